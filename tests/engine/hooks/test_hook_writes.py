"""The hook API: what each pass attends to, and which writes are refused."""

import pytest
import torch
from hook_dummies import Dummy
from hypothesis import given, settings
from hypothesis import strategies as st

from rolling_kv.cache.stores import Resident
from rolling_kv.hooks import attach as hooks
from rolling_kv.hooks.state import RollingKVCacheConfig, RollingKVCacheState

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


def test_appends_to_an_unlimited_cache_seldom_move_it(dummy, monkeypatch):
    moves = []
    resize = Resident.resize
    monkeypatch.setattr(Resident, "resize", lambda store, *args: moves.append(1) or resize(store, *args))
    run = dummy()
    for token in range(100):
        run(token)
    assert run(100) == list(range(101))
    assert 0 < len(moves) <= 2 * 13  # two layers


def test_what_a_model_passes_to_its_own_processor_is_passed_over(dummy):
    run = dummy()
    first = run.transformer.first
    tokens = torch.ones(1, 2, 2)
    assert torch.equal(first(tokens, scale=2.0), tokens)


def test_a_state_can_be_made_without_a_config():
    state = RollingKVCacheState()
    assert (state.config, state.next_token_offset, state.nbytes) == (RollingKVCacheConfig(), 0, 0)


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


def test_a_pass_that_does_not_update_and_finds_no_memory_does_no_harm(dummy):
    run = dummy(3)
    run(0, 1, 2)
    run.state.should_update_cache = False
    run.overwrite(1)

    def full(_):
        raise torch.OutOfMemoryError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch.Tensor, "clone", full)
        run(90, 91)
    assert run.cached() == [0, 1, 2]
    run.state.clear_cache_write()
    assert run(3) == [1, 2, 3]


def test_only_self_attention_without_a_mask(dummy):
    module = dummy().transformer.first
    tokens = torch.zeros(1, 2, 2)
    with pytest.raises(ValueError, match="first was given encoder_hidden_states"):
        module(tokens, tokens)
    with pytest.raises(ValueError, match="first was given an attention_mask"):
        module(tokens, attention_mask=tokens)
