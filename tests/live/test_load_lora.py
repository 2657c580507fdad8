"""Load LoRA on the bundled model: what it changes, what it leaves alone, and what it refuses."""

import json

import pytest
import torch
from graphs import loaders, node, one_sampler, prompt, sample, save_latent, saved_latent
from safetensors.torch import load_file, save_file

from rolling_kv.bundled import BUNDLED
from rolling_kv.checkpoints.model import load_model
from rolling_kv.lora.reader import load_lora
from rolling_kv.lora.stack import applied_loras
from rolling_kv.sampling.session import RollingSession
from rolling_kv.text import load_text_encoder
from rolling_kv.vae.latents import to_raw
from tools.comfyui.client import PromptFailed

WORDS = "a red circle moving right"
FILES = {"first.safetensors": 1, "style/second.safetensors": 2}  # with their seeds


def write_lora(path, width, seed, blocks=1):
    """A LoRA for the self-attention of the first blocks of a model of that width."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in (f"blocks.{block}.self_attn.{name}" for block in range(blocks) for name in "qkvo"):
        tensors[f"diffusion_model.{module}.lora_down.weight"] = torch.randn(4, width, generator=generator) / 6
        tensors[f"diffusion_model.{module}.lora_up.weight"] = torch.randn(width, 4, generator=generator) / 6
        tensors[f"diffusion_model.{module}.alpha"] = torch.tensor(2.0)
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path)


@pytest.fixture(scope="module")
def model():
    return load_model(BUNDLED)


@pytest.fixture(scope="module")
def folder(default_server, cacheless_server, model):
    """Where the files are, on each of the servers."""
    config = model.transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    for server in (default_server, cacheless_server):
        for name, seed in FILES.items():
            write_lora(server.folder / "models/loras" / name, width, seed, config.num_layers)
        write_lora(server.folder / "models/loras/wide.safetensors", 2 * width, 3)
    return default_server.folder / "models/loras"


def with_loras(graph: dict, *loras: tuple[str, float]) -> dict:
    """The graph with the node "sample" behind a chain of LoRAs: file and strength each."""
    source = "model"
    for index, (name, strength) in enumerate(loras):
        graph[f"lora {index}"] = node("RollingKVLoadLoRA", model=[source, 0], lora_name=name, strength=strength)
        source = f"lora {index}"
    graph["sample"]["inputs"]["model"] = [source, 0]
    return graph


def run_latent(client, graph, name="save"):
    return saved_latent(client, client.run(graph), name)


def engine_latent(model, folder, *loras: tuple[str, float], chunks=2):
    """What the engine alone makes of it, as a LATENT."""
    embeds = load_text_encoder(BUNDLED).encode([WORDS])
    with applied_loras(model, [(load_lora(folder / name), strength) for name, strength in loras]):
        with RollingSession(model, embeds, height=64, width=64) as session:
            list(session.generate(chunks, seed=1))
    return to_raw(session.state.latents())


def close(latent, expected):
    torch.testing.assert_close(latent, expected, atol=2e-3, rtol=1e-3)
    return True


def test_loras_add_up_as_in_the_engine(any_client, folder, model):
    bare, chain = (
        run_latent(any_client, one_sampler(2)),
        [("first.safetensors", 0.8), ("style/second.safetensors", -0.5)],
    )
    one = run_latent(any_client, with_loras(one_sampler(2), *chain[:1]))
    both = run_latent(any_client, with_loras(one_sampler(2), *chain))
    assert close(bare, engine_latent(model, folder))
    assert close(one, engine_latent(model, folder, *chain[:1]))
    assert close(both, engine_latent(model, folder, *chain))
    for changed, plain in ((one, bare), (both, one)):
        assert (changed - plain).norm() > 0.03 * plain.norm()


def test_strength_0_and_a_lora_taken_off_give_the_bits_of_the_bare_model(any_client, folder):
    bare = run_latent(any_client, one_sampler(2))
    changed = run_latent(any_client, with_loras(one_sampler(2), ("first.safetensors", 1.0)))
    assert not torch.equal(changed, bare)
    assert torch.equal(run_latent(any_client, with_loras(one_sampler(2), ("first.safetensors", 0.0))), bare)
    assert torch.equal(run_latent(any_client, with_loras(one_sampler(2), ("first.safetensors", 1.0))), changed)
    any_client.free()
    assert torch.equal(run_latent(any_client, one_sampler(2)), bare)


def test_branches_with_and_without_a_lora_do_not_disturb_each_other(client, folder):
    graph = with_loras(one_sampler(2), ("first.safetensors", 1.0))
    graph["bare"], graph["save bare"] = sample(2), save_latent("bare")
    outputs = client.run(graph)
    both = saved_latent(client, outputs), saved_latent(client, outputs, "save bare")
    client.free()
    alone = (
        run_latent(client, with_loras(one_sampler(2), ("first.safetensors", 1.0))),
        run_latent(client, one_sampler(2)),
    )
    assert all(map(torch.equal, both, alone)) and not torch.equal(*both)


def test_a_video_may_be_continued_with_another_lora(any_client, folder):
    """Keys and values are those of the weights that read them: the chunks before are replayed with the LoRA on."""
    graph = one_sampler(1)
    graph["lora 0"] = node("RollingKVLoadLoRA", model=["model", 0], lora_name="first.safetensors", strength=1.0)
    graph["second"] = sample(1, model=["lora 0", 0], state=["sample", 1])
    graph["save"] = save_latent("second")
    latent = run_latent(any_client, graph)
    any_client.free()
    assert torch.equal(run_latent(any_client, graph), latent)
    assert torch.equal(latent[:, :, :3], run_latent(any_client, one_sampler(1)))


@pytest.mark.traceback_expected
def test_a_lora_of_another_size_is_refused_by_the_node_itself(client, folder):
    graph = {**loaders(), "positive": prompt(WORDS), "sample": sample(1), "save": save_latent("sample")}
    with pytest.raises(
        PromptFailed, match="RollingKVLoadLoRA.*wide was made for another model.*this size of the model"
    ):
        client.run(with_loras(graph, ("wide.safetensors", 1.0)))


def test_what_is_left_out_of_a_lora_and_what_is_assumed_of_a_model_is_said_on_the_nodes(client, folder, model):
    """An image-to-video LoRA on a text-to-video model, and a model whose name does not tell its family."""
    write_lora(folder / "partly.safetensors", 128, 5)
    tensors = load_file(folder / "partly.safetensors")
    patch = "diffusion_model.patch_embedding"
    tensors |= {f"{patch}.lora_down.weight": torch.ones(4, 36, 1, 2, 2)}
    tensors |= {f"{patch}.lora_up.weight": torch.ones(128, 4, 1, 1, 1)}
    save_file(tensors, folder / "partly.safetensors")
    settings = {"config": json.dumps({"transformer": {"num_attention_heads": 4}})}
    weights = {name: tensor.contiguous() for name, tensor in model.transformer.state_dict().items()}
    save_file(weights, folder.parent / "diffusion_models" / "mystery.safetensors", settings)
    graph = with_loras(one_sampler(1), ("partly.safetensors", 1.0))
    graph["model"]["inputs"]["model_name"] = "mystery.safetensors"
    said = {}
    client.run(graph, on_text=said.__setitem__)
    assert "patch_embedding" in said["lora 0"] and "36 channels" in said["lora 0"]
    assert "treated as self-forcing" in said["model"]
