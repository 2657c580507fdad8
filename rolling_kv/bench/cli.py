"""`python -m rolling_kv bench` and its subcommands: one folder beside this file for each."""

from __future__ import annotations

from . import options
from .cases import cli as cases
from .chunks import cli as chunks
from .decode import cli as decode
from .kernels import cli as kernels
from .passes import cli as passes
from .pipeline import cli as pipeline
from .preview import cli as preview
from .ranks import cli as ranks
from .report import cli as report
from .speeds import cli as speeds
from .states import cli as states
from .step_caches import cli as step_caches
from .storage import cli as storage
from .streams import cli as streams


def add_command(commands) -> None:
    """Add `bench` to the subcommands of an argument parser."""
    parser = commands.add_parser(
        "bench",
        help="measure the time and memory of the rolling cache, and of other ways to the same chunks",
        epilog="In a checkout of the source repository (d), ComfyUI's own sampler, takes part too where there is a ComfyUI: "
        "in $COMFYUI_PATH, above custom_nodes, or in ~/ComfyUI.",
    )
    parser.set_defaults(run=chunks.main)
    chunks.add_arguments(parser)
    more = parser.add_subparsers(
        metavar="[MEASUREMENT]",
        required=False,
        action=options.Subcommands,
    )
    everything = more.add_parser("report", help="measure all that is to be known of a GPU, in some minutes")
    everything.set_defaults(run=report.main)
    report.add_arguments(everything)
    rates = more.add_parser("kernels", help="measure attention by each of PyTorch's kernels, and the matrix products")
    rates.set_defaults(run=kernels.main)
    kernels.add_arguments(rates)
    single = more.add_parser("passes", help="take one pass apart: time by kind of kernel, bytes announced and real")
    single.set_defaults(run=passes.main)
    passes.add_arguments(single)
    pictures = more.add_parser("decode", help="measure the VAE: time of a latent frame, bytes announced and real")
    pictures.set_defaults(run=decode.main)
    decode.add_arguments(pictures)
    whole = more.add_parser("pipeline", help="measure the way from a prompt to a file, and the share of each part")
    whole.set_defaults(run=pipeline.main)
    pipeline.add_arguments(whole)
    recorded = more.add_parser("cases", help="make the recorded cases on this device, and compare")
    recorded.set_defaults(run=cases.main)
    cases.add_arguments(recorded)
    costs = more.add_parser("speeds", help="measure what exact, standard and fast passes cost in error")
    costs.set_defaults(run=speeds.main)
    speeds.add_arguments(costs)
    steps = more.add_parser("caching", help="measure every step cache at several strengths, in time and quality")
    steps.set_defaults(run=step_caches.main)
    step_caches.add_arguments(steps)
    stores = more.add_parser("storage", help="measure every way to keep the cache and the weights: bytes, time, error")
    stores.set_defaults(run=storage.main)
    storage.add_arguments(stores)
    kept = more.add_parser("states", help="measure what chains, forks and states on disk cost beside one run")
    kept.set_defaults(run=states.main)
    states.add_arguments(kept)
    shown = more.add_parser("preview", help="measure what the pictures of the live preview cost beside the sampling")
    shown.set_defaults(run=preview.main)
    preview.add_arguments(shown)
    several = more.add_parser("ranks", help="measure one video on several processes: time, bytes sent, cache of each")
    several.set_defaults(run=ranks.main)
    ranks.add_arguments(several)
    side = more.add_parser("streams", help="measure several videos whose passes run as one batch")
    side.set_defaults(run=streams.main)
    streams.add_arguments(side)
