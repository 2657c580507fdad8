/**
 * What is being made, on the nodes that make it: Sample Video and Stream Video play the video so far while they run and until their
 * next run, and take prompts meanwhile. In a subgraph, so does the subgraph's node.
 *
 * @import { ComfyNode } from "./comfy.d.ts"
 * @import { Strip } from "./player.js"
 *
 * @typedef {"running" | "paused" | "ended" | "failed" | "cancelled"} Status
 *
 * @typedef {object} Run what the server tells of one execution of a sampler
 * @property {string} run its id
 * @property {string} node
 * @property {string} display_node
 * @property {string | null} [workflow] the id of the workflow that it belongs to
 * @property {Status} status
 * @property {string} steerable why no prompt can be typed in, or ""
 * @property {string} [failure] why the last prompt did not come into the video, or ""
 * @property {string[]} switches how a prompt may come
 * @property {number} chunk how many are made
 * @property {number | null} chunks how many it makes; null until somebody stops it
 * @property {number} first_seconds where in the video it begins
 * @property {number} fps
 * @property {number} frames
 * @property {number} seconds
 * @property {number} rate frames a second of work
 * @property {number | null} left seconds of work
 * @property {string} schedule
 * @property {[number, number]} size width and height of the video
 * @property {Strip[]} strips
 * @property {number} news when something was heard of it last, counted by this page
 *
 * @typedef {Omit<Run, "strips" | "news">} Told a run as the server has it
 */
import {
  addView, call, describeSetting, extend, fit, isElsewhere, isOpen, onEvent, pathTo, setting, withholdPreviews,
} from "./comfy.js"
import { Panel } from "./panel.js"
import { isGoing } from "./steering.js"

const WIDTH = 320 // pixels that a node needs at least, so that all of the prompt line is to be read
const NODES = new Set(["RollingKVSample", "RollingKVStreamVideo"])
const VIEW = "live"
const SIZES = [128, 192, 256, 384, 512, 768]

const KNOWN = 32, STRIPS = 512 // runs, and strips of each

/** The newest run of each node, by workflow and node, in the order in which something was last heard of them. @type {Map<string, Run>} */
const runs = new Map()
/** @type {WeakMap<ComfyNode, Panel>} */
const panels = new WeakMap()
let news = 0 // how often something was heard

/** Where a run is shown: its node, and the subgraph nodes around it. @param {Run} run @returns {ComfyNode[]} */
function nodesOf(run) {
  if (isElsewhere(run.workflow)) return []
  const path = pathTo(run.node)
  if (path.length) return NODES.has(path[path.length - 1].comfyClass ?? "") ? path : []
  return pathTo(run.display_node) // what makes nodes while it runs shows what they do
}

/** @param {ComfyNode} node */
function newPanel(node) {
  const panel = new Panel(() => fit(node, { width: WIDTH }))
  panels.set(node, panel)
  addView(node, VIEW, panel.root, () => panel.height(node.size[0]), Infinity)
  return panel
}

/** @param {Run} run */
function show(run) {
  for (const node of nodesOf(run)) {
    const panel = panels.get(node) ?? newPanel(node)
    panel.show(run)
    fit(node, { width: WIDTH })
  }
}

/** @param {Told} run */
const keyOf = run => `${run.workflow} ${run.node}`

/** Take what an event or the list of runs tells. @param {Told} told @param {(Strip | null)[]} strips */
function hear(told, strips) {
  const key = keyOf(told), known = runs.get(key)
  const before = known?.run === told.run ? known.strips : []
  const fresh = strips.filter(strip => strip && !before.some(other => other.chunk === strip.chunk))
  const all = /** @type {Strip[]} */ ([...before, ...fresh]).sort((one, other) => one.chunk - other.chunk)
  const run = { ...told, strips: all.slice(-STRIPS), news: ++news }
  runs.delete(key)
  runs.set(key, run)
  if (runs.size > KNOWN) runs.delete(runs.keys().next().value ?? "")
  show(run)
}

/** What the server knows: after the page was loaded, and after it was cut off. */
async function catchUp() {
  const asked = news, answer = await call("runs").catch(() => undefined)
  if (!answer) return // it is asked again when it is there
  // What an event has told since is newer than the answer: that the run has ended, for instance, which no other event will tell.
  const newer = new Set([...runs.values()].filter(run => run.news > asked).map(keyOf))
  for (const { strips, ...told } of answer.runs) {
    const known = newer.has(keyOf(told)) ? runs.get(keyOf(told)) : told
    if (known?.run === told.run) hear(known, strips)
  }
  const listed = new Set(answer.runs.map((/** @type {Told} */ told) => told.run))
  for (const run of [...runs.values()].filter(isGoing)) // those of a server that was ended meanwhile
    if (run.news <= asked && !listed.has(run.run)) hear({ ...run, status: "cancelled" }, [])
}

/** Tell the server what the settings say. */
function tellSettings() {
  const on = setting("RollingKV.Live.Preview"), size = setting("RollingKV.Live.Size")
  if (on !== undefined && size !== undefined) call("preview", { on, size }).catch(() => {}) // it says so when it is asked for runs
}

// A node that plays its own video does not show ComfyUI's picture of it beside that.
withholdPreviews(id => {
  const seen = pathTo(id).filter(isOpen)
  return seen.length > 0 && seen.every(node => panels.get(node)?.plays)
})

extend({
  name: "RollingKV.Live",
  settings: [
    describeSetting("RollingKV.Live.Size", {
      type: "combo", section: "Live", defaultValue: 256, options: SIZES.map(value => ({ text: String(value), value })), onChange: tellSettings,
    }),
    describeSetting("RollingKV.Live.Preview", { type: "boolean", section: "Live", defaultValue: true, onChange: tellSettings }),
  ],
  async setup() {
    onEvent("rolling_kv.run", run => hear(run, []))
    onEvent("rolling_kv.chunk", ({ strip, ...run }) => hear(run, [strip]))
    onEvent("reconnected", () => {
      tellSettings() // the server may have begun anew
      catchUp()
    })
    await catchUp()
  },
  // Another workflow is shown, or this one anew: after undo, for instance.
  afterConfigureGraph: () => runs.forEach(show),
})
