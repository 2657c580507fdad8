"""Agreement with the original code of every family on recorded inputs and outputs (tests/data/<family>/README.md).

`ROLLING_KV_CASES=DIR` runs the same tests on other recordings: those in DIR and in the folders in it, of any families.
"""

from copy import deepcopy
from dataclasses import replace
from shutil import copy

import pytest
import torch
from cases import DATA, FOLDER, load_cases
from reference import NaiveRun, guided_chunk

from rolling_kv.config import ALL_FRAMES, CacheConfig, ExecutionConfig
from rolling_kv.sampling import rolling
from rolling_kv.sampling.schedule import clean_prediction, seeded_noise
from rolling_kv.sampling.session import RollingSession

CASES = load_cases()
FLOAT32, BFLOAT16 = (
    [case for case in CASES if case.dtype == dtype and not case.quirk] for dtype in ("float32", "bfloat16")
)
SELF_FORCING = [case for case in FLOAT32 if case.family == "self-forcing" and case.config["batch"] == 1]
MULTI_STEP = [case for case in SELF_FORCING if case.sampler == "unipc"]

QUIRKS = {
    "infinity-rope/quirk_cut_at_3": 0.61,
    "infinity-rope/quirk_flush_at_3": 0.38,
    "infinity-rope/quirk_flush_window_9": 0.56,
    "infinity-rope/quirk_sink_0": 0.13,
    "infinity-rope/quirk_window_7": 0.44,
    "longlive/quirk_sink_6": 0.62,
    "longlive2/quirk_lost_pin": 0.56,  # the README's 0.67 is that of another way to keep the pin
    "memrope/quirk_adaptive": 0.060,
    "memrope/quirk_sink_5": 0.419,
    "reward-forcing/quirk_sink_1": "make the sink 3",
    "reward-forcing/quirk_window_8": "the nearest windows are 6 and 9",
}
"""How far the sane behaviour, ours, is from a fault of the original by its README, or why we refuse the settings."""


def by_name(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def difference(a, b):
    return (a.double() - b.double()).abs().max().item()


either_way = pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])


def test_there_are_cases():
    assert CASES, f"no cases in {FOLDER}"


@by_name([case for case in SELF_FORCING if case.sampler == "renoise" and case.frames_stay])
def test_bit_equal_while_all_frames_stay(case):
    """Always bit-equal to the naive reference on this machine, and to the recording wherever the reference is.

    A recording also carries the rounding of the processor it was made on: the original code itself, run on another
    kind of processor, differs from it by about 2e-6.
    """
    ours, naive, recorded = case.run(exact=True), case.run_naively(), case.tensors["output"]
    assert difference(ours, naive) == 0
    assert difference(ours, recorded) == difference(naive, recorded) <= 1e-5


@by_name(FLOAT32)
@either_way
def test_float32(case, exact):
    made = case.make(exact=exact)
    assert difference(made.output, case.tensors["output"]) <= 1e-5
    apart = {name: difference(*slots) for name, slots in case.held(made).items()}
    assert not {name: largest for name, largest in apart.items() if not largest <= 1e-4}


@by_name(BFLOAT16)
@either_way
def test_bfloat16_is_no_worse_than_the_original(case, exact):
    reference = case.make(dtype=torch.float32, exact=True)
    ours = case.make(dtype=torch.bfloat16, exact=exact)

    def error(x, reference=reference.output):
        return (x.double() - reference.double()).abs().mean().item()

    assert error(ours.output) <= case.bfloat16_allowance * error(case.tensors["output"])
    right = case.held(reference)
    for name, (held, recorded) in case.held(ours).items():
        if name.startswith("memory"):
            assert error(held, right[name][0]) <= case.bfloat16_allowance * error(recorded, right[name][0])


@by_name([case for case in FLOAT32 if case.config.get("record_windows")])
def test_what_joint_passes_predict(case, monkeypatch):
    """All chunks of every pass of Rolling-Forcing, also those that are still noisy."""
    predicted = []

    def watched(*args):
        predicted.append(clean_prediction(*args))
        return predicted[-1]

    monkeypatch.setattr(rolling, "clean_prediction", watched)
    case.run(exact=True)
    passes = case.config["num_blocks"] + case.config["window_blocks"] - 1
    recorded = torch.cat([case.tensors[f"window.{number}"] for number in range(passes)], dim=1)
    assert difference(torch.cat(predicted, dim=2).transpose(1, 2), recorded) <= 1e-5


@by_name([case for case in CASES if case.quirk and case.path.is_relative_to(DATA)])
def test_faults_of_the_originals_are_not_ours(case):
    sane = QUIRKS[case.name]
    if isinstance(sane, str):
        with pytest.raises(ValueError, match=sane):
            case.run(exact=False)
    else:
        digits = 0.6 * 10.0 ** -len(str(sane).partition(".")[2])
        assert difference(case.run(exact=False), case.tensors["output"]) == pytest.approx(sane, abs=digits)


@by_name([case for case in CASES if case.name == "longlive2/two_shots"])
def test_a_cut_without_a_sink_keeps_nothing_of_its_shot(case):
    """No recording has that: the cut moves positions, whether the shot is to have a sink or not."""
    plain, kept = (
        replace(case, config=case.config | {"sink_size": 0, "multi_shot_sink": shot_sink}).run(exact=False)
        for shot_sink in (False, True)
    )
    assert difference(plain, kept) == 0


def test_other_recordings_run_with_the_same_command(tmp_path):
    """Files of several families may lie in one folder, in folders of folders, or both."""
    cases = {case.family: case for case in load_cases(folder=DATA)}
    for number, case in enumerate(cases.values()):
        folder = tmp_path / ("", "deep/er")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        for name in (case.path.name, case.config["weights"]):
            copy(case.path.parent / name, folder / f"{case.family}.safetensors" if name == case.path.name else folder)
    found = load_cases(folder=tmp_path)
    assert {case.family: type(case) for case in found} == {name: type(case) for name, case in cases.items()}
    assert all(torch.equal(case.tensors["output"], cases[case.family].tensors["output"]) for case in found)
    assert [case.family for case in load_cases("krea", folder=tmp_path)] == ["krea"]


@by_name(MULTI_STEP[:1])
@pytest.mark.parametrize("given", [0, 3, 4], ids=lambda frames: f"{frames} given frames")
@pytest.mark.parametrize("window, sink", [(ALL_FRAMES, 0), (6, 0), (8, 1)], ids=["all", "window", "window and sink"])
def test_multistep_with_a_window_and_given_frames(case, window, sink, given):
    """No recording has these together: against the naive reference, bit for bit until a frame leaves."""
    model = case.model(torch.float32)
    sampling = replace(model.preset.sampling, num_inference_steps=6)
    model.preset = replace(model.preset, sampling=sampling, cache=CacheConfig(window, sink))
    prompt, negative = (case.tensors[f"{name}prompt_embeds"] for name in ("", "negative_"))
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
