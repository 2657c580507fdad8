from dataclasses import replace

import comfy.model_management as mm
from comfy_api.latest import io

from ..rolling_kv.checkpoints.model import load_model
from ..rolling_kv.config import SPEEDS, WEIGHT_STORAGES, ExecutionConfig
from ..rolling_kv.presets import PRESETS
from ..rolling_kv.wan.fast import fast_for
from . import attention as kernels
from . import inputs, model_files, run
from .guard import guarded, renamed
from .patchers import ManagedModel
from .types import CATEGORY, Model, ModelHandle


class RollingKVLoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RollingKVLoadModel",
            display_name="Load Causal Video Model",
            category=CATEGORY,
            description=(
                "Loads a causal (autoregressive) Wan video model: Self-Forcing, Causal-Forcing, LongLive, Krea Realtime "
                "and kin. The first node of every Rolling KV workflow."
            ),
            search_aliases=[
                "self forcing",
                "causal forcing",
                "longlive",
                "krea realtime",
                "autoregressive video",
                "wan",
            ],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=model_files.choices(model_files.MODEL),
                    tooltip="A file from models/diffusion_models (.safetensors, .gguf or .pt, original Wan or diffusers names), or "
                    f"a diffusers folder from models/diffusers. One that works: {model_files.MODEL.link}.",
                ),
                io.Combo.Input(
                    "preset",
                    options=["auto", *PRESETS],
                    tooltip="What the model was trained for: chunk size, window and its rules, denoising steps, shift. Auto reads it "
                    "from the file or its name, and assumes self-forcing where nothing tells. For long videos: deep-sink or memrope "
                    "with the weights of Self-Forcing, longlive-infinity with those of LongLive.",
                ),
                inputs.dtype(
                    "Precision of the weights and of the cache. Auto: the file's own, bfloat16 for float32 files on "
                    "a GPU."
                ),
                io.Combo.Input(
                    "storage",
                    options=list(WEIGHT_STORAGES),
                    optional=True,
                    advanced=True,
                    tooltip="How the weights are kept in memory. Float8 takes half of bfloat16, for small cards; each layer "
                    "is widened while it runs. GGUF files stay as they are.",
                ),
                io.Combo.Input(
                    "attention",
                    options=list(kernels.CHOICES),
                    optional=True,
                    advanced=True,
                    tooltip="Attention kernel. Auto: the one that ComfyUI was started with (--use-sage-attention, "
                    "--use-flash-attention), else the fastest of PyTorch's own, which need nothing installed.",
                ),
                io.Boolean.Input(
                    "compile",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Run the blocks through torch.compile: the first chunk takes a minute or more, the others are "
                    "faster. Needs a C++ compiler, on a GPU Triton; with float8 storage an RTX 40 or H100.",
                ),
                io.Combo.Input(
                    "speed",
                    options=list(SPEEDS),
                    default="standard",
                    optional=True,
                    advanced=True,
                    tooltip="What passes may cost in error. Exact: the original code's order of arithmetic, slower. Standard: the "
                    "same to rounding. Fast: attention in 8 bits where SageAttention is installed, or FlashAttention 3 on an H100, "
                    "and products in float8 from RTX 40 and H100 on, which is another rounding; what is missing is said.",
                ),
                io.Boolean.Input(
                    "cuda_graphs",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Once the window is full, record a step and a context pass as CUDA graphs and repeat them: faster where the "
                    "CPU cannot keep up, as with single frames and small pictures. NVIDIA only. Not with step caches.",
                ),
                io.Boolean.Input(
                    "offload",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Keep the weights in main memory and bring one block at a time to the GPU, for models that do not "
                    "fit it. Slower. Not with compile or CUDA graphs.",
                ),
            ],
            outputs=[Model.Output(display_name="model", tooltip="The model with its preset's cache settings.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, model_name=None, attention=None):  # naming it lets the earlier choices through
        return model_files.check(model_files.MODEL, model_name)

    @classmethod
    @renamed("attention", "attention", kernels.EARLIER)
    @guarded
    def execute(
        cls,
        model_name,
        preset,
        dtype="auto",
        storage="model",
        attention="auto",
        compile=False,
        speed="standard",
        cuda_graphs=False,
        offload=False,
    ) -> io.NodeOutput:
        device, offload_device = mm.get_torch_device(), mm.unet_offload_device()
        execution = ExecutionConfig(
            exact=speed == "exact",
            backend=None if attention == kernels.AUTO else attention,
            compile=compile,
            cuda_graphs=cuda_graphs,
            fast=speed == "fast",
        )
        execution.check(device, weight_storage=storage)
        if offload:
            execution.check_offloaded()
        path = model_files.get(model_files.MODEL, model_name)
        model = load_model(
            path,
            dtype=dtype,
            preset=preset,
            storage=storage,
            device="cpu" if offload else offload_device,
            runs_on=device,
        )
        backend, remark = kernels.backend_of(attention, device, model.dtype)
        execution = replace(execution, backend=backend)
        patcher = ManagedModel(model, load_device=device, offload_device=offload_device, offload=offload)
        missing = fast_for(execution, model.transformer, device).remark
        if notes := [note for note in (model.note, remark, missing) if note]:
            run.say("\n".join(notes), cls.hidden.unique_id)
        preset = model.preset
        return io.NodeOutput(ModelHandle(patcher, preset.sampling, preset.cache, execution=execution, path=path))
