from fractions import Fraction

import comfy.model_management as mm
import torch
from comfy_api.latest import Input, InputImpl, io, ui

from ..rolling_kv.fitting import FITS, Clip, Fitting, Pictures, Source, read_colour
from ..rolling_kv.footage import Footage
from . import inputs, run
from .guard import guarded
from .types import CATEGORY, VAE

SIZE = "How the picture comes to that size is up to fit."


class RollingKVEncodeVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RollingKVEncodeVideo",
            display_name="Encode Video",
            category=CATEGORY,
            description=(
                "Encodes an image or a video of any size and rate: to start from, connect the result to the initial latent "
                "of Sample Video; to make the video anew, to its source. Works in constant memory, whatever the length."
            ),
            search_aliases=["vae encode", "image to video", "extend video", "start image", "video to video"],
            inputs=[
                VAE.Input("vae", tooltip="From Load Streaming VAE."),
                io.MultiType.Input(
                    "images",
                    [io.Image, io.Video],
                    tooltip="A video from Load Video, of any length and rate; or one image, or the frames of a video in "
                    "order. The last frames beyond 1 + 4n are left out.",
                ),
                inputs.side("width", SIZE),
                inputs.side("height", SIZE),
                io.Combo.Input(
                    "fit",
                    options=list(FITS),
                    optional=True,
                    tooltip="Crop: scaled to fill the size, and what sticks out is cut off on both sides. Pad: all of it is "
                    "shown, between bars. Stretch: distorted.",
                ),
                inputs.take(),
                inputs.source_fps(),
                io.String.Input(
                    "background",
                    default="#000000",
                    optional=True,
                    advanced=True,
                    tooltip="Colour of what is transparent, and of the bars of pad: #000000 is black, #ffffff white.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="For the initial latent or the source of Sample Video.")
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @guarded
    def execute(
        cls, vae, images, width, height, fit="crop", take=None, source_fps=None, background="#000000"
    ) -> io.NodeOutput:
        geometry = vae.model.geometry
        geometry.latent_size(height, width)
        fitting = Fitting(height, width, fit, read_colour(background))
        source = _source(images, inputs.source_fps_of(geometry, source_fps))
        clip = Clip.of(source, fitting, geometry, *inputs.take_of(take))
        notes = [str(clip), source.note] if isinstance(source, Footage) and source.note else [str(clip)]
        run.say("\n".join(notes), cls.hidden.unique_id)
        vae.bring_to_device(vae.model.encode_bytes(height, width))
        latents, shown = [], []
        with run.progress(cls.hidden.unique_id) as on_latent:
            for latent in vae.model.encode_frames(_watched(clip, shown)):
                on_latent(len(latents), geometry.latent_frames(clip.count))
                latents.append(latent.to(mm.intermediate_device()))
        return io.NodeOutput({"samples": torch.cat(latents, dim=2)}, ui=ui.PreviewImage(torch.cat(shown), cls=cls))


def _source(images, fps: Fraction) -> Source:
    """What an input gives, as pictures at times. fps: of images."""
    if isinstance(images, torch.Tensor):
        return Pictures(images, fps)
    # Before ComfyUI had `get_active_trim_window`, a stream would be the whole file of a video that has been trimmed.
    streams = not isinstance(images, InputImpl.VideoFromComponents) and hasattr(images, "get_active_trim_window")
    if streams and type(images).get_stream_source is not Input.Video.get_stream_source:
        return Footage.open(images.get_stream_source(), *images.get_active_trim_window())
    components = images.get_components()
    alpha = getattr(components, "alpha", None)
    pictures = components.images if alpha is None else torch.cat([components.images[..., :3], alpha], dim=-1)
    return Pictures(pictures, Fraction(components.frame_rate))


def _watched(clip: Clip, shown: list):
    """The frames of a clip. shown: gets the first and the last of them, as images [1, H, W, 3]."""
    for number, frame in enumerate(clip.frames(), start=1):
        if number in (1, clip.count):
            shown.append((frame[0] * 0.5 + 0.5).permute(1, 2, 3, 0))
        yield frame
