"""Datasets that are opened by their name: folders, datasets of the Hub, and the columns that they have."""

import datasets
import numpy as np
import pytest
from huggingface_hub import HfApi

import data_scripts
from data_scripts.checking import check
from data_scripts.exporting import export_dataset
from data_scripts.loading import find_source, load_with_report
from data_scripts.masks import decode_segmentation
from tests.helpers.layout_hub import (
    BOXES,
    SIZE,
    caption_row,
    encoded,
    file_name,
    question_row,
    refer_row,
    run_lengths,
    sample_row,
    save_images,
    texts_of,
    to_xywh,
    write_layout,
)
from tests.helpers.layout_refcoco import rectangle_mask
from tests.helpers.local_hub import Hub


@pytest.fixture
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def load(cache):
    """Return a function that loads a dataset with a cache of its own."""

    def load_cached(name, **flags):
        return data_scripts.load(str(name), cache_dir=cache, **flags)

    return load_cached


def contents(rows):
    """Return image id -> (boxes of the objects, texts) of rows."""
    return {
        row["image_id"]: (
            [item["box"] for item in row["objects"]],
            [(sentence["text"], sentence["phrases"][0]["objects"]) for sentence in row["sentences"]],
        )
        for row in rows.remove_columns("image")
    }


def expected(number, *indices, count=2):
    """Return the expectation of `contents` for objects of an image, which are cut at its edges."""
    width, height = SIZE
    boxes = [
        [max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)]
        for x0, y0, x1, y1 in (BOXES[number][index] for index in indices)
    ]
    texts = [(text, [position]) for position, index in enumerate(indices) for text in texts_of(number, index)[:count]]
    return boxes, texts


def test_refer_columns_are_read_by_the_authors_splits(load, tmp_path):
    """jxu124/refcoco calls val "validation" and testA "test", its boxes are xyxy, and polygons are in JSON texts."""
    folder = write_layout(tmp_path / "refcoco", "refer")
    rows = load(folder, data_dir=tmp_path)
    assert list(rows) == ["train", "val", "testA", "testB"]
    assert contents(rows["train"]) == {"coco_11": expected(11, 0, 1), "coco_12": expected(12, 0)}
    assert contents(rows["testA"]) == {"coco_13": expected(13, 0)}
    # the second reference to image 11 is the third of its split
    assert rows["train"]["positions"][:] == [[0, 1, 4, 5], [2, 3]]
    item = rows["train"][1]["objects"][0]
    assert np.array_equal(decode_segmentation(item["segmentation"]), rectangle_mask(SIZE, (10, 10, 22, 34)))
    assert rows["train"].features == data_scripts.FEATURES
    assert np.asarray(rows["val"][0]["image"]).shape == (SIZE[1], SIZE[0], 3)


def test_refer_columns_name_missing_images_and_their_origin(load, tmp_path):
    folder = write_layout(tmp_path / "refcoco", "refer")
    (tmp_path / "images" / "train2014" / file_name(12)).unlink()
    with pytest.raises(OSError, match=r"1 images of '.*refcoco' do not exist(.|\n)*000000000012.jpg(.|\n)*train2014"):
        load(folder, data_dir=tmp_path)
    # a split of other images does not require it
    assert len(load(folder, data_dir=tmp_path, split="testA")) == 1
    assert len(load(folder, image_dir=tmp_path / "images" / "train2014", split="testB")) == 1
    with pytest.raises(ValueError, match=r"no split 'test' in '.*refcoco'; there are: train, val, testA, testB"):
        load(folder, data_dir=tmp_path, split="test")


def test_refer_columns_without_image_folder_are_refused(load, hub, tmp_path):
    push(write_layout(tmp_path / "refcoco", "refer"), "someone/refcoco")
    with pytest.raises(ValueError, match=r"'someone/refcoco' has no images, .*give data_dir or image_dir"):
        load("someone/refcoco")
    assert len(load("someone/refcoco", data_dir=tmp_path)["train"]) == 2


def test_question_columns_do_not_call_their_mixed_val_val(cache, tmp_path):
    """lmms-lab/RefCOCO's val mixes two; the question is a prompt, boxes are xywh, polygons may be parts."""
    rows, report = load_with_report(str(write_layout(tmp_path / "q", "question")), cache_dir=cache)
    assert list(rows) == ["val_lmms_lab", "test", "testA"]
    found = contents(rows["val_lmms_lab"])
    assert found == {"coco_11": expected(11, 0, 1), "coco_12": expected(12, 0)}
    masks = [item["segmentation"] for item in rows["val_lmms_lab"][0]["objects"]]
    assert masks[0] is not None
    assert masks[1] is None
    assert report["val_lmms_lab"]["changed"] == {"objects lost a mask that is not of all their box": 1}
    assert report["test"]["changed"] == {"boxes are cut at their image's edge": 1}
    # the image of an object is stored once
    stored = rows["val_lmms_lab"].cast_column("image", datasets.Image(decode=False))
    assert stored[0]["image"]["bytes"] == encoded(11)


def test_sample_columns_give_masks_and_categories(load, tmp_path):
    """The row of moondream/refcoco-m is an image; its boxes are xywh, and its val is not called val."""
    folder = write_layout(tmp_path / "m", "sample")
    rows = load(folder)
    assert list(rows) == ["validation"]
    assert contents(rows["validation"]) == {
        f"coco_{number}": expected(number, *range(len(boxes))) for number, boxes in BOXES.items()
    }
    item = rows["validation"][0]["objects"][1]
    assert item["category"] == "cup"
    assert np.array_equal(decode_segmentation(item["segmentation"]), rectangle_mask(SIZE, (30, 8, 60, 40)))
    report = check(find_source(str(folder)), rows)
    assert report["errors"] == report["warnings"] == []


def test_caption_columns_join_captions_of_one_box(load, tmp_path):
    folder = write_layout(tmp_path / "l4", "caption")
    rows = load(folder, image_dir=tmp_path / "images" / "train2014")
    assert list(rows) == ["val", "test"]
    boxes, texts = expected(11, 0, count=1)
    texts.append(("a long caption of the same object", [0]))
    assert contents(rows["val"]) == {"coco_11": (boxes, texts), "coco_12": expected(12, 0, count=1)}


@pytest.mark.parametrize("layout", ["refer", "sample"])
def test_processes_share_the_images_of_a_split(tmp_path, layout):
    folder = write_layout(tmp_path / layout, layout)
    alone, shared = (
        data_scripts.load(
            str(folder), data_dir=str(tmp_path), cache_dir=str(tmp_path / f"cache_{count}"), num_proc=count
        )
        for count in (1, 2)
    )
    assert list(alone) == list(shared)
    for split, rows in alone.items():
        assert rows.remove_columns("image")[:] == shared[split].remove_columns("image")[:]


@pytest.mark.parametrize("layout", ["refer", "question", "sample", "caption"])
def test_check_accepts_each_layout(cache, tmp_path, layout):
    folder = write_layout(tmp_path / layout, layout)
    rows, report = load_with_report(str(folder), data_dir=str(tmp_path), cache_dir=cache)
    found = check(find_source(str(folder)), rows, build_report=report)
    assert found["errors"] == []


def test_boxes_in_another_convention_than_the_layout_are_refused(load, tmp_path):
    """A file of 2026 may differ from its description: the boxes are judged as they are written."""
    rows = [question_row(11, 0, bbox=[40 + index, 20, 62, 44], file_name=f"{index}.jpg") for index in range(20)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "val.parquet")
    with pytest.raises(ValueError, match="The boxes, said to be 'xywh', look like 'xyxy'"):
        load(tmp_path)


def test_values_of_another_kind_name_dataset_and_column(load, tmp_path):
    rows = [sample_row(11)]
    rows[0]["samples"][0]["bbox"] = [1.0, 2.0]
    message = r"validation_0: samples\[0\] has bbox=\[1.0, 2.0\]; expected four"
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "validation.parquet")
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_file_names_that_leave_their_folder_are_refused(load, tmp_path):
    save_images(tmp_path / "images")
    rows = [caption_row(11, 0, "val", file_name="../../secret.jpg")]
    (tmp_path / "rows").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows" / "val.parquet")
    with pytest.raises(ValueError, match=r"has file_name='\.\./\.\./secret.jpg'; expected the path of a file inside"):
        load(tmp_path / "rows", image_dir=tmp_path / "images")


def test_named_rows_count_dropped_annotations_by_reason(cache, tmp_path):
    row = sample_row(11)
    row["samples"][0]["sentences"] = ["  ", "kept"]
    row["samples"][1]["bbox"] = [100.0, 0.0, 5.0, 5.0]
    row["samples"][1]["mask"] = {"counts": "nonsense", "size": [48, 64]}
    datasets.Dataset.from_list([row, row | {"image_id": 12, "file_name": file_name(12), "samples": []}]).to_parquet(
        tmp_path / "validation.parquet"
    )
    rows, report = load_with_report(str(tmp_path), cache_dir=cache)
    assert contents(rows["validation"]) == {"coco_11": ([BOXES[11][0]], [("kept", [0])])}
    assert report == {
        "validation": {
            "left_out": {
                "boxes of which nothing is in the image": 1,
                "expressions of objects without a box in the image": 2,
                "expressions without words": 1,
                "images without an expression": 1,
            },
            "changed": {"objects lost a mask that is empty or cannot be read": 1},
        }
    }


def test_image_keeps_the_frame_that_it_is_annotated_in(load, tmp_path):
    """An EXIF orientation is followed unless only the stored size agrees with the annotated one; others are scaled."""
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / file_name(11)).write_bytes(encoded(11, orientation=6))  # annotated as stored
    (folder / file_name(12)).write_bytes(encoded(12, size=(SIZE[1], SIZE[0]), orientation=6))  # annotated upright
    (folder / file_name(13)).write_bytes(encoded(13, size=(32, 24)))  # annotated at twice its size
    rows = [caption_row(number, 0, "val") for number in BOXES]
    (tmp_path / "rows").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows" / "val.parquet")
    rows = load(tmp_path / "rows", image_dir=folder)["val"]
    assert [row["image"].size for row in rows] == [SIZE, SIZE, (32, 24)]
    assert rows[0]["objects"][0]["box"] == BOXES[11][0]
    assert rows[2]["objects"][0]["box"] == [0, 10, 15, 24]


def test_unknown_columns_are_listed_with_the_layouts_and_the_remedy(load, tmp_path):
    datasets.Dataset.from_dict({"picture": ["a.jpg"], "caption": ["a"]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="has the columns picture, caption, which are neither") as error:
        load(tmp_path)
    for part in ("jxu124/refcoco: ann_id", "moondream/refcoco-m", "columns: {image: image"):
        assert part in str(error.value)


COLUMNS = {"image": "photo", "text": "phrase", "box": "rectangle"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({**COLUMNS, "label": "x"}, "unknown field 'label'"),
        ({"image": "photo"}, "lacks text, box"),
        ({**COLUMNS, "box": "bbox"}, "columns.box is 'bbox'; .* has the columns photo, phrase, rectangle"),
        ("photo", "columns is 'photo'; expected a mapping"),
    ],
)
def test_columns_that_are_not_there_are_named(load, tmp_path, columns, message):
    rows = [{"photo": {"bytes": encoded(11), "path": None}, "phrase": "a", "rectangle": [1.0, 2.0, 9.0, 9.0]}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=message):
        load(tmp_path, columns=columns)


def test_columns_are_read_as_the_user_names_them(load, tmp_path):
    """One text per row, several texts of one box, several or no boxes of one text; boxes in the user's convention."""
    image = {"bytes": encoded(11), "path": None}
    rows = {
        "one": {"photo": image, "phrase": "the cup", "rectangle": to_xywh(BOXES[11][0])},
        "texts": {"photo": image, "phrase": ["the cup", "it"], "rectangle": to_xywh(BOXES[11][0])},
        "boxes": {"photo": image, "phrase": "cups", "rectangle": list(map(to_xywh, BOXES[11]))},
        "none": {"photo": image, "phrase": ["no plate", "no cat"], "rectangle": []},
        "missing": {"photo": image, "phrase": "not annotated", "rectangle": None},
        "both": {"photo": image, "phrase": ["a", "b"], "rectangle": list(map(to_xywh, BOXES[11]))},
        "lists": {"photo": image, "phrase": [["a", "aa"], ["b"]], "rectangle": list(map(to_xywh, BOXES[11]))},
    }
    found = {}
    for name, row in rows.items():
        (tmp_path / name).mkdir()
        features = datasets.Dataset.from_list([row]).features | {"photo": datasets.Image()}
        datasets.Dataset.from_list([row], features=datasets.Features(features)).to_parquet(
            tmp_path / name / "train.parquet"
        )
        if name == "missing":
            with pytest.raises(ValueError, match="1 expressions of objects without a box in the image"):
                load(tmp_path / name, columns=COLUMNS, box_format="xywh")
            continue
        (row,) = load(tmp_path / name, columns=COLUMNS, box_format="xywh")["train"]
        assert row["image_id"] == "train_0"
        found[name] = (
            [item["boxes"] for item in row["objects"]],
            [(sentence["text"], sentence["phrases"][0]["objects"]) for sentence in row["sentences"]],
        )
    first, second = BOXES[11]
    assert found == {
        "one": ([[first]], [("the cup", [0])]),
        "texts": ([[first]], [("the cup", [0]), ("it", [0])]),
        "boxes": ([[first], [second]], [("cups", [0, 1])]),
        "none": ([], [("no plate", []), ("no cat", [])]),
        "both": ([[first], [second]], [("a", [0]), ("b", [1])]),
        "lists": ([[first], [second]], [("a", [0]), ("aa", [0]), ("b", [1])]),
    }
    row = {"photo": image, "phrase": ["a"], "rectangle": [[1.0, 2.0, 3.0, 4.0]] * 2}
    (tmp_path / "wrong").mkdir()
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "wrong" / "train.parquet")
    with pytest.raises(ValueError, match=r"rectangle is .* and phrase is .*; expected one box or mask, or a list"):
        load(tmp_path / "wrong", columns=COLUMNS)


def test_columns_of_structures_files_and_masks(load, tmp_path):
    """Fields of structures, paths of files, and boxes of masks; rows of one file are one image."""
    save_images(tmp_path / "images")
    (tmp_path / "rows").mkdir()
    objects = [{"mask": run_lengths(box), "name": f"object {index}", "kind": "cup"} for index, box in
               enumerate(BOXES[11])]  # fmt: skip
    rows = [{"path": file_name(11), "objects": objects}, {"path": file_name(12), "objects": objects[:1]}]
    rows.append({"path": file_name(11), "objects": [{**objects[0], "name": "the first again"}]})
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows" / "train.parquet")
    columns = {"image": "path", "text": "objects.name", "mask": "objects.mask", "category": "objects.kind"}
    rows = load(tmp_path / "rows", columns=columns, image_dir=tmp_path / "images")["train"]
    assert contents(rows)["coco_11"] == (
        [[4, 6, 20, 30], [30, 8, 60, 40]],
        [("object 0", [0]), ("object 1", [1]), ("the first again", [0])],
    )
    assert rows[0]["objects"][0]["category"] == "cup"
    assert rows["positions"][:] == [[0, 1, 3], [2]]


def test_columns_in_another_convention_are_refused(load, tmp_path):
    image = {"bytes": encoded(11), "path": None}
    rows = [{"photo": image, "phrase": "a", "rectangle": [0.1, 0.2, 0.5, 0.9]}] * 5
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"look like 'xyxy_fraction'(.|\n)*set box_format='xyxy_fraction'"):
        load(tmp_path, columns=COLUMNS)
    assert len(load(tmp_path, columns=COLUMNS, box_format="xyxy_fraction")["train"]) == 5


# the Hub


def push(folder, repository, **options):
    """Push a folder as a dataset; return the commit."""
    api = HfApi(token="hf_write")
    api.create_repo(repository, repo_type="dataset", exist_ok=True)
    return api.upload_folder(repo_id=repository, repo_type="dataset", folder_path=folder, **options).oid


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with Hub() as hub:
        hub.use(monkeypatch, "hf_write")
        monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.address)
        yield hub


def test_pushed_export_is_loaded_by_name(shapes, load, hub, tmp_path):
    folder = export_dataset(data_scripts.SOURCES["shapes"], shapes, tmp_path / "exported")
    push(folder, "someone/shapes")
    rows = load("someone/shapes")
    assert list(rows) == list(shapes)
    assert rows["test"].remove_columns("image")[:] == shapes["test"].remove_columns("image")[:]
    assert np.array_equal(rows["test"][0]["image"], shapes["test"][0]["image"])
    assert load("someone/shapes", split="test").remove_columns("image")[0] == rows["test"].remove_columns("image")[0]
    streamed = next(iter(load("someone/shapes", split="test", streaming=True)))
    assert streamed["sentences"] == rows["test"][0]["sentences"]


def test_revision_and_columns_are_those_of_the_commit(load, hub, tmp_path):
    folder = write_layout(tmp_path / "m", "sample")
    first = push(folder, "someone/photos")
    rows = [sample_row(12)]
    datasets.Dataset.from_list(rows).to_parquet(folder / "data" / "validation-00000-of-00001.parquet")
    push(folder, "someone/photos")
    assert load("someone/photos")["validation"]["image_id"][:] == ["coco_12"]
    assert load("someone/photos", revision=first)["validation"]["image_id"][:] == ["coco_11", "coco_12", "coco_13"]
    with pytest.raises(OSError, match="dataset of this name of the Hub cannot be opened"):
        load("someone/photos", revision="nothing")


@pytest.mark.parametrize("layout", ["sample", "export"])
def test_loaded_dataset_is_read_offline_from_the_cache(load, hub, shapes, monkeypatch, tmp_path, layout):
    if layout == "sample":
        folder = write_layout(tmp_path / "m", "sample")
    else:
        folder = export_dataset(data_scripts.SOURCES["shapes"], shapes, tmp_path / "exported")
    commit = push(folder, "someone/photos")
    before = load("someone/photos")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    num_requests = len(hub.requests)
    after = load("someone/photos")
    assert {split: part.cache_files for split, part in after.items()} == {
        split: part.cache_files for split, part in before.items()
    }
    assert len(load("someone/photos", revision=commit)) == len(before)
    with pytest.raises(ValueError, match="revision='other' of 'someone/photos' is not in the cache"):
        load("someone/photos", revision="other")
    assert len(hub.requests) == num_requests
    with pytest.raises(OSError, match="no folder 'someone/other'"):
        load("someone/other")


def test_folder_wins_over_the_hub_and_paths_do_not_ask_it(load, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_layout(tmp_path / "someone" / "photos", "sample")
    assert len(load("someone/photos")["validation"]) == len(BOXES)
    with pytest.raises(ValueError, match="revision='main' is for datasets of the Hub"):
        load("someone/photos", revision="main")
    for name in ("someone/photo", "./someone/else", "/nowhere", "a/b/c"):
        with pytest.raises(OSError, match=f"There is no folder '{name}'"):
            load(name)
    with pytest.raises(ValueError, match=r"There is no dataset 'shape'; choose from: shapes, .*\(user/name\)"):
        load("shape")
    assert hub.requests == []


def test_missing_dataset_of_the_hub_is_named(load, hub):
    with pytest.raises(OSError, match="There is no folder 'someone/nothing', and the dataset of this name of the Hub"):
        load("someone/nothing")


def test_flags_of_named_datasets_are_checked(load, tmp_path):
    folder = write_layout(tmp_path / "m", "sample")
    with pytest.raises(ValueError, match="has no flag colour; it has: revision, subset, columns, box_format, image"):
        load(folder, colour=1)
    with pytest.raises(ValueError, match=r"box_format is only for columns; .* has those of moondream/refcoco-m"):
        load(folder, box_format="xyxy")


def test_split_of_the_files_without_rows_is_named(load, tmp_path):
    folder = write_layout(tmp_path / "m", "sample")
    rows = datasets.Dataset.from_list([sample_row(11)])
    rows.select([]).to_parquet(folder / "data" / "validation-00000-of-00001.parquet")
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"The split 'validation' of .* has no rows: .*validation-00000-of-00001"):
            load(folder, streaming=streaming)


def test_rows_of_one_image_are_streamed_and_others_are_refused(load, tmp_path):
    folder = write_layout(tmp_path / "m", "sample")
    built = load(folder)["validation"]
    streamed = list(load(folder, split="validation", streaming=True))
    assert [row["objects"] for row in streamed] == built["objects"][:]
    assert np.array_equal(np.asarray(streamed[0]["image"]), np.asarray(built[0]["image"]))
    rows = load(folder, streaming=True, decode=False)["validation"]
    assert next(iter(rows))["image"]["bytes"] == encoded(11)
    with pytest.raises(ValueError, match="has a row for each expression, and streaming requires a row for each image"):
        load(write_layout(tmp_path / "q", "question"), streaming=True)


def test_refer_rows_equal_those_of_the_authors_files(load, tmp_path):
    """The rows of jxu124/refcoco are those of the refer API, which they are made from."""
    rows = [refer_row(11, 0, 0, "train"), refer_row(11, 1, 1, "train")]
    (tmp_path / "rows").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows" / "train.parquet")
    save_images(tmp_path / "images")
    (row,) = load(tmp_path / "rows", image_dir=tmp_path / "images")["train"]
    assert [item["object_id"] for item in row["objects"]] == ["coco_11_1100", "coco_11_1101"]
    numbers = [int(sentence["sentence_id"].removeprefix("coco_11_")) for sentence in row["sentences"]]
    assert numbers == [0, 1, 10, 11]
