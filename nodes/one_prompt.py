"""One prompt as the schedule that makes the same video, so that others can come into its plan while it is made."""

from __future__ import annotations

import torch

from ..rolling_kv.config import CacheConfig
from ..rolling_kv.sampling.scheduled import switch_of
from ..rolling_kv.schedules.reading import read_schedule
from ..rolling_kv.schedules.schedule import MOST_BLEND, WORDS, PromptSchedule, Segment
from . import borders
from .types import EncodedSchedule


def as_schedule(
    positive: list,
    shot: tuple[torch.Tensor, torch.Tensor | None],
    *,
    switch: str | None,
    blend: int,
    curve: str,
    cache: CacheConfig,
    continued: bool,
    given: bool,
) -> EncodedSchedule | str:
    """positive: the CONDITIONING of a run, whose chunks have the embeddings `shot`.

    switch, blend, curve: how it takes hold, see `RollingSession.set_prompt`. continued: behind a state. given: behind given frames.

    Returns why there is no such schedule, as a sentence, where the text is not known or no schedule can say all that.
    """
    spoken = borders.spoken(positive)
    if spoken is None:
        return (
            "no other prompt can be encoded for this run, as its own does not come straight from Encode Prompt or Prompt "
            "Schedule: connect one of them"
        )
    text, encoder = spoken
    word, origin = None, "video"
    if continued:
        origin = "run"
        if blend == 1 and switch is not None:
            word = {switch_of(Segment("", 0.0, word), cache): word for word in WORDS}.get(switch)
        if blend > MOST_BLEND or (blend == 1 and word is None and switch is not None):
            return "no other prompt can be said to this run, as no schedule can say how its own begins"
    elif given and shot[1] is not None:  # the frames have entered with the words that begin the shot
        origin, word = "run", "hold"
    try:
        segment = Segment(text, 0.0, word, blend, curve) if continued else Segment(text, 0.0, word)
        schedule = PromptSchedule((segment,))
        if read_schedule(str(schedule)).segments != (segment,):
            raise ValueError("it reads as several prompts")
    except ValueError as error:
        return f"no other prompt can be said to this run, as its own cannot stand in a schedule: {error}"
    return EncodedSchedule(schedule, {segment.text: shot}, origin, encoder)
