"""Shards of GRIT: phrases that overlap, boxes in 0..1, damage, and streams that are split over processes."""

import logging

import numpy as np
import pytest
from datasets.distributed import split_dataset_by_node

import data_scripts
from data_scripts.schema import FEATURES
from tests.helpers.layout_grit import CAPTION, jpeg, make_grit, make_sample, make_samples, write_parquet, write_tar


@pytest.fixture
def load(tmp_path, caplog):
    """Return a function that loads the shards in the folder `data`."""

    def load_rows(split="train", **flags):
        caplog.set_level(logging.WARNING, "data_scripts.building")
        return data_scripts.load(
            "grit", split, data_dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"), **flags
        )

    return load_rows


def phrases_of(row):
    (sentence,) = row["sentences"]
    return [(sentence["text"][phrase["start"] : phrase["end"]], phrase["objects"]) for phrase in sentence["phrases"]]


@pytest.mark.parametrize("ending", ["tar", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_grit_gives_captions_with_overlapping_phrases(tmp_path, load, ending, streaming, caplog):
    make_grit(tmp_path / "data", ending)
    rows = list(load(streaming=streaming))
    if not streaming:
        assert load().features == FEATURES
    first, second, third, fourth = rows
    assert [row["image_id"] for row in rows] == [f"grit_{1795296605919 + key}" for key in (0, 1, 10000, 10001)]
    assert first["image"].size == (first["width"], first["height"]) == (40, 30)
    assert first["sentences"][0]["text"] == CAPTION
    assert phrases_of(first) == [
        ("a paper cover", [0]),
        ("a wire hanger", [1]),
        ("a paper cover that reads we heart our customers", [0]),
        (CAPTION, [1]),
    ]
    scale = np.array([40, 30, 40, 30])
    boxes = [item["box"] for item in first["objects"]]
    expected = [[0.0196, 0.3105, 0.9622, 0.9603], [0.0194, 0.0276, 0.9593, 0.9695]] * scale
    np.testing.assert_allclose(boxes, expected, rtol=1e-6)
    # both lists have the phrase with the same boxes, each of an object
    assert phrases_of(second) == [("two dogs", [0, 1])]
    assert [item["box"] for item in second["objects"]] == [[5, 3, 15, 15], [20, 3, 30, 15]]
    assert [item["boxes"] for item in second["objects"]] == [[item["box"]] for item in second["objects"]]
    assert phrases_of(third) == [("the sea ", [0]), ("the sea", [1])]
    assert third["objects"][0]["boxes"] == [[36, 6, 40, 18]]
    assert phrases_of(fourth) == [("nothing", [0])]
    downloaded = "" if ending == "tar" else "1 images that were not downloaded"
    assert downloaded in caplog.text
    for reason in ("1 boxes of which nothing is in the image", "1 phrases that are not in their caption"):
        assert reason in caplog.text
    assert "1 boxes are cut at their image's edge" in caplog.text


def test_grit_leaves_out_boxes_of_low_score(tmp_path, load, caplog):
    make_grit(tmp_path / "data")
    rows = load(min_score=0.75)
    assert [phrases_of(row) for row in rows][:2] == [
        [("a paper cover", [0]), ("a paper cover that reads we heart our customers", [0])],
        [("two dogs", [0])],
    ]
    assert rows[1]["objects"][0]["boxes"] == [[5, 3, 15, 15]]
    assert len(rows) == 3
    assert "5 boxes of a score below min_score, " in caplog.text
    assert "1 images without a phrase" in caplog.text
    with pytest.raises(ValueError, match=r"min_score is 'high'; expected a number in 0\.\.1"):
        load(min_score="high")


def test_grit_reads_one_kind_of_phrase_by_flag(tmp_path, load):
    make_grit(tmp_path / "data")
    assert phrases_of(load(spans="noun_chunks")[0]) == [("a paper cover", [0]), ("a wire hanger", [1])]
    assert phrases_of(load(spans="ref_exps")[0])[1] == (CAPTION, [1])
    with pytest.raises(ValueError, match="spans is 'all'; expected 'noun_chunks', 'ref_exps' or 'both'"):
        load(spans="all")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption": 7}, "it has caption=7; expected text"),
        ({"caption": None}, "it has no caption. GRIT has addresses of images: download them"),
        ({"ref_exps": None}, "it has no ref_exps. GRIT has addresses of images: download them"),
        ({"noun_chunks": [[0, 5, 0.1, 0.2, 0.3, 0.4]]}, "noun_chunks[0] is [0, 5, 0.1, 0.2, 0.3, 0.4]; expected ["),
        ({"ref_exps": [[0, 5, 0.1, 0.2, 30, 0.4, 1]]}, "expected a box in 0..1 of the image's width and height"),
        ({"ref_exps": [[5, 0, 0.1, 0.2, 0.3, 0.4, 1]]}, "expected characters start < end"),
        ({"ref_exps": [[0.5, 2, 0.1, 0.2, 0.3, 0.4, 1]]}, "expected characters start < end"),
        ({"image": b"no image"}, "'000000003.jpg' cannot be read as an image"),
        ({"original_width": 1600, "original_height": 900}, "of (1600, 900) was padded or cropped to (40, 30)"),
    ],
)  # fmt: skip
def test_grit_names_malformed_sample(tmp_path, load, changes, message, caplog):
    make_grit(tmp_path / "data", samples=[*make_samples()[:2], make_sample(3, **changes)])
    with pytest.raises(ValueError, match=r"00000\.tar', sample 2 \('000000003'\): .*drop_bad_samples") as raised:
        load()
    assert message in str(raised.value)
    assert len(load(drop_bad_samples=True)) == 2
    assert "left out 1 bad samples" in caplog.text


def test_grit_names_metadata_that_is_not_json(tmp_path, load):
    make_grit(tmp_path / "data")
    path = tmp_path / "data/00000.tar"
    path.write_bytes(path.read_bytes().replace(b'{"id"', b'{"id\n'))
    with pytest.raises(ValueError, match=r"00000\.tar', sample 0 \('000000000'\): it is not JSON"):
        load()


@pytest.mark.parametrize("damage", ["between files", "in a file", "header", "end", "empty"])
def test_grit_names_damaged_tar(tmp_path, load, damage):
    make_grit(tmp_path / "data")
    path = tmp_path / "data/00001.tar"
    content = path.read_bytes()
    second = content.index(b"000010001.jpg")
    changed = {
        "between files": content[:second],
        "in a file": content[: second + 600],
        "header": content[:second] + b"\xff" * 512 + content[second + 512 :],
        "end": content[: -(-len(content.rstrip(b"\0")) // 512) * 512],
        "empty": b"",
    }
    path.write_bytes(changed[damage])
    for streaming in (False, True):
        with pytest.raises(OSError, match=r"00001\.tar' is damaged: .*\. Run img2dataset again for it\."):
            list(load(streaming=streaming, decode=False))


def test_grit_names_damaged_parquet_and_one_without_images(tmp_path, load):
    make_grit(tmp_path / "data", "parquet")
    path = tmp_path / "data/00001.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    with pytest.raises(OSError, match=r"00001\.parquet' is damaged: "):
        load()
    write_parquet(path, make_samples(), with_images=False)
    with pytest.raises(ValueError, match=r"00001\.parquet' has the columns .*, and none of images, jpg.*img2dataset"):
        load()


def test_grit_names_folder_without_shards_and_living_copy(tmp_path, load):
    with pytest.raises(OSError, match=r"no \.tar or \.parquet file in .*img2dataset.* Living copies: zzliang/GRIT"):
        load()


def test_grit_follows_orientation_unless_annotated_as_stored(tmp_path, load):
    samples = [
        make_sample(0, image=jpeg((30, 40), 6)),  # the size is that of the turned image
        make_sample(1, image=jpeg((40, 30), 6)),  # that of the stored one
    ]
    make_grit(tmp_path / "data", samples=samples)
    for row in load():
        assert row["image"].size == (row["width"], row["height"]) == (40, 30)


def many_samples(num_shards: int, per_shard: int) -> list[dict]:
    return [make_sample(10000 * shard + key) for shard in range(num_shards) for key in range(per_shard)]


def test_grit_stream_opens_shards_when_they_are_read(tmp_path, load):
    make_grit(tmp_path / "data", samples=many_samples(4, 3))
    for number in (1, 3):
        (tmp_path / f"data/{number:05d}.tar").write_bytes(b"not a tar")
    rows = load(streaming=True, decode=False)
    assert rows.num_shards == 4
    assert len(list(rows.take(2))) == 2  # `map` reads one row ahead
    with pytest.raises(OSError, match=r"00001\.tar' is damaged"):
        list(rows)
    # a process reads its shards alone: the first of two has the first and the third
    ids = [row["image_id"] for row in split_dataset_by_node(rows, rank=0, world_size=2)]
    assert ids == [f"grit_{1795296605919 + key}" for key in (0, 1, 2, 20000, 20001, 20002)]


def test_grit_stream_resumes_from_its_state(tmp_path, load):
    make_grit(tmp_path / "data", samples=many_samples(2, 3))
    expected = [row["image_id"] for row in load(streaming=True, decode=False)]
    rows = load(streaming=True, decode=False)
    iterator = iter(rows)
    seen = [next(iterator)["image_id"] for _ in range(4)]
    state = rows.state_dict()
    rows = load(streaming=True, decode=False)
    rows.load_state_dict(state)
    assert seen + [row["image_id"] for row in rows] == expected


def test_grit_gives_same_rows_in_processes_and_streaming(tmp_path, load):
    make_grit(tmp_path / "data")
    write_tar(tmp_path / "data/more/00000.tar", [make_sample(0, id=5)])
    rows = load()
    assert len(rows) == 5
    builder = data_scripts.SOURCES["grit"].builder(
        config_name="grit", data_dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "other")
    )
    builder.download_and_prepare(num_proc=2)
    assert builder.as_dataset(split="train").to_dict() == rows.to_dict()
    assert [row["objects"] for row in load(streaming=True)] == rows["objects"][:]


def test_grit_leaves_out_phrase_that_ends_past_its_caption(tmp_path, load, caplog):
    box = [0.1, 0.2, 0.3, 0.4, 0.9]
    write_tar(tmp_path / "data" / "00000.tar", [make_sample(0, "the sea", [[0, 7, *box], [4, 9, *box]], [])])
    (row,) = load()
    assert phrases_of(row) == [("the sea", [0])]
    assert "1 phrases that are not in their caption" in caplog.text
