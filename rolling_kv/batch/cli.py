"""`python -m rolling_kv batch`: the videos of a file of jobs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from .. import options
from ..bundled import check_model
from ..config import CacheConfig
from ..messages import printable, shortened
from .jobs import read_jobs, shard_of
from .making import DONE, Record
from .on_ray import RayMaker, check_ray
from .running import INDEX, generate
from .settings import Settings


def add_command(commands) -> None:
    """Add `batch` to the commands of a parser."""
    batch = commands.add_parser("batch", help="make many videos, from a file with a job on each line")
    batch.set_defaults(run=_batch)
    batch.add_argument(
        "jobs", type=Path, metavar="FILE",
        help='JSON Lines: {"prompt": "…", "seed": 1, "seconds": 5, "name": "…"}; also schedule, negative_prompt, width, '
        "height, image, video, strength, last_seconds, fit, background, state_in, save_state",
    )  # fmt: skip
    batch.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder for the videos; what is whole there is not made again",
    )
    batch.add_argument(
        "--shard",
        metavar="I/N",
        help="make every N-th job from number I on (0 to N-1): for arrays of machines that share the folder",
    )
    batch.add_argument("--ray", action="store_true", help="share the jobs out among actors of Ray, one for each GPU")
    batch.add_argument(
        "--address", help="of a Ray cluster, or auto for the one on this machine (default: one for this batch alone)"
    )
    batch.add_argument(
        "--workers", type=int, help="actors that make videos (default: one for each GPU of the cluster, or one)"
    )
    batch.add_argument(
        "--gpus", type=float, help="that each takes, also a part of one; 0 is on CPUs (default: 1 where there are any)"
    )
    batch.add_argument("--cpus", type=float, help="that each takes (default: 1)")
    batch.add_argument(
        "--text-workers",
        type=int,
        default=0,
        metavar="N",
        help="actors that encode prompts on CPUs, so that no GPU holds the text encoder (default: 0)",
    )
    options.add_model(batch)
    options.add_offload(batch)
    for side in ("height", "width"):
        batch.add_argument(
            f"--{side}", type=int, help="pixels, where a job has none of its own (default: the model's usual size)"
        )
    options.add_cache(batch, "the preset's")
    batch.add_argument("--guidance", type=float, help="classifier-free guidance, 1 is off (default: the preset's)")
    options.add_execution(batch)
    options.add_device(batch, "where to compute")
    batch.add_argument("--scale", type=int, default=1, help="enlarge each pixel so many times, for tiny videos")
    options.add_encoder(batch)


def settings_of(args: argparse.Namespace) -> Settings:
    """What the command says of the model and how it is run."""
    check_model(args.model)
    kept = {"storage": args.cache_storage, "offload": args.offload_cache}
    rules = options.rules_of(args) | {
        name: value for name, value in kept.items() if value != getattr(CacheConfig, name)
    }
    return Settings(
        model=str(args.model),
        text_encoder=args.text_encoder and str(args.text_encoder),
        vae=args.vae and str(args.vae),
        preset=args.preset,
        dtype=args.dtype,
        storage=args.weight_storage,
        loras=tuple((str(path), strength) for path, strength in options.loras_of(args)),
        offload=args.offload_weights,
        device=str(args.device),
        rules=rules,
        guidance=args.guidance,
        execution=options.execution_of(args),
        width=args.width,
        height=args.height,
        scale=args.scale,
        encoder=args.encoder,
    )


def _batch(args: argparse.Namespace) -> None:
    jobs, refused = read_jobs(args.jobs)
    shard = None if args.shard is None else _shard(args.shard)
    count = len(jobs if shard is None else shard_of(jobs, shard))
    settings, maker = settings_of(args), None
    if args.ray:
        check_ray()
        cpus = 1.0 if args.cpus is None else args.cpus
        maker = RayMaker(settings, args.out, args.address, args.workers, args.gpus, cpus, args.text_workers)
    elif any(given is not None for given in (args.address, args.workers, args.gpus, args.cpus)) or args.text_workers:
        raise ValueError(
            "--address, --workers, --gpus, --cpus and --text-workers are Ray's: add --ray, or leave them out"
        )
    failed, made = 0, 0.0
    with tqdm(total=count, unit="video", desc="batch") as bar:

        def show(record: Record) -> None:
            nonlocal failed, made
            if record.status != DONE:
                failed += 1
                where = f"line {record.line}" if record.line else record.name
                bar.write(f"{where}: {shortened(printable(record.error), 300)}", file=sys.stderr)
            if not record.found:
                made += record.seconds - record.continued_at
            if not record.line:
                bar.update()
                bar.set_postfix_str(f"{made / max(bar.format_dict['elapsed'], 1e-9):.2f} s of video per s")

        try:
            records = generate(jobs, args.out, settings, shard=shard, maker=maker, refused=refused, on_record=show)
        except KeyboardInterrupt:
            bar.close()
            sys.exit(
                f"cancelled: {bar.n} of {count} videos are there; the same command makes the others, and goes on where it was"
            )
    done = [record for record in records if record.status == DONE]
    found = sum(record.found for record in done)
    print(f"{len(done) - found} made, {found} there already, {failed} failed: {args.out / INDEX} tells of each")
    if failed:
        raise SystemExit(1)


def _shard(text: str) -> tuple[int, int]:
    try:
        number, count = map(int, text.split("/"))
    except ValueError:
        raise ValueError(f"--shard takes i/n, such as 0/4, got {printable(text)}") from None
    return number, count
