"""Rules that the code keeps, read from its syntax: which way imports go, what is never called, how nodes look."""

import ast
import re
from functools import cache

import pytest

from rolling_kv import config, geometry
from tools.comfyui.env import PACK
from tools.generate.schemas import PREFIX, inputs_of, recorded

ENGINE = sorted((PACK / "rolling_kv").rglob("*.py"))
NODES = sorted((PACK / "nodes").rglob("*.py"))
PUBLISHED = [PACK / "__init__.py", *ENGINE, *NODES]

OWN = {"rolling_kv", "nodes", "tools", "tests", "models", "workflows", "web"}
COMFY = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "server", "execution", "app"}
OUTSIDE = {
    "subprocess", "multiprocessing", "socket", "socketserver", "ssl", "urllib", "http", "ftplib", "requests", "httpx",
    "aiohttp", "websocket", "websockets", "huggingface_hub", "modelscope", "webbrowser", "ctypes", "marshal", "dill",
    "cloudpickle", "pip",
}  # fmt: skip
SERVES = PACK / "nodes/live/routes.py"
"""Answers pages with what ComfyUI's own server is made of: `aiohttp.web`, which opens no connection."""
CODE_FROM_TEXT = {"eval", "exec", "compile", "__import__"}
DOWNLOADS = {"from_pretrained", "from_single_file", "hf_hub_download", "snapshot_download", "load_state_dict_from_url"}
PROCESSES = {"os.system", "os.popen", "os.startfile", "os.fork", "os.kill"}

each_file = pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.relative_to(PACK).as_posix())


@cache
def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path):
    """(level, module) of every import in a file, wherever it stands; level 0 is absolute."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


@cache
def absolute(path):
    return {module.partition(".")[0] for level, module in imports(path) if level == 0}


@cache
def calls(path):
    """(dotted name, call) of every call in a file."""
    return [(ast.unparse(node.func), node) for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]


@each_file
def test_the_pack_imports_itself_by_relative_names_only(path):
    """Its folder can have any name, and an absolute `nodes` is ComfyUI's."""
    assert not absolute(path) & OWN


@pytest.mark.parametrize("path", ENGINE, ids=lambda path: path.name)
def test_the_engine_knows_neither_comfyui_nor_the_nodes(path):
    assert not absolute(path) & COMFY
    depth = len(path.relative_to(PACK / "rolling_kv").parts)
    assert all(level <= depth for level, _ in imports(path)), "an import leaves rolling_kv"


@each_file
def test_nothing_starts_a_process_opens_a_connection_or_runs_code_from_text(path):
    assert not absolute(path) & (OUTSIDE - {"aiohttp"} if path == SERVES else OUTSIDE)
    named = [node for node in ast.walk(parse(path)) if isinstance(node, ast.ImportFrom) and node.module == "aiohttp"]
    assert all([part.name for part in node.names] == ["web"] for node in named)
    for name, call in calls(path):
        assert name not in CODE_FROM_TEXT | PROCESSES, f"line {call.lineno}: {name}"
        assert not re.match(r"os\.(spawn|exec)", name), f"line {call.lineno}: {name}"
        assert name.rpartition(".")[2] not in DOWNLOADS, f"line {call.lineno}: {name} may download"


@each_file
def test_pickles_are_read_as_tensors_only(path):
    for name, call in calls(path):
        assert not re.match(r"pickle\.(load|Unpickler)", name), f"line {call.lineno}"
        if name == "torch.load":
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert keywords.get("weights_only") == "True", f"line {call.lineno}"


def test_scripts_talk_to_comfyui_only():
    forbidden = r"\beval\(|new Function|importScripts|XMLHttpRequest|new WebSocket|https?://"
    for path in (PACK / "web").rglob("*.js"):
        assert not re.search(forbidden, path.read_text(encoding="utf-8")), path


@each_file
def test_imports_are_not_guarded(path):
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Try):
            assert not any(isinstance(part, (ast.Import, ast.ImportFrom)) for part in node.body), f"line {node.lineno}"


def node_classes():
    """Every class in nodes/ that defines a schema."""
    for path in NODES:
        for node in parse(path).body:
            if isinstance(node, ast.ClassDef):
                methods = {part.name: part for part in node.body if isinstance(part, ast.FunctionDef)}
                if "define_schema" in methods:
                    yield node, methods


def test_comfyui_managers_scanner_finds_every_node():
    """It reads the source: a direct subclass of io.ComfyNode, and a literal node_id in the schema."""
    found = {}
    for node, methods in node_classes():
        assert [ast.unparse(base) for base in node.bases] == ["io.ComfyNode"], node.name
        (schema,) = [
            call
            for call in ast.walk(methods["define_schema"])
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "io.Schema"
        ]
        values = {keyword.arg: keyword.value for keyword in schema.keywords}
        assert isinstance(values["node_id"], ast.Constant) and values["node_id"].value == node.name
        found[node.name] = methods
    entries = (PACK / "nodes" / "__init__.py").read_text(encoding="utf-8")
    listed = re.findall(rf"^            ({PREFIX}\w+),$", entries, re.MULTILINE)
    assert sorted(found) == sorted(listed) == sorted(name for name in recorded() if name.startswith(PREFIX))


def test_execute_takes_the_inputs_of_the_recorded_schema():
    for node, methods in node_classes():
        parameters = [argument.arg for argument in methods["execute"].args.args][1:]
        assert sorted(parameters) == sorted(inputs_of(recorded()[node.name])), node.name


def value_of(default):
    if isinstance(default, ast.Attribute):  # WAN_21.fps
        return getattr(getattr(geometry, default.value.id), default.attr)
    return getattr(config, default.id) if isinstance(default, ast.Name) else ast.literal_eval(default)


def test_inputs_that_may_be_left_out_have_the_schemas_defaults():
    for node, methods in node_classes():
        arguments = methods["execute"].args
        named = arguments.args[len(arguments.args) - len(arguments.defaults) :]
        defaults = {argument.arg: value_of(default) for argument, default in zip(named, arguments.defaults)}
        schema = recorded()[node.name]
        assert defaults.keys() == schema["input"].get("optional", {}).keys(), node.name
        for name, (kind, options) in schema["input"].get("optional", {}).items():
            first = options["options"][0] if kind == "COMBO" else None
            assert defaults[name] == options.get("default", first), f"{node.name}.{name}"


def test_node_classes_hold_no_state():
    for node, _ in node_classes():
        assert all(isinstance(part, ast.FunctionDef) for part in node.body), node.name


def test_every_module_of_the_tests_has_a_name_of_its_own():
    """Test files are imported by their bare names, as are the support modules: of two with one name, pytest takes neither."""
    modules = [path.name for path in (PACK / "tests").rglob("*.py") if path.name not in ("conftest.py", "__init__.py")]
    assert {name for name in modules if modules.count(name) > 1} == set()


def test_the_entry_is_what_comfyui_looks_for():
    names = {node.name for node in parse(PACK / "__init__.py").body if hasattr(node, "name")}
    source = (PACK / "__init__.py").read_text(encoding="utf-8")
    assert "comfy_entrypoint" in names
    assert "NODE_CLASS_MAPPINGS" not in source, "ComfyUI would skip the entrypoint"
    (web,) = re.findall(r'^WEB_DIRECTORY = "(.+)"$', source, re.MULTILINE)
    assert (PACK / web).is_dir()
