"""The loop over chunks: `RollingSession` brings a working cache to a point of a video and samples on from there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from typing import Any

import torch

from ..cache.sizes import CacheBytes
from ..cache.window import FrameWindow
from ..checkpoints.model import CausalModel
from ..config import CacheConfig, ExecutionConfig, SamplingConfig
from ..devices import is_out_of_memory
from ..step_cache import StepCache, StepCacheReport, StepProbe, start_step_cache
from ..wan.attachment import RollingAttachment, apply_rolling_kv_cache
from ..wan.shards import HeadShards
from .branches import GuidanceBranches
from .checks import check_latents, check_source_length, checked_seeds, fitted_embeds
from .denoiser import noise_dtype, with_given
from .history import History
from .prompting import Prompting, Wanted
from .recomputed import RecomputedContext, ReencodedFrames, Reencoding, check_vae, context_passes
from .rolling import check_rolling, rolling_chunks
from .running import Running
from .schedule import Noise, NoiseSource, chunk_noise, sample_chunk, starting_from, warp_steps
from .state import CacheState, Chunk, Seeds
from .workspace import CacheSpec, Workspace

logger = logging.getLogger(__name__)


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
    state: the video to continue; its tensors are only read. Between chunks an equal one may be put in its place.
    workspace: where to look for, and leave, a working cache.
    keep_keys: whether the state is to carry what the working cache holds when the session closes, in CPU memory: then
        whoever continues it replays nothing. A log warning says where there is too little RAM.
    switch: how to switch to this prompt where the state's last chunk had another: one of `config.SWITCHES`. None: in the
        family's own way, and not at all if it is the same prompt.
    after: embeddings for the chunks behind the first that is made, where they are others; see `set_prompt`.
    vae: a `vae.WanVAE`. Only a recomputed context asks for it, once the video's first frame is out of view.
    step_cache: a method of `step_cache.METHODS`, which skips work between denoising steps, never in a pass that writes
        the cache; `step_report` tells what it did, once the session is closed.
    shards: the processes that make this video together, each with a session like this one.
    attach: what gives a transformer its caches, in the place of `apply_rolling_kv_cache`: see `together.Together`.
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
        keep_keys: bool = False,
        switch: str | None = None,
        after: torch.Tensor | None = None,
        vae: Reencoding | None = None,
        step_cache=None,
        shards: HeadShards | None = None,
        attach: Callable[[Any], Any] | None = None,
        on_pass: Callable[[int, int], None] | None = None,
    ):
        self.model = model
        self.sampling = sampling or model.preset.sampling
        self.cache_config = cache or model.preset.cache
        self.execution = execution or ExecutionConfig()
        self.state = state or CacheState(model=model.identity, model_name=model.preset.name)
        self.batch = batch
        self.dtype = model.dtype
        self.latent_size = model.geometry.latent_size(height, width)
        self.on_pass = on_pass
        self.step_cache = step_cache
        self.step_report: StepCacheReport | None = None
        self._workspace = workspace
        self._keep_keys = keep_keys
        self._shards = shards
        self._attach = attach or partial(apply_rolling_kv_cache, execution=self.execution, shards=shards)
        self._vae = vae
        self._given: torch.Tensor | None = None  # the frame that the first chunk will begin with
        self._open: Running | None = None
        self._passes_done = 0
        self.sampling.check_cache(self.cache_config)
        self.execution.check(step_cache=step_cache is not None, ranks=1 if shards is None else shards.ranks)
        if shards is not None:
            geometry, heads = model.geometry, model.config.num_attention_heads
            shards.check(heads, geometry.tokens_per_frame(*self.latent_size))
        if self.state.chunks:
            check_latents(model, batch, self.latent_size, self.state.chunks[-1], "the cache state's latents")
        if self.sampling.joint:
            check_rolling(self.state, self.execution, step_cache is not None)
        self._prompts = Prompting(partial(fitted_embeds, model, batch), self.sampling, self.cache_config, self.state)
        self.set_prompt(prompt, negative, switch, after)

    @property
    def cache_bytes(self) -> CacheBytes:
        """Bytes that keys and values take now, of all guidance branches together; those of the prompt not counted."""
        return self._open.branches.nbytes if self._open else CacheBytes(0, 0)

    @property
    def window(self) -> FrameWindow:
        """Which latent frames the caches hold now; to be read only. Raises ValueError unless the session is open."""
        return next(iter(self._running().branches.caches.values())).window

    def set_prompt(
        self,
        prompt: torch.Tensor,
        negative: torch.Tensor | None = None,
        switch: str | None = None,
        after: torch.Tensor | None = None,
        *,
        blend: int = 1,
        curve: str = "linear",
    ) -> None:
        """Use another prompt from the next chunk on.

        prompt, negative: embeddings [B or 1, L, D].
        switch: what is done to the cache before that chunk, one of `config.SWITCHES`; None: what the family does when the
            prompt changes, and nothing where it does not.
        after: embeddings for the chunks behind the next one, where they are others: a cut of LongLive 2 is said in the
            first chunk of a shot alone.
        blend: generated chunks over which the prompt of the last chunk becomes this one: the first of them still has the
            old prompt, the last is the first to have the new one, and nothing is done to the cache. Each mixture is a
            prompt of the log, and a change during a blend starts from the last of them. 1: at once. The negative prompt
            changes at once.
        curve: of the blend, one of `blend.CURVES`.

        Raises ValueError for a switch that the cache's rules cannot do, and for a blend with any switch.
        """
        self._prompts.want(prompt, negative, switch, after, blend, curve)

    def prefill(self, latents: torch.Tensor) -> None:
        """Append given clean latents, [B, C, F, h, w] in model space: an image, or a video to extend.

        Where the family has a single frame inside the first chunk, that chunk will begin with it, and nothing is appended.
        """
        self.sampling.check_given()
        check_latents(self.model, self.batch, self.latent_size, latents, "the initial latents")
        if self._given is not None:  # with more frames it is the start of a video
            latents, self._given = torch.cat([self._given, latents.to(self._given)], dim=2), None
        if self.sampling.given_inside(latents.shape[2], self.state.frames):
            self._given = latents.detach().to(self.model.compute_device(), self.dtype, copy=True)
            return
        sizes = self.sampling.prefill_sizes(latents.shape[2], self.state.frames)
        for chunk in latents.to(self.dtype).split(sizes, dim=2):
            switch, wanted = self._prompts.next_switch(self.state), self._prompts.begin()
            if self._open:
                self._open.branches.leave_cancelled_chunk(self.state, chunk.shape[2], switch)
            self.state = self.state.extended(
                chunk, timestep=0.0, prompt=wanted.prompt, negative=wanted.negative, seed=None, switch=switch
            )
            self._prompts.given(wanted)

    def generate(
        self,
        chunks: int,
        seed: int | Sequence[int] = 0,
        noise_source: NoiseSource | None = None,
        *,
        source: torch.Tensor | Iterable[torch.Tensor] | None = None,
        strength: float = 1.0,
    ) -> Generator[Chunk, None, None]:
        """Sample `chunks` more chunks, yielding each as it is done; `self.state` then includes it.

        The context pass of a chunk runs only when another chunk follows it, in this run or in a later one. With an
        unlimited window, room for all of them is taken at once.

        With the sampler "rolling", chunks that are still noisy when the last one is done, or when the run is cancelled, are
        given up: what follows begins with new ones, right after those that are done. So a video made in two runs is not
        that of one run, but always the same one. A new prompt holds from the next joint pass on, for all chunks in it.

        seed: of the noise; of a batch, a sequence of one seed per video gives each the noise that it would have alone.
        noise_source: other noise than that of the seed.
        source: video to video: latents [B, C, F, h, w] in model space, of which the first frame is that of the first
            chunk here; or their frames [B, C, 1, h, w] one after the other, of which those of a chunk are taken as it
            begins. Each chunk begins as these with noise, instead of as pure noise.
        strength: with a source, 0 to 1, by how much all steps are scaled, and so how little of it stays; at 1, nothing
            stays where the steps begin at 1000.

        Raises ValueError unless the session is open, for fewer chunks than the sampler can make at a time, for a source
        that is too short or not for this sampler, for another number of seeds than videos, and where a recomputed
        context lacks its VAE.
        """
        branches, frames = self._running().branches, self.state.frames
        self.sampling.check_length(chunks, frames, self.model.geometry)
        check_vae(self.cache_config, self.sampling, self.state, chunks, self._vae)
        sampling, seeds = self.sampling, checked_seeds(seed, self.batch)
        if self._shards is not None:
            self._shards.check_same(seeds, chunks, frames, tuple(self._prompts.wanted.prompt.shape))
        pieces = None if source is None else self._pieces_of(source, chunks)
        if pieces is not None:
            sampling = sampling.at_strength(strength)
        branches.leave_cancelled_chunk(
            self.state, self.sampling.chunk_size(frames), self._prompts.next_switch(self.state)
        )
        branches.reserve(frames + self.sampling.frames_of(chunks, frames))
        if self.sampling.joint:
            on_step = partial(self._tick, self.passes_needed(chunks))
            yield from self._generate_jointly(chunks, seeds, noise_source, on_step)
            return
        for made in range(chunks):
            run = self._running()
            # Anew for each chunk: a prompt that was set since may have passes of its own.
            on_step = partial(self._tick, self.passes_needed(chunks - made))
            switch, wanted = self._prompts.next_switch(self.state), self._prompts.begin()
            start, given = self.state.frames, None if self.state.frames else self._given
            run.history.bring_to(self.state, switch, wanted.prompt, wanted.negative, sampling.context_noise, on_step)
            predict = run.denoiser(wanted, sampling.chunk_size(start), on_step, given)
            noise = self._noise(noise_source, seeds, start)
            if pieces is not None:
                noise = starting_from(next(pieces), noise, warp_steps(sampling.steps_at(start), sampling.shift)[0])
            with torch.inference_mode():
                latents = sample_chunk(predict, noise, sampling, start).to(self.dtype)
                latents = latents if given is None else with_given(latents, given)
            yield self._finished(latents, wanted, seeds, switch, 0 if given is None else given.shape[2])

    def _pieces_of(self, source: torch.Tensor | Iterable[torch.Tensor], chunks: int) -> Iterator[torch.Tensor]:
        """What each of the next chunks begins as. Raises ValueError at once where latents do not fit or are too few."""
        sizes = self.sampling.chunk_sizes(chunks, self.state.frames)
        if isinstance(source, torch.Tensor):
            check_latents(self.model, self.batch, self.latent_size, source, "the latents to start from")
            check_source_length(source, chunks, self.sampling, self.state.frames)
            source = source.split(1, dim=2)
        frames = iter(source)
        return (torch.cat(list(islice(frames, size)), dim=2) for size in sizes)

    def _generate_jointly(
        self, chunks: int, seeds: Seeds, noise_source: NoiseSource | None, on_step: Callable[[], None]
    ) -> Generator[Chunk, None, None]:
        sampling, first = self.sampling, self.state.frames
        wanted = self._prompts.wanted

        def noise(number: int) -> Noise:
            return self._noise(noise_source, seeds, first + number * sampling.chunk)

        def predict(x: torch.Tensor, timesteps: Sequence[float]) -> torch.Tensor:
            nonlocal wanted
            run, wanted = self._running(), self._prompts.wanted
            run.history.bring_to(self.state, "", wanted.prompt, wanted.negative, sampling.context_noise, on_step)
            wanted = self._prompts.begin()  # `on_pass` may have set others
            return run.joint_denoiser(wanted, x.shape[2], on_step)(x, timesteps)

        steps = warp_steps(sampling.denoising_steps, sampling.shift)
        made = rolling_chunks(predict, noise, steps, chunks)
        for _ in range(chunks):
            with torch.inference_mode():
                latents = next(made).to(self.dtype)
            yield self._finished(latents, wanted, seeds)

    def _noise(self, source: NoiseSource | None, seeds: Seeds, start: int) -> Noise:
        """The draws of the chunk that begins at the latent frame `start`."""
        shape = (self.batch, self.model.geometry.channels, self.sampling.chunk_size(start), *self.latent_size)
        dtype = noise_dtype(self.sampling, self.dtype)
        return chunk_noise(source, seeds, start, shape, dtype, self.model.compute_device())

    def _finished(self, latents: torch.Tensor, wanted: Wanted, seeds: Seeds, switch: str = "", given: int = 0) -> Chunk:
        """Let the state have a chunk that was made with this."""
        start = self.state.frames
        self.state = self.state.extended(
            latents,
            timestep=self.sampling.context_noise,
            prompt=wanted.prompt,
            negative=wanted.negative,
            seed=seeds,
            switch=switch,
            given=given,
        )
        self._prompts.done(wanted)
        return Chunk(start, latents)

    def passes_needed(self, chunks: int) -> int:
        """Model passes (counting a guided pair as one) until `chunks` more chunks are done, from the start."""
        if not chunks:
            return self._passes_done
        run, switch = self._open, self._prompts.next_switch(self.state)
        if self.cache_config.context == "recomputed":
            backlog = context_passes(self.cache_config, self.sampling, self.state.frames, chunks) - (chunks - 1)
        else:
            backlog = run.history.passes_to(self.state, switch) if run else len(self.state.records)
        return self._passes_done + backlog + self.sampling.passes_for(chunks, self.state.frames)

    def _tick(self, total: int) -> None:
        if self.on_pass is not None:
            self.on_pass(self._passes_done, total)
        self._passes_done += 1

    def _running(self) -> Running:
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
            1 if self._shards is None else self._shards.ranks,
        )
        self._passes_done = 0
        with ExitStack() as ending:  # last in, first out, whatever fails
            ending.push(self._leave_caches)
            attachments = []
            for weights in self.model.transformers:
                attachments.append(self._attach(weights))
                ending.callback(attachments[-1].detach)
            capacity = max(self.state.frames, sampling.chunk)
            branches = GuidanceBranches.open(spec, self._workspace or Workspace(), self.state, capacity)
            history = self._history(branches, attachments[-1], ending)
            self._open = run = Running(attachments[0], branches, history, sampling, self.dtype)
            if self.step_cache is not None:  # after the rolling cache, and off before it: its hooks wrap what they find
                run.steps = start_step_cache(
                    transformer, self.step_cache, steps=sampling.passes, few_step=sampling.few_step
                )
                ending.callback(run.steps.detach)
                ending.callback(self._report_steps, run.steps)
            self._ending = ending.pop_all()
        return self

    def _history(self, branches: GuidanceBranches, attachment: RollingAttachment, ending: ExitStack) -> History:
        kept = branches, self.model, attachment.forward, self.sampling.chunk
        if self.cache_config.context == "kept":
            return History(*kept)
        reencoded = None if self._vae is None else ReencodedFrames(self._vae)
        if reencoded is not None:
            ending.callback(reencoded.release)
        return RecomputedContext(*kept, reencoded)

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
        # Whoever takes it over cannot know how a cancelled chunk was switched to.
        run.branches.leave_cancelled_chunk(self.state, self.sampling.chunk_size(self.state.frames), "")
        if keep and self._keep_keys:
            self._carry_keys(run.branches)
        run.branches.close(self._workspace if keep else None, self.state.key)

    def _carry_keys(self, branches: GuidanceBranches) -> None:
        try:
            self.state = self.state._replace(keys=branches.kept_keys())
        except Exception as error:  # the video is there all the same
            if not isinstance(error, ValueError) and not is_out_of_memory(error):
                raise
            logger.warning("The state carries no keys and values: %s", error)
