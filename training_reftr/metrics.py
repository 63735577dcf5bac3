"""
Figures of grounding from what each phrase scored. Sums are exactly rounded, so that neither the order of the phrases
nor the number of processes that they come from changes a bit. Nothing here holds a collective.
"""

import math
from collections.abc import Iterable

from pycocotools import mask as coco_mask


THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)  # a hit is strictly more


def mean(values: Iterable[float]) -> float:
    """The mean, 0 of nothing."""
    values = list(values)
    return math.fsum(values) / len(values) if values else 0.0


def precisions(ious: list[float]) -> dict[str, float]:
    """`precision@0.5` and so on: the share of IoUs strictly over each threshold."""
    return {f"precision@{threshold}": mean(iou > threshold for iou in ious) for threshold in THRESHOLDS}


def recalls(merged_ious: list[float], any_box_ious: list[float]) -> dict[str, float]:
    """
    Recall of the one answer, where objects have several boxes; two protocols whose figures do not compare:
    `merged_box_recall@1` (RefTR, TransVG: IoU strictly over 0.5 with the union of the boxes) and `any_box_recall@1`
    (Kosmos-2, Grounding DINO: with any one of them).

    Example:

    ```python
    >>> from training_reftr.metrics import recalls

    >>> recalls([0.4, 0.8], [0.9, 0.8])
    {'merged_box_recall@1': 0.5, 'any_box_recall@1': 1.0}

    ```"""
    return {
        "merged_box_recall@1": precisions(merged_ious)["precision@0.5"],
        "any_box_recall@1": precisions(any_box_ious)["precision@0.5"],
    }


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

    def __init__(self):
        self.ious = []

    def update(self, ious: Iterable[float]):
        """Add phrases by the IoU of their box with the true one, 0 where there is no answer."""
        self.ious.extend(float(iou) for iou in ious)

    def compute(self) -> dict[str, float | int]:
        """`accuracy@0.5` (IoU strictly over 0.5), `mean_iou`, `precision@0.5` to `precision@0.9`, `num_phrases`."""
        hits = precisions(self.ious)
        return {
            "accuracy@0.5": hits["precision@0.5"],
            "mean_iou": mean(self.ious),
            **hits,
            "num_phrases": len(self.ious),
        }


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

    def __init__(self):
        self.intersections = []
        self.unions = []

    def update(self, intersections: Iterable[int], unions: Iterable[int]):
        """Add phrases by the pixels that mask and truth share, and that either has."""
        self.intersections.extend(int(count) for count in intersections)
        self.unions.extend(int(count) for count in unions)

    def compute(self) -> dict[str, float | int]:
        """
        `mean_iou` (mIoU, the mean over phrases; two empty masks give 0), `overall_iou` (oIoU, all intersections over
        all unions), `precision@0.5` to `precision@0.9` (IoU strictly over it), `num_phrases`.
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


def count_pixels(segmentation: dict, other: dict) -> tuple[int, int]:
    """
    Intersection and union, in pixels, of two masks in COCO's run-length encoding (`size`, `counts`).

    Raises:
        ValueError: if they are not of one size.
    """
    if list(segmentation["size"]) != list(other["size"]):
        raise ValueError(
            f"Masks of {tuple(segmentation['size'])} and {tuple(other['size'])} (height, width) cannot be compared: "
            "bring them to the original size of their picture."
        )
    pair = [segmentation, other]
    return tuple(int(coco_mask.area(coco_mask.merge(pair, intersect=intersect))) for intersect in (True, False))
