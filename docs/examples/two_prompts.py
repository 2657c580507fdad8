"""Chunk by chunk, with another prompt halfway, decoded while it is made: python -m docs.examples.two_prompts"""

import torch

from rolling_kv import Pipeline, RollingSession
from rolling_kv.vae.latents import to_raw
from rolling_kv.video import VideoWriter

pipeline = Pipeline.load("models/tiny", device="cpu")
red, blue = (pipeline.text_encoder.encode([f"a {colour} circle moving left"]) for colour in ("red", "blue"))
decoder = pipeline.vae.decoder()  # remembers what it has decoded, as the session does what it has made

with (
    VideoWriter("two_prompts.mp4", 64, 64, scale=6) as writer,
    RollingSession(pipeline.model, red, height=64, width=64) as session,
):
    for prompt in (red, blue):
        session.set_prompt(prompt)
        for chunk in session.generate(2, seed=1):
            with torch.inference_mode():
                for frames in decoder.decode_frames(to_raw(chunk.latents.float())):
                    writer.write(frames)
