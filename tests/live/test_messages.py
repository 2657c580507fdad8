"""What a user is told: the file that is missing and its folder, the size that does not fit, the input that is wrong."""

import pytest
from graphs import chosen, loaders, node, one_sampler, sample, save_latent

from tools.comfyui.client import PromptFailed, PromptRejected


@pytest.mark.parametrize(
    ("loader", "folder"), [("model", "diffusion_models"), ("text_encoder", "text_encoders"), ("vae", "vae")]
)
@pytest.mark.parametrize("name", ["wan/absent.safetensors", "wan\\absent.safetensors"])
def test_a_missing_file_is_named_with_its_folder_and_a_link(client, loader, folder, name):
    graph = {**loaders(**{loader: name}), **one_sampler()}
    graph |= loaders(**{loader: name})
    graph["decode"] = node("RollingKVDecodeImages", vae=["vae", 0], latent=["sample", 0])
    graph["preview"] = node("PreviewImage", images=["decode", 0])
    with pytest.raises(PromptRejected) as told:
        client.run(graph)
    message = str(told.value)
    assert "absent.safetensors" in message and folder in message and "https://" in message


@pytest.mark.traceback_expected
def test_a_size_that_does_not_fit_is_told_with_the_ones_that_do(client):
    with pytest.raises(PromptFailed, match=r"(?s)width.*16.*70.*64.*80"):
        client.run(one_sampler(width=70))


@pytest.mark.parametrize("name", ["wan/absent.safetensors", "wan\\absent.safetensors"])
def test_a_missing_lora_is_named_with_its_folder(client, name):
    graph = one_sampler(model=["lora", 0])
    graph["lora"] = node("RollingKVLoadLoRA", model=["model", 0], lora_name=name, strength=1.0)
    with pytest.raises(PromptRejected, match="(?s)absent.safetensors.*was not found. Put the file into .*loras"):
        client.run(graph)


@pytest.mark.traceback_expected
def test_offloaded_weights_that_are_to_be_compiled_are_refused_by_the_loader(client):
    graph = one_sampler()
    graph["model"]["inputs"] |= {"offload": True, "compile": True}
    with pytest.raises(
        PromptFailed, match="RollingKVLoadModel.*compile cannot go with weights in CPU.*turn compile off"
    ):
        client.run(graph)


@pytest.mark.traceback_expected
def test_a_latent_of_another_model_is_told_with_its_shape(client):
    graph = one_sampler(initial_latent=["image latent", 0])
    graph["image latent"] = node("EmptyLatentImage", width=64, height=64, batch_size=1)
    with pytest.raises(PromptFailed, match=r"\[1, 4, 8, 8\]"):
        client.run(graph)


@pytest.mark.traceback_expected
def test_a_state_and_an_initial_latent_at_once_are_refused(client):
    graph = one_sampler(1)
    graph["second"] = sample(1, state=["sample", 1], initial_latent=["sample", 0])
    graph["save"] = save_latent("second")
    with pytest.raises(PromptFailed, match="first sampler"):
        client.run(graph)


@pytest.mark.traceback_expected
def test_a_window_that_holds_no_chunk_is_refused(client):
    graph = one_sampler(1, model=["cache", 0])
    window = chosen("window", "this many frames", frames=2)
    graph["cache"] = node(
        "RollingKVAttachCache", model=["model", 0], **window, **chosen("sink", "this many frames", frames=0)
    )
    with pytest.raises(PromptFailed, match="at least 3"):
        client.run(graph)
