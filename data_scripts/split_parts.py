"""
Cut a split in parts by image, for a dataset that has no split to train on, or none to test on.

`{"validation": {"train": 0.8, "val": 0.1, "test": 0.1}}` replaces the split `validation` by `train_of_validation`,
`val_of_validation` and `test_of_validation`. A part never has the name of a split: results on a part of a published
split are not results on the split.

The part of an image is a function of its id alone, by a hash: of its number in COCO if `image_id` tells one, else of
`image_id`. So parts have no image in common, the images of COCO are in the same part in every dataset that is cut in
the same way, and rows that are added, left out or in another order do not move others. The shares are of the range of
the hash, and only nearly of the images. An image that a dataset has no name for is known by its position: name the
column of `image_id`, see `named_rows`.
"""

import hashlib
import itertools
import re
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from .quoting import quote
from .reading import coco_id


if TYPE_CHECKING:  # the settings of a run use this module, and are read before the datasets library is imported
    import datasets


def check_split_parts(split_parts: Any) -> dict[str, str]:
    """
    Check a description of parts, and return the names of all parts with the split that each is cut from.

    Args:
        split_parts (`dict[str, dict[str, float]]`): split -> part -> share; those of a split sum to 1.

    Raises:
        ValueError: if it is not one.

    Example:

    ```python
    >>> from data_scripts.split_parts import check_split_parts

    >>> check_split_parts({"validation": {"train": 0.9, "test": 0.1}})
    {'train_of_validation': 'validation', 'test_of_validation': 'validation'}

    ```"""
    if not isinstance(split_parts, Mapping):
        raise ValueError(
            f"split_parts is {quote(split_parts)}; expected a mapping, {{validation: {{train: 0.9, test: 0.1}}}}."
        )
    split_of_part = {}
    for split, shares in split_parts.items():
        where = f"split_parts.{split}"
        if not isinstance(shares, Mapping) or not shares:
            raise ValueError(f"{where} is {quote(shares)}; expected parts and shares, {{train: 0.9, test: 0.1}}.")
        for part, share in shares.items():
            if not isinstance(part, str) or not re.fullmatch(r"\w+", part):
                raise ValueError(f"{where} has the part {quote(part)}; expected a name of letters, digits and _.")
            if type(share) not in (int, float) or not 0 < share <= 1:
                raise ValueError(f"{where}.{part} is {quote(share)}; expected a share of more than 0 and at most 1.")
            split_of_part[name_of_part(part, split)] = split
        if abs(sum(shares.values()) - 1) > 1e-6:
            raise ValueError(f"The shares of {where} sum to {sum(shares.values()):g}; expected 1.")
    return split_of_part


def name_of_part(part: str, split: str) -> str:
    """Return what a part of a split is called. It begins as the part does, so `train` is a part to train on."""
    return f"{part}_of_{split}"


def part_of_image(image_id: str, shares: Mapping[str, float]) -> str:
    """
    Return the part that an image is in.

    Args:
        image_id (`str`): of its row.
        shares (`dict[str, float]`): part -> share.

    Example:

    ```python
    >>> from data_scripts.split_parts import part_of_image

    >>> [part_of_image(f"coco_{number}", {"train": 0.8, "test": 0.2}) for number in (9, 25, 30, 34)]
    ['train', 'train', 'test', 'train']

    ```"""
    number = coco_id(image_id, image_id)
    key = image_id if number is None else f"coco_{number}"
    position = int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8]) / 2**64
    ends = zip(shares, itertools.accumulate(shares.values()), strict=True)
    # the last one where the shares sum to less than 1 by rounding
    return next((part for part, end in ends if position < end), list(shares)[-1])


def is_in_part(image_id: str, part: str, shares: Mapping[str, float]) -> bool:
    """Return whether an image is in a part, see `part_of_image`."""
    return part_of_image(image_id, shares) == part


def cut_splits(rows: Mapping[str, Any], split_parts: Mapping, name: str) -> dict[str, Any]:
    """
    Return splits with parts instead of those that are cut.

    Args:
        rows (`dict`): split -> rows or streams of rows.
        split_parts (`dict`): see `check_split_parts`.
        name (`str`): the dataset, for messages.

    Raises:
        ValueError: if there is no such split, or a part has the name of a split, or no image.
    """
    for split in split_parts:
        if split not in rows:
            raise ValueError(f"split_parts cuts {quote(split)}, and the splits of {name!r} are {', '.join(rows)}.")
    cut = {}
    for split, part in rows.items():
        if split not in split_parts:
            cut[split] = part
            continue
        parts = cut_rows(part, split_parts[split])
        for label, found in parts.items():
            if name_of_part(label, split) in rows:
                raise ValueError(f"{name!r} has a split {name_of_part(label, split)!r}: give the part another name.")
            if next(iter(found.select_columns(["image_id"])), None) is None:
                raise ValueError(
                    f"The part {label!r} of the split {split!r} of {name!r} has no images: give it a larger share."
                )
            cut[name_of_part(label, split)] = found
    return cut


def cut_rows(
    rows: "datasets.Dataset | datasets.IterableDataset", shares: Mapping[str, float]
) -> "dict[str, datasets.Dataset | datasets.IterableDataset]":
    """Return the rows of each part of a split."""
    if not hasattr(rows, "__len__"):  # a stream
        return {
            part: rows.filter(partial(is_in_part, part=part, shares=dict(shares)), input_columns=["image_id"])
            for part in shares
        }
    indices = {part: [] for part in shares}
    for index, image_id in enumerate(rows["image_id"][:]):
        indices[part_of_image(image_id, shares)].append(index)
    return {part: rows.select(numbers) for part, numbers in indices.items()}
