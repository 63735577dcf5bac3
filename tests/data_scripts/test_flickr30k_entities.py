"""Flickr30k Entities from files in its authors' layout: phrase spans, zero-based boxes, counted faults."""

import logging
import os
import time

import pytest
from PIL import Image

import data_scripts
from data_scripts.flickr30k_entities import Flickr30kEntities
from data_scripts.schema import FEATURES
from tests.helpers.layout_flickr30k import boxes_xml, make_flickr30k


@pytest.fixture
def folder(tmp_path):
    make_flickr30k(tmp_path / "f30k")
    return tmp_path / "f30k"


@pytest.fixture
def load(folder, tmp_path):
    def load_split(split=None, **flags):
        cache = str(tmp_path / "cache")
        return data_scripts.load("flickr30k_entities", split, cache_dir=cache, data_dir=str(folder), **flags)

    return load_split


def phrases_of(row):
    """Return (text, object id, types) of every phrase of a row."""
    return [
        [
            (sentence["text"][phrase["start"] : phrase["end"]], row["objects"][index]["object_id"], phrase["types"])
            for phrase in sentence["phrases"]
            for index in phrase["objects"]
        ]
        for sentence in row["sentences"]
    ]


def test_builder_rows_follow_schema_and_split_lists(load, folder):
    rows = load()
    assert len(list(folder.glob("flickr30k-images/*.jpg"))) == 12
    assert rows["train"].features == FEATURES
    # 1003 has no boxed phrase
    assert {split: part["image_id"] for split, part in rows.items()} == {
        "train": ["flickr30k_36979", "flickr30k_1002", "flickr30k_1005", "flickr30k_1006", "flickr30k_1007"],
        "val": ["flickr30k_1001", "flickr30k_1008", "flickr30k_1009"],
        "test": ["flickr30k_1004", "flickr30k_1010", "flickr30k_1011"],
    }
    row = rows["train"][0]
    assert row["image"].size == (row["width"], row["height"]) == (50, 40)


def test_builder_maps_phrases_to_characters_of_plain_caption(load):
    row = load("train")[0]
    assert [sentence["sentence_id"] for sentence in row["sentences"]] == [
        "flickr30k_36979_1",
        "flickr30k_36979_2",
        "flickr30k_36979_4",
    ]
    assert [sentence["text"] for sentence in row["sentences"]] == [
        "A man with two buses , that , on a street .",
        "A man near the edge and a bus .",
        "A thin line and Zoë 's café .",
    ]
    assert phrases_of(row) == [
        [("A man", "11", ["people"]), ("two buses", "12", ["vehicles", "scene"])],
        [("the edge", "15", ["other"]), ("a bus", "13", ["vehicles"])],
        [("Zoë 's café", "11", ["people"])],
    ]


def test_builder_shifts_boxes_to_zero_and_merges_chains(load):
    objects = {item["object_id"]: item for item in load("train")[0]["objects"]}
    assert set(objects) == {"11", "12", "13", "15"}  # without 0, the scene and the empty box
    assert objects["11"]["box"] == [0, 0, 10, 20]
    assert objects["12"]["boxes"] == [[4, 5, 29, 25], [20, 1, 40, 11]]
    assert objects["12"]["box"] == [4, 1, 40, 25]
    assert objects["13"]["boxes"] == [[20, 1, 40, 11]] == [objects["13"]["box"]]
    assert objects["15"]["box"] == [39, 29, 50, 40]  # clipped at the edge
    assert objects["12"]["category"] == "vehicles"
    assert objects["11"]["segmentation"] is None


@pytest.mark.parametrize(
    ("image_id", "phrases", "boxes"),
    [
        ("1005", [[("Hands", "61", ["bodyparts"])]] * 5, {"61": [[0, 0, 5, 5], [10.5, 0, 15.5, 5]]}),
        (
            "1006",
            [[("She", "62", ["people", "other"]), ("he", "63", ["people"])], [("He", "63", ["people"])]],
            {"62": [[0, 0, 10, 10]], "63": [[10, 10, 20, 20]]},
        ),
        (
            "1007",
            [
                [("Two", "64", ["people"]), ('a "group" (of 3)', "65", ["people"])],
                [("A cow/bull", "66", ["people", "animals"])],
            ],
            {key: [[0, 0, 10, 10]] for key in ("64", "65", "66")},
        ),
        ("1008", [[("A hat", "67", ["clothing"])]], {"67": [[5, 5, 15, 15]]}),
        ("1009", [[("It", "68", ["other"])]], {"68": [[0, 0, 10, 10]]}),
        (
            "1010",
            [[("A hall", "69", ["scene"]), ("a drum", "70", ["instruments"])]],
            {"69": [[0, 0, 30, 30]], "70": [[2, 2, 8, 8]]},
        ),
        (
            "1011",
            [[("A boy", "71", ["people"]), ("a boy", "72", ["people"]), ("who", "71", ["people"])]],
            {"71": [[0, 0, 8, 8]], "72": [[10, 10, 18, 18]]},
        ),
    ],
)
def test_builder_reads_unusual_annotations(load, image_id, phrases, boxes):
    rows = [row for part in load().values() for row in part]
    (row,) = [row for row in rows if row["image_id"] == f"flickr30k_{image_id}"]
    assert phrases_of(row) == phrases
    assert {item["object_id"]: item["boxes"] for item in row["objects"]} == boxes
    assert row["image"].size == (row["width"], row["height"]) == (30, 20 if image_id == "1008" else 30)


def test_builder_counts_dropped_annotations(load, caplog):
    with caplog.at_level(logging.WARNING, "data_scripts.building"):
        load()
    message, changes = [record.getMessage() for record in caplog.records if " train: " in record.getMessage()]
    assert "train: 1 boxes are cut at their image's edge." in changes
    for reason in (
        "2 boxes of which nothing is in the image",
        "1 captions whose brackets do not match",
        "6 captions without a boxed phrase",
        "14 phrases without a box",
        "1 images without a boxed phrase",
    ):
        assert reason in message


def test_builder_gives_oriented_image_its_upright_size(load):
    row = load("val")[0]
    assert (row["width"], row["height"]) == (40, 60) == row["image"].size
    assert row["objects"][0]["box"] == [1, 2, 11, 12]


def test_builder_scales_boxes_to_image_of_another_size(load, folder, caplog):
    Image.new("RGB", (60, 60)).save(folder / "flickr30k-images" / "1004.jpg")  # annotated as 30 x 20
    with caplog.at_level(logging.WARNING, "data_scripts.building"):
        row = load("test")[0]
    assert (row["width"], row["height"]) == (60, 60)
    assert row["objects"][0]["box"] == [0, 0, 60, 60]
    assert "test: 1 images have another size than annotated, boxes are scaled to it" in caplog.text


def test_builder_drops_unrelated_captions_on_request(load, folder):
    rows = load("train", drop_unrelated_captions=True)
    assert rows["image_id"] == [f"flickr30k_{number}" for number in (36979, 1005, 1006, 1007)]
    assert [sentence["sentence_id"] for sentence in rows[0]["sentences"]] == ["flickr30k_36979_1", "flickr30k_36979_4"]
    (folder / "UNRELATED_CAPTIONS").unlink()
    assert load("train")["image_id"] == [f"flickr30k_{number}" for number in (36979, 1002, 1005, 1006, 1007)]
    with pytest.raises(OSError, match=r"(?s)UNRELATED_CAPTIONS.*annotations\.zip"):
        load("train", drop_unrelated_captions=True)
    (folder / "UNRELATED_CAPTIONS").write_text("36979 two")
    with pytest.raises(ValueError, match="line 1: '36979 two' is not an image id and a caption's number"):
        load("train", drop_unrelated_captions=True)


@pytest.mark.parametrize("image_dir", ["f30k_images", "images", "elsewhere/pictures"])
def test_builder_finds_images_in_known_and_given_folders(tmp_path, image_dir):
    make_flickr30k(tmp_path, image_dir)
    flags = {"image_dir": image_dir} if "/" in image_dir else {}
    cache = str(tmp_path / "cache")
    rows = data_scripts.load("flickr30k_entities", "test", cache_dir=cache, data_dir=str(tmp_path), **flags)
    assert rows[0]["image"].size == (30, 20)
    assert rows[0]["objects"][0]["box"] == [0, 0, 30, 20]


@pytest.mark.row("R1")
def test_builder_names_missing_files_before_writing(load, folder, tmp_path):
    with pytest.raises(ValueError, match=r"data_dir=\.\.\."):
        data_scripts.load("flickr30k_entities", cache_dir=str(tmp_path / "cache"))
    for name in ("36979", "1004"):
        (folder / "flickr30k-images" / f"{name}.jpg").unlink()
    with pytest.raises(OSError, match=r"(?s)2 images of 'flickr30k_entities'.*36979\.jpg.*1004\.jpg.*on request"):
        load()
    (folder / "Annotations" / "1004.xml").unlink()
    with pytest.raises(OSError, match=r"(?s)1 \.xml files of .*1004\.xml.*annotations\.zip"):
        load()
    (folder / "val.txt").unlink()
    with pytest.raises(OSError, match=r"(?s)requires files that do not exist.*val\.txt"):
        load()
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_builder_with_changed_annotation_rebuilds_cache(load, folder):
    assert load("test")[0]["objects"][0]["box"] == [0, 0, 30, 20]
    path = folder / "Annotations" / "1004.xml"
    status = path.stat()
    path.write_text(path.read_text().replace("<xmin>1<", "<xmin>5<"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert load("test")[0]["objects"][0]["box"] == [4, 0, 30, 20]


BOMB = "<!DOCTYPE a [<!ENTITY b0 'ha'>{}]>".format("".join(f"<!ENTITY b{n + 1} '{f'&b{n};' * 10}'>" for n in range(9)))


@pytest.mark.parametrize(
    "content",
    [
        (BOMB + "<annotation><size>&b9;</size></annotation>").encode(),
        (BOMB + "<annotation><size>&b9;</size></annotation>").encode("utf-16"),
        b'<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>',
        b"<annotation>" * 100_000,
        b"<annotation></annotation>",
        boxes_xml("wide", 20, []).encode(),
        boxes_xml(30, 20, [(["51"], ("one", 1, 2, 2))]).encode(),
        b"",
        b"\xff\xd8\xff",
    ],
    ids=["bomb", "bomb in UTF-16", "outside file", "deep", "empty", "width", "box", "nothing", "jpeg"],
)
def test_builder_refuses_hostile_and_broken_annotations(load, folder, content):
    (folder / "Annotations" / "1004.xml").write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"1004\.xml' is not an annotation of Flickr30k Entities"):
        load()
    assert time.perf_counter() - start < 20


def test_builder_refuses_valid_annotation_with_document_type(load, folder):
    path = folder / "Annotations" / "1004.xml"
    path.write_text(f"<!DOCTYPE annotation>\n{path.read_text()}")
    with pytest.raises(ValueError, match=r"1004\.xml' is not an annotation .*: it has a document type"):
        load()


def test_builder_replaces_empty_phrase_by_one_blank(load, folder):
    (folder / "Sentences" / "36979.txt").write_text("A [/EN#12/other ] [/EN#11/people man] runs .\n")
    row = load("train")[0]
    assert row["sentences"][0]["text"] == "A man runs ."
    assert phrases_of(row) == [[("man", "11", ["people"])]]


def test_builder_takes_category_from_first_phrase_type(load, folder):
    caption = "[/EN#11/people A man] , [/EN#11/other who] runs ."
    (folder / "Sentences" / "36979.txt").write_text(f"{caption}\n")
    (item,) = [item for item in load("train")[0]["objects"] if item["object_id"] == "11"]
    assert item["category"] == "people"


def test_builder_refuses_split_list_with_path_outside_folder(load, folder):
    (folder / "test.txt").write_text("../../outside\n")
    with pytest.raises(ValueError, match=r"test\.txt': '\.\./\.\./outside' is not an image id"):
        load()


def test_builder_gives_same_rows_in_processes_and_streaming(load, folder, tmp_path):
    rows = load()
    builder = Flickr30kEntities(data_dir=str(folder), cache_dir=str(tmp_path / "other"))
    builder.download_and_prepare(num_proc=2)
    assert builder.as_dataset(split="train").to_dict() == rows["train"].to_dict()
    streamed = list(builder.as_streaming_dataset(split="train"))
    assert [row["sentences"] for row in streamed] == rows["train"]["sentences"][:]
