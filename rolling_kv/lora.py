"""LoRA files: reading every layout they come in, and applying several to a model, removably.

Two ways to apply one, with the same result up to rounding. *Fused*: the change is added to the weights, which costs
nothing per step; what the weights were is kept in CPU memory and put back bit for bit. *At run time*: each layer adds
its low-rank product as it runs, through peft. That needs no second copy and works on weights that cannot take a sum
(float8, GGUF), but a rank of 256, LongLive's, adds a third to the arithmetic of a 1536-wide layer. So: fused where the
weights are plain numbers, at run time where they are not.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from torch import Tensor

from .files import Checkpoint, CheckpointError, open_checkpoint, read_json, telling
from .layouts import LORA, kind_of, named
from .model import CausalModel

_PREFIX = re.compile(r"(lora_unet_|lycoris_|(base_model|model|diffusion_model|transformer|generator|_orig_mod)\.)+")
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
_SIZES = {1536: "1.3B", 3072: "5B", 5120: "14B"}
_PEFT_TRACES = ("_hf_peft_config_loaded", "lora_scale", "_safe_fusing")


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
    alpha / rank, alpha from the file (or the adapter's config); 1 where there is none. Parts of a LoRA that belong to an
    image encoder are left out: causal models have none.

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
    settings = json.loads(checkpoint.metadata.get("lora_adapter_metadata", "{}"))
    return {name.removeprefix("transformer."): value for name, value in settings.items()}


def read_lora(tensors: dict[str, Tensor], name: str = "lora", settings: dict | None = None) -> Lora:
    """The LoRA in named tensors. settings: `lora_alpha`, `alpha_pattern` and `use_rslora` of a PEFT config."""
    kind = kind_of(tensors)
    if kind != LORA:
        raise CheckpointError(f"this is {kind}, not a LoRA. Give it where a model of that kind is asked for.")
    foreign = [key for key in tensors if _OTHER_ADAPTERS.search(key)]
    if foreign:
        raise CheckpointError(
            f"this is an adapter of another kind than LoRA (it holds {named(tensors, foreign)}). Only plain LoRA is read "
            "here: merge it into the model with the tool that made it, or use its LoRA version."
        )
    down, up, alphas, diffs, strange = {}, {}, {}, {}, []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(_without_prefix(key))
        if match is None:
            strange.append(key)
        elif match["other"] == "alpha":
            alphas[match["module"]] = float(tensor)
        elif match["other"] or match["kind"] == "bias":
            if tensor.any():  # norms often come with a difference of zero, also where the model has none
                diffs[_parameter(match)] = tensor
        else:
            (down if match["down"] else up)[match["module"]] = tensor
    if strange:
        raise CheckpointError(f"{len(strange)} tensors of this LoRA are not understood: {named(tensors, strange)}.")
    halves = sorted(down.keys() ^ up.keys())
    if halves:
        raise CheckpointError(
            f"the LoRA is incomplete: {len(halves)} layers have one of their two matrices ({', '.join(halves[:3])})."
        )
    original = not any(".attn1." in f"{module}." or ".attn2." in f"{module}." for module in down)
    layers = {
        _diffusers_name(f"{module}.weight", original).removesuffix(".weight"): LowRank(
            down[module], up[module], alphas.get(module) or _default_alpha(settings or {}, module, len(down[module]))
        )
        for module in down
    }
    layers = {module: layer for module, layer in layers.items() if not _IMAGE_BRANCH.search(module)}
    diffs = {_diffusers_name(parameter, original): diff for parameter, diff in diffs.items()}
    diffs = {parameter: diff for parameter, diff in diffs.items() if not _IMAGE_BRANCH.search(parameter)}
    return Lora(name, layers, diffs, _fingerprint(layers, diffs))


def _without_prefix(key: str) -> str:
    prefix = _PREFIX.match(key)
    if prefix is None:
        return _SHARDING.sub("", key)
    key = _SHARDING.sub("", key[prefix.end() :])
    if not prefix[0].endswith("_"):
        return key
    module, dot, rest = key.partition(".")
    return _UNDERSCORES.sub(".", module) + dot + rest


def _parameter(match: re.Match) -> str:
    if match["module"].endswith(("modulation", "scale_shift_table")):
        return match["module"]
    return f"{match['module']}.{'bias' if 'diff_b' == match['other'] or match['kind'] == 'bias' else 'weight'}"


def _diffusers_name(parameter: str, original: bool) -> str:
    return next(iter(convert_wan_transformer_to_diffusers({parameter: None}))) if original else parameter


def _default_alpha(settings: dict, module: str, rank: int) -> float:
    patterns = settings.get("alpha_pattern", {}).items()
    found = (value for pattern, value in patterns if re.fullmatch(rf"(.*\.)?({pattern})", module))
    alpha = next(found, settings.get("lora_alpha", rank))
    return alpha * rank**0.5 if settings.get("use_rslora") else alpha


def _fingerprint(layers: dict[str, LowRank], diffs: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    parts = [(f"{name} {layer.alpha}", tensor) for name, layer in layers.items() for tensor in layer[:2]]
    for name, tensor in sorted([*parts, *diffs.items()], key=lambda part: part[0]):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.flatten()[:: max(1, tensor.numel() // 16)].float().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_lora(lora: Lora, model: CausalModel) -> None:
    """Raise CheckpointError unless every part of the LoRA has its place in the model, and fits there."""
    modules = dict(model.transformer.named_modules())
    places = {}  # of each part: the shape it has to have, None where the model has no such part
    for name, layer in lora.layers.items():
        weight = getattr(modules.get(name), "weight", None)
        places[name] = (layer.up.shape[0], *layer.down.shape[1:]), weight is not None and _shape(modules[name])
    for name, diff in lora.diffs.items():
        owner, _, last = name.rpartition(".")
        parameter = getattr(modules.get(owner), last, None)
        places[name] = tuple(diff.shape), parameter is not None and tuple(parameter.shape)
    wrong = [name for name, (shape, needed) in places.items() if needed and shape != needed]
    if wrong:
        shape, needed = places[wrong[0]]
        raise CheckpointError(
            f"the LoRA {lora.name} was made for another model. At {wrong[0]} it is {_size(shape)}, this model is "
            f"{_size(needed)}. Choose the LoRA for this size of the model."
        )
    absent = [name for name, (_, needed) in places.items() if not needed]
    if absent:
        names = ", ".join(absent[:3]) + (" and others" if len(absent) > 3 else "")
        raise CheckpointError(
            f"the LoRA {lora.name} was made for another model: {len(absent)} of its {len(places)} parts have no place in "
            f"this one ({names})."
        )


def _shape(layer) -> tuple[int, ...]:
    """Of a layer's weight when unpacked."""
    return (layer.out_features, layer.in_features) if hasattr(layer, "in_features") else tuple(layer.weight.shape)


def _size(shape: tuple[int, ...]) -> str:
    width = shape[-1]
    return f"{list(shape)}, width {width}" + (f" (Wan {_SIZES[width]})" if width in _SIZES else "")


class LoraStack:
    """The LoRAs that are applied to one model, and the way back to the model without them.

    The transformer is mutated. While LoRAs are applied, `model.identity` differs from that of the bare model, so that
    videos of different stacks are told apart. One stack per model.

    fuse: None decides as the module's text says; True and False choose.
    """

    def __init__(self, model: CausalModel, fuse: bool | None = None):
        self.model = model
        self.fuse = fuse
        self.applied: tuple[tuple[str, float], ...] = ()
        self._bare_identity = model.identity
        self._originals: dict[str, Tensor] = {}

    def set(self, loras: Iterable[tuple[Lora, float]]) -> bool:
        """Make these the applied LoRAs, each with its strength; strength 0 is none. False if they were already.

        Raises CheckpointError for one that does not fit; the stack then stays as it was. If anything else goes wrong
        on the way, the model is left without LoRAs.
        """
        loras = [(lora, float(strength)) for lora, strength in loras if strength]
        wanted = tuple((lora.identity, strength) for lora, strength in loras)
        if wanted == self.applied:
            return False
        for lora, _ in loras:
            check_lora(lora, self.model)
        self.clear()
        try:
            self._apply(loras)
        except BaseException:
            self.clear()
            raise
        self.applied = wanted
        if wanted:
            self.model.identity = hashlib.sha256(f"{self._bare_identity} {wanted}".encode()).hexdigest()[:16]
        return True

    @torch.inference_mode(False)
    def clear(self) -> None:
        """Take all LoRAs off: the module tree and every bit of the weights are what they were."""
        transformer = self.model.transformer
        if hasattr(transformer, "peft_config"):
            transformer.unload_lora()
        for name in _PEFT_TRACES:
            vars(transformer).pop(name, None)
        for name, original in self._originals.items():
            parameter = transformer.get_parameter(name)
            parameter.data = original.to(parameter.device)
        self._originals.clear()
        self.applied = ()
        self.model.identity = self._bare_identity

    @torch.inference_mode(False)
    @torch.no_grad()
    def _apply(self, loras: Sequence[tuple[Lora, float]]) -> None:
        transformer = self.model.transformer
        for lora, strength in loras:
            for name, diff in lora.diffs.items():
                self._add(name, diff, strength)
        layered = {f"lora_{index}": (lora, strength) for index, (lora, strength) in enumerate(loras) if lora.layers}
        if not layered:
            return
        modules = {module: transformer.get_submodule(module) for lora, _ in layered.values() for module in lora.layers}
        for name, (lora, _) in layered.items():
            self._inject(name, lora)
        transformer.set_adapters(list(layered), [strength for _, strength in layered.values()])
        transformer.requires_grad_(False)
        if self.fuse is False or self.fuse is None and not all(map(_is_plain, modules.values())):
            return
        for module, layer in modules.items():
            self._keep(f"{module}.weight", layer.weight)
        transformer.fuse_lora(safe_fusing=True)  # safe: into new tensors, the old ones may be mapped from a file
        transformer.unload_lora()

    def _inject(self, name: str, lora: Lora) -> None:
        transformer, dtype = self.model.transformer, self.model.dtype
        weights, alphas = {}, {}
        for module, layer in lora.layers.items():
            weights[f"transformer.{module}.lora_A.weight"] = layer.down.to(dtype)
            weights[f"transformer.{module}.lora_B.weight"] = layer.up.to(dtype)
            alphas[f"transformer.{module}.alpha"] = layer.alpha
        transformer.load_lora_adapter(weights, adapter_name=name, network_alphas=alphas, low_cpu_mem_usage=True)
        for module in lora.layers:
            wrapper = transformer.get_submodule(module)
            if not _is_plain(wrapper):  # peft has rounded the matrices to the dtype of the stored weight
                for part, half in (("lora_A", wrapper.lora_A), ("lora_B", wrapper.lora_B)):
                    exact = weights[f"transformer.{module}.{part}.weight"]
                    half[name].weight.data = exact.to(wrapper.weight.device)

    def _keep(self, name: str, parameter: Tensor) -> None:
        self._originals.setdefault(name, parameter.data.to("cpu"))

    def _add(self, name: str, diff: Tensor, strength: float) -> None:
        parameter = self.model.transformer.get_parameter(name)
        if not parameter.is_floating_point():
            raise CheckpointError(f"a LoRA changes {name} as a whole, which a GGUF file packs. Use the model in bf16.")
        self._keep(name, parameter)
        parameter.data = (parameter.float() + strength * diff.to(parameter.device, torch.float32)).to(parameter.dtype)


def _is_plain(layer) -> bool:
    """Whether a layer's weights are numbers to compute with, rather than float8 or packed."""
    return layer.weight.dtype.itemsize > 1


@contextmanager
def applied_loras(
    model: CausalModel, loras: Iterable[tuple[Lora, float]], *, fuse: bool | None = None
) -> Iterator[LoraStack]:
    """Apply LoRAs, each with its strength, inside a `with` block. See `LoraStack`."""
    stack = LoraStack(model, fuse)
    try:
        stack.set(loras)
        yield stack
    finally:
        stack.clear()
