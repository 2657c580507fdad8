"""Prompt embeddings: the same from every layout, zero-padded, and a plain message for everything else."""

import json
import logging

import pytest
import sentencepiece
import torch
from builders import scaled_float8, sentencepiece_model, tiny_transformer, tiny_umt5, transformers_tokenizer
from safetensors.torch import save_file
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from rolling_kv.bench.gauges import TensorBytes
from rolling_kv.checkpoints.readers import CheckpointError
from rolling_kv.planning import TEXT_ENCODER
from rolling_kv.text import TextEncoder, clean, load_text_encoder

PROMPTS = ["a red circle moving left across the stormy sea", "", "cats & dogs"]
EOS = 1


@pytest.fixture(scope="module")
def source():
    return tiny_umt5()


@pytest.fixture(scope="module")
def pieces():
    return sentencepiece_model()


@pytest.fixture(scope="module")
def weights(source):
    return {name: tensor for name, tensor in source.state_dict().items() if "embed_tokens" not in name}


def spiece(pieces):
    return {"spiece_model": torch.frombuffer(bytearray(pieces), dtype=torch.uint8)}


@pytest.fixture(scope="module")
def folder(source, pieces, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    source.save_pretrained(folder / "text_encoder", max_shard_size="20KB")
    transformers_tokenizer(pieces).save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def single(weights, pieces, tmp_path_factory):
    path = tmp_path_factory.mktemp("single") / "umt5_xxl_fp32.safetensors"
    save_file(weights | spiece(pieces), path)
    return path


def original_names(weights):
    """Under the names of the original Wan release."""
    renamed = {}
    for name, tensor in weights.items():
        name = name.replace("shared.", "token_embedding.").replace("encoder.final_layer_norm.", "norm.")
        name = name.replace("encoder.block.", "blocks.").replace("layer.0.SelfAttention.", "attn.")
        name = name.replace("attn.relative_attention_bias", "pos_embedding.embedding")
        name = name.replace("layer.0.layer_norm", "norm1").replace("layer.1.layer_norm", "norm2")
        for ours, theirs in (("wi_0", "gate.0"), ("wi_1", "fc1"), ("wo", "fc2")):
            name = name.replace(f"layer.1.DenseReluDense.{ours}", f"ffn.{theirs}")
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("prompt", ["fox \ud83e", "\udd8a fox", "a \udcff b"])
def test_half_of_a_character_is_refused(folder, prompt):
    encoder = load_text_encoder(folder)
    with pytest.raises(ValueError, match=r"half of a character in it \('\\ud[\da-f]{3}' at character \d\)"):
        encoder.tokens(prompt)


def test_embeddings_are_those_of_the_padded_and_masked_encoder(source, pieces, single):
    batch = transformers_tokenizer(pieces)(PROMPTS, padding="max_length", max_length=512, return_tensors="pt")
    with torch.no_grad():
        expected = source(batch.input_ids, batch.attention_mask).last_hidden_state * batch.attention_mask.unsqueeze(-1)
    result = load_text_encoder(single).encode(PROMPTS)
    assert result.shape == (3, 512, 32) and result.dtype == torch.float32
    assert torch.allclose(result, expected, atol=1e-5)
    assert expected.abs().max() > 0.5


def test_the_end_of_the_prompt_counts_and_what_follows_is_zero(single):
    encoder = load_text_encoder(single)
    result = encoder.encode(PROMPTS)
    for row, prompt in zip(result, PROMPTS):
        length = len(encoder.tokens(prompt))
        assert row[length - 1].abs().min() > 0 and not row[length:].any()
    assert encoder.tokens("") == [EOS]
    assert encoder.dim == 32


def test_a_prompt_does_not_depend_on_its_neighbours(single):
    encoder = load_text_encoder(single)
    together = encoder.encode(PROMPTS)
    for row, prompt in zip(together, PROMPTS):
        assert torch.equal(row, encoder.encode([prompt])[0])


def test_all_tokenizers_agree(folder, pieces, single, tmp_path):
    (tmp_path / "spiece.model").write_bytes(pieces)
    official = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    encoders = [
        load_text_encoder(folder),
        load_text_encoder(single),
        load_text_encoder(single, tokenizer=tmp_path),
        load_text_encoder(single, tokenizer=tmp_path / "spiece.model"),
        load_text_encoder(single, tokenizer=folder / "tokenizer"),
        load_text_encoder(single, tokenizer=folder / "tokenizer" / "tokenizer.json"),
    ]
    for prompt in (*PROMPTS, "x(y:1.2), zebra; 42", " dogs \n and\tcats "):
        expected = official(clean(prompt)).input_ids
        assert [encoder.tokens(prompt) for encoder in encoders] == [expected] * len(encoders)


def test_cleaning_is_that_of_the_training_data():
    assert clean(" cats &amp;amp; dogs\n\n at  dawn ") == "cats & dogs at dawn"


def test_long_prompts_are_cut_and_still_end(single, caplog):
    encoder = load_text_encoder(single)
    with caplog.at_level(logging.WARNING):
        ids = encoder.tokens("cats " * 600)
    assert len(ids) == 512 and ids[-1] == EOS and EOS not in ids[:-1]
    assert "the model reads the first 511" in caplog.text
    assert encoder.encode(["cats " * 600]).shape == (1, 512, 32)


def layouts(weights, pieces):
    return {
        "umt5_xxl.safetensors": weights | spiece(pieces),
        "with_decoder.safetensors": weights | spiece(pieces) | {"decoder.block.0.x.weight": torch.zeros(2),
                                                              "lm_head.weight": torch.zeros(2)},
        "models_t5_umt5-xxl-enc-bf16.pth": original_names(weights),
    }  # fmt: skip


@pytest.mark.parametrize("name", layouts({}, b"-"))
def test_every_single_file_gives_the_same_weights(name, weights, pieces, tmp_path):
    path = tmp_path / name
    content = layouts(weights, pieces)[name]
    if path.suffix == ".pth":
        torch.save(content, path)
        (tmp_path / "google" / "umt5-xxl").mkdir(parents=True)
        (tmp_path / "google" / "umt5-xxl" / "spiece.model").write_bytes(pieces)
    else:
        save_file(content, path)
    loaded = load_text_encoder(path).encoder.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    assert torch.equal(loaded["encoder.embed_tokens.weight"], weights["shared.weight"])


@pytest.mark.parametrize("place", [".", "text_encoder"])
def test_a_diffusers_folder_loads_from_either_level(place, folder, single):
    assert len(list((folder / "text_encoder").glob("*.safetensors"))) > 1
    ours, other = load_text_encoder(folder / place), load_text_encoder(single)
    weights = other.encoder.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in ours.encoder.state_dict().items())
    # Products round by how the weights are aligned in memory, and a file's are where the file has them.
    torch.testing.assert_close(ours.encode(PROMPTS), other.encode(PROMPTS), atol=1e-6, rtol=1e-6)


def test_scaled_float8_is_multiplied_by_its_scales(weights, pieces, single, tmp_path):
    stored, meant = scaled_float8(weights)
    save_file(stored | spiece(pieces), tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
    encoder = load_text_encoder(tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors", dtype="float32")
    loaded = encoder.encoder.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in meant.items() if name != "scaled_fp8")
    auto = load_text_encoder(tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
    assert auto.encoder.shared.weight.dtype == torch.bfloat16
    assert (auto.encode(PROMPTS) - load_text_encoder(single).encode(PROMPTS)).abs().mean() < 0.1


@pytest.fixture(scope="module")
def scaled(weights, pieces, tmp_path_factory):
    """A file with scaled float8, one scale a weight; the table of tokens and the position biases are bfloat16, as in ComfyUI's."""
    path = tmp_path_factory.mktemp("scaled") / "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    linear = {name for name in weights if weights[name].ndim == 2 and "shared" not in name and "relative" not in name}
    stored, _ = scaled_float8({name: weights[name] for name in linear})
    save_file(
        {name: tensor.bfloat16() for name, tensor in weights.items() if name not in linear} | stored | spiece(pieces),
        path,
    )
    return path


def test_float8_stays_and_gives_what_it_gives_when_it_is_widened(scaled, monkeypatch):
    kept, widened = load_text_encoder(scaled), load_text_encoder(scaled, dtype="bfloat16")
    before = {name: tensor.clone() for name, tensor in kept.state_dict().items()}
    assert before["encoder.encoder.block.1.layer.1.DenseReluDense.wo.weight"].dtype == torch.float8_e4m3fn
    assert before["encoder.shared.weight"].dtype == torch.bfloat16
    assert torch.equal(kept.encode(PROMPTS), widened.encode(PROMPTS))
    after = kept.state_dict()
    assert all(torch.equal(after[name].float(), before[name].float()) for name in before)
    assert {name: after[name].dtype for name in after} == {name: before[name].dtype for name in before}
    unscaled = {name: tensor for name, tensor in before.items() if not name.endswith(".scale")}
    assert kept.nbytes - 4 * (len(before) - len(unscaled)) < 0.8 * widened.nbytes


def test_no_more_than_one_block_is_wide(scaled, monkeypatch):
    encoder = load_text_encoder(scaled)
    parts = [part for part in encoder.encoder.encoder.block.modules() if isinstance(part, torch.nn.Linear)]
    linear, wide = torch.nn.functional.linear, []

    def counting(*args):
        wide.append(sum(part.weight.dtype == torch.float32 for part in parts))
        return linear(*args)

    monkeypatch.setattr(torch.nn.functional, "linear", counting)
    encoder.encode(PROMPTS)
    assert set(wide) == {len(parts) // 2} and len(encoder.encoder.encoder.block) == 2


def test_weights_are_narrow_again_after_an_error(scaled, monkeypatch):
    encoder = load_text_encoder(scaled)
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encoder.encode(PROMPTS)
    assert not any(part.dtype == torch.float32 for part in encoder.encoder.encoder.block.parameters())
    monkeypatch.undo()
    assert torch.equal(encoder.encode(PROMPTS), load_text_encoder(scaled).encode(PROMPTS))


def test_bytes_are_announced_for_the_largest_encoder():
    """UMT5-XXL on the meta device: what encoding takes, operation by operation, is what is announced and little less."""
    config = UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                        feed_forward_proj="gated-gelu")  # fmt: skip
    with torch.device("meta"):
        stock = UMT5EncoderModel(config).to(torch.bfloat16).eval().requires_grad_(False)
        for part in stock.encoder.block.modules():
            if isinstance(part, torch.nn.Linear):
                part.weight = torch.nn.Parameter(part.weight.to(torch.float8_e4m3fn), requires_grad=False)
                part.register_buffer("scale", torch.ones(()))
        encoder, ids = TextEncoder(stock, None), torch.zeros(1, 512, dtype=torch.int64)
        with torch.no_grad(), TensorBytes() as held:
            encoder.encoder.encoder.block[0](torch.empty(1, 512, 4096))
        with torch.no_grad(), TensorBytes() as all_held:
            encoder.encoder.encoder.embed_tokens(ids)
            for block in encoder.encoder.encoder.block:
                block(torch.empty(1, 512, 4096))
    assert 6.2 < encoder.nbytes / 2**30 < 6.4
    assert abs(encoder.nbytes + encoder.working_nbytes - TEXT_ENCODER["float8"]) < 2e7
    inside = sum(parameter.numel() for parameter in encoder.parameters() if parameter.dtype == torch.float8_e4m3fn)
    assert abs(encoder.nbytes + inside + encoder.working_nbytes - TEXT_ENCODER["16 bit"]) < 2e7
    assert 0.7 * encoder.working_nbytes < held.peak <= encoder.working_nbytes < 1.1 * 2**30
    assert all_held.peak <= encoder.working_nbytes


def test_what_does_not_fit_runs_on_the_cpu(single, caplog):
    encoder, card = load_text_encoder(single), torch.device("cuda:0")
    needed = encoder.nbytes + encoder.working_nbytes
    with caplog.at_level(logging.WARNING):
        assert encoder.device_in(card, needed) == card and not caplog.records
        assert encoder.device_in(torch.device("cpu"), 0).type == "cpu" and not caplog.records
        assert encoder.device_in(card, needed - 1).type == "cpu"
    (record,) = caplog.records
    assert "runs on the CPU" in record.getMessage() and "cuda:0" in record.getMessage()


def write_gguf(path, weights, pieces, kind):
    """Under llama.cpp's names, with the tokenizer in the metadata; returns what the weights stand for."""
    gguf = pytest.importorskip("gguf")
    names = {"shared": "token_embd", "encoder.final_layer_norm": "enc.output_norm", "encoder.block": "enc.blk",
             "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b", "layer.0.SelfAttention.": "attn_",
             "layer.0.layer_norm": "attn_norm", "layer.1.layer_norm": "ffn_norm",
             "layer.1.DenseReluDense.wi_0": "ffn_gate", "layer.1.DenseReluDense.wi_1": "ffn_up",
             "layer.1.DenseReluDense.wo": "ffn_down"}  # fmt: skip
    kind, meant = getattr(gguf.GGMLQuantizationType, kind), {}
    writer = gguf.GGUFWriter(path, "t5encoder")
    if pieces is not None:
        processor = sentencepiece.SentencePieceProcessor(model_proto=pieces)
        ids = range(processor.get_piece_size())
        kinds = [2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 1 for i in ids]
        writer.add_tokenizer_model("t5")
        writer.add_token_list([processor.id_to_piece(i).encode() for i in ids])
        writer.add_token_scores([processor.get_score(i) for i in ids])
        writer.add_token_types(kinds)
        writer.add_add_space_prefix(True)
        writer.add_remove_extra_whitespaces(True)
        writer.add_eos_token_id(1)
        writer.add_pad_token_id(0)
        writer.add_unk_token_id(2)
    for name, tensor in weights.items():
        other = name
        for ours, theirs in names.items():
            other = other.replace(ours, theirs)
        stored = kind if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 else gguf.GGMLQuantizationType.F32
        values = gguf.quants.quantize(tensor.numpy(), stored)
        writer.add_tensor(other, values, raw_dtype=stored)
        meant[name] = torch.from_numpy(gguf.quants.dequantize(values, stored)).view(tensor.shape).float()
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return meant


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16", "BF16"])
def test_a_gguf_file_is_unpacked_and_brings_its_tokenizer(kind, weights, pieces, single, tmp_path):
    path = tmp_path / f"umt5-xxl-encoder-{kind}.gguf"
    meant = write_gguf(path, weights, pieces, kind)
    encoder, other = load_text_encoder(path, dtype="float32"), load_text_encoder(single)
    loaded = encoder.encoder.state_dict()
    for name, tensor in meant.items():  # unpacked in float16, as the scales are
        torch.testing.assert_close(loaded[name], tensor, atol=2e-3, rtol=2e-3)
    for prompt in (*PROMPTS, "x(y:1.2), zebra; 42", " dogs \n and\tcats "):
        assert encoder.tokens(prompt) == other.tokens(prompt)
    assert (encoder.encode(PROMPTS) - other.encode(PROMPTS)).abs().mean() < 0.1
    assert load_text_encoder(path).encoder.shared.weight.dtype == (torch.float32 if kind == "F32" else AUTO[kind])


AUTO = {"Q8_0": torch.bfloat16, "Q4_0": torch.bfloat16, "F16": torch.float16, "BF16": torch.bfloat16}


def test_a_gguf_file_without_tokenizer_takes_the_one_beside_it(weights, pieces, tmp_path):
    write_gguf(tmp_path / "umt5.gguf", weights, None, "Q8_0")
    refused(tmp_path / "umt5.gguf", "the tokenizer is missing")
    (tmp_path / "spiece.model").write_bytes(pieces)
    assert load_text_encoder(tmp_path / "umt5.gguf").tokens("cats") == load_text_encoder(
        tmp_path / "umt5.gguf", tokenizer=tmp_path
    ).tokens("cats")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_weights_compute_in_float32(dtype, single, tmp_path):
    encoder = load_text_encoder(single, dtype=dtype)
    rounded = load_text_encoder(single)
    rounded.encoder.to(getattr(torch, dtype)).float()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with torch.inference_mode():
        result = encoder.encode(PROMPTS)
    assert torch.allclose(result, rounded.encode(PROMPTS), atol=1e-6)
    after = encoder.state_dict()
    assert all(after[name].dtype == before[name].dtype and torch.equal(after[name], before[name]) for name in before)
    assert after["encoder.encoder.block.1.layer.1.DenseReluDense.wo.weight"].dtype == getattr(torch, dtype)


def test_auto_dtype_follows_the_device_that_the_encoder_will_run_on(single):
    encoder = load_text_encoder(single, device="cpu", runs_on="cuda")
    assert encoder.encoder.shared.weight.dtype == torch.bfloat16
    assert encoder.compute_device().type == "cpu"


def test_the_embedding_table_is_held_once(single):
    encoder = load_text_encoder(single, dtype="bfloat16").encoder
    assert encoder.encoder.embed_tokens is encoder.shared
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def refused(path, match, **kwargs):
    with pytest.raises(CheckpointError, match=match) as caught:
        load_text_encoder(path, **kwargs)
    assert str(path) in str(caught.value)


def test_other_files_are_named(weights, pieces, tmp_path):
    path = tmp_path / "file.safetensors"
    refused(path, "no such file")
    save_file(tiny_transformer().state_dict(), path)
    refused(path, "a Wan video model, not a UMT5 .*umt5_xxl_fp16")
    save_file({"decoder.conv1.weight": torch.zeros(2, 2)}, path)
    refused(path, "a VAE, not a UMT5")
    one_bias = {name: t for name, t in weights.items() if not ("block.1" in name and "relative" in name)}
    save_file(one_bias | spiece(pieces), path)
    refused(path, "the T5 of another family")
    path.write_bytes(path.read_bytes()[:-10])
    refused(path, "damaged or incomplete")


def test_missing_and_surplus_tensors_are_listed(weights, pieces, tmp_path):
    path = tmp_path / "file.safetensors"
    changed = weights | spiece(pieces) | {"encoder.extra.weight": torch.zeros(3, 5)}
    del changed["encoder.block.1.layer.0.SelfAttention.k.weight"]
    save_file(changed, path)
    refused(path, r"UMT5 of 2 layers. 1 missing: encoder.block.1.layer.0.SelfAttention.k.weight \[32, 32\]")
    refused(path, r"1 that do not belong there: encoder.extra.weight \[3, 5\]")
    del changed["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"]
    save_file(changed, path)
    refused(path, "wi_0.weight is missing")


def test_a_missing_or_wrong_tokenizer_is_explained(weights, pieces, single, tmp_path):
    path = tmp_path / "file.safetensors"
    save_file(weights, path)
    refused(path, "the tokenizer is missing.*spiece.model or tokenizer.json")
    refused(path, "no tokenizer .*absent", tokenizer=tmp_path / "absent")
    (tmp_path / "bad.model").write_bytes(b"nonsense")
    refused(path, "SentencePiece tokenizer is damaged", tokenizer=tmp_path / "bad.model")
    (tmp_path / "tokenizer.json").write_text("{}")
    refused(path, "tokenizer.json .*is damaged")
    small = weights | {"shared.weight": weights["shared.weight"][:10].clone()} | spiece(pieces)
    save_file(small, path)
    refused(path, "has .* tokens and the text encoder 10: they do not belong together")


def test_a_whole_number_is_a_number(weights, pieces, tmp_path):
    save_file(weights | spiece(pieces), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"layer_norm_epsilon": 1}')
    assert load_text_encoder(tmp_path).encoder.config.layer_norm_epsilon == 1.0


def test_settings_and_values_of_an_encoder_are_checked(weights, pieces, tmp_path):
    for config, said in (
        ({"eos_token_id": 96}, "eos_token_id is 96, and the vocabulary has 96 tokens"),
        ({"eos_token_id": "1"}, "eos_token_id must be a whole number, got '1'"),
        ({"feed_forward_proj": "gated-\ud800"}, "feed_forward_proj must be one of"),
        ({"relative_attention_max_distance": 8}, "no position bias"),
    ):
        save_file(weights | spiece(pieces), tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(config))
        refused(tmp_path, said)
    path = tmp_path / "one.safetensors"
    layer = {"encoder.block.100000000.layer.0.SelfAttention.q.weight": torch.zeros(2, 2)}
    save_file(weights | spiece(pieces) | layer, path)
    refused(path, "more than 200 layers")
    for wrong in (torch.zeros(4, dtype=torch.bfloat16), torch.zeros(2, 2, dtype=torch.uint8)):
        save_file(weights | {"spiece_model": wrong}, path)
        refused(path, "instead of bytes")
    save_file(weights | {"spiece_model": torch.zeros(0, dtype=torch.uint8)}, path)
    refused(path, "tokenizer is")
    save_file(weights | spiece(pieces) | {"encoder.final_layer_norm.weight": torch.full((32,), float("nan"))}, path)
    with pytest.raises(ValueError, match="the text encoder makes values that are no numbers"):
        load_text_encoder(path).encode(["cats"])


def test_a_shot_goes_on_without_the_marker(folder):
    encoder, marker = load_text_encoder(folder), "The cut. "
    begun, after = encoder.encode_shot("  The cut. a red circle", marker)
    assert torch.equal(begun, encoder.encode(["The cut. a red circle"]))
    assert torch.equal(after, encoder.encode(["a red circle"])) and not torch.equal(begun, after)
    for prompt, marked in (
        ("a red circle", marker),
        ("a red circle. The cut. ", marker),
        ("The cut. a red circle", ""),
    ):
        plain, after = encoder.encode_shot(prompt, marked)
        assert torch.equal(plain, encoder.encode([prompt])) and after is None
