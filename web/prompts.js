/**
 * A schedule as the timeline edits it, and its text. Values only: no page, no server. The server alone reads texts.
 *
 * @typedef {{ text: string, time: number, how: string }} Prompt time in seconds; how: what stands in its brackets: "cut", "blend 3"
 * @typedef {{ segments: Prompt[], end: number | null }} Schedule
 * @typedef {number[]} Grid seconds at which chunks begin; beyond its end, chunks last as long as the last one in it
 */

const APPENDED = 5 // seconds that the last prompt gets before another one follows

/** The text of a schedule, as the server writes it. @param {Schedule} schedule */
export function write({ segments, end }) {
  const lines = segments.map(({ text, time, how }) => {
    const words = how ? ` [${how}]` : text.endsWith("]") ? " []" : ""
    return `${numeral(time)}: ${text}${words}`
  })
  return [...lines, ...(end === null ? [] : [`${numeral(end)}: [end]`])].join("\n")
}

/** Seconds as a schedule has them. @param {number} seconds */
export const numeral = seconds => String(Number(seconds.toFixed(6)))

/** A text as a prompt has it: in one line. @param {string} text */
export const inOneLine = text => text.split(/\s+/).filter(Boolean).join(" ")

/** When chunk `number` begins. @param {Grid} grid @param {number} number */
function at(grid, number) {
  const last = grid.length - 1
  if (number <= last) return grid[Math.max(number, 0)]
  return Math.floor((grid[last] + (number - last) * (grid[last] - grid[last - 1])) * 1e4 + 1e-6) / 1e4
}

/** The number of the chunk that begins nearest to a time. @param {Grid} grid @param {number} time */
function nearest(grid, time) {
  const last = grid.length - 1
  if (time > grid[last]) return last + Math.round((time - grid[last]) / (grid[last] - grid[last - 1]))
  let low = 0, high = last // the first chunk that does not begin before the time
  while (low < high) {
    const middle = (low + high) >> 1
    if (grid[middle] < time) low = middle + 1
    else high = middle
  }
  return low && time - grid[low - 1] < grid[low] - time ? low - 1 : low
}

/** The beginning of a chunk that is nearest to a time. @param {Grid} grid @param {number} time */
export const snapped = (grid, time) => at(grid, nearest(grid, time))

/** When the chunk begins that a prompt of that time begins with. @param {Grid} grid @param {number} time */
export function beginning(grid, time) {
  const number = nearest(grid, time)
  return at(grid, number) < time ? at(grid, number + 1) : at(grid, number)
}

/** The beginning of the chunk so many chunks after the one nearest to a time. @param {Grid} grid @param {number} time @param {number} chunks */
export function stepped(grid, time, chunks) {
  const number = nearest(grid, time), there = at(grid, number)
  const between = (chunks > 0 && there > time) || (chunks < 0 && there < time) // stands between two chunks
  return at(grid, number + chunks - (between ? Math.sign(chunks) : 0))
}

/**
 * The same with a prompt, or the end, at another time: at the beginning of a chunk, and between its neighbours. The first stays.
 * @param {Schedule} schedule @param {number} index of the prompt; as many as there are for the end @param {number} time @param {Grid} grid
 * @returns {Schedule}
 */
export function moved(schedule, index, time, grid) {
  const { segments, end } = schedule
  if (!index) return schedule
  const low = stepped(grid, segments[index - 1].time, 1)
  const next = segments[index + 1]?.time ?? end
  const high = index >= segments.length || next === null ? Infinity : stepped(grid, next, -1)
  if (high < low) return schedule // no chunk begins between its neighbours
  const there = Math.min(Math.max(snapped(grid, time), low), high)
  if (index >= segments.length) return { segments, end: there }
  return { segments: segments.map((prompt, number) => (number === index ? { ...prompt, time: there } : prompt)), end }
}

/** The same with other parts of one prompt. @param {Schedule} schedule @param {number} index @param {Partial<Prompt>} parts @returns {Schedule} */
export const changed = ({ segments, end }, index, parts) =>
  ({ segments: segments.map((prompt, number) => (number === index ? { ...prompt, ...parts } : prompt)), end })

/** The same without one prompt; the first that is left begins when the first did. The last one stays. @param {Schedule} schedule @param {number} index @returns {Schedule} */
export function removed({ segments, end }, index) {
  if (segments.length < 2) return { segments, end }
  const left = segments.filter((_, number) => number !== index)
  return { segments: [{ ...left[0], time: segments[0].time }, ...left.slice(1)], end }
}

/** The same with another prompt behind the last one. An end moves on. @param {Schedule} schedule @param {string} text @param {Grid} grid @returns {Schedule} */
export function appended({ segments, end }, text, grid) {
  const last = segments[segments.length - 1].time
  const time = end ?? snapped(grid, last + APPENDED)
  const begin = Math.max(beginning(grid, time), stepped(grid, last, 1))
  const behind = Math.max(snapped(grid, begin + (begin - last)), stepped(grid, begin, 1))
  return { segments: [...segments, { text, time: begin, how: "" }], end: end === null ? null : behind }
}

/**
 * The same with one prompt twice: the second begins in the middle of it. Unchanged where it lasts one chunk.
 * @param {Schedule} schedule @param {number} index @param {number} until when what is shown ends @param {Grid} grid @returns {Schedule}
 */
export function split({ segments, end }, index, until, grid) {
  const { text, time } = segments[index], next = segments[index + 1]?.time ?? end ?? until
  const middle = Math.max(snapped(grid, (time + next) / 2), stepped(grid, time, 1))
  if (middle >= next) return { segments, end }
  return { segments: [...segments.slice(0, index + 1), { text, time: middle, how: "" }, ...segments.slice(index + 1)], end }
}
