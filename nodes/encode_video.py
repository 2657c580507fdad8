import comfy.model_management as mm
import torch
from comfy.utils import common_upscale
from comfy_api.latest import io

from . import inputs, run
from .guard import guarded
from .types import CATEGORY, VAE

SIZE = "The picture is scaled to fill it, and what sticks out is cut off."


class RollingKVEncodeVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RollingKVEncodeVideo",
            display_name="Encode Video",
            category=CATEGORY,
            description=(
                "Encodes an image or the frames of a video, to start a video from: connect the result to the initial latent "
                "of Sample Video. Works in constant memory, whatever the length."
            ),
            search_aliases=["vae encode", "image to video", "extend video", "start image"],
            inputs=[
                VAE.Input("vae", tooltip="From Load Streaming VAE."),
                io.Image.Input(
                    "images",
                    tooltip="One image, or the frames of a video in order, as many a second as the model makes (16; Wan 2.2 "
                    "5B: 24). Of a video, the last frames beyond 1 + 4n are left out.",
                ),
                inputs.side("width", SIZE),
                inputs.side("height", SIZE),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="For the initial latent of Sample Video.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @guarded
    def execute(cls, vae, images, width, height) -> io.NodeOutput:
        geometry = vae.model.geometry
        geometry.latent_size(height, width)
        count = geometry.whole_frames(images.shape[0])
        vae.bring_to_device(vae.model.encode_bytes(height, width))
        encoder, latents = vae.model.encoder(), []
        pieces = images[:count].split([1] + [geometry.temporal] * (count // geometry.temporal))
        with run.progress(cls.hidden.unique_id) as on_piece:
            for piece in pieces:
                on_piece(len(latents), len(pieces))
                pixels = _fill(piece[..., :3], width, height)
                latents.append(encoder.encode(pixels).to(mm.intermediate_device()))
        return io.NodeOutput({"samples": torch.cat(latents, dim=2)})


def _fill(images: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Images [T, H, W, 3] in [0, 1], scaled and cropped to a size: [1, 3, T, height, width] in [-1, 1]."""
    rows, columns = images.shape[1:3]
    if rows * width <= height:  # less than a column would be left of it
        images = images.narrow(2, columns // 2, 1)
    elif columns * height <= width:
        images = images.narrow(1, rows // 2, 1)
    pixels = common_upscale(images.movedim(-1, 1), width, height, "bicubic", "center")
    return pixels.clamp(0, 1).movedim(0, 1).unsqueeze(0) * 2 - 1
