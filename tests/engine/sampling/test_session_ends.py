"""However a session ends, well, cancelled or failing: nothing is left behind, and the next one makes the same video."""

import gc
import weakref

import pytest
import torch
from videos import HEIGHT, WIDTH, Cancelled, prompt, same, sample, small_model

from rolling_kv.config import SamplingConfig
from rolling_kv.sampling.session import RollingSession
from rolling_kv.sampling.workspace import Workspace
from rolling_kv.step_cache import FirstBlockCache


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.mark.parametrize("at", range(5))
def test_cancel_at_any_pass_leaves_nothing_behind(model, at):
    workspace = Workspace()
    trunk = sample(model, 1, workspace=workspace)

    def cancel(done, total):
        if done == at:
            raise Cancelled

    with pytest.raises(Cancelled):
        sample(model, 2, state=trunk, workspace=workspace, on_pass=cancel)
    assert workspace.nbytes == 0 and workspace.caches is None
    assert "Rolling" not in str(model.transformer.attn_processors)
    assert same(sample(model, 2, state=trunk, workspace=workspace), sample(model, 3))


def test_a_session_goes_on_after_a_cancelled_chunk(model):
    """Inside one session too: the chunk that was cancelled is made again, with the same result."""
    budget = [4]

    def cancel_once(done, total):
        budget[0] -= 1
        if budget[0] == 0:
            raise Cancelled

    with RollingSession(model, prompt(model), height=HEIGHT, width=WIDTH, on_pass=cancel_once) as session:
        with pytest.raises(Cancelled):
            list(session.generate(4, seed=7))
        done = len(session.state.records)
        list(session.generate(4 - done, seed=7))
    assert 0 < done < 4
    assert same(session.state, sample(model, 4))


@pytest.mark.parametrize("before", [1, 2, 3])
def test_an_open_chunk_of_another_size_is_in_nobodys_way(model, before):
    """What a cancelled chunk has left open, and then a single frame is given: with a full window it has overwritten one."""

    def cancel(done, total):
        if done == 3 * before + 1:
            raise Cancelled

    frame = torch.randn(1, 16, 1, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(1))
    videos = []
    for on_pass in (cancel, None):
        with RollingSession(model, prompt(model), height=HEIGHT, width=WIDTH, on_pass=on_pass) as session:
            if on_pass:
                with pytest.raises(Cancelled):
                    list(session.generate(before + 1, seed=7))
                session.on_pass = None
            else:
                list(session.generate(before, seed=7))
            session.prefill(frame)
            list(session.generate(1, seed=7))
        videos.append(session.state)
    assert same(*videos)


@pytest.mark.parametrize("between", ["cancelled", "another video in the workspace"])
def test_a_session_can_be_opened_again(model, between):
    """It finds nothing of its own there any more, and replays."""

    def cancel(done, total):
        if between == "cancelled" and done == 5:
            raise Cancelled

    workspace = Workspace()
    session = RollingSession(model, prompt(model), height=HEIGHT, width=WIDTH, workspace=workspace, on_pass=cancel)
    try:
        with session:
            list(session.generate(4 if between == "cancelled" else 2, seed=7))
    except Cancelled:
        session.on_pass = None
    sample(model, 1, seed=99, workspace=workspace)
    done = len(session.state.records)
    passes = []
    session.on_pass = lambda *pair: passes.append(pair)
    with session:
        list(session.generate(4 - done, seed=7))
    assert 0 < done < 4 and passes[-1] == (passes[-1][1] - 1, len(passes))
    assert same(session.state, sample(model, 4))


@pytest.mark.parametrize("ends", ["cancelled", "well"])
def test_a_closed_session_holds_no_memory(model, ends):
    """Whoever still refers to it; after a cancel, the traceback does, and its caches may be most of a GPU."""
    held = []

    def note():
        layers = [parts for cache in session._open.branches.caches.values() for parts in cache.store.layers]
        layers += [parts for known in session._open.branches.prompts for parts in known.prompt.layers.values()]
        held.extend(weakref.ref(part) for parts in layers for part in parts)

    def on_pass(done, total):
        if done == 4:
            note()
            if ends == "cancelled":
                raise Cancelled

    session = RollingSession(model, prompt(model), height=HEIGHT, width=WIDTH, on_pass=on_pass)
    gc.disable()
    try:
        with session:
            chunks = session.generate(3)
            for _ in chunks:
                pass
    except Cancelled as error:
        assert error.__traceback__
        alive = [tensor for tensor in held if tensor() is not None]
    else:
        alive = [tensor for tensor in held if tensor() is not None]
    finally:
        gc.enable()
    assert len(held) > 4 and not alive


def test_a_session_that_fails_at_its_end_is_taken_off_all_the_same(model):
    class Unlucky(FirstBlockCache):
        pass

    many = SamplingConfig(chunk=2, sampler="unipc", num_inference_steps=3)
    session = RollingSession(model, prompt(model), height=HEIGHT, width=WIDTH, sampling=many, step_cache=Unlucky())
    with pytest.raises(MemoryError):
        with session:
            session._open.steps.report = lambda: raise_(MemoryError)
            list(session.generate(1))
    assert "Rolling" not in str(model.transformer.attn_processors)
    assert not model.transformer.is_cache_enabled
    sample(model, 1)


def raise_(error):
    raise error


def test_a_session_must_be_open(model):
    session = RollingSession(model, prompt(model), height=HEIGHT, width=WIDTH)
    with pytest.raises(ValueError, match="inside `with session:`"):
        next(session.generate(1))
    with session:
        list(session.generate(1))
    with pytest.raises(ValueError, match="not open"):
        next(session.generate(1))
    with session:
        chunks = session.generate(2)
        next(chunks)
    with pytest.raises(ValueError, match="not open"):
        next(chunks)


def test_a_negative_prompt_that_no_log_tells_of_is_not_left_behind(model):
    """The first guided chunk after unguided ones is cancelled, and the session closed as if all was well."""
    guided = SamplingConfig(chunk=2, denoising_steps=(1000, 500), guidance_scale=2.0)

    def cancel(done, total):
        if done == 3:
            raise Cancelled

    workspace, start = Workspace(), sample(model, 2)
    size = dict(height=HEIGHT, width=WIDTH, sampling=guided, state=start)
    with RollingSession(
        model, prompt(model), negative=prompt(model, 5), workspace=workspace, on_pass=cancel, **size
    ) as session:
        with pytest.raises(Cancelled):
            list(session.generate(1))
    arguments = dict(sampling=guided, state=start, negative=prompt(model, 6))
    assert same(sample(model, 1, workspace=workspace, **arguments), sample(model, 1, **arguments))


def test_a_context_pass_that_fails_leaves_both_branches_at_the_same_point(model):
    guided = SamplingConfig(chunk=2, denoising_steps=(1000, 500), guidance_scale=2.0)
    arguments = dict(sampling=guided, negative=prompt(model, 5))
    calls = []

    def fail_on_the_second_branch(module, *_):
        calls.append(module)
        if len(calls) == 2:
            raise MemoryError

    with RollingSession(model, prompt(model), height=HEIGHT, width=WIDTH, **arguments) as session:
        list(session.generate(1, seed=7))
        hook = model.transformer.blocks[0].register_forward_hook(fail_on_the_second_branch)
        try:
            with pytest.raises(MemoryError):
                list(session.generate(1, seed=7))
        finally:
            hook.remove()
        list(session.generate(2, seed=7))
    assert same(session.state, sample(model, 3, **arguments))


def test_leaving_a_generator_early_keeps_what_is_done(model):
    with RollingSession(model, prompt(model), height=HEIGHT, width=WIDTH) as session:
        for chunk in session.generate(5, seed=7):
            if chunk.start_frame == 2:
                break
    assert same(session.state, sample(model, 2))
