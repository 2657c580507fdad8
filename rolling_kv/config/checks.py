"""What every setting is checked with: each says what was wrong, with the value."""

from __future__ import annotations

from collections.abc import Collection

from ..messages import shown


def check_choice(name: str, value: object, choices: Collection) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if not isinstance(value, (str, int)) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {shown(value)}")


def check_whole(name: str, value: object, low: int, high: int, unit: str = "") -> None:
    """Raise ValueError unless `value` is a whole number from `low` to `high`. unit: what it counts, in the singular."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, got {shown(value)}")
    if low == 0 and value < 0:
        raise ValueError(f"{name} must not be negative, got {shown(value)}")
    if not low <= value <= high:
        side, bound = ("least", low) if value < low else ("most", high)
        counted = unit and f" {unit}{'s' * (bound != 1)}"
        raise ValueError(f"{name} must be at {side} {bound}{counted}, got {shown(value)}")


def check_real(name: str, value: object, low: float, high: float) -> None:
    """Raise ValueError unless `value` is a number from `low` to `high`, and so a finite one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {shown(value)}")


def check_flag(name: str, value: object) -> None:
    """Raise ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {shown(value)}")
