"""The tiny model: complete, loadable by the engine and by diffusers, the same files every time."""

import json
import os

import pytest
import sentencepiece
import torch
from diffusers import WanPipeline
from transformers import AutoTokenizer

from rolling_kv import tiny
from rolling_kv.checkpoints.model import load_model
from rolling_kv.geometry import WAN_22
from rolling_kv.text import load_text_encoder
from rolling_kv.tiny import TINY_PRESETS, make_tiny, save_tokenizer, train_tokenizer
from rolling_kv.vae.latents import to_raw
from rolling_kv.vae.loading import load_vae

FILES = {
    "model_index.json",
    "rolling_kv.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/spiece.model",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}


class Cancelled(BaseException):
    """Stands for an interrupt."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny")


def contents(folder) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_same_seed_gives_the_same_files(model, tmp_path):
    first, again = contents(model), contents(make_tiny(tmp_path / "again"))
    other = contents(make_tiny(tmp_path / "other", seed=1))
    assert first.keys() == FILES
    assert sum(map(len, first.values())) < 10 * 2**20
    assert again == first
    changed = {name for name in FILES if other[name] != first[name]}
    assert changed == {name for name in FILES if name.endswith(".safetensors")} | {"rolling_kv.json"}


def test_every_part_loads_in_the_engine(model):
    causal = load_model(model)
    assert causal.preset == TINY_PRESETS[16]
    text = load_text_encoder(model)
    embedding = text.encode(["a red circle moving left", "a blue square standing still"])
    assert embedding.shape == (2, 512, causal.transformer.config.text_dim)
    assert embedding.isfinite().all() and not torch.equal(embedding[0], embedding[1])
    latents = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    flow = causal.transformer(latents, torch.tensor([937.5]), embedding[:1]).sample
    assert flow.isfinite().all() and 0.1 < flow.std() < 10
    other = causal.transformer(latents, torch.tensor([937.5]), embedding[1:]).sample
    assert not torch.equal(flow, other)


def test_the_picture_is_a_moving_texture(model):
    latents = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    vae = load_vae(model)
    frames = vae.decoder().decode(to_raw(latents))[0]  # [3, T, H, W]
    assert frames.shape == (3, 9, 64, 64)
    assert frames.flatten(2).std(2).min() > 0.1
    assert frames.diff(dim=1).abs().mean((0, 2, 3)).min() > 0.05
    assert (frames.abs() == 1).float().mean() < 0.2
    encoded = vae.encode_video(frames[None])
    assert encoded.shape == latents.shape and encoded.isfinite().all() and encoded.std() > 0.1


def test_it_may_have_the_latents_of_wan_2_2(tmp_path):
    folder = make_tiny(tmp_path / "tiny", geometry=WAN_22)
    assert contents(folder).keys() == FILES
    causal, vae = load_model(folder), load_vae(folder, geometry=WAN_22)
    assert causal.preset == TINY_PRESETS[48] and causal.geometry == vae.geometry == WAN_22
    latents = torch.randn(1, 48, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    frames = vae.decoder().decode(to_raw(latents))[0]
    assert frames.shape == (3, 5, 64, 64) and frames.flatten(2).std(2).min() > 0.1


def test_it_is_a_diffusers_pipeline(model):
    pipeline = WanPipeline.from_pretrained(model, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        "a red circle", height=32, width=32, num_frames=5, num_inference_steps=2, guidance_scale=1.0, output_type="np"
    ).frames
    assert frames.shape == (1, 5, 32, 32, 3)


@pytest.mark.parametrize(
    "text",
    ["a red circle moving left", "", "A Cat, 2 dogs & (one) BIRD; straße ~ x", "ﬁne ½ ② Ａ", " the  quick\tbrown fox "],
)
def test_both_files_of_the_tokenizer_agree(text, model):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model / "tokenizer" / "spiece.model"))
    tokenizer = AutoTokenizer.from_pretrained(model / "tokenizer", local_files_only=True)
    expected = pieces.encode(" ".join(text.split())) + [1]
    assert tokenizer(text).input_ids == expected
    assert len(tokenizer) == pieces.get_piece_size()
    padded = tokenizer(text, padding="max_length", max_length=512, truncation=True).input_ids
    assert padded == expected + [0] * (512 - len(expected))


def test_every_ascii_character_has_a_token(model):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model / "tokenizer" / "spiece.model"))
    characters = "".join(map(chr, range(33, 127)))
    assert pieces.unk_id() not in pieces.encode(characters)
    assert pieces.decode(pieces.encode(characters)) == characters


def test_a_tokenizer_can_be_trained_on_other_sentences(tmp_path):
    model = train_tokenizer(["a red circle moving left", "a blue square moving right"] * 50, size=60)
    save_tokenizer(tmp_path, model)
    assert len(AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)) <= 60


def test_it_replaces_only_its_own_kind(model, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    make_tiny(folder)
    (folder / "stray").write_text("")
    assert contents(make_tiny(folder)).keys() == FILES
    mark = folder / "rolling_kv.json"
    trained = json.dumps({"preset": json.loads(mark.read_text())["preset"]})
    mark.write_text(trained)
    with pytest.raises(ValueError, match="something else than a random tiny model"):
        make_tiny(folder)
    assert mark.read_text() == trained and contents(folder).keys() == FILES
    (tmp_path / "notes.txt").write_text("")
    for target in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match="give the name of a new folder"):
            make_tiny(target)
    assert sorted(os.listdir(tmp_path)) == ["model", "notes.txt"]


def test_an_interrupt_leaves_the_earlier_model(monkeypatch, tmp_path):
    earlier = contents(make_tiny(tmp_path / "model"))

    def interrupt(*_):
        raise Cancelled

    monkeypatch.setattr(tiny, "save_tokenizer", interrupt)
    with pytest.raises(Cancelled):
        make_tiny(tmp_path / "model", seed=1)
    assert os.listdir(tmp_path) == ["model"]
    assert contents(tmp_path / "model") == earlier
