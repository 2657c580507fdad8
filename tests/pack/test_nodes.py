"""What a user reads about each node is there and fits: in the recorded schemas, the help pages and the translations."""

import json
import re

import pytest

from tools.comfyui.env import PACK
from tools.generate.schemas import (
    BENCHMARK_PAGES,
    ENGLISH,
    FILE_INPUTS,
    PREFIX,
    english,
    inputs_of,
    recorded,
    settings_of,
    with_switches,
)

OURS = {name: schema for name, schema in recorded().items() if name.startswith(PREFIX)}
LANGUAGES = ("en", "zh")

each_node = pytest.mark.parametrize("schema", OURS.values(), ids=list(OURS))
each_language = pytest.mark.parametrize("language", LANGUAGES)


def load_locale(language):
    return json.loads((PACK / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def leaves(texts, path=""):
    """The translated texts below a dict, by the path of their keys."""
    if isinstance(texts, str):
        return {path: texts}
    return {key: text for name, part in texts.items() for key, text in leaves(part, f"{path}.{name}").items()}


def is_sentence(text):
    return re.match(r"[A-Z\d]|[\w.]+\.safetensors", text) is not None and text.endswith(".")


def with_settings(schema):
    """Every input, and those that belong to the choices of one."""
    inputs = inputs_of(schema)
    return inputs | {name: spec for given in inputs.values() for name, spec in settings_of(given).items()}


@each_node
def test_a_node_says_what_it_is_and_when_to_use_it(schema):
    assert schema["category"] == "RollingKV"
    assert re.fullmatch(r"[A-Z][\w() ]+", schema["display_name"])
    assert is_sentence(schema["description"]) and len(schema["description"].split()) >= 15
    aliases = schema["search_aliases"]
    assert len(aliases) >= 2 and all(alias == alias.lower().strip() for alias in aliases)


def test_display_names_and_aliases_find_one_node():
    names = [schema["display_name"] for schema in OURS.values()]
    assert len(set(names)) == len(names)


@each_node
def test_each_input_and_output_has_a_tooltip(schema):
    for name, spec in with_settings(schema).items():
        assert is_sentence(spec[1].get("tooltip", "")), name
    assert len(schema["output_tooltips"]) == len(schema["output_name"]) == len(schema["output"]) > 0
    for name, tooltip in zip(schema["output_name"], schema["output_tooltips"]):
        assert is_sentence(tooltip or ""), name


@each_node
def test_defaults_are_allowed_values(schema):
    for name, (kind, options) in with_settings(schema).items():
        if kind in ("INT", "FLOAT"):
            assert options["min"] <= options["default"] <= options["max"], name
        if kind == "COMBO" and name not in FILE_INPUTS:
            assert options.get("default", options["options"][0]) in options["options"], name


@each_language
@each_node
def test_the_help_page_explains_every_input_and_output(schema, language):
    page = (PACK / "web" / "docs" / schema["name"] / f"{language}.md").read_text(encoding="utf-8")
    texts = load_locale(language)[schema["name"]]
    assert page.startswith(f"# {texts['display_name']}\n")
    inputs = {name: text["name"] for name, text in texts["inputs"].items()}
    outputs = [text["name"] for text in texts["outputs"].values()]
    for label in [*inputs.values(), *outputs]:
        assert f"**{label}**" in page, label
    if language != "en":  # there the label is a translation, and workflows hold the name
        for name in inputs:
            assert re.search(rf"\([^)]*`{name}`", page), name


@each_language
@each_node
def test_the_help_page_explains_every_choice(schema, language):
    page = (PACK / "web" / "docs" / schema["name"] / f"{language}.md").read_text(encoding="utf-8")
    for name, (kind, options) in with_settings(schema).items():
        for choice in options["options"] if kind == "COMBO" else ():
            assert f"`{choice}`" in page, f"{name}: {choice}"
    for given in inputs_of(schema).values():
        for setting in settings_of(given):
            choice, name = setting.split(".")
            (section,) = re.findall(rf"^\*\*`{choice}`\*\*.*?(?=^\*\*`|^## )", page, re.MULTILINE | re.DOTALL)
            assert f"`{name}`" in section, setting


@each_language
def test_help_pages_have_no_cell_or_bold_text_left_open_and_their_pictures_are_there(language):
    for path in (PACK / "web" / "docs").glob(f"*/{language}.md"):
        page = path.read_text(encoding="utf-8")
        assert page.count("**") % 2 == 0 and page.count("`") % 2 == 0, path
        for picture in re.findall(r"!\[.+\]\((.*?)\)", page):  # ComfyUI's page looks for them from web/docs on
            assert (PACK / "web" / "docs" / picture).is_file(), f"{path}: {picture}"
        for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
            columns = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
            assert len(columns) == 1, f"{path}: {table}"


def test_there_are_help_pages_for_no_other_nodes():
    pages = {path.relative_to(PACK / "web" / "docs").as_posix() for path in (PACK / "web" / "docs").rglob("*.md")}
    assert pages == {f"{name}/{language}.md" for name in OURS for language in LANGUAGES}


def test_the_english_texts_are_those_of_the_schemas():
    assert load_locale("en") == english(recorded()), "run python -m tools.generate"


def test_each_language_translates_every_text_and_no_other():
    folders = sorted(path.name for path in (PACK / "locales").iterdir())
    assert folders == sorted(LANGUAGES)
    expected = leaves(english(recorded())).keys()
    for language in LANGUAGES:
        texts = leaves(load_locale(language))
        assert texts.keys() == expected, language
        assert all(text.strip() == text != "" for text in texts.values()), language


@each_language
def test_texts_hold_nothing_that_the_frontends_translator_takes_for_syntax(language):
    for path, text in leaves(load_locale(language)).items():
        assert not re.search(r"[{}@|]", text), f"{path}: {text}"


def test_translated_texts_name_nodes_as_the_translation_does():
    core = {"保存视频", "加载VAE", "VAE解码", "VAE编码", "加载CLIP", "CLIP文本编码"}
    texts = load_locale("zh")
    known = core | {node["display_name"] for node in texts.values()}
    for path, text in leaves(texts).items():
        assert set(re.findall("“(.*?)”", text)) <= known, f"{path}: {text}"


def test_the_record_and_the_english_texts_are_as_the_tool_writes_them():
    content = ENGLISH.read_text(encoding="utf-8")
    assert content == json.dumps(json.loads(content), indent=2, ensure_ascii=False) + "\n"


def test_the_help_pages_list_the_switches_of_the_benchmark():
    assert len(BENCHMARK_PAGES) == len(LANGUAGES)
    for path in BENCHMARK_PAGES:
        page = path.read_text(encoding="utf-8")
        assert with_switches(page, recorded()) == page, "run python -m tools.generate"
        assert with_switches(page.replace("- `pab`: Pyramid Attention Broadcast\n", ""), recorded()) == page
