"""Every way to keep the cache and the weights, on one model: bytes, time, and error against float32."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from statistics import median

import torch
from diffusers.utils import is_gguf_available
from torch import Tensor

from ..cache.sizes import CacheBytes
from ..checkpoints.float8 import store_float8
from ..checkpoints.gguf import GGUF_PACKAGE
from ..checkpoints.model import CausalModel
from ..checkpoints.transformer import build_transformer
from ..config import CACHE_STORAGES
from ..presets import ModelPreset
from ..sampling.session import RollingSession
from .measure import BenchError
from .memory import CudaGauge, TensorBytes, storage_bytes
from .report import machine, markdown, number, size
from .workload import full_window

Say = Callable[[str], None]

PLAIN = "model"
FLOAT8 = "float8"


@dataclass(frozen=True)
class Setting:
    """What every run shares.

    weights: in any names that `build_transformer` takes, in `dtype` on `device`; config: what their shapes do not tell.
    preset: sampling, and the cache but for its storage. prompt: embedding [1, L, D]. chunks: of the video, all from
    noise of `seed`. memory: where CUDA does not count it, follow peak memory in runs of its own.
    """

    name: str
    weights: dict[str, Tensor]
    config: dict
    preset: ModelPreset
    prompt: Tensor
    height: int
    width: int
    chunks: int
    dtype: torch.dtype
    device: torch.device
    seed: int = 0
    memory: bool = True

    @property
    def full_window(self) -> list[int]:
        return full_window(self.chunks, self.preset.sampling, self.preset.cache)


@dataclass(frozen=True)
class Variant:
    """weights: PLAIN (the model's dtype), FLOAT8, or a packing of GGUF files. cache: one of CACHE_STORAGES."""

    weights: str = PLAIN
    cache: str = PLAIN
    offload: bool = False

    @property
    def title(self) -> str:
        return f"weights {self.weights}, cache {self.cache}{', offloaded' if self.offload else ''}"


@dataclass
class Measured:
    """seconds, error: by chunk number; error is the relative 2-norm of the latents' difference from float32.

    The video runs freely: a chunk's error comes from everything before it too. peak_bytes: the most in use during a
    chunk, weights included, the finished video not; None where it was not followed.
    """

    variant: Variant
    weight_bytes: int = 0
    cache_bytes: CacheBytes = CacheBytes(0, 0)
    peak_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)


def variants(packings: Sequence[str]) -> list[Variant]:
    """All of them, the plain one first. packings: of GGUF files."""
    caches = [Variant(cache=cache, offload=offload) for offload in (False, True) for cache in CACHE_STORAGES]
    return caches + [Variant(weights=weights) for weights in (FLOAT8, *packings)]


def check_packings(names: Sequence[str]) -> None:
    """Raise ValueError unless weights can be packed so here."""
    if names and not is_gguf_available():
        raise ValueError(f'packing weights needs the Python package gguf: pip install "{GGUF_PACKAGE}", or --gguf none')
    if unknown := [name for name in names if name not in packings()]:
        raise ValueError(f"the package gguf packs weights as {', '.join(packings())}; got {', '.join(unknown)}")


def packings() -> list[str]:
    """Packings that diffusers unpacks and the package gguf makes: it reads the K-quants, and cannot make them."""
    import gguf
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES

    made = []
    for kind in set(SUPPORTED_GGUF_QUANT_TYPES) - {gguf.GGMLQuantizationType.BF16}:  # a dtype, not a packing
        block, _ = gguf.GGML_QUANT_SIZES[kind]
        try:
            gguf.quants.quantize(torch.zeros(1, block).numpy(), kind)
        except NotImplementedError:
            continue
        made.append(kind.name)
    return sorted(made)


def pack(weights: dict[str, Tensor], packing: str) -> dict[str, Tensor]:
    """The weights, the matrices of the blocks packed as in a GGUF file: those that float8 storage takes as well."""
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFParameter

    kind = gguf.GGMLQuantizationType[packing]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    packed = dict(weights)
    for name, tensor in weights.items():
        if "blocks." in name and tensor.ndim == 2 and tensor.shape[1] % block == 0:
            values = gguf.quants.quantize(tensor.float().cpu().numpy(), kind)
            packed[name] = GGUFParameter(torch.from_numpy(values), quant_type=kind)
    return packed


def build(setting: Setting, storage: str, dtype: torch.dtype | None = None) -> CausalModel:
    """A model of its own around the shared weights, kept as `storage` says."""
    weights = setting.weights if storage in (PLAIN, FLOAT8) else pack(setting.weights, storage)
    transformer = build_transformer(weights, setting.config, dtype or setting.dtype, setting.device)
    if storage == FLOAT8:
        store_float8(transformer)
    return CausalModel(transformer, setting.preset)


class Run:
    """One video that is made chunk by chunk; a context manager around its session."""

    def __init__(self, setting: Setting, variant: Variant, model: CausalModel):
        self.weight_bytes = storage_bytes([*model.parameters(), *model.buffers()])
        cache = replace(setting.preset.cache, storage=variant.cache, offload=variant.offload)
        self.session = RollingSession(model, setting.prompt, height=setting.height, width=setting.width, cache=cache)
        self._video = self.session.generate(setting.chunks, seed=setting.seed)

    def __enter__(self) -> Run:
        self.session.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._video.close()
        self.session.__exit__(*exception)

    def chunk(self) -> Tensor:
        """The next chunk's clean latents, [1, C, f, h, w]."""
        return next(self._video).latents


def reference(setting: Setting) -> list[Tensor]:
    """The chunks that the same weights make in float32."""
    full = replace(setting, prompt=setting.prompt.float())
    with Run(full, Variant(), build(full, PLAIN, torch.float32)) as run:
        return [run.chunk() for _ in range(setting.chunks)]


def measure(setting: Setting, chosen: Sequence[Variant], *, say: Say = print) -> list[Measured]:
    """Make the same video with each variant, in turns chunk by chunk, so that whatever else the machine does hits all.

    Raises BenchError for a video with values that are not finite.
    """
    say("float32, for comparison")
    expected = reference(setting)
    models = [build(setting, variant.weights) for variant in chosen]
    if setting.device.type == "cuda":  # what is set up once is not what is measured
        _take_turns(replace(setting, chunks=min(2, setting.chunks)), chosen, models, expected, lambda _: None)
    results = _take_turns(setting, chosen, models, expected, say)
    if setting.memory and setting.device.type != "cuda":
        for result, model in zip(results, models):
            say(f"following the memory of {result.variant.title}")
            result.peak_bytes = peak_bytes(setting, result.variant, model)
    return results


def _take_turns(
    setting: Setting, chosen: Sequence[Variant], models: Sequence[CausalModel], expected: Sequence[Tensor], say: Say
) -> list[Measured]:
    gauge = CudaGauge(setting.device, 0) if setting.device.type == "cuda" else None
    results = [Measured(variant) for variant in chosen]

    def turn(variant: Variant):
        return gauge.turn(variant.title) if gauge else nullcontext()

    with ExitStack() as stack:
        runs = []
        for variant, model in zip(chosen, models):
            with turn(variant):
                runs.append(stack.enter_context(Run(setting, variant, model)))
        for index in range(setting.chunks):
            for run, result in zip(runs, results):
                with turn(result.variant):
                    start = _now(setting)
                    video = run.chunk()
                    result.seconds.append(_now(setting) - start)
                if not video.isfinite().all():
                    raise BenchError(f"{result.variant.title}: chunk {index + 1} has values that are not finite")
                difference = video.float() - expected[index]
                result.error.append((difference.norm() / expected[index].norm()).item())
            say(f"chunk {index + 1} of {setting.chunks}")
        for run, result in zip(runs, results):
            result.weight_bytes, result.cache_bytes = run.weight_bytes, run.session.cache_bytes
            result.peak_bytes = gauge.peaks[result.variant.title] + run.weight_bytes if gauge else None
    return results


def peak_bytes(setting: Setting, variant: Variant, model: CausalModel) -> int:
    """Most bytes of tensors alive during a chunk, weights included, from an untimed run up to the first full window."""
    run = Run(setting, variant, model)
    with TensorBytes(run.weight_bytes) as tensors, run:
        for _ in range(setting.full_window[0] + 1):
            tensors.restart()
            run.chunk()
        return tensors.peak - sum(chunk.nbytes for chunk in run.session.state.chunks)


def _now(setting: Setting) -> float:
    if setting.device.type == "cuda":
        torch.cuda.synchronize(setting.device)
    return time.perf_counter()


def summary(setting: Setting, results: Sequence[Measured]) -> list[dict]:
    """The figures of the table, in its order; times and errors are medians over the chunks with a full window."""
    first, full = results[0], setting.full_window
    return [
        asdict(result.variant)
        | {
            "weight_bytes": result.weight_bytes,
            "cache_device_bytes": result.cache_bytes.device,
            "cache_host_bytes": result.cache_bytes.host,
            "peak_bytes": result.peak_bytes,
            "seconds": median(result.seconds[index] for index in full),
            "times_the_first": median(result.seconds[index] / first.seconds[index] for index in full),
            "error": median(result.error[index] for index in full),
        }
        for result in results
    ]


def table(setting: Setting, results: Sequence[Measured]) -> str:
    """A Markdown table, and what its columns mean."""
    head = ["weights", "cache", "offloaded", "weights take", "keys, values", "in CPU memory", "peak memory"]
    head += ["s per chunk", "times the first", "error"]
    rows = []
    for row in summary(setting, results):
        sizes = [row["weight_bytes"], row["cache_device_bytes"], row["cache_host_bytes"] or None, row["peak_bytes"]]
        times = [number(row["seconds"], ".3f"), number(row["times_the_first"], ".2f"), number(row["error"], ".1e")]
        rows.append([row["weights"], row["cache"], "yes" if row["offload"] else "", *map(size, sizes), *times])
    full = setting.full_window
    span = f"chunks {full[0] + 1} to {full[-1] + 1}" if len(full) > 1 else f"chunk {full[0] + 1}"
    window = setting.preset.cache.limit
    dtype = str(setting.dtype).removeprefix("torch.")
    lines = [
        *markdown(head, rows),
        "",
        f"model: {dtype}. Window of {f'{window} latent frames' if window else 'all frames'}; medians over {span}. "
        "Error: 2-norm of the difference from the latents that the same weights make in float32, relative to those.",
    ]
    return "\n".join(lines)


def describe(setting: Setting) -> str:
    """Two lines: the model and the video, then the machine."""
    here = machine(setting.device)
    cpu = f"{here['cpu']}, {here['threads']} threads"
    return (
        f"{setting.name}; {setting.height}x{setting.width}, {setting.chunks} chunk{'s' * (setting.chunks > 1)} of "
        f"{setting.preset.sampling.chunk} latent frames, "
        f"{str(setting.dtype).removeprefix('torch.')}\n{here.get('gpu', cpu)}, torch {here['torch']}"
    )


def as_json(setting: Setting, results: Sequence[Measured]) -> dict:
    """Everything measured."""
    return {
        "setting": describe(setting),
        "machine": machine(setting.device),
        "full_window_chunks": [index + 1 for index in setting.full_window],
        "summary": summary(setting, results),
        "by_chunk": [asdict(result) for result in results],
    }
