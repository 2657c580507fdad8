"""The words that a model with a small vocabulary understands, as the bundled one tells them in its rolling_kv.json."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .checkpoints.detect import own_notes
from .checkpoints.readers import read_json
from .messages import listed, printable, shortened

ENTRY = "words"
"""Of rolling_kv.json: `{"known": {"colours": ["red", …], …}, "also": ["crimson", "the", …], "otherwise":
"a green circle"}`."""
MOST = 8
"""Unknown words that a remark names."""
LONGEST = 1000
"""Characters of a remark."""


@dataclass(frozen=True)
class Words:
    """known: the words and phrases by their kind, to be listed. also: others that are no news: synonyms, articles.
    otherwise: a prompt that says everything as it is where a prompt leaves it open; empty where that is not told.
    """

    known: dict[str, tuple[str, ...]]
    also: tuple[str, ...] = ()
    otherwise: str = ""

    def unknown(self, prompt: str) -> list[str]:
        """The words of a prompt, as they stand there, that are none of these; each once."""
        rest = prompt
        phrases = {phrase.lower() for kind in self.known.values() for phrase in kind} | {
            word.lower() for word in self.also
        }
        for phrase in sorted(phrases, key=len, reverse=True):
            # Chinese has no spaces between words; elsewhere a word is known only as a whole.
            edge = r"\b" if phrase.isascii() else ""
            rest = re.sub(edge + re.escape(phrase) + edge, " ", rest, flags=re.IGNORECASE)
        return list({word.lower(): word for word in reversed(re.findall(r"\w[\w'’-]*", rest))}.values())[::-1]

    def remark(self, prompts: Iterable[str]) -> str:
        """What to say about prompts with words that are none of these; empty where there is nothing to say."""
        found = self.unknown(" ".join(prompts))
        if not found:
            return ""
        kinds = "; ".join(f"{kind}: {', '.join(words)}" for kind, words in self.known.items())
        told = f"Words that this tiny model does not know, and leaves out: {listed(found, MOST, 24)}. It knows {kinds}."
        told += f" What a prompt leaves open begins as in: {self.otherwise}." if self.otherwise else ""
        return shortened(printable(told), LONGEST)  # a file can say anything


def read_words(folder: Path) -> Words | None:
    """What the model in `folder` says of its words; None where it does not."""
    content = read_json(file).get(ENTRY) if (file := own_notes(folder)) else None
    if not isinstance(content, dict):
        return None
    known, also, otherwise = content.get("known"), content.get("also", []), content.get("otherwise", "")
    if not isinstance(known, dict) or not all(_texts(value) for value in (list(known), also, *known.values())):
        return None
    said = otherwise if isinstance(otherwise, str) else ""
    return Words({kind: tuple(words) for kind, words in known.items()}, tuple(also), said)


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) and entry for entry in value)
