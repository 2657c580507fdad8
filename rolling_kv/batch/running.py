"""A whole batch: in this process, or by Ray on the GPUs of this machine or of a cluster."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ..atomic import check_place, replacing
from .jobs import Job, Refused, checked_jobs, shard_of
from .making import FAILED, RECORD_SUFFIX, REFUSED, Record, digest_of, found_record, make, read_record
from .settings import Settings

INDEX = "index.jsonl"

Maker = Callable[[Sequence[Job]], Iterator[Record]]
"""Makes jobs and yields the record of each as it is done, in any order."""


def generate(
    jobs: Iterable[Job | dict],
    folder: str | Path,
    settings: Settings | None = None,
    *,
    shard: tuple[int, int] | None = None,
    maker: Maker | None = None,
    refused: Sequence[Refused] = (),
    on_record: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Make many videos into a folder; returns a record for each job, in their order, and then the refused ones.

    Run it again as often as you like: what is there is not made again, what was begun goes on, and what failed is tried
    anew. A job that fails stops nobody. `index.jsonl` in the folder has a line for each record in it.

    jobs: `Job`s, or objects with their fields.
    settings: the model and how it is run; by default the bundled one.
    shard: (i, n): only every n-th job from number i on, on machine i of n that share the folder.
    maker: who makes them; by default this process, one after the other. `on_ray.RayMaker` is for many GPUs.
    refused: lines of a file that are none, from `read_jobs`, to be told in the index too.
    on_record: called with each record as soon as it is there.

    Raises ValueError for settings that do not go together, and OSError for a folder that is none, before anything is loaded.
    """
    folder, settings = Path(folder), settings or Settings()
    good, bad = checked_jobs(enumerate(jobs, 1))
    chosen = good if shard is None else shard_of(good, shard)
    settings.check()
    check_place(folder, folder=True).mkdir(parents=True, exist_ok=True)
    check_place(folder / INDEX)
    records: dict[str, Record] = {}

    def note(record: Record) -> None:
        records[record.name] = record
        on_record(record)

    told = [Record(line.name, REFUSED, line=line.line, error=line.error) for line in (*refused, *bad)]
    for record in told:
        on_record(record)
    for job in chosen:
        if (known := _known(job, settings, folder)) is not None:
            note(known)
    missing = [job for job in chosen if job.name not in records]
    try:
        for record in (maker or LocalMaker(settings, folder))(missing) if missing else ():
            note(record)
    finally:
        write_index(folder, good, settings, told)
    return [*(records[job.name] for job in chosen), *told]


class LocalMaker:
    """Makes jobs in this process, one after the other, with a model that is loaded once."""

    def __init__(self, settings: Settings, folder: Path):
        self.settings, self.folder = settings, folder

    def __call__(self, jobs: Sequence[Job]) -> Iterator[Record]:
        pipeline = self.settings.load()
        for job in jobs:
            yield make(job, self.settings, self.folder, lambda: pipeline)


def _known(job: Job, settings: Settings, folder: Path) -> Record | None:
    """What can be said of a job without the model: it is made already, or its name is taken."""
    try:
        return found_record(job, settings, folder)
    except OSError as error:
        return Record(job.name, FAILED, digest_of(job, settings), error=str(error), job=job.said())


def write_index(folder: Path, jobs: Sequence[Job], settings: Settings, refused: Sequence[Record]) -> None:
    """Tell in one file what became of all jobs, of other shards and earlier runs too, as far as it is known by now."""
    with replacing(folder / INDEX, what="index") as part, part.open("w", encoding="utf-8") as file:
        for job in jobs:
            record = read_record(folder, job.name)
            if record is None or record.digest != digest_of(job, settings):
                record = _known(job, settings, folder)
            if record is not None:
                file.write(json.dumps(record.said()) + "\n")
        names = {job.name for job in jobs}
        others = (
            read_record(folder, path.stem)
            for path in sorted(folder.glob(f"*{RECORD_SUFFIX}"))
            if path.stem not in names
        )
        for record in (*filter(None, others), *refused):
            file.write(json.dumps(record.said()) + "\n")
