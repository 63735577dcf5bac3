"""
Figures of a run while it goes: a line of the log, metrics.jsonl, TensorBoard and others. Nothing here holds a
collective; what is written is written by the main process.
"""

import json
import logging
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from data_scripts.atomic_files import write_file
from data_scripts.quoting import quote
from training_reftr.json_files import read_json_lines
from training_reftr.settings import TrainingSettings
from training_reftr.visualization import draw_validation_images


logger = logging.getLogger(__name__)


class Tracking:
    """
    Where the figures of a run go: `metrics.jsonl` in its folder (a line a record: `{"step", "epoch", "time", ...}`, in
    seconds since 1970), the log, and the trackers of accelerate that `trackers` names.

    Args:
        settings: the run's settings.
        accelerator (`Accelerator`): made by `log_with` of `settings.tracking.tracker_names`.
        state (`TrainingState`): where the run is; what was written of later steps, before a crash, is taken out.
    """

    def __init__(self, settings: TrainingSettings, accelerator: Accelerator, state) -> None:
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
        # last, so that a log is not touched by a run that does not start
        keep_until(self.path, state.step)

    def restart_clock(self) -> None:
        """Measure speed from now on."""
        self.start, self.num_updates, self.num_expressions = time.perf_counter(), 0, 0

    def log_step(self, run, losses: dict, num_expressions: int) -> None:
        """
        Losses, the gradient's norm and the rates of an update, and the speed since the last that was written: one of
        `log_every`, and the last.
        """
        state = run.state
        self.num_updates += 1
        self.num_expressions += num_expressions
        if state.step % self.settings.tracking.log_every and not run.is_at_last_step:
            return
        values = {name: value.item() for name, value in losses.items()}  # waits for the GPU
        seconds = time.perf_counter() - self.start
        speeds = {
            "learning_rate": max(run.scheduler.get_last_lr()),
            "expressions_per_second": self.num_expressions / seconds,
            "seconds_per_update": seconds / self.num_updates,
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

    def log_evaluation(self, state, split: str, metrics: dict, records: list[dict], rows) -> None:
        """Figures of a validation; trackers get pictures of some of its answers as well."""
        figures = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        text = " ".join(f"{name}={value:.3f}" for name, value in figures.items() if isinstance(value, float))
        logger.info(f"step {state.step} {split} of {metrics['num_phrases']} phrases: {text}")
        self.write(state, {f"{split}/{name}": value for name, value in figures.items()})
        trackers = [tracker for tracker in self.accelerator.trackers if hasattr(tracker, "log_images")]
        if trackers and self.settings.evaluation.num_pictures and self.accelerator.is_main_process:
            picture = draw_validation_images(records, rows, self.settings.evaluation.num_pictures)
            for tracker in trackers if picture else []:
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({f"{split}/predictions": np.asarray(picture)[None]}, step=state.step, **layout)
        self.restart_clock()  # an evaluation is no time of training

    def write(self, state, values: dict) -> None:
        """A record for all places but the log."""
        if not self.accelerator.is_main_process:
            return
        with open(self.path, "a") as file:
            record = {"step": state.step, "epoch": state.epoch, "time": round(time.time(), 3), **values}
            file.write(json.dumps(record) + "\n")
        self.accelerator.log(values, step=state.step)


def tracker_settings(name: str, state) -> dict:
    """What each tracker is to know, so that a run that goes on after a crash stays one run there."""
    return {
        "tensorboard": {"purge_step": state.step + 1},
        "wandb": {"name": name, "id": state.run_id, "resume": "allow"},
        "trackio": {"name": name, "resume": "allow"},
    }


def keep_until(path: Path, step: int) -> None:
    """
    Take the records of later steps out of a metrics.jsonl, and lines that are not records, each with a warning. Where
    these are more than a last line that was cut, the file as it was is kept beside it.
    """
    if not path.exists():
        return
    kept, malformed, num_lines = [], [], 0
    for number, line, record in read_json_lines(path):
        num_lines = number
        if not isinstance(record, dict):
            reason = record
        elif not isinstance(record.get("step"), int):
            reason = f"step={quote(record.get('step'))} is not a whole number"
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
    """Gigabytes: the most that was allocated on the GPU, or what the process holds now (0 where that is not Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30
