"""Words that a model with few of them does not know: found in any writing, named once, and of no other model."""

import json
import logging

import pytest

from rolling_kv import words as words_module
from rolling_kv.bundled import BUNDLED
from rolling_kv.pipeline import Pipeline
from rolling_kv.text import load_text_encoder
from rolling_kv.tiny import make_tiny
from rolling_kv.words import Words, read_words

WORDS = Words(
    {"colours": ("red", "blue"), "backgrounds": ("white background",)}, ("a", "on", "the", "background", "红色", "一个")
)


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a red, BLUE. on the White background!", []),
        ("", []),
        ("?! ... ()", []),
        ("A cat on a red cat's redder snow", ["cat", "cat's", "redder", "snow"]),
        ("a white red", ["white"]),
        ("一个红色 圆圈", ["圆圈"]),
        ("a.*b [x] \\", ["b", "x"]),
    ],
)
def test_what_is_left_of_a_prompt_is_unknown(prompt, unknown):
    assert WORDS.unknown(prompt) == unknown


def test_the_remark_names_unknown_words_once_and_lists_the_known_ones():
    remark = WORDS.remark(["a red cat", "a blue Cat in the snow"])
    assert remark.startswith("Words that this tiny model does not know, and leaves out: cat, in, snow.")
    assert remark.endswith("It knows colours: red, blue; backgrounds: white background.")
    assert WORDS.remark(["a red", "the blue"]) == ""
    many = WORDS.remark([" ".join(f"word{i}" + 900 * "x" for i in range(100))])
    assert "and 92 more" in many and len(many) < 590
    assert "\x1b" not in WORDS.remark(["cat\x1b[31m"])


def test_only_the_bundled_model_tells_its_words(tmp_path):
    assert read_words(make_tiny(tmp_path / "tiny")) is None and read_words(tmp_path) is None
    text = load_text_encoder(BUNDLED)
    assert text.remark(["a small red circle moving quickly up and left on a white background", ""]) == ""
    assert "snow" in text.remark(["a red circle in the &lt;snow&gt;"])
    assert load_text_encoder(BUNDLED / "text_encoder").remark(["a cat"])
    assert load_text_encoder(tmp_path / "tiny").remark(["a cat in the snow"]) == ""


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {"known": []},
        {"known": {"a": "b"}},
        {"known": {"a": [1]}},
        {"known": {}, "also": "x"},
        {"known": {"a": [""]}},
    ],
)
def test_an_entry_that_is_none_says_nothing(entry, tmp_path):
    (tmp_path / "rolling_kv.json").write_text(json.dumps({words_module.ENTRY: entry}))
    assert read_words(tmp_path) is None


def test_a_remark_is_fit_for_a_terminal_whatever_the_models_file_says():
    remark = Words({"colours": ("red\x1b[31m",) * 900}, otherwise="a\nb").remark(["a cat"])
    assert remark.isprintable() and len(remark) <= words_module.LONGEST
    assert Words({"colours": ("red",)}, otherwise="a\nb").remark(["a cat"]).isprintable()


def test_a_remark_ends_with_what_is_shown_instead():
    otherwise = Words(WORDS.known, WORDS.also, "a red circle").remark(["a cat"])
    assert otherwise.endswith("white background. What a prompt leaves open begins as in: a red circle.")
    assert read_words(BUNDLED).otherwise == "a big green circle moving right"
    assert not read_words(BUNDLED).unknown(read_words(BUNDLED).otherwise)


def test_the_command_line_and_python_say_it_once(tmp_path, caplog):
    pipeline = Pipeline.load(BUNDLED)
    with caplog.at_level(logging.WARNING):
        pipeline.generate("a red cat", tmp_path / "cat.mp4", height=64, width=64, seconds=0.2)
        pipeline.generate("a red circle", tmp_path / "circle.mp4", height=64, width=64, seconds=0.2)
    assert [record.message.partition(". ")[0] for record in caplog.records] == [
        "Words that this tiny model does not know, and leaves out: cat"
    ]
