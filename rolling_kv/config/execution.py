"""How passes are computed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements

from ..devices import has_float64
from ..platforms import has_float8_products, platform_of, too_new_for_flash_3
from .checks import check_choice

WEIGHT_STORAGES = ("model", "float8")
"""How weights are stored: in the dtype that the model computes in, or the blocks' Linear layers in float8_e4m3fn."""
ATTENTION_BACKENDS = ("native", "flash", "_flash_3", "sage", "xformers")
"""Those of diffusers' attention backends that attend without a mask, copy nothing and download nothing."""
SPEEDS = ("exact", "standard", "fast")
"""What passes cost in time and error, as nodes ask for it: the field of that name is set, none for the standard."""
ANY_DEVICE_BACKEND = "native"
"""The one of them that is not for CUDA alone."""
RECORDABLE_PACKINGS = ("Q8_0", "BF16")
"""GGUF packings that diffusers unpacks on the device alone; for all others the CPU waits in every layer."""


@dataclass(frozen=True)
class ExecutionConfig:
    """How passes are computed: what changes their speed and their rounding, but not what a model was trained for.

    exact: rotate in float64, and keep the original code's order of operations: bit-equal to it in float32. Off: float32
        rotation and fused operations, which agree to rounding and are faster.
    backend: attention backend of diffusers' dispatcher, one of ATTENTION_BACKENDS; None: its default, SDPA, with the kernel
        that is the fastest for the device. "native" is SDPA with the kernel that PyTorch chooses.
    compile: run the blocks through torch.compile. What changes from chunk to chunk (the cache's indices, the number of
        keys) stays outside the compiled parts, so a session compiles once per chunk size.
    cuda_graphs: once the window is full, record passes as CUDA graphs and repeat them; see `wan.graphs`.
    plain: leave the Triton kernels out, with which passes in half precision run on a GPU where Triton is; see `wan.kernels`.
    fast: attention in 8 bits, and products in float8, where the device and what is installed give them; see `wan.fast`. Another
        rounding than the model's own: docs/speed.md has what it costs.
    """

    exact: bool = field(
        default=False, metadata={"help": "rotate in float64 and keep the original code's order of operations; slower"}
    )
    backend: str | None = field(
        default=None,
        metadata={
            "help": "attention kernel (default: the fastest of PyTorch's own for the device)",
            "choices": ATTENTION_BACKENDS,
        },
    )
    compile: bool = field(default=False, metadata={"help": "run the blocks through torch.compile"})
    cuda_graphs: bool = field(
        default=False, metadata={"help": "record passes as CUDA graphs and repeat them (not tried on a GPU yet)"}
    )
    plain: bool = field(
        default=False, metadata={"help": "use PyTorch's own operations alone, not the Triton kernels where Triton is"}
    )
    fast: bool = field(
        default=False,
        metadata={"help": "attention in 8 bits and products in float8, where the GPU and what is installed give them"},
    )

    def describe(self) -> list[str]:
        """What is not the default, as phrases for people."""
        phrases = {
            "exact": "exact",
            "compile": "compiled",
            "cuda_graphs": "CUDA graphs",
            "plain": "plain",
            "fast": "fast",
        }
        chosen = [phrase for name, phrase in phrases.items() if getattr(self, name)]
        return chosen + ([f"attention by {self.backend}"] if self.backend else [])

    def check(
        self,
        device: torch.device | str | None = None,
        *,
        weight_storage: str = "model",
        packings: Collection[str] = (),
        step_cache: bool = False,
        ranks: int = 1,
    ) -> None:
        """Raise ValueError unless these settings go together, and with what they are going to run on.

        device: where the model computes; None: not known yet. weight_storage: one of WEIGHT_STORAGES. packings: of
        weights from a GGUF file, as `checkpoints.gguf.gguf_types` names them. step_cache: whether there is one. ranks:
        processes that share a video.
        """
        if self.exact and self.fast:
            raise ValueError("passes are exact or fast, not both: turn one of them off")
        if ranks > 1 and step_cache:
            raise ValueError(
                "a step cache judges by what one process sees, and those that share a video have to do the same: leave the "
                "step cache out, or make the video in one process"
            )
        if ranks > 1 and self.cuda_graphs:
            raise ValueError("CUDA graphs are for passes of one process: turn them off where several share a video")
        check_choice("the weight storage", weight_storage, WEIGHT_STORAGES)
        if self.backend is not None:
            check_choice("the attention backend", self.backend, ATTENTION_BACKENDS)
            try:
                _check_attention_backend_requirements(AttentionBackendName(self.backend))
            except RuntimeError as error:
                raise ValueError(f"the attention backend {self.backend} is not installed here: {error}") from error
            if self.backend != ANY_DEVICE_BACKEND and device is not None and torch.device(device).type != "cuda":
                raise ValueError(
                    f"the attention backend {self.backend} needs a CUDA GPU, but the model is on {device}: choose "
                    f"{ANY_DEVICE_BACKEND}, or leave the choice to PyTorch"
                )
            if self.backend == "_flash_3" and device is not None and too_new_for_flash_3(platform_of(device)):
                raise ValueError(
                    f"the attention backend {self.backend} has kernels for GPUs up to H100, and on {device}, a newer one, it "
                    "would end the process: choose another, or leave the choice to PyTorch"
                )
        if self.exact and device is not None and not has_float64(torch.device(device)):
            raise ValueError(f"exact passes rotate in float64, which {device} does not have: turn exact off")
        if weight_storage != "model" and packings:
            raise ValueError(
                f'a GGUF file keeps its own packing: set the weight storage to "model" instead of "{weight_storage}"'
            )
        if self.compile and weight_storage == "float8" and device is not None and not _compiles_float8(device):
            raise ValueError(
                f"weights in float8 cannot go with compile on {device}: compiled code widens float8 on NVIDIA GPUs from RTX "
                '40 and H100 on. Turn compile off, or set the weight storage to "model"; the weights of a GGUF file are '
                "small and can be compiled."
            )
        if self.compile and step_cache:
            raise ValueError("a step cache cannot go with compiled blocks: turn compile off, or remove the step cache")
        if self.cuda_graphs:
            self._check_cuda_graphs(device, packings, step_cache)

    def check_offloaded(self) -> None:
        """Raise ValueError unless these settings go together with weights that come from CPU memory block by block."""
        for chosen, name in ((self.compile, "compile"), (self.cuda_graphs, "CUDA graphs")):
            if chosen:
                raise ValueError(
                    f"{name} cannot go with weights in CPU memory, which are somewhere else whenever a block runs: turn "
                    f"{name} off, or keep the weights on the device"
                )

    def _check_cuda_graphs(self, device, packings: Collection[str], step_cache: bool) -> None:
        if step_cache:
            raise ValueError("a step cache cannot go with CUDA graphs: turn them off, or remove the step cache")
        if device is not None and torch.device(device).type != "cuda":
            raise ValueError(f"CUDA graphs need a CUDA device, but the model is on {device}: turn them off")
        waiting = [packing for packing in packings if packing not in RECORDABLE_PACKINGS]
        if waiting:
            raise ValueError(
                f"weights packed as {', '.join(waiting)} cannot go with CUDA graphs: unpacking them copies small tables "
                "from the CPU, which cannot be recorded. Turn CUDA graphs off, or use a GGUF file in Q8_0."
            )


def _compiles_float8(device: torch.device | str) -> bool:
    """Whether code that torch.compile makes for a device brings float8 to other dtypes."""
    return torch.device(device).type == "cpu" or has_float8_products(platform_of(device))
