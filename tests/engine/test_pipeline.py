"""From a prompt to a file, in Python and on the command line: the choices reach the model, the cache and the session."""

import pytest
import torch
from builders import changed, close, original_names
from footage_files import greys, write_clip
from PIL import Image
from safetensors.torch import save_file

from rolling_kv import pipeline as pipeline_module
from rolling_kv.checkpoints.model import load_model
from rolling_kv.checkpoints.readers import CheckpointError
from rolling_kv.cli import main
from rolling_kv.config import CacheConfig, ExecutionConfig, SamplingConfig
from rolling_kv.fitting import Clip, Fitting
from rolling_kv.footage import Footage, read_picture
from rolling_kv.geometry import GEOMETRIES, WAN_21
from rolling_kv.lora.reader import load_lora
from rolling_kv.lora.stack import applied_loras
from rolling_kv.pipeline import Interrupted, Pipeline
from rolling_kv.sampling.memory import estimate
from rolling_kv.sampling.session import RollingSession
from rolling_kv.sampling.state_file import load_state, read_state
from rolling_kv.text import TextEncoder
from rolling_kv.tiny import make_tiny
from rolling_kv.vae.latents import to_model, to_raw
from rolling_kv.vae.loading import load_vae
from rolling_kv.vae.taehv import Taehv
from rolling_kv.video import VideoWriter, read_frames, read_video_info, to_uint8
from rolling_kv.wan.execution import weights_of
from rolling_kv.wan.offloaded import offloaded_blocks

SIZE = dict(height=32, width=32, seconds=0.2)
PROMPT = "a red circle moving left"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny")


def pairs(folder, seed, rank=4):
    """Matrices (down, up) by module name, for the self-attention of the model in `folder`."""
    generator = torch.Generator().manual_seed(seed)
    weights = load_model(folder).transformer.state_dict()
    names = [name.removesuffix(".weight") for name in weights if ".attn1.to_" in name and name.endswith(".weight")]
    return {
        name: (torch.randn(rank, 128, generator=generator) / 8, torch.randn(128, rank, generator=generator) / 8)
        for name in names
    }


@pytest.fixture(scope="module")
def loras(folder, tmp_path_factory):
    """Two LoRA files for the model in `folder`."""
    files = []
    for seed in (1, 2):
        files.append(tmp_path_factory.mktemp("loras") / f"lora {seed}.safetensors")
        tensors = {}
        for module, halves in pairs(folder, seed).items():
            tensors |= {f"transformer.{module}.lora_{half}.weight": tensor for half, tensor in zip("AB", halves)}
        save_file(tensors, files[-1])
    return files


@pytest.fixture
def sessions(monkeypatch):
    """What each session of a pipeline was opened with, and the session."""
    opened = []

    class Noted(RollingSession):
        def __init__(self, model, prompt, **options):
            super().__init__(model, prompt, **options)
            opened.append((options, self))

    monkeypatch.setattr(pipeline_module, "RollingSession", Noted)
    return opened


def test_loras_add_up_with_their_strengths(folder, loras):
    weights = load_model(folder).transformer.state_dict()
    expected = changed(changed(weights, pairs(folder, 1), 0.5), pairs(folder, 2), -1.0)
    pipeline = Pipeline.load(folder, loras=[(loras[0], 0.5), (loras[1], -1.0)])
    assert close(pipeline.model.transformer.state_dict(), expected)
    assert close(Pipeline.load(folder, loras=[(loras[0], 0.0)]).model.transformer.state_dict(), weights)


def test_what_does_not_fit_is_refused_before_the_rest_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline_module, "load_text_encoder", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(CheckpointError, match="absent.safetensors: there is no such file"):
        Pipeline.load(folder, loras=[(tmp_path / "absent.safetensors", 1.0)])
    wide = {"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 256)}
    wide["transformer.blocks.0.attn1.to_q.lora_B.weight"] = torch.ones(256, 2)
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(CheckpointError, match="wide was made for another model"):
        Pipeline.load(folder, loras=[(tmp_path / "wide.safetensors", 1.0)])


def test_the_text_encoder_is_where_there_is_room_beside_a_run(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(TextEncoder, "device_in", lambda self, device, room: asked.append((device, room)) or device)
    monkeypatch.setattr(pipeline_module, "obtainable_memory", lambda device: 2**40)
    pipeline = Pipeline.load(folder)
    ((device, room),) = asked
    run = estimate(
        pipeline.model.transformer,
        *pipeline.model.geometry.size,
        sampling=pipeline.model.preset.sampling,
        cache=pipeline.model.preset.cache,
        frames=1,
    )
    held = sum(tensor.nbytes for part in (pipeline.model, pipeline.vae) for tensor in part.parameters())
    assert device == torch.device("cpu") and 2**40 - room >= held + run.activations + run.cache
    assert 2**40 - room < 2 * (held + run.device + pipeline.vae.decode_bytes(*pipeline.model.geometry.size))


def test_a_video_is_that_of_a_session_with_the_same_choices(folder, loras, tmp_path, sessions):
    cache = CacheConfig(4, sink=1, positions="window", storage="int8", offload=True)
    chosen = dict(cache=cache, execution=ExecutionConfig(backend="native"), seed=3)
    pipeline = Pipeline.load(folder, storage="float8", loras=[(loras[0], 0.7)])
    pipeline.generate(PROMPT, tmp_path / "video.mp4", **SIZE, **chosen)
    ((options, ours),) = sessions
    assert weights_of(pipeline.model.transformer).storage == "float8"
    assert (options["cache"], options["execution"]) == (cache, ExecutionConfig(backend="native"))

    model = load_model(folder, storage="float8")
    with applied_loras(model, [(load_lora(loras[0]), 0.7)]):
        size = {name: SIZE[name] for name in ("height", "width")}
        with RollingSession(model, pipeline.text_encoder.encode([PROMPT]), **size, cache=cache) as theirs:
            list(theirs.generate(1, seed=3))
    assert torch.equal(ours.state.latents(), theirs.state.latents())
    assert read_video_info(tmp_path / "video.mp4").frames == 9


def test_offloaded_weights_make_the_same_video(folder, loras, tmp_path, sessions):
    states = []
    for offload in (False, True):
        pipeline = Pipeline.load(folder, loras=[(loras[0], 0.7)], offload=offload)
        pipeline.generate(PROMPT, tmp_path / f"{offload}.mp4", **SIZE, seed=3)
        states.append(sessions[-1][1].state)
        assert (offloaded_blocks(pipeline.model.transformer) is not None) == offload
    assert torch.equal(states[0].latents(), states[1].latents())


def test_a_recomputed_context_is_made_with_the_same_vae(folder, tmp_path, sessions, monkeypatch):
    cache, counted = CacheConfig(6, context="recomputed"), []
    monkeypatch.setattr(pipeline_module, "check_fits", lambda *_, decoding, **__: counted.append(decoding))
    pipeline = Pipeline.load(folder)
    for seconds in (0.2, 1.7):
        pipeline.generate(PROMPT, tmp_path / "video.mp4", **SIZE | {"seconds": seconds}, cache=cache)
    ours = sessions[-1][1].state
    assert len(ours.records) == 3 and read_video_info(tmp_path / "video.mp4").frames == 33
    assert counted[1] == 2 * counted[0]  # a second stream, for the context
    prompt, size = pipeline.text_encoder.encode([PROMPT]), dict(height=32, width=32)
    with RollingSession(pipeline.model, prompt, **size, cache=cache, vae=pipeline.vae) as theirs:
        list(theirs.generate(3))
    assert torch.equal(ours.latents(), theirs.state.latents())


def test_a_tiny_decoder_makes_the_same_video_in_its_own_pictures(folder, tmp_path, sessions, caplog):
    torch.manual_seed(0)
    tiny = Taehv(16, (8, 6, 4, 4), (1, 2, 2), 1)
    save_file(tiny.state_dict(), tmp_path / "taew2_1.safetensors")
    pipeline = Pipeline.load(folder, vae=tmp_path / "taew2_1.safetensors")
    assert "taew2_1.safetensors is a tiny decoder" in caplog.text
    pipeline.generate(PROMPT, tmp_path / "video.mp4", **SIZE, scale=2)
    latents = sessions[-1][1].state.latents().float()
    with torch.inference_mode():
        frames = torch.cat(list(tiny.stream().decode_frames(latents)), dim=2)
    with VideoWriter(tmp_path / "expected.mp4", 32, 32, scale=2) as writer:
        writer.write(frames)
    shown, expected = (read_frames(tmp_path / name).float() for name in ("video.mp4", "expected.mp4"))
    assert shown.shape == expected.shape and (shown - expected).abs().max() <= 2
    Image.new("RGB", (32, 32)).save(tmp_path / "start.png")
    for refused in ({"image": tmp_path / "start.png"}, {"cache": CacheConfig(6, context="recomputed"), "seconds": 1.7}):
        with pytest.raises(ValueError, match="cannot encode.*load Wan 2.1's VAE"):
            pipeline.generate(PROMPT, tmp_path / "other.mp4", **SIZE | refused)
    assert not any("other" in path.name for path in tmp_path.iterdir())


def test_offloaded_weights_cannot_be_compiled(folder, tmp_path):
    pipeline = Pipeline.load(folder, offload=True)
    with pytest.raises(ValueError, match="compile cannot go with weights in CPU memory"):
        pipeline.generate(PROMPT, tmp_path / "video.mp4", **SIZE, execution=ExecutionConfig(compile=True))
    assert not any(tmp_path.iterdir())


def test_a_model_with_the_latents_of_wan_2_2_makes_its_own_rate_and_size(folder, tmp_path):
    main(["make-tiny", str(tmp_path / "tiny"), "--channels", "48"])
    generate(tmp_path / "tiny", tmp_path / "video.mp4", "--seconds", 0.4)
    info = read_video_info(tmp_path / "video.mp4")
    assert (info.frames, info.width, info.height, info.fps) == (13, 32, 32, 24)  # two chunks of 2: 0.4 s are 10 frames
    with pytest.raises(SystemExit, match="tiny: there is no such file"):
        generate(tmp_path / "tiny", tmp_path / "video.mp4", "--image", tmp_path / "tiny")
    with pytest.raises(CheckpointError, match="the Wan 2.1 VAE, with 16 latent channels.* Wan 2.2 5B, with 48"):
        Pipeline.load(tmp_path / "tiny", vae=folder)


def test_the_marker_of_a_shot_is_said_in_its_first_chunk_alone(tmp_path, sessions):
    folder = make_tiny(tmp_path / "tiny", geometry=GEOMETRIES[48])
    pipeline = Pipeline.load(folder)
    marked = f"The scene transitions. {PROMPT}"
    pipeline.generate(marked, tmp_path / "video.mp4", height=32, width=32, seconds=0.4)
    ((_, session),) = sessions
    assert [record.prompt for record in session.state.records] == [0, 1]
    assert all(map(torch.equal, session.state.prompts, map(pipeline.text_encoder.encode, ([marked], [PROMPT]))))


@pytest.mark.parametrize("channels, frames, given", [(16, 1 + 3, [0, 0]), (48, 2, [1])], ids=["Wan 2.1", "Wan 2.2"])
def test_a_video_starts_with_an_image(channels, frames, given, tmp_path, sessions):
    """As the family has it: a chunk of its own, or the first frame of the first full chunk."""
    folder = make_tiny(tmp_path / "tiny", geometry=GEOMETRIES[channels])
    colours = torch.zeros(1, 3, 1, 40, 60)
    colours[:, 0], colours[:, 2, :, :, 30:] = 0.8, -0.8
    with VideoWriter(tmp_path / "start.mp4", 60, 40, crf=1) as writer:
        writer.write(colours)
    generate(folder, tmp_path / "video.mp4", "--image", tmp_path / "start.mp4")
    ((_, session),) = sessions
    state, vae = session.state, load_vae(folder)
    assert state.frames == frames and [record.given for record in state.records] == given
    picture = read_picture(tmp_path / "start.mp4", 32, 32)
    assert torch.allclose(to_raw(state.latents()[:, :, :1].float()), vae.encode_video(picture), atol=1e-4)
    assert read_video_info(tmp_path / "video.mp4").frames == GEOMETRIES[channels].pixel_frames(frames)


@pytest.fixture
def film(tmp_path):
    """A video of 1.25 s at 24 frames a second, 60x40."""
    return write_clip(tmp_path / "film.mp4", greys(30, 40, 60), 24)


def latents_of(folder, film, take="all", seconds=0.0):
    """What a model of Wan 2.1 sees of a film."""
    clip = Clip.of(Footage.open(film), Fitting(32, 32), WAN_21, take, seconds)
    return to_model(load_vae(folder).encode_video(torch.cat(list(clip.frames()), 2)))


@pytest.mark.parametrize("options, frames", [((), 5), (("--last-seconds", 0.5), 3)], ids=["all", "last"])
def test_a_video_is_extended(options, frames, folder, film, tmp_path, sessions, capsys):
    """It is in the file, and in the state, in front of what follows."""
    generate(folder, tmp_path / "video.mp4", "--video", film, "--state-out", tmp_path / "state.safetensors", *options)
    assert capsys.readouterr().out.startswith("60x40 at 24 fps -> 32x32 at 16 fps, cropped 33 %, ")
    ((_, session),) = sessions
    given = latents_of(folder, film, *(("last", 0.5) if options else ()))
    torch.testing.assert_close(session.state.latents()[:, :, :frames], given, atol=1e-4, rtol=0)
    assert [record.seed for record in session.state.records] == [None] * len(SamplingConfig().prefill_sizes(frames)) + [
        0
    ]
    assert read_state(tmp_path / "state.safetensors").frames == frames + 3
    assert read_video_info(tmp_path / "video.mp4").frames == WAN_21.pixel_frames(frames + 3)
    shown = load_vae(folder).decoder().decode(to_raw(session.state.latents()))
    assert (read_frames(tmp_path / "video.mp4").float() - to_uint8(shown[0]).permute(1, 2, 3, 0)).abs().mean() < 20


def test_a_video_is_made_anew_and_a_run_that_was_cancelled_goes_on_along_it(folder, film, tmp_path, sessions):
    pipeline = Pipeline.load(folder)
    anew = dict(height=32, width=32, video=film, strength=0.5, cache=CacheConfig(6, 1))
    film = write_clip(film, greys(60, 40, 60), 24)  # 37 frames: 10 latent frames, 3 chunks
    pipeline.generate(PROMPT, tmp_path / "whole.mp4", **anew, state_out=tmp_path / "whole.safetensors")
    whole = load_state(tmp_path / "whole.safetensors", pipeline.model)
    with RollingSession(
        pipeline.model, pipeline.text_encoder.encode([PROMPT]), height=32, width=32, cache=anew["cache"]
    ) as session:
        list(session.generate(3, source=latents_of(folder, film), strength=0.5))
    assert whole.frames == 9 and torch.equal(whole.latents(), session.state.latents())

    def cancel(done, total):
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as stopped:
        pipeline.generate(PROMPT, tmp_path / "part.mp4", **anew, on_pass=cancel)
    continued = dict(state_in=stopped.value.state, seconds=stopped.value.left, state_out=tmp_path / "then.safetensors")
    pipeline.generate(PROMPT, tmp_path / "part.mp4", **anew, **continued)
    assert torch.equal(load_state(tmp_path / "then.safetensors", pipeline.model).latents(), whole.latents())
    assert read_video_info(tmp_path / "part.mp4").frames == 33


@pytest.mark.parametrize("seconds", [1.5, 0])
def test_what_is_longer_than_the_video_is_refused(seconds, folder, film, tmp_path):
    with pytest.raises(
        ValueError, match="the video has 1.0625 s to be made anew, .* that is 1 chunks, fewer than asked"
    ):
        Pipeline.load(folder).generate(
            PROMPT, tmp_path / "video.mp4", height=32, width=32, seconds=seconds, video=film, strength=0.5
        )
    assert not (tmp_path / "video.mp4").exists()


# The command line


@pytest.mark.parametrize(
    "options, message",
    [
        (("--video", "film.mp4", "--image", "film.mp4"), "starts with a picture or with another video: give one"),
        (("--strength", 0.5), "there is no video: give one"),
        (("--last-seconds", 2), "there is no video of which the last seconds could be taken"),
        (("--video", "absent.mp4"), "absent.mp4: there is no such file"),
        (("--video", "film.mp4", "--strength", 2), "strength must be a number from 0 to 1, got 2"),
        (("--video", "film.mp4", "--background", "red"), "a colour is written as #"),
        (("--video", "film.mp4", "--preset", "rolling-forcing"), 'the sampler "rolling" starts from noise'),
        (
            ("--video", "film.mp4", "--strength", 0.5, "--preset", "rolling-forcing"),
            'need the sampler "renoise", and this is "rolling"',
        ),
    ],
)
def test_what_does_not_go_with_a_video_is_said(options, message, folder, film, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        generate(folder, "video.mp4", *options)
    assert not (tmp_path / "video.mp4").exists()


def generate(folder, output, *options):
    arguments = ["generate", "--prompt", PROMPT, "--model", folder, "--width", 32, "--height", 32, "--seconds", 0.2]
    main([str(value) for value in [*arguments, "--output", output, *options]])


def test_every_choice_is_an_option(folder, loras, tmp_path, sessions, monkeypatch):
    loaded = []
    load = Pipeline.load.__func__
    monkeypatch.setattr(
        Pipeline,
        "load",
        classmethod(lambda cls, model, **options: loaded.append(options) or load(cls, model, **options)),
    )
    options = ["--lora", loras[0], 0.5, "--lora", loras[1], "--weight-storage", "float8", "--backend", "native"]
    options += ["--window", 5, "--sink", 2, "--positions", "window", "--cache-storage", "float8", "--offload-cache"]
    generate(folder, tmp_path / "video.mp4", *options)
    assert loaded[0]["loras"] == [(loras[0], 0.5), (loras[1], 1.0)] and loaded[0]["storage"] == "float8"
    chosen, _ = sessions[0]
    assert chosen["cache"] == CacheConfig(5, 2, "window", "float8", True)
    assert chosen["execution"] == ExecutionConfig(backend="native")
    assert read_video_info(tmp_path / "video.mp4").frames == 9


def test_compile_reaches_the_session(folder, tmp_path, sessions, monkeypatch):
    compiled = []

    def compile(self, **_):
        compiled.append(self)
        self._compiled_call_impl = None  # runs as it is

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    generate(folder, tmp_path / "video.mp4", "--compile")
    ((options, session),) = sessions
    assert options["execution"].compile and compiled == list(session.model.transformer.blocks)


def test_a_gguf_file_takes_its_text_encoder_and_vae_from_elsewhere(folder, tmp_path, sessions):
    gguf = pytest.importorskip("gguf")
    from gguf_files import write_gguf

    weights = load_model(folder).transformer.state_dict()
    write_gguf(tmp_path / "tiny.gguf", weights, gguf.GGMLQuantizationType.Q8_0)
    assert "head.head.weight" in original_names(weights)
    generate(tmp_path / "tiny.gguf", tmp_path / "video.mp4", "--text-encoder", folder, "--vae", folder)
    ((_, session),) = sessions
    assert session.model.transformer.blocks[0].attn1.to_q.weight.dtype == torch.uint8
    with pytest.raises(SystemExit, match="tiny.gguf holds no text encoder: name one with --text-encoder"):
        generate(tmp_path / "tiny.gguf", tmp_path / "video.mp4")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--lora", "style.safetensors", "much"], "a file and a number, its strength; got style.safetensors much"),
        (["--lora", "a.safetensors", "1", "b.safetensors"], "Give --lora again"),
        (["--lora", "absent.safetensors"], "absent.safetensors: there is no such file"),
        (["--compile", "--offload-weights"], "compile cannot go with weights in CPU memory"),
        (["--backend", "_flash_3"], "_flash_3 is not installed"),
    ],
)
def test_what_cannot_work_is_said_before_the_model_is_loaded(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline_module, "load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match=message):
        generate(tmp_path, tmp_path / "video.mp4", "--text-encoder", tmp_path, "--vae", tmp_path, *options)


def test_a_schedule_makes_what_its_prompts_make_by_hand(folder, sessions, tmp_path):
    pipeline = Pipeline.load(folder)
    size = dict(height=32, width=32)
    schedule = "0.5: a blue square [recache]\n1: a red circle [cut]\n1.4: [end]"
    path = pipeline.generate(PROMPT, tmp_path / "video.mp4", schedule=schedule, seed=1, **size)
    ((_, session),) = sessions
    encode = pipeline.text_encoder.encode
    with RollingSession(pipeline.model, encode([PROMPT]), **size) as by_hand:
        for chunk in range(3):
            if chunk:
                words, switch = [("a blue square", "causal"), ("a red circle", "cut")][chunk - 1]
                by_hand.set_prompt(encode([words]), None, switch)
            list(by_hand.generate(1, seed=1))
    assert session.state.key == by_hand.state.key
    info = read_video_info(path)
    assert info.frames == pipeline.model.geometry.pixel_frames(9)
    said = f"0: {PROMPT}\n0.5625: a blue square [recache]\n1.3125: a red circle [cut]\n2.0625: [end]"
    assert info.metadata["schedule"] == said and info.metadata["prompt"] == PROMPT
    with pytest.raises(ValueError, match="neither a prompt nor a schedule"):
        pipeline.generate(None, tmp_path / "video.mp4", **size)


def test_each_prompt_of_a_schedule_is_encoded_once(folder, tmp_path, monkeypatch):
    pipeline = Pipeline.load(folder)
    encoded = []
    encode = type(pipeline.text_encoder).encode
    monkeypatch.setattr(
        type(pipeline.text_encoder), "encode", lambda self, texts: encoded.extend(texts) or encode(self, texts)
    )
    schedule = "0: a\n0.5: b\n1: a\n1.8: b [blend 2]\n3: c"
    pipeline.generate(None, tmp_path / "video.mp4", schedule=schedule, height=32, width=32, seconds=2.5)
    assert encoded == ["a", "b"]
