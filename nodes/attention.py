"""Which kernel of attention a model uses, after what was chosen on the node and what ComfyUI was started with."""

import comfy.model_management as mm
import torch

from ..rolling_kv.config import ATTENTION_BACKENDS, ExecutionConfig

AUTO = "auto"
CHOICES = (AUTO, *ATTENTION_BACKENDS)
EARLIER = {name: name for name in CHOICES} | {"_native_cudnn": AUTO}
"""The choices, by what they were called before: cuDNN's kernel is what "auto" begins with."""


def backend_of(choice: str, device: torch.device, dtype: torch.dtype) -> tuple[str | None, str]:
    """The attention backend of `ExecutionConfig`, and a sentence where ComfyUI's own choice cannot be had; else "".

    device: where the model computes. dtype: that it computes in. "auto" is what --use-sage-attention and
    --use-flash-attention say, where it goes with both.
    """
    if choice != AUTO:
        return choice, ""
    started = "sage" if mm.sage_attention_enabled() else "flash" if mm.flash_attention_enabled() else None
    if started is None or device.type != "cuda" or dtype.itemsize != 2:
        return None, ""
    try:
        ExecutionConfig(backend=started).check(device)
    except ValueError as error:
        return None, f"PyTorch's attention is used: {error}"
    return started, ""
