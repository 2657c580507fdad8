#!/usr/bin/env bash
# Renders workflows/api/quickstart.json to output/quickstart.mp4, through ComfyUI where there is one, else through the
# engine alone. Makes .venv on the first run. Options: bash run.sh --help
set -euo pipefail
cd "$(dirname "$0")"
pythons=(.venv/bin/python .venv/Scripts/python python3 python3.13 python3.12 python3.11 python3.10 python)
[ -z "${PYTHON:-}" ] || pythons=("$PYTHON" "${pythons[@]}")
for python in "${pythons[@]}"; do
  if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 7))' 2>/dev/null; then
    exec "$python" tools/launch.py run "$@"
  fi
done
echo "No Python 3 was found. Install Python 3.10 to 3.13 (on Debian and Ubuntu: apt install python3 python3-venv)." >&2
exit 1
