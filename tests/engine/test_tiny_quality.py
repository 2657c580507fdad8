"""What a viewer of the bundled tiny model would see, on a small sample with fixed seeds.

The full measurement is tools/train_tiny/measure.py; its table is in docs/tiny-model.md.
"""

import json
from dataclasses import replace

import pytest
import sentencepiece
import torch
from transformers import AutoTokenizer

from rolling_kv.bundled import BUNDLED, BUNDLED_LORA
from rolling_kv.words import read_words
from tools.train_tiny import measure
from tools.train_tiny.detector import detect, direction, prediction_errors
from tools.train_tiny.prompts import WORDS, vocabulary
from tools.train_tiny.world import SIDE, STRIPE_SHADE, render, trajectory


@pytest.fixture(scope="module")
def tiny():
    return measure.Tiny.load(BUNDLED)


def test_detector_reads_exact_frames():
    scenes = measure.scenes_for(12, seed=5)
    generator = torch.Generator().manual_seed(6)
    paths = torch.stack([trajectory(scene, measure.random_start(scene, generator), 17) for scene in scenes])
    errors = []
    for scene, frames in zip(scenes, render(scenes, paths)):
        seen = detect(frames)
        assert seen.present.all()
        assert set(seen.colour) == {scene.colour} and set(seen.shape) == {scene.shape}
        way = "" if scene.speed == "still" else scene.direction
        assert direction(seen.position[: measure.STRAIGHT_FRAMES]) == way
        errors.append(prediction_errors(seen.position).median())
    # What the detector itself adds, in pixels: the corners of slow triangles fall between the samples of the renderer.
    assert torch.stack(errors).median() < 0.05 and max(errors) < 0.3


def test_detector_sees_that_nothing_is_there():
    assert not detect(torch.full((3, 4, 64, 64), 0.2)).present.any()


def test_vae_reconstructs_unseen_clips(tiny):
    assert measure.measure_vae(tiny, 8)["PSNR, dB"] > 32


def test_videos_show_what_the_prompt_says_and_the_cache_makes_them_continuous(tiny):
    seen = measure.measure_prompts(tiny, 20)
    assert seen["shape is there, frames"] > 0.97
    assert seen["colour right, frames"] >= 0.97
    assert seen["shape right, frames"] >= 0.9
    assert seen["direction right, videos"] >= 0.95
    assert 0.8 < seen["speed from the second chunk on, of the one that is said"] < 1.1
    assert seen["border / inside"] <= 1.5
    assert seen["without / with the cache"] >= 5


def test_a_long_video_keeps_its_shape_and_colour(tiny):
    seen = measure.measure_long(tiny, 3, seconds=20)
    assert seen["there and of the right colour, frames"] >= 0.95
    assert seen["step in size, %: where frames start to leave"] < 10
    assert seen["step in brightness, of 255: where frames start to leave"] < 3


def test_a_new_prompt_changes_the_colour_and_not_the_motion(tiny):
    seen = measure.measure_switch(tiny, 8)
    assert seen["old colour before, frames"] >= 0.97
    assert seen["new colour from the second chunk's end on, frames"] >= 0.97
    assert seen["error at the switch, px"] < 2


def test_other_words_change_nothing_else_and_the_picture_is_clean(tiny):
    seen = measure.measure_words(tiny, 20)
    assert seen["a shape is there, clean, frames"] >= 0.97
    assert seen["the same shape and colour throughout, videos"] >= 0.9
    assert seen["colour right where it is said, frames"] >= 0.97
    assert seen["shape right where it is said, frames"] >= 0.93
    assert seen["direction right where it is said, videos"] >= 0.93


def test_a_new_prompt_changes_shape_background_and_speed(tiny):
    seen = measure.measure_changes(tiny, 8)
    assert seen["new shape, frames"] >= 0.9 and seen["new background, frames"] >= 0.9
    assert seen["new speed, videos"] >= 0.6


def test_a_minute_does_not_drift(tiny):
    cache = replace(tiny.model.preset.cache, positions="window")
    seen = measure.measure_minutes(tiny, 4, cache, minutes=1.0)
    assert seen["right shape and colour, frames"] >= 0.97
    assert seen["drift of size, % of it, mean"] <= 3
    assert seen["drift of brightness, % of the range, mean"] <= 3


def test_the_lora_brings_stripes(tiny):
    seen = measure.measure_lora(tiny, BUNDLED_LORA, 4)
    # On white and grey they are a little pale in some videos.
    assert seen["striped, frames"] >= 0.8 and seen["shade of the stripes without it, of 255"] < 3
    assert abs(seen["shade of the stripes with the LoRA, of 255"] - STRIPE_SHADE) < 10
    assert BUNDLED_LORA.stat().st_size < 2**20


def test_the_files_are_small_and_tell_the_words_of_the_grammar():
    assert sum(file.stat().st_size for file in BUNDLED.rglob("*") if file.is_file()) < 24 * 2**20
    content = json.loads((BUNDLED / "rolling_kv.json").read_text(encoding="utf-8"))
    assert content["words"] == vocabulary() and content["only_size"] == [SIDE, SIDE]
    words = read_words(BUNDLED)
    every = " ".join([*WORDS, *WORDS.values()])
    assert words.unknown(every) == [
        "black",
        "grey",
        "white",
        "黑色",
        "gray",
        "灰色",
        "白色",
        "深",
    ]  # of backgrounds alone


@pytest.mark.parametrize(
    "text",
    ["a red circle moving left", "A RED, Circle? cat-dog", "一个红色圆圈向左移动, 白色背景", "", "straße 🙂 redwood"],
)
def test_both_files_of_the_tokenizer_agree(text):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(BUNDLED / "tokenizer/spiece.model"))
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "tokenizer", local_files_only=True)
    assert tokenizer(text).input_ids == [*pieces.encode(" ".join(text.split())), 1]


def test_spellings_and_synonyms_are_the_same_to_the_model(tiny):
    plain, *others = tiny.text.encode(
        ["a big red circle moving left", "A BIG Red Circle Moving LEFT", "a large red ball going left"]
    )
    assert all(torch.equal(plain, other) for other in others)
    assert torch.equal(*tiny.text.encode(["a red cat", "a red zebra"]))
