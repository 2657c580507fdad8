from dataclasses import replace

from comfy_api.latest import io

from ..rolling_kv.config import ALL_FRAMES, CACHE_STORAGES, SINK_PHASES
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
                io.Int.Input(
                    "window",
                    default=0,
                    min=-1,
                    max=4096,
                    tooltip="Latent frames that a chunk attends to, counting the sink and the chunk itself (4 video frames "
                    "each). 0: what the model was trained with. -1: everything; memory then grows with the video.",
                ),
                io.Int.Input(
                    "sink",
                    default=-1,
                    min=-1,
                    max=64,
                    tooltip="The first latent frames of the video, which never leave the window. Avoids the flicker when "
                    "frame 0 would leave. -1: what the model was trained with.",
                ),
                io.Combo.Input(
                    "sink_phase",
                    options=list(SINK_PHASES),
                    optional=True,
                    advanced=True,
                    tooltip="Absolute: as the models were trained. Rebased: the sink always counts as just before the "
                    "window; try it when a very long video drifts.",
                ),
                io.Combo.Input(
                    "storage",
                    options=list(CACHE_STORAGES),
                    optional=True,
                    advanced=True,
                    tooltip="How the cache is kept. Model: the model's own precision. Float8 and int8 take about half the "
                    "memory of bfloat16; int8 is the more exact of the two.",
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
        )

    @classmethod
    def execute(cls, model, window, sink, sink_phase="absolute", storage="model", offload=False) -> io.NodeOutput:
        cache = replace(model.cache, sink_phase=sink_phase, storage=storage, offload=offload)
        if window != 0:
            cache = replace(cache, window=ALL_FRAMES if window == -1 else window)
        if sink != -1:
            cache = replace(cache, sink=sink)
        cache.check_chunk(model.sampling.chunk)
        return io.NodeOutput(model._replace(cache=cache))
