"""Summaries of a run at its start and at its end. Nothing here is a collective."""

import logging
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import datasets
from accelerate import Accelerator

from modeling_reftr import RefTRForVisualGrounding
from training_reftr.build import is_weights_file
from training_reftr.run_folder import RunFolder
from training_reftr.settings import TrainingSettings


logger = logging.getLogger(__name__)


def announce(rows: dict, model: RefTRForVisualGrounding, settings: TrainingSettings, accelerator: Accelerator) -> None:
    """
    Log what runs: the size of each split that is read, processes, batches, device, precision and parameters. The main
    process does.

    Args:
        rows (`dict[str, datasets.Dataset]`): the splits.
        model ([`RefTRForVisualGrounding`]): before it is divided between processes.
        settings ([`TrainingSettings`]): of the run.
        accelerator (`Accelerator`): the processes.
    """
    if not accelerator.is_main_process:
        return
    data, optimization, eval_only = settings.data, settings.optimization, settings.evaluation.eval_only
    trained = [] if eval_only else [*data.train_split.split("+"), *data.validation_split.split("+")]
    names = dict.fromkeys([*trained, *(name.strip() for name in data.test_splits.split(","))])
    splits = ", ".join(f"{name} {describe_size(rows[name])}" for name in names if name in rows)
    processes = f"{accelerator.num_processes} process{'' if accelerator.num_processes == 1 else 'es'}"
    if eval_only:
        batch = f"evaluation_batch_size {settings.evaluation.evaluation_batch_size}"
    else:
        size = optimization.batch_size * optimization.gradient_accumulation_steps * accelerator.num_processes
        batch = (
            f"global batch {size} = batch_size {optimization.batch_size} x gradient_accumulation_steps "
            f"{optimization.gradient_accumulation_steps} x {processes}"
        )
    parameters = list(model.parameters())
    count = f"{sum(value.numel() for value in parameters):,} parameters"
    if not eval_only:
        count += f", {sum(value.numel() for value in parameters if value.requires_grad):,} of them trained"
    lines = [
        f"Dataset {data.dataset}: {splits}.",
        f"{processes} on {accelerator.device}; {batch}; {str(parameters[0].dtype).removeprefix('torch.')}, "
        f"mixed_precision {accelerator.mixed_precision}; {count}.",
    ]
    for line in lines:
        logger.info(line)
    if is_alone_by_mistake(accelerator.num_processes, os.environ):
        logger.warning(
            "Several processes were asked for, and this run has one: `accelerate launch` starts a single process "
            "where there is no GPU, whatever --num_processes says. Start several by `ACCELERATE_USE_CPU=true torchrun "
            "--nproc_per_node 2 train_reftr.py ...`, see docs/many_gpus.md."
        )


def describe_size(rows: datasets.Dataset | datasets.IterableDataset) -> str:
    """Return the number of images of a split, as people read it."""
    return f"{len(rows):,} images" if hasattr(rows, "__len__") else "streamed"


def is_alone_by_mistake(num_processes: int, environment: Mapping[str, str]) -> bool:
    """
    Return whether the variables of a launcher are those of several processes where there is one.

    Args:
        num_processes (`int`): how many there are.
        environment (`Mapping`): variables of this process.

    Example:

    ```python
    >>> from training_reftr.banner import is_alone_by_mistake

    >>> is_alone_by_mistake(1, {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})
    True
    >>> is_alone_by_mistake(1, {"ACCELERATE_USE_CPU": "True"})
    False

    ```"""
    if num_processes > 1:
        return False
    # where it starts one process, accelerate gives it an address to meet others, but no number of them
    is_launched = "ACCELERATE_USE_CPU" in environment or "ACCELERATE_MIXED_PRECISION" in environment
    is_lost = is_launched and "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment
    return is_lost or environment.get("WORLD_SIZE", "1") not in ("", "1")


def describe_results(folder: RunFolder, metrics: dict) -> str:
    """
    Return lines that say where the model, the report and the images of a run are, as far as they exist, and the
    command that asks the model.

    Args:
        folder ([`RunFolder`]): of the run.
        metrics (`dict`): what metrics.json holds.
    """
    model = metrics["model"]
    lines = [f"Model: {model}"]
    lines += [
        f"{name}: {file}"
        for name, file in (("Report", folder.report), ("Images", folder.drawn_predictions))
        if file.exists()
    ]
    example = metrics.get("example", {"texts": []})
    # one that a terminal shows as it is, and that is not taken for an option
    text = next((text for text in example["texts"] if text.isprintable() and not text.startswith("-")), None)
    if text is not None and not is_weights_file(model):
        words = ["predict", "--model", model, "--image", str(folder.path / example["image"]), "--text", text]
        lines.append(f"Next: {shlex.join([*reftr_command(), *words, '--output', str(folder.answer)])}")
    return "\n".join(lines)


def reftr_command() -> list[str]:
    """Return the words that start a command of the project in the environment that this process runs in."""
    script = shutil.which("reftr")
    is_own = script is not None and Path(script).parent == Path(sys.executable).parent
    return ["reftr"] if is_own else [sys.executable, "-m", "reftr_cli"]
