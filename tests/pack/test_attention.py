"""Which kernel of attention the loader chooses, under a ComfyUI that a stand-in plays."""

import pytest
import torch
from node_modules import node_module

CUDA, HALF = torch.device("cuda"), torch.bfloat16


@pytest.fixture
def attention():
    with node_module("attention") as module:
        yield module


@pytest.fixture
def started(attention, monkeypatch):
    """Starts the stand-in with sage and flash attention or without, each of them installed or not."""

    def start(sage=False, flash=False, installed=True):
        monkeypatch.setattr(attention.mm, "sage_attention_enabled", lambda: sage, raising=False)
        monkeypatch.setattr(attention.mm, "flash_attention_enabled", lambda: flash, raising=False)
        if installed:
            name = "pack.rolling_kv.config.execution._check_attention_backend_requirements"
            monkeypatch.setattr(name, lambda backend: None)

    return start


def test_auto_is_what_comfyui_was_started_with(attention, started):
    started()
    assert attention.backend_of("auto", CUDA, HALF) == (None, "")
    started(sage=True, flash=True)
    assert attention.backend_of("auto", CUDA, HALF) == ("sage", "")
    started(flash=True)
    assert attention.backend_of("auto", CUDA, HALF) == ("flash", "")


def test_auto_is_never_a_kernel_that_the_model_cannot_use(attention, started):
    started(sage=True)
    assert attention.backend_of("auto", torch.device("cpu"), HALF) == (None, "")
    assert attention.backend_of("auto", CUDA, torch.float32) == (None, "")


def test_auto_goes_on_where_the_package_is_missing(attention, started):
    started(sage=True, installed=False)
    backend, remark = attention.backend_of("auto", CUDA, HALF)
    assert backend is None and "sage is not installed here" in remark


def test_what_was_chosen_counts(attention, started):
    started(sage=True)
    assert attention.backend_of("native", CUDA, HALF) == ("native", "")


def test_a_choice_that_is_no_longer_there_stands_for_another(attention):
    assert attention.EARLIER["_native_cudnn"] == "auto" and "_native_cudnn" not in attention.CHOICES
    assert all(attention.EARLIER[name] == name for name in attention.CHOICES)
