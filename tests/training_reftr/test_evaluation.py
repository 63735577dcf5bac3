"""Evaluation and its report: phrase counts, metrics computed by hand, written files and drawn images."""

import json
import re
import shutil
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, DatasetDict
from PIL import Image
from torchvision.ops import box_iou

import data_scripts
from modeling_reftr import RefTRForVisualGrounding, RefTRProcessor
from modeling_reftr.rle_reftr import from_coco_rle
from tests.helpers.layout_flickr30k import make_flickr30k
from tests.helpers.layout_refcoco import make_refcoco
from tests.helpers.ranks_evaluation import run_grid
from tests.helpers.tiny import ROOT
from training_reftr import visualization
from training_reftr.baselines import constant_box, shuffled_expressions
from training_reftr.data import GroundingCollator, move
from training_reftr.evaluation import (
    compare_boxes,
    evaluate,
    mask_separation,
    order_records,
    phrase_keys,
    predict_batch,
    summarize,
)
from training_reftr.published_results import DATASET_NAMES, RESULTS, comparable_results
from training_reftr.report import (
    blind_baselines,
    find_training_rows,
    format_metrics,
    format_report,
    has_integer_boxes,
    report,
    select_splits,
)
from training_reftr.settings import DataSettings, EvaluationSettings, TrainingSettings
from training_reftr.streams import StreamedRows
from training_reftr.visualization import (
    attend,
    choose_sentences,
    describe_failure,
    draw_sample,
    draw_validation_images,
    heat,
)


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def evaluated(make_model, processor, shapes, accelerator):
    """Evaluate a model with masks on the test split; return it with its records."""
    model = make_model(predict_masks=True)
    args = TrainingSettings.from_flat(num_workers=0, evaluation_batch_size=4)
    return model, evaluate(model, processor, shapes["test"], args, accelerator, "test")


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def tables_of(text):
    """Return the rows of Markdown tables, keyed by table head without its first cell."""
    tables, head = {}, None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            head = None
        elif head is None:
            head = tuple(cells[1:])
            tables.setdefault(head, [])
        elif not line.startswith("|---"):
            tables[head].append(cells)
    return tables


# every phrase counts once


def test_evaluation_counts_every_phrase_once_on_any_process_count():
    """Try a part of the full grid of `run_grid()`: 1 to 41 images, 1 to 4 processes, batches of 1 to 8."""
    result = run_grid(counts=(1, 2, 7), ranks=(1, 2, 3, 4), batch_sizes=(1, 3), timeout=200)
    assert (result["failed"], result["passed"], result["of"]) == ([], 28, 28)


def test_evaluation_grid_reports_hang_as_failure():
    result = run_grid(counts=(1,), ranks=(1,), batch_sizes=(1,), timeout=0.5)
    assert result == {"passed": 0, "of": 2, "failed": ["not finished after 0.5 s"]}


@pytest.mark.slow
@pytest.mark.row("R9")
def test_evaluation_counts_every_phrase_once_in_full_grid(record_property):
    result = run_grid(timeout=2400)
    record_property("counted", (result["passed"], result["of"]))
    assert (result["failed"], result["passed"]) == ([], 4 * (41 * 8 + 1))


def test_order_records_follows_split_and_drops_duplicates(shapes):
    keys = phrase_keys(shapes["test"])
    records = [dict(zip(("image_id", "sentence_id", "phrase"), key, strict=True)) for key in keys]
    shuffled = [{**record, "copy": 0} for record in records[::-1]] + [{**record, "copy": 1} for record in records[:9]]
    in_order = order_records(shuffled, keys)
    assert [(record["image_id"], record["sentence_id"], record["phrase"]) for record in in_order] == keys
    assert {record["copy"] for record in in_order} == {0}
    with pytest.raises(ValueError, match=rf"1 of {len(keys)} phrases were not evaluated, the first of them \('shapes"):
        order_records(records[1:], keys)


def test_phrase_keys_refuses_duplicate_phrase(shapes):
    rows = shapes["test"].select([0, 1, 0])
    with pytest.raises(ValueError, match=r"phrases twice, the first in the sentence 'shapes_test_\w+' of the image"):
        phrase_keys(rows)


# metrics by hand


def record_of(**fields):
    box = fields.get("box", [0, 0, 10, 10])
    return {"image_id": "a", "image_size": (10, 20), "types": [], "boxes": [box], "box": box, "iou": 1.0, **fields}


def test_summarize_matches_metrics_by_hand():
    box, other = [0, 0, 10, 10], [10, 0, 20, 10]
    records = [
        record_of(object_id="x", pred_box=box, types=["place"]),
        record_of(object_id="y", box=other, pred_box=box, iou=0.0, types=["place"]),
        record_of(object_id="x", pred_box=None, iou=0.0),
    ]
    summary = summarize(records)
    assert summary["num_phrases"] == 3
    (place,) = summary["per_kind"].values()
    assert (place["accuracy@0.5"], place["mean_iou"], place["num_phrases"]) == (0.5, 0.5, 2)
    assert not any(name.startswith("mask") or "recall" in name for name in summary)
    # x is compared with the answer for y (a hit), y with that for x (a miss), and x again with that for y
    assert shuffled_expressions(records)["accuracy@0.5"] == pytest.approx(2 / 3)
    assert shuffled_expressions(records[::2]) is None


def test_mask_separation_averages_pairs_of_different_objects_in_one_sentence():
    def rle(*counts):
        return {"size": [2, 4], "counts": list(counts)}

    left, right, all_pixels = rle(0, 4, 4), rle(4, 4), rle(0, 8)
    first, second = {"sentence_id": "s", "object_id": "x"}, {"sentence_id": "s", "object_id": "y"}
    records = [
        record_of(**first, segmentation=left, pred_segmentation=all_pixels),
        record_of(**second, segmentation=right, pred_segmentation=left),
        record_of(**first, segmentation=left, pred_segmentation=left),  # the same object as the first
        record_of(**second, segmentation=None, pred_segmentation=right),
        record_of(**second, segmentation=right, pred_segmentation=None),
        record_of(**{**second, "sentence_id": "t"}, segmentation=right, pred_segmentation=right),
    ]
    # (all, left) is 0.5 and (left, left) is 1
    assert mask_separation(records) == {"mask_separation": 0.75, "mask_separation_target": 0.0}
    assert mask_separation(records[:1]) == {}


def test_report_of_captions_compares_mask_separation_with_annotations():
    text = format_report(metrics_of("shapes", "test", mask_separation=0.99444, mask_separation_target=0.0123))
    assert "in one caption have a mean IoU of 0.994; that of the annotated masks is 0.012." in text
    assert "in one caption" not in format_report(metrics_of("shapes", "test"))


def test_summarize_matches_merged_and_any_box_recall_by_hand():
    """Merge two buses into one box: an answer on one bus is a hit for any-box recall only."""
    bus, merged = [0.0, 0, 10, 10], [0.0, 0, 40, 10]
    target = {"words": "two buses", "sentence_id": "s", "box": merged, "boxes": [bus, [30.0, 0, 40, 10]]}
    on_one = compare_boxes(torch.tensor(bus), target)
    assert (on_one["iou"], on_one["any_box_iou"]) == (0.25, 1.0)
    on_all = compare_boxes(torch.tensor(merged), target)
    assert (on_all["iou"], on_all["any_box_iou"]) == (1.0, 0.25)
    half = compare_boxes(torch.tensor([0.0, 0, 10, 5]), target)  # an IoU of exactly 0.5 is not a hit
    assert half["any_box_iou"] == 0.5
    answers = [
        {**on_one, "types": ["vehicles", "scene"]},
        {**on_one, "types": ["vehicles"]},
        {**on_all, "types": ["people"]},
        {**half, "types": ["people"]},
    ]
    summary = summarize([record_of(**target, **answer) for answer in answers])
    assert (summary["merged_box_recall@1"], summary["any_box_recall@1"]) == (0.25, 0.5)
    assert summary["accuracy@0.5"] == summary["merged_box_recall@1"]
    by_kind = {
        kind: (values["merged_box_recall@1"], values["any_box_recall@1"], values["num_phrases"])
        for kind, values in summary["per_kind"].items()
    }
    # a phrase of two types counts in both
    assert by_kind == {"people": (0.5, 0.0, 2), "scene": (0.0, 1.0, 1), "vehicles": (0.0, 1.0, 2)}


def test_mask_metrics_count_missing_answers_not_missing_targets():
    records = [
        record_of(mask_pixels=(50, 100), resized_mask_pixels=(3, 4)),
        record_of(mask_pixels=(0, 100), resized_mask_pixels=(0, 4)),
        record_of(),  # without a target mask the box counts and the mask does not
    ]
    summary = summarize(records)
    assert (summary["num_phrases"], summary["mask_num_phrases"]) == (3, 2)
    assert (summary["mask_mean_iou"], summary["mask_mean_iou_resized"]) == (0.25, 0.375)
    assert summary["mask_overall_iou"] == 0.25


def test_compare_boxes_refuses_nan_box():
    target = {"words": "the star", "sentence_id": "s_1", "box": [0, 0, 1, 1], "boxes": [[0, 0, 1, 1]]}
    with pytest.raises(ValueError, match=r"box for 'the star' \(s_1\) is \[nan"):
        compare_boxes(torch.tensor([float("nan"), 0, 1, 1]), target)


def test_constant_box_of_shapes_is_valid_box(shapes):
    rows = shapes["train"]
    records = [
        {"image_size": (row["height"], row["width"]), "box": item["box"]} for row in rows for item in row["objects"]
    ]
    answer = constant_box(rows, records)
    assert 0 < answer["accuracy@0.5"] < 0.5
    x0, y0, x1, y1 = answer["box_xyxy"]
    assert 0 <= x0 < x1 <= 1
    assert 0 <= y0 < y1 <= 1


def test_constant_box_is_box_with_most_hits():
    """Place most boxes in the same part of images that are not square."""
    parts = [[0.1, 0.2, 0.4, 0.9]] * 4 + [[0.6, 0.1, 0.9, 0.3], [0.0, 0.0, 1.0, 0.1]]
    rows, records = [], []
    for number, part in enumerate(parts):
        width, height = 100 + 40 * number, 50
        box = (np.array(part) * [width, height, width, height]).tolist()
        sentence = {"phrases": [{"objects": [0]}]}
        rows.append({"width": width, "height": height, "objects": [{"box": box}], "sentences": [sentence]})
        records.append({"image_size": (height, width), "box": box})
    answer = constant_box(Dataset.from_list(rows), records)
    assert answer["box_xyxy"] == parts[0]
    assert answer["accuracy@0.5"] == pytest.approx(4 / 6)
    assert answer["precision@0.9"] == pytest.approx(4 / 6)


def test_constant_box_is_mean_box_if_it_hits_most():
    boxes = [[0.0, 0.0, 60.0, 100.0], [30.0, 0.0, 90.0, 100.0]]  # neither box hits the other
    sentence = {"phrases": [{"objects": [0]}]}
    rows = [{"width": 100, "height": 100, "objects": [{"box": box}], "sentences": [sentence]} for box in boxes]
    answer = constant_box(Dataset.from_list(rows), [{"image_size": (100, 100), "box": box} for box in boxes])
    assert answer["box_xyxy"] == [0.15, 0.0, 0.75, 1.0]
    assert answer["accuracy@0.5"] == 1


def test_shuffled_expressions_swaps_only_different_objects():
    box, other = [0, 0, 10, 10], [10, 0, 20, 10]
    records = [
        record_of(object_id="x", pred_box=box),
        record_of(object_id="x", pred_box=box),
        record_of(object_id="y", box=other, pred_box=other),
        record_of(object_id="x", image_id="b", pred_box=box),  # the only object of its image
    ]
    swapped = shuffled_expressions(records)
    assert (swapped["num_phrases"], swapped["mean_iou"]) == (3, 0.0)


def test_compare_boxes_counts_box_without_extent_as_miss():
    target = {"words": "a", "sentence_id": "s", "box": [5.0, 5, 5, 5], "boxes": [[5.0, 5, 5, 5]]}
    found = compare_boxes(torch.tensor([5.0, 5, 5, 5]), target)
    assert (found["iou"], found["any_box_iou"]) == (0.0, 0.0)


def test_predict_batch_matches_answers_to_phrases_after_truncation(make_model, processor, shapes, accelerator):
    """Truncate the first phrase: the only answer belongs to the second one."""
    row = shapes["test"][0]
    text = "a star " * 20 + "a circle"
    phrases = [
        {"start": start, "end": end, "objects": [number], "types": []}
        for number, (start, end) in enumerate([(len(text) - 8, len(text)), (0, 6)])
    ]
    row = {**row, "sentences": [{"sentence_id": "s", "text": text, "phrases": phrases}]}
    processor.max_caption_length = 20
    model = make_model(predict_masks=True)
    batch = GroundingCollator(processor)([row])
    with torch.no_grad():
        outputs = model(**{name: value for name, value in batch.items() if name not in ("labels", "targets")})
        found = predict_batch(model, processor, batch, EvaluationSettings(), accelerator)
    size = (row["height"], row["width"])
    expected = processor.image_processor.post_process_boxes(outputs, [size])[0, 1]
    assert (found[0]["pred_box"], found[0]["iou"], found[0]["any_box_iou"]) == (None, 0.0, 0.0)
    assert found[1]["pred_box"] == pytest.approx(expected.tolist(), abs=1e-3)
    (mask,) = processor.image_processor.post_process_masks(outputs, [size])[0]
    assert found[0]["pred_segmentation"] is None
    assert (from_coco_rle(found[1]["pred_segmentation"]) == mask.numpy()).all()
    assert [record["object_id"] for record in found] == [item["object_id"] for item in row["objects"][:2]]


def test_evaluate_disables_dropout_and_restores_training_mode(make_model, processor, shapes, accelerator):
    model = make_model(dropout=0.5, attention_dropout=0.5).train()
    args = TrainingSettings.from_flat(num_workers=0)
    first, again = (evaluate(model, processor, shapes["test"], args, accelerator, "test") for _ in range(2))
    assert first == again
    assert all(module.training for module in (model, model.model.encoder, model.model.text_backbone))


def test_evaluate_records_mask_intersection_and_union(evaluated):
    for record in evaluated[1][:5]:
        answer, truth = (from_coco_rle(record[name]) for name in ("pred_segmentation", "segmentation"))
        assert record["mask_pixels"] == ((answer & truth).sum(), (answer | truth).sum())


def test_evaluate_with_two_step_masks_resizes_twice(make_model, processor, shapes, accelerator):
    processor.image_processor.size = {"shortest_edge": 24, "longest_edge": 24}
    model, rows = make_model(predict_masks=True), shapes["test"].select([0])
    with torch.no_grad():
        inputs = processor(rows[0]["image"], [sentence["text"] for sentence in rows[0]["sentences"][:1]])
        outputs = model(**inputs)
    masks = []
    for two_step in (False, True):
        args = TrainingSettings.from_flat(num_workers=0, two_step_masks=two_step)
        record = evaluate(model, processor, rows, args, accelerator, "test")[0]
        masks.append(from_coco_rle(record["pred_segmentation"]))
        (expected,) = processor.image_processor.post_process_masks(outputs, [(64, 64)], two_step=two_step)
        assert (masks[-1] != expected[0].numpy()).mean() < 0.02
    assert (masks[0] != masks[1]).mean() > 0.02


def test_evaluation_omits_unavailable_baselines_with_warning(shapes, caplog):
    args = TrainingSettings.from_flat(train_split="train+none")
    assert find_training_rows(shapes, args.data) is None
    assert blind_baselines([record_of(object_id="x", pred_box=[0, 0, 1, 1])], None, "testA", args.data) == {}
    assert "testA: no constant box, because the split 'train+none' that it is chosen on was not loaded" in caplog.text
    assert "testA: no shuffled expressions" in caplog.text
    both = find_training_rows(shapes, DataSettings(train_split="train+validation"))
    assert len(both) == len(shapes["train"]) + len(shapes["validation"])
    streamed = {"train": StreamedRows.of(shapes["train"].to_iterable_dataset())}
    assert find_training_rows(streamed, DataSettings()) is None


# report of the script


@pytest.fixture(scope="module")
def two_splits(trained, recipe, tmp_path_factory):
    """Evaluate two splits with masks and drawn samples; return the output folder and the process."""
    output = tmp_path_factory.mktemp("two_splits")
    torch.manual_seed(0)
    RefTRForVisualGrounding.from_pretrained(trained[0], predict_masks=True).save_pretrained(output / "model")
    RefTRProcessor.from_pretrained(trained[0]).save_pretrained(output / "model")
    argv = ["--eval_only", "--test_splits", "validation,test", "--visualize", "3"]
    command = [sys.executable, "train_reftr.py", recipe, "--init_from", output / "model", "--output_dir", output]
    result = subprocess.run([*command, *argv], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return output, result


def test_constant_box_is_chosen_on_all_training_rows(shapes, make_model, processor, accelerator):
    records = evaluate(
        make_model(), processor, shapes["test"], TrainingSettings.from_flat(num_workers=0), accelerator, "test"
    )
    found = blind_baselines(records, shapes["train"], "test", DataSettings())["constant_box"]
    assert found == constant_box(shapes["train"], records)
    assert found != constant_box(shapes["train"].select(range(1)), records)


def test_eval_only_reproduces_metrics_of_training_run(trained, recipe, run, tmp_path):
    output, _ = trained
    run("train_reftr.py", recipe, "--init_from", output, "--output_dir", tmp_path, "--eval_only")
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (output, tmp_path))
    assert not (tmp_path / "model.safetensors").exists()
    for metrics in (first, second):
        assert metrics.pop("model") == str(output)
    assert first == second
    assert (output / "predictions.jsonl").read_text() == (tmp_path / "predictions.jsonl").read_text()
    assert not (tmp_path / "visualizations").exists()


def test_report_covers_several_splits(two_splits, shapes):
    output, result = two_splits
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["model"] == str(output / "model")
    assert (metrics["dataset"], metrics["two_step_masks"]) == ("shapes", False)
    assert list(metrics["splits"]) == ["validation", "test"]
    for name, values in metrics["splits"].items():
        assert values["num_phrases"] == values["mask_num_phrases"] == len(phrase_keys(shapes[name]))
        assert values["integer_boxes"] is False
        assert values["constant_box"]["num_phrases"] == values["num_phrases"]
        assert {"swapped_expressions", "mask_overall_iou", "mask_mean_iou_resized"} <= values.keys()
        assert set(values["per_kind"]) == {"attribute", "place", "relation", "caption"}
    assert result.stdout.startswith(format_metrics(metrics))

    tables = tables_of((output / "report.md").read_text())
    (boxes,) = (rows for head, rows in tables.items() if head[:2] == ("accuracy@0.5", "mean IoU"))
    (masks,) = (rows for head, rows in tables.items() if head[:2] == ("mIoU", "oIoU"))
    expected = [values["mean_iou"] for values in metrics["splits"].values()]
    assert [row[2] for row in boxes if row[0] == "all phrases"] == [f"{value:.3f}" for value in expected]
    expected = [values["mask_overall_iou"] for values in metrics["splits"].values()]
    assert [row[2] for row in masks if row[0] == "all phrases"] == [f"{value:.3f}" for value in expected]
    assert sum(row[0] == "expressions swapped" for row in boxes) == 2
    assert len(tables) == 2  # no published results, and no object with several boxes


def test_predictions_are_keyed_by_sentence_and_phrase(two_splits, shapes):
    lines = lines_of(two_splits[0] / "predictions.jsonl")
    metrics = json.loads((two_splits[0] / "metrics.json").read_text())
    keys = [(name, *key) for name in ("validation", "test") for key in phrase_keys(shapes[name])]
    assert [(line["split"], line["image_id"], line["sentence_id"], line["phrase"]) for line in lines] == keys
    rows = {row["image_id"]: row for name in ("validation", "test") for row in shapes[name]}
    for line in lines:
        row = rows[line["image_id"]]
        (sentence,) = (item for item in row["sentences"] if item["sentence_id"] == line["sentence_id"])
        phrase = sentence["phrases"][line["phrase"]]
        assert line["words"] == sentence["text"][phrase["start"] : phrase["end"]]
        truth = torch.tensor([row["objects"][phrase["objects"][0]]["box"]], dtype=torch.float64)
        answer = torch.tensor([line["pred_box_xyxy"]], dtype=torch.float64)
        assert line["iou"] == line["any_box_iou"] == box_iou(answer, truth).item()
        assert from_coco_rle(line["segmentation"]).shape == (row["height"], row["width"])
    for name, values in metrics["splits"].items():
        ious = [line["iou"] for line in lines if line["split"] == name]
        assert values["accuracy@0.5"] == sum(iou > 0.5 for iou in ious) / len(ious)


def test_report_draws_samples_spread_over_split(two_splits, shapes):
    for name in ("validation", "test"):
        files = sorted((two_splits[0] / "visualizations" / name).iterdir())
        assert len(files) == 3
        images = [re.search(rf"shapes_{name}_\d+", file.name)[0] for file in files]
        first, *_, last = shapes[name]["image_id"]
        assert images[0] == first
        assert last > images[2] > images[1] > images[0]  # spread over the split
        for file in files:
            with Image.open(file) as image:
                assert image.width > 960
                assert image.height > image.width * 0.7


def test_report_of_flickr30k_names_both_recalls(trained, recipe, run, tmp_path):
    """Report both recalls of objects with several boxes, in total and by phrase type."""
    make_flickr30k(tmp_path / "data")
    (tmp_path / "data" / "test.txt").write_text("1004\n")  # one image of one object with one box
    run(
        "train_reftr.py", recipe, "--eval_only", "--init_from", trained[0], "--output_dir", tmp_path / "out",
        "--dataset", "flickr30k_entities", "--dataset_config", "{}", "--data_dir", tmp_path / "data",
        "--data_cache_dir", tmp_path / "cache", "--test_splits", "train,test",
    )  # fmt: skip
    splits = json.loads((tmp_path / "out" / "metrics.json").read_text())["splits"]
    lines = [line for line in lines_of(tmp_path / "out" / "predictions.jsonl") if line["split"] == "train"]
    assert splits["train"]["any_box_recall@1"] == sum(line["any_box_iou"] > 0.5 for line in lines) / len(lines)
    assert splits["train"]["merged_box_recall@1"] == sum(line["iou"] > 0.5 for line in lines) / len(lines)
    assert any(line["any_box_iou"] != line["iou"] for line in lines)
    assert {"people", "vehicles", "animals"} <= splits["train"]["per_kind"].keys()
    assert "any_box_recall@1" in splits["train"]["per_kind"]["vehicles"]
    assert "any_box_recall@1" not in splits["test"]
    assert "swapped_expressions" not in splits["test"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert len(tables_of(text)[("merged-box recall@1", "any-box recall@1", "phrases")]) == 1 + len(
        splits["train"]["per_kind"]
    )
    assert "Not computed, for lack of data: expressions swapped." in text
    # the published results on test use merged boxes
    rows = tables_of(text)[("metric", "this model", "published", "published model", "source")]
    assert [(row[0], row[1], row[3]) for row in rows] == [
        ("test", "boxes, accuracy@0.5", "78.66"),
        ("test", "boxes, accuracy@0.5", "81.18"),
    ]
    assert all("(not confirmed)" in row[-1] for row in rows)
    assert "train2014" not in text


def test_failed_run_keeps_files_of_existing_best_model(trained, recipe, run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder, ignore=shutil.ignore_patterns("checkpoints"))
    names = ("metrics.json", "report.md", "predictions.png", "recipe.yaml", "model.safetensors")
    before = {name: (folder / name).read_bytes() for name in names}
    argv = ("--output_dir", folder, "--best_metric", "beauty", "--learning_rate", "0.5", "--max_steps", "1")
    result = run("train_reftr.py", recipe, *argv, check=False)
    assert "best_metric='beauty'" in result.stderr
    assert {name: (folder / name).read_bytes() for name in names} == before


def test_run_with_unknown_test_split_is_refused_before_training(recipe, run, tmp_path):
    argv = ("train_reftr.py", recipe, "--output_dir", tmp_path, "--test_splits", "test,testC")
    result = run(*argv, check=False)
    assert result.returncode != 0
    assert "test_splits names 'testC', but shapes has the splits train, validation, test." in result.stderr
    assert not list(tmp_path.iterdir())  # refused before training


def test_select_splits_refuses_no_split_and_empty_split(shapes):
    with pytest.raises(ValueError, match=r"test_splits=' ,' names no split; there are: train, validation, test"):
        select_splits(shapes, DataSettings(test_splits=" ,"))
    empty = DatasetDict(test=shapes["test"].select([]))
    with pytest.raises(ValueError, match="'test' of shapes has no rows"):
        select_splits(empty, DataSettings())
    assert list(select_splits(shapes, DataSettings(test_splits="test, validation,test"))) == [
        "test",
        "validation",
    ]


def test_failed_report_removes_previous_metrics(make_model, processor, shapes, accelerator, tmp_path):
    (tmp_path / "metrics.json").write_text("{}")
    model = make_model()
    torch.nn.init.constant_(model.box_head.layers[-1].bias, float("nan"))
    with pytest.raises(ValueError, match="The model's box for"):
        report(
            model, processor, shapes, TrainingSettings.from_flat(output_dir=str(tmp_path), num_workers=0), accelerator
        )
    assert not (tmp_path / "metrics.json").exists()


# published results


def metrics_of(dataset, split, integer_boxes=True, **metrics):
    """Return the metrics file of one split."""
    metrics = {"accuracy@0.5": 0.5, "mean_iou": 0.5, "num_phrases": 2, "per_kind": {}, **metrics}
    metrics |= {f"precision@{threshold}": 0.5 for threshold in (0.5, 0.6, 0.7, 0.8, 0.9)}
    metrics["integer_boxes"] = integer_boxes
    return {"model": "m", "dataset": dataset, "two_step_masks": True, "splits": {split: metrics}}


def test_report_lists_published_metrics_of_same_dataset_and_split():
    text = format_report(metrics_of("refcoco+_unc", "testB", mask_mean_iou=0.9, mask_mean_iou_resized=0.61234))
    rows = tables_of(text)[("metric", "this model", "published", "published model", "source")]
    confirmed = [row for row in rows if "not confirmed" not in row[-1]]
    assert [row[:4] for row in confirmed] == [
        ["testB", "boxes, accuracy@0.5", "50.00", "68.99"],
        ["testB", "masks, mIoU at the resized size", "61.23", "59.40"],
    ]
    assert all(row[4] == "RefTR, ResNet-101, pre-training: Visual Genome" for row in confirmed)
    assert [row[3] for row in rows if row not in confirmed] == ["62.16"]
    assert "truncated to integers, as published" in text
    assert "in two steps, as published" in text
    assert "has seen the held-out images" in text


def test_report_without_masks_lists_no_published_mask_metrics():
    text = format_report(metrics_of("refcocog_umd", "test", integer_boxes=False))
    rows = tables_of(text)[("metric", "this model", "published", "published model", "source")]
    assert {row[1] for row in rows} == {"boxes, accuracy@0.5"}
    assert "compared with the ground truth as annotated" in text
    assert "Published metrics are of target boxes rounded to integers" in text


def test_has_integer_boxes_follows_flags_of_each_dataset():
    args = TrainingSettings.from_flat(dataset="refcoco_unc", dataset_config={"integer_boxes": True})
    assert has_integer_boxes("val", args.data)
    flags = {"refcoco_unc": {"integer_boxes": True}, "refcocog_umd": {}}
    args = TrainingSettings.from_flat(dataset="refcoco_unc,refcocog_umd,shapes", dataset_config=flags)
    assert [has_integer_boxes(f"{name}/val", args.data) for name in args.data.dataset.split(",")] == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("dataset", "split"),
    [
        ("refcoco_google", "val"),
        ("refcocog_google", "val"),
        ("refcoco_unc", "train"),
        ("resc_flickr", "test"),
        ("shapes", "test"),
    ],
)
def test_report_lists_no_published_metrics_if_not_comparable(dataset, split):
    assert "Compared with published results" not in format_report(metrics_of(dataset, split))


def test_comparable_results_of_joined_datasets_use_own_dataset():
    joined, alone = (
        comparable_results("refcoco_unc,shapes", "refcoco_unc/val"),
        comparable_results("refcoco_unc", "val"),
    )
    assert joined == alone != []
    assert comparable_results("refcoco_unc,shapes", "shapes/val") == []


def test_published_results_are_percent_of_known_datasets():
    import data_scripts

    for names in DATASET_NAMES.values():
        assert set(names) <= set(data_scripts.SOURCES)
    for result in RESULTS:
        assert all(1 < value < 100 for value in result.percentages.values())
        for name in DATASET_NAMES[result.dataset]:
            assert set(result.percentages) <= set(data_scripts.SOURCES[name].splits)
    # a split has one value per backbone, pre-training and metric
    keys = [(r.dataset, r.metric, r.backbone, r.pre_training) for r in RESULTS]
    assert len(set(keys)) == len(keys)


# images


def test_attend_returns_attention_of_last_decoder_layer(evaluated, processor, shapes, accelerator):
    model, records = evaluated
    model.eval()
    record = next(record for record in records if record["phrase"] == 1)
    row = shapes["test"][shapes["test"]["image_id"].index(record["image_id"])]
    (sentence,) = (item for item in row["sentences"] if item["sentence_id"] == record["sentence_id"])
    inputs = move(GroundingCollator(processor)([{**row, "sentences": [sentence]}]), "cpu", processor)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = attend(model, processor, row, record, accelerator)
        outputs = model(**inputs, output_attentions=True)
    length = inputs["input_ids"].shape[1]
    expected = outputs.cross_attentions[-1][0, :, 1, length:]
    assert maps.shape == (2, 8, 8)
    np.testing.assert_allclose(maps.reshape(2, -1), expected.numpy(), atol=1e-6)


def test_attend_crops_padding(evaluated, processor, shapes, accelerator):
    model, records = evaluated
    model.set_attn_implementation("eager")
    processor.image_processor.pad_size = {"height": 96, "width": 80}
    with torch.no_grad():
        maps = attend(model.eval(), processor, shapes["test"][0], records[0], accelerator)
    assert maps.shape[1:] == (8, 8)  # instead of 12 x 10 with padding


def test_report_restores_attention_implementation(make_model, processor, shapes, accelerator, tmp_path):
    model = make_model()
    model.set_attn_implementation("sdpa")
    args = TrainingSettings.from_flat(output_dir=str(tmp_path), num_workers=0, visualize=1, num_pictures=0)
    (tmp_path / "visualizations" / "test").mkdir(parents=True)
    (tmp_path / "visualizations" / "test" / "0007_old.png").write_text("")
    metrics = report(model, processor, shapes, args, accelerator)
    assert model.config._attn_implementation == "sdpa"
    assert model.model.text_backbone.config._attn_implementation == "sdpa"
    (file,) = (tmp_path / "visualizations" / "test").iterdir()
    assert file.name.startswith("0000_shapes_test_000000")
    assert not (tmp_path / "predictions.png").exists()
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["model"] == str(tmp_path)


def test_report_names_licences_that_builders_declare(make_model, processor, shapes, accelerator, tmp_path):
    rows = {name: split.select(range(len(split))) for name, split in shapes.items()}
    rows["train"].info.license, rows["test"].info.license = "CC0", "CC BY-SA 4.0"
    args = TrainingSettings.from_flat(output_dir=str(tmp_path), num_workers=0, num_pictures=0)
    assert report(make_model(), processor, rows, args, accelerator)["dataset_license"] == "CC BY-SA 4.0; CC0"
    assert "dataset_license" not in report(make_model(), processor, shapes, args, accelerator)


def test_heat_colors_largest_weights():
    weights = np.zeros((4, 4), np.float32)
    weights[3, 0] = 0.9
    image = np.asarray(heat(Image.new("RGB", (80, 40), "gray"), weights)).astype(int)
    left_bottom, right_top = image[36, 4], image[4, 70]
    assert left_bottom[0] - left_bottom[2] > 150
    assert len(set(right_top.tolist())) == 1
    assert heat(Image.new("RGB", (8, 8)), np.zeros((2, 2))).size == (8, 8)


def test_heat_of_head_without_attention_on_image_stays_gray():
    """The largest weight of a head that attends to the text is small, in one position or in all."""
    peak, even = np.zeros((8, 8), np.float32), np.full((8, 8), 0.004 / 64, np.float32)
    peak[5, 5] = 0.004
    gray = np.asarray(heat(Image.new("RGB", (64, 64), "gray"), np.zeros((8, 8)))).astype(int)
    for weights in (peak, even):
        image = np.asarray(heat(Image.new("RGB", (64, 64), "gray"), weights)).astype(int)
        assert np.abs(image - gray).max() <= 2


def test_heat_of_several_heads_has_common_scale():
    """Uniform attention is weak everywhere, concentrated attention strong, and its share on the image limits both."""
    image, peak = Image.new("RGB", (64, 64), "gray"), np.zeros((8, 8), np.float32)
    peak[5, 5] = 1
    heads = (peak, 0.5 * peak, np.full((8, 8), 1 / 64, np.float32), np.full((8, 8), 0.1 / 64, np.float32))
    reds = [np.ptp(np.asarray(heat(image, weights)).astype(int), axis=-1).max() for weights in heads]
    assert reds[0] > reds[1] > reds[2] > reds[3] > 0
    assert reds[2] < 0.5 * reds[0]


def test_draw_sample_accepts_missing_answer(shapes):
    row = shapes["test"][0]
    sentence = row["sentences"][0]
    key = {"sentence_id": sentence["sentence_id"], "phrase": 0, "words": sentence["text"]}
    item = row["objects"][0]
    record = {**key, "pred_box": None, "iou": 0.0, "box": item["box"], "segmentation": None}
    assert draw_sample(row, record, np.ones((3, 4, 4))).width > 960


def make_group(number, ious=(0.9,), kind="attribute", image_id=None, mask_pixels=None):
    """Make the records of a sentence, as far as its choice depends on them."""
    fields = {"image_id": image_id or f"image {number}", "sentence_id": f"sentence {number}", "types": [kind]}
    fields |= {} if mask_pixels is None else {"mask_pixels": mask_pixels}
    return [{**fields, "phrase": phrase, "iou": iou} for phrase, iou in enumerate(ious)]


def test_choose_sentences_takes_types_in_turns_and_one_failure_last():
    kinds = ["attribute"] * 6 + ["place", "relation"]
    groups = [make_group(number, kind=kind) for number, kind in enumerate(kinds)]
    groups += [make_group(10, (0.9, 0.8), "caption"), make_group(11, (0.9, 0.8), "caption")]
    groups += [make_group(number, (iou,)) for number, iou in ((20, 0.4), (21, 0.0), (22, 0.2))]
    chosen = choose_sentences(groups, 6)
    assert [len(group) for group in chosen] == [2, 1, 1, 1, 2, 1]
    assert {group[0]["types"][0] for group in chosen[:4]} == {"caption", "attribute", "place", "relation"}
    assert [describe_failure(group) for group in chosen] == [""] * 5 + ["failure, IoU 0.20"]
    assert choose_sentences(groups, 6) == chosen
    assert len(choose_sentences(groups, 100)) == 11, "all correct ones, and one failure"
    assert choose_sentences(groups, 1) == [groups[-1]]
    assert choose_sentences([], 8) == choose_sentences(groups, 0) == []


def test_choose_sentences_without_failure_draws_correct_ones_only():
    groups = [make_group(number) for number in range(9)]
    assert choose_sentences(groups, 8) == groups[:8]


def test_choose_sentences_prefers_failed_caption_if_no_caption_is_correct():
    groups = [make_group(0), make_group(1, (0.1,)), make_group(2, (0.9, 0.4)), make_group(3, (0.2,))]
    assert choose_sentences(groups, 8) == [groups[0], groups[2]]


def test_choose_sentences_prefers_fresh_images():
    groups = [make_group(number, image_id="a") for number in range(5)] + [make_group(5, image_id="b")]
    assert choose_sentences(groups, 2) == [groups[0], groups[5]]


def test_describe_failure_counts_boxes_and_masks():
    assert describe_failure(make_group(0, (0.9, 0.5), mask_pixels=(9, 10))) == "failure, IoU 0.50"
    assert describe_failure(make_group(0, (0.51,), mask_pixels=(3, 10))) == "failure, mask IoU 0.30"
    assert describe_failure(make_group(0, (0.51,), mask_pixels=(0, 0))) == "failure, mask IoU 0.00"
    assert describe_failure(make_group(0, (0.51,), mask_pixels=(6, 10))) == ""


def make_records(rows, is_failure):
    """Make a record per phrase of some rows, predicted correctly or far away from the object."""
    records = []
    for row in rows:
        for sentence in row["sentences"]:
            for number, phrase in enumerate(sentence["phrases"]):
                item = row["objects"][phrase["objects"][0]]
                wrong = is_failure(sentence)
                records.append(
                    {"image_id": row["image_id"], "sentence_id": sentence["sentence_id"], "phrase": number}
                    | {"words": sentence["text"][phrase["start"] : phrase["end"]], "types": phrase["types"]}
                    | {"box": item["box"], "pred_box": [0, 0, 4, 4] if wrong else item["box"]}
                    | {"iou": 0.0 if wrong else 1.0, "segmentation": item["segmentation"]}
                    | {"pred_segmentation": item["segmentation"], "mask_pixels": (9, 10)}
                )
    return records


def test_draw_validation_images_arranges_grid_with_one_failure_and_caption(shapes, monkeypatch):
    drawn, draw_sentence = [], visualization.draw_sentence

    def record_group(row, group, width):
        drawn.append(group)
        return draw_sentence(row, group, width)

    monkeypatch.setattr(visualization, "draw_sentence", record_group)
    records = make_records(shapes["test"], lambda sentence: sentence["sentence_id"].endswith("_1"))
    for num, columns in ((8, 4), (6, 3), (7, 4)):
        drawn.clear()
        image = draw_validation_images(records, shapes["test"], num)
        assert len(drawn) == num
        assert 1200 <= image.width <= 1600
        assert image.width // columns >= 320
        assert [bool(describe_failure(group)) for group in drawn] == [False] * (num - 1) + [True]
        assert any(len(group) > 1 for group in drawn)
        is_red = (np.asarray(image) == (208, 0, 0)).all(axis=-1)
        assert np.ptp(is_red.any(axis=0).nonzero()[0]) < image.width // columns
        assert is_red.sum() > 340 * 15
    repeated = draw_validation_images(records, shapes["test"], 7)
    assert repeated.tobytes() == image.tobytes()
    assert draw_validation_images(records, shapes["test"], 1).width == 2 * 8 + 512
    assert draw_validation_images([], Dataset.from_dict({"image_id": []}), 5) is None


def test_draw_validation_images_of_untrained_model_shows_one_failure(evaluated, shapes):
    _, records = evaluated
    records = [{**record, "iou": 0.0} for record in records]
    assert draw_validation_images(records, shapes["test"], 5).width == 2 * 8 + 512


def test_draw_validation_images_keeps_stored_orientation(tmp_path):
    """Ignore the EXIF orientation of an image annotated as stored: rotation would move it away from its boxes."""
    make_refcoco(tmp_path)
    rows = data_scripts.load("refcoco_unc", "train", data_dir=tmp_path, cache_dir=str(tmp_path / "cache"))
    (index,) = [index for index, image_id in enumerate(rows["image_id"]) if image_id == "coco_50"]
    row = rows.cast_column("image", datasets.Image(decode=False))[index]
    (sentence,), (item,) = row["sentences"], row["objects"]
    record = {"image_id": "coco_50", "sentence_id": sentence["sentence_id"], "phrase": 0, "types": []}
    record |= {"words": sentence["text"], "box": item["box"], "pred_box": item["box"], "iou": 1.0}
    image = draw_validation_images([record], rows, 1)
    assert (row["width"], row["height"]) == (40, 30)
    assert image.height < image.width
