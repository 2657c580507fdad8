import math
import uuid
from pathlib import Path

import comfy.model_management as mm
import folder_paths
import torch
from comfy_api.latest import InputImpl, io

from ..rolling_kv.devices import check_memory
from ..rolling_kv.vae.shortage import telling_decoding_shortage
from ..rolling_kv.video import VideoWriter
from . import borders, inputs, run
from .guard import guarded
from .types import CATEGORY, VAE

TILED = "decode with ComfyUI's VAE Decode (Tiled), which takes the same latents, and has seams"
BYTES_PER_PIXEL = 3 * torch.float32.itemsize


class RollingKVDecodeVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RollingKVDecodeVideo",
            display_name="Decode Video",
            category=CATEGORY,
            description=(
                "Decodes latents straight into a video file, frame by frame: memory stays constant, whatever the length. "
                "Connect it to Save Video. For frames to edit, use Decode Images."
            ),
            search_aliases=["vae decode", "latent to video", "streaming decode"],
            inputs=[
                VAE.Input("vae", tooltip="From Load Streaming VAE."),
                io.Latent.Input("latent", tooltip="From Sample Video."),
                inputs.fps(),
                inputs.enlarge(),
                inputs.encoder(),
            ],
            outputs=[
                io.Video.Output(
                    display_name="video",
                    is_output_list=True,
                    tooltip="An mp4, for Save Video; of a batch, one for each of its videos.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @guarded
    def execute(cls, vae, latent, fps=None, enlarge=1, encoder="x264") -> io.NodeOutput:
        geometry = vae.model.geometry
        samples = borders.latents_to_decode(latent, geometry)
        height, width = geometry.pixel_size(*samples.shape[-2:])
        videos = []
        for video in samples.split(1):
            path = Path(folder_paths.get_temp_directory()) / f"rolling_kv_{uuid.uuid4().hex}.mp4"
            with VideoWriter(
                path, width, height, fps=inputs.fps_of(geometry, fps), scale=enlarge, encoder=encoder
            ) as writer:
                if writer.note:
                    run.say(writer.note, cls.hidden.unique_id)
                for frames in _decode(vae, video, cls.hidden.unique_id):
                    writer.write(frames)
            videos.append(DecodedVideo(path))
        return io.NodeOutput(videos)


class RollingKVDecodeImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RollingKVDecodeImages",
            display_name="Decode Images",
            category=CATEGORY,
            description=(
                "Decodes latents into images, to edit, upscale or interpolate. All frames are held in memory (12 bytes per "
                "pixel); to only save the video, use Decode Video."
            ),
            search_aliases=["vae decode", "latent to image", "frames"],
            inputs=[
                VAE.Input("vae", tooltip="From Load Streaming VAE."),
                io.Latent.Input("latent", tooltip="From Sample Video."),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="The frames in order.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @guarded
    def execute(cls, vae, latent) -> io.NodeOutput:
        samples, geometry = borders.latents_to_decode(latent, vae.model.geometry), vae.model.geometry
        count, size = geometry.pixel_frames(samples.shape[2]), geometry.pixel_size(*samples.shape[-2:])
        nbytes = samples.shape[0] * count * math.prod(size) * BYTES_PER_PIXEL
        device = mm.intermediate_device()
        if device.type == "cpu":
            check_memory(nbytes, "holding all frames", "use Decode Video, which holds none, or decode a part")
        images = torch.empty(samples.shape[0] * count, *size, 3, device=device)
        done = 0
        for video in samples.split(1):
            for frames in _decode(vae, video, cls.hidden.unique_id, nbytes if device == vae.load_device else 0):
                pixels = (frames[0] * 0.5 + 0.5).permute(1, 2, 3, 0)  # [T, H, W, 3]
                images[done : done + len(pixels)] = pixels
                done += len(pixels)
        return io.NodeOutput(images)


class DecodedVideo(InputImpl.VideoFromFile):
    """A video in ComfyUI's temporary folder, which may be emptied while a node's kept output still points into it."""

    def __init__(self, path: Path):
        super().__init__(str(path))
        self._path = path

    def __getattribute__(self, name: str):
        if name in vars(InputImpl.VideoFromFile) and name[0] != "_" and not self._path.is_file():
            raise FileNotFoundError(
                "The video that Decode Video has made is gone from ComfyUI's temporary folder. To have it made again, "
                "free the node cache (in the menu, or restart ComfyUI), or change any setting of Decode Video."
            )
        return super().__getattribute__(name)


def _decode(vae, samples: torch.Tensor, node_id: str, kept: int = 0):
    """Yields float32 frames [1, 3, 1 or 4, H, W] in [-1, 1], one latent frame at a time.

    kept: bytes on the VAE's device that the caller keeps them in.
    """
    count, size = samples.shape[2], vae.model.geometry.pixel_size(*samples.shape[3:])
    vae.bring_to_device(kept + vae.model.decode_bytes(*size))
    with run.progress(node_id) as on_frame, telling_decoding_shortage(vae.model, *size, TILED):
        for done, frames in enumerate(vae.model.decoder().decode_frames(samples)):
            on_frame(done, count)
            yield frames
