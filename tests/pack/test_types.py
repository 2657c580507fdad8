"""Types hold, in pyright's basic mode, over the engine and the nodes; pyproject.toml has the settings."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tools.comfyui.env import PACK

# basedpyright is pyright with the Node that it runs on in its packages: it fetches nothing when it starts.
CHECKER = shutil.which("basedpyright", path=Path(sys.executable).parent)


def errors(*arguments):
    """What the checker finds, a line each."""
    command = [CHECKER, "--outputjson", "--pythonpath", sys.executable, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=PACK, env={**os.environ, "NO_COLOR": "1"})
    assert result.returncode in (0, 1), result.stdout + result.stderr
    found = json.loads(result.stdout)
    assert found["summary"]["filesAnalyzed"] > 0
    return [
        f"{Path(error['file']).name}:{error['range']['start']['line'] + 1}: {error['message']}"
        for error in found["generalDiagnostics"]
        if error["severity"] == "error"
    ]


def test_types_hold():
    found = errors()
    assert not found, "\n".join(found)


def test_an_error_of_types_is_found(tmp_path):
    (tmp_path / "wrong.py").write_text(
        "def double(x: int) -> int:\n    return 2 * x\n\n\ndouble('a')\n", encoding="utf-8"
    )
    project = {"typeCheckingMode": "basic", "include": ["."]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(project), encoding="utf-8")
    assert any(line.startswith("wrong.py:5") for line in errors("--project", tmp_path))
