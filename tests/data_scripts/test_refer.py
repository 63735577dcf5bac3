"""References as JSON, gRefCOCO, and other datasets in the refer API's layout."""

import json
import logging
import pickle

import numpy as np
import pandas as pd
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

import data_scripts
from data_scripts.visual_genome import held_out_coco_ids
from tests.helpers.layout_refcoco import make_refcoco, python2_pickle
from tests.helpers.layout_refer import make_grefcoco, make_refer


@pytest.fixture
def load(tmp_path, caplog):
    """Return a function that loads a dataset of the folder `data`."""

    def load_split(name, split=None, folder="data", **flags):
        caplog.set_level(logging.WARNING, "data_scripts.building")
        settings = {"data_dir": str(tmp_path / folder), "cache_dir": str(tmp_path / "cache")}
        return data_scripts.load(name, split, **settings, **flags)

    return load_split


def expressions(row):
    return [(sentence["text"], sentence["phrases"][0]["objects"]) for sentence in row["sentences"]]


def edit_json(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["refcoco_unc", "refclef_unc"])
def test_builder_reads_references_as_json(tmp_path, load, name):
    facts = make_refcoco(tmp_path / "data", name)
    expected = load(name)
    refs = pickle.loads(facts["refs_file"].read_bytes(), encoding="latin-1")
    facts["refs_file"].with_suffix(".json").write_text(json.dumps(refs))
    # JSON is read in place of a pickle, even of one that is refused
    facts["refs_file"].write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    rows = load(name)
    assert list(rows) == list(expected)
    for split, part in expected.items():
        assert rows[split].remove_columns("image")[:] == part.remove_columns("image")[:]
    facts["refs_file"].unlink()
    assert len(load(name, "train")) == len(expected["train"])


def test_held_out_images_are_read_from_references_as_json(tmp_path):
    facts = make_refcoco(tmp_path / "data", "refcoco_unc")
    expected = held_out_coco_ids(["refcoco_unc"], tmp_path / "data")
    refs = pickle.loads(facts["refs_file"].read_bytes(), encoding="latin-1")
    facts["refs_file"].unlink()
    facts["refs_file"].with_suffix(".json").write_text(json.dumps(refs))
    assert held_out_coco_ids(["refcoco_unc"], tmp_path / "data") == expected


def test_builder_refuses_pandas_pickle_and_reads_its_conversion(tmp_path, load):
    facts = make_refcoco(tmp_path / "data")
    expected = load("refcoco_unc", "train")
    refs = pickle.loads(facts["refs_file"].read_bytes(), encoding="latin-1")
    pd.DataFrame(refs).to_pickle(facts["refs_file"])
    with pytest.raises(
        ValueError, match=r"refs\(unc\)\.p' is refused: it is a pickle of pandas.* convert it"
    ) as raised:
        load("refcoco_unc", "train")
    _, _, advice = str(raised.value).partition("JSON: ")
    exec(f"import pandas; {advice}".removesuffix("."))
    rows = load("refcoco_unc", "train")
    assert rows.remove_columns("image")[:] == expected.remove_columns("image")[:]


@pytest.mark.parametrize("content", [b'{"refs": []}', b"[1]", b'[{"ann_id": 7}', b"\xff"])
def test_builder_names_damaged_json_of_references(tmp_path, load, content):
    facts = make_refcoco(tmp_path / "data")
    path = facts["refs_file"].with_suffix(".json")
    path.write_bytes(content)
    with pytest.raises((OSError, ValueError)) as raised:
        load("refcoco_unc")
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("ending", ["json", "p"])
def test_grefcoco_gives_phrases_all_their_objects(tmp_path, load, ending):
    facts = make_grefcoco(tmp_path / "data", ending)
    rows = load("grefcoco")
    assert tuple(rows) == data_scripts.SOURCES["grefcoco"].splits == ("train", "val", "testA", "testB")
    first, second = rows["train"]
    assert [first["image_id"], second["image_id"]] == ["coco_1", "coco_2"]
    assert expressions(first) == [
        ("both people", [0, 1]),
        ("the two people", [0, 1]),
        ("the right one", [1]),
        ("the dog", []),
        ("a cat", []),
        ("the crowd and the left one", [2, 0]),
    ]
    assert expressions(second) == [("nobody", []), ("nothing", []), ("no one", []), ("the cup", [0])]
    assert expressions(rows["val"][0]) == [("both, right to left", [0, 1])]
    assert [item["object_id"] for item in rows["val"][0]["objects"]] == ["coco_32", "coco_31"]
    assert first["positions"] == [0, 1, 2, 3, 4, 5]
    coco = COCO(str(facts["instances_file"]))
    for row in rows["train"]:
        for item in row["objects"]:
            annotation = coco.anns[int(item["object_id"].removeprefix("coco_"))]
            x, y, width, height = annotation["bbox"]
            assert item["box"] == [x, y, x + width, y + height]
            assert item["boxes"] == [item["box"]]
            assert item["category"] == coco.cats[annotation["category_id"]]["name"]
            segmentation = {**item["segmentation"], "counts": item["segmentation"]["counts"].encode()}
            assert (coco_mask.decode(segmentation) == coco.annToMask(annotation)).all()


def test_grefcoco_counts_missing_objects_and_crowds(tmp_path, load, caplog):
    make_grefcoco(tmp_path / "data")
    load("grefcoco")
    assert (
        "grefcoco train: left out 1 expressions of objects that instances.json lacks, 1 expressions of objects "
        "without a box in the image." in caplog.text
    )
    assert "grefcoco train: 1 objects are crowds." in caplog.text


@pytest.mark.parametrize("ann_id", ["11", 1.5, [11, -1], [[11]], [None], True])
def test_grefcoco_names_reference_with_malformed_objects(tmp_path, load, ann_id):
    facts = make_grefcoco(tmp_path / "data")
    edit_json(facts["refs_file"], lambda refs: refs[3].update(ann_id=ann_id))
    with pytest.raises(ValueError, match=r"grefs\(unc\)\.json', reference 3 has ann_id=.* expected an integer"):
        load("grefcoco")


def test_grefcoco_names_missing_files_and_living_copy(tmp_path, load):
    with pytest.raises(OSError, match=r"(?s)grefcoco/instances\.json.*Living copies: FudanCVL/gRefCOCO"):
        load("grefcoco")


def test_refer_reads_folder_with_its_splits(tmp_path, load):
    facts = make_refer(tmp_path / "rrsisd")
    rows = load("refer", folder="rrsisd")
    assert {split: len(part) for split, part in rows.items()} == {"train": 10, "val": 1, "test": 1}
    row = rows["test"][0]
    assert row["image_id"] == "rrsisd_refer_12"
    assert data_scripts.coco_id(row["image_id"], "00012.jpg") is None
    assert row["image"].size == (40, 30)
    assert expressions(row) == [("the field 22", [0]), ("the field 23", [1])]
    assert [item["box"] for item in row["objects"]] == [[2, 3, 12, 15], [20, 9, 35, 29]]
    coco = COCO(str(facts["instances_file"]))
    for item, annotation in zip(row["objects"], coco.loadAnns([120, 121]), strict=True):
        segmentation = {**item["segmentation"], "counts": item["segmentation"]["counts"].encode()}
        assert (coco_mask.decode(segmentation) == coco_mask.decode(annotation["segmentation"][0])).all()


@pytest.mark.parametrize("name", ["refs(rrsisd).json", "refs(google).p", "grefs(unc).json"])
def test_refer_finds_the_only_file_of_references(tmp_path, load, name):
    make_refer(tmp_path / "data", name, "images")
    assert len(load("refer", "train")) == 10


def test_refer_requires_refs_file_among_several(tmp_path, load):
    make_refer(tmp_path / "data", "refs(one).json", "images")
    refs = json.loads((tmp_path / "data/refs(one).json").read_text())[:2]
    (tmp_path / "data/refs(two).p").write_bytes(python2_pickle(refs))
    with pytest.raises(ValueError, match=r"several files of references, refs\(one\)\.json, refs\(two\)\.p; name one"):
        load("refer")
    assert len(load("refer", "train", refs_file="refs(two).p")) == 1
    assert len(load("refer", "train", refs_file="refs(one).json")) == 10
    with pytest.raises(ValueError, match=r"refs_file is '\.\./refs\.p'; expected the name of a"):
        load("refer", refs_file="../refs.p")


def test_refer_rebuilds_when_named_file_changes(tmp_path, load):
    make_refer(tmp_path / "data", "mine.json", "images")
    assert len(load("refer", "train", refs_file="mine.json")) == 10
    edit_json(tmp_path / "data/mine.json", lambda refs: refs.pop(0) and refs.pop(0))
    assert len(load("refer", "train", refs_file="mine.json")) == 9


def test_refer_finds_images_by_folder_and_name(tmp_path, load):
    facts = make_refer(tmp_path / "data", image_folder="tiles")
    for path in (tmp_path / "data/tiles").iterdir():
        path.rename(path.with_name(f"tile-{int(path.stem)}.tif"))
    image_dir = str(tmp_path / "data/tiles")
    assert len(load("refer", "train", image_dir=image_dir, image_name="tile-{id}.tif")) == 10
    edit_json(facts["instances_file"], lambda content: [image.update(file_name="x") for image in content["images"]])
    assert len(load("refer", "train", image_dir=image_dir, image_name="tile-{id}.tif")) == 10
    with pytest.raises(OSError, match=r"(?s)images of 'refer' do not exist.*looked for in image_dir, or below"):
        load("refer")
    for image_name in ("{number}.jpg", "../{id}.jpg", "{id", "{id.real.x}"):
        with pytest.raises(ValueError, match=r"image_name is .*; expected the name of a file in its folder"):
            load("refer", image_name=image_name)


def test_refer_names_images_of_coco_as_other_datasets_do(tmp_path, load):
    make_refer(tmp_path / "data", image_folder="images")
    for path in (tmp_path / "data/images").iterdir():
        path.rename(path.with_name(f"COCO_train2014_{int(path.stem):012d}.jpg"))
    rows = load("refer", "test", image_name="COCO_train2014_{id:012d}.jpg")
    assert rows["image_id"] == ["coco_12"]


def test_refer_recognizes_box_format_and_reads_it_by_flag(tmp_path, load):
    facts = make_refer(tmp_path / "data", image_folder="images")
    expected = load("refer", "train")[:]

    def to_xyxy(content):
        for item in content["annotations"]:
            x, y, width, height = item["bbox"]
            item["bbox"] = [x, y, x + width, y + height]

    edit_json(facts["instances_file"], to_xyxy)
    with pytest.raises(ValueError, match="'refer': The boxes, said to be 'xywh', look like 'xyxy'"):
        load("refer", "train")
    rows = load("refer", "train", box_format="xyxy")
    assert rows["objects"][:] == expected["objects"]


def test_refer_scales_boxes_to_image_of_another_size(tmp_path, load):
    facts = make_refer(tmp_path / "data", image_folder="images")

    def double(content):
        for image in content["images"]:
            image.update(width=80, height=90)

    edit_json(facts["instances_file"], double)
    row = load("refer", "test")[0]
    boxes = [item["box"] for item in row["objects"]]
    np.testing.assert_allclose(boxes, [[1, 1, 6, 5], [10, 3, 17.5, 29 / 3]], rtol=1e-6)


def test_refer_reads_several_targets_and_none(tmp_path, load, caplog):
    facts = make_refer(tmp_path / "data", "refs(unc).json", "images")
    edit_json(facts["refs_file"], lambda refs: [refs[0].update(ann_id=[10, 11]), refs[1].update(ann_id=[])])
    assert expressions(load("refer", "train")[0]) == [("the field 0", [0, 1]), ("the field 1", [])]
    assert "left out" not in caplog.text


@pytest.mark.parametrize("name", ["grefcoco", "refer"])
def test_builder_gives_same_rows_in_processes_and_streaming(tmp_path, load, name):
    (make_grefcoco if name == "grefcoco" else make_refer)(tmp_path / "rrsisd")
    rows = load(name, folder="rrsisd")
    settings = {"data_dir": str(tmp_path / "rrsisd"), "cache_dir": str(tmp_path / "other")}
    builder = data_scripts.SOURCES[name].builder(config_name=name, **settings)
    builder.download_and_prepare(num_proc=2)
    for split, part in rows.items():
        assert builder.as_dataset(split=split).to_dict() == part.to_dict()
        streamed = data_scripts.load(name, split, streaming=True, **settings)
        assert [row["sentences"] for row in streamed] == part["sentences"][:]
