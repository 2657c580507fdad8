"""A prompt to a video file. From the project's folder: python -m docs.examples.minimal"""

from rolling_kv import Pipeline

pipeline = Pipeline.load("models/tiny", device="cpu")  # or a file, with text_encoder=… and vae=…
pipeline.generate(
    "a red circle moving left", "circle.mp4", height=64, width=64, seconds=2, seed=1, scale=6  # tiny pixels, enlarged
)  # fmt: skip
