"""Many videos: jobs of a file, made here, by a shard of many machines, or by Ray on many GPUs."""

from .jobs import Job, read_jobs
from .making import Record
from .on_ray import RayMaker
from .running import generate
from .settings import Settings

__all__ = ["Job", "RayMaker", "Record", "Settings", "generate", "read_jobs"]
