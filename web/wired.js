/**
 * What the server is to know of the nodes around one, before anything runs: see nodes/wired.py.
 *
 * @import { ComfyNode } from "./comfy.d.ts"
 */
import { isElsewhere, pathTo, source, users, valueOf } from "./comfy.js"

const LOADER = "RollingKVLoadModel", CACHE = "RollingKVAttachCache"
const SAMPLERS = ["RollingKVSample", "RollingKVStreamVideo"]
const LONGEST = 64 // nodes one behind the other

/** A node's inputs as an API prompt has them, without links. @param {ComfyNode} node */
export const inputsOf = node => Object.fromEntries((node.widgets ?? [])
  .filter(({ name, serialize }) => serialize !== false && !source(node, name))
  .map(({ name }) => [name, valueOf(node, name)]))

/**
 * The model that comes into an input, through LoRAs and caches; null where none is wired.
 * @param {ComfyNode} node
 * @returns {{ load: object, attach: object[] } | null}
 */
export function modelBefore(node) {
  const attach = []
  let made = source(node, "model")
  for (let steps = 0; made && steps < LONGEST; steps++) {
    if (made.comfyClass === LOADER) return { load: inputsOf(made), attach }
    if (made.comfyClass === CACHE) attach.unshift(inputsOf(made))
    made = source(made, "model")
  }
  return null
}

/** The model that comes out of Attach Rolling Cache. @param {ComfyNode} node */
export function modelOf(node) {
  const model = modelBefore(node)
  return model && { ...model, attach: [...model.attach, inputsOf(node)] }
}

/** The samplers that a node's model goes to. @param {ComfyNode} node */
export function samplersBehind(node) {
  /** @type {Set<ComfyNode>} */
  const found = new Set([node])
  for (const made of found) if (!SAMPLERS.includes(String(made.comfyClass))) for (const user of users(made, "model")) found.add(user)
  return [...found].filter(made => SAMPLERS.includes(String(made.comfyClass)))
}

/** The samplers that take their prompts from a schedule. @param {ComfyNode} node */
export const samplersOf = node => users(node, "positive").filter(made => SAMPLERS.includes(String(made.comfyClass)))

/** The sampler that a run is one of; undefined where it is not in the open workflow. @param {{ node: string, workflow?: string | null }} run */
export const samplerOfRun = ({ node, workflow }) => (isElsewhere(workflow) ? undefined : pathTo(node).at(-1))
