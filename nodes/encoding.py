"""Prompts become embeddings, wherever a node needs them: the same text has the same bits from all of them."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher

from ..rolling_kv.geometry import TEXT_LENGTH
from ..rolling_kv.messages import printable, shortened
from ..rolling_kv.presets import CUT_MARKERS
from ..rolling_kv.sampling.steering import Shot
from ..rolling_kv.text import clean
from . import borders
from .patchers import ManagedModule, fits_beside

logger = logging.getLogger(__name__)


class Encoder(ABC):
    """What turns prompts into embeddings. patcher: its weights, under ComfyUI's memory management."""

    patcher: ModelPatcher

    @abstractmethod
    def embed(self, text: str) -> torch.Tensor:
        """The embedding [1, 512, D] of a prompt. Call it with the weights on their device."""

    @abstractmethod
    def bring_to_device(self, *beside: ModelPatcher) -> None:
        """Load the weights, and those of others that are to stay."""

    @abstractmethod
    def length(self, text: str) -> int:
        """Tokens of a prompt, with the one that ends it. Only the tokenizer is used: other threads may ask."""

    def remark(self, texts: Iterable[str]) -> str:
        """What to say about words that the model does not know; empty where there is nothing to say."""
        return ""

    def fits_beside(self, *others: ModelPatcher) -> bool:
        """Whether the device has room for these weights while those of others stay there."""
        return fits_beside(self.patcher, *others)

    def shots(self, texts: Iterable[str], *beside: ModelPatcher) -> list[Shot]:
        """The embeddings of prompts, as `TextEncoder.encode_shot` makes them for whichever family has their markers.

        beside: what stays on the device meanwhile.
        """
        self.bring_to_device(*beside)
        return [self._shot(text) for text in texts]

    def _shot(self, text: str) -> Shot:
        mm.throw_exception_if_processing_interrupted()  # a schedule may have many
        cleaned = clean(text)
        marker = next((marker for marker in CUT_MARKERS if cleaned.startswith(marker)), None)
        device, first = mm.intermediate_device(), self.embed(text)
        return first.to(device), None if marker is None else self.embed(cleaned.removeprefix(marker)).to(device)

    def check_length(self, text: str) -> None:
        """Raise ValueError for a prompt of which the model would not read the end."""
        if (tokens := self.length(text)) > TEXT_LENGTH:
            raise ValueError(
                f"the prompt has {tokens - 1} tokens, of which the model reads {TEXT_LENGTH - 1}: make it shorter"
            )

    def __deepcopy__(self, memo) -> Encoder:
        return self  # nodes copy CONDITIONING, which carries its encoder

    def __reduce__(self):
        return type(None), ()  # nodes that save CONDITIONING do not mean the weights


class OwnEncoder(Encoder):
    """The pack's, of Load Text Encoder."""

    def __init__(self, managed: ManagedModule):
        self.patcher = self._managed = managed

    def embed(self, text: str) -> torch.Tensor:
        return self._managed.model.encode([text])

    def bring_to_device(self, *beside: ModelPatcher) -> None:
        self._managed.bring_to_device(self._managed.model.working_nbytes, *beside)

    def length(self, text: str) -> int:
        return len(self._managed.model.tokenizer.encode(clean(text))) + 1

    def remark(self, texts: Iterable[str]) -> str:
        return self._managed.model.remark(texts)


class ClipEncoder(Encoder):
    """A CLIP of ComfyUI's, of Load CLIP: a prompt becomes what CLIP Text Encode makes of it, its (word:1.2) included."""

    def __init__(self, clip: Any):
        self._clip, self.patcher = clip, clip.patcher

    def embed(self, text: str) -> torch.Tensor:
        name = f'prompt "{shortened(printable(text), 40)}"'
        embedding = borders.embedding(self._clip.encode_from_tokens_scheduled(self._tokens(text)), name)
        if embedding.shape[1] > TEXT_LENGTH:  # ComfyUI's encoders cut nothing off
            logger.warning("The %s has %d tokens; the model reads the first %d.", name, len(embedding[0]), TEXT_LENGTH)
            embedding = embedding[:, :TEXT_LENGTH]
        if not embedding.isfinite().all():
            raise ValueError(
                f"The CLIP makes values that are no numbers (NaN or infinity) of the {name}: a weight in it, as in "
                "(word:1.2), is too large, or the CLIP's file is damaged."
            )
        return embedding

    def bring_to_device(self, *beside: ModelPatcher) -> None:
        if beside:  # encoding brings the CLIP itself, but does not know of them
            mm.load_models_gpu([self.patcher, *beside])

    def length(self, text: str) -> int:
        # Padded to what ComfyUI pads it to, which is no more than the model reads.
        return max(len(batch) for batches in self._tokens(text).values() for batch in batches)

    def _tokens(self, text: str) -> dict[str, list]:
        clean(text)  # half of a character is told as such
        try:
            return self._clip.tokenize(text)
        except Exception as error:  # of any tokenizer: brackets nested too deeply, for instance
            raise ValueError(
                f"the CLIP cannot read the prompt ({type(error).__name__}): write it more simply"
            ) from error


def encoder_of(given: Any) -> Encoder:
    """The encoder that an input brings, as `inputs.text_encoder` lets it in."""
    return OwnEncoder(given) if isinstance(given, ManagedModule) else ClipEncoder(given)
