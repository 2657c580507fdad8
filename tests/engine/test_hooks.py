"""The hook API: what each pass attends to, which writes are refused, and that it leaves no trace."""

import logging

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
from rolling_kv.config import CacheConfig
from rolling_kv.hooks import (
    ROLLING_KV_CACHE_HOOK,
    RollingKVCacheConfig,
    apply_rolling_kv_cache,
    get_rolling_kv_cache_state,
    remove_rolling_kv_cache,
)


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
    [(("replace",), "'replace'"), (("append", 4), "got 4"), (("overwrite",), "got None"), (("overwrite", -3), "got -3")],
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
    """The ring agrees with the obvious: a list that is cut at the offset, extended, and then loses its oldest tokens."""
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
        (9, (90,) * 5, None),
        (9, (90,) * 6, "6 tokens does not fit a window of 5 with a sink of 1: make window_size at least 7"),
    ],
)
def test_overwrites_that_do_not_fit_are_refused_and_change_nothing(dummy, offset, tokens, message):
    run = dummy(5, 1)
    for chunk in ((0, 1, 2), (3, 4, 5), (6, 7, 8)):
        run(*chunk)
    run.overwrite(offset)
    if message is None:
        message = "5 tokens does not fit"
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
    assert run.cached() == []


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


@pytest.mark.parametrize("qk_norm", [None, "rms_norm", "rms_norm_across_heads"])
def test_a_first_pass_of_diffusers_attention_is_its_own(qk_norm):
    """No norm, a norm of each head, a norm over all heads."""
    torch.manual_seed(0)
    module = Attention(16, heads=2, dim_head=8, qk_norm=qk_norm).requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_()
    tokens = torch.randn(2, 5, 16)
    expected = module(tokens)
    apply_rolling_kv_cache(module)
    if qk_norm is None:
        torch.testing.assert_close(module(tokens), expected)
    else:
        # diffusers' own attention takes [B, H, S, D] into the norm, which is per head then
        torch.testing.assert_close(module(tokens), expected)


# -- Wan ---------------------------------------------------------------------------------------------------------

SIZE = (8, 12)  # latents: 24 tokens per latent frame
TOKENS = 24


def wan_pass(transformer, latents=None, timestep=1.0, prompt=None):
    if latents is None:
        latents = torch.randn(1, 16, 2, *SIZE, generator=torch.Generator().manual_seed(1))
    if prompt is None:
        prompt = torch.randn(len(latents), 6, transformer.config.text_dim, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        return transformer(latents, torch.full((len(latents),), timestep), prompt, return_dict=False)[0]


def video(chunks, steps, batch=1):
    """Latents of each pass: `chunks` chunks of 2 latent frames, `steps` passes each."""
    generator = torch.Generator().manual_seed(3)
    return [[torch.randn(batch, 16, 2, *SIZE, generator=generator) for _ in range(steps)] for _ in range(chunks)]


def through_the_engine(transformer, passes, window, sink, prompt, batch=1):
    """The same passes as `rolling_kv.sampler` makes them."""
    shape = CacheShape.of(transformer, batch, *SIZE, transformer.dtype)
    branch = Branch(RollingKVCache(shape, CacheConfig(window, sink), "cpu", capacity=2), PromptCache(prompt))
    outputs = []
    with torch.inference_mode(), attention.apply_rolling_kv_cache(transformer) as attachment:
        for chunk in passes:
            branch.cache.begin(2)
            outputs += [attachment.forward(latents, 1.0, branch, time_rows=1) for latents in chunk]
            branch.cache.commit()
    return outputs


def through_the_hooks(transformer, passes, window, sink, prompt):
    config = RollingKVCacheConfig(window if window == -1 else window * TOKENS, sink * TOKENS)
    apply_rolling_kv_cache(transformer, config)
    try:
        state, outputs = get_rolling_kv_cache_state(transformer), []
        for chunk in passes:
            state.clear_cache_write()
            offset = state.next_token_offset
            for latents in chunk:
                outputs.append(wan_pass(transformer, latents, prompt=prompt))
                state.configure_cache_write("overwrite", absolute_token_offset=offset)
        return outputs
    finally:
        remove_rolling_kv_cache(transformer)


@pytest.fixture(scope="module")
def transformer():
    return tiny_transformer(num_attention_heads=2, attention_head_dim=24)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("window, sink", [(-1, 0), (4, 0), (5, 1), (7, 2)])
def test_wan_equals_the_engine(transformer, window, sink, batch):
    """Positions, window and values: the same passes give the same flow, up to the rounding of the time embedding."""
    passes = video(5, 3, batch)
    prompt = torch.randn(batch, 6, transformer.config.text_dim, generator=torch.Generator().manual_seed(4))
    ours = through_the_hooks(transformer, passes, window, sink, prompt)
    engine = through_the_engine(transformer, passes, window, sink, prompt, batch)
    assert max((a - b).abs().max() for a, b in zip(ours, engine)) <= 1e-5
