"""Prompts damaged at random, from a seed: each is refused, fails or works with words that a person understands.

`--fuzz N` tries N of them instead of a few.
"""

import copy
import math
import random
import threading

import pytest
from graphs import read_video
from test_prompts import LENGTHS

from tools.comfyui.client import PromptFailed, PromptInterrupted, PromptRejected, first_file, load_prompt
from tools.comfyui.env import PACK

FEW = 15
FIRST_SEED = 0
LONGEST_SECONDS = 10
SHORT = {length: 0.75 for length in LENGTHS.values()} | {"steps.count": 4, "memory": False}
"""So that what is left whole soon comes to its last node."""


def short(graph: dict) -> dict:
    """A prompt whose samplers make a chunk each, and whose benchmark takes few steps."""
    for node in graph.values():
        node["inputs"] |= {name: value for name, value in SHORT.items() if name in node["inputs"]}
    return graph


GRAPHS = [short(load_prompt(path)) for path in sorted((PACK / "workflows" / "api").glob("*.json"))]

HOSTILE = [
    None, True, False, 0, 1, -1, 2**31, 2**62, -(2**62), 1e308, -1e308, math.nan, math.inf, -math.inf, 0.5,
    "", " ", "nan", "tiny", "../../etc/passwd", "C:\\model.safetensors", "/dev/zero", "a" * 5000, "\ud83e", "\0", "\x1b[31m",
    "тест", "all frames", "the model's own", [], {}, [[]], {"a": {"b": 1}}, ["1", 0],
]  # fmt: skip
"""Links that lead nowhere are not among them: one in an input that ComfyUI does not know ends its worker, in any node."""

FOREIGN = (
    "NoneType", "object has no attribute", "Traceback", "positional argument", "unsupported operand", "not subscriptable",
    "DefaultCPUAllocator", "UnicodeEncodeError", "must be real number", "cannot convert float",
)  # fmt: skip
"""What messages of other layers are made of."""

COMFYUIS = "Failed to convert an input value to a"
"""What ComfyUI says of an infinite seed or length, with Python's words, before any node is asked."""


def damaged(seed: int) -> dict:
    """One of the example prompts with up to three inputs of our nodes changed, left out, or added."""
    chance = random.Random(seed)
    graph = copy.deepcopy(chance.choice(GRAPHS))
    ours = [node for node in graph.values() if node["class_type"].startswith("RollingKV")]
    for _ in range(chance.randint(1, 3)):
        node = chance.choice(ours)
        name = chance.choice(sorted(node["inputs"]))
        kind = chance.random()
        if kind < 0.75:
            node["inputs"][name] = chance.choice(HOSTILE)
        elif kind < 0.9:
            del node["inputs"][name]
            if not node["inputs"]:
                break
        else:
            node["inputs"][f"{name}.{chance.choice(['frames', 'strength', 'x'])}"] = chance.choice(HOSTILE)
    return graph


def outcome(client, graph: dict) -> str:
    """What a person reads, empty where the prompt ran; what takes long is cancelled."""
    timer = threading.Timer(LONGEST_SECONDS, client.interrupt)
    timer.start()
    try:
        client.run(graph)
        return ""
    except PromptInterrupted:
        return ""
    except (PromptRejected, PromptFailed) as failure:
        return str(failure)
    finally:
        timer.cancel()


@pytest.mark.traceback_expected
def test_damaged_prompts_end_in_words_for_people_and_the_server_lives(client, request):
    for seed in range(FIRST_SEED, FIRST_SEED + (request.config.getoption("--fuzz") or FEW)):
        message = outcome(client, damaged(seed))
        message.encode()
        assert len(message) < 20_000, f"seed {seed}: a message of {len(message)} characters"
        ours = "\n".join(line for line in message.splitlines() if COMFYUIS not in line)
        foreign = [words for words in FOREIGN if words in ours]
        assert not foreign, f"seed {seed}: {foreign} in {message[:2000]}"
    made = client.run(load_prompt(PACK / "workflows" / "api" / "quickstart.json"))
    assert len(read_video(client.view(first_file(made, ".mp4"))).frames) > 1
