"""Datasets in formats of other projects: boxes, phrases and masks where the authors' own readers have them."""

import json
import logging

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

import data_scripts
from data_scripts.schema import FEATURES
from tests.helpers.layout_line_formats import COCO as COCO_FILE
from tests.helpers.layout_line_formats import FLICKR, MDETR, ODVG, PHRASECUT, make_line_formats, save


@pytest.fixture
def load(tmp_path, caplog):
    """Return a function that writes the files of a format, changes them, and loads a split."""

    def load_split(name, split=None, change=None, make=True, **flags):
        folder = tmp_path / name
        if make:
            make_line_formats(folder, name)
        if change is not None:
            change(folder)
        caplog.set_level(logging.WARNING, "data_scripts.building")
        return data_scripts.load(name, split, cache_dir=str(tmp_path / "cache"), data_dir=str(folder), **flags)

    return load_split


def rewrite(file, edit):
    """Return a change of a JSON file."""

    def change(folder):
        content = json.loads((folder / file).read_text())
        edit(content)
        (folder / file).write_text(json.dumps(content))

    return change


def phrases_of(sentence):
    return [(sentence["text"][phrase["start"] : phrase["end"]], phrase["objects"]) for phrase in sentence["phrases"]]


def masks_of(row):
    return [
        coco_mask.decode({**item["segmentation"], "counts": item["segmentation"]["counts"].encode()})
        for item in row["objects"]
    ]


def test_mdetr_json_joins_expressions_of_one_image(load, caplog):
    rows = load("mdetr_json")
    assert list(rows) == ["train", "val"]
    assert rows["train"].features == FEATURES
    (row,) = rows["train"]
    assert row["image_id"] == COCO_FILE
    assert data_scripts.coco_id(row["image_id"], COCO_FILE) == 581857
    assert row["image"].size == (row["width"], row["height"]) == (640, 427)
    np.testing.assert_allclose([item["box"] for item in row["objects"]], [[103.93, 299.99, 238.15, 427]], rtol=1e-6)
    # not the root noun of tokens_positive
    assert [phrases_of(sentence) for sentence in row["sentences"]] == [
        [("the lady with the blue shirt", [0])],
        [("lady with back to us", [0])],
    ]
    assert "mdetr_json train: 1 lines are joined" in caplog.text


def test_mdetr_json_has_boxes_and_captions_of_pycocotools(load, tmp_path):
    row = load("mdetr_json", "val")[0]
    coco = COCO(str(tmp_path / "mdetr_json" / "finetune_refcoco_val.json"))
    caption = coco.loadImgs(7)[0]["caption"]
    expected = {}
    for item in coco.loadAnns(coco.getAnnIds(imgIds=[7])):
        x, y, width, height = item["bbox"]
        for start, end in item["tokens_positive"]:
            expected.setdefault(caption[start:end], []).append([x, y, x + width, y + height])
    (sentence,) = row["sentences"]
    assert sentence["text"] == caption
    assert {text: row["objects"][index]["boxes"] for text, (index,) in phrases_of(sentence)} == expected
    assert expected["Two young guys"] == [[1, 2, 10, 32], [20, 2, 30, 32]]
    assert set(expected) == {"Two young guys", "shaggy hair", "their hands"}


def test_mdetr_json_counts_what_has_no_words_or_no_image(load, caplog):
    load("mdetr_json")
    assert (
        "val: left out 1 boxes of images that the file lacks, 1 boxes without words of their caption, 1 "
        in caplog.text
    )


def test_mdetr_json_scales_boxes_to_image_of_another_size(load, caplog):
    row = load("mdetr_json", "val", lambda folder: save(folder / "flickr30k-images" / FLICKR, (80, 50)))[0]
    assert (row["width"], row["height"]) == (80, 50)
    assert row["objects"][0]["boxes"] == [[2, 2, 20, 32], [40, 2, 60, 32]]
    assert "val: 1 images have another size than annotated" in caplog.text


def test_mdetr_json_has_expressions_of_none_and_several_as_the_authors_of_grefcoco_write_them(load):
    def change(content):
        images = [{**content["images"][0], "dataset_name": "grefcoco", "caption": name} for name in ("both", "no bus")]
        content["images"] = [{**image, "id": number} for number, image in enumerate(images)]
        fields = {"tokens_positive": [[0, 2]], "iscrowd": 0, "empty": False}
        content["annotations"] = [
            {"image_id": 0, "bbox": [1, 2, 9, 30], **fields},
            {"image_id": 0, "bbox": [20, 2, 10, 30], **fields},
            {"image_id": 1, "bbox": [0, 0, 0, 0], "area": -1, "original_id": -1, **fields, "empty": True},
        ]

    (row,) = load("mdetr_json", "val", rewrite("finetune_refcoco_val.json", change))
    assert [phrases_of(sentence) for sentence in row["sentences"]] == [[("both", [0, 1])], [("no bus", [])]]
    assert [item["box"] for item in row["objects"]] == [[1, 2, 10, 32], [20, 2, 30, 32]]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda content: content["images"][0].pop("caption"), "image 0: the image has no caption; expected text."),
        (lambda content: content["images"][0].update(id="7"), "image 0: the image has id='7'; expected an integer."),
        (lambda content: content["images"][0].update(file_name="../a.jpg"), "expected a path in the folder"),
        (lambda content: content["annotations"][0].update(bbox=7), "image 0: bbox is 7; expected a box"),
        (lambda content: content["annotations"][0].update(bbox=[1, 2, -3, 4]), "is [1, 2, -3, 4]; expected [left"),
        (lambda content: content["annotations"][0].update(image_id=None), "annotation 0: the annotation has image_id"),
        (lambda content: content["annotations"][0].update(tokens_positive=[0, "x"]), "tokens_positive is [0, 'x']"),
        (lambda content: content["annotations"][0].update(tokens_positive=[[0, 99]]), "start, end is (0, 99)"),
    ],
)
def test_mdetr_json_names_malformed_entry(load, edit, message):
    with pytest.raises(ValueError, match=r"(?s)^1 bad lines .*finetune_refcoco_val\.json', ") as raised:
        load("mdetr_json", "val", rewrite("finetune_refcoco_val.json", edit))
    assert message in str(raised.value)


def test_mdetr_json_without_lists_is_refused(load):
    with pytest.raises(ValueError, match=r"finetune_refcoco_val\.json' has no images; expected a list"):
        load("mdetr_json", change=rewrite("finetune_refcoco_val.json", lambda content: content.pop("images")))


def test_line_formats_require_path_for_folder_of_several_datasets(load, tmp_path):
    def change(folder):
        (folder / "finetune_refcocog_train.json").write_text(json.dumps(MDETR["val"]))

    with pytest.raises(ValueError, match=r"several files of 'train', finetune_refcoco_train.json, .*by path"):
        load("mdetr_json", change=change)
    path = {"train": "finetune_refcocog_train.json", "testA": "finetune_refcoco_val.json"}
    rows = load("mdetr_json", make=False, path=path)
    assert {split: len(part) for split, part in rows.items()} == {"train": 1, "testA": 1}


def test_line_formats_name_missing_images(load):
    with pytest.raises(OSError, match=r"(?s)1 images of 'mdetr_json' do not exist .*MDETR's annotations are"):
        load("mdetr_json", change=lambda folder: (folder / "train2014" / COCO_FILE).unlink())


def test_line_formats_refuse_image_that_is_in_two_folders(load):
    def change(folder):
        (folder / "images").symlink_to(folder / "flickr30k-images")

    assert len(load("mdetr_json", "val", change)) == 1
    with pytest.raises(ValueError, match=r"'1000092795\.jpg' may be any of 2 files"):
        load("mdetr_json", make=False, change=lambda folder: save(folder / FLICKR, (40, 50)), drop_bad_lines=False)


def test_odvg_gives_regions_of_one_phrase_to_it(load, caplog):
    rows = load("odvg")
    first, second = rows["train"]
    assert [item["boxes"] for item in first["objects"]] == [
        [[1, 2, 11, 12]],
        [[20, 2, 25, 12]],
        [[30, 2, 35, 12]],
        [[3, 20, 9, 25]],
    ]
    assert phrases_of(first["sentences"][0]) == [("A car", [0]), ("two trees", [1, 2]), ("a bench", [3])]
    assert phrases_of(second["sentences"][0]) == [("the dog", [0])]
    assert (second["width"], second["height"]) == (40, 30)
    assert "odvg train: left out 1 objects without words." in caplog.text


def test_odvg_takes_categories_that_occur_once_as_expressions(load, caplog):
    (row,) = load("odvg", "val")
    assert [(sentence["text"], row["objects"][0]["category"]) for sentence in row["sentences"]] == [("cat", "cat")]
    assert "val: left out 2 objects whose category is that of another object" in caplog.text


def test_odvg_recognizes_fractions_and_reads_them_by_flag(load):
    def change(folder):
        lines = json.loads(json.dumps(ODVG["train"]))
        for line in lines:
            for region in line["grounding"]["regions"]:
                box = np.ravel(region["bbox"]) / [40, 30, 40, 30]
                region["bbox"] = box.tolist()
        (folder / "my_train.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    with pytest.raises(ValueError, match="look like 'xyxy_fraction'"):
        load("odvg", "train", change)
    path = {"train": "my_train.jsonl"}
    rows = load("odvg", "train", make=False, path=path, box_format="xyxy_fraction")
    np.testing.assert_allclose(rows[0]["objects"][0]["box"], [1, 2, 11, 12], rtol=1e-6)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"grounding": {}}, "line 3: the line has no filename; expected text."),
        ({"filename": "a.jpg"}, "line 3: the line has neither 'grounding' nor 'detection'"),
        ({"filename": "a.jpg", "grounding": {"caption": "a"}}, "line 3: grounding has no regions; expected a list"),
        ({"filename": "a.jpg", "grounding": {"caption": "a", "regions": [{}]}}, "grounding.regions[0] has no bbox"),
        ({"filename": "a.jpg", "grounding": {"caption": "a", "regions": [{"bbox": [1, 2, 3, 4], "phrase": "b"}]}},
         "phrases[0].text is 'b'; expected words that are once in 'a'"),
        ({"filename": "a.jpg", "detection": {"instances": [{"bbox": [1, 2, 3, 4]}]}}, "instances[0] has no category"),
    ],
)  # fmt: skip
def test_odvg_names_malformed_line(load, line, message):
    def change(folder):
        with open(folder / "my_train.jsonl", "a") as file:
            file.write(f"{json.dumps(line)}\n")

    with pytest.raises(ValueError, match=r"(?s)^1 bad lines .*my_train\.jsonl, line 3") as raised:
        load("odvg", change=change)
    assert message in str(raised.value)
    assert len(load("odvg", "train", make=False, drop_bad_lines=True)) == 2


def test_phrasecut_gives_all_instances_with_their_masks(load, caplog):
    rows = load("phrasecut")
    assert list(rows) == ["miniv", "train"]
    (row,) = rows["train"]
    assert row["image_id"] == "vg_2375429_coco_271471"
    assert [phrases_of(sentence) for sentence in row["sentences"]] == [[("walking people", [0, 1])], [("sky", [2])]]
    assert [item["boxes"] for item in row["objects"]] == [[[1, 2, 11, 12]], [[20, 2, 26, 10]], [[0, 0, 40, 5]]]
    instances = [instance for entry in PHRASECUT["train"] for instance in entry["Polygons"]]
    for mask, instance, area in zip(masks_of(row), instances, (100, 48, 200), strict=True):
        # as the authors draw it, whose polygons include their edges
        drawn = Image.new("L", (40, 30))
        for part in (part for part in instance if len(part) > 2):
            ImageDraw.Draw(drawn).polygon([tuple(point) for point in part], fill=1)
        assert (np.asarray(drawn) >= mask).all()
        assert mask.sum() == area
    assert "train: 1 polygons of fewer than three points are left out of their mask." in caplog.text
    assert "train: 1 lines are joined to the first one of their image." in caplog.text
    assert rows["miniv"][0]["image_id"] == "vg_61512"


def test_phrasecut_is_read_without_sizes_of_images(load):
    rows = load("phrasecut", "train", lambda folder: (folder / "image_data_split.json").unlink())
    assert rows["image_id"] == ["vg_2375429"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda content: content[0].pop("phrase"), "entry 1: the entry has no phrase"),
        (lambda content: content[0].update(phrase=" "), "entry 1: expressions[0].text is ''; expected words"),
        (lambda content: content[0].update(Polygons=[[[1, 2, 3]], []]), "Polygons[0] has [1, 2, 3]; expected a list"),
        (lambda content: content[0].update(Polygons=[7, []]), "entry 1: Polygons[0] is 7; expected a list"),
        (lambda content: content[0].update(Polygons=[[]]), "entry 1: Polygons has 1 instances; expected 2, as"),
        (lambda content: content[0].update(instance_boxes=[]), "entry 1: instance_boxes is []; expected a box for"),
    ],
)
def test_phrasecut_names_malformed_entry(load, edit, message):
    with pytest.raises(ValueError, match=r"(?s)^1 bad lines .*refer_train\.json, ") as raised:
        load("phrasecut", change=rewrite("refer_train.json", edit))
    assert message in str(raised.value)


@pytest.mark.parametrize("name", ["mdetr_json", "odvg", "phrasecut"])
def test_line_formats_give_same_rows_in_processes_and_streaming(load, tmp_path, name):
    rows = load(name)
    builder = data_scripts.SOURCES[name].builder(
        config_name=name, data_dir=str(tmp_path / name), cache_dir=str(tmp_path / "other")
    )
    builder.download_and_prepare(num_proc=2)
    for split, part in rows.items():
        assert builder.as_dataset(split=split).to_dict() == part.to_dict()
        streamed = data_scripts.load(name, split, data_dir=str(tmp_path / name), streaming=True)
        assert [row["sentences"] for row in streamed] == part["sentences"][:]
