"""Jobs of a batch: what each video is to be, as a frozen value, and the file in which they stand, a line for each."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from ..config import check_choice, check_real, check_whole
from ..fitting import FITS, read_colour
from ..geometry import LONGEST_SECONDS
from ..messages import shortened, shown
from ..schedules.reading import read_schedule
from ..schedules.schedule import PromptSchedule

LONGEST_NAME, LONGEST_BYTES = 120, 200
"""Characters of a name, and bytes of it in UTF-8: what stands behind it while its video grows has to fit into a file name too."""
LARGEST_SIDE = 2**15
"""Pixels; more than any video has."""
_UNDER_WAY = re.compile(r".*\.(?:growing|state)", re.IGNORECASE)
"""What a video of another name is called while it grows, or the state that a failed run has left of it."""
_NAME = re.compile(r"[\w()+=@,-](?:[\w .()+=@,-]*[\w()+=@,-])?")
_DEVICES = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.IGNORECASE)
"""What Windows takes for a device."""
_KINDS = {
    "str": ((str,), "a text"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
}


def check_size(width: object, height: object) -> None:
    """Raise ValueError for what is no number of pixels; None is left to others."""
    for side, pixels in (("width", width), ("height", height)):
        if pixels is not None:
            check_whole(side, pixels, 1, LARGEST_SIDE)


@dataclass(frozen=True)
class Job:
    """One video of a batch. What is left out, and null in a file, is as in `Pipeline.generate`.

    name: of its files, without an ending; by default made of the prompt and of all that is asked for.
    prompt, schedule: what it shows: a prompt, or text that `read_schedule` reads, or a prompt before the schedule's first.
    negative_prompt: what to avoid; only read with guidance.
    seed: of the noise.
    seconds: how long it is, rounded up to whole chunks; with a state how much more.
    width, height: pixels; by default the batch's.
    image, video, strength, last_seconds, fit, background: what it starts with, or is made from.
    state_in: file of a state that it continues.
    save_state: whether its own state is kept beside it, as NAME.safetensors.

    Raises ValueError for what no video can be.
    """

    name: str = ""
    prompt: str | None = None
    schedule: str | None = None
    negative_prompt: str = ""
    seed: int = 0
    seconds: float | None = None
    width: int | None = None
    height: int | None = None
    image: str | None = None
    video: str | None = None
    strength: float | None = None
    last_seconds: float | None = None
    fit: str = "crop"
    background: str = "#000000"
    state_in: str | None = None
    save_state: bool = False

    def __post_init__(self):
        for field in fields(self):
            value, kind = getattr(self, field.name), str(field.type)
            if value is None and kind.endswith("| None"):
                continue
            types, what = _KINDS[kind.removesuffix(" | None")]
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                raise ValueError(f"{field.name} must be {what}, got {shown(value)}")
        if self.prompt is None and self.schedule is None:
            raise ValueError("there is neither a prompt nor a schedule: give one of them")
        self.texts  # noqa: B018  raises for a schedule that is none
        check_whole("seed", self.seed, 0, 2**64 - 1)
        if self.seconds is not None:
            check_real("seconds", self.seconds, 0, LONGEST_SECONDS)
            if not self.seconds:
                raise ValueError("seconds is 0, and a video of a batch has to end: give more, or leave it out")
        check_size(self.width, self.height)
        check_choice("fit", self.fit, FITS)
        read_colour(self.background)
        if self.image is not None and self.video is not None:
            raise ValueError("a video starts with a picture or with another video: give image or video")
        if self.state_in is not None and (self.image is not None or self.video is not None and self.strength is None):
            raise ValueError("a video that is continued has its beginning already: leave image and video out")
        object.__setattr__(self, "name", checked_name(self.name) if self.name else self._own_name())

    @classmethod
    def read(cls, given: object) -> Job:
        """A job from what a line holds. Raises ValueError for what is no job."""
        if not isinstance(given, dict):
            raise ValueError(f"a job is an object with a prompt or a schedule, got {shown(given)}")
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"there is no {shown(unknown[0])} in a job; there are {', '.join(known)}")
        return cls(**{name: value for name, value in given.items() if value is not None})

    @property
    def texts(self) -> tuple[str, ...]:
        """Its distinct prompts. Raises ValueError for a schedule that is none."""
        if self.schedule is None:
            return PromptSchedule.of(self.prompt or "").texts
        schedule = read_schedule(self.schedule)
        return (schedule if self.prompt is None else schedule.led_by(self.prompt)).texts

    def said(self) -> dict[str, Any]:
        """What differs from the defaults, as a line of a file has it."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) != field.default}

    def _own_name(self) -> str:
        words = re.findall(r"\w+", self.texts[0])
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return "-".join([_plain(words), digest[:10]]).lstrip("-")


def _plain(words: list[str]) -> str:
    """Words for a name, in letters that every file system has."""
    return "-".join(words).lower().encode("ascii", "ignore").decode()[:40].strip("-_")


def checked_name(name: str) -> str:
    """A name that a file can have everywhere. Raises ValueError for others."""
    if len(name) > LONGEST_NAME or not _NAME.fullmatch(name) or _DEVICES.fullmatch(name):
        raise ValueError(
            f"the name {shown(shortened(name, 60))} is none for a file: take up to {LONGEST_NAME} letters, digits, spaces and "
            "any of .()+=@,-_, without a folder and without a dot or a space at its ends"
        )
    if len(name.encode()) > LONGEST_BYTES:
        raise ValueError(
            f"the name {shown(shortened(name, 60))} is too long for a file: its letters take {len(name.encode())} bytes, and "
            f"{LONGEST_BYTES} are the most"
        )
    if _UNDER_WAY.fullmatch(name):
        raise ValueError(
            f"the name {shown(shortened(name, 60))} ends as files do that belong to a video under way: take one that does not "
            "end in .growing or .state"
        )
    return name


class Refused(NamedTuple):
    """A line that is no job. line: from 1 on. name: as far as it has one. error: why, as a sentence."""

    line: int
    name: str
    error: str


def read_jobs(path: str | Path) -> tuple[list[Job], list[Refused]]:
    """The jobs in a JSON Lines file, in their order, and the lines that are none. Empty lines are left out.

    Of jobs that share a name the first one counts. Raises ValueError where it holds no job at all, and OSError for a
    file that cannot be read.
    """
    try:
        lines = (
            Path(path).read_text(encoding="utf-8-sig").split("\n")
        )  # a text may hold what `splitlines` takes for more
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text in UTF-8") from None
    jobs, refused = checked_jobs((number, _parsed(line)) for number, line in enumerate(lines, 1) if line.strip())
    if not jobs and not refused:
        raise ValueError(f'{path} holds no job: put one on each line, such as {{"prompt": "a red circle", "seed": 1}}')
    return jobs, refused


def checked_jobs(given: Iterable[tuple[int, object]]) -> tuple[list[Job], list[Refused]]:
    """Of numbered jobs, which may be objects or `Job`s, those that can be made, and the others."""
    jobs: list[Job] = []
    refused, lines = [], {}
    for number, value in given:
        try:
            if isinstance(value, ValueError):
                raise value
            job = value if isinstance(value, Job) else Job.read(value)
            if (first := lines.setdefault(job.name.lower(), number)) != number:
                raise ValueError(f"the name {job.name} is that of line {first} already")
        except ValueError as error:
            name = value.get("name", "") if isinstance(value, dict) else getattr(value, "name", "")
            refused.append(Refused(number, shortened(str(name), LONGEST_NAME), str(error)))
        else:
            jobs.append(job)
    return jobs, refused


def shard_of(jobs: list[Job], shard: tuple[int, int]) -> list[Job]:
    """Every n-th job, from number i on: the part of machine i of n. Raises ValueError unless 0 <= i < n."""
    number, count = shard
    if not 0 <= number < count:
        raise ValueError(f"a shard i/n has i from 0 to n - 1, got {number}/{count}")
    return jobs[number::count]


def _parsed(line: str) -> object:
    try:
        return json.loads(line, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        return ValueError(f"the line is no JSON: {error}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a line. Raises ValueError for a name that stands in it twice, of which one would be lost."""
    read = dict(pairs)
    if len(read) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it says {shown(next(name for name in names if names.count(name) > 1))} twice")
    return read
