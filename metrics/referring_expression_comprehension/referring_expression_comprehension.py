"""Referring expression comprehension as a module of `evaluate`."""

import datasets
import evaluate
import torch
from torchvision.ops import box_iou

from training_reftr.metrics import BoxMetrics


DESCRIPTION = "Accuracy at IoU 0.5 (strictly more), mean IoU, and precision at IoU 0.5 to 0.9 of one box a phrase."
INPUTS = """
Args:
    predictions: a box a phrase, (x0, y0, x1, y1).
    references: the true box of each phrase, in the same units.
Returns:
    accuracy@0.5, mean_iou, precision@0.5 to precision@0.9, num_phrases
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


class ReferringExpressionComprehension(evaluate.Metric):
    """See `training_reftr.metrics.BoxMetrics`."""

    def _info(self):
        boxes_xyxy = datasets.Sequence(datasets.Value("float64"), length=4)
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": boxes_xyxy, "references": boxes_xyxy}),
        )

    def _compute(self, predictions, references):
        metrics = BoxMetrics()
        for predicted, true in zip(predictions, references, strict=True):
            boxes_xyxy = torch.tensor([predicted, true], dtype=torch.float64)
            metrics.update(box_iou(boxes_xyxy[:1], boxes_xyxy[1:])[0].nan_to_num().tolist())
        return metrics.compute()
