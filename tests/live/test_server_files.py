"""What the server tells the frontend about the pack: schemas, help pages, templates, translations."""

import json
import urllib.parse

import pytest
from graphs import PACK, TINY

from tools.generate.schemas import PREFIX, record, recorded


def rolling_nodes(client) -> dict:
    return {name: info for name, info in client.object_info().items() if name.startswith(PREFIX)}


def folder_name(client) -> str:
    """What the server calls the pack: the name of its folder in custom_nodes."""
    (module,) = {schema["python_module"] for schema in rolling_nodes(client).values()}
    return module.removeprefix("custom_nodes.")


def test_recorded_schemas_are_those_of_the_server(client):
    assert record(client) == recorded(), "a node has changed: python -m tools.generate"


def test_the_bundled_model_is_the_first_choice(client):
    nodes = rolling_nodes(client)
    for name in ("RollingKVLoadModel", "RollingKVLoadTextEncoder", "RollingKVLoadVAE"):
        first_input = nodes[name]["input_order"]["required"][0]
        assert nodes[name]["input"]["required"][first_input][1]["options"][0] == TINY


def test_help_pages_are_served(client):
    for name in rolling_nodes(client):
        assert client.get(f"/extensions/{folder_name(client)}/docs/{name}/en.md").startswith(b"#"), name


def test_templates_are_offered_with_thumbnails(client):
    pack = folder_name(client)
    offered = json.loads(client.get("/workflow_templates"))[pack]
    assert sorted(offered) == sorted(path.stem for path in (PACK / "workflows").glob("*.json"))
    for name in offered:
        address = f"/api/workflow_templates/{pack}/{urllib.parse.quote(name)}"
        assert json.loads(client.get(address + ".json"))["nodes"]
        assert client.get(address + ".jpg").startswith(b"\xff\xd8")


@pytest.mark.parametrize("language", sorted(path.name for path in (PACK / "locales").iterdir() if path.is_dir()))
def test_translations_reach_the_frontend(client, language):
    served = json.loads(client.get("/i18n"))[language]["nodeDefs"]
    assert {name for name in served if name.startswith("RollingKV")} == set(rolling_nodes(client))
