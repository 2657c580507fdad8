"""Weights in main memory, block by block, under ComfyUI's memory management."""

import torch
from graphs import one_sampler, saved_latent


def made(client, seed: int, **inputs) -> torch.Tensor:
    graph = one_sampler(3, seed=seed)
    graph["model"]["inputs"] |= inputs
    return saved_latent(client, client.run(graph))


def test_offloaded_weights_make_the_same_videos_before_and_after_they_were_unloaded(client):
    for storage in ("model", "float8"):
        expected = [made(client, seed, storage=storage) for seed in (1, 2)]
        assert torch.equal(made(client, 1, storage=storage, offload=True), expected[0])
        client.post("/free", {"unload_models": True, "free_memory": False})
        assert torch.equal(made(client, 2, storage=storage, offload=True), expected[1])
