"""What the nodes that sample share: from their inputs to an open session, and to a state whose prompts have their texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ..rolling_kv.config import SamplingConfig
from ..rolling_kv.sampling.checks import long_sink_note, size_note
from ..rolling_kv.sampling.recomputed import check_vae, needs_vae
from ..rolling_kv.sampling.scheduled import check_plan, cues, generate_scheduled, switches_of
from ..rolling_kv.sampling.session import RollingSession
from ..rolling_kv.sampling.shortage import telling_shortage
from ..rolling_kv.sampling.state import CacheState, Chunk
from ..rolling_kv.sampling.steering import Shot, Steering
from ..rolling_kv.schedules.schedule import Plan
from ..rolling_kv.wan.fast import product_bytes
from . import borders, inputs, run
from .encoding import Encoder
from .one_prompt import as_schedule
from .patchers import ManagedModule
from .types import EncodedSchedule, ModelHandle

Length = Callable[[SamplingConfig, int, torch.Tensor | None], int]
"""How many chunks are made: of the sampling settings, the latent frames before them, and the source [B, C, F, h, w]."""


class Job:
    """One run of a node, with its inputs checked: what its chunks are made with.

    length: see `Length`. The other parameters are the nodes' inputs.

    start: where the run starts. chunks: how many it makes. frames: latent frames of the whole video then.
    notes: what people are to know of it, as lines.

    Raises ValueError for inputs that do not go together.
    """

    def __init__(
        self, model: ModelHandle, positive, length: Length, seed: int, width: int, height: int, *, guidance=None,
        negative=None, initial_latent=None, state: CacheState | None = None, switch=None, vae=None, batch_size: int = 1,
        source=None, strength: float = 1.0, keep_keys: bool = False,
    ):  # fmt: skip
        self.model, self.state, self._keep_keys = model, state, keep_keys
        self.sampling = sampling = inputs.with_guidance(model.sampling, guidance)
        source = None if source is None else borders.source_latents(source, model.geometry)
        self._given, self.start = borders.start_of(
            initial_latent, state, model.geometry, sampling, height, width, batch_size, source
        )
        self._settings: dict[str, Any] = {"seed": inputs.seeds_of(seed, self.start.batch)}
        if self._given is not None:
            sampling.check_given()
        if source is not None:
            sampling.at_strength(strength)
            source = source.expand(self.start.batch, -1, -1, -1, -1) if source.shape[0] == 1 else source
            self._settings |= {"source": source, "strength": strength}
        self.chunks = length(sampling, self.start.frames, source)
        sampling.check_length(self.chunks, self.start.frames, model.geometry)
        self.frames = self.start.frames + sampling.frames_of(self.chunks, self.start.frames)
        self._switch, self._blend, self._curve = inputs.switch_to_of(switch)
        self._plan, self._after, marker = None, None, model.engine.preset.cut_marker
        self._settle: Callable[[], None] = lambda: None
        if isinstance(positive, EncodedSchedule):
            if self._switch is not None:
                raise ValueError(
                    "The prompt schedule says how each of its prompts begins: write it there in brackets, and leave switch "
                    f"at {inputs.OWN}."
                )
            prompts: EncodedSchedule | str = positive
            self._plan = self._plan_of(positive)
            self._prompt = next(cues(self._plan, positive.embeds, model.cache, marker)).prompt
            ways, texts = switches_of(self._plan, model.cache, marker), positive.texts()
        else:
            self._prompt = borders.embedding(positive, "positive")
            self._after = borders.after_cut(positive, model.engine.preset)
            if self._after is not None and self._switch is None and self._blend == 1:
                self._switch = "cut"
            way = self._switch or model.cache.switch
            sampling.check_cache(model.cache.with_rules(switch=way))
            ways, texts = {way} if state is not None else set(), borders.texts_in(positive)
            prompts = as_schedule(
                positive, (self._prompt, self._after), switch=self._switch, blend=self._blend, curve=self._curve,
                cache=model.cache, continued=state is not None, given=self.start.frames > 0,
            )  # fmt: skip
        self._texts = [*texts, *borders.texts_in(negative)]
        self._switches = ways.union(record.switch for record in state.records) if state is not None else ways
        self._vae = self._needed_vae(vae)
        self._negative = borders.embedding(negative, "negative") if negative is not None and sampling.guided else None
        self.notes = [] if self._plan is None else [str(self._plan.snapped()), *self._plan.notes]
        self.steering = self._steered(prompts)
        size_told = size_note(model.engine, self.start.height, self.start.width)
        self.notes += filter(None, (size_told, long_sink_note(sampling, model.cache, self.frames)))

    def make_room(self, decoder: ManagedModule | None = None, *, standing: bool = False) -> None:
        """Bring to the device what the run needs. decoder: the VAE that decodes its chunks while it goes on.

        standing: the session is open.
        """
        self._decoder = decoder
        # What is said to an open session may switch as the family does.
        joint = "joint" in self._switches or (standing and self.model.cache.switch == "joint")
        size: dict[str, Any] = {"height": self.start.height, "width": self.start.width}
        beside: dict[str, Any] = {"vae": self._vae, "decoder": decoder}
        takes: dict[str, Any] = dict(
            sampling=self.sampling, cache=self.model.cache, batch=self.start.batch, frames=self.frames,
            step_cache=self.model.step_cache, weight_sets=len(self.model.engine.transformers), joint_switch=joint,
            products=product_bytes(self.model.execution, self.model.engine.transformer, self.model.patcher.load_device),
        )  # fmt: skip
        self._telling_shortage = partial(
            telling_shortage, self.model.engine.transformer, **size, device=self.model.patcher.load_device,
            decoding=run.decoding_bytes(**size, batch=self.start.batch, **beside), **takes,
        )  # fmt: skip
        with self._telling_shortage():
            run.make_room(self.model, **size, session=takes, **beside, standing=standing)

    @contextmanager
    def session(self, on_pass: Callable[[int, int], None]) -> Iterator[RollingSession]:
        """An open session that stands where the run starts, once there is room. Raises OutOfMemory where it was too little."""
        model, start = self.model, self.start
        session = RollingSession(
            model.engine, self._prompt, height=start.height, width=start.width, batch=start.batch, negative=self._negative,
            sampling=self.sampling, cache=model.cache, execution=model.execution, step_cache=model.step_cache,
            state=self.state, workspace=model.patcher.workspace, keep_keys=self._keep_keys, switch=self._switch, after=self._after,
            vae=self._vae and self._vae.model, on_pass=on_pass,
        )  # fmt: skip
        if self._blend > 1:
            session.set_prompt(self._prompt, self._negative, after=self._after, blend=self._blend, curve=self._curve)
        with self._telling_shortage(), session:
            if self._given is not None:
                session.prefill(self._given)
            yield session

    def states(self, session: RollingSession, settle: Callable[[], None] = lambda: None) -> Iterator[CacheState]:
        """Make the chunks in an open session: yields its state after each. They are fewer where the run is stopped.

        settle: waits for whoever uses the models of the run in another thread.
        """
        self._settle = settle
        made: Iterator[Chunk]
        if self._plan is None:
            made = session.generate(self.chunks, **self._settings)
        else:
            made = generate_scheduled(
                session, self._plan, self._embeds, negative=self._negative, steering=self.steering, **self._settings
            )
        self.steering.heed = run.check_cancelled
        for _ in self.steering.heeded(made, self.chunks):
            session.state = session.state.named(self._texts)
            yield session.state

    def say(self, text: str, how: str = "") -> str:
        """Have the next chunk begin with a prompt, see `Steering.prompt`; returns what is to be said of its words.

        For other threads: the encoder's tokenizer is all that it uses. Raises ValueError as that does, and for a prompt that
        is too long.
        """
        if self._encoder is None:
            raise ValueError(self.steering.refusal)
        self._encoder.check_length(text)
        return self._encoder.remark([self.steering.prompt(text, how)])

    def _steered(self, prompts: EncodedSchedule | str) -> Steering:
        """What may be said to the run while it goes on. prompts: those of its plan, or why nothing may."""
        self._encoder: Encoder | None = None
        if isinstance(prompts, str):
            return Steering(refusal=prompts)
        self._plan, self._embeds, self._encoder = self._plan or self._plan_of(prompts), prompts.embeds, prompts.encoder
        self._switch, self._blend, self._after = None, 1, None
        model = self.model
        return Steering(self._plan, self._encode, self.sampling, model.cache, model.engine.preset.cut_marker)

    def _encode(self, text: str) -> Shot:
        """The embeddings of a prompt that comes between two chunks, beside the models that the session has on the device."""
        assert self._encoder is not None
        in_use = [self.model.patcher, *(vae for vae in (self._vae, self._decoder) if vae is not None)]
        if not self._encoder.fits_beside(*in_use):
            self._settle()
            in_use = []
        try:
            [shot] = self._encoder.shots([text], *in_use)
        finally:
            self.make_room(self._decoder, standing=True)
        self._texts += [(text, embedding) for embedding in shot if embedding is not None]
        return shot

    def _plan_of(self, prompts: EncodedSchedule) -> Plan:
        """What of a schedule falls on the chunks. Raises ValueError for a switch that cannot be done."""
        model = self.model
        where = {"chunks": self.chunks, "start_frame": self.start.frames, "origin": prompts.origin}
        plan = prompts.schedule.plan(self.sampling, model.geometry, **where)
        check_plan(plan, self.sampling, model.cache, model.engine.preset.cut_marker)
        return plan

    def _needed_vae(self, vae) -> ManagedModule | None:
        """The VAE, if these chunks need one for their context. Raises ValueError where it is missing or that of other latents."""
        run_on = (self.model.cache, self.sampling, self.state or CacheState(), self.chunks)
        check_vae(*run_on, vae)
        if not needs_vae(*run_on):
            return None
        borders.check_vae(vae.model.geometry, self.model.geometry)
        return vae
