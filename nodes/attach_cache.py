from comfy_api.latest import io

from ..rolling_kv.config import CACHE_STORAGES, CONTEXTS
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
                inputs.window(),
                inputs.sink(),
                inputs.positions(),
                io.Combo.Input(
                    "storage",
                    options=list(CACHE_STORAGES),
                    optional=True,
                    advanced=True,
                    tooltip="How the cache keeps its keys and values. Model: the model's own precision. The others take less "
                    "memory; the help page says what they cost in exactness.",
                ),
                io.Boolean.Input(
                    "offload",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Keep the cache in main memory and bring one layer at a time to the GPU. Slower; for long "
                    "windows on small cards.",
                ),
                inputs.leaving(),
                inputs.switch(),
                io.Combo.Input(
                    "context",
                    options=[inputs.OWN, *CONTEXTS],
                    optional=True,
                    advanced=True,
                    tooltip="Kept: the past is seen once and remembered. Recomputed: the frames in view are seen anew before "
                    "every chunk, as Krea Realtime does; slower, and Sample Video then needs a VAE, or a sink of 1.",
                ),
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
        rules = inputs.window_of(window) | inputs.sink_of(sink) | inputs.positions_of(positions)
        rules |= inputs.leaving_of(leaving) | inputs.switch_of(switch)
        rules |= {} if context == inputs.OWN else {"context": context}
        cache = model.cache.with_rules(**rules, storage=storage, offload=offload)
        model.sampling.check_cache(cache)
        return io.NodeOutput(model._replace(cache=cache))
