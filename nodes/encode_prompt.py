from comfy_api.latest import io

from . import borders, inputs, run
from .encoding import encoder_of
from .guard import guarded
from .types import CATEGORY


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
                inputs.text_encoder(),
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
        encoder = encoder_of(text_encoder)
        if remark := encoder.remark([text]):
            run.say(remark, cls.hidden.unique_id)
        [(embedding, after)] = encoder.shots([text])
        notes = {borders.NAMED: (text, embedding), borders.ENCODER: encoder}
        if after is not None:
            notes[borders.AFTER_CUT] = after
        return io.NodeOutput([[embedding, notes]])
