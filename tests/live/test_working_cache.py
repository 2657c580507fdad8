"""With another pack beside this one: what ComfyUI's memory management believes of the working cache, and states in a loop."""

import json

import pytest
import torch
from graphs import node, one_sampler, sample, save_latent, saved_latent
from servers import start

from tools.comfyui.env import PACK

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
    entries = [entry for entry in mm.current_loaded_models if type(entry.model).__name__ == "ManagedModel"]
    return web.json_response([
        {
            "loaded": entry.model_loaded_memory(),
            "size": entry.model_memory(),
            "required": entry.model_memory_required(entry.device),
            "weights": mm.module_size(entry.model.model),
            "cache": entry.model.workspace.device_nbytes,
        }
        for entry in entries
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


@pytest.fixture(scope="module")
def server(install, tmp_path_factory):
    packs = {"rolling-kv": PACK}
    for name, source in (("loaded", LOADED), ("loop", LOOP)):
        packs[name] = tmp_path_factory.mktemp(name)
        (packs[name] / "__init__.py").write_text(source, encoding="utf-8")
    with start(install, packs=packs) as server:
        yield server


@pytest.fixture
def client(server, watch_log):
    return watch_log(server).client


def loaded(client, query: str = "") -> list[dict]:
    return json.loads(client.get(f"/test/loaded{query}"))


def test_it_counts_as_loaded_and_goes_first(client):
    client.run(one_sampler(4, seed=1))
    (model,) = loaded(client)
    cache, weights = model["cache"], model["weights"]
    assert cache > 0 and model["loaded"] == model["size"] == weights + cache
    assert model["required"] == 0  # to run again: the sampler announces what it needs beyond this cache
    (model,) = loaded(client, f"?free={cache // 2}")
    assert model["cache"] == 0 and model["loaded"] == model["size"] == weights
    client.run(one_sampler(4, seed=2))
    (model,) = loaded(client)
    assert model["cache"] == cache and model["loaded"] == model["size"] == weights + cache
    client.run(one_sampler(4, seed=3, batch_size=2))
    (model,) = loaded(client)
    assert model["cache"] == 2 * cache and model["loaded"] == model["size"] == weights + 2 * cache


def test_more_than_it_takes_unloads_the_weights_too(client):
    client.run(one_sampler(4, seed=1))
    (model,) = loaded(client)
    assert loaded(client, f"?free={model['cache'] + 1}") == []
    client.run(one_sampler(4, seed=2))
    assert loaded(client) == [model]


def test_the_free_button_takes_it(client):
    client.run(one_sampler(4, seed=1))
    assert loaded(client)[0]["cache"] > 0
    client.post("/free", {"unload_models": True, "free_memory": False})
    client.run({"1": {"class_type": "PreviewAny", "inputs": {"source": "the queue frees before it goes on"}}})
    assert loaded(client) == []


def test_a_state_goes_round_in_a_loop(client):
    """Three more chunks, one each time, are those of one sampler."""
    graph = one_sampler(1) | {
        "start": node("StartLoop", mode="simple", initial_iteration_value=["sample", 1], **{"mode.num_iterations": 3}),
        "again": sample(1, state=["start", 4]),
        "end": node("EndLoop", output_value=["again", 0], next_iteration_value=["again", 1], accumulate=False),
        "save": save_latent("end"),
    }
    looped = saved_latent(client, client.run(graph))
    assert torch.equal(looped, saved_latent(client, client.run(one_sampler(4))))
