"""What a step caching method is: the contract of the files beside this one, and the parts that they are made of.

A step cache skips work between the denoising steps of one clip or chunk. The methods are diffusers'; here each of them
is a frozen value with diffusers' field names and defaults. See `docs/caching.md`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

Pass = Callable[[torch.Tensor, float], torch.Tensor]
"""(x_t [B, C, f, h, w], timestep) -> predicted flow of the same shape, for one guidance branch."""


class StepClock(NamedTuple):
    """What a method must know about the run that it is attached to.

    timestep: gives the timestep of the pass under way, 0 to 1000
    steps: denoising steps of a chunk
    """

    timestep: Callable[[], float]
    steps: int


class StepShape(NamedTuple):
    """The size of one denoising step, from which a method knows what it will keep.

    branches: 2 with guidance, else 1
    layers: blocks of the model
    tokens: of the whole batch, after patches are made
    dim: hidden size of the model
    latents: values of the latents of the whole batch
    itemsize: bytes of a value in the model's dtype
    """

    branches: int
    layers: int
    tokens: int
    dim: int
    latents: int
    itemsize: int

    @property
    def hidden(self) -> int:
        """Bytes of one tensor of the hidden size."""
        return self.tokens * self.dim * self.itemsize


@dataclass(frozen=True)
class StepCacheMethod:
    """A step caching method: a frozen dataclass with a file of its own, which has everything that is known about it.

    Its fields are made by `count`, `share`, `switch`, `choice`, `timesteps` and `numbers`, so that widgets and arguments
    can be made of them. Fields that nobody should set there are plain.

    name: of the method in arguments and prompts
    title: what people call it
    aliases: what people look for who want it
    constants: the field for constants that belong to one checkpoint; empty if there are none
    calibration: the method that measures those constants, and skips nothing; None if there are none
    """

    name: ClassVar[str]
    title: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    constants: ClassVar[str] = ""
    calibration: ClassVar[type[StepCacheMethod] | None] = None

    # -- what each method has ----------------------------------------------------------------------------------------

    def config(self, clock: StepClock):
        """diffusers' configuration, as `enable_cache` takes it. Raises ValueError if the method cannot run like that."""
        raise NotImplementedError

    def bytes_held(self, shape: StepShape) -> int:
        """Bytes that are kept from step to step, of all branches together."""
        raise NotImplementedError

    @classmethod
    def strengths(cls, guided: bool) -> dict[str, StepCacheMethod]:
        """What a benchmark measures, from gentle to strong, the defaults among them, by what tells them apart."""
        raise NotImplementedError

    @classmethod
    def why_unavailable(cls) -> str:
        """Why this method cannot run with the diffusers that is installed; empty if it can."""
        return ""

    # -- what a method may wish of its attachment --------------------------------------------------------------------

    def place(self, step: int, steps: int, timestep: float) -> dict[str, Any]:
        """Arguments of the model's `cache_context` that tell where in the run a pass is."""
        return {}

    def joint_branches(self, clock: StepClock) -> JointBranches | None:
        """A module that computes both guidance branches in one call, for a method that makes up one from the other.

        With it, the hooks in the blocks act in the conditional branch alone; see `JointBranches.both`.
        """
        return None

    def measured(self, hooks: list) -> list[float]:
        """The constants of one chunk, one per step, that the hooks in the blocks have recorded; of a calibration."""
        return []

    # -- what is the same for all ------------------------------------------------------------------------------------

    def __post_init__(self):
        for knob in self.knobs():
            knob.check(getattr(self, knob.name))

    @classmethod
    def knobs(cls) -> list[Knob]:
        """The settings for people, advanced ones last."""
        known = [f.metadata["knob"]._replace(name=f.name, default=f.default) for f in fields(cls) if f.metadata]
        return sorted(known, key=lambda knob: knob.advanced)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> StepCacheMethod:
        """The method with the values of its widgets or arguments, by the names of `Knob.parts`.

        A value that is missing or None is the default. Raises ValueError for values that cannot work.
        """
        return cls(**{knob.name: knob.read(values) for knob in cls.knobs()})

    @property
    def is_default(self) -> bool:
        """Whether every setting is the default, constants aside."""
        return all(f.name == self.constants or getattr(self, f.name) == f.default for f in fields(self))

    def with_constants(self, constants: tuple[float, ...]) -> StepCacheMethod:
        """This method with the constants that its calibration measured; itself if it needs none."""
        return replace(self, **{self.constants: constants}) if self.constants else self


class JointBranches(nn.Module):
    """Both guidance branches as one call. See `StepCacheMethod.joint_branches`.

    both: whether the pass under way belongs to a step that computes both branches; hooks in the blocks then skip nothing
    """

    both: bool

    def predict(self, x: torch.Tensor, run: Callable[[str, torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        """The flows of the conditional and the unconditional branch; run: computes the branch of that name."""
        raise NotImplementedError


class Knob(NamedTuple):
    """A setting of a method, as a widget or an argument shows it.

    kind: "count" (int), "share" (float), "switch" (bool), "choice" (one of choices), "timesteps" (a range, two floats),
        "timestep" (one end of it) or "numbers" (floats, entered as text)
    tooltip: a sentence; of a range, what happens within it
    low, high: bounds of what can be entered; the method itself holds to `low`
    step: of what can be entered
    choices: all values that there are
    advanced: whether it is shown on demand, and may be left out
    name: of the field
    default: of the field; None is entered as 0
    """

    kind: str
    tooltip: str
    low: float = 0
    high: float = 0
    step: float = 1
    choices: tuple[str, ...] = ()
    advanced: bool = False
    name: str = ""
    default: Any = None

    def parts(self) -> list[Knob]:
        """What is entered: the two ends of a range, or this one setting."""
        if self.kind != "timesteps":
            return [self]
        return [
            self._replace(
                kind="timestep", name=f"{self.name}_{end}", default=default,
                tooltip=f"Timesteps (1000: pure noise, 0: clean) {word} which {self.tooltip}.",
            )
            for end, word, default in zip(("low", "high"), ("above", "below"), self.default)
        ]  # fmt: skip

    def read(self, values: Mapping[str, Any]) -> Any:
        """The value of the field, from the values of the parts by name."""
        if self.kind == "timesteps":
            return tuple(part.read(values) for part in self.parts())
        value = values.get(self.name)
        if value is None or (self.default is None and value == 0):
            return self.default
        return _numbers(self.name, value) if self.kind == "numbers" else value

    def check(self, value: Any) -> None:
        """Raise ValueError if the field cannot have this value."""
        if self.kind in ("count", "share"):
            if value is not None and (not math.isfinite(value) or value < self.low):
                raise ValueError(f"{self.name} must be at least {self.low:g}, got {value}")
        elif self.kind == "choice" and value not in self.choices:
            known = f"{', '.join(self.choices[:-1])} or {self.choices[-1]}"
            raise ValueError(f"{self.name} must be {known}, got {value!r}")
        elif self.kind == "timesteps" and not value[0] < value[1]:
            raise ValueError(f"{self.name} must rise, as in (100, 800), got {value}")


def count(default: int | None, tooltip: str, low: int = 0, high: int = 1000, *, advanced: bool = False) -> Any:
    """A field that holds a number of steps, or another whole number."""
    return _field(default, Knob("count", tooltip, low, high, advanced=advanced))


def share(default: float, tooltip: str, *, advanced: bool = False) -> Any:
    """A field that holds a threshold, a share or a factor."""
    return _field(default, Knob("share", tooltip, 0, 10, 0.01, advanced=advanced))


def switch(default: bool, tooltip: str) -> Any:
    """A field that is on or off."""
    return _field(default, Knob("switch", tooltip))


def choice(choices: tuple[str, ...], tooltip: str, *, advanced: bool = False) -> Any:
    """A field that is one of several words, the first by default."""
    return _field(choices[0], Knob("choice", tooltip, choices=choices, advanced=advanced))


def timesteps(low: float, high: float, what: str) -> Any:
    """A field that holds a range of timesteps, (low, high); what: happens within it, as in "attention is reused"."""
    return _field((low, high), Knob("timesteps", what, -1, 1001, advanced=True))


def numbers(tooltip: str) -> Any:
    """A field that holds any number of floats, none by default."""
    return _field((), Knob("numbers", tooltip))


def _field(default: Any, knob: Knob) -> Any:
    return field(default=default, metadata={"knob": knob})


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise ValueError(f"{name} must be numbers, separated by commas, got {text[:80]!r}") from None
