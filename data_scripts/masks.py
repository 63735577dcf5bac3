"""Encode, decode and validate masks in COCO's run-length encoding; pycocotools itself does not validate its input."""

import numpy as np
from pycocotools import mask as coco_mask

from .quoting import quote
from .reading import MAX_PIXELS


def uncompress_counts(text: str) -> list[int]:
    """
    Return the run lengths of COCO's compressed text, background first.

    A character holds five bits, lowest first; from the fourth number on, differences to the one before the last are
    stored.

    Raises:
        ValueError: if the text ends within a number, has other characters, or a length is negative or astronomical.

    Example:

    ```python
    >>> from data_scripts.masks import uncompress_counts

    >>> uncompress_counts("52203")
    [5, 2, 2, 2, 5]

    ```"""
    counts, value, shift = [], 0, 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            raise ValueError(f"its counts are not a run-length encoding at {character!r}")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the number's last character
            if bits & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value, shift = 0, 0
    if shift or min(counts, default=0) < 0:
        raise ValueError("its counts are not a run-length encoding: they end within a number, or one is negative")
    return counts


def check_counts(counts: str | list[int], height: int, width: int) -> list[int]:
    """
    Return run lengths, compressed or not, as a list that fills a mask.

    Raises:
        ValueError: if they are none, or do not fill the mask: pycocotools would read or write past its memory.
    """
    is_size = all(type(side) is int and side > 0 for side in (height, width))
    if not is_size or height * width > MAX_PIXELS:
        raise ValueError(
            f"its size is [{quote(height)}, {quote(width)}]; expected [height, width] of integers, with at most "
            f"{MAX_PIXELS:,} pixels"
        )
    lengths = uncompress_counts(counts) if isinstance(counts, str) else counts
    if not isinstance(lengths, list) or not all(type(length) is int and length >= 0 for length in lengths):
        raise ValueError("its counts are not a run-length encoding")
    covered = sum(lengths)
    if covered != height * width:
        raise ValueError(f"its runs cover {quote(covered)} pixels of {height * width}")
    return lengths


def encode_counts(counts: str | list[int], height: int, width: int) -> dict:
    """
    Return run lengths, compressed or not, as pycocotools takes them: `size` [height, width] and `counts` (bytes).

    Raises:
        ValueError: see `check_counts`.
    """
    lengths = check_counts(counts, height, width)
    return coco_mask.frPyObjects({"size": [height, width], "counts": lengths}, height, width)


def encode_mask(mask: np.ndarray) -> dict:
    """Encode an array of shape (height, width), nonzero inside the object, as pycocotools does."""
    return coco_mask.encode(np.asfortranarray(mask != 0, dtype=np.uint8))


def decode_mask(encoded: dict) -> np.ndarray:
    """Decode what `encode_mask` returns to an array of shape (height, width)."""
    return coco_mask.decode(encoded)


def encode_polygons(polygons: list[list[float]], height: int, width: int) -> dict:
    """Encode the union of polygons [x, y, x, y, ...] of at least three points, as pycocotools does."""
    return merge_masks(coco_mask.frPyObjects(polygons, height, width))


def merge_masks(encoded: list[dict]) -> dict:
    """Return the union of encoded masks of one size."""
    return encoded[0] if len(encoded) == 1 else coco_mask.merge(encoded)


def mask_iou(segmentation: dict, other: dict) -> float:
    """
    Return the IoU of two masks of one size, given as `segmentation` of the schema; 0 if both are empty.

    Example:

    ```python
    >>> from data_scripts.masks import mask_iou

    >>> mask_iou({"size": [2, 2], "counts": [0, 2, 2]}, {"size": [2, 2], "counts": [1, 3]})
    0.25

    ```"""
    encoded = [encode_counts(mask["counts"], *mask["size"]) for mask in (segmentation, other)]
    return float(coco_mask.iou(encoded[:1], encoded[1:], [False])[0, 0])


def resize_to_nearest(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """
    Resize a mask by the published rule for masks, torch's "nearest": coordinates are rounded down.

    Example:

    ```python
    >>> import numpy as np
    >>> from data_scripts.masks import resize_to_nearest

    >>> resize_to_nearest(np.array([[0, 1, 2]]), 1, 5)
    array([[0, 0, 1, 1, 2]])

    ```"""
    rows, columns = (
        # in single precision, as torch has it
        np.minimum(np.arange(new, dtype=np.float32) * (np.float32(old) / np.float32(new)), old - 1).astype(np.int64)
        for old, new in zip(mask.shape, (height, width), strict=True)
    )
    return mask[rows[:, None], columns]


def to_segmentation(encoded: dict, keep_empty: bool = False) -> dict | None:
    """
    Return an encoding of pycocotools as a `segmentation` of the schema, whose counts are text; None for an empty mask,
    unless `keep_empty`.
    """
    if not keep_empty and not coco_mask.area(encoded):
        return None
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def decode_segmentation(segmentation: dict | None) -> np.ndarray | None:
    """
    Return the mask of a `segmentation` of the schema, (height, width) of zeros and ones; None for none.

    Raises:
        ValueError: see `check_counts`.
    """
    if segmentation is None:
        return None
    size = segmentation.get("size")
    if not isinstance(size, list | tuple) or len(size) != 2:
        raise ValueError(f"its size is {quote(size)}; expected [height, width]")
    return coco_mask.decode(encode_counts(segmentation.get("counts"), *size))


def is_empty(segmentation: dict) -> bool:
    """
    Return whether no pixel belongs to a mask.

    Example:

    ```python
    >>> from data_scripts.masks import is_empty

    >>> is_empty({"size": [4, 4], "counts": "52203"}), is_empty({"size": [4, 4], "counts": "`0"})
    (False, True)

    ```"""
    return not area_of(segmentation)


def area_of(segmentation: dict) -> int:
    """
    Return the number of pixels of a mask.

    Example:

    ```python
    >>> from data_scripts.masks import area_of

    >>> area_of({"size": [4, 4], "counts": "52203"})
    4

    ```"""
    return int(coco_mask.area(_as_bytes(segmentation)))


def box_of(segmentation: dict) -> list[float]:
    """
    Return the smallest box (xyxy) that contains a mask.

    Example:

    ```python
    >>> from data_scripts.masks import box_of

    >>> box_of({"size": [4, 4], "counts": "52203"})
    [1.0, 1.0, 3.0, 3.0]

    ```"""
    x, y, width, height = coco_mask.toBbox(_as_bytes(segmentation)).tolist()
    return [x, y, x + width, y + height]


def _as_bytes(segmentation: dict) -> dict:
    return {"size": segmentation["size"], "counts": segmentation["counts"].encode("ascii")}
