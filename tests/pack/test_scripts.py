"""The page's scripts: types by JSDoc, which Deno's TypeScript checks, and the texts that they show in both languages."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tools.comfyui.env import PACK

SCRIPTS = sorted((PACK / "web").glob("*.js"))
CONFIG = PACK / "tests/support/web/deno.json"
LANGUAGES = ("en", "zh")
DENO = shutil.which("deno", path=Path(sys.executable).parent)


def errors(folder, *scripts):
    """What the checker finds, as it prints it; it keeps its own files in `folder` and asks no network."""
    command = [DENO, "check", "--quiet", "--no-remote", "--config", CONFIG, *scripts]
    environment = {**os.environ, "DENO_DIR": str(folder), "DENO_NO_UPDATE_CHECK": "1", "NO_COLOR": "1"}
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=PACK, env=environment)
    return result.stderr if result.returncode else ""


def test_types_hold(tmp_path):
    assert len(SCRIPTS) > 2
    found = errors(tmp_path, *SCRIPTS)
    assert not found, found


def test_an_error_of_types_is_found(tmp_path):
    wrong = tmp_path / "wrong.js"
    wrong.write_text("/** @param {number} x */\nconst double = x => 2 * x\ndouble('a')\n", encoding="utf-8")
    assert "wrong.js:3" in errors(tmp_path, wrong)


def test_only_the_adapter_knows_the_page():
    for path in SCRIPTS:
        text = path.read_text(encoding="utf-8")
        page = re.search(r"scripts/(app|api)\.js|window\.(app|comfyAPI)|LiteGraph\b|addDOMWidget|\bfetch\(", text)
        assert path.name == "comfy.js" or not page, f"{path.name}: {page[0]}"


def keys(tree, before=""):
    """The dotted names of a tree's texts."""
    if not isinstance(tree, dict):
        return {before}
    return set().union(*(keys(branch, f"{before}.{name}".lstrip(".")) for name, branch in tree.items()))


def texts(language, name):
    return json.loads((PACK / "locales" / language / name).read_text(encoding="utf-8"))


def test_every_text_is_there_in_both_languages_and_used():
    written = {language: keys(texts(language, "main.json")["rollingKV"]) for language in LANGUAGES}
    assert written["en"] == written["zh"]
    sources = "".join(path.read_text(encoding="utf-8") for path in SCRIPTS)
    asked = set(re.findall(r'\bt\("([\w.]+)"', sources))
    assert asked <= written["en"], asked - written["en"]
    # A key may also be put together: t(`live.how.${word}`).
    composed = tuple(re.findall(r"\bt\(`([\w.]+)\$\{", sources))
    assert all(key in asked or key.startswith(composed) for key in written["en"]), written["en"] - asked


def test_every_setting_is_described_in_both_languages():
    sources = "".join(path.read_text(encoding="utf-8") for path in SCRIPTS)
    named = {name.replace(".", "_") for name in re.findall(r'describeSetting\("([\w.]+)"', sources)}
    for language in LANGUAGES:
        assert set(texts(language, "settings.json")) == named
