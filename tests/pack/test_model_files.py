"""What the loaders list and find in ComfyUI's folders, which a stand-in has: names, subfolders, nothing outside."""

import os
from types import ModuleType

import pytest
from node_modules import node_module


class Folders(ModuleType):
    """ComfyUI's folder_paths over one folder; counts how often it walks."""

    def __init__(self, root):
        super().__init__("folder_paths")
        self.root, self.walks = root, 0

    def get_folder_paths(self, name):
        return [str(self.root / name)]

    def get_filename_list(self, name):
        return [
            name for name in self.recursive_search(self.get_folder_paths(name)[0])[0] if name.endswith("safetensors")
        ]

    def get_full_path(self, folder, name):
        path = self.root / folder / name
        return str(path) if os.path.isfile(path) else None

    def recursive_search(self, root, excluded_dir_names=None):
        self.walks += 1
        times = {folder: os.path.getmtime(folder) for folder, *_ in os.walk(root)}
        files = [
            os.path.relpath(os.path.join(folder, name), root) for folder, _, names in os.walk(root) for name in names
        ]
        return files, times


@pytest.fixture
def folders(tmp_path):
    for name in ("diffusion_models", "text_encoders", "vae", "loras", "diffusers"):
        (tmp_path / name).mkdir()
    return Folders(tmp_path)


@pytest.fixture
def model_files(folders):
    with node_module("model_files", folders) as module:
        yield module


def make(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_diffusers_folders_are_listed_and_found_wherever_they_lie(model_files, folders):
    for name in ("flat", "org/name", "models--org--name/snapshots/0123"):
        make(folders.root / "diffusers" / name / "transformer" / "config.json")
    make(folders.root / "diffusers/other/vae/config.json")
    listed = [name.replace(os.sep, "/") for name in model_files.choices(model_files.MODEL)[1:]]
    assert listed == ["flat", "models--org--name/snapshots/0123", "org/name"]
    for name in listed:
        assert model_files.get(model_files.MODEL, name) == folders.root / "diffusers" / name
    assert model_files.choices(model_files.VAE)[1:] == ["other"]


def test_folders_are_walked_again_only_after_a_change(model_files, folders):
    make(folders.root / "diffusion_models/sub/first.gguf")
    assert model_files.choices(model_files.MODEL)[1:] == [os.path.join("sub", "first.gguf")]
    walks = folders.walks
    model_files.choices(model_files.MODEL)
    assert folders.walks == walks + 1  # the stand-in's own list of single files
    second = make(folders.root / "diffusion_models/sub/second.gguf")
    os.utime(second.parent, (1, 1))
    assert os.path.join("sub", "second.gguf") in model_files.choices(model_files.MODEL)
    folders.root.joinpath("diffusers").rmdir()
    assert model_files.choices(model_files.VAE) == ["tiny (bundled)"]


OUTSIDE = [
    "../outside.safetensors",
    "sub/../../outside.safetensors",
    "..\\outside.safetensors",
    "{absolute}",
    "C:outside",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_name_leads_out_of_the_folders(model_files, folders, name):
    outside = make(folders.root / "outside.safetensors")
    make(folders.root / "loras" / "sub" / "inside.safetensors")
    make(folders.root / "loras" / "C:outside")
    for kind in (model_files.MODEL, model_files.LORA):
        assert model_files.find(kind, name.format(absolute=outside)) is None
    for inside in ("sub/inside.safetensors", "sub\\inside.safetensors"):
        assert model_files.get(model_files.LORA, inside) == folders.root / "loras/sub/inside.safetensors"


@pytest.mark.parametrize(
    "name", [None, "", 7, ["a"], "x" * 300, "x" * 100_000, "a\0b", "\ud83e"], ids=lambda n: repr(n)[:9]
)
def test_what_is_no_name_is_told_in_a_line(model_files, name):
    with pytest.raises(ValueError, match="Put the file into .*loras") as told:
        model_files.get(model_files.LORA, name)
    str(told.value).encode()
    assert len(str(told.value)) < 500
    assert (model_files.check(model_files.LORA, name) is True) == (name is None)


def test_tiny_decoders_are_listed_beside_vaes_and_found(model_files, folders):
    for name in ("vae/wan.safetensors", "vae_approx/taew2_1.safetensors", "vae_approx/taesd_decoder.safetensors"):
        make(folders.root / name)
    assert [name for name in model_files.choices(model_files.VAE) if "tiny" not in name] == [
        "wan.safetensors",
        "taew2_1.safetensors",
    ]
    found = model_files.find(model_files.VAE, "taew2_1.safetensors")
    assert found == folders.root / "vae_approx" / "taew2_1.safetensors"
    make(folders.root / "vae" / "taew2_1.safetensors")
    assert model_files.find(model_files.VAE, "taew2_1.safetensors").parent.name == "vae"
    assert model_files.find(model_files.TEXT_ENCODER, "taew2_1.safetensors") is None


def test_what_the_pack_has_itself_is_listed_first_and_found(model_files, folders, tmp_path, monkeypatch):
    make(folders.root / "loras/style.safetensors")
    monkeypatch.setattr(model_files, "BUNDLED", tmp_path / "model")
    monkeypatch.setattr(model_files, "BUNDLED_LORA", tmp_path / "model/loras/stripes.safetensors")
    assert model_files.choices(model_files.LORA) == ["style.safetensors"]
    assert model_files.find(model_files.LORA, model_files.BUNDLED_LORA_NAME) is None
    make(model_files.BUNDLED_LORA)
    make(model_files.BUNDLED / "vae/weights.safetensors")
    assert model_files.choices(model_files.LORA) == [model_files.BUNDLED_LORA_NAME, "style.safetensors"]
    assert model_files.get(model_files.LORA, model_files.BUNDLED_LORA_NAME) == model_files.BUNDLED_LORA
    assert model_files.find(model_files.LORA, model_files.BUNDLED_NAME) is None
    assert model_files.get(model_files.VAE, model_files.BUNDLED_NAME) == model_files.BUNDLED
    assert model_files.BUNDLED_NAME not in model_files.choices(model_files.MODEL)
