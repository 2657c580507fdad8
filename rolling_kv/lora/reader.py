"""Reading LoRA files in any layout they come in. `stack` applies them to a model."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from torch import Tensor

from ..checkpoints.dtypes import dtype_name
from ..checkpoints.names import LORA, kind_of, named
from ..checkpoints.readers import Checkpoint, CheckpointError, open_checkpoint, read_json, telling
from .formulas import Change, shape_of

_PREFIX = re.compile(
    r"(lora_unet_+|lora_transformer_+|lycoris_+"
    r"|(base_model|model|diffusion_model|transformer|generator|pipe|dit|unet|module)\.)+"
)
_SHARDING = re.compile(r"(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")
_UNDERSCORES = re.compile(r"(?<=blocks)_|(?<=\d)_|(?<!linear)_(?=\d)|(?<=attn)_|(?<=ffn)_|(?<=head)_|(?<=embedder)_")
"""The underscores of a kohya name (blocks_0_self_attn_q) that stand for dots."""
_KEY = re.compile(
    r"(?P<module>.{1,300}?)\."
    r"(?P<part>lora_[AB]|lora_down|lora_up|lora\.down|lora\.up|alpha|diff(?:_[bm])?|[wb]_norm"
    r"|dora_scale|lora_magnitude_vector|lokr_w[12](?:_[ab])?|lokr_t2|hada_w[12]_[ab]|hada_t[12]|oft_blocks|rescale)"
    r"(?:\.(?!weight$|bias$)[\w-]+)?(?:\.(?P<kind>weight|bias))?"  # the adapter's name, as in lora_A.default.weight
)
_PARTS = {  # what the formats call the same thing
    "lora_A": "down", "lora_down": "down", "lora.down": "down",
    "lora_B": "up", "lora_up": "up", "lora.up": "up",
    "dora_scale": "magnitude", "lora_magnitude_vector": "magnitude",
}  # fmt: skip
_WHOLE = {"diff": "weight", "w_norm": "weight", "diff_b": "bias", "b_norm": "bias", "diff_m": "modulation"}
"""Differences of a whole parameter, and which of the module's it is."""
_KINDS = {"down": "lora", "up": "lora", "lokr": "lokr", "hada": "loha", "oft": "oft", "rescale": "oft"}
"""Kinds of adapter, by how the names of their tensors begin."""
_OTHER_ADAPTERS = re.compile(r"\.(oft_[rR]|boft_|vera_|ia3_|on_input|fourierft_|hra_|lora_mid|(a1|a2|b1|b2)\.weight)")
_IMAGE_BRANCH = re.compile(r"\.(add_k_proj|add_v_proj|norm_added_k)|image_embedder")
_DIFFUSERS_NAMES = re.compile(r"\.attn[12]\.|\.ffn\.net\.|scale_shift_table|condition_embedder|proj_out")
_PATTERN = re.compile(r"\^?[\w.-]+")
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

    layers: by name of the module. changes: of whole parameters (biases, norms, other kinds than LoRA), by name of the
    parameter. identity: 16 hex digits over kinds, names, scales and every value, the same for every layout it is read
    from; an image encoder's parts do not count, as causal models have none. left_out: the parts that have no place in
    the model it was fitted to, by name, with the shape where that is what does not fit.
    """

    name: str
    layers: dict[str, LowRank]
    changes: dict[str, Change]
    identity: str
    left_out: tuple[str, ...] = ()

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes that it takes on the device beside the weights, in `dtype`."""
        tensors = [tensor for layer in self.layers.values() for tensor in layer[:2]]
        tensors += [tensor for change in self.changes.values() for tensor in change.tensors.values()]
        return sum(tensor.numel() for tensor in tensors) * dtype.itemsize


@torch.inference_mode(False)
def load_lora(path: str | Path) -> Lora:
    """Open a LoRA for a Wan model: .safetensors, a pickle such as LongLive's `lora.pt`, or a folder as PEFT writes it.

    Reads LoRA, DoRA, LoKr, LoHa, OFT and differences of whole parameters, in PEFT's, kohya's, LyCORIS's, DiffSynth's
    and ComfyUI's tensor names, on original Wan or diffusers module names. The scale is alpha / rank, alpha from the
    file (or the adapter's config); 1 where there is none.

    Raises CheckpointError for a file that is no LoRA, is incomplete, or is an adapter of another kind (BOFT, GLoRA, …).
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
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"its metadata lora_adapter_metadata is no JSON object: {error}") from error
    return {name.removeprefix("transformer."): value for name, value in settings.items()}


def read_lora(tensors: dict[str, Tensor], name: str = "lora", settings: dict | None = None) -> Lora:
    """The LoRA in named tensors. settings: `lora_alpha`, `alpha_pattern`, `use_rslora`, … of a PEFT config."""
    foreign = [key for key in tensors if _OTHER_ADAPTERS.search(key) or ".oft_blocks" in key and tensors[key].ndim == 4]
    if foreign:
        raise CheckpointError(
            f"this is an adapter of another kind than LoRA (it holds {named(tensors, foreign)}). LoRA, DoRA, LoKr, LoHa "
            "and OFT are read here: merge it into the model with the tool that made it, or use its LoRA version."
        )
    kind = kind_of(tensors)
    if kind != LORA:
        raise CheckpointError(f"this is {kind}, not a LoRA. Give it where a model of that kind is asked for.")
    modules = _modules(tensors)
    halves = sorted(module for module, parts in modules.items() if ("down" in parts) != ("up" in parts))
    if halves:
        raise CheckpointError(
            f"the LoRA is incomplete: {len(halves)} layers have one of their two matrices ({', '.join(halves[:3])})."
        )
    settings = _checked(settings or {})
    original = not any(_DIFFUSERS_NAMES.search(f"{module}.") for module in modules)
    layers, changes = {}, {}
    for module, parts in modules.items():
        for parameter, change in _changes(module, parts, settings):
            renamed = _diffusers_name(parameter) if original else parameter.replace(".modulation", ".scale_shift_table")
            into, key = changes, renamed
            if isinstance(change, LowRank):
                into, key = layers, renamed.removesuffix(".weight")
            if key in into:
                raise CheckpointError(
                    f"the LoRA changes {parameter} in two ways. One of them is meant for another model."
                )
            into[key] = change
    return Lora(name, layers, changes, _fingerprint(layers, changes))


def _modules(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors by module, and by what they are of its change."""
    modules, strange = {}, []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(_without_prefix(key))
        if match is None:
            strange.append(key)
            continue
        part = _PARTS.get(match["part"], match["part"])
        if part == "up" and match["kind"] == "bias":
            part = "up_bias"
        parts = modules.setdefault(match["module"], {})
        if part in parts:
            raise CheckpointError(
                f"the file holds several adapters: {key} is not the only {match['part']} of {match['module']}. Save one of "
                "them to a file of its own."
            )
        _check_values(key, part, tensor)
        parts[part] = tensor.detach()
    if strange:
        raise CheckpointError(f"{len(strange)} tensors of this LoRA are not understood: {named(tensors, strange)}.")
    return modules


def _check_values(key: str, part: str, tensor: Tensor) -> None:
    if part == "alpha" and tensor.numel() != 1:
        raise CheckpointError(f"{key} should be one number; it has {tensor.numel()} values ({list(tensor.shape)}).")
    if tensor.is_complex() or part != "alpha" and not tensor.is_floating_point():
        raise CheckpointError(f"{key} holds {dtype_name(tensor.dtype)} numbers, which are not read in a LoRA.")
    if not tensor.numel():
        raise CheckpointError(f"{key} is empty ({list(tensor.shape)}): its rank would be 0. The file is of no use.")
    values = tensor.float() if tensor.element_size() == 1 else tensor  # float8 has no minimum
    if not all(math.isfinite(bound) for bound in values.aminmax()):
        raise CheckpointError(f"{key} holds values that are not finite (NaN or infinity). The file is of no use.")


def _changes(module: str, parts: dict[str, Tensor], settings: dict) -> Iterator[tuple[str, LowRank | Change]]:
    """What the tensors of one module change: the parameter, and how."""
    for part in [part for part in _WHOLE if part in parts]:
        diff = parts.pop(part)
        if diff.any():  # norms often come with a difference of zero, also where the model has none
            yield _parameter(module, _WHOLE[part]), Change("diff", {"diff": diff})
    alpha, bias = parts.pop("alpha", None), parts.pop("up_bias", None)
    if not parts:
        return
    kinds = {kind for part in parts for start, kind in _KINDS.items() if part.startswith(start)}
    kind = kinds.pop() if len(kinds) == 1 else ""
    if not kind or kind == "oft" and "magnitude" in parts:
        raise CheckpointError(f"the tensors of {module} are not those of one adapter: {named(parts, list(parts))}.")
    if kind == "oft" and alpha is not None:
        parts = parts | {"alpha": alpha}  # a bound there, not a scale
    alpha, rank = _alpha_and_rank(kind, module, parts, alpha, settings)
    change = Change(kind, parts, alpha / rank)
    _check_shapes(module, change)
    yield f"{module}.weight", _low_rank(parts, alpha) if kind == "lora" and "magnitude" not in parts else change
    if bias is not None:
        yield f"{module}.bias", Change("diff", {"diff": bias * change.scale})


def _check_shapes(module: str, change: Change) -> None:
    if change.kind == "lora" and all(tensor.ndim > 1 for tensor in change.tensors.values()):
        ranks = len(change.tensors["down"]), change.tensors["up"].shape[1]
        if ranks[0] != ranks[1]:
            raise CheckpointError(f"the matrices of {module} have the ranks {ranks[0]} and {ranks[1]}.")
    listed = named(change.tensors, list(change.tensors))
    try:
        shape_of(change)
    except KeyError as missing:
        raise CheckpointError(f"the LoRA is incomplete: {module} has {listed}, but no {missing.args[0]}.") from None
    except (RuntimeError, ValueError, IndexError):
        raise CheckpointError(f"the tensors of {module} do not go together: {listed}. The file is damaged.") from None


def _low_rank(parts: dict[str, Tensor], alpha: float) -> LowRank:
    down, up = parts["down"], parts["up"]
    if down.shape[2:].numel() == 1:  # a Linear layer that was trained as a convolution of one pixel
        down = down.flatten(1)
    return LowRank(down, up.reshape(*up.shape[:2], *[1] * (down.ndim - 2)), alpha)


def _alpha_and_rank(
    kind: str, module: str, parts: dict[str, Tensor], alpha: Tensor | None, settings: dict
) -> tuple[float, float]:
    """Whose quotient is the scale, as the trainers of each kind mean it."""
    ranked = {"lora": ("down",), "loha": ("hada_w1_b",), "lokr": ("lokr_w2_b", "lokr_w1_b"), "oft": ()}[kind]
    rank = next((len(parts[part]) for part in ranked if part in parts), None)
    if rank is None and alpha is None and kind == "lokr":  # whole factors: LyCORIS does not scale them, PEFT does
        rank = _of_module(settings["rank_pattern"], module, settings["r"])
    if not rank:
        return 1.0, 1.0
    if alpha is not None:
        return float(alpha), rank
    given = _of_module(settings["alpha_pattern"], module, settings["alpha"] or None)
    value = float(rank if given is None else given)
    return value * rank**0.5 if settings["use_rslora"] else value, rank


def _without_prefix(key: str) -> str:
    key = _SHARDING.sub("", key)
    prefix = _PREFIX.match(key)
    key = key[prefix.end() :] if prefix else key
    if not prefix or not prefix[0].endswith("_"):
        return key
    module, dot, rest = key.partition(".")
    return _UNDERSCORES.sub(".", module) + dot + rest


def _parameter(module: str, last: str) -> str:
    return module if module.endswith(("modulation", "scale_shift_table")) else f"{module}.{last}"


def _diffusers_name(parameter: str) -> str:
    return next(iter(convert_wan_transformer_to_diffusers({parameter: _ANY})))


def _checked(settings: dict) -> dict:
    """What counts of a PEFT config, whose values come from a file."""
    return {
        "alpha": _number(settings, "lora_alpha") or _number(settings, "alpha"),
        "alpha_pattern": _patterns(settings, "alpha_pattern"),
        "use_rslora": bool(settings.get("use_rslora")),
        "r": _number(settings, "r"),
        "rank_pattern": _patterns(settings, "rank_pattern") if settings.get("peft_type") == "LOKR" else {},
    }


def _patterns(settings: dict, name: str) -> dict[str, tuple[int, float]]:
    """Position and value of each pattern. PEFT's are regular expressions: those of a file are not run as such."""
    patterns = settings.get(name) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{name} in the adapter's config should be a JSON object, not {patterns!r:.80}.")
    plain = {pattern.replace("\\.", ".").removesuffix("$"): _number(patterns, pattern) for pattern in patterns}
    unread = next((pattern for pattern in plain if not _PATTERN.fullmatch(pattern)), None)
    if unread is not None:
        raise CheckpointError(
            f"{name} in the adapter's config names layers by the expression {unread!r:.80}. Only plain names of layers "
            "are read here: write them out in its place."
        )
    return {key: (index, value) for index, (key, value) in enumerate(plain.items()) if value is not None}


def _number(values: dict, name: str) -> float | None:
    value = values.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise CheckpointError(f"{name} in the adapter's config should be a number, not {value!r:.80}.")
    return value


def _of_module(patterns: dict[str, tuple[int, float]], module: str, default: float | None) -> float | None:
    """The value of the first pattern for the module: PEFT's rule for names, its own or the end of it."""
    parts = module.split(".")
    names = {f"^{module}", *(".".join(parts[start:]) for start in range(len(parts)))}
    found = [patterns[name] for name in names if name in patterns]
    return min(found)[1] if found else default


def _fingerprint(layers: dict[str, LowRank], changes: dict[str, Change]) -> str:
    digest = hashlib.sha256()
    parts = [(name, "layer", layer.alpha, {"down": layer.down, "up": layer.up}) for name, layer in layers.items()]
    parts += [(name, change.kind, change.scale, change.tensors) for name, change in changes.items()]
    parts = [part for part in parts if not _IMAGE_BRANCH.search(part[0])]
    for name, kind, scale, tensors in sorted(parts, key=lambda part: part[:2]):
        digest.update(f"{name} {kind} {scale!r}".encode())
        for part, tensor in sorted(tensors.items()):
            digest.update(f"{part} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
