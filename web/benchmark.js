// Shows the table of Benchmark Step Caches inside the node; the plot is an image, which ComfyUI shows by itself.
import { app } from "../../scripts/app.js"

const WIDGET = "measured"
const LINE = 16, PLOT = 420 // heights in pixels

/** Rows of a Markdown table in `text`, each a list of cells, and the other lines of the text, in their order. */
function parse(text) {
  const lines = text.split("\n").map(line => line.trim()).filter(Boolean)
  const isRow = line => line.startsWith("|")
  const cells = line => line.slice(1, -1).split("|").map(cell => cell.trim())
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

function show(area, text) {
  const { before, rows, after } = parse(text)
  const paragraph = line => element("p", "margin: 4px 0", line)
  const row = (cells, index) =>
    element("tr", "", ...cells.map((cell, column) =>
      element(index ? "td" : "th", `padding: 1px 4px; white-space: nowrap; text-align: ${column < 2 ? "left" : "right"};`
        + " border-bottom: 1px solid var(--border-color)", cell)))
  area.replaceChildren(...before.map(paragraph),
    element("table", "border-collapse: collapse", ...rows.map(row)), ...after.map(paragraph))
}

app.registerExtension({
  name: "RollingKV.Benchmark",
  nodeCreated(node) {
    if (node.comfyClass !== "RollingKVBenchmark") return
    const executed = node.onExecuted
    node.onExecuted = function (output) {
      executed?.apply(this, arguments)
      const text = output?.text?.join("\n")
      if (!text) return
      let widget = this.widgets?.find(known => known.name === WIDGET)
      const first = !widget
      if (first) {
        const area = element("div", "overflow: auto; padding: 4px 8px; font: 11px sans-serif; user-select: text;"
          + " color: var(--input-text); background: var(--comfy-input-bg); border-radius: 4px")
        const height = () => Math.min(LINE * (2 + area.querySelectorAll("p, tr").length), 480)
        widget = this.addDOMWidget(WIDGET, "table", area,
          { serialize: false, getMinHeight: height, getMaxHeight: height })
        widget.serialize = false
      }
      show(widget.element, text)
      if (first) {
        const [width, height] = this.computeSize()
        this.setSize([Math.max(this.size[0], width), Math.max(this.size[1], height + PLOT)])
      }
      this.setDirtyCanvas(true, true)
    }
  },
})
