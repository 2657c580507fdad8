"""Recorded passes: the same bits as passes that run one by one, with a recorder that needs no GPU."""

import contextlib
from dataclasses import replace
from inspect import getsource

import pytest
import torch
from builders import tiny_transformer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rolling_kv.bench.storage.experiment import pack
from rolling_kv.cache.rolling import RollingKVCache
from rolling_kv.checkpoints.model import CausalModel
from rolling_kv.checkpoints.transformer import build_transformer
from rolling_kv.config import ALL_FRAMES, RECORDABLE_PACKINGS, CacheConfig, ExecutionConfig, SamplingConfig
from rolling_kv.presets import ModelPreset
from rolling_kv.sampling.session import RollingSession
from rolling_kv.step_cache import SeaCache
from rolling_kv.wan import attachment, fast, graphs
from rolling_kv.wan.attachment import apply_rolling_kv_cache

CHUNK, WINDOW, SINK = 2, 5, 1
SAMPLING = SamplingConfig(chunk=CHUNK, denoising_steps=(1000, 750, 500))
LAYOUTS = 1  # a chunk's places in the ring are an input
SIZE = dict(height=32, width=48)


class Tape(TorchDispatchMode):
    """What a CUDA graph keeps: each operation with the memory and the numbers that it had. Nothing else is run again."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, made))
        return made

    def replay(self):
        for function, args, kwargs, made in self.calls:
            for place, again in zip(tree_leaves(made), tree_leaves(function(*args, **kwargs))):
                # Neither a view nor written in place.
                if isinstance(place, torch.Tensor) and place.data_ptr() != again.data_ptr():
                    place.copy_(again)


class TapeRecorder:
    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, run):
        self.recorded += 1
        with Tape() as tape:
            output = run()

        def replay():
            self.replayed += 1
            tape.replay()

        return replay, output


@pytest.fixture
def recorders(monkeypatch):
    made = []
    monkeypatch.setattr(attachment, "CudaRecorder", lambda device: made.append(TapeRecorder()) or made[-1])
    monkeypatch.setattr(ExecutionConfig, "_check_cuda_graphs", lambda *_: None)
    return made


@pytest.fixture(scope="module")
def model():
    transformer = tiny_transformer(num_attention_heads=2, attention_head_dim=12, num_layers=3)
    return CausalModel(transformer, ModelPreset("test", SAMPLING, CacheConfig(WINDOW, SINK)))


def words(model, seed, tokens=6):
    return torch.randn(1, tokens, model.transformer.config.text_dim, generator=torch.Generator().manual_seed(seed))


def video(model, chunks=8, switch=None, tokens=6, **options):
    with RollingSession(model, words(model, 0), negative=words(model, 1), **SIZE, **options) as session:
        for number in range(chunks):
            if number == switch:
                session.set_prompt(words(model, 2, tokens), words(model, 1))
            for _ in session.generate(1, seed=7):
                pass
        kept = session._open.attachment.graphs
        held = 0 if kept is None else len(kept._recorded)
    assert kept is None or not kept._recorded and not kept._seen, "closing lets go of the graphs"
    return session.state.latents(), held


@pytest.mark.parametrize("storage", ["model", "float8", "int8"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_recorded_passes_change_no_bit(model, recorders, guidance, storage):
    options = dict(
        sampling=SamplingConfig(chunk=CHUNK, denoising_steps=(1000, 750, 500), guidance_scale=guidance),
        cache=CacheConfig(WINDOW, SINK, storage=storage),
    )
    branches = 2 if guidance != 1.0 else 1
    plain, _ = video(model, **options)
    recorded, held = video(model, execution=ExecutionConfig(cuda_graphs=True), **options)
    assert torch.equal(recorded, plain)
    assert held == recorders[0].recorded == 2 * LAYOUTS * branches  # denoising and context passes
    # The third chunk fills the window. Its first step and its context pass run as they are.
    assert recorders[0].replayed == branches * (6 * 3 + 5 - 2 * LAYOUTS)


def test_another_prompt_of_another_length_has_graphs_of_its_own_and_the_old_ones_go(model, recorders):
    plain, _ = video(model, switch=6, tokens=7)
    recorded, held = video(model, switch=6, tokens=7, execution=ExecutionConfig(cuda_graphs=True))
    assert torch.equal(recorded, plain)
    assert held < recorders[0].recorded
    assert recorders[0].replayed > 0


@pytest.mark.parametrize(
    "switch, guidance", [("hold", 2.0), ("joint", 2.0), ("causal", 1.0), ("flush", 1.0), ("cut", 1.0)]
)
def test_two_graphs_survive_prompts(model, recorders, guidance, switch):
    """There and back, and a blend: each prompt moves to where the recordings find it."""
    sampling = replace(SAMPLING, guidance_scale=guidance)
    branches = 2 if guidance != 1.0 else 1

    def made(**options):
        latents, negative = [], words(model, 1)
        with RollingSession(model, words(model, 0), negative=negative, sampling=sampling, **SIZE, **options) as session:
            for seed in (0, 0, 0, 0, 2, 2, 0, 0, 3, 1):
                known = None if seed == 3 else switch
                session.set_prompt(words(model, seed), negative, switch=known, blend=2 if seed == 3 else 1)
                latents += [chunk.latents for chunk in session.generate(1, seed=7)]
            graphs = session._open.attachment.graphs
            return torch.cat(latents, 2), 0 if graphs is None else len(graphs._recorded)

    plain, _ = made()
    recorded, held = made(execution=ExecutionConfig(cuda_graphs=True))
    assert torch.equal(recorded, plain)
    assert held == recorders[0].recorded == 2 * branches and recorders[0].replayed > 10 * branches


def test_a_prompt_that_two_branches_share_stays_with_the_one_when_the_other_has_another(model, recorders):
    sampling = replace(SAMPLING, guidance_scale=2.0)

    def made(**options):
        same = words(model, 0)
        with RollingSession(model, same, negative=same, sampling=sampling, **SIZE, **options) as session:
            latents = [chunk.latents for chunk in session.generate(5, seed=7)]
            session.set_prompt(words(model, 2), same)
            return torch.cat([*latents, *(chunk.latents for chunk in session.generate(3, seed=7))], 2)

    assert torch.equal(made(execution=ExecutionConfig(cuda_graphs=True)), made()) and recorders[0].recorded == 4


def test_memory_of_a_prompt_is_there_once(model, recorders):
    """The recordings' own, in which the one under way lies; those before have none."""
    with RollingSession(model, words(model, 0), execution=ExecutionConfig(cuda_graphs=True), **SIZE) as session:
        prompts = []
        for seed in (0, 0, 0, 0, 2, 3):
            session.set_prompt(words(model, seed))
            list(session.generate(1, seed=7))
            prompts.append(session._open.branches.prompts[-1].prompt)
        assert prompts[-1].nbytes > 0 and [prompt.nbytes for prompt in prompts[:-1]] == [0] * 5
        (place,) = session._open.attachment.graphs._places.values()
        assert prompts[-1].layers is place._layers


@pytest.mark.parametrize(
    "cache",
    [CacheConfig(ALL_FRAMES), CacheConfig(WINDOW, SINK, offload=True)],
    ids=["unlimited", "offloaded"],
)
def test_passes_that_no_other_repeats_are_not_recorded(model, recorders, cache):
    plain, _ = video(model, chunks=5, cache=cache)
    recorded, _ = video(model, chunks=5, cache=cache, execution=ExecutionConfig(cuda_graphs=True))
    assert torch.equal(recorded, plain) and recorders[0].recorded == 0


@pytest.mark.parametrize("storage", ["model", "int8"])
@pytest.mark.parametrize(
    "cache",
    [
        CacheConfig(WINDOW, SINK, positions="window"),
        CacheConfig(6, 2, leaving="ema", ema_alpha=0.9),
        CacheConfig(6, SINK, positions="window", leaving="memory"),
        CacheConfig(7, SINK, positions="window", shot_sink=True),
        CacheConfig(7, SINK),
    ],
    ids=["window", "ema", "memory", "shots", "uneven"],
)
def test_two_graphs_serve_windows_in_which_kept_frames_move_or_chunks_wrap(model, recorders, cache, storage):
    """Where frames move, they do so in a chunk's first pass, which is none of the repeated ones."""
    cache = replace(cache, storage=storage)
    plain, _ = video(model, chunks=9, cache=cache)
    recorded, held = video(model, chunks=9, cache=cache, execution=ExecutionConfig(cuda_graphs=True))
    assert torch.equal(recorded, plain)
    assert held == recorders[0].recorded == 2
    assert recorders[0].replayed >= 8


def test_a_chunk_is_written_where_the_indices_say(model, recorders, monkeypatch):
    """With those of another chunk in their place, the recorded passes give another video."""
    plain, _ = video(model)
    slots = RollingKVCache.slots.fget
    kept = []
    monkeypatch.setattr(RollingKVCache, "slots", property(lambda cache: kept.append(slots(cache)) or kept[0]))
    moved, _ = video(model, execution=ExecutionConfig(cuda_graphs=True))
    assert len({tuple(places.tolist()) for places in kept}) == 2 and not torch.equal(moved, plain)


def test_recorded_fast_passes_change_no_bit(recorders, monkeypatch):
    """Rows are quantised inside of the recording."""
    monkeypatch.setattr(fast, "fast_on", lambda *_: fast.Fast(None, True, ""))
    transformer = tiny_transformer(num_attention_heads=2, attention_head_dim=16, num_layers=2).bfloat16()
    model = CausalModel(transformer, ModelPreset("test", SAMPLING, CacheConfig(WINDOW, SINK)))
    plain, _ = video(model, chunks=6, execution=ExecutionConfig(fast=True))
    recorded, held = video(model, chunks=6, execution=ExecutionConfig(fast=True, cuda_graphs=True))
    assert torch.equal(recorded, plain) and held == 2
    assert not torch.equal(plain, video(model, chunks=6)[0])


def test_graphs_go_when_weights_move(model, recorders):
    """As between two chunks, where something else needed the memory."""
    layer = model.transformer.blocks[1].ffn.net[2]

    def moved(between):
        before = layer.weight.data
        made = []
        with RollingSession(model, words(model, 0), execution=ExecutionConfig(cuda_graphs=True), **SIZE) as session:
            try:
                for number, chunk in enumerate(session.generate(8, seed=7)):
                    made.append(chunk.latents)
                    if number == 5:
                        layer.weight.data = between(before)
            finally:
                layer.weight.data = before
        return torch.cat(made, 2)

    stayed, copied, halved = (moved(how) for how in (lambda x: x, torch.clone, lambda x: x / 2))
    assert torch.equal(stayed, copied) and not torch.equal(stayed, halved)
    assert [recorder.recorded for recorder in recorders] == [2, 4, 4]


def test_passes_over_several_chunks_are_not_recorded_and_their_clean_ones_are(recorders):
    """Rolling-Forcing's: a joint pass reads an anchor that moves with each."""
    sampling = SamplingConfig(chunk=1, denoising_steps=(1000, 500), sampler="rolling")
    transformer = tiny_transformer(num_attention_heads=2, attention_head_dim=12)
    model = CausalModel(transformer, ModelPreset("test", sampling, CacheConfig(4, 1)))

    def made(**options):
        with RollingSession(model, words(model, 0), **SIZE, **options) as session:
            list(session.generate(12, seed=7))
        return session.state.latents()

    plain = made()
    assert torch.equal(made(execution=ExecutionConfig(cuda_graphs=True)), plain)
    assert recorders[0].recorded == 1 and recorders[0].replayed >= 3


def test_a_result_is_not_overwritten_by_the_next_pass(model, recorders):
    with RollingSession(model, words(model, 0), execution=ExecutionConfig(cuda_graphs=True), **SIZE) as session:
        list(session.generate(6, seed=7))
        caches, forward = session._open.branches, session._open.attachment.forward
        prompt = words(model, 0)
        session._open.history.bring_to(session.state, "", prompt, None, 0.0, lambda: None)
        (branch,) = caches.for_prompts(prompt, None)
        branch.cache.begin(CHUNK)
        with torch.inference_mode():
            shape = (1, 16, CHUNK, *session.latent_size)
            first, second = (forward(torch.full(shape, x), 500.0, branch) for x in (0.1, -0.9))
            assert not torch.equal(first, second)
            assert torch.equal(first, forward(torch.full(shape, 0.1), 500.0, branch))
    assert recorders[0].replayed > 0


@pytest.mark.parametrize("sampler", ["unipc", "euler"])
def test_recorded_passes_of_a_many_step_sampler_change_no_bit(model, recorders, sampler):
    """Each of its passes has a timestep of its own: an input of the one recording."""
    options = dict(sampling=SamplingConfig(chunk=CHUNK, sampler=sampler, num_inference_steps=4))
    plain, _ = video(model, **options)
    recorded, held = video(model, execution=ExecutionConfig(cuda_graphs=True), **options)
    assert torch.equal(recorded, plain) and held == 2 * LAYOUTS


def test_the_recorder_uses_the_device_it_was_made_for(monkeypatch):
    """What a machine without CUDA can tell: what is current while a graph is recorded and repeated."""
    said, current = [], [torch.device("cuda", 0)]
    second = torch.device("cuda", 1)

    @contextlib.contextmanager
    def device(chosen):
        current.append(chosen)
        yield
        current.pop()

    @contextlib.contextmanager
    def recording(graph, pool, stream, capture_error_mode):
        said.append(("recorded", current[-1], pool, stream))
        yield

    class Graph:
        def replay(self):
            said.append(("repeated", current[-1]))

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream on {device}")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: f"a pool on {current[-1]}")
    record = graphs.CudaRecorder(second)
    replay, output = record(lambda: said.append(("run", current[-1])) or "output")
    replay()
    assert output == "output" and len(current) == 1
    place = "a pool on cuda:1", "a stream on cuda:1"
    assert said == [("recorded", second, *place), ("run", second), ("repeated", second)]


def test_packings_that_the_cpu_helps_to_unpack_are_refused():
    pytest.importorskip("gguf")
    device = torch.device("cuda")
    recorded = ExecutionConfig(cuda_graphs=True)
    recorded.check(device, packings=["Q8_0", "BF16"])
    with pytest.raises(ValueError, match="weights packed as Q4_K, Q6_K cannot go with CUDA graphs: .*in Q8_0"):
        recorded.check(device, packings=["Q4_K", "Q8_0", "Q6_K"])


@pytest.mark.parametrize("packing", ["Q8_0", "Q4_0"])
def test_packings_are_found_in_the_model(packing, monkeypatch):
    pytest.importorskip("gguf")
    asked = []
    monkeypatch.setattr(ExecutionConfig, "check", lambda self, device, **weights: asked.append(weights))
    monkeypatch.setattr(attachment, "CudaRecorder", lambda device: TapeRecorder())
    transformer = build_transformer(pack(tiny_transformer(ffn_dim=256).state_dict(), packing))
    apply_rolling_kv_cache(transformer, ExecutionConfig(cuda_graphs=True)).detach()
    assert asked == [{"weight_storage": "model", "packings": (packing,)}]


def test_no_other_packing_is_unpacked_on_the_device_alone():
    """diffusers' way of unpacking each kind: a table made from a list of numbers comes from the CPU."""
    pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import dequantize_functions

    alone = {kind.name for kind, unpack in dequantize_functions.items() if "torch.tensor(" not in getsource(unpack)}
    assert alone == set(RECORDABLE_PACKINGS)


def test_what_cannot_be_recorded_is_refused(model):
    session = RollingSession(model, words(model, 0), execution=ExecutionConfig(cuda_graphs=True), **SIZE)
    with pytest.raises(ValueError, match="CUDA graphs need a CUDA device, but the model is on cpu"), session:
        pass
    assert not any("forward" in vars(block) for block in model.transformer.blocks)
    with pytest.raises(ValueError, match="step cache cannot go with CUDA graphs"):
        RollingSession(
            model, words(model, 0), step_cache=SeaCache(), execution=ExecutionConfig(cuda_graphs=True), **SIZE
        )
