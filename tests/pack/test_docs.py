"""docs/architecture.md, CONTRIBUTING.md and docs/models.md speak of what is there."""

import re
import shlex

import pytest

from rolling_kv.cli import _parser
from tools.comfyui.env import PACK

PAGES = ["docs/architecture.md", "CONTRIBUTING.md"]
ALL = ["README.md", *sorted(path.relative_to(PACK).as_posix() for path in (PACK / "docs").glob("*.md"))]
ARCHITECTURE = (PACK / PAGES[0]).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_paths_and_modules_that_are_named_exist(page):
    text = (PACK / page).read_text(encoding="utf-8")
    named = re.findall(r"`((?:[\w.]+/)+(?:[\w.]+)?)[` ]", text)
    assert named
    for path in named:
        if "NAME" in path or path.startswith(".venv/"):
            continue
        assert (PACK / path).exists(), path
    for module in re.findall(r"python -m (tools(?:\.\w+)*)", text):
        path = PACK.joinpath(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    check_links(page)


def check_links(page):
    for target in re.findall(r"\]\(([^)#]+)\)", (PACK / page).read_text(encoding="utf-8")):
        assert target.startswith("https://") or (PACK / page).parent.joinpath(target).exists(), target


@pytest.mark.parametrize("page", ALL)
def test_sources_that_a_page_names_exist(page):
    for path in re.findall(
        r"`((?:rolling_kv|nodes|web|tools|tests)/[\w./]+)`", (PACK / page).read_text(encoding="utf-8")
    ):
        assert (PACK / path).exists(), path


@pytest.mark.parametrize("page", ALL)
def test_commands_that_a_page_gives_are_accepted(page):
    text = (PACK / page).read_text(encoding="utf-8").replace("\\\n", " ")
    for command in re.findall(r"^(?: {4})?(?:python|torchrun .*?) -m rolling_kv (.*)", text, re.MULTILINE):
        _parser().parse_args(shlex.split(command, comments=True))


def test_links_of_the_page_of_models_lead_somewhere():
    check_links("docs/models.md")


def test_every_module_of_the_engine_has_its_place_in_the_tree():
    tree = ARCHITECTURE.split("## The tree")[1].split("## The layers")[0]
    for path in (PACK / "rolling_kv").rglob("*.py"):
        name, wing = path.name, path.parent.name
        if wing in ("rolling_kv", "cache", "wan", "sampling", "checkpoints") and not name.startswith("__"):
            assert re.search(rf"\b{re.escape(name)}\b", tree), path.relative_to(PACK)
        elif path.parent.parent.name == "rolling_kv":
            assert f"{wing}/" in tree
    for path in (PACK / "nodes").glob("*.py"):
        if "define_schema" not in path.read_text(encoding="utf-8") and path.name != "__init__.py":
            assert path.name in tree, path.name
