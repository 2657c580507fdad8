"""The journal of a growing state: what it holds after every chunk, and what is read from it whatever ended the run."""

import os

import pytest
import torch

from rolling_kv.sampling import journal as journal_module
from rolling_kv.sampling.journal import Journal
from rolling_kv.sampling.state import CacheState
from rolling_kv.sampling.state_file import StateFileError, is_state_file, load_state, read_state

MODEL = "0123456789abcdef"


def grown(chunks: int, dtype=torch.float32) -> list[CacheState]:
    """A state after each of its chunks: one frame, then three; a new prompt with each third one, and a negative one."""
    generator, states = torch.Generator().manual_seed(0), [CacheState(model=MODEL, model_name="tiny")]
    negative = torch.randn(1, 4, 8, generator=generator).to(dtype)
    for number in range(chunks):
        if number % 3 == 0:
            prompt = torch.randn(1, 4, 8, generator=generator).to(dtype)
        latents = torch.randn(1, 16, 3 if number else 1, 2, 3, generator=generator).to(dtype)
        state = states[-1].extended(
            latents, timestep=0.0, prompt=prompt, negative=negative if number else None, seed=number or None
        )
        states.append(state.named([(f"prompt of {number}", prompt)]))
    return states[1:]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "video.journal"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("first", [1, 4])
def test_after_every_chunk_the_journal_holds_the_state(dtype, first, path):
    with Journal(path) as journal:
        for state in grown(9, dtype)[first - 1 :]:
            kept = journal.add(state)
            assert journal.add(state) is state  # nothing new
            found = load_state(path)
            assert found.key == kept.key == state.key and found.texts == state.texts and found.records == state.records
            assert all(map(torch.equal, found.chunks + found.prompts, state.chunks + state.prompts))
            assert read_state(path).model_name == "tiny" and read_state(path).key == state.key
    assert is_state_file(path)
    journal.remove()
    assert not path.exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_that_are_on_disk_are_read_from_there(dtype, path, monkeypatch):
    monkeypatch.setattr(journal_module, "MAPPED_AT_ONCE", 4)
    states = grown(11, dtype)
    with Journal(path) as journal:
        state = CacheState(model=MODEL)
        for number, whole in enumerate(states):
            state = journal.add(
                state._replace(
                    chunks=(*state.chunks, whole.chunks[-1]),
                    prompts=whole.prompts,
                    records=whole.records,
                    key=whole.key,
                )
            )
            assert state.key == whole.key and all(map(torch.equal, state.chunks, whole.chunks))
            mapped = [old.data_ptr() != own.data_ptr() for old, own in zip(state.chunks, whole.chunks)]
            assert sum(mapped) == ((number + 1) // 4 * 4 if os.name != "nt" else 0)
        journal.remove()
    assert torch.equal(state.latents(), states[-1].latents())  # the file is gone, its values are not
    assert state.first(frames=7).key == states[2].key


def test_a_journal_that_was_cut_anywhere_is_the_state_up_to_its_last_whole_chunk(path):
    states, ends = grown(5), []
    with Journal(path) as journal:
        for state in states:
            journal.add(state)
            ends.append(path.stat().st_size)
    whole = path.read_bytes()
    cuts = {*range(0, len(whole), 37), *ends, *(end - 1 for end in ends), *(end + 1 for end in ends[:-1])}
    for cut in sorted(cuts):
        done = sum(end <= cut for end in ends)
        for tail in (b"", b"\0" * 300):  # as after a power cut
            path.write_bytes(whole[:cut] + tail)
            if done:
                assert load_state(path).key == states[done - 1].key, (cut, tail)
            else:
                with pytest.raises(StateFileError, match="ends before its first chunk|no safetensors|damaged|altered"):
                    load_state(path)


def test_a_journal_that_was_altered_is_refused(path):
    states = grown(4)
    with Journal(path) as journal:
        for state in states[:3]:
            journal.add(state)
        end = path.stat().st_size
        journal.add(states[3])
    whole = path.read_bytes()
    for at in range(0, end, 11):
        altered = bytearray(whole)
        altered[at] ^= 4
        path.write_bytes(altered)
        with pytest.raises(StateFileError) as refused:
            load_state(path)
        assert str(refused.value).startswith(str(path)) and str(refused.value).isprintable()
    altered = bytearray(whole)
    altered[-1] ^= 4  # of the last chunk it cannot be told from one that was not written to its end
    path.write_bytes(altered)
    assert load_state(path).key == states[2].key


def test_a_full_disk_leaves_what_was_there(path, monkeypatch):
    states = grown(3)
    with Journal(path) as journal:
        journal.add(states[0])

        def full(file, values, write=journal_module._write_all):
            write(file, bytes(values)[:40])
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(journal_module, "_write_all", full)
            with pytest.raises(OSError, match="No space left"):
                journal.add(states[1])
        assert load_state(path).key == states[0].key
        journal.add(states[2])  # there is room again
        assert load_state(path).key == states[2].key


def test_what_was_there_stays_until_all_that_is_known_is_on_disk(path, monkeypatch):
    states = grown(3)
    with Journal(path) as journal:
        journal.add(states[1])

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(journal_module, "_write_all", full)
        with pytest.raises(OSError, match="No space left"), Journal(path) as another:
            another.add(states[2])
    assert load_state(path).key == states[1].key and os.listdir(path.parent) == [path.name]
