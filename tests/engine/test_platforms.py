"""What is decided by hardware and versions, as tables: nothing here asks the machine that the tests run on."""

import pytest
import torch
from rounding import convolutions_round
from torch.nn.attention import SDPBackend

from rolling_kv.platforms import (
    Platform,
    attending_with,
    attention_kernels,
    exact_convolutions,
    has_bfloat16,
    platform_of,
    rounds_to_tf32,
    runs_flash_3,
    too_new_for_flash_3,
)

CUDNN, FLASH, EFFICIENT, MATH = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
OTHERS = (FLASH, EFFICIENT, MATH)


def nvidia(capability, torch=(2, 11, 0), cudnn=91501):
    return Platform("cuda", capability, torch=torch, cudnn=cudnn)


H100, RTX_4090, RTX_5090, A100, T4 = (9, 0), (8, 9), (12, 0), (8, 0), (7, 5)
ROCM = Platform("rocm", arch="gfx1100", torch=(2, 11))
MPS = Platform("mps", (15, 1), torch=(2, 11))
CPU = Platform("cpu", torch=(2, 13))


@pytest.mark.parametrize(
    "platform, dtype, kernels",
    [
        (nvidia(H100), torch.bfloat16, (CUDNN, *OTHERS)),
        (nvidia(H100), torch.float16, (CUDNN, *OTHERS)),
        (nvidia(H100), torch.float32, ()),
        (nvidia(A100), torch.bfloat16, (CUDNN, *OTHERS)),
        (nvidia(RTX_4090), torch.bfloat16, (CUDNN, *OTHERS)),
        (nvidia(RTX_5090, cudnn=91701), torch.bfloat16, (CUDNN, *OTHERS)),
        (nvidia(H100, cudnn=91500), torch.bfloat16, OTHERS),
        (nvidia(H100, (2, 9), cudnn=91002), torch.bfloat16, OTHERS),
        (nvidia(RTX_4090, (2, 7), cudnn=0), torch.float16, OTHERS),
        (nvidia(H100, (2, 5), cudnn=91501), torch.bfloat16, ()),
        (nvidia(T4), torch.float16, ()),
        (ROCM, torch.bfloat16, ()),
        (MPS, torch.float16, ()),
        (CPU, torch.bfloat16, ()),
        (CPU, torch.float32, ()),
    ],
)
def test_the_order_of_attention(platform, dtype, kernels):
    assert attention_kernels(platform, dtype) == kernels


def test_the_order_holds_for_a_while(monkeypatch):
    def now():
        return torch._C._get_sdp_priority_order()[:4], torch._C._get_cudnn_sdp_enabled()

    before = now()
    with attending_with((FLASH, MATH)):
        order, has_cudnn = now()
        assert order[:2] == [FLASH.value, MATH.value] and not has_cudnn
    with pytest.raises(ZeroDivisionError), attending_with((CUDNN, *OTHERS)):
        assert now() == ([CUDNN.value, FLASH.value, EFFICIENT.value, MATH.value], True)
        raise ZeroDivisionError
    assert now() == before
    with attending_with(()):
        assert now() == before


def test_platforms_are_told_by_torch(monkeypatch):
    version = tuple(map(int, torch.__version__.partition("+")[0].split(".")))
    assert platform_of("cpu") == Platform("cpu", torch=version)
    assert has_bfloat16(platform_of("cuda"))  # on a machine without one, too
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: T4)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(torch.version, "hip", None)
    assert platform_of("cuda") == Platform("cuda", T4, torch=version, cudnn=91002)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    properties = type("Properties", (), {"gcnArchName": "gfx1030"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert platform_of("cuda") == Platform("rocm", arch="gfx1030", torch=version)
    monkeypatch.setattr("platform.mac_ver", lambda: ("14.5", ("", "", ""), "arm64"))
    assert platform_of("mps") == Platform("mps", (14, 5), torch=version)


@pytest.mark.parametrize(
    "platform, has",
    [(nvidia(H100), True), (nvidia(RTX_4090), True), (nvidia(A100), True), (nvidia(T4), False), (nvidia((7, 0)), False)]
    + [
        (Platform("rocm", arch=arch), True)
        for arch in ("gfx908", "gfx90a:sramecc+", "gfx942", "gfx1100", "gfx1201", "")
    ]
    + [(Platform("rocm", arch=arch), False) for arch in ("gfx906:sramecc+", "gfx1010", "gfx1030", "gfx803")]
    + [(MPS, True), (Platform("mps", (13, 6)), False), (CPU, True), (Platform("xpu"), True)],
)
def test_who_computes_in_bfloat16(platform, has):
    assert has_bfloat16(platform) is has


@pytest.mark.parametrize("platform, rounds", [(nvidia(A100), True), (nvidia(T4), False), (ROCM, False), (CPU, False)])
def test_who_rounds_to_tf32(platform, rounds):
    assert rounds_to_tf32(platform, torch.float32) is rounds
    assert not rounds_to_tf32(platform, torch.bfloat16)


@pytest.mark.parametrize("with_new_setting", [True, False])
def test_tf32_is_off_for_a_while(monkeypatch, with_new_setting):
    monkeypatch.setattr("rolling_kv.platforms.platform_of", lambda device: nvidia(A100))
    if not with_new_setting:
        monkeypatch.setattr(type(torch.backends.cudnn), "conv", None, raising=False)
    assert convolutions_round()
    with pytest.raises(ZeroDivisionError), exact_convolutions(torch.zeros(1)):
        assert not convolutions_round()
        raise ZeroDivisionError
    assert convolutions_round()
    with exact_convolutions(torch.zeros(1, dtype=torch.bfloat16)):
        assert convolutions_round()


def test_flash_attention_3_is_for_hopper():
    ways = [
        (runs_flash_3(where), too_new_for_flash_3(where)) for where in map(nvidia, [(8, 9), (9, 0), (10, 0), (12, 0)])
    ]
    assert ways == [(False, False), (True, False), (False, True), (False, True)]
    for other in (Platform("rocm", arch="gfx942"), Platform("cpu"), Platform("mps", (15,))):
        assert not runs_flash_3(other) and not too_new_for_flash_3(other)
