"""A model under ComfyUI's memory management, which a stand-in plays: the order of things when the weights go."""

from types import ModuleType, SimpleNamespace

import pytest
from node_modules import node_module


class ModelPatcher:
    def __init__(self, model, offload_device):
        self.model, self.offload_device = model, offload_device

    def detach(self, unpatch_all=True):
        if unpatch_all:
            self.model.device = self.offload_device
        return self.model


class Loras:
    """Notes where the weights are when the LoRAs come off: there, what they were is put back."""

    def __init__(self, model):
        self.model, self.cleared = model, []

    def clear(self):
        self.cleared.append(self.model.device)


@pytest.fixture
def managed(monkeypatch):
    patcher = ModuleType("comfy.model_patcher")
    patcher.ModelPatcher = ModelPatcher
    with node_module("patchers", patcher) as module:
        monkeypatch.setattr(module, "LoraStack", Loras)
        yield module


def test_loras_come_off_where_the_weights_end_up(managed):
    patcher = managed.ManagedModel(SimpleNamespace(device="gpu"), offload_device="cpu")
    assert patcher.detach(unpatch_all=False) is patcher.model
    assert patcher.loras.cleared == []
    assert patcher.detach() is patcher.model
    assert patcher.loras.cleared == ["cpu"]


def test_bytes_of_loras_that_are_applied_are_not_announced_again(managed, monkeypatch):
    model = SimpleNamespace(device="gpu", dtype=None, transformers=("weights",))
    patcher = managed.ManagedModel(model, offload_device="cpu")
    patcher.loras.holds = lambda loras: loras == [("a file", 1.0)]
    monkeypatch.setattr(patcher, "open_lora", lambda path: path)
    monkeypatch.setattr(managed.ManagedModel, "_with_strengths", lambda self, loras: list(loras))
    assert patcher.lora_bytes((("a file", 1.0),)) == 0
    monkeypatch.setattr(patcher, "open_lora", lambda path: SimpleNamespace(nbytes=lambda dtype: 7))
    assert patcher.lora_bytes((("a file", 0.5), ("another", 1.0))) == 14
    model.transformers = ("weights", "weights of context passes")
    assert patcher.lora_bytes((("a file", 0.5), ("another", 1.0))) == 28
