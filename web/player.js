/**
 * Plays the strips of a run, looping, on a canvas: each strip is a WebP with the frames of a chunk, row by row. Nothing is played, and
 * no time is spent, while the canvas is not to be seen.
 *
 * @typedef {{ chunk: number, url: string, frames: number, seconds: number, width: number, height: number, columns: number }} Strip what the
 *   server tells of a chunk's picture; seconds: of the video that its frames show, evenly
 */

/** Most pixels of all strips that are held, decoded 256 MiB: half a minute at 256 x 256. */
const HELD = 64 * 2 ** 20
const AGAIN = 1000 // milliseconds until a picture that did not come is asked for again, twice as many each time
const SELDOM = 60 * 1000 // at most

export class Player {
  /**
   * @param {(path: string) => string} address makes an address of a strip's url
   * @param {(path: string) => Promise<number>} statusOf with which status the server answers there, which an image does not tell
   */
  constructor(address, statusOf) {
    this.address = address
    this.statusOf = statusOf
    this.canvas = document.createElement("canvas")
    this.canvas.setAttribute("role", "img")
    /** @type {(Strip & { image: HTMLImageElement, ready: boolean, late: number })[]} late: milliseconds that it waits, having failed */
    this.strips = [] // in the order of their chunks
    /** Chunks whose strip was taken, those that were let go again too. @type {Set<number>} */
    this.taken = new Set()
    this.position = 0 // in seconds, from the first frame that is held
    this.seen = false
    this.still = matchMedia("(prefers-reduced-motion: reduce)")
    this.request = 0
    this.watcher = new IntersectionObserver(entries => {
      this.seen = entries[entries.length - 1].isIntersecting
      this.wake()
    })
    this.watcher.observe(this.canvas)
  }

  /** How much video there is to play. */
  get seconds() {
    return this.playable.reduce((sum, strip) => sum + strip.seconds, 0)
  }

  /** The strips that have arrived, up to the first that is on its way; those that have failed are passed over. */
  get playable() {
    const first = this.strips.findIndex(strip => !strip.ready && !strip.late)
    return this.strips.slice(0, first < 0 ? this.strips.length : first).filter(strip => strip.ready)
  }

  /** Append the picture of a chunk, once. The oldest ones go when there are too many. @param {Strip} strip */
  append(strip) {
    if (this.taken.has(strip.chunk)) return
    this.taken.add(strip.chunk)
    const image = new Image(), held = { ...strip, image, ready: false, late: 0 }
    this.strips.push(held)
    this.strips.sort((one, other) => one.chunk - other.chunk)
    image.decoding = "async"
    image.onload = () => {
      held.ready = true
      this.forget()
      this.wake()
    }
    image.onerror = () => this.askAgain(held)
    image.src = this.address(strip.url)
  }

  /** Ask for a picture that did not come, until it does or the server has let it go. @param {Player["strips"][number]} held */
  askAgain(held) {
    held.late = Math.min(2 * held.late || AGAIN, SELDOM)
    this.wake()
    setTimeout(async () => {
      if (!this.strips.includes(held)) return
      const status = await this.statusOf(held.url)
      if (status === 404) this.drop(held)
      else if (status !== 200) this.askAgain(held)
      else if (this.strips.includes(held)) held.image.src = this.address(held.url)
    }, held.late)
  }

  /** Let the oldest strips go until the others are small enough together. */
  forget() {
    const pixels = () => this.strips.reduce((sum, strip) => sum + strip.frames * strip.width * strip.height, 0)
    for (let [oldest] = this.strips; (oldest.ready || oldest.late) && this.strips.length > 1 && pixels() > HELD; [oldest] = this.strips) {
      if (oldest.ready) this.position = Math.max(this.position - oldest.seconds, 0)
      this.drop(oldest)
    }
  }

  /** @param {Player["strips"][number]} strip */
  drop(strip) {
    strip.image.onload = strip.image.onerror = null
    strip.image.removeAttribute("src")
    this.strips = this.strips.filter(other => other !== strip)
  }

  /** Begin anew, with nothing. @param {[number, number]} size of the video, whose shape the canvas gets */
  reset([width, height]) {
    this.strips.forEach(strip => this.drop(strip))
    this.taken.clear()
    this.position = 0
    this.canvas.width = width
    this.canvas.height = height
    this.canvas.style.aspectRatio = `${width} / ${height}`
    delete this.canvas.dataset.frame
  }

  /** Play on, if there is something to play and somebody who can see it. */
  wake() {
    cancelAnimationFrame(this.request)
    this.before = undefined
    if (this.seen && this.seconds) this.request = requestAnimationFrame(now => this.step(now))
  }

  /** @param {number} now milliseconds */
  step(now) {
    const seconds = this.seconds
    if (!seconds) return // begun anew since: what arrives next wakes it
    if (this.before !== undefined) this.position = (this.position + (now - this.before) / 1000) % seconds
    this.before = now
    this.draw(this.still.matches ? Infinity : this.position) // somebody who wants no motion sees the newest frame
    if (!this.still.matches) this.request = requestAnimationFrame(next => this.step(next))
  }

  /** @param {number} position in seconds, from the first frame that is held; beyond all of them it is the last one's */
  draw(position) {
    const strips = this.playable, strip = strips.find(({ seconds }) => (position -= seconds) < 0) ?? strips[strips.length - 1]
    if (!strip) return
    const number = Math.min(Math.floor((position / strip.seconds + 1) * strip.frames), strip.frames - 1), shown = `${strip.chunk}:${number}`
    if (this.canvas.dataset.frame === shown) return
    const { image, width, height, columns } = strip
    if (this.canvas.width !== width || this.canvas.height !== height) Object.assign(this.canvas, { width, height })
    this.canvas.getContext("2d")?.drawImage(image, number % columns * width, Math.floor(number / columns) * height,
      width, height, 0, 0, width, height)
    this.canvas.dataset.frame = shown
  }
}
