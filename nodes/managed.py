"""Weights under ComfyUI's memory management."""

from __future__ import annotations

import torch

import comfy.model_management as mm
from comfy.model_patcher import ModelPatcher

from ..rolling_kv.sampler import Workspace


class ManagedModule(ModelPatcher):
    """Any of the engine's holder modules (`.model`), moved between devices by ComfyUI as a whole.

    The modules inside are stock ones, which cannot run from half-loaded weights as ComfyUI's own can.
    """

    def load(self, *args, **kwargs):
        kwargs["full_load"] = True
        return super().load(*args, **kwargs)

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        return 0  # nothing freed: ComfyUI then unloads the whole module

    def bring_to_device(self, memory_required: int = 0) -> torch.device:
        """Load the weights, making room for `memory_required` bytes beside them; returns the device."""
        mm.load_models_gpu([self], memory_required=memory_required, force_full_load=True)
        return self.load_device


class ManagedModel(ManagedModule):
    """A causal model and the working cache that its last run left behind.

    The working cache only saves time, so it is the first thing to go when ComfyUI needs memory, and it goes whenever
    the weights do.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.workspace = Workspace()

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        freed = self.workspace.nbytes
        self.workspace.clear()
        mm.soft_empty_cache()
        return freed

    def detach(self, unpatch_all=True):
        if unpatch_all:  # False: ComfyUI is only replacing its own entry for these weights
            self.workspace.clear()
        return super().detach(unpatch_all)


def check_cancelled() -> None:
    """Raise ComfyUI's interrupt if the user has cancelled the run."""
    mm.throw_exception_if_processing_interrupted()
