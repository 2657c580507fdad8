"""What the server tells of a graph before it runs: plans and schedules over HTTP, on bad requests too; and the window of a state."""

import json
import random
import urllib.error

import pytest
from graphs import TINY, chosen, node, one_sampler

LOAD = {
    "model_name": TINY,
    "preset": "auto",
    "dtype": "auto",
    "storage": "model",
    "attention": "auto",
    "compile": False,
}
MODEL = {"load": LOAD, "attach": []}
SAMPLER = {"width": 64, "height": 64, "length": 8, "length_unit": "chunks"}
WINDOW_9 = chosen("window", "this many frames", frames=9) | chosen("sink", "this many frames", frames=3)


def ask(client, route, body):
    """(status, answer)."""
    try:
        return 200, json.loads(client.post(f"/rolling_kv/{route}", body))
    except urllib.error.HTTPError as refused:
        return refused.code, json.loads(refused.read() or b"{}")


def test_a_plan_says_what_a_run_takes_and_which_frames_it_holds(client):
    status, plan = ask(client, "plan", {"model": {"load": LOAD, "attach": [WINDOW_9]}, "sampler": SAMPLER})
    assert status == 200 and plan["fits"] and plan["remedies"] == []
    assert plan["size"] == [64, 64] and plan["preset"] == "tiny" and plan["device"] == "cpu"
    assert plan["needed"] == sum(plan["parts"].values()) < plan["free"]
    window = plan["window"]
    assert (window["limit"], window["sink"], window["kept"], window["writing"]) == (9, 3, [18, 21], [21, 24])
    left = chosen("window", "this many frames", frames=9) | chosen("sink", "the model's own", frames=3)
    _, own = ask(client, "plan", {"model": {"load": LOAD, "attach": [left]}, "sampler": SAMPLER})
    assert own["window"]["sink"] == 0  # what the choice does not bring is not read
    twice = SAMPLER | chosen("guidance", "this strength", strength=3.0)
    _, guided = ask(client, "plan", {"model": {"load": LOAD, "attach": [WINDOW_9]}, "sampler": twice})
    assert guided["parts"]["cache"] == 2 * plan["parts"]["cache"]


def test_the_last_of_several_caches_counts_and_no_sampler_means_the_usual_size(client):
    attach = [WINDOW_9, chosen("window", "all frames")]
    _, plan = ask(client, "plan", {"model": {"load": LOAD, "attach": attach}, "sampler": None})
    assert plan["window"]["limit"] is None and plan["window"]["sink"] == 3 and plan["size"] == [832, 480]


def test_weights_that_are_offloaded_are_planned_where_they_lie(client):
    plain, moved = (
        ask(client, "plan", {"model": {"load": LOAD | {"offload": offload}}, "sampler": SAMPLER})[1]
        for offload in (False, True)
    )
    assert moved["parts"]["weights"] < plain["parts"]["weights"] and moved["parts"]["host"] > plain["parts"]["host"]
    assert moved["needed"] == sum(moved["parts"].values()) and moved["fits"]


def test_the_speed_counts_where_the_device_has_what_it_needs(client):
    body = {"model": {"load": LOAD | {"dtype": "bfloat16", "compile": True}}, "sampler": SAMPLER}
    fast = {"model": {"load": body["model"]["load"] | {"speed": "fast"}}, "sampler": SAMPLER}
    (_, expected), (status, plan) = ask(client, "plan", body), ask(client, "plan", fast)
    assert status == 200 and plan["parts"] == expected["parts"]  # a CPU multiplies in bfloat16
    status, refused = ask(client, "plan", {"model": {"load": LOAD | {"speed": "faster"}}})
    assert status == 200 and "speed must be one of exact, standard, fast" in refused["error"]


def test_what_cannot_fit_is_told_with_settings_that_would(client):
    body = {"model": {"load": LOAD, "attach": [chosen("window", "this many frames", frames=4096)]}}
    status, plan = ask(client, "plan", body | {"sampler": {"width": 8192, "height": 8192, "length": 600.0}})
    assert status == 200 and not plan["fits"] and plan["needed"] > plan["free"]
    assert any("make the picture smaller" in remedy for remedy in plan["remedies"])


def test_a_schedule_comes_back_in_our_form_with_the_models_chunks(client):
    body = {"text": '"0": "a", "40": "b"', "model": MODEL, "sampler": SAMPLER}
    status, read = ask(client, "schedule", body)
    assert status == 200 and read["canonical"] == "0: a [hold]\n2.8125: b [hold]"
    assert read["grid"][:3] == [0, 0.5625, 1.3125] and read["preset"] == "tiny" and not read["is_canonical"]
    assert ask(client, "schedule", body | {"model": None, "sampler": None})[1]["canonical"] == read["canonical"]
    status, refused = ask(client, "schedule", body | {"text": "0: a\n2: b [cutt]"})
    assert status == 200 and "line 2: [cutt] is none of" in refused["error"]


NAMES = [
    "../models/x.safetensors",
    "/etc/passwd",
    "C:\\x.safetensors",
    "\\\\host\\x",
    "a\0b",
    "\ud800",
    "",
    None,
    7,
    [],
    {},
    "x" * 9999,
]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name)[:20])
def test_no_name_leads_out_of_the_model_folders(client, name):
    for route in ("plan", "schedule"):
        status, refused = ask(client, route, {"text": "a", "model": {"load": LOAD | {"model_name": name}}})
        assert status == 200 and ("was not found" in refused["error"] or "No model is chosen" in refused["error"])


def junk(rng, depth=0):
    """Some JSON."""
    kind = rng.randrange(8 if depth < 3 else 6)
    if kind == 6:
        return [junk(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        return {
            rng.choice(["load", "attach", "window", "frames", "x"]): junk(rng, depth + 1)
            for _ in range(rng.randrange(4))
        }
    return [
        None,
        True,
        rng.randint(-(2**70), 2**70),
        rng.uniform(-1e9, 1e9),
        float("inf"),
        rng.choice(["", "auto", "\ud800", "0: a"]),
    ][kind]


def damaged(rng, value):
    """The value with one part of it, at any depth, replaced by some JSON."""
    if not isinstance(value, dict) or not value or rng.random() < 0.2:
        return junk(rng)
    name = rng.choice(list(value))
    return {**value, name: damaged(rng, value[name])}


def test_any_request_is_answered_or_refused_with_a_sentence(client, request):
    rng = random.Random(7)
    attach = (
        WINDOW_9 | chosen("leaving", "averaged into the sink", alpha=0.9) | chosen("switch", "joint", keep_sink=True)
    )
    whole = {
        "text": "0: a\n2: b [cut]",
        "model": {"load": LOAD, "attach": [attach]},
        "sampler": SAMPLER | chosen("guidance", "off"),
    }
    for _ in range(request.config.getoption("fuzz") or 150):
        body = (
            damaged(rng, whole)
            if rng.random() < 0.8
            else {**whole, "model": {"load": LOAD, "attach": [damaged(rng, attach)]}}
        )
        for route in ("plan", "schedule"):
            status, answer = ask(client, route, body)
            expected = 200 if isinstance(body, dict) else 400
            assert status == expected and answer.get("error", "told"), (route, body, status)


def test_bodies_that_are_no_objects_or_too_large_are_refused(client):
    for body in (None, [], 7, "x", float("nan")):
        assert ask(client, "plan", body)[0] == 400
    with pytest.raises((urllib.error.HTTPError, ConnectionError)) as refused:
        client.post("/rolling_kv/schedule", {"text": "x" * 3_000_000})
    assert getattr(refused.value, "code", 413) == 413


def test_inspect_state_puts_out_the_window_from_which_a_video_goes_on(client):
    graph = one_sampler(4) | {
        "cache": node("RollingKVAttachCache", model=["model", 0], **WINDOW_9),
        "look": node("RollingKVInspectState", state=["sample", 1], model=["cache", 0]),
        "bare": node("RollingKVInspectState", state=["sample", 1]),
    }
    outputs = client.run(graph)
    (window,) = outputs["look"]["window"]
    assert window["limit"] == 9 and window["sink"] == 3 and window["kept"] == [6, 12] and window["writing"] == [12, 12]
    assert window["bytes"] > 0 and window["free"] > 0
    assert not outputs["bare"].get("window") and outputs["bare"]["text"]
