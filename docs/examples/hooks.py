"""A diffusers transformer driven by hand, with the cache put on by hooks (docs/hook-api.md): python -m docs.examples.hooks"""

import torch

from rolling_kv import Pipeline
from rolling_kv.hooks import (
    RollingKVCacheConfig,
    apply_rolling_kv_cache,
    get_rolling_kv_cache_state,
    remove_rolling_kv_cache,
)
from rolling_kv.sampling.schedule import renoise_chunk, seeded_noise, warp_steps

pipeline = Pipeline.load("models/tiny", device="cpu")
transformer = pipeline.model.transformer
prompt = pipeline.text_encoder.encode(["a blue triangle moving right"])
channels, (height, width) = pipeline.model.geometry.channels, pipeline.model.geometry.latent_size(64, 64)
sampling, window = pipeline.model.preset.sampling, pipeline.model.preset.cache.window
tokens = (height // 2) * (width // 2)  # of one latent frame

apply_rolling_kv_cache(transformer, RollingKVCacheConfig(window_size=window * tokens))
state = get_rolling_kv_cache_state(transformer)


def predict(latents: torch.Tensor, timestep: float) -> torch.Tensor:
    """One pass over the chunk at `frame`; the first one appends it, those after it overwrite it."""
    flow = transformer(latents, torch.full((1,), timestep), prompt, return_dict=False)[0]
    state.configure_cache_write("overwrite", absolute_token_offset=frame * tokens)
    return flow


video = []
with torch.inference_mode():
    for frame in range(0, 2 * sampling.chunk, sampling.chunk):
        shape = (1, channels, sampling.chunk, height, width)
        state.clear_cache_write()
        clean = renoise_chunk(
            predict,
            lambda draw: seeded_noise(1, frame, shape, draw),
            warp_steps(sampling.denoising_steps, sampling.shift),
        )
        predict(clean, 0.0)  # the context pass: what stays in the cache is the clean chunk
        video.append(clean)
remove_rolling_kv_cache(transformer)
print([tuple(chunk.shape) for chunk in video])
