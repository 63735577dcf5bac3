"""`transformers.Trainer`: metrics match our own evaluation, predictions, resuming and the Hub."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from data_scripts.masks import resize_to_nearest
from modeling_reftr.modeling_reftr import RefTRVisualGroundingOutput
from modeling_reftr.rle_reftr import from_coco_rle, to_coco_rle
from tests.helpers.local_hub import Hub
from tests.helpers.tiny import ROOT
from training_reftr.data import GroundingCollator
from training_reftr.evaluation import evaluate, predict_batch, summarize
from training_reftr.settings import EvaluationSettings, TrainingSettings
from training_reftr.trainer_metrics import compute_metrics, score_phrases


SCORED = {"compute_metrics": compute_metrics, "preprocess_logits_for_metrics": score_phrases}
SIZES = [(64, 64), (96, 48), (40, 70), (64, 32), (33, 64), (64, 64), (90, 60)]


@pytest.fixture
def rows(shapes, processor) -> Dataset:
    """Make rows of images of several sizes with boxes near the center, some of which the model hits."""
    rng = np.random.default_rng(0)
    rows = []
    for index, size in enumerate(SIZES):
        row = shapes["validation"][index]
        width, height = row["width"], row["height"]
        for item in row["objects"]:
            edges = rng.uniform([0.1, 0.1, 0.6, 0.6], [0.4, 0.4, 0.9, 0.9]) * [width, height, width, height]
            item["box"], item["boxes"] = edges.tolist(), [edges.tolist()]
        if index % 3 == 0:  # single expressions alone
            row["sentences"] = [item for item in row["sentences"] if len(item["phrases"]) == 1][: index // 3 + 1]
        scale = np.array(size * 2) / [width, height, width, height]
        for item in row["objects"]:
            item["box"], item["boxes"] = (item["box"] * scale).tolist(), [(item["box"] * scale).tolist()]
            item["segmentation"] = to_coco_rle(
                torch.from_numpy(resize_to_nearest(from_coco_rle(item["segmentation"]), *size[::-1]))
            )
        rows.append({**row, "image": row["image"].resize(size), "width": size[0], "height": size[1]})
    return Dataset.from_list(rows, features=shapes["validation"].features)


def make_trainer(model, processor, folder, rows, **settings) -> Trainer:
    names = (*SCORED, "train_dataset", "processing_class")
    parts = {name: settings.pop(name) for name in names if name in settings}
    arguments = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False, **settings}
    collator = GroundingCollator(processor, with_targets=False, with_masks=model.config.predict_masks)
    arguments = TrainingArguments(output_dir=str(folder), **arguments)
    return Trainer(model=model, args=arguments, eval_dataset=rows, data_collator=collator, **parts)


def own_metrics(model, processor, rows, batch_size: int) -> dict:
    """Return the metrics of our own evaluation on the same batches, because padding changes answers."""
    collator, accelerator = GroundingCollator(processor), Accelerator(cpu=True)
    records = []
    with torch.no_grad():
        for start in range(0, len(rows), batch_size):
            batch = collator([rows[index] for index in range(start, min(start + batch_size, len(rows)))])
            records += predict_batch(model, processor, batch, EvaluationSettings(), accelerator)
    return summarize(records)


def assert_same_metrics(found: dict, expected: dict, prefix: str, tolerance: float = 1e-6):
    names = [name for name in expected if name != "per_kind" and (name.endswith("_resized") or "mask" not in name)]
    assert len(names) > 7
    for name in names:
        assert found[f"{prefix}_{name}"] == pytest.approx(expected[name], abs=tolerance), name


@pytest.mark.parametrize(("predict_masks", "concatenated"), [(False, True), (False, False), (True, False)])
def test_trainer_metrics_match_own_evaluation(make_model, processor, rows, tmp_path, predict_masks, concatenated):
    """Include a smaller last batch and batches with different numbers of sentences and phrases."""
    model = make_model(predict_masks=predict_masks)
    torch.nn.init.normal_(model.box_head.layers[-1].weight, std=0.1)
    settings = {**SCORED, "eval_do_concat_batches": concatenated}
    for batch_size in (1, 3, 5, 8):
        trainer = make_trainer(model, processor, tmp_path, rows, per_device_eval_batch_size=batch_size, **settings)
        expected = own_metrics(model, processor, rows, batch_size)
        assert 0 < expected["accuracy@0.5"] < 1
        assert ("mask_mean_iou_resized" in expected) is predict_masks
        found = trainer.evaluate()
        assert np.isfinite(found["eval_loss"])
        assert_same_metrics(found, expected, "eval")
        if predict_masks:
            assert found["eval_mask_num_phrases_resized"] == expected["num_phrases"]
            assert 0 < found["eval_mask_overall_iou_resized"] < 1
        assert_same_metrics(trainer.predict(rows).metrics, expected, "test")
        if batch_size == 1:  # without padding, compare with `evaluate` too, which groups images and runs a fused copy
            arguments = TrainingSettings.from_flat(evaluation_batch_size=1, num_workers=0, output_dir=str(tmp_path))
            records = evaluate(model, processor, rows, arguments, Accelerator(cpu=True), "test")
            assert_same_metrics(found, summarize(records), "eval", tolerance=1e-5)


def test_trainer_predictions_are_boxes_phrase_mask_and_masks(make_model, processor, rows, shapes, tmp_path):
    fields = set(RefTRVisualGroundingOutput.__dataclass_fields__)
    model = make_model(predict_masks=True)
    ignored = model.config.keys_to_ignore_at_inference
    assert sorted(fields - {"loss", *ignored}) == ["phrase_mask", "pred_boxes", "pred_masks"]
    assert set(ignored) < fields
    assert "keys_to_ignore_at_inference" not in json.loads(model.config.to_json_string())
    trainer = make_trainer(model, processor, tmp_path, rows, per_device_eval_batch_size=5)
    boxes, phrase_mask, masks = trainer.predict(shapes["test"]).predictions  # images of one size, in equal batches
    num_sentences = sum(map(len, shapes["test"]["sentences"]))
    assert boxes.shape == (num_sentences, *phrase_mask.shape[1:], 4)
    assert masks.shape[:2] == phrase_mask.shape
    for settings in ({}, {"prediction_loss_only": True}, {"include_for_metrics": ["loss", "inputs"]}):
        trainer = make_trainer(make_model(), processor, tmp_path, shapes["test"], **SCORED, **settings)
        found = trainer.evaluate()
        assert np.isfinite(found["eval_loss"])
        assert ("eval_accuracy@0.5" in found) is ("prediction_loss_only" not in settings)
    trainer = make_trainer(make_model(), processor, tmp_path, rows, per_device_eval_batch_size=1)
    boxes, phrase_mask = trainer.predict(rows).predictions  # images of several sizes, in batches of one
    assert boxes.shape[:2] == phrase_mask.shape == (sum(map(len, rows["sentences"])), 3)


def test_compute_metrics_refuses_unscored_predictions(make_model, processor, rows, tmp_path):
    trainer = make_trainer(make_model(), processor, tmp_path, rows, compute_metrics=compute_metrics)
    with pytest.raises(ValueError, match="preprocess_logits_for_metrics=score_phrases"):
        trainer.evaluate()


def test_score_phrases_counts_missing_answer_as_miss():
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 1.0], [0.5, 0.5, 1.0, 1.0]]])
    labels = [{"boxes": boxes[0], "masks": torch.ones(2, 8, 8, dtype=torch.bool), "size": torch.tensor([8, 6])}]
    scores = score_phrases((boxes, torch.tensor([[True, False]]), torch.ones(1, 2, 4, 4)), labels)
    assert scores.tolist() == [[[1, 48, 48], [0, 0, 48]]]
    del labels[0]["masks"]
    scores = score_phrases((boxes, torch.tensor([[True, False]]), torch.ones(1, 2, 4, 4)), labels)
    assert scores.tolist() == [[[1, -1, -1], [0, -1, -1]]]


def moments_of(checkpoint: Path) -> torch.Tensor:
    """Return the first moments of the optimizer in a checkpoint as one vector."""
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    return torch.cat([moments["exp_avg"].flatten() for moments in state.values()])


def test_trainer_resumes_to_same_optimizer_moments(make_model, processor, shapes, tmp_path):
    """Train six steps at once and in two parts, and load the best model by our metrics."""
    settings = {
        "train_dataset": shapes["train"],
        "processing_class": processor,
        **SCORED,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "max_steps": 6,
        "save_steps": 2,
        "eval_steps": 2,
        "eval_strategy": "steps",
    }
    best = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy@0.5"}
    rows = shapes["validation"].select(range(3))
    complete = make_trainer(make_model(), processor, tmp_path / "complete", rows, **settings)
    complete.train()
    make_trainer(make_model(), processor, tmp_path / "parts", rows, **settings | best).train()
    parts = make_trainer(make_model(), processor, tmp_path / "parts", rows, **settings | best)
    shutil.rmtree(tmp_path / "parts" / "checkpoint-6")
    parts.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    assert parts.state.best_model_checkpoint
    checkpoints = ("complete/checkpoint-6", "parts/checkpoint-6", "complete/checkpoint-4")
    complete, parts, earlier = (moments_of(tmp_path / name) for name in checkpoints)
    assert (complete - parts).norm() < 1e-3 * complete.norm()  # rounding depends on memory addresses
    assert (complete - earlier).norm() > 0.1 * complete.norm()


PUSH = """
import sys
from tests.training_reftr.test_trainer import make_trainer
from modeling_reftr import RefTRForVisualGrounding, RefTRProcessor
model, processor = (kind.from_pretrained(sys.argv[1]) for kind in (RefTRForVisualGrounding, RefTRProcessor))
settings = {"push_to_hub": True, "hub_model_id": "someone/toy", "processing_class": processor}
trainer = make_trainer(model, processor, sys.argv[2], None, **settings)
trainer.save_model()
trainer.push_to_hub()
loaded = RefTRForVisualGrounding.from_pretrained("someone/toy")
assert all((value == model.state_dict()[name]).all() for name, value in loaded.state_dict().items())
"""


@pytest.mark.slow
def test_trainer_pushes_loadable_model(trained, tmp_path, run):
    with Hub() as hub:
        paths = {"PYTHONPATH": str(ROOT)}
        run("-c", PUSH, trained[0], tmp_path / "out", **hub.environment("hf_write", tmp_path / "home"), **paths)
        assert {"config.json", "model.safetensors", "processor_config.json", "modeling_reftr.py"} <= {
            *hub.files("someone/toy")
        }
