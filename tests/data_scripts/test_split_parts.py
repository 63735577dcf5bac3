"""Splits that are cut in parts by image, for every dataset, door and order of rows."""

import hashlib

import datasets
import numpy as np
import pytest
from PIL import JpegImagePlugin

import data_scripts
from data_scripts.exporting import export_dataset
from data_scripts.split_parts import check_split_parts, cut_splits, part_of_image
from tests.helpers.layout_hub import caption_row, file_name, save_images, write_samples
from training_reftr.settings import TrainingSettings
from training_reftr.sources import load_rows


NUMBERS = range(100, 140)
PARTS = {"validation": {"train": 0.6, "val": 0.2, "test": 0.2}}
NAMES = ["train_of_validation", "val_of_validation", "test_of_validation"]


@pytest.fixture
def folder(tmp_path):
    """Write a dataset in the columns of moondream/refcoco-m, whose only split is validation."""
    return write_samples(tmp_path / "photos", NUMBERS)


@pytest.fixture
def load(folder, tmp_path):
    """Return a function that loads the dataset, or another, with a cache of its own."""

    def load_cached(name=folder, split_parts=PARTS, **flags):
        return data_scripts.load(str(name), cache_dir=str(tmp_path / "cache"), split_parts=split_parts, **flags)

    return load_cached


def images(rows):
    """Return split -> ids of its images."""
    return {split: part["image_id"][:] for split, part in rows.items()}


def test_parts_take_the_place_of_their_split_and_share_no_image(load):
    found = images(load())
    assert list(found) == NAMES
    ids = [image_id for part in found.values() for image_id in part]
    assert sorted(ids) == [f"coco_{number}" for number in NUMBERS]
    assert 18 <= len(found["train_of_validation"]) <= 30
    # the rule, written again
    for image_id in ids:
        digest = hashlib.sha256(image_id.encode()).hexdigest()
        position = int(digest[:16], 16) / 2**64
        name = NAMES[0] if position < 0.6 else NAMES[1] if position < 0.8 else NAMES[2]
        assert image_id in found[name]


def test_added_and_reordered_rows_move_no_other_image(load, tmp_path):
    before = images(load())
    more = write_samples(tmp_path / "more", [*range(500, 520), *reversed(NUMBERS)])
    after = images(load(more))
    for name, part in before.items():
        assert set(part) == {image_id for image_id in after[name] if int(image_id[5:]) < 500}


def test_image_of_coco_is_in_the_same_part_of_every_dataset(load, tmp_path):
    save_images(tmp_path / "images", NUMBERS)
    rows = [caption_row(11, 0, "validation", id=str(n), file_name=file_name(n)) for n in NUMBERS]
    (tmp_path / "captions").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "captions" / "validation.parquet")
    captions = images(load(tmp_path / "captions", image_dir=tmp_path / "images"))
    assert captions == images(load())
    shares = PARTS["validation"]
    assert part_of_image(f"train2014/{file_name(9)}", shares) == part_of_image("vg_1_coco_9", shares)


def test_parts_are_loaded_alone_several_and_streamed(load):
    expected = images(load())
    for name in NAMES:
        rows = load(split=name)
        assert isinstance(rows, datasets.Dataset)
        assert rows["image_id"][:] == expected[name]
    assert images(load(split=NAMES[:2])) == {name: expected[name] for name in NAMES[:2]}
    streamed = load(streaming=True)
    assert {name: [row["image_id"] for row in part] for name, part in streamed.items()} == expected
    row = next(iter(load(split=NAMES[2], streaming=True)))
    assert np.array_equal(np.asarray(row["image"]), np.asarray(load(split=NAMES[2])[0]["image"]))


def test_stream_decodes_no_image_of_another_part(load, monkeypatch):
    shares = {"validation": {"train": 0.95, "test": 0.05}}
    decoded = []
    original = JpegImagePlugin.JpegImageFile.load

    def count(self, *args):
        decoded.append(1)
        return original(self, *args)

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", count)
    found = len(list(load(split_parts=shares, split="test_of_validation", streaming=True)))
    assert 0 < found < len(NUMBERS) / 2
    assert len(decoded) <= 2 * found
    decoded.clear()
    rows = load(split_parts=shares, split="test_of_validation", streaming=True, decode=False)
    assert {type(row["image"]) for row in rows} == {dict}
    assert decoded == []


@pytest.mark.parametrize("name", ["shapes", "exported"])
def test_generated_and_exported_datasets_are_cut(shapes, data_cache, tmp_path, name):
    flags = {"num_train": 48, "num_validation": 9, "num_test": 10, "image_size": 64} if name == "shapes" else {}
    if name == "exported":
        name = str(export_dataset(data_scripts.SOURCES["shapes"], shapes, tmp_path / "exported"))
    parts = {"train": {"train": 0.7, "dev": 0.3}}
    rows = data_scripts.load(name, cache_dir=data_cache, split_parts=parts, **flags)
    assert sorted(rows) == ["dev_of_train", "test", "train_of_train", "validation"]
    assert sorted([*rows["train_of_train"]["image_id"], *rows["dev_of_train"]["image_id"]]) == sorted(
        shapes["train"]["image_id"]
    )
    assert rows["test"]["image_id"][:] == shapes["test"]["image_id"][:]
    alone = data_scripts.load(name, split="test", cache_dir=data_cache, split_parts=parts, **flags)
    assert len(alone) == len(shapes["test"])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"train": 0.5}, r"split_parts\.train is 0\.5; expected parts and shares"),
        (["validation"], r"split_parts is \['validation'\]; expected a mapping"),
        ({"validation": {"train": 0.5, "test": 0.4}}, r"shares of split_parts\.validation sum to 0\.9; expected 1"),
        ({"validation": {"train": 1.0, "test": 0}}, r"split_parts\.validation\.test is 0; expected a share"),
        ({"validation": {"train": True}}, r"split_parts\.validation\.train is True; expected a share"),
        ({"validation": {"a b": 1}}, r"split_parts\.validation has the part 'a b'; expected a name"),
        ({"val": {"train": 1}}, r"split_parts cuts 'val', and the splits of '.*photos' are validation"),
        (
            {"validation": {"train": 0.9999, "test": 0.0001}},
            r"The part 'test' of the split 'validation' of '.*photos' has no images: give it a larger share",
        ),
    ],
)
def test_invalid_parts_are_refused(load, parts, message):
    with pytest.raises(ValueError, match=message):
        load(split_parts=parts)


def test_cut_split_and_share_of_part_are_refused(load):
    for split in ("validation", "validation[:10%]", "test_of_validation[:1]", "all", ["validation"]):
        with pytest.raises(ValueError, match=r"is cut in parts: name train_of_validation, val_of_validation, test_of"):
            load(split=split)
    with pytest.raises(ValueError, match="There is no split 'train' in"):
        load(split="train")


def test_part_named_as_another_split_is_refused(shapes):
    rows = {"validation": shapes["validation"], "test_of_validation": shapes["test"]}
    with pytest.raises(ValueError, match="'photos' has a split 'test_of_validation': give the part another name"):
        cut_splits(rows, {"validation": {"train": 0.5, "test": 0.5}}, "photos")


def test_shares_of_many_images_are_close_to_those_given():
    shares = {"train": 0.8, "val": 0.1, "test": 0.1}
    counts = dict.fromkeys(shares, 0)
    for number in range(20_000):
        counts[part_of_image(f"image {number}", shares)] += 1
    for part, share in shares.items():
        assert abs(counts[part] / 20_000 - share) < 0.01
    assert check_split_parts({"validation": shares}) == dict.fromkeys(NAMES, "validation")


def test_commands_of_datasets_take_parts(run, folder, tmp_path):
    parts = ("--split_parts", "{validation: {train: 0.8, test: 0.2}}", "--cache_dir", tmp_path / "cache")
    checked = run("-m", "reftr_cli", "data", "check", folder, *parts).stdout
    assert [line.split()[0] for line in checked.splitlines()[1:3]] == ["train_of_validation", "test_of_validation"]
    assert "0 errors" in checked
    statistics = run("-m", "reftr_cli", "data", "stats", folder, *parts).stdout
    assert statistics.splitlines()[0].split() == ["train_of_validation", "test_of_validation"]
    preview = ("--split", "test_of_validation", "--output", tmp_path / "out.png")
    run("-m", "reftr_cli", "data", "preview", folder, *parts, *preview)
    assert (tmp_path / "out.png").is_file()
    run("-m", "reftr_cli", "data", "export", folder, *parts, "--output", tmp_path / "exported")
    again = data_scripts.load(str(tmp_path / "exported"), cache_dir=str(tmp_path / "cache"))
    assert list(again) == ["train_of_validation", "test_of_validation"]
    assert "split_parts" in (tmp_path / "exported" / "README.md").read_text()
    wrong = run("-m", "reftr_cli", "data", "stats", folder, "--split_parts", "{validation: 1}", check=False)
    assert wrong.stderr.startswith("error: split_parts.validation is 1; expected parts")


@pytest.mark.parametrize("streaming", [False, True])
def test_recipes_train_on_parts(folder, tmp_path, streaming):
    settings = TrainingSettings.from_flat(
        dataset=str(folder),
        dataset_config={"split_parts": PARTS},
        data_cache_dir=str(tmp_path / "cache"),
        train_split="train_of_validation",
        validation_split="val_of_validation",
        test_splits="test_of_validation",
        streaming=streaming,
    )
    rows = load_rows(settings.data)
    assert list(rows) == NAMES
    assert [type(rows[name]) is datasets.Dataset for name in NAMES] == [not streaming, True, True]
    assert len(load_rows(settings.data, eval_only=True)[NAMES[2]]) == len(rows[NAMES[2]])


def test_joined_datasets_hold_out_their_parts(folder, tmp_path):
    """An image of COCO that is in the test part of one dataset is not trained on through another."""
    other = write_samples(tmp_path / "other", range(100, 130))
    names = f"{folder},{other}"
    configs = {str(folder): {"split_parts": PARTS}, str(other): {"split_parts": {"validation": {"train": 1}}}}
    settings = TrainingSettings.from_flat(
        dataset=names,
        dataset_config=configs,
        data_cache_dir=str(tmp_path / "cache"),
        train_split="train_of_validation",
        validation_split=f"{folder}/val_of_validation",
    )
    rows = load_rows(settings.data)
    held_out = {*rows[f"{folder}/val_of_validation"]["image_id"], *rows[f"{folder}/test_of_validation"]["image_id"]}
    assert len(held_out) > 5
    assert not held_out & set(rows["train_of_validation"]["image_id"])
