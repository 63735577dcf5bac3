"""The refer API's datasets from files in their authors' layout, with every known irregularity."""

import importlib
import json
import math
import pickle
import random
import subprocess
from pathlib import Path

import datasets
import numpy as np
import pytest
from pycocotools import mask as coco_mask

import data_scripts
from data_scripts.building import clip_box
from data_scripts.refcoco import IMAGE_FOLDERS, encode_segmentation, read_refs, xywh_to_xyxy
from tests.helpers.layout_refcoco import FIRST_REF, SPLITS, make_refcoco, python2_pickle


@pytest.fixture
def refcoco(tmp_path):
    """Write RefCOCO to its own folder; return (facts, load)."""
    facts = make_refcoco(tmp_path / "DATA")

    def load(split=None, **flags):
        settings = {"data_dir": tmp_path / "DATA", "cache_dir": str(tmp_path / "cache"), **flags}
        return data_scripts.load("refcoco_unc", split, **settings)

    return facts, load


def decode(segmentation):
    return coco_mask.decode({**segmentation, "counts": segmentation["counts"].encode()}).astype(bool)


def built(tmp_path):
    """Return the files that a build leaves in the cache."""
    return [path for path in (tmp_path / "cache").rglob("*") if path.suffix in (".arrow", ".incomplete")]


def expressions(row):
    return [sentence["text"] for sentence in row["sentences"]]


def test_builder_reads_first_published_record(refcoco):
    row = refcoco[1]("train")[-1]  # rows are sorted by image id
    assert row["image_id"] == "coco_581857"
    assert row["image"].size == (row["width"], row["height"]) == (427, 640)
    assert expressions(row) == [sentence["sent"] for sentence in FIRST_REF["sentences"]]
    assert [sentence["sentence_id"] for sentence in row["sentences"]] == [f"refcoco_unc_{index}" for index in range(3)]
    for sentence in row["sentences"]:
        assert sentence["phrases"] == [{"start": 0, "end": len(sentence["text"]), "objects": [0], "types": []}]
    (item,) = row["objects"]
    assert (item["object_id"], item["category"]) == ("coco_1719310", "person")
    assert item["box"] == pytest.approx([103.93, 299.99, 238.15, 477.41], abs=1e-4)
    assert item["boxes"] == [item["box"]]


@pytest.mark.parametrize("name", SPLITS)
def test_builder_builds_every_dataset_and_split(tmp_path, name):
    facts = make_refcoco(tmp_path, name)
    rows = data_scripts.load(name, data_dir=tmp_path, cache_dir=str(tmp_path / "cache"))
    assert len(list(facts["image_dir"].rglob("*.jpg"))) >= 12
    assert tuple(rows) == facts["splits"] == data_scripts.SOURCES[name].splits
    prefix = "saiapr" if name.startswith("refclef") else "coco"
    for split, part in rows.items():
        assert part.features == data_scripts.FEATURES
        numbers = [int(image_id.removeprefix(f"{prefix}_")) for image_id in part["image_id"]]
        assert numbers == sorted(numbers)
        if split == "train":
            shared = [100] if name == "refcocog_google" else []
            assert numbers == [20, 30, 40, 50, 70, 71, 72, 73, 74, *shared, 581857]
        else:
            assert [expressions(row) for row in part][:1] == [[f"of {split}"]]
            assert len(part) == (2 if name == "refclef_unc" and split != "val" else 1)
    assert expressions(rows["train"][0]) == ["a crowd", "the corner", "the same corner"]


def test_builder_puts_refclef_reference_in_each_of_its_splits(tmp_path, run):
    """The refer API selects testA by the letter A in the split of a reference: testA, testAB and testAC."""
    make_refcoco(tmp_path, "refclef_unc")
    rows = data_scripts.load("refclef_unc", data_dir=tmp_path, cache_dir=str(tmp_path / "cache"))
    found = {}
    for split in ("testA", "testB", "testC"):
        *_, row = rows[split]
        assert row["image_id"] == "saiapr_110"
        found[split] = list(zip(expressions(row), row["positions"], strict=True))
        sentence_ids = [sentence["sentence_id"] for sentence in row["sentences"]]
        assert len(set(sentence_ids)) == len(sentence_ids)
    # positions continue after the split's own reference
    assert found == {
        "testA": [("testAB of 110", 1), ("testAC of 110", 2), ("testA of 110", 3)],
        "testB": [("testAB of 110", 1), ("testBC of 110", 2)],
        "testC": [("testBC of 110", 1), ("testAC of 110", 2)],
    }
    printed = run(
        "-m", "reftr_cli", "data", "build", "refclef_unc", "--data_dir", tmp_path, "--cache_dir", tmp_path / "cache"
    ).stdout
    counts = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.startswith("test")}
    assert {split: numbers[2] for split, numbers in counts.items()} == {"testA": "4", "testB": "3", "testC": "3"}


def test_builder_merges_references_by_object_and_not_by_box(refcoco):
    rows = {row["image_id"]: row for row in refcoco[1]("train")}

    def texts_with_objects(row):
        return [(sentence["text"], sentence["phrases"][0]["objects"]) for sentence in row["sentences"]]

    assert texts_with_objects(rows["coco_71"]) == [("said once", [0]), ("another", [1]), ("said again", [0])]
    assert texts_with_objects(rows["coco_74"]) == [("one", [0]), ("the one", [0]), ("it", [0]), ("its two ends", [1])]
    assert texts_with_objects(rows["coco_70"]) == [("a café, don't ask", [0])]
    assert [item["category"] for item in rows["coco_72"]["objects"]] == ["cup", None]


def test_builder_scales_masks_and_boxes_to_real_image_size(tmp_path):
    for name in ("refcocog_umd", "refclef_berkeley"):
        facts = make_refcoco(tmp_path / name, name)
        rows = data_scripts.load(name, "train", data_dir=tmp_path / name, cache_dir=str(tmp_path / "cache"))
        seen = {int(row["image_id"].split("_")[1]): row for row in rows}
        assert seen.keys() == facts["expected"].keys()
        for number, objects in facts["expected"].items():
            row = seen[number]
            for item, (box_xyxy, mask) in zip(row["objects"], objects, strict=True):
                assert item["box"] == pytest.approx(box_xyxy, abs=1e-4)
                if mask is None:
                    assert item["segmentation"] is None
                    continue
                assert item["segmentation"]["size"] == [row["height"], row["width"]]
                assert (decode(item["segmentation"]) == mask).all(), number
        # an image is turned upright unless only its stored size equals the annotated one
        stored = {number: seen[number]["image"].size for number in (40, 50)}
        assert stored[40] == (seen[40]["width"], seen[40]["height"]) == (30, 40)
        assert (seen[50]["width"], seen[50]["height"]) == (40, 30)


@pytest.mark.row("R6")
def test_builder_scales_boxes_by_factor_of_each_side(refcoco):
    facts, load = refcoco
    (row,) = [row for row in load("train") if row["image_id"] == "coco_71"]
    instances = json.loads(facts["instances_file"].read_text())
    (image,) = [image for image in instances["images"] if image["id"] == 71]
    image["width"], image["height"] = 2 * image["width"], 4 * image["height"]
    facts["instances_file"].write_text(json.dumps(instances))
    (scaled,) = [row for row in load("train") if row["image_id"] == "coco_71"]
    for before, after in zip(row["objects"], scaled["objects"], strict=True):
        x0, y0, x1, y1 = before["box"]
        assert after["box"] == pytest.approx([x0 / 2, y0 / 4, x1 / 2, y1 / 4], abs=1e-4)


def test_builder_drops_and_counts_bad_annotations(refcoco, caplog):
    facts, load = refcoco
    rows = load("train")
    assert "coco_60" not in rows["image_id"]
    (left_out,) = [record.message for record in caplog.records if "left out" in record.message]
    assert sum(int(word) for word in left_out.split() if word.isdigit()) == facts["dropped"]
    assert "5 expressions of objects without a box in the image" in left_out
    assert "1 expressions of objects that instances.json lacks" in left_out
    assert "1 expressions without words" in left_out
    (changed,) = [record.message for record in caplog.records if "are cut" in record.message]
    assert "2 boxes are cut at their image's edge" in changed
    assert "1 images have another size than annotated" in changed


@pytest.mark.row("R6")
def test_builder_with_integer_boxes_keeps_empty_boxes_and_masks(refcoco, caplog):
    """The published evaluation counts empty boxes and masks as misses; invalid ones are dropped all the same."""
    facts, load = refcoco
    instances = json.loads(facts["instances_file"].read_text())
    for annotation in instances["annotations"]:
        if annotation["image_id"] == 40:  # outside its image, in pixels
            annotation["segmentation"] = [[100, 100, 110, 100, 110, 110]]
    facts["instances_file"].write_text(json.dumps(instances))
    refs = read_refs(facts["refs_file"])
    refs += [{**ref, "split": "val"} for ref in refs if ref["split"] == "train"]
    facts["refs_file"].write_bytes(python2_pickle(refs))
    assert "coco_60" not in load("train", integer_boxes=True)["image_id"]
    rows = {row["image_id"]: row for row in load("val", integer_boxes=True)}
    kept = rows["coco_60"]
    assert expressions(kept) == ["without width", "outside"]
    assert [item["box"] for item in kept["objects"]] == [[5, 5, 5, 14], [40, 5, 40, 14]]
    assert not decode(rows["coco_40"]["objects"][0]["segmentation"]).any()
    assert [item["segmentation"] for item in rows["coco_72"]["objects"]] == [None, None]
    assert "2 boxes without extent are kept, to be counted as misses" in caplog.text
    assert "1 masks without a pixel are kept, to be counted as misses" in caplog.text
    without = {row["image_id"]: row for row in load("val")}
    assert "coco_60" not in without
    assert without["coco_40"]["objects"][0]["segmentation"] is None


def test_builder_positions_follow_order_of_references(refcoco):
    """Rows are sorted by image; positions follow the order of the file, with gaps for dropped references."""
    facts, load = refcoco
    refs = read_refs(facts["refs_file"])
    expected = [item["sent"].strip() for ref in refs if ref["split"] == "train" for item in ref["sentences"]]
    found = {}
    for row in load("train"):
        found |= dict(zip(row["positions"], expressions(row), strict=True))
    assert len(found) == len(expected) - facts["dropped"]
    assert found == {position: text for position, text in enumerate(expected) if position in found}
    assert list(found) != sorted(found)


def test_builder_drops_and_counts_damaged_masks(refcoco, caplog):
    facts, load = refcoco
    instances = json.loads(facts["instances_file"].read_text())
    for annotation, segmentation in zip(
        instances["annotations"],
        (
            [[1, 2, 3, 4]],
            {"size": [30, 40], "counts": [7, 9]},
            {"size": [30, 40], "counts": "oops"},
            [["x"] * 6],
            None,
        ),
        strict=False,
    ):
        annotation["segmentation"] = segmentation
    facts["instances_file"].write_text(json.dumps(instances))
    masks = [item["segmentation"] for row in load("train") for item in row["objects"]]
    assert [mask is None for mask in masks].count(True) == 5 + 2  # two have none
    assert "4 objects lost a mask that is empty or cannot be read" in caplog.text


def test_builder_gives_same_rows_in_processes_and_streaming(tmp_path, refcoco):
    load = refcoco[1]
    rows = load()
    streamed = load(streaming=True)
    assert isinstance(streamed["train"], datasets.IterableDataset)
    assert streamed["train"].features == data_scripts.FEATURES
    apart = load(num_proc=2, cache_dir=str(tmp_path / "other"))
    for split in rows:
        plain = [without_image(row) for row in rows[split]]
        assert [without_image(row) for row in streamed[split]] == plain
        assert [without_image(row) for row in apart[split]] == plain
    assert next(iter(load("testA", streaming=True)))["image"].size == (40, 30)


def without_image(row):
    return {key: value for key, value in row.items() if key != "image"}


def test_builder_truncates_boxes_with_integer_boxes_flag(refcoco):
    assert refcoco[1]("train", integer_boxes=True)[-1]["objects"][0]["box"] == [103, 299, 238, 477]


def test_builder_with_changed_annotation_file_rebuilds_cache(refcoco):
    """A file of the same size is recognized by its modification time."""
    facts, load = refcoco
    assert load("train")[-1]["objects"][0]["category"] == "person"
    facts["instances_file"].write_text(facts["instances_file"].read_text().replace("person", "people"))
    assert load("train")[-1]["objects"][0]["category"] == "people"


def test_edited_builder_rebuilds_cache(tmp_path, refcoco, monkeypatch):
    load = refcoco[1]
    load("val")
    before = len(built(tmp_path))
    load("val")
    assert len(built(tmp_path)) == before
    source = Path(data_scripts.refcoco.__file__).read_text().replace("from .", "from data_scripts.")
    (tmp_path / "edited_refcoco.py").write_text(source.replace('["sent"].strip()', '["raw"].strip()'))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(data_scripts.SOURCES, "refcoco_unc", importlib.import_module("edited_refcoco").SOURCES[0])
    assert expressions(load("val")[0]) == ["OF VAL."]
    assert len(built(tmp_path)) == 2 * before


@pytest.mark.parametrize("images", IMAGE_FOLDERS["coco"])
def test_builder_finds_images_in_usual_folders(tmp_path, images):
    folder = tmp_path / "all" / "refer"
    make_refcoco(folder, images=images)
    rows = data_scripts.load("refcoco_unc", "testB", data_dir=folder, cache_dir=str(tmp_path / "cache"))
    assert rows[0]["image"].size == (40, 30)


def test_builder_finds_images_in_flat_image_dir(tmp_path):
    facts = make_refcoco(tmp_path / "DATA", "refclef_unc", images="../mine")
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in facts["image_dir"].rglob("*.jpg"):
        path.rename(flat / path.name)
    settings = {"data_dir": tmp_path / "DATA", "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(OSError, match="images of 'refclef_unc' do not exist"):
        data_scripts.load("refclef_unc", **settings)
    assert len(data_scripts.load("refclef_unc", "train", image_dir=str(flat), **settings)) == 10


def test_builder_names_missing_annotation_files(tmp_path):
    with pytest.raises(ValueError, match=r"data_dir=.*refcoco\.zip"):
        data_scripts.load("refcoco_unc", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(OSError, match="requires files that do not exist") as error:
        data_scripts.load("refcoco+_unc", data_dir=tmp_path, cache_dir=str(tmp_path / "cache"))
    for part in ("refcoco+/instances.json", "refcoco+/refs(unc).p", "refcoco+.zip", str(tmp_path)):
        assert part in str(error.value)


@pytest.mark.row("R1")
def test_builder_names_missing_images_before_writing(tmp_path, refcoco):
    facts, load = refcoco
    instances = json.loads(facts["instances_file"].read_text())
    refs = pickle.loads(facts["refs_file"].read_bytes(), encoding="latin-1")
    for number in range(2000, 2025):
        instances["images"].append({"id": number, "width": 40, "height": 30, "file_name": "x"})
        refs.append({**FIRST_REF, "image_id": number, "split": "testB"})
    facts["instances_file"].write_text(json.dumps(instances))
    facts["refs_file"].write_bytes(pickle.dumps(refs, protocol=2))
    for streaming in (False, True):
        with pytest.raises(OSError, match="25 images of 'refcoco_unc' do not exist") as error:
            load("testB", streaming=streaming)
        for number in range(2000, 2025):
            assert f"COCO_train2014_{number:012d}.jpg" in str(error.value)
        for part in ("train2014.zip", str(facts["image_dir"]), "image_dir", "images/mscoco/images/train2014"):
            assert part in str(error.value)
    assert not built(tmp_path)
    # references and instances of different datasets
    facts["instances_file"].write_text(json.dumps({**instances, "images": instances["images"][:3]}))
    with pytest.raises(OSError, match="do not belong together"):
        load()


def test_builder_names_images_without_header(tmp_path, refcoco):
    facts, load = refcoco
    paths = sorted(facts["image_dir"].iterdir())[:2]
    paths[0].write_bytes(b"")
    paths[1].write_text("a page that says: not found")
    with pytest.raises(OSError, match="2 images of 'refcoco_unc' cannot be read") as error:
        load()
    assert all(path.name in str(error.value) for path in paths)
    assert not built(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        lambda trace: b"cos\nsystem\n(S'touch " + str(trace).encode() + b"'\ntR.",
        lambda trace: b"c__builtin__\neval\n(S'open(\"" + str(trace).encode() + b'", "w")\'\ntR.',
        lambda trace: b"csubprocess\nPopen\n((S'touch'\nS'" + str(trace).encode() + b"'\nltR.",
        lambda trace: (
            b"c__builtin__\ngetattr\n(c__builtin__\n__import__\n(S'os'\ntRS'system'\ntR(S'touch "
            + str(trace).encode()
            + b"'\ntR."
        ),
        lambda trace: pickle.dumps([{"ref": (Touch(trace),)}], protocol=4),
    ],
    ids=["os.system", "eval", "Popen", "getattr", "nested"],
)
@pytest.mark.row("S1")
def test_builder_refuses_malicious_references_without_running_them(tmp_path, refcoco, content):
    facts, load = refcoco
    trace = tmp_path / "trace"
    facts["refs_file"].write_bytes(content(trace))
    with pytest.raises(ValueError, match="is refused"):
        load()
    assert not trace.exists()
    assert not built(tmp_path)


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return subprocess.check_call, (["touch", str(self.path)],)


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "other"])
def test_builder_names_damaged_annotation_files(refcoco, damage):
    facts, load = refcoco
    for file in (facts["refs_file"], facts["instances_file"]):
        original = file.read_bytes()
        half = original[: len(original) // 2]
        other = pickle.dumps([1]) if file.suffix == ".p" else b'{"images": [{"id": 1}]}'
        content = {"cut": half, "noise": b"\x00\xff" * 50, "empty": b"", "other": other}[damage]
        file.write_bytes(content)
        with pytest.raises((OSError, ValueError)) as error:
            load()
        assert str(file) in str(error.value)
        file.write_bytes(original)


def test_builder_refuses_unknown_flag(refcoco):
    with pytest.raises(ValueError, match="no flag whole_boxes; it has: image_dir, integer_boxes"):
        refcoco[1](whole_boxes=True)


def test_builder_drops_upside_down_box_with_integer_boxes(refcoco):
    facts, load = refcoco
    instances = json.loads(facts["instances_file"].read_text())
    (annotation,) = [annotation for annotation in instances["annotations"] if annotation["id"] == 710]
    annotation["bbox"] = [4.0, 13.0, 9.0, -9.0]
    facts["instances_file"].write_text(json.dumps(instances))
    (row,) = [row for row in load("train", integer_boxes=True) if row["image_id"] == "coco_71"]
    assert expressions(row) == ["another"]
    assert [item["box"] for item in row["objects"]] == [[20, 4, 29, 13]]


@pytest.mark.row("R6")
def test_clip_box_and_mask_encoder_survive_ten_thousand_bad_values():
    """Kept boxes lie in the image and are not empty; nothing raises."""
    rng = random.Random(0)
    odd = [math.nan, math.inf, -math.inf, 0, -1, 1e30, -1e30, 5, 0.5, 39.99, None, "7"]
    kept = 0
    for _ in range(10000):
        box_xywh = [rng.choice(odd) if rng.random() < 0.2 else rng.uniform(-50, 90) for _ in range(4)]
        box_xyxy = xywh_to_xyxy(box_xywh)
        box_xyxy = box_xyxy and clip_box(box_xyxy, 40, 30)
        if box_xyxy:
            kept += 1
            x0, y0, x1, y1 = box_xyxy
            assert 0 <= x0 < x1 <= 40
            assert 0 <= y0 < y1 <= 30
        polygon = [rng.choice(odd) if rng.random() < 0.1 else rng.uniform(-50, 90) for _ in range(rng.randint(0, 10))]
        segmentation = encode_segmentation([polygon], (40, 30), (40, 30))
        if segmentation:
            assert decode(segmentation).any()
    assert 500 < kept < 9000


def test_builder_encodes_polygon_far_beyond_image(tmp_path, refcoco, run):
    """Run in a subprocess with 8 GB of memory, because the fault kills the process."""
    facts, _ = refcoco
    instances = json.loads(facts["instances_file"].read_text())
    (annotation,) = [annotation for annotation in instances["annotations"] if annotation["id"] == 710]
    annotation["segmentation"] = [[0.0, 0.0, 1e30, 0.0, 0.0, 1e30]]
    facts["instances_file"].write_text(json.dumps(instances))
    code = (
        "import resource, sys, data_scripts\n"
        "resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n"
        f"settings = {{'data_dir': {str(tmp_path / 'DATA')!r}, 'cache_dir': {str(tmp_path / 'cache')!r}}}\n"
        "rows = data_scripts.load('refcoco_unc', 'train', **settings)\n"
        "(row,) = [row for row in rows if row['image_id'] == 'coco_71']\n"
        "sys.stdout.write(str(row['objects'][0]['segmentation']['size'] == [row['height'], row['width']]))"
    )
    assert run("-c", code).stdout == "True"


def test_builder_decodes_rotated_images_as_annotated(refcoco):
    """datasets applies the EXIF orientation on decoding; the boxes of a row refer to the row's width and height."""
    row = next(row for row in refcoco[1]("train") if row["image_id"] == "coco_40")
    assert np.asarray(row["image"]).shape[:2] == (row["height"], row["width"])
