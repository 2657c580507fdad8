"""The rolling cache against a naive list of frames, for any window, sink and chunk sizes."""

import pytest
import torch
from histories import histories
from hypothesis import given, settings
from hypothesis import strategies as st

from rolling_kv.cache.prompt import PromptCache
from rolling_kv.cache.rolling import RollingKVCache
from rolling_kv.cache.sizes import CacheShape
from rolling_kv.cache.stores import Resident
from rolling_kv.cache.window import FrameWindow
from rolling_kv.config import ALL_FRAMES, CACHE_STORAGES, CacheConfig


def frames_in_window(total: int, window: int | str, sink: int) -> list[int]:
    """The definition: the first `sink` frames, and the newest ones that fill up the window."""
    everything = list(range(total))
    if window == ALL_FRAMES or total <= window:
        return everything
    return everything[:sink] + everything[total - (window - sink) :]


def make_cache(window, sink, capacity, tokens=2, batch=1, layers=2):
    shape = CacheShape(layers, batch, tokens, heads=1, head_dim=2, dtype=torch.float32)
    return RollingKVCache(shape, CacheConfig(window, sink), "cpu", capacity)


def content(frames: list[int], layer: int, tokens: int) -> torch.Tensor:
    """Recognisable keys: [1, tokens, 1, 2] per frame, joined."""
    values = [[100 * layer + frame + token / 10] * 2 for frame in frames for token in range(tokens)]
    return torch.tensor(values)[None, :, None]


@settings(max_examples=300, deadline=None)
@given(histories())
def test_every_step_of_a_chunk_attends_to_the_frames_a_list_would_give(history):
    window, sink, chunks = history
    cache = make_cache(window, sink, capacity=3)
    total = 0
    for size in chunks:
        cache.begin(size)
        new = list(range(total, total + size))
        expected = frames_in_window(total + size, window, sink)
        for step in range(2):  # every pass over a chunk overwrites the last
            for layer in range(2):
                fresh = content(new, layer, tokens=2)
                keys, values = cache.update(layer, fresh + 0.01 * step, -fresh)
                stored = keys.flatten(2)[0, ::2, 0] - 100 * layer
                assert sorted(stored.round().int().tolist()) == expected
                assert torch.equal(values[0, ::2, 0, 0].round(), -(stored + 100 * layer).round())
                newest = stored[stored.round() >= total]
                assert torch.allclose(newest - newest.round(), torch.full_like(newest, 0.01 * step), atol=1e-4)
        assert cache.window.frames() == stored.round().int().tolist()
        cache.commit()
        total += size


@settings(max_examples=200, deadline=None)
@given(histories())
def test_until_the_first_frame_leaves_the_layout_is_plain_append(history):
    window, sink, chunks = history
    frames = FrameWindow(window if window != ALL_FRAMES else sum(chunks), sink)
    for size in chunks:
        if frames.end + size > frames.capacity:
            break
        frames.begin(size)
        assert frames.segments() == [(0, frames.end, size)]
        frames.commit()


@settings(max_examples=200, deadline=None)
@given(histories())
def test_writes_touch_each_slot_once_and_never_the_sink_again(history):
    window, sink, chunks = history
    frames = FrameWindow(window if window != ALL_FRAMES else sum(chunks), sink)
    for size in chunks:
        frames.begin(size)
        segments = frames.segments()
        slots = [slot for _, start, count in segments for slot in range(start, start + count)]
        sources = [source for start, _, count in segments for source in range(start, start + count)]
        assert len(set(slots)) == len(slots) == size and sources == list(range(size))
        assert len(segments) <= 3
        if frames.end >= sink:
            assert min(slots) >= sink
        frames.commit()


def test_a_window_never_reallocates():
    cache = make_cache(window=4, sink=1, capacity=None)
    before = [layer[0].data_ptr() for layer in cache.store.layers]
    for _ in range(50):
        cache.begin(3)
        cache.update(0, torch.zeros(1, 6, 1, 2), torch.zeros(1, 6, 1, 2))
        cache.commit()
    assert [layer[0].data_ptr() for layer in cache.store.layers] == before


def test_an_unlimited_window_is_moved_seldom_and_never_once_there_is_room(monkeypatch):
    moves = []
    resize = Resident.resize
    monkeypatch.setattr(Resident, "resize", lambda store, *args: moves.append(1) or resize(store, *args))

    def append(cache, chunks):
        for _ in range(chunks):
            cache.begin(3)
            cache.commit()

    grown = make_cache(window=ALL_FRAMES, sink=0, capacity=3)
    append(grown, 100)
    assert 0 < len(moves) <= 13 and grown.window.capacity < 1.5 * 300
    moves.clear()
    known = make_cache(window=ALL_FRAMES, sink=0, capacity=3)
    known.reserve(300)
    append(known, 100)
    assert len(moves) == 1 and known.window.capacity == 300


@given(
    layers=st.integers(1, 4),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 9),
    heads=st.integers(1, 4),
    window=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_bytes_are_known_before_allocation(layers, batch, tokens, heads, window, dtype):
    shape = CacheShape(layers, batch, tokens, heads, 8, dtype)
    for storage in CACHE_STORAGES:
        for offload in (False, True):
            config = CacheConfig(window, storage=storage, offload=offload)
            assert RollingKVCache(shape, config, "cpu").nbytes == RollingKVCache.bytes_kept(shape, config, window)


def test_the_published_bytes_per_frame():
    """480x832 in bfloat16: 274 MiB for the 1.3B model, 1219 MiB for the 14B one."""
    small = CacheShape(30, 1, 1560, 12, 128, torch.bfloat16)
    large = CacheShape(40, 1, 1560, 40, 128, torch.bfloat16)
    assert [round(shape.bytes_per_frame() / 2**20) for shape in (small, large)] == [274, 1219]


def test_prompt_bytes_count_what_is_kept():
    shape = CacheShape(3, 2, 7, 4, 8, torch.float32)
    kept = PromptCache(torch.zeros(2, 5, 6))
    kept.projected = torch.zeros(2, 5, 32)
    kept.layers = {layer: (torch.zeros(2, 5, 4, 8), torch.zeros(2, 5, 4, 8)) for layer in range(3)}
    held = kept.projected.nbytes + sum(k.nbytes + v.nbytes for k, v in kept.layers.values())
    assert PromptCache.bytes_needed(shape, 5) == held


def test_a_chunk_that_does_not_fit_is_refused():
    cache = make_cache(window=4, sink=2, capacity=None)
    cache.begin(3)
    cache.commit()
    with pytest.raises(ValueError, match="chunk of 3 latent frames does not fit a window of 4 with a sink of 2"):
        cache.begin(3)


@pytest.mark.parametrize(
    "window, sink, message", [(0, 0, 'window must be "all"'), (-1, 0, "got -1"), (5, -1, "sink must")]
)
def test_bad_settings_are_refused(window, sink, message):
    with pytest.raises(ValueError, match=message):
        CacheConfig(window, sink)
    with pytest.raises(ValueError, match="make the window at least 6"):
        CacheConfig(5, 3).check_chunk(3)


def test_a_shot_in_an_unlimited_window_pushes_nobody_out():
    """A cut right behind a first chunk of one frame, in a window that is full just when the next chunk comes."""
    shape = CacheShape(layers=1, batch=1, tokens_per_frame=2, heads=1, head_dim=2, dtype=torch.float32)
    config = CacheConfig(ALL_FRAMES, sink=2, cut_flush=False, shot_sink=True)
    cache = RollingKVCache(shape, config, "cpu", capacity=7)
    end = 0
    for size in (1, 3, 3, 3, 3):
        cache.begin(size)
        new = list(range(end, end + size))
        keys, _ = cache.update(0, content(new, 0, tokens=2), torch.zeros(1, 2 * size, 1, 2))
        end += size
        assert sorted(keys.flatten(2)[0, ::2, 0].round().int().tolist()) == list(range(end))
        cache.commit()
        if end == 4:
            cache.window.keep_shot(1, 3)
