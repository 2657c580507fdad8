"""Applying LoRAs to a model, several at once and removably.

Two ways, with the same result up to rounding. *Fused*: the change is added to the weights, which then cost nothing more
per step; what the weights were is kept in CPU memory and put back bit for bit. *At run time*: each layer adds its
low-rank product as it runs. That needs no second copy and works on weights that cannot take a sum (float8, GGUF), but a
rank of 256, LongLive's, adds a third to the arithmetic of a 1536-wide layer, a tenth at 5120. So: fused where the weights
are plain numbers and what they were is no more than CPU memory should hold twice, at run time else (14B models). Both go through peft, by diffusers' `PeftAdapterMixin`. Changes of whole
parameters, and the kinds of adapter that `formulas` knows, are always fused.
"""

from __future__ import annotations

import hashlib
import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from ..checkpoints.model import CausalModel
from ..checkpoints.readers import CheckpointError
from .formulas import Change, difference, shape_of
from .reader import Lora

logger = logging.getLogger(__name__)

_SIZES = {1536: "1.3B", 3072: "5B", 5120: "14B"}
_CHANNELS = {36: " (image-to-video)"}
_MOST_KEPT = 8 * 2**30
"""Bytes of weights that are kept in CPU memory as they were before LoRAs were fused into them."""
_PEFT_TRACES = ("_hf_peft_config_loaded", "lora_scale", "_safe_fusing")


def fit_lora(lora: Lora, model: CausalModel) -> Lora:
    """The LoRA without the parts that have no place in the model; its `left_out` names them, and so does the log.

    Raises CheckpointError when it is for another size of the model, when no part has a place, or when it changes whole
    weights that the model keeps in float8 or packed.
    """
    modules: dict[str, nn.Module] = dict(model.transformer.named_modules())
    shapes = {}  # of each part: the one it has, and the one it needs, None where the model has no such part
    for name, layer in lora.layers.items():
        shapes[name] = (layer.up.shape[0], *layer.down.shape[1:]), _needed(modules, f"{name}.weight")
    for name, change in lora.changes.items():
        needed = _needed(modules, name)
        shape = shape_of(change, needed or (1, 1))
        flat = needed and shape[:1] == needed[:1] and math.prod(shape) == math.prod(needed)  # as convolutions may be
        shapes[name] = needed if flat else shape, needed
    wrong = [name for name, (shape, needed) in shapes.items() if needed and shape != needed]
    wrong.sort(key=lambda name: ".attn" not in name)  # a feed-forward layer has two widths
    for name in wrong:
        shape, needed = shapes[name]
        if name.startswith("blocks.") or shape[:1] != needed[:1]:
            raise CheckpointError(
                f"the LoRA {lora.name} was made for another model. At {name} it is {_size(shape)}, this model is "
                f"{_size(needed)}. Choose the LoRA for this size of the model."
            )
    absent = [name for name, (_, needed) in shapes.items() if not needed]
    unfit = [f"{name}, which is {_size(shapes[name][0])} instead of {_size(shapes[name][1])}" for name in wrong]
    if absent or unfit:
        lora = _without(lora, {*absent, *wrong}, (*unfit, *absent))
    packed = [name for name, change in lora.changes.items() if not _takes_sums(modules, name)]
    if packed:
        raise CheckpointError(
            f"the LoRA {lora.name} changes {len(packed)} weights as a whole ({', '.join(packed[:3])}), which float8 and "
            "GGUF cannot take. Use the model in bf16."
        )
    return lora


def _names(loras: Iterable[tuple[Lora, float]]) -> tuple[tuple[str, float], ...]:
    """What tells a stack of LoRAs from others; strength 0 is none."""
    return tuple((lora.identity, float(strength)) for lora, strength in loras if strength)


def _shape(layer) -> tuple[int, ...]:
    """Of a layer's weight when unpacked."""
    return (layer.out_features, layer.in_features) if hasattr(layer, "in_features") else tuple(layer.weight.shape)


def _without(lora: Lora, names: set[str], said: tuple[str, ...]) -> Lora:
    """The LoRA without the parts of these names. said: how they are told of."""
    layers = {name: layer for name, layer in lora.layers.items() if name not in names}
    changes = {name: change for name, change in lora.changes.items() if name not in names}
    left_out = (*said, *lora.left_out)
    count = len(layers) + len(changes) + len(left_out)
    told = f"{len(left_out)} of its {count} parts have no place in this one ({_listed(left_out)})"
    if not layers and not changes:
        raise CheckpointError(f"the LoRA {lora.name} was made for another model: {told}.")
    logger.warning("The LoRA %s was made for another model: %s and are left out.", lora.name, told)
    return replace(lora, layers=layers, changes=changes, left_out=left_out)


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (" and others" if len(names) > 3 else "")


def _needed(modules: dict[str, nn.Module], name: str) -> tuple[int, ...] | None:
    """Shape of a parameter when unpacked; None where there is none."""
    owner, _, last = name.rpartition(".")
    layer: Any = modules.get(owner)
    parameter = getattr(layer, last, None)
    if not isinstance(parameter, Tensor):
        return None
    if last == "weight" and hasattr(layer, "in_features"):
        return layer.out_features, layer.in_features
    return tuple(parameter.shape)


def _takes_sums(modules: dict[str, nn.Module], name: str) -> bool:
    """Whether a parameter is of plain numbers; vectors in float8 are taken for such, as they hardly lose by it."""
    owner, _, last = name.rpartition(".")
    parameter = getattr(modules[owner], last)
    return parameter.is_floating_point() and (parameter.dtype.itemsize > 1 or parameter.ndim == 1)


def _size(shape: tuple[int, ...]) -> str:
    convolution = len(shape) == 5
    width = shape[0] if convolution else shape[-1]
    size = f" (Wan {_SIZES[width]})" if width in _SIZES else ""
    channels = f", {shape[1]} channels{_CHANNELS.get(shape[1], '')}" if convolution else ""
    return f"{list(shape)}, width {width}{size}{channels}"


class LoraStack:
    """The LoRAs that are applied to one model, and the way back to the model without them.

    The transformer is mutated, and so is that of the context passes, where a model has one: both descend from the model
    that LoRAs are made for. While LoRAs are applied, `model.identity` differs from that of the bare model, so that
    videos of different stacks are told apart. One stack per model.

    fuse: None decides as the module's text says; True and False choose.
    """

    def __init__(self, model: CausalModel, fuse: bool | None = None):
        self.model = model
        self.fuse = fuse
        self.applied: tuple[tuple[str, float], ...] = ()
        self._bare_identity = model.identity
        self._originals: dict[tuple[WanTransformer3DModel, str], Tensor] = {}

    def holds(self, loras: Iterable[tuple[Lora, float]]) -> bool:
        """Whether these are the applied LoRAs, at these strengths."""
        return _names(loras) == self.applied

    def identity_with(self, loras: Iterable[tuple[Lora, float]]) -> str:
        """What `model.identity` is while these LoRAs are applied, each with its strength."""
        if not (wanted := _names(loras)):
            return self._bare_identity
        return hashlib.sha256(f"{self._bare_identity} {wanted} {self.fuse}".encode()).hexdigest()[:16]

    def set(self, loras: Iterable[tuple[Lora, float]]) -> bool:
        """Make these the applied LoRAs, each with its strength; strength 0 is none. False if they were already.

        Parts that have no place in the model are left out: `fit_lora` tells which.
        Raises CheckpointError for one that does not fit; the stack then stays as it was. If anything else goes wrong
        on the way, the model is left without LoRAs.
        """
        loras = [(lora, float(strength)) for lora, strength in loras if strength]
        wanted = _names(loras)
        if wanted == self.applied:
            return False
        identity = self.identity_with(loras)
        loras = [(fit_lora(lora, self.model), strength) for lora, strength in loras]
        self.clear()
        try:
            for transformer in self.model.transformers:
                self._apply(transformer, loras)
        except BaseException:
            self.clear()
            raise
        self.applied = wanted
        self.model.identity = identity
        return True

    @torch.inference_mode(False)
    def clear(self) -> None:
        """Take all LoRAs off: the module tree and every bit of the weights are what they were."""
        for transformer in self.model.transformers:
            if hasattr(transformer, "peft_config"):
                transformer.unload_lora()
            for name in _PEFT_TRACES:
                vars(transformer).pop(name, None)
        for (transformer, name), original in self._originals.items():
            parameter = transformer.get_parameter(name)
            with _mode_of(parameter):
                differs = original.is_inference() != parameter.is_inference()
                parameter.data = original.to(parameter.device, copy=differs)
        self._originals.clear()
        self.applied = ()
        self.model.identity = self._bare_identity

    @torch.no_grad()
    def _apply(self, transformer: WanTransformer3DModel, loras: Sequence[tuple[Lora, float]]) -> None:
        with _mode_of(transformer.patch_embedding.weight):
            self._put_on(transformer, loras)

    def _put_on(self, transformer: WanTransformer3DModel, loras: Sequence[tuple[Lora, float]]) -> None:
        for lora, strength in loras:
            for name, change in lora.changes.items():
                self._add(transformer, name, change, strength)
        layered = {f"lora_{index}": (lora, strength) for index, (lora, strength) in enumerate(loras) if lora.layers}
        if not layered:
            return
        modules = {module: transformer.get_submodule(module) for lora, _ in layered.values() for module in lora.layers}
        for name, (lora, _) in layered.items():
            self._inject(transformer, name, lora)
        transformer.set_adapters(list(layered), [strength for _, strength in layered.values()])
        transformer.requires_grad_(False)
        weights: list[Any] = [layer.weight for layer in modules.values()]
        kept = sum(weight.nbytes for weight in weights)
        fits = kept <= _MOST_KEPT and all(map(_is_plain, modules.values()))
        if self.fuse is False or self.fuse is None and not fits:
            return
        for module in modules:
            self._keep(transformer, f"{module}.weight")
        transformer.fuse_lora(safe_fusing=True)  # safe: into new tensors, the old ones may be mapped from a file
        transformer.unload_lora()

    def _inject(self, transformer: WanTransformer3DModel, name: str, lora: Lora) -> None:
        dtype = self.model.dtype
        weights, alphas = {}, {}
        for module, layer in lora.layers.items():
            weights[f"transformer.{module}.lora_A.weight"] = layer.down.to(dtype)
            weights[f"transformer.{module}.lora_B.weight"] = layer.up.to(dtype)
            alphas[f"transformer.{module}.alpha"] = layer.alpha
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are what is wanted
            transformer.load_lora_adapter(weights, adapter_name=name, network_alphas=alphas, low_cpu_mem_usage=True)
        for module in lora.layers:
            wrapper: Any = transformer.get_submodule(module)
            if not _is_plain(wrapper):  # peft has rounded the matrices to the dtype of the stored weight
                for part, half in (("lora_A", wrapper.lora_A), ("lora_B", wrapper.lora_B)):
                    exact = weights[f"transformer.{module}.{part}.weight"]
                    half[name].weight.data = exact.to(wrapper.weight.device)

    def _keep(self, transformer: WanTransformer3DModel, name: str) -> None:
        self._originals.setdefault((transformer, name), transformer.get_parameter(name).data.to("cpu"))

    def _add(self, transformer: WanTransformer3DModel, name: str, change: Change, strength: float) -> None:
        parameter = transformer.get_parameter(name)
        original = self._originals.get((transformer, name), parameter.data).to(parameter.device, torch.float32)
        self._keep(transformer, name)
        parameter.data = (parameter.float() + strength * difference(change, original)).to(parameter.dtype)


def _mode_of(parameter: Tensor) -> AbstractContextManager:
    """The mode in which a parameter can be given new values: inference mode for those that were made, or moved, in it.

    An inference tensor with the data of an ordinary one, and the other way round, cannot be used any more.
    """
    return torch.inference_mode(parameter.is_inference())


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
