"""Metrics of phrases with none, one or several targets match the authors' scripts and plain definitions."""

import json
import random

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou, generalized_box_iou

from tests.helpers.generalized_cases import box_cases, mask_cases
from tests.helpers.tiny import ROOT
from training_reftr.metrics import GeneralizedBoxMetrics, GeneralizedMaskMetrics, PresenceMetrics, box_overlaps
from training_reftr.metrics.generalized_referring_comprehension import (
    generalized_referring_comprehension as boxes_alone,
)
from training_reftr.metrics.generalized_referring_segmentation import generalized_referring_segmentation as masks_alone
from training_reftr.metrics.grounding_presence import grounding_presence as presence_alone


AUTHORS = json.loads((ROOT / "tests" / "fixtures" / "generalized_metrics.json").read_text())
BOX, MASK, EMPTY = [0, 0, 8, 10], {"size": [2, 2], "counts": "13"}, {"size": [2, 2], "counts": [4]}


def compute_boxes(predictions, references, threshold=0.7):
    metrics = GeneralizedBoxMetrics(threshold)
    metrics.update(predictions, references)
    return metrics.compute()


def compute_masks(predictions, references):
    predictions, references = masks_alone.pair_masks(predictions, references)
    metrics = GeneralizedMaskMetrics()
    for predicted, true in zip(predictions, references, strict=True):
        counts = masks_alone.count_pixels(predicted, true)
        metrics.update(*([value] for value in (*counts, predicted["is_absent"], masks_alone.mask_area(true) == 0)))
    return metrics.compute()


def compute_presence(probabilities, truths):
    metrics = PresenceMetrics()
    metrics.update(probabilities, truths)
    return metrics.compute()


def test_box_metrics_match_authors_script_on_1000_cases(monkeypatch):
    """Compare both variants of the IoU; average precision, which the script does not have, has a test of its own."""
    monkeypatch.setattr(boxes_alone, "average_precisions", lambda predictions, references: {})
    for variant in ("iou", "generalized_iou"):
        found = []
        for predictions, references in box_cases(1000):
            values = compute_boxes(predictions, references)
            found.append([values[name] for name in (f"pr_f1_{variant}@0.5", "n_acc", "t_acc")])
        np.testing.assert_allclose(found, AUTHORS["boxes"][variant], atol=1e-6)


def test_mask_metrics_match_authors_script_on_1000_cases(tmp_path):
    """Compare after conversion of their percentages; one call of the module gives the values of all cases together."""
    cases = mask_cases(1000)
    found = [
        [values["giou"] * 100, values["ciou"] * 100, values["n_acc"], values["t_acc"]]
        for values in (compute_masks(*case) for case in cases)
    ]
    np.testing.assert_allclose(found, AUTHORS["masks"]["values"], atol=1e-5)
    module = masks_alone.GeneralizedReferringSegmentation(cache_dir=str(tmp_path))
    for predictions, references in cases[:20]:
        module.add_batch(predictions=predictions, references=references)
    values = module.compute()
    assert values["giou"] == pytest.approx(np.mean(found[:20], axis=0)[0] / 100)
    assert values["num_phrases"] == 100
    assert 20 <= values["num_no_target"] < 80


def test_box_overlaps_match_torchvision():
    generator = np.random.default_rng(0)
    boxes, others = np.sort(generator.normal(50, 20, (2, 60, 2, 2)), axis=2).reshape(2, 60, 4)
    tensors = torch.from_numpy(boxes), torch.from_numpy(others)
    overlaps = box_overlaps(boxes, others)
    np.testing.assert_allclose(overlaps["iou"], box_iou(*tensors), rtol=1e-12)
    np.testing.assert_allclose(overlaps["generalized_iou"], generalized_box_iou(*tensors), rtol=1e-12, atol=1e-12)
    assert {name: values.tolist() for name, values in box_overlaps([[1, 1, 1, 1]], [[1, 1, 1, 1]]).items()} == {
        "iou": [[0.0]],
        "generalized_iou": [[0.0]],
    }


def test_box_metrics_match_by_hand():
    """Check the limits (score and IoU exactly at theirs), the groups, and two boxes for one target."""
    half = [0, 0, 8, 5]
    both = {"boxes": [BOX, [20, 20, 30, 30]], "scores": [0.7, 0.9]}
    predictions = [None, both, both, both, {"boxes": [half, BOX], "scores": [0.7, 0.69]}, {"boxes": [], "scores": []}]
    references = [[], [], [[20, 20, 30, 30], BOX], [BOX], [BOX], [BOX, BOX]]
    values = compute_boxes(predictions, references)
    group = {
        name: [values["per_group"][name][key] for key in ("pr_f1_iou@0.5", "num_phrases")]
        for name in ("none", "one", "several")
    }
    assert group == {"none": [0.5, 2], "one": [0.5, 2], "several": [0.5, 2]}
    assert (values["n_acc"], values["t_acc"], values["pr_f1_iou@0.5"]) == (0.5, 0.75, 0.5)
    assert (values["num_no_target"], values["num_phrases"]) == (2, 6)
    raised = compute_boxes(predictions, references, threshold=0.71)
    assert (raised["n_acc"], raised["t_acc"]) == (0.5, 0.5)
    apart = [{"boxes": [[0, 0, 10, 10]], "scores": [1]}], [[[2.5, 1, 12.5, 11]]]
    values = compute_boxes(*apart)
    assert (values["pr_f1_iou@0.5"], values["pr_f1_generalized_iou@0.5"]) == (1, 0)


def brute_average_precision(predictions, references, min_iou):
    """Return the average precision at 101 recalls, matching box by box from the highest score on."""
    ranked = sorted(
        (-score, phrase, index)
        for phrase, prediction in enumerate(predictions)
        for index, score in enumerate(prediction["scores"])
    )
    free, hits = [set(range(len(boxes))) for boxes in references], []
    for _, phrase, index in ranked:
        box = torch.tensor([predictions[phrase]["boxes"][index]], dtype=torch.float64)
        ious = {
            true: box_iou(box, torch.tensor([references[phrase][true]], dtype=torch.float64)).item()
            for true in free[phrase]
        }
        best = max(ious, key=ious.get, default=None)
        hits.append(best is not None and ious[best] >= min_iou)
        free[phrase] -= {best} if hits[-1] else set()
    found = np.cumsum(hits)
    precision, recall = found / np.arange(1, len(hits) + 1), found / sum(map(len, references))
    return np.mean([precision[recall >= level].max(initial=0) for level in np.linspace(0, 1, 101)])


def test_average_precision_matches_definition(capfd):
    """Rank the boxes of all phrases, those without a target too, whatever the threshold is."""
    cases = box_cases(8, seed=1)
    predictions, references = ([phrase for case in cases for phrase in case[side]] for side in (0, 1))
    values = compute_boxes(predictions, references, threshold=0.99)
    expected = [brute_average_precision(predictions, references, level) for level in np.linspace(0.5, 0.95, 10)]
    assert 0.3 < expected[-1] + 0.3 < expected[0] < 1
    assert values["average_precision@0.5"] == pytest.approx(expected[0], abs=1e-9)
    assert values["average_precision@0.5:0.95"] == pytest.approx(np.mean(expected), abs=1e-9)
    assert compute_boxes([None, None], [[], [BOX]])["average_precision@0.5"] == 0
    assert compute_boxes([{"boxes": [BOX], "scores": [1]}], [[]])["average_precision@0.5"] == 0
    assert capfd.readouterr().out == ""


def test_presence_metrics_match_pairs_and_thresholds():
    """Compare with plain loops over pairs and thresholds on 60 random cases with ties."""
    rng = random.Random(0)
    for case in range(60):
        digits, number = (1, 3)[case % 2], 3 + int(40 * rng.random())
        probabilities = [round(rng.random(), digits) for _ in range(number)]
        truths = [rng.random() < 0.3 + 0.5 * probability for probability in probabilities]
        truths[:2] = True, False
        p, t = np.array(probabilities), np.array(truths)
        values = compute_presence(probabilities, truths)

        wins = [(a > b) + (a == b) / 2 for a in p[t] for b in p[~t]]
        assert values["auroc"] == pytest.approx(np.mean(wins))
        levels = sorted(set(probabilities), reverse=True)
        recalls = [0, *((p[t] >= level).mean() for level in levels)]
        steps = [t[p >= level].mean() * gain for level, gain in zip(levels, np.diff(recalls), strict=True)]
        assert values["average_precision"] == pytest.approx(sum(steps))
        level = next(level for level in levels if (p[t] >= level).mean() >= 0.95)
        assert values["threshold@t_acc_0.95"] == level
        assert values["n_acc@t_acc_0.95"] == pytest.approx((p[~t] < level).mean())

        orders = [sorted(range(number), key=lambda index: (-p[index], rng.random())) for _ in range(200)]
        risks = np.mean([np.cumsum(~t[order]) / np.arange(1, number + 1) for order in orders], axis=0)
        assert values["risk_coverage_area"] == pytest.approx(risks.mean(), abs=0.03 if digits == 1 else 0.01)
        assert values["risk_coverage"][-1] == {"coverage": 1.0, "risk": pytest.approx((~t).mean())}

        rows = values["reliability"]
        inside = [(row["bin"][0] < p) & (p <= row["bin"][1]) | (p == 0) & (row["bin"][0] == 0) for row in rows]
        assert [row["count"] for row in rows] == [mask.sum() for mask in inside]
        gaps = [abs(p[mask].mean() - t[mask].mean()) * mask.sum() for mask in inside if mask.any()]
        assert values["expected_calibration_error"] == pytest.approx(sum(gaps) / number)


def test_presence_metrics_by_hand_are_independent_of_order_and_parts():
    probabilities, truths = [0.9, 0.8, 0.7, 0.7, 0.1], [True, True, False, True, False]
    values = compute_presence(probabilities, truths)
    assert values["auroc"] == pytest.approx(5.5 / 6)
    assert (values["threshold@t_acc_0.95"], values["n_acc@t_acc_0.95"]) == (0.7, 0.5)
    assert values["risk_coverage_area"] == pytest.approx((0 + 0 + 0.5 / 3 + 1 / 4 + 2 / 5) / 5)
    assert values["risk_coverage"][11] == {"coverage": 0.6, "risk": pytest.approx(0.5 / 3)}
    filled = {row["count"]: row for row in values["reliability"]}
    assert filled[2] == {"bin": [10 / 15, 11 / 15], "count": 2, "mean_confidence": 0.7, "share_right": 0.5}
    assert (values["num_present"], values["num_phrases"]) == (3, 5)
    parts = PresenceMetrics()
    for index in (3, 0, 4, 2, 1):
        parts.update(np.float32([probabilities[index]]).astype(float).round(1), [int(truths[index])])
    assert parts.compute() == values
    # 19 of 20 are exactly a T-acc of 0.95
    values = compute_presence([1.0] * 19 + [0.2, 0.5], [True] * 20 + [False])
    assert (values["threshold@t_acc_0.95"], values["n_acc@t_acc_0.95"]) == (1.0, 1.0)


def flatten(values):
    for value in values.values() if isinstance(values, dict) else values:
        yield from flatten(value) if isinstance(value, (dict, list)) else [value]


def test_generalized_metrics_without_records_are_zero():
    assert set(flatten(GeneralizedBoxMetrics().compute())) == {0}
    assert set(GeneralizedMaskMetrics().compute().values()) == {0}
    values = PresenceMetrics().compute()
    for row in (*values["reliability"], *values["risk_coverage"]):
        row.pop("bin", None), row.pop("coverage", None)
    assert set(flatten(values)) == {0}


def test_generalized_box_metric_accepts_tensors_and_threshold(tmp_path):
    metric = boxes_alone.GeneralizedReferringComprehension(cache_dir=str(tmp_path))
    answer = {"boxes": torch.tensor([BOX, BOX]).bfloat16(), "scores": torch.tensor([0.9, 0.4]), "phrases": ["a star"]}
    for threshold, expected in ((0.5, 1), (0.4, 0), (1, 0)):
        values = metric.compute(predictions=[answer, None], references=[np.array([BOX]), []], threshold=threshold)
        assert values["pr_f1_iou@0.5"] == (expected + 1) / 2
    metric.add(prediction={"boxes": np.zeros((0, 4)), "scores": []}, reference=[])
    assert metric.compute()["n_acc"] == 1


def test_generalized_mask_metric_tells_empty_from_absent(tmp_path):
    """Take an empty mask for "nothing", as in the paper, unless `is_absent` is given, as in the authors' script."""
    metric = masks_alone.GeneralizedReferringSegmentation(cache_dir=str(tmp_path))
    for value, n_acc in ((None, 1), (np.zeros((2, 2)), 1), (EMPTY, 1), (MASK, 0)):
        assert metric.compute(predictions=[value], references=[EMPTY])["n_acc"] == n_acc
    for flag, t_acc, giou in ((True, 0, 0), (np.bool_(False), 1, 1), (torch.tensor(True), 0, 0)):
        values = metric.compute(predictions=[{"mask": MASK, "is_absent": flag}], references=[MASK])
        assert (values["t_acc"], values["giou"], values["ciou"]) == (t_acc, giou, giou)
    metric.add(prediction={"mask": EMPTY, "is_absent": False}, reference=EMPTY)
    assert metric.compute() == {"giou": 0, "ciou": 0, "n_acc": 0, "t_acc": 0, "num_no_target": 1, "num_phrases": 1}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"predictions": [[BOX]]}, r"predictions\[0\] must be \{\"boxes\": .* or None, got \[\[0, 0, 8, 10\]\]"),
        ({"predictions": [{"boxes": [BOX]}]}, r"predictions\[0\] must be \{\"boxes\""),
        ({"predictions": [{"boxes": BOX, "scores": [1]}]}, r"predictions\[0\]\['boxes'\]\[0\] must be a box .* got 0"),
        ({"predictions": [{"boxes": [BOX], "scores": 1}]}, r"\['scores'\] must be a sequence of numbers, got 1"),
        ({"predictions": [{"boxes": [BOX], "scores": []}]}, "one score per box, got 1 boxes and 0 scores"),
        ({"predictions": [{"boxes": [BOX], "scores": ["1"]}]}, r"\['scores'\]\[0\] must be a finite number, got '1'"),
        ({"predictions": [{"boxes": [BOX], "scores": [float("nan")]}]}, "finite number, got nan"),
        ({"predictions": [None, None]}, "must have the same length, got 2 and 1"),
        ({"predictions": 7}, "predictions must be a sequence .* got 7"),
        ({"references": [BOX]}, r"references\[0\]\[0\] must be a box .* got 0"),
        ({"references": [None]}, r"references\[0\] must be a list of boxes, empty for none, got None"),
        ({"threshold": "high"}, "threshold must be a finite number, got 'high'"),
    ],
)
def test_generalized_box_metric_refuses_invalid_input(bad, message, tmp_path):
    metric = boxes_alone.GeneralizedReferringComprehension(cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=message):
        metric.compute(**({"predictions": [None], "references": [[BOX]]} | bad))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"predictions": [3]}, r"predictions\[0\] must be a mask"),
        ({"predictions": [{"mask": MASK}]}, r"predictions\[0\]\['is_absent'\] must be True or False, got None"),
        ({"predictions": [{"mask": MASK, "is_absent": 1}]}, r"must be True or False, got 1"),
        ({"predictions": [{"mask": 3, "is_absent": True}]}, r"predictions\[0\]\['mask'\] must be a mask"),
        ({"predictions": [np.ones((2, 3))]}, r"Masks of \(2, 3\) and \(2, 2\)"),
        ({"predictions": []}, "must have the same length, got 0 and 1"),
        ({"references": [None]}, r"references\[0\] must be a mask"),
    ],
)
def test_generalized_mask_metric_refuses_invalid_input(bad, message, tmp_path):
    metric = masks_alone.GeneralizedReferringSegmentation(cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=message):
        metric.compute(**({"predictions": [MASK], "references": [MASK]} | bad))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"predictions": [1.5]}, r"predictions\[0\] must be a probability from 0 to 1, got 1.5"),
        ({"predictions": [float("nan")]}, "from 0 to 1, got nan"),
        ({"predictions": ["0.5"]}, "from 0 to 1, got '0.5'"),
        ({"predictions": [torch.ones(2)]}, "from 0 to 1, got <Tensor>"),
        ({"predictions": 0.5}, "predictions must be a sequence of probabilities, got 0.5"),
        ({"references": [0.5]}, r"references\[0\] must be True or False, got 0.5"),
        ({"references": [None]}, "must be True or False, got None"),
        ({"references": [True, True]}, "must have the same length, got 1 and 2"),
    ],
)
def test_presence_metric_refuses_invalid_input(bad, message, tmp_path):
    metric = presence_alone.GroundingPresence(cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=message):
        metric.compute(**({"predictions": [0.5], "references": [True]} | bad))
    assert metric.compute(predictions=torch.tensor([0.5]).bfloat16(), references=np.array([1]))["num_present"] == 1
