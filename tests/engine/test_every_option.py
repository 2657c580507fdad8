"""Every option of `generate` and `batch` reaches what it sets, and a video file is what the session made, decoded in one go."""

import argparse

import pytest
import torch
from PIL import Image

from rolling_kv import cli
from rolling_kv import pipeline as pipeline_module
from rolling_kv import streaming as streaming_module
from rolling_kv.batch import Settings
from rolling_kv.batch import cli as batch_cli
from rolling_kv.config import CacheConfig
from rolling_kv.geometry import WAN_21
from rolling_kv.growing import GrowingVideo
from rolling_kv.pipeline import Pipeline
from rolling_kv.presets import DEFAULT_PRESET
from rolling_kv.sampling.session import RollingSession
from rolling_kv.sampling.state import CacheState
from rolling_kv.sampling.state_file import save_state
from rolling_kv.tiny import make_tiny
from rolling_kv.vae.latents import to_raw
from rolling_kv.video import VideoWriter, to_uint8

PROMPT = ["generate", "--prompt", "a red circle", "--output", "video.mp4"]
NOT_PASSED_ON = {"--help", "--debug", "--device"}
VALUES = {  # of options whose type does not tell one; anything but the default
    "--prompt": "a blue square",
    "--schedule": "2: a blue square",
    "--output": "other.mp4",
    "--model": "model.safetensors",
    "--text-encoder": "text.safetensors",
    "--vae": "vae.safetensors",
    "--lora": "lora.safetensors",
    "--negative-prompt": "grey",
    "--image": "start.png",
    "--video": "clip.mp4",
    "--background": "#ffffff",
    "--window": "all",
    "--guidance": "2.5",
    "--width": "48",
    "--height": "80",
    "--span": "24",
    "--ema-alpha": "0.5",
    "--memory-alphas": "0.2 0.4",
    "--state-in": "earlier.safetensors",
    "--state-out": "later.safetensors",
}
NEEDED = {  # by options that do not go without others
    "--span": ["--positions", "window"],
    "--leaving": ["--positions", "window"],
    "--no-shot-clean": ["--no-cut-flush"],
    "--last-seconds": ["--video", VALUES["--video"]],
}


def options(command="generate"):
    (commands,) = [a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return {action.option_strings[-1]: action for action in commands.choices[command]._actions if action.option_strings}


class Reached(BaseException):
    pass


def reached(monkeypatch, arguments):
    """What the command hands to Pipeline.load and to Pipeline.generate."""
    calls = []

    class Loaded:
        model = type("Model", (), {})()

        def generate(self, *args, **kwargs):
            kwargs.pop("on_pass", None)
            calls.append((args, kwargs))
            raise Reached

    Loaded.model.preset, Loaded.model.geometry = DEFAULT_PRESET, WAN_21
    monkeypatch.setattr(Pipeline, "load", lambda *args, **kwargs: calls.append((args, kwargs)) or Loaded())
    monkeypatch.setattr(cli, "check_model", lambda model: None)
    monkeypatch.setattr(cli, "inspect_checkpoint", lambda model: type("Info", (), {"settings": DEFAULT_PRESET}))
    monkeypatch.setattr("rolling_kv.config.ExecutionConfig.check", lambda *_, **__: None)
    with pytest.raises(Reached):
        cli.main(arguments)
    return calls


def given(name, action):
    if name in VALUES:
        return [name, *(VALUES[name].split() if action.nargs == 2 else [VALUES[name]])]
    if isinstance(action, argparse.BooleanOptionalAction):
        return [action.option_strings[getattr(CacheConfig, action.dest)]]  # on, then off
    if action.nargs == 0:
        return [name]
    if action.choices:
        return [name, str(list(action.choices)[-1])]  # defaults stand first
    return [name, str((action.default or 0) + 3)]


@pytest.mark.parametrize("name", [name for name in options() if name not in NOT_PASSED_ON])
def test_an_option_changes_what_the_pipeline_is_asked_for(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    first = dict(timestep=0.0, prompt=torch.zeros(1, 2, 8), negative=None, seed=0)
    save_state(CacheState().extended(torch.zeros(1, 16, 3, 8, 8), **first), VALUES["--state-in"])
    with VideoWriter(VALUES["--video"], 64, 64) as writer:
        writer.write(torch.zeros(5, 64, 64, 3, dtype=torch.uint8))
    Image.new("RGB", (64, 64)).save(VALUES["--image"])
    prompt = [*PROMPT, *NEEDED.get(name, [])]
    plain = reached(monkeypatch, prompt)
    assert reached(monkeypatch, prompt) == plain
    assert reached(monkeypatch, [*prompt, *given(name, options()[name])]) != plain


OF_THE_BATCH = ("--out", "--shard", "--ray", "--address", "--workers", "--gpus", "--cpus", "--text-workers")
"""Options that say who makes the videos, not how."""


@pytest.mark.parametrize("name", [n for n in options("batch") if n not in (*NOT_PASSED_ON, *OF_THE_BATCH)])
def test_an_option_of_a_batch_changes_its_settings(name, monkeypatch):
    monkeypatch.setattr(batch_cli, "check_model", lambda model: None)

    def settings(*arguments):
        return batch_cli.settings_of(cli._parser().parse_args(["batch", "jobs.jsonl", "--out", "x", *arguments]))

    assert settings() == settings() == Settings(device=settings().device)
    assert settings(*given(name, options("batch")[name])) != settings()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return Pipeline.load(make_tiny(tmp_path_factory.mktemp("models") / "tiny"))


class Written(GrowingVideo):
    """Keeps the frames that it writes."""

    def __init__(self, path, width, height, **options):
        super().__init__(path, width, height, **options)
        self.size, self.options, self.kept = (width, height), options, []
        type(self).last = self

    def write(self, frames):
        self.kept.append(frames.clone())
        super().write(frames)


def test_a_file_shows_what_the_session_made(loaded, monkeypatch, tmp_path):
    """Over several chunks and a size that is not square: the frames are those of one decoder, from raw latents."""
    opened = []

    class Noted(RollingSession):
        def __init__(self, model, prompt, **settings):
            super().__init__(model, prompt, **settings)
            opened.append((prompt, settings, self))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(streaming_module, "GrowingVideo", Written)
    monkeypatch.setattr(pipeline_module, "RollingSession", Noted)
    sampling = loaded.model.preset.sampling
    guided = type(sampling)(guidance_scale=2.0, denoising_steps=(1000, 500))
    loaded.generate(
        "one", "x.mp4", height=32, width=48, seconds=1.5, seed=7, negative_prompt="two", sampling=guided, scale=3
    )
    (prompt, settings, session) = opened[0]
    assert torch.equal(prompt, loaded.text_encoder.encode(["one"]))
    assert torch.equal(settings["negative"], loaded.text_encoder.encode(["two"]))
    written = Written.last
    assert written.size == (48, 32) and written.options["scale"] == 3
    assert len(session.state.records) > 1 and {record.seed for record in session.state.records} == {7}
    frames = torch.cat(written.kept)
    expected = to_uint8(loaded.vae.decoder().decode(to_raw(session.state.latents().float())))[0].permute(1, 2, 3, 0)
    assert frames.shape == expected.shape and torch.equal(frames, expected)
