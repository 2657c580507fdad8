"""Model files that are damaged, or made to do harm: any number of them, each from a seed.

`write_case(seed, folder)` writes one and says what reads it. A case changes something that loads: a file's bytes, its
tensors, its metadata, what it is wrapped in, or the JSON beside it.
"""

import json
import os
import pickle
import random
import zipfile
from pathlib import Path

import torch
from builders import original_names, sentencepiece_model, tiny_transformer, tiny_umt5
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file

from rolling_kv.presets import PRESETS

NAMES = (
    "x" * 10**6, "\ud800", "\x1b[31mred\x1b[0m", "a\nb\r\tc", "", ".", "..", "../" * 40 + "etc/passwd", "/etc/passwd",
    "\udcff.safetensors", "C:\\a.safetensors", "blocks.1000000000.attn1.to_q.weight", "blocks.0." * 1000, "\u202egnp.exe",
    "blocks.9.attn1.to_q.weight", "encoder.block.100000000.layer.0.SelfAttention.q.weight", "model." * 5000 + "x", "日本語",
)  # fmt: skip
NUMBERS = (
    0, -1, 1, 2, 7, 10**3, 10**5, 10**7, 10**9, 10**18, 2**63, 10**300, -(10**18), 0.0, -0.5, 2.5, 1e-300, 1e308,
    float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
FIELDS = (
    "num_attention_heads",
    "num_heads",
    "attention_head_dim",
    "num_layers",
    "eps",
    "rope_max_seq_len",
    "patch_size",
)
PRESET_FIELDS = tuple(PRESETS["self-forcing"].to_dict())
TEXT_FIELDS = (
    "relative_attention_max_distance",
    "layer_norm_epsilon",
    "eos_token_id",
    "feed_forward_proj",
    "vocab_size",
)
VAE_FIELDS = (
    "base_dim", "decoder_base_dim", "z_dim", "dim_mult", "num_res_blocks", "attn_scales", "temperal_downsample",
    "latents_mean", "latents_std", "dropout", "is_residual", "patch_size",
)  # fmt: skip


def wild(rng: random.Random, depth: int = 0):
    """A JSON value of any kind."""
    kinds = [lambda: rng.choice(NUMBERS), lambda: rng.choice(NAMES), lambda: None, lambda: rng.random() < 0.5,
             lambda: str(rng.choice(NUMBERS))]  # fmt: skip
    if depth < 3:
        kinds.append(lambda: [wild(rng, depth + 1) for _ in range(rng.randrange(4))])
        kinds.append(lambda: {rng.choice(NAMES): wild(rng, depth + 1) for _ in range(rng.randrange(3))})
    return rng.choice(kinds)()


def wild_text(rng: random.Random, fields) -> str:
    """The text of a JSON object in which some of the fields have wild values; sometimes it is no such thing."""
    start = rng.random()
    if start < 0.06:
        return "[" * 10**5
    if start < 0.1:
        return rng.choice(["", "{", "[]", "3", "null", '"x"', "{'a': 1}", "\ufeff{}", '{"a": 1e400}', "9" * 5000])
    return json.dumps({rng.choice(fields): wild(rng) for _ in range(rng.randint(1, 2))})


def damage(rng: random.Random, content: bytes) -> bytes:
    """The bytes with something changed, mostly near the start, where a file tells what is in it."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 3, 40))):
        place = rng.randrange(max(1, min(len(content), rng.choice((16, 400, 4000, 10**9)))))
        action = rng.randrange(4)
        if action == 0:
            content[place : place + 1] = bytes([rng.randrange(256)])
        elif action == 1:
            del content[place : place + rng.choice((1, 8, 1000))]
        elif action == 2:
            content[place:place] = rng.choice((b"\0", b"\xff" * 8, b"9" * 6, b"[" * 20000))
        else:
            content[place : place + 8] = rng.choice((b"\xff" * 8, b"\0" * 8, b"\xff" * 7 + b"\x7f"))
    return bytes(content[: rng.randrange(len(content) + 1)] if rng.random() < 0.2 else content)


def change_tensors(rng: random.Random, tensors: dict, strict: bool) -> dict:
    """The tensors with one of them harmed. strict: only what a safetensors file can hold."""
    tensors = dict(tensors)
    name = rng.choice(list(tensors))
    tensor = tensors[name]
    values = [
        lambda: tensor.clone().fill_(rng.choice((float("nan"), float("inf"), 1e30, -1e38))),
        lambda: tensor.flatten()[:0].clone(),
        lambda: tensor.flatten()[0].clone(),
        lambda: tensor.unsqueeze(0).clone(),
        lambda: torch.cat([tensor, tensor]),
        lambda: tensor.to(rng.choice((torch.int32, torch.uint8, torch.bool, torch.float64, torch.float8_e4m3fn))),
        lambda: tensor.new_zeros(0, 10**6),
        lambda: torch.zeros([1] * 40),
    ]
    if not strict:
        values += [
            lambda: tensor.flatten()[:1].expand(409600, 409600),
            lambda: tensor.to_sparse(),
            lambda: tensor.to(torch.complex64),
            lambda: torch.quantize_per_tensor(tensor.float(), 1.0, 0, torch.qint8),
            lambda: "no tensor",
            lambda: None,
        ]
    action = rng.randrange(5)
    if action == 0:
        del tensors[name]
    elif action == 1:
        added = rng.choice([name for name in NAMES if not strict or "\ud800" not in name and "\udcff" not in name])
        tensors[added] = torch.zeros(2, 2)
    elif action == 2:
        tensors[f"{name.removesuffix('weight')}scale_weight"] = torch.full(rng.choice(((), (3,), (2, 2))), float("nan"))
        tensors[name] = tensor.to(torch.float8_e4m3fn)
    else:
        tensors[name] = rng.choice(values)()
    return tensors


def wrapped(rng: random.Random, tensors: dict):
    """What a pickle may hold instead of tensors."""
    itself = {"step": 1}
    itself[rng.choice(("model", "generator", "state_dict"))] = itself
    first, second = {}, {}
    first["generator_ema"], second["model"] = second, first
    deep = dict(tensors)
    for _ in range(rng.choice((3, 50, 900))):
        deep = {"model": deep}
    knot = ()
    for _ in range(60):
        knot = (knot, knot)
    keys = dict(zip((1, None, 2.5, (3, 4), b"b", *NAMES), tensors.values()))
    return rng.choice(
        (itself, first, deep, keys, knot, {"x": knot}, [tensors], tensors["proj_out.weight"], {}, 3, "x", None)
    )


def tiny_vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(base_dim=4).eval().requires_grad_(False)


class Sources:
    """What loads, and is harmed: made once."""

    def __init__(self):
        transformer, vae = tiny_transformer(), tiny_vae()
        self.transformer, self.transformer_config = dict(transformer.state_dict()), dict(transformer.config)
        self.vae, self.vae_config = dict(vae.state_dict()), dict(vae.config)
        self.pieces = {"spiece_model": torch.frombuffer(bytearray(sentencepiece_model()), dtype=torch.uint8)}
        self.text = {name: t.clone() for name, t in tiny_umt5().state_dict().items() if "embed_tokens" not in name}


def write_case(seed: int, folder: Path, sources: Sources) -> tuple[str, Path]:
    """Write one case; returns what it is given for ("model", "text" or "vae") and its path."""
    rng = random.Random(seed)
    return rng.choice((_bytes, _safetensors, _pickle, _metadata, _folder, _folder, _gguf, _text, _vae, _name))(
        rng, folder, sources
    )


def _bytes(rng, folder, sources):
    kind, tensors = rng.choice((("model", sources.transformer), ("vae", sources.vae),
                                ("text", sources.text | sources.pieces)))  # fmt: skip
    path = folder / rng.choice(("a.safetensors", "a.pt"))
    torch.save(tensors, path, _use_new_zipfile_serialization=rng.random() < 0.5) if path.suffix == ".pt" else save_file(
        tensors, path
    )
    path.write_bytes(damage(rng, path.read_bytes()))
    return kind, path


def _safetensors(rng, folder, sources):
    tensors = rng.choice((dict, original_names))(sources.transformer)
    save_file(change_tensors(rng, tensors, strict=True), folder / "a.safetensors")
    return "model", folder / "a.safetensors"


def _pickle(rng, folder, sources):
    path = folder / "a.pt"
    kind = rng.randrange(4)
    if kind == 0:
        path.write_bytes(pickle.dumps(wrapped(rng, sources.transformer), protocol=rng.randrange(5)))
        return "model", path
    content = wrapped(rng, sources.transformer) if kind == 1 else change_tensors(rng, sources.transformer, strict=False)
    torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.7)
    if rng.random() < 0.3 and zipfile.is_zipfile(path):  # somebody packs it again
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(folder / "b.pt", "w", zipfile.ZIP_DEFLATED) as other:
            for entry in archive.namelist():
                other.writestr(entry, archive.read(entry))
        path = folder / "b.pt"
    return "model", path


def _metadata(rng, folder, sources):
    if rng.random() < 0.5:
        metadata = {"rolling_kv": '{"preset": ' + wild_text(rng, PRESET_FIELDS) + "}"}
    else:
        metadata = {"config": '{"transformer": ' + wild_text(rng, FIELDS) + "}"}
    metadata = {name: text.encode("utf-8", "replace").decode() for name, text in metadata.items()}
    save_file(sources.transformer, folder / "a.safetensors", metadata)
    return "model", folder / "a.safetensors"


def _folder(rng, folder, sources):
    save_file(sources.transformer, folder / "diffusion_pytorch_model.safetensors")
    text = json.dumps(sources.transformer_config)
    name, text = rng.choice((
        ("rolling_kv.json", '{"preset": ' + wild_text(rng, PRESET_FIELDS) + "}"),
        ("config.json", wild_text(rng, FIELDS)),
        ("config.json", json.dumps(json.loads(text) | {rng.choice(FIELDS): wild(rng)})),
        ("a.safetensors.index.json", json.dumps({"weight_map": wild(rng)})),
        ("a.safetensors.index.json", json.dumps({"weight_map": {"a": rng.choice(NAMES), "b": rng.choice(NAMES)}})),
        ("a.safetensors.index.json", wild_text(rng, ("weight_map", "metadata"))),
    ))  # fmt: skip
    content = text.encode("utf-8", "surrogatepass")
    (folder / name).write_bytes(damage(rng, content) if rng.random() < 0.2 else content)
    return "model", folder


def _gguf(rng, folder, sources):
    path = folder / "a.gguf"
    try:
        import gguf
    except ModuleNotFoundError:
        path.write_bytes(damage(rng, b"GGUF" + b"\3\0\0\0" + b"\1" + b"\0" * 15))
        return "model", path
    writer = gguf.GGUFWriter(path, "wan")
    tensors = sources.transformer | {name: t[: rng.randrange(3)] for name, t in list(sources.transformer.items())[:1]}
    for name, tensor in (tensors if rng.random() < 0.3 else sources.transformer).items():
        values = tensor.numpy()
        if values.ndim == 5:
            shape = rng.choice(([*values.shape], [1, 2, 3], [0], [2**31 - 1] * 4, [-1, 16, 1, 2, 2]))
            if rng.random() < 0.7:
                writer.add_array(f"comfy.gguf.orig_shape.{name}", shape)
            values = values.reshape(-1, *values.shape[2:])
        writer.add_tensor(name, values)
    if rng.random() < 0.3:
        writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
        writer.add_string("tokenizer.ggml.model", rng.choice(("t5", "llama", "\x1b[31m")))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    if rng.random() < 0.6:
        path.write_bytes(damage(rng, path.read_bytes()))
    return "model", path


def _text(rng, folder, sources):
    tensors = sources.text | sources.pieces
    action = rng.randrange(4)
    if action == 0:
        tensors = change_tensors(rng, tensors, strict=True)
    elif action == 1:
        pieces = sources.pieces["spiece_model"]
        tensors["spiece_model"] = rng.choice((
            pieces[:0].clone(), pieces.to(torch.bfloat16), torch.frombuffer(bytearray(damage(rng, bytes(pieces))), dtype=torch.uint8),
            pieces[:40].clone(), pieces[None].clone(),
        ))  # fmt: skip
    elif action == 2:
        del tensors["spiece_model"]
        (folder / "tokenizer.json").write_text(rng.choice(("{}", "[" * 10**5, "", '{"model": null}')))
    save_file(tensors, folder / "model.safetensors")
    if action == 3:
        (folder / "config.json").write_text(wild_text(rng, TEXT_FIELDS), "utf-8", "surrogatepass")
        return "text", folder
    return "text", folder / "model.safetensors"


def _vae(rng, folder, sources):
    if rng.random() < 0.5:
        save_file(change_tensors(rng, sources.vae, strict=True), folder / "a.safetensors")
        return "vae", folder / "a.safetensors"
    save_file(sources.vae, folder / "diffusion_pytorch_model.safetensors")
    config = (
        wild_text(rng, VAE_FIELDS)
        if rng.random() < 0.5
        else json.dumps(sources.vae_config | {rng.choice(VAE_FIELDS): wild(rng)})
    )
    (folder / "config.json").write_text(config, "utf-8", "surrogatepass")
    return "vae", folder


def _name(rng, folder, sources):
    """A damaged file of a name that is not UTF-8, as unzip leaves it, or that steers a terminal."""
    name = (
        os.fsencode(str(folder))
        + rng.choice((b"/\xb0\xa1", b"/\x1b[31m", b"/a\nb", b"/" + b"x" * 200))
        + b".safetensors"
    )
    path = Path(os.fsdecode(name))
    path.write_bytes(rng.randbytes(rng.randrange(100)))
    return rng.choice(("model", "text", "vae")), path
