/**
 * The timeline of a schedule: a block for each prompt, as a plain element. It knows neither the node nor the server: it shows
 * what it is given, and tells what the user makes of it.
 *
 * @import { Grid, Schedule } from "./prompts.js"
 * @typedef {Schedule & { grid: Grid, seconds: number, notes: string[] }} Reading what the server has read; see nodes/live/planning.py
 */
import { element, keepKeys, t, WRONG } from "./comfy.js"
import { appended, beginning, changed, inOneLine, moved, numeral, removed, snapped, split, stepped, write } from "./prompts.js"

const WAYS = ["", "hold", "recache", "flush", "cut", "blend", "slerp"] // of switching; the last two over a number of chunks
const BLEND = 3
const TICKS = [0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400]
const APART = 44 // pixels between two ticks at least
const WIDEST = 30000 // pixels that a browser can still lay out and scroll well
const LEAST = 260 // pixels of a timeline that is not shown yet
const BEHIND = 18 // pixels behind the end
const CLICK = 3 // pixels that a hand may move in a click
/** @type {Record<string, number>} chunks that a key moves a prompt by */
const STEPS = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10 }
const HUES = [172, 28, 262, 205, 330, 88, 46, 230]

const STYLE = `
.rkv-timeline { display: flex; flex-direction: column; gap: 3px; font: 11px sans-serif; color: var(--input-text, #ddd); user-select: none }
.rkv-timeline .bar, .rkv-timeline .group { display: flex; gap: 4px; align-items: center }
.rkv-timeline .bar { flex-wrap: wrap; flex: none }
.rkv-timeline .group { margin-left: auto }
.rkv-timeline select { max-width: 118px }
.rkv-timeline button, .rkv-timeline select, .rkv-timeline input { font: inherit; color: inherit; background: var(--comfy-input-bg, #222);
  border: 1px solid var(--border-color, #4e4e4e); border-radius: 4px; padding: 1px 6px; height: 20px; box-sizing: border-box }
.rkv-timeline button { cursor: pointer }
.rkv-timeline button:hover:enabled, .rkv-timeline [aria-pressed=true] { border-color: var(--input-text, #ddd) }
.rkv-timeline :disabled { opacity: .4; cursor: default }
.rkv-timeline input.chunks { width: 44px; padding: 1px 3px }
.rkv-timeline :focus-visible { outline: 2px solid var(--p-primary-color, #4aa39c); outline-offset: -1px }
.rkv-timeline .view { overflow: auto hidden; background: var(--comfy-input-bg, #222); border-radius: 4px; scrollbar-width: thin; flex: none }
.rkv-timeline .track { position: relative; height: 60px }
.rkv-timeline .ruler span { position: absolute; top: 1px; padding-left: 3px; font-size: 9px; color: var(--descrip-text, #999); border-left: 1px solid var(--border-color, #4e4e4e); height: 12px; white-space: nowrap }
.rkv-timeline .chunks-of { position: absolute; inset: 14px 0 0 0; pointer-events: none; opacity: .55 }
.rkv-timeline .block { position: absolute; top: 15px; height: 40px; box-sizing: border-box; border-radius: 4px; padding: 3px 5px; overflow: hidden; cursor: grab; touch-action: none;
  background: hsl(var(--hue) 38% 45% / .38); border: 1px solid hsl(var(--hue) 38% 45% / .9); border-left-width: 3px }
.rkv-timeline .block.first { cursor: pointer }
.rkv-timeline .block.chosen { background: hsl(var(--hue) 42% 45% / .62) }
.rkv-timeline .block.out { opacity: .4; border-style: dashed }
.rkv-timeline .block div { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; line-height: 16px }
.rkv-timeline .block .way { font-size: 9px; opacity: .8; line-height: 14px }
.rkv-timeline .end { position: absolute; top: 14px; bottom: 0; width: 12px; margin-left: -6px; cursor: ew-resize; touch-action: none }
.rkv-timeline .end::after { content: ""; position: absolute; left: 5px; top: 0; bottom: 2px; border-left: 2px solid var(--input-text, #ddd) }
.rkv-timeline .end::before { content: ""; position: absolute; left: 1px; top: 0; border: 5px solid transparent; border-top-color: var(--input-text, #ddd) }
.rkv-timeline .playhead { position: absolute; top: 0; bottom: 0; border-left: 2px solid var(--p-primary-color, #4aa39c); pointer-events: none }
.rkv-timeline input.text { position: absolute; top: 15px; height: 40px; z-index: 2; padding: 2px 6px; user-select: text }
.rkv-timeline .said { color: var(--descrip-text, #999); line-height: 14px; user-select: text; overflow: hidden auto; max-height: 70px; flex: none }
.rkv-timeline .said.wrong { color: ${WRONG} }`
document.head.append(element("style", {}, STYLE))

export class Timeline {
  /**
   * @param {(schedule: Schedule) => void} onEdit called with what the user has made of the schedule
   * @param {() => void} onHeight called when it wants to be higher or lower than before
   */
  constructor(onEdit, onHeight) {
    this.onEdit = onEdit
    this.onHeight = onHeight
    /** @type {Reading | null} */
    this.reading = null
    this.chosen = 0
    this.zoom = 1 // times as wide as it is when all of it is seen
    /** @type {number | null} */
    this.playhead = null
    /** @type {HTMLElement[]} */
    this.blocks = []
    const button = (/** @type {string} */ key, /** @type {() => void} */ onclick) =>
      element("button", { type: "button", title: t(`schedule.${key}Tip`), onclick }, t(`schedule.${key}`))
    this.buttons = {
      add: button("add", () => this._add()),
      split: button("split", () => this._edit(split(this._schedule, this.chosen, this._until, this._grid), this.chosen + 1)),
      remove: button("remove", () => this._remove(this.chosen)),
      end: button("end", () => this._toggleEnd()),
    }
    this.way = element("select", { "aria-label": t("schedule.way"), title: t("schedule.way"), onchange: () => this._setWay(this.way.value) },
      ...WAYS.map(way => element("option", { value: way }, t(`schedule.ways.${way || "own"}`))))
    this.over = element("input", { type: "number", class: "chunks", min: 2, max: 100, "aria-label": t("schedule.chunks"), title: t("schedule.chunks"),
      onchange: () => this._setWay(this.way.value) })
    const zoom = (/** @type {string} */ key, /** @type {string} */ sign, /** @type {number} */ times) =>
      element("button", { type: "button", title: t(`schedule.${key}`), "aria-label": t(`schedule.${key}`), onclick: () => this._zoom(times) }, sign)
    this.bar = element("div", { class: "bar", role: "toolbar", "aria-label": t("schedule.tools") }, this.buttons.add, this.buttons.split,
      this.buttons.remove, this.way, this.over,
      element("div", { class: "group" }, this.buttons.end, zoom("closer", "+", 2), zoom("farther", "−", 0.5), zoom("fit", "⤢", 0)))
    this.ruler = element("div", { class: "ruler", "aria-hidden": "true" })
    this.lines = element("div", { class: "chunks-of" })
    this.mark = element("div", { class: "playhead" })
    this.end = element("div", { class: "end", tabindex: 0, role: "slider", "aria-label": t("schedule.endLabel"), title: t("schedule.endLabel") })
    this.track = element("div", { class: "track", role: "group", "aria-label": t("schedule.timeline") }, this.lines, this.ruler, this.end, this.mark)
    this.view = element("div", { class: "view" }, this.track)
    this.said = element("div", { class: "said", role: "status" })
    this.root = element("div", { class: "rkv-timeline" }, this.bar, this.view, this.said)
    this._grab(this.end, () => this.blocks.length)
    for (const type of ["pointerdown", "mousedown", "dblclick", "contextmenu"]) this.root.addEventListener(type, event => event.stopPropagation())
    for (const control of [this.way, this.over]) keepKeys(control)
    new ResizeObserver(() => this._draw()).observe(this.view)
    const wrapped = new ResizeObserver(() => this.onHeight())
    for (const part of [this.bar, this.said]) wrapped.observe(part)
  }

  /** Pixels that it wants to be high. */
  get height() {
    return this.bar.offsetHeight + this.view.offsetHeight + (this.said.textContent ? this.said.offsetHeight + 3 : 0) + 4
  }

  /** Show what the server has read. @param {Reading} reading @param {string[]} [notes] what else is to be said */
  show(reading, notes = []) {
    this.reading = reading
    this.chosen = Math.min(this.chosen, reading.segments.length - 1)
    this._say([...notes, ...reading.notes].join(" "), false)
    this._draw()
  }

  /** Show no schedule, but why there is none. @param {string} sentence @param {boolean} [wrong] */
  refuse(sentence, wrong = true) {
    this.reading = null
    this._say(sentence, wrong)
    this._draw()
  }

  /** Show how far a run is. @param {number | null} seconds */
  play(seconds) {
    this.playhead = seconds
    this._drawPlayhead()
  }

  get _schedule() {
    return /** @type {Reading} */ (this.reading)
  }

  get _grid() {
    return this._schedule.grid
  }

  /** Seconds that are shown: to the end, or as long as the server has it. */
  get _until() {
    const { segments, end, seconds } = this._schedule
    return end ?? Math.max(seconds, stepped(this._grid, segments[segments.length - 1].time, 1))
  }

  /** Pixels of a second. */
  get _scale() {
    const width = Math.max(this.view.clientWidth, LEAST) - BEHIND
    return Math.min(width * this.zoom, WIDEST) / this._until
  }

  /* ---- drawing ---- */

  _draw() {
    const shown = this.reading !== null
    for (const control of this.bar.querySelectorAll("button, select, input")) control.toggleAttribute("disabled", !shown)
    this.over.hidden = true
    this.track.style.visibility = shown ? "visible" : "hidden"
    this.end.hidden = !shown || this._schedule.end === null
    this.buttons.end.setAttribute("aria-pressed", String(!this.end.hidden))
    const count = shown ? this._schedule.segments.length : 0
    while (this.blocks.length > count) this.blocks.pop()?.remove()
    while (this.blocks.length < count) this.blocks.push(this._block(this.blocks.length))
    this._drawPlayhead()
    if (!shown) return void this.onHeight()
    const scale = this._scale, until = this._until
    this.track.style.width = `${until * scale + BEHIND - 1}px`
    this._drawRuler(scale, until)
    this.blocks.forEach((_, index) => this._drawBlock(index, scale))
    if (this._schedule.end !== null) {
      this.end.style.left = `${this._schedule.end * scale}px`
      this._value(this.end, this._schedule.end, t("schedule.at", { time: numeral(this._schedule.end) }))
    }
    const prompt = this._schedule.segments[this.chosen], [way, over] = prompt.how.split(" ")
    this.way.value = way
    this.over.hidden = over === undefined
    this.over.value = over ?? String(BLEND)
    this.buttons.remove.disabled = count < 2
    this.onHeight()
  }

  /** @param {number} scale @param {number} until */
  _drawRuler(scale, until) {
    const step = TICKS.find(seconds => seconds * scale >= APART) ?? TICKS[TICKS.length - 1]
    const ticks = Array.from({ length: Math.floor(until / step) + 1 }, (_, number) => number * step)
    this.ruler.replaceChildren(...ticks.map(time => element("span", { style: `left: ${time * scale}px` }, clock(time))))
    const chunk = (this._grid[this._grid.length - 1] - this._grid[this._grid.length - 2]) * scale
    const line = "linear-gradient(90deg, var(--border-color, #4e4e4e) 1px, transparent 1px)"
    this.lines.style.background = chunk >= 4 ? `${line} ${this._grid[1] * scale}px 0 / ${chunk}px 100%` : "none"
  }

  /** @param {number} index */
  _block(index) {
    const block = element("div", { class: "block", tabindex: 0, role: "slider", "aria-description": t("schedule.keys") },
      element("div", { class: "words" }), element("div", { class: "way" }))
    block.addEventListener("focus", () => this._choose(index))
    block.addEventListener("dblclick", () => this._write(index))
    this._grab(block, () => index)
    this.track.insertBefore(block, this.end)
    return block
  }

  /** @param {number} index @param {number} scale */
  _drawBlock(index, scale) {
    const block = this.blocks[index], { segments } = this._schedule, { text, time, how } = segments[index]
    const next = segments[index + 1]?.time ?? this._until, begins = beginning(this._grid, time)
    const skipped = index + 1 < segments.length && beginning(this._grid, next) <= begins
    const same = segments.findIndex(prompt => prompt.text === text)
    block.style.left = `${time * scale}px`
    block.style.width = `${Math.max((next - time) * scale - 1, 6)}px`
    block.style.setProperty("--hue", String(HUES[same % HUES.length]))
    block.className = `block${index ? "" : " first"}${index === this.chosen ? " chosen" : ""}${skipped ? " out" : ""}`
    const [words, way] = block.children
    words.textContent = text
    way.textContent = [`${numeral(time)} s`, how].filter(Boolean).join(" · ")
    const where = begins === time ? t("schedule.at", { time: numeral(time) }) : t("schedule.between", { time: numeral(time), begins: numeral(begins) })
    const [kind, over] = how.split(" ")
    const said = [where, t(`schedule.ways.${kind || "own"}`) + (over ? ` ${over}` : "")].join(", ")
    block.title = `${text}\n${said}`
    block.setAttribute("aria-label", t("schedule.prompt", { number: index + 1, count: segments.length, text }))
    this._value(block, time, said)
  }

  /** @param {HTMLElement} slider @param {number} time @param {string} text */
  _value(slider, time, text) {
    const values = { min: 0, max: Math.ceil(this._until), now: time, text }
    for (const [name, value] of Object.entries(values)) slider.setAttribute(`aria-value${name}`, String(value))
  }

  _drawPlayhead() {
    this.mark.hidden = this.playhead === null || this.reading === null
    if (!this.mark.hidden) this.mark.style.left = `${Math.min(Number(this.playhead), this._until) * this._scale}px`
  }

  /** @param {string} text @param {boolean} wrong */
  _say(text, wrong) {
    if (this.said.textContent !== text) this.said.textContent = text
    this.said.classList.toggle("wrong", wrong)
  }

  /* ---- editing ---- */

  /** @param {Schedule} schedule @param {number} [chosen] the prompt that is chosen then */
  _edit(schedule, chosen = this.chosen) {
    const { segments, end } = this._schedule
    if (schedule.segments === segments && schedule.end === end) return
    const behind = schedule.segments[schedule.segments.length - 1].time
    this.reading = { ...this._schedule, ...schedule, seconds: Math.max(this._schedule.seconds, stepped(this._grid, behind, 1)) }
    this.chosen = Math.max(Math.min(chosen, schedule.segments.length - 1), 0)
    this._draw()
    this.onEdit(schedule)
  }

  /** @param {number} index */
  _choose(index) {
    if (index === this.chosen || !this.reading) return
    this.chosen = index
    this._draw()
  }

  _add() {
    const { segments } = this._schedule
    this._edit(appended(this._schedule, segments[segments.length - 1].text, this._grid), segments.length)
    this._write(this.chosen)
  }

  /** @param {number} index */
  _remove(index) {
    this._edit(removed(this._schedule, index), index && index - 1)
    this.blocks[this.chosen].focus()
  }

  _toggleEnd() {
    const { segments, end } = this._schedule
    this._edit({ segments, end: end === null ? snapped(this._grid, this._until) : null })
  }

  /** @param {string} way */
  _setWay(way) {
    const chunks = Math.min(Math.max(Math.round(Number(this.over.value)) || BLEND, 2), 100)
    this._edit(changed(this._schedule, this.chosen, { how: way === "blend" || way === "slerp" ? `${way} ${chunks}` : way }))
  }

  /** @param {number} times 0 shows all of it */
  _zoom(times) {
    const middle = (this.view.scrollLeft + this.view.clientWidth / 2) / this.track.offsetWidth
    this.zoom = times ? Math.max(this.zoom * times, 1) : 1
    this._draw()
    this.view.scrollLeft = middle * this.track.offsetWidth - this.view.clientWidth / 2
  }

  /** Let the user write a prompt where its block is. @param {number} index */
  _write(index) {
    const block = this.blocks[index], before = this._schedule.segments[index].text
    const room = Math.max(this.view.scrollLeft + this.view.clientWidth - block.offsetLeft, 160)
    const left = Math.max(Math.min(block.offsetLeft, this.track.offsetWidth - 160), 0)
    const input = element("input", { class: "text", type: "text", value: before, maxlength: 10000, "aria-label": t("schedule.text"),
      style: `left: ${left}px; width: ${Math.min(Math.max(block.offsetWidth, 240), room)}px` })
    let open = true
    const close = (/** @type {boolean} */ keep) => {
      if (!open) return
      open = false
      const text = inOneLine(input.value)
      input.remove()
      if (keep && text && text !== before && this.reading) this._edit(changed(this._schedule, index, { text }), index)
    }
    input.addEventListener("keydown", event => {
      if (event.isComposing || (event.key !== "Enter" && event.key !== "Escape")) return
      close(event.key === "Enter")
      this.blocks[index]?.focus()
    })
    input.addEventListener("blur", () => close(true))
    this.track.append(keepKeys(input))
    input.focus()
    input.select()
  }

  /** Let a block or the end be dragged, and moved with keys. @param {HTMLElement} handle @param {() => number} number */
  _grab(handle, number) {
    handle.addEventListener("pointerdown", event => {
      if (event.button || !this.reading) return
      this.track.querySelector("input")?.blur() // what is being written there comes first
      const index = number(), before = write(this._schedule), time = this._schedule.segments[index]?.time ?? this._schedule.end
      const scale = this._scale * (this.track.getBoundingClientRect().width / this.track.offsetWidth) // the canvas may be zoomed
      const drag = new AbortController()
      handle.setPointerCapture(event.pointerId)
      /** The schedule as the pointer has it: the one that is shown, which the server may have read anew meanwhile. @param {PointerEvent} now */
      const dragged = now => {
        const way = now.clientX - event.clientX
        if (Math.abs(way) < CLICK || write(this._schedule) !== before) return this._schedule
        return moved(this._schedule, index, Number(time) + way / scale, this._grid)
      }
      /** @param {PointerEvent} move */
      const follow = move => {
        if (!this.reading) return
        const shown = this.reading, now = this._scale, there = dragged(move)
        this.reading = { ...shown, ...there }
        this.blocks.forEach((_, at) => this._drawBlock(at, now))
        if (there.end !== null) this.end.style.left = `${there.end * now}px`
        this.reading = shown
      }
      /** @param {PointerEvent} up */
      const drop = up => {
        drag.abort()
        if (this.reading && up.type === "pointerup") this._edit(dragged(up))
        this._draw()
      }
      const { signal } = drag
      handle.addEventListener("pointermove", follow, { signal })
      handle.addEventListener("pointerup", drop, { signal })
      handle.addEventListener("pointercancel", drop, { signal })
    })
    handle.addEventListener("keydown", event => {
      const step = STEPS[event.key]
      const index = number(), isEnd = handle === this.end
      if (!this.reading || event.ctrlKey || event.metaKey || event.altKey) return
      if (step) {
        const time = isEnd ? Number(this._schedule.end) : this._schedule.segments[index].time
        this._edit(moved(this._schedule, index, stepped(this._grid, time, step), this._grid))
      } else if (event.key === "Delete" || event.key === "Backspace") {
        if (isEnd) this._toggleEnd()
        else this._remove(index)
      } else if (event.key === "Enter" && !isEnd) {
        this._write(index)
      } else {
        return
      }
      event.preventDefault()
      event.stopPropagation()
    })
  }
}

/** A time as a ruler has it: "2.5", "1:05". @param {number} seconds */
function clock(seconds) {
  if (seconds < 60) return String(seconds)
  const parts = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, Math.floor(seconds % 60)].slice(seconds < 3600 ? 1 : 0)
  return parts.map((part, place) => (place ? String(part).padStart(2, "0") : part)).join(":")
}
