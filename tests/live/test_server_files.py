"""What the server tells the frontend about the pack: schemas, help pages, templates, translations."""

import json
import os
import urllib.parse
from pathlib import Path

import pytest
from graphs import PACK, TINY

RECORD = Path(__file__).parents[1] / "data/object_info.json"


def rolling_nodes(client) -> dict:
    return {name: info for name, info in client.object_info().items() if name.startswith("RollingKV")}


def without_this_machine(schemas: dict) -> dict:
    """Schemas less the pack's folder name and the model files that happen to lie on this machine."""
    for schema in schemas.values():
        del schema["python_module"]
        for group in schema["input"].values():
            for kind, *rest in group.values():
                if kind == "COMBO" and TINY in rest[0].get("options", []):
                    rest[0]["options"] = [TINY]
    return schemas


def test_recorded_schemas_are_those_of_the_server(client):
    """ROLLING_KV_RECORD=1 writes the record anew."""
    schemas = without_this_machine(rolling_nodes(client))
    if os.environ.get("ROLLING_KV_RECORD"):
        RECORD.write_text(json.dumps(schemas, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    assert schemas == recorded, "a node has changed: run this test once with ROLLING_KV_RECORD=1"


def test_the_bundled_model_is_the_first_choice(client):
    nodes = rolling_nodes(client)
    for name in ("RollingKVLoadModel", "RollingKVLoadTextEncoder", "RollingKVLoadVAE"):
        first_input = nodes[name]["input_order"]["required"][0]
        assert nodes[name]["input"]["required"][first_input][1]["options"][0] == TINY


def test_help_pages_are_served(client):
    for name, schema in rolling_nodes(client).items():
        pack = schema["python_module"].removeprefix("custom_nodes.")
        assert client.get(f"/extensions/{pack}/docs/{name}/en.md").startswith(b"#"), name


def test_templates_are_offered_with_thumbnails(client):
    offered = {pack: names for pack, names in json.loads(client.get("/workflow_templates")).items()}
    expected = sorted(path.stem for path in (PACK / "workflows").glob("*.json"))
    (pack,) = [pack for pack, names in offered.items() if sorted(names) == expected]
    for name in expected:
        address = f"/api/workflow_templates/{pack}/{urllib.parse.quote(name)}"
        assert json.loads(client.get(address + ".json"))["nodes"]
        assert client.get(address + ".jpg").startswith(b"\xff\xd8")


@pytest.mark.parametrize("language", sorted(path.name for path in (PACK / "locales").iterdir() if path.is_dir()))
def test_translations_reach_the_frontend(client, language):
    served = json.loads(client.get("/i18n"))[language]["nodeDefs"]
    assert {name for name in served if name.startswith("RollingKV")} == set(rolling_nodes(client))
