import comfy.model_management as mm
from comfy_api.latest import io

from ..rolling_kv.vae.loading import load_vae
from . import inputs, model_files
from .guard import guarded
from .patchers import ManagedModule
from .types import CATEGORY, VAE


class RollingKVLoadVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RollingKVLoadVAE",
            display_name="Load Streaming VAE",
            category=CATEGORY,
            description=(
                "Loads the VAE of Wan 2.1, or of Wan 2.2 5B, for streaming: Decode Video then writes a video of any length "
                "frame by frame, in constant memory. A tiny decoder decodes alike, many times as fast and approximately. ComfyUI's "
                "own VAE Decode with Load VAE works on the same latents, all at once."
            ),
            search_aliases=["wan vae", "load vae", "video vae"],
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=model_files.choices(model_files.VAE),
                    tooltip="wan_2.1_vae.safetensors from models/vae (for models with the latents of Wan 2.2 5B, such as "
                    "LongLive 2, wan2.2_vae.safetensors), or a diffusers folder from models/diffusers. It is at "
                    f"{model_files.VAE.link}. taew2_1 from models/vae_approx is a tiny decoder: fast, near, for decoding alone.",
                ),
                inputs.dtype(
                    "Precision of the VAE. Auto: the file's own, bfloat16 for float32 files on a GPU; float16 for a tiny decoder there."
                ),
            ],
            outputs=[VAE.Output(display_name="vae", tooltip="For Encode Video, Decode Video and Decode Images.")],
        )

    @classmethod
    def validate_inputs(cls, vae_name=None):
        return model_files.check(model_files.VAE, vae_name)

    @classmethod
    @guarded
    def execute(cls, vae_name, dtype="auto") -> io.NodeOutput:
        device, offload_device = mm.vae_device(), mm.vae_offload_device()
        path = model_files.get(model_files.VAE, vae_name)
        vae = load_vae(path, dtype=dtype, device=offload_device, runs_on=device)
        return io.NodeOutput(ManagedModule(vae, load_device=device, offload_device=offload_device))
