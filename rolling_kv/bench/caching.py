"""`python -m rolling_kv bench caching`: every step cache at several strengths on one model, against no step cache."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import torch

from ..bidirectional import BidirectionalClip
from ..checkpoints import load_model
from ..config import PRESETS, CacheConfig, ModelPreset, SamplingConfig
from ..model import CausalModel
from ..sampler import RollingSession
from ..step_cache import (
    METHODS,
    FasterCache,
    FirstBlockCache,
    Forced,
    MagCache,
    MagCacheCalibration,
    PyramidAttentionBroadcast,
    SeaCache,
    StepCacheReport,
    TaylorSeer,
)
from ..text import load_text_encoder
from ..tiny import BUNDLED
from ..vae import WanVAE, load_vae, to_raw
from .caching_report import as_json, check_quality, describe, similarity, table, write_plot
from .memory import TensorBytes, storage_bytes
from .methods import make_transformer
from .report import check_plot, write_json
from .workload import SIZES, Workload

MODES = ("multi-step", "bidirectional", "few-step")


@dataclass(frozen=True)
class Setting:
    """What every run shares. mode: one of MODES. chunks: of the video; a clip has as many frames at once.

    prompt, negative: embeddings. vae: decodes the videos that are compared; None compares nothing.
    """

    model: CausalModel
    prompt: torch.Tensor
    negative: torch.Tensor
    vae: WanVAE | None
    mode: str
    sampling: SamplingConfig
    cache: CacheConfig
    height: int
    width: int
    chunks: int
    seeds: tuple[int, ...] = (0,)
    memory: bool = True


@dataclass
class Measured:
    """One method at one strength. Lists are by seed.

    seconds: of the run. plain_seconds: of an uncached run right before it, so that whatever else the machine does hits
    both. psnr, ssim: means, against the uncached videos. peak_bytes: weights included. extra: what a `judge` said of
    the decoded videos, means.
    """

    method: str
    strength: str
    seconds: list[float] = field(default_factory=list)
    plain_seconds: list[float] = field(default_factory=list)
    report: StepCacheReport | None = None
    peak_bytes: int | None = None
    psnr: float | None = None
    ssim: float | None = None
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def speed_up(self) -> float:
        """Median over the seeds."""
        return median(plain / taken for plain, taken in zip(self.plain_seconds, self.seconds))


def variants(ratios: tuple[float, ...]) -> Iterator[tuple[str, object]]:
    """Every method from gentle to strong, its defaults among them: (strength, method). ratios: MagCache's constants."""
    wide = (100, 950)
    yield "self 2", PyramidAttentionBroadcast()
    yield "self 2, cross 6", PyramidAttentionBroadcast(2, 6)
    yield "self 4, cross 6, to 950", PyramidAttentionBroadcast(4, 6, wide, wide)
    yield "uncond 2, to 641", FasterCache(2)
    yield "uncond 5, to 641", FasterCache()
    yield "uncond 5, to 950", FasterCache(5, 2, (-1, 950), (-1, 950))
    for threshold in (0.05, 0.1, 0.2):
        yield f"threshold {threshold}", FirstBlockCache(threshold)
    yield "every 3", TaylorSeer(3)
    yield "every 5", TaylorSeer()
    yield "every 5, lite", TaylorSeer(use_lite_mode=True)
    if ratios:
        for threshold, steps in ((0.06, 3), (0.12, 4), (0.24, 6)):
            yield f"threshold {threshold}, {steps} in a row", MagCache(threshold, steps, mag_ratios=ratios)
    for threshold in (0.1, 0.25, 0.5):
        yield f"threshold {threshold}", SeaCache(threshold)


def sample(setting: Setting, method, seed: int) -> tuple[torch.Tensor, StepCacheReport | None]:
    """One video, [1, C, F, h, w] in model space, and what the step cache did."""
    shared = dict(
        negative=setting.negative if setting.sampling.guided else None, height=setting.height, width=setting.width,
        sampling=setting.sampling, step_cache=method,
    )  # fmt: skip
    if setting.mode == "bidirectional":
        frames = setting.chunks * setting.sampling.chunk
        clip = BidirectionalClip(setting.model, setting.prompt, frames=frames, **shared)
        return clip.sample(seed), clip.step_report
    session = RollingSession(setting.model, setting.prompt, cache=setting.cache, **shared)
    with session:
        for _ in session.generate(setting.chunks, seed=seed):
            pass
    return session.state.latents(), session.step_report


def calibrate(setting: Setting) -> tuple[float, ...]:
    """MagCache's constants for this model and number of steps, from a video with a seed that is not measured."""
    return sample(setting, MagCacheCalibration(), max(setting.seeds) + 1)[1].mag_ratios


def measure(
    setting: Setting,
    names: list[str],
    *,
    judge: Callable[[torch.Tensor], dict[str, float]] | None = None,
    on_run: Callable[[int, int, str], None] = lambda *_: None,
) -> tuple[list[Measured], tuple[float, ...]]:
    """Time and compare the methods of these names. The first result is without a step cache; also MagCache's constants.

    judge: looks at each decoded video [3, T, H, W] in [-1, 1]. on_run: called as (done, total, what) before each run;
    an exception from it cancels.
    """
    ratios = calibrate(setting) if "magcache" in names and setting.mode != "few-step" else ()
    chosen = [(strength, method) for strength, method in variants(ratios) if method.name in names]
    runs = [("none", "", None)] + [(method.title, strength, method) for strength, method in chosen]
    sample(setting, None, max(setting.seeds) + 1)  # what is set up once is not what is measured
    results, originals = [], {}
    for index, (title, strength, method) in enumerate(runs):
        on_run(index, len(runs), f"{title} {strength}".strip())
        if setting.mode == "few-step" and method is not None:
            method = Forced(method)
        result = Measured(title, strength)
        scores = []
        for seed in setting.seeds:
            start = _now(setting)
            sample(setting, None, seed)
            middle = _now(setting)
            latents, result.report = sample(setting, method, seed)
            result.seconds.append(_now(setting) - middle)
            result.plain_seconds.append(middle - start)
            if setting.vae is not None:
                frames = decode(setting.vae, latents)
                scores.append(similarity(frames, originals.setdefault(seed, frames)) | (judge(frames) if judge else {}))
        if scores:
            mean = {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}
            result.psnr, result.ssim = (None, None) if method is None else (mean["psnr"], mean["ssim"])
            result.extra = {name: value for name, value in mean.items() if name not in ("psnr", "ssim")}
        if setting.memory:
            result.peak_bytes = peak_bytes(setting, method)
        results.append(result)
    return results, ratios


def step_change(setting: Setting) -> tuple[float, ...]:
    """Relative change of the predicted flow from step to step in few-step sampling: one per step after the first."""
    return sample(replace(setting, mode="multi-step"), FirstBlockCache(), setting.seeds[0])[1].change


def decode(vae: WanVAE, latents: torch.Tensor) -> torch.Tensor:
    """Frames [3, T, H, W] in [-1, 1] of one video's latents."""
    with torch.inference_mode():
        return vae.decoder().decode(to_raw(latents.float()))[0].clamp(-1, 1).cpu()


def peak_bytes(setting: Setting, method) -> int:
    """Most memory in use during an untimed run of its own, weights included."""
    device = setting.model.compute_device()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        sample(setting, method, setting.seeds[0])
        return torch.cuda.max_memory_allocated(device)
    weights = storage_bytes([*setting.model.parameters(), *setting.model.buffers()])
    with TensorBytes(weights) as counted:
        sample(setting, method, setting.seeds[0])
    return counted.peak


def _now(setting: Setting) -> float:
    if setting.model.compute_device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, default=BUNDLED, help="as for generate (default: the bundled tiny model)")
    parser.add_argument("--text-encoder", type=Path, help="UMT5, where the model is a single file")
    parser.add_argument("--vae", type=Path, help="the Wan 2.1 VAE, where the model is a single file")
    parser.add_argument("--preset", choices=["auto", *PRESETS], default="auto", help="what the model was trained for")
    parser.add_argument("--size", choices=SIZES, help="random weights of this shape instead: no quality")
    parser.add_argument("--mode", choices=MODES, default=MODES[0], help="default: %(default)s, with the rolling cache")
    parser.add_argument("--prompt", default="a red circle moving left", help="default: %(default)s")
    parser.add_argument("--negative-prompt", default="", help="default: empty")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps, unless few-step (default: %(default)s)")
    parser.add_argument("--sampler", choices=["unipc", "euler"], default="unipc", help="default: %(default)s")
    parser.add_argument("--guidance", type=float, default=3.0, help="1: off, as in few-step (default: %(default)s)")
    parser.add_argument("--chunks", type=int, default=3, help="length of each video (default: %(default)s)")
    parser.add_argument("--height", type=int, help="pixels (default: 64 for the bundled model, else 480)")
    parser.add_argument("--width", type=int, help="pixels (default: 64 for the bundled model, else 832)")
    parser.add_argument("--window", type=int, help="latent frames a chunk attends to (default: the preset's)")
    parser.add_argument("--videos", type=int, default=1, help="seeds to average over (default: %(default)s)")
    parser.add_argument("--methods", help=f"names, separated by commas (default: all): {', '.join(METHODS)}")
    parser.add_argument("--dtype", choices=["auto", "float32", "float16", "bfloat16"], default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's)")
    parser.add_argument("--no-memory", action="store_true", help="leave out the runs that follow memory")
    parser.add_argument("--json", type=Path, metavar="F", help="write all figures to this file")
    parser.add_argument("--plot", type=Path, metavar="F", help="draw quality over speed-up into this PNG file")


def main(args: argparse.Namespace, judge: Callable[[torch.Tensor], dict[str, float]] | None = None) -> None:
    """Measure and print. Raises ValueError, before anything is measured, for arguments that cannot work."""
    names = list(METHODS) if args.methods is None else args.methods.replace(" ", "").split(",")
    if unknown := sorted(set(names) - set(METHODS)):
        raise ValueError(f"--methods takes {', '.join(METHODS)}; got {', '.join(unknown)}")
    for name in ("chunks", "videos", "steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    for path in filter(None, (args.json, args.plot)):
        if not path.absolute().parent.is_dir():
            raise ValueError(f"the folder of {path} does not exist; make it first")
    if args.plot:
        check_plot(args.plot)
    if args.size is None:
        check_quality()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    setting = make_setting(args)
    print(describe(setting), flush=True)
    if setting.mode == "few-step":
        change = step_change(setting)
        print(
            f"From one of the {len(setting.sampling.denoising_steps)} steps to the next the prediction changes by "
            f"{100 * median(change):.0f} % (median; {100 * min(change):.0f} to {100 * max(change):.0f} %): that is the "
            "error a skipped step puts into the video. The methods are forced on below."
        )
    results, ratios = measure(
        setting, names, judge=judge, on_run=lambda done, total, what: print(f"  {done + 1}/{total} {what}", flush=True)
    )
    print(f"\n{table(setting, results)}")
    if ratios:
        print(f"\nMagCache's constants of this model: {', '.join(f'{ratio:.4f}' for ratio in ratios)}")
    if args.json:
        write_json(args.json, as_json(setting, results, ratios))
    if args.plot:
        write_plot(args.plot, setting, results)


def make_setting(args: argparse.Namespace) -> Setting:
    if args.size:
        model, prompt, negative, vae = _random_model(args)
    else:
        if args.model == BUNDLED and not BUNDLED.is_dir():
            raise ValueError(f"the tiny model is not there; make it with: python -m rolling_kv make-tiny {BUNDLED}")
        model = load_model(args.model, preset=args.preset, dtype=args.dtype, device=args.device)
        text = load_text_encoder(args.text_encoder or args.model, dtype=args.dtype, device=args.device)
        vae = load_vae(args.vae or args.model, dtype=args.dtype, device=args.device)
        prompt, negative = text.encode([args.prompt]), text.encode([args.negative_prompt])
    small = args.size is None and args.model == BUNDLED
    height, width = (64, 64) if small else (480, 832)
    if args.size:
        height, width = SIZES[args.size].height, SIZES[args.size].width
    sampling, cache = model.preset.sampling, model.preset.cache
    if args.mode == "few-step":
        sampling = replace(sampling, sampler="renoise", guidance_scale=1.0)
    else:
        sampling = replace(sampling, sampler=args.sampler, num_inference_steps=args.steps, guidance_scale=args.guidance)
    if args.window is not None:
        cache = replace(cache, window=args.window)
    return Setting(
        model, prompt, negative, vae, args.mode, sampling, cache, args.height or height, args.width or width,
        args.chunks, tuple(range(args.videos)), not args.no_memory,
    )  # fmt: skip


def _random_model(args: argparse.Namespace) -> tuple:
    size, device = SIZES[args.size], torch.device(args.device)
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    cache = CacheConfig(size.window)
    workload = Workload(size, size.height, size.width, args.chunks, cache, dtype=getattr(torch, dtype), device=device)
    preset = ModelPreset(f"random {args.size}", SamplingConfig(), cache)
    model = CausalModel(make_transformer(workload, workload.random_weights()), preset)
    return model, workload.prompt, -workload.prompt, None
