"""Unreadable images and rows give the same error message with any number of loader processes."""

import contextlib
import pickle
import re
import subprocess
import sys

import pytest
import yaml
from PIL import UnidentifiedImageError
from torch.utils.data import Dataset

import data_scripts
import train_reftr
from tests.helpers.layout_jsonl import make_jsonl
from tests.helpers.processes import free_port
from tests.helpers.tiny import ROOT
from training_reftr.data import SampleLoader, portable


@pytest.fixture
def jsonl_recipe(recipe, tmp_path):
    """Build a JSON Lines dataset; return a recipe that trains on it and the folder of its images."""
    make_jsonl(tmp_path / "data")
    settings = yaml.safe_load(recipe.read_text())
    cache = str(tmp_path / "cache")
    data_scripts.load("jsonl", data_dir=tmp_path / "data", cache_dir=cache)
    settings |= {"dataset": "jsonl", "dataset_config": {}, "data_dir": str(tmp_path / "data"), "data_cache_dir": cache}
    settings |= {"batch_size": 2, "num_epochs": 1, "num_pictures": 0, "test_splits": "validation"}
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path, tmp_path / "data" / "pictures"


# b is an image of training, e one of validation
@pytest.mark.parametrize(("image", "damage"), [("b", "cut"), ("e", "missing")])
def test_image_error_is_independent_of_loader_processes(jsonl_recipe, tmp_path, image, damage):
    recipe, folder = jsonl_recipe
    path = folder / f"{image}.png"
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    errors = []
    for workers in (0, 2):
        output = tmp_path / f"run{workers}"
        with pytest.raises(OSError, match=r".") as raised:
            train_reftr.main([str(recipe), "--output_dir", str(output), "--num_workers", str(workers)])
        errors.append(raised.value)
    assert type(errors[0]) is type(errors[1])
    assert str(errors[0]) == str(errors[1])
    assert str(path) in str(errors[1])
    assert len(str(errors[1]).splitlines()) == 1


class FailingDataset(Dataset):
    """A dataset whose indices are errors, which it raises."""

    def __getitem__(self, index):
        raise index


def collate(samples):
    return samples


@pytest.mark.parametrize(
    "error",
    [
        ValueError("The row 7 cannot be read."),
        UnidentifiedImageError("cannot identify image file 'one.png'"),
        FileNotFoundError(2, "No such file or directory", "one.png"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_loader_error_keeps_type_and_message(error, workers):
    loader = SampleLoader(FailingDataset(), collate, batch_sampler=[[error]], num_workers=workers)
    with pytest.raises(type(error)) as raised:
        next(iter(loader))
    assert type(raised.value) is type(error)
    assert str(raised.value) == str(error)


def test_portable_keeps_message_of_unpicklable_error():
    class LocalError(OSError):
        pass

    sent = pickle.loads(pickle.dumps(portable(LocalError("The disk is gone."))))
    assert type(sent) is OSError
    assert str(sent) == "The disk is gone."


@pytest.mark.slow
def test_loader_bug_keeps_original_traceback():
    loader = SampleLoader(FailingDataset(), collate, batch_sampler=[[KeyError("text")]], num_workers=1)
    with pytest.raises(KeyError, match=r"Original Traceback"):
        next(iter(loader))


def test_loader_ends_its_processes_at_once_after_error():
    """End the processes explicitly: if the garbage collector ends them, each takes five seconds."""
    loader = SampleLoader(FailingDataset(), collate, batch_sampler=[[ValueError("x")]], num_workers=1)
    with contextlib.suppress(ValueError):
        next(iter(loader))
    (process,) = loader._iterator._workers
    del loader
    assert process.exitcode is not None


@pytest.mark.slow
def test_image_error_on_two_ranks_has_no_traceback(jsonl_recipe, tmp_path):
    recipe, folder = jsonl_recipe
    (folder / "b.png").write_bytes(b"")
    argv = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
        "train_reftr.py",
    ]
    argv += [str(recipe), "--batch_size", "2", "--num_workers", "1", "--output_dir", str(tmp_path / "run")]
    result = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    before_launcher = result.stderr.partition("torch/distributed/elastic")[0]
    assert "Traceback" not in before_launcher
    errors = re.findall("error: .*", result.stderr)  # possibly after a progress bar on the same line
    assert any(str(folder / "b.png") in line for line in errors)
    assert all(
        str(folder / "b.png") in line or "The connection to another rank of this run was lost" in line
        for line in errors
    )
