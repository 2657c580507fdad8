"""What PyTorch's settings of precision say just now, in old and new versions of it."""

import torch


def convolutions_round() -> bool:
    """Whether float32 convolutions on CUDA may round to TF32."""
    convolutions = getattr(torch.backends.cudnn, "conv", None)
    return torch.backends.cudnn.allow_tf32 if convolutions is None else convolutions.fp32_precision == "tf32"
