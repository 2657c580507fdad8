#!/usr/bin/env bash
# Runs the whole test suite, or the pytest arguments given. Makes .venv on the first run. Tests in tests/live run where a
# ComfyUI is found ($COMFYUI_PATH, above custom_nodes, ~/ComfyUI), browser tests where a Chromium is ($CHROMIUM_PATH, PATH).
set -euo pipefail
cd "$(dirname "$0")"
pythons=(.venv/bin/python .venv/Scripts/python python3 python3.13 python3.12 python3.11 python3.10 python)
[ -z "${PYTHON:-}" ] || pythons=("$PYTHON" "${pythons[@]}")
for python in "${pythons[@]}"; do
  if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 7))' 2>/dev/null; then
    exec "$python" tools/launch.py test "$@"
  fi
done
echo "No Python 3 was found. Install Python 3.10 to 3.13 (on Debian and Ubuntu: apt install python3 python3-venv)." >&2
exit 1
