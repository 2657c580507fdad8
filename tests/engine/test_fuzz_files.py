"""Damaged and hostile files, made from seeds: each is refused in one clear line, or loads and gives finite values.

`--fuzz N` tries N of them instead of the few here. A failure names its seed.
"""

import os
import pickle
import signal
from dataclasses import replace

import pytest
import torch
from hostile_files import Sources, write_case

from rolling_kv.checkpoints.model import load_model
from rolling_kv.inspection import inspect_checkpoint
from rolling_kv.sampling.session import RollingSession
from rolling_kv.text import load_text_encoder
from rolling_kv.vae.loading import load_vae

resource = pytest.importorskip("resource")
SECONDS, BYTES = 20, 3 * 2**30


@pytest.fixture(scope="module")
def sources():
    return Sources()


def use(kind, path):
    """What a person does with such a file; returns the values that come out."""
    if kind == "text":
        return load_text_encoder(path).encode(["a red circle"])
    if kind == "vae":
        return load_vae(path).decoder().decode(torch.ones(1, 16, 1, 2, 2))
    refusals = []
    for read in (inspect_checkpoint, load_model):
        try:
            model = read(path)
        except ValueError as error:
            refusals.append(error)
    if refusals:
        raise refusals[-1]
    prompt = torch.ones(1, 5, model.transformer.config.text_dim)
    sampling = replace(model.preset.sampling, num_inference_steps=2)
    with RollingSession(model, prompt, height=32, width=32, sampling=sampling, negative=-prompt) as session:
        next(session.generate(1))
    return session.state.latents()


def outcome(kind, path):
    """ "" for finite values or a refusal in one printable line; otherwise what is wrong."""
    try:
        values = use(kind, path)
    except ValueError as error:  # CheckpointError is one
        text = str(error)
        text.encode("utf-8")
        if not 0 < len(text) <= 600 or not text.isprintable():
            return f"a message of {len(text)} characters: {text[:300]!r}"
        return ""
    return "" if values.isfinite().all() else "values that are no numbers"


def forked(work):
    """The result of `work()` in a process of its own, or what ended that; bounded in time and memory."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
            resource.setrlimit(resource.RLIMIT_CPU, (2 * SECONDS, 2 * SECONDS))  # its own, however busy the machine is
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                result = work()
            except BaseException as error:
                result = f"{type(error).__name__}: {str(error)[:300]!r}"
            os.write(writer, pickle.dumps(result.encode("utf-8", "backslashreplace")[:4000]))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return (
        pickle.loads(said).decode() if said else f"ended by signal {os.WTERMSIG(status)} (27: after {SECONDS} seconds)"
    )


def test_files_are_refused_clearly_or_work(sources, tmp_path, request):
    count = request.config.getoption("--fuzz") or 40
    failures = {}
    for seed in range(count):
        folder = tmp_path / str(seed)
        folder.mkdir()

        def work(seed=seed, folder=folder):
            kind, path = write_case(seed, folder, sources)
            return outcome(kind, path)

        if result := forked(work):
            failures[seed] = result
    assert not failures
