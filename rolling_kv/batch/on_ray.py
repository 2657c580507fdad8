"""A batch on Ray: an actor for each GPU, with the model loaded once, on one machine or on a cluster."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..pipeline import Pipeline
from ..text import load_text_encoder
from .jobs import Job
from .making import Record, failed, make
from .settings import Settings
from .texts import KnownTexts

PACK = Path(__file__).resolve().parents[2]


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
    """

    settings: Settings
    folder: Path
    address: str | None = None
    workers: int | None = None
    gpus: float | None = None
    cpus: float = 1.0
    text_workers: int = 0

    def __call__(self, jobs: Sequence[Job]) -> Iterator[Record]:
        check_ray()
        import ray

        wanted = (self.workers or 1) * self.cpus + self.text_workers
        ray.init(
            address=self.address,
            # A cluster has what it has; one of our own has at least what its actors ask for.
            num_cpus=None if self.address else max(os.cpu_count() or 1, math.ceil(wanted)),
            include_dashboard=None if self.address else False,
            log_to_driver=False,
            # Modules of this package are found by its name in every actor, also where it is no installed one.
            runtime_env={"env_vars": {"PYTHONPATH": str(PACK)}},
        )
        try:
            there = ray.cluster_resources().get("GPU", 0)
            gpus = min(there, 1) if self.gpus is None else self.gpus
            workers = self.workers or max(int(there / gpus) if gpus else 1, 1)
            settings = replace(self.settings, device="cuda") if gpus else self.settings
            rows = [{"job": json.dumps(asdict(job))} for job in jobs]
            data = ray.data.from_items(rows, override_num_blocks=len(rows))
            if self.text_workers:
                data = data.map_batches(
                    _Texts, fn_constructor_args=(self.settings,), batch_size=1, num_cpus=1,
                    compute=ray.data.ActorPoolStrategy(size=self.text_workers),
                )  # fmt: skip
            data = data.map_batches(
                _Videos, fn_constructor_args=(settings, self.folder), batch_size=1, num_cpus=self.cpus,
                num_gpus=gpus or None,
                compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
            )  # fmt: skip
            for row in data.iter_rows():
                yield Record(**json.loads(row["record"]))
        finally:
            ray.shutdown()


class _Videos:
    """An actor that makes videos, with the model loaded once."""

    def __init__(self, settings: Settings, folder: Path):
        self.settings, self.folder = settings, folder
        self.pipeline: Pipeline | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        job = Job(**json.loads(batch["job"][0]))
        texts = batch.get("texts", [b""])[0]
        if error := batch.get("error", [""])[0]:
            record = failed(job, self.settings, self.folder, str(error))
        else:
            self.pipeline = self._with(KnownTexts.unpacked(texts) if texts else None)
            record = make(job, self.settings, self.folder, self.pipeline)
        return {"record": np.array([json.dumps(asdict(record))])}

    def _with(self, texts: KnownTexts | None) -> Pipeline:
        if self.pipeline is None:
            return self.settings.load(texts)
        return self.pipeline if texts is None else replace(self.pipeline, text_encoder=texts)


class _Texts:
    """An actor that encodes prompts, with the text encoder loaded once."""

    def __init__(self, settings: Settings):
        preset = settings.preset_of_model()
        self.guided, self.marker = settings.sampling(preset).guided, preset.cut_marker
        self.encoder = load_text_encoder(settings.text_encoder or settings.model, dtype=settings.dtype)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        job, texts, error = Job(**json.loads(batch["job"][0])), b"", ""
        try:
            negative = [job.negative_prompt] if self.guided else []
            texts = KnownTexts.of(self.encoder, job.texts, negative, self.marker).packed()
        except ValueError as wrong:
            error = str(wrong)
        return {**batch, "texts": np.array([texts], dtype=object), "error": np.array([error])}
