"""A batch on Ray: an actor for each GPU, with the model loaded once, on one machine or on a cluster."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from ..config.checks import check_real, check_whole
from ..pipeline import Pipeline
from ..text import TextEncoder, load_text_encoder
from .jobs import Job
from .making import MOST_LOST, Record, failed, make, sentence_of
from .settings import Settings
from .texts import KnownTexts

PACK = Path(__file__).resolve().parents[2]
MOST_WORKERS = 10_000
"""Also of what each takes: more is a mistake."""


def check_ray() -> None:
    """Raise ValueError where Ray is not installed."""
    if find_spec("ray") is None:
        raise ValueError('Ray is not installed: pip install "ray[data]", or leave --ray out')


@dataclass(frozen=True)
class RayMaker:
    """Makes jobs with Ray Data: each row is a job, and actors take them as they are free.

    An actor that dies is started again by Ray, and its job goes on from what it had on disk; see `making.make`.

    settings: of the batch; `device` is that of an actor.
    folder: which all machines share.
    address: of a cluster; None: one on this machine, for this batch alone. "auto": the one that runs here.
    workers: actors; None: one for each GPU that there is, or one. gpus, cpus: that each of them takes, which may be parts
        of one; of GPUs None: 1 where there are any.
    text_workers: actors that encode prompts on CPUs, so that no GPU holds the text encoder; 0: each actor has its own.

    Raises ValueError for numbers that are none, for more than this machine has, and for what no worker can begin with.
    """

    settings: Settings
    folder: str | Path
    address: str | None = None
    workers: int | None = None
    gpus: float | None = None
    cpus: float = 1.0
    text_workers: int = 0

    def __post_init__(self):
        object.__setattr__(self, "folder", Path(self.folder).resolve())
        if self.workers is not None:
            check_whole("the number of workers", self.workers, 1, MOST_WORKERS)
        check_whole("the number of text workers", self.text_workers, 0, MOST_WORKERS)
        for name, count in (("GPUs", self.gpus), ("CPUs", self.cpus)):
            if count is not None:
                check_real(f"the {name} of a worker", count, 0, MOST_WORKERS)

    def __call__(self, jobs: Sequence[Job]) -> Iterator[Record]:
        check_ray()
        import ray

        run = uuid4().hex
        wanted = (self.workers or 1) * self.cpus + self.text_workers
        try:
            ray.init(
                address=self.address,
                # A cluster has what it has; one of our own has at least what its actors ask for.
                num_cpus=None if self.address else max(os.cpu_count() or 1, math.ceil(wanted)),
                include_dashboard=None if self.address else False,
                log_to_driver=False,
                # Modules of this package are found by its name in every actor, also where it is no installed one.
                runtime_env={"env_vars": {"PYTHONPATH": str(PACK)}},
            )
        except ConnectionError as error:
            raise ConnectionError(
                f"no Ray cluster answers at the address {self.address}: begin one with `ray start --head`, or leave the "
                "address out to use this machine alone"
            ) from error
        try:
            there = ray.cluster_resources().get("GPU", 0)
            gpus = min(there, 1) if self.gpus is None else self.gpus
            workers = self.workers or max(int(there / gpus) if gpus else 1, 1)
            if self.address is None and workers * gpus > there:  # a cluster may grow, and this machine does not
                raise ValueError(
                    f"{workers} workers with {gpus:g} GPUs each are more than the {there:g} of this machine: they would wait for "
                    "ever; take fewer, or a part of a GPU for each"
                )
            settings = replace(self.settings, device="cuda") if gpus else self.settings
            rows = [{"job": json.dumps(asdict(job))} for job in jobs]
            data = ray.data.from_items(rows, override_num_blocks=len(rows))
            if self.text_workers:
                data = data.map_batches(
                    _Texts, fn_constructor_args=(self.settings, self.folder, os.getcwd(), run, self.text_workers),
                    batch_size=1, num_cpus=1,
                    compute=ray.data.ActorPoolStrategy(size=self.text_workers),
                )  # fmt: skip
            data = data.map_batches(
                _Videos, fn_constructor_args=(settings, self.folder, os.getcwd(), run), batch_size=1, num_cpus=self.cpus,
                num_gpus=gpus or None,
                compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
            )  # fmt: skip
            data.context.enable_progress_bars = False  # there is one over the whole batch
            data.context.execution_no_progress_timeout_s = -1  # a video may take hours
            # Nothing is fetched ahead: else each record would wait for the next one.
            for batch in data.iter_batches(batch_size=None, prefetch_batches=0):
                for record, stopped in zip(batch["record"], batch["stopped"]):
                    if stopped:
                        raise ValueError(f"a worker cannot begin: {stopped}")
                    yield Record(**json.loads(str(record)))
        finally:
            ray.shutdown()
            for begun in Path(self.folder).glob(f".{run}.*"):
                begun.unlink()


class _Videos:
    """An actor that makes videos, with the model loaded once."""

    def __init__(self, settings: Settings, folder: Path, place: str, run: str):
        _go_to(place)
        self.settings, self.folder, self.run = settings, folder, run
        self.pipeline: Pipeline | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        job, record, stopped = Job(**json.loads(batch["job"][0])), None, str(batch.get("stopped", [""])[0])
        texts = batch.get("texts", [b""])[0]
        if error := str(batch.get("error", [""])[0]):
            record = failed(job, self.settings, self.folder, error)
        elif not stopped:
            known = KnownTexts.unpacked(texts) if texts else None
            try:
                record = make(job, self.settings, self.folder, lambda: self._with(known), self.run)
            except Exception as error:
                stopped = sentence_of(error)
        return {"record": np.array([json.dumps(record and asdict(record))]), "stopped": np.array([stopped])}

    def _with(self, texts: KnownTexts | None) -> Pipeline:
        if self.pipeline is None:
            self.pipeline = self.settings.load(texts)
        return self.pipeline if texts is None else replace(self.pipeline, text_encoder=texts)


class _Texts:
    """An actor that encodes prompts, with the text encoder loaded once. count: of such actors."""

    def __init__(self, settings: Settings, folder: Path, place: str, run: str, count: int = 1):
        _go_to(place)
        self.settings, self.folder, self.run, self.count = settings, folder, run, count
        self.encoder: TextEncoder | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        job, texts, error, stopped = Job(**json.loads(batch["job"][0])), b"", "", ""
        try:
            preset = self.settings.preset_of_model()
            self.encoder = self.encoder or self._load()
        except Exception as wrong:
            stopped = sentence_of(wrong)
        else:
            negative = [job.negative_prompt] if self.settings.sampling(preset).guided else []
            try:
                texts = KnownTexts.of(self.encoder, job.texts, negative, preset.cut_marker).packed()
            except Exception as wrong:
                error = sentence_of(wrong)
        told = {"error": np.array([error]), "stopped": np.array([stopped])}
        return {**batch, "texts": np.array([texts], dtype=object), **told}

    def _load(self) -> TextEncoder:
        """Ray starts a worker that has died anew, for ever: files tell how many have begun to load and did not end.

        As many as there are others may still be at it.
        """
        place = self.settings.text_encoder or self.settings.model
        lost = len(list(self.folder.glob(f".{self.run}.*"))) - (self.count - 1)
        if lost >= MOST_LOST:
            raise ValueError(
                f"{lost} workers have died while they loaded the text encoder {place}; there may be too little memory"
            )
        begun = self.folder / f".{self.run}.{uuid4().hex}"
        begun.touch()
        encoder = load_text_encoder(place, dtype=self.settings.dtype)
        begun.unlink()
        return encoder


def _go_to(place: str) -> None:
    """Have names of files mean what they mean where the batch was begun, on machines that have that folder."""
    with suppress(OSError):
        os.chdir(place)
