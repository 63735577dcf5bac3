"""Join datasets for training, leaving out every image that one of them holds out."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import datasets

from .building import is_degenerate
from .loading import load
from .reading import coco_id
from .schema import OPTIONAL


logger = logging.getLogger(__name__)

HELD_OUT = ("val", "test")  # how the names of held-out splits begin: val, validation, test, testA, ...


def combine(
    sets: Sequence,
    split: str = "train",
    held_out: tuple[str, ...] = HELD_OUT,
    trained: tuple[str, ...] = (),
    **flags: Any,
) -> datasets.Dataset:
    """
    Join a split of several datasets, leaving out every row whose image is held out in any of them. Images are matched
    by their COCO id (`coco_id`), others by `image_id`.

    What is trained on is not held out: neither a split of `trained`, nor one whose every expression is in one that is
    more than train, as those of val are in trainval. What train itself has of a held-out split is left out.

    Args:
        sets (`list`): datasets, each a name that `load` takes, a pair (name, flags) of it, a dict of splits (such as a
            `DatasetDict`), or a `Dataset`, which has no held-out images.
        split (`str`): the split to join. "trainval" of a dataset that has none is its train and its val.
        held_out (`tuple[str, ...]`): how the names of the held-out splits begin.
        trained (`tuple[str, ...]`, *optional*): all splits that are trained on, where `split` is one of several.
        flags: given to `load` for each name, for example `data_dir`.

    Returns:
        `datasets.Dataset`: the rows of the first dataset, then those of the second, ...

    Raises:
        ValueError: if there is no dataset, or one of them lacks the split or is streamed.

    Example:

    ```python
    >>> import data_scripts

    >>> rows = data_scripts.load("shapes", num_train=3, num_validation=1, num_test=1)
    >>> len(data_scripts.combine([rows, {"train": rows["train"], "test": rows["train"].select([0])}]))
    4

    ```"""
    if not sets:
        raise ValueError("combine requires at least one dataset.")
    names, parts = [], []
    for number, item in enumerate(sets):
        name, splits = _splits(item, number, split, flags)
        _parts_of(name, splits, split)
        if not all(isinstance(rows, datasets.Dataset) for rows in splits.values()):
            raise ValueError(f"{name} is streamed; combine requires datasets that are built, since it reads all rows.")
        names.append(name)
        parts.append(splits)
    keys = {
        key
        for name, splits in zip(names, parts, strict=True)
        for rows in _held_out_splits(name, splits, {split, *trained}, tuple(held_out))
        for key in _image_keys(rows)
    }
    kept = []
    for name, splits in zip(names, parts, strict=True):
        rows = datasets.concatenate_datasets([splits[part] for part in _parts_of(name, splits, split)])
        indices = [index for index, key in enumerate(_image_keys(rows)) if key not in keys]
        if len(indices) < len(rows):
            logger.warning(
                f"{name} {split}: left out {len(rows) - len(indices)} of {len(rows)} images, which are held out in "
                "the joined datasets."
            )
            rows = rows.select(indices)
        kept.append(rows)
    absent = [column for column in OPTIONAL if not all(column in rows.column_names for rows in kept)]
    return datasets.concatenate_datasets(
        [rows.remove_columns([column for column in absent if column in rows.column_names]) for rows in kept]
    )


def _parts_of(name: str, splits: Mapping, split: str) -> tuple[str, ...]:
    """Return the splits that one is made of: itself, or train and val for a trainval that is not there."""
    if split in splits:
        return (split,)
    if split == "trainval" and {"train", "val"} <= splits.keys():
        return ("train", "val")
    raise ValueError(f"{name} has no split {split!r}; it has: {', '.join(splits)}.")


def _held_out_splits(name: str, splits: Mapping, trained: set[str], held_out: tuple[str, ...]) -> list:
    """Return the splits of a dataset that are held out by their name, and not part of what is trained on."""
    known = {*splits, "trainval"} & trained
    own = {part for split in known for part in _parts_of(name, splits, split)}
    candidates = [rows for other, rows in splits.items() if other.startswith(held_out) and other not in own]
    if not candidates:
        return []
    is_more_than_train = own > {"train"} or "train" not in own
    learned = [(splits[part], _image_keys(splits[part])) for part in own if is_more_than_train]
    return [rows for rows in candidates if not (learned and _is_part(rows, learned))]


def _is_part(rows: datasets.Dataset, learned: list[tuple[datasets.Dataset, list]]) -> bool:
    """Return whether every expression of a split is in others, which come with their `_image_keys`."""
    missing = _expressions(rows, _image_keys(rows))
    images = {image for image, *_ in missing}
    if not images or not images <= {key for _, keys in learned for key in keys}:
        return False
    for others, keys in learned:
        indices = [index for index, key in enumerate(keys) if key in images]
        missing -= _expressions(others.select(indices), [keys[index] for index in indices])
    return not missing


def _expressions(rows: datasets.Dataset, keys: list) -> set[tuple]:
    """
    Return (image, text, box) of each phrase of rows, by which it is known in other splits of its dataset: ids may be
    those of a file. What cannot be learned is left out, see `building.integer_box`.
    """
    columns = rows.select_columns(["objects", "sentences"])
    return {
        (key, sentence["text"][phrase["start"] : phrase["end"]], *row["objects"][index]["box"])
        for key, row in zip(keys, columns, strict=True)
        for sentence in row["sentences"]
        for phrase in sentence["phrases"]
        for index in phrase["objects"]
        if not is_degenerate(row["objects"][index]["box"])
    }


def _splits(item: Any, number: int, split: str, flags: dict) -> tuple[str, Mapping]:
    if isinstance(item, datasets.Dataset):
        return f"dataset {number}", {split: item}
    if isinstance(item, Mapping):
        return f"dataset {number}", item
    name, own = (item, {}) if isinstance(item, str) else item
    return name, load(name, **{**flags, **own})


def _image_keys(rows: datasets.Dataset) -> list:
    """Return the key of each row's image: its COCO id, or the row's image_id."""
    columns = rows.cast_column("image", datasets.Image(decode=False)).select_columns(["image_id", "image"])
    keys = []
    for batch in columns.with_format("arrow").iter(1000):
        paths = batch["image"].combine_chunks().field("path").to_pylist()
        for image_id, path in zip(batch["image_id"].to_pylist(), paths, strict=True):
            known = coco_id(image_id, path)
            keys.append(image_id if known is None else known)
    return keys
