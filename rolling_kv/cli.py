"""`python -m rolling_kv`: make a video, look into a checkpoint, write the tiny model, measure."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from threading import Thread

from diffusers.utils import logging
from tqdm import tqdm

from . import options
from .batch.cli import add_command as add_batch
from .bench.cli import add_command as add_bench
from .bench.figures import BenchError, markdown
from .beside_bars import told_beside_bars
from .bundled import BUNDLED_SIZE, check_model, default_size
from .devices import is_out_of_memory
from .fitting import FITS, Fitting, read_colour
from .footage import Footage
from .geometry import GEOMETRIES, WAN_21, WAN_22
from .inspection import CheckpointInfo, inspect_checkpoint
from .listening import listen
from .messages import printable
from .pipeline import LAST_PROMPT_SECONDS, Interrupted, Pipeline, clip_of, plan_prompts, seconds_anew, start_of
from .planning import CHOICE_HEAD, OVERHEAD, TEXT_ENCODER, Choice, choices, kept_in_ways, outline, told_choice
from .presets import PRESETS
from .sampling.state_file import check_state_path, is_state_file, read_state
from .sampling.steering import Steering
from .sampling.summary import summarize
from .schedules.reading import load_schedule, read_schedule
from .schedules.schedule import PromptSchedule
from .streaming import check_ended
from .tiny import make_tiny
from .video import VideoWriter, read_video_info
from .wan.shards import HeadShards, shared_by_torchrun

LONGEST_MESSAGE = 1000
"""Characters of an error that are shown; a file can put any number into one."""
MOST_GIBIBYTES = 1e6
"""Of a card that people may name."""
_OTHER_NAMES = {
    "--size": ("--width", "--height"),
    "--resolution": ("--width", "--height"),
    "--length": ("--seconds",),
    "--duration": ("--seconds",),
    "--frames": ("--seconds",),
    "--num-frames": ("--seconds",),
    "--cfg": ("--guidance",),
    "--cfg-scale": ("--guidance",),
}
"""Options that other programs have, and what they are here."""
FIRST_SAYS = 10.0
"""Seconds that the first of several processes has for saying what is wrong before others say it."""


def main(arguments: list[str] | None = None) -> None:
    """Run a command. Ends the process with one line for whatever goes wrong, unless `--debug` is among the arguments."""
    args = _parser().parse_args(arguments)
    logging.set_verbosity_error()
    try:
        with told_beside_bars():
            args.run(args)
    except Exception as error:
        if getattr(args, "debug", False):
            raise
        sys.exit(f"error: {_sentence(error)}")
    except Interrupted as stopped:
        sys.exit(_what_stays(args, stopped))
    except KeyboardInterrupt:
        sys.exit("cancelled; nothing was written")


def _sentence(error: Exception) -> str:
    """An error as one line. What the pack raises itself is a sentence already; of others the kind says more."""
    if isinstance(error, BenchError):
        return str(error)  # quotes the last lines of another program
    text = " ".join(str(error).split())
    if is_out_of_memory(error):
        text = "there was not enough memory: make the window or the video smaller, or close other programs"
    elif not isinstance(error, (ValueError, OSError)):
        first = (str(error).strip().splitlines() or ["no message"])[0]
        text = f"{type(error).__name__}: {first} (--debug shows where)"
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]} …"


def _what_stays(args: argparse.Namespace, stopped: Interrupted) -> str:
    """Where the finished part of an interrupted run is, and how to go on from there."""
    given = "" if args.image is None else ", without --image"
    if args.video is not None and args.strength is None:
        given = ", without --video" + ("" if args.last_seconds is None else " and --last-seconds")
    state, left = printable(str(stopped.state)), round(stopped.left, 4)
    kept = f"cancelled: the {stopped.seconds:g} s that are done are in {printable(str(stopped.video))}, and their state in {state}"
    if left <= 0 and args.seconds != 0:
        return f"{kept}: nothing is missing"
    return f"{kept}. To go on, run the same command{given} with --state-in {state} --seconds {left or 0}"


@contextmanager
def _asking_first(shards: HeadShards | None = None) -> Iterator[Callable[[], None]]:
    """Let Ctrl-C wait until the chunk under way can be left, so that no frame is lost; a second one ends at once.

    shards: processes that end at the same pass, whichever of them is asked.
    Yields what to call between model passes: it raises KeyboardInterrupt if somebody has asked.
    """
    asked = False

    def ask(number, frame) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    def heed() -> None:
        if asked if shards is None else shards.any(asked):
            raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # somebody else's, or ignored
        yield heed
        return
    signal.signal(signal.SIGINT, ask)
    try:
        yield heed
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class _Parser(argparse.ArgumentParser):
    """Takes `--debug` everywhere, and says what is wrong in one line."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show where in the code an error arose"
        )

    def parse_known_args(self, args=None, namespace=None):
        """Refuse what is left over here, where it is known which command's help has the options."""
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}{self._meant(rest[0])}")
        return namespace, rest

    def _meant(self, word: str) -> str:
        """What somebody may have meant by an argument that there is none of; empty where nothing is near."""
        known = self._option_string_actions
        if not word.startswith("-"):
            return "; a prompt is given as --prompt TEXT" if "--prompt" in known else ""
        meant = {name: (name,) for name in known} | {name: own for name, own in _OTHER_NAMES.items() if own[0] in known}
        near = get_close_matches(word.partition("=")[0], meant, n=1, cutoff=0.75)
        return f"; is it {' and '.join(meant[near[0]])}?" if near else ""

    def error(self, message: str):
        _leave_to_the_first()
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


class _DefaultsHelp(argparse.ArgumentDefaultsHelpFormatter):
    """Adds each default to its help, where there is one to add."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False, "", []) else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m rolling_kv", description=__doc__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="make a video from a prompt", formatter_class=_DefaultsHelp)
    generate.set_defaults(run=_generate)
    generate.add_argument("--prompt", help="what the video shows")
    generate.add_argument(
        "--schedule",
        metavar="TEXT|FILE",
        help="prompts and when they begin, instead of one prompt or after it: `0: a red circle / 2.5: a blue circle [cut]` "
        "in seconds, with [hold], [recache], [flush], [cut] or [blend 3]; also the forms of Infinity-RoPE, FizzNodes, "
        "LongLive and Daydream Scope",
    )
    generate.add_argument("--output", required=True, type=Path, metavar="F", help="file to write, ending in .mp4")
    generate.add_argument("--image", type=Path, metavar="F", help="a picture that the video starts with")
    generate.add_argument(
        "--video",
        type=Path,
        metavar="F",
        help="a video that is extended: --output holds it and what follows; with --strength one that is made anew",
    )
    generate.add_argument(
        "--strength", type=float, help="make --video anew with the prompt: how far from it, from 0 to 1; 0.5 is usual"
    )
    generate.add_argument(
        "--last-seconds", type=float, metavar="S", help="take so much of --video from its end (default: all)"
    )
    generate.add_argument(
        "--fit", choices=FITS, default="crop", help="how --image or --video of another shape come to the size"
    )
    generate.add_argument(
        "--background", default="#000000", metavar="COLOUR", help="what transparent parts and the bars of pad show"
    )
    generate.add_argument(
        "--state-in",
        type=Path,
        metavar="F",
        help="the state of a video to continue, with its size and by --seconds more, or the journal of a run that was "
        "killed; --output gets all of it",
    )
    generate.add_argument(
        "--new-only", action="store_true", help="with --state-in: --output gets what is made now alone"
    )
    generate.add_argument(
        "--state-out",
        type=Path,
        metavar="F",
        help="file for the state of the video, ending in .safetensors, from which to continue it another day",
    )
    generate.add_argument(
        "--seconds",
        type=float,
        help="length, rounded up to whole chunks; 0 is until Ctrl-C (default: the schedule's; without one "
        f"{LAST_PROMPT_SECONDS:g}, after the beginning of its last prompt)",
    )
    generate.add_argument("--seed", type=int, default=0, help="same seed, same video (default: 0)")
    options.add_model(generate)
    options.add_offload(generate)
    multiple = f"a multiple of {WAN_21.multiple} ({WAN_22.name}: {WAN_22.multiple})"
    for axis, side in enumerate(("height", "width")):
        generate.add_argument(
            f"--{side}",
            type=int,
            help=f"pixels, {multiple} (default: {BUNDLED_SIZE} for the tiny model, else {WAN_21.size[axis]}; "
            f"{WAN_22.name}: {WAN_22.size[axis]})",
        )
    options.add_cache(generate, "the preset's")
    generate.add_argument("--guidance", type=float, help="classifier-free guidance, 1 is off (default: the preset's)")
    generate.add_argument("--negative-prompt", default="", help="what to avoid; only read with guidance")
    options.add_execution(generate)
    options.add_device(generate, "where to compute")
    generate.add_argument(
        "--steer",
        action="store_true",
        help="read lines while the video is made: a prompt, which begins with the next chunk and may end with [cut] or another way "
        "of a schedule; /pause, /resume and /stop",
    )
    generate.add_argument("--scale", type=int, default=1, help="enlarge each pixel so many times, for tiny videos")
    options.add_encoder(generate)

    inspect = commands.add_parser("inspect", help="tell what a checkpoint is, or the state of a video")
    inspect.set_defaults(run=_inspect)
    inspect.add_argument(
        "file", type=Path, metavar="FILE", help="a .safetensors, .gguf or .pt file, a diffusers folder, or a state"
    )
    for side in ("width", "height"):
        inspect.add_argument(f"--{side}", type=int, help="pixels (default: what such models were trained at)")
    inspect.add_argument(
        "--card", type=float, metavar="GIB", help="memory of a GPU: tells which settings fit it, and proposes some"
    )

    tiny = commands.add_parser("make-tiny", help="write a complete model of a few MB, with random weights")
    tiny.set_defaults(run=_make_tiny)
    tiny.add_argument("folder", type=Path, metavar="DIR")
    tiny.add_argument("--seed", type=int, default=0, help="of the random weights (default: %(default)s)")
    tiny.add_argument(
        "--channels", type=int, choices=list(GEOMETRIES), default=WAN_21.channels,
        help=f"of its latents: {WAN_21.channels} as {WAN_21.name} has them, {WAN_22.channels} as {WAN_22.name} "
        "(default: %(default)s)",
    )  # fmt: skip

    add_batch(commands)
    add_bench(commands)
    return parser


def _generate(args: argparse.Namespace) -> None:
    """Make a video: alone, or together with the other processes that torchrun has started."""
    with shared_by_torchrun(args.device) as (shards, args.device):
        if shards is None or shards.first:
            _generate_on(args, shards)
            return
        with redirect_stdout(None):  # the first one says all
            try:
                _generate_on(args, shards)
            except KeyboardInterrupt:
                sys.exit(1)
            except Exception:
                _leave_to_the_first()
                raise


def _leave_to_the_first() -> None:
    """Let the first process of torchrun on this machine say what is wrong for all of them.

    torchrun ends all of them as soon as one has ended. What only this one knows is left to it, and it says so afterwards.
    """
    if int(os.environ.get("LOCAL_RANK", 0)):
        time.sleep(FIRST_SAYS)


def _generate_on(args: argparse.Namespace, shards: HeadShards | None) -> None:
    check_model(args.model)
    schedule = None if args.schedule is None else _schedule(args.schedule)
    if args.prompt is None and schedule is None:
        raise ValueError("nothing says what the video shows: give --prompt or --schedule")
    size = None if args.state_in is None else _size_of_state(args)
    if args.state_out is not None:
        check_state_path(args.state_out)
    background = read_colour(args.background)
    for file in filter(None, (args.image, args.video)):
        Footage.open(file)  # raises for what is no picture, before anything is loaded
    execution = options.execution_of(args)
    execution.check(args.device, weight_storage=args.weight_storage)
    if args.offload_weights:
        execution.check_offloaded()
    if rules := options.rules_of(args):  # what does not go together is told before anything is loaded
        preset = PRESETS.get(args.preset) or inspect_checkpoint(args.model).settings
        preset.sampling.check_cache(preset.cache.with_rules(**rules))
    loras = options.loras_of(args)
    height, width = _asked_size(args, size or default_size(args.model))
    # All three raise for what no video can be, before anything is loaded.
    check_ended(args.output, args.state_in, args.new_only)
    WAN_21.latent_size(height, width)  # what other geometries ask for is a multiple of that
    VideoWriter(args.output, width, height, scale=args.scale)
    pipeline = Pipeline.load(
        args.model,
        text_encoder=args.text_encoder,
        vae=args.vae,
        preset=args.preset,
        dtype=args.dtype,
        storage=args.weight_storage,
        loras=loras,
        offload=args.offload_weights,
        device=args.device,
    )
    height, width = _asked_size(args, size or default_size(args.model, pipeline.model.geometry))
    preset = pipeline.model.preset
    cache = options.cache_of(args, preset.cache)
    sampling = preset.sampling
    if args.guidance is not None:
        sampling = replace(sampling, guidance_scale=args.guidance)
    geometry, seconds = pipeline.model.geometry, args.seconds
    clip = clip_of(args.image, args.video, Fitting(height, width, args.fit, background), geometry, args.last_seconds)
    if clip is not None:
        print(clip)
    start = 0 if args.state_in is None else read_state(args.state_in).frames
    start = start_of(clip if args.strength is None else None, start, sampling, geometry)
    if args.strength is not None and clip is not None:
        seconds = seconds_anew(clip, seconds, start, sampling, geometry)
    if schedule is not None:
        plan = plan_prompts(args.prompt, schedule, sampling, geometry, seconds, start)
        print(*plan.notes, plan.snapped(), sep="\n")
    quiet = shards is not None and not shards.first
    with _asking_first(shards) as heed, tqdm(total=1, unit="pass", desc="sampling", disable=quiet) as bar:

        def on_pass(done: int, total: int) -> None:
            heed()
            bar.total = total if args.seconds != 0 else None
            bar.update(done - bar.n)

        def steer(steering: Steering) -> None:
            steering.heed = heed
            said = sys.stdin, steering, bar.write, pipeline.text_encoder.remark
            Thread(target=listen, args=said, name="rolling_kv steering", daemon=True).start()
            told.append(steering)

        told: list[Steering] = []
        pipeline.generate(
            args.prompt,
            args.output,
            height=height,
            width=width,
            seconds=args.seconds,
            schedule=schedule,
            seed=args.seed,
            negative_prompt=args.negative_prompt,
            image=args.image,
            video=args.video,
            strength=args.strength,
            last_seconds=args.last_seconds,
            fit=args.fit,
            background=args.background,
            sampling=sampling,
            cache=cache,
            scale=args.scale,
            encoder=args.encoder,
            execution=execution,
            state_in=args.state_in,
            state_out=args.state_out,
            new_only=args.new_only,
            shards=shards,
            on_pass=on_pass,
            steer=steer if args.steer else None,
        )
        bar.update((bar.total or bar.n) - bar.n)
    if quiet:
        return
    info = read_video_info(args.output)
    made = f"{info.frames} frames, {info.width}x{info.height}, {info.fps:g} frames per second"
    print(f"{args.output}: {made}: {info.frames / info.fps:.6g} s, in whole chunks")
    for steering in told:
        if steering.changed:
            print("as a schedule, the same video:", steering.schedule, sep="\n")


def _asked_size(args: argparse.Namespace, usual: tuple[int, int]) -> tuple[int, int]:
    """Height and width in pixels that were asked for, by default the `usual` ones."""
    height, width = usual
    return height if args.height is None else args.height, width if args.width is None else args.width


def _size_of_state(args: argparse.Namespace) -> tuple[int, int]:
    """Height and width of the video that is to be continued. Raises ValueError for what contradicts its state."""
    size = read_state(args.state_in).size
    if args.image is not None or args.video is not None and args.strength is None:
        name = "--video" if args.image is None else "--image"
        raise ValueError(f"a video that is continued has its beginning already: leave {name} out")
    for name, given, own in zip(("height", "width"), (args.height, args.width), size):
        if given not in (None, own):
            raise ValueError(
                f"{printable(str(args.state_in))} holds a video of {size[1]}x{size[0]} pixels, and --{name} is {given}: "
                "leave it out"
            )
    return size


def _schedule(given: str) -> PromptSchedule:
    """The schedule in a text, or in the file that it names."""
    if len(given) < 4096 and "\n" not in given and "\0" not in given:
        if Path(given).is_file():
            return load_schedule(given)
        if Path(given).suffix.lower() in (".txt", ".json", ".jsonl"):
            raise ValueError(f"there is no schedule file {printable(given)}")
    return read_schedule(given)


def _inspect(args: argparse.Namespace) -> None:
    if is_state_file(args.file):
        if args.card is not None:
            raise ValueError(
                f"{printable(str(args.file))} is the state of a video: --card tells what fits of a model, so give it with the model's file"
            )
        _inspect_state(args.file)
        return
    info = inspect_checkpoint(args.file, args.height, args.width)
    config = info.config
    print(f"file       {printable(str(info.path))}")
    print(f"layout     {info.layout}")
    print(f"size       {_size(info.file_bytes)}, {info.parameters / 1e6:,.1f} million parameters")
    print(f"dtype      {', '.join(info.dtypes)}")
    print(f"model      {config['layers']} layers, dim {config['dim']}, {config['heads']} heads, ffn {config['ffn']}")
    print(
        f"preset     {info.preset or f'none detected: {info.settings.name} is assumed, choose another with --preset'}"
    )
    print(f"settings   {info.settings.trained_for()}")
    if info.note:
        print(f"note       {info.note}")
    per_frame = info.kv_bytes_per_frame
    print(f"KV cache   {_size(per_frame)} per latent frame in bfloat16 at {info.width}x{info.height}")
    if window := info.settings.cache.limit:
        print(
            f"           {_size(per_frame * window)} for its window of {window} latent frames "
            f"({info.geometry.pixel_frames(window)} video frames)"
        )
    run = info.run
    print(
        f"a run      {_size(run.device)} beside the weights: cache {_size(run.cache)}, prompts {_size(run.prompts)}, "
        f"activations {_size(run.activations)}"
    )

    if args.card is not None:
        _inspect_card(args.file, info, args.card)


def _inspect_card(path: Path, info: CheckpointInfo, gibibytes: float) -> None:
    if not 0 < gibibytes <= MOST_GIBIBYTES:
        raise ValueError(f"--card is the memory of a GPU in GiB, such as 12; got {gibibytes:g}")
    model = {"model": outline(path, dtype="bfloat16")}
    if not model["model"].packed:
        model["float8"] = outline(path, dtype="bfloat16", storage="float8")
    card = round(gibibytes * 2**30)
    found = choices(kept_in_ways(model), info.height, info.width, card)
    print(
        f"\non {gibibytes:g} GiB, {OVERHEAD / 2**30:.1f} of them for CUDA, in bfloat16 at {info.width}x{info.height}:\n"
    )
    rows = [[*told_choice(choice), _fit(choice, card)] for choice in found]
    print("\n".join(markdown([*CHOICE_HEAD, "fits"], rows)))
    fitting = next((choice for choice in found if choice.known.fits), None)
    told = [f"{size / 2**30:.1f} GiB in {kept}" for kept, size in TEXT_ENCODER.items() if size > card - OVERHEAD]
    if told:
        print(f"\nthe text encoder UMT5-XXL takes {', '.join(told)} while it encodes: it runs on the CPU instead")
    print(f"\nproposed   {'nothing of these fits: make the picture smaller' if fitting is None else fitting.options()}")


def _fit(choice: Choice, card: int) -> str:
    """Whether a way to run a model fits a card of so many bytes, as a word for people."""
    if not choice.known.fits:
        return ""
    return "yes" if choice.device + choice.fast <= card else "not fast"


def _inspect_state(path: Path) -> None:
    info = summarize(read_state(path))
    print(f"file       {printable(str(path))}, the state of a video")
    print(f"size       {_size(path.stat().st_size)}")
    print(*(f"{name:11}{said}" for name, said in info.facts().items()), "", info.table(), sep="\n")


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _make_tiny(args: argparse.Namespace) -> None:
    folder = make_tiny(args.folder, seed=args.seed, geometry=GEOMETRIES[args.channels])
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: a complete model, {_size(size)}, random weights")
