"""One split is loaded and evaluated without the files of the others."""

import json
import logging
import shutil
from pathlib import Path

import datasets
import pytest

import data_scripts
from tests.helpers.layout_flickr30k import make_flickr30k
from tests.helpers.layout_refcoco import make_refcoco, save_picture
from tests.helpers.layout_reftr_index import make_reftr_index
from training_reftr.settings import TrainingSettings
from training_reftr.sources import load_rows


def make_jsonl(folder):
    for split in ("train", "test"):
        save_picture(folder / f"{split}.jpg", (40, 30))
        line = {"image": f"{split}.jpg", "expressions": [{"text": f"of {split}", "box": [1, 2, 20, 20]}]}
        (folder / f"{split}.jsonl").write_text(json.dumps(line))


# dataset -> (maker of its folder, a split)
CASES = {
    "refcoco_unc": (make_refcoco, "testA"),
    "refcocog_google": (lambda folder: make_refcoco(folder, "refcocog_google"), "val"),
    "flickr30k_entities": (make_flickr30k, "test"),
    "jsonl": (make_jsonl, "test"),
}


@pytest.fixture(params=CASES)
def dataset(request, tmp_path):
    """Return (name, split, its rows, folder without the images of other splits)."""
    make, split = CASES[request.param]
    (tmp_path / "data").mkdir()
    make(tmp_path / "data")
    rows = data_scripts.load(request.param, data_dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "complete"))
    undecoded = {
        name: {image["path"] for image in part.cast_column("image", datasets.Image(decode=False))["image"]}
        for name, part in rows.items()
    }
    others = set().union(*undecoded.values()) - undecoded[split]
    assert others
    for path in others:
        if Path(path).is_file():
            Path(path).unlink()
    return request.param, split, rows[split].remove_columns("image")[:], tmp_path / "data"


def test_split_is_loaded_without_images_of_other_splits(dataset, tmp_path):
    name, split, expected, folder = dataset
    settings = {"data_dir": str(folder), "cache_dir": str(tmp_path / "alone")}
    rows = data_scripts.load(name, split, **settings)
    assert rows.remove_columns("image")[:] == expected
    several = data_scripts.load(name, [split], **settings)
    assert list(several) == [split]
    assert several[split].cache_files == rows.cache_files
    streamed = data_scripts.load(name, split, streaming=True, decode=False, **settings)
    assert [row["image_id"] for row in streamed] == expected["image_id"]
    with pytest.raises(OSError, match="do not exist"):
        data_scripts.load(name, **settings)
    with pytest.raises(ValueError, match=rf"There is no split 'nothing' in '{name}'; there are: .*{split}"):
        data_scripts.load(name, "nothing", **settings)


def test_split_is_read_from_a_complete_build(dataset, tmp_path):
    """A build of all splits is used, and no second one is written."""
    name, split, expected, folder = dataset
    before = sorted((tmp_path / "complete").rglob("*.arrow"))
    rows = data_scripts.load(name, split, data_dir=str(folder), cache_dir=str(tmp_path / "complete"))
    assert rows.remove_columns("image")[:] == expected
    assert sorted((tmp_path / "complete").rglob("*.arrow")) == before


def test_eval_only_requires_the_images_of_its_splits(dataset, tmp_path, caplog):
    name, split, expected, folder = dataset
    settings = TrainingSettings.from_flat(
        dataset=name, data_dir=str(folder), data_cache_dir=str(tmp_path / "alone"), test_splits=split
    )
    with caplog.at_level(logging.WARNING):
        rows = load_rows(settings.data, eval_only=True)
    assert list(rows) == [split]
    assert rows[split].remove_columns("image")[:] == expected
    assert f"Only {split} are loaded" in caplog.text
    with pytest.raises(OSError, match="do not exist"):
        load_rows(settings.data)


def test_index_of_a_split_is_read_without_the_others(tmp_path):
    make_reftr_index(tmp_path / "data")
    index = tmp_path / "data" / "annotations_resc" / "unc"
    for path in index.glob("*.pth"):
        if path.stem != "unc_testA":
            path.unlink()
    shutil.rmtree(tmp_path / "data" / "annotations")
    settings = {"data_dir": str(tmp_path / "data"), "cache_dir": str(tmp_path / "cache")}
    assert len(data_scripts.load("resc_unc", "testA", **settings))
    with pytest.raises(OSError, match=r"unc_train\.pth(.|\n)*Living copies: linhuixiao/OneRef"):
        data_scripts.load("resc_unc", **settings)
