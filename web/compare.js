// Plays the two videos of Compare Videos in step: over each other with a wipe, or side by side.
/** @import { ComfyNode } from "./comfy.d.ts" */
import { addView, address, element, extend, keepKeys, onOutputs, redraw, removeView, t } from "./comfy.js"

/**
 * What the server tells of a video.
 * @typedef {{ name: string, filename: string, subfolder: string, type: string, width: number, height: number, frames: number, fps: number }} Film
 */

const WIDGET = "compared"
const CONTROLS = 66 // height in pixels of what stands below the pictures
/** The files that each node shows. @type {WeakMap<ComfyNode, string>} */
const SHOWN = new WeakMap()
const KEPT = new Set(["pointerdown", "pointermove", "pointerup", "mousedown", "touchstart", "dblclick", "contextmenu"])

/** The second in the middle of a frame, where every browser shows that one. @param {number} frame @param {number} fps */
const middleOf = (frame, fps) => (frame + 0.5) / fps

/** @param {number} seconds */
const clock = seconds => `${Math.floor(seconds / 60)}:${(seconds % 60).toFixed(2).padStart(5, "0")}`

/** @param {Film} film */
function videoOf(film) {
  const query = new URLSearchParams({ filename: film.filename, subfolder: film.subfolder, type: film.type })
  const video = element("video", {
    src: address(`/view?${query}`), preload: "auto", playsinline: true, tabindex: -1, "aria-label": film.name,
    style: "width: 100%; height: 100%; object-fit: contain; display: block; pointer-events: none",
  })
  video.muted = true
  return video
}

/** @param {string} text @param {string} side "left" or "right" */
const corner = (text, side) => element("span", {
  style: `position: absolute; ${side}: 6px; top: 6px; padding: 1px 6px; border-radius: 4px; font: 11px sans-serif; color: #fff;`
    + " background: rgba(0, 0, 0, .55); pointer-events: none; max-width: 45%; overflow: hidden; text-overflow: ellipsis; white-space: nowrap",
}, text)

/** @param {string} sign @param {string} label @param {() => void} onclick */
const button = (sign, label, onclick) => element("button", {
  type: "button", title: label, "aria-label": label, onclick,
  style: "min-width: 28px; height: 24px; padding: 0 4px; border: 1px solid var(--border-color); border-radius: 4px; cursor: pointer;"
    + " color: var(--input-text); background: var(--comfy-input-bg); font: 12px sans-serif",
}, sign)

/** @param {string} label @param {number} most @param {number} step @param {(value: number) => void} change */
function slider(label, most, step, change) {
  const made = element("input", {
    type: "range", min: 0, max: most, step, value: 0, "aria-label": label, style: "flex: 1; min-width: 0; margin: 0",
    oninput: () => change(Number(made.value)),
  })
  return made
}

/**
 * Two videos and what moves them.
 * @param {Film[]} films two of them
 * @param {() => void} resized called when the pictures want another height
 */
function comparison(films, resized) {
  const [first, second] = films.map(videoOf), videos = [first, second]
  const [one, two] = films.map(film => film.frames / film.fps), lead = one >= two ? 0 : 1
  const fps = films[lead].fps, frames = films[lead].frames
  let beside = false

  const layers = [second, first].map(video => element("div", { style: "position: absolute; inset: 0" }, video))
  const [under, over] = layers
  const line = element("div", {
    style: "position: absolute; top: 0; bottom: 0; width: 2px; margin-left: -1px; background: #fff; box-shadow: 0 0 3px #000; pointer-events: none",
  })
  const stage = element("div", {
    style: "position: relative; width: 100%; overflow: hidden; background: #000; border-radius: 4px; touch-action: none; cursor: ew-resize",
  }, ...layers, line, corner(films[0].name, "left"), corner(films[1].name, "right"))

  const wipe = slider(t("compare.wipe"), 100, 0.5, show)
  const seek = slider(t("compare.seek"), Math.max(frames - 1, 1), 1, frame => { pause(); go(frame) })
  const time = element("span", { style: "font: 11px monospace; white-space: nowrap", "aria-live": "off" })
  const play = button("▶", t("compare.play"), () => (videos[lead].paused ? start() : pause()))
  const layout = button("◫", t("compare.beside"), () => arrange(!beside))
  const row = "display: flex; align-items: center; gap: 4px; height: 30px"
  const root = keepKeys(element("div", {
    role: "group", "aria-label": t("compare.label", { first: films[0].name, second: films[1].name }),
    style: "width: 100%; box-sizing: border-box; color: var(--input-text)", onkeydown: keys,
  },
  stage,
  element("div", { style: row }, layout, wipe),
  element("div", { style: row },
    button("◀", t("compare.back"), () => step(-1)), play, button("▶|", t("compare.forward"), () => step(1)), seek, time)))

  /** @param {number} percent of the first video that is seen */
  function show(percent) {
    wipe.value = String(percent)
    wipe.setAttribute("aria-valuetext", t("compare.share", { percent: Math.round(percent) }))
    over.style.clipPath = beside ? "" : `inset(0 ${100 - percent}% 0 0)`
    line.style.left = `${percent}%`
  }

  /** @param {boolean} sides */
  function arrange(sides) {
    beside = sides
    const height = Math.max(...films.map(film => film.height / film.width))
    stage.style.aspectRatio = String((beside ? 2 : 1) / height)
    over.style.right = under.style.left = beside ? "50%" : "0"
    line.style.display = beside ? "none" : ""
    wipe.disabled = beside
    layout.setAttribute("aria-pressed", String(beside))
    show(Number(wipe.value))
    resized()
  }

  const frame = () => Math.min(Math.floor(videos[lead].currentTime * fps + 0.01), frames - 1)

  function tell() {
    seek.value = String(frame())
    seek.setAttribute("aria-valuetext", clock(frame() / fps))
    time.textContent = `${clock(frame() / fps)} · ${frame() + 1}/${frames}`
  }

  /** Show a frame of the longer video, and what the other one has then: its last one, where it is over. @param {number} number */
  function go(number) {
    const at = middleOf(Math.min(Math.max(number, 0), frames - 1), fps)
    videos.forEach((video, index) => {
      video.currentTime = Math.min(at, middleOf(films[index].frames - 1, films[index].fps))
    })
    tell()
  }

  /** @param {number} by frames */
  function step(by) {
    pause()
    go(frame() + by)
  }

  function start() {
    if (frame() >= frames - 1) go(0)
    videos[lead].play().catch(() => {})
    requestAnimationFrame(tick)
  }

  function pause() {
    for (const video of videos) video.pause()
  }

  /** Let the files go: a video that is shown no more holds a connection to the server otherwise, of which a page has few. */
  function stop() {
    pause()
    for (const video of videos) {
      video.removeAttribute("src")
      video.load()
    }
  }

  /** Keep the other video in step; where it is over, played again it would begin anew. */
  function tick() {
    if (videos[lead].paused) return
    const at = videos[lead].currentTime, other = videos[1 - lead], film = films[1 - lead]
    if (at >= middleOf(film.frames - 1, film.fps)) other.pause()
    else {
      if (other.paused) other.play().catch(() => {})
      if (Math.abs(other.currentTime - at) > 1.5 / film.fps) other.currentTime = at
    }
    tell()
    requestAnimationFrame(tick)
  }

  /** @param {KeyboardEvent} event */
  function keys(event) {
    const onSlider = event.target === seek || event.target === wipe, onButton = event.target instanceof HTMLButtonElement
    if (event.key === " " && !onButton) play.click()
    else if (!onSlider && event.key === "ArrowLeft") step(-1)
    else if (!onSlider && event.key === "ArrowRight") step(1)
    else return
    event.preventDefault()
  }

  /** @param {PointerEvent} event */
  function drag(event) {
    if (beside) return
    if (event.type === "pointerdown") stage.setPointerCapture(event.pointerId)
    if (!stage.hasPointerCapture(event.pointerId)) return
    const { left, width } = stage.getBoundingClientRect()
    show(Math.min(Math.max((event.clientX - left) / width * 100, 0), 100))
  }

  for (const type of KEPT) root.addEventListener(type, event => event.stopPropagation())
  stage.addEventListener("pointerdown", drag)
  stage.addEventListener("pointermove", drag)
  for (const type of ["play", "pause"])
    videos[lead].addEventListener(type, () => {
      const playing = !videos[lead].paused
      play.textContent = playing ? "❚❚" : "▶"
      for (const name of ["title", "aria-label"]) play.setAttribute(name, playing ? t("compare.pause") : t("compare.play"))
    })
  videos[lead].addEventListener("seeked", tell)
  videos[lead].addEventListener("ended", () => { go(0); start() })
  for (const [index, video] of videos.entries())
    video.addEventListener("error", () => layers[1 - index].replaceChildren(t("compare.failed")))
  wipe.value = "50"
  arrange(false)
  tell()
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) start()
  return { root, stop, height: (/** @type {number} */ width) => width * Math.max(...films.map(film => film.height / film.width)) / (beside ? 2 : 1) + CONTROLS }
}

/** Show what a run of the node put out, if it did. @param {ComfyNode} node @param {{ compared?: Film[] }} [output] */
function display(node, output) {
  const films = output?.compared
  if (films?.length !== 2) return
  const files = films.map(film => film.filename).join()
  if (SHOWN.get(node) === files) return
  SHOWN.set(node, files)
  removeView(node, WIDGET)
  const named = films.map((film, index) => ({ ...film, name: film.name || (index ? t("compare.second") : t("compare.first")) }))
  const shown = comparison(named, () => redraw(node))
  const widget = addView(node, WIDGET, shown.root, () => shown.height(node.size[0] - 20))
  const removed = widget.onRemove
  widget.onRemove = function () {
    shown.stop()
    removed?.call(this)
  }
}

extend({ name: "RollingKV.Compare", ...onOutputs(["RollingKVCompareVideos"], display) })
