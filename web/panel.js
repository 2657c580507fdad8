/**
 * What a node shows of its run: the video so far, a line of numbers, while it runs the prompt line, and then its schedule to copy.
 *
 * @import { Run } from "./live.js"
 */
import { address, element, statusOf, t } from "./comfy.js"
import { Player } from "./player.js"
import { copyButton, isGoing, Steering } from "./steering.js"

const STYLE = `
.rkv-live { display: flex; flex-direction: column; gap: 4px; min-height: 0; box-sizing: border-box; font: 11px sans-serif; color: var(--input-text) }
.rkv-live canvas { flex: 1 1 0; min-height: 0; width: 100%; object-fit: contain }
.rkv-live .line { flex: none; display: flex; gap: 4px; align-items: center }
.rkv-live .line button { flex: none }
.rkv-live .numbers { flex: 1 1 0; min-width: 0; height: 16px; line-height: 16px; overflow: hidden; white-space: nowrap; text-overflow: ellipsis;
  font-variant-numeric: tabular-nums; color: var(--descrip-text) }
.rkv-live [hidden] { display: none !important }
`
document.head.append(element("style", {}, STYLE))

const LINE = 20, BUTTON = 26, LEAST = 96 // pixels

/** @param {number} seconds "8.4 s", "2:05" */
const duration = seconds =>
  seconds < 60 ? `${seconds.toFixed(1)} s` : `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`

export class Panel {
  /** @param {() => void} resized called when it needs another height */
  constructor(resized) {
    this.resized = resized
    this.player = new Player(address, statusOf)
    this.numbers = element("div", { class: "numbers" })
    this.steering = new Steering(resized)
    this.copied = copyButton(() => this.run)
    this.copied.hidden = true
    this.root = element("div", { class: "rkv-live" }, this.player.canvas, element("div", { class: "line" }, this.numbers, this.copied),
      this.steering.root)
    /** @type {Run | undefined} */
    this.run = undefined
  }

  /** Whether there is a picture. */
  get plays() {
    return !this.player.canvas.hidden
  }

  /** @param {number} width of the node, in pixels */
  height(width) {
    const [across, down] = this.run?.size ?? [16, 9]
    const picture = this.plays ? Math.max(Math.min((width - 20) * down / across, 360), LEAST) : 0
    return picture + (this.copied.hidden ? LINE : BUTTON) + this.steering.height
  }

  /** @param {Run} run */
  show(run) {
    if (run.run !== this.run?.run) {
      this.player.reset(run.size)
      this.player.canvas.hidden = true
    }
    this.run = run
    run.strips.forEach(strip => this.player.append(strip))
    this.player.canvas.hidden = run.strips.length === 0
    this.player.canvas.setAttribute("aria-label", t("live.picture", { seconds: run.seconds.toFixed(1) }))
    this.numbers.textContent = this.numbers.title = this.describe(run)
    this.copied.hidden = isGoing(run) || !run.schedule // while it goes on, it stands beside the other buttons
    this.steering.show(run)
  }

  /** @param {Run} run */
  describe(run) {
    const { chunk, chunks, seconds, rate, left, status } = run
    const parts = [
      status === "running" ? "" : t(`live.status.${status}`),
      chunks === null ? t("live.chunk", { chunk }) : t("live.chunkOf", { chunk, chunks }),
      t("live.made", { seconds: seconds.toFixed(1) }),
      rate ? t("live.rate", { rate: rate.toFixed(1) }) : "",
      left && status === "running" ? t("live.left", { time: duration(left) }) : "",
    ]
    return parts.filter(Boolean).join(" · ")
  }
}
