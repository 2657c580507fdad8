"""Blocks whose weights lie in CPU memory: the same bits, two blocks on the device, and nothing left behind."""

import pytest
import torch
from builders import tiny_transformer
from lora_files import matrices, peft
from videos import Cancelled, prompt, same, sample

from rolling_kv.bench.gauges import TensorBytes
from rolling_kv.bench.storage.experiment import pack
from rolling_kv.cache.offload import Copies
from rolling_kv.checkpoints.float8 import store_float8
from rolling_kv.checkpoints.model import CausalModel
from rolling_kv.checkpoints.transformer import build_transformer
from rolling_kv.config import CacheConfig, ExecutionConfig, SamplingConfig
from rolling_kv.lora.reader import read_lora
from rolling_kv.lora.stack import LoraStack
from rolling_kv.presets import ModelPreset
from rolling_kv.sampling.session import RollingSession
from rolling_kv.step_cache import FirstBlockCache, SeaCache
from rolling_kv.wan import fast
from rolling_kv.wan.offloaded import blocks_aside, offload_blocks, offloaded_blocks, spared_by_offloading, weight_nbytes

LAYERS = 4
SIZE = dict(num_layers=LAYERS, num_attention_heads=2, attention_head_dim=12)
SAMPLING = SamplingConfig(chunk=2, denoising_steps=(1000, 500))
MANY_STEPS = SamplingConfig(chunk=2, sampler="unipc", num_inference_steps=6, guidance_scale=2.0)


LATENTS = torch.zeros(1, 16, 2, 4, 6), torch.zeros(1), torch.zeros(1, 6, 32)


def model(dtype=torch.float32, storage="model", **size) -> CausalModel:
    size = SIZE | size
    if storage == "Q8_0":
        pytest.importorskip("gguf")
        weights = pack(tiny_transformer(**size).state_dict(), storage)
        transformer = build_transformer(weights, {"num_attention_heads": size["num_attention_heads"]}, dtype)
    else:
        transformer = tiny_transformer(**size).to(dtype)
    if storage == "float8":
        store_float8(transformer)
    return CausalModel(transformer, ModelPreset("test", SAMPLING, CacheConfig(5, sink=1)))


def video(made, **settings):
    if settings.get("sampling", SAMPLING).guided:
        settings["negative"] = prompt(made, 5).to(made.dtype)
    return sample(made, 4, **settings)


def values(transformer):
    return {name: tensor.clone() for name, tensor in transformer.state_dict().items()}


class Order(Copies):
    """Notes what is copied when."""

    def __init__(self, said):
        self.said, self.ready = said, 0

    def copy(self, to, source):
        self.said.append(("copied", source.data_ptr()))
        super().copy(to, source)

    def mark(self):
        return len(self.said)

    def wait(self, mark):
        self.said.append(("waited", mark))


@pytest.mark.parametrize(
    "storage, settings",
    [
        ("model", {}),
        ("model", dict(execution=ExecutionConfig(exact=True))),
        ("model", dict(cache=CacheConfig(5, sink=1, storage="int8", offload=True))),
        ("model", dict(cache=CacheConfig(6, sink=2, positions="window", leaving="ema"))),
        ("model", dict(sampling=MANY_STEPS)),
        ("model", dict(sampling=MANY_STEPS, step_cache=SeaCache(threshold=0.5))),
        ("float8", {}),
        ("Q8_0", {}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_videos_are_those_of_weights_on_the_device(storage, settings, dtype):
    size = dict(num_attention_heads=2, attention_head_dim=128, ffn_dim=256) if storage == "Q8_0" else {}
    plain, offloaded = (model(dtype, storage, **size) for _ in range(2))
    blocks = offload_blocks(offloaded.transformer, "cpu")
    expected = video(plain, **settings)
    assert same(video(offloaded, **settings), expected)
    blocks.remove()
    assert same(video(offloaded, **settings), expected)


def test_two_blocks_are_on_the_device():
    """Counted on the meta device, which takes no tensor of the CPU for one of its own."""
    transformer = model().transformer
    before, sizes = sum(p.nbytes for p in transformer.parameters()), weight_nbytes(transformer)
    spared = spared_by_offloading(transformer)
    blocks = offload_blocks(transformer, "meta")
    assert sizes == before and blocks.device_nbytes <= 2.2 * blocks.host_nbytes / LAYERS
    assert (
        0 <= weight_nbytes(transformer) - (before - spared) < 0.2 * blocks.device_nbytes
    )  # weights begin at round places
    with blocks_aside(transformer):
        transformer.to("meta")
    assert {p.device.type for p in transformer.blocks.parameters()} == {"cpu"}
    latents, words = torch.empty(1, 16, 2, 4, 6, device="meta"), torch.empty(1, 6, 32, device="meta")
    timestep = torch.empty(1, device="meta")
    with torch.inference_mode(), TensorBytes() as held:
        for _ in range(2):
            flow = transformer(latents, timestep, words, return_dict=False)[0]
    assert flow.device.type == "meta"
    del flow
    assert held.live == blocks.device_nbytes
    assert {p.device.type for p in transformer.blocks.parameters()} == {"cpu"}
    blocks.release()
    assert held.live == 0


def test_a_block_comes_while_the_one_before_it_computes():
    made, said = model(), []
    blocks = offload_blocks(made.transformer, "cpu")
    blocks.copies = Order(said)
    for layer, block in enumerate(made.transformer.blocks):
        block.attn1.to_q.register_forward_pre_hook(lambda *_, layer=layer: said.append(("computes", layer)))
    memories = [packed.memory.data_ptr() for packed in blocks._packed]
    video(made)
    copied = [memories.index(what) for kind, what in said if kind == "copied"]
    passes = len([layer for kind, layer in said if (kind, layer) == ("computes", 1)])
    assert copied == [layer % LAYERS for layer in range(len(copied))] and len(copied) == LAYERS * passes + 1
    for index, (kind, layer) in enumerate(said):
        if kind == "computes":
            assert said[index - 1] == ("copied", memories[(layer + 1) % LAYERS])
            assert said[index - 2][0] == "waited"


@pytest.mark.parametrize("method", [SeaCache(threshold=5), FirstBlockCache(threshold=10)], ids=["pass", "blocks"])
def test_blocks_that_a_step_cache_skips_are_not_copied(method):
    """Every copy is of a block that then computes, in turn; at the end one or two have come that nobody waits for."""
    made, said = model(), []
    blocks = offload_blocks(made.transformer, "cpu")
    blocks.copies = Order(said)
    for layer, block in enumerate(made.transformer.blocks):
        block.attn1.to_q.register_forward_pre_hook(lambda *_, layer=layer: said.append(("computes", layer)))
    called = []
    made.transformer.register_forward_pre_hook(lambda *_: called.append(1))
    video(made, sampling=MANY_STEPS, step_cache=method)
    computed = said.count(("computes", 1))
    copied = [layer for kind, layer in said if kind == "copied"]
    assert len(called) > 1.5 * computed and LAYERS * computed < len(copied) <= LAYERS * computed + 2
    memories = [packed.memory.data_ptr() for packed in blocks._packed]
    assert copied == [memories[layer % LAYERS] for layer in range(len(copied))]
    with torch.inference_mode():
        made.transformer(*LATENTS, return_dict=False)  # without a rolling cache
    assert len([kind for kind, _ in said if kind == "copied"]) >= len(copied) + LAYERS - 1


def test_everything_is_as_it_was_afterwards():
    made = model()
    transformer, before = made.transformer, values(made.transformer)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in transformer.modules()]
    own = [set(vars(m)) for m in transformer.modules()]
    blocks = offload_blocks(transformer, "cpu")
    assert offload_blocks(transformer, "cpu") is blocks and offloaded_blocks(transformer) is blocks
    kept = dict(transformer.named_parameters())
    video(made)
    assert all(now is kept[name] for name, now in transformer.named_parameters())

    def cancel(done, total):
        raise Cancelled

    with pytest.raises(Cancelled):
        video(made, on_pass=cancel)
    failing = transformer.blocks[2].attn2.to_v.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        video(made)
    failing.remove()
    assert all(now is kept[name] for name, now in transformer.named_parameters())
    assert all(torch.equal(now, before[name]) for name, now in values(transformer).items())
    blocks.remove()
    blocks.remove()
    assert offloaded_blocks(transformer) is None and list(values(transformer)) == list(before)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in transformer.modules()] == hooks
    assert [set(vars(m)) for m in transformer.modules()] == own
    assert same(video(made), video(model()))


def test_they_may_be_removed_while_a_video_is_made():
    made = model()
    blocks = offload_blocks(made.transformer, "cpu")
    kept = dict(made.transformer.named_parameters())
    with RollingSession(made, prompt(made), height=64, width=96) as session:
        list(session.generate(1))
        blocks.remove()
        list(session.generate(1))
    assert not blocks._buffers and all(now is kept[name] for name, now in made.transformer.named_parameters())


def test_what_an_interrupt_leaves_is_put_back():
    """Hooks of torch do not run after Ctrl-C, which is no Exception."""
    made = model()
    blocks = offload_blocks(made.transformer, "cpu")
    kept = dict(made.transformer.named_parameters())

    def interrupted(*_):
        raise Cancelled

    failing = made.transformer.blocks[1].ffn.register_forward_pre_hook(interrupted)
    with pytest.raises(Cancelled):
        video(made)
    failing.remove()
    assert same(video(made), video(model()))
    blocks.release()
    assert all(now is kept[name] for name, now in made.transformer.named_parameters())


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "runtime"])
@pytest.mark.parametrize("inside", [True, False], ids=["in inference mode", "outside"])
def test_loras_come_on_change_and_go(fuse, inside):
    plain, offloaded = model(), model()
    offload_blocks(offloaded.transformer, "cpu")
    lora = read_lora(peft(matrices(**SIZE)))
    stacks = {id(made): LoraStack(made, fuse=fuse) for made in (plain, offloaded)}
    videos = []
    for made in (plain, offloaded):
        stack, one = stacks[id(made)], []
        with torch.inference_mode(inside):
            for strength in (1.0, 0.5, 0.0):
                stack.set([(lora, strength)])
                one.append(video(made))
        videos.append(one)
    assert all(map(same, *videos))
    assert not same(videos[0][0], videos[0][1]) and same(videos[1][2], video(model()))


def test_a_lora_on_some_blocks_takes_no_memory_from_the_others():
    """Blocks that have grown need larger memory on the device, also where one that has not is there already."""
    plain, offloaded = model(), model()
    offload_blocks(offloaded.transformer, "cpu")
    video(offloaded)
    of_one = {name: tensor for name, tensor in peft(matrices(**SIZE)).items() if "blocks.2." in name}
    for made in (plain, offloaded):
        LoraStack(made, fuse=False).set([(read_lora(of_one), 1.0)])
    assert same(video(offloaded), video(plain))


def test_weights_that_were_changed_in_their_places_are_those_of_the_next_video():
    plain, offloaded = model(), model()
    offload_blocks(offloaded.transformer, "cpu")
    for made in (plain, offloaded):
        video(made)
        for parameter in made.transformer.blocks.parameters():
            parameter.data.mul_(1.1)
    assert same(video(offloaded), video(plain))


def test_fast_passes_multiply_offloaded_weights_as_they_are(monkeypatch):
    made, execution = model(torch.bfloat16), ExecutionConfig(fast=True)
    monkeypatch.setattr(fast, "fast_on", lambda *_: fast.Fast("sage", True, ""))
    assert fast.fast_for(execution, made.transformer, torch.device("cuda")).products
    offload_blocks(made.transformer, "cpu")
    used = fast.fast_for(execution, made.transformer, torch.device("cuda"))
    assert (used.backend, used.products) == ("sage", False) and "lie in CPU memory" in used.remark


def test_what_compiles_or_records_is_refused():
    made = model()
    offload_blocks(made.transformer, "cpu")
    with pytest.raises(ValueError, match="compile cannot go with weights in CPU memory.*turn compile off"):
        video(made, execution=ExecutionConfig(compile=True))
    with pytest.raises(ValueError, match="CUDA graphs cannot go with weights in CPU memory"):
        ExecutionConfig(cuda_graphs=True).check_offloaded()
    ExecutionConfig().check_offloaded()
    assert same(video(made), video(model()))
