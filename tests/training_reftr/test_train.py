"""train_reftr.py and the predict command, run as a user does."""

import json
import re

import numpy as np
import pytest
import yaml
from PIL import Image

from modeling_reftr import RefTRForVisualGrounding, RefTRProcessor
from tests.helpers.processes import free_port, run_ranks
from tests.helpers.tiny import ROOT


def metrics_of_test_split(folder):
    """Return the metrics of the test split in the folder of a run."""
    return json.loads((folder / "metrics.json").read_text())["splits"]["test"]


def logged_losses(log):
    """Return (step, {part: value}) of every logged line of losses."""
    lines = re.findall(r"step (\d+) epoch \d+ (.*?) rates", log)
    return [(int(step), {k: float(v) for k, v in (p.split("=") for p in parts.split())}) for step, parts in lines]


def test_run_writes_model_processor_and_report(trained):
    output, result = trained
    names = {path.name for path in output.iterdir()}
    assert {"model.safetensors", "config.json", "processor_config.json", "tokenizer.json"} <= names
    assert {"metrics.json", "predictions.jsonl", "predictions.png", "report.md"} <= names
    assert not list(output.glob("*.bin"))
    metrics = metrics_of_test_split(output)
    assert {"accuracy@0.5", "mean_iou", "num_phrases"} <= metrics.keys()
    assert set(metrics["per_kind"]) == {"attribute", "place", "relation", "caption"}
    assert sum(kind["num_phrases"] for kind in metrics["per_kind"].values()) == metrics["num_phrases"]
    assert metrics["constant_box"]["num_phrases"] == metrics["num_phrases"]
    with Image.open(output / "predictions.png") as image:
        assert min(image.size) > 320
    assert "best constant box" in result.stdout
    losses = logged_losses(result.stderr)
    assert [step for step, _ in losses] == list(range(1, 13))
    assert {"loss", "loss_bbox", "loss_giou", "loss_bbox_0", "gradient_norm"} <= losses[0][1].keys()
    assert all(np.isfinite(list(parts.values())).all() for _, parts in losses)


def test_run_from_saved_model_starts_with_lower_loss(trained, recipe, run, tmp_path):
    output, _ = trained
    result = run("train_reftr.py", recipe, "--init_from", output, "--output_dir", tmp_path, "--max_steps", "1")
    first_loss = logged_losses(result.stderr)[0][1]["loss"]
    assert first_loss < logged_losses(trained[1].stderr)[0][1]["loss"]


def test_predict_answers_on_own_image(trained, run, tmp_path):
    output, _ = trained
    Image.fromarray(np.full((90, 150, 3), 99, np.uint8)).save(tmp_path / "photo.jpg")
    result = run(
        "-m", "reftr_cli", "predict", "--model", output, "--image", tmp_path / "photo.jpg",
        "--text", "the red circle", "the star", "--output", tmp_path / "out.png",
    )  # fmt: skip
    answers = json.loads(result.stdout)
    assert [answer["label"] for answer in answers] == ["the red circle", "the star"]
    model, processor = RefTRForVisualGrounding.from_pretrained(output), RefTRProcessor.from_pretrained(output)
    inputs = processor(str(tmp_path / "photo.jpg"), ["the red circle", "the star"])
    expected = processor.post_process_grounding(model.eval()(**inputs), [(90, 150)])
    for answer, box in zip(answers, expected, strict=True):
        assert answer["box"] == pytest.approx(box["boxes"][0].tolist(), abs=0.02)
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.width >= 320


def test_predict_names_missing_image(trained, run, tmp_path):
    command = ("-m", "reftr_cli", "predict", "--model", trained[0], "--text", "the star", "--image")
    result = run(*command, tmp_path / "none.jpg", check=False)
    assert result.returncode != 0
    assert "error: There is no image at" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("ranks", "accumulation", "grouped", "masks", "steps"),
    [
        (2, 1, True, False, 20),
        (2, 1, True, True, 7),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (2, 2, True, False, 20),
                (2, 1, False, False, 20),
                (4, 1, True, False, 20),
                (4, 2, False, False, 20),
            )
        ),
    ],
)
def test_several_ranks_train_like_one_process(run, tmp_path, ranks, accumulation, grouped, masks, steps, data_cache):
    """
    Train the first steps of the demo: the same global batch gives the same losses, to 1e-5.

    A tenth of the demo's learning rates keeps rounding small: at the full ones, the order of summation changes losses
    by some 1e-4 within 20 steps, and faster with masks.
    """
    settings = yaml.safe_load((ROOT / "recipes" / "demo.yaml").read_text())
    assert settings["model"]["dropout"] == settings["model"]["text_config"]["hidden_dropout_prob"] == 0.0
    settings["dataset_config"] |= {"num_train": 340, "num_validation": 4, "num_test": 4}
    settings |= {"data_cache_dir": data_cache, "batch_size": 16, "num_workers": 0, "log_every": 1, "max_steps": steps}
    settings |= {f"{part}learning_rate": 1e-4 for part in ("", "backbone_", "text_", "mask_head_")}
    settings["model"]["predict_masks"] = masks
    settings["group_by_image"] = grouped
    # accumulation makes the batches of batch norm smaller, on any number of processes
    settings["model"]["freeze_backbone_batch_norm"] = accumulation > 1
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    one = run("train_reftr.py", recipe, "--output_dir", tmp_path / "one")
    share = ("--batch_size", 16 // ranks // accumulation, "--gradient_accumulation_steps", accumulation)
    two = run_ranks(["train_reftr.py", recipe, *share, "--output_dir", tmp_path / "two"], ranks)
    losses_one, losses_two = logged_losses(one.stderr), logged_losses(two.stderr)
    assert [step for step, _ in losses_one] == [step for step, _ in losses_two] == list(range(1, steps + 1))
    for (step, first), (_, second) in zip(losses_one, losses_two, strict=True):
        for name, value in first.items():
            # the norm is a sum of squares over all weights, rounded in another order
            tolerance = 1e-3 if name == "gradient_norm" else 1e-5
            assert second[name] == pytest.approx(value, abs=1e-5, rel=tolerance), (step, name)
    first, second = (metrics_of_test_split(tmp_path / name) for name in ("one", "two"))
    assert first["num_phrases"] == second["num_phrases"]


# masks


MASKS = {"predict_masks": True, "auxiliary_loss": False}


def test_mask_stage_keeps_boxes_of_first_stage(trained, recipe, run, tmp_path):
    """Train the two published stages: masks on top of the best box model, here with the mask head only."""
    output, _ = trained
    stage = {**MASKS, "freeze_grounding": True}
    result = run(
        "train_reftr.py", recipe, "--init_from", output, "--output_dir", tmp_path, "--max_steps", "6",
        "--model", json.dumps(stage), "--learning_rate", "1e-5", "--mask_head_learning_rate", "1e-2",
    )  # fmt: skip
    assert "mask_head.output_convolution" in result.stderr  # new weights are logged
    losses = logged_losses(result.stderr)
    assert {"loss_mask", "loss_dice"} <= losses[0][1].keys()
    assert "loss_bbox_0" not in losses[0][1]
    assert losses[-1][1]["loss_mask"] < losses[0][1]["loss_mask"]
    boxes, masks = (metrics_of_test_split(folder) for folder in (output, tmp_path))
    assert masks["mean_iou"] == pytest.approx(boxes["mean_iou"], abs=1e-6)  # the boxes do not change
    for name in ("mask_mean_iou", "mask_mean_iou_resized", "mask_overall_iou", "mask_precision@0.9"):
        assert 0 <= masks[name] <= 1
        assert name not in boxes
    assert masks["mask_num_phrases"] == masks["num_phrases"]
    assert "mask mIoU" in result.stdout

    answers = run(
        "-m", "reftr_cli", "predict", "--model", tmp_path, "--image", tmp_path / "predictions.png",
        "--text", "the star", "--output", tmp_path / "out.png",
    )  # fmt: skip
    (answer,) = json.loads(answers.stdout)
    with Image.open(tmp_path / "predictions.png") as image:
        assert answer["segmentation"]["size"] == [image.height, image.width]


def test_two_ranks_train_and_evaluate_masks_like_one_process(recipe, run, tmp_path):
    """Train jointly on grouped images with ranks of different load: losses and metrics are the same."""
    settings = yaml.safe_load(recipe.read_text())
    settings["model"] |= MASKS
    settings |= {"max_steps": 3, "batch_size": 8}
    path = tmp_path / "masks.yaml"
    path.write_text(yaml.safe_dump(settings))
    one = run("train_reftr.py", path, "--output_dir", tmp_path / "one")
    two = run_ranks(["train_reftr.py", path, "--batch_size", "4", "--output_dir", tmp_path / "two"], 2)
    for (_, first), (_, second) in zip(logged_losses(one.stderr), logged_losses(two.stderr), strict=True):
        for name in ("loss_mask", "loss_dice", "loss_bbox"):
            assert second[name] == pytest.approx(first[name], abs=1e-5, rel=1e-4)
    evaluated = []
    for ranks in (1, 2):
        evaluation = ("--eval_only", "--init_from", tmp_path / "one", "--output_dir", tmp_path / f"eval{ranks}")
        run_ranks(["train_reftr.py", path, *evaluation], ranks)
        evaluated.append(metrics_of_test_split(tmp_path / f"eval{ranks}"))
    for name in ("num_phrases", "mask_num_phrases"):
        assert evaluated[0][name] == evaluated[1][name]
    for name in ("mask_mean_iou", "mask_overall_iou", "accuracy@0.5"):
        assert evaluated[0][name] == pytest.approx(evaluated[1][name], abs=1e-3)


def test_unavailable_best_metric_is_refused(recipe, run, tmp_path):
    command = (
        "train_reftr.py",
        recipe,
        "--output_dir",
        tmp_path,
        "--max_steps",
        "1",
        "--best_metric",
        "mask_mean_iou",
    )
    assert "best_metric='mask_mean_iou' is not one of accuracy@0.5" in run(*command, check=False).stderr


@pytest.mark.slow
def test_fsdp2_run_resumes(recipe, run, tmp_path):
    """Use a tolerance on two CPU processes: FSDP2 rounds sums differently from run to run."""
    sharded = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    sharded |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    sharded |= {"FSDP_TRANSFORMER_CLS_TO_WRAP": "RefTREncoderLayer", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    argv = ("train_reftr.py", recipe, "--batch_size", 4, "--output_dir")
    ranks = ("-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port")
    plain = run(*ranks, free_port(), *argv, tmp_path / "plain")
    run(*ranks, free_port(), *argv, tmp_path / "run", "--max_steps", 4, **sharded)
    rest = run(*ranks, free_port(), *argv, tmp_path / "run", "--resume", "auto", **sharded)
    assert "Going on from" in rest.stderr
    expected, losses = dict(logged_losses(plain.stderr)), dict(logged_losses(rest.stderr))
    assert list(losses) == [step for step in expected if step > 4]
    for step, parts in losses.items():
        assert parts["loss"] == pytest.approx(expected[step]["loss"], rel=1e-3)
    model = RefTRForVisualGrounding.from_pretrained(tmp_path / "run")
    assert sum(parameter.numel() for parameter in model.parameters()) > 0


@pytest.mark.slow
def test_compiled_run_matches_losses_of_plain_run(recipe, run, tmp_path):
    """Compare losses up to rounding, and load the saved model as usual."""
    argv = ("train_reftr.py", recipe, "--log_every", 1, "--max_steps", 3, "--size_divisor", 32, "--output_dir")
    run(*argv, tmp_path / "plain")
    run(*argv, tmp_path / "compiled", "--compile", "true", timeout=900)
    losses = []
    for name in ("plain", "compiled"):
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses.append([line["train/loss"] for line in lines if "train/loss" in line])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert RefTRProcessor.from_pretrained(tmp_path / "compiled").image_processor.size_divisor == 32
    RefTRForVisualGrounding.from_pretrained(tmp_path / "compiled")
