"""The Triton kernels, in a process of their own: Triton has to know before it is imported that it interprets them."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from builders import tiny_transformer

from rolling_kv import devices
from rolling_kv.config import ExecutionConfig
from rolling_kv.devices import checked_kernels
from rolling_kv.wan import fused
from rolling_kv.wan.attachment import apply_rolling_kv_cache
from tools.comfyui.env import PACK

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is for Linux")


@needs_triton
def test_the_kernels_give_what_the_plain_paths_give():
    command = [sys.executable, "-m", "pytest", "-c", "tests/pytest.ini", "tests/support/kernel_cases.py", "-q", "-n0"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    told = subprocess.run(command, cwd=PACK, env=environment, capture_output=True, text=True, timeout=600)
    assert told.returncode == 0, told.stdout + told.stderr


@pytest.fixture
def blocks():
    return tiny_transformer(num_attention_heads=2, attention_head_dim=24, cross_attn_norm=True).blocks


@needs_triton
def test_when_kernels_are_used(blocks, monkeypatch):
    def used(blocks=blocks, **execution):
        return fused.kernels_for(ExecutionConfig(**execution), blocks) is not None

    assert not used()  # on a CPU
    monkeypatch.setattr(fused, "kernels_run_on", lambda device: True)
    assert used()
    assert not used(plain=True) and not used(exact=True) and not used(compile=True)
    hook = blocks[1].attn1.norm_k.register_forward_hook(lambda *_: None)
    assert not used()
    hook.remove()
    assert used()
    assert not used(tiny_transformer(num_attention_heads=2, attention_head_dim=24, cross_attn_norm=False).blocks)


@needs_triton
def test_where_triton_cannot_make_code_passes_do_without(caplog):
    """As on this machine, if it has no GPU."""
    if torch.cuda.is_available():
        pytest.skip("Triton can make code here")
    checked_kernels.cache_clear()
    assert not fused.kernels_run_on(torch.device("cuda")) and not fused.kernels_run_on(torch.device("cuda"))
    (record,) = caplog.records
    assert "Triton cannot make kernels here" in record.message


def test_without_triton_passes_do_without(monkeypatch):
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    checked_kernels.cache_clear()
    assert not fused.kernels_run_on(torch.device("cuda"))
    checked_kernels.cache_clear()


def test_nothing_of_triton_is_imported_on_a_cpu():
    code = "import sys, rolling_kv.wan.attachment, rolling_kv.pipeline; print('rolling_kv.wan.kernels' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], cwd=PACK, capture_output=True, text=True, timeout=300)
    assert told.stdout.strip() == "False", told.stderr


def test_an_attachment_on_a_cpu_has_no_kernels():
    transformer = tiny_transformer(num_attention_heads=2, attention_head_dim=24)
    with apply_rolling_kv_cache(transformer) as attachment:
        assert attachment.context.kernels is None
