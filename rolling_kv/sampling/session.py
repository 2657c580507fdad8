"""The loop over chunks: `RollingSession` brings a working cache to a point of a video and samples on from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch

from ..cache.sizes import CacheBytes
from ..checkpoints.model import CausalModel
from ..config import CacheConfig, ExecutionConfig, SamplingConfig
from ..devices import to_device
from ..step_cache import StepCache, StepCacheReport, StepProbe, start_step_cache
from ..wan.attachment import RollingAttachment, apply_rolling_kv_cache
from .branches import GuidanceBranches
from .checks import check_latents, fitted_embeds
from .denoiser import Denoiser, check_negative, noise_dtype
from .schedule import sample_chunk, seeded_noise
from .state import CacheState
from .workspace import CacheSpec, Workspace

NoiseSource = Callable[[int, int, tuple[int, ...]], torch.Tensor]
"""(first latent frame of the chunk, draw, shape) -> noise [B, C, f, h, w]. See `schedule.Noise` for the draws."""


class Chunk(NamedTuple):
    """A finished chunk: its first absolute latent frame and its clean latents [B, C, f, h, w] in model space."""

    start_frame: int
    latents: torch.Tensor


class RollingSession:
    """One run on one video. A context manager: the cache is attached to the model inside it, and only there.

        with RollingSession(model, prompt, height=480, width=832) as session:
            for chunk in session.generate(7, seed=1):
                ...
            state = session.state

    model: mutated while the session is open (its attention processors), restored when it closes.
    prompt: text embeddings [B or 1, L, D], zero-padded.
    height, width: pixels, multiples of what the model's geometry asks for.
    negative: embeddings of the negative prompt; needed with guidance only.
    batch: videos made side by side.
    sampling, cache: by default the model's preset.
    execution: how passes are computed.
    state: the video to continue; its tensors are only read.
    workspace: where to look for, and leave, a working cache.
    step_cache: a method of `step_cache.METHODS`, which skips work between denoising steps, never in a pass that writes
        the cache; `step_report` tells what it did, once the session is closed.
    on_pass: called as on_pass(done, total) before every model pass; whatever it raises cancels the run, and the working
        cache is dropped.

    Raises ValueError for settings, prompts or a state that do not fit the model or each other.
    """

    def __init__(
        self,
        model: CausalModel,
        prompt: torch.Tensor,
        *,
        height: int,
        width: int,
        negative: torch.Tensor | None = None,
        batch: int = 1,
        sampling: SamplingConfig | None = None,
        cache: CacheConfig | None = None,
        execution: ExecutionConfig | None = None,
        state: CacheState | None = None,
        workspace: Workspace | None = None,
        step_cache=None,
        on_pass: Callable[[int, int], None] | None = None,
    ):
        self.model = model
        self.sampling = sampling or model.preset.sampling
        self.cache_config = cache or model.preset.cache
        self.execution = execution or ExecutionConfig()
        self.state = state or CacheState(model=model.identity)
        self.batch = batch
        self.device = model.compute_device()
        self.dtype = model.dtype
        self.latent_size = model.geometry.latent_size(height, width)
        self.on_pass = on_pass
        self.step_cache = step_cache
        self.step_report: StepCacheReport | None = None
        self._workspace = workspace
        self._attachment: RollingAttachment | None = None
        self._branches: GuidanceBranches | None = None
        self._steps: StepCache | StepProbe | None = None
        self._passes_done = 0

        self.cache_config.check_chunk(self.sampling.chunk)
        self.execution.check(step_cache=step_cache is not None)
        if self.state.chunks:
            check_latents(model, batch, self.latent_size, self.state.chunks[-1], "the cache state's latents")
        self.set_prompt(prompt, negative)

    @property
    def cache_bytes(self) -> CacheBytes:
        """Bytes that keys and values take now, of all guidance branches together; those of the prompt not counted."""
        return self._branches.nbytes if self._branches else CacheBytes(0, 0)

    def set_prompt(self, prompt: torch.Tensor, negative: torch.Tensor | None = None) -> None:
        """Use another prompt from the next chunk on. Embeddings [B or 1, L, D]."""
        check_negative(self.sampling, negative)
        # Copies of its own, which the state takes over: the caller may go on to change what was given.
        self._prompt = fitted_embeds(self.model, self.batch, prompt, "the prompt").clone()
        self._negative = None
        if negative is not None and self.sampling.guided:
            self._negative = fitted_embeds(self.model, self.batch, negative, "the negative prompt").clone()

    def prefill(self, latents: torch.Tensor) -> None:
        """Append given clean latents, [B, C, F, h, w] in model space: an image, or a video to extend."""
        check_latents(self.model, self.batch, self.latent_size, latents, "the initial latents")
        latents = latents.to(self.dtype)
        start = 0
        for frames in self.sampling.prefill_sizes(latents.shape[2], self.state.frames):
            chunk = latents[:, :, start : start + frames]
            self.state = self.state.extended(
                chunk, timestep=0.0, prompt=self._prompt, negative=self._negative, seed=None
            )
            start += frames

    def generate(self, chunks: int, seed: int = 0, noise_source: NoiseSource | None = None) -> Iterator[Chunk]:
        """Sample `chunks` more chunks, yielding each as it is done; `self.state` then includes it.

        The context pass of a chunk runs only when another chunk follows it, in this run or in a later one. With an
        unlimited window, room for all of them is taken at once. Raises ValueError unless the session is open.
        """
        caches = self._open_branches()
        caches.leave_cancelled_chunk(self.state, self.sampling.chunk_size(self.state.frames))
        tick = partial(self._tick, self.passes_needed(chunks))
        caches.reserve(self.state.frames + sum(self.sampling.chunk_sizes(chunks, self.state.frames)))
        for _ in range(chunks):
            caches = self._open_branches()
            caches.replay(self.state, self.model, self._attachment.forward, self._negative, tick)
            start, channels = self.state.frames, self.model.geometry.channels
            shape = (self.batch, channels, self.sampling.chunk_size(start), *self.latent_size)
            prompt, negative = self._prompt, self._negative  # `on_pass` may set others, for the next chunk
            branches = caches.for_prompts(prompt, negative)
            for branch in branches:
                branch.cache.begin(shape[2])
            if self._steps:
                self._steps.begin()
            passes = [partial(self._attachment.forward, branch=branch) for branch in branches]
            predict = Denoiser(passes, self.sampling, self.dtype, self._steps, tick)

            def draw(number: int) -> torch.Tensor:
                noise = noise_source(start, number, shape) if noise_source else seeded_noise(seed, start, shape, number)
                return to_device(noise.to(noise_dtype(self.sampling, self.dtype)), self.device)

            with torch.inference_mode():
                latents = sample_chunk(predict, draw, self.sampling, start).to(self.dtype)
            self.state = self.state.extended(
                latents, timestep=self.sampling.context_noise, prompt=prompt, negative=negative, seed=seed
            )
            yield Chunk(start, latents)

    def passes_needed(self, chunks: int) -> int:
        """Model passes (counting a guided pair as one) until `chunks` more chunks are done, from the start."""
        backlog = len(self.state.records) - (self._branches.cached if self._branches else 0)
        first = self.sampling.passes_at(self.state.frames)
        others = self.sampling.passes_at(self.state.frames + 1)
        return self._passes_done + backlog + first + (chunks - 1) * (others + 1) if chunks else self._passes_done

    def _tick(self, total: int) -> None:
        if self.on_pass is not None:
            self.on_pass(self._passes_done, total)
        self._passes_done += 1

    def _open_branches(self) -> GuidanceBranches:
        if self._branches is None:
            raise ValueError("this session is not open: generate inside `with session:`")
        return self._branches

    def __enter__(self) -> RollingSession:
        transformer, sampling = self.model.transformer, self.sampling
        spec = CacheSpec.of(
            self.model, self.batch, self.latent_size, self.cache_config, self.execution, sampling.branches
        )
        self._passes_done = 0
        with ExitStack() as ending:  # last in, first out, whatever fails
            ending.push(self._leave_caches)
            self._attachment = apply_rolling_kv_cache(transformer, self.execution)
            ending.callback(self._detach)
            capacity = max(self.state.frames, sampling.chunk)
            self._branches = GuidanceBranches.open(spec, self._workspace or Workspace(), self.state.key, capacity)
            if self.step_cache is not None:  # after the rolling cache, and off before it: its hooks wrap what they find
                steps = start_step_cache(
                    transformer, self.step_cache, steps=sampling.passes_at(1), few_step=sampling.few_step
                )
                self._steps = steps
                ending.callback(steps.detach)
                ending.callback(self._report_steps)
            self._ending = ending.pop_all()
        return self

    def __exit__(self, *exception) -> None:
        self._ending.__exit__(*exception)

    def _report_steps(self) -> None:
        self.step_report = self._steps.report()

    def _detach(self) -> None:
        attachment, self._attachment, self._steps = self._attachment, None, None
        attachment.detach()

    def _leave_caches(self, exception_type, *_) -> None:
        branches, self._branches = self._branches, None
        if branches is None:
            return
        # Keep the working cache only if the log records every prompt in it.
        recorded = not self.sampling.guided or not branches.cached or self.state.records[-1].negative >= 0
        keep = exception_type is None and recorded
        branches.close(self._workspace if keep else None, self.state.key)
