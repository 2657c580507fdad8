"""The hook API on Wan's transformer: the engine's results, positions without end, bounded memory."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from builders import tiny_transformer
from crossings import Crossings
from hook_dummies import SIZE, TOKENS, noise, wan_pass

from rolling_kv.cache.prompt import Branch, PromptCache
from rolling_kv.cache.rolling import RollingKVCache
from rolling_kv.cache.sizes import CacheShape
from rolling_kv.checkpoints.model import CausalModel
from rolling_kv.config import ALL_FRAMES, CacheConfig, SamplingConfig
from rolling_kv.hooks.attach import apply_rolling_kv_cache, get_rolling_kv_cache_state, remove_rolling_kv_cache
from rolling_kv.hooks.state import RollingKVCacheConfig
from rolling_kv.presets import ModelPreset
from rolling_kv.sampling.session import RollingSession
from rolling_kv.wan.attachment import RollingAttachment
from rolling_kv.wan.attachment import apply_rolling_kv_cache as attach
from rolling_kv.wan.inputs import time_sinusoid


@pytest.fixture(scope="module")
def transformer():
    return tiny_transformer(num_attention_heads=2, attention_head_dim=24)


@pytest.fixture
def hooked(transformer):
    """The transformer under the hooks of a given window and sink in latent frames."""

    def apply(window=-1, sink=0, to=transformer):
        applied.append(to)
        apply_rolling_kv_cache(to, RollingKVCacheConfig(window if window == -1 else window * TOKENS, sink * TOKENS))
        return to

    applied = []
    yield apply
    for module in applied:
        remove_rolling_kv_cache(module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window, sink, batch", [(-1, 0, 1), (4, 0, 2), (5, 1, 1), (7, 2, 1)])
def test_wan_agrees_with_the_engine(hooked, window, sink, batch, dtype):
    """Three passes over each of five chunks: bit-equal, but for the engine's fused blocks, which are float32 only."""
    transformer = tiny_transformer(num_attention_heads=2, attention_head_dim=24).to(dtype)
    latents = noise(5, 3, batch, 16, 2, *SIZE, seed=1).to(dtype)
    prompt = noise(batch, 6, transformer.config.text_dim).to(dtype)

    shape = CacheShape.of(transformer, batch, *SIZE, dtype)
    kept = CacheConfig(ALL_FRAMES if window == -1 else window, sink)
    branch = Branch(RollingKVCache(shape, kept, "cpu", capacity=2), PromptCache(prompt))
    expected = []
    with torch.no_grad(), attach(transformer) as attachment:
        for chunk in latents:
            branch.cache.begin(2)
            expected += [attachment.forward(step, 0.0, branch, time_rows=1) for step in chunk]
            branch.cache.commit()

    state, actual = get_rolling_kv_cache_state(hooked(window, sink, transformer)), []
    for chunk in latents:
        offset = state.next_token_offset
        for step in chunk:
            actual.append(wan_pass(transformer, step, prompt=prompt))
            state.configure_cache_write("overwrite", absolute_token_offset=offset)
        state.clear_cache_write()
    tolerance = 1e-5 if dtype == torch.float32 else 0
    for ours, theirs in zip(actual, expected):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def test_positions_do_not_wait_for_the_device(hooked):
    state = get_rolling_kv_cache_state(meta := hooked(to=tiny_transformer().to("meta")))
    latents, prompt = torch.zeros(1, 16, 2, *SIZE, device="meta"), torch.zeros(1, 6, 32, device="meta")
    with Crossings() as crossings, torch.inference_mode():
        for chunk in range(2):
            for _ in range(2):
                meta(latents, torch.zeros(1, device="meta"), prompt)
                state.configure_cache_write("overwrite", absolute_token_offset=chunk * 2 * TOKENS)
            state.clear_cache_write()
    assert not crossings.waiting
    assert len(crossings.free) == 2 * 2  # cosines and sines of each chunk


def test_the_passes_of_a_sampling_session(transformer, hooked, monkeypatch):
    """What a session with guidance asks of the model, asked through the hooks, in a context for each branch."""
    passes = []
    original = RollingAttachment.forward

    def record(self, latents, timestep, branch, **kwargs):
        flow = original(self, latents, timestep, branch, **kwargs)
        passes.append((branch.cache, branch.cache.window.end, latents, timestep, branch.prompt.embeds, flow))
        return flow

    monkeypatch.setattr(RollingAttachment, "forward", record)
    sampling = SamplingConfig(chunk=2, sampler="euler", num_inference_steps=2, guidance_scale=3.0)
    model = CausalModel(transformer, ModelPreset("test", sampling, CacheConfig(5, sink=1)))
    prompt, negative = noise(2, 1, 6, transformer.config.text_dim, seed=5)
    height, width = (8 * size for size in SIZE)
    with RollingSession(model, prompt, negative=negative, height=height, width=width) as session:
        list(session.generate(4, seed=1))

    # The stock model's sinusoid is float32, which at timestep 1000 alone costs 1e-5.
    projection = transformer.condition_embedder.timesteps_proj
    monkeypatch.setattr(projection, "forward", lambda timestep: time_sinusoid(timestep, projection.num_channels))
    hooked(5, 1)
    contexts, compared = {}, 0
    for cache, frame, latents, timestep, embeds, flow in passes:
        with transformer.cache_context(contexts.setdefault(id(cache), f"branch {len(contexts)}")):
            get_rolling_kv_cache_state(transformer).configure_cache_write("overwrite", frame * TOKENS)
            ours = wan_pass(transformer, latents, timestep, embeds)
        if flow is not None:
            assert (ours - flow).abs().max() <= 1e-5
            compared += 1
    assert len(contexts) == 2 and compared == 2 * 4 * 2 and len(passes) == compared + 2 * 3


def test_the_example_of_the_docs_makes_the_video_of_a_session(transformer, tmp_path):
    text = Path(__file__).parents[3].joinpath("docs", "hook-api.md").read_text(encoding="utf-8")
    example = tmp_path / "example.py"
    example.write_text(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], encoding="utf-8")
    height, width = SIZE
    prompt = noise(1, 6, transformer.config.text_dim)
    given = dict(transformer=transformer, prompt=prompt, chunks=5, height=height, width=width, seed=7)
    try:
        video = runpy.run_path(str(example), given)["video"]
    finally:
        remove_rolling_kv_cache(transformer)

    model = CausalModel(transformer, ModelPreset("test", SamplingConfig(chunk=3), CacheConfig(12, sink=3)))
    with RollingSession(model, prompt, height=8 * height, width=8 * width) as session:
        expected = [chunk.latents for chunk in session.generate(5, seed=7)]
    torch.testing.assert_close(torch.cat(video), torch.cat(expected), atol=5e-5, rtol=0)


def test_positions_beyond_the_table_of_the_stock_model(transformer, hooked):
    """The same window gives the same flow at frame 0 and at frame 90; the stock table ends at 64."""
    hooked(2)
    first, later = wan_pass(transformer), None
    for _ in range(45):
        later = wan_pass(transformer)
    assert get_rolling_kv_cache_state(transformer).next_token_offset == 92 * TOKENS
    torch.testing.assert_close(later, first, atol=1e-4, rtol=0)


def test_a_pass_that_does_not_update_has_the_bits_of_one_that_does(transformer, hooked):
    state = get_rolling_kv_cache_state(hooked(3))
    for seed in range(3):
        wan_pass(transformer, noise(1, 16, 2, *SIZE, seed=seed))
    state.should_update_cache = False
    first, second = wan_pass(transformer), wan_pass(transformer)
    state.should_update_cache = True
    assert torch.equal(first, second) and torch.equal(first, wan_pass(transformer))


def test_a_write_between_two_frames_is_refused(transformer, hooked):
    state = get_rolling_kv_cache_state(hooked())
    wan_pass(transformer)
    state.configure_cache_write("overwrite", absolute_token_offset=TOKENS + 1)
    with pytest.raises(ValueError, match="token 25 is not at the start of a latent frame, which has 24 tokens"):
        wan_pass(transformer)


def test_another_video_size_is_refused(transformer, hooked):
    hooked()
    wan_pass(transformer)
    with pytest.raises(ValueError, match="token 48 .* has 20 tokens at this size .4 x 5."):
        wan_pass(transformer, noise(1, 16, 2, 8, 10))


@pytest.mark.parametrize("window", [-1, 4])
def test_inference_mode_and_no_grad_can_be_mixed(transformer, hooked, window):
    hooked(window)
    for inference in (True, False, True, False):
        with torch.inference_mode(inference):
            wan_pass(transformer)


def test_the_cache_holds_no_autograd_graph(hooked):
    transformer = hooked(4, to=tiny_transformer().requires_grad_(True))
    prompt = noise(1, 6, transformer.config.text_dim)
    for _ in range(3):
        transformer(noise(1, 16, 2, *SIZE), torch.zeros(1), prompt)
    caches = get_rolling_kv_cache_state(transformer)._layers.values()
    assert not any(part.requires_grad for cache in caches for part in cache.store.open(0, 0))


def test_fused_projections(hooked):
    transformer = tiny_transformer()
    expected = wan_pass(transformer)
    transformer.fuse_qkv_projections()
    for block in transformer.blocks:
        block.attn1.to_q.weight.zero_()  # not what is used any more
    torch.testing.assert_close(wan_pass(hooked(to=transformer)), expected, atol=1e-5, rtol=0)


def test_the_window_bounds_the_memory(transformer, hooked):
    state = get_rolling_kv_cache_state(hooked(4, 1))
    for _ in range(5):
        wan_pass(transformer)
        assert state.nbytes == 2 * 2 * 4 * TOKENS * 48 * 4  # layers, keys and values, tokens, dim, float32


def test_a_session_is_refused_on_a_hooked_transformer(transformer, hooked):
    hooked(-1, 0, transformer)
    with pytest.raises(ValueError, match="hooks of rolling_kv.hooks; remove them first"):
        attach(transformer)
