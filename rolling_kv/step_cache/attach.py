"""Attach one of diffusers' step caches to a transformer, and take it off again without a trace.

The hooks are in place only while `StepCache.predict` runs. Every other pass meets the plain model: the context pass,
replays and prefills, which write the rolling cache, are therefore neither skipped nor recorded.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import NamedTuple

import torch
from diffusers.hooks.hooks import StateManager
from torch import nn

from .method import JointBranches, Pass, StepCacheMethod, StepClock
from .probe import StepProbe
from .report import StepCacheReport

BRANCHES = ("cond", "uncond")


class Forced(NamedTuple):
    """A method to attach in few-step sampling too: to measure what that does to the video."""

    method: StepCacheMethod


def start_step_cache(
    transformer, method: StepCacheMethod | Forced, *, steps: int, few_step: bool
) -> StepCache | StepProbe:
    """The step cache for a run; in few-step sampling, which has nothing to skip, a `StepProbe` that says so.

    transformer: a stock `WanTransformer3DModel`
    method: a value of one of the classes in `METHODS`
    steps: denoising steps of a chunk
    few_step: whether the model makes a chunk in few steps

    Call `detach` on what is returned. Raises as `apply_step_cache` does.
    """
    if isinstance(method, Forced):
        return apply_step_cache(transformer, method.method, steps)
    return StepProbe(method, steps) if few_step else apply_step_cache(transformer, method, steps)


def apply_step_cache(transformer, method: StepCacheMethod, steps: int) -> StepCache:
    """Attach a method, whatever the sampling; call `detach` on what is returned.

    transformer: a stock `WanTransformer3DModel`. Attach after a rolling cache, detach before it.
    method: a value of one of the classes in `METHODS`
    steps: denoising steps of a chunk

    Raises ValueError if a step cache is attached already, or if the method cannot run, as without its constants.
    """
    if transformer.is_cache_enabled:
        raise ValueError("this transformer has a step cache attached already; take that one off first")
    cache = StepCache(transformer, method, steps)
    try:
        cache._attach()
    except BaseException:
        cache.detach()
        raise
    return cache


class StepCache:
    """A step cache on a transformer. Made by `apply_step_cache`; one per transformer. See `begin` and `predict`."""

    def __init__(self, transformer, method: StepCacheMethod, steps: int):
        self.transformer = transformer
        self.method = method
        self.steps = steps
        self.timestep = math.inf
        self.step = 0
        self._joint: JointBranches | None = None
        self._before: dict[nn.Module, tuple] = {}  # the forward and the hook registry of each instance, or None
        self._forwards: dict[nn.Module, tuple] = {}  # of the modules with our hooks: (hooked, as before)
        self._cache_hooks: list = []
        self._states: dict[str, dict] = {}  # per branch and hook
        self._constants: list[list[float]] = []  # of each finished chunk
        self._counter = _CallCounter(transformer)
        self._passes = 0
        self._peak = 0
        self._weighed: set[torch.Size] = set()  # shapes of the chunks that `_peak` has seen

    def begin(self) -> None:
        """Forget everything: the next `predict` is the first step of another chunk."""
        self._collect_constants()
        self._forget()

    def predict(self, x: torch.Tensor, timestep: float, passes: list[Pass]) -> list[torch.Tensor]:
        """Run one denoising step of every guidance branch; steps come in order. One flow per pass, [B, C, f, h, w].

        passes: the conditional branch, then the unconditional one if there is guidance.
        """
        self.timestep = timestep
        self._passes += len(passes)
        branches: dict[str, Pass] = dict(zip(BRANCHES, passes))
        if self._joint is not None and len(passes) == 2:
            flows = self._joint.predict(x, lambda name, x: self._run(name, branches[name], x))
        else:
            flows = [self._run(name, branch, x) for name, branch in branches.items()]
        self.step += 1
        if x.shape not in self._weighed:  # every chunk of that shape holds as much
            storages = [tensor.untyped_storage() for tensor in self.held()]
            self._peak = max(self._peak, sum({s.data_ptr(): s.nbytes() for s in storages}.values()))
            if self.step == self.steps:
                self._weighed.add(x.shape)
        return flows

    def held(self) -> list[torch.Tensor]:
        """What is kept from step to step: every tensor, of all branches."""
        hooks = self._all_hooks()
        managers = {id(v): v for hook in hooks for v in vars(hook).values() if isinstance(v, StateManager)}
        states = [manager._state_cache for manager in managers.values()]
        # Hooks of FasterCache and Pyramid Attention Broadcast have one state each; those of the branches are kept here.
        states += [vars(hook).get("state") for hook in hooks]
        states += [list(branch.values()) for branch in self._states.values()]
        return list(_tensors(states))

    def report(self) -> StepCacheReport:
        self._collect_constants()
        constants = tuple(sum(step) / len(step) for step in zip(*self._constants))
        possible = dict.fromkeys(self._counter.calls, self._passes * len(self.transformer.blocks))
        return StepCacheReport(self.method.title, dict(self._counter.calls), possible, self._peak, (), constants)

    def detach(self) -> None:
        """Put the transformer back exactly as it was. Safe to call twice, and after an exception."""
        self._counter.remove()
        self._forget()  # the hooks live on in cycles of references, for who knows how long
        if self.transformer.is_cache_enabled:
            self._switch(on=True)
            self.transformer.disable_cache()
        # diffusers leaves its registries behind, and each forward as an attribute of the instance.
        for module, (forward, registry) in self._before.items():
            _set_attribute(module, "forward", forward)
            _set_attribute(module, "_diffusers_hook", registry)
        self._before, self._forwards, self._cache_hooks, self._joint = {}, {}, [], None

    # -- inside ----------------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        names = ("forward", "_diffusers_hook")
        self._before = {m: tuple(vars(m).get(name) for name in names) for m in self.transformer.modules()}
        known = {id(hook) for module in self._before for hook in _hooks(module)}
        self.transformer.enable_cache(self.method.config(StepClock(self._attention_timestep, self.steps)))
        self._forwards = {
            module: (vars(module)["forward"], plain)
            for module, (plain, _) in self._before.items()
            if vars(module).get("forward") is not plain
        }
        self._cache_hooks = [h for module in self._forwards for h in _hooks(module) if id(h) not in known]
        self._switch(on=False)
        self._joint = self.method.joint_branches(StepClock(lambda: self.timestep, self.steps))

    def _all_hooks(self) -> list:
        return self._cache_hooks + (_hooks(self._joint) if self._joint else [])

    def _forget(self) -> None:
        for hook in self._all_hooks():
            hook.reset_state(None)
        self._states.clear()
        self.step = 0

    def _attention_timestep(self) -> float:
        """What the hooks in the blocks see: in a step that computes both joint branches, no time at which they may skip."""
        return math.inf if self._joint is not None and self._joint.both else self.timestep

    def _run(self, name: str, branch: Pass, x: torch.Tensor) -> torch.Tensor:
        with self._live(name):
            return branch(x, self.timestep)

    @contextmanager
    def _live(self, name: str):
        # Some methods keep one state per module, which the branches must not share.
        for hook in self._cache_hooks:
            if hasattr(hook, "state"):
                hook.state = self._states.setdefault(name, {}).setdefault(hook, type(hook.state)())
        place = self.method.place(self.step, self.steps, self.timestep)
        # A method that makes up the unconditional branch never reuses anything inside it: nothing is kept of it.
        self._switch(on=self._joint is None or name == "cond")
        self._counter.on = True
        try:
            with self.transformer.cache_context(name, **place):
                yield
        finally:
            self._counter.on = False
            self._switch(on=False)

    def _collect_constants(self) -> None:
        if self.step == self.steps and (constants := self.method.measured(self._cache_hooks)):
            self._constants.append(constants)
            self.step = 0  # so that the chunk counts once

    def _switch(self, on: bool) -> None:
        for module, (hooked, plain) in self._forwards.items():
            _set_attribute(module, "forward", hooked if on else plain)


class _CallCounter:
    """Counts which parts of the blocks really compute: by their last linear layers, which a cached output bypasses."""

    def __init__(self, transformer):
        self.on = False
        self.calls = {"self-attention": 0, "cross-attention": 0, "feed-forward": 0}
        self._handles = []
        for block in transformer.blocks:
            for part, module in zip(self.calls, (block.attn1.to_out[0], block.attn2.to_out[0], block.ffn.net[-1])):
                self._handles.append(module.register_forward_pre_hook(lambda *_, part=part: self._count(part)))

    def _count(self, part: str) -> None:
        if self.on:
            self.calls[part] += 1

    def remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()


def _hooks(module: nn.Module) -> list:
    registry = vars(module).get("_diffusers_hook")
    return [] if registry is None else list(registry.hooks.values())


def _set_attribute(module: nn.Module, name: str, value) -> None:
    if value is not None:
        setattr(module, name, value)
    elif name in vars(module):
        delattr(module, name)


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value))
