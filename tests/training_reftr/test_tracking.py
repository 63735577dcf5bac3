"""The log of a run reports throughput."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from training_reftr import tracking
from training_reftr.checkpoints import TrainingState
from training_reftr.settings import TrainingSettings
from training_reftr.tracking import Tracking


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock by one that the test advances."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(tracking.time, "perf_counter", lambda: now.seconds)
    return now


def test_tracking_excludes_evaluation_from_throughput(tmp_path, clock):
    args = TrainingSettings.from_flat(output_dir=str(tmp_path), log_every=2, num_pictures=0)
    state = TrainingState()
    scheduler = SimpleNamespace(get_last_lr=lambda: [1e-3, 1e-5])
    run = SimpleNamespace(state=state, scheduler=scheduler, is_at_last_step=False)
    log = Tracking(args, Accelerator(cpu=True), state)

    def step(num_expressions: int, seconds: float):
        clock.seconds += seconds
        state.step += 1
        log.log_step(run, {"loss": torch.tensor(0.5)}, num_expressions)

    step(5, seconds=1.0)
    step(7, seconds=2.0)
    clock.seconds += 100.0
    log.log_evaluation(state, "validation", {"num_phrases": 3, "mean_iou": 0.25}, [], [])
    step(8, seconds=1.0)
    step(8, seconds=1.0)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    speeds = [(record["step"], record["train/expressions_per_second"]) for record in records if "train/loss" in record]
    assert speeds == [(2, pytest.approx(12 / 3)), (4, pytest.approx(16 / 2))]
    assert records[-1]["train/seconds_per_update"] == pytest.approx(1.0)
    assert records[-1]["train/learning_rate"] == 1e-3
