"""Metrics: against pycocotools, at the thresholds, in any order, and as modules of evaluate without a network."""

import random

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from conftest import ROOT
from training_reftr.metrics import BoxMetrics, MaskMetrics, count_pixels


def random_masks(number, seed):
    """Masks of one size, empty and full ones among them, in COCO's run-length encoding."""
    generator = np.random.default_rng(seed)
    masks = []
    for index in range(number):
        mask = generator.random((37, 53)) < generator.choice([0.0, 0.02, 0.5, 0.98, 1.0])
        if index % 2:
            top, left = generator.integers(0, 20, 2)
            mask = np.zeros((37, 53), bool)
            mask[top : top + generator.integers(0, 18), left : left + generator.integers(0, 30)] = True
        masks.append(coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))))
    return masks


def test_masks_against_pycocotools():
    """1,000 pairs of random masks."""
    predicted, true = random_masks(1000, 0), random_masks(1000, 1)
    expected = [coco_mask.iou([a], [b], [False]).item() for a, b in zip(predicted, true, strict=True)]
    metrics = MaskMetrics()
    for index, (a, b) in enumerate(zip(predicted, true, strict=True)):
        intersection, union = count_pixels(a, b)
        metrics.update([intersection], [union])
        single = MaskMetrics()
        single.update([intersection], [union])
        assert single.compute()["mean_iou"] == pytest.approx(expected[index], abs=1e-12)
    values = metrics.compute()
    assert values["mean_iou"] == pytest.approx(np.mean(expected), abs=1e-12)
    assert values["num_phrases"] == 1000
    for threshold in (0.5, 0.6, 0.7, 0.8, 0.9):
        assert values[f"precision@{threshold}"] == np.mean(np.array(expected) > threshold)
    pixels = [coco_mask.decode(masks).sum() for masks in (predicted, true)]
    both = sum(metrics.intersections)
    assert values["overall_iou"] == pytest.approx(both / (sum(pixels) - both), abs=1e-12)


def test_a_hit_is_strictly_more():
    boxes, masks = BoxMetrics(), MaskMetrics()
    boxes.update([0.5, 0.5 + 1e-9, 0.9, 0.0])
    masks.update([1, 51, 90, 0], [2, 100, 100, 0])
    for values in (boxes.compute(), masks.compute()):
        assert values["precision@0.5"] == 0.5
        assert values["precision@0.9"] == 0.0
    assert boxes.compute()["accuracy@0.5"] == 0.5


def test_order_and_parts_change_no_bit():
    draw = random.Random(0)
    ious = [draw.random() for _ in range(10_001)]
    whole = BoxMetrics()
    whole.update(ious)
    for seed in range(5):
        shuffled = random.Random(seed).sample(ious, len(ious))
        parts = BoxMetrics()
        for rank in range(4):
            parts.update(shuffled[rank::4])
        assert parts.compute() == whole.compute()


def test_nothing_is_zero():
    assert set(BoxMetrics().compute().values()) == {0}
    assert set(MaskMetrics().compute().values()) == {0}


def test_masks_of_two_sizes_are_refused():
    masks = [coco_mask.encode(np.asfortranarray(np.ones(size, np.uint8))) for size in ((2, 3), (3, 2))]
    with pytest.raises(ValueError, match=r"Masks of \(2, 3\) and \(3, 2\)"):
        count_pixels(*masks)


def test_modules_of_evaluate(run, tmp_path):
    """As a user loads them: by path, offline, in a process of its own."""
    code = """
import sys
import evaluate
boxes = evaluate.load(sys.argv[1] + "/referring_expression_comprehension")
boxes.add_batch(predictions=[[0, 0, 8, 10], [0, 0, 1, 1]], references=[[0, 0, 10, 10], [5, 5, 6, 6]])
print(boxes.compute()["mean_iou"])
masks = evaluate.load(sys.argv[1] + "/referring_segmentation")
pair = [{"size": [2, 2], "counts": counts} for counts in ("13", "22")]  # of three and of two pixels
print(masks.compute(predictions=pair[:1], references=pair[1:])["overall_iou"])
print(boxes.compute(predictions=[[1, 1, 1, 1]], references=[[1, 1, 1, 1]])["mean_iou"])
"""
    result = run("-c", code, ROOT / "metrics", HF_EVALUATE_OFFLINE="1", HF_HOME=tmp_path)
    assert [float(value) for value in result.stdout.split()] == [0.4, 2 / 3, 0.0]
