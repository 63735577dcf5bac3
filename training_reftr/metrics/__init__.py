"""
Metrics of grounding from what each phrase scored. The folders next to this file are modules of `evaluate` that work
without the project; training computes with their functions. Nothing here is a collective.
"""

from training_reftr.metrics.generalized_referring_comprehension.generalized_referring_comprehension import (
    GeneralizedBoxMetrics,
    box_overlaps,
    count_matches,
)
from training_reftr.metrics.generalized_referring_segmentation.generalized_referring_segmentation import (
    GeneralizedMaskMetrics,
)
from training_reftr.metrics.grounding_presence.grounding_presence import PresenceMetrics
from training_reftr.metrics.referring_expression_comprehension.referring_expression_comprehension import (
    THRESHOLDS,
    BoxMetrics,
    box_ious,
    mean,
    precisions,
)
from training_reftr.metrics.referring_segmentation.referring_segmentation import MaskMetrics, count_pixels


__all__ = [
    "THRESHOLDS",
    "BoxMetrics",
    "GeneralizedBoxMetrics",
    "GeneralizedMaskMetrics",
    "MaskMetrics",
    "PresenceMetrics",
    "box_ious",
    "box_overlaps",
    "count_matches",
    "count_pixels",
    "mean",
    "precisions",
    "recalls",
]


def recalls(merged_ious: list[float], any_box_ious: list[float]) -> dict[str, float]:
    """
    Return the recall of one box for objects with several boxes, by two protocols that are not comparable:
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
