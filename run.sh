#!/usr/bin/env bash
# Renders workflows/api/quickstart.json to output/quickstart.mp4, through ComfyUI where there is one, else through the
# engine alone. Makes .venv on the first run. Options: bash run.sh --help
set -euo pipefail
cd "$(dirname "$0")"
source tools/venv.sh
make_venv run requirements-run.txt
exec "$venv_python" -m tools.render "$@"
