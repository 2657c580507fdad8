from functools import partial

from comfy_api.latest import io

from ..rolling_kv.config import SamplingConfig
from ..rolling_kv.geometry import Geometry
from . import borders, inputs, run
from .guard import guarded
from .job import Job
from .live.previewing import preview_of
from .live.watching import are_watched, fingerprint, watched
from .types import CATEGORY, VAE, EncodedSchedule, Model, State

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
                inputs.positive(),
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
                inputs.seed(),
                inputs.side("width", SIZE),
                inputs.side("height", SIZE),
                inputs.guidance(advanced=True),
                inputs.negative(),
                inputs.initial_latent(),
                State.Input(
                    "state",
                    optional=True,
                    tooltip="Continue this video. From the cache state output of another sampler.",
                ),
                inputs.switch_to(),
                VAE.Input(
                    "vae",
                    optional=True,
                    tooltip="From Load Streaming VAE. Shows the live preview as the video will be; without one it is a quick "
                    "approximation. Needed by models whose context is computed anew before every chunk (Krea Realtime), which "
                    "see a frame that was decoded and encoded again.",
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
                io.Boolean.Input(
                    "keep_keys",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="The state carries the keys and values of its window in CPU memory. Whoever continues it then need "
                    "not replay the video: for states with several continuations. A saved file has none.",
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
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt, io.Hidden.extra_pnginfo],
            accept_all_inputs=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **values):
        return fingerprint(cls.hidden)

    @classmethod
    @guarded
    def execute(
        cls, model, positive, length, length_unit, seed, width, height, guidance=None, negative=None,
        initial_latent=None, state=None, switch=None, vae=None, batch_size=1, source=None, strength=0.5,
        keep_keys=False,
    ) -> io.NodeOutput:  # fmt: skip
        job = Job(
            model, positive, partial(_chunks, length, length_unit, positive, model.geometry), seed, width, height,
            guidance=guidance, negative=negative, initial_latent=initial_latent, state=state, switch=switch, vae=vae,
            batch_size=batch_size, source=source, strength=strength, keep_keys=keep_keys,
        )  # fmt: skip
        fits = vae is not None and vae.model.geometry.channels == model.geometry.channels
        decoder = vae if fits and are_watched() else None
        job.make_room(decoder)
        if job.notes:
            run.say("\n".join(job.notes), cls.hidden.unique_id)
        live = watched(cls.hidden, job, preview=preview_of(model, decoder))
        with run.progress(cls.hidden.unique_id, live.newest) as on_pass, live, job.session(on_pass) as session:
            for _ in job.states(session, live.settle):
                live.show(session)
        if session.step_report is not None:
            run.say("\n".join([*job.notes, session.step_report.summary()]), cls.hidden.unique_id)
        return io.NodeOutput(borders.latent_of(session.state), session.state)


def _chunks(
    length: float, unit: str, positive, geometry: Geometry, sampling: SamplingConfig, start: int, source
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
        chunks = positive.schedule.chunks(sampling, geometry, start_frame=start, origin=positive.origin, last=length)
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
