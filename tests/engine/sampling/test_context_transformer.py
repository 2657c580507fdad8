"""A model with a second set of weights runs context passes and given frames through it, and all other passes through the first."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from builders import shuffled, tiny_transformer
from reference import NaiveRun
from videos import HEIGHT, SAMPLING, WIDTH, prompt, same, sample

from rolling_kv.checkpoints.model import CausalModel
from rolling_kv.config import ALL_FRAMES, CacheConfig, ExecutionConfig
from rolling_kv.presets import ModelPreset
from rolling_kv.sampling.memory import estimate
from rolling_kv.sampling.schedule import seeded_noise
from rolling_kv.sampling.session import RollingSession
from rolling_kv.sampling.workspace import Workspace
from rolling_kv.wan.attachment import is_attached

SIZE = dict(height=HEIGHT, width=WIDTH)
LATENTS = (HEIGHT // 8, WIDTH // 8)


@pytest.fixture(scope="module")
def model():
    first, second = tiny_transformer(), tiny_transformer()
    second.load_state_dict(shuffled(first.state_dict()))
    return CausalModel(first, ModelPreset("plus", SAMPLING, CacheConfig(ALL_FRAMES)), context_transformer=second)


class SwappingRun(NaiveRun):
    """The naive loop, which takes the other transformer before it writes, and the first again after it."""

    def __init__(self, model, prompt):
        super().__init__(model, prompt)
        self.own, self.twin = model.transformers
        for block, other in zip(self.own.blocks, self.twin.blocks):
            other.attn1.processor, other.attn2.processor = block.attn1.processor, block.attn2.processor

    def swapped(self, write, latents):
        self.transformer = self.twin
        write(latents)
        self.transformer = self.own

    def keep(self, clean):
        self.swapped(super().keep, clean)

    def prefill(self, latents):
        self.swapped(super().prefill, latents)


@pytest.mark.parametrize("given", [0, 1, 4], ids=lambda frames: f"{frames} given")
@pytest.mark.parametrize("cache", [CacheConfig(ALL_FRAMES), CacheConfig(6, sink=1)], ids=["all", "window"])
def test_it_is_a_loop_that_swaps_transformers(model, cache, given):
    model.preset = replace(model.preset, cache=cache)
    naive = SwappingRun(deepcopy(model), prompt(model))
    clip = seeded_noise(2, 0, (1, 16, given, *LATENTS), 0)
    with RollingSession(model, prompt(model), execution=ExecutionConfig(exact=True), **SIZE) as session:
        if given:
            session.prefill(clip)
            naive.prefill(clip)
        for chunk in session.generate(5, seed=1):
            start, shape = naive.start, chunk.latents.shape
            expected = naive.chunk(lambda draw, start=start, shape=shape: seeded_noise(1, start, shape, draw))
            error = (chunk.latents - expected).abs().max()
            assert error <= (0 if cache.unlimited or naive.start <= cache.window else 1e-5)


def test_the_second_set_makes_a_difference(model):
    alone = CausalModel(model.transformer, model.preset)
    one, two = sample(alone, 3), sample(model, 3)
    assert torch.equal(one.chunks[0], two.chunks[0]) and not torch.equal(one.chunks[1], two.chunks[1])


@pytest.mark.parametrize("workspace", [True, False], ids=["taken over", "replayed"])
def test_two_runs_equal_one(model, workspace):
    shared = Workspace() if workspace else None
    whole, part = sample(model, 5), sample(model, 2, workspace=shared)
    assert same(sample(model, 3, state=part, workspace=shared), whole)


@pytest.mark.parametrize("switch", ["joint", "causal", "flush", "cut"])
def test_a_switch_writes_with_the_second_set_and_is_replayed(model, switch):
    settings = dict(cache=CacheConfig(6, sink=1), **SIZE)
    with RollingSession(model, prompt(model), **settings) as session:
        list(session.generate(3, seed=1))
        session.set_prompt(prompt(model, 5), switch=switch)
        list(session.generate(2, seed=1))
    with RollingSession(model, prompt(model, 5), state=session.state, **settings) as again:
        list(again.generate(1, seed=1))
    with session:
        list(session.generate(1, seed=1))
    assert same(session.state, again.state)


def test_prompts_of_either_set_and_branch_never_mix(model):
    """With guidance, and another prompt on the way: the same as in runs of their own, from the state."""
    sampling = replace(SAMPLING, guidance_scale=2.0)
    settings = dict(sampling=sampling, negative=prompt(model, 9), **SIZE)
    with RollingSession(model, prompt(model), **settings) as session:
        list(session.generate(2, seed=1))
        session.set_prompt(prompt(model, 5), prompt(model, 9))
        list(session.generate(2, seed=1))
    with RollingSession(model, prompt(model), **settings) as first:
        list(first.generate(2, seed=1))
    with RollingSession(model, prompt(model, 5), state=first.state, **settings) as second:
        list(second.generate(2, seed=1))
    assert same(session.state, second.state)


def test_both_are_put_back_and_both_are_announced(model):
    with RollingSession(model, prompt(model), **SIZE) as session:
        list(session.generate(2))
        assert all(map(is_attached, model.transformers))
        held = [known.prompt for known in session._open.branches.prompts]
        tensors = [tensor for known in held for pair in known.layers.values() for tensor in pair]
        nbytes = sum(tensor.nbytes for tensor in tensors + [known.projected for known in held])
    assert not any(map(is_attached, model.transformers))
    words = prompt(model).shape[1]
    options = dict(sampling=SAMPLING, cache=model.preset.cache, frames=4, prompt_tokens=words)
    announced = estimate(model.transformer, **SIZE, weight_sets=len(model.transformers), **options).prompts
    assert announced / 2 < nbytes <= announced  # a context pass ends before the last block looks at the prompt


def test_a_second_set_that_cannot_be_attached_leaves_the_first_as_it_was(model):
    with RollingSession(CausalModel(model.context_transformer, model.preset), prompt(model), **SIZE):
        with pytest.raises(ValueError, match="has a rolling cache attached already"):
            RollingSession(model, prompt(model), **SIZE).__enter__()
        assert not is_attached(model.transformer)
