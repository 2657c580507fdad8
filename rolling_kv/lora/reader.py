"""Reading LoRA files in any layout they come in. `lora_stack` applies them to a model."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from torch import Tensor

from ..checkpoints.names import LORA, kind_of, named
from ..checkpoints.readers import Checkpoint, CheckpointError, open_checkpoint, read_json, telling

_PREFIX = re.compile(r"(lora_unet_|lycoris_|(base_model|model|diffusion_model|transformer|generator)\.)+")
_SHARDING = re.compile(r"(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")
_UNDERSCORES = re.compile(r"(?<=blocks)_|(?<=\d)_|_(?=\d)|(?<=attn)_|(?<=ffn)_|(?<=head)_")
"""The underscores of a kohya name (blocks_0_self_attn_q) that stand for dots."""
_KEY = re.compile(
    r"(?P<module>.+?)\."
    r"(?:(?P<down>lora_A|lora_down|lora\.down)|(?P<up>lora_B|lora_up|lora\.up)|(?P<other>alpha|diff_b|diff))"
    r"(?:\.(?!weight$|bias$)\w+)?(?:\.(?P<kind>weight|bias))?"  # the adapter's name, as in lora_A.default.weight
)
_OTHER_ADAPTERS = re.compile(r"\.(lokr_|hada_|oft_|boft_|dora_scale|lora_magnitude_vector)")
_IMAGE_BRANCH = re.compile(r"\.(add_k_proj|add_v_proj|norm_added_k)|image_embedder")
_ANY = torch.empty(1, 1, 1, 1)
"""Stands for a value where only the name is converted."""


class LowRank(NamedTuple):
    """The change of one layer: its weight plus `alpha / rank * up @ down`."""

    down: Tensor  # [rank, in, …]
    up: Tensor  # [out, rank, …]
    alpha: float


@dataclass(frozen=True, eq=False)
class Lora:
    """An opened LoRA, under diffusers' names. Its tensors are mapped from disk and never changed.

    layers: by name of the module. diffs: what is added to whole parameters (biases, norms), by name of the parameter.
    identity: 16 hex digits that tell it from others, the same for every layout it is read from.
    """

    name: str
    layers: dict[str, LowRank]
    diffs: dict[str, Tensor]
    identity: str

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes that it takes on the device beside the weights, in `dtype`."""
        tensors = [tensor for layer in self.layers.values() for tensor in layer[:2]] + list(self.diffs.values())
        return sum(tensor.numel() for tensor in tensors) * dtype.itemsize


@torch.inference_mode(False)
def load_lora(path: str | Path) -> Lora:
    """Open a LoRA for a Wan model: .safetensors, a pickle such as LongLive's `lora.pt`, or a folder as PEFT writes it.

    Reads PEFT's, kohya's and ComfyUI's tensor names, on original Wan or diffusers module names. The scale is
    alpha / rank, alpha from the file (or the adapter's config); 1 where there is none. Parts of a LoRA that belong to
    an image encoder are left out: causal models have none.

    Raises CheckpointError for a file that is no LoRA, is incomplete, or is an adapter of another kind (LoKr, DoRA, …).
    """
    path = Path(path)
    with telling(path):
        checkpoint = open_checkpoint(path)
        return read_lora(checkpoint.tensors, path.stem, _adapter_settings(checkpoint))


def _adapter_settings(checkpoint: Checkpoint) -> dict:
    beside = checkpoint.files[0].with_name("adapter_config.json")
    if checkpoint.files[0].stem == "adapter_model" and beside.exists():
        return read_json(beside)
    try:
        settings = dict(json.loads(checkpoint.metadata.get("lora_adapter_metadata", "{}")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"its metadata lora_adapter_metadata is no JSON object: {error}") from error
    return {name.removeprefix("transformer."): value for name, value in settings.items()}


def read_lora(tensors: dict[str, Tensor], name: str = "lora", settings: dict | None = None) -> Lora:
    """The LoRA in named tensors. settings: `lora_alpha`, `alpha_pattern` and `use_rslora` of a PEFT config."""
    foreign = [key for key in tensors if _OTHER_ADAPTERS.search(key)]
    if foreign:
        raise CheckpointError(
            f"this is an adapter of another kind than LoRA (it holds {named(tensors, foreign)}). Only plain LoRA is "
            "read here: merge it into the model with the tool that made it, or use its LoRA version."
        )
    kind = kind_of(tensors)
    if kind != LORA:
        raise CheckpointError(f"this is {kind}, not a LoRA. Give it where a model of that kind is asked for.")
    down, up, alphas, biases, diffs, strange = {}, {}, {}, {}, {}, []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(_without_prefix(key))
        if match is None:
            strange.append(key)
        elif match["other"] == "alpha":
            alphas[match["module"]] = float(tensor)
        elif match["other"]:
            if tensor.any():  # norms often come with a difference of zero, also where the model has none
                diffs[_parameter(match["module"], match["other"])] = tensor
        elif match["kind"] == "bias":
            biases[match["module"]] = tensor
        else:
            (down if match["down"] else up)[match["module"]] = tensor
    if strange:
        raise CheckpointError(f"{len(strange)} tensors of this LoRA are not understood: {named(tensors, strange)}.")
    halves = sorted(down.keys() ^ up.keys())
    if halves:
        raise CheckpointError(
            f"the LoRA is incomplete: {len(halves)} layers have one of their two matrices ({', '.join(halves[:3])})."
        )
    layers = {}
    for module in down:
        rank = len(down[module])
        if up[module].shape[1] != rank:
            raise CheckpointError(f"the matrices of {module} have the ranks {rank} and {up[module].shape[1]}.")
        alpha = alphas.get(module, _default_alpha(settings or {}, module, rank))
        layers[module] = LowRank(down[module], up[module], alpha)
        if module in biases:
            diffs[f"{module}.bias"] = biases[module] * (alpha / rank)
    if not any(".attn1." in module or ".attn2." in module for module in layers):
        layers = {_diffusers_name(f"{module}.weight").removesuffix(".weight"): layers[module] for module in layers}
        diffs = {_diffusers_name(parameter): diffs[parameter] for parameter in diffs}
    layers, diffs = _without_image_branch(layers), _without_image_branch(diffs)
    return Lora(name, layers, diffs, _fingerprint(layers, diffs))


def _without_prefix(key: str) -> str:
    key = _SHARDING.sub("", key)
    prefix = _PREFIX.match(key)
    key = key[prefix.end() :] if prefix else key
    if not prefix or not prefix[0].endswith("_"):
        return key
    module, dot, rest = key.partition(".")
    return _UNDERSCORES.sub(".", module) + dot + rest


def _parameter(module: str, difference: str) -> str:
    if module.endswith(("modulation", "scale_shift_table")):
        return module
    return f"{module}.{'bias' if difference == 'diff_b' else 'weight'}"


def _diffusers_name(parameter: str) -> str:
    return next(iter(convert_wan_transformer_to_diffusers({parameter: _ANY})))


def _without_image_branch(parts: dict) -> dict:
    return {name: part for name, part in parts.items() if not _IMAGE_BRANCH.search(name)}


def _default_alpha(settings: dict, module: str, rank: int) -> float:
    patterns = settings.get("alpha_pattern", {}).items()
    found = (value for pattern, value in patterns if re.fullmatch(rf"(.*\.)?({pattern})", module))
    alpha = float(next(found, settings.get("lora_alpha") or rank))  # a number in every layout: it is in the identity
    return alpha * rank**0.5 if settings.get("use_rslora") else alpha


def _fingerprint(layers: dict[str, LowRank], diffs: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    parts = [(f"{name} {layer.alpha}", tensor) for name, layer in layers.items() for tensor in layer[:2]]
    for name, tensor in sorted([*parts, *diffs.items()], key=lambda part: part[0]):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.flatten()[:: max(1, tensor.numel() // 16)].float().numpy().tobytes())
    return digest.hexdigest()[:16]
