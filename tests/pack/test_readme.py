"""What the README tells people to do works: commands, the Python example, links within the repository."""

import json
import re
import runpy

import pytest

from rolling_kv.presets import PRESETS
from rolling_kv.tiny import make_tiny
from tools.comfyui.env import PACK
from tools.generate.schemas import PREFIX, recorded

README = (PACK / "README.md").read_text(encoding="utf-8")


def indented_blocks():
    return [re.sub(r"\\\n\s+", "", block) for block in re.findall(r"(?:^ {4}.*\n)+", README, re.MULTILINE)]


def commands(program):
    lines = [line.strip() for block in indented_blocks() for line in block.splitlines()]
    return [line.partition("  # ")[0] for line in lines if line.startswith(program)]


@pytest.mark.parametrize("name", [name for name in recorded() if name.startswith(PREFIX)])
def test_every_node_is_described(name):
    assert f"| **{recorded()[name]['display_name']}** |" in README


def test_each_command_is_shown():
    assert {line.split()[3] for line in commands("python -m rolling_kv")} == {
        "generate", "batch", "inspect", "make-tiny", "bench"
    }  # fmt: skip
    assert len(commands("bash run.sh")) == len(commands("bash test.sh")) == 1


def test_the_python_example_runs(tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    make_tiny(tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path)
    short = example.replace("seconds=5", "seconds=0.5").replace("generate(4", "generate(1")
    (tmp_path / "example.py").write_text(short, encoding="utf-8")
    names = runpy.run_path(str(tmp_path / "example.py"))
    assert (tmp_path / "circle.mp4").stat().st_size > 0
    assert [len(names["first"]), len(names["rest"])] == [1, 1]


def test_the_curl_example_sends_an_api_prompt_and_fetches_what_it_saves():
    queue, history, view = commands("curl")
    (file,) = re.findall(r"\$\(cat (\S+)\)", queue)
    prompt = json.loads((PACK / file).read_text(encoding="utf-8"))
    (prefix,) = [node["inputs"]["filename_prefix"] for node in prompt.values() if node["class_type"] == "SaveVideo"]
    folder, name = prefix.split("/")
    assert f"filename={name}_00001_.mp4&subfolder={folder}&type=output" in view
    assert "/history/" in history


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert re.search(rf"^## {target[1:]}$", README, re.MULTILINE | re.IGNORECASE), target
        elif not target.startswith("https://"):
            assert (PACK / target).is_file(), target


def test_presets_are_real():
    (table,) = re.findall(r"^\| Model \|.*?\n\n", README, re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"`([\w+-]+)`", table)) == PRESETS.keys()
