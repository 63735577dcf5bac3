"""Dry run: a few optimizer steps of everything, in a temporary folder. `limited` is a collective."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator

import datasets
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from training_reftr.checkpoints import checkpoints_of, find_checkpoint, load_state
from training_reftr.resuming import refuse_changes
from training_reftr.settings import TrainingSettings
from training_reftr.streams import StreamedRows


NUM_STEPS = 4  # the first steps are slower than the rest


@contextlib.contextmanager
def limited(
    settings: TrainingSettings, rows: dict, accelerator: Accelerator
) -> Iterator[tuple[TrainingSettings, dict]]:
    """
    Yield the settings and rows of a run. With `dry_run`, limit them to a few optimizer steps and one evaluation batch
    per split, in a folder that is deleted at the end. A dry run does not resume, but validates `resume`.

    Raises:
        OSError, ValueError: see `find_checkpoint` and `with_model_of`.
    """
    if not settings.checkpoints.dry_run:
        yield settings, rows
        return
    if settings.checkpoints.resume is not None:
        refuse_changes(settings, find_checkpoint(settings.checkpoints, accelerator))
    folder = [tempfile.mkdtemp(prefix="dry_run_") if accelerator.is_main_process else None]
    broadcast_object_list(folder)
    settings = settings.replace(
        output_dir=folder[0],
        max_steps=NUM_STEPS,
        log_every=1,
        resume=None,
        trackers="none",
        push_to_hub=None,
    )
    count = settings.evaluation.evaluation_batch_size * accelerator.num_processes
    trained = settings.data.train_split.split("+")
    try:
        yield settings, {split: part if split in trained else _first(part, count) for split, part in rows.items()}
        accelerator.wait_for_everyone()
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(folder[0], ignore_errors=True)


def _first(rows: datasets.Dataset | StreamedRows, count: int) -> datasets.Dataset | StreamedRows:
    return rows if isinstance(rows, StreamedRows) else rows.select(range(min(count, len(rows))))


def estimate(settings: TrainingSettings) -> str:
    """Return the estimated duration and memory of a run after its dry run."""
    lines = [json.loads(line) for line in settings.checkpoints.folder.log.read_text().splitlines()]
    last = [line for line in lines if "train/seconds_per_update" in line][-1]
    steps = load_state(checkpoints_of(settings.checkpoints.output_dir)[0]).steps_per_epoch
    hours = steps * last["train/seconds_per_update"] / 3600
    size = sum(path.stat().st_size for path in checkpoints_of(settings.checkpoints.output_dir)[0].iterdir()) / 2**30
    num_epochs = settings.schedule.num_epochs
    return (
        f"The dry run succeeded. An epoch of {steps:,} steps takes about {hours:.2f} hours "
        f"({last['train/expressions_per_second']:.1f} expressions/s) without evaluation, all {num_epochs} "
        f"about {hours * num_epochs:.1f}; a process uses {last['train/memory_gb']:.2f} GB, a checkpoint "
        f"{size:.2f} GB."
    )
