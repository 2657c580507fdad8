"""Inside a chunk nothing waits for the device. The meta device stands for it: nobody can read a value there."""

import pytest
import torch
from builders import tiny_transformer
from torch.utils._python_dispatch import TorchDispatchMode

from rolling_kv import transfer
from rolling_kv.bench.memory import tensors_in
from rolling_kv.config import SINK_PHASES, STORAGES, CacheConfig, SamplingConfig
from rolling_kv.model import CausalModel
from rolling_kv.sampler import RollingSession
from rolling_kv.state import CacheState
from rolling_kv.transfer import to_device


class Crossings(TorchDispatchMode):
    """Notes each operation that copies between the devices, and whether somebody waits for it."""

    def __init__(self):
        super().__init__()
        self.waiting, self.free = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        given, made = tensors_in((args, kwargs)), tensors_in(result)
        # Numbers, which CPU tensors without dimensions are, go along with any operation between others.
        calculating = len(given) > 1 and "copy" not in str(function)
        devices = {tensor.device.type for tensor in given + made if tensor.ndim or not calculating}
        if len(devices) > 1:
            (self.free if kwargs.get("non_blocking") else self.waiting).append(str(function))
        return result


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


@pytest.mark.parametrize("sink_phase", SINK_PHASES)
@pytest.mark.parametrize("storage", STORAGES)
def test_no_step_and_no_context_pass_waits(model, storage, sink_phase):
    sampling = SamplingConfig(chunk=2, denoising_steps=(1000, 500), guidance_scale=3.0)
    prompt, negative = torch.randn(2, 1, 6, 32, generator=torch.Generator().manual_seed(0))
    cache = CacheConfig(5, 1, sink_phase, storage)
    with (
        Crossings() as crossings,
        RollingSession(
            model, prompt, negative=negative, height=32, width=48, sampling=sampling, cache=cache
        ) as session,
    ):
        for _ in session.generate(5, seed=1):
            pass
    assert session.state.frames == 10
    assert not crossings.waiting
    # The two prompts; for each chunk two draws and the positions; for each context pass the clean latents.
    moved = 2 + 5 * 3 + 4
    turns = 2 * 2 * 3 if sink_phase == "rebased" else 0  # branches, layers, chunks after the first frame has left
    assert len(crossings.free) == moved + turns


def test_the_look_sees_who_waits(model):
    with Crossings() as crossings:
        torch.ones(2).to("meta"), torch.ones(()).to("meta")
        torch.zeros(2, device="meta").copy_(torch.ones(2))
        torch.ones(2).to("meta", non_blocking=True)
        torch.zeros(2, device="meta") * torch.ones(())
    assert (len(crossings.waiting), len(crossings.free)) == (3, 1)


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
    assert transfer.to_device(tensor, torch.device("cpu")) is tensor
