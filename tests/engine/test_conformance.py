"""Agreement with the original Self-Forcing code on recorded inputs and outputs (tests/data/self_forcing/README.md).

`ROLLING_KV_CASES=DIR` runs the same tests on another folder of cases.
"""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from cases import FOLDER, load_cases
from reference import NaiveRun, guided_chunk

from rolling_kv.config import ALL_FRAMES, CacheConfig, ExecutionConfig
from rolling_kv.sampling.schedule import seeded_noise
from rolling_kv.sampling.session import RollingSession

FEW_STEP = load_cases("renoise")
MULTI_STEP = load_cases("unipc")
FLOAT32 = [case for case in FEW_STEP if case.config["dtype"] == "float32"]
BFLOAT16 = [case for case in FEW_STEP if case.config["dtype"] == "bfloat16"]


def by_name(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def difference(a, b):
    return (a.double() - b.double()).abs().max().item()


def test_there_are_cases():
    assert FEW_STEP or MULTI_STEP, f"no cases in {FOLDER}"


@by_name([case for case in FLOAT32 if case.config["batch"] == 1 and case.frames_stay])
def test_bit_equal_while_all_frames_stay(case):
    """Always bit-equal to the naive reference on this machine, and to the recording wherever the reference is.

    A recording also carries the rounding of the processor it was made on: the original code itself, run on another
    kind of processor, differs from it by about 2e-6.
    """
    ours, naive, recorded = case.run(exact=True), case.run_naively(), case.tensors["output"]
    assert difference(ours, naive) == 0
    assert difference(ours, recorded) == difference(naive, recorded) <= 1e-5


@by_name(FLOAT32)
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
def test_float32(case, exact):
    assert difference(case.run(exact=exact), case.tensors["output"]) <= 1e-5


@by_name(BFLOAT16)
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
def test_bfloat16_is_no_worse_than_the_original(case, exact):
    reference = case.run(dtype=torch.float32, exact=True)
    ours = case.run(dtype=torch.bfloat16, exact=exact)

    def error(x):
        return (x.double() - reference.double()).abs().mean().item()

    assert error(ours) <= error(case.tensors["output"])


@by_name(MULTI_STEP)
def test_multistep_with_guidance(case):
    assert difference(case.run(exact=True), case.tensors["output"]) <= 1e-5


@pytest.mark.parametrize("given", [0, 3, 4], ids=lambda frames: f"{frames} given frames")
@pytest.mark.parametrize("window, sink", [(ALL_FRAMES, 0), (6, 0), (8, 1)], ids=["all", "window", "window and sink"])
def test_multistep_with_a_window_and_given_frames(window, sink, given):
    """No recording has these together: against the naive reference, bit for bit until a frame leaves."""
    model = MULTI_STEP[0].model(torch.float32)
    sampling = replace(model.preset.sampling, num_inference_steps=6)
    model.preset = replace(model.preset, sampling=sampling, cache=CacheConfig(window, sink))
    prompt, negative = (MULTI_STEP[0].tensors[f"{name}prompt_embeds"] for name in ("", "negative_"))
    shape = (1, 16, sampling.chunk, 4, 6)
    clip = seeded_noise(2, 0, (1, 16, given, *shape[3:]), 0)
    cond, uncond = (NaiveRun(deepcopy(model), embeds) for embeds in (prompt, negative))
    session = RollingSession(
        model, prompt, negative=negative, height=32, width=48, execution=ExecutionConfig(exact=True)
    )
    with session:
        if given:
            session.prefill(clip)
            for run in (cond, uncond):
                run.prefill(clip)
        for chunk in session.generate(4, seed=1):
            expected = guided_chunk(cond, uncond, seeded_noise(1, cond.start, shape, 0))
            assert difference(chunk.latents, expected) <= (0 if window == ALL_FRAMES or cond.start <= window else 1e-5)
    assert max(cond.attended) == given + 4 * sampling.chunk - 1
    assert len(cond.attended) == (given + 4 * sampling.chunk if window == ALL_FRAMES else window)
