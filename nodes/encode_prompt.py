from comfy_api.latest import io

from . import borders, run
from .encoding import encode_shot
from .guard import guarded
from .types import CATEGORY, TextEncoder


class RollingKVEncodePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RollingKVEncodePrompt",
            display_name="Encode Prompt",
            category=CATEGORY,
            description=(
                "Turns a prompt into the conditioning that Sample Video reads. Use one per prompt: one for each segment of "
                "a chained video, and one for the negative prompt if you sample with guidance."
            ),
            search_aliases=["clip text encode", "prompt", "text", "conditioning"],
            inputs=[
                TextEncoder.Input("text_encoder", tooltip="From Load Text Encoder (UMT5)."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What the video shows. These models like long, concrete descriptions; what exceeds 512 tokens "
                    "is cut off.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning", tooltip="The UMT5 embedding, zero-padded to 512 tokens."
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @guarded
    def execute(cls, text_encoder, text) -> io.NodeOutput:
        if remark := text_encoder.model.remark([text]):
            run.say(remark, cls.hidden.unique_id)
        text_encoder.bring_to_device(text_encoder.model.working_nbytes)
        embedding, after = encode_shot(text_encoder, text)
        notes = {borders.NAMED: (text, embedding), borders.ENCODER: text_encoder}
        if after is not None:
            notes[borders.AFTER_CUT] = after
        return io.NodeOutput([[embedding, notes]])
