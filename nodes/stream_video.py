import json
import logging

from comfy.cli_args import args
from comfy_api.latest import InputImpl, io, ui

from ..rolling_kv.streaming import ENDLESS_SECONDS, VideoStream
from . import borders, inputs, run, state_files
from .guard import guarded
from .job import Job
from .live.watching import fingerprint, watched
from .types import CATEGORY, VAE, Model, State

logger = logging.getLogger(__name__)

WHOLE, NEW = "the whole video", "only what is new"
PREFIX = "video/rolling_kv_stream"
SIZE = "Ignored when a state or an initial latent sets the size."


class RollingKVStreamVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RollingKVStreamVideo",
            display_name="Stream Video",
            category=CATEGORY,
            description=(
                "Makes a video of any length straight into a file: each chunk is decoded and written while the next one is "
                "made, and memory does not grow. Cancel whenever you like: the video so far stays, and a state from which "
                "Load State goes on."
            ),
            search_aliases=["long video", "endless video", "stream to disk", "ksampler", "save video", "text to video"],
            inputs=[
                Model.Input("model", tooltip="From Load Causal Video Model or Attach Rolling Cache."),
                inputs.positive(),
                VAE.Input("vae", tooltip="From Load Streaming VAE: decodes the chunks."),
                io.Float.Input(
                    "seconds",
                    default=10.0,
                    min=0.0,
                    max=86400.0,
                    step=0.05,
                    round=False,
                    tooltip="How much video to make here, beyond what is already there. Rounded up to whole chunks. 0: until "
                    "you cancel.",
                ),
                inputs.seed(),
                inputs.side("width", SIZE),
                inputs.side("height", SIZE),
                io.String.Input(
                    "filename_prefix",
                    default=PREFIX,
                    tooltip="How the file's name begins, with folders below ComfyUI's output folder. A number follows it.",
                ),
                inputs.guidance(advanced=True),
                inputs.negative(),
                inputs.initial_latent(),
                State.Input(
                    "state",
                    optional=True,
                    tooltip="Continue this video. From Load State, Sample Video or another Stream Video.",
                ),
                inputs.switch_to(),
                inputs.fps(),
                inputs.enlarge(),
                io.Combo.Input(
                    "written",
                    options=[WHOLE, NEW],
                    optional=True,
                    advanced=True,
                    tooltip="What of a continued video the file holds: all of it, whose old part is decoded again, or only "
                    "what is made here.",
                ),
                inputs.encoder(),
            ],
            outputs=[
                io.Video.Output(display_name="video", tooltip="An mp4, which is saved in the output folder already."),
                State.Output(
                    display_name="state",
                    tooltip="Where this video stands, for another Stream Video, Sample Video or Save State.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
            accept_all_inputs=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **values):
        return fingerprint(cls.hidden)

    @classmethod
    @guarded
    def execute(
        cls, model, positive, vae, seconds, seed, width, height, filename_prefix, guidance=None, negative=None,
        initial_latent=None, state=None, switch=None, fps=None, enlarge=1, written="the whole video", encoder="x264",
    ) -> io.NodeOutput:  # fmt: skip
        geometry, node_id = model.geometry, cls.hidden.unique_id
        borders.check_vae(vae.model.geometry, geometry)
        if not seconds and model.cache.unlimited:
            raise ValueError(
                "A video without an end needs a window: with all frames in it, memory grows with the video. Choose a window "
                "in Attach Rolling Cache, or set seconds."
            )
        job = Job(
            model, positive, lambda sampling, start, _: sampling.chunks_for_seconds(seconds or ENDLESS_SECONDS, start, geometry),
            seed, width, height, guidance=guidance, negative=negative, initial_latent=initial_latent, state=state,
            switch=switch, vae=vae,
        )  # fmt: skip
        if job.start.batch != 1:
            raise ValueError(f"A video file holds one video, and these are {job.start.batch}: take one of them.")
        size = job.start.height, job.start.width
        path, name = state_files.place_for(filename_prefix, *size, ".mp4")
        job.make_room(vae)
        rate = inputs.fps_of(geometry, fps)
        live = watched(cls.hidden, job, fps=rate, endless=not seconds)
        stream = VideoStream(
            path, vae.model, *size, before=state, new_only=state is not None and written == NEW, on_frames=live.see,
            fps=rate, scale=enlarge, encoder=encoder, metadata=_metadata(cls.hidden),
        )  # fmt: skip
        try:
            with run.progress(node_id, live.newest) as on_pass, live, stream, job.session(on_pass) as session:
                for made in job.states(session, stream.settle):
                    session.state = stream.add(made)
                    live.show(session)
                    run.say(
                        "\n".join(filter(None, [*job.notes, stream.note, f"{made.seconds:g} s in {name}"])), node_id
                    )
        except BaseException:
            if stream.kept:
                run.say(stream.kept, node_id)
                logger.warning("%s", stream.kept)
            raise
        shown = ui.PreviewVideo([state_files.saved(name)])
        return io.NodeOutput(InputImpl.VideoFromFile(str(stream.video)), stream.state, ui=shown)


def _metadata(hidden) -> dict[str, str]:
    """The workflow and the prompt as tags of the file, as Save Video has them."""
    if args.disable_metadata:
        return {}
    values = {**(hidden.extra_pnginfo or {}), **({"prompt": hidden.prompt} if hidden.prompt else {})}
    return {name: json.dumps(value) for name, value in values.items()}
