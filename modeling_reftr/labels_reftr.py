"""Convert annotated boxes and masks to the labels of the model."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from .decoding_reftr import is_undecoded
from .image_processing_reftr import open_undecoded
from .inputs_reftr import is_sequence, nesting_depth, to_list
from .pixels_reftr import check_image
from .quoting_reftr import quote
from .rle_reftr import fill_mask, to_run_lengths


def is_one_target(value: Any, name: str) -> bool:
    """
    Return whether a value is one box (4,) or mask (height, width), and not a list of them, judged by the number of
    dimensions. RLE and PIL images are masks.

    Raises:
        ValueError: if it is neither.
    """
    if name == "masks" and isinstance(value, (dict, Image.Image)):
        return True
    values = to_list(value, name)
    if len(values) == 0 or (is_sequence(values[0]) and len(values[0]) == 0):
        return False  # no targets, or the empty list of those of the first phrase
    return nesting_depth(values) == {"boxes": 1, "masks": 2}[name]


def group_targets(value: Any, name: str, num_phrases: int, is_whole: bool, sentence: str) -> list[list]:
    """
    Return the boxes or masks of each phrase of a sentence.

    Args:
        value: for each phrase one target, or a list of its targets; without phrases, such a value itself.
        name (`str`): "boxes" or "masks".
        num_phrases (`int`): phrases of the sentence.
        is_whole (`bool`): whether the sentence was given without phrases, as its own one.
        sentence (`str`): the sentence, for messages.

    Raises:
        ValueError: if there is not one entry per phrase.

    Example:

    ```python
    >>> from modeling_reftr.labels_reftr import group_targets

    >>> group_targets([[0, 0, 9, 9], [[0, 0, 9, 9], [9, 0, 12, 9]], []], "boxes", 3, False, "a, both cups and no cat")
    [[[0, 0, 9, 9]], [[0, 0, 9, 9], [9, 0, 12, 9]], []]

    ```"""
    if is_whole and is_one_target(value, name):
        return [[value]]
    values = to_list(value, f"{name} of {quote(sentence)}")
    if len(values) != num_phrases:
        raise ValueError(
            f"{len(values)} {name} for the {num_phrases} phrases of {quote(sentence)}: give one per phrase, or a list "
            "of those of each phrase."
        )
    return [
        # what is not a list is refused where its numbers are read
        to_list(target, f"{name} of a phrase of {quote(sentence)}")
        if is_sequence(target) and not is_one_target(target, name)
        else [target]
        for target in values
    ]


def slots_of_targets(counts: dict[str, list[int]], sentence: str) -> dict[str, torch.Tensor]:
    """
    Return `target_slots` and `is_absent` of a label, see [`RefTRForVisualGrounding.forward`]; nothing if every phrase
    has one target.

    Args:
        counts (`dict[str, list[int]]`): "boxes" and "masks" -> number of them for each phrase.
        sentence (`str`): the sentence, for messages.

    Raises:
        ValueError: if phrases have other numbers of masks than of boxes.
    """
    if all(count == 1 for of_phrases in counts.values() for count in of_phrases):
        return {}
    of_phrases = counts.get("boxes")
    if of_phrases is None:
        raise ValueError(
            f"The phrases of {quote(sentence)} have {counts['masks']} masks and no boxes: give the box of each mask."
        )
    if counts.get("masks", of_phrases) != of_phrases:
        raise ValueError(
            f"The phrases of {quote(sentence)} have {of_phrases} boxes and {counts['masks']} masks: give a mask for "
            "each box."
        )
    counts_of_slots = torch.tensor(of_phrases, dtype=torch.long)
    return {
        "target_slots": torch.arange(len(of_phrases)).repeat_interleave(counts_of_slots),
        "is_absent": counts_of_slots == 0,
    }


def to_mask_array(mask: Any, sentence: str) -> np.ndarray:
    """
    Convert a mask (array, tensor, PIL image, or rows in any sequence) to an array.

    Raises:
        ValueError: if its rows differ in length.
    """
    if isinstance(mask, torch.Tensor):
        return mask.detach().cpu().numpy()
    if is_sequence(mask) and not (isinstance(mask, np.ndarray) and mask.dtype != object):
        mask = [
            to_list(row, f"a row of a mask of {quote(sentence)}")
            for row in to_list(mask, f"a mask of {quote(sentence)}")
        ]
        if len({len(row) for row in mask}) > 1:
            raise ValueError(f"The rows of a mask of {quote(sentence)} must have the same length.")
        if any(is_sequence(value) for row in mask for value in row):  # NumPy would unfold it
            raise ValueError(f"A row of a mask of {quote(sentence)} contains lists; give numbers or booleans.")
    return np.asarray(mask)


def stack_masks(masks: Sequence[Any], height: int, width: int, sentence: str) -> np.ndarray:
    """
    Stack masks (arrays, PIL images or COCO RLE) into a bool array (phrases, height, width).

    Raises:
        ValueError: if a mask does not have the size of its image, or is a PIL image of a format that is not accepted.
    """
    arrays = np.zeros((len(masks), height, width), dtype=bool)
    for index, mask in enumerate(masks):
        mask = open_undecoded(mask) if is_undecoded(mask) else mask
        if isinstance(mask, Image.Image):
            check_image(mask, f"A mask of {quote(sentence)}")  # before NumPy decodes it
        mask = mask if isinstance(mask, dict) else to_mask_array(mask, sentence)
        if isinstance(mask, dict):
            lengths, size = to_run_lengths(mask)
        else:
            size = mask.shape
        if size != (height, width):
            raise ValueError(
                f"A mask of {quote(sentence)} has the size {quote(size)}, its image has {(height, width)} (height, "
                "width)."
            )
        arrays[index] = fill_mask(lengths, *size) if isinstance(mask, dict) else mask != 0
    return arrays


def to_label_boxes(boxes: Sequence[Any], height: int, width: int, sentence: str) -> torch.Tensor:
    """
    Convert boxes (x0, y0, x1, y1) in pixels to (center_x, center_y, width, height) in 0..1 of the image.

    A box may exceed the image by one pixel, as annotations round, and is clipped.

    Args:
        boxes (`(phrases, 4)`): the boxes of a sentence's phrases.
        height, width (`int`): the size of the image.
        sentence (`str`): the sentence, for messages.

    Returns:
        `torch.Tensor` of shape `(phrases, 4)`.

    Raises:
        ValueError: if a box is empty, inverted, not finite or outside the image.

    Example:

    ```python
    >>> from modeling_reftr.labels_reftr import to_label_boxes

    >>> to_label_boxes([[160, 0, 480, 480]], height=480, width=640, sentence="the bus")
    tensor([[0.5000, 0.5000, 0.5000, 1.0000]])

    ```"""
    labels = []
    for box in boxes:
        try:
            box = [float(side) for side in to_list(box, "box")]
            x0, y0, x1, y1 = box
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"The box {quote(box)} of {quote(sentence)} must be four numbers, (x0, y0, x1, y1) in pixels; give "
                "one box per phrase."
            ) from error
        if not (x0 < x1 and y0 < y1 and math.isfinite(sum(box))):
            raise ValueError(f"The box {box} of {quote(sentence)} must be (x0, y0, x1, y1) with x0 < x1 and y0 < y1.")
        left, top, right, bottom = (
            max(x0, 0) / width,
            max(y0, 0) / height,
            min(x1, width) / width,
            min(y1, height) / height,
        )
        is_outside = min(x0, y0) < -1 or x1 > width + 1 or y1 > height + 1
        if is_outside or left >= right or top >= bottom:
            raise ValueError(f"The box {box} of {quote(sentence)} exceeds its image of {width} x {height} pixels.")
        labels.append([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top])
    return torch.tensor(labels, dtype=torch.float32).reshape(-1, 4)
