/** What comfy.js uses of ComfyUI's frontend, whose own types are not published for scripts. Only the type check reads this file. */

export interface ComfyWidget {
  name: string
  type: string
  value: any
  serialize?: boolean
  hidden?: boolean
  element?: HTMLElement
  options: Record<string, any>
  callback?: (this: any, value: any, ...rest: any[]) => any
  onRemove?: () => void
}

export interface ComfyLink {
  origin_id: string | number
  origin_slot: number
  target_id: string | number
  target_slot: number
}

export interface ComfyGraph {
  id: string
  nodes: ComfyNode[]
  /** Only the root graph has it. */
  subgraphs?: Map<string, ComfyGraph>
  outputs?: { name: string, linkIds: (string | number)[] }[]
  getNodeById(id: string | number): ComfyNode | null | undefined
  getLink(id: string | number | null | undefined): ComfyLink | undefined
}

export interface ComfyNode {
  id: string | number
  comfyClass?: string
  title: string
  mode: number
  color?: string
  bgcolor?: string
  size: [number, number]
  graph: ComfyGraph | null
  /** Only subgraph nodes have it. */
  subgraph?: ComfyGraph
  isVirtualNode?: boolean
  /** `widget` where one of the node's widgets gives what is not linked. */
  inputs?: { name: string, type: string, link?: string | number | null, widget?: { name: string } }[]
  outputs?: { name: string, type: string }[]
  widgets?: ComfyWidget[]
  addDOMWidget(name: string, type: string, element: HTMLElement, options: object): ComfyWidget
  removeWidget(widget: ComfyWidget): void
  computeSize(): [number, number]
  setSize(size: [number, number]): void
  setDirtyCanvas(foreground: boolean, background: boolean): void
  onExecuted?: (output: any) => void
  onRemoved?: () => void
}

export interface ComfyExtension {
  name: string
  settings?: object[]
  init?(): void | Promise<void>
  setup?(): void | Promise<void>
  nodeCreated?(node: ComfyNode): void
  loadedGraphNode?(node: ComfyNode): void
  afterConfigureGraph?(): void
  /** Outputs by locator of their node, when a workflow's tab is shown again or a run of the history is opened. */
  onNodeOutputsUpdated?(outputs: Record<string, any>): void
}
