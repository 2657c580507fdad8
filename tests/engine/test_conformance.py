"""Agreement with the original Self-Forcing code on recorded inputs and outputs (tests/data/self_forcing/README.md).

`ROLLING_KV_CASES=DIR` runs the same tests on another folder of cases.
"""

import pytest
import torch
from cases import FOLDER, load_cases

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
