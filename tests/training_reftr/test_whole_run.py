"""Checkpoints, log and resume of a complete run in which every setting has a different value."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_reftr
from tests.helpers.faults import change_state, write_recipe
from training_reftr.checkpoints import checkpoints_of, load_state
from training_reftr.settings import Scope, names_in_scope


LAST = 18  # optimizer steps: 3 epochs of 6


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, data_cache):
    settings = {
        "num_epochs": 3,
        "learning_rate": 2e-3,
        "backbone_learning_rate": 3e-4,
        "text_learning_rate": 5e-4,
        "warmup_steps": 3,
        "lr_drop_epochs": [2],
        "log_every": 4,
        "checkpoint_every": 4,
        "keep_checkpoints": 3,
        "evaluate_every": 2,
        "best_metric": "mean_iou",
        "trackers": "tensorboard",
        "seed": 3,
    }
    return write_recipe(tmp_path_factory.mktemp("complete") / "complete.yaml", data_cache, **settings)


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("finished") / "run"
    assert train_reftr.main([str(recipe), "--output_dir", str(output_dir)]) == 0
    return output_dir


def logged_values(output_dir, name: str) -> dict[int, float]:
    """Return the values of a metric in the log of a run, by step."""
    lines = map(json.loads, (output_dir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_best_model_has_highest_validation_metric(finished):
    validations = logged_values(finished, "validation/mean_iou")
    assert list(validations) == [12, LAST], "every second epoch and the last one"
    best = max(validations, key=validations.get)
    assert validations[12] != validations[LAST]
    latest = checkpoints_of(finished)[0]
    if best != LAST:  # a checkpoint is written before its evaluation
        assert load_state(latest).best_step == best
        assert load_state(latest).best == validations[best]
    assert_equal(weights(finished), weights(finished / "checkpoints" / f"step_{best:08d}"))


def test_best_model_folder_contains_its_recipe(finished, recipe):
    written, given = (yaml.safe_load(path.read_text()) for path in (finished / "recipe.yaml", recipe))
    machine = names_in_scope(Scope.MACHINE)
    assert {name: written[name] for name in given if name not in machine} == {
        name: value for name, value in given.items() if name not in machine
    }


def test_run_keeps_latest_checkpoints_at_given_steps(finished):
    assert [load_state(path).step for path in checkpoints_of(finished)] == [LAST, 16, 12]
    state = load_state(finished / "checkpoints" / "step_00000016")
    assert not state.is_evaluation_due
    assert (state.best, state.best_step) == (logged_values(finished, "validation/mean_iou")[12], 12)


def test_log_has_last_step_and_scheduled_learning_rates(finished):
    learning_rates = logged_values(finished, "train/learning_rate")
    assert list(learning_rates) == [4, 8, 12, 16, LAST]
    assert learning_rates[8] == pytest.approx(2e-3)
    assert learning_rates[16] == learning_rates[LAST] == pytest.approx(2e-4)


def test_resumed_run_is_bit_identical_with_one_tensorboard_run(finished, recipe, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(checkpoints_of(folder)[0])
    assert train_reftr.main([str(recipe), "--output_dir", str(folder), "--resume", "auto"]) == 0
    (last, *_), (expected, *_) = checkpoints_of(folder), checkpoints_of(finished)
    assert_equal(weights(last), weights(expected))
    assert_equal(load_file(last / "optimizer.safetensors"), load_file(expected / "optimizer.safetensors"))
    assert logged_values(folder, "train/learning_rate") == logged_values(finished, "train/learning_rate")
    events = EventAccumulator(str(next(folder.rglob("events.out.tfevents*")).parent)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [4, 8, 12, 16, LAST]


def test_resume_in_new_folder_keeps_own_best_model(finished, recipe, tmp_path):
    checkpoint = tmp_path / "step_00000016"
    shutil.copytree(finished / "checkpoints" / checkpoint.name, checkpoint)
    change_state(checkpoint, best=0.99)
    argv = ["--resume", str(checkpoint), "--output_dir", str(tmp_path / "new"), "--trackers", "none"]
    assert train_reftr.main([str(recipe), *argv]) == 0
    assert_equal(weights(tmp_path / "new"), weights(checkpoints_of(finished)[0]))


def test_seed_determines_initial_weights(recipe, tmp_path):
    frozen = [f"--{name}_rate=1e-12" for name in ("learning", "backbone_learning", "text_learning")]
    argv = [str(recipe), *frozen, "--max_steps", "1", "--trackers", "none"]
    found = []
    for number, seed in enumerate((3, 3, 4)):
        assert train_reftr.main([*argv, "--seed", str(seed), "--output_dir", str(tmp_path / str(number))]) == 0
        found.append(weights(tmp_path / str(number))["model.encoder.layers.0.mlp.fc1.weight"])
    first, again, other = found
    assert torch.allclose(first, again, atol=1e-9)
    assert (first - other).abs().max() > 0.01
