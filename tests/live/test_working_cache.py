"""With another pack beside this one: what ComfyUI's memory management believes of the working cache, and states in a loop."""

import json

import pytest
import torch
from graphs import node, one_sampler, sample, save_latent, saved_latent


@pytest.fixture(scope="module")
def server(crowded_server):
    crowded_server.client.free()  # of other models
    return crowded_server


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
    for text in ("the queue frees before it goes on", "or with this, which may have been faster"):
        client.run({"1": {"class_type": "PreviewAny", "inputs": {"source": text}}})
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
