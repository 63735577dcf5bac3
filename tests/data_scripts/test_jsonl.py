"""Own data in JSON Lines: every field of a line, boxes on the right pixels, named faults, training without code."""

import json
import logging
import re

import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools import mask as coco_mask

import data_scripts
from data_scripts.jsonl import JsonLines
from data_scripts.masks import uncompress_counts
from data_scripts.schema import FEATURES
from modeling_reftr import RefTRImageProcessor
from modeling_reftr.phrases_reftr import find_phrases
from tests.helpers.layout_jsonl import PICTURES, make_jsonl
from tests.helpers.layout_orientation import STORING
from training_reftr.data import GroundingCollator


MASK = np.zeros((30, 40), np.uint8)
MASK[5:15, 10:30] = 1


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))


def line(*expressions, image="pictures/a.png", **fields):
    return {"image": image, "expressions": list(expressions), **fields}


def box(text="the red car", **fields):
    return {"text": text, "box": [1, 2, 11, 12], **fields}


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "own" / "pictures"
    images.mkdir(parents=True)
    for name in ("a", "b", "c"):
        Image.new("RGB", (40, 30), "gray").save(images / f"{name}.png")
    Image.fromarray(MASK * 255).save(images / "mask.png")
    return tmp_path / "own"


@pytest.fixture
def load(folder, tmp_path):
    def load_split(*lines, split="train", **flags):
        if lines:
            write(folder / "train.jsonl", *lines)
        return data_scripts.load("jsonl", split, cache_dir=str(tmp_path / "cache"), data_dir=str(folder), **flags)

    return load_split


def masks_of(row):
    return [
        coco_mask.decode({**item["segmentation"], "counts": item["segmentation"]["counts"].encode()}).tolist()
        for item in row["objects"]
    ]


def test_builder_turns_line_into_row_of_schema(load, folder):
    write(folder / "validation.jsonl", line(box("on the left"), image="pictures/c.png"))
    two = {"text": "two cars", "boxes": [[0, 0, 5, 5], [9, 9, 12, 12.5]]}
    rows = load(
        line(box(category="car", types=["colour"]), box("it"), two),
        "",
        line(box(), image="pictures/b.png", image_id=17),
        split=None,
    )
    assert set(rows) == {"train", "validation"}
    assert rows["train"].features == FEATURES
    assert rows["train"]["image_id"] == ["pictures/a.png", "17"]
    row = rows["train"][0]
    assert row["image"].size == (row["width"], row["height"]) == (40, 30)
    assert [item["box"] for item in row["objects"]] == [[1, 2, 11, 12], [1, 2, 11, 12], [0, 0, 12, 12.5]]
    assert row["objects"][2]["boxes"] == [[0, 0, 5, 5], [9, 9, 12, 12.5]]
    assert [item["category"] for item in row["objects"]] == ["car", None, None]
    assert row["sentences"][0] == {
        "sentence_id": "pictures/a.png_0",
        "text": "the red car",
        "phrases": [{"start": 0, "end": 11, "objects": [0], "types": ["colour"]}],
    }


def test_builder_reads_images_of_every_kind(tmp_path, caplog):
    make_jsonl(tmp_path / "own")
    with caplog.at_level(logging.WARNING, "data_scripts.building"):
        rows = data_scripts.load("jsonl", cache_dir=str(tmp_path / "cache"), data_dir=str(tmp_path / "own"))
    seen = {row["image_id"]: row for part in rows.values() for row in part}
    names = [f"pictures/{name}.png" for name in (*"abcefgh", "grey", "palette", "inner/see-through")]
    assert set(seen) == {*names, "17", "d1", "d2"}
    assert {split: len(part) for split, part in rows.items()} == {"train": 8, "validation": 5}
    assert sum(len(row["sentences"]) for row in seen.values()) == 16
    for image_id, row in seen.items():
        name = {"17": "übung 1", "d1": "d", "d2": "d"}.get(image_id) or image_id[len("pictures/") : -len(".png")]
        size, mode = PICTURES[name]
        assert (row["image"].size, row["image"].mode) == (size, mode)
        assert (row["width"], row["height"]) == size

    def boxes(name):
        return [item["box"] for item in seen[name]["objects"]]

    assert boxes("pictures/grey.png") == [[0, 0, 40, 30]]
    assert [sentence["phrases"][0]["objects"] for sentence in seen["pictures/grey.png"]["sentences"]] == [[0], [0]]
    assert boxes("pictures/palette.png") == [[0, 5, 40, 12.5]]
    assert "1 boxes are cut" in caplog.text
    assert seen["17"]["sentences"][0]["text"] == "die Tür ☕"
    assert boxes("pictures/b.png") == [[1, 2, 11, 12], [0, 0, 12, 12]]
    assert seen["d1"]["objects"][0]["boxes"] == [[1, 2, 11, 12], [0, 0, 2, 2]]
    # the box of a mask is the extent of its pixels
    assert boxes("pictures/c.png") == [[10, 5, 30, 15], [10, 5, 11, 15], [2, 2, 12, 9]]
    assert boxes("pictures/e.png") == [[3, 2, 12, 9]]
    assert masks_of(seen["pictures/g.png"]) == [MASK.tolist()]
    assert boxes("pictures/g.png") == [[1, 2, 11, 12]]


def test_builder_finds_phrases_by_text_or_characters(load):
    caption = {
        "text": "a car near a big car",
        "phrases": [
            {"text": "a car", "box": [1, 2, 11, 12]},
            {"start": 11, "end": 20, "box": [20, 2, 30, 12], "types": ["size"]},
            {"text": "car", "start": 17, "end": 20, "box": [20, 2, 30, 12]},
        ],
    }
    row = load(line(caption, box("the car")))[0]
    phrases = row["sentences"][0]["phrases"]
    assert [(phrase["start"], phrase["end"], phrase["objects"]) for phrase in phrases] == [
        (0, 5, [0]),
        (11, 20, [1]),
        (17, 20, [1]),
    ]
    assert row["sentences"][1]["phrases"][0]["objects"] == [0]  # equal boxes are one object


@pytest.mark.parametrize("where", ["flag", "line"])
def test_builder_accepts_boxes_in_xywh(load, where):
    fields = {"box_format": "xywh"}
    row = load(line(box(), **(fields if where == "line" else {})), **(fields if where == "flag" else {}))[0]
    assert row["objects"][0]["box"] == [1, 2, 12, 14]


def test_builder_reads_none_one_and_several_objects_of_expressions_and_phrases(load):
    text = "a car and two dogs but no bus"
    caption = [
        {"text": "a car", "objects": [{"box": [1, 2, 11, 12]}]},
        {"text": "two dogs", "objects": [{"box": [20, 2, 30, 12]}, {"mask": "pictures/mask.png", "category": "dog"}]},
        {"text": "bus", "boxes": [], "types": ["vehicle"]},
    ]
    row = load(
        line(
            {"text": text, "phrases": caption},
            {"text": "the unicorn", "objects": []},
            {"text": "all", "objects": [{"box": [20, 2, 30, 12]}, {"box": [1, 2, 11, 12]}, {"box": [20, 2, 30, 12]}]},
            {"text": "parts", "boxes": [[0, 0, 5, 5], [9, 9, 12, 12]]},
        ),
        line({"text": "nothing", "boxes": []}, image="pictures/b.png"),
    )
    assert row["image_id"] == ["pictures/a.png", "pictures/b.png"]
    assert row[1]["objects"] == []
    assert row[1]["sentences"][0]["phrases"] == [{"start": 0, "end": 7, "objects": [], "types": []}]
    row = row[0]
    named = [
        (sentence["text"], [phrase["objects"] for phrase in sentence["phrases"]]) for sentence in row["sentences"]
    ]
    # equal objects are one
    assert named == [(text, [[0], [1, 2], []]), ("the unicorn", [[]]), ("all", [[1, 0]]), ("parts", [[3]])]
    assert row["sentences"][0]["phrases"][2]["types"] == ["vehicle"]
    assert [len(item["boxes"]) for item in row["objects"]] == [1, 1, 1, 2]
    assert row["objects"][2]["box"] == [10, 5, 30, 15]
    assert row["objects"][2]["category"] == "dog"
    # boxes of objects are in the box format of their line, and scaled with it
    fraction = {"box": [0.5, 0.5, 0.25, 0.25]}
    row = load(line({"text": "a", "objects": [fraction, {"box": [0, 0, 1, 1]}]}, box_format="xywh_fraction"))[0]
    assert [item["box"] for item in row["objects"]] == [[20, 15, 30, 22.5], [0, 0, 40, 30]]


POLYGON = [10, 5, 30, 5, 30, 15, 10, 15]
UNCOMPRESSED = coco_mask.encode(np.asfortranarray(MASK))


@pytest.mark.parametrize(
    "mask",
    [
        {"polygon": POLYGON},
        {"polygon": [POLYGON[:6], [10, 5, 30, 15, 10, 15]]},
        {"segmentation": [POLYGON]},
        {"segmentation": {"size": [30, 40], "counts": uncompress_counts(UNCOMPRESSED["counts"].decode())}},
        {"segmentation": {"size": [30, 40], "counts": UNCOMPRESSED["counts"].decode()}},
        {"mask": "pictures/mask.png"},
    ],
    ids=["polygon", "polygons", "COCO polygons", "run lengths", "compressed", "file"],
)
def test_builder_maps_every_mask_format_to_same_pixels(load, mask):
    row = load(line({"text": "the car", **mask}, box("in a box", **mask)))[0]
    assert masks_of(row) == [MASK.tolist()] * 2
    # the first box is derived from the mask
    assert [item["box"] for item in row["objects"]] == [[10, 5, 30, 15], [1, 2, 11, 12]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16"])
def test_builder_reads_mask_file_of_any_single_channel_mode(load, folder, mode):
    image = Image.fromarray(MASK.astype(np.uint16) * 300) if mode == "I;16" else Image.fromarray(MASK).convert("L")
    image = Image.fromarray(MASK * 255).convert("1") if mode == "1" else image
    image = image if mode in ("1", "I;16") else image.convert(mode)
    assert image.mode == mode
    image.save(folder / "pictures" / "mask.png")
    assert masks_of(load(line({"text": "it", "mask": "pictures/mask.png"}))[0]) == [MASK.tolist()]


def test_uncompress_counts_inverts_pycocotools_encoding():
    rng = np.random.default_rng(0)
    for _ in range(200):
        lengths = rng.integers(1, 10 ** rng.integers(1, 5), size=rng.integers(1, 30)).tolist()
        height, width = sum(lengths), 1
        encoded = coco_mask.frPyObjects({"size": [height, width], "counts": lengths}, height, width)
        assert uncompress_counts(encoded["counts"].decode()) == lengths


BAD = {
    "no JSON": ('{"image": ', "it is not JSON"),
    "no mapping": ("[1]", "the line is [1]; expected {"),
    "NaN": (
        '{"image": "pictures/a.png", "expressions": [{"text": "a", "box": [NaN, 1, 2, 3]}]}',
        "it is not JSON: NaN is not a number",
    ),
    "deep": ("[" * 100_000, "it is not JSON"),
    "Latin-1": ('{"image": "\udcff"}', "it is not JSON"),
    "no image": ({"expressions": [box()]}, "no field 'image'"),
    "no expressions": ({"image": "pictures/a.png"}, "expressions is None; expected a list of one or more"),
    "empty expressions": (line(), "expressions is []; expected a list of one or more"),
    "unknown field": (line(box(), bbox=[1]), "the line has fields that are unknown, ['bbox']"),
    "unknown field of expression": (line(box(bbox=[1])), "expressions[0] has fields that are unknown, ['bbox']"),
    "text": (line(box(7)), "expressions[0].text is 7; expected words"),
    "blank text": (line(box(" \t")), "expressions[0].text is ' \\t'; expected words"),
    "no box": (line({"text": "a"}), "expressions[0] has no field 'box'"),
    "three numbers": (line(box(box=[1, 2, 3])), "box is [1, 2, 3]; expected [left, top, right, bottom]"),
    "text in box": (line(box(box=["1", 2, 3, 4])), "expressions[0].box is ['1', 2, 3, 4]"),
    "true in box": (line(box(box=[True, 2, 3, 4])), "expressions[0].box is [True, 2, 3, 4]"),
    "endless": ('{"image": "pictures/a.png", "expressions": [{"text": "a", "box": [1e999, 1, 2, 3]}]}', "box is [inf"),
    "astronomical": (line(box(box=[1, 2, 1e30, 12])), "box is [1, 2, 1e+30, 12]; expected [left, top, right, bottom]"),
    "inverted": (line(box(box=[11, 2, 1, 12])), "of some extent (box_format is 'xyxy')"),
    "no extent": (line(box(box=[1, 2, 1, 12])), "expressions[0].box is [1, 2, 1, 12]"),
    "outside": (line(box(box=[100, 2, 111, 12])), "expected boxes in the image of 40 x 30"),
    "box and boxes": (line(box(boxes=[[1, 2, 3, 4]])), "is ['box', 'boxes']; expected one of them"),
    "no object and a category": (
        line({"text": "a", "boxes": [], "category": "cup"}),
        "expressions[0] is ['boxes', 'category']; expected boxes alone, since [] is for no object",
    ),
    "objects and box": (line(box(objects=[])), "expressions[0] is ['objects', 'box']; expected one of them"),
    "objects are no list": (line({"text": "a", "objects": {}}), "expressions[0].objects is {}; expected a list of"),
    "object is no object": (line({"text": "a", "objects": [[1, 2, 3, 4]]}), "objects[0] is [1, 2, 3, 4]; expected {"),
    "object without boxes": (line({"text": "a", "objects": [{"boxes": []}]}), "objects[0].boxes is []; expected a"),
    "object without a box": (line({"text": "a", "objects": [{}]}), "expressions[0].objects[0] has no field 'box'"),
    "types of an object": (
        line({"text": "a", "objects": [{"box": [1, 2, 3, 4], "types": []}]}),
        "objects[0] has fields that are unknown, ['types']; expected of box, boxes",
    ),
    "box_format": (line(box(), box_format="yxyx"), "box_format is 'yxyx'; expected one of xyxy, xywh, cxcywh"),
    "unit of boxes": (line(box(), box_format=["xyxy"]), "box_format is ['xyxy']; expected one of xyxy"),
    "number outside its unit": (
        line(box(box=[0.1, 0.1, 0.5, 20]), box_format="xyxy_fraction"),
        "box is [0.1, 0.1, 0.5, 20]; expected [left, top, right, bottom] of 0..1 of the image's width and height",
    ),
    "category": (line(box(category=3)), "expressions[0].category is 3; expected text"),
    "types": (line(box(types="colour")), "expressions[0].types is 'colour'; expected a list of texts"),
    "size": (line(box(), width=41, height=30), "width, height is (41, 30); expected the image's (40, 30)"),
    "half a size": (line(box(), width=40), "width, height is (40, None); expected two integers"),
    "image_id": (line(box(), image_id=[1]), "image_id is [1]; expected text or an integer"),
    "outside path": (line(box(), image="../secret.png"), "image is '../secret.png'; expected a path in the folder"),
    "absolute path": (line(box(), image="/etc/passwd"), "image is '/etc/passwd'; expected a path in the folder"),
    "Windows path": (line(box(), image="..\\secret.png"), "expected a path in the folder"),
    "address": (line(box(), image="http://127.0.0.1/a.png"), "addresses are not fetched"),
    "nul": (line(box(), image="a\0b"), "image has"),
    "text as image": (line(box(), image="pictures/text.png"), "cannot be read as an image"),
    "empty phrases": (line({"text": "a", "phrases": []}), "expressions[0].phrases is []"),
    "twice": (
        line({"text": "a a", "phrases": [{"text": "a", "box": [1, 2, 3, 4]}]}),
        "expressions[0].phrases[0].text is 'a'; expected words that are once in 'a a'",
    ),
    "past the end": (
        line({"text": "a", "phrases": [{"start": 0, "end": 2, "box": [1, 2, 3, 4]}]}),
        "expressions[0].phrases[0].start, end is (0, 2); expected characters of the 1 of 'a'",
    ),
    "other words": (
        line({"text": "a car", "phrases": [{"start": 0, "end": 2, "text": "car", "box": [1, 2, 3, 4]}]}),
        "expressions[0].phrases[0].text is 'car'; expected 'a '",
    ),
    "two masks": (line(box(polygon=POLYGON, mask="pictures/mask.png")), "expected one of them"),
    "two points": (line(box(polygon=[[1, 2, 3, 4]])), "expected polygons"),
    "far point": (line(box(polygon=[[1, 2, 3, 4, 1e8, 1e8]])), "expected points in the image of 40 x 30"),
    "outside mask": (line(box(polygon=[50, 5, 60, 5, 60, 15])), "expected a mask with a pixel in the image"),
    "mask size": (line(box(segmentation={"size": [40, 30], "counts": [1200]})), "segmentation.size is [40, 30]"),
    "run lengths": (line(box(segmentation={"size": [30, 40], "counts": [1, 2]})), "run lengths that sum to 1200"),
    "negative": (line(box(segmentation={"size": [30, 40], "counts": [1300, -100]})), "run lengths that sum to"),
    "damaged counts": (line(box(segmentation={"size": [30, 40], "counts": "~~~"})), "run lengths that sum to"),
    "mask is there": (line(box(mask="pictures/none.png")), "expected a file that is there"),
    "outside mask file": (line(box(mask="../m.png")), "expressions[0].mask is '../m.png'; expected a path in"),
    "mask of colours": (line(box(mask="pictures/b.png")), "expected an image of one channel, not of mode RGB"),
    "small mask": (line(box(mask="pictures/small.png")), "expected a mask of (width, height) (40, 30)"),
    "same image_id": (line(box(), image_id="pictures/c.png"), "expected that of"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_builder_names_field_value_and_expectation_of_bad_line(load, folder, tmp_path, fault):
    bad, message = BAD[fault]
    (folder / "pictures" / "text.png").write_text("no image")
    Image.new("L", (4, 3)).save(folder / "pictures" / "small.png")
    first = line(box(), image="pictures/c.png")
    bad = bad if isinstance(bad, str) else json.dumps(bad)
    (folder / "train.jsonl").write_bytes(f"{json.dumps(first)}\n\n{bad}\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=rf"(?s)1 bad lines .*train\.jsonl, line 3: .*{re.escape(message)}"):
        load()
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    rows = load(drop_bad_lines=True)
    assert len(rows) == 1


def test_builder_lists_hundred_bad_lines_and_counts_dropped_ones(load, caplog):
    lines = [line(box(""), image="pictures/b.png")] * 125 + [line(box())]
    with pytest.raises(ValueError, match="125 bad lines") as raised:
        load(*lines)
    assert len(re.findall(r"(?m)^  .*train\.jsonl, line \d+: ", str(raised.value))) == 100
    assert "... and 25 more" in str(raised.value)
    with caplog.at_level(logging.WARNING, "data_scripts.building"):
        assert len(load(drop_bad_lines=True)) == 1
    assert "left out 125 bad lines" in caplog.text


@pytest.mark.row("R1")
def test_builder_names_every_missing_image(load, tmp_path):
    with pytest.raises(OSError, match="23 images of 'jsonl' do not exist") as raised:
        load(*(line(box(), image=f"pictures/{number:02d}.jpg") for number in range(23)), line(box()))
    assert all(f"{number:02d}.jpg" in str(raised.value) for number in range(23))
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_builder_names_missing_files_and_invalid_split(folder, tmp_path):
    cache = str(tmp_path / "cache")
    with pytest.raises(OSError, match=r"(?s)no \.jsonl or \.json file in .*own'.*A folder of your own data contains"):
        data_scripts.load("jsonl", cache_dir=cache, data_dir=str(folder))
    with pytest.raises(OSError, match=r"no file .*mine\.jsonl"):
        data_scripts.load("jsonl", cache_dir=cache, data_dir=str(folder), path="mine.jsonl")
    with pytest.raises(ValueError, match=r"data_dir=\.\.\. or path=\.\.\."):
        data_scripts.load("jsonl", cache_dir=cache)
    write(folder / "my-data.jsonl", line(box()))
    with pytest.raises(ValueError, match="'my-data' is not a valid name of a split"):
        data_scripts.load("jsonl", cache_dir=cache, data_dir=str(folder))


def test_builder_names_missing_images_and_bad_lines_in_one_round(load):
    lines = [line(box()), line(box("")), line(box(), image="no.jpg"), line({"text": "a"}, image="none.jpg")]
    with pytest.raises(ValueError, match=r"(?s)^1 bad lines .*line 2: expressions\[0\]\.text.*2 images .*no\.jpg"):
        load(*lines)
    with pytest.raises(OSError, match="2 images of 'jsonl' do not exist"):
        load(drop_bad_lines=True)


def test_builder_joins_lines_of_one_image(load, caplog):
    lines = [
        line(box()),
        line(box("it"), image="pictures/b.png"),
        line(box("she", box=[1, 2, 10, 10]), box("the same"), box_format="xywh"),
    ]
    with caplog.at_level(logging.WARNING, "data_scripts.building"):
        rows = load(*lines)
    assert "train: 1 lines are joined to the first one of their image." in caplog.text
    assert rows["image_id"] == ["pictures/a.png", "pictures/b.png"]
    row = rows[0]
    assert [item["box"] for item in row["objects"]] == [[1, 2, 11, 12], [1, 2, 12, 14]]
    assert [sentence["text"] for sentence in row["sentences"]] == ["the red car", "she", "the same"]
    assert [sentence["phrases"][0]["objects"] for sentence in row["sentences"]] == [[0], [0], [1]]
    assert len({sentence["sentence_id"] for sentence in row["sentences"]}) == 3


def test_builder_refuses_lines_of_one_image_in_two_frames(load, folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(folder / "turned.jpg", exif=exif)
    lines = [line(box(), image="turned.jpg", width=60, height=40), line(box(), image="turned.jpg")]
    with pytest.raises(ValueError, match=r"line 2: width, height is None; expected those of .*train\.jsonl, line 1"):
        load(*lines)


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("pictures/a.png", "pictures\\a.png"),
        ("pictures/a.png", "Pictures/A.PNG"),
        ("pictures/caf\u00e9 1.png", "pictures/cafe\u0301 1.png"),
        ("pictures/caf\u00e9 1.png", "pictures/caf%C3%A9%201.png"),
        ("pictures/50%25.png", "pictures/50%.png"),
    ],
)
def test_builder_finds_file_under_another_spelling(load, folder, caplog, name, written):
    Image.new("RGB", (40, 30)).save(folder / name)
    with caplog.at_level(logging.WARNING, "data_scripts.building"):
        rows = load(line(box(), image=written), line(box("it"), image=name))
    assert "train: 1 files are found under another spelling of their name, 1 lines are joined" in caplog.text
    assert rows["image_id"] == [name]
    assert rows[0]["image"].size == (40, 30)


def test_builder_refuses_file_that_may_be_several(load, folder):
    for name in ("A.png", "a.PNG"):
        Image.new("RGB", (40, 30)).save(folder / name)
    with pytest.raises(ValueError, match=r"line 1: 'a\.png' may be any of 2 files"):
        load(line(box(), image="a.png"))
    assert load(line(box(), image="A.png"))["image_id"] == ["A.png"]


def test_builder_never_leaves_folder_by_encoded_name(load, tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "secret.png")
    for name in ("%2e%2e/secret.png", "..%2fsecret.png", "pictures/..%5c..%5csecret.png"):
        with pytest.raises(OSError, match="1 images of 'jsonl' do not exist"):
            load(line(box(), image=name))


def test_builder_with_respelled_mask_rebuilds_cache(load, folder):
    assert load(line({"text": "one", "mask": "pictures\\MASK.png"}))[0]["objects"][0]["box"] == [10, 5, 30, 15]
    changed = MASK.copy()
    changed[0] = 1
    Image.fromarray(changed).save(folder / "pictures" / "mask.png")
    assert load()[0]["objects"][0]["box"] == [0, 0, 40, 15]


def test_builder_ignores_unknown_fields_by_flag_and_names_misspelled_ones(load, caplog):
    caption = {"text": "a car", "phrases": [{"text": "a car", "box": [1, 2, 11, 12], "uid": 1}], "lang": "en"}
    first = line(box(score=0.5, category_id=3), caption, source="me")
    with pytest.raises(ValueError, match=r"(?s)1 bad lines .*\['source'\]; expected of image"):
        load(first)
    with caplog.at_level(logging.WARNING, "data_scripts.building"):
        rows = load(first, line(box(score=1), image="pictures/b.png"), ignore_unknown_fields=True)
    assert [len(row["sentences"]) for row in rows] == [2, 1]
    assert "1 fields 'category_id', which are unknown" in caplog.text
    assert "2 fields 'score', which are unknown" in caplog.text
    assert "1 fields 'source', which are unknown" in caplog.text
    assert "1 fields 'uid', which are unknown" in caplog.text
    for wrong, right in {"bbox": "box", "Boxes": "boxes", "poligon": "polygon", "type": "types"}.items():
        with pytest.raises(ValueError, match=rf"\['{wrong}'\], '{wrong}' perhaps for '{right}'; expected of text"):
            load(line(box(**{wrong: 1})), ignore_unknown_fields=True)


@pytest.mark.parametrize("start", ["", "\ufeff", "\n \n"])
def test_builder_reads_json_array_as_lines(load, folder, start):
    lines = [line(box("die T\u00fcr")), line({"text": "it", "mask": "pictures/mask.png"}, image="pictures/b.png")]
    expected = load(*lines)
    (folder / "train.jsonl").rename(folder.parent / "train.jsonl")
    (folder / "train.json").write_text(start + json.dumps(lines, indent=1, ensure_ascii=False), encoding="utf-8")
    assert load().to_dict() == expected.to_dict()
    (folder / "train.json").write_text(json.dumps([lines[0], {**lines[1], "expressions": []}]))
    with pytest.raises(ValueError, match=r"(?s)1 bad lines .*train\.json, entry 2: expressions is \[\]"):
        load()
    (folder / "train.json").write_text(json.dumps(lines)[:-3])
    with pytest.raises(OSError, match=r"train\.json' is damaged"):
        load()


def test_builder_finds_phrases_as_processor_does(load):
    text = "The man\u2019s  car near a carport, a  dog and a dog"
    phrases = ["the man's car", "car", "A dog", "a dog", "carp"]
    caption = {"text": text, "phrases": [{"text": phrase, "box": [1, 2, 11, 12]} for phrase in phrases]}
    found = [(phrase["start"], phrase["end"]) for phrase in load(line(caption))[0]["sentences"][0]["phrases"]]
    assert found == find_phrases(text, phrases)
    assert [text[start:end] for start, end in found] == ["The man\u2019s  car", "car", "a  dog", "a dog", "carp"]


def test_builder_clips_and_counts_boxes_past_edge(load, caplog):
    with caplog.at_level(logging.WARNING, "data_scripts.building"):
        row = load(line(box(box=[-5, 2, 900, 12])))[0]
    assert row["objects"][0]["box"] == [0, 2, 40, 12]
    assert "train: 1 boxes are cut at their image's edge." in caplog.text


def test_builder_reads_files_given_by_name(folder, tmp_path):
    cache = str(tmp_path / "cache")
    write(folder / "a.jsonl", line(box("one")))
    write(folder / "b.jsonl", line(box("two"), image="a.png"))
    rows = data_scripts.load("jsonl", "train", cache_dir=cache, path=str(folder / "a.jsonl"))
    assert rows[0]["sentences"][0]["text"] == "one"
    rows = data_scripts.load(
        "jsonl", "train", cache_dir=cache, data_dir=str(folder), path="b.jsonl", image_dir="pictures"
    )
    assert rows[0]["sentences"][0]["text"] == "two"
    files = {"train": str(folder / "a.jsonl"), "held_out": [str(folder / "a.jsonl")]}
    rows = data_scripts.load("jsonl", None, cache_dir=cache, path=files)
    assert {split: len(part) for split, part in rows.items()} == {"train": 1, "held_out": 1}
    # the name that datasets uses for the files
    builder = JsonLines(cache_dir=cache, data_files=files)
    builder.download_and_prepare()
    assert builder.as_dataset(split="held_out").to_dict() == rows["held_out"].to_dict()


def test_builder_with_outside_paths_allowed_still_refuses_urls(load, folder, tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "outside.png")
    lines = [line(box(), image="../outside.png"), line(box(), image=str(folder / "pictures" / "a.png"))]
    assert len(load(*lines, allow_outside_paths=True)) == 2
    with pytest.raises(ValueError, match="addresses are not fetched"):
        load(line(box(), image="file:///etc/passwd"), allow_outside_paths=True)


def test_builder_with_changed_lines_or_masks_rebuilds_cache(load, folder):
    assert load(line({"text": "one", "mask": "pictures/mask.png"}))[0]["objects"][0]["box"] == [10, 5, 30, 15]
    changed = MASK.copy()
    changed[0] = 1
    Image.fromarray(changed).save(folder / "pictures" / "mask.png")
    assert load()[0]["objects"][0]["box"] == [0, 0, 40, 15]
    assert load(line(box("two")))[0]["sentences"][0]["text"] == "two"


def test_builder_gives_same_rows_in_processes_and_streaming(load, folder, tmp_path):
    rows = load(line(box()), line(box("it"), image="pictures/b.png"), line(box("she"), image="pictures/c.png"))
    builder = JsonLines(data_dir=str(folder), cache_dir=str(tmp_path / "other"))
    builder.download_and_prepare(num_proc=2)
    assert builder.as_dataset(split="train").to_dict() == rows.to_dict()
    assert [row["sentences"] for row in builder.as_streaming_dataset(split="train")] == rows["sentences"][:]


def test_stream_boxes_equal_cached_boxes(load, folder):
    rows = load(line({"text": "it", "box": [0.1, 2.3, 20.7, 12.9]}))
    streamed = next(iter(data_scripts.load("jsonl", "train", data_dir=str(folder), streaming=True)))
    assert rows[0]["objects"][0]["box"] != [0.1, 2.3, 20.7, 12.9]  # stored in single precision
    assert streamed["objects"] == rows[0]["objects"]


MODES = {"RGB": "jpg", "L": "jpg", "CMYK": "jpg", "P": "png", "RGBA": "png", "LA": "png", "I;16": "png", "I": "tif"}
SEEN = (8, 4, 32, 20)  # xyxy of the bright part of an image of 60 x 40


def make_stored_image(mode, orientation):
    """Return a dark image with a bright part, stored so that its EXIF orientation turns it upright."""
    upright = np.full((40, 60), 30, np.uint8)
    upright[SEEN[1] : SEEN[3], SEEN[0] : SEEN[2]] = 220
    image = Image.fromarray(upright)
    image = image.transpose(STORING[orientation]) if orientation in STORING else image
    if mode == "I;16":
        return Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    if mode == "I":
        return Image.fromarray(np.asarray(image).astype(np.int32) * 257)
    return image.convert("RGB").quantize(8) if mode == "P" else image.convert(mode)


@pytest.mark.row("R3")
def test_processor_aligns_boxes_for_64_image_modes_and_orientations(folder, tmp_path, record_property):
    lines = []
    for mode, ending in MODES.items():
        for orientation in range(1, 9):
            name = f"{mode.replace(';', '')}_{orientation}.{ending}"
            exif = Image.Exif()
            exif[0x0112] = orientation
            make_stored_image(mode, orientation).save(folder / name, exif=exif)
            lines.append(line({"text": "the bright part", "box": list(SEEN)}, image=name))
    write(folder / "train.jsonl", *lines)
    rows = data_scripts.load("jsonl", "train", cache_dir=str(tmp_path / "cache"), data_dir=str(folder))
    image_processor = RefTRImageProcessor(size={"shortest_edge": 240, "longest_edge": 240})
    right = 0
    for row in rows:
        assert (row["width"], row["height"]) == (60, 40), row["image_id"]
        size = (row["height"], row["width"])
        pixels = image_processor(row["image"], original_sizes=[size], return_tensors="pt")["pixel_values"][0]
        assert pixels.shape == (3, 160, 240), row["image_id"]
        scale = pixels.shape[-1] / row["width"]
        bright = pixels.mean(dim=0) > pixels.mean(dim=0).median() + 0.8
        rows_of, columns_of = (bright.any(dim=axis).nonzero().flatten() for axis in (1, 0))
        found = [columns_of[0], rows_of[0], columns_of[-1] + 1, rows_of[-1] + 1]
        np.testing.assert_allclose(np.array(found) / scale, row["objects"][0]["box"], atol=0.6)
        right += 1
    record_property("counted", (right, 64))
    assert right == 64


def test_builder_decides_orientation_by_annotated_size(load, folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(folder / "turned.jpg", exif=exif)
    lines = [line(box(), image="turned.jpg", width=60, height=40), line(box(), image="pictures/a.png")]
    row = load(*lines)[0]
    assert (row["width"], row["height"]) == (60, 40)
    row = load({**lines[0], "width": 40, "height": 60})[0]
    assert (row["width"], row["height"]) == (40, 60)


@pytest.mark.row("R5")
def test_collator_truncates_captions_longer_than_limit(load, processor, caplog):
    text = "the car " * 500
    caption = {
        "text": text,
        "phrases": [{"start": start, "end": start + 7, "box": [1, 2, 9, 9]} for start in (0, 3000)],
    }
    rows = load(line(caption, box(text), box("🚗 🚙")))
    batch = GroundingCollator(processor)([rows[0]])
    assert batch["input_ids"].shape == (3, 64)
    assert batch["phrase_spans"][0, 1].tolist() == [0, 1]
    assert "64 tokens and were truncated" in caplog.text


def test_train_script_trains_on_own_images_without_code(recipe, run, tmp_path):
    settings = yaml.safe_load(recipe.read_text())
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("validation", 4), ("test", 4)):
        lines = []
        for number in range(count):
            image = np.full((48, 64, 3), 90, np.uint8)
            x, y = rng.integers(0, 32), rng.integers(0, 24)
            image[y : y + 20, x : x + 24] = (220, 40, 40)
            name = f"{split}_{number}.png"
            (tmp_path / "own").mkdir(exist_ok=True)
            Image.fromarray(image).save(tmp_path / "own" / name)
            target = {"box": [int(x), int(y), 24, 20], "types": ["colour"]}
            lines.append(line({"text": "the red part", **target}, {"text": "red", **target}, image=name))
        write(tmp_path / "own" / f"{split}.jsonl", *lines)
    settings |= {"dataset": "jsonl", "dataset_config": {"data_dir": str(tmp_path / "own"), "box_format": "xywh"}}
    settings |= {"batch_size": 4, "data_cache_dir": str(tmp_path / "cache")}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(settings))
    run("train_reftr.py", tmp_path / "own.yaml", "--output_dir", tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())["splits"]["test"]
    assert metrics["num_phrases"] == 8
    assert set(metrics["per_kind"]) == {"colour"}
    assert (tmp_path / "run" / "model.safetensors").is_file()
