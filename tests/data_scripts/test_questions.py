"""Expressions for nothing or for several objects: each is compared with what is true of the objects in its image."""

import io
import re
from collections import Counter

import datasets
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

import data_scripts
from data_scripts import shapes as shapes_module
from data_scripts.cutouts import plural_of
from data_scripts.exporting import export_dataset
from data_scripts.shapes import COLORS, SHAPES, ShapesConfig, draw_row
from tests.helpers.layout_cutouts import draw_object


SIZE = 64
MARGIN = 0.08 * SIZE  # see data_scripts.scenes
PLACES = {"leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "bottommost": (1, -1)}
SIDES = {"on the left": (0, 1), "on the right": (0, -1), "at the top": (1, 1), "at the bottom": (1, -1)}
RELATIONS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}
FLAGS = {"absent_questions": 2, "half_right_questions": 2, "plural_questions": 2}
FEW = {"image_size": SIZE, "num_train": 250, "num_validation": 1, "num_test": 1, "split": "train"}
NAMES = ("apple", "leaf", "mug", "red mug", "blue mug", "red car", "butterfly")
PLURALS = {"apples": "apple", "butterflies": "butterfly", "mugs": "mug", "red mugs": "red mug"}
PLURALS |= {"blue mugs": "blue mug", "red cars": "red car"}
NEW_KINDS = ("absent", "half_right", "plural")
ATTRIBUTES = ("small", "large", *COLORS, *SHAPES)
SEVERAL = {"every", "all", "the", "both", "side"}


@pytest.fixture(scope="module")
def shapes_rows(tmp_path_factory):
    """Objects side by side, of which the boxes tell the sizes."""
    return data_scripts.load(
        "shapes",
        cache_dir=str(tmp_path_factory.mktemp("cache")),
        max_objects=5,
        object_scale=1.2,
        min_visible=1.0,
        repeated_colors=0.5,
        **FLAGS,
        **FEW,
    )


@pytest.fixture(scope="module")
def load_cutouts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objects")
    for number, name in enumerate(NAMES):
        draw_object((30 * number, 200, 90), "disc").save(folder / f"{name}.png")
    flags = {"objects": str(folder), "cache_dir": str(tmp_path_factory.mktemp("cache")), "max_objects": 5, **FEW}
    return lambda **others: data_scripts.load("cutouts", **{**flags, **others})


@pytest.fixture(scope="module")
def cutouts_rows(load_cutouts):
    return load_cutouts(**FLAGS)


def middle_of(item):
    x0, y0, x1, y1 = item["box"]
    return (x0 + x1) / 2, (y0 + y1) / 2


def fit_shapes(row):
    """Return a function that returns the objects that a description fits, read off the image and its annotations."""
    image, seen = np.asarray(row["image"]).astype(float), []
    for item in row["objects"]:
        segmentation = {**item["segmentation"], "counts": item["segmentation"]["counts"].encode()}
        color = np.median(image[coco_mask.decode(segmentation).astype(bool)], axis=0)
        x0, y0, x1, y1 = item["box"]
        seen.append(
            {
                item["category"],
                "shape",
                min(COLORS, key=lambda name: np.abs(np.array(COLORS[name]) - color).sum()),
                "small" if max(x1 - x0, y1 - y0) < 0.3 * SIZE else "large",
            }
        )
    return lambda text: [i for i, attributes in enumerate(seen) if set(text.removesuffix("s").split()) <= attributes]


def fit_names(row):
    """Return a function that returns the objects that a name fits; "large" and "small" compare the two of a name."""
    names = [item["category"] for item in row["objects"]]

    def fit(text):
        text = PLURALS.get(text, text)
        size, _, head = text.partition(" ")
        if size in ("small", "large"):
            fitting = fit(head)
            areas = [np.prod(np.subtract(row["objects"][i]["box"][2:], row["objects"][i]["box"][:2])) for i in fitting]
            assert len(fitting) in (0, 2)
            return [fitting[np.argmax(areas) if size == "large" else np.argmin(areas)]] if fitting else []
        assert text in NAMES
        return [i for i, name in enumerate(names) if f" {name}".endswith(f" {text}")]

    return fit


def solve(text, fit, middles):
    """Return (form, objects) of an expression; fail if it is ambiguous."""
    relation = re.fullmatch(rf"the (.+) ({'|'.join(RELATIONS)}) the (.+)", text)
    side = re.fullmatch(rf"the two (.+) ({'|'.join(SIDES)})", text)
    place = re.fullmatch(rf"the ({'|'.join(PLACES)}) (.+)", text)
    several = re.fullmatch(r"(both|all|every) (.+)|(the) (.+s)", text)
    if relation:
        anchors = fit(relation[3])
        assert len(anchors) <= 1
        if not anchors:
            return "relation", []
        axis, direction = RELATIONS[relation[2]]
        others = [i for i in fit(relation[1]) if i not in anchors]
        distances = {i: direction * (middles[anchors[0]][axis] - middles[i][axis]) for i in others}
        inside = [i for i in others if distances[i] > 0]
        assert all(distances[i] >= MARGIN for i in inside)
        assert inside or all(distance <= -MARGIN for distance in distances.values())
        return "relation", inside
    if side or place:
        word, head = (side[2], side[1]) if side else (place[1], place[2])
        axis, direction = {**SIDES, **PLACES}[word]
        order = sorted(fit(head), key=lambda i: direction * middles[i][axis])
        number = 2 if side else 1
        assert not order or len(order) > number
        assert not order or direction * (middles[order[number]][axis] - middles[order[number - 1]][axis]) >= MARGIN
        return ("side" if side else "place"), sorted(order[:number])
    if several:
        objects = fit(several[2] or several[4])
        assert len(objects) != 1
        assert several[1] != "both" or len(objects) in (0, 2)
        return (several[1] or "the"), objects
    objects = fit(text.removeprefix("the "))
    assert len(objects) <= 1
    return "attribute", objects


def solve_rows(rows, make_fit):
    """Compare the objects of all expressions with what `solve` returns, and yield (row, fit, text, kind, form)."""
    for row in rows:
        fit, middles = make_fit(row), [middle_of(item) for item in row["objects"]]
        for sentence in row["sentences"]:
            for phrase in sentence["phrases"]:
                text, (kind,) = sentence["text"][phrase["start"] : phrase["end"]], phrase["types"]
                form, objects = solve(text, fit, middles)
                assert sorted(phrase["objects"]) == objects, (text, row["image_id"])
                if kind in ("absent", "half_right"):
                    assert objects == []
                elif kind == "plural":
                    assert len(objects) > 1
                else:
                    assert len(objects) == 1
                if kind in NEW_KINDS:
                    assert text == sentence["text"]
                yield row, fit, text, kind, form


def test_shapes_questions_are_true_of_their_objects_only(shapes_rows):
    forms = {kind: Counter() for kind in NEW_KINDS}
    for _, fit, text, kind, form in solve_rows(shapes_rows, fit_shapes):
        words = [word.removesuffix("s") for word in text.split() if word.removesuffix("s") in ATTRIBUTES]
        if kind in ("absent", "half_right"):
            assert all(map(fit, words)) == (kind == "half_right"), text
        if kind in NEW_KINDS:
            forms[kind][form] += 1
    assert all({"attribute", "place", "relation", *SEVERAL} <= set(forms[kind]) for kind in ("absent", "half_right"))
    assert set(forms["plural"]) == SEVERAL
    assert min(sum(counts.values()) for counts in forms.values()) > 250, forms


def test_cutouts_questions_are_true_of_their_objects_only(cutouts_rows):
    forms = {kind: Counter() for kind in NEW_KINDS}
    asked = set()
    for row, _, text, kind, form in solve_rows(cutouts_rows, fit_names):
        names = {item["category"] for item in row["objects"]}
        for plural, singular in PLURALS.items():
            text = re.sub(rf"\b{plural}\b", singular, text)
        if kind in NEW_KINDS:
            forms[kind][form] += 1
        if kind in ("absent", "half_right"):
            words = set(text.split()) & {word for name in NAMES for word in name.split()}
            assert (words <= {word for name in names for word in name.split()}) == (kind == "half_right"), text
        if kind in ("absent", "half_right") and form == "attribute":
            asked.add((kind, text))
            # a mug may be a red one
            assert not any(text.endswith(f" {name}") for name in names)
    assert {"attribute", "place", "relation", *SEVERAL} <= set(forms["absent"])
    assert set(forms["plural"]) == SEVERAL
    assert forms["half_right"]["relation"] > 200
    assert ("half_right", "the red mug") in asked
    assert ("absent", "the leaf") in asked


@pytest.mark.parametrize("name", ["shapes_rows", "cutouts_rows"])
def test_false_relation_of_one_object_comes_with_true_opposite(name, request):
    """Else, a relation that is asked of the only object of its kind would always be false."""
    make_fit = fit_shapes if name == "shapes_rows" else fit_names
    counts = Counter()
    for row in request.getfixturevalue(name):
        fit = make_fit(row)
        for sentence in row["sentences"]:
            (kind,) = sentence["phrases"][0]["types"]
            relation = re.fullmatch(rf"the (.+) ({'|'.join(RELATIONS)}) the (.+)", sentence["text"])
            if kind in ("relation", "half_right") and relation:
                others = set(fit(relation[1])) - set(fit(relation[3]))
                counts[kind, len(others) == 1] += bool(fit(relation[3]))
    assert counts["half_right", True] == counts["relation", True] > 50
    assert counts["half_right", False] > 20


@pytest.mark.parametrize(
    "settings",
    [{"image_size": 64}, {"image_size": 48, "max_objects": 5, "repeated_colors": 0.5, "max_aspect_ratio": 2}],
)
def test_questions_leave_image_and_other_sentences_unchanged(settings):
    for index in range(10):
        plain = draw_row("train", index, ShapesConfig(**settings))
        row = draw_row("train", index, ShapesConfig(**settings, **FLAGS))
        assert {name: row[name] for name in row if name != "sentences"} == {
            name: plain[name] for name in plain if name != "sentences"
        }
        count = len(plain["sentences"])
        assert row["sentences"][:count] == plain["sentences"]
        assert len(row["sentences"]) > count
        assert {p["types"][0] for s in row["sentences"][count:] for p in s["phrases"]} <= {*NEW_KINDS, "relation"}
        assert row == draw_row("train", index, ShapesConfig(**settings, **FLAGS))
        assert len({sentence["sentence_id"] for sentence in row["sentences"]}) == len(row["sentences"])


def test_questions_of_cutouts_leave_image_and_other_sentences_unchanged(load_cutouts, cutouts_rows):
    for plain, row in zip(load_cutouts(num_train=10, decode=False), cutouts_rows, strict=False):
        count = len(plain["sentences"])
        assert row["sentences"][:count] == plain["sentences"]
        assert row["objects"] == plain["objects"]
        assert Image.open(io.BytesIO(plain["image"]["bytes"])) == row["image"]
        assert {p["types"][0] for s in row["sentences"][count:] for p in s["phrases"]} <= {*NEW_KINDS, "relation"}


def test_questions_are_at_most_as_many_as_requested(cutouts_rows, shapes_rows):
    for rows in (cutouts_rows, shapes_rows):
        for row in rows.remove_columns("image"):
            kinds = Counter(phrase["types"][0] for s in row["sentences"] for phrase in s["phrases"])
            assert all(kinds[kind] <= 2 for kind in NEW_KINDS)
            texts = [
                sentence["text"] for sentence in row["sentences"] if sentence["phrases"][0]["types"] != ["caption"]
            ]
            assert len(set(texts)) == len(texts)
    row = draw_row("test", 0, ShapesConfig(image_size=64, absent_questions=100))
    assert [s["phrases"][0]["types"] for s in row["sentences"]].count(["absent"]) > 10


def test_max_objects_is_upper_limit_of_objects():
    counts = Counter(
        len(draw_row("train", index, ShapesConfig(image_size=32, max_objects=5, object_scale=1.4))["objects"])
        for index in range(100)
    )
    assert set(counts) == {2, 3, 4, 5}


def test_phrases_without_objects_survive_export(shapes_rows, tmp_path):
    rows = shapes_rows.select(range(5))
    export_dataset(data_scripts.SOURCES["shapes"], datasets.DatasetDict(train=rows), tmp_path / "export")
    exported = data_scripts.load(str(tmp_path / "export"), split="train", cache_dir=str(tmp_path / "cache"))
    assert exported["sentences"][:] == rows["sentences"][:]
    assert [] in [phrase["objects"] for s in exported[0]["sentences"] for phrase in s["phrases"]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"plural_questions": -1}, "plural_questions=-1 must be at least 0"),
        ({"max_objects": 1}, "max_objects=1 must be from 2 to 6"),
        ({"max_objects": 7}, "max_objects=7 must be from 2 to 6"),
    ],
)
def test_invalid_number_of_questions_or_objects_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        ShapesConfig(**flags).validate()


def test_settings_that_allow_no_scene_are_named(monkeypatch):
    monkeypatch.setattr(shapes_module, "place_shapes", lambda *_: [])
    with pytest.raises(
        ValueError, match=r"None of 1000 scenes has room .*: lower object_scale=1.0, min_visible=0.6 or"
    ):
        draw_row("train", 0, ShapesConfig())


@pytest.mark.parametrize(
    ("name", "plural"),
    [
        ("red mug", "red mugs"),
        ("key", "keys"),
        ("butterfly", "butterflies"),
        *(
            (name, None)
            for name in ("leaf", "fish", "snowman", "cactus", "glasses", "computer mouse", "T-REX", "sheep")
        ),
        ("cup of tea", None),
    ],
)
def test_plural_is_formed_of_regular_nouns_only(name, plural):
    assert plural_of(name) == plural
