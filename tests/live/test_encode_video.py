"""Pictures and videos of a user's own through the graph: started from, extended, made anew, and shown as they were taken."""

import io

import numpy as np
import pytest
import torch
from footage_files import write_clip
from graphs import (
    chosen,
    loaders,
    node,
    one_sampler,
    prompt,
    sample,
    save_images,
    save_latent,
    saved_images,
    saved_latent,
)
from PIL import Image

from rolling_kv.bundled import BUNDLED
from rolling_kv.fitting import Clip, Fitting
from rolling_kv.footage import Footage
from rolling_kv.geometry import WAN_21
from rolling_kv.vae.loading import load_vae
from tools.comfyui.client import PromptFailed
from tools.train_tiny.detector import detect
from tools.train_tiny.world import Scene, render, trajectory

SCENE = Scene("circle", "red", "right")
FRAMES = 53


@pytest.fixture(scope="module")
def clip(default_server):
    """Load Video's name of a film of the tiny world, 160x128 at 48 frames a second, and its frames [3, T, 64, 64]."""
    path = trajectory(SCENE, (20.0, 40.0), FRAMES)
    frames = render([SCENE], path[None])[0]
    large = frames.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(3, 1)
    side = large[..., :1].expand(-1, -1, -1, 16)
    film = torch.cat([side, large, side], 3)
    pictures = ((film + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
    write_clip(default_server.folder / "input" / "film.mp4", pictures, 48, options={"crf": "6"})
    return "film.mp4", frames


def encoded(images: str, size: int = 64, **inputs) -> dict:
    return node("RollingKVEncodeVideo", vae=["vae", 0], images=[images, 0], width=size, height=size, **inputs)


def decoded(source: str) -> dict:
    return node("RollingKVDecodeImages", vae=["vae", 0], latent=[source, 0])


def seen(images: np.ndarray):
    return detect(torch.from_numpy(images).float().permute(3, 0, 1, 2) / 127.5 - 1)


def previews(client, outputs: dict, name: str) -> list[np.ndarray]:
    """The pictures of 0 to 255 that a node shows on itself."""
    files = outputs[name]["images"]
    assert all(file["type"] == "temp" for file in files)
    return [np.asarray(Image.open(io.BytesIO(client.view(file))).convert("RGB"), dtype=int) for file in files]


def test_an_odd_picture_with_transparent_parts_begins_a_video(server, client):
    """Load Image has its alpha channel as a mask; together again they hide what is transparent."""
    picture = np.zeros((31, 45, 4), np.uint8)
    picture[..., :3] = (200, 30, 30)  # hidden, but for the disc
    y, x = np.mgrid[:31, :45]
    picture[(x - 22) ** 2 + (y - 15) ** 2 < 64] = (50, 90, 235, 255)
    Image.fromarray(picture).save(server.folder / "input" / "odd.png")
    graph = one_sampler(1, initial_latent=["start", 0]) | {
        "image": node("LoadImage", image="odd.png"),
        "with alpha": node("JoinImageWithAlpha", image=["image", 0], alpha=["image", 1]),
        "start": encoded("with alpha", fit="pad", background="#121218"),
        "images": decoded("sample"),
        "save images": save_images("images"),
    }
    said = {}
    outputs = client.run(graph, on_text=said.__setitem__)
    assert said["start"] == "45x31 -> 64x64, bars on 31 %, transparent parts on #121218"
    (shown,) = previews(client, outputs, "start")
    expected = Fitting(64, 64, "pad", (18 / 255, 18 / 255, 24 / 255))(torch.from_numpy(picture)[None])
    assert np.abs(shown - (expected[0, :, 0].permute(1, 2, 0) * 127.5 + 127.5).numpy()).max() < 1.5
    first = saved_images(client, outputs, "save images")[0]
    assert np.abs(first - shown).mean() < 6 and first[..., 0].max() < 120  # no red anywhere


def test_a_video_is_fitted_encoded_and_shown(client, clip):
    name, frames = clip
    graph = loaders() | {
        "video": node("LoadVideo", file=name),
        "sample": encoded("video"),
        "save": save_latent("sample"),
    }
    said = {}
    outputs = client.run(graph, on_text=said.__setitem__)
    assert said["sample"] == "160x128 at 48 fps -> 64x64 at 16 fps, cropped 20 %, 53 frames, 3.31 of 3.31 s"
    first, last = (seen(picture[None]).position[0] for picture in previews(client, outputs, "sample"))
    places = detect(frames).position
    assert (first - places[0]).norm() < 0.5 and (last - places[-1]).norm() < 0.5
    latent = saved_latent(client, outputs)
    assert latent.shape == (1, 16, 14, 8, 8)
    video = load_vae(BUNDLED).decoder().decode(latent)[0]
    assert (detect(video).position - places).norm(dim=1).max() < 1


@pytest.mark.parametrize("way", ["components", "trimmed", "made"])
def test_every_way_of_giving_a_video_gives_the_same_latent(way, client, clip):
    """Its images with their rate; a window of it by Trim Video; and a video that lies in memory."""
    graph = loaders() | {
        "video": node("LoadVideo", file=clip[0]),
        "parts": node("GetVideoComponents", video=["video", 0]),
    }
    if way == "trimmed":
        graph["cut"] = node("Video Slice", video=["video", 0], start_time=0.5, duration=1.0, strict_duration=False)
        graph["direct"] = encoded("cut")
        graph["rest"] = node("ImageFromBatch", image=["parts", 0], batch_index=24, length=48)
        graph["other"] = encoded("rest", **chosen("source_fps", "this many", rate=48.0))
    elif way == "made":
        graph["made"] = node("CreateVideo", images=["parts", 0], fps=48.0)
        graph["direct"], graph["other"] = encoded("video"), encoded("made")
    else:
        graph["direct"] = encoded("video", **chosen("take", "the last seconds", seconds=1.0))
        graph["other"] = encoded(
            "parts", **chosen("take", "the last seconds", seconds=1.0), **chosen("source_fps", "this many", rate=48.0)
        )
    graph |= {"save direct": save_latent("direct"), "save other": save_latent("other")}
    outputs = client.run(graph)
    direct, other = (saved_latent(client, outputs, f"save {name}") for name in ("direct", "other"))
    assert direct.shape == other.shape == (1, 16, {"components": 5, "trimmed": 4, "made": 14}[way], 8, 8)
    # ComfyUI's conversion of colours differs in rounding.
    assert (direct - other).abs().mean() < 0.05 * direct.std()


def test_a_clip_is_extended(client, clip):
    """Its last second becomes context, and what follows goes on from there."""
    name, frames = clip
    graph = one_sampler(3, initial_latent=["clip", 0]) | {
        "video": node("LoadVideo", file=name),
        "clip": encoded("video", **chosen("take", "the last seconds", seconds=1.0)),
        "images": decoded("sample"),
        "save images": save_images("images"),
    }
    outputs = client.run(graph)
    images = seen(saved_images(client, outputs, "save images"))
    assert len(images.colour) == 53 and images.present.all()
    assert set(images.colour) == {"red"} and set(images.shape) == {"circle"}
    assert (images.position[:17] - detect(frames).position[-17:]).norm(dim=1).max() < 1
    steps = images.position.diff(dim=0).norm(dim=1)
    assert steps.max() < 3 and steps[17:].mean() > 0.7  # no jump at the seam, and no standstill behind it


def test_a_video_is_made_anew(client, clip):
    """Its colour is the prompt's, its motion stays; more chunks than it has are refused, and the whole of it is a length."""
    graph = one_sampler(1, source=["film", 0], length_unit="source", width=512, strength=0.6) | {
        "video": node("LoadVideo", file=clip[0]),
        "film": encoded("video"),
        "positive": prompt("a blue circle moving right"),
        "images": decoded("sample"),
        "save images": save_images("images"),
    }
    outputs = client.run(graph)
    assert saved_latent(client, outputs).shape == (1, 16, 12, 8, 8)  # four chunks of the 14 frames
    images = seen(saved_images(client, outputs, "save images"))
    assert set(images.colour) == {"blue"} and images.present.all()
    places = detect(clip[1]).position[:45]
    assert (images.position - places).norm(dim=1).mean() < 1.5
    graph["sample"]["inputs"]["strength"] = 1.0
    outputs = client.run(graph)
    assert (seen(saved_images(client, outputs, "save images")).position - places).norm(dim=1).mean() > 4


def test_a_source_goes_with_a_schedule_and_a_state(client, clip):
    """One schedule over a source equals chained samplers with a part of it each."""
    texts = ["a blue circle moving right", "a green circle moving right"]
    film = {"video": node("LoadVideo", file=clip[0]), "film": encoded("video")}
    schedule = node(
        "RollingKVPromptSchedule", text_encoder=["text_encoder", 0], count_from="video",
        text=f"0: {texts[0]}\n1.3125: {texts[1]} [hold]",
    )  # fmt: skip
    whole = one_sampler(1, source=["film", 0], length_unit="source", strength=0.5) | film | {"positive": schedule}
    chain = (
        one_sampler(2, source=["film", 0], strength=0.5)
        | film
        | {"positive": prompt(texts[0]), "then": prompt(texts[1])}
    )
    chain["rest"] = node("LatentCut", samples=["film", 0], dim="t", index=6, amount=8)
    chain["second"] = sample(2, positive="then", state=["sample", 1], source=["rest", 0], strength=0.5, switch="hold")
    chain["save"] = save_latent("second")
    videos = [saved_latent(client, client.run(graph)) for graph in (whole, chain)]
    assert torch.equal(*videos)


@pytest.mark.traceback_expected
@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"length": 5},
            r"RollingKVSample.*The source has 14 latent frames \(3.3125 s\), fewer than the 15 that are to be made",
        ),
        ({"source": None, "length_unit": "source"}, "The length is to be that of the source, and there is none"),
        ({"strength": 0.0}, "strength 0 is too little for 4 steps: make it larger"),
    ],
    ids=["too-long", "none", "strength"],
)
def test_what_does_not_go_with_a_source_is_said(change, message, client, clip):
    graph = one_sampler(1, source=["film", 0]) | {"video": node("LoadVideo", file=clip[0]), "film": encoded("video")}
    inputs = graph["sample"]["inputs"] | change
    graph["sample"]["inputs"] = {name: value for name, value in inputs.items() if value is not None}
    with pytest.raises(PromptFailed, match=message):
        client.run(graph)


@pytest.mark.traceback_expected
def test_what_cannot_be_encoded_is_said(server, client, clip):
    (server.folder / "input" / "no.mp4").write_bytes(b"no video at all")
    graph = loaders() | {
        "video": node("LoadVideo", file="no.mp4"),
        "film": encoded("video"),
        "save": save_latent("film"),
    }
    with pytest.raises(PromptFailed, match="RollingKVEncodeVideo.*no.mp4 holds no picture that can be read"):
        client.run(graph)
    graph["video"]["inputs"]["file"] = clip[0]
    graph["film"]["inputs"]["background"] = "red"
    with pytest.raises(PromptFailed, match="a colour is written as # and six digits"):
        client.run(graph)


def test_the_footage_is_what_the_node_encodes(client, server, clip):
    """The engine alone gives the same latent."""
    graph = loaders() | {
        "video": node("LoadVideo", file=clip[0]),
        "film": encoded("video", fit="stretch"),
        "save": save_latent("film"),
    }
    latent = saved_latent(client, client.run(graph))
    footage = Clip.of(Footage.open(server.folder / "input" / clip[0]), Fitting(64, 64, "stretch"), WAN_21)
    ours = torch.cat(list(load_vae(BUNDLED).encode_frames(footage.frames())), 2)
    torch.testing.assert_close(latent, ours, atol=0.02 * ours.std().item(), rtol=0)
