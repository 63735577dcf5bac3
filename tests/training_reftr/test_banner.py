"""Log lines at the start of a run, and results printed at its end."""

import logging
import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from tests.helpers.processes import ScriptProcess, run_process
from training_reftr.banner import announce, describe_results
from training_reftr.launch import is_alone_by_mistake
from training_reftr.settings import TrainingSettings


class Processes:
    """Stand in for the accelerator of a run with several processes."""

    is_main_process, num_processes, device, mixed_precision = True, 3, "cpu", "bf16"


def last_lines(stdout: str) -> dict[str, str]:
    """Return the lines below the tables, keyed by name."""
    return dict(line.split(": ", 1) for line in stdout.strip().split("\n\n")[-1].splitlines())


def test_run_starts_by_logging_dataset_and_batch_sizes(trained):
    log = trained[1].stderr
    assert "Dataset shapes: train 48 images, validation 9 images, test 10 images." in log
    assert re.search(
        r"1 process on cpu; global batch 8 = batch_size 8 x gradient_accumulation_steps 1 x 1 process; float32, "
        r"mixed_precision no; ([\d,]+) parameters, ([\d,]+) of them trained\.",
        log,
    )
    assert log.index("Dataset shapes:") < log.index("step 1 epoch 0")
    assert "Several processes were asked for" not in log


def test_announce_counts_processes_batches_and_trained_parameters(shapes, make_model, caplog):
    model = make_model()
    frozen = model.base_model.text_backbone.requires_grad_(False)
    total, untrained = (sum(value.numel() for value in part.parameters()) for part in (model, frozen))
    args = TrainingSettings.from_flat(batch_size=4, gradient_accumulation_steps=2, train_split="train+validation")
    with caplog.at_level(logging.INFO):
        announce(shapes, model, args, Processes)
    assert "global batch 24 = batch_size 4 x gradient_accumulation_steps 2 x 3 processes" in caplog.text
    assert f"{total:,} parameters, {total - untrained:,} of them trained" in caplog.text
    assert "mixed_precision bf16" in caplog.text
    assert "WARNING" not in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        announce(shapes, model, TrainingSettings.from_flat(eval_only=True, test_splits="test"), Processes)
        announce(shapes, model, args, type("Other", (Processes,), {"is_main_process": False}))
    assert "Dataset shapes: test 10 images." in caplog.text
    assert "evaluation_batch_size 16" in caplog.text
    assert "trained" not in caplog.text


@pytest.mark.parametrize("num_processes", [1, 2])
def test_is_alone_by_mistake_detects_missing_second_process(num_processes, monkeypatch):
    """Use the environment variables that accelerate itself sets."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    argv = [
        "--cpu",
        "--num_processes",
        str(num_processes),
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "train.py",
    ]
    args = launch_command_parser().parse_args(argv)
    args.dynamo_backend = "no"
    _, environment = prepare_simple_launcher_cmd_env(args)
    assert is_alone_by_mistake(1, environment) is (num_processes == 2)
    assert not is_alone_by_mistake(2, environment)
    assert not is_alone_by_mistake(1, {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"})  # set by a cluster
    assert is_alone_by_mistake(1, {"WORLD_SIZE": "2"})
    assert not is_alone_by_mistake(2, {"WORLD_SIZE": "2"})


def test_run_ends_with_its_paths_and_a_working_command(trained):
    folder, result = trained
    lines = last_lines(result.stdout)
    assert list(lines) == ["Model", "Report", "Images", "Next"]
    assert lines["Model"] == str(folder)
    assert all(Path(lines[name]).exists() for name in ("Report", "Images"))
    argv = shlex.split(lines["Next"])
    answer = Path(argv[argv.index("--output") + 1])
    assert not answer.exists()
    try:
        # run the command as printed, except that the interpreter is already running
        assert run_process(["-m", "reftr_cli", *argv[argv.index("predict") :]]).returncode == 0
        assert answer.exists()
    finally:
        answer.unlink(missing_ok=True)


def test_evaluation_ends_with_only_existing_paths(trained, recipe, tmp_path):
    folder, _ = trained
    argv = ["train_reftr.py", recipe, "--eval_only", "--init_from", folder, "--output_dir", tmp_path / "out"]
    variables = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    process = ScriptProcess([*argv, "--num_pictures", "0"], environment=variables)
    stdout, stderr = process.communicate(120)
    assert last_lines(stdout) == {"Model": str(folder), "Report": str(tmp_path / "out" / "report.md")}
    assert stderr.count("Several processes were asked for, and this run has one") == 1
    assert "1 process on cpu" in stderr


def test_describe_results_omits_commands_that_would_fail(tmp_path):
    args = TrainingSettings.from_flat(output_dir=str(tmp_path))
    metrics = {"model": "published.pth", "example": {"image": "example.png", "texts": ["the star"]}}
    assert describe_results(args.checkpoints.folder, metrics) == "Model: published.pth"
    metrics = {
        "model": "owner/model",
        "example": {"image": "example.png", "texts": ["-1 on a shirt", "a\x1b[2J", "the 'star'"]},
    }
    last = describe_results(args.checkpoints.folder, metrics).splitlines()[-1]
    assert "--text 'the '\"'\"'star'\"'\"''" in last
    metrics["example"]["texts"] = ["-1 on a shirt"]
    assert "Next" not in describe_results(args.checkpoints.folder, metrics)
