"""The README's tables of files and models, from the records of the presets."""

from __future__ import annotations

import re

from rolling_kv.presets import PRESETS, TEXT_ENCODER_FILES, VAE_FILE, VAE_FILE_22, ModelFile

from ..comfyui.env import PACK
from .files import write

README = PACK / "README.md"


def tables() -> str:
    """Which files there are, where they go, and what each model was trained for, as Markdown."""
    files = [
        ["", "File", "Folder"],
        ["Text encoder", " or ".join(map(link, TEXT_ENCODER_FILES)), "`models/text_encoders`"],
        ["VAE", f"{link(VAE_FILE)}; {described(VAE_FILE_22)}", "`models/vae`"],
        ["One of the models below", "", "`models/diffusion_models`"],
    ]
    models, above = [["Model", "File", "Preset", "Trained for"]], None
    for preset in PRESETS.values():
        same_family = above and preset.title == above.title
        title = "" if same_family else preset.title
        weights = "" if same_family and preset.files == above.files else ", ".join(map(described, preset.files))
        models.append([title, weights, f"`{preset.name}`", preset.trained_for()])
        above = preset
    return table(files) + "\n" + table(models)


def link(file: ModelFile) -> str:
    return f"[{file.label}]({file.url})"


def described(file: ModelFile) -> str:
    return f"{link(file)}, {file.note}" if file.note else link(file)


def table(rows: list[list[str]]) -> str:
    lines = ["|" + "".join(f" {cell} |" if cell else " |" for cell in row) for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def generated() -> str:
    """The README with its tables as they should be."""
    text = README.read_text(encoding="utf-8")
    return re.sub(
        r"^\|  ?\| File \|.*?(?=\n\nChunks, windows)", lambda _: tables().rstrip(), text, count=1, flags=re.M | re.S
    )


def generate() -> None:
    write(README, generated())
