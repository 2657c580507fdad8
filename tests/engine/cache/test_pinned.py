"""CPU memory beside a device. CUDA's part is played by a stand-in, which keeps account of what is pinned."""

from contextlib import nullcontext
from types import SimpleNamespace

import psutil
import pytest
import torch

from rolling_kv.cache import offload, pinned
from rolling_kv.cache.pinned import HostMemory
from rolling_kv.cache.rolling import RollingKVCache
from rolling_kv.cache.sizes import CacheShape
from rolling_kv.config import ALL_FRAMES, CacheConfig

CUDA = torch.device("cuda", 1)
PAGE = 4096


class Cudart:
    def __init__(self):
        self.pinned, self.said, self.error = {}, [], 0

    def cudaHostRegister(self, address, nbytes, flags):
        assert flags == 1
        if not self.error:
            self.pinned[address] = nbytes
        return self.error

    def cudaHostUnregister(self, address):
        del self.pinned[address]
        self.said.append("unpinned")


@pytest.fixture
def cudart(monkeypatch):
    cudart = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: cudart.said.append(f"waited for {device}"))
    monkeypatch.setattr(pinned, "_forget_error", lambda device: cudart.said.append("forgot"))
    monkeypatch.setattr(pinned.mmap, "PAGESIZE", PAGE)
    return cudart


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8], ids=str)
def test_memory_for_cuda_is_pinned_page_by_page_and_given_back(cudart, dtype):
    size = (2, 1, 700, 3, 1)
    memory = HostMemory(CUDA)
    tensor, other = memory.zeros(size, dtype), memory.zeros(size, dtype)
    assert (tensor.shape, tensor.dtype, tensor.float().abs().sum()) == (size, dtype, 0)
    for made in (tensor, other):
        length = cudart.pinned[made.data_ptr()]
        assert made.data_ptr() % PAGE == length % PAGE == 0 and 0 <= length - made.nbytes < PAGE
    part, address = tensor[:, :, :10], tensor.data_ptr()
    del tensor, made
    assert address in cudart.pinned  # its memory is in use
    del part
    assert list(cudart.pinned) == [other.data_ptr()]
    assert cudart.said == ["waited for cuda:1", "unpinned"]


def test_memory_that_cannot_be_pinned_is_ordinary_with_one_warning(cudart, caplog):
    cudart.error = 2
    memory = HostMemory(CUDA)
    for _ in range(3):
        assert torch.equal(memory.zeros((2, 3), torch.float32), torch.zeros(2, 3))
    (record,) = caplog.records
    assert "cannot pin 0.00 GiB of RAM (error 2)" in record.getMessage()
    assert cudart.said == ["forgot"] and not memory.pinned


def test_without_cuda_nothing_is_pinned(cudart):
    assert torch.equal(HostMemory(torch.device("cpu")).zeros((2,), torch.int8), torch.zeros(2, dtype=torch.int8))
    assert not cudart.pinned


def test_a_cache_that_ram_does_not_hold_is_refused_before_it_is_made(monkeypatch):
    shape = CacheShape(30, 1, 1560, 12, 128, torch.bfloat16)
    config = CacheConfig(21, offload=True)
    total = RollingKVCache.bytes_kept(shape, config, 21).host
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=total - 1))
    monkeypatch.setattr(offload, "HostMemory", None)
    with pytest.raises(ValueError, match=r"needs 5\.6 GiB of RAM, and 5\.6 GiB are available: .* turn offload off"):
        RollingKVCache(shape, config, "cpu")


def test_everything_that_is_offloaded_lies_in_such_memory(monkeypatch):
    made = []

    class Noted(HostMemory):
        def zeros(self, *form):
            made.append(super().zeros(*form))
            return made[-1]

    monkeypatch.setattr(offload, "HostMemory", Noted)
    shape = CacheShape(2, 1, 2, 1, 12, torch.float32)
    cache = RollingKVCache(shape, CacheConfig(3, 1, positions="window", storage="int8", offload=True), "cpu")
    for _ in range(2):
        cache.begin(2)
        for layer in range(2):
            cache.update(layer, *torch.ones(2, 1, 4, 1, 12))
        cache.commit()
    assert len(made) == 2 * 2 + 2 * 2  # codes and scales of each layer, and of its sink keys
    assert cache.nbytes.host == sum(tensor.nbytes for tensor in made)


def test_a_cache_that_cannot_grow_stays_as_it_was(monkeypatch):
    shape = CacheShape(3, 1, 2, 1, 4, torch.float32)
    cache = RollingKVCache(shape, CacheConfig(ALL_FRAMES, offload=True), "cpu", capacity=10)
    layer = shape.bytes_per_frame() * 10 // 3
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=4 * layer - 1))
    before = [parts[0].data_ptr() for parts in cache.store.layers]
    with pytest.raises(ValueError, match="offloading the cache needs"):
        cache.reserve(20)  # all of them twice as large, and one of the old ones beside its successor
    assert cache.window.capacity == 10 and [parts[0].data_ptr() for parts in cache.store.layers] == before
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=4 * layer))
    cache.reserve(20)
    assert cache.window.capacity == 20
