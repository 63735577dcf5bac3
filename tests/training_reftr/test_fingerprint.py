"""The fingerprint of training data depends on the annotations only, not on where or how they are stored."""

import json

import datasets
import pyarrow as pa
import pytest

import data_scripts
from tests.helpers.layout_jsonl import LINES, make_jsonl
from training_reftr.fingerprint import Fingerprint, fingerprint_of


def describe(rows):
    fingerprint = fingerprint_of(rows)
    return fingerprint.num_rows, fingerprint.hexdigest()


def build(folder, lines=None, **settings):
    """Build rows of JSON Lines in a separate folder with a separate cache."""
    make_jsonl(folder / "data")
    if lines is not None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "data" / "train.jsonl").write_text(text, encoding="utf-8")
    settings = {"data_dir": folder / "data", "cache_dir": str(folder / "cache"), "split": "train", **settings}
    return data_scripts.load("jsonl", **settings)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return build(tmp_path_factory.mktemp("first"))


def test_fingerprint_is_independent_of_storage(rows, tmp_path):
    expected = describe(rows)
    assert expected[0] == len(LINES["train"])
    middle = len(rows) // 2
    others = {
        "another machine": build(tmp_path / "other"),
        "streamed": build(tmp_path / "streamed", streaming=True, decode=False),
        "in memory": datasets.Dataset.from_list(list(rows), features=rows.features),
        "in parts": datasets.concatenate_datasets([rows.select(range(middle)), rows.select(range(middle, len(rows)))]),
        "reversed twice": rows.select(range(len(rows))[::-1]).select(range(len(rows))[::-1]),
        "with another column": rows.add_column("note", list(range(len(rows)))),
        "mapped": rows.map(lambda row: {"category": row["image_id"]}, keep_in_memory=True, new_fingerprint="other"),
    }
    assert {name: describe(other) for name, other in others.items()} == dict.fromkeys(others, expected)


def changed(lines, number, **changes):
    """Return the lines with fields of one expression changed."""
    line = lines[number]
    expression = {**line["expressions"][0], **changes}
    return [*lines[:number], {**line, "expressions": [expression, *line["expressions"][1:]]}, *lines[number + 1 :]]


CHANGES = {
    "text": lambda lines: changed(lines, 0, text="the red cat"),
    "box": lambda lines: changed(lines, 0, box=[1, 2, 11, 12.5]),
    "type": lambda lines: changed(lines, 0, types=["cat"]),
    "category": lambda lines: changed(lines, 7, category="cat"),
    "no category": lambda lines: changed(lines, 7, category=None),
    "phrases": lambda lines: changed(lines, 1, phrases=[{"text": "car", "box": [1, 2, 11, 12]}]),
    "mask": lambda lines: changed(lines, 0, polygon=[2, 2, 12, 2, 12, 9]),
    "boxes": lambda lines: changed(lines, 6, boxes=[[1, 2, 11, 12], [0, 0, 2, 3]]),
    "row left out": lambda lines: lines[:-1],
    "row twice": lambda lines: [*lines, {**lines[0], "image_id": "again"}],
    "other order": lambda lines: lines[::-1],
    "other name": lambda lines: [{**lines[0], "image_id": "other"}, *lines[1:]],
    "text moved": lambda lines: changed(changed(lines, 4, text="the glas"), 5, text="sdie Tür ☕"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_fingerprint_changes_with_annotations(rows, tmp_path, change):
    number, fingerprint = describe(build(tmp_path, change(LINES["train"])))
    assert fingerprint != describe(rows)[1]
    assert number == len(change(LINES["train"]))


def fingerprint_of_texts(*texts, category="dog"):
    """Return the fingerprint of one row without phrases, which would mark where each sentence ends."""
    sentences = [{"text": text, "phrases": []} for text in texts]
    row = {"image_id": "a", "width": 4, "height": 3, "objects": [{"category": category}], "sentences": sentences}
    schema = pa.Table.from_pylist([{**row, "objects": [{"category": "dog"}]}]).schema
    fingerprint = Fingerprint()
    fingerprint.add(pa.Table.from_pylist([row], schema=schema))
    return fingerprint.hexdigest()


def test_fingerprint_detects_text_moved_to_next_sentence():
    assert fingerprint_of_texts("the dog", "s") != fingerprint_of_texts("the do", "gs")


def test_fingerprint_distinguishes_null_from_empty():
    assert fingerprint_of_texts("the dog", category=None) != fingerprint_of_texts("the dog", category="")
