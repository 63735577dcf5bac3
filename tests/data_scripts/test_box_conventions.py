"""In which convention boxes are written, and whether all of them together say that they are in another one."""

import json
import logging

import numpy as np
import pytest
from PIL import Image

import data_scripts
from data_scripts.box_conventions import BOX_FORMATS, judge_boxes, parse_box_format, to_boxes_xyxy
from data_scripts.checking import check
from data_scripts.loading import load_with_report
from tests.helpers.layout_flickr30k import make_flickr30k
from tests.helpers.layout_jsonl import make_jsonl
from tests.helpers.layout_refcoco import make_refcoco
from training_reftr.settings import DataSettings
from training_reftr.sources import load_rows


PHOTOS = ((640, 480), (480, 640), (640, 427), (500, 375))
LARGE = ((4000, 3000), (3000, 4000))
# conventions that are the same numbers, or nearly so, on these images: nobody can tell them apart
EQUAL = {"square": {frozenset({layout, f"{layout}_thousand"}) for layout in ("xyxy", "xywh", "cxcywh")}}


def draw_boxes(sizes, seed, num_images=50, num_boxes=4):
    """Draw boxes_xyxy as annotators find them, mostly around the middle, and the (width, height) of their images."""
    rng = np.random.default_rng(seed)
    boxes, sizes_of_boxes = [], []
    for size in rng.choice(sizes, num_images):
        for _ in range(num_boxes):
            half = rng.uniform(0.04, 0.3, 2) * size
            center = np.clip(rng.normal(0.5, 0.22, 2), 0, 1) * size
            boxes.append([*np.maximum(0, center - half), *np.minimum(size, center + half)])
            sizes_of_boxes.append(size)
    return np.array(boxes), np.array(sizes_of_boxes)


def write_boxes(boxes_xyxy, sizes, box_format):
    """Return boxes as a tool that exports them in a convention writes them."""
    layout, unit = parse_box_format(box_format)
    first, last = boxes_xyxy[:, :2], boxes_xyxy[:, 2:]
    parts = {"xyxy": (first, last), "xywh": (first, last - first), "cxcywh": ((first + last) / 2, last - first)}
    written = np.concatenate(parts[layout], axis=1)
    if unit == "pixels":
        return np.round(written)
    written = written / np.tile(sizes, 2)
    return written if unit == "fraction" else np.round(1000 * written)


@pytest.mark.parametrize("true", BOX_FORMATS)
def test_boxes_of_every_convention_are_the_same_pixels(true):
    boxes_xyxy, sizes = draw_boxes(PHOTOS, seed=1)
    found = to_boxes_xyxy(write_boxes(boxes_xyxy, sizes, true), sizes, *parse_box_format(true))
    assert np.abs(found - boxes_xyxy).max() <= 1.5


@pytest.mark.parametrize("kind", ["photos", "few photos", "large", "tiny", "square"])
@pytest.mark.parametrize("true", BOX_FORMATS)
def test_wrong_convention_is_named_and_the_right_one_is_not_suspected(kind, true):
    sizes = {"large": LARGE, "tiny": ((64, 64),), "square": ((1000, 1000),)}.get(kind, PHOTOS)
    for seed in range(3):
        boxes_xyxy, sizes_of_boxes = draw_boxes(sizes, seed, num_images=8 if kind == "few photos" else 50)
        written = write_boxes(boxes_xyxy, sizes_of_boxes, true)
        for said in BOX_FORMATS:
            judgement = judge_boxes(written, sizes_of_boxes, said)
            if said == true or frozenset({said, true}) in EQUAL.get(kind, ()):
                assert judgement is None, (said, judgement)
            else:
                same = {true, *(other for pair in EQUAL.get(kind, ()) if true in pair for other in pair)}
                assert judgement is not None, said
                assert judgement.box_format in same, (said, judgement)
                assert f"said to be {said!r}, look like {judgement.box_format!r}" in judgement.message


def test_y_before_x_is_named():
    boxes_xyxy, sizes = draw_boxes(PHOTOS, seed=2)
    judgement = judge_boxes(np.round(boxes_xyxy)[:, [1, 0, 3, 2]], sizes)
    assert judgement.box_format == "yxyx"
    assert "exchange x and y" in judgement.message


@pytest.mark.parametrize(
    ("boxes", "size"),
    [
        ([[0, 0, 640, 480]] * 40, (640, 480)),  # all over the image
        ([[10, 20, 110, 90]], (640, 480)),
        ([[0, 0, 1, 1]], (3, 2)),  # of an image of three pixels
        ([[-3, 5, 645, 482]], (640, 480)),  # over its edge by what annotations round
        ([[10, 20, 900, 90], *([[10, 20, 110, 90]] * 60)], (640, 480)),  # one slip
        ([], (640, 480)),
    ],
)
def test_real_boxes_are_not_suspected(boxes, size):
    assert judge_boxes(boxes, [size] * len(boxes)) is None


def make_lines(folder, box_format, field=None, num_images=12):
    """Write train.jsonl and its images, with boxes of a convention; returns the boxes_xyxy in pixels."""
    boxes_xyxy, sizes = draw_boxes(((64, 48), (48, 64), (80, 40)), seed=3, num_images=num_images, num_boxes=3)
    written = write_boxes(np.round(boxes_xyxy), sizes, box_format).tolist()
    lines = []
    for index in range(num_images):
        Image.new("RGB", tuple(map(int, sizes[3 * index]))).save(folder / f"{index}.png")
        expressions = [{"text": f"thing {k}", "box": written[3 * index + k]} for k in range(3)]
        line = {"image": f"{index}.png", "expressions": expressions}
        lines.append({**line, "box_format": field} if field else line)
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return np.round(boxes_xyxy)


def load(folder, **flags):
    return data_scripts.load("jsonl", "train", data_dir=folder, cache_dir=str(folder / "cache"), **flags)


def boxes_of(rows):
    return np.array([item["box"] for row in rows for item in row["objects"]])


@pytest.mark.parametrize("where", ["flag", "line"])
@pytest.mark.parametrize("box_format", ["xyxy", "xywh_fraction", "cxcywh_thousand", "CXCYWH-fraction", "xyxy_pixels"])
def test_lines_are_read_in_the_convention_that_is_said(tmp_path, where, box_format, caplog):
    expected = make_lines(tmp_path, box_format, field=box_format if where == "line" else None)
    rows = load(tmp_path, **({"box_format": box_format} if where == "flag" else {}))
    assert np.abs(boxes_of(rows) - expected).max() <= (1.1 if "thousand" in box_format else 1e-3)
    assert "look like" not in caplog.text


@pytest.mark.parametrize("annotated", ["upright", "stored"])
def test_fractions_are_of_the_image_as_it_was_annotated(tmp_path, annotated):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 40)).save(tmp_path / "1.jpg", exif=exif)
    width, height = (80, 40) if annotated == "stored" else (40, 80)
    line = {"image": "1.jpg", "expressions": [{"text": "it", "box": [0.25, 0.5, 0.5, 0.75]}]}
    line |= {"width": width, "height": height, "box_format": "xyxy_fraction"}
    (tmp_path / "train.jsonl").write_text(json.dumps(line))
    (row,) = load(tmp_path)
    assert row["objects"][0]["box"] == [width / 4, height / 2, width / 2, 3 * height / 4]


def test_fractions_read_as_pixels_are_refused(tmp_path):
    make_lines(tmp_path, "xyxy_fraction", num_images=2)
    with pytest.raises(
        ValueError, match=r"look like 'xyxy_fraction': all numbers of 6 boxes .*set box_format='xyxy_f"
    ):
        load(tmp_path)


def test_layout_is_named_beside_the_lines_that_make_no_sense(tmp_path):
    make_lines(tmp_path, "xywh")
    with pytest.raises(ValueError, match=r"bad lines(.|\n)*look like 'xywh'"):
        load(tmp_path)


def test_unit_is_named_where_every_line_makes_sense(tmp_path, caplog):
    make_lines(tmp_path, "xyxy")
    with caplog.at_level(logging.WARNING):
        load(tmp_path, box_format="xyxy_thousand")
    assert "said to be 'xyxy_thousand', look like 'xyxy': no number of 36 boxes is over the size" in caplog.text
    # the cache keeps it
    flags = {"data_dir": tmp_path, "cache_dir": str(tmp_path / "cache"), "box_format": "xyxy_thousand"}
    splits, build_report = load_with_report("jsonl", **flags)
    report = check(data_scripts.SOURCES["jsonl"], splits, build_report=build_report)
    (finding,) = [finding for finding in report["warnings"] if finding["kind"] == "convention"]
    assert "look like 'xyxy'" in finding["message"]


@pytest.mark.parametrize("name", ["shapes", "jsonl", "refcoco_unc", "flickr30k_entities"])
def test_good_datasets_are_not_suspected(name, tmp_path, shapes):
    splits = shapes
    if name != "shapes":
        {"jsonl": make_jsonl, "refcoco_unc": make_refcoco, "flickr30k_entities": make_flickr30k}[name](tmp_path)
        splits = data_scripts.load(name, data_dir=tmp_path, cache_dir=str(tmp_path / "cache"))
    report = check(data_scripts.SOURCES[name], splits)
    assert [finding for finding in report["errors"] + report["warnings"] if finding["kind"] == "convention"] == []


def test_slip_does_not_hide_a_convention_and_some_boxes_of_another_are_named():
    boxes_xyxy, sizes = draw_boxes(PHOTOS, seed=5)
    fractions = write_boxes(boxes_xyxy, sizes, "cxcywh_fraction")
    fractions[7] = [10, 20, 110, 90]
    judgement = judge_boxes(fractions, sizes)
    assert judgement.box_format == "cxcywh_fraction"
    assert judgement.is_certain
    assert "all numbers of 199 of 200 boxes are in 0..1" in judgement.message
    mixed = np.concatenate((fractions[8:20], boxes_xyxy[20:]))
    judgement = judge_boxes(mixed, sizes[8:])
    assert judgement.box_format == "cxcywh_fraction"
    assert not judgement.is_certain


@pytest.mark.parametrize("said", ["xyxy", "xywh_thousand", "cxcywh_fraction"])
@pytest.mark.parametrize("size", [(4000, 3000), (1920, 1080), (640, 480), (20, 16)])
def test_objects_in_a_corner_are_not_taken_for_another_unit(size, said):
    """As the logo on each page, or the clock of a screen."""
    rng = np.random.default_rng(0)
    first = rng.uniform(0.01, 0.1, (200, 2)) * size
    boxes_xyxy = np.concatenate((first, first + rng.uniform(0.06, 0.15, (200, 2)) * size), axis=1)
    sizes = np.tile(size, (200, 1))
    assert judge_boxes(write_boxes(boxes_xyxy, sizes, said), sizes, said) is None


@pytest.mark.parametrize("true", ["xyxy_fraction", "xywh"])
def test_split_in_another_convention_is_named(tmp_path, true):
    """The boxes of validation are too few to be seen among those of train."""
    make_lines(tmp_path, "xyxy", num_images=60)
    (tmp_path / "train.jsonl").rename(tmp_path / "large.jsonl")
    make_lines(tmp_path, true, num_images=4)
    (tmp_path / "train.jsonl").rename(tmp_path / "validation.jsonl")
    with pytest.raises(ValueError, match=rf"The boxes of 'validation', said to be 'xyxy', look like '{true}'"):
        load(tmp_path)


def test_polygons_in_fractions_are_refused(tmp_path):
    """They would be masks of one pixel."""
    Image.new("RGB", (64, 48)).save(tmp_path / "1.png")
    polygons = [[0.1, 0.1, 0.9, 0.1, 0.5, 0.8], [[0.2, 0.1, 0.9, 0.3, 0.5, 0.9]]]
    expressions = [{"text": f"thing {k}", "box": [4, 4, 40, 40], "polygon": polygons[k]} for k in range(2)]
    (tmp_path / "train.jsonl").write_text(json.dumps({"image": "1.png", "expressions": expressions}))
    with pytest.raises(ValueError, match=r"The polygons, .* look like 'xyxy_fraction': .*convert them to pixels"):
        load(tmp_path)


def test_sums_of_fractions_that_end_at_the_edge_are_not_cut_there(tmp_path):
    Image.new("RGB", (640, 480)).save(tmp_path / "1.png")
    # right and bottom sides at the edges, six decimals
    boxes = [[round(value, 6) for value in (1 - x / 2, 1 - x / 4, x, x / 2)] for x in np.arange(1, 60) / 61]
    assert any(x + width / 2 > 1 for x, _, width, _ in boxes)  # else the numbers prove nothing
    expressions = [{"text": f"thing {k}", "box": box} for k, box in enumerate(boxes)]
    line = {"image": "1.png", "box_format": "cxcywh_fraction", "expressions": expressions}
    (tmp_path / "train.jsonl").write_text(json.dumps(line))
    _, build_report = load_with_report("jsonl", data_dir=tmp_path, cache_dir=str(tmp_path / "cache"))
    assert build_report == {}


def change_boxes(rows, box_format):
    """Return rows whose boxes are of another convention than the schema says."""

    def change(row):
        size = np.array([[row["width"], row["height"]]])
        for item in row["objects"]:
            item["box"] = write_boxes(np.array([item["box"]]), size, box_format)[0].tolist()
            item["boxes"] = [item["box"]]
        return row

    return rows.map(change, features=rows.features)


def test_check_and_training_say_what_the_boxes_of_rows_look_like(shapes, tmp_path):
    """As of somebody's own Parquet files, which no builder has read."""
    rows = change_boxes(shapes["train"], "cxcywh_fraction")
    report = check(data_scripts.SOURCES["shapes"], {"train": rows})
    (finding,) = [finding for finding in report["errors"] if finding["kind"] == "convention"]
    assert "look like 'cxcywh_fraction'" in finding["message"]
    rows.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"look like 'cxcywh_fraction': all numbers .* are in 0\.\.1"):
        load_rows(DataSettings(dataset=str(tmp_path), data_cache_dir=str(tmp_path / "cache")))
