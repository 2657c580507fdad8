"""States on disk: the same bits when they come back, and a sentence for every file that is none or was tampered with."""

import hashlib
import os
from dataclasses import replace

import pytest
import torch
from hostile_states import malformed
from safetensors import safe_open
from safetensors.torch import save_file
from stand_in_vae import StandInVae
from videos import HEIGHT, SAMPLING, WIDTH, prompt, same, sample, small_model

from rolling_kv.config import CacheConfig
from rolling_kv.geometry import WAN_21
from rolling_kv.sampling import state_file
from rolling_kv.sampling.session import RollingSession
from rolling_kv.sampling.state import CacheState
from rolling_kv.sampling.state_file import StateFileError, is_state_file, load_state, read_state, save_state
from rolling_kv.sampling.summary import summarize

GUIDED = replace(SAMPLING, guidance_scale=2.0)
WAYS = {
    "switches": dict(cache=CacheConfig(6, sink=2, switch="joint")),
    "cuts": dict(cache=CacheConfig(6, sink=2, switch="cut")),
    "guidance": dict(sampling=GUIDED),
    "given frames": dict(given=3),
    "a given frame in the first chunk": dict(given=1, sampling=replace(SAMPLING, given_frame="in chunk")),
    "a recomputed context": dict(cache=CacheConfig(4, context="recomputed"), vae=StandInVae()),
}


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "video.safetensors"


def run(model, chunks, state=None, given=0, **settings):
    """A video whose prompt changes with every second chunk: a switch, a blend, and a cut where the rules have them."""
    guided = settings.get("sampling", SAMPLING).guided
    negative = prompt(model, 9) if guided else None
    at = sum(record.seed is not None for record in state.records) if state else 0
    session = RollingSession(
        model, prompt(model, 0), negative=negative, height=HEIGHT, width=WIDTH, state=state, **settings
    )
    with session:
        if given and state is None:
            session.prefill(torch.randn(1, 16, given, 4, 6, generator=torch.Generator().manual_seed(2)))
        for number in range(at, at + chunks):
            negative = prompt(model, 9 + number // 3) if guided else None
            session.set_prompt(prompt(model, number // 2), negative)
            list(session.generate(1, seed=number))
    return session.state


@pytest.fixture(scope="module")
def state(model):
    """With a blend, a switch, given frames, and two seeds."""
    session = RollingSession(
        model, prompt(model, 0), height=HEIGHT, width=WIDTH, cache=CacheConfig(6, sink=2, switch="joint")
    )
    with session:
        session.prefill(torch.ones(1, 16, 1, 4, 6))
        list(session.generate(2, seed=1))
        session.set_prompt(prompt(model, 1), blend=3)
        list(session.generate(3, seed=1))
        session.set_prompt(prompt(model, 0), switch="cut")
        list(session.generate(1, seed=2))
    return session.state


def bits(state):
    return [tensor.contiguous().view(torch.uint8).tolist() for tensor in state.chunks + state.prompts]


# There and back


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_state_from_a_file_continues_as_the_video_itself_bit_for_bit(way, model, path):
    whole, first = run(model, 5, **way), run(model, 3, **way)
    save_state(first, path)
    loaded = load_state(path, model, (HEIGHT, WIDTH))
    assert loaded.records == first.records and loaded.key == first.key and bits(loaded) == bits(first)
    assert same(run(model, 5 - 3, loaded, **way), whole)


def test_a_blend_and_a_batch_and_half_precision_come_back(state, path):
    loaded = load_state(save_state(state, path))
    assert (loaded.records, loaded.key, bits(loaded)) == (state.records, state.key, bits(state))
    mixed = CacheState(model="m")
    for dtype, seed in ((torch.float32, None), (torch.bfloat16, 2**63), (torch.float16, 0)):
        words = torch.randn(2, 3, 5).to(dtype)
        chunk = torch.randn(2, 16, 1, 4, 6).to(dtype).transpose(3, 4)
        mixed = mixed.extended(chunk, timestep=0.5, prompt=words, negative=-words, seed=seed)
    loaded = load_state(save_state(mixed, path))
    assert loaded.key == mixed.key and bits(loaded) == bits(mixed)
    assert [chunk.dtype for chunk in loaded.chunks] == [torch.float32, torch.bfloat16, torch.float16]


def test_it_is_an_ordinary_safetensors_file_whose_digest_anybody_can_compute(state, path):
    save_state(state._replace(texts=("a", None, "0" * 64), model_name="tiny"), path)
    with safe_open(path, framework="pt") as file:
        digest = file.metadata()["digest"]
        assert torch.equal(file.get_tensor("chunk.1"), state.chunks[1])
        assert len(list(file.keys())) == len(state.chunks) + len(state.prompts)
    blank = path.read_bytes().replace(digest.encode(), b"0" * 64, 1)
    assert hashlib.sha256(blank).hexdigest() == digest
    stored = read_state(path)
    assert stored.texts == ("a", None, "0" * 64) and len(state.prompts) == 3
    assert stored.model_name == "tiny" and all(chunk.is_meta for chunk in stored.chunks)
    assert os.listdir(path.parent) == [path.name]


def test_what_takes_its_place_is_whole_and_an_earlier_one_stays_otherwise(state, path, monkeypatch):
    save_state(state.first(frames=3), path)
    monkeypatch.setattr(state_file, "tensor_bytes", lambda tensor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_state(state, path)
    assert load_state(path).key == state.first(frames=3).key and os.listdir(path.parent) == [path.name]


def test_latents_take_at_most_a_megabyte_a_frame(tmp_path):
    big = CacheState(model="m").extended(
        torch.zeros(1, 16, 3, 60, 104), timestep=0.0, prompt=torch.zeros(1, 4, 8), negative=None, seed=0
    )
    assert save_state(big, tmp_path / "big.safetensors").stat().st_size < 3 * 2**20


# Texts of prompts


def test_texts_go_with_a_state_wherever_it_goes_and_no_bit_depends_on_them(model, path):
    words = [
        ("first", prompt(model, 0)),
        ("second", prompt(model, 1).double()),
        ("of another model", torch.ones(1, 4, 9)),
    ]
    bare = run(model, 3, sampling=GUIDED)
    state = bare.named(words)
    assert bare.texts == (None, None, None) and state.texts == ("first", None, "second")
    assert state.key == bare.key and bits(state) == bits(bare)
    again = state.named([("other", prompt(model, 0)), ("negative", prompt(model, 9))])
    assert again.texts == ("first", "negative", "second")
    longer = run(model, 2, state, sampling=GUIDED)
    assert longer.texts == ("first", None, "second", None, None) and same(longer, run(model, 5, sampling=GUIDED))
    assert longer.first(frames=4).texts == ("first", None)
    assert load_state(save_state(longer, path)).texts == longer.texts
    batch = RollingSession(model, prompt(model, 0), height=HEIGHT, width=WIDTH, batch=2)
    batch.prefill(torch.ones(2, 16, 1, 4, 6))
    assert batch.state.named(words).texts == ("first",)


# The beginning of a video


def test_the_beginning_of_a_video_is_the_state_that_it_was_then(model):
    states, state = [], None
    for _ in range(5):
        states.append(state := run(model, 1, state, sampling=GUIDED))
    for made in states:
        taken = state.first(frames=made.frames)
        assert same(taken, made) and len(taken.prompts) == len(made.prompts) and taken.records == made.records
        assert taken.chunks[0].data_ptr() == state.chunks[0].data_ptr()  # nothing is copied
    assert same(run(model, 3, state.first(frames=5), sampling=GUIDED), state)
    assert state.first(seconds=99) is state


@pytest.mark.parametrize("seconds, frames", [(0.32, 2), (0.8124, 2), (0.8125, 4), (1.0, 4), (1.3125, 6), (2, 8)])
def test_seconds_are_cut_to_whole_chunks(model, seconds, frames):
    assert WAN_21.seconds(4) == 0.8125
    assert sample(model, 4).first(seconds=seconds).frames == frames


def test_what_cannot_be_taken_is_said(model):
    state = sample(model, 2)
    for nothing, message in (
        (dict(seconds=0.1), r"begins with a chunk of 2 latent frames, 0.3125 s: no less can be taken, got 0.1 s"),
        (dict(frames=1), "no less can be taken, got 1 latent frames"),
        (dict(seconds=float("nan")), "got nan s"),
        (dict(), "in latent frames or in seconds"),
        (dict(frames=2, seconds=1), "in latent frames or in seconds"),
    ):
        with pytest.raises(ValueError, match=message):
            state.first(**nothing)
    with pytest.raises(ValueError, match="holds no frames yet"):
        CacheState().first(frames=1)


# For people


def test_a_summary_has_a_row_for_each_way_in_which_chunks_were_made(state):
    info = summarize(state._replace(texts=("a red\ncircle", None)))
    rows = [(part.start, part.end, part.chunks, part.prompt, part.switch, part.seed) for part in info.stretches]
    assert rows == [
        (0, 1, 1, "a red\ncircle", "", None),
        (1, 7, 3, "a red\ncircle", "", 1),
        (7, 9, 1, "prompt 1", "", 1),
        (9, 11, 1, "prompt 2", "", 1),
        (11, 13, 1, "a red\ncircle", "cut", 2),
    ]
    assert (info.frames, info.chunks, info.seconds, info.width, info.height) == (13, 7, 3.0625, WIDTH, HEIGHT)
    lines = info.table().splitlines()
    assert len(lines) == 6 and lines[1].split()[:2] == ["0", "s"] and "a red\\ncircle" in lines[1]
    assert lines[5].split()[-4:] == ["2", "cut", "a", "red\\ncircle"]


# Refusals


def test_another_model_or_size_is_refused_naming_both(state, path, model):
    save_state(state._replace(model_name="longlive"), path)
    other = small_model()
    other.identity = "0123456789abcdef"
    both = rf"made by the model longlive \({model.identity}, float32\), and here is test \(0123456789abcdef, float32\)"
    with pytest.raises(StateFileError, match=both):
        load_state(path, other)
    with pytest.raises(StateFileError, match="is 48x32 pixels, and 64x32 are asked for"):
        load_state(path, model, (32, 64))


def test_what_cannot_be_saved_is_said(state, tmp_path):
    for wrong, path, message in (
        (CacheState(), "a.safetensors", "holds no frames yet"),
        (state, "a.pt", r"must end in .safetensors, got 'a.pt'"),
        (state, "a\0.safetensors", "zero character"),
    ):
        with pytest.raises(ValueError, match=message):
            save_state(wrong, tmp_path / path)
    assert os.listdir(tmp_path) == []


def test_malformed_files_are_refused_in_a_sentence_and_nothing_is_executed(state, tmp_path, monkeypatch):
    monkeypatch.setenv("STATE_FILE_BOMB", str(tmp_path / "executed"))
    good, bad = save_state(state, tmp_path / "good.safetensors"), tmp_path / "bad.safetensors"
    assert load_state(good).key == state.key
    cases = list(malformed(good))
    read = []
    monkeypatch.setattr(
        state_file, "read_tensor", lambda *args, whole=state_file.read_tensor: read.append(1) or whole(*args)
    )
    for name, content, message in cases:
        bad.write_bytes(content)
        read.clear()
        with pytest.raises(StateFileError, match=message or None) as refused:
            load_state(bad)
        text = str(refused.value)
        assert text.isprintable() and 0 < len(text) <= 600 and text.startswith(str(bad)), (name, text)
        assert not read or any(word in text for word in ("make the key", "no numbers")), (name, text)
        is_state_file(bad)
    assert len(cases) > 150 and sorted(os.listdir(tmp_path)) == ["bad.safetensors", "good.safetensors"]


def test_what_is_no_file_is_said(tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    for path, message in (
        (tmp_path, "no file"),
        (tmp_path / "absent.safetensors", "no such file"),
        ("a\0b", "no such file"),
        (os.devnull, "no file"),
        (tmp_path / "model.safetensors", "a safetensors file, but no cache state"),
    ):
        with pytest.raises(StateFileError, match=message):
            load_state(path)
        assert not is_state_file(path)
