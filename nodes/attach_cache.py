from dataclasses import replace

from comfy_api.latest import io

from ..rolling_kv.config import CACHE_STORAGES, POSITIONS
from . import inputs
from .guard import guarded
from .types import CATEGORY, Model


class RollingKVAttachCache(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RollingKVAttachCache",
            display_name="Attach Rolling Cache",
            category=CATEGORY,
            description=(
                "Chooses how much of the past the model sees. Without this node the model's own settings apply. A shorter "
                "window is faster and takes less memory; a sink keeps the first frames forever, which steadies long videos."
            ),
            search_aliases=["kv cache", "rolling cache", "window", "attention sink", "local attention", "memory"],
            inputs=[
                Model.Input("model", tooltip="From Load Causal Video Model."),
                inputs.window(),
                inputs.sink(),
                io.Combo.Input(
                    "positions",
                    options=[inputs.OWN, *POSITIONS],
                    optional=True,
                    advanced=True,
                    tooltip="Where the sink counts as being. Absolute: where its frames were made. Rebased: always just before "
                    "the window; try it when a very long video drifts.",
                ),
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
            ],
            outputs=[Model.Output(display_name="model", tooltip="The model with these cache settings.")],
            accept_all_inputs=True,
        )

    @classmethod
    @guarded
    def execute(cls, model, window, sink, positions="the model's own", storage="model", offload=False) -> io.NodeOutput:
        cache = inputs.with_sink(inputs.with_window(model.cache, window), sink)
        if positions != inputs.OWN:
            cache = replace(cache, positions=positions)
        cache = replace(cache, storage=storage, offload=offload)
        model.sampling.check_cache(cache)
        return io.NodeOutput(model._replace(cache=cache))
