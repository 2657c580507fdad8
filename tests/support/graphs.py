"""API prompts with the bundled tiny model, put together in a line or two, and what they saved."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load

PACK = Path(__file__).parents[2]
TINY = "tiny (bundled)"


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def chosen(name: str, choice: str, **brought) -> dict:
    """A dynamic combo at that choice, with the inputs that it brings."""
    return {name: choice} | {f"{name}.{key}": value for key, value in brought.items()}


def loaders(model=TINY, text_encoder=TINY, vae=TINY) -> dict:
    """The nodes "model", "text_encoder" and "vae"."""
    return {
        "model": node("RollingKVLoadModel", model_name=model, preset="auto", dtype="auto"),
        "text_encoder": node("RollingKVLoadTextEncoder", text_encoder_name=text_encoder, dtype="auto"),
        "vae": node("RollingKVLoadVAE", vae_name=vae, dtype="auto"),
    }


def prompt(text: str) -> dict:
    return node("RollingKVEncodePrompt", text_encoder=["text_encoder", 0], text=text)


def sample(chunks: int, seed: int = 1, positive: str = "positive", size: int = 64, **inputs) -> dict:
    """A sampler of `chunks` chunks that reads the node "model"; `inputs` override or add."""
    values = {"model": ["model", 0], "positive": [positive, 0], "length": chunks, "length_unit": "chunks", "seed": seed}
    return node("RollingKVSample", **{**values, "width": size, "height": size, **inputs})


def save_latent(source: str) -> dict:
    return node("SaveLatent", samples=[source, 0], filename_prefix="test")


def save_images(source: str) -> dict:
    return node("SaveImage", images=[source, 0], filename_prefix="test")


def save_video(source: str) -> dict:
    return node("SaveVideo", video=[source, 0], filename_prefix="video/test", format="auto", codec="auto")


def one_sampler(chunks: int = 2, seed: int = 1, **inputs) -> dict:
    """A whole prompt: one sampler whose latent the node "save" saves."""
    return {
        **loaders(),
        "positive": prompt("a red circle moving right"),
        "sample": sample(chunks, seed, **inputs),
        "save": save_latent("sample"),
    }


def saved_latent(client, outputs: dict, name: str = "save") -> torch.Tensor:
    """The latent [1, 16, frames, height, width] that a SaveLatent node wrote."""
    return load(client.view(outputs[name]["latents"][0]))["latent_tensor"]


def saved_images(client, outputs: dict, name: str) -> np.ndarray:
    """The images [frames, height, width, 3] of 0 to 255 that a SaveImage node wrote."""
    files = outputs[name]["images"]
    images = (Image.open(io.BytesIO(client.view(file))).convert("RGB") for file in files)
    return np.stack([np.asarray(image, dtype=int) for image in images])


class Video(NamedTuple):
    frames: np.ndarray  # [frames, height, width, 3] of 0 to 255
    rate: float
    codec: str


def read_video(data: bytes) -> Video:
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        return Video(frames, float(stream.average_rate), stream.codec_context.name)


def bring_state(client, prompt: dict) -> None:
    """Have the server make the state that an example loads, by the example that saves it, unless it is there."""
    schema = client.object_info("RollingKVLoadState")["RollingKVLoadState"]
    there = schema["input"]["required"]["state_name"][1]["options"]
    loaded = {node["inputs"]["state_name"] for node in prompt.values() if node["class_type"] == "RollingKVLoadState"}
    if loaded - set(there):
        client.run(api_prompts()["fork"])


def api_prompts() -> dict[str, dict]:
    """The prompts of workflows/api by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (PACK / "workflows/api").glob("*.json")}
