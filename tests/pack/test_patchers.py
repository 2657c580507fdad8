"""A model under ComfyUI's memory management, which a stand-in plays: the order of things when the weights go."""

from types import ModuleType, SimpleNamespace

import pytest
import torch
from builders import tiny_transformer
from node_modules import node_module

from rolling_kv.checkpoints.model import CausalModel


class ModelPatcher:
    """As ComfyUI's: it moves all of a model, and counts what it is told or what it finds."""

    def __init__(self, model, offload_device, load_device=None, size=0):
        self.model, self.offload_device, self.load_device, self.size = model, offload_device, load_device, size

    def model_size(self):
        return self.size

    def load(self, full_load):
        with torch.inference_mode(torch.is_inference_mode_enabled()):
            self.model.to(self.load_device)

    def detach(self, unpatch_all=True):
        if unpatch_all:
            self.model.device = self.offload_device
            if isinstance(self.model, torch.nn.Module):
                self.model.to(self.offload_device)
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


def offloaded(managed, card):
    model = CausalModel(tiny_transformer(num_layers=6))
    patcher = managed.ManagedModel(model, load_device=torch.device(card), offload_device="cpu", offload=True)
    return patcher, patcher._streamed[0], dict(model.transformer.named_parameters())


def test_offloaded_blocks_are_neither_moved_nor_counted(managed):
    """The meta device is in the place of a card."""
    patcher, blocks, parameters = offloaded(managed, "meta")
    inside = sum(p.nbytes for name, p in parameters.items() if name.startswith("blocks."))
    outside = sum(p.nbytes for name, p in parameters.items() if not name.startswith("blocks."))
    assert patcher.model_size() == outside + blocks.device_nbytes < outside + inside / 2
    with torch.inference_mode():
        patcher.load()
    parameters = dict(patcher.model.transformer.named_parameters())
    assert all((p.device.type == "cpu") == name.startswith("blocks.") for name, p in parameters.items())
    assert not any(p.is_inference() for p in parameters.values())
    assert [buffer.device.type for buffer in blocks._buffers] == ["meta"] * 2


def test_what_offloaded_blocks_took_is_given_back_with_the_weights(managed):
    patcher, blocks, _ = offloaded(managed, "cpu")
    patcher.load()
    assert len(blocks._buffers) == 2
    patcher.detach(unpatch_all=False)
    assert len(blocks._buffers) == 2
    patcher.detach()
    assert not blocks._buffers and patcher.model.transformer.blocks[0]._forward_pre_hooks


def test_offloaded_blocks_stay_in_cpu_memory_where_comfyui_unloads_to_the_card(managed):
    patcher, blocks, _ = offloaded(managed, "meta")
    patcher.offload_device = torch.device("meta")  # as with --highvram
    patcher.load()
    patcher.detach()
    transformer = patcher.model.transformer
    assert {p.device.type for p in transformer.blocks.parameters()} == {"cpu"} and not blocks._buffers
    assert transformer.patch_embedding.weight.device.type == "meta"
