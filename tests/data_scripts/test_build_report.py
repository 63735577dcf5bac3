"""Build reports: dropped and changed annotations are counted, kept with the cache and shown by every command."""

import json
import logging
import os
from pathlib import Path

import pytest

import data_scripts
from data_scripts import visual_genome
from data_scripts.building import BUILD_REPORT
from data_scripts.loading import load_with_report
from data_scripts.reports import format_build_report, read_build_report
from reftr_cli.data import main
from tests.helpers.layout_flickr30k import make_flickr30k
from tests.helpers.layout_jsonl import make_jsonl
from tests.helpers.layout_refcoco import make_refcoco
from tests.helpers.layout_reftr_index import make_reftr_index
from tests.helpers.layout_visual_genome import make_visual_genome


NOTHING = "The build left out and changed nothing."
NOT_RECORDED = "What the build left out or changed is not recorded. A build with an empty cache records it."
CUT = "boxes are cut at their image's edge"
SCALED = "images have another size than annotated, boxes are scaled to it"


def make_bad_jsonl(folder: Path):
    """Write the files of `layout_jsonl` with bad lines in both splits, more of them in train."""
    make_jsonl(folder)
    for split, count in (("train", 3), ("validation", 2)):
        with open(folder / f"{split}.jsonl", "a", encoding="utf-8") as file:
            file.write('{"image": 7}\n' * count)


def make_bad_refcoco(folder: Path):
    """Write the files of `layout_refcoco` with two unreadable masks in train and one in val."""
    facts = make_refcoco(folder)
    instances = json.loads(facts["instances_file"].read_text())
    for annotation in instances["annotations"]:
        if annotation["image_id"] in (581857, 40, 100):
            annotation["segmentation"] = {"size": [30, 40], "counts": "oops"}
    facts["instances_file"].write_text(json.dumps(instances))


def make_held_out_visual_genome(folder: Path):
    """Write Visual Genome's files and those of RefCOCO, which hold out three of its images."""
    make_visual_genome(folder, (581857, 100, 20, 101, 102))
    make_refcoco(folder)


# name -> (function that writes its files, its flags, the expected report)
BUILDS = {
    "jsonl": (
        make_bad_jsonl,
        {"drop_bad_lines": True},
        {
            "train": {"left_out": {"bad lines": 3}, "changed": {CUT: 1}},
            "validation": {"left_out": {"bad lines": 2}, "changed": {}},
        },
    ),
    "refcoco_unc": (
        make_bad_refcoco,
        {},
        {
            "train": {
                "left_out": {
                    "expressions of objects that instances.json lacks": 1,
                    "expressions of objects without a box in the image": 5,
                    "expressions without words": 1,
                },
                "changed": {
                    CUT: 2,
                    "objects lost a mask that is empty or cannot be read": 2,
                    "images have another size than annotated, boxes and masks are scaled to it": 1,
                },
            },
            "val": {"left_out": {}, "changed": {"objects lost a mask that is empty or cannot be read": 1}},
        },
    ),
    "flickr30k_entities": (
        make_flickr30k,
        {"drop_unrelated_captions": True},
        {
            "train": {
                "left_out": {
                    "boxes of which nothing is in the image": 2,
                    "captions that are not about their image": 2,
                    "captions whose brackets do not match": 1,
                    "captions without a boxed phrase": 6,
                    "phrases without a box or without words": 14,
                    "images without a boxed phrase": 2,
                },
                "changed": {CUT: 1},
            },
            "val": {"left_out": {"phrases without a box or without words": 2}, "changed": {CUT: 1, SCALED: 1}},
            "test": {"left_out": {"captions without a boxed phrase": 1}, "changed": {}},
        },
    ),
    "visual_genome": (
        make_held_out_visual_genome,
        {"exclude": ["refcoco_unc"], "validation_images": 2},
        {
            "all": {
                "left_out": {
                    "images that are held out in refcoco_unc": 3,
                    "images that are there twice": 1,
                    "images that image_data.json lacks": 1,
                    "images that region_descriptions.json lacks": 1,
                },
                "changed": {},
            },
            "train": {
                "left_out": {
                    "images without a region": 1,
                    "regions without a box in the image": 3,
                    "regions without words": 2,
                },
                "changed": {CUT: 2, SCALED: 1},
            },
        },
    ),
    "reftr_refcoco_unc": (
        make_reftr_index,
        {},
        {
            split: {"left_out": {"masks without a pixel": 2 if split == "trainval" else 1}, "changed": {}}
            for split in ("train", "val", "testA", "testB", "trainval")
        },
    ),
}


@pytest.fixture
def command(tmp_path, capsys):
    """Return a function that runs `reftr data` in this process and returns its exit code and output."""

    def run_command(*argv):
        logger = logging.getLogger("data_scripts")
        handlers = list(logger.handlers)
        try:
            code = main([str(argument) for argument in (*argv, "--cache_dir", tmp_path / "cache")])
        finally:
            logger.handlers[:] = handlers
        return code, capsys.readouterr().out

    return run_command


@pytest.mark.parametrize("name", BUILDS)
def test_build_report_is_kept_with_cache(name, tmp_path, monkeypatch, caplog):
    make, flags, expected = BUILDS[name]
    make(tmp_path / "files")
    monkeypatch.setattr(visual_genome, "IMAGES_A_SHARD", 2)
    settings = {"data_dir": str(tmp_path / "files"), **flags}
    _, report = load_with_report(name, cache_dir=str(tmp_path / "cache"), **settings)
    assert report == expected
    assert list(report) == list(expected)
    assert "left out" in caplog.text
    caplog.clear()
    splits, report = load_with_report(name, cache_dir=str(tmp_path / "cache"), **settings)
    assert (report, caplog.text) == (expected, "")
    apart, report = load_with_report(name, cache_dir=str(tmp_path / "other"), num_proc=2, **settings)
    assert report == expected
    assert {split: len(rows) for split, rows in apart.items()} == {split: len(rows) for split, rows in splits.items()}
    for folder in ("cache", "other"):  # no file of a worker process is left
        assert [path.name for path in (tmp_path / folder).rglob(f"{BUILD_REPORT}*")] == [BUILD_REPORT]


def test_data_commands_show_build_report(command, tmp_path):
    make_bad_jsonl(tmp_path / "files")
    make_bad_jsonl(tmp_path / "more")
    (tmp_path / "more" / "train.jsonl").unlink()
    expected = BUILDS["jsonl"][2]
    shown = (
        "Left out or changed by the build:\n- train: left out 3 bad lines\n"
        f"- train: 1 {CUT}\n- validation: left out 2 bad lines\n"
    )
    files = ("jsonl", "--data_dir", tmp_path / "files", "--drop_bad_lines")
    assert shown in command("build", *files)[1]
    # another dataset in the same cache has its own report
    more = command("build", "jsonl", "--data_dir", tmp_path / "more", "--drop_bad_lines")[1]
    assert "Left out or changed by the build:\n- validation: left out 2 bad lines\nAll images" in more
    assert shown in command("build", *files)[1]
    assert shown in command("check", *files, "--json", tmp_path / "report.json")[1]
    assert json.loads((tmp_path / "report.json").read_text())["build"] == expected
    assert shown in command("stats", *files)[1]
    command("export", *files, "--output", tmp_path / "export")
    assert f"\n\n{shown}\n" in (tmp_path / "export" / "README.md").read_text()


def test_build_command_reports_build_without_losses(command):
    small = ("--num_train", 1, "--num_validation", 1, "--num_test", 1, "--image_size", 64)
    assert NOTHING in command("build", "shapes", *small)[1].splitlines()


def test_data_commands_accept_cache_without_report(command, tmp_path):
    make_bad_jsonl(tmp_path / "files")
    files = ("jsonl", "--data_dir", tmp_path / "files", "--drop_bad_lines")
    command("build", *files)
    (path,) = (tmp_path / "cache").rglob(BUILD_REPORT)
    path.unlink()
    for name in ("build", "stats"):
        assert NOT_RECORDED in command(name, *files)[1].splitlines()
    assert NOT_RECORDED in command("check", *files, "--json", tmp_path / "report.json")[1].splitlines()
    assert json.loads((tmp_path / "report.json").read_text())["build"] is None
    command("export", *files, "--output", tmp_path / "export")
    assert NOT_RECORDED in (tmp_path / "export" / "README.md").read_text().splitlines()


@pytest.mark.parametrize("content", ["", "[]", '{"train": 3}', '{"train": {"left_out": {"bad lines": "x"}}}', "\x00"])
def test_read_build_report_names_damaged_file(content, tmp_path):
    (tmp_path / BUILD_REPORT).write_text(content)
    with pytest.raises(OSError, match=f"{BUILD_REPORT}' is damaged"):
        read_build_report(tmp_path)


def test_build_report_ignores_counts_of_killed_build(tmp_path):
    make_bad_jsonl(tmp_path / "files")
    settings = {"data_dir": str(tmp_path / "files"), "cache_dir": str(tmp_path / "cache"), "drop_bad_lines": True}
    builder = data_scripts.SOURCES["jsonl"].builder(config_name="jsonl", **settings)
    os.makedirs(f"{builder.cache_dir}.incomplete")
    left = Path(f"{builder.cache_dir}.incomplete", f"{BUILD_REPORT}.train-00007")
    left.write_text(json.dumps([["train", "changed", {CUT: 5}]]))
    assert load_with_report("jsonl", **settings)[1] == BUILDS["jsonl"][2]


def test_stream_logs_losses_and_writes_no_report(tmp_path, caplog):
    make_bad_jsonl(tmp_path / "files")
    settings = {"data_dir": str(tmp_path / "files"), "cache_dir": str(tmp_path / "cache"), "drop_bad_lines": True}
    rows = data_scripts.load("jsonl", streaming=True, **settings)
    assert len(list(rows["train"])) == 8
    assert "jsonl train: left out 3 bad lines." in caplog.text
    assert f"jsonl train: 1 {CUT}." in caplog.text
    assert not list((tmp_path / "cache").rglob(f"{BUILD_REPORT}*"))
    # a stream adds nothing to the counts of a later build of the same builder either
    builder = data_scripts.SOURCES["jsonl"].builder(config_name="jsonl", **settings)
    list(builder.as_streaming_dataset(split="train"))
    builder.download_and_prepare()
    assert read_build_report(builder.cache_dir) == BUILDS["jsonl"][2]


def test_build_report_counts_clipped_integer_boxes(tmp_path):
    make_refcoco(tmp_path / "files")
    settings = {"data_dir": str(tmp_path / "files"), "cache_dir": str(tmp_path / "cache")}
    _, report = load_with_report("refcoco_unc", integer_boxes=True, **settings)
    assert report["train"]["changed"][CUT] == 2


def test_load_refuses_split_left_empty_and_says_why(command, tmp_path):
    make_bad_jsonl(tmp_path / "files")
    (tmp_path / "files" / "test.jsonl").write_text('{"image": 7}\n')
    read_from = f"read from '{tmp_path}/files/test.jsonl'"
    expected = rf"(?s)Nothing is left in test of 'jsonl', {read_from}\. .*- test: left out 1 bad lines"
    for _ in range(2):  # the second time from the cache
        with pytest.raises(ValueError, match=expected):
            command("build", "jsonl", "--data_dir", tmp_path / "files", "--drop_bad_lines")
    settings = {"data_dir": tmp_path / "files", "cache_dir": str(tmp_path / "cache"), "drop_bad_lines": True}
    with pytest.raises(ValueError, match=expected):
        data_scripts.load("jsonl", "test", **settings)
    assert len(data_scripts.load("jsonl", "train", **settings)) == 8


def test_format_build_report_of_empty_report_is_one_line():
    assert format_build_report({}) == NOTHING


def test_load_names_file_of_split_without_lines(tmp_path):
    make_jsonl(tmp_path / "files")
    file = tmp_path / "files" / "validation.jsonl"
    file.write_text("")
    settings = {"data_dir": tmp_path / "files", "cache_dir": str(tmp_path / "cache")}
    for split in (None, "validation"):
        for streaming in (False, True):
            with pytest.raises(ValueError, match=f"Nothing is left in validation of 'jsonl', read from '{file}'"):
                data_scripts.load("jsonl", split, streaming=streaming, **settings)
    assert len(list(data_scripts.load("jsonl", "train", streaming=True, **settings))) == 8
    with pytest.raises(ValueError, match="Nothing is left in validation of 'jsonl', read from no file"):
        data_scripts.load("jsonl", path={"train": "train.jsonl", "validation": []}, **settings)


def test_load_refuses_stream_left_empty_and_says_why(tmp_path):
    make_bad_jsonl(tmp_path / "files")
    (tmp_path / "files" / "test.jsonl").write_text('{"image": 7}\n')
    with pytest.raises(ValueError, match=r"(?s)Nothing is left in test of 'jsonl'.*- test: left out 1 bad lines"):
        data_scripts.load("jsonl", data_dir=tmp_path / "files", streaming=True, drop_bad_lines=True)
