#!/usr/bin/env bash
# Puts ComfyUI with this pack into a new folder: install.sh FOLDER. Takes the PyTorch of the Python that it is run with as it is.
# Variables: COMFYUI_SOURCE (a git repository), COMFYUI_REF (a tag or branch of it), PYTHON.
set -euo pipefail
folder=$1
pack=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}

git -c advice.detachedHead=false clone --depth 1 --branch "${COMFYUI_REF:-v0.27.0}" \
  "${COMFYUI_SOURCE:-https://github.com/comfyanonymous/ComfyUI}" "$folder"
# What belongs to the driver stays: a newer torch may not run on it.
kept=$(mktemp)
trap 'rm -f "$kept"' EXIT
"$python" -c 'import importlib.metadata as m
for name in ("torch", "torchvision", "torchaudio"):
    try: print(f"{name}=={m.version(name)}")
    except m.PackageNotFoundError: pass' > "$kept"
"$python" -m pip install --no-cache-dir --constraint "$kept" -r "$folder/requirements.txt" -r "$pack/requirements.txt"
ln -s "$pack" "$folder/custom_nodes/rolling-kv"
