"""Step Cache and Benchmark Step Caches on a real server, with the bundled model in few steps of its many."""

import io

import pytest
import torch
from graphs import chosen, loaders, node, one_sampler, prompt, save_images, saved_images, saved_latent
from PIL import Image

from rolling_kv.step_cache import METHODS
from tools.comfyui.client import PromptFailed, PromptInterrupted, PromptRejected

MANY = {"preset": "causal-multistep", "dtype": "auto"}
"""Fifty steps with guidance, whatever the model says."""


def many_steps(seed=1, **step_cache):
    """One chunk in many steps, with the step cache of these settings, or without one."""
    graph = one_sampler(1, seed, negative=["negative", 0]) | {"negative": prompt("")}
    graph["model"]["inputs"] |= MANY
    if step_cache:
        graph["cache"] = node("RollingKVStepCache", model=["model", 0], **step_cache)
        graph["sample"]["inputs"]["model"] = ["cache", 0]
    return graph


def steps(count):
    return chosen("steps", "this many", count=count)


def benchmark(model="model", **inputs):
    """A benchmark of two step caches with their defaults, small enough for a test."""
    methods = chosen("methods", "chosen", **{name: name in ("firstblock", "taylorseer") for name in METHODS})
    values = {
        "model": [model, 0], "positive": ["positive", 0], "vae": ["vae", 0], **methods,
        **steps(8), "chunks": 1, "first_seed": 0, "width": 64, "height": 64, "strengths": "defaults", "memory": False,
    }  # fmt: skip
    return {
        **loaders(), "positive": prompt("a red circle moving right"), "negative": prompt(""),
        "benchmark": node("RollingKVBenchmark", **values | inputs),
    }  # fmt: skip


def rows(outputs):
    """The table that a benchmark showed: its head and its lines, as lists of cells."""
    (text,) = outputs["benchmark"]["text"]
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("| -")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_a_step_cache_changes_the_video_a_little_and_leaves_the_model_as_it_was(client):
    client.free()
    plain = saved_latent(client, client.run(many_steps()))
    cached = saved_latent(client, client.run(many_steps(method="First Block Cache", **{"method.threshold": 0.1})))
    error = (cached - plain).square().mean() / plain.square().mean()
    assert 0 < error < 0.05
    after = saved_latent(client, client.run(many_steps(seed=2)))
    client.free()
    assert torch.equal(saved_latent(client, client.run(many_steps(seed=2))), after)


def test_few_steps_are_sampled_without_the_step_cache(client):
    graph = one_sampler(1) | {
        "cache": node("RollingKVStepCache", model=["model", 0], method="TaylorSeer", **TAYLORSEER)
    }
    graph["sample"]["inputs"]["model"] = ["cache", 0]
    with_cache = saved_latent(client, client.run(graph))
    assert torch.equal(saved_latent(client, client.run(one_sampler(1))), with_cache)


TAYLORSEER = {
    "method.cache_interval": 2, "method.max_order": 1, "method.disable_cache_before_step": 1,
    "method.use_lite_mode": False, "method.disable_cache_after_step": 0, "method.taylor_factors_dtype": "float32",
}  # fmt: skip


def test_advanced_settings_may_be_left_out(client):
    """They have their defaults then: these are all that SeaCache has."""
    basic = {"method.threshold": 1.0, "method.residual_order": 1, "method.max_consecutive_cached": 2}
    advanced = {"method.retention_steps": 1, "method.cache_end_steps": 1, "method.power_exp": 3.0}
    default = saved_latent(client, client.run(many_steps(method="SeaCache", **basic)))
    given = saved_latent(client, client.run(many_steps(method="SeaCache", **basic, **advanced)))
    assert torch.equal(default, given)


@pytest.mark.parametrize("method", [{"method": "TeaCache"}, {}], ids=["unknown", "none"])
def test_an_unknown_method_is_told_with_the_choices(client, method):
    with pytest.raises(PromptRejected, match="method must be one of First Block Cache, TaylorSeer, .*, SeaCache$"):
        graph = many_steps(method="TeaCache")
        graph["cache"]["inputs"] = {"model": ["model", 0]} | method
        client.run(graph)
    with pytest.raises(PromptRejected, match="methods must be all or chosen"):
        client.run(benchmark(methods="some"))


def test_a_benchmark_shows_and_puts_out_table_and_plot(client):
    graph = benchmark(model="cache")
    graph["cache"] = node("RollingKVStepCache", model=["model", 0], method="TaylorSeer", **TAYLORSEER)
    graph |= {"text": node("PreviewAny", source=["benchmark", 0]), "save": save_images("benchmark")}
    graph["save"]["inputs"]["images"] = ["benchmark", 1]
    outputs = client.run(graph)
    head, plain, *cached = rows(outputs)
    assert outputs["text"]["text"] == outputs["benchmark"]["text"]
    assert plain[0] == "none" and [row[:2] for row in cached] == [
        ["First Block Cache", "threshold 0.05"], ["TaylorSeer", "every 5"], ["Step Cache node", "TaylorSeer"]
    ]  # fmt: skip
    values = [dict(zip(head, row)) for row in cached]
    assert values[2]["ffn"] == "50%" and all(float(value["seconds"]) > 0 for value in values)
    assert all(value["PSNR, dB"] == "same" or 5 < float(value["PSNR, dB"]) < 100 for value in values)
    (shown,) = outputs["benchmark"]["images"]
    plot = Image.open(io.BytesIO(client.view(shown)))
    assert plot.size == (960, 600) == saved_images(client, outputs, "save").shape[2:0:-1]


def test_all_methods_in_both_modes(client):
    """All of them, MagCache's calibration and the quality left out among them."""
    guidance = chosen("guidance", "this strength", strength=3.0)
    inputs = {"methods": "all", "negative": ["negative", 0], **guidance, **steps(6)}
    for mode in ("multi-step", "bidirectional"):
        graph = benchmark(**inputs, mode=mode)
        if mode == "bidirectional":
            del graph["benchmark"]["inputs"]["vae"]
        outputs = client.run(graph)
        text = outputs["benchmark"]["text"][0]
        left_out = text.count("SeaCache needs diffusers")  # by an older one
        assert len({row[0] for row in rows(outputs)[2:]}) == len(METHODS) - left_out
        assert text.startswith(mode) and "MagCache's constants of this model: 1." in text
        assert ("PSNR" in text) == (mode == "multi-step") == ("No quality" not in text)


def test_a_benchmark_cancelled_midway_leaves_the_model_as_it_was(client):
    client.free()
    seen = []

    def cancel(node_id, step, total):
        if node_id == "benchmark":
            seen.append((step, total))
            if len(seen) > 1 and step > total / 2 and not cancel.done:
                cancel.done = True
                client.interrupt()

    cancel.done = False
    with pytest.raises(PromptInterrupted, match="RollingKVBenchmark"):
        client.run(benchmark(**steps(40), chunks=3), cancel)
    assert seen[-1][0] < seen[-1][1]
    # The loaded model is still in ComfyUI's cache: these runs use it.
    video = saved_latent(client, client.run(one_sampler(2, seed=31)))
    assert len(rows(client.run(benchmark()))) == 4
    client.free()
    assert torch.equal(saved_latent(client, client.run(one_sampler(2, seed=31))), video)


@pytest.mark.traceback_expected
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"steps": "the model's own"}, r"few steps.*From one of the 4 steps .* changes by \d+ %.*set steps to"),
        ({"methods": "chosen"} | {f"methods.{name}": False for name in METHODS}, "Switch on at least one"),
        (chosen("guidance", "this strength", strength=3.0), "needs a negative prompt"),
    ],
)
def test_what_cannot_work_is_told(client, inputs, message):
    with pytest.raises(PromptFailed, match=message):
        client.run(benchmark(**inputs))


@pytest.mark.traceback_expected
def test_a_step_cache_without_its_constants_is_told_before_anything_runs(client):
    graph = benchmark(model="cache")
    settings = {"threshold": 0.06, "max_skip_steps": 3, "retention_ratio": 0.2, "mag_ratios": ""}
    settings = {f"method.{name}": value for name, value in settings.items()}
    graph["cache"] = node("RollingKVStepCache", model=["model", 0], method="MagCache", **settings)
    done = []
    with pytest.raises(PromptFailed, match="Benchmark Step Caches"):
        client.run(graph, lambda name, step, total: done.append(step) if name == "benchmark" else None)
    assert not any(done)
