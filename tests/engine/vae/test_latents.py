"""Raw latents and the model's: the statistics of each kind."""

import torch
from vaes import (
    STOCK,
    latents,
)

from rolling_kv.geometry import GEOMETRIES
from rolling_kv.vae.latents import LATENTS_MEAN, LATENTS_STD, STATISTICS, to_model, to_raw


def test_latent_statistics_are_those_of_the_stock_vae():
    assert list(LATENTS_MEAN) == STOCK.config.latents_mean and list(LATENTS_STD) == STOCK.config.latents_std
    raw = latents(2)
    assert torch.allclose(to_raw(to_model(raw)), raw, atol=1e-6)
    shaped = to_model(torch.tensor(LATENTS_MEAN).view(1, 16, 1, 1, 1) + torch.tensor(LATENTS_STD).view(1, 16, 1, 1, 1))
    assert torch.allclose(shaped, torch.ones_like(shaped), atol=1e-5)


def test_each_kind_of_latents_has_its_own_statistics():
    for channels in GEOMETRIES:
        raw = latents(2, channels=channels)
        assert torch.allclose(to_raw(to_model(raw)), raw, atol=1e-6)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in STATISTICS[channels])
        assert torch.allclose(to_model(mean + std), torch.ones(1, channels, 1, 1, 1), atol=1e-5)
