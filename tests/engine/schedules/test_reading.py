"""Schedules from text: every form says what it says in its own program, and text that says nothing clear is refused."""

import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rolling_kv.config import SamplingConfig
from rolling_kv.geometry import WAN_21, WAN_22
from rolling_kv.schedules.reading import MOST_CHARACTERS, load_schedule, read_schedule
from rolling_kv.schedules.schedule import WORDS, PromptSchedule, Segment

DATA = Path(__file__).parents[2] / "data" / "infinity_rope" / "schedules.json"
CANONICAL = "0: a red circle\n2.5: a blue circle [recache]\n6: a green square [cut]"
SIZES = [
    SamplingConfig(),
    SamplingConfig(chunk=1),
    SamplingConfig(chunk=8),
    SamplingConfig(independent_first_frame=True),
]


def segments(text):
    return list(read_schedule(text).segments)


def begins(plan):
    return [(number, segment.text, segment.switch, segment.blend, segment.curve) for number, segment in plan.begins]


def test_the_canonical_form():
    assert segments(CANONICAL) == [
        Segment("a red circle", 0.0),
        Segment("a blue circle", 2.5, "recache"),
        Segment("a green square", 6.0, "cut"),
    ]
    assert str(read_schedule(CANONICAL)) == CANONICAL
    blends = segments("0s :  a\n\n 1.5 s: b [ Blend  3 ]\n2: c [slerp 4]\n3.: d [flush]\n4: e [hold]")
    assert blends[1:] == [
        Segment("b", 1.5, None, 3), Segment("c", 2.0, None, 4, "slerp"), Segment("d", 3.0, "flush"), Segment("e", 4.0, "hold"),
    ]  # fmt: skip
    assert read_schedule("0: a\n10: [end]").end == 10
    assert segments("0: a / 2: b, 16/9 / c [cut] / 3s: d") == [
        Segment("a", 0.0), Segment("b, 16/9 / c", 2.0, "cut"), Segment("d", 3.0),
    ]  # fmt: skip
    assert segments("a red / blue circle: [a] picture") == [Segment("a red / blue circle: [a] picture", 0.0)]
    assert segments("0: a [close-up] []\n1: [x] b: c") == [Segment("a [close-up]", 0.0), Segment("[x] b: c", 1.0)]


@pytest.mark.parametrize("case", json.loads(DATA.read_text()), ids=lambda case: case["schedule"])
def test_infinity_rope_is_read_as_its_own_parser_does(case):
    schedule = read_schedule(case["schedule"])
    assert [segment.text for segment in schedule.segments] == case["prompts"]
    sampling = SamplingConfig(chunk=case["num_frame_per_block"])
    own = schedule.chunks(sampling) * sampling.chunk if schedule.ends else None
    assert own == case["num_frames"]
    plan = schedule.plan(sampling, chunks=sum(case["blocks"]))
    kinds = {None: "flush", "cut": "cut"}  # without a word, the family's own way: a flush
    found = [{"frame": number * sampling.chunk, "kind": kinds[segment.switch]} for number, segment in plan.begins]
    assert found[1:] == case["switches"]
    if len(case["prompts"]) > 1:
        numbers = [number for number, _ in plan.begins]
        assert [b - a for a, b in zip(numbers, numbers[1:])] == case["blocks"][:-1]
    again = read_schedule(str(plan.snapped()))
    assert begins(again.plan(sampling, chunks=plan.chunks)) == begins(plan)


def test_infinity_ropes_subtitles_and_what_is_nearly_a_length_are_told():
    schedule = read_schedule("a[5s#] | b [ 3s] ; [0-1] hello | c")
    assert [(s.text, s.time, s.switch) for s in schedule.segments] == [("a", 5.0, None), ("b [ 3s]", None, "cut")]
    assert "subtitles" in schedule.notes[1] and "[ 3s] is part of the prompt" in schedule.notes[2]


def test_shares_are_of_the_run():
    schedule = read_schedule("a cat | a dog # | a bird; a tree")
    assert [s.text for s in schedule.segments] == ["a cat", "a dog #", "a bird; a tree"]
    for origin in ("video", "run"):
        plan = schedule.plan(SamplingConfig(), chunks=9, start_frame=6, origin=origin)
        assert [(number - plan.first, segment.text[2:5]) for number, segment in plan.begins] == [
            (0, "cat"),
            (3, "dog"),
            (6, "bir"),
        ]


@pytest.mark.parametrize("text", ['"0": "a",\n"24" :"b",', '{"24": "b", "0": "a"}'])
def test_keyframes_are_frames_and_held(text):
    schedule = read_schedule(text)
    assert [(s.text, s.time, s.switch) for s in schedule.segments] == [("a", 0, "hold"), ("b", 24, "hold")]
    assert "frames per second" in schedule.notes[0] and "holds" in schedule.notes[0]
    for geometry, second in ((WAN_21, 1.5), (WAN_22, 1.0)):
        plan = schedule.plan(SamplingConfig(chunk=1), geometry, chunks=30)
        same = read_schedule(f"0: a\n{second}: b").plan(SamplingConfig(chunk=1), geometry, chunks=30)
        assert [number for number, _ in plan.begins] == [number for number, _ in same.begins]


def test_longlives_prompts():
    """Its JSON lines hold prompts alone; the switches are latent frames, and one inside a chunk waits for the next."""
    assert read_schedule('{"prompts": ["a", "b"]}').unit == read_schedule('["a", "b"]').unit == "shares"
    schedule = read_schedule('{"prompts": ["a", "b", "c"], "switch_frame_indices": "4, 96", "num_output_frames": 144}')
    plan = schedule.plan(SamplingConfig(), chunks=schedule.chunks(SamplingConfig()))
    assert [(number * 3, segment.text) for number, segment in plan.begins] == [(0, "a"), (6, "b"), (96, "c")]
    assert plan.chunks == 48
    assert segments('{"prompts": ["a", "b"], "times": [0, 2.5]}') == [Segment("a", 0.0), Segment("b", 2.5)]


def test_a_timeline_of_daydream_scope():
    prompts = [
        {"startTime": 0, "endTime": 2.5, "transitionSteps": 4, "prompts": [{"text": "a", "weight": 100}]},
        {"startTime": 2.5, "endTime": 10.0, "prompts": [{"text": "b\n b", "weight": 100}], "transitionSteps": 4,
         "temporalInterpolationMethod": "slerp"},
    ]  # fmt: skip
    schedule = read_schedule(json.dumps({"prompts": prompts, "settings": {"seed": 42}, "version": "2.0"}, indent=1))
    assert schedule.segments == (Segment("a", 0.0), Segment("b b", 2.5, None, 4, "slerp"))
    assert schedule.end == 10
    assert str(schedule) == "0: a\n2.5: b b [slerp 4]\n10: [end]"


def test_lists_and_lines_of_prompts_with_times():
    expected = [Segment("a", 0.0), Segment("b", 2.5, "cut")]
    assert segments('[{"time": 0, "prompt": "a"}, {"start": 2.5, "text": "b", "switch": "cut"}]') == expected
    assert segments('{"time": 0, "prompt": "a"}\n\n{"time": 2.5, "prompt": "b", "switch": "cut"}\n') == expected
    assert read_schedule('{"prompt": "a"}\n{"prompt": "b"}').unit == "shares"


@pytest.mark.parametrize("sampling", SIZES)
@pytest.mark.parametrize("geometry", [WAN_21, WAN_22], ids=lambda geometry: geometry.name)
def test_a_prompt_begins_with_the_first_chunk_at_its_time_or_later(sampling, geometry):
    schedule = PromptSchedule(tuple(Segment(f"p{n}", n * 0.73) for n in range(14)))
    plan = schedule.plan(sampling, geometry, chunks=20)
    start, found = 0, {}
    for number, size in enumerate(sampling.chunk_sizes(20)):
        second = geometry.seconds(start) if start else 0
        for segment in schedule.segments:
            if segment.time <= second + 1e-9 and segment.text not in found:
                found[segment.text] = number
        start += size
    kept = {number: text for text, number in found.items()}  # the last of those in one chunk
    assert [(number, segment.text) for number, segment in plan.begins] == sorted(kept.items())
    assert len(plan.notes) == len(found) - len(kept) + (len(found) < 14)


texts = st.text("abc d,.:[]#é", min_size=1, max_size=12).filter(
    lambda text: text.strip() and not re.search(r"\[\s*\d|^\s*\[end\]|^[\s\d]*:|^\s*\d", text)
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_what_is_printed_is_read_as_the_same(data):
    sampling = data.draw(st.sampled_from(SIZES))
    geometry = data.draw(st.sampled_from([WAN_21, WAN_22]))
    times = sorted(data.draw(st.sets(st.integers(1, 30_000), max_size=6)))
    made = []
    for milliseconds in [0, *times]:
        switch = data.draw(st.sampled_from([None, *WORDS]))
        blend = data.draw(st.integers(1, 9)) if switch is None else 1
        curve = data.draw(st.sampled_from(["linear", "slerp"])) if blend > 1 else "linear"
        made.append(Segment(data.draw(texts), milliseconds / 1000, switch, blend, curve))
    schedule = PromptSchedule(tuple(made), end=data.draw(st.sampled_from([None, 31.0])))
    assert read_schedule(str(schedule)) == schedule
    start = data.draw(st.sampled_from([0, 0, 1, 5, 12]))
    plan = schedule.plan(sampling, geometry, chunks=data.draw(st.integers(1, 20)), start_frame=start)
    snapped = plan.snapped()
    again = read_schedule(str(snapped)).plan(sampling, geometry, chunks=plan.chunks, start_frame=start)
    assert begins(again) == begins(plan)
    assert str(again.snapped()) == str(snapped)
    if snapped.end is not None:
        assert read_schedule(str(snapped)).chunks(sampling, geometry, start_frame=start) == plan.chunks


def test_how_long_a_video_is():
    sampling = SamplingConfig()
    with pytest.raises(ValueError, match=r"does not say how long the video is: .* `10: \[end\]`"):
        read_schedule("0: a").chunks(sampling)
    assert read_schedule("0: a").chunks(sampling, last=5.0) == sampling.chunks_for_seconds(5.0)
    plan = read_schedule("0: a\n6: b").plan(sampling, chunks=read_schedule("0: a\n6: b").chunks(sampling, last=5.0))
    assert plan.begins[-1][0] == plan.chunks - sampling.chunks_for_seconds(5.0)
    ends = read_schedule("0: a\n10: [end]")
    assert ends.chunks(sampling) == sampling.chunks_for_seconds(10)
    assert ends.chunks(sampling) == 4 + ends.chunks(sampling, start_frame=12)
    assert ends.chunks(sampling, start_frame=12, origin="run") == 14
    with pytest.raises(ValueError, match="ends after 10.* s, and the video is .* s long already"):
        ends.chunks(sampling, start_frame=42)


def test_a_prompt_before_the_first_one():
    led = read_schedule("2.5: b").led_by("a")
    assert str(led) == "0: a\n2.5: b"
    for text in ("0: b", "b | c", "b[2s] | c"):
        with pytest.raises(ValueError, match="leave the other prompt out"):
            read_schedule(text).led_by("a")
    with pytest.raises(ValueError, match="says nothing about the first 2.8125 s"):
        read_schedule("2.5: b").plan(SamplingConfig(), chunks=9)
    assert read_schedule("2.5: b").plan(SamplingConfig(), chunks=9, start_frame=12).begins  # what comes before is there


MALFORMED = {
    "": "is empty",
    " \n\t": "is empty",
    "\ufeff": "is empty",
    "0: a\nb": "line 2: there is no time before `b`",
    "a\n2: b": "line 2, begins with a time, and line 1 does not: begin every line with one, as in `0: a`",
    "a\nb": "2 lines without a time",
    "0:": "line 1: there is no prompt",
    "0: a\n1: [cut]": "line 2: there is no prompt",
    "0: a\n1: b\n1: c": "line 3: it begins at second 1, and line 2 at 1",
    "0: a\n2: b\n1: c": "line 3: it begins at second 1, and line 2 at 2",
    "0: a\n1: b\n.5: [end]": "line 3: it begins at second 0.5",
    "-1: a": "not negative",
    "0: a\n2,5: b": "line 2: 2,5 is no number of seconds: write `2.5`",
    "1e3: a": "no number of seconds",
    "0: a\n1.2.3: b": "1.2.3 is no number of seconds",
    "0: a\n1:30: b": r"line 2: `1:30` may be minutes or part of a prompt: write seconds, as in `90: …`",
    "16:9 a cat": r"`0: 16:9 …`",
    "0: a\n99999999999: b": "at most a year",
    "0: a [recach]": r"\[recach\] is none of .*: write \[recache\]",
    "0: a [close-up]": r"none of .*, or, if it belongs to the prompt, \[\] behind it",
    "0: a [blend]": "needs the number of chunks",
    "0: a [blend 1]": "needs the number of chunks",
    "0: a [blend -3]": "needs the number of chunks",
    "0: a [blend 3.5]": "needs the number of chunks",
    "0: a [slerp 101]": "from 2 to 100",
    "0: a [blend 9999999999999999999999]": "from 2 to 100",
    "0: a [blend 3 4]": "is none of",
    "0: a [cut] [flush]": "in one way, not in two",
    "0: a [blend 3][cut]": "in one way, not in two",
    "0: a\n1: b [end]": r"line 2: \[end\] stands alone",
    "0: a\n1: [end]\n2: b": r"line 3: \[end\] has to be the last line",
    "1: [end]": "has no prompt",
    "0: a[5s]": r"line 1: `\[5s\]` is how long a prompt lasts in Infinity-RoPE's form",
    "0: a | 5: b": "does not stand between prompts that have a time",
    "a[5s] |": "segment 2: there is no prompt",
    "[5s] | b": "segment 1: there is no prompt",
    "a || b": "segment 2: there is no prompt",
    "|": "segment 1: there is no prompt",
    "a[5s]\n2: b": "line 2, begins with a time",
    '"0": "a", "0": "b"': "0 stands there twice",
    '"0": "a" "24": "b"': "column",
    '"0": 5': "a prompt must be text, got 5",
    '"0": "a", "max_f/2": "b"': "frame max_f/2: a keyframe is the number of a frame",
    '"0": "a", "-3": "b"': "frame -3: a keyframe is the number",
    '"0": "a `t/2`"': "expressions between ` are not computed",
    '"0": "a --neg b"': "--neg has no place",
    '"00": "a", "0": "b"': "it begins at frame 0, and frame 0",
    "{": "line 1, column 2",
    "{}": "it has no \"prompts\", but nothing",
    "[]": "at least one",
    '{"prompts": []}': "at least one",
    '{"prompts": 5}': "must be a list of at least one, got 5",
    '{"prompts": ["a", 5]}': "prompt 1: expected an object",
    '{"prompts": [""]}': "prompt 1: there is no prompt",
    '{"prompts": ["a", "b"], "times": [0]}': "must be a list of 2 seconds",
    '{"prompts": ["a", "b"], "times": [0, "1"]}': "the time of prompt 2 must be a number",
    '{"prompts": ["a", "b"], "times": [0, true]}': "the time of prompt 2 must be a number",
    '{"prompts": ["a", "b"], "times": [0, NaN]}': "NaN is no number",
    '{"prompts": ["a", "b"], "times": [0, 1e400]}': "the time of prompt 2 must be a number",
    '{"prompts": ["a", "b"], "times": [3, 1]}': "prompt 2: it begins at second 1",
    '{"prompts": ["a", "b"], "times": [0, 1], "switch_frame_indices": [3]}': "say the same twice",
    '{"prompts": ["a", "b"], "switch_frame_indices": [3, 6]}': "must be a list of 1 latent frames",
    '{"prompts": ["a", "b"], "switch_frame_indices": "x"}': "the time of prompt 2 must be a number",
    '{"prompts": ["a", "b"], "times": [0, 1], "end": 0.5}': "ends at 0.5, before its last prompt",
    '{"prompts": ["a"]}\n{"prompts": ["b"]}': "the prompts of as many videos",
    '{"prompt": "a", "time": 0}\n{"prompt": "b"}': "line 2: it has no time",
    '{"prompt": "a"}\n{"prompt": }': "JSON of line 2",
    '[{"time": 0}]': "prompt must be text, got None",
    '[{"time": 0, "prompt": "a", "switch": "slide"}]': "the switch must be one of",
    '[{"time": 0, "prompt": "a"}, {"time": 1, "prompt": "b", "blend": 3, "switch": "cut"}]': "little by little",
    '[{"time": 0, "prompt": "a"}, {"time": 1, "prompt": "b", "blend": "x"}]': "blend must be a whole number",
    '[{"time": 0, "prompts": [{"text": "a"}, {"text": "b"}]}]': "it mixes 2 prompts",
    '{"a": {"prompts": 1}}': 'it has no "prompts", but a',
    "[" * 100_000: "at most 10,000 characters",
    '{"prompts": ' + "[" * 50_000 + "]" * 50_000 + "}": "nested too deeply|expected an object",
    '{"prompts": ["a"], "times": [' + "1" * 5000 + "]}": "as JSON",
    "0: a\0b": "no character to read",
    "0: \ud83e": "no character to read",
    "x" * 10_001: "at most 10,000 characters",
    "x" * (MOST_CHARACTERS + 1): "at most 200,000 characters",
    "\n".join(f"{n}: a" for n in range(1500)): "at most 1,000 prompts",
    "|".join("a" * 1500): "at most 1,000 prompts",
    json.dumps([str(n) for n in range(1500)]): "at most 1,000 prompts",
}  # fmt: skip


@pytest.mark.parametrize("text", MALFORMED, ids=lambda text: ascii(text[:40]))
def test_what_says_nothing_clear_is_refused_with_what_to_write(text):
    with pytest.raises(ValueError, match=MALFORMED[text]) as said:
        read_schedule(text)
    message = str(said.value)
    assert len(message) < 600 and message.isprintable(), message


def damaged(seed):
    """A schedule of some form that was cut, or had characters changed, doubled or put in."""
    rng = random.Random(seed)
    text = rng.choice([
        CANONICAL, "a[5s] | b[10s#] | c[2.5 s]", '"0": "a", "24": "b"', '{"prompts": ["a", "b"], "times": [0, 2.5]}',
        '[{"startTime": 0, "endTime": 3, "prompts": [{"text": "a"}], "transitionSteps": 4}]', "a | b",
    ])  # fmt: skip
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text) + 1)
        text = rng.choice([
            text[:at], text[at:], text[:at] + chr(rng.choice([0, 10, 58, 91, 93, 124, 44, 34, 0xD800, 0x202E, 55])) + text[at:],
            text[:at] + text[at + 1 :], text[:at] + text, text[:at] + rng.choice(["nan", "1e9", "[cut]", "-", "99999999999999"]) + text[at:],
        ])  # fmt: skip
    return text


def test_damaged_text_is_read_or_refused_in_a_sentence():
    """Never anything else, and whatever is read can be planned and printed."""
    refused = 0
    for seed in range(1500):
        text = damaged(seed)
        try:
            schedule = read_schedule(text)
        except ValueError as error:
            refused += 1
            assert str(error).isprintable() and "schedule" in str(error) and len(str(error)) < 600, (text, error)
            continue
        try:
            str(schedule.plan(SamplingConfig(), chunks=8).snapped())
        except ValueError as error:
            assert "says nothing about the first" in str(error)
    assert refused > 500


@pytest.mark.parametrize(
    "text",
    ["1" * 200_000, "[" + "1" * 199_000, "0: " + "[" * 190_000, "0: a" + " " * 190_000 + "b", "a" + " [5" * 60_000 + "|",
     "0: " + "/ " * 90_000, "." * 199_999, '"' * 199_999, "[{" * 90_000, "0: " + "[1" * 90_000],
    ids=lambda text: ascii(text[:12]),
)  # fmt: skip
def test_no_text_takes_long(text):
    """Nothing here grows with the square of a text's length: this test would not end."""
    try:
        read_schedule(text)
    except ValueError as error:
        assert len(str(error)) < 600


def test_files(tmp_path):
    path = tmp_path / "schedule.txt"
    path.write_bytes(b"\xef\xbb\xbf" + CANONICAL.replace("\n", "\r\n").encode())
    assert load_schedule(path) == read_schedule(CANONICAL)
    path.write_bytes(b"0: a\xff")
    with pytest.raises(ValueError, match=r"not UTF-8 text \(byte 4\)"):
        load_schedule(path)
    path.write_bytes(b"0: a" * MOST_CHARACTERS * 2)
    with pytest.raises(ValueError, match="at most 200,000 characters"):
        load_schedule(path)
