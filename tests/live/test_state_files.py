"""States that are put away and brought back: by other servers, in part, under every way of keeping outputs, and damaged."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from graphs import chosen, loaders, node, one_sampler, prompt, sample, save_latent, saved_images, saved_latent
from hostile_states import malformed, random_state
from test_load_lora import load_model, write_lora

from rolling_kv.bundled import BUNDLED
from rolling_kv.sampling.state_file import read_state
from rolling_kv.sampling.state_file import save_state as write_state
from rolling_kv.vae.loading import load_vae
from tools.comfyui.client import PromptFailed, PromptRejected

RED, BLUE, SQUARE = "a red circle moving right", "a blue circle moving left", "a green square moving up"


def save_state(source: str, prefix: str = "states/rolling_kv") -> dict:
    return node("RollingKVSaveState", state=[source, 1], filename_prefix=prefix)


def load(name: str, **inputs) -> dict:
    return node("RollingKVLoadState", state_name=name, **inputs)


def saved(server, outputs: dict, name: str = "put away") -> Path:
    (file,) = outputs[name]["states"]
    return server.folder / file["type"] / file["subfolder"] / file["filename"]


def run_latent(client, graph: dict) -> torch.Tensor:
    return saved_latent(client, client.run(graph))


def put_away(server, chunks: int = 2, prefix: str = "states/rolling_kv", **inputs) -> Path:
    """The file of a state that the server makes and saves."""
    graph = one_sampler(chunks, **inputs) | {"put away": save_state("sample", prefix)}
    return saved(server, server.client.run(graph))


def going_on(name: str, chunks: int, text: str = RED, **inputs) -> dict:
    """A whole prompt that continues a state from a file."""
    graph = {**loaders(), "positive": prompt(text), "load": load(name, **inputs)}
    return graph | {"sample": sample(chunks, state=["load", 0]), "save": save_latent("sample")}


# Forks and chains, under every way of keeping outputs


def schedule(text: str) -> dict:
    return node("RollingKVPromptSchedule", text_encoder=["text_encoder", 0], text=text, count_from="video")


def test_three_continuations_of_one_state_in_one_prompt_each_equal_a_straight_run(every_server):
    client, words = every_server.client, {"same": RED, "blue": BLUE, "square": SQUARE}
    fork = one_sampler(2)
    for name, text in words.items():
        fork |= {f"{name} prompt": prompt(text), name: sample(2, positive=f"{name} prompt", state=["sample", 1])}
        fork[f"save {name}"] = save_latent(name)
    outputs = client.run(fork)
    for name, text in words.items():
        client.free()
        straight = one_sampler(4) | {"positive": schedule(f"0: {RED}\n1.3: {text}" if text != RED else f"0: {RED}")}
        whole = run_latent(client, straight)
        assert torch.equal(saved_latent(client, outputs, f"save {name}"), whole), name


def test_after_an_edit_of_the_last_prompt_of_a_chain_only_what_is_behind_it_runs(every_server):
    client, graph, before = every_server.client, one_sampler(1), "sample"
    for number, text in enumerate([BLUE, SQUARE, RED]):
        graph |= {f"prompt {number}": prompt(text), f"sampler {number}": sample(1, 2, f"prompt {number}")}
        graph[f"sampler {number}"]["inputs"]["state"] = [before, 1]
        before = f"sampler {number}"
    graph |= {"put away": node("RollingKVSaveState", state=[before, 1], filename_prefix="chain/end")}
    client.run(graph)
    graph["prompt 2"]["inputs"]["text"] = "a yellow circle moving down"
    ran = set()
    client.run(graph, lambda node_id, step, steps: ran.add(node_id))
    assert ran >= {"prompt 2", "sampler 2", "put away"}
    if "--cache-none" not in every_server.options:
        kept = {"sample", "sampler 0", "sampler 1"}
        assert not ran & (kept if "--cache-lru" not in every_server.options else {"sampler 1"}), ran


# Put away and brought back


def test_a_video_is_put_away_and_goes_on(every_server):
    client = every_server.client
    path = put_away(every_server, 2)
    assert path.parent == every_server.folder / "output/states" and path.name.startswith("rolling_kv_0")
    client.free()
    continued = run_latent(client, going_on(f"states/{path.name} [output]", 2))
    assert torch.equal(continued, run_latent(client, one_sampler(4)))


def test_a_state_of_one_server_dropped_into_the_input_folder_of_another_goes_on(default_server, cacheless_server):
    made = put_away(cacheless_server, 2)
    dropped = default_server.folder / "input/from elsewhere"
    dropped.mkdir()
    shutil.copy(made, dropped / "a video.safetensors")
    (dropped / "no state.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    (options,) = [
        info["input"]["required"]["state_name"][1]["options"]
        for info in default_server.client.object_info("RollingKVLoadState").values()
    ]
    assert "from elsewhere/a video.safetensors" in options and not any("no state" in name for name in options)
    for name in ("from elsewhere/a video.safetensors", "from elsewhere\\a video.safetensors [input]"):
        latent = run_latent(default_server.client, going_on(name, 1))
    assert torch.equal(latent, run_latent(cacheless_server.client, one_sampler(3)))


def test_the_beginning_of_a_video_goes_on_another_way(server, client):
    name = f"states/{put_away(server, 4).name} [output]"
    trimmed = going_on(name, 2, BLUE, **chosen("take", "the first seconds", seconds=1.5))
    by_hand = one_sampler(2) | {"blue": prompt(BLUE), "second": sample(2, positive="blue", state=["sample", 1])}
    by_hand["save"] = save_latent("second")
    assert torch.equal(run_latent(client, trimmed), run_latent(client, by_hand))
    whole = going_on(name, 1, **chosen("take", "all"))
    assert torch.equal(run_latent(client, whole), run_latent(client, one_sampler(5)))


def test_a_file_that_has_changed_is_read_again_and_one_that_has_not_is_not(server, client):
    place = server.folder / "input/changing.safetensors"
    made = put_away(server, 1), put_away(server, 2, seed=7)  # before: another prompt in between empties ComfyUI's cache
    shutil.copy(made[0], place)
    graph = {"load": load(place.name), "look": node("RollingKVInspectState", state=["load", 0])}
    first = client.run(graph)["look"]["text"][0]
    ran = set()
    client.run(graph, lambda node_id, step, steps: ran.add(node_id))
    assert "load" not in ran
    shutil.copy(made[1], place)
    second = client.run(graph)["look"]["text"][0]
    assert "3 latent frames" in first and "6 latent frames" in second


def test_prompts_keep_their_texts_through_chains_schedules_and_files(server, client):
    graph = one_sampler(2, seed=5) | {"blue": prompt(BLUE), "words": schedule(f"0: {SQUARE}\n2.9: {RED} [blend 3]")}
    graph |= {"second": sample(1, 6, "blue", state=["sample", 1]), "third": sample(4, 7, "words", state=["second", 1])}
    graph["words"]["inputs"]["count_from"] = "sampler"
    graph["words"]["inputs"]["text"] = f"0: {SQUARE}\n0.8: {RED} [blend 3]"
    graph["put away"] = node("RollingKVSaveState", state=["third", 1], filename_prefix="texts/video")
    stored = read_state(saved(server, client.run(graph)))
    assert stored.model_name and stored.texts == (RED, BLUE, SQUARE, None)
    by_clip = one_sampler(1) | {
        "positive": node("ConditioningConcat", conditioning_to=["a", 0], conditioning_from=["a", 0])
    }
    by_clip |= {"a": prompt(RED), "put away": save_state("sample")}
    del by_clip["save"]
    assert read_state(saved(server, client.run(by_clip))).texts in ((None,), ())


# What is shown


def test_inspect_state_shows_the_prompts_the_rules_and_the_last_frames(server, client):
    graph = one_sampler(2) | {
        "blue | or": prompt("blue | or"),
        "second": sample(2, 3, "blue | or", state=["sample", 1]),
    }
    graph["look"] = node("RollingKVInspectState", state=["second", 1], model=["model", 0], vae=["vae", 0])
    graph |= {"strip": node("SaveImage", images=["look", 1], filename_prefix="strip")}
    graph["save"] = save_latent("second")
    outputs = client.run(graph)
    text = outputs["look"]["text"][0]
    assert "12 latent frames in 4 chunks" in text and "64x64" in text and "rules: chunks of 3" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and RED in rows[2] and r"blue \| or" in rows[3] and "| 3 |" in rows[3]
    strip = saved_images(client, outputs, "strip")
    assert strip.shape == (1, 64, 4 * 64, 3) and len(outputs["look"]["images"]) == 1
    frames = load_vae(BUNDLED).decoder().decode(saved_latent(client, outputs))[0]
    expected = (frames.clamp(-1, 1) * 127.5 + 127.5).permute(1, 2, 3, 0)[-13::4]
    shown = torch.from_numpy(strip[0]).unflatten(1, (4, 64)).transpose(0, 1)
    assert (shown - expected).abs().mean() < 4  # decoding began in the middle


def test_inspect_state_without_a_vae_gives_the_table_and_no_frames(server, client):
    graph = one_sampler(1) | {"look": node("RollingKVInspectState", state=["sample", 1])}
    graph["text"] = node("PreviewAny", source=["look", 0])
    outputs = client.run(graph)
    assert outputs["text"]["text"][0] == outputs["look"]["text"][0] and "images" not in outputs["look"]


@pytest.mark.traceback_expected
def test_frames_without_a_vae_are_refused_by_who_wants_them(client):
    graph = one_sampler(1) | {"look": node("RollingKVInspectState", state=["sample", 1])}
    graph["strip"] = node("PreviewImage", images=["look", 1])
    with pytest.raises(PromptFailed, match="a VAE is connected"):
        client.run(graph)


# Refusals


def tree(server) -> set[str]:
    return {str(path) for path in server.folder.rglob("*") if "output" not in path.parts and path.name != "server.log"}


@pytest.fixture
def careful_server(server):
    """Fails a test after which there is a file that was not there, outside of the output folder."""
    before = tree(server)
    yield server
    assert tree(server) - before == set()


OUTSIDE = [
    "../evil", "states/../../evil", "/tmp/evil", "C:\\evil", "C:evil", "\\\\server\\share\\evil", "..\\evil", "a\0b", "x" * 5000,
    "x/" * 2500 + "y", "", ".", "/", "states/" + "x" * 300, "%date%/../../../evil", "linked/evil",
]  # fmt: skip


@pytest.mark.traceback_expected
def test_no_prefix_leads_out_of_the_output_folder(careful_server, client, tmp_path):
    (careful_server.folder / "output/linked").symlink_to(tmp_path, target_is_directory=True)
    client.run(one_sampler(1) | {"put away": save_state("sample")})
    for prefix in OUTSIDE:
        with pytest.raises((PromptFailed, PromptRejected)) as told:
            client.run(one_sampler(1) | {"put away": save_state("sample", prefix)})
        assert "filename_prefix cannot be" in str(told.value) and len(str(told.value)) < 600, prefix
    assert os.listdir(tmp_path) == []


def test_no_name_leads_out_of_the_folders(server, client, tmp_path):
    made = put_away(server, 1)
    shutil.copy(made, server.folder / "outside.safetensors")
    shutil.copy(made, tmp_path / "outside.safetensors")
    links = {"linked.safetensors": tmp_path / "outside.safetensors", "folder": tmp_path, "dead.safetensors": "nowhere"}
    for name, target in links.items():
        (server.folder / "input" / name).symlink_to(target)
    names = [
        "../outside.safetensors", "../outside.safetensors [output]", str(tmp_path / "outside.safetensors"), "linked.safetensors",
        "folder/outside.safetensors", "dead.safetensors", "states/../../outside.safetensors [output]", "..\\outside.safetensors",
        "C:\\outside.safetensors", "\\\\host\\share\\outside.safetensors", "a\0b", "x" * 5000, "x/" * 2500, "", " [output]", "states",
        f"{made.name} [temp]", "/etc/passwd", "absent.safetensors", 7, {"a": 1}, ["a", "b", "c"],
    ]  # fmt: skip
    for name in names:
        graph = {"load": load(name), "look": node("RollingKVInspectState", state=["load", 0])}
        with pytest.raises(PromptRejected) as told:
            client.run(graph)
        assert len(str(told.value)) < 900, name
        if isinstance(name, str):
            assert "press R" in str(told.value), name
    options = client.object_info("RollingKVLoadState")["RollingKVLoadState"]["input"]["required"]["state_name"][1][
        "options"
    ]
    assert not [name for name in options if "linked" in name or "folder" in name or "dead" in name]


@pytest.mark.traceback_expected
def test_malformed_files_are_refused_by_the_node_and_nothing_is_executed(careful_server, client, tmp_path, monkeypatch):
    monkeypatch.setenv("STATE_FILE_BOMB", str(tmp_path / "executed"))
    good, bad = (careful_server.folder / "output" / name for name in ("good.safetensors", "bad.safetensors"))
    cases = list(malformed(write_state(random_state(), good)))
    for name, content, _ in cases:
        bad.write_bytes(content)
        graph = {"load": load("bad.safetensors [output]"), "look": node("RollingKVInspectState", state=["load", 0])}
        with pytest.raises(PromptFailed, match="RollingKVLoadState") as told:
            client.run(graph)
        assert str(bad) in str(told.value) and len(str(told.value)) < 800, name
    client.object_info("RollingKVLoadState")
    assert len(cases) > 150 and not (tmp_path / "executed").exists()


@pytest.mark.traceback_expected
def test_another_model_is_refused_naming_both_and_the_same_with_its_loras_is_not(server, client):
    config = load_model(BUNDLED).transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    write_lora(server.folder / "models/loras/state.safetensors", width, 4, config.num_layers)
    lora = {"lora": node("RollingKVLoadLoRA", model=["model", 0], lora_name="state.safetensors", strength=1.0)}
    graph = one_sampler(1, model=["lora", 0]) | lora | {"put away": save_state("sample")}
    name = f"states/{saved(server, client.run(graph)).name} [output]"
    client.free()
    with_lora = going_on(name, 1, model=["lora", 0]) | lora
    with_lora["sample"]["inputs"]["model"] = ["lora", 0]
    assert torch.equal(run_latent(client, with_lora), run_latent(client, one_sampler(2, model=["lora", 0]) | lora))
    with pytest.raises(
        PromptFailed, match=r"made by the model \S+ \([0-9a-f]{16}, \w+\), and here is \S+ \([0-9a-f]{16}"
    ):
        client.run(going_on(name, 1, model=["model", 0]))
    looked = going_on(name, 1) | {"look": node("RollingKVInspectState", state=["load", 0], model=["model", 0])}
    assert "another model" in client.run(looked)["look"]["text"][0]
