"""
Metrics of a run in progress: the log, metrics.jsonl, TensorBoard and other trackers. Nothing here is a collective;
only the main process writes.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import numpy as np
import torch
from accelerate import Accelerator

from data_scripts.atomic_files import write_file
from data_scripts.quoting import quote
from training_reftr.json_files import read_json_lines
from training_reftr.settings import TrainingSettings
from training_reftr.visualization import draw_validation_images


if TYPE_CHECKING:
    from training_reftr.checkpoints import TrainingState
    from training_reftr.run import Run


logger = logging.getLogger(__name__)


class Tracking:
    """
    Write the metrics of a run to `metrics.jsonl` in its folder (one record per line: `{"step", "epoch", "time", ...}`,
    with the time in seconds since 1970), to the log, and to the trackers of accelerate that `trackers` names.

    Args:
        settings ([`TrainingSettings`]): settings of the run.
        accelerator (`Accelerator`): accelerator built with `log_with` of `settings.tracking.tracker_names`.
        state (`TrainingState`): progress of the run; records of later steps, written before a crash, are removed.
    """

    def __init__(self, settings: TrainingSettings, accelerator: Accelerator, state: TrainingState) -> None:
        self.accelerator = accelerator
        self.settings = settings
        self.path = settings.checkpoints.folder.log
        self.restart_clock()
        if not accelerator.is_main_process:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if settings.tracking.tracker_names:
            name = settings.tracking.run_name or Path(settings.checkpoints.output_dir).name
            config = {
                key: value if isinstance(value, int | float) else str(value)
                for key, value in settings.to_flat().items()
            }
            accelerator.init_trackers("reftr", config=config, init_kwargs=tracker_settings(name, state))
        # Do this last, so that a run that fails to start does not modify the log.
        keep_until(self.path, state.step)

    def restart_clock(self) -> None:
        """Restart the measurement of throughput."""
        self.start, self.num_steps, self.num_expressions = time.perf_counter(), 0, 0

    def log_step(self, run: Run, losses: dict[str, torch.Tensor], num_expressions: int) -> None:
        """
        Log losses, gradient norm and learning rates of an optimizer step, and the throughput since the last record,
        every `log_every` steps and at the last step.
        """
        state = run.state
        self.num_steps += 1
        self.num_expressions += num_expressions
        if state.step % self.settings.tracking.log_every and not run.is_at_last_step:
            return
        values = {name: value.item() for name, value in losses.items()}  # waits for the GPU
        seconds = time.perf_counter() - self.start
        speeds = {
            "learning_rate": max(run.scheduler.get_last_lr()),
            "expressions_per_second": self.num_expressions / seconds,
            "seconds_per_update": seconds / self.num_steps,
            "memory_gb": memory_in_use(self.accelerator.device),
        }
        parts = " ".join(f"{name}={value:.6f}" for name, value in values.items())
        rates = " ".join(f"{rate:.2e}" for rate in run.scheduler.get_last_lr())
        logger.info(
            f"step {state.step} epoch {state.epoch} {parts} rates {rates}, "
            f"{speeds['expressions_per_second']:.1f} expressions/s, {speeds['memory_gb']:.2f} GB"
        )
        self.write(state, {f"train/{name}": value for name, value in (values | speeds).items()})
        self.restart_clock()

    def log_evaluation(
        self, state: TrainingState, split: str, metrics: dict, records: list[dict], rows: datasets.Dataset
    ) -> None:
        """Log the metrics of a validation, and images of some predictions to trackers."""
        values = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        text = " ".join(f"{name}={value:.3f}" for name, value in values.items() if isinstance(value, float))
        logger.info(f"step {state.step} {split} of {metrics['num_phrases']} phrases: {text}")
        self.write(state, {f"{split}/{name}": value for name, value in values.items()})
        trackers = [tracker for tracker in self.accelerator.trackers if hasattr(tracker, "log_images")]
        if trackers and self.settings.evaluation.num_pictures and self.accelerator.is_main_process:
            image = draw_validation_images(records, rows, self.settings.evaluation.num_pictures)
            for tracker in trackers if image else []:
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({f"{split}/predictions": np.asarray(image)[None]}, step=state.step, **layout)
        self.restart_clock()  # exclude evaluation from throughput

    def write(self, state: TrainingState, values: dict) -> None:
        """Write a record to metrics.jsonl and the trackers."""
        if not self.accelerator.is_main_process:
            return
        with open(self.path, "a") as file:
            record = {"step": state.step, "epoch": state.epoch, "time": round(time.time(), 3), **values}
            file.write(json.dumps(record) + "\n")
        self.accelerator.log(values, step=state.step)


def describe_step(run: Run, losses: dict[str, torch.Tensor]) -> str:
    """Return the epoch, the loss and the highest learning rate of an optimizer step for a line of the log."""
    learning_rate = max(run.scheduler.get_last_lr())
    return f"epoch {run.state.epoch}, loss {losses['loss'].item():.4f}, learning rate {learning_rate:.2e}"


def tracker_settings(name: str, state: TrainingState) -> dict:
    """Return the arguments of each tracker with which a resumed run continues as one run."""
    return {
        "tensorboard": {"purge_step": state.step + 1},
        "wandb": {"name": name, "id": state.run_id, "resume": "allow"},
        "trackio": {"name": name, "resume": "allow"},
    }


def keep_until(path: Path, step: int) -> None:
    """
    Remove records of later steps from a metrics.jsonl, and malformed lines with a warning. If more than an incomplete
    last line is malformed, keep a copy of the file.
    """
    if not path.exists():
        return
    kept, malformed, num_lines = [], [], 0
    for number, line, record in read_json_lines(path):
        num_lines = number
        if not isinstance(record, dict):
            reason = record
        elif not isinstance(record.get("step"), int):
            reason = f"step={quote(record.get('step'))} is not an integer"
        else:
            kept += [line] if record["step"] <= step else []
            continue
        malformed.append(number)
        logger.warning(f"{str(path)!r}, line {number} is left out, it is not a record of the log ({reason}).")
    if malformed and malformed != [num_lines]:
        copy = path.with_name(f"{path.name}.damaged")
        shutil.copyfile(path, copy)
        logger.warning(f"The log as it was is kept as {str(copy)!r}.")
    write_file(path, b"".join(line + b"\n" for line in kept))


def memory_in_use(device: torch.device) -> float:
    """Return the peak memory of the GPU, or the resident memory of the process (0 if not on Linux), in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30
