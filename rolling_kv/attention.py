"""Attach a rolling cache to a stock diffusers `WanTransformer3DModel`, and take it off again without a trace.

Nothing is subclassed or patched on a class. While attached, each block's two attention modules have a processor of
ours, and some modules have an instance-level `forward`: the rotary embedding (absolute frame positions, angles in
float64), the condition embedder (time sinusoid in float64, text projected once per prompt), the blocks (the same
arithmetic in fewer passes over memory) and above all the last block (whose remainder the context pass does not need).
The state dict and the module tree stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _check_attention_backend_requirements,
    dispatch_attention_fn,
)

from .block import fused_feed_forward, fused_forward, is_plain, may_fuse, modulated_norm, rms_norm_
from .cache import Branch
from .graphs import CudaRecorder, PassGraphs, PassKey
from .rope import rotary_angles, rotate, turns
from .transfer import has_float64, to_device
from .weights import check_compile, check_cuda_graphs, gguf_types, storage_of

ATTENTION_BACKENDS = ("native", "_native_cudnn", "flash", "_flash_3", "sage", "xformers")
"""Those of diffusers' backends that attend without a mask and download nothing."""


@dataclass
class _Pass:
    """What the processors read during one forward pass."""

    branch: Branch
    time_rows: int
    keys_only: bool
    rotation: torch.Tensor | None = None  # as `rope.rotate` takes it
    sinusoid: torch.Tensor | None = None  # of the timestep, [channels]


class RollingAttachment:
    """A transformer with rolling caches attached. Made by `apply_rolling_kv_cache`; one per transformer.

    exact: rotate in float64, and keep the original code's order of operations: bit-equal to it in float32. Off: float32
        rotation and fused operations, which agree to rounding and are faster.
    backend: attention backend of diffusers' dispatcher (None: its default, SDPA).
    compile: run the blocks through torch.compile. What changes from chunk to chunk (the cache's indices, the number of
        keys) stays outside the compiled parts, so a session compiles once per chunk size.
    cuda_graphs: once the window is full, record passes as CUDA graphs and repeat them; see `graphs`.
    """

    def __init__(
        self,
        transformer,
        *,
        exact: bool = False,
        backend: str | None = None,
        compile: bool = False,
        cuda_graphs: bool = False,
    ):
        self.transformer = transformer
        self.exact = exact
        self.backend = backend
        self.compile = compile
        self.graphs = PassGraphs(CudaRecorder(transformer.patch_embedding.weight.device)) if cuda_graphs else None
        self.current: _Pass | None = None
        self._rotations: dict[tuple, torch.Tensor] = {}
        self._sinusoids: dict[tuple, torch.Tensor] = {}
        self._undo = []

    def forward(
        self,
        latents: torch.Tensor,
        timestep: float,
        branch: Branch,
        *,
        time_rows: int | None = None,
        keys_only: bool = False,
    ) -> torch.Tensor | None:
        """Run the open chunk of `branch` through the model, writing its keys and values into the cache.

        latents: [B, C, f, h, w] in model space, where the cache has an open chunk of f frames. timestep: 0 to 1000,
        one for the whole chunk. time_rows: rows in which the timestep is embedded, by default f as in the original
        (a different number gives the same values up to the rounding of the matrix product). keys_only: write the cache
        and return None.
        Returns the predicted flow, [B, C, f, h, w].
        """
        batch, _, frames = latents.shape[:3]
        cache = branch.cache
        if cache.window.open != frames or cache.shape.batch != batch:
            raise ValueError(
                f"the cache has an open chunk of {cache.window.open} frames at batch {cache.shape.batch}, "
                f"the latents are {frames} frames at batch {batch}"
            )
        self.current = _Pass(branch, time_rows or frames, keys_only)
        try:
            timesteps = torch.full((batch,), float(timestep), device=latents.device)
            inputs = latents, timesteps, self._rotation(latents), self._sinusoid(timestep, latents.device)
            if self.graphs is None or (layout := cache.layout) is None:
                return self._run(*inputs)
            key = PassKey(cache, branch.prompt, layout, latents.shape, self.current.time_rows, keys_only)
            return self.graphs.run(key, self._run, *inputs)
        finally:
            self.current = None

    def _run(self, latents, timesteps, rotation, sinusoid) -> torch.Tensor | None:
        self.current.rotation, self.current.sinusoid = rotation, sinusoid
        sample = self.transformer(latents, timesteps, self.current.branch.prompt.embeds, return_dict=False)[0]
        return None if self.current.keys_only else sample

    def detach(self) -> None:
        """Put the transformer back exactly as it was. Safe to call twice, and after an exception."""
        while self._undo:
            self._undo.pop()()
        self._rotations.clear()
        self._sinusoids.clear()
        if self.graphs is not None:
            self.graphs.clear()

    def __enter__(self) -> RollingAttachment:
        return self

    def __exit__(self, *_) -> None:
        self.detach()

    def _attach(self) -> None:
        blocks = self.transformer.blocks
        last, last_is_plain = blocks[-1], is_plain(blocks[-1])
        for layer, block in enumerate(blocks):
            self._set_processor(block.attn1, RollingSelfAttention(self, layer))
            self._set_processor(block.attn2, PromptCrossAttention(self, layer))
        self._set_forward(self.transformer.rope, self._given_rotation)
        self._set_forward(self.transformer.condition_embedder, self._embed_condition)
        if not self.exact and not self.compile:
            for block in filter(may_fuse, blocks):
                self._set_forward(block, fused_forward(block, block.forward))
                self._set_forward(block.ffn, fused_feed_forward(block.ffn, block.ffn.forward))
        if last_is_plain:  # somebody else's forward, which may bring its weights in, is never cut short
            self._set_forward(last, self._last_block_forward(last, last.forward))
        if self.compile:
            for block in blocks:
                block.compile(dynamic=False)
                self._undo.append(partial(delattr, block, "_compiled_call_impl"))

    def _set_processor(self, module, processor) -> None:
        previous = module.processor
        self._undo.append(lambda: setattr(module, "processor", previous))
        module.processor = processor

    def _set_forward(self, module, forward) -> None:
        if "forward" in vars(module):  # a hook of somebody else's
            previous = module.forward
            self._undo.append(lambda: setattr(module, "forward", previous))
        else:
            self._undo.append(lambda: delattr(module, "forward"))
        module.forward = forward

    def _rotation(self, latents: torch.Tensor) -> torch.Tensor:
        """The rotation for the open chunk's positions, as `rope.rotate` takes it."""
        window = self.current.branch.cache.window
        _, patch_height, patch_width = self.transformer.config.patch_size
        frames, height, width = latents.shape[2:]
        grid = (frames, height // patch_height, width // patch_width)
        key = (window.end, *grid, latents.device)
        if key not in self._rotations:
            # Every step of a chunk uses the same one; another chunk's will not be needed again.
            self._rotations.clear()
            rotation = turns(rotary_angles(self.transformer.config.attention_head_dim, window.end, *grid))
            rotation = rotation.to(torch.complex128 if self.exact else torch.complex64)[None, :, None]
            # torch.compile fuses real arithmetic only.
            rotation = torch.view_as_real(rotation) if self.compile else rotation
            self._rotations[key] = to_device(rotation, latents.device)
        return self._rotations[key]

    def _sinusoid(self, timestep: float, device: torch.device) -> torch.Tensor:
        """The sinusoid of a timestep, [channels], computed on the CPU in float64. Every chunk has the same timesteps."""
        key = float(timestep), device
        if key not in self._sinusoids:
            embedder = self.transformer.condition_embedder
            sinusoid = time_sinusoid(torch.tensor(key[:1], dtype=torch.float64), embedder.timesteps_proj.num_channels)
            dtype = next(embedder.time_embedder.parameters()).dtype
            self._sinusoids[key] = to_device(sinusoid[0].to(dtype), device)
        return self._sinusoids[key]

    def _given_rotation(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.current.rotation

    def _embed_condition(self, timestep, encoder_hidden_states, encoder_hidden_states_image=None, **_):
        embedder = self.transformer.condition_embedder
        prompt = self.current.branch.prompt
        if prompt.projected is None:
            prompt.projected = embedder.text_embedder(encoder_hidden_states)
        # One matrix row per frame, as the original computes it: the row count changes the rounding of the product.
        rows = self.current.time_rows
        sinusoid = self.current.sinusoid.repeat(len(timestep) * rows, 1)
        time = embedder.time_embedder(sinusoid).type_as(encoder_hidden_states)
        modulation = embedder.time_proj(embedder.act_fn(time))
        return time[::rows], modulation[::rows], prompt.projected, None

    def _last_block_forward(self, block, forward):
        @partial(torch.compiler.disable, recursive=False)
        def last_block(hidden_states, encoder_hidden_states, temb, rotary_emb):
            if not self.current.keys_only:
                return forward(hidden_states, encoder_hidden_states, temb, rotary_emb)
            self._write_keys(block, hidden_states, temb, rotary_emb)
            return hidden_states

        return last_block

    @torch.compiler.disable
    def _write_keys(self, block, hidden_states, temb, rotary_emb) -> None:
        """What a context pass needs of the last block: the beginning, up to the keys and values."""
        shift, scale = (block.scale_shift_table + temb.float())[:, :2].chunk(2, dim=1)
        if self.exact:
            normed = block.norm1(hidden_states.float()) * (1 + scale) + shift
        else:
            normed = modulated_norm(hidden_states.float(), block.norm1, scale, shift)
        processor = block.attn1.processor
        key, value = processor.key_value(block.attn1, normed.type_as(hidden_states), rotary_emb)
        self.current.branch.cache.write(processor.layer, key, value)


class RollingSelfAttention:
    """Self-attention of one block over the frames in the window. A diffusers attention processor."""

    _parallel_config = None

    def __init__(self, attachment: RollingAttachment, layer: int):
        self.attachment = attachment
        self.layer = layer
        self._attention_backend = attachment.backend

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        """hidden_states: [B, S, dim], the tokens of the open chunk. rotary_emb: see `rope.rotate`."""
        query = rotate(self._heads(attn, attn.to_q(hidden_states), attn.norm_q), rotary_emb)
        key, value = self.key_value(attn, hidden_states, rotary_emb)
        return _project(attn, self._attend(query, key, value))

    @torch.compiler.disable
    def _attend(self, query, key, value):
        key, value = self.attachment.current.branch.cache.update(self.layer, key, value)
        return _attention(self, query, key, value)

    def key_value(self, attn, hidden_states, rotary_emb) -> tuple[torch.Tensor, torch.Tensor]:
        """The chunk's own keys, after RoPE, and values, [B, S, H, D] each."""
        key = rotate(self._heads(attn, attn.to_k(hidden_states), attn.norm_k), rotary_emb)
        return key, attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))

    def _heads(self, attn, projected, norm):
        return _normalise(projected, norm, self.attachment.exact).unflatten(2, (attn.heads, -1))


class PromptCrossAttention:
    """Cross-attention of one block; the prompt's keys and values are computed once. A diffusers attention processor."""

    _parallel_config = None

    def __init__(self, attachment: RollingAttachment, layer: int):
        self.attachment = attachment
        self.layer = layer
        self._attention_backend = attachment.backend

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        """hidden_states: [B, S, dim]; encoder_hidden_states: the projected prompt, [B, L, dim]."""
        query = _normalise(attn.to_q(hidden_states), attn.norm_q, self.attachment.exact)
        return _project(attn, self._attend(attn, query.unflatten(2, (attn.heads, -1)), encoder_hidden_states))

    @torch.compiler.disable
    def _attend(self, attn, query, encoder_hidden_states):
        layers = self.attachment.current.branch.prompt.layers
        if self.layer not in layers:
            key = _normalise(attn.to_k(encoder_hidden_states), attn.norm_k, self.attachment.exact)
            value = attn.to_v(encoder_hidden_states)
            layers[self.layer] = key.unflatten(2, (attn.heads, -1)), value.unflatten(2, (attn.heads, -1))
        return _attention(self, query, *layers[self.layer])


def _attention(processor, query, key, value) -> torch.Tensor:
    # A float32 norm weight in a half-precision model lifts the query: keys and values decide the dtype.
    return dispatch_attention_fn(
        query.to(key.dtype), key, value, backend=processor._attention_backend, parallel_config=None
    )


def _project(attn, heads) -> torch.Tensor:
    return attn.to_out[1](attn.to_out[0](heads.flatten(2, 3)))


def _normalise(hidden_states: torch.Tensor, norm, exact: bool) -> torch.Tensor:
    """Normalise the fresh output of a projection; it may be overwritten."""
    if not exact:
        fits = hidden_states.device.type == "cpu" and hidden_states.dtype == norm.weight.dtype == torch.float32
        return rms_norm_(hidden_states, norm) if fits else norm(hidden_states)
    # The original's order of operations; torch's fused kernel differs from it in the last bit.
    wide = hidden_states.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    return wide.type_as(hidden_states) * norm.weight


def time_sinusoid(timestep: torch.Tensor, channels: int) -> torch.Tensor:
    """Sinusoidal embedding of timesteps [N] in float64, [N, channels], cosines first as Wan has them."""
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
    angles = torch.outer(timestep.to(torch.float64), torch.pow(10000, -exponent))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def apply_rolling_kv_cache(
    transformer,
    *,
    exact: bool = False,
    backend: str | None = None,
    compile: bool = False,
    cuda_graphs: bool = False,
) -> RollingAttachment:
    """Attach to a stock `WanTransformer3DModel`. Use as a context manager, or call `detach` on what is returned.

    Raises ValueError if a rolling cache or one of diffusers' own is attached already, if the model is conditioned on
    images, if `exact` is asked for on a device without float64, if the attention backend is not one of
    ATTENTION_BACKENDS or is not installed, if float8 weights are to be compiled or recorded, if weights in a GGUF packing
    outside `weights.RECORDABLE` are to be recorded, or if CUDA graphs are asked for without CUDA. The arguments are those
    of `RollingAttachment`.
    """
    check_backend(backend)
    device = transformer.patch_embedding.weight.device
    if exact and not has_float64(device):
        raise ValueError(f"exact passes rotate in float64, which {device} does not have: turn exact off")
    if compile:
        check_compile(storage_of(transformer))
    if cuda_graphs:
        check_cuda_graphs(device, storage_of(transformer), gguf_types(dict(transformer.named_parameters())))
    if is_attached(transformer):
        raise ValueError("this transformer has a rolling cache attached already; detach that one first")
    if transformer.is_cache_enabled:
        raise ValueError(
            "this transformer has one of diffusers' own caches enabled, which would also skip the passes that write the "
            "rolling cache: call its disable_cache() first, and give the method as step_cache instead"
        )
    registry = getattr(transformer, "_diffusers_hook", None)
    if registry is not None and registry.get_hook("rolling_kv_cache") is not None:
        raise ValueError("this transformer has the hooks of rolling_kv.hooks; remove them first")
    if transformer.config.image_dim is not None or transformer.config.added_kv_proj_dim is not None:
        raise ValueError("this is an image-conditioned Wan model; causal models are text-conditioned (T2V) ones")
    attachment = RollingAttachment(transformer, exact=exact, backend=backend, compile=compile, cuda_graphs=cuda_graphs)
    try:
        attachment._attach()
    except BaseException:
        attachment.detach()
        raise
    return attachment


def is_attached(transformer) -> bool:
    """Whether a rolling cache is attached to `transformer`."""
    return any(isinstance(block.attn1.processor, RollingSelfAttention) for block in transformer.blocks)


@contextmanager
def attention_backend(transformer, backend: str | None) -> Iterator[None]:
    """Let the attention of a stock transformer use `backend` for a while; None: what it uses anyway.

    diffusers' own `set_attention_backend` also changes what every other model uses.
    """
    if backend is None:
        yield
        return
    processors = [attention.processor for block in transformer.blocks for attention in (block.attn1, block.attn2)]
    before = [processor._attention_backend for processor in processors]
    try:
        for processor in processors:
            processor._attention_backend = backend
        yield
    finally:
        for processor, name in zip(processors, before):
            processor._attention_backend = name


def check_backend(backend: str | None) -> None:
    """Raise ValueError unless `backend` is None or one of ATTENTION_BACKENDS that is installed."""
    if backend is None:
        return
    if backend not in ATTENTION_BACKENDS:
        raise ValueError(f"the attention backend must be one of {', '.join(ATTENTION_BACKENDS)}, got {backend!r}")
    try:
        _check_attention_backend_requirements(AttentionBackendName(backend))
    except RuntimeError as error:
        raise ValueError(f"the attention backend {backend} is not installed here: {error}") from error


def remove_rolling_kv_cache(transformer) -> bool:
    """Detach whatever rolling cache is attached to `transformer`; False if there was none."""
    processor = transformer.blocks[0].attn1.processor
    if not isinstance(processor, RollingSelfAttention):
        return False
    processor.attachment.detach()
    return True
