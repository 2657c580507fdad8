from comfy_api.latest import io

from ..rolling_kv.sampling.state_file import load_state
from . import inputs, run, state_files
from .guard import guarded
from .types import CATEGORY, Model, State


class RollingKVLoadState(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        seconds = io.Float.Input(
            "seconds",
            default=5.0,
            min=0.05,
            max=86400.0,
            step=0.05,
            round=False,
            tooltip="The longest that the beginning may be. It ends with a whole chunk.",
        )
        return io.Schema(
            node_id="RollingKVLoadState",
            display_name="Load State",
            category=CATEGORY,
            description=(
                "Brings back a video that Save State or Stream Video has put away, or its beginning. Sample Video goes on "
                "from there, bit for bit as if it had never stopped. Nothing in the file is executed."
            ),
            search_aliases=["load cache", "checkpoint", "continue", "resume", "trim", "import state"],
            inputs=[
                io.Combo.Input(
                    "state_name",
                    options=state_files.choices(),
                    tooltip="A state in ComfyUI's input folder, or in its output folder. After a file was added, press R.",
                ),
                inputs.choice(
                    "take",
                    {inputs.ALL: [], inputs.FIRST_SECONDS: [seconds]},
                    "How much of the video to take. With its beginning, what followed is forgotten: go on another way from "
                    "there.",
                    optional=True,
                ),
                Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model that is to go on, with its LoRAs. If another one has made the video, that is told "
                    "here, before it is read.",
                ),
            ],
            outputs=[State.Output(display_name="state", tooltip="For Sample Video, Stream Video or Inspect State.")],
            hidden=[io.Hidden.unique_id],
            accept_all_inputs=True,
        )

    @classmethod
    def validate_inputs(cls, state_name=None, take=None) -> bool | str:
        # ComfyUI gives all dynamic combos of a node here.
        return state_files.check(state_name)

    @classmethod
    def fingerprint_inputs(cls, state_name=None, **others) -> str:
        path = state_files.find(state_name)
        facts = path.stat() if path else None
        return f"{facts.st_mtime_ns} {facts.st_size}" if facts else ""

    @classmethod
    @guarded
    def execute(cls, state_name, take=None, model=None) -> io.NodeOutput:
        path = state_files.get(state_name)
        if model is None:
            state = load_state(path)
        else:
            state = load_state(path, model.engine, identity=model.patcher.identity_with(model.loras))
        whole = state.seconds
        if take and take["take"] == inputs.FIRST_SECONDS:
            state = state.first(seconds=take.get("seconds", whole))
        run.say(f"{state.seconds:g} s of {whole:g} s, {state.size[1]}x{state.size[0]}", cls.hidden.unique_id)
        return io.NodeOutput(state)
