"""The rules of the cache and of prompt switches, as a person chooses them on the nodes."""

import pytest
import torch
from graphs import chosen, node, one_sampler, prompt, sample, save_latent, saved_latent

from tools.comfyui.client import PromptFailed, PromptRejected

OWN = "the model's own"
SWITCHES = ["hold", "joint", "causal", "flush", "cut"]
ANEW = {"joint": {"keep_sink": True}, "causal": {"keep_sink": True}}
AVERAGES = {
    "averaged into the sink": {"alpha": 0.5},
    "memory behind the sink": {"slow": 0.2, "fast": 0.6},
}
STEPS = 4  # of the bundled model over one chunk
FRAMES = 3  # of a chunk; the window holds three of them


def attach(sink: int = 0, **inputs) -> dict:
    """The node "cache" between the model and a sampler."""
    sink = chosen("sink", "this many frames", frames=sink)
    return {"cache": node("RollingKVAttachCache", model=["model", 0], window=OWN, **sink, **inputs)}


def attached(chunks: int, sink: int = 0, **inputs) -> dict:
    """A whole prompt with a sampler behind Attach Rolling Cache."""
    return one_sampler(chunks, model=["cache", 0]) | attach(sink, **inputs)


def switched(before: int = 2, attach_inputs: dict | None = None, **inputs) -> dict:
    """A sampler of `before` chunks and one more with another prompt, which has the inputs."""
    graph = attached(before, **(attach_inputs or {}))
    graph["new"] = prompt("a blue square moving left")
    graph["second"] = sample(1, positive="new", model=["cache", 0], state=["sample", 1], **inputs)
    graph["save"] = save_latent("second")
    return graph


def run_latent(client, graph: dict) -> torch.Tensor:
    return saved_latent(client, client.run(graph))


def passes(client, graph: dict, name: str) -> int:
    """How many passes a node's progress bar counts."""
    totals = []
    client.run(graph, lambda node_id, step, steps: totals.append(steps) if node_id == name else None)
    return totals[-1]


def test_positions_change_a_video_once_its_sink_has_been_left_behind(client):
    absolute = run_latent(client, attached(4, sink=3, positions="absolute"))
    assert torch.equal(run_latent(client, attached(4, sink=3, positions=OWN)), absolute)
    window = run_latent(client, attached(4, sink=3, positions="window"))
    assert torch.equal(window[:, :, : 3 * FRAMES], absolute[:, :, : 3 * FRAMES])
    assert not torch.equal(window, absolute)


def test_what_leaves_is_forgotten_or_averaged(client):
    rules = {"sink": 3, "positions": "window"}
    made = {"forgotten": run_latent(client, attached(5, **rules, **chosen("leaving", "forgotten")))}
    assert torch.equal(run_latent(client, attached(5, **rules, **chosen("leaving", OWN))), made["forgotten"])
    for choice, shares in AVERAGES.items():
        made[choice] = run_latent(client, attached(5, **rules, **chosen("leaving", choice, **shares)))
        other = dict.fromkeys(shares, 0.9)
        assert not torch.equal(
            run_latent(client, attached(5, **rules, **chosen("leaving", choice, **other))), made[choice]
        )
    for one, other in [("forgotten", "averaged into the sink"), ("forgotten", "memory behind the sink")]:
        assert not torch.equal(made[one], made[other])
        assert torch.isfinite(made[other]).all()


def test_each_way_to_switch_is_another_continuation(client, cacheless_client):
    made = {way: run_latent(client, switched(switch=way)) for way in SWITCHES}
    before = 2 * FRAMES
    for way, latent in made.items():
        assert torch.equal(latent[:, :, :before], made["hold"][:, :, :before]), way
        assert torch.isfinite(latent).all()
    for number, way in enumerate(SWITCHES):
        assert not any(torch.equal(made[way], made[other]) for other in SWITCHES[:number]), way
    # The bundled model holds, and so does a chain of samplers that choose nothing.
    assert torch.equal(run_latent(client, switched(switch=OWN)), made["hold"])
    assert torch.equal(run_latent(client, switched()), made["hold"])
    # The cache's own way is that of every sampler behind it, unless one chooses another.
    for way in SWITCHES:
        own = {"attach_inputs": chosen("switch", way, **ANEW.get(way, {}))}
        assert torch.equal(run_latent(client, switched(**own)), made[way]), way
        assert torch.equal(run_latent(client, switched(**own, switch="hold")), made["hold"]), way
    # Where ComfyUI keeps nothing between the nodes, each is the same.
    for way, latent in made.items():
        assert torch.equal(run_latent(cacheless_client, switched(switch=way)), latent), way


def test_a_switch_is_replayed_when_the_working_cache_is_gone(client):
    graph = switched(switch="causal")
    graph["third"] = sample(1, positive="new", model=["cache", 0], state=["second", 1])
    graph["save"] = save_latent("third")
    chained = run_latent(client, graph)
    client.run(one_sampler(1, seed=9))  # whose cache takes the place of the other
    graph["third"]["inputs"]["seed"] = 2
    other = run_latent(client, graph)
    assert torch.equal(other[:, :, :-FRAMES], chained[:, :, :-FRAMES]) and not torch.equal(other, chained)
    client.free()
    assert torch.equal(run_latent(client, graph), other)


def test_whether_the_sink_outlives_a_switch_is_a_choice(client):
    kept, replaced = (
        run_latent(client, switched(4, {"sink": 3} | chosen("switch", "joint", keep_sink=keep)))
        for keep in (True, False)
    )
    assert not torch.equal(kept, replaced)


@pytest.mark.parametrize(("way", "anew"), [("hold", 0), ("joint", 1), ("causal", 3), ("flush", 0), ("cut", 0)])
def test_passes_that_compute_the_window_anew_are_counted(client, way, anew):
    client.free()  # so that the first sampler runs, and leaves its cache to the second
    context = 0 if anew else 1  # of the chunk before, which is not needed where all of the window is computed anew
    assert passes(client, switched(5, switch=way), "second") == context + anew + STEPS


@pytest.mark.traceback_expected
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (chosen("leaving", "averaged into the sink", alpha=0.9), "there is none: make the sink as long as a chunk"),
        ({"sink": 2} | chosen("leaving", "averaged into the sink", alpha=0.9), "make the sink 3"),
        ({"sink": 3} | chosen("leaving", "memory behind the sink", slow=0.1, fast=0.2), 'needs "window" positions'),
        (
            {"sink": 3, "positions": "window"}
            | chosen("leaving", "memory behind the sink", slow=0.1, fast=0.2)
            | chosen("switch", "cut"),
            'a "cut" at a prompt switch cannot go with leaving "memory"',
        ),
        ({"sink": 7}, r"cannot hold the sink \(7\) and a chunk \(3\): make the window at least 10"),
        (chosen("leaving", "averaged into the sink", alpha=1.5), "alpha"),
        ({"sink_phase": "before"}, "sink_phase must be one of the model's own, absolute, rebased, got 'before'"),
    ],
)
def test_rules_that_do_not_go_together_are_refused_by_the_cache(client, inputs, message):
    with pytest.raises((PromptFailed, PromptRejected), match=message):
        client.run(attached(1, **inputs))


@pytest.mark.traceback_expected
def test_a_switch_that_averages_do_not_allow_is_refused_before_anything_is_sampled(client):
    rules = {"sink": 3, "positions": "window"} | chosen("leaving", "memory behind the sink", slow=0.1, fast=0.2)
    graph = switched(2, rules, switch="flush")
    steps = []
    with pytest.raises(PromptFailed, match='a "flush" at a prompt switch cannot go with leaving "memory"'):
        client.run(graph, lambda node_id, step, steps_: steps.append(steps_) if node_id == "second" else None)
    assert not any(steps)
    with pytest.raises(PromptFailed, match="switch cannot be 'fade'. Choose one of: .*, cut, blend"):
        client.run(switched(1, switch="fade"))


def test_a_blend_leads_from_one_prompt_to_the_other(client):
    graph = switched(2, **chosen("switch", "blend", chunks=3))
    graph["second"]["inputs"]["length"] = 3
    blended = run_latent(client, graph)
    graph["second"]["inputs"] |= {"switch": "hold"}
    at_once = run_latent(client, graph)
    graph["second"]["inputs"]["positive"] = ["positive", 0]
    unchanged = run_latent(client, graph)
    one, two = 3 * FRAMES, 4 * FRAMES  # the first chunk of a blend has the old prompt still
    assert torch.equal(blended[:, :, :one], unchanged[:, :, :one])
    for other in (unchanged, at_once):
        assert not torch.equal(blended[:, :, one:two], other[:, :, one:two])


@pytest.mark.traceback_expected
def test_a_recomputed_context_asks_for_a_vae_when_its_first_frame_is_out_of_view(client):
    graph = one_sampler(2)
    graph["model"]["inputs"]["preset"] = "krea-realtime"
    two = run_latent(client, graph)
    # The context of each chunk but the first is computed anew: one pass for the chunk that is in view.
    client.free()
    assert passes(client, graph, "sample") == 5 + 1 + 5
    graph["sample"]["inputs"]["length"] = 3
    steps = []
    with pytest.raises(PromptFailed, match="decoded and encoded again, which needs a VAE: give one, or keep the first"):
        client.run(graph, lambda node_id, step, total: steps.append(total) if node_id == "sample" else None)
    assert not any(steps)
    graph["sample"]["inputs"]["vae"] = ["vae", 0]
    reencoded = run_latent(client, graph)
    assert reencoded.shape[2] == 3 * FRAMES and torch.equal(reencoded[:, :, : 2 * FRAMES], two)
    del graph["sample"]["inputs"]["vae"]
    graph["sample"]["inputs"]["model"] = ["cache", 0]
    for given in (attach(1), attach(0, context="kept")):
        other = run_latent(client, graph | given)
        assert torch.isfinite(other).all() and not torch.equal(other, reencoded)


def test_an_old_prompt_keeps_its_sink_phase(client):
    for before, now in [("rebased", "window"), ("absolute", "absolute"), (OWN, OWN)]:
        old = run_latent(client, attached(4, sink=3, sink_phase=before))
        assert torch.equal(old, run_latent(client, attached(4, sink=3, positions=now))), before


def test_presets_for_long_videos_run_with_weights_of_another(client):
    made = {}
    for preset in ("self-forcing", "deep-sink", "memrope"):
        graph = one_sampler(8)
        graph["model"]["inputs"]["preset"] = preset
        made[preset] = run_latent(client, graph)
        assert torch.equal(made[preset][:, :, :FRAMES], made["self-forcing"][:, :, :FRAMES])
        assert torch.isfinite(made[preset]).all()
    assert not torch.equal(made["deep-sink"], made["self-forcing"])
    assert not torch.equal(made["memrope"], made["self-forcing"])
