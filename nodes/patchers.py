"""Weights under ComfyUI's memory management."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher

from ..rolling_kv.lora.reader import Lora, load_lora
from ..rolling_kv.lora.stack import LoraStack, fit_lora
from ..rolling_kv.sampling.workspace import Workspace
from ..rolling_kv.wan.offloaded import blocks_aside, offload_blocks, weight_nbytes


def obtainable(device: torch.device) -> int:
    """Bytes that can be had on a device: what is free, and what ComfyUI has loaded there and can unload."""
    # Whatever runs meanwhile may let go of any of them.
    loaded = [known.model for known in mm.current_loaded_models if known.device == device]
    return int(mm.get_free_memory(device) + sum(model.loaded_size() for model in loaded if model is not None))


def fits_beside(weights: ModelPatcher, *others: ModelPatcher) -> bool:
    """Whether the device of weights has room for them while those of others stay there."""
    device, staying = weights.load_device, [weights, *others]
    leaving = (
        loaded.model_loaded_memory()
        for loaded in mm.current_loaded_models
        if loaded.device == device and loaded.model is not None and loaded.model not in staying
    )
    room = mm.get_free_memory(device) + weights.loaded_size() + sum(leaving)
    return room >= 1.1 * weights.model_size() + mm.minimum_inference_memory()


class ManagedModule(ModelPatcher):
    """Any of the engine's holder modules (`.model`), moved between devices by ComfyUI as a whole.

    The modules inside are stock ones, which cannot run from half-loaded weights as ComfyUI's own can.
    """

    def load(self, *args, **kwargs):
        kwargs["full_load"] = True
        return super().load(*args, **kwargs)

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        return 0  # nothing freed: ComfyUI then unloads the whole module

    def bring_to_device(self, memory_required: int = 0, *others: ModelPatcher) -> torch.device:
        """Load the weights, and those of others, making room for `memory_required` bytes; returns the device."""
        mm.load_models_gpu([self, *others], memory_required=memory_required, force_full_load=True)
        return self.load_device


class ManagedModel(ManagedModule):
    """A causal model, and what its last run left behind: the working cache and the applied LoRAs.

    The working cache only saves time, so it is the first thing to go when ComfyUI needs memory. Both go whenever the
    weights do.

    offload: keep the weights of the blocks in CPU memory, which ComfyUI then neither moves nor counts: see `wan.offloaded`.
    """

    def __init__(self, model, *args, offload: bool = False, **kwargs):
        self._streamed = [offload_blocks(part, kwargs["load_device"]) for part in model.transformers] if offload else []
        if offload:
            kwargs["size"] = sum(map(weight_nbytes, model.transformers))
        super().__init__(model, *args, **kwargs)
        self.workspace = Workspace()
        self.loras = LoraStack(self.model)
        self._opened: dict[tuple[Path, int], Lora] = {}  # by file and time of its last change

    def open_lora(self, path: Path) -> Lora:
        """What fits the model of the LoRA in a file, read once. Raises CheckpointError where nothing does."""
        key = path, path.stat().st_mtime_ns
        if key not in self._opened:
            self._opened[key] = fit_lora(load_lora(path), self.model)
        return self._opened[key]

    def lora_bytes(self, loras: tuple[tuple[Path, float], ...]) -> int:
        """Bytes that applying these takes on the device, beside the weights; none where they are applied already."""
        if self.loras.holds(self._with_strengths(loras)):
            return 0
        sets = len(self.model.transformers)
        return sum(self.open_lora(path).nbytes(self.model.dtype) * sets for path, _ in loras)

    def identity_with(self, loras: tuple[tuple[Path, float], ...]) -> str:
        """What tells the model with these LoRAs from others, before they are applied."""
        return self.loras.identity_with(self._with_strengths(loras))

    def use_loras(self, loras: tuple[tuple[Path, float], ...]) -> None:
        """Make these the applied LoRAs, each with its strength; quick when they are already.

        Call it with the weights on the device, before a run. Keys and values belong to the weights that made them, so a
        change drops the working cache.
        """
        before = self.loras.applied
        try:
            self.loras.set(self._with_strengths(loras))
        finally:
            if self.loras.applied != before:
                self.workspace.clear()

    def _with_strengths(self, loras: tuple[tuple[Path, float], ...]) -> list[tuple[Lora, float]]:
        return [(self.open_lora(path), strength) for path, strength in loras]

    def model_size(self):
        """With the working cache, so that it is not taken for room that the weights still need."""
        return super().model_size() + self.workspace.device_nbytes

    def loaded_size(self):
        """With the working cache: ComfyUI asks for a part of this before it takes everything."""
        return super().loaded_size() + self.workspace.device_nbytes

    def load(self, *args, **kwargs):
        self.workspace.clear()  # there is none before the weights are; `model_size` now is theirs, and noted as such
        with self._moving():
            super().load(*args, **kwargs)
        for blocks in self._streamed:
            blocks.prepare()

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        freed = self.workspace.device_nbytes
        self.workspace.clear()
        mm.soft_empty_cache()
        return freed

    def detach(self, unpatch_all=True):
        if unpatch_all:  # False: ComfyUI is only replacing its own entry for these weights
            self.workspace.clear()
        with self._moving():
            model = super().detach(unpatch_all)
        if unpatch_all:
            for blocks in self._streamed:
                blocks.release()
            self.loras.clear()  # what the weights were is in CPU memory, where these are by now
        return model

    @contextmanager
    def _moving(self) -> Iterator[None]:
        """What ComfyUI moves meanwhile, which may be to a card with `--highvram`, leaves offloaded blocks where they are."""
        with ExitStack() as around:
            if self._streamed:
                # What a block brings to the device is no inference tensor; LoRAs change both kinds of weights in one mode.
                around.enter_context(torch.inference_mode(False))
                for transformer in self.model.transformers:
                    around.enter_context(blocks_aside(transformer))
            yield
