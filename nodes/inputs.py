"""Widgets that more than one node has, each written once, and what their choices mean to the engine.

Where a setting may be left to the model, a choice says so; no number stands for it.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from comfy_api.latest import io

from ..rolling_kv.config import ALL_FRAMES, CACHE_STORAGES, CONTEXTS, POSITIONS, SWITCHES, CacheConfig, SamplingConfig
from ..rolling_kv.geometry import WAN_21, WAN_22, Geometry
from ..rolling_kv.sampling.blend import CURVES
from ..rolling_kv.sampling.history import RECOMPUTING
from ..rolling_kv.video import ENCODERS
from .types import Schedule, TextEncoder

OWN = "the model's own"
"""The choice that leaves a setting as the model was trained."""

OFF = "off"
EVERY_FRAME = "all frames"
SO_MANY_FRAMES = "this many frames"
SO_MANY = "this many"
THIS_STRENGTH = "this strength"
FORGOTTEN = "forgotten"
INTO_SINK = "averaged into the sink"
INTO_MEMORY = "memory behind the sink"
ALL = "all"
FIRST_SECONDS = "the first seconds"
LAST_SECONDS = "the last seconds"
BLEND = "blend"
BLEND_CHUNKS = 4
SWITCHING = (
    "Hold: the past stays as it was seen; smooth, and slow to follow. Joint: the window is seen anew with the new prompt, all "
    "at once; causal: chunk by chunk. Flush: all but the first frame and the last two are forgotten. Cut: a new shot."
)
"""What the ways of switching prompts do, as sentences of a tooltip."""
SIDES = {"width": 832, "height": 480}
SEEDS = 2**64
"""How many seeds there are."""


def choice(
    name: str, options: dict[str, list], tooltip: str, *, optional=False, advanced=False
) -> io.DynamicCombo.Input:
    """A combo whose choices may bring inputs of their own. options: those inputs by choice, the default first."""
    return io.DynamicCombo.Input(
        name,
        options=[io.DynamicCombo.Option(key, inputs) for key, inputs in options.items()],
        optional=optional,
        tooltip=tooltip,
        extra_dict={"advanced": True} if advanced else None,
    )


def side(name: str, tooltip: str) -> io.Int.Input:
    """Width or height in pixels. tooltip: what else is to be said of it."""
    multiple = f"Pixels, a multiple of {WAN_21.multiple} (of {WAN_22.multiple} for {WAN_22.name})."
    tooltip = f"{multiple} {tooltip}".rstrip()
    return io.Int.Input(name, default=SIDES[name], min=16, max=8192, step=16, tooltip=tooltip)


def dtype(tooltip: str) -> io.Combo.Input:
    """The precision of weights."""
    return io.Combo.Input(
        "dtype", options=["auto", "bfloat16", "float16", "float32"], optional=True, advanced=True, tooltip=tooltip
    )


def window() -> io.DynamicCombo.Input:
    frames = io.Int.Input(
        "frames",
        default=21,
        min=1,
        max=4096,
        tooltip="Latent frames that a chunk attends to, counting the sink and the chunk itself.",
    )
    return choice(
        "window",
        {OWN: [], SO_MANY_FRAMES: [frames], EVERY_FRAME: []},
        "How much of the video a chunk attends to, in latent frames (4 video frames each). With all frames, memory grows "
        "with the video.",
    )


def sink() -> io.DynamicCombo.Input:
    frames = io.Int.Input(
        "frames", default=3, min=0, max=64, tooltip="Latent frames from the start of the video that are always kept."
    )
    return choice(
        "sink",
        {OWN: [], SO_MANY_FRAMES: [frames]},
        "The first latent frames of the video, which never leave the window. Avoids the flicker when frame 0 would leave.",
    )


def positions() -> io.Combo.Input:
    return io.Combo.Input(
        "positions",
        options=[OWN, *POSITIONS],
        optional=True,
        advanced=True,
        tooltip="Where the past counts as being. Absolute: where it was made; a sink moves ever further away. Window: within "
        "the window, with the sink always just before the rest; for videos of more than half a minute.",
    )


def leaving() -> io.DynamicCombo.Input:
    slow, fast = CacheConfig.memory_alphas
    return choice(
        "leaving",
        {
            OWN: [],
            FORGOTTEN: [],
            INTO_SINK: [
                _share(
                    "alpha", CacheConfig.ema_alpha, "How much of the sink stays each time: near 1, it changes slowly."
                )
            ],
            INTO_MEMORY: [
                _share("slow", slow, "How much of what leaves goes into the slow memory frame each time."),
                _share("fast", fast, "How much of what leaves goes into the fast memory frame each time."),
            ],
        },
        "What becomes of frames that leave the window. Averaged into the sink (ema, Reward-Forcing): needs a sink as long as a "
        "chunk. Memory behind the sink (MemRoPE): a slow and a fast average in two frames; needs window positions.",
        optional=True,
        advanced=True,
    )


def switch() -> io.DynamicCombo.Input:
    keep_sink = io.Boolean.Input(
        "keep_sink",
        default=CacheConfig.global_sink,
        tooltip="On: the first frames of the video stay the sink. Off: the first frames of the window become it.",
    )
    return choice(
        "switch",
        {OWN: []} | {way: [keep_sink] if way in RECOMPUTING else [] for way in SWITCHES},
        f"What happens when the prompt changes. {SWITCHING}",
        optional=True,
        advanced=True,
    )


def cache_rules() -> list[io.Input]:
    """All that Attach Rolling Cache asks for beside the model."""
    return [
        window(),
        sink(),
        positions(),
        io.Combo.Input(
            "storage",
            options=list(CACHE_STORAGES),
            optional=True,
            advanced=True,
            tooltip="How the cache keeps its keys and values. Model: the model's own precision. The others take less "
            "memory; the help page says what they cost in exactness.",
        ),
        io.Boolean.Input(
            "offload",
            default=False,
            optional=True,
            advanced=True,
            tooltip="Keep the cache in main memory and bring one layer at a time to the GPU. Slower; for long "
            "windows on small cards.",
        ),
        leaving(),
        switch(),
        io.Combo.Input(
            "context",
            options=[OWN, *CONTEXTS],
            optional=True,
            advanced=True,
            tooltip="Kept: the past is seen once and remembered. Recomputed: the frames in view are seen anew before "
            "every chunk, as Krea Realtime does; slower, and Sample Video then needs a VAE, or a sink of 1.",
        ),
    ]


def guidance(*, advanced: bool) -> io.DynamicCombo.Input:
    strength = io.Float.Input(
        "strength", default=3.0, min=0.0, max=30.0, step=0.1, tooltip="How strongly the prompt is followed. 1 is off."
    )
    return choice(
        "guidance",
        {OWN: [], OFF: [], THIS_STRENGTH: [strength]},
        "Classifier-free guidance. Off is right for distilled few-step models. A strength needs a negative prompt, twice "
        "the time and twice the cache.",
        optional=True,
        advanced=advanced,
    )


def fps() -> io.DynamicCombo.Input:
    rate = io.Float.Input("rate", default=16.0, min=1.0, max=120.0, step=1.0, tooltip="Frames per second of the file.")
    return choice(
        "fps",
        {OWN: [], SO_MANY: [rate]},
        "Frames per second of the file. The models make 16, those with the latents of Wan 2.2 5B 24; another number changes "
        "the speed, not the motion.",
        optional=True,
        advanced=True,
    )


def take() -> io.DynamicCombo.Input:
    def seconds(which: str) -> io.Float.Input:
        return io.Float.Input(
            "seconds",
            default=2.0,
            min=0.05,
            max=86400.0,
            step=0.05,
            round=False,
            tooltip=f"How much to take {which}. Rounded up to whole latent frames.",
        )

    return choice(
        "take",
        {ALL: [], FIRST_SECONDS: [seconds("from the beginning")], LAST_SECONDS: [seconds("from the end")]},
        "Which part of a video is encoded. The last seconds end with its very last frame: the right ones to go on from.",
        optional=True,
    )


def source_fps() -> io.DynamicCombo.Input:
    rate = io.Float.Input(
        "rate", default=30.0, min=0.1, max=1000.0, step=0.01, round=False, tooltip="Frames per second."
    )
    return choice(
        "source_fps",
        {OWN: [], SO_MANY: [rate]},
        "How many of the images make a second: as many as the model makes (16; Wan 2.2 5B: 24), or this many, of which the "
        "right ones are taken. A video tells it itself.",
        optional=True,
        advanced=True,
    )


def switch_to() -> io.DynamicCombo.Input:
    """How one sampler takes up its prompt."""
    chunks = io.Int.Input(
        "chunks",
        default=BLEND_CHUNKS,
        min=2,
        max=1000,
        tooltip="Over how many chunks the old prompt becomes the new one.",
    )
    curve = io.Combo.Input(
        "curve",
        options=list(CURVES),
        default=CURVES[0],
        optional=True,
        tooltip="Linear: on a straight line. Slerp: on an arc, on which each token of the prompt keeps its length.",
    )
    return choice(
        "switch",
        {OWN: []} | {way: [] for way in SWITCHES} | {BLEND: [chunks, curve]},
        f"How a continued video takes up the new prompt. {SWITCHING} Blend: from one prompt to the other, little by little. "
        "The model's own does nothing where the prompt is the same.",
        optional=True,
        advanced=True,
    )


def batch_size() -> io.Int.Input:
    return io.Int.Input(
        "batch_size",
        default=1,
        min=1,
        max=64,
        optional=True,
        advanced=True,
        tooltip="Videos side by side, with the seeds seed, seed + 1, and so on: each is what it is alone with its seed. A state or "
        "an initial latent brings its own number: leave this at 1 there.",
    )


def positive() -> io.MultiType.Input:
    return io.MultiType.Input(
        "positive",
        [io.Conditioning, Schedule],
        tooltip="From Encode Prompt, or CLIP Text Encode with a Wan CLIP (umt5_xxl). For several prompts from "
        "Prompt Schedule.",
    )


def text_encoder() -> io.MultiType.Input:
    return io.MultiType.Input(
        "text_encoder",
        [TextEncoder, io.Clip],
        tooltip="From Load Text Encoder (UMT5), or Load CLIP with type wan (umt5_xxl).",
    )


def negative() -> io.Conditioning.Input:
    return io.Conditioning.Input("negative", optional=True, tooltip="What to avoid. Only read when there is guidance.")


def seed() -> io.Int.Input:
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=0xFFFFFFFFFFFFFFFF,
        control_after_generate=True,
        tooltip="Same seed, same video; also when it is made in several pieces.",
    )


def initial_latent() -> io.Latent.Input:
    return io.Latent.Input(
        "initial_latent",
        optional=True,
        tooltip="Frames to start from: an image (image to video) or a video (extension), from Encode Video or "
        "VAE Encode.",
    )


def enlarge() -> io.Int.Input:
    return io.Int.Input(
        "enlarge",
        default=1,
        min=1,
        max=16,
        optional=True,
        advanced=True,
        tooltip="Repeat each pixel this many times in both directions. For very small videos.",
    )


def encoder() -> io.Combo.Input:
    return io.Combo.Input(
        "encoder",
        options=list(ENCODERS),
        optional=True,
        advanced=True,
        tooltip="What encodes the video. x264 works on the CPU, and gives the same file every time. The others are those of an "
        "NVIDIA GPU; where they do not open, x264 does it. HEVC makes smaller files, which fewer browsers play.",
    )


def _share(name: str, default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.001, tooltip=tooltip)


def window_of(chosen: dict) -> dict:
    """The cache settings that `window` gives; none for the model's own, here and below."""
    windows = {SO_MANY_FRAMES: chosen.get("frames"), EVERY_FRAME: ALL_FRAMES}
    return {"window": windows[chosen["window"]]} if chosen["window"] in windows else {}


def sink_of(chosen: dict) -> dict:
    """The cache settings that `sink` gives."""
    return {"sink": chosen["frames"]} if "frames" in chosen else {}


def positions_of(chosen: str) -> dict:
    """The cache settings that `positions` gives."""
    return {} if chosen == OWN else {"positions": chosen}


def leaving_of(chosen: dict | None) -> dict:
    """The cache settings that `leaving` gives, None where it was left out."""
    chosen = chosen or {"leaving": OWN}
    slow, fast = CacheConfig.memory_alphas
    rules = {
        OWN: {},
        FORGOTTEN: {"leaving": "drop"},
        INTO_SINK: {"leaving": "ema", "ema_alpha": chosen.get("alpha", CacheConfig.ema_alpha)},
        INTO_MEMORY: {"leaving": "memory", "memory_alphas": (chosen.get("slow", slow), chosen.get("fast", fast))},
    }
    return rules[chosen["leaving"]]


def switch_of(chosen: dict | None) -> dict:
    """The cache settings that `switch` gives, None where it was left out."""
    chosen = chosen or {"switch": OWN}
    rules = {} if chosen["switch"] == OWN else {"switch": chosen["switch"]}
    return rules | ({"global_sink": chosen["keep_sink"]} if "keep_sink" in chosen else {})


def cache_of(
    cache: CacheConfig, window: dict | None = None, sink: dict | None = None, positions: str = OWN, storage: str = "model",
    offload: bool = False, leaving: dict | None = None, switch: dict | None = None, context: str = OWN,
) -> CacheConfig:  # fmt: skip
    """The cache settings of a model with what `cache_rules` give. Raises ValueError for rules that do not go together."""
    rules = window_of(window or {"window": OWN}) | sink_of(sink or {"sink": OWN}) | positions_of(positions)
    rules |= leaving_of(leaving) | switch_of(switch)
    rules |= {} if context == OWN else {"context": context}
    return cache.with_rules(**rules, storage=storage, offload=offload)


def switch_to_of(chosen: dict | None) -> tuple[str | None, int, str]:
    """The engine's switch, and chunks and curve of a blend, that `switch_to` gives: None for the model's own, 1 for no blend."""
    chosen = chosen or {"switch": OWN}
    if chosen["switch"] == BLEND:
        return "hold", chosen.get("chunks", BLEND_CHUNKS), chosen.get("curve", CURVES[0])
    return None if chosen["switch"] == OWN else chosen["switch"], 1, CURVES[0]


def seeds_of(seed: int, videos: int) -> list[int]:
    """The seeds that `seed` and `batch_size` give: behind the largest comes 0."""
    return [(seed + video) % SEEDS for video in range(videos)]


def with_guidance(sampling: SamplingConfig, chosen: dict | None) -> SamplingConfig:
    """The sampling settings with what `guidance` gives, None where it was left out."""
    chosen = chosen or {"guidance": OWN}
    scales = {OWN: sampling.guidance_scale, OFF: 1.0, THIS_STRENGTH: chosen.get("strength")}
    return replace(sampling, guidance_scale=scales[chosen["guidance"]])


def take_of(chosen: dict | None) -> tuple[str, float]:
    """What is taken of a source, and how many seconds of it, as `Clip.of` reads them; all where it was left out."""
    chosen = chosen or {"take": ALL}
    takes = {ALL: "all", FIRST_SECONDS: "first", LAST_SECONDS: "last"}
    return takes[chosen["take"]], chosen.get("seconds", 2.0)


def source_fps_of(geometry: Geometry, chosen: dict | None) -> Fraction:
    """The rate that `source_fps` gives for images that a model of that geometry reads, None where it was left out."""
    return Fraction((chosen or {}).get("rate", geometry.fps)).limit_denominator(1001)


def fps_of(geometry: Geometry, chosen: dict | None) -> float:
    """The rate that `fps` gives for a model of that geometry, None where it was left out."""
    return (chosen or {}).get("rate", geometry.fps)
