"""The loop over chunks: `RollingSession` brings a working cache to a point of a video and samples on from there."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from ..cache.joint import JointPass
from ..cache.prompt import Branch
from ..cache.sizes import CacheBytes
from ..checkpoints.model import CausalModel
from ..config import CacheConfig, ExecutionConfig, SamplingConfig
from ..step_cache import StepCache, StepCacheReport, StepProbe, start_step_cache
from ..wan.attachment import RollingAttachment, apply_rolling_kv_cache
from .branches import GuidanceBranches
from .checks import check_latents, fitted_embeds
from .denoiser import Denoiser, needed_negative, noise_dtype
from .history import History
from .rolling import check_rolling, rolling_chunks
from .schedule import Noise, NoiseSource, chunk_noise, sample_chunk, warp_steps
from .state import CacheState, Chunk, same_values
from .workspace import CacheSpec, Workspace


@dataclass
class _Open:
    """What a session holds while it is open."""

    attachment: RollingAttachment
    branches: GuidanceBranches
    history: History
    steps: StepCache | StepProbe | None = None


class _Wanted(NamedTuple):
    """What the next chunk is to be made with: embeddings [B, L, D] on the CPU, and how to switch to them."""

    prompt: torch.Tensor
    negative: torch.Tensor | None
    switch: str | None = None


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
    switch: how to switch to this prompt where the state's last chunk had another: one of `config.SWITCHES`. None: in the
        family's own way, and not at all if it is the same prompt.
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
        switch: str | None = None,
        step_cache=None,
        on_pass: Callable[[int, int], None] | None = None,
    ):
        self.model = model
        self.sampling = sampling or model.preset.sampling
        self.cache_config = cache or model.preset.cache
        self.execution = execution or ExecutionConfig()
        self.state = state or CacheState(model=model.identity)
        self.batch = batch
        self.dtype = model.dtype
        self.latent_size = model.geometry.latent_size(height, width)
        self.on_pass = on_pass
        self.step_cache = step_cache
        self.step_report: StepCacheReport | None = None
        self._workspace = workspace
        self._fitted = partial(fitted_embeds, model, batch)
        self._open: _Open | None = None
        self._passes_done = 0
        self.sampling.check_cache(self.cache_config)
        self.execution.check(step_cache=step_cache is not None)
        if self.state.chunks:
            check_latents(model, batch, self.latent_size, self.state.chunks[-1], "the cache state's latents")
        if self.sampling.joint:
            check_rolling(self.state, step_cache is not None)
        self.set_prompt(prompt, negative, switch)

    @property
    def cache_bytes(self) -> CacheBytes:
        """Bytes that keys and values take now, of all guidance branches together; those of the prompt not counted."""
        return self._open.branches.nbytes if self._open else CacheBytes(0, 0)

    def set_prompt(self, prompt: torch.Tensor, negative: torch.Tensor | None = None, switch: str | None = None) -> None:
        """Use another prompt from the next chunk on.

        prompt, negative: embeddings [B or 1, L, D].
        switch: what is done to the cache before that chunk, one of `config.SWITCHES`; None: what the family does when the
            prompt changes, and nothing where it does not.

        Raises ValueError for a switch that the cache's rules cannot do.
        """
        if switch is not None:
            self.cache_config.check_switch(switch)
            self.sampling.check_cache(replace(self.cache_config, switch=switch))
        negative = needed_negative(self.sampling, negative)
        # Copies of its own, which the state takes over: the caller may go on to change what was given.
        fitted = self._fitted(prompt, "the prompt").clone()
        fitted_negative = None if negative is None else self._fitted(negative, "the negative prompt").clone()
        self._wanted = _Wanted(fitted, fitted_negative, switch)

    def _next_switch(self) -> str:
        """What is done to the cache before the next chunk; empty for nothing."""
        if not self.state.records:
            return ""
        switch = self._wanted.switch
        if switch is None:
            last = self._fitted(self.state.prompts[self.state.records[-1].prompt], "a prompt of the cache state")
            switch = "hold" if same_values(last.contiguous(), self._wanted.prompt) else self.cache_config.switch
        return "" if switch == "hold" else switch

    def prefill(self, latents: torch.Tensor) -> None:
        """Append given clean latents, [B, C, F, h, w] in model space: an image, or a video to extend."""
        self.sampling.check_given()
        check_latents(self.model, self.batch, self.latent_size, latents, "the initial latents")
        sizes = self.sampling.prefill_sizes(latents.shape[2], self.state.frames)
        for chunk in latents.to(self.dtype).split(sizes, dim=2):
            prompt, negative, _ = self._wanted
            switch = self._next_switch()
            self.state = self.state.extended(
                chunk, timestep=0.0, prompt=prompt, negative=negative, seed=None, switch=switch
            )
            self._wanted = _Wanted(prompt, negative)

    def generate(
        self, chunks: int, seed: int = 0, noise_source: NoiseSource | None = None
    ) -> Generator[Chunk, None, None]:
        """Sample `chunks` more chunks, yielding each as it is done; `self.state` then includes it.

        The context pass of a chunk runs only when another chunk follows it, in this run or in a later one. With an
        unlimited window, room for all of them is taken at once.

        With the sampler "rolling", chunks that are still noisy when the last one is done, or when the run is cancelled, are
        given up: what follows begins with new ones, right after those that are done. So a video made in two runs is not
        that of one run, but always the same one. A new prompt holds from the next joint pass on, for all chunks in it.

        Raises ValueError unless the session is open, and for fewer chunks than the sampler can make at a time.
        """
        branches, frames = self._running().branches, self.state.frames
        self.sampling.check_length(chunks, frames, self.model.geometry)
        branches.leave_cancelled_chunk(self.state, self.sampling.chunk_size(frames), self._next_switch())
        branches.reserve(frames + self.sampling.frames_of(chunks, frames))
        on_step = partial(self._tick, self.passes_needed(chunks))
        if self.sampling.joint:
            yield from self._generate_jointly(chunks, seed, noise_source, on_step)
            return
        for _ in range(chunks):
            run = self._running()
            wanted = self._wanted  # `on_pass` may set others, for the next chunk
            prompt, negative, switch = wanted.prompt, wanted.negative, self._next_switch()
            start, context_noise = self.state.frames, self.sampling.context_noise
            run.history.bring_to(self.state, switch, prompt, negative, context_noise, on_step)
            shape = (self.batch, self.model.geometry.channels, self.sampling.chunk_size(start), *self.latent_size)
            branches = run.branches.for_prompts(prompt, negative)
            for branch in branches:
                branch.cache.begin(shape[2])
            passes = [partial(run.attachment.predict, branch=branch) for branch in branches]
            predict = Denoiser(passes, self.sampling, self.dtype, run.steps, on_step)
            noise = chunk_noise(
                noise_source, seed, start, shape, noise_dtype(self.sampling, self.dtype), self.model.compute_device()
            )
            with torch.inference_mode():
                latents = sample_chunk(predict, noise, self.sampling, start).to(self.dtype)
            self.state = self.state.extended(
                latents, timestep=context_noise, prompt=prompt, negative=negative, seed=seed, switch=switch
            )
            if self._wanted is wanted:  # its switch is done
                self._wanted = wanted._replace(switch=None)
            yield Chunk(start, latents)

    def _generate_jointly(
        self, chunks: int, seed: int, noise_source: NoiseSource | None, on_step: Callable[[], None]
    ) -> Generator[Chunk, None, None]:
        sampling, first = self.sampling, self.state.frames
        shape = (self.batch, self.model.geometry.channels, sampling.chunk, *self.latent_size)
        dtype, device = noise_dtype(sampling, self.dtype), self.model.compute_device()
        wanted = self._wanted

        def noise(number: int) -> Noise:
            return chunk_noise(noise_source, seed, first + number * sampling.chunk, shape, dtype, device)

        def predict(x: torch.Tensor, timesteps: Sequence[float]) -> torch.Tensor:
            nonlocal wanted
            run, (prompt, negative, _) = self._running(), self._wanted
            run.history.bring_to(self.state, "", prompt, negative, sampling.context_noise, on_step)
            wanted = self._wanted  # `on_pass` may set others, for the next pass
            passes = [
                partial(run.attachment.predict, branch=_looking_at(branch, x.shape[2]))
                for branch in run.branches.for_prompts(wanted.prompt, wanted.negative)
            ]
            return Denoiser(passes, sampling, self.dtype, None, on_step)(x, timesteps)

        steps = warp_steps(sampling.denoising_steps, sampling.shift)
        made = rolling_chunks(predict, noise, steps, chunks)
        for _ in range(chunks):
            with torch.inference_mode():
                latents = next(made).to(self.dtype)
            start = self.state.frames
            self.state = self.state.extended(
                latents, timestep=sampling.context_noise, prompt=wanted.prompt, negative=wanted.negative, seed=seed
            )
            yield Chunk(start, latents)

    def passes_needed(self, chunks: int) -> int:
        """Model passes (counting a guided pair as one) until `chunks` more chunks are done, from the start."""
        if not chunks:
            return self._passes_done
        run, switch = self._open, self._next_switch()
        backlog = run.history.passes_to(self.state, switch) if run else len(self.state.records)
        return self._passes_done + backlog + self.sampling.passes_for(chunks, self.state.frames)

    def _tick(self, total: int) -> None:
        if self.on_pass is not None:
            self.on_pass(self._passes_done, total)
        self._passes_done += 1

    def _running(self) -> _Open:
        if self._open is None:
            raise ValueError("this session is not open: generate inside `with session:`")
        return self._open

    def __enter__(self) -> RollingSession:
        transformer, sampling = self.model.transformer, self.sampling
        spec = CacheSpec.of(
            self.model,
            self.batch,
            self.latent_size,
            self.cache_config,
            self.execution,
            sampling.branches,
            sampling.joint,
        )
        self._passes_done = 0
        with ExitStack() as ending:  # last in, first out, whatever fails
            ending.push(self._leave_caches)
            attachments = []
            for weights in self.model.transformers:
                attachments.append(apply_rolling_kv_cache(weights, self.execution))
                ending.callback(attachments[-1].detach)
            capacity = max(self.state.frames, sampling.chunk)
            branches = GuidanceBranches.open(spec, self._workspace or Workspace(), self.state.key, capacity)
            history = History(branches, self.model, attachments[-1].forward, sampling.chunk)
            self._open = run = _Open(attachments[0], branches, history)
            if self.step_cache is not None:  # after the rolling cache, and off before it: its hooks wrap what they find
                run.steps = start_step_cache(
                    transformer, self.step_cache, steps=sampling.passes, few_step=sampling.few_step
                )
                ending.callback(run.steps.detach)
                ending.callback(self._report_steps, run.steps)
            self._ending = ending.pop_all()
        return self

    def __exit__(self, *exception) -> None:
        self._ending.__exit__(*exception)

    def _report_steps(self, steps: StepCache | StepProbe) -> None:
        self.step_report = steps.report()

    def _leave_caches(self, exception_type, *_) -> None:
        run, self._open = self._open, None
        if run is None:
            return
        # Keep the working cache only if the log records every prompt in it.
        recorded = not self.sampling.guided or not run.branches.cached or self.state.records[-1].negative >= 0
        keep = exception_type is None and recorded
        run.branches.close(self._workspace if keep else None, self.state.key)


def _looking_at(branch: Branch, frames: int) -> Branch:
    """The branch for a joint pass over `frames` latent frames, which reads its cache and writes nothing."""
    cache: Any = branch.cache
    seen: Any = JointPass(cache, frames)
    return Branch(seen, branch.prompt)
