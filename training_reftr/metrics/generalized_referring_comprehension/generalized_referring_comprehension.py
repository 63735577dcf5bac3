"""
Generalized referring expression comprehension, any number of boxes per phrase, as a module of `evaluate`. This file
works alone: it imports `evaluate`, `datasets`, `numpy` and `pycocotools` only.
"""

import contextlib
import io
import math
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

import datasets
import evaluate
import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


DESCRIPTION = """
Pr@(F1=1, IoU>=0.5), N-acc, T-acc and average precision of phrases that refer to none, one or several objects, as in
generalized referring expression comprehension (GREC, gRefCOCO). All values are fractions, not percentages.
"""
INPUTS = """
Args:
    predictions: for each phrase {"boxes": boxes (x0, y0, x1, y1), "scores": one number per box}, whose other
        keys are ignored; None where the answer is that the phrase refers to nothing, as without boxes.
    references: for each phrase the list of its true boxes, in the same units, empty if it refers to nothing.
    threshold: boxes with a lower score are not answers, except for average precision, which ranks all boxes.
        0.7 by default, as in the authors' script.
Returns:
    pr_f1_iou@0.5: share of phrases whose boxes and true boxes match one to one with IoU >= 0.5 (Pr@(F1=1, IoU>=0.5) of
        the paper)
    pr_f1_generalized_iou@0.5: the same with generalized IoU, as computed by the authors' script
    n_acc, t_acc: share of phrases without a target that have no box, and of phrases with targets that have a box
    average_precision@0.5, average_precision@0.5:0.95: of boxes ranked by score, by COCO's rules for one category
    per_group: both Pr and num_phrases of phrases with none, one and several targets
    num_no_target, num_phrases
    A share of nothing is 0.
Raises:
    ValueError: if a prediction is not boxes with scores, or a box has other than four finite numbers.
Example:

    >>> metric = evaluate.load("metrics/generalized_referring_comprehension")
    >>> prediction = {"boxes": [[0, 0, 8, 10], [5, 5, 6, 6]], "scores": [0.9, 0.2]}
    >>> metric.compute(predictions=[prediction, None], references=[[[0, 0, 10, 10]], []])["pr_f1_iou@0.5"]
    1.0
"""
CITATION = """
@inproceedings{liu2023gres,
  title={{GRES}: Generalized Referring Expression Segmentation},
  author={Liu, Chang and Ding, Henghui and Jiang, Xudong},
  booktitle={CVPR},
  year={2023}
}
@article{he2023grec,
  title={{GREC}: Generalized Referring Expression Comprehension},
  author={He, Shuting and Ding, Henghui and Liu, Chang and Jiang, Xudong},
  journal={arXiv preprint arXiv:2308.16182},
  year={2023}
}
"""
MIN_OVERLAP = 0.5  # a match has at least this IoU
THRESHOLD = 0.7  # of the authors' script
GROUPS = ("none", "one", "several")  # by the number of true boxes
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


def box_overlaps(boxes_xyxy: list, others_xyxy: list) -> dict[str, np.ndarray]:
    """
    Return `iou` and `generalized_iou`, each of shape (boxes, others), of every box with every other one; 0 where
    neither has an extent. Generalized IoU is less by the share of the smallest box around both that neither covers.

    Example:

    ```python
    >>> from training_reftr.metrics import box_overlaps

    >>> overlaps = box_overlaps([[0, 0, 10, 10]], [[0, 0, 8, 10], [10, 0, 20, 20]])
    >>> {name: values.round(3).tolist() for name, values in overlaps.items()}
    {'iou': [[0.8, 0.0]], 'generalized_iou': [[0.8, -0.25]]}

    ```"""
    boxes = np.reshape(np.asarray(boxes_xyxy, dtype=np.float64), (-1, 1, 4))
    others = np.reshape(np.asarray(others_xyxy, dtype=np.float64), (1, -1, 4))
    sides = np.minimum(boxes[..., 2:], others[..., 2:]) - np.maximum(boxes[..., :2], others[..., :2])
    intersections = np.clip(sides, 0, None).prod(axis=-1)
    unions = (boxes[..., 2:] - boxes[..., :2]).prod(axis=-1) + (others[..., 2:] - others[..., :2]).prod(axis=-1)
    unions = unions - intersections
    hulls = np.maximum(boxes[..., 2:], others[..., 2:]) - np.minimum(boxes[..., :2], others[..., :2])
    hulls = hulls.prod(axis=-1)
    ious = np.divide(intersections, unions, out=np.zeros_like(intersections), where=unions > 0)
    gaps = np.divide(hulls - unions, hulls, out=np.zeros_like(hulls), where=hulls > 0)
    return {"iou": ious, "generalized_iou": ious - gaps}


def count_matches(overlaps: np.ndarray) -> int:
    """
    Return the number of pairs of rows and columns of at least `MIN_OVERLAP`, taking the highest overlap first and each
    row and column once, as the authors do. The largest possible number can be higher.
    """
    overlaps, count = overlaps.copy(), 0
    while overlaps.size and overlaps.max() >= MIN_OVERLAP:
        row, column = np.unravel_index(overlaps.argmax(), overlaps.shape)
        overlaps[row], overlaps[:, column] = -np.inf, -np.inf
        count += 1
    return count


def to_coco(boxes_per_phrase: list[list], scores_per_phrase: Iterable[list]) -> COCO:
    """
    Return the boxes of each phrase as a dataset of pycocotools, with one image per phrase and one category. Ids count
    from 1, because `COCOeval` takes 0 for "not matched".
    """
    coco = COCO()
    coco.dataset = {
        "images": [{"id": phrase} for phrase in range(len(boxes_per_phrase))],
        "categories": [{"id": 1}],
        "annotations": [
            {
                "image_id": phrase,
                "category_id": 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "score": score,
                "iscrowd": 0,
            }
            for phrase, (boxes, scores) in enumerate(zip(boxes_per_phrase, scores_per_phrase, strict=True))
            for (x0, y0, x1, y1), score in zip(boxes, scores, strict=True)
        ],
    }
    for number, annotation in enumerate(coco.dataset["annotations"], start=1):
        annotation["id"] = number
    coco.createIndex()
    return coco


def average_precisions(predictions: list[dict[str, list]], references: list[list]) -> dict[str, float]:
    """
    Return `average_precision@0.5` and the mean of those at IoU 0.5 to 0.95, `average_precision@0.5:0.95`, of boxes
    ranked by score over all phrases; boxes of phrases without a target are false positives. 0 without true boxes.
    """
    boxes, scores = ([prediction[name] for prediction in predictions] for name in ("boxes", "scores"))
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        true, predicted = to_coco(references, ([0] * len(phrase) for phrase in references)), to_coco(boxes, scores)
        evaluation = COCOeval(true, predicted, "bbox")
        evaluation.params.maxDets = [max(map(len, boxes), default=0)]
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, math.inf]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    values = evaluation.eval["precision"].mean(axis=(1, 2, 3, 4)).clip(min=0).tolist()  # -1 without true boxes
    return {"average_precision@0.5": values[0], "average_precision@0.5:0.95": mean(values)}


class GeneralizedBoxMetrics:
    """
    Generalized referring expression comprehension: whether the boxes of a phrase are exactly its targets.

    Args:
        threshold (`float`): boxes with a lower score are not answers.

    Example:

    ```python
    >>> from training_reftr.metrics import GeneralizedBoxMetrics

    >>> metrics = GeneralizedBoxMetrics(threshold=0.5)
    >>> answer = {"boxes": [[0, 0, 8, 10], [0, 0, 1, 1]], "scores": [0.9, 0.6]}
    >>> metrics.update([answer, answer, None], [[[0, 0, 10, 10]], [[0, 0, 10, 10], [0, 0, 1, 1]], []])
    >>> values = metrics.compute()
    >>> round(values["pr_f1_iou@0.5"], 3), values["n_acc"], values["per_group"]["one"]["pr_f1_iou@0.5"]
    (0.667, 1.0, 0.0)

    ```"""

    def __init__(self, threshold: float = THRESHOLD) -> None:
        self.threshold = to_score(threshold, "threshold")
        self.predictions = []
        self.references = []

    def update(self, predictions: Any, references: Any) -> None:
        """Add phrases by their boxes with scores and their true boxes, see `pair_boxes`."""
        predictions, references = pair_boxes(predictions, references)
        self.predictions.extend(predictions)
        self.references.extend(references)

    def compute(self) -> dict[str, Any]:
        """Return the metrics that `INPUTS` lists, as fractions."""
        answers = []
        for prediction in self.predictions:
            pairs = zip(prediction["boxes"], prediction["scores"], strict=True)
            answers.append([box for box, score in pairs if score >= self.threshold])
        phrases = list(zip(answers, self.references, strict=True))
        records = [  # F1 is 1 if every box and every true box is matched
            {
                f"pr_f1_{name}@0.5": len(boxes) == len(true_boxes) == count_matches(overlaps)
                for name, overlaps in box_overlaps(boxes, true_boxes).items()
            }
            for boxes, true_boxes in phrases
        ]
        groups = {name: [] for name in GROUPS}
        for record, true_boxes in zip(records, self.references, strict=True):
            groups[GROUPS[min(len(true_boxes), 2)]].append(record)
        return {
            **summarize_matches(records),
            "n_acc": mean(not boxes for boxes, true_boxes in phrases if not true_boxes),
            "t_acc": mean(bool(boxes) for boxes, true_boxes in phrases if true_boxes),
            **average_precisions(self.predictions, self.references),
            "per_group": {
                name: {**summarize_matches(group), "num_phrases": len(group)} for name, group in groups.items()
            },
            "num_no_target": len(groups["none"]),
            "num_phrases": len(records),
        }


def summarize_matches(records: list[dict[str, bool]]) -> dict[str, float]:
    """Return the share of records in which each variant of the IoU matches."""
    return {name: mean(record[name] for record in records) for name in ("pr_f1_iou@0.5", "pr_f1_generalized_iou@0.5")}


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


def to_number(value: Any) -> float:
    """Return a number as a float, NaN for everything else."""
    try:
        return math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # torch raises the last for several numbers
        return math.nan


def to_score(value: Any, name: str) -> float:
    """
    Return a score as a float.

    Raises:
        ValueError: if it is not a finite number.
    """
    score = to_number(value)
    if not math.isfinite(score):
        raise ValueError(f"{name} must be a finite number, got {quote(value)}.")
    return score


def to_detections(value: Any, name: str) -> dict[str, list]:
    """
    Return a prediction as `boxes`, lists of four floats, and `scores`, one per box; both are empty for None.

    Raises:
        ValueError: if it is not a dict of boxes and as many scores.
    """
    if value is None:
        return {"boxes": [], "scores": []}
    if not isinstance(value, Mapping) or "boxes" not in value or "scores" not in value:
        raise ValueError(f'{name} must be {{"boxes": [...], "scores": [...]}} or None, got {quote(value)}.')
    boxes = to_phrase_boxes(value["boxes"], f"{name}['boxes']")
    scores = entries(value["scores"], f"{name}['scores'] must be a sequence of numbers")
    if len(boxes) != len(scores):
        raise ValueError(f"{name} must have one score per box, got {len(boxes)} boxes and {len(scores)} scores.")
    return {
        "boxes": boxes,
        "scores": [to_score(score, f"{name}['scores'][{index}]") for index, score in enumerate(scores)],
    }


def to_phrase_boxes(values: Any, name: str) -> list[list[float]]:
    """
    Return boxes as lists of four floats.

    Raises:
        ValueError: if they are not a sequence of boxes.
    """
    values = entries(values, f"{name} must be a list of boxes, empty for none")
    return [to_box(value, f"{name}[{index}]") for index, value in enumerate(values)]


def pair_boxes(predictions: Any, references: Any) -> tuple[list[dict[str, list]], list[list[list[float]]]]:
    """
    Return predictions as dicts of boxes and scores, and references as lists of boxes.

    Raises:
        ValueError: if one is not that, or their numbers differ.
    """
    predictions = entries(predictions, "predictions must be a sequence with boxes and scores for each phrase")
    references = entries(references, "references must be a sequence with a list of boxes for each phrase")
    if len(predictions) != len(references):
        raise ValueError(
            f"predictions and references must have the same length, got {len(predictions)} and {len(references)}."
        )
    return (
        [to_detections(value, f"predictions[{index}]") for index, value in enumerate(predictions)],
        [to_phrase_boxes(value, f"references[{index}]") for index, value in enumerate(references)],
    )


class GeneralizedReferringComprehension(evaluate.Metric):
    """Module of `evaluate` for any number of boxes per phrase, see `DESCRIPTION` and `INPUTS`."""

    def _info(self) -> evaluate.MetricInfo:
        numbers = datasets.Sequence(datasets.Value("float64"))
        boxes_xyxy = datasets.Sequence(numbers)
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": {"boxes": boxes_xyxy, "scores": numbers}, "references": boxes_xyxy}
            ),
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add phrases by their boxes with scores and their true boxes, see `pair_boxes`."""
        predictions, references = pair_boxes(predictions, references)
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one phrase by its boxes with scores, or None, and its true boxes."""
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def _compute(self, predictions: list, references: list, threshold: float = THRESHOLD) -> dict[str, Any]:
        metrics = GeneralizedBoxMetrics(threshold)
        metrics.update(predictions, references)
        return metrics.compute()
