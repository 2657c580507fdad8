/**
 * The schedule editor: a timeline below the text of Prompt Schedule. The text is all that counts, and all that is saved; the timeline
 * shows what the server reads in it, and writes it anew when the user changes something there.
 *
 * @import { ComfyNode } from "./comfy.d.ts"
 * @import { Schedule } from "./prompts.js"
 */
import { addView, call, extend, fit, isThere, onEvent, onValue, setValue, source, t, valueOf } from "./comfy.js"
import { numeral, write } from "./prompts.js"
import { Timeline } from "./timeline.js"
import { inputsOf, modelBefore, samplerOfRun, samplersOf } from "./wired.js"

const NODE = "RollingKVPromptSchedule"
const WAIT = 150 // milliseconds without a change before the server is asked

/** What a node's timeline asks the server. @param {ComfyNode} node */
function question(node) {
  const [sampler] = samplersOf(node)
  const model = modelBefore(node) ?? (sampler ? modelBefore(sampler) : null)
  return { text: valueOf(node, "text"), model, sampler: sampler ? inputsOf(sampler) : null }
}

class Editor {
  /** @param {ComfyNode} node */
  constructor(node) {
    this.node = node
    this.timeline = new Timeline(schedule => this.write(schedule), () => this.fit())
    this.asked = "" // what the timeline shows the answer to, or is about to
    this.shown = "" // the text that the timeline shows
    this.height = 0
    addView(node, "timeline", this.timeline.root, () => this.timeline.height)
    onValue(node, "text", () => {
      this.asked = "" // an answer that is on its way is about an older text
      this.ask()
    })
    this.ask()
  }

  /** Write what the user has made of the text that is shown. One that has been typed since stays, and is shown next. @param {Schedule} schedule */
  write(schedule) {
    if (valueOf(this.node, "text") !== this.shown) return this.ask()
    this.shown = write(schedule)
    setValue(this.node, "text", this.shown)
  }

  /** Ask the server what the text says, once nothing has changed for a moment. */
  ask() {
    clearTimeout(this.waiting)
    this.waiting = setTimeout(() => this.answer(), WAIT)
  }

  async answer() {
    if (!isThere(this.node)) return
    if (source(this.node, "text")) return this.timeline.refuse(t("schedule.linked"), false)
    const body = question(this.node), asked = JSON.stringify(body)
    if (asked === this.asked) return
    this.asked = asked
    const [said, wrong] = await call("schedule", body).then(read => [read, ""], error => [null, error.message])
    if (asked !== this.asked) return // something has changed meanwhile
    if (said?.segments) this.show(body.text, said)
    else if (body.model) await this.withoutModel(body, asked, wrong)
    else this.timeline.refuse(wrong)
  }

  /** A model that cannot be read says nothing about the text: show it with the chunks of most models. @param {any} body @param {string} asked @param {string} wrong */
  async withoutModel(body, asked, wrong) {
    const [said, why] = await call("schedule", { ...body, model: null }).then(read => [read, ""], error => [null, error.message])
    if (asked !== this.asked) return
    if (said?.segments) this.show(body.text, said, [wrong])
    else this.timeline.refuse(why)
  }

  /** @param {string} text @param {any} said what the server has read in it @param {string[]} [notes] */
  show(text, said, notes = []) {
    this.shown = text
    this.timeline.show(said, [...notes, ...this.notes(said)])
  }

  /** @param {any} said @returns {string[]} */
  notes(said) {
    const chunk = numeral(said.grid.at(-1) - said.grid.at(-2))
    const grid = said.preset ? t("schedule.grid", { chunk, preset: said.preset }) : t("schedule.anyGrid", { chunk })
    return said.is_canonical ? [grid] : [grid, t("schedule.otherForm")]
  }

  fit() {
    const height = this.timeline.height
    if (height === this.height) return
    this.height = height
    fit(this.node)
  }
}

/** @type {Map<ComfyNode, Editor>} */
const editors = new Map()

function askAll() {
  for (const [node, editor] of editors) {
    if (isThere(node)) editor.ask()
    else editors.delete(node)
  }
}

extend({
  name: "RollingKV.Schedule",
  nodeCreated(node) {
    if (node.comfyClass === NODE) editors.set(node, new Editor(node))
  },
  afterConfigureGraph: askAll,
})
onEvent("graphChanged", askAll)
onEvent("rolling_kv.chunk", run => {
  const sampler = samplerOfRun(run)
  for (const [node, { timeline }] of editors) {
    if (!sampler || !samplersOf(node).includes(sampler)) continue
    const from = valueOf(node, "count_from") === "sampler" ? 0 : run.first_seconds
    timeline.play(from + run.seconds)
  }
})
onEvent("rolling_kv.run", run => {
  if (run.status === "running" || run.status === "paused") return
  const sampler = samplerOfRun(run)
  for (const [node, { timeline }] of editors) if (sampler && samplersOf(node).includes(sampler)) timeline.play(null)
})
