"""ComfyUI's own text encoders: the same embeddings, a CONDITIONING that Sample Video takes, and prompts of ours from a CLIP."""

import json
import struct
import subprocess

import pytest
import torch
from builders import original_names, sentencepiece_model, tiny_transformer, tiny_umt5
from graphs import TINY, chosen, node, one_sampler, prompt, sample, save_latent, saved_latent
from safetensors.torch import load_file, save_file
from transformers import T5TokenizerFast

from rolling_kv.checkpoints.model import load_model
from rolling_kv.config import SamplingConfig
from rolling_kv.geometry import TEXT_LENGTH
from rolling_kv.sampling.session import RollingSession
from rolling_kv.text import load_text_encoder
from rolling_kv.vae.latents import to_raw
from tools.comfyui.client import PromptFailed

PROMPTS = ["a red circle moving left across the stormy sea", "", "cats & dogs"]
WIDTH, VOCABULARY = 768, 32128  # of T5 base

ENCODE = """
import sys
from safetensors.torch import load_file, save_file
import comfy.options
comfy.options.enable_args_parsing()
source, target, config, prompts = sys.argv[1:5]
sys.argv[1:] = ["--cpu"]
import json
from comfy.text_encoders.wan import WanT5Model, WanT5Tokenizer
weights = load_file(source)
tokenizer = WanT5Tokenizer(tokenizer_data={"spiece_model": weights.pop("spiece_model")})
options = {"model_name": "umt5xxl", "umt5xxl_model_config": json.loads(config)}
model = WanT5Model(model_options=options)
missing = model.load_sd(weights | {"encoder.block.23.layer.1.DenseReluDense.wi_1.weight": weights["shared.weight"]})[0]
assert not [name for name in missing if "logit_scale" not in name], missing
encoded = [model.encode_token_weights(tokenizer.tokenize_with_weights(text))[0] for text in json.loads(prompts)]
save_file({str(n): tensor.float().contiguous() for n, tensor in enumerate(encoded)}, target)
"""
"""Runs in ComfyUI's Python: its text encoder for Wan with a config of another size."""


def test_the_embeddings_are_those_of_comfyuis_encoder_for_wan(install, tmp_path):
    encoder = tiny_umt5()
    weights = {name: tensor for name, tensor in encoder.state_dict().items() if "embed_tokens" not in name}
    weights["spiece_model"] = torch.frombuffer(bytearray(sentencepiece_model()), dtype=torch.uint8)
    source, target = tmp_path / "umt5.safetensors", tmp_path / "embeddings.safetensors"
    save_file(weights, source)
    known = encoder.config.to_dict()
    config = {name: known[name] for name in ("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "vocab_size")}
    command = [install.python, "-c", ENCODE, source, target, json.dumps(config), json.dumps(PROMPTS)]
    done = subprocess.run(command, cwd=install.path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = load_file(target)
    ours = load_text_encoder(source).encode(PROMPTS)
    for index in range(len(PROMPTS)):
        embedding = theirs[str(index)]
        assert embedding.shape == (1, TEXT_LENGTH, 32)
        torch.testing.assert_close(embedding[0], ours[index], atol=1e-4, rtol=1e-3)


def write_t5(path, embedding: torch.Tensor) -> None:
    """A T5 base in float16 whose blocks add nothing: their weights are a hole in the file. [VOCABULARY, WIDTH]"""
    shapes = {"shared.weight": embedding.shape, "encoder.final_layer_norm.weight": (WIDTH,)}
    for block in (f"encoder.block.{index}" for index in range(12)):
        shapes |= {f"{block}.layer.0.SelfAttention.{name}.weight": (WIDTH, WIDTH) for name in "qkvo"}
        shapes |= {f"{block}.layer.{layer}.layer_norm.weight": (WIDTH,) for layer in (0, 1)}
        shapes[f"{block}.layer.1.DenseReluDense.wi.weight"] = (3072, WIDTH)
        shapes[f"{block}.layer.1.DenseReluDense.wo.weight"] = (WIDTH, 3072)
    shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, 12)
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in (embedding, torch.ones(WIDTH)):  # the first two
            file.write(tensor.half().numpy().tobytes())
        file.truncate(8 + len(text) + end)


@pytest.fixture(scope="module")
def embedding():
    return torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0)).half().float()


@pytest.fixture(scope="module")
def folder(default_server, embedding):
    folder = default_server.folder / "models"
    write_t5(folder / "text_encoders/random_t5.safetensors", embedding)
    weights = tiny_transformer(text_dim=WIDTH).state_dict()
    save_file(original_names(weights), folder / "diffusion_models/random_768.safetensors")
    return folder


def on_clip(graph: dict) -> dict:
    """The graph with ComfyUI's Load CLIP in the place of our text encoder, and the model that reads such embeddings."""
    graph["model"]["inputs"]["model_name"] = "random_768.safetensors"
    return graph | {"text_encoder": node("CLIPLoader", clip_name="random_t5.safetensors", type="wan")}


def test_our_prompts_are_encoded_by_a_clip_too(client, folder):
    """A schedule of it is its prompts by CLIP Text Encode in a chain, with a blend on an arc, which is not the one on a line."""
    red, blue, cut = "a (red:1.2) circle", "a blue circle", "The scene transitions. a square"

    def last(graph: dict) -> torch.Tensor:
        return saved_latent(client, client.run(on_clip(graph | {"save": save_latent("last")})))

    def scheduled(way: str) -> torch.Tensor:
        text = f"0: {red}\n0.5: {blue} [{way} 3]\n2.5: {cut} [hold]"
        schedule = node("RollingKVPromptSchedule", text_encoder=["text_encoder", 0], text=text, count_from="video")
        return last(one_sampler() | {"positive": schedule, "last": sample(5)})

    def chained(encode, **brought) -> torch.Tensor:
        graph = one_sampler(1) | {"positive": encode(red), "blue": encode(blue), "cut": encode(cut)}
        way = chosen("switch", "blend", chunks=3, **brought)
        graph["second"] = sample(3, positive="blue", state=["sample", 1], **way)
        return last(graph | {"last": sample(1, positive="cut", state=["second", 1], switch="hold")})

    arc = chained(lambda text: node("CLIPTextEncode", clip=["text_encoder", 0], text=text), curve="slerp")
    assert torch.equal(scheduled("slerp"), arc)
    line = chained(prompt)
    assert torch.equal(scheduled("blend"), line) and not torch.equal(line, arc)


@pytest.mark.traceback_expected
def test_a_clip_of_another_width_is_refused(client, folder):
    graph = on_clip(one_sampler(1))
    graph["model"]["inputs"]["model_name"] = TINY
    with pytest.raises(PromptFailed, match="768"):
        client.run(graph)


def test_a_conditioning_of_clip_text_encode_is_sampled_with(client, folder, embedding, install):
    """ComfyUI pads a T5 prompt to 128 tokens, the model wants 512. With guidance, so the negative one comes so as well."""
    words = {"positive": "a red circle moving right", "negative": "blurry"}
    guided = chosen("guidance", "this strength", strength=2.0)
    graph = on_clip(one_sampler(1, model=["model", 0], negative=["negative", 0], **guided))
    graph |= {name: node("CLIPTextEncode", clip=["text_encoder", 0], text=text) for name, text in words.items()}
    latent = saved_latent(client, client.run(graph))

    tokenizer = T5TokenizerFast.from_pretrained(install.path / "comfy/text_encoders/t5_tokenizer")
    embeds = {}
    for name, text in words.items():
        rows = embedding[tokenizer(text).input_ids]
        rows = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1e-6)  # the encoder's last norm
        embeds[name] = torch.nn.functional.pad(rows, (0, 0, 0, TEXT_LENGTH - len(rows)))[None]
    model = load_model(folder / "diffusion_models/random_768.safetensors")
    sampling = SamplingConfig(guidance_scale=2.0)
    with RollingSession(
        model, embeds["positive"], negative=embeds["negative"], height=64, width=64, sampling=sampling
    ) as session:
        list(session.generate(1, seed=1))
    expected = to_raw(session.state.latents())
    torch.testing.assert_close(latent, expected, atol=0.01 * expected.std().item(), rtol=0.01)
