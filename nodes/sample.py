from dataclasses import replace

import comfy.model_management as mm
import torch
from comfy.utils import ProgressBar
from comfy_api.latest import io
from server import PromptServer

from ..rolling_kv.geometry import TEXT_LENGTH, WAN_21
from ..rolling_kv.sampling.memory import estimate
from ..rolling_kv.sampling.session import RollingSession
from ..rolling_kv.vae import to_model, to_raw
from .managed import check_cancelled, free_memory_of
from .types import CATEGORY, Model, State


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
            search_aliases=["ksampler", "autoregressive sampler", "extend video", "continue video", "image to video"],
            inputs=[
                Model.Input("model", tooltip="From Load Causal Video Model or Attach Rolling Cache."),
                io.Conditioning.Input(
                    "positive", tooltip="From Encode Prompt, or CLIP Text Encode with a Wan CLIP (umt5_xxl)."
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
                    options=["seconds", "chunks"],
                    tooltip="Seconds at 16 frames per second, or chunks (3 latent frames, or 1 for frame-wise models).",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Same seed, same video; also when it is made in several pieces.",
                ),
                io.Int.Input(
                    "width",
                    default=832,
                    min=16,
                    max=8192,
                    step=16,
                    tooltip="Pixels, a multiple of 16. Ignored when a state or an initial latent sets the size.",
                ),
                io.Int.Input(
                    "height",
                    default=480,
                    min=16,
                    max=8192,
                    step=16,
                    tooltip="Pixels, a multiple of 16. Ignored when a state or an initial latent sets the size.",
                ),
                io.Float.Input(
                    "guidance",
                    default=0.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    optional=True,
                    advanced=True,
                    tooltip="Classifier-free guidance. 0: what the model was trained for. 1: off, right for distilled "
                    "few-step models. More needs a negative prompt, twice the time and twice the cache.",
                ),
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
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        length,
        length_unit,
        seed,
        width,
        height,
        guidance=0.0,
        negative=None,
        initial_latent=None,
        state=None,
    ) -> io.NodeOutput:
        if initial_latent is not None and state is not None:
            raise ValueError(
                "Both an initial latent and a state are connected. Connect the initial latent to the first sampler of the "
                "chain only, and the state to those that follow."
            )
        patcher, sampling, geometry = model.patcher, model.sampling, model.patcher.model.geometry
        if guidance:
            sampling = replace(sampling, guidance_scale=guidance)
        given = None if initial_latent is None else _model_latents(initial_latent)
        batch, start = 1, 0
        if state is not None:
            given_shape, start = state.chunks[0].shape, state.frames
        elif given is not None:
            given_shape, start = given.shape, given.shape[2]
        if start:
            batch = given_shape[0]
            height, width = geometry.pixel_size(*given_shape[-2:])
        if length_unit == "seconds":
            chunks = sampling.chunks_for_seconds(length, start, geometry)
        else:
            chunks = max(round(length), 1)
        frames = start + sum(sampling.chunk_sizes(chunks, start))
        needed = estimate(
            patcher.model.transformer,
            height,
            width,
            sampling=sampling,
            cache=model.cache,
            batch=batch,
            frames=frames,
            step_cache=model.step_cache,
        )
        held = needed.cache + needed.prompts
        beside = needed.device - held + patcher.lora_bytes(model.loras)
        patcher.bring_to_device(max(held - patcher.workspace.nbytes, 0) + beside)
        patcher.use_loras(model.loras)

        progress = ProgressBar(1, node_id=cls.hidden.unique_id)

        def on_pass(done: int, total: int) -> None:
            check_cancelled()
            progress.update_absolute(done, total)

        session = RollingSession(
            patcher.model,
            embedding(positive, "positive"),
            height=height,
            width=width,
            batch=batch,
            negative=None if negative is None or not sampling.guided else embedding(negative, "negative"),
            sampling=sampling,
            cache=model.cache,
            state=state,
            workspace=patcher.workspace,
            execution=model.execution,
            step_cache=model.step_cache,
            on_pass=on_pass,
        )
        try:
            with session:
                if given is not None:
                    session.prefill(given)
                for _ in session.generate(chunks, seed=seed):
                    pass
        except BaseException as error:
            free_memory_of(error)
            raise
        progress.update_absolute(progress.total)
        if session.step_report is not None:
            PromptServer.instance.send_progress_text(session.step_report.summary(), cls.hidden.unique_id)
        samples = to_raw(session.state.latents().float()).to(mm.intermediate_device())
        return io.NodeOutput({"samples": samples}, session.state)


def _model_latents(latent: dict) -> torch.Tensor:
    samples = latent["samples"]
    if samples.ndim != 5 or samples.shape[1] != WAN_21.channels:
        raise ValueError(
            f"The initial latent must be a Wan 2.1 video latent [batch, {WAN_21.channels}, frames, height, width], got "
            f"{list(samples.shape)}. Encode the image or video with Encode Video, or VAE Encode with the Wan 2.1 VAE."
        )
    return to_model(samples.float())


def embedding(conditioning: list, name: str) -> torch.Tensor:
    """The prompt embedding [1, 512, D] of a CONDITIONING. name: of the input. Raises ValueError for several prompts."""
    if len(conditioning) != 1:
        raise ValueError(
            f"The {name} conditioning combines {len(conditioning)} prompts; causal video models read exactly one. Write one "
            "prompt, or chain samplers to use several one after the other."
        )
    embedding = conditioning[0][0]
    missing = TEXT_LENGTH - embedding.shape[1]
    return torch.nn.functional.pad(embedding, (0, 0, 0, missing)) if missing > 0 else embedding
