"""The speed on the loader: what a CPU has of it, and what is said of the rest."""

import pytest
import torch
from graphs import one_sampler, saved_latent

from tools.comfyui.client import PromptFailed


def made(client, **inputs):
    """The latents, and what nodes have said."""
    graph, said = one_sampler(), []
    graph["model"]["inputs"] |= inputs
    outputs = client.run(graph, on_text=lambda *text: said.append(str(text)))
    return saved_latent(client, outputs), " ".join(said)


def test_each_speed_makes_the_video(client):
    standard, _ = made(client, speed="standard")
    exact, _ = made(client, speed="exact")
    fast, said = made(client, speed="fast")
    assert torch.equal(fast, standard)
    assert "Fast passes use PyTorch's attention (attention in 8 bits needs a CUDA GPU) and products in" in said
    torch.testing.assert_close(exact, standard, atol=1e-3, rtol=1e-3)
    assert not torch.equal(exact, standard)


@pytest.mark.traceback_expected
def test_graphs_on_a_cpu_are_refused_by_the_loader(client):
    with pytest.raises(PromptFailed, match="RollingKVLoadModel.*CUDA graphs need a CUDA device"):
        made(client, cuda_graphs=True)
