"""Moving average of weights: its values, checkpoints and resume."""

import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file

import train_reftr
from tests.helpers.faults import write_recipe
from training_reftr.averaging import build_average, load_average
from training_reftr.checkpoints import checkpoints_of
from training_reftr.settings import OptimizationSettings


DECAY, LAST = 0.6, 12  # a decay that the short averages of the first steps reach


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, data_cache):
    settings = {
        "num_epochs": 2,
        "learning_rate": 2e-3,
        "backbone_learning_rate": 3e-4,
        "text_learning_rate": 5e-4,
        "checkpoint_every": 1,
        "keep_checkpoints": LAST,
        "evaluate_every": 2,
        "ema_decay": DECAY,
    }
    return write_recipe(tmp_path_factory.mktemp("averaging") / "averaging.yaml", data_cache, **settings)


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("averaged") / "run"
    assert train_reftr.main([str(recipe), "--output_dir", str(output_dir)]) == 0
    return output_dir


def weights_by_step(folder) -> list[dict[str, torch.Tensor]]:
    """Return the weights of each step's checkpoint, first step first."""
    return [load_file(path / "model.safetensors") for path in reversed(checkpoints_of(folder))]


def test_average_of_run_matches_its_definition_and_is_saved_as_model(finished):
    steps = weights_by_step(finished)
    assert len(steps) == LAST
    expected = {name: value.double() for name, value in steps[0].items() if value.is_floating_point()}
    for number, weights in enumerate(steps[1:], start=1):
        decay = min(DECAY, (1 + number) / (10 + number))
        expected = {name: decay * value + (1 - decay) * weights[name].double() for name, value in expected.items()}
    saved, moved = load_file(finished / "model.safetensors"), 0
    average = load_file(finished / "checkpoints" / f"step_{LAST:08d}" / "average.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(saved[name].double(), value, rtol=1e-4, atol=1e-5)
        assert torch.equal(saved[name], average[f"module.{name}"])
        moved += not torch.allclose(saved[name], steps[-1][name], rtol=1e-3, atol=1e-5)
    assert moved > 50, "the average is not the last weights"


def test_resumed_run_has_bit_identical_average(finished, recipe, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for path in checkpoints_of(folder)[:5]:  # within an epoch
        shutil.rmtree(path)
    assert train_reftr.main([str(recipe), "--output_dir", str(folder), "--resume", "auto"]) == 0
    found, expected = (load_file(checkpoints_of(path)[0] / "average.safetensors") for path in (folder, finished))
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_average_that_starts_on_resume_warns(recipe, tmp_path, caplog):
    argv = [str(recipe), "--output_dir", str(tmp_path)]
    assert train_reftr.main([*argv, "--max_steps", "2", "--ema_decay", "0"]) == 0
    assert not list(tmp_path.rglob("average.safetensors"))
    with caplog.at_level(logging.WARNING):
        assert train_reftr.main([*argv, "--max_steps", "4", "--resume", "auto"]) == 0
    assert "The average of weights restarts from" in caplog.text
    assert "ema_decay=0.6 (was 0.0)" in caplog.text
    third, fourth = weights_by_step(tmp_path)[2:]
    average = load_file(checkpoints_of(tmp_path)[0] / "average.safetensors")
    name = "model.encoder.layers.0.mlp.fc1.weight"
    torch.testing.assert_close(average[f"module.{name}"], third[name].lerp(fourth[name], 1 - 2 / 11))


def test_average_of_another_model_is_refused(make_model, tmp_path):
    accelerator = SimpleNamespace(device=torch.device("cpu"), distributed_type=DistributedType.NO)
    average = build_average(make_model(), OptimizationSettings(ema_decay=0.9), accelerator)
    file = tmp_path / "average.safetensors"
    save_file({"n_averaged": torch.tensor(1), "module.other": torch.zeros(1)}, file)
    with pytest.raises(OSError, match=r"average.safetensors' does not fit the model"):
        load_average(file, average)


@pytest.mark.parametrize("strategy", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_average_of_sharded_weights_is_refused(make_model, strategy):
    accelerator = SimpleNamespace(device=torch.device("cpu"), distributed_type=strategy)
    with pytest.raises(ValueError, match=rf"ema_decay=0.9 requires all weights.*{strategy.value}.*set ema_decay to 0"):
        build_average(make_model(), OptimizationSettings(ema_decay=0.9), accelerator)


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_ema_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"ema_decay=.* must be at least 0 and less than 1"):
        OptimizationSettings(ema_decay=decay)
