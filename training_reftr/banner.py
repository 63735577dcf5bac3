"""Summaries of a run at its start and at its end. Nothing here is a collective."""

import logging
import os
import shlex

import datasets
from accelerate import Accelerator

from modeling_reftr import RefTRForVisualGrounding
from training_reftr.build import is_weights_file
from training_reftr.launch import is_alone_by_mistake, reftr_command
from training_reftr.run_folder import RunFolder
from training_reftr.settings import TrainingSettings
from training_reftr.streams import StreamedRows


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
    splits = ", ".join(f"{name} {describe_num_images(rows[name])}" for name in names if name in rows)
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


def describe_num_images(rows: datasets.Dataset | StreamedRows) -> str:
    """Return the number of images of a split, or of the shards of a stream, as people read it."""
    return f"{rows.num_shards:,} streamed shards" if isinstance(rows, StreamedRows) else f"{len(rows):,} images"


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
        argv = ["predict", "--model", model, "--image", str(folder.path / example["image"]), "--text", text]
        lines.append(f"Next: {shlex.join([*reftr_command(), *argv, '--output', str(folder.answer)])}")
    return "\n".join(lines)
