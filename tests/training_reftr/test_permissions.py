"""All written files and folders have the permissions of the umask."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

import data_scripts
from data_scripts.exporting import export_dataset
from modeling_reftr.saving_reftr import save_tensors
from tests.helpers.tiny import TINY_SET
from training_reftr.images import ImageReader


@pytest.fixture(params=[0o022, 0o027], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def unexpected_modes(folder, umask):
    """Return the files and folders whose permissions do not follow the umask."""
    # Python writes the bytecode cache of a folder with permissions independent of the umask
    paths = [folder, *(path for path in folder.rglob("*") if "__pycache__" not in path.parts)]
    expected = {True: 0o777 & ~umask, False: 0o666 & ~umask}
    found = {str(path): path.stat().st_mode & 0o777 for path in paths}
    return {path: oct(mode) for path, mode in found.items() if mode != expected[os.path.isdir(path)]}


def test_run_files_follow_umask(trained):
    folder, _ = trained
    assert (folder / "checkpoints").is_dir()
    folder.chmod(0o750)  # pytest created the folder with other permissions
    assert unexpected_modes(folder, 0o027) == {}


def test_saved_model_files_follow_umask(make_model, processor, tmp_path, umask):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "mine.safetensors").touch(0o600)
    make_model(backbone_config={"backbone": "resnet18", "out_indices": [4]}).save_pretrained(folder)
    processor.save_pretrained(folder)
    assert (folder / "mine.safetensors").stat().st_mode & 0o777 == 0o600  # a file of the user is not changed
    (folder / "mine.safetensors").unlink()
    make_model().save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    for path in (folder, tmp_path / "sharded"):
        assert unexpected_modes(path, umask) == {}


def test_saved_tensors_follow_umask(tmp_path, umask):
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / "tensors.safetensors"
    path.touch(0o600)
    save_tensors({"one": torch.ones(2)}, path)
    assert unexpected_modes(tmp_path / "folder", umask) == {}
    assert list((tmp_path / "folder").iterdir()) == [path]


def test_built_and_exported_datasets_follow_umask(tmp_path, umask):
    (tmp_path / "cache").mkdir()
    splits = data_scripts.load("shapes", cache_dir=str(tmp_path / "cache"), **TINY_SET, num_proc=2)
    export_dataset(data_scripts.SOURCES["shapes"], splits, tmp_path / "export")
    for name in ("cache", "export"):
        assert unexpected_modes(tmp_path / name, umask) == {}


def test_cached_images_follow_umask(processor, tmp_path, umask):
    Image.fromarray(np.zeros((40, 30, 3), np.uint8)).save(tmp_path / "one.png")
    read = ImageReader(processor.image_processor, str(tmp_path / "cache"))
    read({"image": {"bytes": None, "path": str(tmp_path / "one.png")}, "height": 40, "width": 30})
    assert unexpected_modes(tmp_path / "cache", umask) == {}
