"""What a job may be, and what is said of the others."""

import json
from dataclasses import fields

import pytest

from rolling_kv.batch.jobs import LONGEST_NAME, Job, checked_jobs, read_jobs, shard_of

FULL = {
    "name": "A video (2)",
    "prompt": "a red circle",
    "schedule": "2: a blue square [cut]",
    "negative_prompt": "grey",
    "seed": 7,
    "seconds": 2,
    "width": 64,
    "height": 48,
    "video": "a.mp4",
    "strength": 0.5,
    "last_seconds": 1.5,
    "fit": "pad",
    "background": "#ffffff",
    "state_in": "s.safetensors",
    "save_state": True,
}


def test_a_line_says_all_that_a_job_has_and_is_written_as_it_was_read():
    job = Job.read(FULL)
    assert job.said() == FULL
    assert set(FULL) | {"image"} == {field.name for field in fields(Job)}
    assert job.texts == ("a red circle", "a blue square")


def test_a_job_without_a_name_gets_one_of_its_own_that_stays():
    one, again, other = (Job(prompt="A red circle, moving!", seed=seed) for seed in (1, 1, 2))
    assert one.name == again.name != other.name
    assert one.name.startswith("a-red-circle-moving-")
    assert Job(prompt="圆").name and Job(prompt="").name


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "neither a prompt nor a schedule"),
        ({"prompt": 3}, "prompt must be a text"),
        ({"prompt": "x", "seed": True}, "seed must be a whole number"),
        ({"prompt": "x", "seed": -1}, "seed must not be negative"),
        ({"prompt": "x", "seconds": 0}, "has to end"),
        ({"prompt": "x", "seconds": float("nan")}, "seconds must be a number"),
        ({"prompt": "x", "seconds": "5"}, "seconds must be a number"),
        ({"prompt": "x", "promt": "y"}, "there is no 'promt' in a job; there are name, prompt"),
        ({"prompt": "x", "fit": "zoom"}, "fit must be one of"),
        ({"prompt": "x", "background": "reddish"}, "reddish"),
        ({"prompt": "x", "image": "a.png", "video": "b.mp4"}, "image or video"),
        ({"prompt": "x", "state_in": "s", "image": "a.png"}, "has its beginning already"),
        ({"prompt": "x", "schedule": "0: y"}, "leave the other prompt out"),
        ({"schedule": "0: x [jump]"}, "jump"),
        ({"prompt": "x", "name": "../x"}, "is none for a file"),
        ({"prompt": "x", "name": "x" * (LONGEST_NAME + 1)}, "is none for a file"),
        ({"prompt": "x", "name": "con.mp4"}, "is none for a file"),
        ({"prompt": "x", "name": " x"}, "is none for a file"),
        ({"prompt": "x", "name": ".x"}, "is none for a file"),
        ({"prompt": "x", "name": "x\n"}, "is none for a file"),
        ({"prompt": "x", "name": "圆" * 100}, "too long for a file: its letters take 300 bytes"),
        ({"prompt": "x", "name": "y.growing"}, "belong to a video under way"),
        ({"prompt": "x", "name": "y.State"}, "belong to a video under way"),
        ({"prompt": "x", "width": 0}, "width must be at least 1"),
        ({"prompt": "x", "height": -16}, "height must be at least 1"),
        ([], "a job is an object"),
    ],
)
def test_what_is_no_job_is_refused_with_a_sentence(wrong, said):
    with pytest.raises(ValueError, match="(?s).*" + said.replace("(", r"\(")):
        Job.read(wrong)


def test_a_file_gives_its_jobs_and_the_lines_that_are_none(tmp_path):
    lines = [
        json.dumps({"prompt": "x", "name": "one"}),
        "",
        "{",
        json.dumps({"prompt": "y", "name": "ONE"}),
        json.dumps({"prompt": "y"}),
        "[" * 100_000,
    ]
    (tmp_path / "jobs.jsonl").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    jobs, refused = read_jobs(tmp_path / "jobs.jsonl")
    assert [job.prompt for job in jobs] == ["x", "y"]
    assert [(line.line, line.name) for line in refused] == [(3, ""), (4, "ONE"), (6, "")]
    assert "that of line 1 already" in refused[1].error


def test_null_is_as_if_it_were_left_out():
    assert Job.read(dict.fromkeys(FULL) | {"prompt": "x"}) == Job(prompt="x")


def test_lines_are_those_of_json_lines_and_say_each_thing_once(tmp_path):
    """A text may hold what other formats take for the end of a line, and which of two prompts is meant cannot be told."""
    texts = "a\u2028b", "a\x85b"
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    lines.append('{"prompt": "x", "seed": 1, "prompt": "y"}')
    (tmp_path / "jobs.jsonl").write_bytes("\r\n".join(lines).encode())
    jobs, (refused,) = read_jobs(tmp_path / "jobs.jsonl")
    assert tuple(job.prompt for job in jobs) == texts
    assert refused.line == 3 and "it says 'prompt' twice" in refused.error


@pytest.mark.parametrize(("held", "said"), [(b"\n\n", "holds no job"), (b"\xff\xfe\x00", "no text in UTF-8")])
def test_a_file_without_jobs_says_what_belongs_in_it(tmp_path, held, said):
    (tmp_path / "jobs.jsonl").write_bytes(held)
    with pytest.raises(ValueError, match=said):
        read_jobs(tmp_path / "jobs.jsonl")


def test_shards_share_all_jobs_out_and_none_twice():
    jobs, _ = checked_jobs(enumerate(({"prompt": "x", "seed": seed} for seed in range(11)), 1))
    parts = [shard_of(jobs, (number, 3)) for number in range(3)]
    assert sorted(job.seed for part in parts for job in part) == list(range(11))
    for wrong in [(3, 3), (-1, 3), (0, 0)]:
        with pytest.raises(ValueError, match="from 0 to n - 1"):
            shard_of(jobs, wrong)
