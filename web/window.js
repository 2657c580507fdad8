/**
 * The window of a cache as a strip, and what it takes: a plain element. It knows neither the node nor the server.
 *
 * @typedef {{ limit: number | null, sink: number, memory: number[], kept: [number, number], writing: [number, number], frames: number,
 *   bytes: number, free: number }} Window see nodes/live/runs.py
 */
import { element, t, WRONG } from "./comfy.js"

const CELLS = 96 // latent frames of which each is drawn; of more, only how long they are
const STYLE = `
.rkv-window { display: flex; flex-direction: column; gap: 3px; font: 11px sans-serif; color: var(--input-text, #ddd); user-select: text }
.rkv-window .strip { display: flex; gap: 2px; height: 20px; flex: none }
.rkv-window .strip div { min-width: 4px; border-radius: 3px; background-clip: padding-box }
.rkv-window .sink { --colour: hsl(172 45% 42%) }
.rkv-window .memory { --colour: hsl(262 38% 58%) }
.rkv-window .kept { --colour: hsl(205 42% 50%) }
.rkv-window .writing { --colour: hsl(28 75% 55%) }
.rkv-window .strip div, .rkv-window .dot { background: var(--colour) }
.rkv-window .strip .cells { background: repeating-linear-gradient(90deg, var(--colour) 0 calc(100% / var(--count) - 1px), transparent 0 calc(100% / var(--count))) }
.rkv-window .strip .left { flex: 0 0 26px; background: none; border: 1px dashed var(--border-color, #4e4e4e); box-sizing: border-box; text-align: center; line-height: 18px; font-size: 9px; color: var(--descrip-text, #999) }
.rkv-window .strip .left.none { display: none }
.rkv-window .legend { display: flex; flex-wrap: wrap; gap: 0 10px; color: var(--descrip-text, #999); line-height: 14px }
.rkv-window .dot { display: inline-block; width: 8px; height: 8px; border-radius: 2px; margin-right: 4px }
.rkv-window .dot.left { background: none; border: 1px dashed var(--descrip-text, #999); box-sizing: border-box }
.rkv-window .room { height: 6px; border-radius: 3px; background: var(--comfy-input-bg, #222); display: flex; overflow: hidden; flex: none }
.rkv-window .room div { border-right: 1px solid var(--comfy-menu-bg, #353535); min-width: 1px; background: hsl(205 42% 50%) }
.rkv-window .room.over div { background: var(--error-text, #ff4444) }
.rkv-window .said { color: var(--descrip-text, #999); line-height: 14px }
.rkv-window .warn { color: ${WRONG}; line-height: 14px }`
document.head.append(element("style", {}, STYLE))

/** Bytes for people. @param {number} bytes */
export function size(bytes) {
  const [unit, name] = bytes < 2 ** 20 ? [2 ** 10, "KiB"] : bytes < 2 ** 30 ? [2 ** 20, "MiB"] : [2 ** 30, "GiB"]
  const value = bytes / unit
  return `${value.toFixed(value < 10 ? 1 : 0)} ${name}`
}

/**
 * The parts of a window in the order of time, each with how many latent frames it has.
 * @param {Window} window
 * @returns {["sink" | "left" | "memory" | "kept" | "writing", number][]}
 */
export function partsOf({ sink, memory, kept: [first, end], writing: [begin, total] }) {
  const left = Math.max(first - sink - memory.filter(frame => frame >= sink && frame < first).length, 0)
  return [["sink", sink], ["left", left], ["memory", memory.length], ["kept", end - first], ["writing", total - begin]]
}

export class WindowStrip {
  /** @param {() => void} onHeight called when it may want to be higher or lower than before */
  constructor(onHeight) {
    this.onHeight = onHeight
    this.strip = element("div", { class: "strip", role: "img" })
    this.legend = element("div", { class: "legend", "aria-hidden": "true" })
    this.room = element("div", { class: "room", role: "img" })
    this.said = element("div", { class: "said" })
    this.warning = element("div", { class: "warn", role: "alert" })
    this.body = element("div", { class: "rkv-window" }, this.strip, this.legend, this.room, this.said, this.warning)
    this.root = element("div", { style: "overflow: hidden" }, this.body)
    for (const type of ["pointerdown", "mousedown"]) this.root.addEventListener(type, event => event.stopPropagation())
    new ResizeObserver(onHeight).observe(this.body)
  }

  /** Pixels that it wants to be high. */
  get height() {
    return Math.max(this.body.offsetHeight, 14)
  }

  /** Show no window, but a sentence. @param {string} sentence @param {boolean} [wrong] */
  refuse(sentence, wrong = false) {
    for (const part of [this.strip, this.legend, this.room]) part.style.display = "none"
    this.said.textContent = wrong ? "" : sentence
    this.warning.textContent = wrong ? sentence : ""
    this.onHeight()
  }

  /**
   * @param {Window} window
   * @param {string} said what it is the window of
   * @param {{ parts: [string, number][], room: number, warning: string }} [needs] names and bytes of what is needed, how many there
   *   are, and what is wrong with that
   */
  show(window, said, needs) {
    const parts = partsOf(window).filter(([, count]) => count)
    const whole = window.frames <= CELLS || (window.limit ?? Infinity) <= CELLS
    const names = parts.map(([kind, count]) => t("cache.one", { name: t(`cache.names.${kind}`), count }))
    this.strip.style.display = this.legend.style.display = ""
    this.strip.setAttribute("aria-label", t("cache.window", { parts: names.join(", ") }))
    this.strip.replaceChildren(...parts.map(([kind, count], index) => kind === "left"
      ? element("div", { class: "left", title: names[index] }, "…")
      : element("div", { class: `${kind}${whole ? " cells" : ""}`, style: `flex: ${count} ${count} 0; --count: ${count}`, title: names[index] })))
    this.legend.replaceChildren(...parts.map(([kind], index) =>
      element("span", {}, element("span", { class: `dot ${kind}` }), names[index])))
    this.said.textContent = said
    this._needs(needs)
    this.onHeight()
  }

  /** @param {{ parts: [string, number][], room: number, warning: string } | undefined} needs */
  _needs(needs) {
    this.room.style.display = needs ? "" : "none"
    const { parts, room, warning } = needs ?? { parts: [], room: 1, warning: "" }
    const all = Math.max(parts.reduce((sum, [, bytes]) => sum + bytes, 0), room)
    this.room.classList.toggle("over", warning !== "")
    const names = parts.map(([name, bytes]) => `${name} ${size(bytes)}`)
    this.room.setAttribute("aria-label", names.join(", "))
    this.room.title = names.join("\n")
    this.room.replaceChildren(...parts.map(([, bytes]) => element("div", { style: `flex: 0 1 ${(100 * bytes) / all}%` })))
    this.warning.textContent = warning
  }
}
