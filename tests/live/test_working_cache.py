"""The working cache in the eyes of ComfyUI's memory management: counted while it is there, the first thing to go."""

import json

import pytest
from graphs import one_sampler
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


@pytest.fixture(scope="module")
def server(install, tmp_path_factory):
    pack = tmp_path_factory.mktemp("loaded")
    (pack / "__init__.py").write_text(LOADED, encoding="utf-8")
    with start(install, packs={"rolling-kv": PACK, "loaded": pack}) as server:
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
