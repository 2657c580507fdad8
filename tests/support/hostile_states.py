"""Files under the name of a state that are damaged, or made to do harm: more than a hundred that nobody should believe."""

import hashlib
import json
import os
import pickle
import random

import torch

from rolling_kv.sampling.state import CacheState


def random_state():
    """A state of 7 chunks and 3 prompts that no model has made, with what `malformed` changes in its file."""
    generator, state = torch.Generator().manual_seed(0), CacheState(model="m" * 16)
    prompts = [torch.randn(1, 4, 8, generator=generator) for _ in range(3)]
    for number, frames in enumerate([1, 2, 2, 2, 2, 2, 2]):
        chunk = torch.randn(1, 16, frames, 4, 6, generator=generator)
        state = state.extended(chunk, timestep=0.0, prompt=prompts[number // 3], negative=None, seed=number or None)
    return state


def parts(path):
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def forged(header, data=b"", said=None, digest=True):
    """A file with a digest that fits, whatever it says."""
    if said is not None:
        header["__metadata__"]["state"] = said if isinstance(said, str) else json.dumps(said)
    if digest:
        header["__metadata__"]["digest"] = "0" * 64
    text = json.dumps(header).encode()
    raw = len(text).to_bytes(8, "little") + text + data
    return raw.replace(b"0" * 64, hashlib.sha256(raw).hexdigest().encode(), 1) if digest else raw


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["STATE_FILE_BOMB"],)


def malformed(good):
    """(name, bytes, what the message says): more than a hundred files that nobody should believe."""
    raw, rng = good.read_bytes(), random.Random(1)
    start = len(raw) - len(parts(good)[1])
    for end in [0, 1, 7, 8]:
        yield f"{end} bytes", raw[:end], "no safetensors file"
    for end in [9, 10, 100, start - 1, start, start + 1, len(raw) - 1, *rng.sample(range(start, len(raw)), 15)]:
        yield f"cut at {end}", raw[:end], "cut short"
    yield "longer", raw + b"\0", "longer than what it holds"
    for place in [*rng.sample(range(9, start), 25), *rng.sample(range(start, len(raw)), 25)]:
        flipped = raw[:place] + bytes([raw[place] ^ 1 << rng.randrange(8)]) + raw[place + 1 :]
        yield f"flipped at {place}", flipped, ""
    for length in (2**24 + 1, 2**40, 2**63, 2**64 - 1):
        yield f"a header of {length}", length.to_bytes(8, "little") + raw[8:], "claims to be .* are the most"
    yield "a pickle", pickle.dumps(Bomb()), "pickle or an archive, which was not opened"
    yield "an archive", b"PK\x03\x04" + raw, "pickle or an archive, which was not opened"
    yield "a web page", b"<!DOCTYPE html>" * 9, "no safetensors file"
    yield "deep", len(b"{" * 90000).to_bytes(8, "little") + b"{" * 90000, "no JSON"
    deep = b'{"a":' + b"[" * 90000
    yield "deeper", len(deep).to_bytes(8, "little") + deep, "no JSON"
    yield (
        "an ordinary file",
        forged({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"0000", digest=False),
        ("no cache state"),
    )

    def entries(**changes):
        header, data = parts(good)
        header["chunk.1"] |= changes
        return forged(header, data)

    for dtype in ("I64", "U8", "F8_E4M3", "BOOL", "", None, [], {}, 7):
        yield f"dtype {dtype}", entries(dtype=dtype), "has the type"
    for shape in ([], [1] * 6, [0, 16, 2, 4, 6], [-1, 16, 2, 4, 6], [1.0, 16, 2, 4, 6], [True, 16], [2**40], ["1"]):
        yield f"shape {shape}", entries(shape=shape), "a shape that no state has"
    for shape in (None, 7, [1, 16, 2, 4, 2**30], [1, 16, 2, 4], "abc"):
        yield f"shape {shape}", entries(shape=shape), ""
    yield "transposed", entries(shape=[1, 16, 2, 6, 4]), "does not fit its log"
    yield "half", entries(dtype="F16"), "does not lie where"
    for offsets in ([0, 4], [4, 0], [-8, 9], [0], None, [0.5, 1], ["0", "1"], [2**70, 2**71]):
        yield f"offsets {offsets}", entries(data_offsets=offsets), "does not lie where"
    for name in ("../../evil", "/etc/passwd", "C:\\evil", "chunk.99", "chunk.01", "", "chunk.1\0", "\x1b[2J"):
        header, data = parts(good)
        header = {name if key == "chunk.1" else key: value for key, value in header.items()}
        yield f"the name {name!r}", forged(header, data), "not those that its log tells of"

    def said(**changes):
        header, data = parts(good)
        return forged(header, data, json.loads(header["__metadata__"]["state"]) | changes)

    def logged(number=2, **changes):
        header, data = parts(good)
        content = json.loads(header["__metadata__"]["state"])
        content["log"][number] |= changes
        return forged(header, data, content)

    for field, values in {
        "frames": (0, 1, 3, -2, 2.0, True, "2", None, 10**30),
        "timestep": (-1.0, 1001.0, 0, "0", None),
        "prompt": (-1, 2, 99, 0.0, None, "0"),
        "negative": (-2, 2, 99, None, 0.5),
        "seed": (1.5, "1", True, 2**65, [], [1], [1, 2], [[1]], {}),
        "switch": ("explode", "hold ", None, 1, []),
        "given": (-1, 3, 0.5, None),
    }.items():
        for value in values:
            yield f"{field} {value}", logged(**{field: value}), ""
    yield "a switch at the start", logged(0, switch="cut"), "has the switch 'cut'"
    yield "an unknown fact", logged(evil=1), "damaged"
    for name, value in (("log", []), ("log", None), ("log", [1]), ("log", {}), ("texts", None), ("texts", [1, 2, 3])):
        yield f"{name} {value}", said(**{name: value}), ""
    yield "texts too few", said(texts=[]), "not those that its log tells of"
    for name in ("model", "model_name", "key"):
        yield f"{name} null", said(**{name: None}), "where a text should be"
    yield "another key", said(key="0" * 32), "make the key"
    yield "another model's name in its log", said(model="0" * 16), "make the key"
    yield "another seed", logged(seed=77), "make the key"
    for text in ("", "{}", "[]", "null", "{" * 9, '{"log":[NaN]}', '{"log": 1e999}', "9" * 5000, "[" * 50000):
        header, data = parts(good)
        yield f"it says {text[:12]}", forged(header, data, text), ""
    for version in ("2", "", "1\x1b"):
        header, data = parts(good)
        header["__metadata__"]["version"] = version
        yield f"version {version!r}", forged(header, data), "of version .*, and '1' is what is read"
    for number, value in ((0, float("nan")), (3, float("inf"))):
        header, data = parts(good)
        place = header[f"chunk.{number}"]["data_offsets"][0]
        bad = torch.tensor([value]).view(torch.uint8).numpy().tobytes()
        yield f"{value} in a chunk", forged(header, data[:place] + bad + data[place + 4 :]), "no numbers"
    header, data = parts(good)
    place = header["prompt.1"]["data_offsets"][0]
    yield "NaN in a prompt", forged(header, data[:place] + b"\xff" * 4 + data[place + 4 :]), "no numbers"
    yield "other values", forged(header, data[:place] + b"\0" * 4 + data[place + 4 :]), "make the key"
