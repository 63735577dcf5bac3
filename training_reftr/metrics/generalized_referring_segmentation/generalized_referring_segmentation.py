"""
Generalized referring expression segmentation, one mask or none per phrase, as a module of `evaluate`. This file works
alone: it imports `evaluate`, `datasets` and `numpy` only.
"""

import math
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

import datasets
import evaluate
import numpy as np


DESCRIPTION = """
gIoU, cIoU, N-acc and T-acc of one mask, or none, per phrase that may refer to nothing, as in generalized referring
expression segmentation (GRES, gRefCOCO). All values are fractions, not percentages.
"""
INPUTS = """
Args:
    predictions: a mask for each phrase, or None where the answer is that it refers to nothing, which is an empty mask:
        COCO's run-length encoding {"size": [height, width], "counts": str, bytes or a list of lengths}, or an array,
        tensor or list of shape (height, width) of booleans or zeros and ones. An empty mask answers "nothing", as in
        the paper. {"mask": mask, "is_absent": bool} is for models that predict this apart from the mask, as the
        authors' does: then `is_absent` alone says whether the answer is "nothing".
    references: the true mask of each phrase, of the same size, with all of its objects; empty if it refers to nothing.
Returns:
    giou: mean IoU over phrases; the IoU of a phrase without a target is 1 if the answer is "nothing", else 0
    ciou: all intersections over all unions. The union of a phrase whose target is answered by "nothing" counts, with
        the mask if one is given; that of a phrase without a target counts unless the answer is "nothing"
    n_acc, t_acc: share of phrases without a target answered by "nothing", and of phrases with a target not answered so
    num_no_target, num_phrases
    A share of nothing is 0.
Raises:
    ValueError: if a mask is none of these, or the masks of a phrase have two sizes.
Example:

    >>> metric = evaluate.load("metrics/generalized_referring_segmentation")
    >>> mask, empty = {"size": [2, 2], "counts": "13"}, {"size": [2, 2], "counts": "4"}
    >>> metric.compute(predictions=[mask, None], references=[mask, empty])["giou"]
    1.0
"""
CITATION = """
@inproceedings{liu2023gres,
  title={{GRES}: Generalized Referring Expression Segmentation},
  author={Liu, Chang and Ding, Henghui and Jiang, Xudong},
  booktitle={CVPR},
  year={2023}
}
"""
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


class GeneralizedMaskMetrics:
    """
    Generalized referring segmentation: how well masks fit, where an answer may be that a phrase refers to nothing.

    Example:

    ```python
    >>> from training_reftr.metrics import GeneralizedMaskMetrics

    >>> metrics = GeneralizedMaskMetrics()
    >>> metrics.update([60, 0, 0], [80, 0, 20], are_rejected=[False, True, True], are_absent=[False, True, False])
    >>> values = metrics.compute()
    >>> round(values["giou"], 3), values["ciou"], values["n_acc"], values["t_acc"]
    (0.583, 0.6, 1.0, 0.5)

    ```"""

    def __init__(self) -> None:
        self.phrases = []

    def update(
        self,
        intersections: Iterable[int],
        unions: Iterable[int],
        are_rejected: Iterable[bool],
        are_absent: Iterable[bool],
    ) -> None:
        """
        Add phrases by the pixels that mask and truth share, and that either has; by whether the answer is that the
        phrase refers to nothing, and by whether that is true.
        """
        for intersection, union, is_rejected, is_absent in zip(
            intersections, unions, are_rejected, are_absent, strict=True
        ):
            is_answered = not is_rejected and not is_absent
            shared = int(intersection) if is_answered else 0
            either = 0 if is_rejected and is_absent else int(union)
            self.phrases.append((shared, either, bool(is_rejected), bool(is_absent)))

    def compute(self) -> dict[str, float | int]:
        """Return `giou`, `ciou`, `n_acc`, `t_acc` as fractions, see `INPUTS`, `num_no_target` and `num_phrases`."""
        ious = [
            float(is_rejected) if is_absent else shared / either if either else 0.0
            for shared, either, is_rejected, is_absent in self.phrases
        ]
        total = sum(either for _, either, _, _ in self.phrases)
        return {
            "giou": mean(ious),
            "ciou": sum(shared for shared, _, _, _ in self.phrases) / total if total else 0.0,
            "n_acc": mean(is_rejected for _, _, is_rejected, is_absent in self.phrases if is_absent),
            "t_acc": mean(not is_rejected for _, _, is_rejected, is_absent in self.phrases if not is_absent),
            "num_no_target": sum(is_absent for _, _, _, is_absent in self.phrases),
            "num_phrases": len(self.phrases),
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


def mask_area(mask: dict) -> int:
    """Return the number of pixels inside of a mask, given by its run lengths."""
    return sum(mask["counts"][1::2])


def to_mask_answer(value: Any, true_mask: dict, name: str) -> dict:
    """
    Return an answer as run lengths, see `to_run_lengths`, with `is_absent`: whether it says that the phrase refers to
    nothing. The mask of None is empty and has the size of the true mask.

    Raises:
        ValueError: if it is neither None, a mask, nor a dict of `mask` and `is_absent`.
    """
    if value is None:
        return {"size": true_mask["size"], "counts": [math.prod(true_mask["size"])], "is_absent": True}
    if not isinstance(value, Mapping) or "mask" not in value:
        mask = to_run_lengths(value, name)
        return {**mask, "is_absent": mask_area(mask) == 0}
    mask, is_absent = to_run_lengths(value["mask"], f"{name}['mask']"), value.get("is_absent")
    if getattr(is_absent, "shape", None) == ():  # a boolean of NumPy or torch
        is_absent = is_absent.item()
    if not isinstance(is_absent, bool):
        raise ValueError(f"{name}['is_absent'] must be True or False, got {quote(is_absent)}.")
    return {**mask, "is_absent": is_absent}


def pair_masks(predictions: Any, references: Any) -> tuple[list[dict], list[dict]]:
    """
    Return predictions and references as run lengths, predictions with `is_absent`, see `to_mask_answer`.

    Raises:
        ValueError: if one is not a mask, or their numbers differ.
    """
    predictions = entries(predictions, "predictions must be a sequence of masks")
    references = entries(references, "references must be a sequence of masks")
    if len(predictions) != len(references):
        raise ValueError(
            f"predictions and references must have the same length, got {len(predictions)} and {len(references)}."
        )
    references = [to_run_lengths(value, f"references[{index}]") for index, value in enumerate(references)]
    predictions = [
        to_mask_answer(value, true_mask, f"predictions[{index}]")
        for index, (value, true_mask) in enumerate(zip(predictions, references, strict=True))
    ]
    return predictions, references


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


class GeneralizedReferringSegmentation(evaluate.Metric):
    """Module of `evaluate` for masks of phrases that may refer to nothing, see `DESCRIPTION` and `INPUTS`."""

    def _info(self) -> evaluate.MetricInfo:
        lengths = datasets.Sequence(datasets.Value("int64"))
        mask = {"size": lengths, "counts": lengths}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": {**mask, "is_absent": datasets.Value("bool")}, "references": mask}
            ),
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add phrases by their predicted and true masks, see `pair_masks`."""
        predictions, references = pair_masks(predictions, references)
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one phrase by its predicted mask, or None, and its true one."""
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def _compute(self, predictions: list, references: list) -> dict[str, float | int]:
        metrics = GeneralizedMaskMetrics()
        for predicted, true in zip(predictions, references, strict=True):
            intersection, union = count_pixels(predicted, true)
            metrics.update([intersection], [union], [predicted["is_absent"]], [mask_area(true) == 0])
        return metrics.compute()
