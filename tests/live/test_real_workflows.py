"""The workflows of models that do not ship: what a page says without the files, and that they run with stand-ins of them."""

import json
import shutil

import pytest
import torch
from browser import until
from builders import original_names
from graphs import PACK, read_video
from safetensors.torch import save_file
from test_browser import OF_REAL_MODELS, needed
from test_load_lora import write_lora

from rolling_kv.bundled import BUNDLED
from rolling_kv.checkpoints.model import load_model
from rolling_kv.checkpoints.readers import open_checkpoint
from rolling_kv.tiny import make_tiny
from tools.comfyui.client import first_file

each_workflow = pytest.mark.parametrize("path", OF_REAL_MODELS, ids=[path.stem for path in OF_REAL_MODELS])


@each_workflow
def test_without_the_files_the_page_names_them(fresh_frontend, path):
    frontend = fresh_frontend
    nodes = frontend.open_workflow(path)
    assert nodes and all(node["known"] for node in nodes)
    names, page = [file["name"] for file in needed(path)], frontend.page
    named = "names => names.every(name => document.body.innerText.includes(name))"
    closed = page.get_by_text("Show missing models").first
    until(page, lambda: page.evaluate(named, names) or closed.is_visible())
    if not page.evaluate(named, names):  # they are in a list that is closed
        closed.click()
        page.wait_for_function(named, arg=names)
    # The list asks the registry of nodes, which is out of reach.
    errors = frontend.errors_from("RollingKV", "rolling-kv", "rolling_kv")
    assert [error for error in errors if "api.comfy.org" not in error] == []


def write_stand_in(file: dict, place, vae) -> None:
    """The bundled model's part in the form in which the real file comes. vae: a file of a VAE that is built as the real one."""
    if file["directory"] == "diffusion_models":
        torch.save({"generator": original_names(load_model(BUNDLED).transformer.state_dict())}, place)
    elif file["directory"] == "text_encoders":
        weights = {name: tensor.clone() for name, tensor in open_checkpoint(BUNDLED / "text_encoder").tensors.items()}
        pieces = (BUNDLED / "tokenizer" / "spiece.model").read_bytes()
        save_file(weights | {"spiece_model": torch.frombuffer(bytearray(pieces), dtype=torch.uint8)}, place)
    elif file["directory"] == "vae":
        shutil.copy(vae, place)
    else:
        write_lora(place.with_suffix(".safetensors"), 128, 1)
        torch.save(open_checkpoint(place.with_suffix(".safetensors")).tensors, place)
        place.with_suffix(".safetensors").unlink()


@pytest.fixture
def stand_ins(server, tmp_path):
    places, vae = [], make_tiny(tmp_path / "tiny") / "vae" / "diffusion_pytorch_model.safetensors"
    for file in {file["name"]: file for path in OF_REAL_MODELS for file in needed(path)}.values():
        places.append(server.folder / "models" / file["directory"] / file["name"])
        write_stand_in(file, places[-1], vae)
    yield
    for place in places:
        place.unlink()


@each_workflow
def test_with_stand_ins_the_prompt_runs(server, stand_ins, path):
    prompt = json.loads((PACK / "workflows" / "api" / f"{path.stem.removeprefix('rolling_kv_')}.json").read_text())
    for node in prompt.values():
        if "width" in node["inputs"]:
            node["inputs"] |= {"width": 64, "height": 64, "length": 1.0, "length_unit": "seconds"}
    video = read_video(server.client.view(first_file(server.client.run(prompt), ".mp4")))
    assert video.frames.shape == (21, 64, 64, 3)
