"""A video that is put away and continued another day, bit for bit as if it had never stopped: python -m docs.examples.resume"""

import torch

from rolling_kv import CacheState, Pipeline, RollingSession
from rolling_kv.sampling.state import ChunkRecord

pipeline = Pipeline.load("models/tiny", device="cpu")
prompt = pipeline.text_encoder.encode(["a green square moving up"])


def continued(state: CacheState | None, chunks: int) -> CacheState:
    """The video with so many chunks more. The state that is given stays as it is: others may continue from it too."""
    with RollingSession(pipeline.model, prompt, height=64, width=64, state=state) as session:
        for _ in session.generate(chunks, seed=1):
            pass
        return session.state


# A state is the clean latents and the log of how they came about: no keys and values, which are made anew from these.
first = continued(None, 2)
torch.save(
    (first.chunks, first.prompts, [tuple(record) for record in first.records], first.model, first.key), "video.pt"
)

chunks, prompts, records, model, key = torch.load("video.pt", weights_only=True)
loaded = CacheState(chunks, prompts, tuple(ChunkRecord(*record) for record in records), model, key)
resumed = continued(loaded, 2)

assert torch.equal(resumed.latents(), continued(None, 4).latents())
print(resumed)
