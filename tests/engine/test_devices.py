"""Inside a chunk nothing waits for the device. The meta device stands for it: nobody can read a value there.

One thing does wait, inside diffusers: unpacking the weights of a GGUF file in a packing outside
`config.RECORDABLE_PACKINGS`, in every layer.
"""

from itertools import product

import pytest
import torch
from builders import tiny_transformer
from crossings import Crossings
from torch.utils._python_dispatch import TorchDispatchMode

from rolling_kv import devices
from rolling_kv.bench.gauges import tensors_in
from rolling_kv.checkpoints.model import CausalModel
from rolling_kv.config import CACHE_STORAGES, POSITIONS, SAMPLERS, CacheConfig, ExecutionConfig, SamplingConfig
from rolling_kv.devices import to_device
from rolling_kv.sampling.schedule import integrate_chunk, renoise_chunk, warp_steps
from rolling_kv.sampling.session import RollingSession
from rolling_kv.sampling.state import CacheState
from rolling_kv.wan.attachment import apply_rolling_kv_cache

CHUNKWISE = [name for name in SAMPLERS if name != "rolling"]


@pytest.fixture
def model():
    """Only its weights are gone to the device: what tells it from other models was read before."""
    model = CausalModel(tiny_transformer())
    model.transformer.to("meta")
    return model


@pytest.fixture(autouse=True)
def chunks_come_back(monkeypatch):
    """A finished chunk is copied to the CPU, which waits; from the meta device, nothing comes back."""
    extended = CacheState.extended
    monkeypatch.setattr(
        CacheState,
        "extended",
        lambda state, chunk, **log: extended(state, torch.zeros(chunk.shape, dtype=chunk.dtype), **log),
    )


def video(model, sampler, cache):
    sampling = SamplingConfig(
        chunk=2, denoising_steps=(1000, 500), sampler=sampler, num_inference_steps=4, guidance_scale=3.0
    )
    prompt, negative = torch.randn(2, 1, 6, 32, generator=torch.Generator().manual_seed(0))
    with RollingSession(
        model, prompt, negative=negative, height=32, width=48, sampling=sampling, cache=cache
    ) as session:
        for _ in session.generate(5, seed=1):
            pass
    assert session.state.frames == 10


# How keys are stored has to do with where they are turned, and nothing with how a chunk is sampled.
RULES = [*product(CACHE_STORAGES, POSITIONS, CHUNKWISE[:1]), *product(CACHE_STORAGES[:1], POSITIONS, CHUNKWISE[1:])]


@pytest.mark.parametrize(("storage", "positions", "sampler"), RULES)
def test_no_step_and_no_context_pass_waits(model, storage, positions, sampler):
    with Crossings() as crossings:
        video(model, sampler, CacheConfig(5, 1, positions, storage))
    assert not crossings.waiting
    # The two prompts; for each chunk the positions, and two draws or one and the noise levels; for each context pass the
    # clean latents; once each timestep, that of the context passes included.
    moved = 2 + 5 * 3 + 4 + (3 if sampler == "renoise" else 5)
    turns = 2 * 3 if positions == "window" else 0  # branches, chunks after the first frame has left
    assert len(crossings.free) == moved + turns


@pytest.mark.parametrize("storage", CACHE_STORAGES)
def test_no_joint_and_no_clean_pass_waits(model, storage):
    with Crossings() as crossings:
        video(model, "rolling", CacheConfig(5, 1, storage=storage))
    assert not crossings.waiting
    # The two prompts; two draws of each chunk; for each joint pass the positions, and the anchor's for each branch; for each
    # clean pass the positions and the clean latents; once the timesteps of a pass: ramping up, in full, ramping down, clean.
    assert len(crossings.free) == 2 + 5 * 2 + 6 * (1 + 2) + 4 * 2 + 4


class NoFloat64(TorchDispatchMode):
    """Refuses what MPS refuses: tensors of doubles on the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        wide = [tensor for tensor in tensors_in(result) if tensor.dtype in (torch.float64, torch.complex128)]
        if any(tensor.device.type == "meta" for tensor in wide):
            raise TypeError(f"{function}: this device has no float64")
        return result


@pytest.mark.parametrize("sampler", CHUNKWISE)
def test_a_device_without_float64_is_asked_for_none(model, sampler, monkeypatch):
    monkeypatch.setattr(devices, "FLOAT64", ("cpu",))
    with NoFloat64():
        video(model, sampler, CacheConfig(5, 1, "window"))
        video(model, "rolling", CacheConfig(5, 1))
    with pytest.raises(ValueError, match="exact passes rotate in float64, which meta does not have: turn exact off"):
        apply_rolling_kv_cache(model.transformer, ExecutionConfig(exact=True))


def test_latents_are_mixed_alike_without_float64(monkeypatch):
    def chunk():
        noise = torch.Generator().manual_seed(0)
        return renoise_chunk(
            lambda x, timestep: x.sin(),
            lambda draw: torch.randn(1, 16, 2, 4, 6, generator=noise),
            warp_steps((1000, 750, 500), 5.0),
        )

    expected = chunk()
    monkeypatch.setattr(devices, "FLOAT64", ())
    torch.testing.assert_close(chunk(), expected, atol=1e-6, rtol=1e-5)


def test_the_look_sees_who_waits(model):
    with Crossings() as crossings:
        torch.ones(2).to("meta"), torch.ones(()).to("meta")
        torch.zeros(2, device="meta").copy_(torch.ones(2))
        torch.linalg.solve(torch.eye(2), torch.ones(2))
        torch.ones(2).to("meta", non_blocking=True)
        torch.zeros(2, device="meta") * torch.ones(())
    assert (len(crossings.waiting), len(crossings.free)) == (4, 1)


@pytest.mark.parametrize("sampler", ["unipc", "euler"])
def test_half_precision_flows_are_integrated_as_wide_as_the_latents(sampler):
    def chunk(flow_dtype):
        return integrate_chunk(
            lambda x, timestep: x.sin().bfloat16().to(flow_dtype),
            lambda draw: torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0)),
            SamplingConfig(sampler=sampler, num_inference_steps=6),
        )

    assert torch.equal(chunk(torch.bfloat16), chunk(torch.float32))


def test_steps_so_fine_that_their_timesteps_are_equal_begin_with_the_first():
    """UniPC's timesteps are whole numbers; looked up by one, the second of two equal steps would be found."""
    sampling = SamplingConfig(sampler="unipc", num_inference_steps=300, shift=12.0)
    clean, noise = torch.randn(2, 1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    made = integrate_chunk(lambda x, timestep: noise - clean, lambda draw: noise, sampling)
    torch.testing.assert_close(made, clean, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "source, device, pinned, blocking",
    [
        ("cpu", "cuda", True, False),
        ("cpu", "mps", False, True),
        ("meta", "cuda", False, False),
        ("cpu", "cpu", False, False),
    ],
)
def test_what_goes_to_cuda_goes_through_pinned_memory(source, device, pinned, blocking, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: calls.append("pinned") or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *where, **how: calls.append((*where, how)) or tensor)
    to_device(torch.zeros(2, device=source), torch.device(device))
    assert calls == ["pinned"] * pinned + [(torch.device(device), {"non_blocking": not blocking})]


def test_nothing_is_copied_where_it_is():
    tensor = torch.zeros(2)
    assert devices.to_device(tensor, torch.device("cpu")) is tensor
