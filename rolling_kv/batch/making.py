"""One job of a batch: made, or found to be made already, or gone on with where an earlier run has ended."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..atomic import claiming, replacing
from ..bundled import default_size
from ..fitting import Fitting, read_colour
from ..growing import growing_place
from ..pipeline import Pipeline, clip_of, plan_prompts, seconds_anew, start_of
from ..sampling.state_file import SUFFIX, load_state, read_state, save_state
from ..streaming import journal_place
from ..video import read_video_info
from .jobs import Job
from .settings import Settings

RECORD_SUFFIX = ".json"
DONE, FAILED, BEGUN, REFUSED = "done", "failed", "begun", "refused"
MOST_LOST = 3
"""Workers that a job may take with it, by more memory than there is for example, before it counts as failed."""


@dataclass(frozen=True)
class Record:
    """What became of a job; `NAME.json` beside its video, and a line of the index.

    name: of the job. status: "done", "failed", "begun" or, for a line that is no job, "refused".
    digest: of all that decides how the video looks.
    file: name of the video in the folder. frames, seconds, bytes: of the video. made_in: seconds that the last run took.
    continued_at: seconds of it that an earlier run had made already. found: whether an earlier run had made all of it.
    error: why it failed, as a sentence. job: what was asked for. line: of a refused line.
    lost: workers of a run that have died while they made it. run: which one.
    """

    name: str
    status: str
    digest: str = ""
    file: str = ""
    frames: int = 0
    seconds: float = 0.0
    bytes: int = 0
    made_in: float = 0.0
    continued_at: float = 0.0
    found: bool = False
    error: str = ""
    job: dict[str, Any] | None = None
    line: int = 0
    lost: int = 0
    run: str = ""

    def said(self) -> dict[str, Any]:
        """Without what is not there."""
        return {name: value for name, value in asdict(self).items() if value not in ("", 0, None, False)}


def digest_of(job: Job, settings: Settings) -> str:
    """Of all that decides how a video looks, its name aside."""
    said = {**asdict(replace(job, name="x")), "settings": settings.deciding()}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def read_record(folder: Path, name: str) -> Record | None:
    """What stands beside a video; None where nothing does, or nothing that can be read."""
    try:
        said = json.loads((folder / f"{name}{RECORD_SUFFIX}").read_text(encoding="utf-8"))
        return Record(**said)
    except (OSError, ValueError, TypeError):
        return None


def write_record(folder: Path, record: Record) -> Record:
    with replacing(folder / f"{record.name}{RECORD_SUFFIX}", what="record") as part:
        part.write_text(json.dumps(record.said(), indent=1), encoding="utf-8")
    return record


def found_record(job: Job, settings: Settings, folder: Path) -> Record | None:
    """The record of a job whose video an earlier run has made; None where it is to be made.

    Raises FileExistsError where the name is taken by another job, or by a video of which nothing is known.
    """
    record, video, state = read_record(folder, job.name), folder / f"{job.name}.mp4", _state_out(job, folder)
    if record is None:
        for file in filter(None, (video, journal_place(video), _failed_state(video), state)):
            if file.exists():
                raise FileExistsError(
                    f"{file} is there, and no {job.name}{RECORD_SUFFIX} beside it says which job has made it: choose "
                    "another name or folder, or move it"
                )
        return None
    if record.digest != digest_of(job, settings):
        raise FileExistsError(
            f"{job.name} is the name of another job in {folder}, with other settings: choose another name or folder, or "
            f"delete {job.name}{RECORD_SUFFIX} and what it tells of"
        )
    whole = record.status == DONE and video.is_file() and video.stat().st_size == record.bytes
    whole = whole and (state is None or state.is_file())
    return replace(record, found=True) if whole else None


def make(job: Job, settings: Settings, folder: Path, load: Callable[[], Pipeline], run: str = "") -> Record:
    """Make the video of a job, or go on with it, in constant memory; what fails is in the record, not raised.

    A run of it that was killed has left a journal, one that failed a state: the video goes on from there, and becomes
    the one that it would have been, except that the sampler "rolling" begins anew wherever a run begins.

    load: gives the model; what it raises is raised, as it is no fault of the job.
    run: of a batch whose workers are started again when they die: a job that they die of has to end some time.
    """
    try:
        with claiming(folder / f"{job.name}{RECORD_SUFFIX}", what="video"):
            return found_record(job, settings, folder) or _make(job, settings, folder, load, run)
    except OSError as error:  # what is there is another's: it keeps its record
        return _failure(job, settings, str(error))


def _make(job: Job, settings: Settings, folder: Path, load: Callable[[], Pipeline], run: str) -> Record:
    begin, earlier, lost = time.monotonic(), read_record(folder, job.name), 0
    if run and earlier is not None and (earlier.status, earlier.run) == (BEGUN, run):
        lost = earlier.lost + 1
    if lost >= MOST_LOST:
        return failed(
            job, settings, folder, f"{lost} workers have died while they made it; there may be too little memory"
        )
    record = Record(job.name, BEGUN, digest_of(job, settings), job=job.said(), lost=lost, run=run)
    write_record(folder, record)
    pipeline = load()
    try:
        video, done = _made(job, settings, folder, pipeline)
        info = read_video_info(video)
        record = replace(
            record, status=DONE, file=video.name, frames=info.frames, bytes=video.stat().st_size,
            seconds=round(info.frames / info.fps, 4), made_in=round(time.monotonic() - begin, 2), continued_at=done,
        )  # fmt: skip
    except Exception as error:
        return failed(job, settings, folder, sentence_of(error))
    return write_record(folder, record)


def sentence_of(error: Exception) -> str:
    """What is told of an error: what the pack raises itself is a sentence, of others the kind says more."""
    return str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"


def failed(job: Job, settings: Settings, folder: Path, error: str) -> Record:
    """Note, beside where its video would be, why there is none."""
    return write_record(folder, _failure(job, settings, error))


def _failure(job: Job, settings: Settings, error: str) -> Record:
    return Record(job.name, FAILED, digest_of(job, settings), error=" ".join(error.split()), job=job.said())


def _made(job: Job, settings: Settings, folder: Path, pipeline: Pipeline) -> tuple[Path, float]:
    """The video of a job, and how many seconds of it were there already."""
    model, video = pipeline.model, folder / f"{job.name}.mp4"
    sampling, cache = settings.sampling(model.preset), settings.cache(model.preset)
    usual = default_size(Path(settings.model), model.geometry)
    height, width = job.height or settings.height or usual[0], job.width or settings.width or usual[1]
    if job.state_in is not None:
        height, width = read_state(job.state_in).size
    clip = clip_of(
        job.image,
        job.video,
        Fitting(height, width, job.fit, read_colour(job.background)),
        model.geometry,
        job.last_seconds,
    )
    first = 0 if job.state_in is None else read_state(job.state_in).frames
    start = start_of(clip if job.strength is None else None, first, sampling, model.geometry)
    seconds = job.seconds
    if job.strength is not None:
        seconds = seconds_anew(clip, seconds, start, sampling, model.geometry)
    state_out = _state_out(job, folder)
    plan = plan_prompts(job.prompt, job.schedule, sampling, model.geometry, seconds, start)
    whole = start + sampling.frames_of(plan.chunks, start)
    begun, done = _begun(video, state_out, start, whole, pipeline, (height, width)), 0.0
    given: dict[str, Any] = {
        "image": job.image,
        "video": job.video,
        "last_seconds": job.last_seconds,
        "state_in": job.state_in,
    }
    if begun is not None:
        frames = read_state(begun).frames
        done = model.geometry.seconds(frames)
        seconds = model.geometry.seconds(whole) - done
        given = {"state_in": begun} | (
            {} if job.strength is None else {"video": job.video, "last_seconds": job.last_seconds}
        )
    made = pipeline.generate(
        job.prompt, video, height=height, width=width, seconds=seconds, schedule=job.schedule, seed=job.seed,
        negative_prompt=job.negative_prompt, strength=job.strength, fit=job.fit, background=job.background,
        sampling=sampling, cache=cache, scale=settings.scale, encoder=settings.encoder,
        execution=settings.execution,
        state_out=state_out, **given,
    )  # fmt: skip
    with suppress(OSError):
        _failed_state(video).unlink()
    return made, done


def _begun(
    video: Path, state_out: Path | None, start: int, whole: int, pipeline: Pipeline, size: tuple[int, int]
) -> Path | None:
    """The file of the state from which to go on with a video; None where nothing is there.

    state_out: where a run that failed has left it, if not beside the video. start: latent frames that are given. whole:
    latent frames that the video will have. Where all of them are made already, and only the file was not finished, the last
    chunk is made once more; where that is the only one, or not even all are there that are given, all is done anew.
    """
    for file in filter(None, (journal_place(video), state_out, _failed_state(video))):
        if not file.exists():
            continue
        state = read_state(file)
        if start <= state.frames < whole:
            return file
        again = state.frames >= whole and len(state.chunks) > 1
        if again:
            save_state(load_state(file, pipeline.model, size).first(frames=whole - 1), _failed_state(video))
        for left in (journal_place(video), growing_place(video)):
            with suppress(FileNotFoundError):
                left.unlink()
        return _failed_state(video) if again else None
    return None


def _failed_state(video: Path) -> Path:
    """Where a run that failed or was cancelled has left its state."""
    return video.with_suffix(f".state{SUFFIX}")


def _state_out(job: Job, folder: Path) -> Path | None:
    """Where the state of a job is kept that asks for it."""
    return folder / f"{job.name}{SUFFIX}" if job.save_state else None
