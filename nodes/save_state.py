from comfy_api.latest import io

from ..rolling_kv.sampling.state_file import save_state
from . import run, state_files
from .guard import guarded
from .types import CATEGORY, State

PREFIX = "states/rolling_kv"


class RollingKVSaveState(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RollingKVSaveState",
            display_name="Save State",
            category=CATEGORY,
            description=(
                "Puts a video away, to be continued another day or on another machine: its latents, prompts, seeds and "
                "switches in one file, from which Load State goes on bit for bit. It holds no weights, and 0.2 MB for each "
                "latent frame at 832x480."
            ),
            search_aliases=["save cache", "checkpoint", "continue later", "resume", "export state"],
            inputs=[
                State.Input("state", tooltip="From Sample Video."),
                io.String.Input(
                    "filename_prefix",
                    default=PREFIX,
                    tooltip="How the file's name begins, with folders below ComfyUI's output folder. A number follows it.",
                ),
            ],
            outputs=[State.Output(display_name="state", tooltip="The same state, for another Sample Video.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    @guarded
    def execute(cls, state, filename_prefix) -> io.NodeOutput:
        path, name = state_files.place_for(filename_prefix, *state.size)
        save_state(state, path)
        told = f"{state.seconds:g} s kept as {name} in the output folder"
        run.say(told, cls.hidden.unique_id)
        return io.NodeOutput(state, ui={"text": (told,), "states": (state_files.saved(name),)})
