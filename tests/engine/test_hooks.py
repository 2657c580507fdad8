"""The hook API: what each pass attends to, which writes are refused, and that it leaves no trace."""

import logging
import re
from pathlib import Path

import pytest
import torch
from builders import tiny_transformer
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_processor import Attention
from diffusers.models.cache_utils import CacheMixin
from hypothesis import given, settings
from hypothesis import strategies as st

from rolling_kv import attention, hooks
from rolling_kv.cache import Branch, CacheShape, PromptCache, RollingKVCache
from rolling_kv.config import CacheConfig, ModelPreset, SamplingConfig
from rolling_kv.hooks import (
    ROLLING_KV_CACHE_HOOK,
    RollingKVCacheConfig,
    apply_rolling_kv_cache,
    get_rolling_kv_cache_state,
    remove_rolling_kv_cache,
)
from rolling_kv.model import CausalModel
from rolling_kv.sampler import RollingSession


class PlainAttention(torch.nn.Module):
    """Keys and values are the tokens themselves, so that a test can read what is attended."""

    def __init__(self):
        super().__init__()
        self.heads = 1
        self.to_q, self.to_k, self.to_v = (torch.nn.Identity() for _ in range(3))
        self.norm_q, self.norm_k = torch.nn.Identity(), torch.nn.Identity()
        self.to_out = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Dropout(0.0)])

    def forward(self, hidden_states):
        return hidden_states


class CrossAttention(PlainAttention):
    is_cross_attention = True


class Between(torch.nn.Module):
    def forward(self, hidden_states):
        return hidden_states


class Transformer(torch.nn.Module, CacheMixin):
    def __init__(self):
        super().__init__()
        self.first, self.between, self.second = PlainAttention(), Between(), PlainAttention()
        self.cross = CrossAttention()

    def forward(self, hidden_states):
        residual = hidden_states
        self.first(hidden_states)
        self.between(hidden_states)
        self.second(hidden_states)
        return self.cross(residual)


class Dummy:
    """A dummy transformer under the hooks, called with numbers; remembers what its passes attended to."""

    def __init__(self, monkeypatch, *config):
        self.transformer = Transformer()
        self.attended = []

        def dispatch(query, key, value, backend=None):
            assert torch.equal(key, value)
            self.attended.append(sorted(int(token) for token in key[0, :, 0, 0]))
            return query

        monkeypatch.setattr(hooks, "dispatch_attention_fn", dispatch)
        apply_rolling_kv_cache(self.transformer, RollingKVCacheConfig(*config))

    def __call__(self, *tokens, batch=1) -> list[int]:
        """One pass; returns the tokens that both its layers attended to."""
        self.attended.clear()
        with torch.no_grad():
            self.transformer(torch.tensor(tokens).float().view(1, -1, 1).expand(batch, -1, 2))
        assert len(self.attended) == 2 and self.attended[0] == self.attended[1]
        return self.attended[0]

    @property
    def state(self):
        return get_rolling_kv_cache_state(self.transformer)

    def overwrite(self, offset):
        self.state.configure_cache_write("overwrite", absolute_token_offset=offset)

    def cached(self) -> list[int]:
        """What is in the cache, without a change to it."""
        self.state.clear_cache_write()
        self.state.should_update_cache = False
        try:
            return self()
        finally:
            self.state.should_update_cache = True


@pytest.fixture
def dummy(monkeypatch):
    return lambda *config: Dummy(monkeypatch, *config)


# -- settings ----------------------------------------------------------------------------------------------------


def test_defaults(dummy):
    state = dummy().state
    assert RollingKVCacheConfig() == RollingKVCacheConfig(window_size=-1, sink_size=0)
    assert (state.should_update_cache, state.write_mode, state.absolute_token_offset) == (True, "append", None)
    assert state.next_token_offset == 0 and state.nbytes == 0


@pytest.mark.parametrize(
    "config, message", [((0,), "got 0"), ((-2,), "got -2"), ((8, -1), "got -1"), ((4, 4), "4 tokens .* sink of 4")]
)
def test_impossible_windows_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        RollingKVCacheConfig(*config)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("replace",), "'replace'"),
        (("append", 4), "got 4"),
        (("overwrite",), "got None"),
        (("overwrite", -3), "got -3"),
    ],
)
def test_impossible_writes_are_refused(dummy, arguments, message):
    state = dummy().state
    state.configure_cache_write("overwrite", 7)
    with pytest.raises(ValueError, match=message):
        state.configure_cache_write(*arguments)
    assert (state.write_mode, state.absolute_token_offset) == ("overwrite", 7)


# -- what a pass attends to --------------------------------------------------------------------------------------


def test_an_unlimited_cache_keeps_everything(dummy):
    run = dummy()
    assert run(0, 1) == [0, 1]
    assert run(2, 3, 4) == [0, 1, 2, 3, 4]
    assert run(5) == [0, 1, 2, 3, 4, 5]
    assert run.state.next_token_offset == 6


def test_the_oldest_tokens_leave_before_the_pass_attends(dummy):
    run = dummy(4)
    assert run(0, 1, 2) == [0, 1, 2]
    assert run(3, 4, 5) == [2, 3, 4, 5]
    assert run(6) == [3, 4, 5, 6]


def test_the_sink_stays(dummy):
    run = dummy(5, 2)
    assert run(0, 1, 2) == [0, 1, 2]
    assert run(3, 4, 5) == [0, 1, 3, 4, 5]
    assert run(6, 7) == [0, 1, 5, 6, 7]


def test_denoising_steps_overwrite_the_chunk_that_the_first_one_appended(dummy):
    run = dummy(6)
    run(0, 1, 2)
    run(3, 4, 5)
    assert run(60, 70, 80) == [3, 4, 5, 60, 70, 80]
    run.overwrite(6)
    assert run(61, 71, 81) == [3, 4, 5, 61, 71, 81]
    assert run(6, 7, 8) == [3, 4, 5, 6, 7, 8]
    run.state.clear_cache_write()
    assert run(9, 10, 11) == [6, 7, 8, 9, 10, 11]


def test_an_overwrite_forgets_what_follows_it(dummy):
    run = dummy()
    run(0, 1, 2)
    run(3, 4, 5)
    run.overwrite(1)
    assert run(90, 91) == [0, 90, 91]
    assert run.cached() == [0, 90, 91] and run.state.next_token_offset == 3


def test_a_pass_that_does_not_update_leaves_the_cache_as_it_was(dummy):
    run = dummy(4)
    run(0, 1, 2)
    run(3, 4, 5)
    run.state.should_update_cache = False
    assert run(90, 91) == [4, 5, 90, 91]
    run.overwrite(3)
    assert run(93, 94, 95) == [2, 93, 94, 95]
    run.state.should_update_cache = True
    run.state.clear_cache_write()
    assert run.state.next_token_offset == 6
    assert run.cached() == [2, 3, 4, 5]
    assert run(6) == [3, 4, 5, 6]


def test_nothing_kept_leaves_the_batch_size_open(dummy):
    run = dummy(4)
    run.state.should_update_cache = False
    assert run(90, 91) == [90, 91]
    run.state.should_update_cache = True
    assert run(0, 1, batch=2) == [0, 1]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), window=st.sampled_from([-1, 5, 8]), sink=st.sampled_from([0, 2]))
def test_any_order_of_passes_against_a_list(data, window, sink):
    """The ring agrees with a list that is cut at the offset, extended, and then loses its oldest tokens."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        run = Dummy(monkeypatch, window, sink)
        tokens, lost, fresh = [], 0, 0  # tokens: all ever kept; lost: how many of those behind the sink have left
        for _ in range(data.draw(st.integers(1, 12))):
            count = data.draw(st.integers(1, 3))
            lowest = sink + lost if lost else 0
            start = data.draw(st.integers(max(lowest, len(tokens) - count if lost else 0), len(tokens)))
            if start < len(tokens) or data.draw(st.booleans()):
                run.overwrite(start)
            else:
                run.state.clear_cache_write()
            run.state.should_update_cache = keep = data.draw(st.booleans())
            after = tokens[:start] + list(range(fresh, fresh + count))
            fresh += count
            lost_after = lost if window == -1 else max(lost, len(after) - window)
            assert run(*after[start:]) == sorted(after[:sink] + after[sink + lost_after :])
            if keep:
                tokens, lost = after, lost_after


# -- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "offset, tokens, message",
    [
        (10, (90,), "at token 10: the cache ends at token 9"),
        (2, (90, 91, 92), "at token 2: it has left the window, which holds tokens 5 to 9 and the sink of 1"),
        (0, (90,), "at token 0: it has left the window"),
        (6, (90, 91), "tokens 6 to 8 of 9: .* before 5, which are gone; overwrite at token 7"),
        (9, (90,) * 5, "5 tokens does not fit a window of 5 with a sink of 1: make window_size at least 6"),
    ],
)
def test_overwrites_that_do_not_fit_are_refused_and_change_nothing(dummy, offset, tokens, message):
    run = dummy(5, 1)
    for chunk in ((0, 1, 2), (3, 4, 5), (6, 7, 8)):
        run(*chunk)
    run.overwrite(offset)
    with pytest.raises(ValueError, match=message):
        run(*tokens)
    assert run.cached() == [0, 5, 6, 7, 8]
    assert run(9) == [0, 6, 7, 8, 9]


def test_an_overwrite_of_an_empty_cache_starts_at_zero(dummy):
    run = dummy()
    run.overwrite(3)
    with pytest.raises(ValueError, match="ends at token 0"):
        run(1)
    run.overwrite(0)
    assert run(1) == [1]


def test_another_batch_size_is_refused_and_changes_nothing(dummy):
    run = dummy()
    run(0, 1, batch=2)
    with pytest.raises(ValueError, match="holds a batch of 2, this pass has a batch of 3.*cache_context"):
        run(2, 3, batch=3)
    assert run(2, 3, batch=2) == [0, 1, 2, 3]
    run.state.reset()
    assert run(2, 3, batch=3) == [2, 3]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_pass_is_noticed(dummy, error):
    """The first layer has its keys, the second does not."""
    run = dummy()
    run(0, 1)

    def fail(_):
        raise error

    run.transformer.between.forward = fail
    with pytest.raises(error):
        run(2, 3)
    del run.transformer.between.forward
    with pytest.raises(ValueError, match="interrupted"):
        run(2, 3)
    run.state.reset()
    assert run(0, 1) == [0, 1]


def test_an_interrupted_pass_that_does_not_update_does_no_harm(dummy):
    run = dummy(3)
    run(0, 1, 2)
    run.state.should_update_cache = False
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def interrupt(*_, **__):
            raise KeyboardInterrupt

        patch.setattr(hooks, "dispatch_attention_fn", interrupt)
        run(90, 91)
    assert run.cached() == [0, 1, 2]


def test_only_self_attention_without_a_mask(dummy):
    module = dummy().transformer.first
    tokens = torch.zeros(1, 2, 2)
    with pytest.raises(ValueError, match="first was given encoder_hidden_states"):
        module(tokens, tokens)
    with pytest.raises(ValueError, match="first was given an attention_mask"):
        module(tokens, attention_mask=tokens)


# -- contexts and resets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("opened_before", [False, True], ids=["", "a context was open before the hooks came"])
def test_contexts_do_not_mix(monkeypatch, opened_before):
    if opened_before:
        original = hooks.apply_rolling_kv_cache

        def apply(module, config):
            HookRegistry.check_if_exists_or_initialize(module.first)
            with module.cache_context("cond"):
                pass
            original(module, config)

        monkeypatch.setitem(globals(), "apply_rolling_kv_cache", apply)
    run = Dummy(monkeypatch)
    for cond, uncond in (([0, 1], [10, 11]), ([0, 1, 2, 3], [10, 11, 12, 13])):
        with run.transformer.cache_context("cond"):
            assert run(*cond[-2:]) == cond
            run.overwrite(len(cond))
        with run.transformer.cache_context("uncond"):
            assert run(*uncond[-2:]) == uncond
            assert run.state.write_mode == "append"
    assert run.state.next_token_offset == 0


def test_reset_stateful_hooks_resets_every_context(dummy):
    run = dummy()
    states = []
    for name in ("cond", "uncond"):
        with run.transformer.cache_context(name):
            run(1, 2)
            run.overwrite(1)
            run.state.should_update_cache = False
            states.append(run.state)
    run.transformer._diffusers_hook.reset_stateful_hooks()
    for name, state in zip(("cond", "uncond"), states):
        assert (state.should_update_cache, state.write_mode, state.absolute_token_offset) == (True, "append", None)
        assert state.nbytes == 0
        with run.transformer.cache_context(name):
            assert run.state is state
            assert run(5, batch=2) == [5]


# -- putting on and taking off -----------------------------------------------------------------------------------


def fingerprint(module):
    """All that the hooks could change, except the empty registries that diffusers leaves."""
    return [
        (name, type(part), sorted(set(vars(part)) - {"_diffusers_hook"})) for name, part in module.named_modules()
    ] + [list(module.state_dict())]


@pytest.mark.parametrize(
    "remove",
    [
        remove_rolling_kv_cache,
        lambda module: module._diffusers_hook.remove_hook(ROLLING_KV_CACHE_HOOK, recurse=True),
    ],
    ids=["ours", "diffusers'"],
)
def test_removing_leaves_no_trace(remove):
    transformer = tiny_transformer()
    before, output = fingerprint(transformer), wan_pass(transformer)
    apply_rolling_kv_cache(transformer, RollingKVCacheConfig(48))
    wan_pass(transformer)
    remove(transformer)
    assert fingerprint(transformer) == before
    assert torch.equal(wan_pass(transformer), output)
    assert get_rolling_kv_cache_state(transformer) is None
    apply_rolling_kv_cache(transformer)
    with transformer.cache_context("cond"):
        wan_pass(transformer)
        assert get_rolling_kv_cache_state(transformer).next_token_offset == 48
    assert get_rolling_kv_cache_state(transformer).next_token_offset == 0


@pytest.mark.parametrize("ours_first", [True, False])
def test_other_hooks_stay(dummy, ours_first):
    calls = []

    class Count(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    transformer = Transformer()
    for ours in (ours_first, not ours_first):
        if ours:
            apply_rolling_kv_cache(transformer)
        else:
            HookRegistry.check_if_exists_or_initialize(transformer.first).register_hook(Count(), "count")
    remove_rolling_kv_cache(transformer)
    tokens = torch.ones(1, 2, 2)
    assert transformer.first(tokens) is tokens and calls == [transformer.first]


def test_applying_twice_is_refused():
    transformer = Transformer()
    apply_rolling_kv_cache(transformer)
    with pytest.raises(ValueError, match="already"):
        apply_rolling_kv_cache(transformer)
    remove_rolling_kv_cache(transformer)
    apply_rolling_kv_cache(transformer)


def test_a_transformer_of_a_sampling_session_is_refused():
    transformer = tiny_transformer()
    with attention.apply_rolling_kv_cache(transformer), pytest.raises(ValueError, match="close the session"):
        apply_rolling_kv_cache(transformer)
    assert get_rolling_kv_cache_state(transformer) is None


def test_a_module_without_self_attention_is_refused():
    with pytest.raises(ValueError, match="CrossAttention contains no self-attention"):
        apply_rolling_kv_cache(CrossAttention())


def test_removing_nothing_is_fine():
    remove_rolling_kv_cache(Transformer())
    assert get_rolling_kv_cache_state(Transformer()) is None


def test_one_warning_per_untested_class(caplog):
    with caplog.at_level(logging.WARNING, "rolling_kv.hooks"):
        apply_rolling_kv_cache(Transformer())
    assert len(caplog.records) == 1
    assert "untested with PlainAttention" in caplog.text
    caplog.clear()
    apply_rolling_kv_cache(tiny_transformer())
    assert not caplog.records


def test_only_self_attention_and_positions_get_a_forward_of_ours():
    transformer = tiny_transformer()
    apply_rolling_kv_cache(transformer)
    hooked = {name for name, part in transformer.named_modules() if "forward" in vars(part)}
    assert hooked == {"", "rope", "blocks.0.attn1", "blocks.1.attn1"}


# -- other attention modules -------------------------------------------------------------------------------------


def test_a_single_attention_module_is_a_pass_of_its_own(monkeypatch):
    module = PlainAttention()
    apply_rolling_kv_cache(module, RollingKVCacheConfig(2))
    tokens = torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        module(torch.ones(1, 2, 4))
        expected = torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        torch.testing.assert_close(module(tokens), expected)
    assert get_rolling_kv_cache_state(module).next_token_offset == 4


@pytest.mark.parametrize("qk_norm", [None, "rms_norm", "layer_norm"])
def test_a_first_pass_of_diffusers_attention_is_its_own(qk_norm):
    """Without a norm, and with one of each head."""
    torch.manual_seed(0)
    module = Attention(16, heads=2, dim_head=8, qk_norm=qk_norm).requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_()
    tokens = torch.randn(2, 5, 16)
    expected = module(tokens)
    apply_rolling_kv_cache(module)
    torch.testing.assert_close(module(tokens), expected)


def test_norms_in_float32_do_not_lift_a_half_precision_module():
    module = Attention(16, heads=2, dim_head=8, qk_norm="rms_norm").to(torch.bfloat16)
    module.norm_q.float(), module.norm_k.float()
    apply_rolling_kv_cache(module)
    with torch.no_grad():
        assert module(torch.ones(1, 3, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


# -- Wan ---------------------------------------------------------------------------------------------------------

SIZE = (8, 12)  # latents: 24 tokens per latent frame
TOKENS = 24


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


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wan_pass(transformer, latents=None, timestep=0.0, prompt=None):
    latents = noise(1, 16, 2, *SIZE) if latents is None else latents
    prompt = noise(len(latents), 6, transformer.config.text_dim) if prompt is None else prompt
    with torch.no_grad():
        return transformer(latents, torch.full((len(latents),), timestep), prompt, return_dict=False)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window, sink, batch", [(-1, 0, 1), (4, 0, 2), (5, 1, 1), (7, 2, 1)])
def test_wan_agrees_with_the_engine(hooked, window, sink, batch, dtype):
    """Three passes over each of five chunks: bit-equal, but for the engine's fused blocks, which are float32 only."""
    transformer = tiny_transformer(num_attention_heads=2, attention_head_dim=24).to(dtype)
    latents = noise(5, 3, batch, 16, 2, *SIZE, seed=1).to(dtype)
    prompt = noise(batch, 6, transformer.config.text_dim).to(dtype)

    shape = CacheShape.of(transformer, batch, *SIZE, dtype)
    branch = Branch(RollingKVCache(shape, CacheConfig(window, sink), "cpu", capacity=2), PromptCache(prompt))
    expected = []
    with torch.no_grad(), attention.apply_rolling_kv_cache(transformer) as attachment:
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


def test_the_passes_of_a_sampling_session(transformer, hooked, monkeypatch):
    """What a session with guidance asks of the model, asked through the hooks, in a context for each branch."""
    passes = []
    original = attention.RollingAttachment.forward

    def record(self, latents, timestep, branch, **kwargs):
        flow = original(self, latents, timestep, branch, **kwargs)
        passes.append((branch.cache, branch.cache.window.end, latents, timestep, branch.prompt.embeds, flow))
        return flow

    monkeypatch.setattr(attention.RollingAttachment, "forward", record)
    sampling = SamplingConfig(chunk=2, sampler="euler", num_inference_steps=2, guidance_scale=3.0)
    model = CausalModel(transformer, ModelPreset("test", sampling, CacheConfig(5, sink=1)))
    prompt, negative = noise(2, 1, 6, transformer.config.text_dim, seed=5)
    height, width = (8 * size for size in SIZE)
    with RollingSession(model, prompt, negative=negative, height=height, width=width) as session:
        list(session.generate(4, seed=1))

    # The stock model's sinusoid is float32, which at timestep 1000 alone costs 1e-5.
    projection = transformer.condition_embedder.timesteps_proj
    monkeypatch.setattr(
        projection, "forward", lambda timestep: attention.time_sinusoid(timestep, projection.num_channels)
    )
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


def test_the_example_of_the_docs_makes_the_video_of_a_session(transformer):
    text = Path(__file__).parents[2].joinpath("docs", "hook-api.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    height, width = SIZE
    prompt = noise(1, 6, transformer.config.text_dim)
    given = dict(transformer=transformer, prompt=prompt, chunks=5, height=height, width=width, seed=7)
    try:
        exec(example, given)
    finally:
        remove_rolling_kv_cache(transformer)

    model = CausalModel(transformer, ModelPreset("test", SamplingConfig(chunk=3), CacheConfig(12, sink=3)))
    with RollingSession(model, prompt, height=8 * height, width=8 * width) as session:
        expected = [chunk.latents for chunk in session.generate(5, seed=7)]
    torch.testing.assert_close(torch.cat(given["video"]), torch.cat(expected), atol=5e-5, rtol=0)


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
        attention.apply_rolling_kv_cache(transformer)
