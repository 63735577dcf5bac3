"""Metrics match pycocotools, are independent of order, and load as offline modules of `evaluate`."""

import inspect
import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torchvision.ops import box_iou

from data_scripts import masks as data_masks
from modeling_reftr.rle_reftr import from_coco_rle
from modeling_reftr.rle_reftr import uncompress_counts as model_uncompress_counts
from tests.helpers.generalized_cases import box_cases, mask_cases
from tests.helpers.tiny import ROOT
from training_reftr import metrics as training_metrics
from training_reftr.evaluation import compare_boxes, compare_masks, mask_metrics, summarize
from training_reftr.metrics import (
    BoxMetrics,
    GeneralizedBoxMetrics,
    MaskMetrics,
    PresenceMetrics,
    box_ious,
    count_pixels,
)
from training_reftr.metrics.generalized_referring_comprehension import generalized_referring_comprehension
from training_reftr.metrics.generalized_referring_segmentation import generalized_referring_segmentation
from training_reftr.metrics.grounding_presence import grounding_presence
from training_reftr.metrics.referring_expression_comprehension import referring_expression_comprehension as boxes_alone
from training_reftr.metrics.referring_segmentation import referring_segmentation as masks_alone


MODULES = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        boxes_alone,
        masks_alone,
        generalized_referring_comprehension,
        generalized_referring_segmentation,
        grounding_presence,
    )
}
BOX, MASK = [0, 0, 8, 10], {"size": [2, 2], "counts": "13"}


def random_masks(number, seed):
    """Return random masks of one size in COCO's run-length encoding, some of them empty or full."""
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


def test_mask_metrics_match_pycocotools():
    """Compare 1,000 pairs of random masks."""
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


def test_metrics_count_hit_only_above_threshold():
    boxes, masks = BoxMetrics(), MaskMetrics()
    boxes.update([0.5, 0.5 + 1e-9, 0.9, 0.0])
    masks.update([1, 51, 90, 0], [2, 100, 100, 0])
    for values in (boxes.compute(), masks.compute()):
        assert values["precision@0.5"] == 0.5
        assert values["precision@0.9"] == 0.0
    assert boxes.compute()["accuracy@0.5"] == 0.5


def test_box_metrics_are_independent_of_order_and_parts():
    rng = random.Random(0)
    ious = [rng.random() for _ in range(10_001)]
    complete = BoxMetrics()
    complete.update(ious)
    for seed in range(5):
        shuffled = random.Random(seed).sample(ious, len(ious))
        parts = BoxMetrics()
        for rank in range(4):
            parts.update(shuffled[rank::4])
        assert parts.compute() == complete.compute()


def test_metrics_without_records_are_zero():
    assert set(BoxMetrics().compute().values()) == {0}
    assert set(MaskMetrics().compute().values()) == {0}


def test_count_pixels_refuses_masks_of_two_sizes():
    masks = [coco_mask.encode(np.asfortranarray(np.ones(size, np.uint8))) for size in ((2, 3), (3, 2))]
    with pytest.raises(ValueError, match=r"Masks of \(2, 3\) and \(3, 2\)"):
        count_pixels(*masks)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """Copy each module file alone into a folder of its name, as in a clone of its Space."""
    folder = tmp_path_factory.mktemp("spaces")
    for name in MODULES:
        (folder / name).mkdir()
        shutil.copy(ROOT / "training_reftr" / "metrics" / name / f"{name}.py", folder / name)
    return folder


@pytest.fixture
def run_alone(tmp_path):
    """Run code in a process that finds installed packages but not this project."""
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    start = (
        f"import importlib.util, json, sys; sys.path += {packages!r};"
        "names = ('training_reftr', 'modeling_reftr', 'data_scripts', 'train_reftr');"
        "assert not any(importlib.util.find_spec(name) for name in names)\n"
    )

    def run(code, *arguments):
        command = [sys.executable, "-I", "-S", "-c", start + code, *map(str, arguments)]  # -S: no .pth of an install
        environment = {"HF_EVALUATE_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


def test_evaluate_modules_match_training_metrics(clone, run_alone, trained, shapes, tmp_path):
    """Load the modules by path, offline and without the project; compare on predictions and on random masks."""
    lines = [json.loads(line) for line in (trained[0] / "predictions.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["split"] == "test"]
    rows = {row["image_id"]: row for row in shapes["test"]}
    true_boxes = []
    for line in lines:
        row = rows[line["image_id"]]
        (sentence,) = (item for item in row["sentences"] if item["sentence_id"] == line["sentence_id"])
        true_boxes.append(row["objects"][sentence["phrases"][line["phrase"]]["objects"][0]]["box"])
    boxes = {"predictions": [line["pred_box_xyxy"] for line in lines], "references": true_boxes}

    pairs = list(zip(random_masks(60, 2), random_masks(60, 3), strict=True))
    records = []
    for predicted, true in pairs:
        answers = torch.from_numpy(from_coco_rle(predicted))[None]
        target = {"segmentation": {**true, "counts": true["counts"].decode()}}
        records.append(target | compare_masks(answers, answers[:, :20, :30], 0, target, FakeProcessor))
    records.append(target | compare_masks(answers, answers[:, :20, :30], None, target, FakeProcessor))
    masks = {
        "predictions": [record["pred_segmentation"] for record in records],
        "references": [record["segmentation"] for record in records],
    }
    predictions, references = box_cases(1)[0]
    answers, true_masks = mask_cases(1)[0]
    generalized = {
        "generalized_referring_comprehension": {"predictions": predictions, "references": references},
        "generalized_referring_segmentation": {
            "predictions": [answer["mask"].tolist() for answer in answers],
            "references": [mask.tolist() for mask in true_masks],
        },
        "grounding_presence": {"predictions": [0.9, 0.4, 0.6], "references": [True, False, False]},
    }
    (tmp_path / "inputs.json").write_text(json.dumps({"boxes": boxes, "masks": masks, "generalized": generalized}))
    code = """
import evaluate, numpy as np
inputs = json.load(open("inputs.json"))
boxes = evaluate.load(sys.argv[1] + "/referring_expression_comprehension")
masks = evaluate.load(sys.argv[1] + "/referring_segmentation")
assert "accuracy@0.5" in boxes.inputs_description and boxes.citation and masks.description
found = [boxes.compute(**inputs["boxes"]), masks.compute(**inputs["masks"])]
boxes.add_batch(predictions=np.array([[0, 0, 8, 10], [0, 0, 1, 1]]), references=[[0, 0, 10, 10], [5, 5, 6, 6]])
boxes.add(prediction=None, reference=[0, 0, 1, 1])
found += [boxes.compute()["mean_iou"], boxes.compute(predictions=[], references=[])["num_phrases"]]
found += [evaluate.load(f"{sys.argv[1]}/{name}").compute(**values) for name, values in inputs["generalized"].items()]
print(json.dumps(found))
"""
    of_boxes, of_masks, by_hand, of_nothing, *of_generalized = json.loads(run_alone(code, clone))
    expected = json.loads((trained[0] / "metrics.json").read_text())["splits"]["test"]
    assert of_boxes["num_phrases"] == len(lines) > 50
    assert of_boxes["mean_iou"] > 0
    assert of_boxes == {name: expected[name] for name in of_boxes}
    expected = mask_metrics(records)
    assert of_masks["num_phrases"] == 61
    assert 0 < of_masks["mean_iou"] != of_masks["overall_iou"] > 0
    assert of_masks == {name: expected[f"mask_{name}"] for name in of_masks}
    assert by_hand == pytest.approx(0.8 / 3)
    assert of_nothing == 0
    boxes, presence = GeneralizedBoxMetrics(), PresenceMetrics()
    boxes.update(predictions, references)
    presence.update(*generalized["grounding_presence"].values())
    assert of_generalized[::2] == [boxes.compute(), presence.compute()]
    assert 0 < of_generalized[1]["giou"] != of_generalized[1]["ciou"] > 0


class FakeProcessor:
    """Provide the resizing that `compare_masks` needs, as a crop of the target mask."""

    class image_processor:
        @staticmethod
        def resize_masks(masks, size):
            return masks[:, : size[0], : size[1]]


def test_evaluate_modules_share_identical_helpers():
    """Each file works alone and copies the functions it shares with others, so the copies must stay identical."""
    sources = defaultdict(list)
    for module in MODULES.values():
        for name, function in inspect.getmembers(module, inspect.isfunction):
            sources[name].append(inspect.getsource(function))
    copied = {name: found for name, found in sources.items() if len(found) > 1}
    assert {"quote", "mean", "entries", "precisions", "to_box", "to_run_lengths", "count_pixels"} <= copied.keys()
    assert [name for name, found in copied.items() if len(set(found)) > 1] == []
    assert boxes_alone.THRESHOLDS == masks_alone.THRESHOLDS == training_metrics.THRESHOLDS
    assert training_metrics.MaskMetrics is masks_alone.MaskMetrics


@pytest.mark.parametrize("name", MODULES)
def test_evaluate_module_folder_is_complete_space(name):
    """Check the metadata for the Hub, and that requirements list exactly the imports."""
    folder = ROOT / "training_reftr" / "metrics" / name
    assert "- metric\n" in (folder / "README.md").read_text()
    needed = (folder / "requirements.txt").read_text().split()
    imported = set(re.findall(r"^(?:import|from) (\w+)", (folder / f"{name}.py").read_text(), re.MULTILINE))
    assert {"datasets", "evaluate", "numpy"} <= imported - sys.stdlib_module_names == set(needed)


def test_box_ious_match_torchvision():
    generator = np.random.default_rng(0)
    boxes, others = np.sort(generator.normal(50, 20, (2, 300, 2, 2)), axis=2).reshape(2, 300, 4)
    expected = box_iou(torch.from_numpy(boxes), torch.from_numpy(others))
    np.testing.assert_allclose(box_ious(boxes[:, None], others), expected.numpy(), rtol=1e-12)
    assert compare_boxes(torch.tensor([0.0, 0, 3, 1]), {"box": [0, 0, 5, 1], "boxes": [[0, 0, 5, 1]]})["iou"] == 0.6
    assert box_ious([1, 1, 1, 1], [[1, 1, 1, 1], [2, 1, 4, 3]]).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "change",
    [
        tuple,
        np.array,
        lambda values: torch.tensor(values).bfloat16(),
        lambda values: [torch.tensor(v) for v in values],
    ],
    ids=["tuple", "array", "tensor", "tensors"],
)
def test_box_metric_accepts_every_box_type(change, tmp_path):
    metric = boxes_alone.ReferringExpressionComprehension(cache_dir=str(tmp_path))
    values = metric.compute(predictions=change([BOX, [2, 2, 2, 2]]), references=change([[0, 0, 10, 10], [2, 2, 2, 2]]))
    assert values["mean_iou"] == 0.4


def test_mask_metric_accepts_every_mask_type(tmp_path):
    metric = masks_alone.ReferringSegmentation(cache_dir=str(tmp_path))
    array = np.array([[0, 1], [1, 1]])
    forms = [MASK, {**MASK, "counts": b"13"}, {"size": (2, 2), "counts": [1, 3]}, array, array.astype(float)]
    forms += [array.tolist(), torch.from_numpy(array).bool(), coco_mask.encode(np.asfortranarray(array, np.uint8))]
    for form in forms:
        values = metric.compute(predictions=[form, None], references=[array > 0, form])
        assert (values["mean_iou"], values["overall_iou"]) == (0.5, 3 / 6), form
    full, start = np.ones((3, 2)), np.array([[1, 0], [1, 0], [0, 0]])
    assert count_pixels(full, start) == (2, 6)
    assert count_pixels(start, 1 - start) == (0, 6)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([[0, 0, 1]], r"predictions\[0\] must be a box .* got \[0, 0, 1\]"),
        ([BOX, [5, 0, 3, 4]], r"predictions\[1\] must be a box .* x0 <= x1 .* got \[5, 0, 3, 4\]"),
        ([[0, 3, 5, 1]], "y0 <= y1"),
        ([[0, 0, float("nan"), 1]], "finite"),
        ([[0, 0, 1e200, 1]], "finite"),
        ([0, 0, 8, 10], r"predictions\[0\] must be a box .* got 0"),
        (["a box"], "got 'a box'"),
        ([[[0, 1], 0, 1, 1]], "must be a box"),
        (7, "predictions must be a sequence of boxes, got 7"),
        ([BOX, BOX], "must have the same length, got 2 and 1"),
    ],
)
def test_box_metric_refuses_invalid_boxes(bad, message, tmp_path):
    metric = boxes_alone.ReferringExpressionComprehension(cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=bad, references=[BOX])
    with pytest.raises(ValueError, match=r"references\[0\] must be a box .* got None"):
        metric.compute(predictions=[BOX], references=[None])
    assert metric.compute(predictions=[BOX], references=[BOX])["mean_iou"] == 1  # refused calls leave no state


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"size": [2, 2]}, "must be a run-length encoding"),
        ({"size": 2, "counts": "13"}, "must be a run-length encoding"),
        ({"size": [2, 2], "counts": "1\u732b"}, "must be a run-length encoding"),
        ({"size": [2, 2], "counts": "1P"}, "ends within a number"),
        ({"size": [2, 2], "counts": "o" * 9}, "cannot stand there"),
        ({"size": [2, 3], "counts": "13"}, "1 to 1099511627776 pixels that its run lengths fill, they cover 4"),
        ({"size": [2, 2], "counts": [5, -1]}, "fill, they cover 4"),
        ({"size": [-2, -2], "counts": [4]}, "fill, they cover 4"),
        ({"size": [10**10, 10**10], "counts": [10**20]}, "1 to 1099511627776 pixels"),
        (np.array([[0.5, 1]]), "booleans or zeros and ones"),
        (np.ones((1, 2, 2)), "booleans or zeros and ones"),
        (np.zeros((0, 2)), "booleans or zeros and ones"),
        ([["a"]], "booleans or zeros and ones"),
        ([[1], [1, 0]], "booleans or zeros and ones"),
        (3, "booleans or zeros and ones"),
    ],
)
def test_mask_metric_refuses_invalid_masks(bad, message, tmp_path):
    metric = masks_alone.ReferringSegmentation(cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=rf"predictions\[1\] .*{message}"):
        metric.compute(predictions=[MASK, bad], references=[MASK, MASK])
    with pytest.raises(ValueError, match="sequence of masks, got 7"):
        metric.compute(predictions=[MASK], references=7)
    with pytest.raises(ValueError, match=r"references\[0\] must be a mask"):
        metric.compute(predictions=[MASK], references=[None])
    with pytest.raises(ValueError, match="must have the same length, got 2 and 1"):
        metric.compute(predictions=[MASK, None], references=[MASK])
    assert metric.compute(predictions=[MASK], references=[MASK])["mean_iou"] == 1


def test_count_pixels_of_huge_masks_allocates_no_pixels():
    """Compare masks by run lengths: pycocotools would not finish, or would allocate every pixel."""
    start = time.perf_counter()
    huge = {"size": [10**6, 10**6], "counts": [10**11, 9 * 10**11]}
    half = {"size": [10**6, 10**6], "counts": [5 * 10**11, 5 * 10**11]}
    assert count_pixels(huge, half) == (5 * 10**11, 9 * 10**11)
    assert time.perf_counter() - start < 1


def test_run_lengths_are_decoded_alike_in_all_packages():
    for mask in random_masks(50, 4):
        text = mask["counts"].decode()
        assert masks_alone.uncompress_counts(text) == data_masks.uncompress_counts(text)
        assert model_uncompress_counts(text) == data_masks.uncompress_counts(text)
        assert masks_alone.array_to_counts(from_coco_rle(mask)) == masks_alone.uncompress_counts(text)


def test_summarize_matches_evaluate_modules():
    """Compare the values of `metrics.json` with those of the modules, which have the same names."""
    record = {"iou": 0.6, "any_box_iou": 0.6, "boxes": [BOX], "types": [], "mask_pixels": (1, 2)}
    values = summarize([record | {"resized_mask_pixels": (3, 4)}])
    boxes, masks = BoxMetrics(), MaskMetrics()
    boxes.update([0.6])
    masks.update([1], [2])
    expected = boxes.compute() | {f"mask_{name}": value for name, value in masks.compute().items()}
    assert values == expected | {"mask_mean_iou_resized": 0.75, "per_kind": {}}
