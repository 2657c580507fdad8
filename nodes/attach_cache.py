from comfy_api.latest import io

from . import inputs
from .guard import guarded, renamed
from .types import CATEGORY, Model

SINK_PHASES = {inputs.OWN: inputs.OWN, "absolute": "absolute", "rebased": "window"}
"""The choices of `positions`, by what they were called when it was `sink_phase`."""


class RollingKVAttachCache(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RollingKVAttachCache",
            display_name="Attach Rolling Cache",
            category=CATEGORY,
            description=(
                "Chooses how much of the past the model sees, and how. Without this node the model's own settings apply. A "
                "shorter window is faster and takes less memory; a sink keeps the first frames forever, which steadies long "
                "videos."
            ),
            search_aliases=["kv cache", "rolling cache", "window", "attention sink", "local attention", "memory"],
            inputs=[
                Model.Input("model", tooltip="From Load Causal Video Model."),
                *inputs.cache_rules(),
            ],
            outputs=[Model.Output(display_name="model", tooltip="The model with these cache settings.")],
            accept_all_inputs=True,
        )

    @classmethod
    @renamed("sink_phase", "positions", SINK_PHASES)
    @guarded
    def execute(
        cls, model, window, sink, positions="the model's own", storage="model", offload=False, leaving=None, switch=None,
        context="the model's own",
    ) -> io.NodeOutput:  # fmt: skip
        cache = inputs.cache_of(model.cache, window, sink, positions, storage, offload, leaving, switch, context)
        model.sampling.check_cache(cache)
        return io.NodeOutput(model._replace(cache=cache))
