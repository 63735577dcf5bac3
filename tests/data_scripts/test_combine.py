"""Several datasets combined, without the images that any of them holds out."""

import datasets
import pytest

import data_scripts
from data_scripts import coco_id, combine
from data_scripts.pickles import read_pickle
from tests.helpers.layout_refcoco import make_refcoco
from tests.helpers.layout_reftr_index import make_reftr_index, save
from tests.helpers.layout_visual_genome import make_visual_genome


@pytest.fixture
def settings(tmp_path):
    """Write RefCOCO, RefCOCOg (google), whose val shares an image with its train, and Visual Genome to one folder."""
    make_refcoco(tmp_path, "refcoco_unc")
    make_refcoco(tmp_path, "refcocog_google")
    make_visual_genome(tmp_path, (581857, 100, 102))
    return {"data_dir": tmp_path, "cache_dir": str(tmp_path / "cache")}


@pytest.mark.row("R21")
def test_combine_leaves_out_images_held_out_by_any_dataset(settings, caplog):
    names = ["refcoco_unc", "refcocog_google", "visual_genome"]
    joined = combine(names, **settings)
    assert joined.features == data_scripts.FEATURES
    assert joined["image_id"] == [
        *[f"coco_{number}" for number in (20, 30, 40, 50, 70, 71, 72, 73, 74, 581857)] * 2,
        "vg_1_coco_581857",
        *("vg_50", "vg_51", "vg_54", "vg_55", "vg_56", "vg_58", "vg_59_coco_581900", "vg_60"),
    ]
    held_out = set()
    for name in names:
        for split, rows in data_scripts.load(name, **settings).items():
            held_out |= set() if split == "train" else {coco_id(image_id) for image_id in rows["image_id"]}
    assert held_out == {100, 101, 102}
    assert not held_out & {coco_id(image_id) for image_id in joined["image_id"]}
    assert "refcocog_google train: left out 1 of 11 images" in caplog.text
    assert "visual_genome train: left out 2 of 11 images" in caplog.text
    sentence_ids = [sentence["sentence_id"] for row in joined for sentence in row["sentences"]]
    assert len(set(sentence_ids)) == len(sentence_ids)


def test_combine_accepts_loaded_rows_and_dataset_flags(settings):
    google = data_scripts.load("refcocog_google", **settings)
    joined = combine([google, ("refcoco_unc", {"integer_boxes": True})], **settings)
    assert len(joined) == 20
    assert joined[9]["objects"][0]["box"] != joined[19]["objects"][0]["box"] == [103, 299, 238, 477]
    # rows without other splits hold nothing out
    assert len(combine([google["train"]])) == 11
    assert len(combine([google["train"], google])) == 20
    assert len(combine([google], held_out=())) == 11
    assert combine([google], split="val")["image_id"] == ["coco_100"]


def test_combine_matches_images_by_file_name_without_coco_id(settings):
    google = data_scripts.load("refcocog_google", **settings)
    renamed = google["train"].map(lambda row, index: {"image_id": f"row_{index}"}, with_indices=True)
    assert len(combine([renamed, google])) == 20


def test_combine_refuses_wrong_datasets(settings):
    with pytest.raises(ValueError, match="requires at least one dataset"):
        combine([])
    with pytest.raises(ValueError, match=r"visual_genome has no split 'testA'; it has: train\."):
        combine(["refcoco_unc", "visual_genome"], split="testA", **settings)
    with pytest.raises(ValueError, match="refcoco_unc is streamed"):
        combine(["refcoco_unc"], streaming=True, **settings)
    with pytest.raises(ValueError, match="no dataset 'refcocos'"):
        combine(["refcocos"], **settings)


@pytest.fixture
def two_builders(tmp_path):
    """Write an index of ReSC, which has its own trainval, and the refer API's files, which have none."""
    make_reftr_index(tmp_path)
    folder = tmp_path / "annotations_resc" / "referit"
    records = [record for split in ("train", "val") for record in read_pickle(folder / f"referit_{split}.pth")]
    save(records, folder / "referit_trainval.pth")
    make_refcoco(tmp_path)
    return {"data_dir": str(tmp_path), "cache_dir": str(tmp_path / "cache")}


def keys_of(rows):
    return {coco_id(image_id) or image_id for image_id in rows["image_id"]}


def test_combine_with_trainval_does_not_hold_out_val(two_builders, caplog):
    """`val` is recognized as part of trainval by its expressions: ids and files differ (ReferIt's is its own file)."""
    for name in ("resc_referit", "refcoco_unc"):
        splits = data_scripts.load(name, **two_builders)
        if name == "refcoco_unc":  # its train and its val
            expected = keys_of(splits["train"]) | keys_of(splits["val"])
        else:
            splits["test"] = splits["test"].select([])  # its images are those of train in this fixture
            expected = keys_of(splits["trainval"])
        assert keys_of(combine([splits], split="trainval")) == expected
    assert "left out" not in [record.message for record in caplog.records if record.name == "data_scripts.combining"]


def test_combine_with_miss_in_val_keeps_trainval_images(two_builders):
    """An empty box stays in val, where it counts as a miss, but not in trainval, where it cannot be learned."""
    splits = data_scripts.load("resc_referit", **two_builders)
    splits["test"] = splits["test"].select([])

    def add_miss(row):
        (first, *_) = row["objects"]
        row["objects"].append({**first, "object_id": "miss", "box": [5, 5, 5, 9], "boxes": [[5, 5, 5, 9]]})
        phrase = {"start": 0, "end": 4, "objects": [len(row["objects"]) - 1], "types": []}
        row["sentences"].append({"sentence_id": "miss", "text": "miss", "phrases": [phrase]})
        return row

    splits["val"] = splits["val"].map(add_miss)
    assert keys_of(combine([splits], split="trainval")) == keys_of(splits["trainval"])


def test_combine_of_trainval_equals_train_with_val(two_builders):
    refer = data_scripts.load("refcoco_unc", **two_builders)
    index = {
        name: rows.filter(lambda row, name=name: row["image_id"] != "coco_9" or not name.startswith("test"))
        for name, rows in data_scripts.load("resc_unc", **two_builders).items()
    }
    # a test image of one dataset is left out of the other's val and trainval
    tested = refer["val"].select([0]).map(lambda row: {"image_id": "coco_25"})
    index["testA"], index["testB"] = tested, tested
    at_once = combine([index, refer], split="trainval")
    both = ("train", "val")
    one_by_one = [combine([index, refer], split=split, trained=both) for split in both]
    joined = datasets.concatenate_datasets(one_by_one)

    def expressions(rows):
        return {(row["image_id"], item["text"]) for row in rows for item in row["sentences"]}

    assert expressions(at_once) == expressions(joined)
    images = keys_of(at_once)
    assert {100, 9, 20, 40} <= images  # val of one dataset, all of the other
    assert not {25, 101, 102} & images  # test splits of either
    # val is held out if only train is trained on
    assert 100 not in keys_of(combine([index, refer], split="train"))


def test_combine_can_train_on_split_named_test(two_builders):
    splits = data_scripts.load("refcoco_unc", **two_builders)
    parts = {"test": datasets.concatenate_datasets([splits["testA"], splits["testB"]]), **splits}
    assert keys_of(combine([parts], split="test")) == {101, 102}
    assert keys_of(combine([{name: parts[name] for name in ("test", "train", "val")}], split="test")) == {101, 102}
    # another dataset still holds its test split out
    assert keys_of(combine([parts, {"test": parts["test"].select([]), "testA": splits["testA"]}], split="test")) == {
        102
    }
    # all of testA is held out if one of its expressions is not trained on
    more = datasets.concatenate_datasets([splits["testA"], splits["train"].select([0])])
    assert keys_of(combine([{**parts, "testA": more}], split="test")) == {102}


def test_combine_accepts_rows_of_earlier_export(two_builders):
    splits = data_scripts.load("refcoco_unc", **two_builders)
    earlier = splits["train"].remove_columns("positions")
    assert len(combine([earlier, splits["train"]])) == 20


def test_coco_id_warns_of_deprecated_parameter_name():
    with pytest.warns(FutureWarning, match="`picture` is deprecated, use `path`"):
        assert coco_id("17", picture="COCO_train2014_000000000042.jpg") == 42
