"""train_reftr.py and the predict command, run as a user runs them."""

import json
import re
import socket

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from conftest import ROOT, TINY_SET
from modeling_reftr import RefTRForVisualGrounding, RefTRProcessor
from training_reftr.arguments import TrainingArguments, parse_arguments
from training_reftr.evaluation import constant_box, summarize, swapped_expressions
from training_reftr.optimization import build_scheduler


def logged_losses(log):
    """(step, {part: value}) of each line of loss parts."""
    lines = re.findall(r"step (\d+) epoch \d+ (.*?) rates", log)
    return [(int(step), {k: float(v) for k, v in (p.split("=") for p in parts.split())}) for step, parts in lines]


def test_a_run_leaves_model_processor_and_report(trained):
    output, result = trained
    names = {path.name for path in output.iterdir()}
    assert {"model.safetensors", "config.json", "processor_config.json", "tokenizer.json"} <= names
    assert {"metrics.json", "predictions.png"} <= names
    assert not list(output.glob("*.bin"))
    metrics = json.loads((output / "metrics.json").read_text())
    assert {"accuracy@0.5", "mean_iou", "num_phrases"} <= metrics.keys()
    assert set(metrics["per_kind"]) == {"attribute", "place", "relation", "caption"}
    assert sum(kind["num_phrases"] for kind in metrics["per_kind"].values()) == metrics["num_phrases"]
    assert metrics["constant_box"]["num_phrases"] == metrics["num_phrases"]
    with Image.open(output / "predictions.png") as picture:
        assert min(picture.size) > 320
    assert "best constant box" in result.stdout
    losses = logged_losses(result.stderr)
    assert [step for step, _ in losses] == list(range(1, 13))
    assert {"loss", "loss_bbox", "loss_giou", "loss_bbox_0", "gradient_norm"} <= losses[0][1].keys()
    assert all(np.isfinite(list(parts.values())).all() for _, parts in losses)


def test_eval_only_gives_the_same_figures(trained, recipe, run, tmp_path):
    output, _ = trained
    run("train_reftr.py", recipe, "--init_from", output, "--output_dir", tmp_path, "--eval_only")
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (output, tmp_path))
    assert not (tmp_path / "model.safetensors").exists()
    for metrics in (first, second):
        metrics.pop("model")
    assert first == second


def test_training_goes_on_from_a_saved_model(trained, recipe, run, tmp_path):
    output, _ = trained
    result = run("train_reftr.py", recipe, "--init_from", output, "--output_dir", tmp_path, "--max_steps", "1")
    first_loss = logged_losses(result.stderr)[0][1]["loss"]
    assert first_loss < logged_losses(trained[1].stderr)[0][1]["loss"]


def test_prediction_on_ones_own_picture(trained, run, tmp_path):
    output, _ = trained
    Image.fromarray(np.full((90, 150, 3), 99, np.uint8)).save(tmp_path / "photo.jpg")
    result = run(
        "-m", "modeling_reftr.predict", "--model", output, "--image", tmp_path / "photo.jpg",
        "--text", "the red circle", "the star", "--output", tmp_path / "out.png",
    )  # fmt: skip
    answers = json.loads(result.stdout)
    assert [answer["phrase"] for answer in answers] == ["the red circle", "the star"]
    model, processor = RefTRForVisualGrounding.from_pretrained(output), RefTRProcessor.from_pretrained(output)
    inputs = processor(str(tmp_path / "photo.jpg"), ["the red circle", "the star"])
    expected = processor.post_process_grounding(model.eval()(**inputs), [(90, 150)])
    for answer, box in zip(answers, expected, strict=True):
        assert answer["box"] == pytest.approx(box["boxes"][0].tolist(), abs=0.02)
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.width >= 320


def test_prediction_says_what_is_missing(trained, run, tmp_path):
    command = ("-m", "modeling_reftr.predict", "--model", trained[0], "--text", "the star", "--image")
    result = run(*command, tmp_path / "none.jpg", check=False)
    assert result.returncode != 0
    assert "error: There is no picture at" in result.stderr
    assert "Traceback" not in result.stderr


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize(("accumulation", "masks", "steps"), [(1, False, 20), (2, False, 20), (1, True, 7)])
def test_two_ranks_train_as_one_process(run, tmp_path, accumulation, masks, steps, data_cache):
    """
    The demo's first steps: the same losses (1e-5) with the same global batch, at a tenth of its rates: at its own,
    what the order of a sum rounds grows to some 1e-4 in 20 steps. With masks it grows faster.
    """
    settings = yaml.safe_load((ROOT / "recipes" / "demo.yaml").read_text())
    assert settings["model"]["dropout"] == settings["model"]["text_config"]["hidden_dropout_prob"] == 0.0
    settings["dataset_config"] |= {"num_train": 340, "num_validation": 4, "num_test": 4}
    settings |= {"data_cache_dir": data_cache, "batch_size": 16, "num_workers": 0, "log_every": 1, "max_steps": steps}
    settings |= {f"{part}learning_rate": 1e-4 for part in ("", "backbone_", "text_", "mask_head_")}
    settings["model"]["predict_masks"] = masks
    # accumulation cuts the batch that batch norm looks at, on any number of processes
    settings["model"]["freeze_backbone_batch_norm"] = accumulation > 1
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    one = run("train_reftr.py", recipe, "--output_dir", tmp_path / "one")
    two = run(
        "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port(), "train_reftr.py", recipe,
        "--batch_size", 8 // accumulation, "--gradient_accumulation_steps", accumulation,
        "--output_dir", tmp_path / "two", ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    losses_one, losses_two = logged_losses(one.stderr), logged_losses(two.stderr)
    assert [step for step, _ in losses_one] == [step for step, _ in losses_two] == list(range(1, steps + 1))
    for (step, first), (_, second) in zip(losses_one, losses_two, strict=True):
        for name, value in first.items():
            # the norm is no loss: a sum of squares over all weights, rounded in another order
            tolerance = 1e-3 if name == "gradient_norm" else 1e-5
            assert second[name] == pytest.approx(value, abs=1e-5, rel=tolerance), (step, name)
    first, second = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert first["num_phrases"] == second["num_phrases"]


# settings


def test_recipe_and_command_line(recipe):
    args = parse_arguments([str(recipe), "--batch_size", "3", "--learning_rate=5e-4", "--eval_only"])
    assert (args.batch_size, args.learning_rate, args.eval_only) == (3, 5e-4, True)
    assert args.dataset_config == TINY_SET
    assert args.model["d_model"] == 32
    assert parse_arguments([]) == TrainingArguments()
    assert parse_arguments(["--model", '{"d_model": 64}']).model == {"d_model": 64}


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        ("learning_rat: 1", [], "no field 'learning_rat'. Did you mean 'learning_rate'?"),
        ("- 1", [], "must be a mapping"),
        ("batch_size: 0", [], "batch_size=0 must be at least 1"),
        ("", ["--bach_size", "3"], "no field 'bach_size'. Did you mean 'batch_size'?"),
        ("", ["--lr_schedule", "linear"], "lr_schedule='linear' must be"),
        ("", ["--learning_rate", "nan"], "learning_rate=nan"),
        ("", ["--max_grad_norm", "0"], "max_grad_norm=0.0 must be greater than 0"),
        ("", ["--model", "{"], "is not JSON"),
        ("", ["--model", "[1]"], "must be a mapping"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, content, words, message):
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_arguments([str(tmp_path / "recipe.yaml"), *words])


def test_a_missing_recipe_is_named():
    with pytest.raises(OSError, match=r"no recipe 'nowhere\.yaml'"):
        parse_arguments(["nowhere.yaml"])


def test_unknown_model_fields_are_refused(recipe, run, tmp_path):
    result = run("train_reftr.py", recipe, "--model", '{"d_modl": 8}', "--output_dir", tmp_path, check=False)
    assert result.returncode != 0
    assert "model has no field 'd_modl'. Did you mean 'd_model'?" in result.stderr


# parts


def test_metrics_by_hand():
    record = {"image_id": "a", "image_size": (10, 20), "types": ["place"]}
    records = [
        {**record, "object_id": "x", "box": [0, 0, 10, 10], "pred_box": [0, 0, 10, 10], "iou": 1.0},
        {**record, "object_id": "y", "box": [10, 0, 20, 10], "pred_box": [0, 0, 10, 10], "iou": 0.0},
        {**record, "object_id": "x", "box": [0, 0, 10, 10], "pred_box": None, "iou": 0.0, "types": []},
    ]
    summary = summarize(records)
    assert summary["num_phrases"] == 3
    (place,) = summary["per_kind"].values()
    assert (place["accuracy@0.5"], place["mean_iou"], place["num_phrases"]) == (0.5, 0.5, 2)
    assert "mask_mean_iou" not in summary
    # x is held against y's answer (a hit), y against x's (a miss), and x again against y's
    assert swapped_expressions(records)["accuracy@0.5"] == pytest.approx(2 / 3)


def test_the_best_constant_box_is_the_commonest(shapes):
    rows = shapes["train"]
    records = [
        {"image_size": (row["height"], row["width"]), "box": item["box"]} for row in rows for item in row["objects"]
    ]
    answer = constant_box(rows, records)
    assert 0 < answer["accuracy@0.5"] < 0.5
    x0, y0, x1, y1 = answer["box_xyxy"]
    assert 0 <= x0 < x1 <= 1
    assert 0 <= y0 < y1 <= 1


def test_schedules():
    def factors(**settings):
        args = TrainingArguments(learning_rate=1.0, **settings)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        scheduler = build_scheduler(optimizer, args, steps_per_epoch=10, num_steps=100)
        values = []
        for _ in range(100):
            values.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        return values

    step = factors(lr_drop_epochs=6)
    assert (step[0], step[59], step[60], step[99]) == (1, 1, pytest.approx(0.1), pytest.approx(0.1))
    cosine = factors(lr_schedule="cosine", warmup_steps=20)
    assert cosine[:2] == [pytest.approx(1 / 20), pytest.approx(2 / 20)]
    assert cosine[60] == pytest.approx(0.5)
    assert min(cosine[20:]) == pytest.approx(0.01)
    assert set(factors(lr_schedule="constant")) == {1}


# masks


MASKS = {"predict_masks": True, "auxiliary_loss": False}


def test_boxes_then_masks(trained, recipe, run, tmp_path):
    """The published two stages: masks over the boxes run's best, the mask head alone if it is said."""
    output, _ = trained
    stage = {**MASKS, "freeze_grounding": True}
    result = run(
        "train_reftr.py", recipe, "--init_from", output, "--output_dir", tmp_path, "--max_steps", "6",
        "--model", json.dumps(stage), "--learning_rate", "1e-5", "--mask_head_learning_rate", "1e-2",
    )  # fmt: skip
    assert "mask_head.output_convolution" in result.stderr  # what is new is said
    losses = logged_losses(result.stderr)
    assert {"loss_mask", "loss_dice"} <= losses[0][1].keys()
    assert "loss_bbox_0" not in losses[0][1]
    assert losses[-1][1]["loss_mask"] < losses[0][1]["loss_mask"]
    boxes, masks = (json.loads((folder / "metrics.json").read_text()) for folder in (output, tmp_path))
    assert masks["mean_iou"] == pytest.approx(boxes["mean_iou"], abs=1e-6)  # the boxes are what they were
    for name in ("mask_mean_iou", "mask_mean_iou_resized", "mask_overall_iou", "mask_precision@0.9"):
        assert 0 <= masks[name] <= 1
        assert name not in boxes
    assert masks["mask_num_phrases"] == masks["num_phrases"]
    assert "mask mIoU" in result.stdout

    answers = run(
        "-m", "modeling_reftr.predict", "--model", tmp_path, "--image", tmp_path / "predictions.png",
        "--text", "the star", "--output", tmp_path / "out.png",
    )  # fmt: skip
    (answer,) = json.loads(answers.stdout)
    with Image.open(tmp_path / "predictions.png") as picture:
        assert answer["segmentation"]["size"] == [picture.height, picture.width]


def test_two_ranks_give_the_masks_of_one_process(recipe, run, tmp_path):
    """Joint training, grouped images, shares of unlike size: the same losses and the same figures."""
    settings = yaml.safe_load(recipe.read_text())
    settings["model"] |= MASKS
    settings |= {"max_steps": 3, "batch_size": 8}
    path = tmp_path / "masks.yaml"
    path.write_text(yaml.safe_dump(settings))
    one = run("train_reftr.py", path, "--output_dir", tmp_path / "one")
    two = run(
        "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port(), "train_reftr.py", path,
        "--batch_size", "4", "--output_dir", tmp_path / "two", ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    for (_, first), (_, second) in zip(logged_losses(one.stderr), logged_losses(two.stderr), strict=True):
        for name in ("loss_mask", "loss_dice", "loss_bbox"):
            assert second[name] == pytest.approx(first[name], abs=1e-5, rel=1e-4)
    evaluated = []
    for ranks in (1, 2):
        run(
            "-m", "torch.distributed.run", "--nproc_per_node", ranks, "--master_port", free_port(), "train_reftr.py",
            path, "--eval_only", "--init_from", tmp_path / "one", "--output_dir", tmp_path / f"eval{ranks}",
            ACCELERATE_USE_CPU="true",
        )  # fmt: skip
        evaluated.append(json.loads((tmp_path / f"eval{ranks}" / "metrics.json").read_text()))
    for name in ("num_phrases", "mask_num_phrases"):
        assert evaluated[0][name] == evaluated[1][name]
    for name in ("mask_mean_iou", "mask_overall_iou", "accuracy@0.5"):
        assert evaluated[0][name] == pytest.approx(evaluated[1][name], abs=1e-3)


def test_a_figure_that_is_not_there_cannot_choose_the_best(recipe, run, tmp_path):
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


def test_a_backbone_that_differs_is_refused(trained, recipe, run, tmp_path):
    changes = json.dumps({"text_config": {"hidden_size": 48}})
    command = ("train_reftr.py", recipe, "--init_from", trained[0], "--output_dir", tmp_path)
    result = run(*command, "--model", changes, check=False)
    assert "model.text_config.hidden_size=48, but init_from has 32 there" in result.stderr


def test_phrases_without_answer_or_truth_in_the_mask_figures():
    record = {"image_id": "a", "types": [], "iou": 1.0}
    records = [
        {**record, "mask_pixels": (50, 100), "resized_mask_pixels": (3, 4)},
        {**record, "mask_pixels": (0, 100), "resized_mask_pixels": (0, 4)},
        record,  # no truth: its box counts, its mask does not
    ]
    summary = summarize(records)
    assert (summary["num_phrases"], summary["mask_num_phrases"]) == (3, 2)
    assert (summary["mask_mean_iou"], summary["mask_mean_iou_resized"]) == (0.25, 0.375)
    assert summary["mask_overall_iou"] == 0.25
