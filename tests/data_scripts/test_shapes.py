"""The embedded set: drawn the same each time, its splits apart, its words fitting one object each."""

import importlib
import io
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

import data_scripts
from data_scripts.schema import FEATURES
from data_scripts.shapes import COLORS, MARGIN, SHAPES, SIZES, draw_row


PLACES = {"leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "bottommost": (1, -1)}
RELATIONS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}


@pytest.fixture(scope="module")
def rows():
    return [draw_row(split, index, 96, 3) for split in ("train", "test") for index in range(60)]


def look(row, picture):
    """What a viewer sees of each object: shape, colour, size and the middle of its box, read off image and boxes."""
    seen = []
    for item in row["objects"]:
        mask = coco_mask.decode({**item["segmentation"], "counts": item["segmentation"]["counts"].encode()}).astype(
            bool
        )
        color = np.median(picture[mask], axis=0)
        name = min(COLORS, key=lambda name: np.abs(np.array(COLORS[name]) - color).sum())
        x0, y0, x1, y1 = item["box"]
        seen.append({"shape": item["category"], "color": name, "middle": ((x0 + x1) / 2, (y0 + y1) / 2)})
    return seen


def fitting(words, seen):
    """Objects that colour and shape words fit; sizes are left to the builder's own word."""
    colors = [word for word in words.split() if word in COLORS]
    shapes = [word for word in words.split() if word in SHAPES]
    return [
        index
        for index, item in enumerate(seen)
        if (not colors or item["color"] == colors[0]) and (not shapes or item["shape"] == shapes[0])
    ]


def test_rows_have_the_schema(shapes):
    assert shapes["train"].features == FEATURES
    assert {split: len(rows) for split, rows in shapes.items()} == {"train": 48, "validation": 9, "test": 10}
    row = shapes["train"][0]
    assert row["image"].size == (row["width"], row["height"]) == (64, 64)


def test_drawn_the_same_each_time():
    assert draw_row("train", 5, 64, 0) == draw_row("train", 5, 64, 0)
    assert draw_row("train", 5, 64, 0) != draw_row("train", 5, 64, 1)


def test_an_edited_builder_is_noticed(tmp_path, monkeypatch):
    settings = {"cache_dir": str(tmp_path), "num_train": 1, "num_validation": 1, "num_test": 1}
    before = data_scripts.load("shapes", split="test", **settings)[0]
    edited = tmp_path / "edited_shapes.py"
    source = Path(data_scripts.shapes.__file__).read_text().replace("\nfrom .", "\nfrom data_scripts.")
    edited.write_text(source.replace('"the {', '"that {'))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(data_scripts.SOURCES, "shapes", importlib.import_module("edited_shapes").SOURCES[0])
    after = data_scripts.load("shapes", split="test", **settings)[0]
    assert [sentence["text"] for sentence in before["sentences"]] != [s["text"] for s in after["sentences"]]


def test_splits_are_disjoint(rows):
    pictures = [row["image"]["bytes"] for row in rows]
    assert len(set(pictures)) == len(pictures)
    assert len({row["image_id"] for row in rows}) == len(rows)


def test_masks_agree_with_boxes(rows):
    for row in rows:
        for item in row["objects"]:
            segmentation = {**item["segmentation"], "counts": item["segmentation"]["counts"].encode()}
            x, y, width, height = coco_mask.toBbox(segmentation)
            assert [x, y, x + width, y + height] == item["box"]
            assert segmentation["size"] == [row["height"], row["width"]]


def test_rows_have_several_sentences_of_whole_phrases(rows):
    for row in rows:
        phrases = [(sentence["text"], phrase) for sentence in row["sentences"] for phrase in sentence["phrases"]]
        assert len(row["sentences"]) >= 3
        for text, phrase in phrases:
            words = text[phrase["start"] : phrase["end"]]
            assert words.startswith("the ")
            assert words == words.strip()
            if phrase["types"] != ["caption"]:
                assert words == text
        assert len({sentence["sentence_id"] for sentence in row["sentences"]}) == len(row["sentences"])


def test_words_fit_one_object_and_it_is_the_one(rows):
    """Read the words with another parser than the builder's, and look at the image."""
    told = dict.fromkeys(("attribute", "place", "relation", "caption"), 0)
    for row in rows:
        picture = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))).astype(float)
        seen = look(row, picture)
        margin = MARGIN * row["width"]
        for sentence in row["sentences"]:
            for phrase in sentence["phrases"]:
                words = sentence["text"][phrase["start"] : phrase["end"]]
                (answer,) = phrase["objects"]
                kind = phrase["types"][0]
                has_size = any(size in words for size in SIZES)
                relation = re.search("|".join(RELATIONS), words)
                head = words[: relation.start()] if relation else words
                candidates = fitting(head, seen)
                assert answer in candidates, (words, row["image_id"])
                place = next((place for place in PLACES if place in words), None)
                if place and not has_size:
                    axis, direction = PLACES[place]
                    order = sorted(candidates, key=lambda index: direction * seen[index]["middle"][axis])
                    gap = direction * (seen[order[1]]["middle"][axis] - seen[order[0]]["middle"][axis])
                    assert order[0] == answer
                    assert gap >= margin
                elif relation and not has_size:
                    axis, direction = RELATIONS[relation[0]]
                    (anchor,) = fitting(words[relation.end() :], seen)
                    inside = [
                        index
                        for index in candidates
                        if index != anchor
                        and direction * (seen[anchor]["middle"][axis] - seen[index]["middle"][axis]) > 0
                    ]
                    assert inside == [answer]
                    assert len([index for index in candidates if index != anchor]) >= 2
                elif not has_size:
                    assert candidates == [answer]
                else:
                    continue
                told[kind] += 1
    assert all(count > 20 for count in told.values()), told


def test_size_words_agree_with_sizes(rows):
    """Of two objects of one shape, wholly visible, the one that is called large is larger."""
    compared = 0
    for row in rows:
        named = {}
        for sentence in row["sentences"]:
            for phrase in sentence["phrases"]:
                words = sentence["text"][phrase["start"] : phrase["end"]]
                head = re.split("|".join(RELATIONS), words)[0]
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
def test_any_side(side, tmp_path):
    rows = data_scripts.load(
        "shapes", split="test", cache_dir=str(tmp_path), image_size=side, num_train=1, num_validation=1, num_test=3
    )
    assert {row["image"].size for row in rows} == {(side, side)}


def test_wrong_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="image_size=8"):
        data_scripts.load("shapes", cache_dir=str(tmp_path), image_size=8)
    with pytest.raises(ValueError, match="50,000,000 pixels"):
        data_scripts.load("shapes", cache_dir=str(tmp_path), image_size=8000)
    with pytest.raises(ValueError, match="num_test=0"):
        data_scripts.load("shapes", cache_dir=str(tmp_path), num_test=0)
    with pytest.raises(ValueError, match="no dataset 'shape'"):
        data_scripts.load("shape")
