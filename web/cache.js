/**
 * The cache inspector: on Attach Rolling Cache the window that a run will have and what it will take, and while one runs, what it has;
 * on Inspect State the window from which a video goes on.
 *
 * @import { ComfyNode } from "./comfy.d.ts"
 */
import { addView, call, extend, fit, isThere, onEvent, onOutputs, t } from "./comfy.js"
import { WindowStrip, size } from "./window.js"
import { inputsOf, modelOf, samplerOfRun, samplersBehind } from "./wired.js"

const CACHE = "RollingKVAttachCache", STATE = "RollingKVInspectState"
const WAIT = 250 // milliseconds without a change before the server is asked

/** The largest of the samplers that a model goes to; a graph may have several. @param {ComfyNode} node */
function samplerOf(node) {
  const area = (/** @type {any} */ inputs) => Number(inputs.width) * Number(inputs.height) || 0
  return samplersBehind(node).map(inputsOf).sort((one, other) => area(other) - area(one))[0] ?? null
}

class Inspector {
  /** @param {ComfyNode} node */
  constructor(node) {
    this.node = node
    this.height = 0
    this.asked = ""
    this.strip = new WindowStrip(() => this.fit())
    addView(node, "cache", this.strip.root, () => this.strip.height)
  }

  fit() {
    if (this.strip.height === this.height) return
    this.height = this.strip.height
    fit(this.node)
  }

  /** Ask the server what a run will take, once nothing has changed for a moment. */
  ask() {
    clearTimeout(this.waiting)
    this.waiting = setTimeout(() => this.answer(), WAIT)
  }

  async answer() {
    if (!isThere(this.node)) return
    const model = modelOf(this.node), asked = JSON.stringify([model, samplerOf(this.node)])
    if (asked === this.asked) return
    this.asked = asked
    if (!model) return this.strip.refuse(t("cache.unknown"))
    const [plan, wrong] = await call("plan", { model, sampler: samplerOf(this.node) }).then(said => [said, ""], error => [null, error.message])
    if (asked !== this.asked) return // something has changed meanwhile
    if (!plan) this.strip.refuse(wrong, true)
    else if (plan.window) this.plan(plan)
  }

  /** @param {any} plan see nodes/live/planning.py */
  plan({ window, parts, device, needed, free, host_free, fits, remedies, preset, size: [width, height], seconds }) {
    const named = ["weights", "cache", "prompts", "passes"].map(name => /** @type {[string, number]} */ ([t(`cache.parts.${name}`), parts[name]]))
    const planned = t("cache.planned", { width, height, seconds: Number(seconds.toFixed(2)), preset })
    const bytes = [t("cache.needs", { needed: size(needed), free: size(free), device })]
    if (host_free !== null) bytes.push(t("cache.beside", { bytes: size(parts.host) }))
    this.strip.show(window, `${planned}: ${bytes.join(", ")}`, {
      parts: named,
      room: free,
      warning: fits ? "" : t("cache.tooLarge", { remedies: remedies.join(", ") }),
    })
  }

  /** @param {any} run as `rolling_kv.chunk` tells of it */
  run({ window, status }) {
    if (!window) return
    const goes = status === "running" || status === "paused"
    const values = { frames: window.frames, bytes: size(window.bytes), free: size(window.free) }
    this.strip.show(window, goes ? t("cache.running", values) : t("cache.ended", values))
    this.asked = "" // what it will take is shown again with the next change
  }
}

/** @type {Map<ComfyNode, Inspector>} */
const inspectors = new Map()

function askAll() {
  for (const [node, inspector] of inspectors) {
    if (isThere(node)) inspector.ask()
    else inspectors.delete(node)
  }
}

/** Show what Inspect State has put out of the window, if it has. @param {ComfyNode} node @param {any} output */
function state(node, output) {
  const window = output?.window?.[0]
  if (!window) return
  const known = states.get(node) ?? new Inspector(node)
  states.set(node, known)
  known.strip.show(window, t("cache.state", { frames: window.frames, bytes: size(window.bytes), free: size(window.free) }))
}

/** @type {WeakMap<ComfyNode, Inspector>} */
const states = new WeakMap()

extend({
  name: "RollingKV.Cache",
  nodeCreated(node) {
    if (node.comfyClass !== CACHE) return
    inspectors.set(node, new Inspector(node))
    inspectors.get(node)?.ask()
  },
  afterConfigureGraph: askAll,
})
extend({ name: "RollingKV.CacheState", ...onOutputs([STATE], state) })
onEvent("graphChanged", askAll)
for (const event of ["rolling_kv.chunk", "rolling_kv.run"])
  onEvent(event, run => {
    const sampler = samplerOfRun(run)
    for (const [node, inspector] of inspectors) if (sampler && samplersBehind(node).includes(sampler)) inspector.run(run)
  })
