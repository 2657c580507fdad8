"""Step caches skip work between denoising steps, and nothing else: not the context pass, not the other branch."""

import gc
import weakref
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from builders import tiny_transformer

from rolling_kv.checkpoints.model import CausalModel
from rolling_kv.config import CacheConfig, ExecutionConfig, SamplingConfig
from rolling_kv.presets import ModelPreset
from rolling_kv.sampling.clip import BidirectionalClip
from rolling_kv.sampling.memory import estimate
from rolling_kv.sampling.session import RollingSession
from rolling_kv.sampling.workspace import Workspace
from rolling_kv.step_cache import (
    METHODS,
    FasterCache,
    FirstBlockCache,
    MagCache,
    MagCacheCalibration,
    PyramidAttentionBroadcast,
    SeaCache,
    TaylorSeer,
    apply_step_cache,
)
from rolling_kv.wan.offloaded import offload_blocks
from rolling_kv.wan.processors import RollingSelfAttention

STEPS, LAYERS, CHUNK = 12, 4, 2
SIZE = dict(height=32, width=48)
MULTI_STEP = SamplingConfig(chunk=CHUNK, sampler="unipc", num_inference_steps=STEPS, guidance_scale=2.0)
FEW_STEP = SamplingConfig(chunk=CHUNK)
RATIOS = (1.0,) * STEPS
# Wide enough to skip on a model with random weights, whose predictions hardly depend on the step.
SKIPPING = {
    "pab": PyramidAttentionBroadcast(2, 3, (50, 990), (50, 990)),
    "fastercache": FasterCache(3, 2, (-1, 990), (-1, 990)),
    "firstblock": FirstBlockCache(0.5),
    "taylorseer": TaylorSeer(3),
    "taylorseer lite": TaylorSeer(3, use_lite_mode=True),
    "magcache": MagCache(mag_ratios=RATIOS),
    "seacache": SeaCache(2.0),
}
EACH = pytest.mark.parametrize("method", SKIPPING.values(), ids=SKIPPING)


@pytest.fixture(scope="module")
def model():
    transformer = tiny_transformer(num_attention_heads=2, attention_head_dim=12, num_layers=LAYERS)
    return CausalModel(transformer, ModelPreset("test", MULTI_STEP, CacheConfig(4, sink=1)))


def words(model, seed):
    return torch.randn(1, 6, model.transformer.config.text_dim, generator=torch.Generator().manual_seed(seed))


def roll(model, method=None, *, chunks=3, negative=1, **kwargs):
    session = RollingSession(
        model, words(model, 0), negative=words(model, negative), step_cache=method, **SIZE, **kwargs
    )
    with session:
        for _ in session.generate(chunks, seed=3):
            pass
    return session


def clip(model, method=None, **kwargs):
    clip = BidirectionalClip(
        model, words(model, 0), negative=words(model, 1), frames=4, step_cache=method, **SIZE, **kwargs
    )
    return clip.sample(seed=3), clip.step_report


def snapshot(transformer):
    """Everything that hangs on the instances: attributes, hooks, processors."""
    return {
        name: dict(vars(module)) | {key: dict(value) for key, value in vars(module).items() if isinstance(value, dict)}
        for name, module in transformer.named_modules()
    }


def psnr(a, b):
    return 10 * torch.log10((b.max() - b.min()) ** 2 / (a - b).pow(2).mean()).item()


def test_every_method_is_tested():
    assert {type(method) for method in SKIPPING.values()} == set(METHODS.values())


@EACH
def test_a_skipped_step_really_skips(model, method):
    calls = []
    handles = [
        block.ffn.net[0].register_forward_pre_hook(lambda *_: calls.append("feed-forward"))
        for block in model.transformer.blocks
    ]
    try:
        report = roll(model, method).step_report
    finally:
        for handle in handles:
            handle.remove()
    context = 2 * 2 * (LAYERS - 1)  # two chunks have one, per branch; the last block needs no feed-forward there
    assert calls.count("feed-forward") - context == report.computed["feed-forward"]
    assert report.possible["feed-forward"] == 3 * 2 * STEPS * LAYERS
    assert 0.1 < report.skipped() < 0.9
    assert report.nbytes > 0


@EACH
def test_weights_in_cpu_memory_change_nothing(model, method):
    expected, offloaded = roll(model, method), deepcopy(model)
    offload_blocks(offloaded.transformer, "cpu")
    session = roll(offloaded, method)
    assert torch.equal(session.state.latents(), expected.state.latents())
    assert session.step_report.skipped() == expected.step_report.skipped() > 0


@pytest.mark.parametrize(
    "method, part, computed",
    [  # per chunk and branch, of 12 steps
        (PyramidAttentionBroadcast(2, 1, (0, 1001)), "self-attention", 6),
        (PyramidAttentionBroadcast(1, 3, (0, 1001), (0, 1001)), "cross-attention", 4),
        (TaylorSeer(4, 1, 2), "feed-forward", 5),  # 0, 1, 3, 7, 11
        (MagCache(max_skip_steps=2, retention_ratio=0.25, mag_ratios=RATIOS), "feed-forward", 6),  # 0, 1, 2, 5, 8, 11
        (SeaCache(1e9), "feed-forward", 5),  # 0, 3, 6, 9 and the last
    ],
    ids=["pab self", "pab cross", "taylorseer", "magcache", "seacache"],
)
def test_the_schedule_starts_again_with_every_chunk_and_branch(model, method, part, computed):
    report = roll(model, method).step_report
    assert report.computed[part] == 3 * 2 * LAYERS * computed


def test_fastercache_leaves_out_the_unconditional_branch(model):
    report = roll(model, FasterCache(3, 100, (-1, 1001), (-1, 999)), chunks=1).step_report
    assert report.computed["feed-forward"] == LAYERS * (STEPS + STEPS // 3)
    unguided = replace(MULTI_STEP, guidance_scale=1.0)
    report = roll(model, FasterCache(3, 2, (-1, 1001), (-1, 999)), chunks=1, sampling=unguided).step_report
    assert report.computed["feed-forward"] == LAYERS * STEPS
    assert report.skipped("self-attention") > 0.3


HOLDING = SKIPPING | {
    "pab self": PyramidAttentionBroadcast(2, 1, (50, 990)),
    "pab cross": PyramidAttentionBroadcast(1, 3, cross_attention_timestep_skip_range=(50, 990)),
    "taylorseer of order 2 in float32": TaylorSeer(2, 2, taylor_factors_dtype="float32"),
    "seacache of order 0": SeaCache(2.0, residual_order=0),
}


def foreseen_bytes(model, method, sampling):
    preset = model.preset
    return estimate(model.transformer, **SIZE, sampling=sampling, cache=preset.cache, step_cache=method).step_cache


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("mode", [roll, clip], ids=["rolling", "bidirectional"])
@pytest.mark.parametrize("method", HOLDING.values(), ids=HOLDING)
def test_what_is_held_is_what_was_foreseen(model, method, mode, guidance):
    sampling = replace(MULTI_STEP, guidance_scale=guidance)
    made = mode(model, method, sampling=sampling)
    report = made.step_report if mode is roll else made[1]
    at_once = sampling if mode is roll else replace(sampling, chunk=4)
    foreseen = foreseen_bytes(model, method, at_once)
    assert report.nbytes == pytest.approx(foreseen, rel=0.005)  # single numbers are held, too


def test_half_precision_holds_half():
    model = CausalModel(
        tiny_transformer(num_layers=2).to(torch.bfloat16), ModelPreset("test", MULTI_STEP, CacheConfig(4))
    )
    for method in (SKIPPING["seacache"], SKIPPING["firstblock"], SKIPPING["fastercache"]):
        foreseen = foreseen_bytes(model, method, MULTI_STEP)
        assert roll(model, method, chunks=1).step_report.nbytes == pytest.approx(foreseen, rel=0.01)


@EACH
@pytest.mark.parametrize("guided", [True, False])
def test_nothing_is_held_any_more_afterwards(model, method, guided):
    """Not until Python happens to look for cycles of references: such tensors can fill a GPU."""
    cache = apply_step_cache(model.transformer, method, STEPS)
    passes = [run(model, 0), run(model, 1)][: 1 + guided]
    gc.disable()
    try:
        cache.begin()
        for step in range(3):
            with torch.inference_mode():
                cache.predict(torch.ones(1, 16, 2, 4, 6), 1000.0 - 80 * step, passes)
        held = [weakref.ref(tensor) for tensor in cache.held()]
        assert held
        cache.detach()
        assert not any(tensor() is not None for tensor in held)
    finally:
        gc.enable()
        cache.detach()


@EACH
def test_the_context_pass_writes_what_it_writes_without(model, method):
    workspace, plain = Workspace(), Workspace()
    state = roll(model, method, chunks=3, workspace=workspace).state
    roll(model, method, chunks=1, state=state, workspace=workspace)  # its context passes are the caches' newest content
    assert workspace.cached_chunks == 3
    roll(model, None, chunks=1, state=state, workspace=plain)  # replays all three, without a step cache
    for name, cache in workspace.caches.items():
        tokens = cache.shape.tokens_per_frame
        chunk = {cache.window.slot(frame) for frame in range(6, 8)}  # of the last chunk, which has no context pass yet
        for ours, theirs in zip(cache.store.layers, plain.caches[name].store.layers):
            for slot in set(range(cache.window.filled)) - chunk:
                at = slice(slot * tokens, (slot + 1) * tokens)
                assert torch.equal(ours[0][:, :, at], theirs[0][:, :, at])


@EACH
def test_the_branches_do_not_mix(model, method):
    """With the same prompt in both branches, guidance changes nothing, however often each one is skipped."""
    if isinstance(method, FasterCache):
        method = replace(method, alpha_low_frequency=1.0, alpha_high_frequency=1.0)
    guided = roll(model, method, negative=0, chunks=2).state.latents()
    single = replace(MULTI_STEP, guidance_scale=1.0)
    if isinstance(method, FasterCache):  # the second branch is made up, from the first: nothing to compare bit by bit
        assert psnr(guided, roll(model, None, chunks=2, sampling=single).state.latents()) > 20
    else:
        assert torch.equal(guided, roll(model, method, chunks=2, sampling=single).state.latents())


@EACH
def test_a_negative_prompt_does_not_reach_the_other_branch(model, method):
    """What the conditional branch computes at the first step after a skip depends on its own past alone."""
    seen = {}
    for negative in (1, 2):
        flows = []
        cache = apply_step_cache(model.transformer, method, STEPS)
        try:
            cache.begin()
            x = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))
            for step in range(STEPS):
                timestep = 980.0 - 80 * step
                passes = [run(model, 0), run(model, negative)]
                with torch.inference_mode():
                    flows.append(cache.predict(x, timestep, passes)[0])
        finally:
            cache.detach()
        seen[negative] = torch.stack(flows)
    assert torch.equal(seen[1], seen[2])


def run(model, seed):
    def forward(x, timestep):
        return model.transformer(x, torch.tensor([timestep]), words(model, seed), return_dict=False)[0]

    return forward


@EACH
@pytest.mark.parametrize("ends", ["well", "cancelled", "cancelled in a pass"])
@pytest.mark.parametrize("mode", [roll, clip], ids=["rolling", "bidirectional"])
def test_the_model_is_left_as_it_was(model, method, ends, mode):
    class Cancelled(BaseException):
        pass

    def on_pass(done, total):
        if ends == "cancelled" and done == 7:
            raise Cancelled

    def in_a_pass(module, inputs):
        in_a_pass.calls += 1
        if in_a_pass.calls == 3:
            raise Cancelled

    in_a_pass.calls = 0
    handle = model.transformer.blocks[0].ffn.register_forward_pre_hook(in_a_pass) if "pass" in ends else None
    before = snapshot(model.transformer)
    if ends == "well":
        mode(model, method)
    else:
        with pytest.raises(Cancelled):
            mode(model, method, on_pass=on_pass)
    after = snapshot(model.transformer)
    if handle:
        handle.remove()
    assert after == before
    assert not model.transformer.is_cache_enabled


def test_hooks_of_others_stay(model):
    from diffusers.hooks import HookRegistry, ModelHook

    block = model.transformer.blocks[0]
    registry = HookRegistry.check_if_exists_or_initialize(block)
    registry.register_hook(ModelHook(), "somebody else's")
    try:
        before = snapshot(model.transformer)
        plain = roll(model).state.latents()
        roll(model, SKIPPING["firstblock"])
        assert snapshot(model.transformer) == before
        assert torch.equal(roll(model).state.latents(), plain)
    finally:
        registry.remove_hook("somebody else's")
        del block.forward, block._diffusers_hook


# Latents against those of the uncached run of the same seed, on random weights: measured, rounded down.
WORKS = {
    "pab": 50,
    "fastercache": 40,
    "firstblock": 40,
    "taylorseer": 45,
    "taylorseer lite": 25,
    "magcache": 40,
    "seacache": 40,
}


@EACH
@pytest.mark.parametrize("mode", ["multi-step", "bidirectional"])
def test_what_works_keeps_the_video(model, method, mode):
    name = next(name for name, known in SKIPPING.items() if known == method)
    if mode == "multi-step":
        video, plain = roll(model, method).state.latents(), roll(model).state.latents()
    else:
        video, plain = clip(model, method)[0], clip(model)[0]
    assert video.isfinite().all()
    assert WORKS[name] < psnr(video, plain) < 200


@EACH
@pytest.mark.parametrize("mode", ["rolling", "bidirectional"])
def test_few_steps_have_nothing_to_skip(model, method, mode):
    """The video is the uncached one, and the report says by how much a skipped step would have missed."""
    few = replace(FEW_STEP, guidance_scale=1.0)
    if mode == "rolling":
        session = roll(model, method, sampling=few)
        video, plain, report = session.state.latents(), roll(model, sampling=few).state.latents(), session.step_report
    else:
        (video, report), (plain, _) = clip(model, method, sampling=few), clip(model, sampling=few)
    assert torch.equal(video, plain)
    assert report.skipped() == 0 and len(report.change) == (9 if mode == "rolling" else 3)
    middle = sorted(report.change)[len(report.change) // 2]
    assert "nothing to skip" in report.note and f"by {100 * middle:.0f} %" in report.note


def test_magcache_is_calibrated_on_the_model_itself(model):
    report = roll(model, MagCacheCalibration(), chunks=2).step_report
    assert report.skipped() == 0
    assert len(report.constants) == STEPS and report.constants[0] == 1.0
    assert all(0.2 < ratio < 5 for ratio in report.constants)
    assert roll(model, MagCache(mag_ratios=report.constants, threshold=1.0)).step_report.skipped() > 0.2
    with pytest.raises(ValueError, match="calibrate"):
        roll(model, MagCache())
    assert not isinstance(model.transformer.blocks[0].attn1.processor, RollingSelfAttention)


def test_an_offloaded_cache_survives_skipped_layers(model):
    offloaded = CacheConfig(4, sink=1, offload=True)
    for name in ("firstblock", "pab"):
        plain = roll(model, SKIPPING[name]).state.latents()
        assert torch.equal(roll(model, SKIPPING[name], cache=offloaded).state.latents(), plain)


def test_one_chunk_of_everything_is_the_bidirectional_clip(model):
    whole = replace(MULTI_STEP, chunk=4)
    rolled = roll(model, chunks=1, sampling=whole, cache=CacheConfig(4)).state.latents()
    assert psnr(rolled, clip(model)[0]) > 90


def test_the_backend_holds_for_the_clip_alone(model):
    seen = []
    processors = [block.attn1.processor for block in model.transformer.blocks]
    handle = model.transformer.register_forward_pre_hook(
        lambda *_: seen.extend(processor._attention_backend for processor in processors)
    )
    try:
        video, _ = clip(model, execution=ExecutionConfig(backend="native"))
    finally:
        handle.remove()
    assert set(seen) == {"native"} and {processor._attention_backend for processor in processors} == {None}
    assert torch.equal(video, clip(model)[0])
    with pytest.raises(ValueError, match="attention backend"):
        clip(model, execution=ExecutionConfig(backend="flesh"))


def test_caches_that_would_get_in_each_others_way_are_refused(model):
    with RollingSession(model, words(model, 0), negative=words(model, 1), **SIZE):
        with pytest.raises(ValueError, match="close its session"):
            clip(model)
    model.transformer.enable_cache(FirstBlockCache().config(None))
    try:
        with pytest.raises(ValueError, match="disable_cache"):
            roll(model)
    finally:
        model.transformer.disable_cache()
        for module in model.transformer.modules():
            vars(module).pop("_diffusers_hook", None), vars(module).pop("forward", None)


def test_impossible_settings_are_refused(model):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        PyramidAttentionBroadcast(0)
    with pytest.raises(ValueError, match="must rise"):
        PyramidAttentionBroadcast(2, 1, (800, 100))
    with pytest.raises(ValueError, match="first step is computed"):
        FasterCache(spatial_attention_timestep_skip_range=(-1, 1001))
    with pytest.raises(ValueError, match="bfloat16"):
        TaylorSeer(taylor_factors_dtype="int8")
    with pytest.raises(ValueError, match="compile"):
        RollingSession(
            model,
            words(model, 0),
            negative=words(model, 1),
            step_cache=SeaCache(),
            execution=ExecutionConfig(compile=True),
            **SIZE,
        )
    cache = apply_step_cache(model.transformer, FirstBlockCache(), STEPS)
    try:
        with pytest.raises(ValueError, match="already"):
            apply_step_cache(model.transformer, FirstBlockCache(), STEPS)
    finally:
        cache.detach()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_method_is_made_of_what_was_entered(method):
    """What is left out has its default, and what a widget shows by default is the default."""
    parts = [part for knob in method.knobs() for part in knob.parts()]
    shown = {part.name: part.default or 0 for part in parts if part.kind != "numbers"}
    left_out = dict.fromkeys(part.name for part in parts)
    assert method.from_values({}) == method.from_values(left_out) == method.from_values(shown) == method()
    assert all(part.tooltip.endswith(".") and part.low < part.high for part in parts if part.high)
    assert [part.advanced for part in parts] == sorted(part.advanced for part in parts)


def test_ranges_and_constants_are_put_together():
    given = {"spatial_attention_timestep_skip_range_low": 50.0, "cross_attention_block_skip_range": 3}
    expected = PyramidAttentionBroadcast(2, 3, spatial_attention_timestep_skip_range=(50.0, 800))
    assert PyramidAttentionBroadcast.from_values(given) == expected
    assert TaylorSeer.from_values({"disable_cache_after_step": 7}).disable_cache_after_step == 7
    assert MagCache.from_values({"mag_ratios": "1, 0.9 0.8"}).mag_ratios == (1.0, 0.9, 0.8)
    with pytest.raises(ValueError, match="mag_ratios must be numbers, separated by commas, got 'many'"):
        MagCache.from_values({"mag_ratios": "many"})
    with pytest.raises(ValueError, match="must rise"):
        PyramidAttentionBroadcast.from_values({"spatial_attention_timestep_skip_range_low": 900.0})
