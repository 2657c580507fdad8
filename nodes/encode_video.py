import comfy.model_management as mm
import torch
from comfy.utils import ProgressBar, common_upscale
from comfy_api.latest import io

from ..rolling_kv.geometry import WAN_21
from .managed import check_cancelled
from .types import CATEGORY, VAE


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
                    tooltip="One image, or the frames of a video in order (16 per second). Of a video, the last "
                    "frames beyond 1 + 4n are left out.",
                ),
                io.Int.Input(
                    "width",
                    default=832,
                    min=16,
                    max=8192,
                    step=16,
                    tooltip="Pixels, a multiple of 16. The picture is scaled to fill it, and what sticks out is cut off.",
                ),
                io.Int.Input(
                    "height",
                    default=480,
                    min=16,
                    max=8192,
                    step=16,
                    tooltip="Pixels, a multiple of 16. The picture is scaled to fill it, and what sticks out is cut off.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="For the initial latent of Sample Video.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, vae, images, width, height) -> io.NodeOutput:
        WAN_21.latent_size(height, width)
        vae.bring_to_device(vae.model.encode_bytes(height, width))
        progress = ProgressBar(1 + (images.shape[0] - 1) // WAN_21.temporal, node_id=cls.hidden.unique_id)
        encoder, latents = vae.model.encoder(), []
        frames = images[: images.shape[0] - (images.shape[0] - 1) % WAN_21.temporal]
        pieces = [frames[:1], *frames[1:].split(WAN_21.temporal)] if len(frames) > 1 else [frames]
        for piece in pieces:
            check_cancelled()
            pixels = common_upscale(piece[..., :3].movedim(-1, 1), width, height, "bicubic", "center")
            pixels = pixels.clamp(0, 1).movedim(0, 1).unsqueeze(0) * 2 - 1  # [1, 3, T, H, W]
            latents.append(encoder.encode(pixels).to(mm.intermediate_device()))
            progress.update_absolute(len(latents))
        return io.NodeOutput({"samples": torch.cat(latents, dim=2)})
