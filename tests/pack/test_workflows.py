"""The example workflows fit the recorded schemas, and each workflow file says the same as its API prompt."""

import itertools
import json
import math

import pytest

from tools.comfyui.env import PACK
from tools.generate.schemas import inputs_of, recorded, settings_of

SCHEMAS = recorded()
NOTES = ("MarkdownNote", "Note")
FOLDER = PACK / "workflows"
WORKFLOWS = sorted(FOLDER.glob("*.json"))
PROMPTS = sorted((FOLDER / "api").glob("*.json"))
TITLE_HEIGHT = 30
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"
SEED_CONTROLS = ("fixed", "increment", "decrement", "randomize")

each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
each_prompt = pytest.mark.parametrize("path", PROMPTS, ids=lambda path: path.stem)


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def graph_nodes(workflow):
    return [node for node in workflow["nodes"] if node["type"] not in NOTES]


def downloads(path):
    """The files that a workflow names for people to get, with their links; of an API prompt, those of its workflow."""
    workflow = load(FOLDER / f"rolling_kv_{path.stem.removeprefix('rolling_kv_')}.json")
    return [file for node in graph_nodes(workflow) for file in node["properties"].get("models", [])]


def choices(spec):
    """The values of a combo input, None for other inputs."""
    kind, *options = spec
    if isinstance(kind, list):
        return kind
    if kind == DYNAMIC:
        return [option["key"] for option in options[0]["options"]]
    return options[0]["options"] if kind == "COMBO" else None


def is_widget(spec):
    return choices(spec) is not None or spec[0] in ("INT", "FLOAT", "STRING", "BOOLEAN")


def settings_for(name, spec, choice):
    """The inputs that a choice of a dynamic combo brings along, by their names in a prompt; {} for other inputs."""
    settings = settings_of(spec)
    return {f"{name}.{k.partition('.')[2]}": v for k, v in settings.items() if k.partition(".")[0] == choice}


def inputs_with(schema, values):
    """The inputs of a node by name, with those that its dynamic combos bring at these values."""
    return {
        key: value
        for name, spec in inputs_of(schema).items()
        for key, value in ({name: spec} | settings_for(name, spec, values.get(name))).items()
    }


def widgets_of(schema, values):
    """The widgets that the frontend makes for a node at these values, in its order: name to input, None for its own."""
    widgets = {}
    for name, spec in inputs_of(schema).items():
        if is_widget(spec):
            chosen = values[len(widgets)]
            widgets[name] = spec
            widgets |= settings_for(name, spec, chosen)
            options = spec[1] if len(spec) > 1 else {}
            if options.get("control_after_generate"):
                widgets["control_after_generate"] = None
            if options.get("image_upload"):
                widgets["upload"] = None
    return widgets


def saved_states():
    """Names under which Load State finds the first state that each example saves."""
    nodes = itertools.chain(*(load(path).values() for path in PROMPTS))
    savers = [node["inputs"] for node in nodes if node["class_type"] == "RollingKVSaveState"]
    return {f"{saver['filename_prefix']}_00001_.safetensors [output]" for saver in savers}


def check_value(name, spec, value, files=()):
    """files: names that a choice of a file may have beside those that are there."""
    allowed = choices(spec)
    if name.endswith("_name") and value in files:
        return
    if name.endswith("state_name"):
        allowed = saved_states()
    if allowed is not None:
        assert value in allowed, f"{name}: {value!r} is not one of {allowed}"
        return
    kind, options = spec
    types = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}[kind]
    assert isinstance(value, types) and isinstance(value, bool) == (kind == "BOOLEAN"), f"{name}: {value!r} for {kind}"
    if kind in ("INT", "FLOAT"):
        assert options.get("min", -math.inf) <= value <= options.get("max", math.inf), f"{name}: {value}"
    if kind == "INT" and "step" in options:
        assert (value - options["min"]) % options["step"] == 0, f"{name}: {value} is not a step of {options['step']}"


def box(node):
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE_HEIGHT, x + width, y + height


def widget_values(node):
    """The values of a node's widgets by input, without those of the frontend's own widgets."""
    values = node.get("widgets_values", [])  # a node without widgets has none
    widgets = widgets_of(SCHEMAS[node["type"]], values)
    return {name: value for (name, spec), value in zip(widgets.items(), values) if spec is not None}


def as_prompt(workflow):
    """The API prompt of a workflow, without titles."""
    links = {link[0]: link for link in workflow["links"]}
    prompt = {}
    for node in graph_nodes(workflow):
        inputs = widget_values(node)
        for slot in node["inputs"]:
            if slot["link"] is not None:
                _, source, output, *_ = links[slot["link"]]
                inputs[slot["name"]] = [str(source), output]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def test_the_examples_are_there():
    assert {path.stem for path in WORKFLOWS} >= {
        "rolling_kv_text_to_video", "rolling_kv_image_to_video", "rolling_kv_two_prompts", "rolling_kv_step_cache",
        "rolling_kv_benchmark",
    }  # fmt: skip
    assert (FOLDER / "api" / "quickstart.json") in PROMPTS


@each_workflow
def test_nodes_and_widgets_fit_the_schemas(path):
    files = [file["name"] for file in downloads(path)]
    for node in graph_nodes(load(path)):
        assert node["type"] in SCHEMAS, f"{node['type']} is not recorded: python -m tools.generate"
        schema = SCHEMAS[node["type"]]
        values = node.get("widgets_values", [])  # a node without widgets has none
        widgets = widgets_of(schema, values)
        assert len(values) == len(widgets), f"{node['type']}: {values} for {list(widgets)}"
        for (name, spec), value in zip(widgets.items(), values):
            if spec is not None:
                check_value(f"{node['type']}.{name}", spec, value, files)
        if "control_after_generate" in widgets:
            assert values[list(widgets).index("control_after_generate")] in SEED_CONTROLS
        specs = inputs_with(schema, widget_values(node))
        inputs = {name: spec[0] if isinstance(spec[0], str) else "COMBO" for name, spec in specs.items()}
        slots = {slot["name"]: slot["type"] for slot in node["inputs"] if slot["name"] != "upload"}
        assert slots == inputs, node["type"]
        assert [(slot["name"], slot["type"]) for slot in node["outputs"]] == list(
            zip(schema["output_name"], schema["output"])
        ), node["type"]
        assert node["mode"] == 0, f"{node['type']} is muted or bypassed"


@pytest.mark.parametrize("path", [path for path in WORKFLOWS if downloads(path)], ids=lambda path: path.stem)
def test_a_workflow_of_a_real_model_says_where_each_file_comes_from(path):
    """Each node has the file that it loads, with the folder that it looks into."""
    folders = {
        "model_name": "diffusion_models",
        "text_encoder_name": "text_encoders",
        "vae_name": "vae",
        "lora_name": "loras",
    }
    loaders = 0
    for node in graph_nodes(load(path)):
        named = {name: value for name, value in widget_values(node).items() if name in folders}
        told = [(file["name"], file["directory"]) for file in node["properties"].get("models", [])]
        assert told == [(value, folders[name]) for name, value in named.items()], node["type"]
        loaders += len(told)
    assert loaders >= 3
    for file in downloads(path):
        assert file["url"].startswith("https://huggingface.co/") and file["url"].endswith("/" + file["name"])


@each_workflow
def test_links_join_slots_of_one_type(path):
    workflow = load(path)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {}
    for link, source, output, target, slot, kind in workflow["links"]:
        assert link not in links
        links[link] = (source, output, target, slot)
        out, into = nodes[source]["outputs"][output], nodes[target]["inputs"][slot]
        assert out["type"] == kind and kind in into["type"].split(",")  # an input may take links of several types
        assert link in out["links"] and into["link"] == link
    used = {slot["link"] for node in nodes.values() for slot in node["inputs"]} - {None}
    given = {link for node in nodes.values() for slot in node["outputs"] for link in slot["links"] or ()}
    assert used == given == links.keys()
    assert len(nodes) == len(workflow["nodes"])
    assert workflow["last_node_id"] >= max(nodes) and workflow["last_link_id"] >= max(links)


@each_workflow
def test_required_inputs_are_connected_and_something_is_saved(path):
    nodes = graph_nodes(load(path))
    for node in nodes:
        connected = {slot["name"] for slot in node["inputs"] if slot["link"] is not None}
        required = SCHEMAS[node["type"]]["input"].get("required", {})
        assert {name for name, spec in required.items() if not is_widget(spec)} <= connected, node["type"]
    assert any(SCHEMAS[node["type"]]["output_node"] for node in nodes)


@each_workflow
def test_a_person_can_read_it(path):
    workflow = load(path)
    notes = [node["widgets_values"][0] for node in workflow["nodes"] if node["type"] in NOTES]
    assert any(note.startswith("## ") for note in notes) and any("models/diffusion_models" in note for note in notes)
    for one, other in itertools.combinations(workflow["nodes"], 2):
        (left, top, right, bottom), (x0, y0, x1, y1) = box(one), box(other)
        assert left >= x1 or x0 >= right or top >= y1 or y0 >= bottom, f"{one['type']} lies on {other['type']}"


@each_workflow
def test_it_has_a_thumbnail(path):
    picture = path.with_suffix(".jpg").read_bytes()
    assert picture.startswith(b"\xff\xd8\xff") and len(picture) < 300_000


def test_there_is_one_folder_of_templates():
    """ComfyUI lists the workflows of every folder of these names, and serves those of the first alone."""
    names = {"example_workflows", "example", "examples", "workflow", "workflows"}
    assert {path.name for path in PACK.iterdir()} & names == {FOLDER.name}


def test_there_are_no_pictures_of_other_workflows():
    assert {path.stem for path in FOLDER.glob("*.jpg")} <= {path.stem for path in WORKFLOWS}


@each_workflow
def test_the_workflow_and_its_api_prompt_agree(path):
    prompt = load(FOLDER / "api" / f"{path.stem.removeprefix('rolling_kv_')}.json")
    untitled = {node_id: {k: v for k, v in node.items() if k != "_meta"} for node_id, node in prompt.items()}
    assert as_prompt(load(path)) == untitled


def test_each_api_prompt_but_the_quickstart_belongs_to_a_workflow():
    assert {path.stem for path in PROMPTS} == {
        "quickstart", *(path.stem.removeprefix("rolling_kv_") for path in WORKFLOWS)
    }  # fmt: skip


@each_prompt
def test_api_prompts_fit_the_schemas(path):
    prompt, files = load(path), []
    if path.stem != "quickstart":
        files = [file["name"] for file in downloads(path)]
    for node_id, node in prompt.items():
        schema = SCHEMAS[node["class_type"]]
        inputs, values = inputs_with(schema, node["inputs"]), node["inputs"]
        assert schema["input"].get("required", {}).keys() <= values.keys() <= inputs.keys(), node["class_type"]
        assert node["_meta"]["title"], node_id
        for name, value in values.items():
            if isinstance(value, list):
                source = SCHEMAS[prompt[value[0]]["class_type"]]
                assert source["output"][value[1]] in inputs[name][0].split(","), f"{node['class_type']}.{name}"
            else:
                check_value(f"{node['class_type']}.{name}", inputs[name], value, files)


def test_the_quickstart_needs_no_model_but_the_bundled_one():
    prompt = load(FOLDER / "api" / "quickstart.json")
    files = {n: v for node in prompt.values() for n, v in node["inputs"].items() if n.endswith("_name")}
    assert set(files) == {"model_name", "text_encoder_name", "vae_name"} and set(files.values()) == {"tiny (bundled)"}
