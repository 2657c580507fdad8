from comfy_api.latest import io, ui

from ..rolling_kv.schedules.reading import read_schedule
from ..rolling_kv.schedules.timeline import LAST_SECONDS
from . import inputs, run
from .encoding import encoder_of
from .guard import guarded
from .types import CATEGORY, EncodedSchedule, Model, Schedule

EXAMPLE = "0: a red circle moving right\n2.5: a blue circle moving right [recache]\n6: a green square moving left [cut]"


class RollingKVPromptSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RollingKVPromptSchedule",
            display_name="Prompt Schedule",
            category=CATEGORY,
            description=(
                "Several prompts and when they begin, for Sample Video in the place of one. One a line: 2.5: a blue circle "
                "[cut]. Also reads the schedules of Infinity-RoPE, FizzNodes, LongLive and Daydream Scope. Shows what it "
                "has understood."
            ),
            search_aliases=["prompt travel", "batch prompt schedule", "keyframes", "timeline", "storyboard", "prompts"],
            inputs=[
                inputs.text_encoder(),
                io.String.Input(
                    "text",
                    multiline=True,
                    default=EXAMPLE,
                    tooltip="One prompt a line, after the second that it begins at. In brackets behind it how it begins: [hold], "
                    "[recache], [flush], [cut], [blend 3] or [slerp 3] over so many chunks; without, as the model's family does "
                    "it. 10: [end] is the end.",
                ),
                io.Combo.Input(
                    "count_from",
                    options=["video", "sampler"],
                    tooltip="Where the times count from: the beginning of the video, so that one schedule can go to all "
                    "samplers of a chain, or the beginning of what each sampler makes.",
                ),
                Model.Input(
                    "model",
                    optional=True,
                    tooltip="Only for what is shown here: with the times of the chunks that this model makes. Sample Video "
                    "shows them in any case.",
                ),
            ],
            outputs=[
                Schedule.Output(
                    display_name="schedule",
                    tooltip="For the positive input of Sample Video. Each prompt is encoded once.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @guarded
    def execute(cls, text_encoder, text, count_from, model=None) -> io.NodeOutput:
        schedule = read_schedule(text)
        shown, notes = str(schedule), schedule.notes
        if model is not None and not schedule.begins_later:
            settings = model.sampling, model.geometry
            plan = schedule.plan(*settings, chunks=schedule.chunks(*settings, last=LAST_SECONDS), origin="run")
            shown, notes = str(plan.snapped()), plan.notes
        encoder = encoder_of(text_encoder)
        if remark := encoder.remark(schedule.texts):
            notes = [*notes, remark]
        told = "\n".join([shown, *notes])
        run.say(told, cls.hidden.unique_id)
        embeds = dict(zip(schedule.texts, encoder.shots(schedule.texts)))
        origin = {"video": "video", "sampler": "run"}[count_from]
        return io.NodeOutput(EncodedSchedule(schedule, embeds, origin, encoder), ui=ui.PreviewText(told))
