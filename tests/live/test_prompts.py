"""Every example prompt that makes videos runs on a real ComfyUI, and each video is what was asked for."""

import copy

import numpy as np
import pytest
from graphs import TINY, api_prompts, bring_state, read_video

LENGTHS = {"RollingKVSample": "length", "RollingKVStreamVideo": "seconds"}
"""What makes a video, and its input that says how long it becomes."""
CHUNK = 3  # latent frames, of the bundled model
FPS = 16


def bundled(prompt: dict) -> bool:
    """Whether all that it loads is there. What other models there are run in test_real_workflows.py, with stand-ins."""
    names = ("model_name", "text_encoder_name", "vae_name", "lora_name")
    return all(node["inputs"].get(name, TINY) == TINY for node in prompt.values() for name in names)


def makers(prompt: dict) -> list[dict]:
    return [node for node in prompt.values() if node["class_type"] in LENGTHS]


PROMPTS = {name: prompt for name, prompt in api_prompts().items() if makers(prompt) and bundled(prompt)}


def inputs_of(prompt: dict, link: list) -> dict:
    return prompt[link[0]]["inputs"]


def pixel_frames(latent_frames: int) -> int:
    return max(4 * latent_frames - 3, 0)


def latent_frames(prompt: dict, maker: dict) -> int:
    """Latent frames of the video after its maker: what it starts from, and whole chunks of at least its length."""
    frames = 0
    if "source" in maker and maker["length_unit"] == "source":
        return encoded_frames(prompt, inputs_of(prompt, maker["source"])) // CHUNK * CHUNK
    if "state" in maker:
        frames = state_frames(prompt, prompt[maker["state"][0]])
    elif "initial_latent" in maker:
        frames = encoded_frames(prompt, inputs_of(prompt, maker["initial_latent"]))
    seconds = next(maker[length] for length in LENGTHS.values() if length in maker)
    wanted = pixel_frames(frames) + round(seconds * FPS)
    while pixel_frames(frames) < wanted:
        frames += CHUNK
    return frames


def state_frames(prompt: dict, giver: dict) -> int:
    """Latent frames of a state that a node gives: the sampler that made it, or Load State, of what the fork has saved."""
    if giver["class_type"] != "RollingKVLoadState":
        return latent_frames(prompt, giver["inputs"])
    fork = PROMPTS["fork"]
    (saver,) = [node["inputs"] for node in fork.values() if node["class_type"] == "RollingKVSaveState"]
    assert giver["inputs"]["state_name"] == f"{saver['filename_prefix']}_00001_.safetensors [output]"
    return latent_frames(fork, inputs_of(fork, saver["state"]))


def encoded_frames(prompt: dict, encode: dict) -> int:
    """Latent frames that Encode Video makes: of a picture, or of a video, or of the last seconds of one."""
    images = prompt[encode["images"][0]]
    if images["class_type"] == "LoadImage":
        return 1
    frames = whole = latent_frames(prompt, inputs_of(prompt, images["inputs"]["latent"]))
    if encode["take"] == "the last seconds":
        frames = -(-(round(encode["take.seconds"] * FPS) - 1) // 4) + 1
    return min(frames, whole)


def loaded_frames(prompt: dict) -> int:
    """Pixel frames that come from a file, which no seed changes."""
    loads = [node for node in prompt.values() if node["class_type"] == "RollingKVLoadState"]
    return sum(pixel_frames(state_frames(prompt, node)) for node in loads)


def saved_videos(prompt: dict) -> dict[str, tuple[dict, float]]:
    """Of each node that saves videos, by its id: the inputs of what makes them, and how many times larger they are."""
    saved = {}
    for name, node in prompt.items():
        if node["class_type"] == "RollingKVStreamVideo":
            saved[name] = node["inputs"], node["inputs"]["enlarge"]
        elif node["class_type"] == "SaveVideo":
            decode, enlarged = inputs_of(prompt, node["inputs"]["video"]), 1
            while "latent" not in decode:  # Create Video, of images that another node enlarges
                enlarged *= decode.get("scale_by", 1)
                decode = inputs_of(prompt, decode.get("images") or decode["image"])
            saved[name] = inputs_of(prompt, decode["latent"]), enlarged * decode.get("enlarge", 1)
    return saved


def run_videos(client, prompt: dict) -> list[np.ndarray]:
    """Frames of every video that its nodes save or show."""
    outputs = client.run(prompt)
    made = [outputs[saver] for saver in sorted(outputs)]  # they come in the order in which the nodes ran
    shown = [item for output in made for items in output.values() for item in items if isinstance(item, dict)]
    files = [item for item in shown if item.get("filename", "").endswith(".mp4")]
    return [read_video(client.view(file)).frames for file in files]


@pytest.mark.parametrize("name", sorted(name for name in PROMPTS if name != "compare"))  # which saves none
def test_the_video_has_the_length_size_and_rate_that_were_asked_for(client, name):
    prompt = PROMPTS[name]
    bring_state(client, prompt)
    outputs, saved = client.run(prompt), saved_videos(prompt)
    assert saved
    for saver, (maker, enlarged) in saved.items():
        files = [file for files in outputs[saver].values() for file in files if isinstance(file, dict)]
        assert len(files) == maker.get("batch_size", 1)
        for file in files:
            video = read_video(client.view(file))
            height, width = (maker[side] * enlarged for side in ("height", "width"))
            assert video.frames.shape == (pixel_frames(latent_frames(prompt, maker)), height, width, 3)
            assert (video.rate, video.codec) == (FPS, "h264")


def chained(prompt: dict) -> bool:
    """Whether samplers take something from each other, where what ComfyUI keeps between them may make a difference."""
    return len(makers(prompt)) > 1 or bool(loaded_frames(prompt))


@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_another_seed_gives_another_video_and_the_same_seed_the_same(client, cacheless_client, name):
    """Also where ComfyUI keeps nothing between the nodes."""
    prompt = copy.deepcopy(PROMPTS[name])

    def videos(client, seed):
        bring_state(client, prompt)
        for maker in makers(prompt):
            maker["inputs"] |= {"seed": seed, LENGTHS[maker["class_type"]]: 0.75}
        return run_videos(client, prompt)

    first, other = videos(client, 1), videos(client, 2)
    assert first and len(first) == len(other)
    loaded = loaded_frames(prompt)
    for one, another in zip(first, other):
        assert one.shape == another.shape and np.abs(one[loaded:].astype(int) - another[loaded:]).mean() > 1
    client.free()  # so that the third video is made, too
    again = [videos(client, 1)] + ([videos(cacheless_client, 1)] if chained(prompt) else [])
    for made in again:
        assert len(made) == len(first) and all(map(np.array_equal, made, first))
