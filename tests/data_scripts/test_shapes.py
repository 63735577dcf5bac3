"""The built-in shapes dataset: reproducible rows, disjoint splits, phrases that fit exactly one object each."""

import hashlib
import importlib
import io
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

import data_scripts
from data_scripts.scenes import MARGIN
from data_scripts.schema import FEATURES
from data_scripts.shapes import COLORS, SHAPES, SIZES, ShapesConfig, draw_row


LOCATIONS = {"leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "bottommost": (1, -1)}
RELATIONS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}


@pytest.fixture(scope="module")
def rows():
    """Rows of square and of rectangular images."""
    square = ShapesConfig(image_size=96, seed=3)
    rectangular = ShapesConfig(image_size=96, seed=3, min_aspect_ratio=0.4, max_aspect_ratio=2.5)
    return [
        draw_row(split, index, config)
        for split, config in (("train", square), ("test", rectangular))
        for index in range(60)
    ]


def describe_objects(row, image):
    """Return the shape, color and box center of each object, read off the image and the annotations."""
    seen = []
    for item in row["objects"]:
        mask = coco_mask.decode({**item["segmentation"], "counts": item["segmentation"]["counts"].encode()}).astype(
            bool
        )
        color = np.median(image[mask], axis=0)
        name = min(COLORS, key=lambda name: np.abs(np.array(COLORS[name]) - color).sum())
        x0, y0, x1, y1 = item["box"]
        seen.append({"shape": item["category"], "color": name, "center": ((x0 + x1) / 2, (y0 + y1) / 2)})
    return seen


def find_fitting(text, seen):
    """Return the objects that fit the color and shape in a text; sizes are not compared."""
    colors = [word for word in text.split() if word in COLORS]
    shapes = [word for word in text.split() if word in SHAPES]
    return [
        index
        for index, item in enumerate(seen)
        if (not colors or item["color"] == colors[0]) and (not shapes or item["shape"] == shapes[0])
    ]


def test_shapes_rows_follow_schema(shapes):
    assert shapes["train"].features == FEATURES
    assert {split: len(rows) for split, rows in shapes.items()} == {"train": 48, "validation": 9, "test": 10}
    row = shapes["train"][0]
    assert row["image"].size == (row["width"], row["height"]) == (64, 64)


def test_draw_row_is_reproducible_per_seed():
    config = ShapesConfig(image_size=64)
    assert draw_row("train", 5, config) == draw_row("train", 5, config)
    assert draw_row("train", 5, config) != draw_row("train", 5, ShapesConfig(image_size=64, seed=1))


@pytest.mark.parametrize(
    ("split", "index", "size", "seed", "expected"),
    [
        ("train", 0, 96, 0, "d9a3d375f575b437"),
        ("test", 7, 64, 3, "622acf3cbd8934dc"),
        ("validation", 11, 33, 1, "1f4d12f61498cef1"),
    ],
)
def test_draw_row_draws_known_images(split, index, size, seed, expected):
    """Compare pixels, because another version of zlib compresses them to other bytes."""
    row = draw_row(split, index, ShapesConfig(image_size=size, seed=seed))
    pixels = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
    texts = "".join(sentence["text"] for sentence in row["sentences"])
    assert hashlib.sha256(pixels.tobytes() + texts.encode()).hexdigest()[:16] == expected


def test_shapes_images_have_constant_area_and_log_uniform_ratios():
    config = ShapesConfig(image_size=32, min_aspect_ratio=0.5, max_aspect_ratio=2)
    sizes = [(row["width"], row["height"]) for row in (draw_row("train", index, config) for index in range(200))]
    ratios = np.array([width / height for width, height in sizes])
    assert all(abs(width * height - 32**2) <= 64 for width, height in sizes)
    assert 0.48 < ratios.min() < 0.55
    assert 1.8 < ratios.max() < 2.1
    assert 0.4 < (ratios < 1).mean() < 0.6
    image = draw_row("train", 0, config)
    assert Image.open(io.BytesIO(image["image"]["bytes"])).size == sizes[0]


def test_size_of_objects_follows_shorter_side():
    """Compare the sides of a square of a box's area in squares and in images of 1:2."""

    def mean_side(ratio):
        config = ShapesConfig(image_size=64, min_aspect_ratio=ratio, max_aspect_ratio=ratio)
        boxes = [item["box"] for index in range(60) for item in draw_row("train", index, config)["objects"]]
        return np.mean([math.sqrt((x2 - x1) * (y2 - y1)) for x1, y1, x2, y2 in boxes])

    assert 0.65 < mean_side(0.5) / mean_side(1.0) < 0.78  # 0.71 is the ratio of the shorter sides


def test_object_scale_multiplies_size_of_objects():
    def sides(scale: float) -> float:
        rows = [draw_row("train", index, ShapesConfig(image_size=64, object_scale=scale)) for index in range(30)]
        return np.mean([item["box"][2] - item["box"][0] for row in rows for item in row["objects"]])

    assert 1.2 < sides(1.3) / sides(1) < 1.4


def test_objects_larger_than_shorter_side_are_refused():
    ShapesConfig(object_scale=2).validate()
    with pytest.raises(ValueError, match=r"object_scale=2.1 must be from 0.5 to 2.02, where the largest object fits"):
        ShapesConfig(object_scale=2.1).validate()


@pytest.mark.parametrize(("ratio", "size"), [(2, (91, 45)), (0.25, (32, 128))])
def test_shapes_builder_generates_one_aspect_ratio(ratio, size, tmp_path):
    flags = {"image_size": 64, "num_train": 1, "num_validation": 1, "num_test": 2, "cache_dir": str(tmp_path)}
    rows = data_scripts.load("shapes", split="test", min_aspect_ratio=ratio, max_aspect_ratio=ratio, **flags)
    assert {row["image"].size for row in rows} == {size}


def test_edited_builder_rebuilds_cache(tmp_path, monkeypatch):
    settings = {"cache_dir": str(tmp_path), "num_train": 1, "num_validation": 1, "num_test": 1}
    before = data_scripts.load("shapes", split="test", **settings)[0]
    edited = tmp_path / "edited_shapes.py"
    source = Path(data_scripts.shapes.__file__).read_text().replace("\nfrom .", "\nfrom data_scripts.")
    edited.write_text(source.replace('"the {', '"that {'))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(data_scripts.SOURCES, "shapes", importlib.import_module("edited_shapes").SOURCES[0])
    after = data_scripts.load("shapes", split="test", **settings)[0]
    assert [sentence["text"] for sentence in before["sentences"]] != [s["text"] for s in after["sentences"]]


def test_shapes_splits_are_disjoint(rows):
    images = [row["image"]["bytes"] for row in rows]
    assert len(set(images)) == len(images)
    assert len({row["image_id"] for row in rows}) == len(rows)


def test_shapes_masks_agree_with_boxes(rows):
    for row in rows:
        for item in row["objects"]:
            segmentation = {**item["segmentation"], "counts": item["segmentation"]["counts"].encode()}
            x, y, width, height = coco_mask.toBbox(segmentation)
            assert [x, y, x + width, y + height] == item["box"]
            assert segmentation["size"] == [row["height"], row["width"]]


def test_shapes_rows_have_several_sentences_of_complete_phrases(rows):
    for row in rows:
        phrases = [(sentence["text"], phrase) for sentence in row["sentences"] for phrase in sentence["phrases"]]
        assert len(row["sentences"]) >= 3
        for text, phrase in phrases:
            expression = text[phrase["start"] : phrase["end"]]
            assert expression.startswith("the ")
            assert expression == expression.strip()
            if phrase["types"] != ["caption"]:
                assert expression == text
        assert len({sentence["sentence_id"] for sentence in row["sentences"]}) == len(row["sentences"])


def test_shapes_phrases_fit_exactly_their_object(rows):
    """Parse the phrases independently of the builder and compare them with the image."""
    checked = dict.fromkeys(("attribute", "place", "relation", "caption"), 0)
    for row in rows:
        image = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))).astype(float)
        seen = describe_objects(row, image)
        margin = MARGIN * 96
        for sentence in row["sentences"]:
            for phrase in sentence["phrases"]:
                expression = sentence["text"][phrase["start"] : phrase["end"]]
                (answer,) = phrase["objects"]
                kind = phrase["types"][0]
                has_size = any(size in expression for size in SIZES)
                relation = re.search("|".join(RELATIONS), expression)
                head = expression[: relation.start()] if relation else expression
                candidates = find_fitting(head, seen)
                assert answer in candidates, (expression, row["image_id"])
                location = next((location for location in LOCATIONS if location in expression), None)
                if location and not has_size:
                    axis, direction = LOCATIONS[location]
                    order = sorted(candidates, key=lambda index: direction * seen[index]["center"][axis])
                    gap = direction * (seen[order[1]]["center"][axis] - seen[order[0]]["center"][axis])
                    assert order[0] == answer
                    assert gap >= margin
                elif relation and not has_size:
                    axis, direction = RELATIONS[relation[0]]
                    (anchor,) = find_fitting(expression[relation.end() :], seen)
                    inside = [
                        index
                        for index in candidates
                        if index != anchor
                        and direction * (seen[anchor]["center"][axis] - seen[index]["center"][axis]) > 0
                    ]
                    assert inside == [answer]
                    assert len([index for index in candidates if index != anchor]) >= 2
                elif not has_size:
                    assert candidates == [answer]
                else:
                    continue
                checked[kind] += 1
    assert all(count > 20 for count in checked.values()), checked


def test_shapes_size_adjectives_agree_with_object_sizes(rows):
    """Of two objects of one shape, the one called large is larger."""
    compared = 0
    for row in rows:
        named = {}
        for sentence in row["sentences"]:
            for phrase in sentence["phrases"]:
                expression = sentence["text"][phrase["start"] : phrase["end"]]
                head = re.split("|".join(RELATIONS), expression)[0]
                for size in SIZES:
                    if f" {size} " in head:
                        assert named.setdefault(phrase["objects"][0], size) == size
        for (first, first_size), (second, second_size) in itertools.permutations(named.items(), 2):
            a, b = row["objects"][first], row["objects"][second]
            if (first_size, second_size) == ("small", "large") and a["category"] == b["category"]:
                widest = [max(box[2] - box[0], box[3] - box[1]) for box in (a["box"], b["box"])]
                assert widest[0] < widest[1]
                compared += 1
    assert compared > 2


@pytest.mark.parametrize("side", [32, 65, 200])
def test_shapes_builder_accepts_any_image_size(side, tmp_path):
    rows = data_scripts.load(
        "shapes", split="test", cache_dir=str(tmp_path), image_size=side, num_train=1, num_validation=1, num_test=3
    )
    assert {row["image"].size for row in rows} == {(side, side)}


def test_shapes_builder_refuses_wrong_settings(tmp_path):
    with pytest.raises(ValueError, match="image_size=8"):
        data_scripts.load("shapes", cache_dir=str(tmp_path), image_size=8)
    with pytest.raises(ValueError, match="50,000,000 pixels"):
        data_scripts.load("shapes", cache_dir=str(tmp_path), image_size=8000)
    for ratios in ((2, 1), (0.2, 1), (1, 4.5), (float("nan"), 1)):
        flags = dict(zip(("min_aspect_ratio", "max_aspect_ratio"), ratios, strict=True))
        with pytest.raises(ValueError, match=r"must be from 0\.25 to 4"):
            data_scripts.load("shapes", cache_dir=str(tmp_path), **flags)
    with pytest.raises(ValueError, match="num_test=0"):
        data_scripts.load("shapes", cache_dir=str(tmp_path), num_test=0)
    with pytest.raises(ValueError, match="no dataset 'shape'"):
        data_scripts.load("shape")


def least_ratio(min_visible):
    """Return the least ratio of the sides of the boxes of squares and circles, which overlaps cut."""
    rows = [draw_row("train", index, ShapesConfig(image_size=64, min_visible=min_visible)) for index in range(60)]
    boxes = [item["box"] for row in rows for item in row["objects"] if item["category"] != "star"]
    return min(min(x2 - x1, y2 - y1) / max(x2 - x1, y2 - y1) for x1, y1, x2, y2 in boxes)


def test_min_visible_bounds_what_objects_hide():
    assert least_ratio(0.95) > 0.85 > least_ratio(0.4)
    with pytest.raises(ValueError, match=r"min_visible=1.5 must be from 0.1 to 1"):
        ShapesConfig(min_visible=1.5).validate()


def share_with_shapes(repeated_colors):
    """Return the share of the attribute expressions that name a shape in some scenes."""
    config = ShapesConfig(image_size=64, repeated_colors=repeated_colors)
    texts = [
        sentence["text"]
        for index in range(60)
        for sentence in draw_row("train", index, config)["sentences"]
        if sentence["phrases"][0]["types"] == ["attribute"]
    ]
    return np.mean([text.split()[-1] != "shape" and not set(COLORS) & set(text.split()) for text in texts])


def test_repeated_colors_makes_expressions_to_train_on_depend_on_shapes():
    assert share_with_shapes(0) < share_with_shapes(1)
    rows = [draw_row("test", 0, ShapesConfig(repeated_colors=share)) for share in (0, 1)]
    assert rows[0] == rows[1]
    with pytest.raises(ValueError, match=r"repeated_colors=1.5 must be from 0 to 1"):
        ShapesConfig(repeated_colors=1.5).validate()
