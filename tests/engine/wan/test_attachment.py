"""Attaching to a stock transformer, and leaving it as it was."""

import copy

import pytest
import torch
from builders import tiny_transformer
from rounding import convolutions_round
from torch.nn.attention import SDPBackend

from rolling_kv.cache.prompt import Branch, PromptCache
from rolling_kv.cache.rolling import RollingKVCache
from rolling_kv.cache.sizes import CacheShape
from rolling_kv.config import CacheConfig, ExecutionConfig
from rolling_kv.platforms import Platform
from rolling_kv.rope import rotary_angles, rotary_rotations, rotate, rotations
from rolling_kv.wan.attachment import apply_rolling_kv_cache, remove_rolling_kv_cache
from rolling_kv.wan.inputs import time_sinusoid
from rolling_kv.wan.processors import RollingSelfAttention


@pytest.fixture(scope="module")
def transformer():
    return tiny_transformer(num_attention_heads=2, attention_head_dim=24)


def branch(transformer, window=6, batch=1, size=(8, 12), prompt=None):
    shape = CacheShape.of(transformer, batch, *size, torch.float32)
    prompt = torch.zeros(batch, 8, transformer.config.text_dim) if prompt is None else prompt
    return Branch(RollingKVCache(shape, CacheConfig(window), "cpu"), PromptCache(prompt))


def fingerprint(transformer):
    """Everything that attaching could change: processors, instance attributes, module names, state dict names."""
    return (
        [id(processor) for processor in transformer.attn_processors.values()],
        [sorted(vars(module)) for module in transformer.modules()],
        [name for name, _ in transformer.named_modules()],
        list(transformer.state_dict()),
    )


def run_stock(transformer):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, 3, 8, 12, generator=generator)
    prompt = torch.randn(1, 8, transformer.config.text_dim, generator=generator)
    with torch.no_grad():
        return transformer(latents, torch.tensor([500.0]), prompt, return_dict=False)[0]


def test_the_state_dict_and_the_modules_stay_while_attached(transformer):
    before = fingerprint(transformer)
    with apply_rolling_kv_cache(transformer):
        attached = fingerprint(transformer)
    assert attached[2:] == before[2:]
    assert attached[0] != before[0]


def test_detaching_leaves_no_trace(transformer):
    before, output = fingerprint(transformer), run_stock(transformer)
    attachment = apply_rolling_kv_cache(transformer)
    assert remove_rolling_kv_cache(transformer) is True
    assert fingerprint(transformer) == before
    assert torch.equal(run_stock(transformer), output)
    assert remove_rolling_kv_cache(transformer) is False
    attachment.detach()
    assert fingerprint(transformer) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_inside_a_pass_leaves_no_trace(transformer, error):
    before = fingerprint(transformer)

    def fail(*_):
        raise error

    hook = transformer.blocks[1].ffn.register_forward_hook(fail)
    inside = fingerprint(transformer)
    try:
        with pytest.raises(error), apply_rolling_kv_cache(transformer) as attachment:
            part = branch(transformer)
            part.cache.begin(3)
            attachment.forward(torch.zeros(1, 16, 3, 8, 12), 1000.0, part)
        assert attachment.context.current is None
        assert fingerprint(transformer) == inside
    finally:
        hook.remove()
    assert fingerprint(transformer) == before


def test_somebody_elses_forward_hook_is_put_back(transformer):
    module = transformer.rope
    module.forward = other = lambda hidden_states: None
    try:
        with apply_rolling_kv_cache(transformer):
            assert module.forward is not other
        assert module.forward is other
    finally:
        del module.forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["", "ffn", "norm1", "norm3"])
def test_somebody_elses_forward_runs_in_every_pass(dtype, path):
    """It may bring the weights in, as diffusers' group offloading does: that of the last block in a context pass too."""
    transformer = tiny_transformer(num_attention_heads=2, attention_head_dim=24).to(dtype)
    calls = []

    def around(forward, name):
        return lambda *args, **kwargs: calls.append(name) or forward(*args, **kwargs)

    for number, block in enumerate(transformer.blocks):
        module = block.get_submodule(path)
        module.forward = around(module.forward, number)
    cache = RollingKVCache(CacheShape.of(transformer, 1, 8, 12, dtype), CacheConfig(6), "cpu")
    part = Branch(cache, PromptCache(torch.zeros(1, 8, transformer.config.text_dim, dtype=dtype)))
    with torch.inference_mode(), apply_rolling_kv_cache(transformer) as attachment:
        part.cache.begin(3)
        for keys_only in (False, True):
            attachment.forward(torch.zeros(1, 16, 3, 8, 12, dtype=dtype), 0.0, part, keys_only=keys_only)
    assert calls == [0, 1, 0, 1][: 3 if path else 4]  # the rest of a plain last block is left out


def test_attaching_twice_is_refused(transformer):
    with apply_rolling_kv_cache(transformer), pytest.raises(ValueError, match="attached already"):
        apply_rolling_kv_cache(transformer)
    assert not isinstance(transformer.blocks[0].attn1.processor, RollingSelfAttention)


def test_image_conditioned_models_are_refused():
    transformer = tiny_transformer(added_kv_proj_dim=128, image_dim=16)
    with pytest.raises(ValueError, match="image-conditioned"):
        apply_rolling_kv_cache(transformer)


def test_a_first_chunk_sees_what_the_stock_model_sees(transformer):
    """With an empty cache one pass is plain bidirectional attention over the chunk, at any batch and size."""
    generator = torch.Generator().manual_seed(2)
    for batch, size in ((1, (8, 12)), (2, (4, 6)), (3, (2, 2))):
        latents = torch.randn(batch, 16, 3, *size, generator=generator)
        prompt = torch.randn(batch, 8, transformer.config.text_dim, generator=generator)
        with torch.inference_mode():
            expected = transformer(latents, torch.full((batch,), 625.0), prompt, return_dict=False)[0]
            with apply_rolling_kv_cache(transformer) as attachment:
                part = branch(transformer, batch=batch, size=size, prompt=prompt)
                part.cache.begin(3)
                actual = attachment.forward(latents, 625.0, part)
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


def test_the_keys_only_pass_writes_what_a_full_pass_writes(transformer):
    latents = torch.randn(1, 16, 3, 8, 12, generator=torch.Generator().manual_seed(3))
    caches = []
    with torch.inference_mode(), apply_rolling_kv_cache(transformer) as attachment:
        for keys_only in (False, True):
            part = branch(transformer)
            part.cache.begin(3)
            result = attachment.forward(latents, 0.0, part, keys_only=keys_only)
            assert (result is None) == keys_only
            caches.append(part.cache)
    for (full,), (cut,) in zip(caches[0].store.layers, caches[1].store.layers):
        assert full.abs().sum() > 0
        assert torch.equal(full, cut)


def test_the_prompt_is_projected_once(transformer):
    calls = []
    hooks = [
        module.register_forward_hook(lambda module, *_: calls.append(module))
        for module in (transformer.condition_embedder.text_embedder, transformer.blocks[0].attn2.to_k)
    ]
    try:
        with torch.inference_mode(), apply_rolling_kv_cache(transformer) as attachment:
            part = branch(transformer)
            for _ in range(3):
                part.cache.begin(3)
                attachment.forward(torch.zeros(1, 16, 3, 8, 12), 500.0, part)
                part.cache.commit()
    finally:
        for hook in hooks:
            hook.remove()
    assert len(calls) == 2


def test_a_pass_without_an_open_chunk_is_refused(transformer):
    with apply_rolling_kv_cache(transformer) as attachment:
        part = branch(transformer)
        with pytest.raises(ValueError, match="open chunk of 0 frames at batch 1, the latents are 3 frames"):
            attachment.forward(torch.zeros(1, 16, 3, 8, 12), 0.0, part)


def test_rotary_positions_are_those_of_the_stock_model(transformer):
    """Diffusers tabulates cos and sin, each angle twice; ours are the angles, for any first frame."""
    latents = torch.zeros(1, 16, 5, 8, 12)
    cos, sin = transformer.rope(latents)
    ours = rotary_angles(24, 2, 3, 4, 6)
    for table, values in ((cos, ours.cos()), (sin, ours.sin())):
        expected = table[0, :, 0].view(5, 4 * 6, 24)[2:].flatten(0, 1)[:, ::2]
        torch.testing.assert_close(values.float(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("start", [0, 100_000.5])
def test_sines_that_are_computed_once_are_those_of_every_token(start, dtype):
    position = 128, start, 3, 4, 6
    assert torch.equal(rotary_rotations(*position, dtype), rotations(rotary_angles(*position)).to(dtype))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 6e-2)])
@pytest.mark.parametrize("start", [1_000, 100_000])
def test_scores_depend_on_the_difference_of_positions_alone(start, dtype, tolerance):
    """At frame 100,000 (seven hours) as at frame 0: no table ends, no precision is lost."""
    generator = torch.Generator().manual_seed(4)
    query, key = (torch.randn(1, 24, 2, 128, generator=generator).to(dtype) for _ in range(2))

    def scores(first):
        turn_q, turn_k = (
            torch.polar(torch.ones(1, dtype=torch.float64), rotary_angles(128, first + offset, 2, 3, 4)).to(
                torch.complex64
            )
            for offset in (7, 0)
        )
        q, k = rotate(query, turn_q[None, :, None]), rotate(key, turn_k[None, :, None])
        return torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / 128**0.5

    assert (scores(0) - scores(start)).abs().max() <= tolerance


def test_time_sinusoid_is_the_stock_one(transformer):
    timestep = torch.tensor([0.0, 625.0, 833.3333, 1000.0])
    stock = transformer.condition_embedder.timesteps_proj(timestep)
    torch.testing.assert_close(time_sinusoid(timestep, 32).float(), stock, atol=1e-4, rtol=0)


def test_deep_copies_are_independent(transformer):
    other = copy.deepcopy(transformer)
    with apply_rolling_kv_cache(transformer):
        assert not isinstance(other.blocks[0].attn1.processor, RollingSelfAttention)


def test_real_and_complex_rotations_agree():
    heads = torch.randn(2, 6, 3, 12, generator=torch.Generator().manual_seed(5))
    rotation = rotations(rotary_angles(12, 4, 1, 2, 3)).to(torch.complex64)[None, :, None]
    torch.testing.assert_close(rotate(heads, torch.view_as_real(rotation)), rotate(heads, rotation))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_a_rotation_in_place_has_the_same_bits(dtype):
    heads = torch.randn(2, 6, 3, 24, generator=torch.Generator().manual_seed(5))
    rotation = rotations(rotary_angles(24, 4, 1, 2, 3)).to(dtype)[None, :, None]
    before, copied = heads.clone(), heads.clone()
    with torch.no_grad():
        plain, turned = rotate(heads, rotation), rotate(copied, rotation, overwrite=True)
    assert torch.equal(heads, before) and torch.equal(turned, plain)
    assert (turned.data_ptr() == copied.data_ptr()) == (dtype is torch.complex64)
    with torch.enable_grad():  # where what was there is needed later
        assert rotate(before.requires_grad_(), rotation, overwrite=True).grad_fn is not None


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", ["to_q", "to_k", "to_v", "norm_q", "norm_k"])
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_what_a_hook_keeps_stays_as_it_was(name, exact):
    """Of norms, too, where they are called, as on a GPU; here, because their weights have another dtype."""
    transformer = tiny_transformer(num_attention_heads=2, attention_head_dim=24)
    attention = transformer.blocks[0].attn1
    if name.startswith("norm"):
        getattr(attention, name).bfloat16()
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 16, 3, 8, 12, generator=generator)
    prompt = torch.randn(1, 8, transformer.config.text_dim, generator=generator)

    def made():
        part = branch(transformer, prompt=prompt)
        part.cache.begin(3)
        with torch.inference_mode(), apply_rolling_kv_cache(transformer, ExecutionConfig(exact=exact)) as attachment:
            return attachment.forward(latents, 500.0, part)

    expected, kept = made(), []
    getattr(attention, name).register_forward_hook(lambda module, given, out: kept.append((out, out.clone())))
    assert torch.equal(made(), expected)
    assert len(kept) == (not (exact and name.startswith("norm")))  # exact passes compute norms themselves
    assert all(torch.equal(out, then) for out, then in kept)


@pytest.mark.parametrize(
    "backend, message", [("flash_hub", "must be one of native"), ("sage", "is not installed here")]
)
def test_a_backend_that_cannot_be_used_is_refused(transformer, backend, message):
    before = fingerprint(transformer)
    with pytest.raises(ValueError, match=message):
        apply_rolling_kv_cache(transformer, ExecutionConfig(backend=backend))
    assert fingerprint(transformer) == before


@pytest.fixture
def seen_by_attention(monkeypatch):
    """What SDPA finds in each call: the order of its kernels, and whether key and value are views of the cache's layout."""
    calls, attend = [], torch.nn.functional.scaled_dot_product_attention

    def spied(*args, query, key, value, **options):
        views = all(tensor.transpose(1, 2).is_contiguous() for tensor in (query, key, value))
        calls.append((torch._C._get_sdp_priority_order()[:4], views))
        return attend(*args, query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spied)
    return calls


@pytest.mark.parametrize("dtype, backend", [(torch.bfloat16, None), (torch.float32, None), (torch.bfloat16, "native")])
def test_the_order_of_kernels_is_that_of_the_platform(seen_by_attention, monkeypatch, dtype, backend):
    h100 = Platform("cuda", (9, 0), torch=(2, 11), cudnn=91501)
    monkeypatch.setattr("rolling_kv.wan.execution.platform_of", lambda device: h100)
    half = tiny_transformer(num_attention_heads=2, attention_head_dim=24).to(dtype)
    shape = CacheShape.of(half, 1, 8, 12, dtype)
    made = Branch(RollingKVCache(shape, CacheConfig(6), "cpu"), PromptCache(torch.zeros(1, 8, 32, dtype=dtype)))
    before = torch._C._get_sdp_priority_order()[:4]
    with apply_rolling_kv_cache(half, ExecutionConfig(backend=backend)) as attachment, torch.inference_mode():
        made.cache.begin(3)
        attachment.forward(torch.zeros(1, 16, 3, 8, 12, dtype=dtype), 500.0, made)
    names = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    ours = [getattr(SDPBackend, name).value for name in names]
    expected = ours if dtype == torch.bfloat16 and backend is None else before
    assert seen_by_attention == [(expected, True)] * 4
    assert torch._C._get_sdp_priority_order()[:4] == before


def test_the_patch_embedding_convolves_in_float32(transformer, monkeypatch):
    a100 = Platform("cuda", (8, 0), torch=(2, 11), cudnn=91501)
    monkeypatch.setattr("rolling_kv.platforms.platform_of", lambda device: a100)
    seen, made, convolve = [], branch(transformer), torch.nn.functional.conv3d

    def spied(*args):
        seen.append(convolutions_round())
        return convolve(*args)

    monkeypatch.setattr(torch.nn.functional, "conv3d", spied)
    with apply_rolling_kv_cache(transformer) as attachment, torch.inference_mode():
        made.cache.begin(3)
        attachment.forward(torch.zeros(1, 16, 3, 8, 12), 500.0, made)
    assert seen == [False] and convolutions_round()
