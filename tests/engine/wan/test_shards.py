"""One video on several processes is the video of one, in as much less memory, and sends what the documentation counts."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from builders import tiny_transformer
from shard_cases import CASES, SIDE, made

from rolling_kv.cli import main
from rolling_kv.config import ExecutionConfig
from rolling_kv.sampling.state_file import read_state
from rolling_kv.step_cache import METHODS
from rolling_kv.tiny import make_tiny
from rolling_kv.video import read_frames
from rolling_kv.wan.shards import HeadShards, shared_by_torchrun
from tools.comfyui.env import PACK

HEADS = 4
CLOSE = 1e-5
PACKED = {"int8": 0.05, "float8": 0.05}
"""Where a rounding on the other side of a step shows: a part of the largest value."""


@pytest.fixture(scope="module")
def transformer():
    return tiny_transformer(num_attention_heads=HEADS, attention_head_dim=24)


def together(ranks, transformer, folder) -> dict[str, dict]:
    """What `shard_cases` tells of each case with so many processes."""
    torch.save(transformer, folder / "weights.pt")
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(PACK), str(PACK / "tests/support")]))
    given = map(str, (PACK / "tests/support/shard_cases.py", ranks, folder / "weights.pt", folder / "told.json"))
    ended = subprocess.run([sys.executable, *given], env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return json.loads((folder / "told.json").read_text())


@pytest.fixture(scope="module", params=[2, 4])
def told(request, transformer, tmp_path_factory):
    return request.param, together(request.param, transformer, tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize("name", CASES)
def test_several_processes_make_the_video_of_one(told, name):
    _, cases = told
    case = cases[name]
    assert case["same"], "the processes have different latents"
    assert case["error"] <= CLOSE * max(case["size"], 1) or case["error"] <= PACKED.get(name, 0) * case["size"]


@pytest.mark.parametrize("name", CASES)
def test_each_process_holds_its_part_of_the_cache(told, name):
    ranks, cases = told
    assert cases[name]["held"] * ranks == cases[name]["whole"] > 0


def test_bytes_sent_are_those_of_the_formula(told, transformer):
    """Six chunks of two steps, and a context pass behind all but the last: (1 - 1/n) / n of q, k, v and what comes of them."""
    ranks, cases = told
    tokens, dim, layers = 3 * (SIDE // 16) ** 2, HEADS * 24, len(transformer.blocks)
    part = tokens * dim * 4 * (ranks - 1) // ranks // ranks
    flow = tokens // ranks * 64 * 4 * (ranks - 1)
    denoising, context = layers * 4 * part + flow, (layers - 1) * 4 * part + 2 * part
    assert cases["plain"]["sent"] == 12 * denoising + 5 * context


def test_processes_with_other_seeds_are_all_told_where_they_would_mix_their_videos(told):
    ranks, cases = told
    assert cases["seeds"]["refused"] == [1] * ranks


def test_a_process_without_a_gpu_of_its_own_is_told(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="there are 2 GPUs on this machine, and 4 processes or more"):
        shared_by_torchrun(torch.device("cuda")).__enter__()


class Alone(HeadShards):
    """As many processes, of which only this one is asked."""

    def __init__(self, ranks):
        self.group, self.rank, self.ranks, self.sent = None, 0, ranks, 0


def test_what_cannot_be_shared_out_evenly_is_refused_with_the_counts_that_work(transformer):
    with pytest.raises(ValueError, match="4 heads and 16 tokens a frame .* among 3 processes: take one of 1, 2, 4"):
        made(transformer, Alone(3), {})
    with pytest.raises(ValueError, match="among 8 processes"):
        made(transformer, Alone(8), {})


def test_what_several_processes_cannot_do_is_refused(transformer):
    with pytest.raises(ValueError, match="step cache judges by what one process sees"):
        made(transformer, Alone(2), {"step_cache": next(iter(METHODS.values()))()})
    with pytest.raises(ValueError, match="passes of one process"):
        made(transformer, Alone(2), {"execution": ExecutionConfig(cuda_graphs=True)})


def test_diffusers_own_parallelism_is_refused_where_it_would_be_wrong_in_silence(told):
    ranks, cases = told
    assert cases["diffusers"]["refused"] == [1] * ranks


def generating(folder, output, seconds="0.5") -> list[str]:
    """The arguments of a command."""
    given = ["generate", "--prompt", "a red circle", "--model", folder, "--output", output, "--width", "64"]
    return list(map(str, [*given, "--height", "64", "--seconds", seconds, "--device", "cpu"]))


def generate(folder, output, *launcher, **options):
    command = [sys.executable, *launcher, "-m", "rolling_kv", *generating(folder, output, **options)]
    return subprocess.Popen(command, cwd=PACK, stderr=subprocess.PIPE, text=True)


def torchrun(ranks):
    return "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)


def test_torchrun_makes_the_video_that_one_process_makes(tmp_path):
    folder = make_tiny(tmp_path / "tiny")
    main(generating(folder, tmp_path / "alone.mp4"))
    process = generate(folder, tmp_path / "together.mp4", *torchrun(2))
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    alone, together = (torch.cat(list(read_frames(tmp_path / f"{name}.mp4"))) for name in ("alone", "together"))
    assert alone.shape == together.shape and (alone.int() - together.int()).abs().max() <= 4


def test_ctrl_c_ends_all_processes_at_one_pass_and_keeps_what_is_done(tmp_path):
    folder = make_tiny(tmp_path / "tiny")
    process = generate(folder, tmp_path / "long.mp4", *torchrun(2), seconds="600")
    until = time.monotonic() + 240
    while not (tmp_path / "long.journal").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert "cancelled: the " in error and (tmp_path / "long.mp4").is_file(), error
    assert read_state(tmp_path / "long.state.safetensors").frames >= 3
    assert not list(tmp_path.glob("*.journal"))
