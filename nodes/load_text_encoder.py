import comfy.model_management as mm
from comfy_api.latest import io

from ..rolling_kv.text import load_text_encoder
from . import inputs, model_files
from .guard import guarded
from .patchers import ManagedModule, obtainable
from .types import CATEGORY, TextEncoder


class RollingKVLoadTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RollingKVLoadTextEncoder",
            display_name="Load Text Encoder (UMT5)",
            category=CATEGORY,
            description=(
                "Loads the UMT5 text encoder that Wan models read prompts with. ComfyUI's own Load CLIP (type wan) with "
                "CLIP Text Encode gives the same conditioning; use this one for diffusers folders and the bundled model."
            ),
            search_aliases=["umt5", "t5", "load clip", "wan text encoder"],
            inputs=[
                io.Combo.Input(
                    "text_encoder_name",
                    options=model_files.choices(model_files.TEXT_ENCODER),
                    tooltip="A UMT5 file from models/text_encoders, or a diffusers folder from models/diffusers. "
                    f"One that works: {model_files.TEXT_ENCODER.link}.",
                ),
                inputs.dtype(
                    "Precision in which the weights are kept in memory. Auto: the file's own, float8 included. Where they do "
                    "not fit the GPU, the text encoder runs on the CPU."
                ),
            ],
            outputs=[TextEncoder.Output(display_name="text_encoder", tooltip="For Encode Prompt.")],
        )

    @classmethod
    def validate_inputs(cls, text_encoder_name=None):
        return model_files.check(model_files.TEXT_ENCODER, text_encoder_name)

    @classmethod
    @guarded
    def execute(cls, text_encoder_name, dtype="auto") -> io.NodeOutput:
        device, offload_device = mm.text_encoder_device(), mm.text_encoder_offload_device()
        path = model_files.get(model_files.TEXT_ENCODER, text_encoder_name)
        encoder = load_text_encoder(path, dtype=dtype, device=offload_device, runs_on=device)
        device = encoder.device_in(device, obtainable(device))
        if device.type == "cpu":
            offload_device = device
        managed = ManagedModule(encoder, load_device=device, offload_device=offload_device, size=encoder.nbytes)
        return io.NodeOutput(managed)
