"""Box conventions: read boxes in each of them, and recognize boxes written in another one than declared."""

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
# conventions that give the same or nearly the same numbers on these images and cannot be told apart
EQUAL = {"square": {frozenset({layout, f"{layout}_thousand"}) for layout in ("xyxy", "xywh", "cxcywh")}}


def draw_boxes(sizes, seed, num_images=50, num_boxes=4):
    """Draw boxes_xyxy as annotators place them, mostly around the center, and the (width, height) of their images."""
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
    """Return boxes as an export tool writes them in a convention."""
    layout, unit = parse_box_format(box_format)
    first, last = boxes_xyxy[:, :2], boxes_xyxy[:, 2:]
    parts = {"xyxy": (first, last), "xywh": (first, last - first), "cxcywh": ((first + last) / 2, last - first)}
    written = np.concatenate(parts[layout], axis=1)
    if unit == "pixels":
        return np.round(written)
    written = written / np.tile(sizes, 2)
    return written if unit == "fraction" else np.round(1000 * written)


@pytest.mark.parametrize("true", BOX_FORMATS)
def test_to_boxes_xyxy_maps_every_convention_to_same_pixels(true):
    boxes_xyxy, sizes = draw_boxes(PHOTOS, seed=1)
    found = to_boxes_xyxy(write_boxes(boxes_xyxy, sizes, true), sizes, *parse_box_format(true))
    assert np.abs(found - boxes_xyxy).max() <= 1.5


@pytest.mark.parametrize("kind", ["photos", "few photos", "large", "tiny", "square"])
@pytest.mark.parametrize("true", BOX_FORMATS)
def test_judge_boxes_names_true_convention_only_if_declared_wrong(kind, true):
    sizes = {"large": LARGE, "tiny": ((64, 64),), "square": ((1000, 1000),)}.get(kind, PHOTOS)
    for seed in range(3):
        boxes_xyxy, sizes_of_boxes = draw_boxes(sizes, seed, num_images=8 if kind == "few photos" else 50)
        written = write_boxes(boxes_xyxy, sizes_of_boxes, true)
        for declared in BOX_FORMATS:
            judgement = judge_boxes(written, sizes_of_boxes, declared)
            if declared == true or frozenset({declared, true}) in EQUAL.get(kind, ()):
                assert judgement is None, (declared, judgement)
            else:
                same = {true, *(other for pair in EQUAL.get(kind, ()) if true in pair for other in pair)}
                assert judgement is not None, declared
                assert judgement.box_format in same, (declared, judgement)
                assert f"said to be {declared!r}, look like {judgement.box_format!r}" in judgement.message


def test_judge_boxes_names_y_before_x():
    boxes_xyxy, sizes = draw_boxes(PHOTOS, seed=2)
    judgement = judge_boxes(np.round(boxes_xyxy)[:, [1, 0, 3, 2]], sizes)
    assert judgement.box_format == "yxyx"
    assert "exchange x and y" in judgement.message


@pytest.mark.parametrize(
    ("boxes", "size"),
    [
        ([[0, 0, 640, 480]] * 40, (640, 480)),  # covers the image
        ([[10, 20, 110, 90]], (640, 480)),
        ([[0, 0, 1, 1]], (3, 2)),  # in an image three pixels wide
        ([[-3, 5, 645, 482]], (640, 480)),  # exceeds the edges by a rounding error
        ([[10, 20, 900, 90], *([[10, 20, 110, 90]] * 60)], (640, 480)),  # one outlier
        ([], (640, 480)),
    ],
)
def test_judge_boxes_accepts_real_boxes(boxes, size):
    assert judge_boxes(boxes, [size] * len(boxes)) is None


def make_lines(folder, box_format, field=None, num_images=12):
    """Write train.jsonl with boxes in a convention and its images; return the boxes_xyxy in pixels."""
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
def test_jsonl_builder_reads_boxes_in_declared_convention(tmp_path, where, box_format, caplog):
    expected = make_lines(tmp_path, box_format, field=box_format if where == "line" else None)
    rows = load(tmp_path, **({"box_format": box_format} if where == "flag" else {}))
    assert np.abs(boxes_of(rows) - expected).max() <= (1.1 if "thousand" in box_format else 1e-3)
    assert "look like" not in caplog.text


@pytest.mark.parametrize("annotated", ["upright", "stored"])
def test_jsonl_builder_scales_fractions_to_annotated_orientation(tmp_path, annotated):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 40)).save(tmp_path / "1.jpg", exif=exif)
    width, height = (80, 40) if annotated == "stored" else (40, 80)
    line = {"image": "1.jpg", "expressions": [{"text": "it", "box": [0.25, 0.5, 0.5, 0.75]}]}
    line |= {"width": width, "height": height, "box_format": "xyxy_fraction"}
    (tmp_path / "train.jsonl").write_text(json.dumps(line))
    (row,) = load(tmp_path)
    assert row["objects"][0]["box"] == [width / 4, height / 2, width / 2, 3 * height / 4]


def test_jsonl_builder_refuses_fractions_read_as_pixels(tmp_path):
    make_lines(tmp_path, "xyxy_fraction", num_images=2)
    with pytest.raises(
        ValueError, match=r"look like 'xyxy_fraction': all numbers of 6 boxes .*set box_format='xyxy_f"
    ):
        load(tmp_path)


def test_jsonl_builder_names_layout_with_bad_lines(tmp_path):
    make_lines(tmp_path, "xywh")
    with pytest.raises(ValueError, match=r"bad lines(.|\n)*look like 'xywh'"):
        load(tmp_path)


def test_jsonl_builder_warns_of_wrong_unit_in_valid_lines(tmp_path, caplog):
    make_lines(tmp_path, "xyxy")
    with caplog.at_level(logging.WARNING):
        load(tmp_path, box_format="xyxy_thousand")
    assert "said to be 'xyxy_thousand', look like 'xyxy': no number of 36 boxes is over the size" in caplog.text
    # check reports it for the cached rows as well
    flags = {"data_dir": tmp_path, "cache_dir": str(tmp_path / "cache"), "box_format": "xyxy_thousand"}
    splits, build_report = load_with_report("jsonl", **flags)
    report = check(data_scripts.SOURCES["jsonl"], splits, build_report=build_report)
    (finding,) = [finding for finding in report["warnings"] if finding["kind"] == "convention"]
    assert "look like 'xyxy'" in finding["message"]


@pytest.mark.parametrize("name", ["shapes", "jsonl", "refcoco_unc", "flickr30k_entities"])
def test_check_finds_no_convention_fault_in_good_dataset(name, tmp_path, shapes):
    splits = shapes
    if name != "shapes":
        {"jsonl": make_jsonl, "refcoco_unc": make_refcoco, "flickr30k_entities": make_flickr30k}[name](tmp_path)
        splits = data_scripts.load(name, data_dir=tmp_path, cache_dir=str(tmp_path / "cache"))
    report = check(data_scripts.SOURCES[name], splits)
    assert [finding for finding in report["errors"] + report["warnings"] if finding["kind"] == "convention"] == []


def test_judge_boxes_tolerates_slip_and_names_mixed_convention():
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


@pytest.mark.parametrize("declared", ["xyxy", "xywh_thousand", "cxcywh_fraction"])
@pytest.mark.parametrize("size", [(4000, 3000), (1920, 1080), (640, 480), (20, 16)])
def test_judge_boxes_accepts_objects_in_corner(size, declared):
    """Such objects are the logo of each page or the clock of a screen."""
    rng = np.random.default_rng(0)
    first = rng.uniform(0.01, 0.1, (200, 2)) * size
    boxes_xyxy = np.concatenate((first, first + rng.uniform(0.06, 0.15, (200, 2)) * size), axis=1)
    sizes = np.tile(size, (200, 1))
    assert judge_boxes(write_boxes(boxes_xyxy, sizes, declared), sizes, declared) is None


@pytest.mark.parametrize("true", ["xyxy_fraction", "xywh"])
def test_jsonl_builder_names_split_in_another_convention(tmp_path, true):
    """Each split is judged on its own, as few boxes of validation would disappear among those of train."""
    make_lines(tmp_path, "xyxy", num_images=60)
    (tmp_path / "train.jsonl").rename(tmp_path / "large.jsonl")
    make_lines(tmp_path, true, num_images=4)
    (tmp_path / "train.jsonl").rename(tmp_path / "validation.jsonl")
    with pytest.raises(ValueError, match=rf"The boxes of 'validation', said to be 'xyxy', look like '{true}'"):
        data_scripts.load("jsonl", data_dir=tmp_path, cache_dir=str(tmp_path / "cache"))


def test_jsonl_builder_refuses_polygons_in_fractions(tmp_path):
    """They would become masks of one pixel."""
    Image.new("RGB", (64, 48)).save(tmp_path / "1.png")
    polygons = [[0.1, 0.1, 0.9, 0.1, 0.5, 0.8], [[0.2, 0.1, 0.9, 0.3, 0.5, 0.9]]]
    expressions = [{"text": f"thing {k}", "box": [4, 4, 40, 40], "polygon": polygons[k]} for k in range(2)]
    (tmp_path / "train.jsonl").write_text(json.dumps({"image": "1.png", "expressions": expressions}))
    with pytest.raises(ValueError, match=r"The polygons, .* look like 'xyxy_fraction': .*convert them to pixels"):
        load(tmp_path)


def test_jsonl_builder_does_not_clip_fractions_ending_at_edge(tmp_path):
    Image.new("RGB", (640, 480)).save(tmp_path / "1.png")
    # right and bottom sides at the edges, six decimals
    boxes = [[round(value, 6) for value in (1 - x / 2, 1 - x / 4, x, x / 2)] for x in np.arange(1, 60) / 61]
    assert any(x + width / 2 > 1 for x, _, width, _ in boxes)  # otherwise the test proves nothing
    expressions = [{"text": f"thing {k}", "box": box} for k, box in enumerate(boxes)]
    line = {"image": "1.png", "box_format": "cxcywh_fraction", "expressions": expressions}
    (tmp_path / "train.jsonl").write_text(json.dumps(line))
    _, build_report = load_with_report("jsonl", data_dir=tmp_path, cache_dir=str(tmp_path / "cache"))
    assert build_report == {}


def change_boxes(rows, box_format):
    """Return rows with boxes in another convention than the schema's."""

    def change(row):
        size = np.array([[row["width"], row["height"]]])
        for item in row["objects"]:
            item["box"] = write_boxes(np.array([item["box"]]), size, box_format)[0].tolist()
            item["boxes"] = [item["box"]]
        return row

    return rows.map(change, features=rows.features)


def test_check_and_load_rows_name_wrong_convention_of_rows(shapes, tmp_path):
    """Parquet files of a user pass no builder, so check and training judge their boxes."""
    rows = change_boxes(shapes["train"], "cxcywh_fraction")
    report = check(data_scripts.SOURCES["shapes"], {"train": rows})
    (finding,) = [finding for finding in report["errors"] if finding["kind"] == "convention"]
    assert "look like 'cxcywh_fraction'" in finding["message"]
    rows.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"look like 'cxcywh_fraction': all numbers .* are in 0\.\.1"):
        load_rows(DataSettings(dataset=str(tmp_path), data_cache_dir=str(tmp_path / "cache")))
