"""The hook API: contexts do not mix, it leaves no trace, and it takes other attention modules than Wan's."""

import logging

import hook_dummies
import pytest
import torch
from builders import tiny_transformer
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_processor import Attention
from hook_dummies import CrossAttention, Dummy, PlainAttention, Transformer, wan_pass

from rolling_kv.hooks import attach as hooks
from rolling_kv.hooks.attach import (
    ROLLING_KV_CACHE_HOOK,
    apply_rolling_kv_cache,
    get_rolling_kv_cache_state,
    remove_rolling_kv_cache,
)
from rolling_kv.hooks.state import RollingKVCacheConfig
from rolling_kv.wan.attachment import apply_rolling_kv_cache as attach

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

        monkeypatch.setattr(hook_dummies, "apply_rolling_kv_cache", apply)
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
    with attach(transformer), pytest.raises(ValueError, match="close the session"):
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
