"""The ComfyUI nodes. Each file is one step of the graph; `rolling_kv/` does the work."""

from comfy_api.latest import ComfyExtension, io

from .attach_cache import RollingKVAttachCache
from .benchmark import RollingKVBenchmark
from .compare import RollingKVCompareVideos
from .decode import RollingKVDecodeImages, RollingKVDecodeVideo
from .encode_prompt import RollingKVEncodePrompt
from .encode_video import RollingKVEncodeVideo
from .inspect_state import RollingKVInspectState
from .live import watching
from .load_lora import RollingKVLoadLoRA
from .load_model import RollingKVLoadModel
from .load_state import RollingKVLoadState
from .load_text_encoder import RollingKVLoadTextEncoder
from .load_vae import RollingKVLoadVAE
from .prompt_schedule import RollingKVPromptSchedule
from .sample import RollingKVSample
from .save_state import RollingKVSaveState
from .step_cache import RollingKVStepCache
from .stream_video import RollingKVStreamVideo


class RollingKVExtension(ComfyExtension):
    async def on_load(self) -> None:
        watching.set_up()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            RollingKVLoadModel,
            RollingKVLoadLoRA,
            RollingKVLoadTextEncoder,
            RollingKVLoadVAE,
            RollingKVEncodePrompt,
            RollingKVPromptSchedule,
            RollingKVAttachCache,
            RollingKVStepCache,
            RollingKVBenchmark,
            RollingKVSample,
            RollingKVStreamVideo,
            RollingKVSaveState,
            RollingKVLoadState,
            RollingKVInspectState,
            RollingKVEncodeVideo,
            RollingKVDecodeVideo,
            RollingKVDecodeImages,
            RollingKVCompareVideos,
        ]
