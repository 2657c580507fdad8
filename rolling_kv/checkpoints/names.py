"""What named tensors belong to: telling kinds of models apart, prefixes, naming schemes."""

from __future__ import annotations

import math
import re

from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from torch import Tensor

from ..geometry import WAN_21
from ..messages import shortened
from .readers import CheckpointError

WAN = "a Wan video model"
UMT5 = "a T5 or UMT5 text encoder"
LORA = "a LoRA"
VAE = "a VAE"
_SHARDING_PARTS = {"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"}
_PREFIX_PARTS = _SHARDING_PARTS | {"model", "diffusion_model"}
MOST_LAYERS = 200
"""Blocks of a model; Wan's 14B has 40. A thousand take ten seconds to set up, even without weights."""
_CONTEXT_MARK = re.compile(
    r"(^|\.)memory_(?=(patch_embedding|text_embedding|time_embedding|time_projection|head|modulation|weight|bias)(\.|$))"
)
"""In the name of a tensor of the second set of weights, which Self Gradient Forcing Plus calls its memory expert."""
_SIGNS = (  # the first that matches any tensor name; LoRA names contain those of the model they belong to
    (
        r"\.lora_(A|B|down|up)(\.|$)|\.lora[AB]\.|\.lora\.(down|up)\.|(^|\.)lora_unet_|\.(lokr|hada|oft)_"
        r"|\.(dora_scale|lora_magnitude_vector|diff|diff_b|diff_m)$",
        LORA,
    ),
    (r"(^|\.)blocks\.0\.(self_attn|attn1)\.", WAN),
    (r"(^|\.)encoder\.block\.0\.layer\.|^token_embedding\.weight$|^enc\.blk\.0\.|^blocks\.0\.attn\.q\.weight$", UMT5),
    (r"(^|\.)decoder\.(conv1|conv_in|conv_out|mid_block|middle)\.|(^|\.)(post_)?quant_conv\.", VAE),
    (r"(^|\.)(text_model|vision_model|visual)\.", "a CLIP model"),
    (
        r"(^|\.)(double_blocks|joint_blocks|transformer_blocks|input_blocks|down_blocks)\.",
        "an image or video model of another family (Stable Diffusion, Flux, Hunyuan, LTX, …)",
    ),
)


def kind_of(tensors: dict[str, Tensor]) -> str:
    """What the tensors belong to, as a noun: WAN, UMT5, LORA, VAE, …; unknown ones are quoted."""
    for pattern, kind in _SIGNS:
        if any(re.search(pattern, name) for name in tensors):
            return kind
    return f"something unknown (its first tensors are {named(tensors, list(tensors)[:3])})"


def named(tensors: dict[str, Tensor], names: list[str]) -> str:
    """The names with shapes, for messages: at most three, then how many more."""
    listed = ", ".join(f"{shortened(name)} {list(tensors[name].shape)[:8]}" for name in names[:3])
    return listed + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def latent_channels(tensors: dict[str, Tensor]) -> int | None:
    """Channels of the latents that a Wan transformer makes, told by its last bias; None where there is none."""
    biases = [tensor for name, tensor in tensors.items() if name.endswith(("head.head.bias", "proj_out.bias"))]
    return biases[0].numel() // math.prod(WAN_21.patch) if biases else None


def count_layers(weights: dict[str, Tensor], block: str) -> int:
    """Layers that the names tell of: one more than the highest number after `block`, a regular expression.

    Raises CheckpointError for more than MOST_LAYERS, before anything is built after such a number.
    """
    numbers = {number[1]: name for name in weights if (number := re.match(rf"{block}([0-9]+)\.", name))}
    highest = max(numbers, key=lambda number: (len(number), number), default="0")
    if len(highest) > 4 or int(highest) >= MOST_LAYERS:
        raise CheckpointError(
            f"{shortened(numbers[highest])} belongs to a model of more than {MOST_LAYERS} layers, and the file holds "
            f"{len(numbers)}. It is damaged, or no Wan model."
        )
    return 1 + int(highest)


def check_fit(weights: dict[str, Tensor], needed: dict[str, Tensor], model: str) -> None:
    """Raise CheckpointError unless the weights are those that `model`, a noun, needs: by name and shape."""
    missing = [name for name in needed if name not in weights]
    surplus = [name for name in weights if name not in needed]
    wrong = [name for name in needed if name in weights and weights[name].shape != needed[name].shape]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {named(needed, missing)}")
    if surplus:
        problems.append(f"{len(surplus)} that do not belong there: {named(weights, surplus)}")
    if wrong:
        expected = ", ".join(str(list(needed[name].shape)) for name in wrong[:3])
        problems.append(f"{len(wrong)} of the wrong shape: {named(weights, wrong)}, expected {expected}")
    if problems:
        raise CheckpointError(
            f"the tensors do not fit {model}. {'; '.join(problems)}. "
            "The file is incomplete, or holds another kind of model."
        )


def strip_prefixes(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Remove what training and packing tools put in front of a transformer's names, and tell what it was.

    Strips `model.`, `model.diffusion_model.` and the marks of FSDP and torch.compile, in any nesting. Of a file that
    packs the whole pipeline, only the transformer is kept.
    """
    packed = {name: tensor for name, tensor in tensors.items() if name.startswith("model.diffusion_model.")}
    stripped, prefixes = {}, {}
    for name, tensor in (packed or tensors).items():
        parts = name.split(".")
        start = next((i for i, part in enumerate(parts) if part not in _PREFIX_PARTS), 0)
        prefixes[".".join(parts[:start])] = True
        key = ".".join(part for part in parts[start:] if part not in _SHARDING_PARTS)
        if key in stripped:
            raise CheckpointError(f"the file holds {shortened(key)} twice, under different prefixes.")
        stripped[key] = tensor
    return stripped, max(prefixes, key=len)


def split_context(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A model's tensors, and those of its second set of weights, for context passes, under the names of the first.

    The second is empty where the file has one set, as nearly all do.
    """
    renamed = {name: _CONTEXT_MARK.sub(r"\1", name, count=1) for name in tensors}
    own = {name: tensor for name, tensor in tensors.items() if renamed[name] == name}
    return own, {renamed[name]: tensor for name, tensor in tensors.items() if name not in own}


def to_diffusers_names(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """A Wan transformer's tensors under diffusers' names, and what the names were."""
    if any(".attn1." in name for name in tensors):
        return dict(tensors), "diffusers names"
    return convert_wan_transformer_to_diffusers(dict(tensors)), "original Wan names"
