"""Makes .venv with what is needed, then renders or tests: `python tools/launch.py run|test [ARGUMENTS]`.

The scripts run.sh, run.bat, test.sh and test.bat only look for a Python and hand over to this file. It needs nothing
installed, and is written so that a Python too old for the project can read it and look for a fitting one.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PACK = Path(__file__).resolve().parents[1]
VENV = PACK / ".venv"
VERSIONS = ["3.13", "3.12", "3.11", "3.10"]
WINDOWS = sys.platform == "win32"
COMMANDS = {"run": ["-m", "tools.render"], "test": ["-m", "pytest", "-c", "tests/pytest.ini"]}

FITS = "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))"
HAS_VENV = "import venv, ensurepip"
HAS_PIP = "import pip"
VIRTUALENV = "import sys; sys.path.insert(0, sys.argv[1]); import virtualenv; virtualenv.cli_run([sys.argv[2]])"


def answers(python, code):
    """Whether a Python, given as the start of a command line, runs `code` without failing."""
    command = [*python, "-c", code]
    try:
        result = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except OSError:
        return False
    return result.returncode == 0


def candidates():
    """Pythons to try, as starts of command lines, the most likely first. $PYTHON, where it is set, is the only one."""
    if os.environ.get("PYTHON"):
        return [[os.environ["PYTHON"]]]
    found = [[sys.executable], ["python3"], *([f"python{version}"] for version in VERSIONS), ["python"]]
    if WINDOWS:
        found += [["py", f"-{version}"] for version in VERSIONS]
        found += [[str(path)] for path in portable_pythons()]
    return found


def portable_pythons():
    """Where the portable build of ComfyUI has its Python: in python_embeded, beside ComfyUI or in it."""
    comfyui = Path(os.environ.get("COMFYUI_PATH") or PACK.parent.parent)  # the pack is in custom_nodes
    return [folder / "python_embeded" / "python.exe" for folder in (comfyui.parent, comfyui)]


def find_python():
    """The first Python that fits and can make an environment; ends the program with advice where there is none."""
    fitting = [python for python in candidates() if answers(python, FITS)]
    for module in (HAS_VENV, HAS_PIP):
        for python in fitting:
            if answers(python, module):
                return python
    named = os.environ.get("PYTHON")
    if WINDOWS:
        advice = "Install one from python.org, or name it: set PYTHON=C:\\path\\to\\python.exe"
    else:
        advice = (
            "Install one (on Debian and Ubuntu: apt install python3 python3-venv), or name it: "
            "PYTHON=/path/to/python3 bash SCRIPT"
        )
    sys.exit(f"No Python 3.10 to 3.13 with venv was found{f' at PYTHON={named}' if named else ''}.\n{advice}")


def run(command):
    """Run a command that says itself what is wrong, and end the program as it ends where it fails."""
    result = subprocess.run(command, cwd=str(PACK))
    if result.returncode:
        sys.exit(result.returncode)


def venv_python():
    return VENV / ("Scripts/python.exe" if WINDOWS else "bin/python")


def make_venv():
    if answers([str(venv_python())], ""):
        return
    python = find_python()
    version = subprocess.run([*python, "--version"], stdout=subprocess.PIPE, text=True).stdout.strip()
    print(f"Making .venv with {version}", flush=True)
    if answers(python, HAS_VENV):
        return run([*python, "-m", "venv", "--clear", str(VENV)])
    # The portable build's Python has pip but no venv. What makes the environment is put aside, not into ComfyUI's own.
    with tempfile.TemporaryDirectory() as folder:
        run([*python, "-m", "pip", "install", "--disable-pip-version-check", "-q", "--target", folder, "virtualenv"])
        run([*python, "-c", VIRTUALENV, folder, str(VENV)])


def install(name):
    """Install requirements-NAME.txt, unless .venv/NAME.stamp says that exactly this was installed before."""
    digest = hashlib.sha256()
    for path in [*sorted(PACK.glob("requirements*.txt")), PACK / "constraints.txt"]:
        digest.update(path.read_bytes())
    stamp = VENV / f"{name}.stamp"
    if stamp.is_file() and stamp.read_text() == digest.hexdigest():
        return
    requirements = f"requirements-{name}.txt"
    print(f"Installing {requirements} into .venv (PyTorch is large: this can take minutes)", flush=True)
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    pip = [str(venv_python()), "-m", "pip", "install", "--disable-pip-version-check", *quiet]
    run([*pip, "-r", requirements, "-c", "constraints.txt"])
    stamp.write_text(digest.hexdigest())


def main(name, arguments):
    os.chdir(str(PACK))
    make_venv()
    install(name)
    if name == "test" and not arguments:  # in two processes, each file in one: its tests share what they need
        arguments = ["tests", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    command = [str(venv_python()), *COMMANDS[name], *arguments]
    sys.stdout.flush()
    if WINDOWS:  # there, exec would return to the prompt before the program has ended
        sys.exit(subprocess.run(command).returncode)
    os.execv(command[0], command)


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2:])
    except KeyboardInterrupt:
        sys.exit(130)
