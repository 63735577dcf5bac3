"""Referring segmentation as a module of `evaluate`."""

import datasets
import evaluate

from training_reftr.metrics import MaskMetrics, count_pixels


DESCRIPTION = "Mean IoU, overall IoU, and precision at IoU 0.5 to 0.9 (strictly more) of one mask a phrase."
INPUTS = """
Args:
    predictions: a mask a phrase, in COCO's run-length encoding: {"size": [height, width], "counts": str}.
    references: the true mask of each phrase, of the same size.
Returns:
    mean_iou, overall_iou, precision@0.5 to precision@0.9, num_phrases
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


class ReferringSegmentation(evaluate.Metric):
    """See `training_reftr.metrics.MaskMetrics`."""

    def _info(self):
        mask = {"size": datasets.Sequence(datasets.Value("int64"), length=2), "counts": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": mask, "references": mask}),
        )

    def _compute(self, predictions, references):
        metrics = MaskMetrics()
        for predicted, true in zip(predictions, references, strict=True):
            intersection, union = count_pixels(predicted, true)
            metrics.update([intersection], [union])
        return metrics.compute()
