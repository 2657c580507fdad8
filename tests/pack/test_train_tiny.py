"""The recipe of the tiny model: it resumes where it stopped, its world obeys the prompts, its prompts say what they say."""

import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tools.comfyui.env import PACK
from tools.train_tiny import export, loop, polish, starts, train_vae
from tools.train_tiny.code import LinearCode
from tools.train_tiny.detector import detect
from tools.train_tiny.prompts import EVERYTHING, LENGTHS, WORDS, canonical, describe, make_tokenizer, vocabulary
from tools.train_tiny.self_forcing import HOLD, SHRUNKEN, follow, pixel_times, sighted
from tools.train_tiny.train_transformer import Denoiser, tokenizer_file
from tools.train_tiny.world import (
    DIRECTIONS,
    FASTER,
    FURTHER,
    SHAPES,
    SIDE,
    SIZES,
    SMALLER,
    Scene,
    Track,
    covered,
    moved,
    other_shapes,
    random_scene,
    random_start,
    render,
    trajectory,
)

SCENE = Scene("circle", "red", "right")


class Killed(BaseException):
    """Stands for a signal."""


def trained(steps, killed_at=None):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    def loss(step, generator, averaged):
        if step == killed_at:
            raise Killed
        x = torch.randn(16, 4, generator=generator)
        return (module(x) - x[:, :2].sin()).square().mean() + 0.01 * averaged(x).square().mean()

    averaged = loop.train("part", module, loss, steps, 1e-3, matrices=[module[0].weight], save_every=2)
    return [*module.parameters(), *averaged.parameters()]


def test_a_run_that_was_killed_goes_on_as_if_it_was_not(tmp_path, monkeypatch):
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    whole = trained(9)
    monkeypatch.chdir(tmp_path / "killed")
    for step in (5, 8):
        with pytest.raises(Killed):
            trained(9, killed_at=step)
    assert all(map(torch.equal, trained(9), whole))
    assert all(map(torch.equal, trained(9, killed_at=0), whole))  # nothing is left to do


WORKERS = """
import torch
from tools.train_tiny import loop

torch.manual_seed(0)
module = torch.nn.Linear(2, 1)
rank, workers = loop.join_workers()

def loss(step, generator, averaged):
    x = torch.randn(4, 2, generator=generator)
    return (module(x) - x[:, :1]).square().mean()

loop.side_by_side(*(lambda name=name: loop.save({"by": rank}, loop.WORK / name) for name in ("one.pt", "two.pt", "three.pt")))
averaged = loop.train("part", module, loss, 4, 1e-2, save_every=2, together=True)
loop.save(module.state_dict(), loop.WORK / f"worker_{rank}.pt")
"""


def test_workers_train_the_same_weights_on_examples_of_their_own(tmp_path):
    """Two workers under torchrun, as docs/tiny-model.md starts them, and what one would have learned alone."""
    (tmp_path / ".train").mkdir()
    (tmp_path / "script.py").write_text(WORKERS, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(PACK), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=120)

    def saved(name):
        return torch.load(tmp_path / ".train" / name, weights_only=True)

    assert [saved(name)["by"] for name in ("one.pt", "two.pt", "three.pt")] == [0, 1, 0]
    torch.manual_seed(0)
    module = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 1e-2 * (step + 1) / 100 * (0.5 + 0.49 * math.cos(math.pi * step / 4))
        optimizer.zero_grad()
        for rank in range(2):
            x = torch.randn(4, 2, generator=torch.Generator().manual_seed(step * 7919 + 17 + 1_000_003 * rank))
            ((module(x) - x[:, :1]).square().mean() / 2).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    for name, weights in module.state_dict().items():
        assert torch.equal(saved("worker_0.pt")[name], saved("worker_1.pt")[name])
        torch.testing.assert_close(saved("worker_0.pt")[name], weights)


def test_steps_of_muon_are_orthogonal():
    for shape in ((3, 8, 20), (2, 20, 8), (1, 16, 16)):
        matrices = loop.orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        spread = torch.linalg.svdvals(matrices)
        assert 0.4 < spread.min() and spread.max() < 1.3


def test_a_shape_turns_only_where_it_stood():
    start = torch.tensor([[12.0, 30.0]])
    track = Track([SCENE], start)
    before = track.at(torch.arange(10.0))
    assert torch.equal(before[0], trajectory(SCENE, (12.0, 30.0), 10))
    track.turn([replace(SCENE, speed="quickly", direction="up")], 9)
    after = track.at(torch.arange(9.0, 20.0))
    assert torch.allclose(after[:, 0], before[:, -1], atol=1e-4)
    assert torch.allclose(after[0].diff(dim=0), torch.tensor([1.9, 0.0]), atol=1e-4)
    track.turn([replace(SCENE, speed="still")], 19)
    assert torch.allclose(track.at(torch.arange(19.0, 30.0)), after[:, -1:].expand(-1, 11, -1), atol=1e-4)
    track.turn([replace(SCENE, direction="down")], 29)
    assert torch.allclose(track.at(torch.tensor([29.0, 34.0]))[0].diff(dim=0), torch.tensor([0.0, 6.0]), atol=1e-4)


def test_a_changed_speed_keeps_the_way_after_a_wall():
    track = Track([SCENE], torch.tensor([[40.0, 30.0]]))
    assert track.at(torch.tensor([19.0, 20.0]))[0, :, 0].diff() < 0
    here = track.at(torch.tensor([20.0]))
    track.turn([replace(SCENE, speed="slowly")], 20)
    assert torch.allclose(track.at(torch.tensor([20.0, 30.0])), here + torch.tensor([[0.0, 0], [-7.0, 0]]), atol=1e-4)


def test_prompts_say_what_they_are_said_to_say():
    """Every attribute that counts as said is named, none that does not; in the model's own words, or in none."""
    generator = torch.Generator().manual_seed(0)
    known = set(WORDS) | {"?"}
    for _ in range(500):
        scene = random_scene(generator)
        prompt, said = describe(scene, generator)
        words = prompt.replace(",", "").split()
        assert set(words) <= known
        colours = [word for word in words if word in vocabulary()["known"]["colours"]]
        shapes = [word for word in words if word in vocabulary()["known"]["shapes"]]
        assert colours[:1] == [scene.colour] * ("colour" in said)
        assert shapes[:1] == [scene.shape] * ("shape" in said)
        assert (scene.size in words) == ("size" in said)
        assert (f"{scene.background} background" in prompt) == ("background" in said)
        assert all(word in words for word in scene.direction.split()) or "direction" not in said
        assert "direction" in said or scene.speed == "still" or not {"left", "right", "up", "down"} & set(words)
        assert ("still" in words) == (scene.speed == "still" and "speed" in said)


def test_prompts_fit_and_must_say_what_they_are_asked(tmp_path):
    make_tokenizer(tmp_path / "spiece.model")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        scene, must = replace(random_scene(generator), speed="slowly"), frozenset({"background", "direction"})
        prompt, said = describe(scene, generator, must=must, may=must | {"colour"})
        assert must <= said <= must | {"colour"}
        assert len(pieces.encode(prompt)) < LENGTHS[0]
        assert len(pieces.encode(describe(scene, generator, room=30)[0])) < LENGTHS[1]
    same = canonical(pieces)
    assert len(set(same.tolist())) == len(WORDS) + 4  # and padding, end, unknown, space
    assert same[pieces.piece_to_id("▁LARGE")] == same[pieces.piece_to_id("▁big")] == pieces.piece_to_id("▁big")


def test_what_a_prompt_leaves_open_is_always_the_same_and_read_from_the_picture():
    scene = replace(SCENE, speed="quickly", background="white")
    assert starts.settled(scene, EVERYTHING, starts.OPEN) == scene
    open_scene = starts.settled(scene, frozenset({"colour"}), starts.OPEN)
    assert open_scene == Scene(**starts.OPEN | {"colour": "red"})
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        shown = replace(random_scene(generator), speed="", background="black")
        path = trajectory(shown, random_start(shown, generator), 9)
        assert sighted(SCENE, frozenset(), detect(render([shown], path[None])[0])) == shown


def test_every_start_is_possible():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        scene = random_scene(generator)
        path = trajectory(scene, random_start(scene, generator), 9)
        assert path.min() >= scene.margin - 1e-3 and path.max() <= SIDE - scene.margin + 1e-3
        assert torch.allclose(path.diff(dim=0), torch.tensor(scene.velocity).expand(8, 2), atol=1e-4)
    assert len(DIRECTIONS) == 8


def test_ways_lead_to_the_other_shapes_to_a_smaller_one_and_to_another_motion():
    code, generator = LinearCode.fit(clips=64), torch.Generator().manual_seed(0)
    scenes = [replace(random_scene(generator), shape=shape, size="big", speed="") for shape in SHAPES]
    paths = torch.stack([trajectory(scene, random_start(scene, generator), 9) for scene in scenes])
    clean, ways = starts.drawn(code, scenes, paths)
    assert torch.allclose(clean, code.encode(render(scenes, paths)), atol=1e-4)
    for way, turn in zip(ways, range(2)):
        others = [replace(scene, shape=other_shapes(scene.shape)[turn]) for scene in scenes]
        assert torch.allclose(clean + way, code.encode(render(others, paths)), atol=1e-4)
    for before, after in zip(code.decode(clean), code.decode(clean + ways[2])):
        sizes = [detect(video).size.mean() for video in (before, after)]
        assert 0.95 * SMALLER < sizes[1] / sizes[0] < 1.05 * SMALLER
    for way, axis in zip(ways[3:5], range(2)):
        for before, after in zip(code.decode(clean), code.decode(clean + way)):
            places = [detect(video).position for video in (before, after)]
            faster = (places[1][-1] - places[1][0] - places[0][-1] + places[0][0])[axis]
            assert faster > 0.5 * FASTER * 8


def test_training_goes_on_from_an_exported_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".train").mkdir()
    model = Denoiser()
    with torch.no_grad():
        model.transformer.proj_out.weight.mul_(2)
    model.transformer.save_pretrained(tmp_path / "transformer")
    model.text.shipped().save_pretrained(tmp_path / "text_encoder")
    (tmp_path / "tokenizer").mkdir()
    shutil.copy(tokenizer_file(), tmp_path / "tokenizer")
    again = Denoiser()
    again.take_over(tmp_path)
    assert torch.equal(again.transformer.proj_out.weight, model.transformer.proj_out.weight)
    assert torch.equal(again.text.encoder.shared.weight, model.text.encoder.shared.weight)

    # A tokenizer that lacks some of the words: those it has keep their embeddings.
    fewer = {word: others for word, others in WORDS.items() if word not in ("navy", "moving")}
    monkeypatch.setattr("tools.train_tiny.prompts.WORDS", fewer)
    make_tokenizer(tmp_path / "tokenizer/spiece.model")
    older = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer/spiece.model"))
    table = torch.randn(older.get_piece_size(), 64)
    file = tmp_path / "text_encoder/model.safetensors"
    save_file(load_file(file) | {"shared.weight": table}, file)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    again.take_over(tmp_path)
    taken = again.text.encoder.shared.weight
    number = again.text.tokenizer.piece_to_id
    for word in ("red", "left", "a"):
        assert torch.equal(taken[number("▁" + word)], table[older.piece_to_id("▁" + word)])
    for piece in ("▁moving", "▁", "<unk>"):
        assert torch.equal(taken[number(piece)], table[older.piece_to_id("▁a")])
    assert not torch.equal(taken[number("▁navy")], table[older.piece_to_id("▁grey")])


def test_the_vae_goes_on_from_an_exported_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".train").mkdir()
    vae = train_vae.make_vae()
    for part in ("polished", "encoder"):
        torch.save({"averaged": vae.state_dict()}, f".train/{part}.pt")
    finished = export.finished_vae()
    assert not torch.allclose(finished.post_quant_conv.weight, vae.post_quant_conv.weight, rtol=0.1)
    finished.save_pretrained(tmp_path / "vae")
    again = train_vae.make_vae()
    train_vae.take_over(again, tmp_path)
    for layer, rows in (("quant_conv", 16), ("post_quant_conv", 16)):
        for name in ("weight", "bias"):
            values = [getattr(getattr(model, layer), name)[:rows] for model in (again, vae)]
            assert torch.allclose(*values, atol=1e-5)


def test_the_code_is_as_it_was_when_it_is_read_again(tmp_path):
    code = LinearCode.fit(clips=64)
    code.save(tmp_path / "code.safetensors")
    again = LinearCode.load(tmp_path / "code.safetensors")
    latents = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    frames = again.decode(latents)
    assert torch.equal(code.decode(latents), frames)
    assert torch.allclose(again.encode(frames)[:, :, 1:], latents[:, :, 1:], atol=1e-4)


def test_what_is_moved_lies_on_the_way_to_a_shape_further_on():
    here = torch.full((1, 12, 2), 30.0)
    time = torch.arange(12.0) - 5.5
    faster, further = FASTER * time[:, None], torch.full((12, 1), FURTHER)
    none = torch.zeros(12, 1)
    inside = covered(["circle"], ["big"], here)
    ways = moved(inside, 12)
    there = [
        covered(["circle"], ["big"], here + torch.cat(by, 1)) - inside
        for by in ((faster, none), (none, faster), (further, none), (none, further))
    ]
    alike = torch.nn.functional.cosine_similarity(ways.flatten(1)[:, None], torch.stack(there).flatten(1)[None], dim=2)
    assert alike.diag().min() > 0.5 and (alike - alike.diag().diag()).abs().max() < 0.1
    twice = torch.cat([inside, inside], 1)
    assert torch.allclose(moved(twice, 12), torch.cat([ways, ways], 2)), "each piece is faster around its own middle"


def test_a_shape_that_should_stand_goes_back_and_one_that_moves_goes_on_from_where_it_is():
    scenes = [replace(SCENE, speed="still"), replace(SCENE, speed="slowly")]
    track, times = Track(scenes, torch.tensor([[30.0, 30.0], [20.0, 30.0]])), torch.arange(9.0, 21.0)
    off = torch.tensor([2.0, 0.0])
    seen = [detect(frames) for frames in render(scenes, track.at(times) + off)]
    before = track.at(times)
    assert follow(track, seen, times, hold=HOLD).all()
    gone = (track.at(times) - before).mean(1)
    assert torch.allclose(gone, torch.stack([(1 - HOLD) * off, off]), atol=0.1)


def test_a_video_that_has_become_empty_should_show_its_shape_in_the_middle():
    empty = detect(torch.full((3, 12, 64, 64), 0.4))
    assert sighted(SCENE, frozenset({"colour"}), empty) == Scene(**starts.OPEN | {"colour": SCENE.colour})
    track, times = Track([SCENE], torch.tensor([[20.0, 30.0]])), pixel_times(1)
    assert follow(track, [empty], times).all()
    assert torch.allclose(track.at(times).mean(1), torch.tensor([[32.0, 32.0]]))


@pytest.mark.parametrize("off, known", [(-2.0, True), (-12.0, False)])
@pytest.mark.parametrize("bounces", [True, False])
def test_a_shape_that_fades_should_come_back_where_it_was_seen_last(off, known, bounces):
    track, times = Track([SCENE], torch.tensor([[24.0, 30.0]])), pixel_times(1)
    expected = track.at(times) + torch.tensor([off, 0.0])
    frames = render([SCENE], expected)[0]
    frames[:, 6:] = frames[:, :1, :1, :1]  # nothing but its background
    seen = detect(frames)
    assert seen.present.sum() == 6
    assert follow(track, [seen], times, bounces=bounces) == (known or not bounces)
    assert torch.allclose(track.at(times), expected, atol=0.3)


def test_a_triangle_that_has_shrunk_is_followed_where_it_is(monkeypatch):
    """It has lost almost half of its area: it is no longer what it should be, but it is not gone."""
    scene = Scene("triangle", "red", "right", "small")
    monkeypatch.setitem(SIZES, "small", 0.75 * SIZES["small"])
    frames = render([scene], torch.tensor([[[20.0, 44.0]]]))[0]
    monkeypatch.undo()
    assert not detect(frames).present.any()
    seen = detect(frames, SHRUNKEN)
    assert seen.present.all() and seen.shape == ["triangle"]
    assert (seen.position - torch.tensor([20.0, 44.0])).abs().max() < 4


def test_a_piece_of_an_own_video_has_the_frames_that_it_should_show():
    generator = torch.Generator().manual_seed(4)
    scenes = [
        Scene("square", "yellow", "right", "big", "slowly", "navy"),
        Scene("circle", "red", "up and left", "small"),
    ]
    paths = torch.stack([trajectory(scene, random_start(scene, generator), 45) for scene in scenes])
    frames, code = render(scenes, paths), LinearCode.fit(clips=64)
    own = polish.OwnVideos(code.encode(frames), scenes, paths)
    for _ in range(4):
        codes, shown, others = own.piece(generator)
        assert shown.shape == (1, 3, 4 * polish.PIECE, 32, 32) and others.shape == (2, *shown.shape)
        drawn = code.decode(codes)[:, :, 1:]  # as a first latent frame, the first is one frame and not four
        errors = [(drawn - shown[:, :, shift : shift + drawn.shape[2]]).square().mean() for shift in (4, 3, 2)]
        assert errors[0] == min(errors) and errors[0] < 0.05
        assert (others - shown).square().mean() > 0.01
