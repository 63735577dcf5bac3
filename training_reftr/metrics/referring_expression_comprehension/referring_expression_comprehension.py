"""
Referring expression comprehension, one box per phrase, as a module of `evaluate`. This file works alone: it imports
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
Accuracy at IoU 0.5 (strictly more), mean IoU, and precision at IoU 0.5 to 0.9 of one box per phrase, as in visual
grounding, referring expression comprehension (REC) and phrase grounding.
"""
INPUTS = """
Args:
    predictions: a box (x0, y0, x1, y1) for each phrase, or None where there is no answer, which is a miss.
    references: the true box of each phrase, in the same units. Lists, arrays and tensors are taken.
Returns:
    accuracy@0.5, mean_iou, precision@0.5 to precision@0.9, num_phrases
Raises:
    ValueError: if a box has other than four finite numbers, or its second corner lies before the first.
Example:

    >>> metric = evaluate.load("metrics/referring_expression_comprehension")
    >>> metric.compute(predictions=[[0, 0, 8, 10]], references=[[0, 0, 10, 10]])["mean_iou"]
    0.8
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
NO_ANSWER = [0.0, 0.0, 0.0, 0.0]  # the IoU of a box without extent is 0 with every box
MAX_COORDINATE = 1e100  # areas of larger boxes are not finite

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


def box_ious(boxes_xyxy: np.ndarray, others_xyxy: np.ndarray) -> np.ndarray:
    """
    Return the IoUs of boxes of shape (..., 4) with others, whose shapes broadcast; 0 where neither has an extent.

    Example:

    ```python
    >>> from training_reftr.metrics import box_ious

    >>> box_ious([[0, 0, 8, 10], [0, 0, 0, 0]], [0, 0, 10, 10]).tolist()
    [0.8, 0.0]

    ```"""
    boxes, others = np.asarray(boxes_xyxy, dtype=np.float64), np.asarray(others_xyxy, dtype=np.float64)
    sides = np.minimum(boxes[..., 2:], others[..., 2:]) - np.maximum(boxes[..., :2], others[..., :2])
    intersections = np.clip(sides, 0, None).prod(axis=-1)
    unions = (boxes[..., 2:] - boxes[..., :2]).prod(axis=-1) + (others[..., 2:] - others[..., :2]).prod(axis=-1)
    unions = unions - intersections
    return np.divide(intersections, unions, out=np.zeros_like(intersections), where=unions > 0)


class BoxMetrics:
    """
    Referring expression comprehension: how well boxes fit.

    Example:

    ```python
    >>> from training_reftr.metrics import BoxMetrics

    >>> metrics = BoxMetrics()
    >>> metrics.update([0.5, 0.75])
    >>> metrics.update([1.0, 0.0])
    >>> metrics.compute()["accuracy@0.5"], metrics.compute()["mean_iou"]
    (0.5, 0.5625)

    ```"""

    def __init__(self) -> None:
        self.ious = []

    def update(self, ious: Iterable[float]) -> None:
        """Add phrases by the IoU of their box with the true one, 0 where there is no answer."""
        self.ious.extend(float(iou) for iou in ious)

    def compute(self) -> dict[str, float | int]:
        """Return `accuracy@0.5` (strictly over 0.5), `mean_iou`, `precision@0.5` to `@0.9`, `num_phrases`."""
        hits = precisions(self.ious)
        return {
            "accuracy@0.5": hits["precision@0.5"],
            "mean_iou": mean(self.ious),
            **hits,
            "num_phrases": len(self.ious),
        }


def has_lists(value: Any) -> bool:
    """Return whether a list holds lists: NumPy would unfold them, however often they are there."""
    return isinstance(value, (list, tuple)) and any(isinstance(entry, (list, tuple)) for entry in value)


def to_box(value: Any, name: str) -> list[float]:
    """
    Return a box as four floats.

    Raises:
        ValueError: if it is not a box (x0, y0, x1, y1).
    """
    if hasattr(value, "detach"):  # a tensor, of any device and dtype
        value = value.detach().cpu().double()
    try:
        box = np.empty(0) if has_lists(value) else np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        box = np.empty(0)
    if box.shape != (4,) or not (np.abs(box) < MAX_COORDINATE).all() or (box[:2] > box[2:]).any():
        raise ValueError(
            f"{name} must be a box (x0, y0, x1, y1) of finite numbers with x0 <= x1 and y0 <= y1, got {quote(value)}."
        )
    return box.tolist()


def to_boxes(values: Any, name: str) -> list[list[float]]:
    """
    Return boxes as lists of four floats, `NO_ANSWER` for a prediction that is None.

    Raises:
        ValueError: if they are not a sequence of boxes.
    """
    values = entries(values, f"{name} must be a sequence of boxes")
    return [
        NO_ANSWER if value is None and name == "predictions" else to_box(value, f"{name}[{index}]")
        for index, value in enumerate(values)
    ]


class ReferringExpressionComprehension(evaluate.Metric):
    """Module of `evaluate` for boxes, see `DESCRIPTION` and `INPUTS`."""

    def _info(self) -> evaluate.MetricInfo:
        boxes_xyxy = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": boxes_xyxy, "references": boxes_xyxy}),
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add phrases by their predicted and true boxes; raises ValueError for what is not a box."""
        predictions, references = to_boxes(predictions, "predictions"), to_boxes(references, "references")
        if len(predictions) != len(references):
            raise ValueError(
                f"predictions and references must have the same length, got {len(predictions)} and {len(references)}."
            )
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one phrase by its predicted box, or None, and its true one."""
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def _compute(self, predictions: list, references: list) -> dict[str, float | int]:
        metrics = BoxMetrics()
        metrics.update(box_ious(np.reshape(predictions, (-1, 4)), np.reshape(references, (-1, 4))))
        return metrics.compute()
