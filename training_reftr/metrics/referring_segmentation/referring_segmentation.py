"""
Referring expression segmentation, one mask per phrase, as a module of `evaluate`. This file works alone: it imports
`evaluate`, `datasets` and `numpy` only.
"""

import math
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

import datasets
import evaluate
import numpy as np


DESCRIPTION = """
Mean IoU, overall IoU, and precision at IoU 0.5 to 0.9 (strictly more) of one mask per phrase, as in referring
expression segmentation (RES).
"""
INPUTS = """
Args:
    predictions: a mask for each phrase, or None where there is no answer, which is an empty mask: COCO's run-length
        encoding {"size": [height, width], "counts": str, bytes or a list of lengths}, or an array, tensor or list of
        shape (height, width) of booleans or zeros and ones.
    references: the true mask of each phrase, of the same size.
Returns:
    mean_iou, overall_iou, precision@0.5 to precision@0.9, num_phrases
Raises:
    ValueError: if a mask is none of these, or the masks of a phrase have two sizes.
Example:

    >>> metric = evaluate.load("metrics/referring_segmentation")
    >>> mask = {"size": [2, 2], "counts": "13"}
    >>> metric.compute(predictions=[mask], references=[mask])["mean_iou"]
    1.0
"""
CITATION = """
@inproceedings{muchen2021referring,
  title={Referring Transformer: A One-step Approach to Multi-task Visual Grounding},
  author={Muchen, Li and Leonid, Sigal},
  booktitle={Thirty-Fifth Conference on Neural Information Processing Systems},
  year={2021}
}
"""
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)  # a hit is strictly more
MAX_PIXELS = 2**40  # of a mask: sums stay exact in 64 bits

QUOTED = reprlib.Repr()  # in messages, which lists that hold each other would fill without end
QUOTED.maxlevel = 2
QUOTED.repr_instance = lambda value, level: (
    repr(value) if value is None or isinstance(value, (bool, float)) else f"<{type(value).__name__}>"
)


def quote(value: Any) -> str:
    """Return a value as `repr` writes it, shortened: a few entries of lists in lists, and arrays by their type."""
    try:
        return QUOTED.repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return f"<{type(value).__name__}>"


def mean(values: Iterable[float]) -> float:
    """Return the mean, 0 of nothing. Sums are exactly rounded, so that no order of the values changes a bit."""
    values = list(values)
    return math.fsum(values) / len(values) if values else 0.0


def entries(values: Any, expectation: str) -> list:
    """
    Return a sequence as a list: a list, tuple, array, Series, column of a dataset or a dataset of torch.

    Raises:
        ValueError: if it is a text, a mapping, a table or has no length.
    """
    is_other = isinstance(values, (str, bytes, Mapping)) or hasattr(values, "columns")
    if (
        is_other
        or not hasattr(values, "__len__")
        or not hasattr(values, "__getitem__")
        or getattr(values, "ndim", 1) < 1
    ):
        raise ValueError(f"{expectation}, got {quote(values)}.")
    if hasattr(values, "__iter__"):
        return list(values)
    return [values[index] for index in range(len(values))]  # a dataset of torch


def precisions(ious: list[float]) -> dict[str, float]:
    """Return `precision@0.5` and so on: the share of IoUs strictly over each threshold."""
    return {f"precision@{threshold}": mean(iou > threshold for iou in ious) for threshold in THRESHOLDS}


class MaskMetrics:
    """
    Referring segmentation: how well masks fit, from the pixels of each intersection and union.

    Example:

    ```python
    >>> from training_reftr.metrics import MaskMetrics

    >>> metrics = MaskMetrics()
    >>> metrics.update([1, 90], [4, 100])
    >>> values = metrics.compute()
    >>> values["mean_iou"], values["overall_iou"], values["precision@0.8"]
    (0.575, 0.875, 0.5)

    ```"""

    def __init__(self) -> None:
        self.intersections = []
        self.unions = []

    def update(self, intersections: Iterable[int], unions: Iterable[int]) -> None:
        """Add phrases by the pixels that mask and truth share, and that either has."""
        self.intersections.extend(int(count) for count in intersections)
        self.unions.extend(int(count) for count in unions)

    def compute(self) -> dict[str, float | int]:
        """
        Return `mean_iou` (mIoU, the mean over phrases; two empty masks give 0), `overall_iou` (oIoU, all intersections
        over all unions), `precision@0.5` to `precision@0.9` (IoU strictly over it), `num_phrases`.
        """
        ious = [
            intersection / union if union else 0.0
            for intersection, union in zip(self.intersections, self.unions, strict=True)
        ]
        total = sum(self.unions)
        return {
            "mean_iou": mean(ious),
            "overall_iou": sum(self.intersections) / total if total else 0.0,
            **precisions(ious),
            "num_phrases": len(ious),
        }


def uncompress_counts(counts: str | bytes) -> list[int]:
    """
    Return the run lengths of COCO's compressed text: five bits per character, lowest first, from the fourth length on
    as differences to the one before the last.

    Raises:
        ValueError: if the text ends within a number or has other characters.
    """
    lengths, value, shift = [], 0, 0
    for code in counts.encode("utf-8") if isinstance(counts, str) else counts:
        bits = code - 48
        if not 0 <= bits < 64 or shift > 30:
            raise ValueError(f"{chr(code)!r} cannot stand there")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the last character of a number
            if bits & 16:
                value -= 1 << shift
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value, shift = 0, 0
    if shift:
        raise ValueError("the text ends within a number")
    return lengths


def array_to_counts(mask: np.ndarray) -> list[int]:
    """Return the run lengths of a mask (height, width), column by column, background first."""
    pixels = mask.T.reshape(-1).astype(bool)
    bounds = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    lengths = np.diff(bounds, prepend=0, append=pixels.size).tolist()
    return [0, *lengths] if pixels.size and pixels[0] else lengths


def has_lists(value: Any) -> bool:
    """Return whether a list holds lists: NumPy would unfold them, however often they are there."""
    return isinstance(value, (list, tuple)) and any(isinstance(entry, (list, tuple)) for entry in value)


def to_run_lengths(value: Any, name: str) -> dict:
    """
    Return a mask as `size` [height, width] and `counts`, a list of run lengths, background first.

    Raises:
        ValueError: if it is neither COCO's run-length encoding nor an array (height, width) of zeros and ones.
    """
    if isinstance(value, dict):
        try:
            height, width = map(int, entries(value["size"], "size must be a sequence"))
            counts = value["counts"]
            is_text = isinstance(counts, (str, bytes))
            lengths = (
                uncompress_counts(counts) if is_text else list(map(int, entries(counts, "counts must be a sequence")))
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f'{name} must be a run-length encoding {{"size": [height, width], "counts": ...}}, '
                f"got {quote(value)} ({error})."
            ) from error
        is_size = min(height, width) > 0 and height * width <= MAX_PIXELS
        if not is_size or min(lengths, default=0) < 0 or sum(lengths) != height * width:
            raise ValueError(
                f"{name} must have a size [height, width] of 1 to {MAX_PIXELS} pixels that its run lengths fill, they "
                f"cover {quote(sum(lengths))}: got {quote(value)}."
            )
        return {"size": [height, width], "counts": lengths}
    if hasattr(value, "detach"):  # a tensor, of any device
        value = value.detach().cpu()
    try:
        is_deep = isinstance(value, (list, tuple)) and any(map(has_lists, value))
        mask = np.empty(0) if is_deep else np.asarray(value)
        if mask.dtype == object and mask.ndim == 1 and not any(map(has_lists, mask)):  # a Series or array of rows
            mask = np.asarray([np.asarray(row).tolist() for row in mask])
    except (TypeError, ValueError):
        mask = np.empty(0)
    if mask.ndim != 2 or mask.dtype.kind not in "biuf" or not mask.size or not ((mask == 0) | (mask == 1)).all():
        raise ValueError(
            f"{name} must be a mask: a run-length encoding or an array (height, width) of booleans or zeros and ones, "
            f"got {quote(value)}."
        )
    return {"size": list(mask.shape), "counts": array_to_counts(mask)}


def to_masks(values: Any, name: str) -> list[dict | None]:
    """
    Return masks as run lengths, see `to_run_lengths`, and None for a prediction that is None.

    Raises:
        ValueError: if they are not a sequence of masks.
    """
    values = entries(values, f"{name} must be a sequence of masks")
    return [
        None if value is None and name == "predictions" else to_run_lengths(value, f"{name}[{index}]")
        for index, value in enumerate(values)
    ]


def count_pixels(segmentation: dict | None, other: dict | None) -> tuple[int, int]:
    """
    Return intersection and union, in pixels, of two masks in any form that `to_run_lengths` takes.

    Raises:
        ValueError: if one is not a mask, or they have two sizes.
    """
    first, second = to_run_lengths(segmentation, "A mask"), to_run_lengths(other, "A mask")
    if first["size"] != second["size"]:
        raise ValueError(
            f"Masks of {tuple(first['size'])} and {tuple(second['size'])} (height, width) cannot be compared: "
            "resize both to the original size of their image."
        )
    ends = [np.cumsum(mask["counts"], dtype=np.int64) for mask in (first, second)]
    bounds = np.union1d(*ends)  # between two of them neither mask changes
    lengths = np.diff(bounds, prepend=0)
    in_first, in_second = (np.searchsorted(mask_ends, bounds) % 2 == 1 for mask_ends in ends)
    return int(lengths[in_first & in_second].sum()), int(lengths[in_first | in_second].sum())


class ReferringSegmentation(evaluate.Metric):
    """Module of `evaluate` for masks, see `DESCRIPTION` and `INPUTS`."""

    def _info(self) -> evaluate.MetricInfo:
        lengths = datasets.Sequence(datasets.Value("int64"))
        mask = {"size": lengths, "counts": lengths}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": mask, "references": mask}),
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add phrases by their predicted and true masks; raises ValueError for what is not a mask."""
        predictions, references = to_masks(predictions, "predictions"), to_masks(references, "references")
        if len(predictions) != len(references):
            raise ValueError(
                f"predictions and references must have the same length, got {len(predictions)} and {len(references)}."
            )
        predictions = [  # no answer is an empty mask of the reference's size
            {"size": true["size"], "counts": [math.prod(true["size"])]} if mask is None else mask
            for mask, true in zip(predictions, references, strict=True)
        ]
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one phrase by its predicted mask, or None, and its true one."""
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def _compute(self, predictions: list, references: list) -> dict[str, float | int]:
        metrics = MaskMetrics()
        for predicted, true in zip(predictions, references, strict=True):
            intersection, union = count_pixels(predicted, true)
            metrics.update([intersection], [union])
        return metrics.compute()
