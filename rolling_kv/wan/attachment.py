"""Attach a rolling cache to a stock diffusers `WanTransformer3DModel`, and take it off again without a trace.

Nothing is subclassed or patched on a class. While attached, each block's two attention modules have a processor of
ours, and some modules have an instance-level `forward`: the rotary embedding (absolute frame positions, angles in
float64), the patch embedding (video by video), the condition embedder (time sinusoid in float64, text projected once per
prompt), the blocks (the same arithmetic in fewer passes over memory) and above all the last block (whose remainder the
context pass does not need). The state dict and the module tree stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch

from ..cache.prompt import Branch
from ..config import ExecutionConfig
from .borrowed import Rotate, matrices, rotation_on
from .context import Pass, PassContext
from .execution import best_kernels, compiled_code, weights_of
from .fast import fast_for, say_once
from .framewise import framewise_forward
from .fused import fused_forwards, fuses_half, is_plain, kernels_for, last_block_forward
from .graphs import Addresses, CudaRecorder, PassGraphs, PassKey
from .inputs import PassInputs, condition_forward, video_by_video
from .offloaded import offloaded_blocks
from .processors import PromptCrossAttention, RollingSelfAttention
from .products import float8_forwards
from .shards import HeadShards, output_forward, patches_forward


class RollingAttachment:
    """A transformer with rolling caches attached. Made by `apply_rolling_kv_cache`; one per transformer."""

    def __init__(self, transformer, execution: ExecutionConfig, shards: HeadShards | None = None):
        self.transformer = transformer
        self.execution = execution
        self.shards = shards
        device = transformer.patch_embedding.weight.device
        self.fast = fast_for(execution, transformer, device)
        self.context = PassContext(replace(execution, backend=self.fast.backend), self.detach, shards)
        self.inputs = PassInputs(transformer, execution)
        recorded = execution.cuda_graphs
        self.graphs = PassGraphs(CudaRecorder(device), Addresses(transformer)) if recorded else None
        self._undo: list[Callable[[], object]] = []

    def forward(
        self,
        latents: torch.Tensor,
        timestep: float | Sequence[float],
        branch: Branch,
        *,
        time_rows: int | None = None,
        keys_only: bool = False,
        once: bool = False,
    ) -> torch.Tensor | None:
        """Run the open chunk of `branch` through the model, writing its keys and values into the cache.

        latents: [B, C, f, h, w] in model space, where the cache has an open chunk of f frames.
        timestep: 0 to 1000, one for the whole chunk or one for each frame.
        time_rows: rows in which a single timestep is embedded, by default f as in the original (a different number gives
            the same values up to the rounding of the matrix product).
        keys_only: write the cache and return None.
        once: never record it: too few passes are like it to be worth the memory.

        Returns the predicted flow, [B, C, f, h, w]. Raises ValueError unless frames and batch are those of the cache, and
        timesteps are one or as many as frames.
        """
        return self._pass(latents, timestep, (branch,), time_rows, keys_only, once)

    def forward_together(
        self,
        latents: Sequence[torch.Tensor],
        timestep: float | Sequence[float],
        branches: Sequence[Branch],
        *,
        time_rows: int | None = None,
        keys_only: bool = False,
    ) -> Sequence[torch.Tensor | None]:
        """Run the open chunks of several branches through the model as one batch; see `forward`.

        latents: [B, C, f, h, w] of each, of one shape but for B. Prompts have one length.
        Returns the predicted flow of each.
        """
        flows = self._pass(torch.cat(list(latents)), timestep, tuple(branches), time_rows, keys_only)
        return [None] * len(branches) if flows is None else flows.split([len(one) for one in latents])

    def _pass(
        self,
        latents: torch.Tensor,
        timestep,
        branches: tuple[Branch, ...],
        time_rows: int | None,
        keys_only: bool,
        once: bool = False,
    ) -> torch.Tensor | None:
        batch, _, frames = latents.shape[:3]
        caches, context = [branch.cache for branch in branches], self.context
        held = sum(cache.shape.batch for cache in caches)
        if any(cache.window.open != frames for cache in caches) or held != batch:
            raise ValueError(
                f"the cache has an open chunk of {caches[0].window.open} frames at batch {held}, "
                f"the latents are {frames} frames at batch {batch}"
            )
        check_no_parallelism(self.transformer)
        framewise = isinstance(timestep, Sequence)
        if framewise and len(timestep) != frames:
            raise ValueError(f"a chunk of {frames} frames takes 1 timestep or {frames}, got {len(timestep)}")
        context.current = Pass(branches, time_rows or frames, keys_only)
        try:
            timesteps = self.inputs.timesteps(timestep, batch, latents.device)
            self.inputs.together = len(caches)
            rotations = [self.inputs.rotation(cache.position, latents) for cache in caches]
            if len(rotations) > 1:
                rotation = torch.cat(
                    [turn.expand(c.shape.batch, *turn.shape[1:]) for turn, c in zip(rotations, caches)]
                )
            else:
                (rotation,) = rotations
            if self.shards is not None:
                rotation = self.shards.own(rotation, frames)
            inputs = latents, timesteps, rotation, self.inputs.sinusoid(timestep, latents.device)
            if self.graphs is None or once or len(branches) > 1 or not caches[0].repeats:
                return self._run(*inputs)
            prompt, rows = context.current.branch.prompt, context.current.time_rows
            key = PassKey(caches[0], prompt.embeds.shape, latents.shape, rows, framewise, keys_only)
            return self.graphs.run(key, prompt, self._run, *inputs, caches[0].slots)
        finally:
            context.current = None

    def predict(self, latents: torch.Tensor, timestep: float | Sequence[float], branch: Branch) -> torch.Tensor:
        """The predicted flow of the open chunk of `branch`, [B, C, f, h, w]: `forward` in full."""
        flow = self.forward(latents, timestep, branch)
        assert flow is not None
        return flow

    def _run(self, latents, timesteps, rotation, sinusoid, slots=None) -> torch.Tensor | None:
        context = self.context
        context.rotate = self._borrowed()
        context.rotation = rotation if context.rotate is None else matrices(rotation)
        context.sinusoid, context.slots = sinusoid, slots
        try:
            own_order = best_kernels(self.transformer) if context.execution.backend is None else nullcontext()
            # Triton's kernels run on the current device.
            with compiled_code(self.execution), own_order, torch.cuda.device_of(latents):
                texts = [branch.prompt.embeds for branch in context.running.branches]
                embeds = torch.cat(texts) if len(texts) > 1 else texts[0]
                sample = self.transformer(latents, timesteps, embeds, return_dict=False)[0]
        finally:
            context.rotation = context.rotate = context.sinusoid = context.slots = None
        return None if context.running.keys_only else sample

    def _borrowed(self) -> Rotate | None:
        """What rotates heads in half precision in the place of PyTorch's own operations."""
        execution, weight = self.execution, self.transformer.patch_embedding.weight
        own = execution.exact or execution.plain or execution.compile or self.context.kernels is not None
        if own or not fuses_half(weight):
            return None
        config = self.transformer.config
        return rotation_on(weight.device, weight.dtype, config.num_attention_heads, config.attention_head_dim)

    def detach(self) -> None:
        """Put the transformer back exactly as it was. Safe to call twice, and after an exception."""
        while self._undo:
            self._undo.pop()()
        self.inputs.clear()
        if self.graphs is not None:
            self.graphs.clear()

    def __enter__(self) -> RollingAttachment:
        return self

    def __exit__(self, *_) -> None:
        self.detach()

    def _attach(self) -> None:
        blocks, context = self.transformer.blocks, self.context
        last, plain = blocks[-1], [is_plain(block) for block in blocks]
        context.kernels = kernels_for(self.execution, blocks)
        for layer, block in enumerate(blocks):
            self._set_processor(block.attn1, RollingSelfAttention(context, layer))
            self._set_processor(block.attn2, PromptCrossAttention(context, layer))
        self._set_forward(self.transformer.rope, lambda hidden_states: context.rotation)
        patches, embedder = self.transformer.patch_embedding, self.transformer.condition_embedder
        self._set_forward(patches, video_by_video(patches.forward, patches.weight))
        if self.shards is not None:
            project_out = self.transformer.proj_out
            self._set_forward(patches, patches_forward(patches.forward, self.shards))
            self._set_forward(project_out, output_forward(project_out.forward, self.shards, context))
        self._set_forward(embedder, condition_forward(embedder, context))
        in_float8 = float8_forwards(blocks, context.kernels) if self.fast.products else []
        fused = [] if self.execution.exact or self.execution.compile else fused_forwards(blocks, context.kernels)
        for module, forward in (*fused, *in_float8):
            self._set_forward(module, forward)
        in_fewer = {id(module) for module, _ in fused}
        for block, is_stock in zip(blocks, plain):
            takes_frames = (fuses_half,) if id(block) in in_fewer else ()
            self._set_forward(block, framewise_forward(block, block.forward, is_stock, *takes_frames))
        if plain[-1]:  # somebody else's forward, which may bring its weights in, is never cut short
            self._set_forward(last, last_block_forward(last, last.forward, context))
        if (offloaded := offloaded_blocks(self.transformer)) is not None:
            for layer, block in enumerate(blocks):
                self._set_forward(block, offloaded.arriving(layer, block.forward))
            self._undo.append(partial(setattr, offloaded, "by_forwards", False))
            offloaded.by_forwards = True
            offloaded.forget()
        if self.execution.compile:
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


def apply_rolling_kv_cache(
    transformer, execution: ExecutionConfig | None = None, shards: HeadShards | None = None
) -> RollingAttachment:
    """Attach to a stock `WanTransformer3DModel`. Use as a context manager, or call `detach` on what is returned.

    execution: how passes are computed; the defaults where it is left out.
    shards: the processes that share the passes, each with a cache of its part of the heads.

    Raises ValueError if a rolling cache or one of diffusers' own is attached already, if the model is conditioned on
    images, or if `ExecutionConfig.check` finds that the settings cannot go with these weights on their device.
    """
    execution = execution or ExecutionConfig()
    weights = weights_of(transformer)
    execution.check(weights.device, weight_storage=weights.storage, packings=weights.packings)
    if weights.offloaded:
        execution.check_offloaded()
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
    check_no_parallelism(transformer)
    attachment = RollingAttachment(transformer, execution, shards)
    say_once(attachment.fast.remark)
    try:
        attachment._attach()
    except BaseException:
        attachment.detach()
        raise
    return attachment


def check_no_parallelism(transformer) -> None:
    """Raise ValueError where diffusers shares the passes out by itself: its plan knows no cache, and gives other values."""
    if getattr(transformer, "_parallel_config", None) is not None:
        raise ValueError(
            "this transformer has diffusers' own parallelism enabled, which knows nothing of the rolling cache: leave "
            "enable_parallelism out, and give the session `shards` instead"
        )


def is_attached(transformer) -> bool:
    """Whether a rolling cache is attached to `transformer`."""
    return any(isinstance(block.attn1.processor, RollingSelfAttention) for block in transformer.blocks)


def remove_rolling_kv_cache(transformer) -> bool:
    """Detach whatever rolling cache is attached to `transformer`; False if there was none."""
    processor = transformer.blocks[0].attn1.processor
    if not isinstance(processor, RollingSelfAttention):
        return False
    processor.context.detach()
    return True
