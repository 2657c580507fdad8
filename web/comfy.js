/**
 * Everything that the pack's scripts ask of ComfyUI's page. No other file of ours touches `app`, `api` or LiteGraph, so what a
 * new frontend changes is mended here. It runs on the frontends 1.45 and newer, on the classic canvas and in Nodes 2.0.
 *
 * @import { ComfyExtension, ComfyNode, ComfyGraph, ComfyLink, ComfyWidget } from "./comfy.d.ts"
 */
import { api } from "../../scripts/api.js"
import { app } from "../../scripts/app.js"

const SUBGRAPH_INPUT = "-10" // the id that a link out of a subgraph's input panel has as its origin
const MUTED = 2, BYPASSED = 4

/** Make hooks known to the page: `name` ("RollingKV.Something"), `nodeCreated(node)`, `settings`, … @param {ComfyExtension} extension */
export const extend = extension => app.registerExtension(extension)

/* ---- texts ------------------------------------------------------------------------------------------------------------ */

/** Texts of all packs by language, as locales/<language>/{main,settings}.json have them. @type {Record<string, any>} */
const locales = await api.fetchApi("/i18n").then(answer => answer.json()).catch(() => ({}))

/** @param {any} tree @param {string} key names with dots between them */
const textOf = (tree, key) => key.split(".").reduce((branch, name) => branch?.[name], tree)

/**
 * A text of ours in the page's language, else in English.
 * @param {string} key where it stands below "rollingKV" in locales/<language>/main.json: "live.pause"
 * @param {Record<string, string | number>} [values] what replaces {name} in it
 */
export function t(key, values = {}) {
  const [own, english] = [setting("Comfy.Locale") ?? "en", "en"].map(language => textOf(locales[language]?.rollingKV, key))
  return String(own ?? english ?? key).replace(/\{(\w+)\}/g, (whole, name) => String(values[name] ?? whole))
}

/* ---- settings --------------------------------------------------------------------------------------------------------- */

/** The value of a setting of ours or of the page's. @param {string} id @returns {any} */
export const setting = id => app.extensionManager.setting.get(id)

/**
 * One entry for an extension's `settings`. Name and tooltip come from locales/<language>/settings.json, where dots of the id are
 * underscores.
 * @param {string} id "RollingKV.Live.Size"
 * @param {{ type: string, defaultValue: unknown, section: string, options?: object[], onChange?: (value: any) => void }} options
 *   section: English name of the heading below "Rolling KV"
 */
export function describeSetting(id, { section, ...options }) {
  const texts = locales.en?.settings?.[id.replaceAll(".", "_")]
  return { id, name: texts?.name ?? id, tooltip: texts?.tooltip, category: ["Rolling KV", section, id], ...options }
}

/* ---- server ----------------------------------------------------------------------------------------------------------- */

/** The address of something below /rolling_kv, for an <img>. @param {string} path "/rolling_kv/runs/…" */
export const address = path => api.apiURL(path)

/** The status of an answer; 0 where there is none. @param {string} path as for `address` */
export const statusOf = path => fetch(address(path)).then(answer => answer.status, () => 0)

/**
 * Ask a route of ours; a body makes it a POST.
 * @param {string} path below /rolling_kv: "runs"
 * @param {object} [body]
 * @returns {Promise<any>} what it answered
 * @throws {Error & { status: number }} with the server's own sentence where it gave one; also where that is all of its answer
 */
export async function call(path, body) {
  const answer = await api.fetchApi(`/rolling_kv/${path}`, body && {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  })
  const text = await answer.text()
  let said
  try {
    said = JSON.parse(text)
  } catch {
    said = undefined // a proxy's page, or nothing
  }
  if (answer.ok && !said?.error) return said
  throw Object.assign(new Error(said?.error ?? t("unreachable", { status: answer.status })), { status: answer.status })
}

/**
 * Listen to an event of the websocket: ours ("rolling_kv.chunk") or ComfyUI's ("execution_success", "reconnected").
 * @param {string} type
 * @param {(detail: any) => void} listener
 * @returns {() => void} takes the listener away
 */
export function onEvent(type, listener) {
  const heard = (/** @type {any} */ event) => listener(event.detail)
  api.addEventListener(type, heard)
  return () => api.removeEventListener(type, heard)
}

/**
 * Keep ComfyUI's own preview picture away from nodes that show a better one. Works only where it is called while the script loads:
 * the page begins to listen after that.
 * @param {(executionId: string) => boolean} covered whether the node has its own
 */
export function withholdPreviews(covered) {
  api.addEventListener("b_preview_with_metadata", (/** @type {any} */ event) => {
    if (covered(String(event.detail.displayNodeId))) event.stopImmediatePropagation()
  })
}

/* ---- nodes ------------------------------------------------------------------------------------------------------------ */

/** @returns {ComfyGraph | undefined} */
const root = () => app.rootGraph ?? app.graph

/** @param {ComfyGraph | undefined} graph @param {string} id @returns {ComfyNode | undefined} */
const byId = (graph, id) => graph?.getNodeById(id) ?? graph?.getNodeById(Number(id)) ?? undefined

/**
 * The node that an output belongs to.
 * @param {string} locator "id", or "subgraph's uuid:id"
 */
export function nodeOf(locator) {
  const [id, subgraph] = locator.split(":").reverse()
  return byId(subgraph ? root()?.subgraphs?.get(subgraph) : root(), id)
}

/**
 * The nodes on the way to a node of a prompt: [node], or inside subgraphs [outer subgraph node, …, node]. Empty when the open
 * workflow has no such node.
 * @param {string} executionId "12", or "12:7:5"
 * @returns {ComfyNode[]}
 */
export function pathTo(executionId) {
  const nodes = []
  let graph = root()
  for (const id of String(executionId).split(":")) {
    const node = byId(graph, id)
    if (!node) return []
    nodes.push(node)
    graph = node.subgraph
  }
  return nodes
}

/** What the page takes for the id of a workflow without one, as an API prompt is; opened again, it has another. */
const NO_ID = "00000000-0000-0000-0000-000000000000"

/**
 * Whether a prompt was queued from another workflow than the open one. Without an id it may be of any.
 * @param {string | null} [workflow] the id that the prompt carries along
 */
export const isElsewhere = workflow => Boolean(workflow) && workflow !== NO_ID && workflow !== root()?.id

/** The open workflow's graph and those of its subgraphs. */
const graphs = () => [root(), ...(root()?.subgraphs?.values() ?? [])]

/** Every node of the open workflow, those in subgraphs too. @returns {ComfyNode[]} */
export const allNodes = () => graphs().flatMap(graph => [...(graph?.nodes ?? [])])

/** Whether a node is still in the open workflow: undo and opening another one make all of them anew, with their subgraphs. @param {ComfyNode} node */
export const isThere = node => graphs().includes(node.graph ?? undefined) && node.graph?.getNodeById(node.id) === node

/** Whether the node is in the graph that the canvas shows now. @param {ComfyNode} node */
export const isOpen = node => node.graph === (app.canvas?.graph ?? root())

/**
 * Hooks for an extension that shows what nodes put out: after a run, and where nothing is executed, as the page is back from another
 * tab or has opened the history.
 * @param {string[]} classes of the nodes
 * @param {(node: ComfyNode, output: any) => void} display
 */
export function onOutputs(classes, display) {
  const shows = (/** @type {ComfyNode | null | undefined} */ node) => classes.includes(node?.comfyClass ?? "")
  return {
    /** @param {ComfyNode} node */
    nodeCreated(node) {
      if (!shows(node)) return
      const executed = node.onExecuted
      node.onExecuted = function (output) {
        executed?.call(this, output)
        display(this, output)
      }
    },
    /** @param {Record<string, any>} outputs */
    onNodeOutputsUpdated(outputs) {
      for (const [locator, output] of Object.entries(outputs)) {
        const node = nodeOf(locator)
        if (node && shows(node)) display(node, output)
      }
    },
  }
}

/** @param {ComfyNode} node */
export const redraw = node => node.setDirtyCanvas(true, true)

/* ---- widgets ---------------------------------------------------------------------------------------------------------- */

/** @param {ComfyNode} node @param {string} name @returns {ComfyWidget | undefined} */
export const widgetOf = (node, name) => node.widgets?.find(widget => widget.name === name)

/**
 * Put an element below the node's widgets. It is a view: it is not saved with the workflow, nor part of a prompt.
 * @param {ComfyNode} node
 * @param {string} name of the widget, one of its kind on a node
 * @param {HTMLElement} element
 * @param {() => number} height how high it wants to be now at least, in pixels; asked whenever the node is laid out
 * @param {number} [most] how high it may become where the node has room; without it, no higher
 */
export function addView(node, name, element, height, most) {
  const room = () => {
    element.style.minHeight = `${height()}px` // Nodes 2.0 asks the element
    return height() + 2 * MARGIN
  }
  const widget = node.addDOMWidget(name, "rolling_kv", element,
    { serialize: false, hideOnZoom: false, margin: MARGIN, getMinHeight: room, getMaxHeight: () => most ?? room() })
  if (!node.widgets?.includes(widget)) list(node, widget)
  widget.serialize = false
  element.dataset.view = name
  setTimeout(() => takePlace(node, name, element)) // once the page has made its elements
  fit(node)
  return widget
}

/**
 * Have a node list a widget of ours: subgraph nodes of older frontends, around 1.45, list those of the nodes in them and no other.
 * @param {ComfyNode} node
 * @param {ComfyWidget} widget
 */
function list(node, widget) {
  const known = Object.getOwnPropertyDescriptor(node, "widgets")?.get
  if (!known) return
  const get = () => {
    const others = known.call(node)
    return others.includes(widget) ? others : [...others, widget]
  }
  Object.defineProperty(node, "widgets", { get, set: () => {}, configurable: true, enumerable: true })
  known.call(node).push(widget) // Nodes 2.0 looks at a node's widgets anew when the list that it knows changes
}

/**
 * Nodes 2.0 keeps the elements of a node when it makes the node anew, on undo and when another workflow is shown: what a former node
 * of that number has put there makes room.
 * @param {ComfyNode} node
 * @param {string} name
 * @param {HTMLElement} element
 */
function takePlace(node, name, element) {
  if (element.isConnected || !isOpen(node)) return
  document.querySelector(`[data-node-id="${node.id}"] [data-view="${name}"]`)?.replaceWith(element)
}

const MARGIN = 10 // what the classic canvas leaves free around an element

/**
 * Make the node at least as large as its widgets need.
 * @param {ComfyNode} node
 * @param {{ below?: number, width?: number }} [room] below: more pixels, for a picture of ComfyUI's. width: of the node at least
 */
export function fit(node, { below = 0, width = 0 } = {}) {
  const [across, down] = node.computeSize(), size = [Math.max(across, width), down + below]
  if (node.size[0] < size[0] || node.size[1] < size[1])
    node.setSize([Math.max(node.size[0], size[0]), Math.max(node.size[1], size[1])])
  redraw(node)
}

/** @param {ComfyNode} node @param {string} name */
export function removeView(node, name) {
  const widget = widgetOf(node, name)
  if (widget) node.removeWidget(widget)
}

/**
 * Where the value of a widget is kept, with the widget there. In a subgraph, newer frontends keep that of a promoted one on the subgraph's node.
 * @param {ComfyNode} node
 * @param {string} name
 * @returns {[ComfyNode, ComfyWidget | undefined]}
 */
function keeper(node, name) {
  const link = linkInto(node, slotOf(node, name)), outer = outside(node, link)
  const input = link && outer?.inputs?.[link.origin_slot], promoted = input?.widget?.name
  return outer && promoted && widgetOf(outer, promoted) ? keeper(outer, promoted) : [node, widgetOf(node, name)]
}

/** The value of a widget, also where it is promoted. @param {ComfyNode} node @param {string} name */
export const valueOf = (node, name) => keeper(node, name)[1]?.value

/**
 * Change a widget's value as a user does: one step of undo, and everything that shows it follows.
 * @param {ComfyNode} node
 * @param {string} name
 * @param {unknown} value
 */
export function setValue(node, name, value) {
  const [keeping, widget] = keeper(node, name)
  if (!widget || widget.value === value) return
  app.canvas.emitBeforeChange()
  try {
    widget.value = value
    widget.callback?.(value, app.canvas, keeping)
    redraw(keeping)
  } finally {
    app.canvas.emitAfterChange()
  }
}

/**
 * Hear of every change of a widget's value, by the user, by undo, or by `setValue`.
 * @param {ComfyNode} node
 * @param {string} name
 * @param {(value: any) => void} listener
 */
export function onValue(node, name, listener) {
  const widget = widgetOf(node, name)
  if (!widget) return
  const before = widget.callback
  widget.callback = function (value, ...rest) {
    const answer = before?.call(this, value, ...rest)
    listener(widget.value)
    return answer
  }
}

/* ---- links ------------------------------------------------------------------------------------------------------------ */

/** @param {ComfyNode} node @param {string} name of an input */
const slotOf = (node, name) => node.inputs?.findIndex(input => input.name === name) ?? -1

/** The link into an input: of the node's own graph, where `getInputLink` of a subgraph's node gives one inside. @param {ComfyNode} node @param {number} slot */
const linkInto = (node, slot) => node.graph?.getLink(node.inputs?.[slot]?.link)

/** The subgraph's node whose input a link inside of the subgraph comes from. @param {ComfyNode} node that it goes to @param {ComfyLink | undefined} link */
const outside = (node, link) =>
  String(link?.origin_id) === SUBGRAPH_INPUT ? allNodes().find(made => made.subgraph === node.graph) : undefined

/**
 * The node whose output goes into an input, through reroutes, bypassed nodes and the borders of subgraphs.
 * @param {ComfyNode} node
 * @param {string} name of the input
 * @returns {ComfyNode | undefined} undefined when nothing is connected
 */
export const source = (node, name) => origin(node, slotOf(node, name), new Set())

/** @param {ComfyNode} node @param {number} slot @param {Set<string>} seen @returns {ComfyNode | undefined} */
function origin(node, slot, seen) {
  const graph = node.graph, link = linkInto(node, slot)
  const key = `${graph?.id} ${node.id} ${slot}`
  if (!graph || !link || seen.has(key)) return undefined
  seen.add(key)
  const outer = outside(node, link)
  if (outer) return origin(outer, link.origin_slot, seen)
  return behind(byId(graph, String(link.origin_id)), link.origin_slot, seen)
}

/** The node that makes what comes out of a slot. @param {ComfyNode | undefined} node @param {number} slot @param {Set<string>} seen @returns {ComfyNode | undefined} */
function behind(node, slot, seen) {
  if (!node) return undefined
  if (node.mode === BYPASSED) { // a subgraph's node, too
    const type = node.outputs?.[slot]?.type
    return origin(node, node.inputs?.findIndex(input => input.type === type) ?? -1, seen)
  }
  if (node.subgraph) {
    const inner = node.subgraph.getLink(node.subgraph.outputs?.[slot]?.linkIds[0])
    return inner && behind(byId(node.subgraph, String(inner.origin_id)), inner.origin_slot, seen)
  }
  return node.isVirtualNode ? origin(node, 0, seen) : node
}

/** Whether a run has the node: neither it nor what it is in is muted or bypassed. @param {ComfyNode} node @returns {boolean} */
function takesPart(node) {
  if (node.mode === MUTED || node.mode === BYPASSED) return false
  const outer = allNodes().filter(made => made.subgraph && made.subgraph === node.graph)
  return !outer.length || outer.some(takesPart)
}

/** The nodes that will run with `node` behind an input of the name, in the whole workflow. @param {ComfyNode} node @param {string} name */
export const users = (node, name) => allNodes().filter(other => source(other, name) === node && takesPart(other))

/* ---- the page --------------------------------------------------------------------------------------------------------- */

/** A short message in the corner. @param {"error" | "warn" | "info" | "success"} severity @param {string} text */
export const toast = (severity, text) =>
  app.extensionManager.toast.add({ severity, summary: "Rolling KV", detail: text, life: severity === "error" ? 8000 : 4000 })

/**
 * Keys typed into `element` stay there: none is taken for a shortcut of the canvas.
 * @template {HTMLElement} T
 * @param {T} element
 */
export function keepKeys(element) {
  for (const type of ["keydown", "keyup", "keypress", "copy", "cut", "paste"])
    element.addEventListener(type, event => event.stopPropagation())
  return element
}

/** Copy text, also where the page is served without encryption, so that it has no clipboard. @param {string} text @returns {Promise<boolean>} */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text)
    return true
  } catch {
    const area = document.createElement("textarea")
    area.value = text
    area.style.cssText = "position: fixed; opacity: 0"
    document.body.append(area)
    area.select()
    const done = document.execCommand("copy")
    area.remove()
    return done
  }
}

/** The colour of a sentence that says what is wrong: of the alarm, mixed with that of text, so that it is read on a node in every theme. */
export const WRONG = "color-mix(in srgb, var(--error-text, #ff4444), var(--input-text, #ddd))"

/**
 * An element with attributes, listeners (`onclick`) and children.
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {Record<string, any>} [attributes] `style` is text; false and undefined leave an attribute out
 * @param {...(Node | string)} children
 * @returns {HTMLElementTagNameMap[K]}
 */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag)
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value)
    else if (value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : String(value))
  }
  made.append(...children)
  return made
}
