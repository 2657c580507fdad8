"""What a viewer of the bundled tiny model would see, on a small sample with fixed seeds.

The full measurement is tools/train_tiny/measure.py; its table is in docs/tiny-model.md.
"""

from pathlib import Path

import pytest
import torch

from tools.train_tiny import measure
from tools.train_tiny.detector import detect, direction, prediction_errors
from tools.train_tiny.world import render, trajectory

FOLDER = Path(__file__).parents[2] / "models" / "tiny"


@pytest.fixture(scope="module")
def tiny():
    return measure.Tiny.load(FOLDER)


def test_detector_reads_exact_frames():
    scenes = measure.scenes_for(12, seed=5)
    generator = torch.Generator().manual_seed(6)
    paths = torch.stack([trajectory(scene, measure.random_start(scene, generator), 17) for scene in scenes])
    errors = []
    for scene, frames in zip(scenes, render(scenes, paths)):
        seen = detect(frames)
        assert seen.present.all()
        assert set(seen.colour) == {scene.colour} and set(seen.shape) == {scene.shape}
        assert direction(seen.position[: measure.STRAIGHT_FRAMES]) == scene.direction
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
