// Shows the tables of Benchmark Step Caches and Inspect State inside the nodes; pictures ComfyUI shows by itself.
import { app } from "../../scripts/app.js"

const TABLES = { // how many columns hold texts, which stand on the left, and the height of the picture below in pixels
  RollingKVBenchmark: { texts: 2, picture: 420 },
  RollingKVInspectState: { texts: 6, picture: 140 },
}
const WIDGET = "measured"
const LINE = 16 // height in pixels

/** Rows of a Markdown table in `text`, each a list of cells, and the other lines of the text, in their order. */
function parse(text) {
  const lines = text.split("\n").map(line => line.trim()).filter(Boolean)
  const isRow = line => line.startsWith("|")
  const cells = line => line.slice(1, -1).split(/(?<!\\)\|/).map(cell => cell.trim().replaceAll("\\|", "|"))
  const rows = lines.filter(isRow).map(cells).filter(row => !row.every(cell => /^-+$/.test(cell)))
  const first = lines.findIndex(isRow)
  return { before: lines.slice(0, first), rows, after: lines.slice(first).filter(line => !isRow(line)) }
}

function element(tag, style, ...children) {
  const made = document.createElement(tag)
  made.style.cssText = style
  made.append(...children)
  return made
}

function show(area, text, texts) {
  const { before, rows, after } = parse(text)
  const paragraph = line => element("p", "margin: 4px 0", line)
  const row = (cells, index) =>
    element("tr", "", ...cells.map((cell, column) =>
      element(index ? "td" : "th", `padding: 1px 4px; white-space: nowrap; text-align: ${column < texts ? "left" : "right"};`
        + " border-bottom: 1px solid var(--border-color)", cell)))
  area.replaceChildren(...before.map(paragraph),
    element("table", "border-collapse: collapse", ...rows.map(row)), ...after.map(paragraph))
}

/** Show what a run of the node put out, if it did: { text: [Markdown], … }. */
function display(node, output) {
  const text = output?.text?.join("\n"), { texts, picture } = TABLES[node.comfyClass]
  if (!text) return
  let widget = node.widgets?.find(known => known.name === WIDGET)
  if (!widget) {
    const area = element("div", "overflow: auto; padding: 4px 8px; font: 11px sans-serif; user-select: text;"
      + " color: var(--input-text); background: var(--comfy-input-bg); border-radius: 4px")
    const height = () => Math.min(LINE * (2 + area.querySelectorAll("p, tr").length), 480)
    widget = node.addDOMWidget(WIDGET, "table", area,
      { serialize: false, getMinHeight: height, getMaxHeight: height })
    widget.serialize = false
    show(area, text, texts)
    const [width, least] = node.computeSize()
    node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], least + picture)])
  } else {
    show(widget.element, text, texts)
  }
  node.setDirtyCanvas(true, true)
}

/** The node that an output belongs to: "id", or "subgraph:id" inside a subgraph. */
function nodeOf(locator) {
  const [id, subgraph] = locator.split(":").reverse()
  const root = app.rootGraph ?? app.graph
  return (subgraph ? root.subgraphs?.get(subgraph) : root)?.getNodeById(id)
}

app.registerExtension({
  name: "RollingKV.Tables",
  nodeCreated(node) {
    if (!(node.comfyClass in TABLES)) return
    const executed = node.onExecuted
    node.onExecuted = function (output) {
      executed?.apply(this, arguments)
      display(this, output)
    }
  },
  // Back from another tab, or opened from the history: the outputs are there again, and nothing has been executed.
  onNodeOutputsUpdated(outputs) {
    for (const [locator, output] of Object.entries(outputs)) {
      const node = nodeOf(locator)
      if (node?.comfyClass in TABLES) display(node, output)
    }
  },
})
