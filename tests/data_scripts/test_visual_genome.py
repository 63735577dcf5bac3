"""Visual Genome from files in its authors' layout, with and without held-out images."""

import json

import pytest

import data_scripts
from data_scripts.reading import scan_list
from data_scripts.visual_genome import held_out_coco_ids, read_held_out, write_held_out
from tests.helpers.layout_refcoco import make_refcoco
from tests.helpers.layout_visual_genome import make_visual_genome


# RefCOCO's images by split, see layout_refcoco: 100 to 102 are held out
COCO_IDS = (581857, 100, 20, 101, 102)


@pytest.fixture
def genome(tmp_path):
    """Write Visual Genome with RefCOCO's files next to it; return (facts, load)."""
    facts = make_visual_genome(tmp_path / "vg", COCO_IDS)
    make_refcoco(tmp_path / "refer")

    def load(split=None, **flags):
        settings = {"data_dir": tmp_path / "vg", "cache_dir": str(tmp_path / "cache"), **flags}
        return data_scripts.load("visual_genome", split, **settings)

    return facts, load


def without_image(row):
    return {key: value for key, value in row.items() if key != "image"}


def test_builder_reads_regions_into_rows(genome, tmp_path, caplog):
    facts, load = genome
    rows = load("train")
    assert rows.features == data_scripts.FEATURES
    assert rows["image_id"] == facts["image_ids"]
    assert len(list((tmp_path / "vg").glob("VG_100K*/*.jpg"))) >= 12
    assert all(row["image"].size == (row["width"], row["height"]) for row in rows)
    first = rows[0]
    assert [sentence["text"] for sentence in first["sentences"]] == ["the clock is green in colour", "a wall"]
    assert [item["box"] for item in first["objects"]] == [[4, 5, 24, 15], [0, 0, 40, 30]]
    assert first["objects"][1] == {
        "object_id": "vg_101",
        "box": [0, 0, 40, 30],
        "boxes": [[0, 0, 40, 30]],
        "category": None,
        "segmentation": None,
    }
    assert first["sentences"][1]["sentence_id"] == "vg_101"
    assert first["sentences"][1]["phrases"] == [{"start": 0, "end": 6, "objects": [1], "types": []}]
    seen = {row["image_id"]: row for row in rows}
    other, scaled = seen["vg_50"], seen["vg_51"]
    assert [sentence["text"] for sentence in other["sentences"]] == ["a café ☕", "past the edge"]
    assert other["objects"][1]["box"] == [0, 20, 18, 30]
    assert scaled["objects"][0]["box"] == [10, 10, 30, 20]
    assert "2 regions without words" in caplog.text
    assert "3 regions without a box in the image" in caplog.text
    assert "1 images that image_data.json lacks" in caplog.text
    assert "1 images without a region" in caplog.text
    assert "1 images that are there twice" in caplog.text
    assert "2 boxes are cut" in caplog.text
    assert "nothing is left out" in caplog.text  # no dataset to exclude was named

    def texts_with_boxes(number):
        row = seen[f"vg_{number}"]
        return [
            (sentence["text"], row["objects"][phrase["objects"][0]]["box"])
            for sentence in row["sentences"]
            for phrase in sentence["phrases"]
        ]

    assert texts_with_boxes(54) == [("all of it", [0, 0, 40, 30])]
    assert texts_with_boxes(55) == [("turned", [2, 3, 22, 38])]
    assert (seen["vg_55"]["width"], seen["vg_55"]["height"]) == (30, 40)
    assert texts_with_boxes(56) == [("a tree", [1, 1, 10, 10])] * 3 + [("a tree", [20, 1, 29, 10])]
    assert texts_with_boxes(58) == [("the corner", [30.5, 20.25, 40, 30])]
    assert texts_with_boxes(60) == [("the first", [5, 5, 15, 15])]


@pytest.mark.row("R21")
def test_builder_leaves_out_held_out_images(tmp_path, genome, caplog):
    facts, load = genome
    excluded = {"exclude": ["refcoco_unc"], "exclude_data_dir": str(tmp_path / "refer")}
    rows = load("train", **excluded)
    refcoco = data_scripts.load("refcoco_unc", data_dir=tmp_path / "refer", cache_dir=str(tmp_path / "cache"))
    held_out = {data_scripts.coco_id(key) for split in ("val", "testA", "testB") for key in refcoco[split]["image_id"]}
    assert held_out == {100, 101, 102} == held_out_coco_ids(["refcoco_unc"], tmp_path / "refer")
    kept = {data_scripts.coco_id(image_id) for image_id in rows["image_id"]}
    assert kept == {581857, 20, 581900, None}
    assert not kept & held_out
    assert "3 images that are held out in refcoco_unc" in caplog.text
    # the same by a list, without the excluded dataset; another list rebuilds the cache
    path = tmp_path / "held_out.json"
    assert write_held_out(path, ["refcoco_unc"], tmp_path / "refer") == 3
    assert read_held_out(path) == held_out
    assert load("train", held_out_file=str(path))["image_id"] == rows["image_id"]
    # another image_data.json may hold the ids as text
    images = json.loads(genome[0]["images_file"].read_text())
    texts = [{**image, "coco_id": image["coco_id"] and str(image["coco_id"])} for image in images]
    genome[0]["images_file"].write_text(json.dumps(texts))
    assert load("train", held_out_file=str(path))["image_id"] == rows["image_id"]
    path.write_text(json.dumps({"coco_ids": [20]}))
    assert len(load("train", held_out_file=str(path))) == len(facts["image_ids"]) - 1
    # files of held-out images are not required
    for number in (2, 4, 5):
        next((tmp_path / "vg").glob(f"*/{number}.jpg")).unlink()
    assert len(load("train", validation_images=0, **excluded, seed=1)) == len(rows)


def test_held_out_command_writes_list_of_images(tmp_path, genome, run):
    path, refer = tmp_path / "held_out.json", tmp_path / "refer"
    argv = ("-m", "reftr_cli", "data", "held_out", "refcoco_unc", "--data_dir", refer, "--output", path)
    assert "3 images" in run(*argv).stdout
    assert read_held_out(path) == {100, 101, 102}
    folders = ("--data_dir", tmp_path / "vg", "--cache_dir", tmp_path / "cache")
    result = run("-m", "reftr_cli", "data", "check", "visual_genome", *folders, "--held_out_file", path)
    assert "visual_genome: 0 errors" in result.stdout
    refused = run("-m", "reftr_cli", "data", "held_out", "shapes", "--data_dir", refer, "--output", path, check=False)
    assert refused.returncode == 1
    assert "error: 'shapes' is not a dataset with images of COCO" in refused.stderr


def test_builder_refuses_invalid_exclusions(tmp_path, genome):
    load = genome[1]
    with pytest.raises(ValueError, match="'refclef_unc' is not a dataset with images of COCO"):
        load(exclude=["refclef_unc"])
    with pytest.raises(OSError, match="nowhere"):
        load(exclude=["refcoco_unc"], exclude_data_dir=str(tmp_path / "nowhere"))
    path = tmp_path / "ids.json"
    for content in ("[1, 2]", '{"coco_ids": ["1"]}', "{"):
        path.write_text(content)
        with pytest.raises((OSError, ValueError), match=r"ids\.json"):
            load(held_out_file=str(path))


def test_builder_draws_validation_split(genome):
    load = genome[1]
    rows = load(validation_images=2)
    again = load(validation_images=2, streaming=True)
    other = load("validation", validation_images=2, seed=1)
    assert {split: len(part) for split, part in rows.items()} == {"train": 11, "validation": 2}
    assert set(rows["train"]["image_id"]) | set(rows["validation"]["image_id"]) == set(genome[0]["image_ids"])
    for split, part in rows.items():
        assert [without_image(row) for row in again[split]] == [without_image(row) for row in part]
    assert other["image_id"] != rows["validation"]["image_id"]
    with pytest.raises(ValueError, match="validation_images=15"):
        load(validation_images=15)


@pytest.mark.row("R1")
def test_builder_names_missing_images_and_region_faults(tmp_path, genome):
    next((tmp_path / "vg").glob("*/50.jpg")).unlink()
    with pytest.raises(OSError, match="1 images of 'visual_genome' do not exist") as error:
        genome[1]()
    for part in ("50.jpg", "VG_100K", "VG_100K_2", "images2.zip"):
        assert part in str(error.value)
    (tmp_path / "vg" / "region_descriptions.json").write_text("[]")
    with pytest.raises(ValueError, match=r"No image of .* is left"):
        genome[1]()
    (tmp_path / "vg" / "region_descriptions.json").write_text('[{"id": 1, "objects": []}]')
    with pytest.raises(ValueError, match=r"region_descriptions\.json', the image at byte 1 has no regions;"):
        genome[1]()
    with pytest.raises(OSError, match="region_descriptions"):
        data_scripts.load("visual_genome", data_dir=tmp_path, cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("chunk_bytes", [1, 7, 100, 1 << 20])
def test_scan_list_reads_json_in_chunks(tmp_path, chunk_bytes):
    entries = [{"id": 1, "text": "é☕, ] } {"}, {"id": 2, "inner": [{"a": [1, 2]}, "}"]}, {}]
    path = tmp_path / "list.json"
    for text in (json.dumps(entries), json.dumps(entries, indent=1, ensure_ascii=False)):
        path.write_text(text, encoding="utf-8")
        content = path.read_bytes()
        found = list(scan_list(path, chunk_bytes))
        assert [json.loads(content[start : start + length]) for start, length, _ in found] == entries
        assert [entry.get("id") for _, _, entry in found] == [1, 2, None]
    path.write_text("[]")
    assert list(scan_list(path, chunk_bytes)) == []


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '[{"id": 1}', '[{"id": 1}, ]', '[{"id": ', '[{"id": 1} {}]', "[,{}]"]
)
def test_scan_list_names_damaged_file(tmp_path, content):
    path = tmp_path / "list.json"
    path.write_text(content)
    with pytest.raises(OSError, match=r"list\.json' is damaged at byte \d"):
        list(scan_list(path))
