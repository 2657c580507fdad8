// Shows the tables of Benchmark Step Caches and Inspect State inside the nodes; pictures ComfyUI shows by itself.
/** @import { ComfyNode } from "./comfy.d.ts" */
import { addView, element, extend, fit, onOutputs, redraw, widgetOf } from "./comfy.js"

/** How many columns hold texts, which stand on the left, and the height of the picture below in pixels. @type {Record<string, { texts: number, picture: number }>} */
const TABLES = {
  RollingKVBenchmark: { texts: 2, picture: 420 },
  RollingKVInspectState: { texts: 6, picture: 140 },
}
const WIDGET = "measured"
const LINE = 16 // height in pixels

/** Rows of a Markdown table in `text`, each a list of cells, and the other lines of the text, in their order. @param {string} text */
function parse(text) {
  const lines = text.split("\n").map(line => line.trim()).filter(Boolean)
  const isRow = (/** @type {string} */ line) => line.startsWith("|")
  const cells = (/** @type {string} */ line) =>
    line.slice(1, -1).split(/(?<!\\)\|/).map(cell => cell.trim().replaceAll("\\|", "|"))
  const rows = lines.filter(isRow).map(cells).filter(row => !row.every(cell => /^-+$/.test(cell)))
  const first = lines.findIndex(isRow)
  return { before: lines.slice(0, first), rows, after: lines.slice(first).filter(line => !isRow(line)) }
}

/** @param {HTMLElement} area @param {string} text @param {number} texts */
function show(area, text, texts) {
  const { before, rows, after } = parse(text)
  const paragraph = (/** @type {string} */ line) => element("p", { style: "margin: 4px 0" }, line)
  const row = (/** @type {string[]} */ cells, /** @type {number} */ index) =>
    element("tr", {}, ...cells.map((cell, column) =>
      element(index ? "td" : "th", {
        style: `padding: 1px 4px; white-space: nowrap; text-align: ${column < texts ? "left" : "right"};`
          + " border-bottom: 1px solid var(--border-color)",
      }, cell)))
  area.replaceChildren(...before.map(paragraph),
    element("table", { style: "border-collapse: collapse" }, ...rows.map(row)), ...after.map(paragraph))
}

/** Show what a run of the node put out, if it did. @param {ComfyNode} node @param {{ text?: string[] }} [output] its texts are Markdown */
function display(node, output) {
  const text = output?.text?.join("\n"), table = TABLES[node.comfyClass ?? ""]
  if (!text || !table) return
  const known = widgetOf(node, WIDGET)
  if (known?.element) {
    show(known.element, text, table.texts)
    return redraw(node)
  }
  const area = element("div", {
    style: "overflow: auto; padding: 4px 8px; font: 11px sans-serif; user-select: text; box-sizing: border-box;"
      + " color: var(--input-text); background: var(--comfy-input-bg); border-radius: 4px",
  })
  show(area, text, table.texts)
  addView(node, WIDGET, area, () => Math.min(LINE * (2 + area.querySelectorAll("p, tr").length), 480))
  fit(node, { below: table.picture })
}

extend({ name: "RollingKV.Tables", ...onOutputs(Object.keys(TABLES), display) })
