"""The hook API that diffusers pull request #13569 proposes, on this package's rolling cache.

For code that drives a diffusers transformer itself, one forward pass at a time; `rolling_kv.sampling` does not need it.
The names are the pull request's. The window is ours: it counts the tokens that a pass writes, and the oldest tokens
leave before the pass attends. docs/hook-api.md has an example and every difference.

Everything is a diffusers `ModelHook` under one name, `ROLLING_KV_CACHE_HOOK`, so diffusers' own
`HookRegistry.remove_hook` takes it off again.
"""

from __future__ import annotations

import logging
import types

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention, WanRotaryPosEmbed

from ..devices import to_device
from ..rope import rotary_angles, rotate
from ..wan.processors import RollingSelfAttention
from .state import ContextStates, RollingKVCacheConfig, RollingKVCacheState

logger = logging.getLogger(__name__)
ROLLING_KV_CACHE_HOOK = "rolling_kv_cache"
"""Name of every hook in diffusers' registries."""
SELF_ATTENTION_ATTRIBUTES = ("to_q", "to_k", "to_v", "to_out", "heads", "norm_q", "norm_k")


def apply_rolling_kv_cache(module: torch.nn.Module, config: RollingKVCacheConfig | None = None) -> None:
    """Give every self-attention inside `module` a rolling cache, and Wan's rotary embedding absolute positions.

    module: what is going to be called; one call is one pass. It is changed in place until the hooks are removed.
    Attention other than Wan's is recognised by `SELF_ATTENTION_ATTRIBUTES`, with one warning for each class.
    Raises ValueError if there is no self-attention in it, or if it has a rolling cache already.
    """
    names = [name for name, submodule in module.named_modules() if _is_self_attention(submodule)]
    if not names:
        raise ValueError(
            f"{type(module).__name__} contains no self-attention module that has "
            f"{', '.join(SELF_ATTENTION_ATTRIBUTES)}; pass the transformer itself"
        )
    if get_rolling_kv_cache_state(module) is not None:
        raise ValueError("this module has a rolling KV cache hook already; call remove_rolling_kv_cache(module) first")
    if any(isinstance(getattr(m, "processor", None), RollingSelfAttention) for m in module.modules()):
        raise ValueError(
            "a sampling session has its rolling cache attached to this transformer; close the session first"
        )

    states = ContextStates(config or RollingKVCacheConfig())
    untested = set()
    for name, submodule in module.named_modules():
        if name in names:
            hook = SelfAttentionHook(states, submodule is module, name or type(module).__name__)
            if not isinstance(submodule, WanAttention):
                untested.add(type(submodule).__name__)
        elif isinstance(submodule, WanRotaryPosEmbed):
            hook = WanPositionsHook(states, False)
        elif submodule is module:
            hook = RollingKVCacheHook(states, True)
        else:
            continue
        HookRegistry.check_if_exists_or_initialize(submodule).register_hook(hook, ROLLING_KV_CACHE_HOOK)
    for class_name in sorted(untested):
        logger.warning(
            "the rolling KV cache is untested with %s: it is treated like Wan's self-attention, and its positions are "
            "those that the model passes to it, which may start at 0 in every chunk",
            class_name,
        )


def remove_rolling_kv_cache(module: torch.nn.Module) -> None:
    """Take off what `apply_rolling_kv_cache` put on, with all that is cached. Does nothing if there is nothing."""
    HookRegistry.check_if_exists_or_initialize(module).remove_hook(ROLLING_KV_CACHE_HOOK, recurse=True)


def get_rolling_kv_cache_state(module: torch.nn.Module) -> RollingKVCacheState | None:
    """The state of the cache context that is open now, or of passes outside any context; None without hooks."""
    for submodule in module.modules():
        registry = getattr(submodule, "_diffusers_hook", None)
        hook = registry.get_hook(ROLLING_KV_CACHE_HOOK) if registry is not None else None
        if hook is not None:
            return hook.states.get_state()
    return None


class RollingKVCacheHook(ModelHook):
    """The hook of the module that the cache was applied to: a call of it is a pass. The base of the other hooks.

    All hooks share one `ContextStates`, so that a cache context reaches them all through this one, also when
    diffusers has listed the modules that have hooks before ours came.
    """

    _is_stateful = True

    def __init__(self, states: ContextStates, outermost: bool):
        super().__init__()
        self.states = states
        self.outermost = outermost

    def pre_forward(self, module, *args, **kwargs):
        if self.outermost:
            self.states.get_state().begin_pass()
        return args, kwargs

    def post_forward(self, module, output):
        if self.outermost:
            self.states.get_state().end_pass()
        return output

    def reset_state(self, module):
        self.states.reset()
        return module

    def deinitalize_hook(self, module):
        # The registry has put the class's own forward back as an instance attribute; before, there was none.
        if vars(module).get("forward") == types.MethodType(type(module).forward, module):
            del module.forward
        return module


class SelfAttentionHook(RollingKVCacheHook):
    """Replaces the forward of one self-attention module: its keys and values go through the rolling cache."""

    def __init__(self, states: ContextStates, outermost: bool, name: str):
        super().__init__(states, outermost)
        self.name = name

    def new_forward(
        self, module, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None, **_
    ) -> torch.Tensor:
        """hidden_states: [B, S, dim]. rotary_emb: Wan's (cos, sin), [1, S, 1, D] each, every angle twice.

        What else a model passes is for its own attention processor, which does not run.
        """
        if encoder_hidden_states is not None:
            raise ValueError(f"{self.name} was given encoder_hidden_states: a rolling cache is for self-attention only")
        if attention_mask is not None:
            raise ValueError(f"{self.name} was given an attention_mask: with a rolling cache every token is attended")
        query, key, value = project(module, hidden_states)
        if rotary_emb is not None:
            cos, sin = rotary_emb
            rotation = torch.complex(cos[..., 0::2].float(), sin[..., 1::2].float())
            query, key = rotate(query, rotation), rotate(key, rotation)
        backend = getattr(getattr(module, "processor", None), "_attention_backend", None)
        with self.states.get_state().attended(self.name, key, value) as (keys, values):
            # A float32 norm weight in a half-precision model lifts the query: the cache decides the dtype.
            hidden_states = dispatch_attention_fn(query.to(keys.dtype), keys, values, backend=backend)
        hidden_states = hidden_states.flatten(2, 3)
        for layer in module.to_out if isinstance(module.to_out, torch.nn.ModuleList) else [module.to_out]:
            hidden_states = layer(hidden_states)
        return hidden_states


class WanPositionsHook(RollingKVCacheHook):
    """Replaces the forward of Wan's rotary embedding: a pass gets the positions at which it is written."""

    def __init__(self, states: ContextStates, outermost: bool):
        super().__init__(states, outermost)
        self.key, self.tables = None, None  # every step of a chunk uses the same ones

    def new_forward(self, module, hidden_states) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states: latents [B, C, f, h, w]. Returns (cos, sin) as the stock module, [1, S, 1, D] each."""
        frames, height, width = (size // patch for size, patch in zip(hidden_states.shape[2:], module.patch_size))
        offset = self.states.get_state().write_offset
        start_frame, rest = divmod(offset, height * width)
        if rest:
            raise ValueError(
                f"token {offset} is not at the start of a latent frame, which has {height * width} tokens at this size "
                f"({height} x {width}); was the cache filled at another size?"
            )
        key = (start_frame, frames, height, width, hidden_states.device)
        if self.tables is None or key != self.key:
            angles = rotary_angles(module.attention_head_dim, start_frame, frames, height, width)
            cos, sin = (part.float().repeat_interleave(2, -1)[None, :, None] for part in (angles.cos(), angles.sin()))
            self.key = key
            self.tables = (to_device(cos, hidden_states.device), to_device(sin, hidden_states.device))
        return self.tables


def _is_self_attention(module: torch.nn.Module) -> bool:
    return all(hasattr(module, name) for name in SELF_ATTENTION_ATTRIBUTES) and not getattr(
        module, "is_cross_attention", False
    )


def project(module, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised query and key, and value, [B, S, H, D] each."""
    if getattr(module, "fused_projections", False):
        query, key, value = module.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        query, key, value = module.to_q(hidden_states), module.to_k(hidden_states), module.to_v(hidden_states)
    value = value.unflatten(2, (module.heads, -1))
    return normalise(module.norm_q, query, value.shape[3]), normalise(module.norm_k, key, value.shape[3]), value


def normalise(norm, projected: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Normalise over all heads together as Wan does, or per head where the norm is as wide as one: [B, S, H, D]."""
    heads = projected.unflatten(2, (-1, head_dim))
    if norm is None:
        return heads
    weight = getattr(norm, "weight", None)
    if weight is not None and weight.numel() == head_dim:
        return norm(heads)
    return norm(projected).unflatten(2, (-1, head_dim))
