"""A schedule in the place of one prompt: what it makes, what it shows, and what it is told."""

import pytest
import torch
from graphs import chosen, node, one_sampler, prompt, sample, save_latent, saved_latent

from tools.comfyui.client import PromptFailed

RED, BLUE, SQUARE = "a red circle moving right", "a blue circle moving left", "a green square moving up"
SCHEDULE = f"0: {RED}\n1: {BLUE} [recache]\n2: {SQUARE} [cut]\n3.5: {RED} [blend 3]\n5: [end]"
SNAPPED = f"0: {RED}\n1.3125: {BLUE} [recache]\n2.0625: {SQUARE} [cut]\n3.5625: {RED} [blend 3]"
CHUNKS = 7


def schedule(text: str = SCHEDULE, count_from: str = "video", **inputs) -> dict:
    values = {"text_encoder": ["text_encoder", 0], "text": text, "count_from": count_from}
    return node("RollingKVPromptSchedule", **values, **inputs)


def scheduled(chunks: int, text: str = SCHEDULE, count_from: str = "video", **inputs) -> dict:
    """A whole prompt with a sampler that reads a schedule."""
    return one_sampler(chunks, **inputs) | {"positive": schedule(text, count_from)}


def chain(graph: dict, name: str, before: str, chunks: int, **inputs) -> None:
    """One more sampler behind another, whose latent is saved."""
    graph[name] = sample(chunks, state=[before, 1], **inputs)
    graph["save"] = save_latent(name)


def run_latent(client, graph: dict) -> torch.Tensor:
    return saved_latent(client, client.run(graph))


def test_one_schedule_equals_prompts_in_a_chain_and_itself_cut_anywhere(client):
    whole = run_latent(client, scheduled(CHUNKS))
    by_hand = one_sampler(2) | {"positive": prompt(RED), "blue": prompt(BLUE), "square": prompt(SQUARE)}
    chain(by_hand, "second", "sample", 1, positive="blue", switch="causal")
    chain(by_hand, "third", "second", 2, positive="square", switch="cut")
    chain(by_hand, "fourth", "third", 2, positive="positive", **{"switch": "blend", "switch.chunks": 3})
    assert torch.equal(run_latent(client, by_hand), whole)
    cut = scheduled(1)  # the third one begins in the middle of the blend
    chain(cut, "second", "sample", 5)
    chain(cut, "third", "second", 1)
    assert torch.equal(run_latent(client, cut), whole)


def test_times_may_count_from_each_sampler(client):
    graph = scheduled(2, f"0: {RED}\n0.5: {BLUE}", "sampler")
    chain(graph, "second", "sample", 2)
    prompts = one_sampler(1) | {"positive": prompt(RED), "blue": prompt(BLUE)}
    for number, (name, positive) in enumerate([("second", "blue"), ("third", "positive"), ("fourth", "blue")]):
        chain(prompts, name, ["sample", "second", "third"][number], 1, positive=positive)
    assert torch.equal(run_latent(client, graph), run_latent(client, prompts))


def test_a_schedule_says_how_long_the_video_is(client):
    ends = run_latent(client, scheduled(1, length_unit="schedule"))
    assert ends.shape[2] == CHUNKS * 3
    open_ended = run_latent(client, scheduled(1, f"0: {RED} / 2: {BLUE}", length_unit="schedule", length=0.5))
    assert open_ended.shape[2] == 9 + 3
    infinity_rope = run_latent(client, scheduled(1, f"{RED}[0.8s#] | {BLUE}[0.8s]", length_unit="schedule"))
    assert infinity_rope.shape[2] == 6


def test_what_was_understood_is_shown_with_the_chunks_times(client):
    said = {}
    graph = scheduled(CHUNKS, SCHEDULE)
    graph["positive"]["inputs"]["model"] = ["model", 0]
    outputs = client.run(graph, on_text=lambda node_id, text: said.setdefault(node_id, []).append(text))
    for name in ("positive", "sample"):
        assert any(SNAPPED in text for text in said[name]), (name, said)
    assert outputs["positive"]["text"][0].startswith(SNAPPED)
    frames = {"positive": schedule(f'"0": "{RED}", "24": "{BLUE}"')}
    outputs = client.run(scheduled(3) | frames)
    shown = outputs["positive"]["text"][0]
    assert shown.startswith(f"frame 0: {RED} [hold]\nframe 24: {BLUE} [hold]") and "FizzNodes" in shown


@pytest.mark.traceback_expected
@pytest.mark.parametrize(
    "change, message",
    [
        ({"text": "0: a\n1: b [recach]"}, r"line 2: \[recach\] is none of .*: write \[recache\]"),
        ({"text": ""}, "the schedule is empty"),
        ({"text": "2: a"}, "says nothing about the first 2.0625 s"),
        ({"switch": "flush"}, "leave switch at the model's own"),
    ],
)
def test_what_cannot_be_is_told(client, change, message):
    graph = scheduled(3, change.get("text", SCHEDULE), **{k: v for k, v in change.items() if k != "text"})
    with pytest.raises(PromptFailed, match=message):
        client.run(graph)


@pytest.mark.traceback_expected
def test_the_length_of_a_schedule_needs_one(client):
    with pytest.raises(PromptFailed, match="connect Prompt Schedule to positive"):
        client.run(one_sampler(2, length_unit="schedule"))


def test_words_and_a_size_that_the_bundled_model_does_not_know_are_named(client):
    graph = scheduled(1, f"0: {RED}\n3: a red cat")
    graph["negative"] = prompt("a cat in the snow")
    graph["sample"]["inputs"] |= {"negative": ["negative", 0], **chosen("guidance", "this strength", strength=1.5)}
    graph["sample"]["inputs"]["width"] = 80
    said = {}
    outputs = client.run(graph, on_text=lambda node_id, text: said.setdefault(node_id, []).append(text))
    assert "leaves out: cat. It knows" in outputs["positive"]["text"][0]
    assert "64x64 pixels alone. At 80x64" in " ".join(said["sample"])
    assert "leaves out: cat, in, snow. It knows" in " ".join(said["negative"])
