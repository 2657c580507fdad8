"""Attach one of diffusers' step caches to a transformer, and take it off again without a trace.

The hooks are in place only while `StepCache.predict` runs. Every other pass meets the plain model: the context pass,
replays and prefills, which write the rolling cache, are therefore neither skipped nor recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import torch
from diffusers.hooks import apply_faster_cache
from diffusers.hooks.hooks import StateManager
from torch import nn

from .methods import FasterCache, MagCacheCalibration, Run, SeaCache

BRANCHES = ("cond", "uncond")
Pass = Callable[[torch.Tensor, float], torch.Tensor]
"""(x_t [B, C, f, h, w], timestep) -> predicted flow of the same shape, for one guidance branch."""


class StepCacheReport(NamedTuple):
    """What a step cache did, or why it did nothing.

    computed, possible: calls per part of the blocks ("self-attention", "cross-attention", "feed-forward"); empty where
        the cache was not attached. nbytes: most bytes that it held. change: relative change of the predicted flow from
        step to step, of each step; only where the cache was not attached. mag_ratios: MagCache's constants, the mean
        over the chunks of a run with `MagCacheCalibration`. note: for people, or empty.
    """

    method: str
    computed: dict[str, int]
    possible: dict[str, int]
    nbytes: int = 0
    change: tuple[float, ...] = ()
    mag_ratios: tuple[float, ...] = ()
    note: str = ""

    def skipped(self, part: str | None = None) -> float:
        """Share of the calls that were left out, 0 to 1, of one part or over all of them."""
        parts = [part] if part else list(self.possible)
        possible = sum(self.possible[part] for part in parts)
        return 1 - sum(self.computed[part] for part in parts) / possible if possible else 0.0

    def plus(self, other: StepCacheReport) -> StepCacheReport:
        """Of two runs with one method: calls add up, bytes are the most of either. The rest stays as it is here."""
        return self._replace(
            computed={part: calls + other.computed[part] for part, calls in self.computed.items()},
            possible={part: calls + other.possible[part] for part, calls in self.possible.items()},
            nbytes=max(self.nbytes, other.nbytes),
        )

    def summary(self) -> str:
        """A sentence for people."""
        shares = ", ".join(f"{self.skipped(part):.0%} of {part}" for part in self.possible)
        return self.note or f"{self.method} left out {shares}, and held {self.nbytes / 2**20:.1f} MiB."


class StepCache:
    """A step cache on a transformer. Made by `apply_step_cache`; one per transformer. See `begin` and `predict`."""

    def __init__(self, transformer, method, steps: int):
        self.transformer = transformer
        self.method = method
        self.steps = steps
        self.timestep = math.inf
        self.step = 0
        self._joint: _JointBranches | None = None
        self._before: dict[nn.Module, tuple] = {}  # the forward and the hook registry of each instance, or None
        self._forwards: dict[nn.Module, tuple] = {}  # of the modules with our hooks: (hooked, as before)
        self._cache_hooks: list = []
        self._states: dict[str, dict] = {}  # per branch and hook
        self._ratios: list[list[float]] = []  # of each finished chunk
        self._counter = _CallCounter(transformer)
        self._passes = 0
        self._peak = 0
        self._weighed: set[torch.Size] = set()  # shapes of the chunks that `_peak` has seen

    def begin(self) -> None:
        """Forget everything: the next `predict` is the first step of another chunk."""
        self._collect_ratios()
        self._forget()

    def predict(self, x: torch.Tensor, timestep: float, passes: list[Pass]) -> list[torch.Tensor]:
        """Run one denoising step of every guidance branch; steps come in order. One flow per pass, [B, C, f, h, w].

        passes: the conditional branch, then the unconditional one if there is guidance.
        """
        self.timestep = timestep
        self._passes += len(passes)
        branches = dict(zip(BRANCHES, passes))
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
        self._collect_ratios()
        ratios = tuple(sum(step) / len(step) for step in zip(*self._ratios))
        possible = dict.fromkeys(self._counter.calls, self._passes * len(self.transformer.blocks))
        return StepCacheReport(self.method.title, dict(self._counter.calls), possible, self._peak, (), ratios)

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
        self.transformer.enable_cache(self.method.config(Run(self._attention_timestep, self.steps)))
        self._forwards = {
            module: (vars(module)["forward"], plain)
            for module, (plain, _) in self._before.items()
            if vars(module).get("forward") is not plain
        }
        self._cache_hooks = [h for module in self._forwards for h in _hooks(module) if id(h) not in known]
        self._switch(on=False)
        if isinstance(self.method, FasterCache):
            self._joint = _JointBranches(self.method.config(Run(lambda: self.timestep, self.steps), guided=True))

    def _all_hooks(self) -> list:
        return self._cache_hooks + (_hooks(self._joint) if self._joint else [])

    def _forget(self) -> None:
        for hook in self._all_hooks():
            hook.reset_state(None)
        self._states.clear()
        self.step = 0

    def _attention_timestep(self) -> float:
        """What the attention hooks see. FasterCache, with guidance, reuses attention only where it skips a branch."""
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
        where = {}
        if isinstance(self.method, SeaCache):
            where = dict(step_index=self.step, num_inference_steps=self.steps, sigma=self.timestep / 1000)
        # FasterCache, with guidance, never reuses attention in the unconditional branch: nothing is kept of it.
        self._switch(on=self._joint is None or name == "cond")
        self._counter.on = True
        try:
            with self.transformer.cache_context(name, **where):
                yield
        finally:
            self._counter.on = False
            self._switch(on=False)

    def _collect_ratios(self) -> None:
        if isinstance(self.method, MagCacheCalibration) and self.step == self.steps:
            manager = next(h.state_manager for h in self._cache_hooks)
            self._ratios.append(list(manager._state_cache["cond"].calibration_ratios))
            self.step = 0

    def _switch(self, on: bool) -> None:
        for module, (hooked, plain) in self._forwards.items():
            _set_attribute(module, "forward", hooked if on else plain)


class _JointBranches(nn.Module):
    """Both guidance branches as one batch, unconditional first: what FasterCache's hook on the denoiser works on."""

    def __init__(self, config):
        super().__init__()
        self.both = False  # whether the pass under way belongs to a step that computes both branches
        self._run = None
        self._batch = 0
        apply_faster_cache(self, config)

    def predict(self, x: torch.Tensor, run: Callable) -> list[torch.Tensor]:
        self._run, self._batch = run, x.shape[0]
        try:
            uncond, cond = self(hidden_states=torch.cat([x, x])).chunk(2)
        finally:
            self._run, self.both = None, False
        return [cond, uncond]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.shape[0] == self._batch:  # the hook will make up the unconditional branch
            return self._run("cond", hidden_states)
        self.both = True
        uncond, cond = hidden_states.chunk(2)
        return torch.cat([self._run("uncond", uncond), self._run("cond", cond)])


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


def apply_step_cache(transformer, method, steps: int) -> StepCache:
    """Attach `method` to a stock `WanTransformer3DModel`; call `detach` on what is returned.

    method: one of `methods.METHODS`. steps: denoising steps of a chunk. Attach after a rolling cache, detach before it.
    Raises ValueError if a step cache is attached already, or if the method lacks its constants (MagCache).
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
