"""Mutated annotation files: a builder builds a complete dataset or raises one sentence that names the file."""

import io
import json
import pickle
import random
import re
import xml.etree.ElementTree as ElementTree
from typing import NamedTuple
from xml.sax.saxutils import escape

import numpy as np
import pytest
import torch

import data_scripts
from tests.helpers.layout_flickr30k import make_flickr30k
from tests.helpers.layout_jsonl import make_jsonl
from tests.helpers.layout_refcoco import make_refcoco
from tests.helpers.layout_refer import make_grefcoco, make_refer
from tests.helpers.layout_reftr_index import make_reftr_index
from tests.helpers.layout_visual_genome import make_visual_genome
from tests.helpers.tiny import trials


VALUES = [None, "", "words", 7, -1, 10**30, 0.5, float("nan"), True, [], [[1]], [1, 2, 3, 4], {}, {"a": 1}, ...]
# replacements for a part of a text
PIECES = [
    "",
    " ",
    "words",
    "7",
    "-1",
    "9" * 30,
    "1e400",
    "nan",
    "٣",
    "\0",
    "\x1b",
    "]",
    "[/EN#",
    "/",
    "&",
    "<a>",
    "\n",
    ...,
]


# values that a pickle can contain as well
OBJECTS = [
    *VALUES,
    b"words",
    {1, 2},
    1j,
    np.zeros((2, 4)),
    np.array(["a"]),
    np.float16("nan"),
    torch.ones(4),
    torch.ones(0),
]


def paths_in(value, path=(), limit=3):
    """Yield the path of every entry in a nested value, of lists only of the first entries."""
    if isinstance(value, dict):
        entries = list(value.items())
    elif isinstance(value, list | tuple):
        entries = list(enumerate(value))[:limit]
    else:
        return
    for key, entry in entries:
        yield (*path, key)
        yield from paths_in(entry, (*path, key), limit)


def replaced(content, path, value):
    """Return a copy with another value at a path; `...` removes the entry."""
    if not path:
        return value
    key, *rest = path
    if isinstance(content, dict):
        items = {name: replaced(entry, rest, value) if name == key else entry for name, entry in content.items()}
        return {name: entry for name, entry in items.items() if entry is not ...}
    items = [replaced(entry, rest, value) if index == key else entry for index, entry in enumerate(content)]
    return type(content)(entry for entry in items if entry is not ...)


def mutations(content, values, seed: int, count: int):
    """Draw mutations of a file's content, each one or two pairs (path, value)."""
    rng = random.Random(seed)
    found = [(path, value) for path in ((), *paths_in(content)) for value in values if path or value is not ...]
    # add pairs of mutations if there are not enough single ones
    twice = [(rng.choice(found), rng.choice(found)) for _ in range(max(0, count - len(found)))]
    return [(one,) for one in rng.sample(found, min(count, len(found)))] + twice


def build(name: str, folder, cache, is_streamed: bool, flags: dict) -> str | None:
    """Build or stream a dataset; return the error message, or None on success."""
    settings = {"data_dir": folder, "cache_dir": str(cache), **flags}
    try:
        splits = data_scripts.load(name, streaming=is_streamed, decode=not is_streamed, **settings)
        number = sum(sum(1 for _ in rows) if is_streamed else len(rows) for rows in splits.values())
    except (ValueError, OSError) as error:
        return str(error)
    assert number > 0
    return None


# readers of a file's content into lists and mappings, and their writers


def read_lines(content: bytes) -> list:
    return [json.loads(line) for line in content.splitlines()]


def write_lines(lines) -> bytes:
    lines = lines if isinstance(lines, list | tuple) else [lines]
    return "".join(f"{json.dumps(line)}\n" for line in lines).encode()


def read_pieces(content: bytes) -> list:
    """Return lines as lists of their words and signs."""
    return [re.findall(r"\w+|\W", line) for line in content.decode().splitlines()]


def write_pieces(lines) -> bytes:
    return "\n".join(line if isinstance(line, str) else "".join(line) for line in lines).encode()


def read_xml(content: bytes) -> dict:
    def read(element):
        return {"tag": element.tag, "text": element.text or "", "parts": [read(part) for part in element]}

    return read(ElementTree.fromstring(content))


def write_xml(node) -> bytes:
    def write(part):
        if not isinstance(part, dict):
            return escape("".join(map(str, part)) if isinstance(part, list) else part)
        tag = part.get("tag", "none")
        parts = part.get("parts", "")
        inner = escape(parts) if isinstance(parts, str) else "".join(map(write, parts))
        return f"<{tag}>{escape(part.get('text', ''))}{inner}</{tag}>"

    return write(node).encode()


class Layout(NamedTuple):
    """Describe the file to mutate and how to read and write it; `prepare` changes the folder first."""

    make: object
    name: str
    file: str
    read: object = json.loads
    write: object = lambda content: json.dumps(content).encode()
    values: list = VALUES
    flags: dict = {}
    prepare: object = lambda folder: None


def read_pickle(content: bytes):
    return pickle.loads(content, encoding="latin-1")


def write_pickle(content) -> bytes:
    return pickle.dumps(content, 2)


def name_several_objects(folder):
    """Rewrite references to name one, two or no objects, as in gRefCOCO."""
    path = folder / "refcoco" / "refs(unc).p"
    refs = read_pickle(path.read_bytes())
    for number, ref in enumerate(refs):
        ref |= {"ann_id": [[ref["ann_id"]], [ref["ann_id"]] * 2, [-1]][number % 3], "no_target": number % 3 == 2}
    path.write_bytes(write_pickle(refs))


def hold_out(folder):
    """Write a list of held-out images, as the command `held_out` does."""
    (folder / "held_out.json").write_text(json.dumps({"sets": ["refcoco_unc"], "coco_ids": [20, 100]}))


def read_index(content: bytes):
    return torch.load(io.BytesIO(content), weights_only=False)


def write_index(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def make_refclef(folder):
    make_refcoco(folder, "refclef_unc")


PICKLE, PIECEWISE, XML = (
    (read_pickle, write_pickle, [*VALUES, b"words", {1, 2}, 1j]),
    (read_pieces, write_pieces, PIECES),
    (read_xml, write_xml, PIECES),
)
INDEX, LINES = (read_index, write_index, OBJECTS), (read_lines, write_lines)
REFS, MASKS = "refcoco/refs(unc).p", "refcoco/anns/refcoco/refcoco_unc_train.pth"
LAYOUTS = {
    "refs": Layout(make_refcoco, "refcoco_unc", REFS, *PICKLE),
    "instances": Layout(make_refcoco, "refcoco_unc", "refcoco/instances.json"),
    "refclef refs": Layout(make_refclef, "refclef_unc", "refclef/refs(unc).p", *PICKLE),
    "refclef instances": Layout(make_refclef, "refclef_unc", "refclef/instances.json"),
    "refs to several objects": Layout(make_refcoco, "refcoco_unc", REFS, *PICKLE, prepare=name_several_objects),
    "grefs": Layout(make_grefcoco, "grefcoco", "grefcoco/grefs(unc).json"),
    "refs of any name": Layout(make_refer, "refer", "refs(unc).p", *PICKLE),
    "instances beside refs of any name": Layout(make_refer, "refer", "instances.json"),
    "regions": Layout(make_visual_genome, "visual_genome", "region_descriptions.json"),
    "image data": Layout(make_visual_genome, "visual_genome", "image_data.json"),
    "held-out images": Layout(
        make_visual_genome,
        "visual_genome",
        "held_out.json",
        flags={"held_out_file": "held_out.json"},
        prepare=hold_out,
    ),
    "captions": Layout(make_flickr30k, "flickr30k_entities", "Sentences/36979.txt", *PIECEWISE),
    "boxes": Layout(make_flickr30k, "flickr30k_entities", "Annotations/36979.xml", *XML),
    "split list": Layout(make_flickr30k, "flickr30k_entities", "val.txt", *PIECEWISE),
    "unrelated captions": Layout(
        make_flickr30k,
        "flickr30k_entities",
        "UNRELATED_CAPTIONS",
        *PIECEWISE,
        flags={"drop_unrelated_captions": True},
    ),
    "short index": Layout(make_reftr_index, "resc_vg", "annotations_resc/vg/vg_all.pth", *INDEX),
    "long index": Layout(make_reftr_index, "resc_referit", "annotations_resc/referit/referit_val.pth", *INDEX),
    "index of captions": Layout(make_reftr_index, "reftr_flickr", "annotations/flickr/flickr_train.pth", *INDEX),
    "index of masks": Layout(make_reftr_index, "reftr_refcoco_unc", MASKS, *INDEX),
    "lines": Layout(make_jsonl, "jsonl", "train.jsonl", *LINES),
    "lines with masks": Layout(make_jsonl, "jsonl", "validation.jsonl", *LINES),
}


@pytest.mark.row("S16")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_builder_with_mutated_value_succeeds_or_names_file(layout, tmp_path, record_property):
    layout.make(tmp_path / "data")
    layout.prepare(tmp_path / "data")
    path = tmp_path / "data" / layout.file
    flags = {name: str(path) if name == "held_out_file" else value for name, value in layout.flags.items()}
    content = layout.read(path.read_bytes())
    chosen = mutations(content, layout.values, seed=1, count=len(trials(200, short=6)))
    wrong = []
    for number, mutation in enumerate(chosen):
        changed = content
        for keys, value in mutation:
            changed = replaced_if_present(changed, keys, value)
        path.write_bytes(layout.write(changed))
        try:
            message = build(layout.name, tmp_path / "data", tmp_path / f"cache{number}", number % 2 == 1, flags)
        except Exception as error:
            wrong.append((mutation, f"{type(error).__name__}: {error}"))
            continue
        # a message about a missing file names that file instead
        names = (path.name, path.stem, " do not exist")
        if message is not None and not any(name in message for name in names):
            wrong.append((mutation, message))
    record_property("counted", (len(chosen) - len(wrong), len(chosen)))
    assert wrong == []


def replaced_if_present(content, path, value):
    """Apply `replaced` unless an earlier mutation removed the entry."""
    return replaced(content, path, value) if path in {(), *paths_in(content)} else content
