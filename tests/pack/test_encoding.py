"""Prompts that become embeddings by a CLIP of ComfyUI's, where no server is needed to see it."""

from types import ModuleType, SimpleNamespace

import pytest
import torch
from node_modules import node_module

from rolling_kv.geometry import TEXT_LENGTH


class Clip:
    """A token for each word, which becomes its weight; a tokenizer that fails as others do."""

    patcher = SimpleNamespace()

    def tokenize(self, text):
        text.encode()
        if "((" in text:
            raise RecursionError
        words = [float(word) for word in text.split()] + [1.0]
        return {"t5": [words + [0.0] * (TEXT_LENGTH - len(words))]}

    def encode_from_tokens_scheduled(self, tokens):
        return [[torch.tensor(tokens["t5"])[..., None], {}]]


class Interrupted(BaseException):
    pass


@pytest.fixture(scope="module")
def cancelled():
    return []


@pytest.fixture(scope="module")
def encoder(cancelled):
    def heed():
        if cancelled:
            raise Interrupted

    patcher, management = ModuleType("comfy.model_patcher"), ModuleType("comfy.model_management")
    patcher.ModelPatcher = object
    management.throw_exception_if_processing_interrupted = heed
    management.intermediate_device = lambda: "cpu"
    with node_module("encoding", patcher, management) as module:
        yield module.encoder_of(Clip())


def test_what_a_clip_makes_of_a_long_prompt_is_cut_off_where_the_model_ends(encoder, caplog):
    long = " ".join(map(str, range(1, 601)))
    assert torch.equal(encoder.embed(long)[0, :, 0], torch.arange(1.0, TEXT_LENGTH + 1)) and "512" in caplog.text
    assert encoder.embed("").shape == (1, TEXT_LENGTH, 1)
    with pytest.raises(ValueError, match="600 tokens"):
        encoder.check_length(long)


@pytest.mark.parametrize(
    ("text", "why"), [("\ud800", "half of a character"), ("((", "cannot read"), ("1e999", "no numbers")]
)
def test_what_a_clip_cannot_read_is_told(encoder, text, why):
    with pytest.raises(ValueError, match=why):
        encoder.embed(text)
    if why != "no numbers":  # so a page is told that says it to a run
        with pytest.raises(ValueError, match=why):
            encoder.check_length(text)


def test_many_prompts_can_be_cancelled(encoder, cancelled):
    def texts():
        yield "1"
        cancelled.append(True)
        yield "2"
        raise AssertionError("a third prompt was asked for")

    with pytest.raises(Interrupted):
        encoder.shots(texts())
