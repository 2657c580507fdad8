"""Several videos at once: a batch with a seed for each, and lists of prompts and states, under every cache of ComfyUI."""

import numpy as np
import pytest
import torch
from graphs import loaders, node, one_sampler, prompt, read_video, sample, save_latent, save_video, saved_latent

from tools.comfyui.client import PromptFailed

TEXTS = ("a red circle moving right", "a blue square moving left")


def latents(client, graph: dict, *names: str) -> list[torch.Tensor]:
    outputs = client.run(graph)
    return [saved_latent(client, outputs, f"save {name}") for name in names]


def chain(seed: int = 5, **inputs) -> dict:
    """A sampler, two that continue it, and one that continues the first of these."""
    graph = {**loaders(), "positive": prompt(TEXTS[0]), "other": prompt(TEXTS[1])}
    graph["start"] = sample(2, seed, **inputs)
    graph["straight"] = sample(1, seed, state=["start", 1])
    graph["fork"] = sample(1, seed, positive="other", state=["start", 1])
    graph["end"] = sample(1, seed, state=["straight", 1])
    return graph | {f"save {name}": save_latent(name) for name in ("fork", "end")}


@pytest.fixture(scope="module")
def alone(default_server):
    """What two seeds make alone, on the default server: a fork, and a whole video in one run."""
    made = []
    for seed in (5, 6):
        (fork,) = latents(default_server.client, chain(seed), "fork")
        graph = one_sampler(4, seed)
        made.append((fork, saved_latent(default_server.client, default_server.client.run(graph))))
    return made


def test_chains_and_forks_give_the_same_under_every_cache(every_client, alone):
    for _ in range(2):  # the second time, some of it is there already
        for made, expected in zip(latents(every_client, chain(), "fork", "end"), alone[0]):
            assert torch.equal(made, expected)


def test_a_batch_is_the_videos_of_its_seeds(every_client, alone):
    together = latents(every_client, chain(batch_size=2), "fork", "end")
    for made, (first, second) in zip(together, zip(*alone)):
        assert made.shape[0] == 2
        torch.testing.assert_close(made, torch.cat([first, second]), atol=1e-3, rtol=1e-3)
    every_client.run(one_sampler(1, seed=9))  # whose cache takes the place of the other
    again = latents(every_client, chain(batch_size=2), "fork", "end")
    assert all(torch.equal(*pair) for pair in zip(again, together))


def test_behind_the_largest_seed_comes_zero(client):
    graph = one_sampler(1, 2**64 - 1, batch_size=2)
    both = saved_latent(client, client.run(graph))
    zero = saved_latent(client, client.run(one_sampler(1, 0)))
    torch.testing.assert_close(both[1:], zero, atol=1e-3, rtol=1e-3)


def saved_videos(client, outputs: dict, name: str) -> list[np.ndarray]:
    return [read_video(client.view(file)).frames for file in outputs[name]["images"]]


def test_a_batch_is_decoded_into_a_file_for_each_video(any_client):
    graph = one_sampler(1, seed=5, batch_size=2)
    graph["video"] = node("RollingKVDecodeVideo", vae=["vae", 0], latent=["sample", 0])
    graph["save video"] = save_video("video")
    both = saved_videos(any_client, any_client.run(graph), "save video")
    assert len(both) == 2
    for seed, video in enumerate(both, start=5):
        graph["sample"] = sample(1, seed)
        (alone,) = saved_videos(any_client, any_client.run(graph), "save video")
        assert video.shape == alone.shape == (9, 64, 64, 3)
        assert np.abs(video - alone).mean() < 0.1
    assert np.abs(both[0] - both[1]).mean() > 3


def test_lists_of_prompts_make_lists_of_videos_and_of_states(any_client):
    """ComfyUI runs a node once for each member of a list: so a second sampler continues each state with its own prompt."""
    graph = loaders()
    for number, text in enumerate(TEXTS):
        graph[f"text {number}"] = node("PrimitiveString", value=text)
        graph[f"next text {number}"] = node("PrimitiveString", value=TEXTS[1 - number])
    for name in ("text", "next text"):
        graph[f"{name}s"] = node(
            "CreateList", **{f"inputs.input{number}": [f"{name} {number}", 0] for number in (0, 1)}
        )
    if not any_client.has_nodes(graph):
        pytest.skip("this ComfyUI has no Create List")
    graph |= {"positive": prompt(["texts", 0]), "next": prompt(["next texts", 0])}
    graph["sample"] = sample(1)
    graph["second"] = sample(1, positive="next", state=["sample", 1])
    graph["video"] = node("RollingKVDecodeVideo", vae=["vae", 0], latent=["second", 0])
    graph["save"], graph["save video"] = save_latent("second"), save_video("video")
    outputs = any_client.run(graph)
    files, videos = outputs["save"]["latents"], saved_videos(any_client, outputs, "save video")
    assert len(files) == len(videos) == 2 and np.abs(videos[0] - videos[1]).mean() > 3
    for number, file in enumerate(files):
        straight = {**loaders(), "positive": prompt(TEXTS[number]), "next": prompt(TEXTS[1 - number])}
        straight |= {"sample": graph["sample"], "second": graph["second"], "save": save_latent("second")}
        listed = saved_latent(any_client, {"save": {"latents": [file]}})
        assert torch.equal(listed, saved_latent(any_client, any_client.run(straight)))


@pytest.mark.traceback_expected
def test_a_batch_beside_a_state_of_another_is_refused(client):
    graph = one_sampler(1, batch_size=2)
    graph["second"] = sample(1, state=["sample", 1], batch_size=3)
    graph["save"] = save_latent("second")
    with pytest.raises(PromptFailed, match="batch_size is 3, and the state holds 2 videos: leave batch_size at 1"):
        client.run(graph)
    graph["second"]["inputs"]["batch_size"] = 2
    assert saved_latent(client, client.run(graph)).shape[:3] == (2, 16, 6)
    graph = one_sampler(1, batch_size=2, initial_latent=["sample", 0])
    graph["sample"], graph["last"] = sample(1), graph["sample"]
    graph["save"] = save_latent("last")
    with pytest.raises(PromptFailed, match="the initial latent holds 1 video: .* Repeat Latent Batch"):
        client.run(graph)
