"""The nodes' schemas as a server describes them, for the tests that run without one, and the English texts in them."""

from __future__ import annotations

import json
import re

from ..comfyui.client import ComfyClient, load_prompt
from ..comfyui.env import PACK
from .files import as_json, write

RECORD = PACK / "tests" / "data" / "object_info.json"
ENGLISH = PACK / "locales" / "en" / "nodeDefs.json"

BENCHMARK_PAGES = sorted((PACK / "web" / "docs" / "RollingKVBenchmark").glob("*.md"))

PREFIX = "RollingKV"
"""What the ids of the pack's own nodes begin with."""

FILE_INPUTS = ("model_name", "lora_name", "text_encoder_name", "vae_name", "state_name", "image")
"""Inputs that list the files of the machine."""
SHIPPED = ("tiny (bundled)", "stripes (bundled)", "example.png")
"""Files that every machine has: the pack's model and ComfyUI's example image."""

KEPT = (
    "name", "display_name", "description", "category", "search_aliases", "output_node", "input", "input_order",
    "output", "output_is_list", "output_name", "output_tooltips",
)  # fmt: skip
"""Entries of a schema that every supported ComfyUI has, without the name of the folder that the pack lies in."""


def recorded() -> dict[str, dict]:
    """The schemas in tests/data/object_info.json, by node id."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


def record(client: ComfyClient) -> dict[str, dict]:
    """What the server at `client` knows of the pack's nodes and of those that the workflows use, normalised, by id."""
    known = client.object_info()
    names = {name for name in known if name.startswith(PREFIX)} | nodes_of_workflows()
    return {name: normalised(known[name]) for name in sorted(names)}


def nodes_of_workflows() -> set[str]:
    prompts = (PACK / "workflows" / "api").glob("*.json")
    return {node["class_type"] for path in prompts for node in load_prompt(path).values()}


def normalised(schema: dict) -> dict:
    """A node's schema without what differs between machines: entries not in KEPT, and files not in SHIPPED."""
    schema = {key: schema[key] for key in KEPT if key in schema}
    schema["input"] = {
        section: {name: _without_local_files(name, spec) for name, spec in inputs.items()}
        for section, inputs in schema["input"].items()
    }
    return schema


def _without_local_files(name: str, spec: list) -> list:
    if name not in FILE_INPUTS:
        return spec
    kind, *options = spec
    if isinstance(kind, list):  # a combo of a node in the older API: [[choices], {options}]
        return [_shipped(kind), *options]
    if kind == "COMBO":
        return [kind, options[0] | {"options": _shipped(options[0]["options"])}]
    return spec


def _shipped(files: list[str]) -> list[str]:
    return [file for file in files if file in SHIPPED]


def inputs_of(schema: dict) -> dict[str, list]:
    """The inputs of a node by name, required ones first, in the order in which the frontend shows them."""
    order = schema["input_order"]
    return {
        name: schema["input"][section][name] for section in ("required", "optional") for name in order.get(section, ())
    }


def settings_of(spec: list) -> dict[str, list]:
    """The inputs that the choices of a dynamic combo bring along, by choice and name; {} for other inputs."""
    if spec[0] != "COMFY_DYNAMICCOMBO_V3":
        return {}
    return {
        f"{choice['key']}.{name}": setting
        for choice in spec[1]["options"]
        for section in choice["inputs"].values()
        for name, setting in section.items()
    }


def english(schemas: dict[str, dict]) -> dict[str, dict]:
    """The pack's nodes as an English nodeDefs.json: the texts of the schemas, outputs keyed by number.

    Not those of `settings_of`: the frontend looks them up without the choice, so one text would serve several settings.
    """
    return {name: _texts(schema) for name, schema in schemas.items() if name.startswith(PREFIX)}


def _texts(schema: dict) -> dict:
    inputs = {name: {"name": name, "tooltip": spec[1]["tooltip"]} for name, spec in inputs_of(schema).items()}
    outputs = {
        str(index): {"name": name, "tooltip": tooltip}
        for index, (name, tooltip) in enumerate(zip(schema["output_name"], schema["output_tooltips"]))
    }
    return {key: schema[key] for key in ("display_name", "description")} | {"inputs": inputs, "outputs": outputs}


def with_switches(page: str, schemas: dict[str, dict]) -> str:
    """A help page of Benchmark Step Caches, with the list of the switches that its choice brings along."""
    settings = settings_of(inputs_of(schemas["RollingKVBenchmark"])["methods"])
    lines = [f"- `{name.partition('.')[2]}`: {spec[1]['display_name']}\n" for name, spec in settings.items()]
    return re.sub(r"(?<=\n\n)(- `\w+`: .*\n)+", "".join(lines), page, count=1)


def english_texts() -> str:
    """The content of locales/en/nodeDefs.json."""
    return as_json(english(recorded()))


def generate(client: ComfyClient) -> None:
    """Write tests/data/object_info.json from a server that has the pack, and the English texts from that."""
    write(RECORD, as_json(record(client)))
    write(ENGLISH, english_texts())
    for path in BENCHMARK_PAGES:
        write(path, with_switches(path.read_text(encoding="utf-8"), recorded()))
