"""Rolling-Forcing's sampler: chunks at falling noise levels, denoised together (https://github.com/TencentARC/RollingForcing).

A chunk enters with the pass that has its number, as pure noise, takes one step in every pass, and is done after the last
one. So a pass holds as many chunks as there are steps, the first of which is the least noisy; fewer while the video ramps
up, and while it ramps down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from ..config import ExecutionConfig
from .schedule import Noise, Step, clean_prediction, renoised
from .state import CacheState

JointPredict = Callable[[torch.Tensor, Sequence[float]], torch.Tensor]
"""(x_t [B, C, F, h, w] of several chunks, a timestep for each frame) -> predicted flow of the same shape."""


def check_rolling(state: CacheState, execution: ExecutionConfig, step_cache: bool) -> None:
    """Raise ValueError unless the sampler can go on from a state, with passes that are executed so.

    step_cache: whether there is one.
    """
    if execution.compile:
        raise ValueError(
            'compiled blocks cannot go with the sampler "rolling": its passes grow and shrink by a chunk, and torch.compile, '
            "which makes code for every length, gives up before the longest. Turn compile off"
        )
    if step_cache:
        raise ValueError(
            'a step cache cannot go with the sampler "rolling": every pass holds chunks at all steps, and no chunk stays at '
            "its place for two of them. Remove the step cache"
        )
    if switches := sorted({record.switch for record in state.records if record.switch}):
        raise ValueError(
            f'the sampler "rolling" cannot go on from a video whose prompts were switched by {" and ".join(switches)}: its '
            "cache knows no such switch. Continue the video with the model that made it"
        )


def joint_windows(chunks: int, steps: int) -> Iterator[range]:
    """The chunks of each joint pass. In pass number w, chunk number c takes step w - c, where step 0 is pure noise."""
    for number in range(chunks + steps - 1):
        yield range(max(0, number - steps + 1), min(chunks, number + 1))


def rolling_chunks(
    predict: JointPredict, noise: Callable[[int], Noise], steps: Sequence[Step], chunks: int
) -> Iterator[torch.Tensor]:
    """Each of `chunks` clean chunks in turn, [B, C, f, h, w], as soon as it is done; the next pass runs when it is asked for.

    predict: the model. noise: the draws of a chunk, by its number; draw n is taken after its step n - 1.
    steps: from pure noise to the least noisy, at most as many as chunks.
    """
    inputs: dict[int, torch.Tensor] = {}
    for number, window in enumerate(joint_windows(chunks, len(steps))):
        if number < chunks:
            inputs[number] = noise(number)(0)
        held = [inputs[chunk] for chunk in window]
        frames = held[0].shape[2]
        timesteps = [steps[number - chunk].timestep for chunk in window for _ in range(frames)]
        flow = predict(torch.cat(held, dim=2), timesteps)
        done = []
        for chunk, x, part in zip(window, held, flow.split(frames, dim=2)):
            step = number - chunk
            clean = clean_prediction(x, part, steps[step])
            if step + 1 < len(steps):
                inputs[chunk] = renoised(clean, noise(chunk)(step + 1), steps[step + 1]).to(x.dtype)
            else:
                del inputs[chunk]
                done.append(clean)
        yield from done
