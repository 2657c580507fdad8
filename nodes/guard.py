"""What stands between ComfyUI and a node: inputs that are checked, and messages that can be printed.

ComfyUI checks what is typed into widgets. It does not check what comes over a link, a literal in the place of a link,
or the choice of a dynamic combo.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from functools import wraps
from numbers import Integral, Real

from comfy_api.latest import io

from ..rolling_kv.config import check_choice
from ..rolling_kv.messages import printable, shortened, shown
from .types import EDGES

LONGEST = 2000
"""Characters of a message. A file or a prompt may put any number into one."""


def guarded(execute: Callable) -> Callable:
    """A node's `execute` that checks its inputs against the schema first, and whose errors are as `told` makes them.

    Bounds and choices hold whichever way a value comes. Inputs that the node does not have are left out, as ComfyUI does.
    So are inputs of a choice that were not given: the engine's defaults then apply.
    """
    parameters = inspect.signature(execute).parameters

    @wraps(execute)
    def checked(cls, **values):
        try:
            for given in cls.SCHEMA.inputs:
                if given.id in values:
                    values[given.id] = checked_value(given, values[given.id])
                elif not given.optional:
                    raise ValueError(f"{given.id} is missing. {_wanted(given)}")
            return execute(cls, **{name: value for name, value in values.items() if name in parameters})
        except Exception as error:
            if told(str(error)) == str(error) and _encodes("".join(traceback.format_exception(error))):
                raise
            known = isinstance(error, (ValueError, OSError))
            raise ValueError(told(str(error) if known else f"{type(error).__name__}: {error}")) from None

    return checked


def renamed(before: str, now: str, choices: dict) -> Callable:
    """Lets prompts that were saved before still run: an input by its old name stands for the new one.

    To be put outside of `guarded`, on a node that accepts all inputs. choices: what each old choice is called now.
    """

    def decorate(execute: Callable) -> Callable:
        @wraps(execute)
        def translated(cls, **values):
            if before in values:
                given = values.pop(before)
                check_choice(before, given, choices)
                values[now] = choices[given]
            return execute(cls, **values)

        return translated

    return decorate


def told(text: str) -> str:
    """A message as people can be told it: a few lines without control characters and halves of characters.

    A half of a character, from a cut emoji or a file name in another encoding, would end ComfyUI's worker for good: it
    cannot be logged.
    """
    return shortened("\n".join(map(printable, text.split("\n"))), LONGEST)


def _encodes(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def checked_value(given: io.Input, value):
    """The value of an input, a choice with what was given of that which it brings. Raises ValueError for one it cannot have."""
    if value is None and given.optional:
        return None
    if isinstance(given, io.DynamicCombo.Input):
        return _checked_choice(given, value)
    if not _allowed(given, value):
        raise ValueError(f"{given.id} cannot be {shown(value)}. {_wanted(given)}")
    return value


def _checked_choice(given: io.DynamicCombo.Input, value) -> dict:
    key = value.get(given.id) if isinstance(value, dict) else None
    option = next((option for option in given.options if option.key == key), None)
    if option is None:
        raise ValueError(f"{given.id} cannot be {shown(value)}. {_wanted(given)}")
    brought = [part for part in option.inputs if value.get(part.id) is not None]
    return {given.id: key} | {part.id: checked_value(part, value[part.id]) for part in brought}


def _allowed(given: io.Input, value) -> bool:
    kind = given.io_type
    if kind in ("INT", "FLOAT"):
        low, high = getattr(given, "min", None), getattr(given, "max", None)
        number = isinstance(value, Integral if kind == "INT" else Real)
        return number and (low is None or low <= value) and (high is None or value <= high)  # neither holds for NaN
    if kind == "COMBO":  # names of files are checked where files are looked for
        return given.id.endswith("_name") or (isinstance(value, str) and value in given.options)
    if kind == "STRING":
        return isinstance(value, str) and _encodes(value)
    if kind == "BOOLEAN":
        return isinstance(value, bool)
    return any(EDGES[edge](value) for edge in given.get_io_type().split(","))


def _wanted(given: io.Input) -> str:
    """What an input can be, as a sentence."""
    kind = given.io_type
    if kind in ("INT", "FLOAT"):
        return f"It is a number from {given.min} to {given.max}."
    if isinstance(given, io.DynamicCombo.Input):
        return f"Choose one of: {', '.join(option.key for option in given.options)}."
    if kind == "COMBO":
        return f"Choose one of: {', '.join(map(str, given.options))}."
    if kind == "STRING":
        return "It is a text of whole characters; half of one (of an emoji that was cut, say) cannot be read."
    if kind == "BOOLEAN":
        return "It is on or off."
    return f"It takes a link. {given.tooltip}"
