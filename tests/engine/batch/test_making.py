"""A batch in one process: each video is that of a single run, nothing is made twice, and what was begun goes on."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from rolling_kv.batch import Job, Settings, generate
from rolling_kv.batch import making as making_module
from rolling_kv.cli import main
from rolling_kv.growing import GrowingVideo
from rolling_kv.pipeline import Pipeline
from rolling_kv.sampling.journal import Journal
from rolling_kv.sampling.session import RollingSession
from rolling_kv.streaming import journal_place
from rolling_kv.tiny import make_tiny
from tools.comfyui.env import PACK

SIZE = {"width": 32, "height": 32}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return Settings(model=str(make_tiny(tmp_path_factory.mktemp("models") / "tiny")), **SIZE)


@pytest.fixture(scope="module")
def pipeline(settings):
    return settings.load()


@pytest.fixture(autouse=True)
def loaded(monkeypatch, pipeline):
    """The model is loaded once for all tests."""
    monkeypatch.setattr(Settings, "load", lambda *_: pipeline)


def jobs(count, **given):
    return [Job(prompt="a red circle", seed=seed, seconds=0.5, name=f"video {seed}", **given) for seed in range(count)]


def alone(pipeline, job, place):
    return pipeline.generate(job.prompt, place, height=32, width=32, seconds=job.seconds, seed=job.seed).read_bytes()


def test_videos_are_those_of_single_runs_and_are_made_once(settings, pipeline, tmp_path, monkeypatch):
    made = jobs(2)
    records = generate(made, tmp_path / "out", settings)
    assert [(record.name, record.status, record.found) for record in records] == [
        ("video 0", "done", False),
        ("video 1", "done", False),
    ]
    for job in made:
        assert (tmp_path / f"out/{job.name}.mp4").read_bytes() == alone(pipeline, job, tmp_path / "alone.mp4")
    index = [json.loads(line) for line in (tmp_path / "out/index.jsonl").read_text().splitlines()]
    assert [line["job"]["seed"] if "seed" in line["job"] else 0 for line in index] == [0, 1]
    monkeypatch.setattr(Settings, "load", lambda *_: pytest.fail("there was nothing to be made"))
    assert all(record.found for record in generate(made, tmp_path / "out", settings))


def test_what_fails_stops_nobody_is_told_and_is_tried_again(settings, tmp_path):
    good, bad = jobs(2)
    bad = replace(bad, image=str(tmp_path / "none.png"))
    records = generate([bad, good, {"prompt": ""} | {"seed": "x"}], tmp_path / "out", settings)
    assert [record.status for record in records] == ["failed", "done", "refused"]
    assert "none.png" in records[0].error and records[2].line == 3
    from PIL import Image

    Image.new("RGB", (32, 32), "red").save(tmp_path / "none.png")
    again = generate([bad, good], tmp_path / "out", settings)
    assert [(record.status, record.found) for record in again] == [("done", False), ("done", True)]


def test_a_name_is_of_one_job_with_its_settings_alone(settings, tmp_path):
    (job,) = jobs(1)
    generate([job], tmp_path, settings)
    before = (tmp_path / "video 0.mp4").read_bytes()
    for other in (replace(job, seed=9), job):
        (record,) = generate([other], tmp_path, settings if other is not job else replace(settings, guidance=2.0))
        assert record.status == "failed" and "another job" in record.error
    (tmp_path / "mine.mp4").write_bytes(b"mine")
    (record,) = generate([replace(job, name="mine")], tmp_path, settings)
    assert record.status == "failed" and "no mine.json beside it" in record.error
    assert (tmp_path / "mine.mp4").read_bytes() == b"mine" and (tmp_path / "video 0.mp4").read_bytes() == before
    (found,) = generate([job], tmp_path, settings)
    assert found.found


def test_the_index_tells_of_earlier_runs_too(settings, tmp_path):
    first, second = jobs(2)
    generate([second], tmp_path, settings)
    generate([first], tmp_path, settings)
    assert [json.loads(line)["name"] for line in (tmp_path / "index.jsonl").read_text().splitlines()] == [
        "video 0",
        "video 1",
    ]


def test_a_deleted_or_cut_video_is_made_again(settings, tmp_path):
    (job,) = jobs(1)
    generate([job], tmp_path, settings)
    video = tmp_path / "video 0.mp4"
    whole = video.read_bytes()
    for damage in (video.unlink, lambda: video.write_bytes(whole[:100])):
        damage()
        (record,) = generate([job], tmp_path, settings)
        assert (record.status, record.found) == ("done", False) and video.read_bytes() == whole


def interrupted(after):
    """An on_pass that fails before model pass number `after`."""

    def on_pass(done, total):
        if done == after:
            raise RuntimeError("the machine is gone")

    return on_pass


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("after", [3, 6, 11])
def test_what_failed_on_the_way_goes_on_and_becomes_the_same_video(
    settings, pipeline, tmp_path, monkeypatch, after, kept
):
    job = replace(jobs(1)[0], seconds=1.5, save_state=kept)
    whole = alone(pipeline, job, tmp_path / "alone.mp4")
    real = Pipeline.generate
    monkeypatch.setattr(Pipeline, "generate", lambda *a, **k: real(*a, **k, on_pass=interrupted(after)))
    (record,) = generate([job], tmp_path / "out", settings)
    assert record.status == "failed" and "the machine is gone" in record.error
    monkeypatch.setattr(Pipeline, "generate", real)
    (record,) = generate([job], tmp_path / "out", settings)
    assert record.status == "done" and bool(record.continued_at) == (after > 4)
    assert (tmp_path / "out/video 0.mp4").read_bytes() == whole
    left = {file.name for file in (tmp_path / "out").iterdir()}
    assert left == {"video 0.mp4", "video 0.json", "index.jsonl"} | ({"video 0.safetensors"} if kept else set())


def test_a_run_that_was_killed_is_gone_on_with(settings, pipeline, tmp_path):
    """Also where all chunks were made, and only the file was not finished."""
    job = replace(jobs(1)[0], seconds=1.5)
    whole, out = alone(pipeline, job, tmp_path / "alone.mp4"), tmp_path / "out"
    (tmp_path / "jobs.jsonl").write_text(json.dumps(job.said()))
    command = ["-m", "rolling_kv", "batch", tmp_path / "jobs.jsonl", "--out", out, "--model", settings.model]
    command += ["--width", "32", "--height", "32", "--device", "cpu"]
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=PACK, stderr=subprocess.DEVNULL)
    while not journal_place(out / "video 0.mp4").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert journal_place(out / "video 0.mp4").exists()
    (record,) = generate([job], out, settings)
    assert record.continued_at > 0 and (out / "video 0.mp4").read_bytes() == whole


def test_a_video_whose_chunks_are_all_there_is_finished(settings, pipeline, tmp_path, monkeypatch):
    job, out = replace(jobs(1)[0], seconds=1.5), tmp_path / "out"
    whole = alone(pipeline, job, tmp_path / "alone.mp4")

    class Full(OSError):
        pass

    def full(*_):
        raise Full("the disk is full")

    monkeypatch.setattr("rolling_kv.growing.GrowingVideo.finish", full)
    (record,) = generate([job], out, settings)
    assert record.status == "failed" and "the disk is full" in record.error
    monkeypatch.undo()
    monkeypatch.setattr(Settings, "load", lambda *_: pipeline)
    (record,) = generate([job], out, settings)
    assert record.status == "done" and 0 < record.continued_at < record.seconds
    assert (out / "video 0.mp4").read_bytes() == whole


def test_states_go_from_job_to_job(settings, pipeline, tmp_path):
    first = replace(jobs(1)[0], save_state=True)
    generate([first], tmp_path, settings)
    second = Job(prompt="a blue square", state_in=str(tmp_path / "video 0.safetensors"), seconds=0.5, name="second")
    (record,) = generate([second], tmp_path, settings)
    assert record.seconds > 1
    expected = pipeline.generate(
        "a blue square", tmp_path / "x.mp4", height=32, width=32, seconds=0.5, state_in=second.state_in
    )
    assert (tmp_path / "second.mp4").read_bytes() == expected.read_bytes()


def test_shards_write_one_index(settings, tmp_path):
    for number in range(2):
        generate(jobs(3), tmp_path, settings, shard=(number, 2))
        names = [json.loads(line)["name"] for line in (tmp_path / "index.jsonl").read_text().splitlines()]
        assert names == [["video 0", "video 2"], ["video 0", "video 1", "video 2"]][number]


def test_the_command_says_what_became_of_each(settings, tmp_path, capsys):
    lines = [json.dumps(jobs(1)[0].said()), "x", json.dumps({"prompt": "x", "image": "none.png", "name": "bad"})]
    (tmp_path / "jobs.jsonl").write_text("\n".join(lines))
    command = ["batch", str(tmp_path / "jobs.jsonl"), "--out", str(tmp_path / "out"), "--model", settings.model]
    command += ["--width", "32", "--height", "32"]
    with pytest.raises(SystemExit, match="1"):
        main(command)
    out, err = capsys.readouterr()
    assert out.startswith("1 made, 0 there already, 2 failed: ")
    assert "line 2: the line is no JSON" in err and "bad: " in err and "none.png" in err
    (tmp_path / "jobs.jsonl").write_text(lines[0])
    main([*command, "--shard", "0/1"])
    assert capsys.readouterr().out.startswith("0 made, 1 there already, 0 failed: ")


def test_every_video_is_encoded_as_the_settings_say_and_known_by_what_it_shows(settings, tmp_path, monkeypatch):
    real, asked = Pipeline.generate, []

    def noted(*args, encoder, **options):
        asked.append(encoder)
        return real(*args, **options)

    monkeypatch.setattr(Pipeline, "generate", noted)
    generate(jobs(1), tmp_path, replace(settings, encoder="h264_nvenc"))
    (record,) = generate(jobs(1), tmp_path, settings)
    assert asked == ["h264_nvenc"] and record.found
    with pytest.raises(ValueError, match="the encoder must be one of x264, h264_nvenc, hevc_nvenc, got 'h263'"):
        generate(jobs(1), tmp_path, replace(settings, encoder="h263"))


def test_ctrl_c_says_how_to_go_on_and_loses_nothing(settings, pipeline, tmp_path, monkeypatch):
    made = [replace(job, seconds=1.5) for job in jobs(2)]
    whole, real, passes = alone(pipeline, made[1], tmp_path / "alone.mp4"), Pipeline.generate, iter(range(1000))

    def cancelled(done, total):
        if next(passes) == 22:  # of the second video
            raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "generate", lambda *a, **k: real(*a, **k, on_pass=cancelled))
    (tmp_path / "jobs.jsonl").write_text("\n".join(json.dumps(job.said()) for job in made))
    command = ["batch", str(tmp_path / "jobs.jsonl"), "--out", str(tmp_path / "out"), "--model", settings.model]
    command += ["--width", "32", "--height", "32"]
    with pytest.raises(SystemExit, match="cancelled: 1 of 2 videos are there; the same command"):
        main(command)
    monkeypatch.setattr(Pipeline, "generate", real)
    first, second = generate(made, tmp_path / "out", settings)
    assert first.found and second.continued_at > 0
    assert (tmp_path / "out/video 1.mp4").read_bytes() == whole


def test_a_single_chunk_that_is_there_and_no_video_of_it_is_made_again(settings, pipeline, tmp_path, monkeypatch):
    (job,) = jobs(1)
    whole, real = alone(pipeline, job, tmp_path / "alone.mp4"), GrowingVideo.finish
    monkeypatch.setattr(GrowingVideo, "finish", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
    (record,) = generate([job], tmp_path / "out", settings)
    assert record.status == "failed" and journal_place(tmp_path / "out/video 0.mp4").exists()
    monkeypatch.setattr(GrowingVideo, "finish", real)
    (record,) = generate([job], tmp_path / "out", settings)
    assert record.status == "done" and (tmp_path / "out/video 0.mp4").read_bytes() == whole
    assert not list((tmp_path / "out").glob("*.journal"))


def test_a_run_that_was_killed_while_it_read_the_given_video_begins_anew(settings, pipeline, tmp_path):
    """What it had read is less than what was given, and the rest of it would be made up."""
    given, out = tmp_path / "given.mp4", tmp_path / "out"
    pipeline.generate("a red circle", given, height=32, width=32, seconds=1.5)
    (job,) = jobs(1, video=str(given))
    with pytest.raises(SystemExit):
        making_module.make(job, settings, out, lambda: (_ for _ in ()).throw(SystemExit))
    session = RollingSession(pipeline.model, torch.zeros(1, 8, pipeline.model.config.text_dim), height=32, width=32)
    with session:
        session.prefill(torch.zeros(1, pipeline.model.geometry.channels, 3, *session.latent_size))
    with Journal(journal_place(out / "video 0.mp4")) as journal:
        journal.add(session.state)
    (record,) = generate([job], out, settings)
    expected = pipeline.generate(job.prompt, tmp_path / "x.mp4", height=32, width=32, seconds=0.5, video=given)
    assert (record.status, record.continued_at) == ("done", 0)
    assert (out / "video 0.mp4").read_bytes() == expected.read_bytes()


def test_two_batches_at_once_do_not_touch_each_others_videos(settings, pipeline, tmp_path, monkeypatch):
    """The second one comes when all chunks of the first one's are made, and only the file is not finished."""
    (job,) = jobs(1)
    whole, real, second = alone(pipeline, job, tmp_path / "alone.mp4"), GrowingVideo.finish, []

    def finish(video):
        monkeypatch.setattr(GrowingVideo, "finish", real)
        second.extend(generate([job], tmp_path / "out", settings))
        return real(video)

    monkeypatch.setattr(GrowingVideo, "finish", finish)
    (record,) = generate([job], tmp_path / "out", settings)
    assert second[0].status == "failed" and "is being written by another run" in second[0].error
    assert record.status == "done" and (tmp_path / "out/video 0.mp4").read_bytes() == whole


def test_a_state_of_which_nothing_is_known_is_no_ones_beginning(settings, pipeline, tmp_path):
    state, (job,) = tmp_path / "video 0.safetensors", jobs(1, save_state=True)
    pipeline.generate("other", tmp_path / "x.mp4", height=32, width=32, seconds=1.5, state_out=state)
    before = state.read_bytes()
    for given in (job, replace(job, state_in=str(state))):
        (record,) = generate([given], tmp_path, settings)
        assert record.status == "failed" and "no video 0.json beside it" in record.error
    assert state.read_bytes() == before


def test_a_job_whose_state_is_gone_is_not_whole(settings, tmp_path):
    (job,) = jobs(1, save_state=True)
    generate([job], tmp_path, settings)
    (tmp_path / "video 0.safetensors").unlink()
    (record,) = generate([job], tmp_path, settings)
    assert (record.status, record.found) == ("done", False) and (tmp_path / "video 0.safetensors").is_file()


def test_a_job_that_its_workers_die_of_fails_in_the_end(settings, pipeline, tmp_path):
    (job,) = jobs(1)

    def dies():
        raise SystemExit

    for _ in range(3):
        with pytest.raises(SystemExit):
            making_module.make(job, settings, tmp_path, dies, "first run")
    record = making_module.make(job, settings, tmp_path, dies, "first run")
    assert record.status == "failed" and "3 workers have died" in record.error
    assert making_module.make(job, settings, tmp_path, lambda: pipeline, "second run").status == "done"


@pytest.mark.parametrize(("made", "said"), [("out", "is a file"), ("out/index.jsonl/", "is a folder")])
def test_a_folder_that_cannot_hold_the_videos_is_told_before_anything_is_made(
    settings, tmp_path, monkeypatch, made, said
):
    monkeypatch.setattr(Settings, "load", lambda *_: pytest.fail("loaded"))
    (tmp_path / made).mkdir(parents=True) if made.endswith("/") else (tmp_path / made).touch()
    with pytest.raises(OSError, match=said):
        generate(jobs(1), tmp_path / "out", settings)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shard", "2/2"], "from 0 to n - 1"),
        (["--shard", "x"], "--shard takes i/n"),
        (["--workers", "2"], "are Ray's"),
        (["--gpus", "0.5"], "are Ray's"),
        (["--ray", "--workers", "0"], "number of workers must be at least 1"),
        (["--ray", "--cpus", "nan"], "CPUs of a worker must be a number"),
        (["--window", "1", "--sink", "3"], "window"),
        (["--height", "0"], "height must be at least 1, got 0"),
    ],
)
def test_options_that_do_not_go_together_are_told_before_anything_is_loaded(
    settings, tmp_path, monkeypatch, options, said
):
    monkeypatch.setattr(Settings, "load", lambda *_: pytest.fail("loaded"))
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "x"}')
    with pytest.raises(SystemExit, match=said):
        main(
            ["batch", str(tmp_path / "jobs.jsonl"), "--out", str(tmp_path / "out"), "--model", settings.model, *options]
        )
    assert not list(tmp_path.glob("out/*.mp4"))


def test_a_record_that_is_damaged_counts_as_none(settings, tmp_path):
    (job,) = jobs(1)
    generate([job], tmp_path, settings)
    (tmp_path / "video 0.json").write_text("{")
    assert making_module.read_record(tmp_path, "video 0") is None
