#!/usr/bin/env bash
# Runs the whole test suite, or the pytest arguments given. Makes .venv on the first run. Tests in tests/live run where a
# ComfyUI is found ($COMFYUI_PATH, above custom_nodes, ~/ComfyUI), browser tests where a Chromium is ($CHROMIUM_PATH, PATH).
set -euo pipefail
cd "$(dirname "$0")"
source tools/venv.sh
make_venv test requirements-test.txt
exec "$venv_python" -m pytest -c tests/pytest.ini "${@:-tests}"
