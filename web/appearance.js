// Gives the pack's nodes a colour of their own; one that a user has chosen stays.
import { extend } from "./comfy.js"

const TITLE = "#1d4b52", BODY = "#163a40" // petrol; ComfyUI lightens both in its light themes

extend({
  name: "RollingKV.Appearance",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("RollingKV")) return
    node.color = TITLE
    node.bgcolor = BODY
  },
})
