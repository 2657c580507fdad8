"""A batch on a real Ray: two actors, one of which is killed halfway, and jobs that cannot be made."""

import json
import os
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from rolling_kv.batch import Job, RayMaker, Settings, generate
from rolling_kv.batch.making import read_record
from rolling_kv.batch.on_ray import _Texts, _Videos
from rolling_kv.batch.running import LocalMaker
from rolling_kv.batch.texts import KnownTexts
from rolling_kv.text import load_text_encoder
from rolling_kv.tiny import make_tiny

WORKER = "_Videos"


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = make_tiny(tmp_path_factory.mktemp("models") / "tiny")
    return Settings(model=str(folder), width=32, height=32)


def kill_one_halfway(folder, killed):
    """Kill an actor as soon as a video of it is begun."""
    until = time.monotonic() + 240
    while time.monotonic() < until and not killed:
        for journal in folder.glob("*.journal"):
            for process in psutil.process_iter(["cmdline"]):
                if WORKER in " ".join(process.info["cmdline"] or []) and any(
                    file.path == str(journal) for file in process.open_files()
                ):
                    process.kill()
                    killed.append(journal.stem)
                    return
        time.sleep(0.005)


def test_twelve_jobs_on_two_actors_of_which_one_is_killed(settings, tmp_path, monkeypatch):
    # Half an hour without a new video ends a run of Ray Data by default; here it would be less than the actors take to start.
    context = pytest.importorskip("ray.data").DataContext.get_current()
    monkeypatch.setattr(context, "execution_no_progress_timeout_s", 1)
    jobs = [{"prompt": "a red circle", "seed": seed, "seconds": 2, "name": f"video {seed}"} for seed in range(10)]
    jobs.append({"prompt": "x", "image": "none.png", "name": "bad"})
    jobs.append({"prompt": "other", "name": "video 3"})
    out, killed = tmp_path / "out", []
    out.mkdir()
    killer = threading.Thread(target=kill_one_halfway, args=(out, killed), daemon=True)
    killer.start()
    maker = RayMaker(settings, str(out), workers=2, cpus=1, text_workers=1)
    records = generate(jobs, out, settings, maker=maker)
    killer.join(1)
    assert killed, "no actor was killed: nothing was tested"
    status = {record.name if not record.line else "line": record.status for record in records}
    assert status == {**{f"video {seed}": "done" for seed in range(10)}, "bad": "failed", "line": "refused"}
    (gone_on,) = [record for record in records if record.name == killed[0]]
    assert gone_on.continued_at > 0 and not list(out.glob("*.journal")) and not list(out.glob(".*"))

    index = [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]
    assert len(index) == 12 and [line["error"] for line in index if line["status"] != "done"]

    again = generate(jobs[:10], out, settings, maker=lambda _: pytest.fail("made twice"))
    assert all(record.found for record in again)
    for name in (killed[0], "video 7"):
        job = Job.read(next(job for job in jobs if job["name"] == name))
        (record,) = LocalMaker(settings, tmp_path)([job])
        assert (out / record.file).read_bytes() == (tmp_path / record.file).read_bytes()


def test_a_worker_that_cannot_begin_ends_the_batch_with_what_it_says(settings, tmp_path):
    """Where it went on, one machine without the model would fail all jobs of the others."""
    wrong = replace(settings, text_encoder=str(tmp_path / "none.safetensors"))
    row = {"job": np.array([json.dumps(asdict(Job(prompt="x", name="a")))])}
    told = _Videos(wrong, tmp_path, ".", "run")(row)
    assert "none.safetensors" in told["stopped"][0] and read_record(tmp_path, "a").status == "begun"
    texts = _Texts(wrong, tmp_path, ".", "run")(row)
    assert "none.safetensors" in texts["stopped"][0]
    assert "none.safetensors" in _Videos(settings, tmp_path, ".", "run")(texts)["stopped"][0]


def test_text_workers_that_die_while_they_load_end_the_batch_in_the_end(settings, tmp_path, monkeypatch):
    """Whichever jobs they die with; another one may still be loading."""

    def row(name):
        return {"job": np.array([json.dumps(asdict(Job(prompt="x", name=name)))])}

    def dies(*_, **__):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr("rolling_kv.batch.on_ray.load_text_encoder", dies)
        for name in "abc":
            with pytest.raises(SystemExit):
                _Texts(settings, tmp_path, ".", "run")(row(name))
    told = _Texts(settings, tmp_path, ".", "run")(row("d"))["stopped"][0]
    assert f"3 workers have died while they loaded the text encoder {settings.model}" in told
    assert not _Texts(settings, tmp_path, ".", "run", 2)(row("d"))["stopped"][0]
    assert not _Texts(settings, tmp_path, ".", "another run")(row("d"))["stopped"][0]
    assert len(list(tmp_path.glob(".*"))) == 3


def test_the_folder_of_a_batch_is_the_one_where_it_was_begun(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert RayMaker(settings, "out").folder == tmp_path / "out"


def test_names_of_files_mean_what_they_mean_where_the_batch_was_begun(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32), "red").save(tmp_path / "start.png")
    (tmp_path / "elsewhere").mkdir()
    row = {"job": np.array([json.dumps(asdict(Job(prompt="x", image="start.png", seconds=0.5, name="a")))])}
    begun_in = os.getcwd()
    monkeypatch.chdir(tmp_path / "elsewhere")
    told = _Videos(settings, Path("out"), begun_in, "run")(row)
    assert json.loads(told["record"][0])["status"] == "done" and (tmp_path / "out/a.mp4").is_file()


def test_prompts_that_were_encoded_elsewhere_are_the_same(settings):
    encoder = load_text_encoder(settings.model)
    known = KnownTexts.of(encoder, ["[cut] a", "b"], ["grey"], "[cut]")
    there = KnownTexts.unpacked(known.packed())
    for text in ("[cut] a", "b"):
        for mine, own in zip(there.encode_shot(text), encoder.encode_shot(text, "[cut]")):
            assert (mine is None and own is None) or mine.equal(own)
    assert there.encode(["grey"]).equal(encoder.encode(["grey"]))
