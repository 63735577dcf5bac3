"""`reftr data export --format`: files of other formats that give the same rows when they are read back."""

import io
import json

import datasets
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

import data_scripts
from data_scripts import SOURCES, annotation_export
from data_scripts.annotation_export import export_annotations
from data_scripts.formats import FORMATS as ALL_FORMATS
from data_scripts.importing import import_files
from data_scripts.masks import decode_segmentation, encode_mask, to_segmentation
from data_scripts.records import NO_TARGET
from data_scripts.schema import FEATURES
from tests.helpers.layout_flickr30k import make_flickr30k
from tests.helpers.layout_refcoco import make_refcoco


FORMATS = ("jsonl", "mdetr_json", "odvg", "coco")
MASKS = ("jsonl", "coco")  # formats with masks and categories
CAPTIONS = ("jsonl", "mdetr_json", "odvg")  # formats with the phrases of a caption
SMALL = {"num_train": 3, "num_validation": 1, "num_test": 1, "image_size": 64}


def read_back(name, output, tmp_path, image_dir=None):
    """Read an export as a user does: as a dataset, or by an import; rows by split."""
    cache = str(tmp_path / "cache")
    flags = {} if image_dir is None else {"image_dir": str(image_dir)}
    if name != "coco":
        return data_scripts.load(name, data_dir=str(output), cache_dir=cache, **flags)
    files = {path.stem: [path] for path in sorted(output.glob("*.json"))}
    import_files(name, files, tmp_path / "in", image_dir=image_dir, overwrite=True)
    flags = {"image_dir": str(image_dir or output)}
    return data_scripts.load("jsonl", data_dir=str(tmp_path / "in"), cache_dir=cache, **flags)


def content_of(row, name, with_masks=None):
    """Return what a format carries of a row: its size, pixels, and each phrase with its words and its object."""
    with_masks = name in MASKS if with_masks is None else with_masks
    phrases = []
    for sentence in row["sentences"]:
        for phrase in sentence["phrases"]:
            (index,) = phrase["objects"]
            item = row["objects"][index]
            boxes = item["boxes"] if len(item["boxes"]) > 1 and name == "jsonl" else [item["box"]]
            text, span = sentence["text"], (phrase["start"], phrase["end"])
            words = (text, span) if name in CAPTIONS else text[slice(*span)]
            category = (item["category"] or (name == "coco" and "object") or None) if with_masks else None
            types = phrase["types"] if name == "jsonl" else []
            mask = json.dumps(item["segmentation"]) if with_masks else None
            phrases.append((words, boxes, category, types, mask))
    size = (row["width"], row["height"])
    return size, sorted(phrases, key=str), row["image"].convert("RGB").tobytes()


def assert_same(name, rows, read):
    assert set(read) == set(rows)
    for split, part in rows.items():
        part = [row for row in part if any(sentence["phrases"] for sentence in row["sentences"])]
        assert len(read[split]) == len(part)
        for row, other in zip(part, read[split], strict=True):
            assert content_of(other, name) == content_of(row, name), (name, split)


@pytest.fixture(scope="module")
def refcoco(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refer")
    make_refcoco(folder / "data", "refcoco_unc")
    return data_scripts.load("refcoco_unc", data_dir=str(folder / "data"), cache_dir=str(folder / "cache"))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("by_path", [False, True])
def test_refcoco_is_the_same_when_read_back(refcoco, tmp_path, name, by_path):
    output = tmp_path / "out"
    report = export_annotations(name, SOURCES["refcoco_unc"], refcoco, output, by_path)
    assert (output / "images").exists() is not by_path
    rows = refcoco
    if by_path:  # one image is annotated as it is stored
        undecoded = refcoco["train"].cast_column("image", datasets.Image(decode=False))
        kept = [number for number, row in enumerate(undecoded) if row["image"]["bytes"] is None]
        rows = {**refcoco, "train": refcoco["train"].select(kept)}
        left_out = {"images annotated against their EXIF orientation, which have no path": 1}
        assert len(kept) == len(undecoded) - 1
        assert report.build["train"]["left_out"].items() >= left_out.items()
    assert report.counts["train"]["expressions"] == sum(len(row["sentences"]) for row in rows["train"])
    assert_same(name, rows, read_back(name, output, tmp_path, report.image_dir if by_path else None))


@pytest.mark.parametrize("name", FORMATS)
def test_captions_are_the_same_when_read_back(tmp_path, name):
    make_flickr30k(tmp_path / "flickr")
    rows = data_scripts.load(
        "flickr30k_entities", data_dir=str(tmp_path / "flickr"), cache_dir=str(tmp_path / "flickr_cache")
    )
    report = export_annotations(name, SOURCES["flickr30k_entities"], rows, tmp_path / "out")
    without = sum(not sentence["phrases"] for row in rows["train"] for sentence in row["sentences"])
    assert report.build["train"].get("left_out", {}).get("sentences without a phrase", 0) == without
    assert_same(name, rows, read_back(name, tmp_path / "out", tmp_path))
    if name == "coco":
        assert report.build["train"]["changed"]["phrases of captions are expressions of their own"] > 0


@pytest.mark.parametrize("name", FORMATS)
def test_generated_images_are_written_as_files(tmp_path, name):
    rows = data_scripts.load("shapes", cache_dir=str(tmp_path / "shapes"), **SMALL)
    export_annotations(name, SOURCES["shapes"], rows, tmp_path / "out")
    assert len(list((tmp_path / "out" / "images").iterdir())) == 5
    assert_same(name, rows, read_back(name, tmp_path / "out", tmp_path))
    with pytest.raises(ValueError, match=r"are in its rows .* Leave out --by_path"):
        export_annotations(name, SOURCES["shapes"], rows, tmp_path / "other", by_path=True)
    assert not (tmp_path / "other").exists()


# rows of every kind


def image_bytes(color, size=(40, 30)):
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def mask_of(x0, y0, x1, y1):
    mask = np.zeros((30, 40), np.uint8)
    mask[y0:y1, x0:x1] = 1
    return to_segmentation(encode_mask(mask), keep_empty=True)


def make_object(*boxes, **fields):
    around = [*np.min(boxes, axis=0)[:2].tolist(), *np.max(boxes, axis=0)[2:].tolist()]
    return {"object_id": "", "box": around, "boxes": list(boxes), "category": None, "segmentation": None, **fields}


def make_phrase(text, words, *objects, types=()):
    start = text.index(words)
    return {"start": start, "end": start + len(words), "objects": list(objects), "types": list(types)}


@pytest.fixture
def rows():
    """Rows with several objects per phrase, no target, no extent, several boxes, and masks of some objects alone."""
    text = "a cup left of two plates"
    objects = [
        make_object([1, 2, 11, 12], category="cup", segmentation=mask_of(1, 2, 11, 12)),
        make_object([20, 2, 25, 12], category="plate", segmentation=mask_of(20, 2, 25, 12)),
        make_object([30, 2, 35, 12], category="plate", segmentation=mask_of(30, 2, 35, 12)),
        make_object([1, 2, 1, 12]),
        make_object([3, 3, 9, 9], [12, 3, 15, 9]),
        make_object([5, 5, 6, 6], segmentation=mask_of(0, 0, 0, 0)),
        make_object([7, 7, 9, 9]),
    ]
    phrases = [make_phrase(text, "a cup", 0, types=["noun"]), make_phrase(text, "two plates", 1, 2)]
    sentences = [
        (text, phrases),
        ("nothing", []),
        ("no unicorn", [make_phrase("no unicorn", "no unicorn")]),
        ("a line", [make_phrase("a line", "a line", 3)]),
        ("forks", [make_phrase("forks", "forks", 4)]),
        ("a dot", [make_phrase("a dot", "a dot", 5)]),
        (
            "a cup and no fork",
            [make_phrase("a cup and no fork", "a cup", 0), make_phrase("a cup and no fork", "fork")],
        ),
        ("a cup and a line", [make_phrase("a cup and a line", "a cup and a line", 0, 3)]),
    ]
    row = {
        "image_id": "first",
        "image": {"path": "a.png", "bytes": image_bytes("red")},
        "width": 40,
        "height": 30,
        "objects": objects,
        "sentences": [{"sentence_id": "", "text": text, "phrases": phrases} for text, phrases in sentences],
        "positions": None,
    }
    other = {**row, "image_id": "other", "image": {"path": "a.png", "bytes": image_bytes("blue")}}
    empty = {**row, "image_id": "empty", "objects": [], "sentences": [row["sentences"][1]]}
    return {
        "train": datasets.Dataset.from_list([row, empty], features=FEATURES),
        "val": datasets.Dataset.from_list([other], features=FEATURES),
    }


LEFT_OUT = {
    "images without a sentence to write": 1,
    "masks without a pixel": 1,
    "objects that no sentence names": 1,
    "phrases of objects without extent": 2,
    "sentences without a phrase": 2,
}
WITHOUT = {"categories": 4, "masks": 4, "types of phrases": 1}
AROUND = {"objects with several boxes have the box around them": 1}
REPORTS = {
    "jsonl": (LEFT_OUT, {}),
    "odvg": ({**LEFT_OUT, **WITHOUT, NO_TARGET: 2}, AROUND),
    "mdetr_json": ({**LEFT_OUT, **WITHOUT}, AROUND),
    "coco": (
        {**LEFT_OUT, "types of phrases": 1, NO_TARGET: 2},
        {
            **AROUND,
            "objects without a category are of 'object'": 2,
            "phrases of captions are expressions of their own": 3,
        },
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_fields_that_a_format_lacks_are_counted_by_reason(rows, tmp_path, name):
    report = export_annotations(name, SOURCES["jsonl"], rows, tmp_path / "out")
    left_out, changed = REPORTS[name]
    assert report.build["train"] == {"left_out": left_out, **({"changed": changed} if changed else {})}
    assert report.counts["train"]["images"] == report.counts["val"]["images"] == 1
    read = read_back(name, tmp_path / "out", tmp_path)
    # two images with one name are two files
    colors = [read[split][0]["image"].convert("RGB").getpixel((0, 0)) for split in ("train", "val")]
    assert colors == [(255, 0, 0), (0, 0, 255)]
    phrases = {
        sentence["text"][phrase["start"] : phrase["end"]]: [
            read["train"][0]["objects"][index] for index in phrase["objects"]
        ]
        for sentence in read["train"][0]["sentences"]
        for phrase in sentence["phrases"]
    }
    absent = {"no unicorn", "fork"} if ALL_FORMATS[name].has_no_target else set()
    assert set(phrases) == {"a cup", "two plates", "forks", "a dot"} | absent
    assert [phrases[words] for words in absent] == [[]] * len(absent)
    assert [item["boxes"] for item in phrases["two plates"]] == [[[20, 2, 25, 12]], [[30, 2, 35, 12]]]
    forks = [[3, 3, 9, 9], [12, 3, 15, 9]] if name == "jsonl" else [[3, 3, 15, 9]]
    assert [item["boxes"] for item in phrases["forks"]] == [forks]
    if name in MASKS:
        assert [item["category"] for item in phrases["two plates"]] == ["plate", "plate"]
        assert [decode_segmentation(item["segmentation"]).sum() for item in phrases["two plates"]] == [50, 50]


def test_coco_has_one_annotation_per_object_and_one_category_list(refcoco, tmp_path):
    export_annotations("coco", SOURCES["refcoco_unc"], refcoco, tmp_path / "out")
    lists = set()
    for split, part in refcoco.items():
        api = COCO(str(tmp_path / "out" / f"{split}.json"))
        lists.add(json.dumps(api.dataset["categories"]))
        # objects of one image with equal fields are one
        items = [
            item
            for row in part
            for item in {
                json.dumps([item[name] for name in ("box", "category", "segmentation")]): item
                for item in row["objects"]
            }.values()
        ]
        for annotation, item in zip(api.dataset["annotations"], items, strict=True):
            x, y, width, height = annotation["bbox"]
            assert [x, y, x + width, y + height] == pytest.approx(item["box"])
            name = api.cats[annotation["category_id"]]["name"]
            assert name == (item["category"] or "object")
            if item["segmentation"] is not None:
                mask = decode_segmentation(item["segmentation"])
                assert (api.annToMask(annotation) == mask).all()
                assert annotation["area"] == mask.sum()
    assert len(lists) == 1


def test_boxes_are_written_with_the_digits_that_they_have(refcoco, tmp_path):
    export_annotations("coco", SOURCES["refcoco_unc"], refcoco, tmp_path / "out")
    text = (tmp_path / "out" / "train.json").read_text()
    boxes = [item["bbox"] for item in json.loads(text)["annotations"]]
    assert max(len(str(number)) for box in boxes for number in box) <= 7, boxes


def test_mdetr_names_the_dataset_as_its_evaluation_does(refcoco, rows, tmp_path):
    for name, source, splits in (("refcoco", "refcoco_unc", refcoco), ("captions", "refcoco_unc", rows)):
        export_annotations("mdetr_json", SOURCES[source], splits, tmp_path / name)
        entries = json.loads((tmp_path / name / "train.json").read_text())["images"]
        assert entries[0]["dataset_name"] == name


def test_export_is_complete_or_not_there(rows, tmp_path, monkeypatch):
    output = tmp_path / "out"
    export_annotations("odvg", SOURCES["jsonl"], rows, output)
    before = sorted(path.relative_to(output) for path in output.rglob("*"))
    with pytest.raises(OSError, match="exists"):
        export_annotations("odvg", SOURCES["jsonl"], rows, output)

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(annotation_export, "count_lines", fail)
    with pytest.raises(OSError, match="the disk is full"):
        export_annotations("odvg", SOURCES["jsonl"], rows, output, overwrite=True)
    monkeypatch.undo()
    assert sorted(path.relative_to(output) for path in output.rglob("*")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    export_annotations("odvg", SOURCES["jsonl"], rows, output, overwrite=True)
    (output / "notes.txt").write_text("mine")
    with pytest.raises(OSError, match="is not replaced: it contains more than an export"):
        export_annotations("odvg", SOURCES["jsonl"], rows, output, overwrite=True)
    nothing = {"train": rows["train"].select([1])}
    with pytest.raises(
        ValueError, match=r"Nothing is left in train of 'jsonl' to write as odvg: left out .*1 images without"
    ):
        export_annotations("odvg", SOURCES["jsonl"], nothing, tmp_path / "none")


# the command


def test_command_exports_and_says_how_to_read(run, tmp_path):
    flags = [argument for name, value in SMALL.items() for argument in (f"--{name}", value)]
    command = ("-m", "reftr_cli", "data", "export", "shapes", *flags, "--cache_dir", tmp_path / "cache")
    result = run(*command, "--format", "odvg", "--output", tmp_path / "out")
    table = [line.split() for line in result.stdout.splitlines()[:4]]
    assert table[0] == ["split", "images", "expressions", "boxes"]
    assert [line[:2] for line in table[1:]] == [["train", "3"], ["validation", "1"], ["test", "1"]]
    assert "- train: left out" in result.stdout
    assert f"`reftr data check odvg --data_dir {tmp_path / 'out'}` reads it." in result.stdout
    checked = ("--data_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache")
    assert "odvg: 0 errors" in run("-m", "reftr_cli", "data", "check", "odvg", *checked).stdout
    for argv, error in (
        (("--format", "voc"), "'voc' is not a format to write here; use one of parquet, jsonl"),
        (("--format", "coco", "--license", "mit"), "--license is for Parquet files: remove it or --format coco"),
        (("--format", "coco", "--push_to_hub", "a/b"), "--push_to_hub is for Parquet files"),
    ):
        refused = run(*command, *argv, "--output", tmp_path / "other", check=False)
        assert refused.returncode == 1
        assert error in refused.stderr
