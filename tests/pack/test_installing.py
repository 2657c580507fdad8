"""`pip install -r requirements.txt` into a ComfyUI leaves alone what is there. pip only plans; nothing is installed."""

import json
import re
import subprocess
import sys
import venv

import pytest
from packaging.requirements import Requirement

from tools.comfyui.env import PACK
from tools.minima import minima

PIP = [sys.executable, "-m", "pip"]
PLAN = ["--dry-run", "--quiet", "--report", "-", "--disable-pip-version-check", "--retries", "1", "--timeout", "20"]

COMFYUI = {
    "torch": "2.13.0", "numpy": "2.2.6", "sentencepiece": "0.2.0", "safetensors": "0.6.2", "psutil": "7.0.0",
    "av": "16.0.0", "tqdm": "4.67.1", "pillow": "11.3.0", "requests": "2.32.5", "regex": "2025.10.22", "httpx": "0.28.1",
    "packaging": "25.0", "PyYAML": "6.0.3", "filelock": "3.20.0", "typing_extensions": "4.15.0", "fsspec": "2025.10.0",
}  # fmt: skip
"""What a ComfyUI has besides: those of its requirements that the pack, or what it needs, asks for too."""

HEAD = ["filelock", "numpy>=1.17", "packaging>=20.0", "pyyaml>=5.1", "regex!=2019.12.17", "tqdm>=4.27"]
OLD = {
    "transformers": (
        "4.57.1",
        [*HEAD, "huggingface-hub<1.0,>=0.34.0", "tokenizers<=0.23.0,>=0.22.0", "safetensors>=0.4.3"],
    ),
    "tokenizers": ("0.22.1", ["huggingface-hub<2.0,>=0.16.4"]),
    "huggingface_hub": ("0.36.0", ["filelock", "fsspec>=2023.5.0", "requests", "tqdm>=4.42.1"]),
}
OLDER = {
    "transformers": ("4.51.3", [*HEAD, "huggingface-hub<1.0,>=0.30.0", "tokenizers<0.22,>=0.21", "safetensors>=0.4.3"]),
    "tokenizers": ("0.21.4", ["huggingface-hub<1.0,>=0.16.4"]),
    "huggingface_hub": ("0.30.2", ["filelock", "fsspec>=2023.5.0", "requests", "tqdm>=4.42.1"]),
}
NEW = {
    "transformers": (
        "5.24.0",
        [*HEAD, "huggingface-hub<3.0,>=1.31.0", "tokenizers<0.24.0,>=0.23.1", "safetensors>=0.8.0"],
    ),
    "tokenizers": ("0.23.3", ["huggingface-hub<3.0,>=0.16.4"]),
    "huggingface_hub": ("2.4.0", ["filelock", "fsspec>=2023.5.0", "tqdm>=4.42.1"]),
    "safetensors": ("0.8.0", []),
}
"""Versions and requirements as these releases say them."""


@pytest.fixture(scope="module")
def index():
    """Skips where pip reaches no package index."""
    result = subprocess.run(
        [*PIP, "install", *PLAN, "--no-deps", "--ignore-installed", "tqdm"], capture_output=True, text=True
    )
    if result.returncode:
        pytest.skip(f"pip reaches no package index: {(result.stderr.strip().splitlines() or ['no message'])[-1]}")


def environment(folder, packages):
    """An environment in which pip sees packages of these versions; they are empty."""
    venv.create(folder, with_pip=False, symlinks=sys.platform != "win32")
    (python,) = [path for name in ("bin/python", "Scripts/python.exe") if (path := folder / name).exists()]
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    for name, (version, needs) in packages.items():
        info = folder / site / f"{name}-{version}.dist-info"
        info.mkdir()
        text = [
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}",
            *(f"Requires-Dist: {need}" for need in needs),
        ]
        (info / "METADATA").write_text("\n".join(text) + "\n", encoding="utf-8")
        (info / "RECORD").touch()
        (info / "INSTALLER").write_text("pip\n", encoding="utf-8")
    return python


def plan(python, *requirements):
    """Version of each package that pip would install, by its name in lower case with underscores."""
    command = [*PIP, "--python", python, "install", *PLAN, *requirements]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    parts = [part["metadata"] for part in json.loads(result.stdout)["install"]]
    return {re.sub(r"[-_.]+", "_", part["name"]).lower(): part["version"] for part in parts}


def number(version):
    return tuple(int(part) for part in version.split(".")[:2])


def planned(tmp_path, packages):
    known = {name: (version, []) for name, version in COMFYUI.items()} | packages
    return plan(environment(tmp_path / "venv", known), "-r", PACK / "requirements.txt")


KEPT = {"transformers", "huggingface_hub", "tokenizers", "torch", "numpy", "av", "sentencepiece", "psutil", "tqdm"}


def test_transformers_4_stays_and_diffusers_fits_it(index, tmp_path):
    packages = planned(tmp_path, OLD)
    assert not KEPT & packages.keys(), packages
    assert (0, 38) <= number(packages["diffusers"]) < (0, 40)


def test_an_older_hub_moves_no_further_than_transformers_allows(index, tmp_path):
    """Each diffusers that the engine can use wants huggingface_hub 0.34, so 0.30 cannot stay."""
    packages = planned(tmp_path, OLDER)
    assert KEPT & packages.keys() <= {"huggingface_hub"}, packages
    assert (0, 34) <= number(packages["huggingface_hub"]) < (1, 0)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="transformers 5.24 needs Python 3.11")
def test_with_the_newest_transformers_comes_the_newest_diffusers(index, tmp_path):
    packages = planned(tmp_path, NEW)
    assert not KEPT & packages.keys(), packages
    assert number(packages["diffusers"]) >= (0, 42)


def test_the_oldest_versions_allowed_go_together(index):
    """By what they ask of each other; CONTRIBUTING.md says how to run the engine on them."""
    oldest = {(pin := Requirement(line)).name: next(iter(pin.specifier)).version for line in minima()}
    with_needs = [f"{name}=={oldest[name]}" for name in ("transformers", "tokenizers", "diffusers", "peft")]
    result = subprocess.run(
        [*PIP, "install", *PLAN, "--no-deps", "--ignore-installed", *with_needs], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    for part in json.loads(result.stdout)["install"]:
        for need in map(Requirement, part["metadata"]["requires_dist"]):
            if need.name in oldest and not need.marker:
                assert need.specifier.contains(oldest[need.name], prereleases=True), (part["metadata"]["name"], need)


def test_every_requirement_has_an_oldest_version():
    lines = re.findall(r"^\w.*", (PACK / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert [Requirement(line).name for line in minima()] == [Requirement(line).name for line in lines]
