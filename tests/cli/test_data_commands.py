"""`reftr data` as a user types it, on drawn shapes and on a small source of files."""

import base64
import copy
import io
import json
import os
import random
import signal
import subprocess
import sys
import time

import datasets
import numpy as np
import pytest
from huggingface_hub import DatasetCard, HfApi
from PIL import Image
from pycocotools import mask as coco_mask

from data_scripts import FEATURES, SOURCES, exporting, load
from data_scripts.checking import is_box_within
from data_scripts.reports import compute_statistics
from modeling_reftr.drawing_reftr import draw_answers
from reftr_cli import preview
from reftr_cli.data_commands import push_export
from tests.helpers.layout_hub import encoded, write_layout
from tests.helpers.layout_toy import make_row, make_toy, save_picture
from tests.helpers.local_hub import Hub
from tests.helpers.tiny import ROOT


WITH_TOY = "-m", "tests.helpers.toy_command"
SMALL = ("--num_train", "4", "--num_validation", "2", "--num_test", "2", "--image_size", "64")


@pytest.fixture
def command(run, tmp_path):
    """Return a function that runs a command on the toy source in a folder, with its own cache."""

    def run_command(name, *argv, folder=tmp_path / "toy", check=True, **environment):
        folders = ("--data_dir", folder, "--cache_dir", tmp_path / "cache")
        path = {"PYTHONPATH": ROOT} if environment else {}
        return run(*WITH_TOY, name, "toy", *folders, *argv, check=check, **path, **environment)

    return run_command


@pytest.fixture
def toy(tmp_path):
    (tmp_path / "toy").mkdir()
    return tmp_path / "toy"


def refused(result, *parts):
    """Check that a command failed with a sentence and without a traceback; return the sentence."""
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    errors = result.stderr[result.stderr.index("error: ") :]
    for part in parts:
        assert part in errors
    return errors


@pytest.mark.parametrize("name", [None, "list", "build", "check", "export", "preview", "stats", "import", "held_out"])
def test_data_command_help_fits_screen(run, name):
    result = run("-m", "reftr_cli", "data", *([name] if name else []), "--help", COLUMNS="80")
    assert len(result.stdout.splitlines()) <= 40
    assert "usage: reftr data" in result.stdout


def test_list_shows_datasets_and_their_flags(run, command, toy):
    lines = run("-m", "reftr_cli", "data", "list", COLUMNS="80").stdout.splitlines()
    assert lines[0].split()[:4] == ["name", "images", "expressions", "splits"]
    assert any(line.startswith("shapes ") for line in lines)
    assert max(map(len, lines)) <= 80
    details = run("-m", "reftr_cli", "data", "list", "shapes").stdout
    assert "--image_size (96)" in details
    assert "at least 32" in details
    refused(run("-m", "reftr_cli", "data", "list", "shape", check=False), "There is no dataset 'shape'", "shapes")


def test_list_tells_origin_of_files(run):
    details = run(*WITH_TOY, "list", "toy").stdout
    for part in ("testA.json", "pictures/", "made by the tests", "--limit (0)"):
        assert part in details
    assert ["testA", "2", "-", "-"] in [line.split() for line in details.splitlines()]


def test_build_prints_counts_next_to_published_ones(command, toy):
    make_toy(toy)
    lines = command("build", "--num_proc", "2").stdout.splitlines()
    assert lines[1].split() == ["train", "6", "6", "6", "6", "6", "6"]
    assert lines[2].split() == ["testA", "2", "2", "2", "-", "2", "-"]
    lines = command("build", "--limit", "1", "--prefix=see: ").stdout.splitlines()
    assert lines[1].split() == ["train", "1", "6", "1", "6", "1", "6"]


def test_data_commands_refuse_wrong_arguments(command, toy):
    make_toy(toy)
    refused(command("build", "--limits", "3", check=False), "'--limits'", "--limit, --prefix")
    refused(command("build", "again", check=False), "'again'")
    refused(command("build", "--num_proc", "0", check=False), "--num_proc 0")
    refused(command("preview", "--output", "x.png", "--split", "dev", check=False), "no split 'dev'", "train, testA")
    refused(command("build", "--limit", "[", check=False), "--limit '['")


def test_build_names_missing_files_and_images(command, toy):
    sentence = refused(command("build", check=False), "train.json", "Ask the tests")
    assert str(toy) in sentence
    make_toy(toy)
    for index in range(3):
        (toy / f"pictures/train_{index}.jpg").unlink()
    refused(command("build", check=False), "3 images", "train_0.jpg", "train_2.jpg")


@pytest.mark.parametrize("num_proc", [1, 2])
def test_build_ends_with_error_sentence_of_builder(command, toy, num_proc):
    rows = {"train": [make_row("train", i) for i in range(3)], "testA": [make_row("testA", 0)]}
    rows["train"][1]["image_id"] = "raises"
    make_toy(toy, rows)
    errors = refused(command("build", "--num_proc", num_proc, check=False))
    assert errors.strip().endswith("error: The row 'raises' cannot be read: take it out.")


def break_images(folder, rows) -> list[str]:
    """Break the image of each row, in five alternating ways; return their names."""
    for index, row in enumerate(rows):
        path = folder / row["image"]
        content = path.read_bytes()
        share = (0, 0.3, 0.9, 0.999)
        path.write_bytes(b"not an image" if index % 5 == 4 else content[: int(len(content) * share[index % 5])])
    return [row["image"] for row in rows]


@pytest.mark.row("R2")
def test_build_and_check_find_only_broken_images(command, toy, record_property):
    """All of 20 broken images are found, with no false alarm in 1,000."""
    rows = {"train": [make_row("train", index) for index in range(1020)], "testA": [make_row("testA", 0)]}
    make_toy(toy, rows)
    for index, row in enumerate(rows["train"][:400]):  # every common way of storing images
        settings = [{"progressive": True}, {"quality": 40, "subsampling": 2}, {"optimize": True}, {"comment": b"x"}]
        save_picture(toy / row["image"], seed=index, **settings[index % 4])
    for row in rows["train"][400:420]:
        Image.open(toy / row["image"]).convert("CMYK").save(toy / row["image"])
    for row in rows["train"][420:440]:
        Image.open(toy / row["image"]).convert("L").save(toy / row["image"])
    assert "All images decode." in command("build", "--verify", "--num_proc", "2").stdout
    broken = break_images(toy, random.Random(0).sample(rows["train"], 20))
    sentence = refused(command("build", check=False))  # only the headers are read
    assert all(name in sentence for name in (*broken[0::5], *broken[4::5]))
    sentence = refused(command("build", "--verify", "--num_proc", "2", check=False), "20 images")
    record_property("counted", (sum(name in sentence for name in broken), len(broken)))
    assert all(name in sentence for name in broken)
    result = command("check", "--json", toy / "report.json", "--num_proc", "2", check=False)
    errors = json.loads((toy / "report.json").read_text())["errors"]
    assert result.returncode == 1
    assert [item["kind"] for item in errors] == ["picture"] * 20
    assert all(any(name in item["message"] for item in errors) for name in broken)


def spoil(rows):
    """Put one fault of each kind into rows; return [(kind, image id, part of the message)]."""
    train = rows["train"]
    expected = []

    def fault(index, kind, part):
        expected.append((kind, train[index]["image_id"], part))
        return train[index]["objects"][0], train[index]["sentences"][0]

    fault(0, "box", "48 x 32")[0].update(box=[10, 8, 60, 20], boxes=[[10, 8, 60, 20]], segmentation=None)
    fault(1, "box", "not a box")[0].update(box=[30, 8, 10, 20], boxes=[[30, 8, 10, 20]], segmentation=None)
    fault(2, "box", "nan")[0].update(box=[float("nan")] * 4, segmentation=None)
    fault(3, "box", "union")[0].update(boxes=[[10.4, 8.2, 20, 20]])
    fault(4, "mask", "[32, 47]")[0]["segmentation"]["size"] = [32, 47]
    fault(5, "mask", "more than 2 pixels")[0].update(box=[10, 8, 37, 20], boxes=[[10, 8, 37, 20]])
    fault(6, "mask", "runs cover 1488")[0]["segmentation"]["counts"] = empty_counts(height=31)
    fault(7, "mask", "no pixel")[0]["segmentation"]["counts"] = empty_counts(height=32)
    fault(8, "phrase", "contains no word")[1]["phrases"][0].update(start=3, end=4)
    fault(9, "phrase", "not a span")[1]["phrases"][0].update(end=999)
    fault(10, "phrase", "[1]")[1]["phrases"][0].update(objects=[1])
    fault(11, "phrase", "names an object twice")[1]["phrases"][0].update(objects=[0, 0])
    fault(12, "sentence", "blank")[1].update(text=" ")
    fault(13, "picture", "48 x 32")
    train[13].update(width=47)
    train[13]["objects"][0]["segmentation"] = None
    fault(14, "mask", "run-length")[0]["segmentation"]["counts"] = "\u00e9\u00e9"
    return expected


def empty_counts(height):
    return coco_mask.encode(np.zeros((height, 48), np.uint8, order="F"))["counts"].decode()


def test_check_finds_every_kind_of_fault(command, toy):
    rows = {"train": [make_row("train", index) for index in range(40)], "testA": [make_row("testA", 0)]}
    expected = spoil(rows)
    rows["train"][20]["image_id"] = rows["train"][21]["image_id"]
    rows["train"][22]["sentences"][0]["sentence_id"] = rows["train"][23]["sentences"][0]["sentence_id"]
    rows["train"][24]["objects"][0]["object_id"] = rows["train"][25]["objects"][0]["object_id"]
    rows["testA"].append({**copy.deepcopy(rows["train"][30]), "objects": [], "sentences": []})
    rows["train"][31]["sentences"][0]["phrases"] = []
    make_toy(toy, rows)
    path = toy / rows["train"][35]["image"]
    path.write_bytes(path.read_bytes()[:-20])
    expected.append(("picture", "train_35", "damaged"))

    result = command("check", "--json", toy / "report.json", "--num_proc", "2", "--limit", "2", check=False)
    assert result.returncode == 1
    report = json.loads((toy / "report.json").read_text())
    assert {(item["kind"], item["image_id"]) for item in report["errors"]} == {
        *((kind, image_id) for kind, image_id, _ in expected),
        ("id", None),
    }
    for kind, image_id, part in expected:
        assert any(
            (item["kind"], item["image_id"]) == (kind, image_id) and part in item["message"]
            for item in report["errors"]
        ), (kind, image_id, part)
    assert len([item for item in report["errors"] if item["kind"] == "id"]) == 3
    warnings = [item["message"] for item in report["warnings"]]
    assert "1 image_ids are in 'train' as well" in warnings
    assert "1 sentences have no phrase" in warnings
    assert "40 images, published are 6" in warnings
    assert report["splits"]["testA"] == {
        "images": 2,
        "objects": 1,
        "expressions": 1,
        "published": {"images": 2, "objects": None, "expressions": None},
    }
    assert f"{len(report['errors'])} errors" in result.stdout
    assert "error: mask: 5\n" in result.stdout
    assert "... and 3 more" in result.stdout
    one_process = command("check", "--limit", "2", check=False)
    assert one_process.stdout == result.stdout


@pytest.mark.parametrize(
    ("box_xyxy", "expected"), [([0, 0, 40, 30], True), ([0, 0, 10, 31], False), ([0, 0, 41, 30], False)]
)
def test_is_box_within_rejects_box_past_edge(box_xyxy, expected):
    assert is_box_within(box_xyxy, 40, 30) is expected


def test_check_accepts_valid_rows(command, toy, run, tmp_path):
    rows = {"train": [make_row("train", index) for index in range(6)], "testA": [make_row("testA", 0)]}
    rows["train"][0]["objects"][0]["segmentation"] = None
    rows["train"][2]["sentences"][0]["phrases"][0]["objects"] = []  # nothing is meant
    make_toy(toy, rows)
    # stored rotated, with its EXIF tag: the row has the upright size
    exif = Image.Exif()
    exif[0x0112] = 6
    save_picture(toy / rows["train"][1]["image"], size=(32, 48), exif=exif.tobytes())
    result = command("check")
    assert "toy: 0 errors, 1 warnings." in result.stdout
    assert "warning: count: 1" in result.stdout
    result = run("-m", "reftr_cli", "data", "check", "shapes", *SMALL, "--cache_dir", tmp_path / "cache")
    assert result.stdout.endswith("shapes: 0 errors, 0 warnings.\n")


@pytest.mark.parametrize("num_proc", [1, 2])
def test_export_loads_with_plain_datasets(command, toy, tmp_path, num_proc):
    rows = make_toy(toy)
    output = tmp_path / "export"
    printed = command("export", "--output", output, "--num_proc", num_proc).stdout
    assert str(output) in printed
    snippet = (output / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {}
    exec(snippet, names)
    assert names["rows"]["image_id"][:] == [row["image_id"] for row in rows["train"]]
    loaded = datasets.load_dataset(str(output), cache_dir=str(tmp_path / "other"))
    assert list(loaded) == ["train", "testA"]
    assert loaded["testA"].features == FEATURES
    stored = loaded["train"].cast_column("image", datasets.Image(decode=False))
    for row, original in zip(stored, rows["train"], strict=True):
        assert row["image"]["bytes"] == (toy / original["image"]).read_bytes()
        assert row["image_id"] == original["image_id"]
        assert row["sentences"] == original["sentences"]
    assert loaded["train"][0]["image"].size == (48, 32)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cache", "export", "other", "toy"]
    card = (output / "README.md").read_text()
    assert "| train | 6 | 6 | 6 |" in card
    assert "made by the tests" in card


def test_export_by_path_stores_paths_and_refuses_drawn_images(command, toy, tmp_path, run):
    make_toy(toy)
    output = tmp_path / "export"
    command("export", "--output", output, "--by_path")
    loaded = datasets.load_dataset(str(output), split="testA", cache_dir=str(tmp_path / "other"))
    assert loaded.cast_column("image", datasets.Image(decode=False))[0]["image"] == {
        "bytes": None,
        "path": str(toy / "pictures/testA_0.jpg"),
    }
    assert loaded[0]["image"].size == (48, 32)
    drawn = run(
        *("-m", "reftr_cli", "data", "export", "shapes", *SMALL, "--cache_dir", tmp_path / "cache", "--by_path"),
        *("--output", tmp_path / "shapes"),
        check=False,
    )
    refused(drawn, "Leave out --by_path")
    assert not (tmp_path / "shapes").exists()


def test_export_shards_large_splits(toy, tmp_path, monkeypatch):
    make_toy(toy)
    monkeypatch.setattr(exporting, "MAX_SHARD_BYTES", 2000)
    rows = load("toy", data_dir=toy, cache_dir=str(tmp_path / "cache"))
    exporting.export_dataset(SOURCES["toy"], rows, tmp_path / "export")
    files = sorted(path.name for path in (tmp_path / "export/data").iterdir())
    assert len(files) > 3
    loaded = datasets.load_dataset(str(tmp_path / "export"), cache_dir=str(tmp_path / "other"))
    assert loaded["train"]["image_id"][:] == [f"train_{index}" for index in range(6)]


def test_export_appears_by_one_rename(toy, tmp_path, monkeypatch):
    """The folder that is written becomes the export, as a copy could be seen half written."""
    make_toy(toy)
    rows = load("toy", data_dir=toy, cache_dir=str(tmp_path / "cache"))
    folders = []

    def note_folder(path, *args):
        folders.append(path.parent.stat().st_ino)
        path.write_text("")

    monkeypatch.setattr(exporting, "write_dataset_card", note_folder)
    exporting.export_dataset(SOURCES["toy"], rows, tmp_path / "export")
    assert folders == [(tmp_path / "export").stat().st_ino]


def test_export_replaces_only_exports_and_only_on_request(command, toy, tmp_path):
    make_toy(toy)
    output = tmp_path / "export"
    command("export", "--output", output)
    refused(command("export", "--output", output, check=False), "exists", "--overwrite")
    command("export", "--output", output, "--limit", "1", "--overwrite")
    assert "`limit=1`" in (output / "README.md").read_text()
    (output / "mine.txt").write_text("mine")
    refused(command("export", "--output", output, "--overwrite", check=False), "more than an export")
    assert (output / "mine.txt").exists()


def test_failed_export_leaves_nothing(command, toy, tmp_path):
    make_toy(toy)
    command("build")
    (toy / "pictures/train_5.jpg").unlink()
    refused(command("export", "--output", tmp_path / "export", check=False), "train_5.jpg")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cache", "toy"]


def test_preview_draws_boxes_masks_and_text(command, toy, tmp_path, run):
    rows = {"train": [make_row("train", index) for index in range(6)], "testA": [make_row("testA", 0)]}
    item = rows["testA"][0]["objects"][0]
    item["boxes"] = [[10.4, 8.2, 15, 20], [20, 9, 29.8, 20]]
    make_toy(toy, rows)
    command("preview", "--output", tmp_path / "train.png", "--num", "5")
    image = Image.open(tmp_path / "train.png")
    assert image.width == 8 + 4 * 328
    command("preview", "--output", tmp_path / "test.png", "--split", "testA")
    pixels = np.asarray(Image.open(tmp_path / "test.png")).astype(int)
    color = (0xD8, 0x1B, 0xBD)
    scale = 320 / 48
    is_color = (pixels == color).all(axis=-1)
    near = slice(8 + round(9 * scale), 8 + round(12 * scale))
    assert is_color[8 + round(10 * scale) : 8 + round(18 * scale), near].any()  # left side of the box of all parts
    assert is_color.sum() > 50  # the box and its label
    first = (tmp_path / "train.png").read_bytes()
    command("preview", "--output", tmp_path / "train.png", "--num", "5")
    assert (tmp_path / "train.png").read_bytes() == first
    refused(command("preview", "--output", tmp_path / "train.nothing", check=False), ".nothing")
    refused(command("preview", "--output", tmp_path / "train.png", "--num", "0", check=False), "--num 0")


def test_preview_and_stats_take_all_objects_of_expressions(monkeypatch):
    boxes = [[1, 2, 10, 12], [20, 2, 29, 12]]
    fields = {"object_id": "", "category": None, "segmentation": None}
    objects = [{"box": box, "boxes": [box], **fields} for box in boxes]
    named = {"the left": [0], "both": [0, 1], "the dog": [], "no cat": []}
    sentences = []
    for text, indices in named.items():
        phrase = {"start": 0, "end": len(text), "objects": indices, "types": []}
        sentences.append({"sentence_id": text, "text": text, "phrases": [phrase]})
    picture = io.BytesIO()
    Image.new("RGB", (48, 32)).save(picture, "PNG")
    row = {"image_id": "1.png", "image": {"path": None, "bytes": picture.getvalue()}, "width": 48, "height": 32}
    rows = datasets.Dataset.from_list([{**row, "objects": objects, "sentences": sentences}])
    rows = rows.cast(datasets.Features({name: FEATURES[name] for name in rows.column_names}))
    drawn = []

    def draw(image, boxes_xyxy, phrases, *, title, **settings):
        drawn.append((dict(zip(phrases, boxes_xyxy, strict=True)), title))
        return draw_answers(image, boxes_xyxy, phrases, title=title, **settings)

    monkeypatch.setattr(preview, "draw_answers", draw)
    preview.draw_preview(rows, num=1, seed=0)
    ((found, title),) = drawn
    left, right = boxes
    assert found == {"the left": left, "both (1 of 2)": left, "both (2 of 2)": right}
    assert title in ("1.png - not there: the dog; no cat", "1.png - not there: no cat; the dog")
    statistics, _ = compute_statistics(rows)
    counted = {"expressions (phrases)": 4, "expressions with no target": 2, "expressions with several targets": 1}
    assert statistics.items() >= counted.items()


def test_stats_prints_statistics_of_each_split(command, toy):
    make_toy(toy)
    lines = command("stats").stdout.splitlines()
    statistics = {" ".join(line.split()[:-2]): line.split()[-2:] for line in lines if line}
    assert statistics["images"] == ["6", "2"]
    assert statistics["words per sentence, maximum"] == ["6", "6"]
    assert statistics["objects with a mask"] == ["100.0%", "100.0%"]
    assert "29 characters: the bright patch of picture 0" in lines


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


@pytest.mark.parametrize("layout", ["sample", "export"])
def test_data_commands_take_folders(shapes, run, tmp_path, layout):
    folder = tmp_path / "rows"
    if layout == "sample":
        write_layout(folder, "sample")
    else:
        exporting.export_dataset(SOURCES["shapes"], shapes, folder)
    cache = ("--cache_dir", tmp_path / "cache")
    printed = run("-m", "reftr_cli", "data", "check", folder, *cache).stdout
    assert f"{folder}: 0 errors, 0 warnings." in printed
    assert "expressions (phrases)" in run("-m", "reftr_cli", "data", "stats", folder, *cache).stdout
    run("-m", "reftr_cli", "data", "preview", folder, *cache, "--output", tmp_path / "samples.png")
    assert Image.open(tmp_path / "samples.png").width > 300
    reported = {"sample": "validation: 1 boxes are cut at their", "export": "left out and changed nothing"}[layout]
    assert reported in run("-m", "reftr_cli", "data", "build", folder, *cache).stdout
    result = run("-m", "reftr_cli", "data", "check", tmp_path / "none", *cache, check=False)
    refused(result, "There is no folder", "datasets.load_dataset")


@pytest.mark.slow
def test_data_commands_take_columns_of_a_pushed_dataset(hub, run, tmp_path, monkeypatch):
    hub.use(monkeypatch, "hf_write")
    rows = [{"photo": {"bytes": encoded(11), "path": None}, "said": "a cup", "at": [4, 6, 16, 24]}]
    (tmp_path / "rows").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows" / "train.parquet")
    api = HfApi(endpoint=hub.address, token="hf_write")
    api.create_repo("someone/photos", repo_type="dataset")
    commit = api.upload_folder(repo_id="someone/photos", repo_type="dataset", folder_path=tmp_path / "rows").oid
    online = hub.environment("hf_write", tmp_path / "home")
    command = ("-m", "reftr_cli", "data", "check", "someone/photos", "--cache_dir", tmp_path / "cache")
    refused(run(*command, check=False, **online), "has the columns photo, said, at", "columns: {image: image")
    flags = ("--columns", "{image: photo, text: said, box: at}", "--box_format", "xywh", "--revision", commit)
    assert "someone/photos: 0 errors" in run(*command, *flags, **online).stdout
    assert "someone/photos: 0 errors" in run(*command, *flags, **{**online, "HF_HUB_OFFLINE": "1"}).stdout
    refused(run(*command, "--column", "x", check=False, **online), "'--column'", "--columns, --box_format")


def test_list_names_living_copies_with_licences(run):
    lines = run("-m", "reftr_cli", "data", "list", COLUMNS="119").stdout.splitlines()
    (copy,) = [line for line in lines if line.startswith("moondream/refcoco-m")]
    assert copy.split()[1:3] == ["refcoco_unc", "MIT"]
    details = run("-m", "reftr_cli", "data", "list", "refcocog_umd").stdout
    assert "jxu124/refcocog" in details
    assert "CC BY 4.0" in details
    assert ["train", "21,899", "42,226", "80,512"] in [line.split() for line in details.splitlines()]


def test_missing_annotations_name_living_copies(run, tmp_path):
    result = run("-m", "reftr_cli", "data", "build", "refcoco_unc", "--data_dir", tmp_path, check=False)
    refused(result, "instances.json", "Living copies: jxu124/refcoco", "Apache-2.0", "moondream/refcoco-m")


def test_export_card_describes_terms_size_and_files(toy, tmp_path):
    make_toy(toy, {split: [make_row(split, 0)] for split in ("train", "testA")})
    loaded = load("toy", data_dir=toy, cache_dir=str(tmp_path / "cache"))
    splits = {"testA": loaded["testA"], "extra": loaded["testA"], "val": loaded["testA"], "train": loaded["train"]}
    exporting.export_dataset(SOURCES["toy"], splits, tmp_path / "export", license="cc-by-4.0", language="de")
    card = DatasetCard.load(tmp_path / "export" / "README.md").data
    assert (card.license, card.language, card.size_categories) == ("cc-by-4.0", ["de"], ["n<1K"])
    order = ["train", "val", "testA", "extra"]
    assert [part["split"] for part in card.configs[0]["data_files"]] == order
    info = card.dataset_info
    assert [(part["name"], part["num_examples"]) for part in info["splits"]] == [(name, 1) for name in order]
    assert info["download_size"] == sum(file.stat().st_size for file in (tmp_path / "export" / "data").iterdir())
    assert info["dataset_size"] == sum(part["num_bytes"] for part in info["splits"]) > 1000
    read = datasets.load_dataset(str(tmp_path / "export"), cache_dir=str(tmp_path / "other"))
    assert list(read) == order
    assert read["train"].features == FEATURES
    # the licence of a user's own data is unknown
    exporting.export_dataset(SOURCES["jsonl"], splits, tmp_path / "own")
    card = DatasetCard.load(tmp_path / "own" / "README.md").data
    assert (card.license, card.language) == ("unknown", ["und"])


@pytest.mark.slow
def test_export_pushes_to_hub_only_with_flag(command, toy, tmp_path, hub, run):
    make_toy(toy)
    online = hub.environment("hf_write", tmp_path / "home")
    command("export", "--output", tmp_path / "export", **online)
    assert hub.requests == []  # nothing is sent without the flag
    flags = ("--overwrite", "--push_to_hub", "someone/toy", "--private")
    printed = command("export", "--output", tmp_path / "export", *flags, **online).stdout
    assert "Pushed: " in printed
    assert hub.repositories["dataset", "someone/toy"].private
    files = hub.files("someone/toy", "dataset")
    for path in (tmp_path / "export").rglob("*"):
        if path.is_file():
            assert files.pop(path.relative_to(tmp_path / "export").as_posix()) == path.read_bytes()
            assert b"hf_write" not in path.read_bytes()
    # after the push, the card names the repository on the Hub and on disk
    assert 'load_dataset("someone/toy", split="train")' in (tmp_path / "export" / "README.md").read_text()
    assert set(files) == {".gitattributes"}
    load = "import datasets; print(len(datasets.load_dataset('someone/toy', split='testA')))"
    assert run("-c", load, **online).stdout.split() == ["2"]


@pytest.fixture
def exported(tmp_path, hub, monkeypatch):
    """Write a folder like an export and connect the client of this process to the local Hub."""
    hub.use(monkeypatch, "hf_write")
    monkeypatch.setattr("training_reftr.hub.WAITS", (0, 0))
    (tmp_path / "exported" / "data").mkdir(parents=True)
    for split in ("train", "testA"):
        (tmp_path / "exported" / "data" / f"{split}-00000-of-00001.parquet").write_bytes(split.encode() * 1000)
    (tmp_path / "exported" / "README.md").write_text("---\npretty_name: toy\n---\n# toy\n")
    return tmp_path / "exported"


def on_the_hub(hub):
    """Return path -> content of the dataset's files on the Hub."""
    return {path: content for path, content in hub.files("someone/toy", "dataset").items() if path[0] != "."}


def on_disk(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}


@pytest.mark.parametrize(
    ("token", "repository", "reason"),
    [
        ("", "someone/toy", "401"),
        ("hf_bad", "someone/toy", "Invalid credentials"),
        ("hf_read", "someone/toy", "you must use a write token"),
        ("hf_write", "other/toy", "namespace 'other'"),
    ],
    ids=["none", "bad", "read", "of_others"],
)
def test_push_export_without_rights_is_refused(exported, hub, monkeypatch, token, repository, reason):
    hub.use(monkeypatch, token)
    with pytest.raises(OSError, match=reason) as error:
        push_export(exported, repository)
    assert f"not pushed to {repository!r}" in str(error.value)
    assert not token or token not in str(error.value)
    assert not hub.repositories


@pytest.mark.parametrize("fault", ["status", "cut"])
@pytest.mark.parametrize("pattern", ["POST .*/repos/create", "POST .*/preupload/", "PUT", "POST .*/commit/"])
def test_push_export_with_failing_hub_raises_and_keeps_previous_files(exported, hub, fault, pattern):
    hub.fault(fault, pattern, times=100)
    with pytest.raises(OSError, match="was not pushed to 'someone/toy'"):
        push_export(exported, "someone/toy")
    assert not hub.repositories or on_the_hub(hub) == {}
    hub.faults.clear()
    assert push_export(exported, "someone/toy").endswith(hub.head("someone/toy", "dataset"))
    assert on_the_hub(hub) == on_disk(exported)
    # a dataset on the Hub stays if a later push fails
    former = on_disk(exported)
    for path in (exported / "data").iterdir():
        path.write_bytes(b"new content of " + path.name.encode())
    hub.fault(fault, pattern, times=100)
    with pytest.raises(OSError, match="was not pushed to 'someone/toy'"):
        push_export(exported, "someone/toy")
    assert on_the_hub(hub) == former


def test_push_export_names_repository_in_generated_card(exported, hub):
    """The card of an export names it; a card that a user has written stays unchanged."""
    card = f'---\npretty_name: toy\n---\n\nrows = load_dataset("{exported}", split="train")\n'
    (exported / "README.md").write_text(card)
    push_export(exported, "someone/toy")
    assert hub.files("someone/toy", "dataset")["README.md"].decode() == card
    (exported / "README.md").write_text(card + exporting.MARK)
    for repository in ("someone/toy", "someone/other"):
        push_export(exported, repository)
        pushed = hub.files(repository, "dataset")["README.md"]
        assert f'\nrows = load_dataset("{repository}", split="train")\n' in pushed.decode()
        assert str(exported) not in pushed.decode()
        assert (exported / "README.md").read_bytes() == pushed


def test_push_export_removes_files_of_previous_dataset(exported, hub):
    """After a push of two files per split and one of a single file, nothing is read twice."""
    for number in range(2):
        (exported / "data" / f"train-0000{number}-of-00002.parquet").write_bytes(b"half")
    (exported / "data" / "train-00000-of-00001.parquet").rename(exported / "single")
    push_export(exported, "someone/toy")
    assert sum(path.startswith("data/train") for path in on_the_hub(hub)) == 2
    for path in (exported / "data").glob("train-*-of-00002.parquet"):
        path.unlink()
    (exported / "single").rename(exported / "data" / "train-00000-of-00001.parquet")
    push_export(exported, "someone/toy")
    assert on_the_hub(hub) == on_disk(exported)


def test_push_export_refuses_public_repository_for_private_dataset(exported, hub):
    push_export(exported, "someone/toy")
    with pytest.raises(OSError, match="'someone/toy' is there and public"):
        push_export(exported, "someone/toy", private=True)


@pytest.mark.parametrize("kind", ["corrupt", "lose"])
def test_push_export_with_damaged_upload_raises(exported, hub, kind):
    hub.fault(kind, "PUT", times=100)
    with pytest.raises(OSError, match="was not pushed to 'someone/toy'"):
        push_export(exported, "someone/toy")
    assert on_the_hub(hub) == {}
    hub.faults.clear()
    push_export(exported, "someone/toy")
    assert on_the_hub(hub) == on_disk(exported)


@pytest.mark.parametrize("content", [None, b"---\n---\n# t"], ids=["missing", "short"])
def test_push_export_refuses_commit_with_other_files(exported, hub, monkeypatch, content):
    """The Hub reports success, but its commit lacks the card or contains half of it."""
    commit = hub.commit

    def commit_less(repository, items, *rest):
        kept = [item for item in items if item["value"].get("path") != "README.md"]
        if content is not None and len(kept) < len(items):
            value = {"path": "README.md", "content": base64.b64encode(content).decode()}
            kept.append({"key": "file", "value": value})
        return commit(repository, kept, *rest)

    monkeypatch.setattr(hub, "commit", commit_less)
    message = r"not pushed to 'someone/toy': the commit \w+ does not hold README\.md as they were sent"
    with pytest.raises(OSError, match=message):
        push_export(exported, "someone/toy")


@pytest.mark.parametrize("status", [500, 429])
def test_push_export_retries_if_hub_is_busy(exported, hub, status):
    fault = hub.fault("status", "POST .*/commit/", value=status)
    push_export(exported, "someone/toy")
    assert fault.happened == 1
    assert on_the_hub(hub) == on_disk(exported)


def test_push_export_survives_repeated_hub_errors(exported, hub):
    faults = [hub.fault("status", pattern, times=2) for pattern in ("/preupload/", "/objects/batch", "PUT")]
    push_export(exported, "someone/toy")
    assert [fault.happened for fault in faults] == [2, 2, 2]
    assert on_the_hub(hub) == on_disk(exported)


def test_export_without_network_is_kept_on_disk(command, toy, tmp_path):
    make_toy(toy)
    flags = ("--output", tmp_path / "export", "--push_to_hub", "someone/toy")
    refused(command("export", *flags, check=False), "complete", "'someone/toy'", "ush again")
    assert len(datasets.load_dataset(str(tmp_path / "export"), split="testA", cache_dir=str(tmp_path / "other"))) == 2
    assert "someone/toy" not in (tmp_path / "export" / "README.md").read_text()
    nowhere = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_secret"}
    result = command("export", *flags, "--overwrite", check=False, **nowhere)
    assert "hf_secret" not in refused(result, "complete", "ush again")
    refused(command("export", *flags, "--overwrite", "--by_path", check=False), "--by_path")
    refused(command("export", "--output", tmp_path / "other_export", "--private", check=False), "--private")


def test_export_embeds_images_without_files(run, tmp_path):
    """Images that are not files are embedded as well."""
    run(
        "-m",
        "reftr_cli",
        "data",
        "export",
        "shapes",
        *SMALL,
        "--cache_dir",
        tmp_path / "c",
        "--output",
        tmp_path / "out",
    )
    rows = datasets.load_dataset(str(tmp_path / "out"), split="test", cache_dir=str(tmp_path / "other"))
    content = rows.cast_column("image", datasets.Image(decode=False))[0]["image"]["bytes"]
    assert Image.open(io.BytesIO(content)).size == (64, 64)


def test_interrupted_build_ends_with_one_line(tmp_path):
    """Ctrl-C in a terminal reaches the worker processes of the build as well."""
    argv = [sys.executable, "-m", "reftr_cli", "data"]
    argv += ["build", "shapes", "--num_train", "200000", "--num_proc", "2", "--cache_dir", str(tmp_path)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(argv, cwd=ROOT, start_new_session=True, **streams)
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("*.arrow")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert output.splitlines()[-1] == "Interrupted."
    assert "KeyboardInterrupt" not in output


def test_interrupted_worker_reports_nothing_that_it_could_not_close():
    """Send Ctrl-C to a forked worker, in which closing a file then fails; the main process prints what it has to."""
    program = """
import os, signal
from reftr_cli.data_commands import quiet_forks

class File:
    def __del__(self):
        raise OSError("not closed")

with quiet_forks():
    if not (worker := os.fork()):
        os.kill(os.getpid(), signal.SIGINT)
        file = File()
        del file
        os._exit(0)
    os.waitpid(worker, 0)
file = File()
del file
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stderr.count("Exception ignored") == 1
