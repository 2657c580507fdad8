"""Pictures of latents for whoever watches: the linear map, and a decoder that may skip chunks."""

import json

import pytest
import torch

from rolling_kv import previews
from rolling_kv.bundled import BUNDLED
from rolling_kv.pipeline import Pipeline
from rolling_kv.previews import FITTED, DecodedPreview, LinearPreview, load_fitted
from rolling_kv.sampling.session import RollingSession
from rolling_kv.vae.latents import to_raw
from rolling_kv.video import to_uint8


@pytest.fixture(scope="module")
def made():
    """The bundled model's VAE, and the model latents of two videos side by side that it decodes."""
    pipeline = Pipeline.load(BUNDLED)
    with torch.inference_mode():
        prompts = pipeline.text_encoder.encode(["a red circle moving right", "a blue square moving up"])
    with RollingSession(pipeline.model, prompts, height=64, width=64, batch=2) as session:
        for _ in session.generate(3, seed=1):
            pass
    return pipeline.vae, session.state


@pytest.fixture
def decoded(made):
    """The first of the videos as uint8 [T, H, W, 3]."""
    vae, state = made
    with torch.inference_mode():
        return to_uint8(vae.decoder().decode(to_raw(state.latents()[:1].float()))[0]).permute(1, 2, 3, 0)


def apart(pictures, expected) -> float:
    return (pictures.float() - expected.float()).abs().mean().item()


def test_each_cell_becomes_its_pixels_by_the_numbers_and_the_first_video_is_shown():
    factors = torch.zeros(2, 12)  # red, green and blue of a pixel's upper left, upper right, lower left and lower right
    factors[0, 0:4], factors[1, 8:12] = torch.tensor([0.1, 0.2, 0.3, 0.4]), 0.5
    latents = torch.randn(2, 2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    preview = LinearPreview(factors.tolist(), [0.0] * 4 + [-1.0] * 4 + [0.25] * 4)
    pictures = preview.pictures(lambda first, last: latents[:, :, first:last], 1, 4)
    assert pictures.shape == (3, 6, 8, 3) and pictures.dtype == torch.uint8
    for number, picture in enumerate(pictures, 1):
        for row, column in ((0, 0), (3, 2), (4, 7), (5, 3)):
            cell = latents[0, :, number, row // 2, column // 2]
            red, blue = cell[0] * (0.1 + 0.1 * (2 * (row % 2) + column % 2)), 0.5 * cell[1] + 0.25
            assert picture[row, column].tolist() == to_uint8(torch.stack([red, torch.tensor(-1.0), blue])).tolist()


def test_whole_numbers_are_colours_too():
    pictures = LinearPreview([[0, 1, 0]], [-1, 0, 1]).pictures(
        lambda first, last: torch.ones(1, 1, last - first, 2, 2), 0, 3
    )
    assert pictures.shape == (3, 2, 2, 3) and pictures[0, 0, 0].tolist() == [0, 255, 255]


def test_the_numbers_that_ship_are_those_of_the_bundled_vae(made, decoded):
    """To be fitted anew whenever the VAE changes: python -m tools.fit_preview."""
    pictures = load_fitted(BUNDLED).pictures(made[1].frames_between, 0, 9).float()
    shown = torch.cat([decoded[:1], *(group.float().mean(0, keepdim=True) for group in decoded[1:].split(4))])
    assert pictures.shape == shown.shape
    assert (pictures - shown).pow(2).mean().sqrt() < 16
    assert (pictures - shown[1:2]).pow(2).mean().sqrt() > 16  # frames differ by more


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", '{"factors": [[1, 2]], "bias": "x"}', '{"factors": [[1], [2, 3]], "bias": [1]}',
        '{"factors": null, "bias": [0, 0, 0]}', '{"factors": [[1, 2, 3]], "bias": {}}', "[" * 100_000,
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_read_are_told_of(text, tmp_path):
    (tmp_path / "vae").mkdir()
    assert load_fitted(tmp_path) is None
    (tmp_path / FITTED).write_text(text)
    with pytest.raises(ValueError, match="latent_rgb.json holds no linear map"):
        load_fitted(tmp_path)


def test_numbers_of_other_latents_are_refused(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / FITTED).write_text(json.dumps({"factors": [[1, 2, 3]] * 4, "bias": [1, 2]}))
    with pytest.raises(ValueError, match="holds no linear map"):
        load_fitted(tmp_path)


def test_decoded_chunks_are_the_frames_of_the_video(made, decoded):
    vae, state = made
    preview = DecodedPreview(vae.decoder, vae.compute_device())
    pictures = [preview.pictures(state.frames_between, first, first + 3) for first in (0, 3, 6)]
    assert [len(part) for part in pictures] == [9, 12, 12] and torch.equal(torch.cat(pictures), decoded)


@pytest.mark.parametrize("primed", ["as shipped", "as far as the VAE sees"])
def test_after_a_gap_a_few_frames_are_decoded_again(made, decoded, primed, monkeypatch):
    vae, state = made
    if primed != "as shipped":
        monkeypatch.setattr(previews, "PRIMED", vae.reach)
    preview = DecodedPreview(vae.decoder, vae.compute_device())
    preview.pictures(state.frames_between, 0, 3)
    pictures, expected = preview.pictures(state.frames_between, 6, 9), decoded[21:]
    assert pictures.shape == expected.shape
    assert torch.equal(pictures, expected) if primed != "as shipped" else apart(pictures, expected) < 2


def test_a_decoder_that_fails_is_not_gone_on_with(made, decoded):
    vae, state = made
    preview = DecodedPreview(vae.decoder, vae.compute_device())
    preview.pictures(state.frames_between, 0, 3)
    with pytest.raises(ZeroDivisionError):
        preview.pictures(lambda *_: 1 / 0, 3, 6)
    assert apart(preview.pictures(state.frames_between, 3, 6), decoded[9:21]) < 2
