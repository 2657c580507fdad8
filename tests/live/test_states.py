"""What travels along the edges: split, forked and repeated runs give the bits of one fresh run, also after a cancel."""

import pytest
import torch
from graphs import loaders, one_sampler, prompt, sample, save_latent, saved_latent

from tools.comfyui.client import PromptInterrupted

PASSES = 5  # of the bundled model over one chunk: four denoising steps and the context pass


def run_latent(client, graph: dict) -> torch.Tensor:
    return saved_latent(client, client.run(graph))


def fresh_latent(client, graph: dict) -> torch.Tensor:
    """The result on a server that has just dropped its models and its cached outputs."""
    client.free()
    return run_latent(client, graph)


def test_two_chained_samplers_give_the_bits_of_one(any_client):
    whole = run_latent(any_client, one_sampler(5))
    graph = one_sampler(2)
    graph["second"] = sample(3, state=["sample", 1])
    graph["save"] = save_latent("second")
    assert torch.equal(fresh_latent(any_client, graph), whole)


def test_a_changed_seed_gives_what_a_fresh_server_gives(any_client):
    run_latent(any_client, one_sampler(2, seed=1))
    changed = run_latent(any_client, one_sampler(2, seed=2))
    assert torch.equal(fresh_latent(any_client, one_sampler(2, seed=2)), changed)


def fork(*branches: str) -> dict:
    """One sampler, and from its state the named branches."""
    graph = {**loaders(), "positive": prompt("a red circle moving right"), "sample": sample(2)}
    for seed, name in enumerate(branches, start=10):
        graph[f"{name} prompt"] = prompt(f"a {name} square moving left")
        graph[name] = sample(2, seed=seed if name == "blue" else 99, positive=f"{name} prompt", state=["sample", 1])
        graph[f"save {name}"] = save_latent(name)
    return graph


def test_two_branches_from_one_state_do_not_disturb_each_other(any_client):
    outputs = any_client.run(fork("blue", "green"))
    both = {name: saved_latent(any_client, outputs, f"save {name}") for name in ("blue", "green")}
    assert not torch.equal(both["blue"], both["green"])
    assert torch.equal(both["blue"][:, :, :6], both["green"][:, :, :6])
    for name, latent in both.items():
        any_client.free()
        assert torch.equal(saved_latent(any_client, any_client.run(fork(name)), f"save {name}"), latent), name


def test_branches_of_a_state_that_carries_its_keys_replay_nothing(any_client):
    passes, latents = {}, {}
    for keep_keys in (False, True):
        graph = fork("blue", "green")
        graph["sample"]["inputs"] |= {"length": 4, "keep_keys": keep_keys}
        any_client.free()
        outputs = any_client.run(graph, lambda node_id, step, steps: passes.__setitem__((keep_keys, node_id), steps))
        latents[keep_keys] = {name: saved_latent(any_client, outputs, f"save {name}") for name in ("blue", "green")}
    # Whichever comes first takes the cache over; of three chunks before the last, nobody replays any.
    replayed = {name: passes[False, name] - passes[True, name] for name in ("blue", "green")}
    assert sorted(replayed.values()) == [0, 3]
    assert all(torch.equal(latents[True][name], latents[False][name]) for name in latents[True])


def test_changing_the_second_of_two_prompts_samples_only_from_there(client):
    graph = fork("blue")
    client.free()
    client.run(graph)
    graph["blue prompt"]["inputs"]["text"] = "a yellow square moving up"
    sampled = set()
    client.run(graph, lambda node_id, step, steps: sampled.add(node_id))
    assert "blue" in sampled and "sample" not in sampled


class CancelMidChunk:
    """For `run`: interrupts a node once, soon after its first chunk; the interrupt then falls inside a later one.

    The server leaves out most reports of a long run, always the same steps of a chunk where their number fits: so it is no
    use to wait for a certain one.
    """

    def __init__(self, client, node_id: str):
        self.client = client
        self.node_id = node_id
        self.cancelled_at = None

    def __call__(self, node_id: str, step: int, steps: int) -> None:
        if node_id != self.node_id:
            return
        self.last, self.total = step, steps
        if self.cancelled_at is None and step > PASSES:
            self.cancelled_at = step
            self.client.interrupt()


def test_a_cancelled_run_stops_at_once_and_the_next_is_as_ever(any_client):
    expected = fresh_latent(any_client, one_sampler(3, seed=5))
    any_client.free()
    cancel = CancelMidChunk(any_client, "sample")
    with pytest.raises(PromptInterrupted, match="RollingKVSample"):
        any_client.run(one_sampler(200, seed=5), cancel)
    assert cancel.total >= 800 and cancel.last < cancel.cancelled_at + 20
    assert torch.equal(run_latent(any_client, one_sampler(3, seed=5)), expected)


def test_a_cancelled_continuation_leaves_the_state_it_came_from(any_client):
    graph = one_sampler(2)
    graph["second"] = sample(200, seed=3, state=["sample", 1])
    graph["save"] = save_latent("second")
    with pytest.raises(PromptInterrupted):
        any_client.run(graph, CancelMidChunk(any_client, "second"))
    graph["second"] = sample(2, seed=3, state=["sample", 1])
    continued = run_latent(any_client, graph)
    assert torch.equal(fresh_latent(any_client, graph), continued)
