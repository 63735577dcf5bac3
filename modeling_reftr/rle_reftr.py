"""Read and write masks in COCO's run-length encoding (RLE)."""

import operator
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import numpy as np
import torch

from .decoding_reftr import MAX_PIXELS
from .inputs_reftr import is_sequence, to_list
from .quoting_reftr import explain, quote


def to_coco_rle(mask: np.ndarray | torch.Tensor) -> dict[str, Any]:
    """
    Encode a mask as COCO's compressed RLE.

    Args:
        mask (`np.ndarray` or `torch.Tensor` of shape `(height, width)`): nonzero where the object is.

    Returns:
        `dict`: `size` [height, width] and `counts` (`str`).
    """
    from pycocotools import mask as coco_mask  # an optional dependency of the model's folder on the Hub

    array = mask.cpu().numpy() if isinstance(mask, torch.Tensor) else np.asarray(mask)
    encoded = coco_mask.encode(np.asfortranarray(array != 0, dtype=np.uint8))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def from_coco_rle(segmentation: Mapping[str, Any]) -> np.ndarray:
    """
    Decode COCO's RLE to a bool mask of shape (height, width).

    Args:
        segmentation (`dict`): `size` [height, width], and `counts` as `str`, `bytes` or a list of run lengths.

    Raises:
        ValueError: see `to_run_lengths`.

    Example:

    ```python
    >>> from modeling_reftr.rle_reftr import from_coco_rle

    >>> from_coco_rle({"size": [2, 3], "counts": [2, 2, 2]}).astype(int)
    array([[0, 1, 0],
           [0, 1, 0]])

    ```"""
    lengths, size = to_run_lengths(segmentation)
    return fill_mask(lengths, *size)


def fill_mask(lengths: list[int], height: int, width: int) -> np.ndarray:
    """Return the bool mask (height, width) of run lengths that cover it column by column, background first."""
    is_object = np.arange(len(lengths)) % 2 == 1
    return np.repeat(is_object, lengths).reshape(width, height).T


def to_run_lengths(segmentation: Mapping[str, Any]) -> tuple[list[int], tuple[int, int]]:
    """
    Return the run lengths, background first, and the (height, width) of COCO's RLE, without allocating the mask.

    Raises:
        ValueError: if the size is not [height, width] with at most `MAX_PIXELS` pixels, or the run lengths do not sum
            to the number of pixels.
    """
    if not isinstance(segmentation, Mapping) or not {"size", "counts"} <= segmentation.keys():
        raise ValueError(
            f'A run-length encoding must have "size" [height, width] and "counts", got {quote(segmentation)}.'
        )
    size, counts = segmentation["size"], segmentation["counts"]
    sides = to_list(size, "size") if is_sequence(size) else []
    is_size = len(sides) == 2 and all(isinstance(side, Integral) and not isinstance(side, bool) for side in sides)
    if not is_size or min(sides) < 1 or int(sides[0]) * int(sides[1]) > MAX_PIXELS:
        raise ValueError(
            f"The size of a run-length encoding must be [height, width], positive integers with at most "
            f"{MAX_PIXELS:,} pixels, got size={quote(size)}."
        )
    height, width = map(int, sides)
    try:
        lengths = uncompress_counts(counts) if isinstance(counts, (str, bytes)) else to_list(counts, "counts")
        lengths = [operator.index(length) for length in lengths]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The run lengths {quote(counts)} do not encode a mask of {[height, width]} [height, width]: "
            f"{explain(error)}"
        ) from error
    if min(lengths, default=0) < 0 or sum(lengths) != height * width:
        raise ValueError(f"The run lengths {quote(counts)} do not fill a mask of {[height, width]} [height, width].")
    return lengths, (height, width)


def uncompress_counts(counts: str | bytes) -> list[int]:
    """
    Return the run lengths of COCO's compressed counts.

    Each character holds five bits, lowest first; from the fourth run on, the difference to the run before the last is
    stored.

    Raises:
        ValueError: if the text ends within a number or contains other characters.
    """
    lengths, value, shift = [], 0, 0
    for code in counts.encode("utf-8") if isinstance(counts, str) else counts:
        bits = code - 48
        if not 0 <= bits < 64 or shift > 30:
            raise ValueError(f"{chr(code)!r} is not valid there.")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the last character of a number
            if bits & 16:
                value -= 1 << shift
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value, shift = 0, 0
    if shift:
        raise ValueError("The text ends within a number.")
    return lengths
