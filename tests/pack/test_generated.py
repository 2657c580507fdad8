"""What `python -m tools.generate` makes is as it would make it now, as far as that shows without a server."""

import json
import re

import pytest

from rolling_kv.presets import PRESETS
from tools.comfyui.env import PACK
from tools.generate import help_pages, memory, models, readme, results, schemas
from tools.generate.examples import WORKFLOWS
from tools.generate.workflows import layout

DUE = "run python -m tools.generate"
SAVED = [name for name, description in WORKFLOWS.items() if not description.get("api_only")]


def load(path):
    return json.loads((PACK / path).read_text(encoding="utf-8"))


def test_the_tables_of_the_readme_are_the_presets():
    assert readme.README.read_text(encoding="utf-8") == readme.generated(), DUE


def test_the_table_of_families_is_the_presets():
    page = models.PAGE.read_text(encoding="utf-8")
    assert page == models.generated(), DUE
    assert all(f"| `{name}` " in page for name in PRESETS)
    assert all(preset.licence in page and preset.source in page and preset.note in page for preset in PRESETS.values())


def test_the_table_of_cards_is_counted_from_the_models():
    page = memory.PAGE.read_text(encoding="utf-8")
    assert page == memory.generated(), DUE
    assert all(f"(`{name}`)" in page for name in memory.MODELS)


def test_the_tables_of_gpus_are_the_reports(tmp_path):
    assert results.PAGE.read_text(encoding="utf-8") == results.generated(), DUE
    assert results.section(tmp_path) == f"{results.HEADING}\n\n{results.NONE}"
    cases = {"cases": [{"name": "a", "difference": 1e-6}]}
    ended = {"seconds": 3.0, "command": "python -m rolling_kv bench cases"}
    machine = {
        "gpu": "Card",
        "cpu": "CPU",
        "driver": "1.2",
        "torch": "2.9",
        "system": "Linux",
        "revision": "abcdef" * 4,
    }
    report = {"machine": machine, "size": "1.3B", "quick": False, "parts": [
        ended | {"name": "cases", "status": "done", "figures": cases},
        ended | {"name": "graphs", "status": "failed: no", "figures": None},
        ended | {"name": "of another version", "status": "done", "figures": {}},
    ]}  # fmt: skip
    for name in ("b-2026-01", "a-2026-02"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(report))
    section = results.section(tmp_path)
    assert section.index("results/a-2026-02/report.json") < section.index("results/b-2026-01/report.json")
    assert (
        section.count("**Card**, random weights of the size 1.3B; driver 1.2, torch 2.9; Linux; revision abcdefabc (")
        == 2
    )
    assert section.count("1 cases, at most 1.0e-06 off (a)") == 2 and section.count("| failed: no ") == 2
    assert "another version" not in section


@pytest.mark.parametrize("language", help_pages.HEADS)
def test_the_tables_of_the_help_pages_are_the_presets(language):
    page = help_pages.page(language).read_text(encoding="utf-8")
    assert page == help_pages.generated(language), DUE
    assert all(f"| `{name}` |" in page for name in PRESETS)


def test_the_loader_lists_every_preset():
    options = schemas.inputs_of(schemas.recorded()["RollingKVLoadModel"])["preset"][1]["options"]
    assert options == ["auto", *PRESETS], DUE


def test_the_english_texts_are_those_of_the_schemas():
    assert schemas.ENGLISH.read_text(encoding="utf-8") == schemas.english_texts(), DUE


@pytest.mark.parametrize("name", SAVED)
def test_a_workflow_has_the_nodes_and_notes_of_its_description_in_their_places(name):
    described = layout(WORKFLOWS[name])
    wanted = [(kind, list(place)) for kind, place, *_ in described["nodes"].values()]
    wanted += [("MarkdownNote", list(place)) for place, *_ in described["notes"]]
    saved = load(f"workflows/{name}.json")["nodes"]
    assert sorted((node["type"], node["pos"]) for node in saved) == sorted(wanted), DUE
    notes = {node["widgets_values"][0] for node in saved if node["type"] == "MarkdownNote"}
    assert notes == {text for *_, text in described["notes"]}, DUE


@pytest.mark.parametrize("name", WORKFLOWS)
def test_an_api_prompt_has_the_values_of_its_description(name):
    prompt = load(f"workflows/api/{name.removeprefix('rolling_kv_')}.json")
    saved = [(node["class_type"], node["inputs"]) for node in prompt.values()]
    for kind, values, *_ in WORKFLOWS[name]["nodes"].values():
        links = re.compile(r"[a-z_]+\.\d")
        plain = {key: value for key, value in values.items() if not links.fullmatch(str(value))}
        assert any(kind == other and plain.items() <= inputs.items() for other, inputs in saved), f"{kind}: {DUE}"


def test_translations_give_the_same_links():
    english, chinese = (load(f"locales/{language}/nodeDefs.json") for language in ("en", "zh"))
    for name, node in english.items():
        for given, text in node["inputs"].items():
            for link in re.findall(r"https://\S+?(?=\.?(?:\s|$))", text["tooltip"]):
                assert link in chinese[name]["inputs"][given]["tooltip"], f"{name}.{given}"
