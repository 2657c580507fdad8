"""`import rolling_kv`: the public names are there, lead where their types say, and cost nothing until they are used."""

import ast
import shutil
import subprocess
import sys

import pytest

import rolling_kv
from tools.comfyui.env import PACK

FACE = {
    "Pipeline", "RollingSession", "load_model", "load_text_encoder", "load_vae", "CacheConfig", "SamplingConfig",
    "ExecutionConfig", "CacheState", "PromptSchedule", "PRESETS", "__version__", "read_schedule",
}  # fmt: skip


def python(code, path=PACK):
    result = subprocess.run([sys.executable, "-c", code], cwd=path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_importing_the_package_alone_imports_nothing_large():
    code = "import sys, rolling_kv; rolling_kv.__version__; print(*sys.modules)"
    modules = python(code)
    assert not {"torch", "diffusers", "transformers", "numpy"} & set(modules)
    assert [name for name in modules if name.startswith("rolling_kv")] == ["rolling_kv"]


def test_every_name_is_there():
    assert set(rolling_kv.__all__) == FACE
    assert all(getattr(rolling_kv, name) is not None for name in FACE)
    assert set(dir(rolling_kv)) >= FACE
    with pytest.raises(AttributeError, match="no attribute 'Pipelines'"):
        rolling_kv.Pipelines  # noqa: B018


def test_types_and_values_come_from_the_same_modules():
    tree = ast.parse((PACK / "rolling_kv" / "__init__.py").read_text(encoding="utf-8"))
    typed = {
        alias.name: f".{node.module}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    assert typed == rolling_kv._MODULES
    for name, module in typed.items():
        value, place = getattr(rolling_kv, name), f"rolling_kv{module}"
        assert f"{getattr(value, '__module__', place)}.".startswith(f"{place}."), name  # also from within a package
    assert (PACK / "rolling_kv" / "py.typed").is_file()


def test_the_version_is_the_projects_wherever_the_package_lies(tmp_path):
    line = f'version = "{rolling_kv.__version__}"'
    assert line in (PACK / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    (tmp_path / "rolling_kv").mkdir()
    shutil.copy(PACK / "rolling_kv" / "__init__.py", tmp_path / "rolling_kv")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\nversion = "9"\n', encoding="utf-8")
    info = tmp_path / "rolling_kv-7.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rolling-kv\nVersion: 7.0\n", encoding="utf-8")
    assert python("import rolling_kv; print(rolling_kv.__version__)", tmp_path) == ["7.0"]
