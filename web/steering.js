/**
 * The prompt line below a video that is being made: what is typed there holds from the next chunk on. And the buttons beside it.
 *
 * @import { Run } from "./live.js"
 */
import { call, copy, element, keepKeys, t, toast, WRONG } from "./comfy.js"

const STYLE = `
.rkv-steering { flex: none; display: flex; flex-direction: column; gap: 4px }
.rkv-steering .row { display: flex; gap: 4px; height: 22px }
.rkv-live :is(input, select, button) { box-sizing: border-box; height: 22px; padding: 0 6px; font: inherit;
  color: var(--input-text); background: var(--comfy-input-bg); border: 1px solid var(--border-color); border-radius: 4px }
.rkv-steering .prompt { flex: 1 1 0; min-width: 0 }
.rkv-steering .chunks { flex: none; width: 44px }
.rkv-steering select { flex: none; max-width: 45% }
.rkv-steering button { flex: 1 1 auto }
.rkv-live button { cursor: pointer; white-space: nowrap; overflow: hidden; text-overflow: ellipsis }
.rkv-live button:hover:enabled { border-color: var(--descrip-text) }
.rkv-live :is(input, select, button):focus-visible { outline: 1px solid var(--input-text); outline-offset: -1px }
.rkv-live :disabled { opacity: .5; cursor: not-allowed }
.rkv-steering .answer { height: 16px; line-height: 16px; overflow: hidden; white-space: nowrap; text-overflow: ellipsis; color: var(--descrip-text) }
.rkv-steering .answer.wrong { color: ${WRONG} }
`
document.head.append(element("style", {}, STYLE))

const ROW = 26, ANSWER = 20 // pixels, with the gap before it
const BLENDS = ["blend", "slerp"] // over a number of chunks
const FEWEST = 2, MOST = 16 // chunks of a blend

/** Whether a run can be steered still. @param {{ status: Run["status"] }} run */
export const isGoing = ({ status }) => status === "running" || status === "paused"

/** A button that gives what a run has done as a schedule. @param {() => Run | undefined} run */
export const copyButton = run => element("button", { type: "button", title: t("live.copyTip"), onclick: async () => {
  if (await copy(run()?.schedule ?? "")) toast("success", t("live.copied"))
  else toast("error", t("live.notCopied"))
} }, t("live.copy"))

export class Steering {
  /** @param {() => void} resized called when it needs another height */
  constructor(resized) {
    this.resized = resized
    this.prompt = element("input", { type: "text", class: "prompt", spellcheck: "false", placeholder: t("live.prompt"),
      "aria-label": t("live.prompt"), onkeydown: (/** @type {KeyboardEvent} */ event) => this.typed(event) })
    this.how = element("select", { "aria-label": t("live.way"), title: t("live.way"), onchange: () => this.choose() })
    this.chunks = element("input", { type: "number", class: "chunks", min: FEWEST, max: MOST, value: 3, hidden: true,
      "aria-label": t("live.blendChunks"), title: t("live.blendChunks") })
    this.pause = element("button", { type: "button", onclick: () => this.ask(this.run?.status === "paused" ? "resume" : "pause") })
    this.stop = element("button", { type: "button", title: t("live.stopTip"), onclick: () => this.ask("stop") }, t("live.stop"))
    this.copied = copyButton(() => this.run)
    this.answer = element("div", { class: "answer", role: "status", hidden: true })
    this.controls = [element("div", { class: "row" }, this.prompt, this.how, this.chunks),
      element("div", { class: "row" }, this.pause, this.stop, this.copied)]
    this.root = keepKeys(element("div", { class: "rkv-steering", hidden: true }, ...this.controls, this.answer))
    /** @type {Run | undefined} */
    this.run = undefined
    this.ways = ""
  }

  /** In pixels. */
  get height() {
    return this.root.hidden ? 0 : 2 * ROW + (this.answer.hidden ? 0 : ANSWER)
  }

  /** @param {Run} run */
  show(run) {
    const before = this.height
    if (run.run !== this.run?.run) {
      this.say("")
      this.stopping = false
    }
    if (run.failure && run.failure !== this.run?.failure) this.say(run.failure, true)
    this.run = run
    this.root.hidden = !isGoing(run)
    this.offer(run)
    for (const control of [this.prompt, this.how, this.chunks]) {
      control.disabled = run.steerable !== ""
      control.title = run.steerable || (control === this.prompt ? t("live.promptTip") : control.getAttribute("aria-label") ?? "")
    }
    this.pause.textContent = run.status === "paused" ? t("live.resume") : t("live.pause")
    this.stop.disabled = this.pause.disabled = this.stopping === true
    this.copied.disabled = !run.schedule
    if (this.height !== before) this.resized()
  }

  /** The ways in which a prompt may come to this run. @param {Run} run */
  offer({ switches }) {
    const ways = [...switches, ...BLENDS], key = ways.join()
    if (key === this.ways) return
    const chosen = this.how.value
    this.ways = key
    this.how.replaceChildren(...ways.map(way => element("option", { value: way }, t(`live.how.${way || "own"}`))))
    this.how.value = ways.includes(chosen) ? chosen : ways[0]
    this.choose()
  }

  choose() {
    this.chunks.hidden = !BLENDS.includes(this.how.value)
  }

  /** @param {KeyboardEvent} event */
  typed(event) {
    if (event.key === "Escape") this.prompt.blur()
    if (event.key !== "Enter" || event.isComposing) return // Enter also ends the choice of a character
    event.preventDefault()
    const prompt = this.prompt.value.trim()
    const how = BLENDS.includes(this.how.value) ? `${this.how.value} ${this.chunks.value}` : this.how.value
    if (prompt) this.ask("prompt", { prompt, how })
  }

  /** @param {"prompt" | "pause" | "resume" | "stop"} action @param {{ prompt?: string, how?: string }} [more] */
  async ask(action, more = {}) {
    const run = this.run?.run
    try {
      const said = await call("steer", { run, action, ...more })
      if (run !== this.run?.run) return
      if (more.prompt) this.heard(more.prompt, said)
      if (action === "stop") {
        this.stopping = this.stop.disabled = this.pause.disabled = true
        this.say(t("live.stopping"))
      }
    } catch (error) {
      if (run === this.run?.run) this.say(/** @type {Error} */ (error).message, true)
    }
  }

  /** @param {string} prompt that was sent @param {{ remark?: string }} said remark: about the prompt's words */
  heard(prompt, { remark = "" }) {
    if (this.prompt.value.trim() === prompt) this.prompt.value = "" // else the next one is being typed
    this.say(`${t("live.heard", { prompt })} ${remark}`.trim())
  }

  /** @param {string} text @param {boolean} [wrong] */
  say(text, wrong = false) {
    const before = this.height
    this.answer.textContent = this.answer.title = text
    this.answer.hidden = !text
    this.answer.classList.toggle("wrong", wrong)
    if (this.height !== before) this.resized()
  }
}
