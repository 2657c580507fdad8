"""The example workflows, each described in short: its nodes and their values, its columns and its notes.

A node is its class, its values, and the files that it needs: {"name": ("RollingKVLoadVAE", {"vae_name": …}, [VAE])}. A value
"name.0" is a link to the first output of that node. "after" names the example that has to run first.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from rolling_kv.geometry import WAN_21
from rolling_kv.presets import DEFAULT_PRESET, PRESETS, TEXT_ENCODER_FILES, VAE_FILE, ModelFile, ModelPreset

from .readme import link

TINY, STRIPES = "tiny (bundled)", "stripes (bundled)"
CIRCLE, SQUARE = "a red circle moving right", "a blue circle moving right"
LONGLIVE_SCHEDULE = """0: A wide shot of a lighthouse on a cliff at dusk, waves breaking below, warm light in its window, in a painterly style.
10: A storm rises over the same lighthouse, dark clouds and heavy rain, its beam cuts through the night.
20: The storm has passed over the lighthouse, calm sea, a golden sunrise behind it."""
FORK_STATE = "states/rolling_kv_fork"
SCHEDULE = f"0: {CIRCLE}\n2.5: {SQUARE} [recache]\n5: a green square moving left [cut]"

LOADERS = {
    "model": ("RollingKVLoadModel", {"model_name": TINY}),
    "text_encoder": ("RollingKVLoadTextEncoder", {"text_encoder_name": TINY}),
    "vae": ("RollingKVLoadVAE", {"vae_name": TINY}),
    "cache": ("RollingKVAttachCache", {"model": "model.0"}),
}


def real_model(first: str, preset: ModelPreset, then: str) -> str:
    """Note on the files of a real model. first: a sentence in front; preset: whose weights; then: what to set."""
    return f"""## With a real model
{first}Put into ComfyUI's model folders, choose them in the three loaders, press R first if they do not show:
- `models/diffusion_models`: {link(preset.files[0])} ({preset.title}), or another causal Wan model
- `models/text_encoders`: {link(TEXT_ENCODER_FILES[0])}
- `models/vae`: {link(VAE_FILE)}

{then}"""


def multi_step_model(then: str) -> str:
    first = "Step caches help models that sample in many steps. "
    return real_model(first, PRESETS["causal-multistep"], then).replace("causal Wan model", "one that is not distilled")


REAL_MODELS = real_model("", DEFAULT_PRESET, "Then set the size to 832 x 480 and **enlarge** in Decode Video to 1.")


class Download(NamedTuple):
    """A file that a node needs: the frontend says where it is missing, and from where to get it."""

    name: str
    url: str
    directory: str

    @classmethod
    def of(cls, file: ModelFile, directory: str) -> Download:
        return cls(Path(file.url).name, file.url, directory)


TEXT_ENCODER = Download.of(TEXT_ENCODER_FILES[0], "text_encoders")
VAE = Download.of(VAE_FILE, "vae")
SELF_FORCING = Download.of(DEFAULT_PRESET.files[0], "diffusion_models")
LONGLIVE = Download.of(PRESETS["longlive"].files[0], "diffusion_models")
LONGLIVE_LORA = Download("lora.pt", LONGLIVE.url.replace(LONGLIVE.name, "lora.pt"), "loras")


def real_loaders(model: Download) -> dict:
    """The loaders, each with the file that it needs as the third part."""
    return {
        "model": ("RollingKVLoadModel", {"model_name": model.name}, [model]),
        "text_encoder": ("RollingKVLoadTextEncoder", {"text_encoder_name": TEXT_ENCODER.name}, [TEXT_ENCODER]),
        "vae": ("RollingKVLoadVAE", {"vae_name": VAE.name}, [VAE]),
    }


def real_size(inputs: dict) -> dict:
    """The inputs of a sampler at the size that the models were trained at."""
    height, width = WAN_21.size
    return {"length_unit": "seconds", "seed": 1, "width": width, "height": height} | inputs


def prompt(text: str) -> tuple:
    return "RollingKVEncodePrompt", {"text_encoder": "text_encoder.0", "text": text}


def sample(positive: str, length: float, seed: int, **inputs) -> tuple:
    values = {"model": "cache.0", "positive": positive, "length": length, "length_unit": "seconds", "seed": seed}
    return "RollingKVSample", values | {"width": 64, "height": 64} | inputs


def decode(latent: str) -> tuple:
    return "RollingKVDecodeVideo", {"vae": "vae.0", "latent": latent, "enlarge": 6}


def output(latent: str, name: str, prefix: str = "") -> dict:
    return {
        f"{prefix}decode": decode(latent),
        f"{prefix}save": ("SaveVideo", {"video": f"{prefix}decode.0", "filename_prefix": f"video/{name}"}),
    }


def compared(first: str, second: str, first_name: str, second_name: str) -> dict:
    """Two samplers' videos, played side by side under these names."""
    videos = {"first": f"{first}_decode.0", "second": f"{second}_decode.0"}
    names = {"first_name": first_name, "second_name": second_name}
    return {
        f"{first}_decode": decode(f"{first}.0"),
        f"{second}_decode": decode(f"{second}.0"),
        "compare": ("RollingKVCompareVideos", videos | names),
    }


def encode(video: str, **inputs) -> tuple:
    return "RollingKVEncodeVideo", {"vae": "vae.0", "images": video, "width": 64, "height": 64} | inputs


def from_own_video(name: str, encoded: dict, made: tuple, note: str) -> dict:
    """A workflow that makes a video of another one, for which a first sampler stands.

    name: of the file. encoded: how Encode Video takes that video. made: the sampler that reads it. note: what it is about.
    """
    return {
        "nodes": LOADERS
        | {
            "first_prompt": prompt(CIRCLE),
            "own": sample("first_prompt.0", 3.0, 1),
            "video": ("RollingKVDecodeVideo", {"vae": "vae.0", "latent": "own.0"}),
            "encode": encode("video.0", **encoded),
            "second_prompt": prompt(SQUARE),
            "sample": made,
        }
        | output("sample.0", name),
        "sizes": {"encode": (340, 420)},
        "columns": [
            "model text_encoder vae",
            "cache first_prompt second_prompt",
            "own video",
            "encode",
            "sample",
            "decode",
            "save",
        ],
        "notes": [(0, (340, 300), note), (1, (720, 270), REAL_MODELS)],
    }


TEXT_TO_VIDEO = LOADERS | {"prompt": prompt(CIRCLE), "sample": sample("prompt.0", 5.0, 1)}

WORKFLOWS = {
    "rolling_kv_text_to_video": {
        "nodes": TEXT_TO_VIDEO | output("sample.0", "rolling_kv_t2v"),
        "columns": ["model text_encoder", "cache prompt", "sample vae", "decode", "save"],
        "notes": [
            (
                0,
                (340, 210),
                "## Text to video\nThe model writes the video chunk by chunk; each chunk sees the "
                "frames before it through the rolling cache. **length** may be as long as you like: memory stays the same.",
            ),
            (1, (720, 270), REAL_MODELS),
        ],
    },
    "rolling_kv_image_to_video": {
        "nodes": LOADERS
        | {
            "prompt": prompt(CIRCLE),
            "image": ("LoadImage", {"image": "example.png"}),
            "encode": encode("image.0"),
            "sample": sample("prompt.0", 3.0, 1, initial_latent="encode.0"),
        }
        | output("sample.0", "rolling_kv_i2v"),
        "columns": ["model text_encoder image vae", "cache prompt encode", "sample", "decode", "save"],
        "notes": [
            (
                0,
                (340, 270),
                "## Image to video\nThe image becomes the first frame of the video. To extend a "
                "video instead, see the workflow rolling_kv_extend_video. The size is that of Encode "
                "Video; width and height of Sample Video are ignored.",
            ),
            (1, (720, 270), REAL_MODELS),
        ],
    },
    "rolling_kv_two_prompts": {
        "nodes": LOADERS
        | {
            "first_prompt": prompt(CIRCLE),
            "second_prompt": prompt(SQUARE),
            "first": sample("first_prompt.0", 3.0, 1),
            "second": sample("second_prompt.0", 3.0, 1, state="first.1"),
        }
        | output("second.0", "rolling_kv_two_prompts"),
        "columns": ["model text_encoder", "cache first_prompt second_prompt", "first", "second vae", "decode", "save"],
        "notes": [
            (
                0,
                (340, 270),
                "## Two prompts\nThe second sampler continues exactly where the first one stopped: "
                "its **state** input is the first one's output. Chain as many as you like. When you change the second "
                "prompt, only the second sampler runs again. How fast the new prompt takes hold is up to its **switch** (an "
                "advanced input).",
            ),
            (1, (720, 270), REAL_MODELS),
        ],
    },
    "rolling_kv_prompt_schedule": {
        "nodes": LOADERS
        | {
            "schedule": (
                "RollingKVPromptSchedule",
                {"model": "cache.0", "text_encoder": "text_encoder.0", "text": SCHEDULE},
            ),
            "sample": sample("schedule.0", 8.0, 1),
        }
        | output("sample.0", "rolling_kv_prompt_schedule"),
        "sizes": {"schedule": (340, 240)},
        "columns": ["model text_encoder", "cache vae", "schedule", "sample", "decode", "save"],
        "notes": [
            (
                0,
                (340, 270),
                "## Prompt schedule\n**Prompt Schedule** goes where one prompt would go: each line is a prompt and the second that "
                "it begins at, with how it begins in brackets: `[hold]`, `[recache]`, `[flush]`, `[cut]` or `[blend 3]` (over 3 "
                "chunks). After a run node and sampler show what they have understood, with the times of the chunks. "
                "Set **length_unit** to `schedule` to make as much as the schedule says.",
            ),
            (1, (720, 270), REAL_MODELS),
        ],
    },
    "rolling_kv_step_cache": {
        "nodes": LOADERS
        | {
            "model": ("RollingKVLoadModel", {"model_name": TINY, "preset": "causal-multistep"}),
            "cache": (
                "RollingKVStepCache",
                {"model": "model.0", "method": "TaylorSeer", "method.cache_interval": 3},
            ),
            "prompt": prompt(CIRCLE),
            "negative": prompt(""),
            "sample": sample("prompt.0", 2.0, 1, negative="negative.0"),
        }
        | output("sample.0", "rolling_kv_step_cache"),
        "columns": [
            "model text_encoder",
            "prompt negative cache",
            "sample vae",
            "decode",
            "save",
        ],  # other methods are taller
        "notes": [
            (
                0,
                (340, 270),
                "## Step cache\nMany steps, and most of what they compute hardly changes from one to the next: **Step Cache** "
                "leaves part of it out. After the run **Sample Video** says how much. Bypass the node to compare; the "
                "workflow rolling_kv_benchmark measures all methods.",
            ),
            (2, (720, 300), multi_step_model("Keep the preset, set the size to 832 x 480 and **enlarge** to 1.")),
        ],
    },
    "rolling_kv_benchmark": {
        "nodes": {name: node for name, node in LOADERS.items() if name != "cache"}
        | {
            "prompt": prompt(CIRCLE),
            "negative": prompt(""),
            "benchmark": (
                "RollingKVBenchmark",
                {
                    "model": "model.0",
                    "positive": "prompt.0",
                    "negative": "negative.0",
                    "vae": "vae.0",
                    "steps": "this many",
                    "steps.count": 12,
                    "guidance": "this strength",
                    "guidance.strength": 3,
                    "chunks": 1,
                    "width": 64,
                    "height": 64,
                },
            ),
        },
        "sizes": {"benchmark": (840, 440)},
        "columns": ["model text_encoder vae", "prompt negative", "benchmark"],  # which grows when it shows its table
        "notes": [
            (
                0,
                (340, 270),
                "## Which step cache for this model?\n**Benchmark Step Caches** makes the same short video with every method, "
                "from gentle to strong, and shows table and plot when it is done. Choose there, then set the method in "
                "**Step Cache**.",
            ),
            (
                1,
                (340, 460),
                multi_step_model(
                    "Set **steps** (50), **width**, **height** and **guidance** to what you will work with: the figures hold "
                    "for that."
                ),
            ),
        ],
    },
    "rolling_kv_stream": {
        "nodes": LOADERS
        | {
            "schedule": (
                "RollingKVPromptSchedule",
                {"model": "cache.0", "text_encoder": "text_encoder.0", "text": SCHEDULE},
            ),
            "stream": (
                "RollingKVStreamVideo",
                {
                    "model": "cache.0",
                    "positive": "schedule.0",
                    "vae": "vae.0",
                    "seconds": 8.0,
                    "seed": 1,
                    "width": 64,
                    "height": 64,
                    "enlarge": 6,
                },
            ),
        },
        "sizes": {"schedule": (340, 240), "stream": (400, 640)},
        "columns": ["model text_encoder", "cache vae", "schedule", "stream"],
        "notes": [
            (
                0,
                (340, 300),
                "## Stream to disk\n**Stream Video** writes the video while it makes it, so memory does not grow with its "
                "length. **seconds** 0 goes on until you cancel. Cancel whenever you like: the video so far stays in the output "
                "folder, and a state beside it from which Load State goes on. Should the computer stop, the file that was "
                "growing plays, and Load State reads its journal.",
            ),
            (1, (720, 270), real_model("", DEFAULT_PRESET, "Then set the size to 832 x 480 and **enlarge** to 1.")),
        ],
    },
    "rolling_kv_fork": {
        "nodes": LOADERS
        | {
            "first_prompt": prompt(CIRCLE),
            "blue_prompt": prompt(SQUARE),
            "yellow_prompt": prompt(CIRCLE.replace("red", "yellow")),
            "first": sample("first_prompt.0", 3.0, 1),
            "keep": ("RollingKVSaveState", {"state": "first.1", "filename_prefix": FORK_STATE}),
            "blue": sample("blue_prompt.0", 2.0, 1, state="first.1"),
            "yellow": sample("yellow_prompt.0", 2.0, 1, state="first.1"),
        }
        | output("blue.0", "rolling_kv_fork_blue", "blue_")
        | output("yellow.0", "rolling_kv_fork_yellow", "yellow_"),
        "columns": [
            "model text_encoder vae",
            "cache first_prompt blue_prompt yellow_prompt",
            "first keep",
            "blue yellow",
            "blue_decode yellow_decode",
            "blue_save yellow_save",
        ],
        "notes": [
            (
                0,
                (340, 300),
                "## Fork\nA state is a value: two samplers go on from the same one, each in its own way, and neither changes what "
                "the other gets. **Save State** puts it on disk; another day **Load State** takes the place of the first "
                "sampler, and the video goes on bit for bit.",
            ),
            (1, (720, 270), REAL_MODELS),
        ],
    },
    "rolling_kv_continue": {
        "after": "rolling_kv_fork",
        "nodes": LOADERS
        | {
            "load": (
                "RollingKVLoadState",
                {"state_name": f"{FORK_STATE}_00001_.safetensors [output]", "model": "cache.0"},
            ),
            "prompt": prompt("a yellow square moving left"),
            "look": ("RollingKVInspectState", {"state": "load.0", "model": "cache.0", "vae": "vae.0"}),
            "sample": sample("prompt.0", 2.0, 1, state="load.0"),
            "decode": ("RollingKVDecodeImages", {"vae": "vae.0", "latent": "sample.0"}),
            "enlarge": ("ImageScaleBy", {"image": "decode.0", "upscale_method": "nearest-exact", "scale_by": 6.0}),
            "video": ("CreateVideo", {"images": "enlarge.0", "fps": WAN_21.fps}),
            "save": ("SaveVideo", {"video": "video.0", "filename_prefix": "video/rolling_kv_continue"}),
        },
        "sizes": {"look": (560, 440)},
        "columns": ["model text_encoder vae", "cache prompt load", "sample", "decode enlarge video", "save", "look"],
        "notes": [
            (
                0,
                (340, 300),
                "## Continue another day\n**Load State** brings back what **Save State** has put away, here by the workflow "
                "rolling_kv_fork: run that first, then press R. The video goes on bit for bit as if it had never stopped, with "
                "any prompt. **Inspect State** shows what is in a state.\n\n**Decode Images** gives pictures, for nodes that "
                "work on images; Decode Video would need less memory.",
            ),
            (
                1,
                (720, 270),
                real_model(
                    "", DEFAULT_PRESET, "Then make the state with that model, and leave out the node that enlarges."
                ),
            ),
        ],
    },
    "rolling_kv_extend_video": from_own_video(
        "rolling_kv_extend",
        {"take": "the last seconds", "take.seconds": 2.0},
        sample("second_prompt.0", 3.0, 1, initial_latent="encode.0"),
        "## Extend a video\nThe last seconds of a video become the past of a new one, which goes on from there. The first "
        "sampler stands for a video of your own: connect **Load Video** to Encode Video instead. Any size and rate "
        "will do; after a run Encode Video shows what it has taken.",
    ),
    "rolling_kv_video_to_video": from_own_video(
        "rolling_kv_v2v",
        {},
        sample("second_prompt.0", 3.0, 2, source="encode.0", length_unit="source"),
        "## Video to video\nEach chunk begins as the video with noise on it, instead of as noise alone: the motion stays, "
        "and the prompt decides what moves. **strength** (an advanced input) says how far it may go. The first "
        "sampler stands for a video of your own: connect **Load Video** to Encode Video instead.",
    ),
    "rolling_kv_compare": {
        "nodes": LOADERS
        | {
            "prompt": prompt(CIRCLE),
            "first": sample("prompt.0", 5.0, 1),
            "second": sample("prompt.0", 5.0, 2),
        }
        | compared("first", "second", "seed 1", "seed 2"),
        "columns": [
            "model text_encoder vae",
            "cache prompt",
            "first second",
            "first_decode second_decode",
            "compare",
        ],
        "notes": [
            (
                0,
                (340, 270),
                "## Compare\nOne prompt, two seeds. After a run **Compare Videos** plays both in step: drag the wipe, or set them side by "
                "side. Compare schedules or two settings of the cache in the same way.",
            ),
            (1, (720, 270), REAL_MODELS),
        ],
    },
    "rolling_kv_lora": {
        "nodes": LOADERS
        | {
            "lora": ("RollingKVLoadLoRA", {"model": "cache.0", "lora_name": STRIPES}),
            "prompt": prompt(CIRCLE),
            "plain": sample("prompt.0", 3.0, 1),
            "striped": sample("prompt.0", 3.0, 1, model="lora.0"),
        }
        | compared("plain", "striped", "without", "with the LoRA"),
        "columns": [
            "model text_encoder vae",
            "cache prompt lora",
            "plain striped",
            "plain_decode striped_decode",
            "compare",
        ],
        "notes": [
            (
                0,
                (340, 270),
                "## A LoRA\n**Load LoRA** changes the model of one branch, here with the stripes that come with the bundled model; "
                "the other branch keeps it as it was. Both have one seed, so all else is the same. **strength** says how much of "
                "it, and several of these nodes in a row add up.",
            ),
            (1, (720, 270), REAL_MODELS),
        ],
    },
    "rolling_kv_batch": {
        "nodes": LOADERS
        | {"prompt": prompt(CIRCLE), "sample": sample("prompt.0", 3.0, 1, batch_size=3)}
        | output("sample.0", "rolling_kv_batch"),
        "columns": ["model text_encoder", "cache prompt", "sample vae", "decode", "save"],
        "notes": [
            (
                0,
                (340, 270),
                "## A batch\nThree videos side by side, with the seeds 1, 2 and 3: each is what it is alone with its seed, so choose "
                "the best and make only that one longer. **batch_size** is an advanced input.",
            ),
            (1, (720, 270), REAL_MODELS),
        ],
    },
    "rolling_kv_self_forcing": {
        "nodes": real_loaders(SELF_FORCING)
        | {
            "cache": LOADERS["cache"],
            "prompt": prompt(
                "A red fox runs through deep snow at the edge of a pine forest, powder flying from its paws. The camera follows "
                "it at eye level in soft morning light."
            ),
            "sample": ("RollingKVSample", real_size({"model": "cache.0", "positive": "prompt.0", "length": 10.0})),
            "decode": ("RollingKVDecodeVideo", {"vae": "vae.0", "latent": "sample.0"}),
            "save": ("SaveVideo", {"video": "decode.0", "filename_prefix": "video/rolling_kv_self_forcing"}),
        },
        "columns": ["model text_encoder", "cache prompt", "sample vae", "decode", "save"],
        "notes": [
            (
                0,
                (340, 300),
                "## Self-Forcing, 1.3B\nTen seconds at 832 x 480 in four steps per chunk, with the settings that the model was "
                "trained for. It wants long prompts that describe the picture. For less memory choose another **storage** in Attach "
                "Rolling Cache, or a smaller size.",
            ),
            (1, (720, 270), real_model("", DEFAULT_PRESET, "Other models: see docs/models.md.")),
        ],
    },
    "rolling_kv_longlive": {
        "nodes": real_loaders(LONGLIVE)
        | {
            "lora": (
                "RollingKVLoadLoRA",
                {"model": "model.0", "lora_name": LONGLIVE_LORA.name, "strength": 1.0},
                [LONGLIVE_LORA],
            ),
            "cache": ("RollingKVAttachCache", {"model": "lora.0"}),
            "schedule": (
                "RollingKVPromptSchedule",
                {"model": "cache.0", "text_encoder": "text_encoder.0", "text": LONGLIVE_SCHEDULE},
            ),
            "sample": (
                "RollingKVSample",
                real_size({"model": "cache.0", "positive": "schedule.0", "length_unit": "schedule", "length": 10.0}),
            ),
            "decode": ("RollingKVDecodeVideo", {"vae": "vae.0", "latent": "sample.0"}),
            "save": ("SaveVideo", {"video": "decode.0", "filename_prefix": "video/rolling_kv_longlive"}),
        },
        "sizes": {"schedule": (340, 240)},
        "columns": ["model text_encoder", "lora cache", "schedule vae", "sample", "decode", "save"],
        "notes": [
            (
                0,
                (340, 300),
                "## LongLive, 1.3B\nHalf a minute with three prompts. LongLive sees its window anew when the prompt changes, so a "
                "new one takes hold within a second. Its weights are a base and a LoRA, **lora.pt**, which Load LoRA puts "
                "on top.",
            ),
            (
                1,
                (720, 300),
                real_model(
                    "",
                    PRESETS["longlive"],
                    f"- `models/loras`: [{LONGLIVE_LORA.name}]({LONGLIVE_LORA.url})\n\nFor videos of "
                    "more than half a minute choose the preset `longlive-infinity`.",
                ),
            ),
        ],
    },
    "quickstart": {
        "api_only": True,
        "nodes": TEXT_TO_VIDEO | output("sample.0", "rolling_kv_quickstart"),
        "columns": ["model text_encoder", "cache prompt", "sample vae", "decode", "save"],
        "notes": [],
    },
}
