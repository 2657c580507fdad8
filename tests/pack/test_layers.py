"""Which way imports go: the table of layers, held against the syntax of every file. docs/architecture.md shows the same table."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tools.comfyui.env import PACK

GROUND = ["geometry", "rope", "devices", "platforms", "atomic", "messages", "installed", "float8_linear"]
SETTINGS = ["config", "presets"]
ABOVE = [
    "batch",
    "streaming",
    "beside_bars",
    "listening",
    "pipeline",
    "inspection",
    "planning",
    "cli",
    "options",
    "tiny",
    "bundled",
    "hook_state",
    "__init__",
    "__main__",
]

LAYERS: list[tuple[list[str], list[str]]] = [
    (GROUND, []),
    (SETTINGS, [*GROUND, *SETTINGS, "cache.codecs"]),
    (["cache"], [*GROUND, *SETTINGS]),
    (["step_cache"], []),
    (["strips"], []),
    (["checkpoints"], [*GROUND, *SETTINGS]),
    (["lora", "vae", "words"], [*GROUND, *SETTINGS, "checkpoints"]),
    (["previews"], [*GROUND, *SETTINGS, "vae", "video"]),
    (["text"], [*GROUND, *SETTINGS, "checkpoints", "words"]),
    (["video", "schedules", "fitting"], [*GROUND, *SETTINGS]),
    (["growing"], [*GROUND, *SETTINGS, "video"]),
    (["footage"], [*GROUND, "fitting"]),
    (["wan"], [*GROUND, *SETTINGS, "cache"]),
    (["sampling"], [*GROUND, *SETTINGS, "cache", "wan", "step_cache", "schedules", "checkpoints.model"]),
    (["hooks"], [*GROUND, *SETTINGS, "cache", "wan.processors"]),
]
"""Modules and wings of rolling_kv, and what of rolling_kv each may import besides itself; a wing stands for all in it."""

BENCH_IS_IMPORTED_BY = ["cli"]
"""Of the engine; ABOVE may import everything else."""

DOORS = {
    ("rolling_kv/bench/chunks/cli.py", "tools.comfyui.sampler"),
    ("rolling_kv/bench/cases/cli.py", "cases"),
    ("rolling_kv/bench/speeds/run.py", "tools.train_tiny.measure"),
}
"""What is loaded by name at run time and lies outside: ComfyUI's own sampler, which only the source repository can start, the recorded
cases, and the detector of what the bundled model shows."""

OUTSIDE = (
    "nodes",
    "tools",
    "tests",
    "docs",
    "comfy",
    "comfy_api",
    "comfy_extras",
    "comfy_execution",
    "folder_paths",
)


def modules(root: Path) -> set[str]:
    """Dotted names of all modules and packages below a folder, from its own name on."""
    files = {path.relative_to(root.parent).with_suffix("").parts for path in root.rglob("*.py")}
    return {".".join(parts) for parts in files} | {".".join(parts[:-1]) for parts in files if parts[-1] == "__init__"}


def imports(path: Path, root: Path, known: set[str]) -> list[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports, wherever it stands, `importlib` included.

    Names of this pack begin with the folder below the pack; a name that `from … import` takes counts as the module that
    it is, where it is one. What cannot be read from the syntax is given as "?".
    """
    package = path.relative_to(root.parent).parts[:-1]

    def resolve(level: int, name: str) -> str:
        above = package[: len(package) - level + 1] if level <= len(package) else ("..",) * (level - len(package))
        return ".".join([*above, *filter(None, name.split("."))])

    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = resolve(node.level, node.module or "") if node.level else node.module or ""
            names = [f"{base}.{alias.name}".lstrip(".") for alias in node.names]
            found += [(node.lineno, name if name in known or name.startswith("...") else base) for name in names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
            "import_module",
            "__import__",
        ):
            given = node.args[0] if node.args else None
            text = given.value if isinstance(given, ast.Constant) and isinstance(given.value, str) else "?"
            dots = len(text) - len(text.lstrip("."))
            found.append((node.lineno, resolve(dots, text[dots:]) if dots else text))
    return found


def unit_of(name: str) -> str:
    """`cache.window` is part of `cache`."""
    return name.partition(".")[0]


def broken_rules(path: Path, root: Path) -> list[str]:
    """Imports of a file of the engine that the table does not allow, as sentences. root: the folder rolling_kv."""
    known = modules(root)
    place = path.relative_to(root.parent).as_posix()
    own = unit_of(".".join(path.relative_to(root).with_suffix("").parts))
    allowed = next((may for names, may in LAYERS if own in names), None)
    said = []
    for line, name in imports(path, root, known):
        where = f"{place}, line {line}"
        top, _, inner = name.partition(".")
        if (place, name) in DOORS:
            continue
        if name == "?":
            if own != "__init__":  # the public face: tests/pack/test_face.py holds its table against its types
                said.append(f"{where}: cannot be read from the syntax")
        elif top in OUTSIDE or name.startswith(".."):
            said.append(f"{where}: the engine does not import {name}")
        elif top == root.name:
            target = unit_of(inner) or "__init__"
            if target == own:
                continue
            if allowed is not None:
                fits = any(inner == may or inner.startswith(f"{may}.") for may in allowed)
            else:
                fits = own == "bench" or target != "bench" or own in BENCH_IS_IMPORTED_BY
            if not fits:
                said.append(f"{where}: {own} does not import {inner or root.name}")
    return said


ENGINE = PACK / "rolling_kv"
FILES = sorted(ENGINE.rglob("*.py"))


def test_every_module_has_a_layer():
    placed = [name for names, _ in LAYERS for name in names] + ABOVE + ["bench"]
    assert len(placed) == len(set(placed))
    units = {unit_of(".".join(path.relative_to(ENGINE).with_suffix("").parts)) for path in FILES}
    assert units == set(placed), "a new module or wing needs its place in the table"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ENGINE).as_posix())
def test_imports_go_one_way(path):
    assert not broken_rules(path, ENGINE)


def test_doors_are_still_used():
    for place, name in DOORS:
        assert name in [found for _, found in imports(PACK / place, ENGINE, set())]


NODES = PACK / "nodes"


def test_a_node_never_imports_a_node():
    known = modules(NODES)
    sources = {path.stem: path.read_text(encoding="utf-8") for path in NODES.glob("*.py")}
    nodes = {name for name, source in sources.items() if re.search(r"\bdef define_schema\b", source)}
    assert len(nodes) > 5
    for name in sources.keys() - {"__init__"}:
        for line, imported in imports(NODES / f"{name}.py", NODES, known):
            assert imported.removeprefix("nodes.") not in nodes, f"nodes/{name}.py, line {line}: {imported}"


@pytest.fixture
def engine(tmp_path):
    """Writes a file of a made-up engine; returns what its imports break."""
    root = tmp_path / "rolling_kv"
    for name in ("cache/window.py", "cache/codecs.py", "wan/processors.py", "wan/fused.py", "sampling/session.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    for name in ("bench/cli.py", "checkpoints/model.py", "checkpoints/names.py", "config.py", "text.py", "rope.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()

    def check(place, source):
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
        return broken_rules(path, root)

    return check


@pytest.mark.parametrize(
    "place, source",
    [
        ("rope.py", "from .config import x"),
        ("config.py", "from .cache.window import x"),
        ("config.py", "from .cache import window"),
        ("cache/window.py", "from ..wan.fused import x"),
        ("cache/window.py", "from ..wan import fused"),
        ("cache/window.py", "from .. import wan"),
        ("cache/window.py", "def f():\n    from ..sampling.session import x"),
        ("cache/window.py", "import importlib\nimportlib.import_module('..wan.fused', __package__)"),
        ("cache/window.py", "from importlib import import_module\nimport_module('...nodes', __package__)"),
        ("cache/window.py", "from importlib import import_module\nimport_module(name)"),
        ("step_cache/magcache.py", "from ..rope import rotate"),
        ("checkpoints/names.py", "from ..wan.fused import x"),
        ("wan/fused.py", "from ..checkpoints.model import x"),
        ("sampling/session.py", "from ..checkpoints.names import x"),
        ("hooks/attach.py", "from ..wan.fused import x"),
        ("text.py", "from .cache.window import x"),
        ("pipeline.py", "from .bench.cli import x"),
        ("pipeline.py", "from ..nodes import x"),
        ("pipeline.py", "import folder_paths"),
        ("pipeline.py", "from comfy.utils import x"),
        ("pipeline.py", "import tools.render"),
    ],
)
def test_an_import_that_breaks_the_table_is_found(engine, place, source):
    assert engine(place, source)


@pytest.mark.parametrize(
    "place, source",
    [
        ("config.py", "from .cache.codecs import CODECS"),
        ("cache/window.py", "from .codecs import x\nfrom . import codecs\nfrom ..config import y\nimport torch, math"),
        ("sampling/session.py", "from ..checkpoints.model import x\nfrom ..wan.fused import y"),
        ("hooks/attach.py", "from ..wan.processors import x"),
        ("text.py", "from .checkpoints.names import x"),
        ("cli.py", "from .bench.cli import x\nfrom .sampling import session"),
        ("bench/cli.py", "from ..wan import fused\nfrom ..text import x"),
    ],
)
def test_an_import_that_the_table_allows_passes(engine, place, source):
    assert engine(place, source) == []
