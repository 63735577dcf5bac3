"""Annotation files of which one value is of another kind: a complete build, or one sentence that names the file."""

import copy
import json
import pickle
import random

import pytest
from layout_refcoco import make_refcoco
from layout_visual_genome import make_visual_genome

import data_scripts
from conftest import trials


VALUES = [None, "", "words", 7, -1, 10**30, 0.5, float("nan"), True, [], [[1]], [1, 2, 3, 4], {}, {"a": 1}, ...]


def places(value, path=(), limit=3):
    """Every place in a value as JSON has it, of lists the first entries."""
    if isinstance(value, dict):
        entries = list(value.items())
    elif isinstance(value, list | tuple):
        entries = list(enumerate(value))[:limit]
    else:
        return
    for key, entry in entries:
        yield (*path, key)
        yield from places(entry, (*path, key), limit)


def replaced(content, path, value):
    """A copy with another value at a place; `...` takes the entry out."""
    content = copy.deepcopy(content)
    part = content
    for key in path[:-1]:
        part = part[key]
    if isinstance(part, tuple):
        return None
    if value is ...:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    return content


def mutations(content, seed: int, count: int):
    """Some of all (place, value) of a file's content."""
    rng = random.Random(seed)
    found = [(path, value) for path in places(content) for value in VALUES]
    return rng.sample(found, min(count, len(found)))


def build(name: str, folder, cache) -> str | None:
    """Build a dataset; the sentence of a refusal, None where it was built."""
    try:
        splits = data_scripts.load(name, data_dir=folder, cache_dir=str(cache))
    except (ValueError, OSError) as error:
        return str(error)
    assert sum(map(len, splits.values())) > 0
    return None


LAYOUTS = {
    "refs": (make_refcoco, "refcoco_unc", "refcoco/refs(unc).p"),
    "instances": (make_refcoco, "refcoco_unc", "refcoco/instances.json"),
    "refclef refs": (lambda folder: make_refcoco(folder, "refclef_unc"), "refclef_unc", "refclef/refs(unc).p"),
    "refclef instances": (
        lambda folder: make_refcoco(folder, "refclef_unc"),
        "refclef_unc",
        "refclef/instances.json",
    ),
    "regions": (make_visual_genome, "visual_genome", "region_descriptions.json"),
    "image data": (make_visual_genome, "visual_genome", "image_data.json"),
}


@pytest.mark.row("S16")
@pytest.mark.parametrize(("make", "name", "file"), LAYOUTS.values(), ids=LAYOUTS)
def test_value_of_another_kind_ends_in_a_build_or_a_sentence(make, name, file, tmp_path, record_property):
    make(tmp_path / "data")
    path = tmp_path / "data" / file
    is_pickle = path.suffix == ".p"
    content = pickle.loads(path.read_bytes(), encoding="latin-1") if is_pickle else json.loads(path.read_bytes())
    chosen = mutations(content, seed=1, count=len(trials(100, short=6)))
    wrong = []
    for number, (place, value) in enumerate(chosen):
        changed = replaced(content, place, value)
        path.write_bytes(pickle.dumps(changed, 2) if is_pickle else json.dumps(changed).encode())
        try:
            sentence = build(name, tmp_path / "data", tmp_path / f"cache{number}")
        except Exception as error:
            wrong.append((place, value, f"{type(error).__name__}: {error}"))
            continue
        if sentence is not None and path.name not in sentence and path.stem not in sentence:
            wrong.append((place, value, sentence))
    record_property("counted", (len(chosen) - len(wrong), len(chosen)))
    assert wrong == []
