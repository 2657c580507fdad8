"""Packs beside this one, for what only other packs can do."""

from pathlib import Path

from tools.comfyui.env import PACK

PICK = """
class Anything(str):
    def __ne__(self, other):
        return False

class Pick:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"value": ("STRING", {"default": ""})}})
    RETURN_TYPES, FUNCTION, CATEGORY = (Anything("*"),), "go", "test"

    def go(self, value):
        kinds = {"number": float, "count": int, "text": str}
        kind, _, rest = value.partition(":")
        return (kinds[kind](rest.encode().decode("unicode_escape") if kind == "text" else rest),)

NODE_CLASS_MAPPINGS = {"Pick": Pick}
"""
"""A node that gives any value over a link."""


LOADED = """
import comfy.model_management as mm
from aiohttp import web
from server import PromptServer

@PromptServer.instance.routes.get("/test/loaded")
async def loaded(request):
    if "free" in request.query:
        measured, mm.get_free_memory = mm.get_free_memory, lambda *_, **__: 0
        try:
            mm.free_memory(int(request.query["free"]), mm.get_torch_device())
        finally:
            mm.get_free_memory = measured
    # Held while they are looked at: the queue may be letting go of them.
    held = [(entry, entry.model) for entry in list(mm.current_loaded_models)]
    return web.json_response([
        {
            "loaded": entry.model_loaded_memory(),
            "size": entry.model_memory(),
            "required": entry.model_memory_required(entry.device),
            "weights": mm.module_size(model.model),
            "cache": model.workspace.device_nbytes,
        }
        for entry, model in held
        if type(model).__name__ == "ManagedModel"
    ])

NODE_CLASS_MAPPINGS = {}
"""
"""A pack that says what ComfyUI believes of the models that it has loaded, and lets it free some memory first."""


LOOP = """
import nodes
from comfy_execution.graph_utils import GraphBuilder, is_link

class StartLoop:
    RETURN_TYPES = ("INT", "BOOLEAN", "BOOLEAN", "*", "*")
    FUNCTION, CATEGORY = "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        required = {"mode": (["simple"],), "mode.num_iterations": ("INT",)}
        return {"required": required, "optional": {"initial_iteration_value": ("ROLLING_KV_STATE",)}}

    def run(self, initial_iteration_value=None, **_):
        return (0, False, False, None, initial_iteration_value)

class EndLoop:
    RETURN_TYPES = ("*",)
    FUNCTION, CATEGORY = "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        optional = {"output_value": ("LATENT",), "next_iteration_value": ("ROLLING_KV_STATE",)}
        return {
            "required": {"accumulate": ("BOOLEAN",)}, "optional": optional,
            "hidden": {"graph": "DYNPROMPT", "end": "UNIQUE_ID"},
        }

    def run(self, accumulate, graph, end, output_value=None, next_iteration_value=None):
        body = set()

        def in_loop(name):
            made = graph.get_node(name)
            before = [value[0] for value in made["inputs"].values() if is_link(value)]
            inside = made["class_type"] == "StartLoop" or any([in_loop(other) for other in before])
            body.update([name] if inside else [])
            return inside

        in_loop(end)
        (start,) = [name for name in body if graph.get_node(name)["class_type"] == "StartLoop"]
        left = graph.get_node(start)["inputs"]["mode.num_iterations"] - 1
        if not left:
            return (output_value,)
        built = GraphBuilder()
        copies = {name: built.node(graph.get_node(name)["class_type"], name) for name in body}
        for name, copied in copies.items():
            for given, value in graph.get_node(name)["inputs"].items():
                inside = is_link(value) and value[0] in copies
                copied.set_input(given, copies[value[0]].out(value[1]) if inside else value)
        copies[start].set_input("mode.num_iterations", left)
        copies[start].set_input("initial_iteration_value", next_iteration_value)
        return {"result": (copies[end].out(0),), "expand": built.finalize()}

NODE_CLASS_MAPPINGS = {"StartLoop": StartLoop, "EndLoop": EndLoop} if "StartLoop" not in nodes.NODE_CLASS_MAPPINGS else {}
"""
"""ComfyUI's loop nodes where it has none yet (0.27), as far as a state needs them: the graph between the two, made anew each time."""


def write_packs(folder: Path) -> dict[str, Path]:
    """The folders of all of them, and of this pack, by their names."""
    packs = {"rolling-kv": PACK}
    for name, source in (("pick", PICK), ("loaded", LOADED), ("loop", LOOP)):
        packs[name] = folder / name
        packs[name].mkdir()
        (packs[name] / "__init__.py").write_text(source, encoding="utf-8")
    return packs
