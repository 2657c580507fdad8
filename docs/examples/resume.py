"""A video that is put away and continued another day, bit for bit as if it had never stopped: python -m docs.examples.resume"""

import torch

from rolling_kv import CacheState, Pipeline, RollingSession
from rolling_kv.sampling.state_file import load_state, save_state

pipeline = Pipeline.load("models/tiny", device="cpu")
TEXT = "a green square moving up"
prompt = pipeline.text_encoder.encode([TEXT])


def continued(state: CacheState | None, chunks: int) -> CacheState:
    """The video with so many chunks more. The state that is given stays as it is: others may continue from it too."""
    with RollingSession(pipeline.model, prompt, height=64, width=64, state=state) as session:
        for _ in session.generate(chunks, seed=1):
            pass
        return session.state.named([(TEXT, prompt)])  # for people who look into the file


# A state is the clean latents and the log of how they came about: no keys and values, which are made anew from these.
save_state(continued(None, 2), "video.safetensors")
resumed = continued(load_state("video.safetensors", pipeline.model), 2)

assert torch.equal(resumed.latents(), continued(None, 4).latents())
print(resumed)
