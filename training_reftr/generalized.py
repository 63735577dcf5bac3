"""
Metrics of phrases that refer to none, one or several objects, from the records of an evaluation: which boxes answer,
and how certain their scores are. Nothing here is a collective.
"""

import math
from collections import defaultdict
from collections.abc import Iterable

from training_reftr.metrics import (
    THRESHOLDS,
    GeneralizedBoxMetrics,
    GeneralizedMaskMetrics,
    PresenceMetrics,
    box_ious,
    box_overlaps,
    count_matches,
    mean,
)


BOX_NAMES = ("pr_f1_iou@0.5", "pr_f1_generalized_iou@0.5", "average_precision@0.5")


def has_one_target(record: dict) -> bool:
    """Return whether the phrase of a record refers to exactly one object."""
    return "targets" not in record


def targets_in(record: dict) -> list[dict]:
    """Return the objects that the phrase of a record refers to, each with `box` and `segmentation`."""
    return [record] if has_one_target(record) else record["targets"]


def answers_of(record: dict, threshold: float | None = None) -> list[tuple[list[float], float]]:
    """
    Return the boxes of a record that are answers, with their scores.

    Args:
        record (`dict`): see `training_reftr.evaluation.evaluate`.
        threshold (`float`, *optional*): the score above which a box is an answer, by default that of the evaluation.
    """
    if "query_scores" not in record:  # a model without presence gives one answer
        return [] if record["pred_box"] is None else [(record["pred_box"], 1.0)]
    threshold = record["threshold"] if threshold is None else threshold
    pairs = zip(record["query_boxes"], record["query_scores"], strict=True)
    return [(box, score) for box, score in pairs if score > threshold]


def is_best_right(record: dict) -> bool:
    """Return whether the best answer of a record overlaps a target by an IoU over 0.5."""
    targets = [target["box"] for target in targets_in(record)]
    if not targets or not record["query_boxes"]:
        return False
    return bool(box_ious(record["query_boxes"][0], targets).max() > THRESHOLDS[0])


def best_score(record: dict) -> float:
    """Return the highest score of a record; 0 if the phrase was removed by truncation."""
    return record["query_scores"][0] if record["query_scores"] else 0.0


def generalized_metrics(records: list[dict], threshold: float) -> dict:
    """
    Return the metrics of all phrases, those with none or several targets included.

    Args:
        records (`list[dict]`): see `training_reftr.evaluation.evaluate`, with `query_boxes` and `query_scores`.
        threshold (`float`): the score above which a box is an answer.

    Returns:
        `dict`:
            - `pr_f1_iou@0.5`, `pr_f1_generalized_iou@0.5`, `average_precision@0.5`, `t_acc`, and `n_acc` if there are
              no-target phrases: see [`GeneralizedBoxMetrics`];
            - `mask_giou` and `mask_ciou` with masks: see [`GeneralizedMaskMetrics`];
            - `expected_calibration_error` of the highest score of a phrase, as the probability that its box is right;
            - `presence_auroc`, `presence_average_precision` and `presence_n_acc@t_acc_0.95` of the highest score, as
              the probability that the phrase refers to something, if there are phrases with and without targets: see
              [`PresenceMetrics`];
            - `generalized`: `threshold`, `per_group` and `per_kind` (the metrics of phrases with none, one and several
              targets, and of each type), `reliability` and `risk_coverage`.
    """
    boxes, presence, correctness = box_metrics(records, threshold), PresenceMetrics(), PresenceMetrics()
    scores, is_present = [best_score(record) for record in records], [bool(targets_in(record)) for record in records]
    presence.update(scores, is_present)
    correctness.update(scores, [is_best_right(record) for record in records])
    ranked, calibrated = presence.compute(), correctness.compute()
    values = {name: boxes[name] for name in BOX_NAMES} | {"t_acc": boxes["t_acc"]}
    if boxes["num_no_target"]:
        values["n_acc"] = boxes["n_acc"]
        if any(is_present):
            names = ("auroc", "average_precision", "n_acc@t_acc_0.95")
            values |= {f"presence_{name}": ranked[name] for name in names}
    values |= generalized_mask_metrics(records, threshold)
    values["expected_calibration_error"] = calibrated["expected_calibration_error"]
    values["num_no_target"] = boxes["num_no_target"]
    values["generalized"] = {
        "threshold": threshold,
        "num_phrases": len(records),
        "per_group": {name: group for name, group in boxes["per_group"].items() if group["num_phrases"]},
        "per_kind": kinds_of_phrases(records, threshold),
        "reliability": calibrated["reliability"],
        "risk_coverage": calibrated["risk_coverage"],
        "risk_coverage_area": calibrated["risk_coverage_area"],
    }
    return values


def box_metrics(records: Iterable[dict], threshold: float) -> dict:
    """Return the `GeneralizedBoxMetrics` of records."""
    metrics = GeneralizedBoxMetrics(math.nextafter(threshold, math.inf))  # whose boxes have at least this score
    records = list(records)
    metrics.update(
        [{"boxes": record["query_boxes"], "scores": record["query_scores"]} for record in records],
        [[target["box"] for target in targets_in(record)] for record in records],
    )
    return metrics.compute()


def kinds_of_phrases(records: list[dict], threshold: float) -> dict[str, dict]:
    """
    Return for each type of phrases `pr_f1_iou@0.5`, `num_phrases` and, for types without targets, `n_acc` and `auroc`,
    which compares them with all phrases that refer to something.
    """
    by_kind = defaultdict(list)
    for record in records:
        for kind in record["types"]:
            by_kind[kind].append(record)
    present = [best_score(record) for record in records if targets_in(record)]
    kinds = {}
    for kind, group in sorted(by_kind.items()):
        answered = [bool(answers_of(record, threshold)) for record in group]
        kinds[kind] = {
            "pr_f1_iou@0.5": mean(is_exact(record, threshold) for record in group),
            "num_phrases": len(group),
        }
        if present and not any(targets_in(record) for record in group):
            metrics = PresenceMetrics()
            scores = [best_score(record) for record in group]
            metrics.update(present + scores, [True] * len(present) + [False] * len(scores))
            kinds[kind] |= {"n_acc": 1 - mean(answered), "auroc": metrics.compute()["auroc"]}
    return kinds


def is_exact(record: dict, threshold: float | None = None) -> bool:
    """Return whether the answers of a record are exactly its targets: an F1 score of 1 at an IoU of 0.5."""
    boxes = [box for box, _ in answers_of(record, threshold)]
    true_boxes = [target["box"] for target in targets_in(record)]
    return len(boxes) == len(true_boxes) == count_matches(box_overlaps(boxes, true_boxes)["iou"])


def generalized_mask_metrics(records: list[dict], threshold: float) -> dict[str, float]:
    """Return gIoU and cIoU of the records with masks; empty if no record has one."""
    records = [record for record in records if "answer_pixels" in record]
    if not records:
        return {}
    metrics = GeneralizedMaskMetrics()
    metrics.update(
        *zip(*(record["answer_pixels"] for record in records), strict=True),
        are_rejected=[not answers_of(record, threshold) for record in records],
        are_absent=[not targets_in(record) for record in records],
    )
    values = metrics.compute()
    return {"mask_giou": values["giou"], "mask_ciou": values["ciou"]}
