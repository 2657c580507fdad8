"""Where model files are looked for, how combos name them, and what to say when one is missing."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import folder_paths

from ..rolling_kv.bundled import BUNDLED

BUNDLED_NAME = "tiny (bundled)"


class Kind(NamedTuple):
    """One kind of model file: ComfyUI's folder for it, its place in a diffusers folder, and where to get it."""

    title: str
    folder: str
    subfolder: str
    link: str


MODEL = Kind(
    "model",
    "diffusion_models",
    "transformer",
    "https://huggingface.co/gdhe17/Self-Forcing/resolve/main/checkpoints/self_forcing_dmd.pt",
)
TEXT_ENCODER = Kind(
    "text encoder",
    "text_encoders",
    "text_encoder",
    "https://huggingface.co/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files/text_encoders/"
    "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
)
VAE = Kind(
    "VAE",
    "vae",
    "vae",
    "https://huggingface.co/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files/vae/wan_2.1_vae.safetensors",
)
SUFFIXES = (".safetensors", ".sft", ".pt", ".pth", ".ckpt", ".bin")


def choices(kind: Kind) -> list[str]:
    """Names for a combo: the bundled model, single files, then diffusers folders in models/diffusers."""
    names = [BUNDLED_NAME] if (BUNDLED / kind.subfolder).is_dir() else []
    names += [name for name in folder_paths.get_filename_list(kind.folder) if name.lower().endswith(SUFFIXES)]
    if kind is MODEL:  # ComfyUI does not list these
        files = (folder_paths.recursive_search(root)[0] for root in folder_paths.get_folder_paths(kind.folder))
        names += sorted(name for found in files for name in found if name.lower().endswith(".gguf"))
    for root in map(Path, folder_paths.get_folder_paths("diffusers")):
        if root.is_dir():
            names += sorted(path.name for path in root.iterdir() if (path / kind.subfolder).is_dir())
    return names


def find(kind: Kind, name: str) -> Path | None:
    """The file or folder that a combo's `name` stands for, with either kind of slash; None if there is none."""
    if name == BUNDLED_NAME:
        return BUNDLED if (BUNDLED / kind.subfolder).is_dir() else None
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or Path(name).is_absolute():
        return None
    single = folder_paths.get_full_path(kind.folder, str(Path(*parts)))
    if single is not None:
        return Path(single)
    folders = (Path(root, *parts) for root in folder_paths.get_folder_paths("diffusers"))
    return next((folder for folder in folders if (folder / kind.subfolder).is_dir()), None)


def check(kind: Kind, name: str) -> bool | str:
    """For `validate_inputs`: True, or what to do about a missing file."""
    if find(kind, name) is not None:
        return True
    places = " or ".join(folder_paths.get_folder_paths(kind.folder))
    return (
        f"The {kind.title} {name!r} was not found. Put the file into {places} (or a diffusers folder into "
        f"models/diffusers), then press R to refresh. One that works: {kind.link}"
    )
