"""Every example prompt that makes a video runs on a real ComfyUI, and the video is what was asked for."""

import copy

import numpy as np
import pytest
from graphs import api_prompts, read_video

from tools.comfyui.client import first_file

PROMPTS = {
    name: prompt
    for name, prompt in api_prompts().items()
    if any(node["class_type"] == "SaveVideo" for node in prompt.values())
}
CHUNK = 3  # latent frames, of the bundled model
FPS = 16


def sole(prompt: dict, class_type: str) -> dict:
    (inputs,) = [node["inputs"] for node in prompt.values() if node["class_type"] == class_type]
    return inputs


def pixel_frames(latent_frames: int) -> int:
    return max(4 * latent_frames - 3, 0)


def latent_frames(prompt: dict, sampler: dict) -> int:
    """Latent frames of the video after a sampler: what it starts from, and whole chunks of at least its length."""
    frames = 0
    if "state" in sampler:
        frames = latent_frames(prompt, prompt[sampler["state"][0]]["inputs"])
    elif "initial_latent" in sampler:
        frames = 1
    wanted = pixel_frames(frames) + round(sampler["length"] * FPS)
    while pixel_frames(frames) < wanted:
        frames += CHUNK
    return frames


def run_video(client, prompt: dict):
    return read_video(client.view(first_file(client.run(prompt), ".mp4")))


@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_the_video_has_the_length_size_and_rate_that_were_asked_for(client, name):
    prompt = PROMPTS[name]
    decode = sole(prompt, "RollingKVDecodeVideo")
    sampler = prompt[decode["latent"][0]]["inputs"]
    video = run_video(client, prompt)
    height, width = (sampler[side] * decode["enlarge"] for side in ("height", "width"))
    assert video.frames.shape == (pixel_frames(latent_frames(prompt, sampler)), height, width, 3)
    assert (video.rate, video.codec) == (FPS, "h264")


@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_another_seed_gives_another_video_and_the_same_seed_the_same(any_client, name):
    prompt = copy.deepcopy(PROMPTS[name])
    samplers = [node["inputs"] for node in prompt.values() if node["class_type"] == "RollingKVSample"]
    videos = []
    for seed in (1, 2, 1):
        for sampler in samplers:
            sampler.update(seed=seed, length=0.75)
        videos.append(run_video(any_client, prompt).frames)
        any_client.free()
    first, other, again = videos
    assert np.array_equal(first, again)
    assert first.shape == other.shape and np.abs(first.astype(int) - other).mean() > 1
