"""What a message may carry: names and values from files and from people, made fit for one line of any log."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection
from itertools import islice

MESSAGE_LENGTH = 590
"""Characters of a whole message. What a file says may be of any length."""
NAME_LENGTH = 80
"""Characters of one name or value in a message; the longest names of Wan's and UMT5's tensors have 68."""


def printable(text: str) -> str:
    """The text with all characters escaped that end a log or steer a terminal.

    Those are control characters, line ends, marks that turn the direction of writing, and lone surrogates, which no
    log can encode: a file name that is not UTF-8 holds them.
    """
    if text.isprintable():
        return text
    return "".join(
        character
        if character.isprintable() or unicodedata.category(character) == "Zs"
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def shortened(text: str, length: int = NAME_LENGTH) -> str:
    """The text, with its middle left out where it has more than `length` characters."""
    if len(text) <= length:
        return text
    end = (length - 1) // 2
    return f"{text[: length - 1 - end]}…{text[-end:]}"


def shown(value: object) -> str:
    """A value as Python writes it, fit for a message; of anything but text and numbers only the type."""
    if value is None or isinstance(value, (str, int, float)):
        return shortened(printable(repr(value)))
    return f"a {type(value).__name__}"


def listed(names: Collection[str], most: int = 3, length: int = NAME_LENGTH) -> str:
    """The first names, each fit for a message and of at most `length` characters, and how many more there are."""
    first = ", ".join(shortened(printable(str(name)), length) for name in islice(names, most))
    return first + (f" and {len(names) - most} more" if len(names) > most else "")
