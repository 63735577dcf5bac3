"""Several sets joined, without what any of them holds out."""

import pytest
from layout_refcoco import make_refcoco
from layout_visual_genome import make_visual_genome

import data_scripts
from data_scripts import coco_id, combine


@pytest.fixture
def settings(tmp_path):
    """RefCOCO, RefCOCOg (google), whose val shares a picture with its train, and Visual Genome in one folder."""
    make_refcoco(tmp_path, "refcoco_unc")
    make_refcoco(tmp_path, "refcocog_google")
    make_visual_genome(tmp_path, (581857, 100, 102))
    return {"data_dir": tmp_path, "cache_dir": str(tmp_path / "cache")}


@pytest.mark.row("R21")
def test_no_row_is_held_out_anywhere(settings, caplog):
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


def test_rows_and_flags_of_ones_own(settings):
    google = data_scripts.load("refcocog_google", **settings)
    joined = combine([google, ("refcoco_unc", {"integer_boxes": True})], **settings)
    assert len(joined) == 20
    assert joined[9]["objects"][0]["box"] != joined[19]["objects"][0]["box"] == [103, 299, 238, 477]
    # bare rows hold nothing out
    assert len(combine([google["train"]])) == 11
    assert len(combine([google["train"], google])) == 20
    assert len(combine([google], held_out=())) == 11
    assert combine([google], split="val")["image_id"] == ["coco_100"]


def test_pictures_are_matched_by_file_name_where_the_id_does_not_tell(settings):
    google = data_scripts.load("refcocog_google", **settings)
    renamed = google["train"].map(lambda row, index: {"image_id": f"row_{index}"}, with_indices=True)
    assert len(combine([renamed, google])) == 20


def test_wrong_sets_are_refused(settings):
    with pytest.raises(ValueError, match="one set at least"):
        combine([])
    with pytest.raises(ValueError, match=r"visual_genome has no split 'testA'; it has: train\."):
        combine(["refcoco_unc", "visual_genome"], split="testA", **settings)
    with pytest.raises(ValueError, match="refcoco_unc is streamed"):
        combine(["refcoco_unc"], streaming=True, **settings)
    with pytest.raises(ValueError, match="no data set 'refcocos'"):
        combine(["refcocos"], **settings)
