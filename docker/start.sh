#!/usr/bin/env bash
# Starts the ComfyUI of install.sh for other machines: start.sh FOLDER [ARGUMENTS of ComfyUI]. Variables: PORT, PYTHON.
set -euo pipefail
folder=$1
shift
cd "$folder"
exec "${PYTHON:-python}" main.py --listen 0.0.0.0 --port "${PORT:-8188}" --disable-auto-launch "$@"
