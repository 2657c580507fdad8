from comfy_api.latest import io

from ..rolling_kv.messages import listed
from . import model_files, run
from .guard import guarded
from .types import CATEGORY, Model


class RollingKVLoadLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RollingKVLoadLoRA",
            display_name="Load LoRA (Causal Video)",
            category=CATEGORY,
            description=(
                "Changes a causal video model by a LoRA: LongLive's own, or one for style, motion or a person that was "
                "made for Wan 2.1 of the same size. Chain several to add them up. Other branches of the workflow keep "
                "the model as it was."
            ),
            search_aliases=["lora", "longlive lora", "adapter", "style lora", "wan lora"],
            inputs=[
                Model.Input("model", tooltip="From Load Causal Video Model, or another Load LoRA."),
                io.Combo.Input(
                    "lora_name",
                    options=model_files.choices(model_files.LORA),
                    tooltip="A file from models/loras: .safetensors or .pt, in original Wan, diffusers, kohya or PEFT names.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How much of it: 1 is what it was trained for, 0 is none, below 0 is the opposite.",
                ),
            ],
            outputs=[Model.Output(display_name="model", tooltip="The model with this LoRA.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, lora_name=None):
        return model_files.check(model_files.LORA, lora_name)

    @classmethod
    @guarded
    def execute(cls, model, lora_name, strength) -> io.NodeOutput:
        path = model_files.get(model_files.LORA, lora_name)
        lora = model.patcher.open_lora(path)  # one that does not fit is refused here, not in the sampler
        if lora.left_out:
            run.say(f"Left out: {listed(lora.left_out, length=200)}.", cls.hidden.unique_id)
        return io.NodeOutput(model._replace(loras=(*model.loras, (path, strength))))
