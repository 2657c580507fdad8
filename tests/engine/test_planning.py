"""What a run will take is told from a file's header, to the byte as the run itself has it; and which frames its window will hold."""

import pytest
import torch
from builders import write_weights
from videos import HEIGHT, SAMPLING, WIDTH, prompt, small_model

from rolling_kv.bundled import BUNDLED
from rolling_kv.checkpoints.model import load_model
from rolling_kv.checkpoints.readers import CheckpointError
from rolling_kv.config import CacheConfig, ExecutionConfig, SamplingConfig
from rolling_kv.planning import (
    OVERHEAD,
    choices,
    forecast,
    kept_in_ways,
    last_window,
    offloaded,
    outline,
    window_after,
)
from rolling_kv.sampling.memory import OFFLOAD_WEIGHTS, STANDARD_SPEED, estimate
from rolling_kv.sampling.session import RollingSession
from rolling_kv.wan import fast as fast_module
from rolling_kv.wan.offloaded import offload_blocks, weight_nbytes
from rolling_kv.wan.products import Product, float8_forwards

ROOM = 2**40
WINDOW, SAMPLING_3 = CacheConfig(21), SamplingConfig()


def planned(cache=WINDOW, frames=21, room=ROOM, host_room=None, **options):
    made = outline(BUNDLED)
    return forecast(
        made, 64, 64, sampling=SAMPLING_3, cache=cache, frames=frames, room=room, host_room=host_room, **options
    )


def test_the_outline_is_the_model_that_a_load_makes():
    made, model = outline(BUNDLED), load_model(BUNDLED)
    assert made.preset == model.preset and made.dtype == model.dtype and made.weight_sets == 1
    assert made.transformer.config == model.config
    loaded = sum(weight.numel() * weight.itemsize for weight in model.transformer.parameters())
    assert made.weights == loaded
    assert outline(BUNDLED, dtype="bfloat16").weights == loaded // 2
    assert loaded / 4 < outline(BUNDLED, dtype="float32", storage="float8").weights < loaded / 2
    assert outline(BUNDLED, preset="deep-sink").preset.name == "deep-sink"


def test_no_weight_is_read(monkeypatch):
    def never(*_, **__):
        raise AssertionError("a value was read")

    monkeypatch.setattr("safetensors.safe_open.get_tensor", never, raising=False)
    assert outline(BUNDLED).transformer.patch_embedding.weight.is_meta


def test_a_file_that_is_no_model_is_refused_as_a_load_refuses_it(tmp_path):
    path = tmp_path / "model.safetensors"
    write_weights(path, {"a": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="model.safetensors"):
        outline(path)
    with pytest.raises(CheckpointError, match="no such file"):
        outline(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    "cache", [CacheConfig(21), CacheConfig("all"), CacheConfig(9, sink=3, storage="int8", offload=True)]
)
def test_a_forecast_is_what_the_run_is_estimated_at(cache):
    known, made = planned(cache, frames=30, batch=2), outline(BUNDLED)
    run = estimate(made.transformer, 64, 64, sampling=SAMPLING_3, cache=cache, dtype=made.dtype, batch=2, frames=30)
    assert known.run == run and known.fits and not known.remedies
    assert known.latents == 2 * 16 * 8 * 8 * made.dtype.itemsize * 30
    assert known.device == known.weights + run.device + run.host + known.latents and known.host == 0
    split = planned(cache, frames=30, batch=2, host_room=ROOM)
    assert split.device == known.weights + run.device and split.host == run.host + known.latents


def test_it_fits_to_the_byte_on_either_side():
    known = planned(host_room=ROOM)
    assert planned(room=known.device, host_room=known.host).fits
    for short in (planned(room=known.device - 1, host_room=ROOM), planned(room=ROOM, host_room=known.host - 1)):
        assert not short.fits and "make the picture smaller" in short.remedies


def test_what_is_said_to_fit_fits():
    room = planned(CacheConfig(9)).device
    known = planned(CacheConfig(21), room=room)
    assert known.remedies[0] == "set the window to at most 9 latent frames"
    assert planned(CacheConfig(9), room=room).fits and not planned(CacheConfig(10), room=room).fits


def test_rules_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="cannot hold the sink"):
        planned(CacheConfig(4, sink=3))


@pytest.mark.parametrize(
    "cache, frames, kept, writing",
    [
        (CacheConfig(21, sink=3), 60, [0, 1, 2, *range(42, 60)], 3),
        (CacheConfig(21, sink=3), 6, [*range(6)], 3),
        (CacheConfig("all"), 30, [*range(30)], 3),
        (CacheConfig(12, sink=3, positions="window", leaving="memory"), 30, [*range(5), *range(23, 30)], 3),
    ],
)
def test_the_last_window(cache, frames, kept, writing):
    window = last_window(SamplingConfig(), cache, frames)
    assert sorted(window.frames()) == kept and window.open == writing


SWITCHES = ["", "", "", "flush", "", "causal", "", "cut", "", "", "joint", "", ""]


@pytest.mark.parametrize(
    "cache",
    [
        CacheConfig(5, sink=1),
        CacheConfig(6, sink=2, global_sink=False),
        CacheConfig(8, sink=2, cut_flush=False, cut_offset=8, shot_sink=True),
        CacheConfig(8, sink=2, cut_flush=False, shot_clean=True),
        CacheConfig("all", sink=1),
    ],
)
def test_the_window_that_a_log_leads_to_is_the_one_that_a_run_has(cache):
    model = small_model()
    with RollingSession(model, prompt(model), cache=cache, sampling=SAMPLING, height=HEIGHT, width=WIDTH) as session:
        for words, switch in enumerate(SWITCHES):
            if switch:
                session.set_prompt(prompt(model, words), switch=switch)
            list(session.generate(1, seed=7))
            if cache.shot_clean and switch == "cut":
                continue  # the cache is emptied only once the chunk is written to it
            expected = window_after(session.state.records, cache)
            assert sorted(expected.frames()) == sorted(session.window.frames()), words
            assert list(expected.kept) == list(session.window.kept)


def test_a_window_that_cannot_hold_a_chunk_of_the_log_is_refused():
    model = small_model()
    with RollingSession(model, prompt(model), height=HEIGHT, width=WIDTH) as session:
        list(session.generate(3, seed=7))
    with pytest.raises(ValueError, match="does not fit a window"):
        window_after(session.state.records, CacheConfig(1))


def ways(card: int, **changes):
    model = {storage: outline(BUNDLED, dtype="bfloat16", storage=storage) for storage in ("model", "float8")}
    return choices({name: made._replace(**changes) for name, made in model.items()}, 64, 64, card)


def test_ways_to_run_on_a_card_begin_with_the_least_change_and_take_less_and_less():
    found = ways(2**40)
    rows = [(way.cache.window, way.weights, way.cache.storage, way.cache.offload) for way in found]
    kinds = [("model", "model", False), ("model", "int8", False), ("float8", "model", False), ("float8", "int8", False)]
    kinds.append(("float8", "int8", True))
    assert rows == [(window, *kind) for window in (9, 6) for kind in kinds]
    assert all(way.known.fits for way in found)
    plain = found[0]
    assert plain.device == plain.known.weights + plain.known.run.device + OVERHEAD
    assert [way.device for way in found[:2]] == sorted((way.device for way in found[:2]), reverse=True)
    assert found[4].device < found[3].device and found[4].known.host > plain.known.host


def test_a_way_fits_a_card_to_the_byte():
    needed = ways(2**40)[3].device
    assert ways(needed)[3].known.fits and not ways(needed - 1)[3].known.fits
    fast = ways(2**40)[0].fast
    assert fast == outline(BUNDLED, dtype="bfloat16").products > 10 * ways(2**40)[2].fast > 0
    assert ways(needed)[3].options() == "--window 9 --weight-storage float8 --cache-storage int8"


def test_offloaded_weights_are_further_ways_that_take_less():
    model = {storage: outline(BUNDLED, dtype="bfloat16", storage=storage) for storage in ("model", "float8")}
    found = choices(kept_in_ways(model), 64, 64, 2**40)
    rows = [(way.weights, way.cache.storage, way.cache.offload) for way in found]
    offloaded_rows = [("float8, offloaded", "int8", False), ("float8, offloaded", "int8", True)]
    assert rows[5:7] == offloaded_rows and len(rows) == 14
    assert found[5].device < found[3].device and found[6].device < found[4].device
    assert found[5].known.host - found[3].known.host > found[3].device - found[5].device
    said = "--window 9 --weight-storage float8 --offload-weights --cache-storage int8 --offload-cache"
    assert found[6].options() == said
    packed = {"model": model["model"]._replace(packed=True)}
    rows = [(way.weights, way.cache.storage) for way in choices(kept_in_ways(packed), 64, 64, 2**40)]
    assert ("model, offloaded", "int8") in rows and not any("float8" in weights for weights, _ in rows)


@pytest.mark.parametrize("storage", ["model", "float8"])
def test_the_outline_of_offloaded_weights_is_what_a_pass_takes(storage):
    """To the roundness of addresses, and the norms that float8 leaves as they are."""
    made, model = outline(BUNDLED, storage=storage, offload=True), load_model(BUNDLED, storage=storage)
    blocks = offload_blocks(model.transformer, "cpu")
    assert made.weights == pytest.approx(weight_nbytes(model.transformer), rel=0.05)
    assert made.host_weights == pytest.approx(blocks.host_nbytes, rel=0.05)


def test_offloading_the_weights_is_named_where_it_makes_a_run_fit():
    made, known = outline(BUNDLED), planned(host_room=ROOM)
    elsewhere = offloaded(made)
    needed = known.device - made.weights + elsewhere.weights
    assert OFFLOAD_WEIGHTS in planned(room=needed, host_room=ROOM).remedies
    assert OFFLOAD_WEIGHTS not in planned(room=needed - 1, host_room=ROOM).remedies
    assert OFFLOAD_WEIGHTS not in planned(room=needed, host_room=known.host).remedies
    assert OFFLOAD_WEIGHTS not in planned(room=needed).remedies
    moved = forecast(elsewhere, 64, 64, sampling=SAMPLING_3, cache=WINDOW, frames=21, room=needed - 1, host_room=ROOM)
    assert moved.device == needed and moved.host == known.host + elsewhere.host_weights
    assert OFFLOAD_WEIGHTS not in moved.remedies


def copied(transformer):
    """Bytes of what an attachment with products in float8 really takes beside the weights."""
    own = {tensor.data_ptr() for tensor in transformer.parameters()}
    made = [forward for _, forward in float8_forwards(transformer.blocks) if isinstance(forward, Product)]
    tensors = [tensor for product in made for tensor in (product.weight, product.scales)]
    return sum(tensor.nbytes for tensor in tensors if tensor.data_ptr() not in own)


@pytest.mark.parametrize("storage", ["model", "float8"])
def test_fast_passes_take_in_a_forecast_what_they_take_in_a_run(storage):
    made = outline(BUNDLED, dtype="bfloat16", storage=storage)
    model = load_model(BUNDLED, dtype="bfloat16", storage=storage)
    plain, fast = (
        forecast(made, 64, 64, sampling=SAMPLING_3, cache=WINDOW, frames=21, room=ROOM, host_room=ROOM, fast=fast)
        for fast in (False, True)
    )
    beside = fast.device - plain.device
    assert fast.run.products == beside == made.products == copied(model.transformer) > 0
    whole = sum(p.nbytes for p in model.transformer.blocks.parameters())
    assert 0.3 < beside / whole < 0.5 if storage == "model" else beside / whole < 0.05
    assert made._replace(packed=True).products == offloaded(made).products == 0
    asked = ExecutionConfig(fast=True), made.transformer, torch.device("cuda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            fast_module, "fast_on", lambda _, dtype, *rest: fast_module.Fast(None, dtype == torch.bfloat16, "")
        )
        assert fast_module.product_bytes(*asked) == beside
        offload_blocks(model.transformer, "cpu")
        assert fast_module.product_bytes(asked[0], model.transformer, asked[2]) == 0


def test_leaving_fast_is_named_where_it_makes_a_run_fit():
    made = outline(BUNDLED, dtype="bfloat16")
    around = dict(sampling=SAMPLING_3, cache=WINDOW, frames=21, host_room=ROOM)
    needed = forecast(made, 64, 64, room=ROOM, **around).device
    known = forecast(made, 64, 64, room=needed, fast=True, **around)
    assert not known.fits and STANDARD_SPEED in known.remedies and known.device == needed + made.products
    assert STANDARD_SPEED not in forecast(made, 64, 64, room=needed - 1, fast=True, **around).remedies
    assert forecast(made, 64, 64, room=needed + made.products, fast=True, **around).fits
    elsewhere = offloaded(made)
    least = forecast(elsewhere, 64, 64, room=ROOM, fast=True, **around).device
    assert OFFLOAD_WEIGHTS in forecast(made, 64, 64, room=least, fast=True, **around).remedies
    assert STANDARD_SPEED not in forecast(elsewhere, 64, 64, room=least - 1, fast=True, **around).remedies


def test_packed_weights_have_no_other_storage():
    model = {"model": outline(BUNDLED, dtype="bfloat16")._replace(packed=True)}
    assert {way.weights for way in choices(model, 64, 64, 2**40)} == {"model"}
