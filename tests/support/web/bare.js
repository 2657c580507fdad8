// A page without ComfyUI: nodes with widgets and links, and no more than comfy.js asks of them. It stands for scripts/app.js and api.js.
const listeners = new EventTarget()
const extensions = []
const graph = {
  id: "bare", nodes: [], links: new Map(), subgraphs: new Map(),
  getNodeById: id => graph.nodes.find(node => String(node.id) === String(id)),
  getLink: id => graph.links.get(id),
}

class Node {
  constructor(comfyClass, widgets, wires) {
    Object.assign(this, { comfyClass, graph, id: graph.nodes.length + 1, mode: 0, size: [bare.width, 0], widgets: [], inputs: [], outputs: [] })
    this.box = document.createElement("div")
    this.box.style.cssText = `width: ${bare.width}px; margin: 8px; transform-origin: 0 0`
    document.body.append(this.box)
    for (const [name, value] of Object.entries(widgets)) this.widgets.push({ name, value, options: {} })
    for (const [name, node] of Object.entries(wires)) {
      graph.links.set(graph.links.size + 1, { origin_id: node.id, origin_slot: 0, target_id: this.id, target_slot: this.inputs.length })
      this.inputs.push({ name, type: "*", link: graph.links.size })
    }
  }

  addDOMWidget(name, type, element, options) {
    const widget = { name, type, element, options }
    this.widgets.push(widget)
    this.box.append(element)
    return widget
  }

  computeSize() {
    return [bare.width, this.widgets.reduce((sum, widget) => sum + (widget.options.getMinHeight?.() ?? 20), 0)]
  }

  setSize(size) {
    this.size = size
  }

  setDirtyCanvas() {}
}

/** What a test does with the page. steps: the widgets' values after each step of undo. */
export const bare = {
  width: 520,
  settings: {},
  steps: [],
  make(comfyClass, widgets = {}, wires = {}) {
    const node = new Node(comfyClass, widgets, wires)
    graph.nodes.push(node)
    for (const extension of extensions) extension.nodeCreated?.(node)
    return node
  },
  tell: (type, detail) => listeners.dispatchEvent(new CustomEvent(type, { detail })),
}

export const api = {
  fetchApi: (route, options) => fetch(`/api${route}`, options),
  apiURL: route => `/api${route}`,
  addEventListener: (type, listener) => listeners.addEventListener(type, listener),
  removeEventListener: (type, listener) => listeners.removeEventListener(type, listener),
}

export const app = {
  graph,
  canvas: {
    graph,
    emitBeforeChange() {},
    emitAfterChange: () => bare.steps.push(graph.nodes.map(node => Object.fromEntries(node.widgets.map(({ name, value }) => [name, value])))),
  },
  registerExtension: extension => extensions.push(extension),
  extensionManager: { setting: { get: id => bare.settings[id] }, toast: { add() {} } },
}
window.bare = bare
