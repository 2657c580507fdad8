// Stands in for the page's module of this name when the scripts in web/ are checked.
/** @import { ComfyExtension, ComfyGraph } from "../../../../web/comfy.d.ts" */
/**
 * @type {{ graph: ComfyGraph, rootGraph?: ComfyGraph, registerExtension: (extension: ComfyExtension) => void,
 *   canvas: { graph: ComfyGraph, emitBeforeChange: () => void, emitAfterChange: () => void },
 *   extensionManager: { setting: { get: (id: string) => any }, toast: { add: (message: object) => void } } }}
 */
export const app = /** @type {any} */ (undefined)
