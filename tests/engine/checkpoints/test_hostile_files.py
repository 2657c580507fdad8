"""What a file claims is checked before it is believed, and what was loaded is the file's no more."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from builders import scaled_float8, sentencepiece_model, tiny_transformer, tiny_umt5, write_weights
from diffusers.utils import is_gguf_available
from hostile_files import tiny_vae
from safetensors.torch import save_file

from rolling_kv.checkpoints.fingerprint import fingerprint
from rolling_kv.checkpoints.model import CausalModel, load_model
from rolling_kv.checkpoints.readers import CheckpointError
from rolling_kv.config import CacheConfig, SamplingConfig
from rolling_kv.inspection import inspect_checkpoint
from rolling_kv.messages import MESSAGE_LENGTH, listed, printable, shortened, shown
from rolling_kv.presets import ModelPreset
from rolling_kv.sampling.session import RollingSession
from rolling_kv.sampling.state import CacheState

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def weights():
    return dict(tiny_transformer().state_dict())


def refused(path, match, read=None):
    for load in [read] if read else [load_model, inspect_checkpoint]:
        with pytest.raises(CheckpointError, match=match) as caught:
            load(path)
        text = str(caught.value)
        assert text.isprintable() and len(text) <= MESSAGE_LENGTH
        assert len(text.encode("utf-8")) >= len(text)


# Messages


def test_messages_are_one_printable_line_of_bounded_length():
    error = CheckpointError("a\ud800 \x1b[31m\n日本語 ü\u3000\u202e" + "x" * 10**6 + " end")
    assert str(error).startswith("a\\ud800 \\x1b[31m\\n日本語 ü\u3000\\u202exxx") and str(error).endswith("… end"[1:])
    assert len(str(error)) == MESSAGE_LENGTH
    assert printable("plain text, ü 日本語") == "plain text, ü 日本語"
    assert shortened("abcdefghij", 5) == "ab…ij"
    assert listed(["a", "\ud800", "c", "d", "e"]) == "a, \\ud800, c and 2 more"
    assert shown([1, 2]) == "a list" and shown("\ud800") == "'\\ud800'" and len(shown("x" * 999)) == 80


@pytest.mark.parametrize("name", [b"\xb0\xa1.safetensors", b"\x1b[31m.safetensors", b"a\nb.pt"])
def test_a_file_name_cannot_break_a_message(name, tmp_path):
    path = Path(os.fsdecode(os.fsencode(str(tmp_path)) + b"/" + name))
    try:
        path.write_bytes(b"nonsense")
    except OSError:
        pytest.skip("this file system has no such names")
    refused(path, "damaged")


# What a file claims


def test_a_pickle_that_holds_itself_is_refused(tmp_path):
    itself, first, second = {}, {}, {}
    itself["model"] = itself
    first["generator"], second["state_dict"] = second, first
    for content in (itself, first):
        torch.save(content, tmp_path / "a.pt")
        refused(tmp_path / "a.pt", "wrapped more than 8 times")


def test_wrappers_are_followed_as_deep_as_tools_nest_them(weights, tmp_path):
    content = dict(weights)
    for depth in range(1, 10):
        content = {"model" if depth % 2 else "state_dict": content}
        torch.save(content, tmp_path / "a.pt")
        if depth <= 8:
            assert load_model(tmp_path / "a.pt").transformer.config.num_layers > 0
    refused(tmp_path / "a.pt", "wrapped more than 8 times")


def test_layer_numbers_are_not_believed(weights, tmp_path):
    extra = {"blocks.1000000000.attn1.to_q.weight": torch.zeros(2, 2)}
    refused(write_weights(tmp_path / "a.safetensors", weights | extra), r"blocks.1000000000.* more than 200 layers")
    extra = {"blocks.200.attn1.to_q.weight": torch.zeros(2, 2)}
    refused(write_weights(tmp_path / "a.safetensors", weights | extra), "more than 200 layers")


@pytest.mark.parametrize(
    "config, said",
    [
        ({"num_layers": 10**9}, "num_layers must be at most 200, got 1000000000"),
        ({"num_layers": "5"}, "num_layers must be a whole number, got '5'"),
        ({"rope_max_seq_len": 10**7}, "rope_max_seq_len must be at most 32768"),
        ({"eps": float("nan")}, "eps must be a number from 0 to 1, got nan"),
        ({"num_heads": 0}, "num_attention_heads must be at least 1"),
        ({"attention_head_dim": True}, "attention_head_dim must be a whole number, got True"),
    ],
)
def test_settings_of_a_file_are_checked(config, said, weights, tmp_path):
    save_file(weights, tmp_path / "a.safetensors", {"config": json.dumps({"transformer": config})})
    refused(tmp_path / "a.safetensors", said)
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, said)


@pytest.mark.parametrize(
    "values, said",
    [
        ([], "an object with names and values, not a list"),
        ({"\ud800": 1}, "unknown preset entries: .ud800"),
        ({"chunk": 2.5}, "chunk must be a whole number, got 2.5"),
        ({"chunk": 65}, "chunk must be at most 64 latent frames"),
        ({"window": 10**5}, "window must be at most 4096 latent frames"),
        ({"window": 2.5}, "window must be"),
        ({"sink": 1.5}, "sink must be a whole number"),
        ({"num_inference_steps": 10**8}, "num_inference_steps must be at most 1000"),
        ({"guidance_scale": "x"}, "guidance_scale must be a number from 0 to 1000, got 'x'"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number"),
        ({"shift": float("inf")}, "shift must be a number"),
        ({"shift": 1e308}, "shift must be a number"),
        ({"context_noise": "1"}, "context_noise is a timestep"),
        ({"denoising_steps": 5}, "denoising steps must be a list of timesteps, got 5"),
        ({"denoising_steps": [float("nan")]}, "denoising steps must fall"),
        ({"independent_first_frame": 1}, "independent_first_frame must be true or false"),
        ({"name": "\x1b[31m"}, "the name of a preset"),
    ],
)
def test_presets_of_a_file_are_checked(values, said, weights, tmp_path):
    with pytest.raises(ValueError, match=said):
        ModelPreset.from_dict(values)
    save_file(weights, tmp_path / "a.safetensors", {"rolling_kv": json.dumps({"preset": values})})
    refused(tmp_path / "a.safetensors", said)


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a": ' * 10**5, '{"a": ' + "9" * 5000 + "}"])
def test_deep_json_is_refused(text, weights, tmp_path):
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    refused(tmp_path, "config.json is not valid JSON")
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**30)
    refused(tmp_path, "1,073,741,824 bytes")


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/etc/passwd", ".", "", "..", "b/a.safetensors", "b\\a.safetensors", "C:a.safetensors"]
)
def test_an_index_names_files_of_its_folder_only(name, weights, tmp_path):
    save_file(weights, tmp_path / "a.safetensors")
    folder = tmp_path / "model"
    (folder / "b").mkdir(parents=True)
    save_file(weights, folder / "b" / "a.safetensors")
    (folder / "a.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    refused(folder, "no .safetensors file of this folder")
    for wrong in ([], {"x": 5}, "a.safetensors"):
        (folder / "a.safetensors.index.json").write_text(json.dumps({"weight_map": wrong}))
        refused(folder, '"weight_map" should give a file name')


def test_tensors_that_claim_more_than_the_file_holds_are_refused(weights, tmp_path):
    few = torch.zeros(1).expand(409600, 128)
    torch.save(weights | {"blocks.0.ffn.net.0.proj.weight": few}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", r"claims the shape \[409600, 128\], 209,715,200 bytes, of which the file holds 4")
    one = torch.zeros(1000, 1000)
    torch.save({f"x{i}": one for i in range(50)}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "the tensors claim 200,000,000 bytes")


def test_a_pickle_that_was_zipped_again_is_read_or_refused(weights, tmp_path):
    def zipped(content):
        torch.save(content, tmp_path / "a.pt")
        with (
            zipfile.ZipFile(tmp_path / "a.pt") as old,
            zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new,
        ):
            for entry in old.namelist():
                new.writestr(entry, old.read(entry))
        return tmp_path / "b.pt"

    loaded = load_model(zipped(weights)).transformer.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    refused(zipped({"x": torch.zeros(10**6)}), "claims to hold 4,")


def test_files_without_tensors_or_names_are_refused(tmp_path):
    save_file({}, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", "holds no tensors")
    torch.save({1: torch.zeros(2), None: 3, (4,): 5}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "no tensors; its entries are 1, None, a tuple")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", "a device or a pipe")


def test_a_scale_of_another_shape_or_without_value_is_refused(weights, tmp_path):
    stored, _ = scaled_float8(weights)
    name = "blocks.0.attn1.to_q.scale_weight"
    refused(
        write_weights(tmp_path / "a.safetensors", stored | {name: torch.ones(3)}), "scale of .*to_q.weight has the sh"
    )
    path = write_weights(tmp_path / "a.safetensors", stored | {name: torch.tensor(float("nan"))})
    refused(path, "1 of .* hold values that are no numbers .*to_q.weight", load_model)


# Values


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_that_are_no_numbers_are_refused(value, dtype, weights, tmp_path):
    changed = {name: tensor.clone().to(getattr(torch, dtype)) for name, tensor in weights.items()}
    changed["blocks.1.attn2.to_v.weight"][77, 33] = value
    refused(write_weights(tmp_path / "a.safetensors", changed), "blocks.1.attn2.to_v.weight", load_model)


def test_a_chunk_that_is_no_numbers_ends_the_run(weights, tmp_path):
    changed = {name: tensor * 1e30 if "to_out" in name else tensor for name, tensor in weights.items()}
    model = load_model(write_weights(tmp_path / "a.safetensors", changed))
    sampling = SamplingConfig(chunk=1, denoising_steps=(1000, 500))
    prompt = torch.ones(1, 5, 32)
    with RollingSession(model, prompt, height=32, width=32, sampling=sampling, cache=CacheConfig(3)) as session:
        with pytest.raises(ValueError, match="the sampled latents from latent frame 0 on .* no numbers"):
            next(session.generate(1))
        assert not session.state.chunks
    state = CacheState()
    for value in (float("nan"), float("inf")):
        chunk = torch.zeros(1, 16, 1, 4, 4)
        chunk[0, 3, 0, 2, 1] = value
        with pytest.raises(ValueError, match="the given latents from latent frame 0 on"):
            state.extended(chunk, timestep=0.0, prompt=prompt, negative=None, seed=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("size", [1, 3, 8, 1001, 300_001])
def test_every_value_enters_the_fingerprint(dtype, size):
    values = (torch.arange(size) % 7).to(dtype)
    known = fingerprint({"a": values})
    assert fingerprint({"a": values.clone()}) == known
    for place in {0, size // 3, size - 1}:
        changed = values.clone()
        changed[place] = 9
        assert fingerprint({"a": changed}) != known
    if size > 8:
        swapped = values.clone()
        swapped[[1, size // 7 * 7 - 2]] = swapped[[size // 7 * 7 - 2, 1]]
        assert fingerprint({"a": swapped}) != known
    assert fingerprint({"b": values}) != known
    assert fingerprint({"a": values[None]}) != known
    assert fingerprint({"a": values}, "other") != known
    padded = torch.cat([values[:1], values])[1:]  # another place in memory
    assert fingerprint({"a": padded}) == known


def test_models_that_differ_in_one_value_are_told_apart(weights):
    known = CausalModel(tiny_transformer()).identity
    for name in ("blocks.1.ffn.net.2.weight", "proj_out.bias", "scale_shift_table"):
        model = tiny_transformer()
        flat = model.get_parameter(name).view(-1)
        flat[len(flat) // 2 + 1] += 0.5
        assert CausalModel(model).identity != known


# Files that change while they are loaded

CHANGES = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import torch
from rolling_kv.checkpoints.gguf import plain
from rolling_kv.checkpoints.model import load_model
from rolling_kv.text import load_text_encoder
from rolling_kv.vae.loading import load_vae

torch.set_num_threads(1)
load = {"model": load_model, "text": load_text_encoder, "vae": load_vae}
for path, kind, dtype in json.loads(sys.argv[2]):
    module = load[kind](path, dtype=dtype)

    def held():
        tensors = {name: plain(tensor).contiguous() for name, tensor in module.state_dict().items() if tensor.ndim}
        return {name: tensor.view(torch.uint8) for name, tensor in tensors.items()}

    before = {name: tensor.clone() for name, tensor in held().items()}
    for harm in (lambda file: file.write(b"\\xff" * os.path.getsize(path)), lambda file: file.truncate(1000)):
        with open(path, "r+b") as file:
            harm(file)
        print(path, all(torch.equal(tensor, before[name]) for name, tensor in held().items()), flush=True)
"""


def test_what_is_loaded_does_not_change_with_its_file(weights, tmp_path):
    cases = [("a.safetensors", "model", "auto"), ("b.safetensors", "model", "bfloat16"), ("c.pt", "model", "auto")]
    cases += [("text.safetensors", "text", "auto"), ("vae.safetensors", "vae", "auto")]
    tensors = {name: tensor for name, tensor in tiny_umt5().state_dict().items() if "embed_tokens" not in name}
    (tmp_path / "spiece.model").write_bytes(sentencepiece_model())
    for name, kind, _ in cases:
        write_weights(tmp_path / name, {"model": weights, "text": tensors, "vae": tiny_vae().state_dict()}[kind])
    if is_gguf_available():
        from gguf_files import Kind, write_gguf

        write_gguf(tmp_path / "d.gguf", weights, Kind.Q8_0)
        cases.append(("d.gguf", "model", "auto"))
    cases = [(str(tmp_path / name), *rest) for name, *rest in cases]
    command = [sys.executable, "-c", CHANGES, str(ROOT), json.dumps(cases)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.stdout.splitlines() == [f"{path} True" for path, *_ in cases for _ in range(2)], result.stderr[-2000:]
    assert result.returncode == 0
