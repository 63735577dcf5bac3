"""The published indexes in their folder tree: boxes, masks and splits of every layout; hostile files are refused."""

import logging
import operator
import os
import pickle
import re
import subprocess
from collections import OrderedDict

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

import data_scripts
from data_scripts.masks import decode_segmentation
from data_scripts.pickles import read_pickle
from data_scripts.reftr_index import RefTRIndex
from data_scripts.schema import FEATURES
from tests.helpers.layout_reftr_index import (
    COCO,
    COCO_GREY,
    MASK_SPLITS,
    RESC_SPLITS,
    make_reftr_index,
    rectangle,
    save,
)
from training_reftr.data import GroundingCollator


FACTS = {"coco_box_xyxy": [10.75, 20.5, 41.25, 37.75], "coco_box_whole_xyxy": [10, 20, 40, 37]}


@pytest.fixture
def folder(tmp_path):
    assert make_reftr_index(tmp_path / "data") == FACTS
    assert len(list((tmp_path / "data").rglob("*.jpg"))) == 12
    return tmp_path / "data"


@pytest.fixture
def load(folder, tmp_path):
    def load_split(name, split=None, **flags):
        return data_scripts.load(name, split, cache_dir=str(tmp_path / "cache"), data_dir=str(folder), **flags)

    return load_split


def texts(rows):
    return [[sentence["text"] for sentence in row["sentences"]] for row in rows]


def decode(segmentation):
    return coco_mask.decode({**segmentation, "counts": segmentation["counts"].encode()})


@pytest.mark.parametrize("name", RESC_SPLITS)
def test_builder_groups_resc_expressions_of_image_in_one_row(load, name):
    rows = load(f"resc_{name}")
    trainval = ("trainval",) if name.startswith("unc") else ()
    assert set(rows) == {*RESC_SPLITS[name], *trainval}
    train = rows["train"]
    assert train.features == FEATURES
    assert train["image_id"] == ["coco_581857", "coco_9", "coco_25"]
    assert texts(train) == [
        ["the lady with the blue shirt train", "blue shirt", "corner"],
        ["Left Man"],
        [" a café "],
    ]
    assert train[2]["objects"][0]["box"] == [2, 3, 22, 43]
    row = train[0]
    assert row["image"].size == (row["width"], row["height"]) == (64, 48)
    assert [sentence["sentence_id"] for sentence in row["sentences"]] == [f"{name}_train_{n}" for n in (0, 2, 3)]
    # xywh with fractions, one object for equal boxes, clipped at the edge
    assert [item["box"] for item in row["objects"]] == [FACTS["coco_box_xyxy"], [60, 40, 64, 48]]
    assert [item["object_id"] for item in row["objects"]] == ["coco_581857_0", "coco_581857_1"]
    assert [sentence["phrases"][0]["objects"] for sentence in row["sentences"]] == [[0], [0], [1]]
    assert row["sentences"][1]["phrases"] == [{"start": 0, "end": 10, "objects": [0], "types": []}]


def test_builder_joins_trainval_or_reads_own_file_for_referit(load):
    rows = load("resc_unc", "trainval")
    assert texts(rows)[0] == [
        "the lady with the blue shirt train", "blue shirt", "corner",
        "the lady with the blue shirt val", "blue shirt", "corner",
    ]  # fmt: skip
    assert len(rows[0]["objects"]) == 2
    assert texts(load("resc_referit", "trainval")) == [["sky trainval", "sky trainval"], ["top half"] * 2]
    assert texts(load("resc_referit", "test")) == [["sky test"], ["top half"]]


def test_builder_reads_box_format_of_each_dataset(load):
    assert load("resc_referit", "val")[0]["objects"][0]["box"] == [4, 5, 20, 30]
    flickr = load("resc_flickr", "test")
    assert [row["objects"][0]["box"] for row in flickr] == [
        [1, 2, 30, 20],
        [0, 0, 30, 30],
        [1, 2, 3, 4],
    ]
    genome = load("resc_vg", "train")
    assert [row["objects"][0]["box"] for row in genome] == [
        [1, 2, 31, 22],
        [9.5, 9, 13.5, 13.5],
        [0, 0, 30, 30],
        [1, 1, 2, 2],
    ]
    # images come from two folders
    assert [row["image"].size for row in genome] == [(80, 60), (60, 80), (30, 30), (30, 30)]
    assert texts(genome)[0] == ["tree", "tree"]


# tree -> (folder of the sets, folder of COCO's images, folder of the others, data_dir)
MSCOCO = "other/images/mscoco/images/train2014"
TREES = {
    "TransVG": ("data", f"ln_data/{MSCOCO}", "ln_data", "."),
    "TransVG's sets": ("data", f"ln_data/{MSCOCO}", "ln_data", "data"),
    "OneRef": ("ref_data_shuffled", f"image_data/{MSCOCO}", "image_data", "."),
    "OneRef's single": ("ref_data_shuffled/single_dataset", f"image_data/{MSCOCO}", "image_data", "."),
    "one folder": (".", "train2014", ".", "."),
}


@pytest.mark.parametrize(
    ("tree", "name"),
    [
        ("TransVG", "resc_unc"),
        ("TransVG", "resc_flickr"),
        ("TransVG's sets", "resc_referit"),
        ("OneRef", "resc_gref_umd"),
        ("OneRef", "resc_flickr"),
        ("OneRef's single", "resc_referit"),
        ("one folder", "resc_unc"),
        ("one folder", "resc_referit"),
    ],
)
def test_builder_finds_resc_index_in_trees_of_others(load, folder, tmp_path, tree, name):
    expected = load(name)
    sets, coco_images, image_root, data_dir = TREES[tree]
    moved = {
        f"annotations_resc/{path.name}": f"{sets}/{path.name}" for path in (folder / "annotations_resc").iterdir()
    }
    moved |= {"refcoco/images/train2014": coco_images, "referit/images": f"{image_root}/referit/images"}
    moved |= {"flickr30k/f30k_images": f"{image_root}/Flickr30k/flickr30k-images"}
    other = tmp_path / "other"
    for source, target in moved.items():
        (other / target).parent.mkdir(parents=True, exist_ok=True)
        (folder / source).rename(other / target)
    settings = {"data_dir": str(other / data_dir), "cache_dir": str(tmp_path / "other_cache")}
    rows = data_scripts.load(name, **settings)
    assert list(rows) == list(expected)
    for split, part in expected.items():
        assert rows[split].remove_columns("image")[:] == part.remove_columns("image")[:]
        assert all(row["image"].size == (row["width"], row["height"]) for row in rows[split])
    (path,) = (other / sets / name.removeprefix("resc_")).glob("*_val.pth")
    path.unlink()
    with pytest.raises(OSError, match=rf"(?s){path.name}.*<set>/<set>_<split>\.pth.*Living copies: linhuixiao/OneRef"):
        data_scripts.load(name, **settings)


def test_builder_truncates_boxes_with_integer_boxes_flag(load):
    assert load("resc_unc", "val", integer_boxes=True)[0]["objects"][0]["box"] == FACTS["coco_box_whole_xyxy"]
    boxes = [item["box"] for item in load("reftr_refcoco_unc", "val", integer_boxes=True)[0]["objects"]]
    assert boxes == [[10, 20, 41, 37], [0, 0, 10, 10]]
    caption = load("reftr_flickr", "val", integer_boxes=True)[0]
    assert [item["box"] for item in caption["objects"]] == [[1, 2, 30, 20], [5, 6, 10, 12]]


def test_builder_gives_captions_their_phrases(load):
    rows = load("reftr_flickr")
    assert set(rows) == {"train", "val", "test", "trainval"}
    row, twice = rows["test"]
    assert texts([row]) == [["A man with two buses .", "by a man ."]]
    spans = [[(p["start"], p["end"], p["objects"]) for p in sentence["phrases"]] for sentence in row["sentences"]]
    assert spans == [[(0, 5, [0]), (11, 20, [1])], [(3, 8, [0])]]
    assert [item["box"] for item in row["objects"]] == [[1, 2, 30, 20], [5.5, 6, 10, 12]]
    assert [(p["start"], p["end"], p["objects"]) for p in twice["sentences"][0]["phrases"]] == [
        (0, 5, [0]),
        (6, 11, [1]),
    ]
    assert [item["box"] for item in twice["objects"]] == [[0, 0, 5, 5], [9, 9, 20, 60]]


@pytest.mark.parametrize("name", MASK_SPLITS)
def test_builder_reads_masks_from_files(load, name):
    rows = load(f"reftr_{name}", "train")
    first, second, third = rows
    assert [item["box"] for item in first["objects"]] == [FACTS["coco_box_xyxy"], [0, 0, 10, 10]]
    assert texts(rows) == [["blue shirt", "the lady train", "nothing to see"], ["left man"], ["a café"]]
    assert (decode(first["objects"][0]["segmentation"]) == rectangle(48, 64, (10, 20, 41, 37))).all()
    assert (decode(second["objects"][0]["segmentation"]) == rectangle(30, 40, (5, 5, 15, 15))).all()
    assert (decode(third["objects"][0]["segmentation"]) == rectangle(50, 30, (2, 3, 22, 43))).all()
    assert first["objects"][1]["segmentation"] is None  # an empty mask


def test_builder_aligns_mask_with_oriented_image(load, folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = folder / "refcoco" / "images" / "train2014" / COCO
    Image.new("RGB", (48, 64)).save(path, exif=exif)  # upright 64 x 48, as in cv2 and the masks
    row = load("reftr_refcoco_unc", "train")[0]
    assert (row["width"], row["height"]) == (64, 48)
    # the image is not turned if only its stored size agrees with the mask
    Image.new("RGB", (64, 48)).save(path, exif=exif)
    row = load("reftr_refcocog_umd", "train")[0]
    assert (row["width"], row["height"]) == (64, 48)


@pytest.mark.parametrize("size", [(31, 40), (40, 30)])
def test_builder_refuses_mask_of_another_size(load, folder, size):
    np.save(folder / "refcoco/masks/refcoco/1.npy", np.ones(size))
    message = rf"mask '1\.npy' has .* {re.escape(str(size))} and its image .*000009\.jpg' \(30, 40\)"
    with pytest.raises(ValueError, match=message):
        load("reftr_refcoco_unc", "train")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.row("S8")
def test_builder_refuses_hostile_masks(load, folder, tmp_path):
    path = folder / "refcoco/masks/refcoco/1.npy"
    np.save(path, np.array([[Evil(tmp_path / "ran")]], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"1\.npy' is refused: it contains objects"):
        load("reftr_refcoco_unc")
    with path.open("wb") as file:  # the bare pickle
        pickle.dump(Evil(tmp_path / "ran"), file)
    with pytest.raises((OSError, ValueError), match=r"1\.npy' is (refused|damaged)"):
        load("reftr_refcoco_unc")
    np.lib.format.write_array_header_1_0(
        path.open("wb"), {"descr": "|u1", "fortran_order": False, "shape": (10**6,) * 2}
    )
    with pytest.raises(OSError, match=r"1\.npy' is damaged"):
        load("reftr_refcoco_unc")
    np.save(path, np.ones((2, 30, 40)))
    with pytest.raises(ValueError, match=r"1\.npy' is float64 of \(2, 30, 40\); expected numbers of \(H, W\)"):
        load("reftr_refcoco_unc")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.row("S1")
def test_builder_refuses_hostile_indexes(load, folder, tmp_path, legacy):
    path = folder / "annotations_resc/unc/unc_val.pth"
    for call in (Evil(tmp_path / "ran"), subprocess.Popen, eval, operator.attrgetter, torch.hub.load):
        save([(COCO, "", [1, 2, 3, 4], "words", call)], path, legacy)
        with pytest.raises(ValueError, match=r"unc_val\.pth' is refused: it asks for"):
            load("resc_unc")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("function", "name"),
    [(getattr, "builtins.getattr"), (np.fromfile, "numpy.fromfile"), (torch.hub.load, "torch.hub.load")],
)
def test_builder_refuses_index_naming_function_of_allowed_package(load, folder, function, name):
    path = folder / "annotations_resc/unc/unc_train.pth"
    path.write_bytes(pickle.dumps([(COCO, "", [1, 2, 3, 4], "words", function)], protocol=4))
    message = rf"unc_train\.pth' is refused: it asks for {re.escape(name)}, "
    with pytest.raises(ValueError, match=message):
        read_pickle(path)
    with pytest.raises(ValueError, match=message):
        load("resc_unc")


class OrderedDictOf:
    """Pickle as an `OrderedDict` of the given pairs."""

    def __init__(self, *pairs):
        self.pairs = pairs

    def __reduce__(self):
        return OrderedDict, (list(self.pairs),)


def test_read_pickle_refuses_colliding_integer_key(folder):
    path = folder / "annotations_resc/unc/unc_train.pth"
    path.write_bytes(pickle.dumps(OrderedDictOf((2**61, 1)), protocol=4))
    with pytest.raises(ValueError, match=f"has the key {2**61}; expected text or a number"):
        read_pickle(path)


@pytest.mark.parametrize("legacy", [True, False])
def test_read_pickle_turns_tensors_into_arrays(tmp_path, legacy):
    base = torch.arange(12.0)
    parts = [base.view(3, 4)[1], base[2:6], torch.tensor(3.5), base.half(), torch.zeros(0, 4)]
    records = [("a.jpg", torch.tensor([[1, 2, 3, 4]])), *parts]
    save(records, tmp_path / "index.pth", legacy)
    (_, box), *read = read_pickle(tmp_path / "index.pth")
    assert box.tolist() == [[1, 2, 3, 4]]
    assert [array.tolist() for array in read] == [tensor.tolist() for tensor in parts]
    save([base.view(3, 4).T], tmp_path / "index.pth", legacy)
    with pytest.raises(OSError, match="is not contiguous"):
        read_pickle(tmp_path / "index.pth")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ((COCO, "", [1, 2, 3, 4], "words"), "record 1: .* expected \\(image, _, box, text, _\\)"),
        (COCO, "record 1: .* expected"),
        (
            ("../secret.jpg", "", [1, 2, 3, 4], "words", ""),
            "'../secret.jpg' is not a file of the image folder",
        ),
        (
            ("/etc/secret.jpg", "", [1, 2, 3, 4], "words", ""),
            "'/etc/secret.jpg' is not a file of the image folder",
        ),
        (("..\\secret.jpg", "", [1, 2, 3, 4], "words", ""), "is not a file of the image folder"),
        ((7, "", [1, 2, 3, 4], "words", ""), "7 is not a file of the image folder"),
        ((COCO, "", [1, 2, 3], "words", ""), "record 1: 1 starts, 1 phrases and 1 boxes of four numbers, .* expected"),
        ((COCO, "", None, "words", ""), "record 1: .*; expected"),
        ((COCO, "", [1, 2, 3, 4], None, ""), "record 1: its text is None"),
    ],
)
def test_builder_names_wrong_records(load, folder, record, reason):
    save([(COCO, "", [1, 2, 3, 4], "words", ""), record], folder / "annotations_resc/unc/unc_val.pth")
    with pytest.raises(ValueError, match=f"unc_val.*{reason}"):
        load("resc_unc")


def test_builder_names_index_damaged_or_not_a_list(load, folder):
    path = folder / "annotations_resc/unc/unc_val.pth"
    save({"a": 1}, path)
    with pytest.raises(ValueError, match=r"unc_val\.pth' is {'a': 1}; expected a list of records"):
        load("resc_unc")
    original = path.read_bytes()
    for content in (b"", original[: len(original) // 2], b"<html>sign in</html>"):
        path.write_bytes(content)
        with pytest.raises(OSError, match=r"unc_val\.pth' is damaged"):
            load("resc_unc")


@pytest.mark.row("R6")
def test_builder_drops_and_counts_bad_boxes_and_texts(load, folder, caplog):
    nan = float("nan")
    boxes = [[nan, 2, 3, 4], [9, 9, 0, 4], [9, 9, -4, 4], [500, 2, 3, 4], [1, 2, float("inf"), 4], [-5, -5, 10, 10]]
    records = [(COCO, "", box, f"number {number}", "") for number, box in enumerate(boxes)]
    records += [(COCO, "", [1, 2, 3, 4], text, "") for text in ("", " \t\n", "🙂" * 3, "a" * 10_000)]
    records += [(COCO_GREY, "", [9, 9, 0, 0], "an only one", "")]
    save(records, folder / "annotations_resc/unc/unc_val.pth")
    with caplog.at_level(logging.WARNING, "data_scripts.building"):
        (row,) = load("resc_unc")["val"]
    assert [len(sentence["text"]) for sentence in row["sentences"]] == [8, 8, 3, 10_000]
    assert row["positions"] == [4, 5, 8, 9]
    assert [item["box"] for item in row["objects"]] == [[1, 2, 64, 6], [0, 0, 5, 5], [1, 2, 4, 6]]
    message, changes = [record.getMessage() for record in caplog.records if " val: " in record.getMessage()]
    assert "val: 2 boxes are cut at their image's edge." in changes
    for reason in (
        "2 expressions without words",
        "5 expressions without a box",
        "5 boxes of which nothing is in the image",
        "1 images without an expression",
    ):
        assert reason in message


@pytest.mark.row("R6")
def test_builder_with_integer_boxes_keeps_empty_boxes_and_masks(load, folder, caplog):
    """The published evaluation counts empty boxes and masks as misses; invalid boxes are dropped all the same."""
    boxes = [[10.2, 9, 0.7, 4], [9, 9, 0, 4], [500, 2, 3, 4], [9, 9, -4, 4], [float("nan"), 2, 3, 4], [1, 2, 3, 4]]
    records = [(COCO, "", box, f"number {number}", "") for number, box in enumerate(boxes)]
    save(records, folder / "annotations_resc/unc/unc_val.pth")
    for flags, kept in (({}, [0, 5]), ({"integer_boxes": True}, [0, 1, 2, 5])):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "data_scripts.building"):
            (row,) = load("resc_unc", **flags)["val"]
        assert row["positions"] == kept
        assert ("3 boxes without extent are kept, to be counted as misses" in caplog.text) == bool(flags)
    assert [item["box"] for item in row["objects"]] == [[10, 9, 10, 13], [9, 9, 9, 13], [64, 2, 64, 6], [1, 2, 4, 6]]

    for flags in ({}, {"integer_boxes": True}):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "data_scripts.building"):
            row = load("reftr_refcoco_unc", **flags)["val"][0]
        (item,) = [item for item in row["objects"] if item["box"] == [0, 0, 10, 10]]
        assert (item["segmentation"] is not None) == bool(flags)
        assert ("1 masks without a pixel are kept, to be counted as misses" in caplog.text) == bool(flags)
    assert not decode_segmentation(item["segmentation"]).any()


def test_builder_drops_empty_box_from_trainval_but_keeps_it_in_val(load, folder):
    records = [(COCO, "", box, text, "") for box, text in (([9, 9, 0, 4], "a line"), ([1, 2, 3, 4], "a box"))]
    save(records, folder / "annotations_resc/unc/unc_val.pth")
    rows = load("resc_unc", integer_boxes=True)
    assert texts(rows["val"]) == [["a line", "a box"]]
    (row,) = [row for row in rows["trainval"] if "a box" in texts([row])[0]]
    assert "a line" not in texts([row])[0]
    assert all(item["box"][0] < item["box"][2] for item in row["objects"])


@pytest.mark.row("R6")
def test_builder_keeps_only_valid_boxes_of_10000_random_ones(load, folder, caplog):
    rng = np.random.default_rng(0)
    boxes = rng.normal(20, 40, size=(10_000, 4)).round(1)
    boxes[rng.random(boxes.shape) < 0.02] = np.nan
    boxes[rng.random(boxes.shape) < 0.02] = np.inf
    records = [(COCO, "", box, f"number {number}", "") for number, box in enumerate(boxes)]
    save(records, folder / "annotations_resc/unc/unc_val.pth")
    with caplog.at_level(logging.WARNING, "data_scripts.building"):
        (row,) = load("resc_unc", "val")
    kept = np.array([item["box"] for item in row["objects"]])
    assert np.isfinite(kept).all()
    assert (kept >= 0).all()
    assert (kept <= [64, 48, 64, 48]).all()
    assert (kept[:, :2] < kept[:, 2:]).all()
    (number,) = set(re.findall(r" val: left out (\d+) boxes of which nothing is in the image", caplog.text))
    assert len(row["sentences"]) + int(number) == 10_000
    assert 1_000 < len(row["sentences"]) < 9_000


def test_builder_drops_phrases_at_wrong_position(load, folder, caplog):
    starts, phrases = [0, 11, 90, -5], ["A man", "Two Buses", "bus", "bus"]
    record = ("36979.jpg", starts, [[1, 2, 30, 20]] * 4, phrases, None, "A man with two buses .")
    save([record], folder / "annotations/flickr/flickr_val.pth")
    with caplog.at_level(logging.WARNING, "data_scripts.building"):
        (row,) = load("reftr_flickr")["val"]
    assert [(phrase["start"], phrase["end"]) for phrase in row["sentences"][0]["phrases"]] == [(0, 5), (11, 20)]
    assert "2 phrases that are not at their position in the sentence" in caplog.text


@pytest.mark.row("R1")
def test_builder_names_missing_files_before_writing(load, folder, tmp_path):
    (folder / "refcoco/masks/refcoco/1.npy").unlink()
    with pytest.raises(OSError, match=r"(?s)1 masks of 'reftr_refcoco_unc'.*1\.npy.*ubc-vision/RefTR"):
        load("reftr_refcoco_unc")
    (folder / "refcoco/images/train2014" / COCO).unlink()
    with pytest.raises(OSError, match=rf"(?s)1 images of 'resc_unc'.*{COCO}.*READMEs"):
        load("resc_unc")
    (folder / "annotations_resc/unc/unc_testB.pth").unlink()
    with pytest.raises(OSError, match=r"(?s)'resc_unc' requires files that do not exist.*unc_testB\.pth"):
        load("resc_unc")
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_builder_with_changed_files_rebuilds_cache(load, folder):
    assert texts(load("reftr_refcoco_unc", "val"))[1] == ["left man"]
    path = folder / "refcoco/anns/refcoco/refcoco_unc_val.pth"
    save([(COCO, "0.npy", [1, 2, 3, 4], "another")], path)
    assert texts(load("reftr_refcoco_unc", "val")) == [["another"]]
    np.save(folder / "refcoco/masks/refcoco/0.npy", rectangle(48, 64, (0, 0, 1, 2)))
    segmentation = load("reftr_refcoco_unc", "val")[0]["objects"][0]["segmentation"]
    assert coco_mask.area({**segmentation, "counts": segmentation["counts"].encode()}) == 2


def test_builder_finds_images_in_given_image_dir(load, folder, tmp_path):
    (folder / "referit/images").rename(tmp_path / "elsewhere")
    rows = load("resc_referit", "test", image_dir=str(tmp_path / "elsewhere"))
    assert rows[0]["image"].size == (48, 36)


def test_builder_gives_same_rows_in_processes_and_streaming(load, folder, tmp_path):
    rows = load("reftr_refcoco_unc", "train")
    flags = {"config_name": "reftr_refcoco_unc", "data_dir": str(folder), "cache_dir": str(tmp_path / "other")}
    builder = RefTRIndex(**flags)
    builder.download_and_prepare(num_proc=2)
    assert builder.as_dataset(split="train").to_dict() == rows.to_dict()
    streamed = list(builder.as_streaming_dataset(split="train"))
    assert [row["sentences"] for row in streamed] == rows["sentences"][:]


@pytest.mark.row("R5")
def test_collator_truncates_long_captions_and_masks_their_phrases(load, folder, processor):
    caption = "a man " * 100
    record = ("36979.jpg", [0, 594], [[1, 2, 30, 20]] * 2, ["a man", "a man"], None, caption)
    save([record], folder / "annotations/flickr/flickr_val.pth")
    rows = load("reftr_flickr", "val")
    batch = GroundingCollator(processor)([rows[0]])
    assert batch["input_ids"].shape[1] <= 64
    # the second phrase lies after the truncation and is empty
    assert batch["phrase_spans"][0, 0, 0] == 1
    assert batch["phrase_spans"][0, 1].tolist() == [0, 1]
    assert batch["phrase_attention_mask"][0, 1].sum() == 2
