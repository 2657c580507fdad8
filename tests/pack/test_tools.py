"""Finding a ComfyUI, its Python and what that lacks: on made-up folders, without a server."""

import pytest

from tools.comfyui import env as comfy_env
from tools.comfyui.client import _explain, first_file
from tools.comfyui.env import ComfyError, ComfyInstall, find_comfyui, find_python, missing_requirements


@pytest.fixture
def clean(monkeypatch, tmp_path):
    for name in ("COMFYUI_PATH", "COMFYUI_PYTHON"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setattr(comfy_env.Path, "home", lambda: home)
    return monkeypatch


def make_comfyui(path):
    path.mkdir(parents=True)
    (path / "main.py").touch()
    (path / "nodes.py").touch()
    return path


def make_file(path):
    path.parent.mkdir(parents=True)
    path.touch()
    return path


def test_comfyui_is_looked_for_in_the_promised_order(clean, tmp_path):
    pack = tmp_path / "portable" / "custom_nodes" / "rolling-kv"
    pack.mkdir(parents=True)
    assert find_comfyui(pack) is None
    at_home = make_comfyui(tmp_path / "home" / "ComfyUI")
    assert find_comfyui(pack) == at_home
    (tmp_path / "portable" / "main.py").touch()
    (tmp_path / "portable" / "nodes.py").touch()
    assert find_comfyui(pack) == tmp_path / "portable"
    clean.setenv("COMFYUI_PATH", str(make_comfyui(tmp_path / "named")))
    assert find_comfyui(pack) == tmp_path / "named"


def test_a_pack_outside_custom_nodes_does_not_take_the_folder_above_it(clean, tmp_path):
    above = make_comfyui(tmp_path / "projects")
    assert find_comfyui(above / "packs" / "rolling-kv") is None


def test_a_wrong_comfyui_path_is_an_error_that_names_it(clean, tmp_path):
    make_comfyui(tmp_path / "home" / "ComfyUI")
    clean.setenv("COMFYUI_PATH", str(tmp_path / "elsewhere"))
    with pytest.raises(ComfyError, match="elsewhere"):
        find_comfyui(tmp_path)


@pytest.mark.parametrize(
    "layout", [".venv/bin/python", "venv/bin/python", ".venv/Scripts/python.exe", "../python_embeded/python.exe"]
)
def test_the_python_of_each_kind_of_installation_is_found(clean, tmp_path, layout):
    comfyui = make_comfyui(tmp_path / "portable" / "ComfyUI")
    assert find_python(comfyui) is None
    python = make_file((comfyui / layout).resolve())
    assert find_python(comfyui).resolve() == python
    clean.setenv("COMFYUI_PYTHON", str(make_file(tmp_path / "conda" / "python")))
    assert find_python(comfyui) == tmp_path / "conda" / "python"


def test_only_what_is_absent_or_too_old_is_missing_and_never_torch(tmp_path):
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("torch>=99\nnumpy>=1.25\n# a comment\ndiffusers>=0.38\nsome_thing>=2  # why\nav>=14\n")
    install = ComfyInstall(tmp_path, tmp_path, {"torch": "2.5.0", "numpy": "2.0.1", "some-thing": "1.9"}, False)
    assert missing_requirements(install, requirements) == ["diffusers>=0.38", "some_thing>=2", "av>=14"]


def test_a_refusal_is_told_with_node_input_and_value():
    problem = {"message": "Value not in list", "details": "model: 'a.safetensors' not in ['b.safetensors']"}
    answer = {
        "error": {"message": "Prompt outputs failed validation", "details": ""},
        "node_errors": {"4": {"class_type": "RollingKVLoadModel", "errors": [problem]}},
    }
    text = _explain(answer)
    assert "RollingKVLoadModel (4)" in text and "a.safetensors" in text


def test_the_video_among_the_outputs_is_found():
    image = {"filename": "a.png", "subfolder": "", "type": "temp"}
    video = {"filename": "b.mp4", "subfolder": "s", "type": "output"}
    outputs = {"1": {"images": [image], "text": ["hello"]}, "7": {"images": [video], "animated": [True]}}
    assert first_file(outputs, ".mp4") == video
    with pytest.raises(LookupError, match="webm"):
        first_file(outputs, ".webm")


def test_the_first_video_is_that_of_the_first_node_in_whatever_order_the_nodes_ran():
    outputs = {name: {"images": [{"filename": f"{name}.mp4"}]} for name in ("10", "9", "12:7", "13")}
    assert (
        first_file(outputs, ".mp4")["filename"]
        == first_file(dict(reversed(outputs.items())), ".mp4")["filename"]
        == "9.mp4"
    )
