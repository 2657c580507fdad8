"""Prompts as tools, other nodes and accidents make them: each ends in one clear sentence, or works; the server lives."""

import pytest
from graphs import chosen, loaders, node, one_sampler, prompt, read_video, save_latent

from tools.comfyui.client import PromptFailed, PromptRejected, first_file

pytestmark = pytest.mark.traceback_expected


@pytest.fixture(scope="module")
def client(crowded_server):
    crowded_server.client.folder = crowded_server.folder
    return crowded_server.client


def linked(graph: dict, name: str, values: dict[str, str]) -> dict:
    """The graph with inputs of a node linked to a Pick each."""
    for index, (given, value) in enumerate(values.items()):
        graph[f"pick {index}"] = node("Pick", value=value)
        graph[name]["inputs"][given] = [f"pick {index}", 0]
    return graph


def told(client, graph: dict) -> str:
    """The one message that a prompt ends in: fit to be read and to be logged, and the server still runs prompts."""
    with pytest.raises((PromptFailed, PromptRejected)) as failure:
        client.run(graph)
    message = str(failure.value)
    message.encode()
    assert len(message) < 3000, message[:3000]
    for foreign in ("NoneType", "object has no attribute", "Traceback", "positional argument", "Exception when valid"):
        assert foreign not in message, message
    return message


def test_names_of_files_may_come_over_links(client):
    graph = {**one_sampler(1)}
    linked(graph, "model", {"model_name": "text:tiny (bundled)", "preset": "text:auto"})
    assert client.run(graph)["save"]["latents"]


@pytest.mark.parametrize("loader", ["model", "text_encoder"])
@pytest.mark.parametrize("value", ["text:absent.safetensors", "count:7", "text:", "text:../../../etc/passwd"])
def test_a_linked_name_that_is_no_file_is_told_with_the_folder(client, loader, value):
    message = told(client, linked(one_sampler(1), loader, {f"{loader}_name": value}))
    assert "Put the file into" in message and "https://" in message


NAMES = [
    None,
    7,
    {"a": 1},
    True,
    "",
    "x" * 300,
    "x" * 100_000,
    "\ud83e.safetensors",
    "a\0b",
    "../a",
    "/etc/passwd",
    "C:a",
]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name)[:12])
def test_a_name_that_no_file_has_is_told_with_the_folder(client, name):
    message = told(client, one_sampler(1) | {"model": node("RollingKVLoadModel", model_name=name, preset="auto")})
    assert "Put the file into" in message
    graph = one_sampler(1, model=["lora", 0])
    graph["lora"] = node("RollingKVLoadLoRA", model=["model", 0], lora_name=name, strength=1.0)
    assert "Put the file into" in told(client, graph)


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("width", "count:1000000"), ("width", f"count:{2**62}"), ("height", "count:0"), ("length", "number:nan"),
        ("length", "number:inf"), ("length", "number:1e9"), ("length", "number:-1"), ("seed", "count:-1"),
        ("length_unit", "text:hours"), ("width", "number:64.5"), ("width", "text:64"),
    ],
)  # fmt: skip
def test_numbers_over_links_have_the_bounds_of_the_widgets(client, given, value):
    message = told(client, linked(one_sampler(1), "sample", {given: value}))
    assert f"{given} cannot be" in message


def test_numbers_of_choices_have_their_bounds_too(client):
    for strength in ("number:nan", "number:-1", "number:31"):
        graph = one_sampler(1, **chosen("guidance", "this strength", strength=3.0))
        message = told(client, linked(graph, "sample", {"guidance.strength": strength}))
        assert "strength cannot be" in message and "from 0.0 to 30.0" in message
    graph = one_sampler(1, model=["cache", 0])
    frames = chosen("window", "this many frames", frames=9)
    graph["cache"] = node("RollingKVAttachCache", model=["model", 0], sink="the model's own", **frames)
    assert "frames cannot be 1000000" in told(client, linked(graph, "cache", {"window.frames": "count:1000000"}))


@pytest.mark.parametrize("value", [0, "everything", None, {"window": "everything"}, {"window": []}])
def test_choices_that_there_are_not_are_told_with_those_that_there_are(client, value):
    graph = one_sampler(1, model=["cache", 0])
    graph["cache"] = node("RollingKVAttachCache", model=["model", 0], window=value, sink="the model's own")
    assert "Choose one of: the model's own, this many frames, all frames" in told(client, graph)
    del graph["cache"]["inputs"]["window"]
    assert "window is missing" in told(client, graph)
    assert "guidance cannot be 3.0" in told(client, one_sampler(1, guidance=3.0))


@pytest.mark.parametrize("value", ["tiny", 1, {"samples": 1}, True])
@pytest.mark.parametrize("given", ["model", "positive", "negative", "initial_latent", "state"])
def test_a_literal_in_the_place_of_a_link_is_told(client, given, value):
    guided = chosen("guidance", "this strength", strength=3.0)
    graph = one_sampler(1, **guided)
    graph["sample"]["inputs"][given] = value
    assert f"{given} cannot be" in told(client, graph)


def test_literals_where_the_vae_and_latents_belong(client):
    graph = {**loaders(), "decode": node("RollingKVDecodeVideo", vae=["vae", 0], latent="none", enlarge=1)}
    graph["save"] = node("SaveVideo", video=["decode", 0], filename_prefix="x", format="auto", codec="auto")
    assert "latent cannot be" in told(client, graph)
    graph["decode"]["inputs"] |= {"vae": None, "latent": None}
    assert "cannot be None" in told(client, graph)


@pytest.mark.parametrize("fps", ["number:nan", "number:inf", "number:0", "number:1e9"])
def test_a_rate_that_no_video_has_is_told(client, fps):
    graph = one_sampler(1)
    graph["vae"] = loaders()["vae"]
    rate = chosen("fps", "this many", rate=16)
    graph["decode"] = node("RollingKVDecodeVideo", vae=["vae", 0], latent=["sample", 0], enlarge=1, **rate)
    graph["save"] = node("SaveVideo", video=["decode", 0], filename_prefix="x", format="auto", codec="auto")
    assert "rate cannot be" in told(client, linked(graph, "decode", {"fps.rate": fps}))


def test_half_a_character_is_told_and_the_worker_lives(client):
    graph = one_sampler(1)
    graph["positive"] = prompt("fox \ud83e")
    assert "whole characters" in told(client, graph)
    damaged = client.folder / "models/diffusion_models" / "\udcc4\udcd0.safetensors"
    damaged.write_bytes(b"nothing")
    graph = one_sampler(1) | {"model": node("RollingKVLoadModel", model_name=damaged.name, preset="auto")}
    assert "safetensors" in told(client, graph)
    damaged.unlink()
    assert client.run(one_sampler(1))["save"]["latents"]


@pytest.mark.parametrize("kind", ["EmptyHunyuanLatentVideo", "EmptyLatentImage"])
def test_an_empty_latent_is_no_picture_to_start_from(client, kind):
    graph = one_sampler(1, initial_latent=["empty", 0])
    graph["empty"] = node(kind, width=64, height=64, batch_size=1, length=9)
    told_of = told(client, graph)
    assert "all of it is zero" in told_of or "video latent" in told_of


def test_a_run_that_is_larger_than_the_memory_is_refused_before_it_starts(client):
    graph = one_sampler(1, model=["cache", 0], width=8192, height=8192)
    window = chosen("window", "this many frames", frames=4096)
    graph["cache"] = node("RollingKVAttachCache", model=["model", 0], sink="the model's own", **window)
    message = told(client, graph)
    assert "GiB" in message and "available" in message and "window" in message


def test_images_that_are_larger_than_the_memory_are_refused_before_they_are_decoded(client):
    graph = {**loaders(), "decode": node("RollingKVDecodeImages", vae=["vae", 0], latent=["empty", 0])}
    graph["empty"] = node("EmptyHunyuanLatentVideo", width=1024, height=1024, length=2401, batch_size=1)
    graph["preview"] = node("PreviewImage", images=["decode", 0])
    message = told(client, graph)
    assert "GiB" in message and "Decode Video" in message


@pytest.mark.parametrize(("width", "height"), [(16, 8192), (8192, 16)])
def test_a_picture_may_be_cut_to_any_shape(client, width, height):
    graph = {**loaders(), "image": node("LoadImage", image="example.png")}
    graph["small"] = node(
        "ImageScale", image=["image", 0], upscale_method="bilinear", width=64, height=64, crop="disabled"
    )
    graph["encode"] = node("RollingKVEncodeVideo", vae=["vae", 0], images=["small", 0], width=width, height=height)
    graph["save"] = save_latent("encode")
    assert client.run(graph)["save"]["latents"]


def test_a_video_whose_file_is_gone_says_how_to_get_it_again(client):
    graph = one_sampler(1)
    graph["vae"] = loaders()["vae"]
    graph["decode"] = node("RollingKVDecodeVideo", vae=["vae", 0], latent=["sample", 0], enlarge=1)
    graph["save"] = node("SaveVideo", video=["decode", 0], filename_prefix="a", format="auto", codec="auto")
    client.run(graph)
    for path in client.folder.rglob("temp/**/rolling_kv_*.mp4"):
        path.unlink()
    graph["save"]["inputs"]["filename_prefix"] = "b"
    assert "change any setting of Decode Video" in told(client, graph)
    client.free()
    assert len(read_video(client.view(first_file(client.run(graph), ".mp4"))).frames) == 9


def test_a_kernel_by_the_name_that_it_once_had_still_runs(client):
    graph = one_sampler(1)
    graph["model"]["inputs"]["attention"] = "_native_cudnn"
    client.run(graph)


def test_a_kernel_that_the_device_does_not_have_is_refused_by_the_loader(client, install):
    if install.cuda:
        pytest.skip("this device has it")
    graph = one_sampler(1)
    graph["model"]["inputs"]["attention"] = "sage"
    assert "RollingKVLoadModel" in told(client, graph)
