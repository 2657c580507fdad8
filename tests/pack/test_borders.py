"""What becomes of CONDITIONING and LATENT at the border to the engine, where no server is needed to see it."""

from functools import partial

import pytest
import torch
from node_modules import node_module

from rolling_kv.config import SamplingConfig
from rolling_kv.geometry import WAN_21, WAN_22
from rolling_kv.presets import PRESETS
from rolling_kv.sampling.state import CacheState, ChunkRecord
from rolling_kv.vae.latents import to_model


@pytest.fixture
def borders():
    with node_module("borders") as module:
        yield module


LATENTS = torch.randn(1, 48, 4, 2, 2, generator=torch.Generator().manual_seed(0))


def test_frames_that_a_noise_mask_leaves_are_the_given_ones(borders):
    """As Wan22ImageToVideoLatent marks them: the rest of its latent is no picture."""
    mask = torch.ones(1, 1, 4, 2, 2)
    mask[:, :, :1] = 0
    given = borders.initial_latents({"samples": LATENTS, "noise_mask": mask}, WAN_22)
    assert torch.equal(given, to_model(LATENTS[:, :, :1]))
    for whole in ({"samples": LATENTS}, {"samples": LATENTS, "noise_mask": torch.ones(1, 1, 4, 2, 2)}):
        assert torch.equal(borders.initial_latents(whole, WAN_22), to_model(LATENTS))


def test_an_image_inside_the_first_chunk_is_no_frame_before_it(borders):
    image = {"samples": LATENTS[:, :, :1]}
    inside, apart = PRESETS["longlive2"].sampling, SamplingConfig()
    assert borders.start_of(image, None, WAN_22, inside, 0, 0)[1] == (1, 0, 32, 32)
    assert borders.start_of(image, None, WAN_22, apart, 0, 0)[1] == (1, 1, 32, 32)
    assert borders.start_of({"samples": LATENTS}, None, WAN_22, inside, 0, 0)[1].frames == 4


def test_a_batch_is_that_of_what_is_continued(borders):
    start = partial(borders.start_of, geometry=WAN_22, sampling=SamplingConfig(), height=64, width=96)
    assert start(None, None, batch=3)[1] == (3, 0, 64, 96)
    pair = {"samples": LATENTS.expand(2, -1, -1, -1, -1)}
    state = CacheState((pair["samples"],), (), (ChunkRecord(4, 0.0, 0, -1, (1, 2)),))
    for kept in (dict(initial_latent=pair, state=None), dict(initial_latent=None, state=state)):
        assert start(**kept, batch=1)[1].batch == start(**kept, batch=2)[1].batch == 2
    with pytest.raises(
        ValueError, match="batch_size is 3, and the initial latent holds 2 videos: .* Repeat Latent Batch"
    ):
        start(pair, None, batch=3)
    with pytest.raises(ValueError, match="batch_size is 2, and the initial latent holds 1 video: "):
        start({"samples": LATENTS}, None, batch=2)
    with pytest.raises(
        ValueError, match="batch_size is 3, and the state holds 2 videos: leave batch_size at 1 to make as many.$"
    ):
        start(None, state, batch=3)


def test_latents_of_the_other_vae_are_named(borders):
    with pytest.raises(ValueError, match=r"must be a Wan 2.1 video latent.*\(of Wan 2.2 5B\)"):
        borders.initial_latents({"samples": LATENTS}, WAN_21)
    with pytest.raises(ValueError, match=r"decodes Wan 2.1 video latents.*\(of Wan 2.2 5B\)"):
        borders.latents_to_decode({"samples": LATENTS}, WAN_21)


def test_a_family_without_a_marker_reads_no_shots(borders):
    after = torch.zeros(1, 512, 8)
    marked = [[after + 1, {borders.AFTER_CUT: after}]]
    assert borders.after_cut(marked, PRESETS["longlive2"]) is after
    assert borders.after_cut(marked, PRESETS["self-forcing"]) is None
    assert borders.after_cut([[after, {}]], PRESETS["longlive2"]) is None
    assert borders.after_cut([[after]], PRESETS["longlive2"]) is None


def test_texts_are_told_of_what_was_encoded_and_of_nothing_that_a_node_made_of_it(borders):
    encoded, shot = torch.rand(1, 512, 8), torch.rand(1, 512, 8)
    notes = {borders.NAMED: ("a dog", encoded), borders.AFTER_CUT: shot}
    told = list(borders.texts_in([[encoded + 1, notes]], None, [[encoded]], [[encoded, {}]]))
    assert [text for text, _ in told] == ["a dog", "a dog"]
    assert told[0][1] is encoded and told[1][1] is shot
