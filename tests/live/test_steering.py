"""A run is steered over HTTP: prompts, pause, resume, stop; the copied schedule makes the same video; nothing stays in a cache."""

import json
import random
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from graphs import node, prompt, read_video, sample, save_latent, saved_latent
from test_state_files import saved, schedule
from test_stream_video import BLUE, RED, beside, streamed

from rolling_kv.sampling.state_file import read_state
from tools.comfyui.client import PromptInterrupted, first_file
from tools.comfyui.env import PACK


def runs(client) -> list[dict]:
    return json.loads(client.get("/rolling_kv/runs"))["runs"]


def steer(client, run: str, action: str, **values) -> dict:
    return json.loads(client.post("/rolling_kv/steer", {"run": run, "action": action, **values}))


def refusal(client, body) -> tuple[int, str]:
    """The status and the sentence with which a body is refused."""
    with pytest.raises(urllib.error.HTTPError) as refused:
        client.post("/rolling_kv/steer", body)
    answer = refused.value.read()
    return refused.value.code, json.loads(answer)["error"] if answer.startswith(b"{") else ""


class Going:
    """A prompt that runs in another thread. A context manager: inside, its newest run is paused behind a chunk."""

    def __init__(self, client, graph: dict):
        self.client, self.graph = client, graph
        self.outputs = self.error = None
        self.known = {run["run"] for run in runs(client)}
        self.thread = threading.Thread(target=self._run)

    def _run(self):
        try:
            self.outputs = self.client.run(self.graph)
        except BaseException as error:
            self.error = error

    def about(self) -> dict:
        return next(run for run in runs(self.client) if run["run"] not in self.known)

    def until(self, holds) -> dict:
        deadline = time.monotonic() + 300
        while True:
            new = [run for run in runs(self.client) if run["run"] not in self.known]
            if found := next(filter(holds, new), None):
                return found
            assert time.monotonic() < deadline and self.thread.is_alive(), (new, self.error)
            time.sleep(0.02)

    def __enter__(self):
        self.thread.start()
        try:
            self.run = self.until(lambda run: True)["run"]
            paused = steer(self.client, self.run, "pause")
            assert paused["status"] == "paused"
            self.until(lambda run: run["waiting"])
        except BaseException as error:
            self.__exit__(type(error))
            raise
        return self

    def say(self, text: str, how: str = "") -> dict:
        return steer(self.client, self.run, "prompt", prompt=text, how=how)

    def __exit__(self, kind, *_):
        if kind is not None:  # the test has failed already: the run must not wait for ever
            self.client.interrupt()
        self.thread.join(300)
        assert kind is not None or not self.thread.is_alive()


def redness(frames: np.ndarray) -> np.ndarray:
    """Of each frame, how much more red than blue there is."""
    return frames[..., 0].mean((1, 2)) - frames[..., 2].mean((1, 2))


def test_a_prompt_comes_into_the_video_with_the_next_chunk_and_its_schedule_makes_it_again(server, client):
    graph = streamed(6.0, "steered/video")
    with Going(client, graph) as going:
        answer = going.say(BLUE, "cut")
        assert answer["remark"] == "" and answer["steerable"] == "" and answer["count_from"] == "video"
        assert answer["switches"] == ["", "hold", "recache", "flush", "cut"]
        assert answer["schedule"].splitlines()[0] == f"0: {RED}"
        at = float(re.fullmatch(rf"([\d.]+): {BLUE} \[cut\]", answer["schedule"].splitlines()[1])[1])
        assert "wombat" in going.say(f"{BLUE} wombat", "cut")["remark"]
        going.say(f"{BLUE} [cut]")
        code, sentence = refusal(client, {"run": going.run, "action": "prompt", "prompt": "dog " * 600})
        assert code == 400 and re.fullmatch(
            r"the prompt has \d+ tokens, of which the model reads 511: make it shorter", sentence
        )
        assert refusal(client, {"run": going.run, "action": "prompt", "prompt": "a", "how": "melt"})[1].startswith(
            "[melt] is none"
        )
        assert steer(client, going.run, "resume")["status"] == "running"
    assert going.error is None
    ended = going.about()
    assert ended["status"] == "ended" and ended["schedule"] == answer["schedule"]
    assert refusal(client, {"run": going.run, "action": "pause"})[0] == 404
    video = read_video(client.view(first_file({"stream": going.outputs["stream"]}, ".mp4"))).frames
    border = round(at * 16)
    assert redness(video)[:border].min() > 5 and redness(video)[border + 4 :].max() < -5
    state = read_state(saved(server, going.outputs))
    assert state.texts == (RED, BLUE)

    again = streamed(6.0, "steered/again", positive="words") | {"words": schedule(ended["schedule"])}
    outputs = client.run(again)
    assert read_state(saved(server, outputs)).key == state.key
    assert (read_video(client.view(first_file({"stream": outputs["stream"]}, ".mp4"))).frames == video).all()

    anew = client.run(graph)  # not taken from the cache, and from then on kept as ever
    assert read_state(saved(server, anew)).texts == (RED,)
    names = beside(server, "steered")
    client.run(graph)
    assert beside(server, "steered") == names


def test_a_stream_without_an_end_is_stopped_while_it_is_paused(server, client):
    with Going(client, streamed(0.0, "stopped/video")) as going:
        chunk = going.about()["chunk"]
        steer(client, going.run, "stop")
    assert going.error is None and going.about()["chunk"] == chunk
    assert beside(server, "stopped") == ["video state_00001_.safetensors", "video_00001_.mp4"]
    state = read_state(saved(server, going.outputs))
    assert going.about()["schedule"] == f"0: {RED}\n{int(state.seconds * 1e4) / 1e4:g}: [end]"


def test_a_paused_run_can_be_cancelled(server, client):
    with Going(client, streamed(0.0, "paused/video")) as going:
        client.interrupt()
    assert isinstance(going.error, PromptInterrupted)
    assert going.about()["status"] == "cancelled"
    assert beside(server, "paused") == ["video_00001_.mp4", "video_00001_.state.safetensors"]


def test_samplers_in_a_chain_are_steered_each_for_itself(any_client):
    """With the default cache and without one. The second one counts from its own beginning."""
    client = any_client
    graph = streamed(1.0, "unused")
    for unused in ("stream", "put away"):
        del graph[unused]
    graph |= {"more": prompt(BLUE), "first": sample(2), "save": save_latent("second")}
    graph["second"] = sample(6, positive="more", state=["first", 1], **{"switch": "blend", "switch.chunks": 3})
    graph["flat"] = node("ConditioningZeroOut", conditioning=["positive", 0])
    graph["third"] = sample(3, positive="flat")
    graph["save third"] = save_latent("third")
    with Going(client, graph) as going:
        assert going.about()["node"] in ("first", "third")
        steer(client, going.run, "resume")
        second = going.until(lambda run: run["node"] == "second")
    assert second["count_from"] == "sampler" and second["schedule"] == f"0: {BLUE} [blend 3]"
    third = next(run for run in runs(client) if run["node"] == "third")
    assert "connect one of them" in third["steerable"] and third["schedule"] == "" and third["switches"] == []
    assert saved_latent(client, going.outputs).shape[2] == 24


def test_whatever_is_sent_is_answered_with_a_sentence(server, client):
    with Going(client, streamed(0.0, "fuzzed/video")) as going:
        run = going.run
        for body, status in [
            ([], 400), ("text", 400), (None, 400), ({}, 400), ({"run": run}, 400), ({"run": run, "action": "melt"}, 400),
            ({"run": 1, "action": "pause"}, 400), ({"run": run, "action": ["pause"]}, 400), ({"run": "x", "action": "stop"}, 404),
            ({"run": "../" + run, "action": "stop"}, 404), ({"run": run, "action": "prompt"}, 400),
            ({"run": run, "action": "prompt", "prompt": 5}, 400), ({"run": run, "action": "prompt", "prompt": "\ud83d"}, 400),
            ({"run": run, "action": "prompt", "prompt": "a\x00b"}, 400), ({"run": run, "action": "prompt", "prompt": "a", "how": {}}, 400),
            ({"run": run, "action": "prompt", "prompt": "a", "how": "\ud83d\n"}, 400), ({"run": run, "action": "prompt", "prompt": "a" * 20_000}, 400),
            ({"run": run, "action": "prompt", "prompt": "a" * 70_000}, 413),
        ]:  # fmt: skip
            code, sentence = refusal(client, body)
            assert code == status and (sentence or status == 413) and "Traceback" not in sentence, body
        generator = random.Random(5)
        for _ in range(60):
            raw = bytes(generator.choices(b'{}[]":,\\u0d8runactioprmshw 1\xff', k=generator.randint(0, 60)))
            request = urllib.request.Request(
                f"{client.url}/rolling_kv/steer", raw, {"Content-Type": "application/json"}
            )
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request, timeout=60)
            assert refused.value.code == 400
        assert going.about()["schedule"] == f"0: {RED}" and going.about()["status"] == "paused"
        steer(client, run, "stop")
    assert going.error is None


def test_the_example_of_the_documentation_runs(server, client):
    page = (PACK / "docs/live.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(import json.*?)```", page, re.DOTALL)[1]
    with Going(client, streamed(20.0, "example/video")) as going:
        steer(client, going.run, "resume")
        subprocess.run(
            [sys.executable, "-c", code.replace("http://127.0.0.1:8188", client.url)], check=True, timeout=120
        )
    assert going.error is None
    assert read_state(saved(server, going.outputs)).texts[-1] == "a blue circle moving right"
