"""The loop over chunks: `RollingSession` brings a working cache to a point of a video and samples on from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from .attention import RollingAttachment, apply_rolling_kv_cache
from .cache import Branch, CacheBytes, CacheShape, PromptCache, RollingKVCache
from .config import SPATIAL_COMPRESSION, CacheConfig, SamplingConfig, check_size
from .model import CausalModel
from .schedule import sample_chunk, seeded_noise
from .state import CacheState, same_values
from .step_cache import StepCache, StepCacheReport, StepWatch, start_step_cache
from .transfer import to_device

NoiseSource = Callable[[int, int, tuple[int, ...]], torch.Tensor]
"""(first latent frame of the chunk, draw, shape) -> noise [B, C, f, h, w]. See `schedule.Noise` for the draws."""


class Chunk(NamedTuple):
    """A finished chunk: its first absolute latent frame and its clean latents [B, C, f, h, w] in model space."""

    start_frame: int
    latents: torch.Tensor


class CacheSpec(NamedTuple):
    """What must agree for one run to take over another's working cache."""

    model: str  # identity: keys and values belong to the weights that made them
    shape: CacheShape
    config: CacheConfig
    branches: tuple[str, ...]
    exact: bool
    backend: str | None
    compile: bool
    device: torch.device


@dataclass
class Workspace:
    """Keeps a model's working cache between two runs, so that the next run can take it over.

    Holds one cache, at one point of one video. It is only ever an optimisation: a run that finds another video here
    replays its own, with the same result.
    """

    spec: CacheSpec | None = None
    caches: dict[str, RollingKVCache] | None = None
    key: str = ""
    cached_chunks: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes on the compute device."""
        return sum(cache.nbytes.device for cache in (self.caches or {}).values())

    def clear(self) -> None:
        """Let go of the working cache's memory."""
        self.spec, self.caches, self.key, self.cached_chunks = None, None, "", 0


class RollingSession:
    """One run on one video. A context manager: the cache is attached to the model inside it, and only there.

        with RollingSession(model, prompt, height=480, width=832) as session:
            for chunk in session.generate(7, seed=1):
                ...
            state = session.state

    model: mutated while the session is open (its attention processors), restored when it closes.
    prompt, negative: text embeddings [B or 1, L, D], zero-padded; negative is needed with guidance only.
    height, width: pixels, multiples of 16. sampling, cache: by default the model's preset.
    state: the video to continue; its tensors are only read. workspace: where to look for, and leave, a working cache.
    exact, backend, compile, cuda_graphs: see `RollingAttachment`. on_pass: called as on_pass(done, total) before every
    model pass; whatever it raises cancels the run, and the working cache is dropped. step_cache: a method of
    `step_cache.METHODS`, which skips work between denoising steps, never in a pass that writes the cache; `step_report`
    tells what it did, once the session is closed.
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
        state: CacheState | None = None,
        workspace: Workspace | None = None,
        exact: bool = False,
        backend: str | None = None,
        compile: bool = False,
        cuda_graphs: bool = False,
        on_pass: Callable[[int, int], None] | None = None,
        step_cache=None,
    ):
        self.model = model
        self.sampling = sampling or model.preset.sampling
        self.cache_config = cache or model.preset.cache
        self.state = state or CacheState(model=model.identity)
        self.batch = batch
        self.device = next(model.transformer.parameters()).device
        self.dtype = model.dtype
        self.latent_size = check_size(height, width)
        self.exact = exact
        self.backend = backend
        self.compile = compile
        self.cuda_graphs = cuda_graphs
        self.on_pass = on_pass
        self.step_cache = step_cache
        self.step_report: StepCacheReport | None = None
        self._steps: StepCache | StepWatch | None = None
        self._shared = workspace is not None
        self._workspace = workspace or Workspace()
        self._attachment: RollingAttachment | None = None
        self._caches: dict[str, RollingKVCache] = {}
        self._cached = 0  # chunks of the state whose context pass the working cache has seen
        self._passes_done = 0
        self._prompt_caches: list[tuple[torch.Tensor, PromptCache]] = []  # with the embeddings on the CPU

        self.cache_config.check_chunk(self.sampling.chunk)
        if self.step_cache is not None and self.compile:
            raise ValueError("a step cache cannot go with compiled blocks: turn compile off, or remove the step cache")
        if self.step_cache is not None and self.cuda_graphs:
            raise ValueError("a step cache cannot go with CUDA graphs: turn them off, or remove the step cache")
        if self.state.chunks:
            self._check_latents(self.state.chunks[-1], "the cache state's latents")
        self.set_prompt(prompt, negative)

    @property
    def cache_bytes(self) -> CacheBytes:
        """Bytes that keys and values take now, of all guidance branches together; those of the prompt not counted."""
        held = [cache.nbytes for cache in self._caches.values()]
        return CacheBytes(sum(part.device for part in held), sum(part.host for part in held))

    # -- what comes in -------------------------------------------------------------------------------------------

    def set_prompt(self, prompt: torch.Tensor, negative: torch.Tensor | None = None) -> None:
        """Use another prompt from the next chunk on. Embeddings [B or 1, L, D]."""
        if self.sampling.guided and negative is None:
            raise ValueError(
                f"guidance_scale is {self.sampling.guidance_scale}, which needs a negative prompt; connect one, "
                "or set guidance to 1 to sample without"
            )
        # Copies of its own, which the state takes over: the caller may go on to change what was given.
        self._prompt = self._embeds(prompt, "the prompt").clone()
        self._negative = self._embeds(negative, "the negative prompt").clone() if self.sampling.guided else None

    def prefill(self, latents: torch.Tensor) -> None:
        """Append given clean latents, [B, C, F, h, w] in model space: an image, or a video to extend."""
        self._check_latents(latents, "the initial latents")
        latents = latents.to(self.dtype)
        start = 0
        for frames in self.sampling.prefill_sizes(latents.shape[2], self.state.frames):
            chunk = latents[:, :, start : start + frames]
            self.state = self.state.extended(
                chunk, timestep=0.0, prompt=self._prompt, negative=self._negative, seed=None
            )
            start += frames

    # -- sampling ------------------------------------------------------------------------------------------------

    def generate(self, chunks: int, seed: int = 0, noise_source: NoiseSource | None = None) -> Iterator[Chunk]:
        """Sample `chunks` more chunks, yielding each as it is done; `self.state` then includes it.

        The context pass of a chunk runs only when another chunk follows it, in this run or in a later one. With an
        unlimited window, room for all of them is taken at once. Raises ValueError unless the session is open.
        """
        self._check_open()
        self._leave_cancelled_chunk()
        total = self.passes_needed(chunks)
        channels = self.model.transformer.config.in_channels
        for cache in self._caches.values():
            cache.reserve(self.state.frames + sum(self.sampling.chunk_sizes(chunks, self.state.frames)))
        for _ in range(chunks):
            self._check_open()
            self._catch_up(total)
            start = self.state.frames
            shape = (self.batch, channels, self.sampling.chunk_size(start), *self.latent_size)
            prompt, negative = self._prompt, self._negative  # `on_pass` may set others, for the next chunk
            branches = self._branches(prompt, negative)
            for branch in branches:
                branch.cache.begin(shape[2])
            if self._steps:
                self._steps.begin()
            with torch.inference_mode():
                latents = sample_chunk(
                    lambda x, timestep: self._predict(branches, x, timestep, total),
                    lambda draw: self._draw(noise_source, seed, start, shape, draw),
                    self.sampling,
                    start,
                ).to(self.dtype)
            self.state = self.state.extended(
                latents, timestep=self.sampling.context_noise, prompt=prompt, negative=negative, seed=seed
            )
            yield Chunk(start, latents)

    def passes_needed(self, chunks: int) -> int:
        """Model passes (counting a guided pair as one) until `chunks` more chunks are done, from the start."""
        backlog = len(self.state.records) - self._cached
        first = self.sampling.passes_at(self.state.frames)
        others = self.sampling.passes_at(self.state.frames + 1)
        return self._passes_done + backlog + first + (chunks - 1) * (others + 1) if chunks else self._passes_done

    def _draw(self, noise_source, seed, start, shape, draw) -> torch.Tensor:
        noise = noise_source(start, draw, shape) if noise_source else seeded_noise(seed, start, shape, draw)
        dtype = self.dtype if self.sampling.sampler == "renoise" else torch.float32
        return to_device(noise.to(dtype), self.device)

    def _predict(self, branches: list[Branch], x: torch.Tensor, timestep: float, total: int) -> torch.Tensor:
        self._tick(total)
        x = x.to(self.dtype)
        passes = [partial(self._attachment.forward, branch=branch) for branch in branches]
        flows = self._steps.predict(x, timestep, passes) if self._steps else [run(x, timestep) for run in passes]
        if len(flows) == 1:
            return flows[0]
        cond, uncond = flows
        return uncond + self.sampling.guidance_scale * (cond - uncond)

    def _catch_up(self, total: int) -> None:
        """Run the context pass of every chunk that the working cache has not seen yet."""
        for index in range(self._cached, len(self.state.records)):
            record = self.state.records[index]
            # Another model may have made this video, in another dtype.
            latents = to_device(self.state.chunks[index].to(self.dtype), self.device)
            rows = 1 if record.seed is None else record.frames  # as the original embeds the timestep of given frames
            self._tick(total)
            branches = self._branches(self._past(record.prompt), self._past_negative(index))
            for branch in branches:
                if not branch.cache.window.open:
                    branch.cache.begin(record.frames)
                with torch.inference_mode():
                    self._attachment.forward(latents, record.timestep, branch, time_rows=rows, keys_only=True)
            for branch in branches:  # all or none: a pass that fails leaves the branches at the same point
                branch.cache.commit()
            self._cached = index + 1

    def _leave_cancelled_chunk(self) -> None:
        """Start over with a cache in which a cancelled chunk is open and something of another size comes next.

        It may have overwritten frames that the next chunk still sees; one of the same size overwrites it in turn.
        """
        waiting = self.state.records[self._cached :]
        frames = waiting[0].frames if waiting else self.sampling.chunk_size(self.state.frames)
        if any(cache.window.open not in (0, frames) for cache in self._caches.values()):
            for cache in self._caches.values():
                cache.reset()
            self._cached = 0

    def _past_negative(self, index: int) -> torch.Tensor | None:
        """The negative prompt with which chunk number `index` enters the cache; None without guidance.

        A chunk made without guidance has none of its own. It takes the next one in the log, which was the prompt of the
        session that first needed it: the log alone decides, so that a replay gives the same bits.
        """
        if not self.sampling.guided:
            return None
        later = (record.negative for record in self.state.records[index:] if record.negative >= 0)
        known = next(later, None)
        return self._negative if known is None else self._past(known)

    def _past(self, prompt: int) -> torch.Tensor:
        """Prompt number `prompt` of the state."""
        return self._embeds(self.state.prompts[prompt], "a prompt of the cache state")

    def _branches(self, prompt: torch.Tensor, negative: torch.Tensor | None) -> list[Branch]:
        """The conditional branch, and with guidance the unconditional one."""
        branches = [
            Branch(cache, self._prompt_cache(embeds))
            for cache, embeds in zip(self._caches.values(), (prompt, negative))
        ]
        used = [branch.prompt for branch in branches]  # a long video has many others, one after the other
        self._prompt_caches = [(source, known) for source, known in self._prompt_caches if known in used]
        return branches

    def _prompt_cache(self, embeds: torch.Tensor) -> PromptCache:
        """embeds: on the CPU, where comparing them does not wait for the device."""
        for source, known in self._prompt_caches:
            if same_values(source, embeds):
                return known
        made = PromptCache(to_device(embeds, self.device))
        self._prompt_caches.append((embeds, made))
        return made

    def _tick(self, total: int) -> None:
        if self.on_pass is not None:
            self.on_pass(self._passes_done, total)
        self._passes_done += 1

    # -- the working cache ---------------------------------------------------------------------------------------

    def __enter__(self) -> RollingSession:
        names = ("cond", "uncond") if self.sampling.guided else ("cond",)
        shape = CacheShape.of(self.model.transformer, self.batch, *self.latent_size, self.dtype)
        spec = CacheSpec(
            self.model.identity, shape, self.cache_config, names, self.exact, self.backend, self.compile, self.device
        )
        workspace = self._workspace
        self._cached = self._passes_done = 0
        self._attachment = apply_rolling_kv_cache(
            self.model.transformer,
            exact=self.exact,
            backend=self.backend,
            compile=self.compile,
            cuda_graphs=self.cuda_graphs,
        )
        try:
            if workspace.spec == spec:
                self._caches = workspace.caches
                if workspace.key == self.state.key:
                    self._cached = workspace.cached_chunks
                else:
                    for cache in self._caches.values():
                        cache.reset()
            else:
                workspace.clear()
                capacity = max(self.state.frames, self.sampling.chunk)
                with torch.inference_mode():
                    self._caches = {n: RollingKVCache(shape, self.cache_config, self.device, capacity) for n in names}
            self._spec = spec
            workspace.clear()
            if self.step_cache is not None:  # after the rolling cache, and off before it: its hooks wrap what they find
                self._steps = start_step_cache(
                    self.model.transformer,
                    self.step_cache,
                    steps=self.sampling.passes_at(1),
                    few_step=self.sampling.sampler == "renoise",
                )
        except BaseException:
            self._detach()
            self._leave_caches(keep=False)
            raise
        return self

    def __exit__(self, exception_type, *_) -> None:
        # Not a cache with a negative prompt in it that the log does not tell of.
        told = not self.sampling.guided or not self._cached or self.state.records[-1].negative >= 0
        with ExitStack() as ending:  # last in, first out, whatever fails
            ending.callback(self._leave_caches, keep=exception_type is None and self._shared and told)
            ending.callback(self._detach)
            if self._steps is not None:
                ending.callback(self._steps.detach)
                self.step_report = self._steps.report()

    def _detach(self) -> None:
        attachment, self._attachment, self._steps = self._attachment, None, None
        attachment.detach()

    def _leave_caches(self, keep: bool) -> None:
        """Hand the working cache over to the workspace, or give its memory back, whatever an exception still holds."""
        caches, prompts, self._caches, self._prompt_caches = self._caches, self._prompt_caches, {}, []
        for _, prompt in prompts:
            prompt.release()
        if keep:
            workspace = self._workspace
            workspace.spec, workspace.caches, workspace.key = self._spec, caches, self.state.key
            workspace.cached_chunks = self._cached
        else:
            for cache in caches.values():
                cache.release()

    # -- checks --------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._attachment is None:
            raise ValueError("this session is not open: generate inside `with session:`")

    def _embeds(self, embeds: torch.Tensor, name: str) -> torch.Tensor:
        text_dim = self.model.transformer.config.text_dim
        if embeds.ndim != 3 or embeds.shape[0] not in (1, self.batch) or embeds.shape[2] != text_dim:
            raise ValueError(
                f"{name} must be [1 or {self.batch}, tokens, {text_dim}] for this model, got {list(embeds.shape)}; "
                "was it made by a text encoder of another model?"
            )
        return embeds.to("cpu", self.dtype).expand(self.batch, -1, -1)

    def _check_latents(self, latents: torch.Tensor, name: str) -> None:
        expected = (self.batch, self.model.transformer.config.in_channels, *self.latent_size)
        if latents.ndim != 5 or (*latents.shape[:2], *latents.shape[3:]) != expected:
            raise ValueError(
                f"{name} must be [batch {expected[0]}, channels {expected[1]}, frames, height {expected[2]}, "
                f"width {expected[3]}] (in latents, {SPATIAL_COMPRESSION} pixels each), got {list(latents.shape)}"
            )
