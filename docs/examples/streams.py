"""Two videos whose passes run as one batch, decoded while they are made: python -m docs.examples.streams"""

import torch

from rolling_kv import Pipeline
from rolling_kv.sampling.together import Together
from rolling_kv.vae.latents import to_raw
from rolling_kv.video import VideoWriter

pipeline = Pipeline.load("models/tiny", device="cpu")
prompts = [pipeline.text_encoder.encode([f"a {colour} circle moving left"]) for colour in ("red", "blue")]

with (
    VideoWriter("first.mp4", 64, 64, scale=6) as first,
    VideoWriter("second.mp4", 64, 64, scale=6) as second,
    Together(pipeline.model) as together,
):
    streams = [together.join(prompt, chunks=3, seed=1, height=64, width=64) for prompt in prompts]
    outputs = {stream: (writer, pipeline.vae.decoder()) for stream, writer in zip(streams, (first, second))}
    for stream, chunk in together.chunks():  # of any of them; another may join here, and `stream.leave()` ends one
        writer, decoder = outputs[stream]
        with torch.inference_mode():
            for frames in decoder.decode_frames(to_raw(chunk.latents.float())):
                writer.write(frames)
