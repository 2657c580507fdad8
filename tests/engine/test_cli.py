"""The command line: whatever is wrong is said in one line, and what ends the process leaves nothing behind."""

import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rolling_kv import cli
from rolling_kv.bench.figures import BenchError
from rolling_kv.bundled import BUNDLED, default_size
from rolling_kv.checkpoints.detect import PRESET_FILE
from rolling_kv.cli import main
from rolling_kv.config import ExecutionConfig
from rolling_kv.devices import usable_device
from rolling_kv.geometry import WAN_21
from rolling_kv.pipeline import Pipeline
from rolling_kv.planning import choices, outline
from rolling_kv.sampling.session import RollingSession
from rolling_kv.sampling.state_file import read_state
from rolling_kv.tiny import make_tiny
from rolling_kv.video import read_frames, read_video_info

ENGINE = Path(cli.__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny")


def said(arguments, capsys) -> str:
    """What a command that fails says."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code not in (0, None)
    text = ended.value.code if isinstance(ended.value.code, str) else capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == text.endswith("\n"), text
    return text


@pytest.mark.parametrize(
    "given, message",
    [
        (["--seconds", "nan"], "the length must be positive, got nan"),
        (["--seconds", "-1"], "the length must be positive"),
        (["--seconds", "inf"], "at most a year of video, got inf"),
        (["--seconds", "1e300"], "at most a year of video"),
        (["--seconds", "3e7", "--width", "8192", "--height", "8192"], "this video needs .* GiB of RAM"),
        (["--window", "2000000000"], "window must be at most 4096 latent frames"),
        (
            ["--window", "4096", "--width", "8192", "--height", "8192"],
            "this video needs .* of RAM, and .* are available",
        ),
        (
            ["--leaving", "ema", "--preset", "longlive", "--sink", "2"],
            "sink is 2 latent .* a chunk is 3: make the sink 3",
        ),
        (["--leaving", "memory"], 'leaving "memory" needs "window" positions'),
        (["--leaving", "blur"], "invalid choice"),
        (["--span", "21"], 'a span of 21 needs "window" positions'),
        (["--ema-alpha", "2"], "ema_alpha must be a number from 0 to 1, got 2"),
        (["--guidance", "nan"], "guidance_scale must be a number from 0 to 1000"),
        (["--guidance", "inf"], "guidance_scale must be a number from 0 to 1000"),
        (["--guidance", "-3"], "guidance_scale must be a number from 0 to 1000"),
        (["--scale", "100000"], "at most 16384 pixels"),
        (["--scale", "0"], "scale must be at least 1"),
        (["--width", "16400"], "at most 16384 pixels"),
        (["--width", "1000000000000000000000"], "at most 16384 pixels"),
        (["--width", "33"], "width must be a multiple of 16 pixels, got 33"),
        (["--height", "0"], "height must be a multiple of 16 pixels, got 0"),
        (["--width", "34", "--height", "66"], "height must be .* 16 pixels, got 66; .* 64 and 80, and width .* got 34"),
        (["--prompt", "fox \ud83e"], "half of a character"),
        (["--device", "evil"], "the device 'evil' cannot be used here"),
        (["--device", "meta"], "the device 'meta' cannot be used here"),
        (["--device", ""], "the device '' cannot be used here"),
        (["--device", "cpu", "--backend", "_native_cudnn"], "invalid choice: '_native_cudnn'"),
        (["--model", "/nonexistent"], "nonexistent: there is no such file or folder"),
        (["--model", os.devnull], "there is no such file or folder"),
        (["--model", "x" * 5000], "too long|no such file"),
        (["--output", "x" * 5000 + ".mp4"], "cannot write"),
        (["--output", "video.avi"], "must end in .mp4"),
        (["--output", "a\0b.mp4"], "zero character"),
        (["--window", "few"], "a number of latent frames or all"),
        (["--nonsense"], "unrecognized arguments: --nonsense .see"),
        (["--size=64x64"], "--size=64x64; is it --width and --height[?]"),
        (["--lenght=5"], "--lenght=5; is it --seconds[?]"),
        (["--guidence"], "--guidence; is it --guidance[?]"),
        (["a red circle"], "unrecognized arguments: a red circle; a prompt is given as --prompt TEXT"),
        (["--schedule", "0: a"], "leave the other prompt out"),
        (["--schedule", "2: a [recach]"], r"line 1: \[recach\] is none of .*: write \[recache\]"),
        (["--schedule", "2: a\nb"], "line 2: there is no time before `b`"),
        (["--schedule", "absent.txt"], "there is no schedule file absent.txt"),
        (["--schedule", "x" * 5000 + "\0"], "no character to read"),
        (
            ["--schedule", "0.1: a [cut]", "--seconds", "2", "--preset", "reward-forcing"],
            r"at 0.5625 s, \[cut\]: a .cut. at a",
        ),
    ],
)
def test_what_cannot_work_is_said_in_one_line(given, message, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    usual = {"--prompt": "x", "--output": "video.mp4", "--model": folder, "--width": 32, "--height": 32}
    usual |= {"--seconds": 0.2, "--device": "cpu"} | dict(zip(given[::2], given[1::2]))
    text = said(["generate", *(part for pair in usual.items() for part in pair), *given[len(given) & ~1 :]], capsys)
    assert re.search(message, text), text
    assert len(text) < 1200 and os.listdir(tmp_path) == []


@pytest.mark.parametrize("preset", ["auto", "memrope"])
def test_rules_that_do_not_go_together_are_told_before_anything_is_loaded(preset, folder, monkeypatch, capsys):
    monkeypatch.setattr(Pipeline, "load", lambda *_, **__: pytest.fail("it was loaded"))
    arguments = ["--prompt", "x", "--output", "x.mp4", "--model", folder, "--preset", preset, "--window", "7"]
    text = said(["generate", *arguments, "--sink", "5", "--device", "cpu"], capsys)
    assert re.search(r"a window of 7 latent frames cannot hold the sink \(5\).* at least (8|10)", text)


@pytest.mark.parametrize(
    "error, message",
    [
        (RuntimeError("first\nsecond\nthird"), "error: RuntimeError: first (--debug shows where)"),
        (AssertionError(), "error: AssertionError: no message (--debug shows where)"),
        (ValueError("two\nlines"), "error: two lines"),
        (MemoryError(), "error: there was not enough memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            "error: there was not enough memory",
        ),
        (OSError("x" * 10**6), "error: xxx"),
    ],
)
def test_any_error_is_one_line_and_debug_shows_where_it_arose(error, message, tmp_path, monkeypatch, capsys):
    def fail(args):
        raise error

    monkeypatch.setattr(cli, "_make_tiny", fail)
    text = said(["make-tiny", tmp_path], capsys)
    assert text.startswith(message) and len(text) < 1100
    with pytest.raises(type(error)):
        main(["make-tiny", str(tmp_path), "--debug"])


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("given", [["--prompt", "x", "--device", "cpu"], ["--promt", "x"]])
def test_an_error_that_all_processes_of_a_machine_share_is_said_once(given, number, monkeypatch, capsys):
    """By the first of each machine, before torchrun ends the others; what only another one has, by that one afterwards."""

    def fail(args, shards):
        raise ValueError("no")

    waited = []
    monkeypatch.setattr(cli, "shared_by_torchrun", lambda device: nullcontext((SimpleNamespace(first=False), device)))
    monkeypatch.setattr(cli, "_generate_on", fail)
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: waited.append(capsys.readouterr().err))
    monkeypatch.setenv("LOCAL_RANK", str(number))
    with pytest.raises(SystemExit) as ended:
        main(["generate", *given, "--output", "x.mp4"])
    assert waited == [""] * number and "error: " in (capsys.readouterr().err or ended.value.code)


def test_the_last_lines_of_another_program_stay_lines(monkeypatch, tmp_path):
    def fail(args):
        raise BenchError("its last words were:\nfirst\nsecond")

    monkeypatch.setattr(cli, "_make_tiny", fail)
    with pytest.raises(SystemExit, match="error: its last words were:\nfirst\nsecond"):
        main(["make-tiny", str(tmp_path)])


def test_every_command_takes_debug():
    for command in (["inspect", "x"], ["make-tiny", "x"], ["bench"], ["bench", "storage"], ["bench", "caching"]):
        assert cli._parser().parse_args([*command, "--debug"]).debug


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_a_device_that_is_not_there_is_refused_with_those_that_are(folder):
    with pytest.raises(ValueError, match=r"'cuda' cannot be used here \(.+\); these can: cpu"):
        usable_device("cuda")
    assert usable_device("cpu") == usable_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(ValueError, match="'cuda' cannot be used here"):
        Pipeline.load(folder, device="cuda")


def test_compiling_without_a_compiler_says_what_to_do(folder, tmp_path, monkeypatch, capsys):
    def no_compiler(graph, example_inputs):
        raise RuntimeError("No working C++ compiler found in CXX\n and so on")

    torch._dynamo.reset()
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: plain(self, backend=no_compiler, **options))
    arguments = ["generate", "--prompt", "x", "--output", tmp_path / "video.mp4", "--model", folder, "--compile"]
    text = said([*arguments, "--width", 32, "--height", 32, "--seconds", 0.2, "--device", "cpu"], capsys)
    torch._dynamo.reset()
    assert "torch.compile cannot make code here (No working C++ compiler found in CXX)" in text
    assert "turn compile off" in text and os.listdir(tmp_path) == []


def test_attention_kernels_for_cuda_are_refused_elsewhere(monkeypatch):
    ExecutionConfig(backend="native").check("cpu")
    monkeypatch.setattr("rolling_kv.config.execution._check_attention_backend_requirements", lambda backend: None)
    ExecutionConfig(backend="flash").check("cuda")
    for device in ("cpu", "mps"):
        with pytest.raises(ValueError, match=f"flash needs a CUDA GPU, but the model is on {device}: choose native"):
            ExecutionConfig(backend="flash").check(device)


# The process


def process(*arguments, code=None, folder=None, **environment) -> subprocess.CompletedProcess:
    """`python -m rolling_kv`, or `code`, in a process of its own; `folder` goes before the installed packages."""
    program = ["-c", code] if code else ["-m", "rolling_kv"]
    paths = os.pathsep.join(map(str, filter(None, (folder, ENGINE))))
    return subprocess.run(
        [sys.executable, *program, *map(str, arguments)],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": paths} | environment,
        stdin=subprocess.DEVNULL,
    )


ENDED_WHILE_WRITING = """
import os, signal, sys
from rolling_kv import __main__
from rolling_kv.atomic import replacing

def run():
    with replacing(sys.argv[1]) as part:
        os.kill(os.getpid(), int(sys.argv[2]))
        part.write_text("half")

__main__._run = run
__main__.main()
"""

posix = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


@posix
@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 1)])
def test_whatever_ends_the_process_leaves_nothing(name, code, tmp_path):
    (tmp_path / "video.mp4").write_text("earlier")
    handler = "default_int_handler" if name == "SIGINT" else "SIG_DFL"  # whatever runs the tests may ignore signals
    heeding = f"import signal; signal.signal(signal.{name}, signal.{handler})\n{ENDED_WHILE_WRITING}"
    ended = process(tmp_path / "video.mp4", int(getattr(signal, name)), code=heeding)
    assert ended.returncode == code and b"Traceback" not in ended.stderr
    assert os.listdir(tmp_path) == ["video.mp4"] and (tmp_path / "video.mp4").read_text() == "earlier"


@posix
def test_a_terminal_that_closes_under_nohup_ends_nothing(tmp_path):
    ignoring = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{ENDED_WHILE_WRITING}"
    assert process(tmp_path / "video.mp4", int(signal.SIGHUP), code=ignoring).returncode == 0
    assert (tmp_path / "video.mp4").read_text() == "half"


@posix
def test_an_interrupt_during_the_imports_shows_no_traceback(tmp_path):
    heeding = "import os, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    (tmp_path / "torch.py").write_text(f"{heeding}os.kill(os.getpid(), signal.SIGINT)\n")
    ended = process("inspect", "x", folder=tmp_path)
    assert (ended.returncode, ended.stderr.strip()) == (1, b"cancelled; nothing was written")


def test_inspect_tells_what_fits_a_card_and_proposes_it(folder, capsys):
    main(["inspect", str(folder), "--card", "12"])
    out = capsys.readouterr().out
    assert "on 12 GiB, 0.6 of them for CUDA, in bfloat16 at 832x480:" in out
    rows = [line for line in out.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 15 and all(row.endswith("| yes  |") for row in rows[1:])
    assert "proposed   --window 9 --weight-storage model --cache-storage model\n" in out
    assert "the text encoder UMT5-XXL takes 11.6 GiB in 16 bit while it encodes: it runs on the CPU instead" in out
    main(["inspect", str(folder), "--card", "7"])
    assert "takes 11.6 GiB in 16 bit, 7.3 GiB in float8 while" in capsys.readouterr().out
    main(["inspect", str(folder), "--card", "24"])
    assert "text encoder" not in capsys.readouterr().out
    main(["inspect", str(folder), "--card", "0.64"])
    assert "proposed   --window 9 --weight-storage model --cache-storage model\n" not in capsys.readouterr().out
    main(["inspect", str(folder), "--card", "0.5"])
    assert "nothing of these fits: make the picture smaller" in capsys.readouterr().out
    first = choices({"model": outline(folder, dtype="bfloat16")}, 480, 832, 2**40)[0]
    for missing, word in ((0, "yes"), (1, "not fast")):
        main(["inspect", str(folder), "--card", str((first.device + first.fast - missing) / 2**30)])
        rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
        assert rows[0].rstrip("| ").endswith(f"| {word}")
    for nonsense in ("nan", "inf", "1e300"):
        assert "--card is the memory of a GPU in GiB" in said(["inspect", folder, "--card", nonsense], capsys)


def test_the_bundled_model_is_known_by_any_of_its_paths(monkeypatch, capsys):
    monkeypatch.chdir(BUNDLED.parent.parent)
    assert default_size(Path("models/tiny")) == default_size(BUNDLED) == (64, 64)
    main(["inspect", "models/tiny"])
    assert "per latent frame in bfloat16 at 64x64" in capsys.readouterr().out


def test_a_copy_of_the_bundled_model_makes_its_size(tmp_path):
    (tmp_path / "transformer").mkdir()
    shutil.copy(BUNDLED / PRESET_FILE, tmp_path)
    assert default_size(tmp_path) == default_size(tmp_path / "transformer") == (64, 64)
    assert default_size(tmp_path / "absent") == default_size(tmp_path.parent) == WAN_21.size


@pytest.mark.parametrize(
    "given, page",
    [
        (["generate", "--output", "x.mp4", "--speed", "fast"], "rolling_kv generate"),
        (["bench", "--nonsense"], "rolling_kv bench"),
        (["bench", "kernels", "--nonsense"], "bench kernels"),
    ],
)
def test_an_unknown_option_leads_to_the_help_of_its_command(given, page, capsys):
    told = said(given, capsys)
    assert "unrecognized arguments: --" in told and told.endswith(f"{page} --help)\n")


def test_an_unknown_measurement_is_told_which_there_are(capsys):
    told = said(["bench", "list"], capsys)
    assert "argument [MEASUREMENT]: invalid choice: 'list' (choose from" in told and told.count("kernels") == 1


def test_inspect_tells_the_rules_of_the_preset(folder, tmp_path, capsys):
    file = tmp_path / "longlive.safetensors"
    file.write_bytes((folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes())
    main(["inspect", str(file)])
    assert (
        "chunks of 3, window 12 with a sink of 3, window computed anew at a switch, 4 steps" in capsys.readouterr().out
    )


def test_a_name_that_the_code_page_lacks_is_printed_all_the_same(folder, tmp_path):
    file = tmp_path / "модель.safetensors"
    file.write_bytes((folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes())
    told = process("inspect", file, PYTHONIOENCODING="cp1252")
    assert told.returncode == 0, told.stderr
    assert rb"\u043c\u043e\u0434\u0435\u043b\u044c.safetensors" in told.stdout


def test_a_schedule_is_printed_as_it_was_understood(folder, tmp_path, capsys):
    """From its file, with what people should know."""
    schedule = tmp_path / "schedule.txt"
    schedule.write_text('"0": "a red circle", "3": "a blue circle", "4": "a square"', encoding="utf-8")
    output = tmp_path / "video.mp4"
    arguments = ["--schedule", schedule, "--output", output, "--model", folder, "--seconds", "1", "--device", "cpu"]
    main(["generate", "--width", "32", "--height", "32", *map(str, arguments)])
    note, skipped, *lines = capsys.readouterr().out.splitlines()
    assert "FizzNodes' keyframes" in note
    assert skipped == 'Left out, as the next prompt begins with the same chunk: "a blue circle".'
    assert lines[:2] == ["0: a red circle [hold]", "0.5625: a square [hold]"]
    assert lines[2].endswith("21 frames, 32x32, 16 frames per second: 1.3125 s, in whole chunks")


def test_what_is_to_be_known_of_a_run_stands_on_lines_of_its_own(tmp_path, capsys):
    """The progress bar is drawn already."""
    usual = ["--output", str(tmp_path / "video.mp4"), "--seconds", "0.2", "--device", "cpu"]
    main(["generate", "--prompt", "a cat", "--width", "80", *usual])
    lines = re.split(r"[\r\n]+", capsys.readouterr().err)
    for text in (
        "This model knows pictures of 64x64 pixels alone. At 80x64",
        "Words that this tiny model does not know",
    ):
        assert [line for line in lines if text in line] == [line for line in lines if line.startswith(text)] != []


def test_without_prompt_and_schedule_nothing_is_loaded(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Pipeline, "load", lambda *_, **__: pytest.fail("loaded"))
    text = said(["generate", "--output", tmp_path / "video.mp4", "--model", folder], capsys)
    assert "give --prompt or --schedule" in text


# States


def video(folder, output, *options):
    size = [] if "--state-in" in options else ["--width", 32, "--height", 32]
    main([str(v) for v in ["generate", "--model", folder, "--output", output, "--device", "cpu", *size, *options]])


def interrupt_at(number):
    """What makes Ctrl-C come in that pass of a run."""
    passes = []

    def tick(self, total, whole=RollingSession._tick):
        passes.append(total)
        if len(passes) == number:
            os.kill(os.getpid(), signal.SIGINT)
        whole(self, total)

    return tick


SCHEDULE = "0: a red circle / 0.7: a blue circle [blend 3] / 3: a green square [cut] / 4: [end]"


def test_a_video_continued_from_a_state_is_the_one_made_at_once(folder, tmp_path, capsys):
    whole, part, state = tmp_path / "whole.mp4", tmp_path / "part.mp4", tmp_path / "video.safetensors"
    video(folder, whole, "--schedule", SCHEDULE, "--state-out", tmp_path / "whole.safetensors")
    video(folder, part, "--schedule", SCHEDULE, "--seconds", 2, "--state-out", state)
    assert read_video_info(part).frames < read_video_info(whole).frames
    video(folder, part, "--schedule", SCHEDULE, "--state-in", state, "--state-out", state)
    assert torch.equal(read_frames(part), read_frames(whole))
    ours, theirs = read_state(state), read_state(tmp_path / "whole.safetensors")
    assert ours.key == theirs.key and ours.texts == theirs.texts
    capsys.readouterr()
    assert "is the state of a video: --card tells" in said(["inspect", state, "--card", 12], capsys)
    main(["inspect", str(state)])
    told = capsys.readouterr().out
    assert "a red circle" in told and re.search(r"3\.5625 s +4\.3125 s +15 to 18 +0 +cut +a green square", told), told
    assert "32x32" in told and "prompt 1" in told  # a mixture has no text


@posix
@pytest.mark.parametrize("named", [True, False])
def test_ctrl_c_leaves_the_part_that_is_done_and_says_how_to_go_on(named, folder, tmp_path, monkeypatch):
    whole, part, kept = tmp_path / "whole.mp4", tmp_path / "part.mp4", tmp_path / "part.state.safetensors"
    options = ["--schedule", SCHEDULE]
    video(folder, whole, *options)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if named:
        kept = tmp_path / "kept.safetensors"
        options += ["--state-out", kept]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(RollingSession, "_tick", interrupt_at(9))
        video(folder, part, *options)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    done = read_state(kept)
    assert read_video_info(part).frames == done.pixel_frames < read_video_info(whole).frames
    said = ended.value.code
    assert said.startswith(f"cancelled: the {done.seconds:g} s that are done are in {part}")
    state_in, seconds = re.search(r"--state-in (\S+) --seconds (\S+)$", said).groups()
    video(folder, part, *options, "--state-in", state_in, "--seconds", seconds)
    assert torch.equal(read_frames(part), read_frames(whole))


@posix
def test_ctrl_c_before_the_first_chunk_leaves_nothing(folder, tmp_path, monkeypatch):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(RollingSession, "_tick", interrupt_at(1))
    with pytest.raises(SystemExit, match="cancelled; nothing was written"):
        video(folder, tmp_path / "video.mp4", "--schedule", SCHEDULE, "--state-out", tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == []


def test_an_error_on_the_way_keeps_the_video_so_far_and_its_state(folder, tmp_path, monkeypatch, caplog):
    def fail(self, total, passes=[]):  # noqa: B006
        passes.append(total)
        if len(passes) == 9:
            raise ValueError("no more")

    monkeypatch.setattr(RollingSession, "_tick", fail)
    with pytest.raises(SystemExit, match="error: no more"):
        video(folder, tmp_path / "video.mp4", "--schedule", SCHEDULE, "--state-out", tmp_path / "a.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "video.mp4"]
    done = read_state(tmp_path / "a.safetensors")
    assert done.frames and read_video_info(tmp_path / "video.mp4").frames == done.pixel_frames
    assert f"the {done.seconds:g} s that are done are in {tmp_path / 'video.mp4'}, and their state in" in caplog.text


def test_what_contradicts_a_state_is_said_before_anything_is_loaded(folder, tmp_path, monkeypatch, capsys):
    state, other = tmp_path / "a.safetensors", make_tiny(tmp_path / "other", seed=5)
    video(folder, tmp_path / "video.mp4", "--prompt", "x", "--seconds", 0.2, "--state-out", state)
    usual = ["generate", "--prompt", "x", "--output", tmp_path / "more.mp4", "--seconds", 0.2, "--device", "cpu"]
    identities = "made by the model tiny .*[0-9a-f]{16}.* here is tiny .*[0-9a-f]{16}"
    assert re.search(identities, said([*usual, "--model", other, "--state-in", state], capsys))
    monkeypatch.setattr(Pipeline, "load", lambda *_, **__: pytest.fail("it was loaded"))
    for given, message in (
        (["--state-in", state, "--width", 64], "holds a video of 32x32 pixels, and --width is 64: leave it out"),
        (["--state-in", state, "--image", "a.png"], "leave --image out"),
        (["--state-in", tmp_path / "video.mp4"], "no safetensors file"),
        (["--state-in", tmp_path / "absent.safetensors"], "there is no such file"),
        (["--state-out", tmp_path / "a.pt"], "must end in .safetensors"),
        (["--state-out", tmp_path], "is a folder"),
    ):
        assert re.search(message, said([*usual, "--model", folder, *given], capsys))
    assert not (tmp_path / "more.mp4").exists()
