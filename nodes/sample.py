from itertools import chain
from typing import Any

from comfy_api.latest import io

from ..rolling_kv.config import SamplingConfig
from ..rolling_kv.geometry import Geometry
from ..rolling_kv.sampling.checks import long_sink_note
from ..rolling_kv.sampling.recomputed import check_vae, needs_vae
from ..rolling_kv.sampling.scheduled import check_plan, cues, generate_scheduled, switches_of
from ..rolling_kv.sampling.session import RollingSession
from ..rolling_kv.sampling.state import CacheState
from ..rolling_kv.schedules.schedule import Plan
from . import borders, inputs, run
from .guard import guarded
from .types import CATEGORY, VAE, EncodedSchedule, Model, ModelHandle, Schedule, State

SIZE = "Ignored when a state, an initial latent or a source sets the size."


class RollingKVSample(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RollingKVSample",
            display_name="Sample Video",
            category=CATEGORY,
            description=(
                "Makes a video chunk by chunk. Chain several to change the prompt on the way: connect the cache state of "
                "one to the next, which continues exactly where it stopped. Two samplers may continue from one state."
            ),
            search_aliases=[
                "ksampler",
                "autoregressive sampler",
                "extend video",
                "continue video",
                "image to video",
                "video to video",
            ],  # fmt: skip
            inputs=[
                Model.Input("model", tooltip="From Load Causal Video Model or Attach Rolling Cache."),
                io.MultiType.Input(
                    "positive",
                    [io.Conditioning, Schedule],
                    tooltip="From Encode Prompt, or CLIP Text Encode with a Wan CLIP (umt5_xxl). For several prompts from "
                    "Prompt Schedule.",
                ),
                io.Float.Input(
                    "length",
                    default=5.0,
                    min=0.05,
                    max=86400.0,
                    step=0.05,
                    round=False,
                    tooltip="How much video to make here, beyond what is already there. Rounded up to whole chunks.",
                ),
                io.Combo.Input(
                    "length_unit",
                    options=["seconds", "chunks", "schedule", "source"],
                    tooltip="Seconds at the model's rate (16 frames per second; Wan 2.2 5B: 24), or chunks (3 latent frames, "
                    "1 for frame-wise models, 8 for LongLive 2). Schedule: to the end of the prompt schedule; where it has "
                    "none, length is the seconds of its last prompt. Source: as many whole chunks as the source has.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Same seed, same video; also when it is made in several pieces.",
                ),
                inputs.side("width", SIZE),
                inputs.side("height", SIZE),
                inputs.guidance(advanced=True),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="What to avoid. Only read when there is guidance."
                ),
                io.Latent.Input(
                    "initial_latent",
                    optional=True,
                    tooltip="Frames to start from: an image (image to video) or a video (extension), from Encode Video or "
                    "VAE Encode.",
                ),
                State.Input(
                    "state",
                    optional=True,
                    tooltip="Continue this video. From the cache state output of another sampler.",
                ),
                inputs.switch_to(),
                VAE.Input(
                    "vae",
                    optional=True,
                    tooltip="From Load Streaming VAE. Only for models whose context is computed anew before every chunk (Krea "
                    "Realtime), which see a frame that was decoded and encoded again; others do not read it.",
                ),
                inputs.batch_size(),
                io.Latent.Input(
                    "source",
                    optional=True,
                    tooltip="Video to video: each chunk begins as this with noise, instead of as noise alone. Its first frame "
                    "is that of the first chunk made here. From Encode Video or VAE Encode.",
                ),
                io.Float.Input(
                    "strength",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="How far from the source it may go: 1 leaves nothing of it, little only touches it up. Only read "
                    "with a source.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="latent",
                    tooltip="The whole video so far, for Decode Video, Decode Images or VAE Decode.",
                ),
                State.Output(
                    display_name="state", tooltip="Where this video stands, for another Sample Video to go on."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            accept_all_inputs=True,
        )

    @classmethod
    @guarded
    def execute(
        cls, model, positive, length, length_unit, seed, width, height, guidance=None, negative=None,
        initial_latent=None, state=None, switch=None, vae=None, batch_size=1, source=None, strength=0.5,
    ) -> io.NodeOutput:  # fmt: skip
        sampling = inputs.with_guidance(model.sampling, guidance)
        source = None if source is None else borders.source_latents(source, model.geometry)
        given, start = borders.start_of(
            initial_latent, state, model.geometry, sampling, height, width, batch_size, source
        )
        if given is not None:
            sampling.check_given()
        if source is not None:
            sampling.at_strength(strength)
            source = source.expand(start.batch, -1, -1, -1, -1) if source.shape[0] == 1 else source
        chunks = _chunks(length, length_unit, positive, source, sampling, start.frames, model.geometry)
        sampling.check_length(chunks, start.frames, model.geometry)
        frames = start.frames + sampling.frames_of(chunks, start.frames)
        size: dict[str, Any] = {"height": start.height, "width": start.width, "batch": start.batch}
        switch, blend = inputs.switch_to_of(switch)
        plan, after, marker = None, None, model.engine.preset.cut_marker
        if isinstance(positive, EncodedSchedule):
            plan = _plan_of(positive, switch, model, sampling, chunks, start.frames)
            ways = switches_of(plan, model.cache, marker)
            prompt = next(cues(plan, positive.embeds, model.cache, marker)).prompt
        else:
            prompt = borders.embedding(positive, "positive")
            after = borders.after_cut(positive, model.engine.preset)
            if after is not None and switch is None and blend == 1:
                switch = "cut"
            way = switch or model.cache.switch
            sampling.check_cache(model.cache.with_rules(switch=way))
            ways = {way} if state is not None else set()
        switches = ways.union(record.switch for record in state.records) if state is not None else ways
        vae = _needed_vae(model, sampling, state or CacheState(), chunks, vae)
        run.make_room(model, sampling, frames=frames, joint_switch="joint" in switches, vae=vae, **size)
        notes = [] if plan is None else [str(plan.snapped()), *plan.notes]
        if note := long_sink_note(sampling, model.cache, frames):
            notes.append(note)
        if notes:
            run.say("\n".join(notes), cls.hidden.unique_id)
        with run.progress(cls.hidden.unique_id) as on_pass:
            avoid = borders.embedding(negative, "negative") if negative is not None and sampling.guided else None
            session = RollingSession(
                model.engine, prompt, negative=avoid, sampling=sampling, cache=model.cache, execution=model.execution,
                step_cache=model.step_cache, state=state, workspace=model.patcher.workspace, switch=switch,
                after=after, vae=vae and vae.model, on_pass=on_pass, **size,
            )  # fmt: skip
            if blend > 1:
                session.set_prompt(prompt, avoid, after=after, blend=blend)
            with session:
                if given is not None:
                    session.prefill(given)
                seeds = inputs.seeds_of(seed, start.batch)
                again: dict[str, Any] = {} if source is None else {"source": source, "strength": strength}
                if plan is None:
                    made = session.generate(chunks, seed=seeds, **again)
                else:
                    made = generate_scheduled(session, plan, positive.embeds, negative=avoid, seed=seeds, **again)
                for _ in made:
                    pass
        if session.step_report is not None:
            run.say("\n".join([*notes, session.step_report.summary()]), cls.hidden.unique_id)
        if plan is None:
            known = borders.texts_in(positive, negative)
        else:
            known = chain(positive.texts(), borders.texts_in(negative))
        state = session.state.named(known)
        return io.NodeOutput(borders.latent_of(state), state)


def _needed_vae(model: ModelHandle, sampling: SamplingConfig, state: CacheState, chunks: int, vae):
    """The VAE, if these chunks need one. Raises ValueError where it is missing or that of other latents."""
    run_on = (model.cache, sampling, state, chunks)
    check_vae(*run_on, vae)
    if not needs_vae(*run_on):
        return None
    borders.check_vae(vae.model.geometry, model.geometry)
    return vae


def _plan_of(
    prompts: EncodedSchedule,
    switch: str | None,
    model: ModelHandle,
    sampling: SamplingConfig,
    chunks: int,
    start: int,
) -> Plan:
    """What of a schedule falls on these chunks. Raises ValueError for a switch beside it, or one that cannot be done."""
    if switch is not None:
        raise ValueError(
            "The prompt schedule says how each of its prompts begins: write it there in brackets, and leave switch at "
            f"{inputs.OWN}."
        )
    schedule, _, origin = prompts
    plan = schedule.plan(sampling, model.geometry, chunks=chunks, start_frame=start, origin=origin)
    check_plan(plan, sampling, model.cache, model.engine.preset.cut_marker)
    return plan


def _chunks(
    length: float, unit: str, positive, source, sampling: SamplingConfig, start: int, geometry: Geometry
) -> int:
    """Chunks that make a length of video after `start` latent frames. Raises ValueError for one that follows from what is
    not there, or that is longer than the source [B, C, F, h, w] of all frames.
    """
    if unit == "schedule":
        if not isinstance(positive, EncodedSchedule):
            raise ValueError(
                "The length is to be that of the prompt schedule, and there is none: connect Prompt Schedule to positive, or "
                "set length_unit to seconds."
            )
        schedule, _, origin = positive
        chunks = schedule.chunks(sampling, geometry, start_frame=start, origin=origin, last=length)
    elif unit == "source":
        if source is None:
            raise ValueError(
                "The length is to be that of the source, and there is none: connect Encode Video to source, or set "
                "length_unit to seconds."
            )
        chunks = max(sampling.chunks_within(source.shape[2], start), 1)
    elif unit == "seconds":
        chunks = sampling.chunks_for_seconds(length, start, geometry)
    else:
        chunks = max(round(length), 1)
    if source is not None and (frames := sampling.frames_of(chunks, start)) > source.shape[2]:
        raise ValueError(
            f"The source has {source.shape[2]} latent frames ({geometry.seconds(source.shape[2]):g} s), fewer than the "
            f"{frames} that are to be made: set length_unit to source, or encode a longer video."
        )
    return chunks
