"""Progress is a bar on a terminal, and a few lines of the log elsewhere."""

import io
import logging
import re
import sys

import pytest

from data_scripts.progress import progress_bar
from tests.helpers.tiny import ROOT
from training_reftr import progress
from training_reftr.progress import Progress


SMALL = ("--num_train", "9", "--num_validation", "3", "--num_test", "3", "--image_size", "64")
LINE = re.compile(
    r"INFO training: step (\d+) of 12 \((\d+)%\), epoch \d, loss \d+\.\d{4}, learning rate 1\.00e-03, "
    r"0:00:\d\d remaining"
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """Return a list whose last entry is the time."""
    times = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: times[-1])
    return times


def messages(caplog):
    return [record.getMessage() for record in caplog.records]


def test_training_without_terminal_logs_lines_instead_of_bars(trained):
    _, result = trained
    log = result.stdout + result.stderr
    assert "\r" not in log
    assert "/s]" not in log
    assert LINE.findall(log)[-1] == ("12", "100")
    assert len(LINE.findall(log)) == 12
    assert len(log) < 15_000


def test_data_commands_without_terminal_show_no_bars(run, tmp_path):
    result = run("-m", "reftr_cli", "data", "build", "shapes", "--cache_dir", tmp_path, "--verify", *SMALL)
    assert "All images decode" in result.stdout
    assert result.stderr == ""


def test_predict_without_terminal_shows_no_bars(run, trained):
    image = ROOT / "demo" / "shapes.jpg"
    result = run("-m", "reftr_cli", "predict", "--model", trained[0], "--image", image, image, "--text", "the star")
    assert len(result.stdout.splitlines()) == 2
    assert result.stderr == ""


def test_progress_logs_at_equal_distances_with_remaining_time(caplog, clock):
    with caplog.at_level(logging.INFO), Progress("training", 1000, done=900, num_lines=20) as shown:
        for _ in range(100):
            clock.append(clock[-1] + 1)
            shown.update(lambda: "loss 1")
    assert messages(caplog) == [
        "training: step 950 of 1000 (95%), loss 1, 0:00:50 remaining",
        "training: step 1000 of 1000 (100%), loss 1, 0:00:00 remaining",
    ]


def test_progress_of_slow_loop_logs_every_five_minutes(caplog, clock):
    with caplog.at_level(logging.INFO), Progress("test", 8, unit="batch", num_lines=0) as shown:
        for _ in range(8):
            clock.append(clock[-1] + 100)
            shown.update()
    assert messages(caplog) == [
        "test: batch 3 of 8 (38%), 0:08:20 remaining",
        "test: batch 6 of 8 (75%), 0:03:20 remaining",
    ]


def test_progress_of_other_processes_is_silent(caplog, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with caplog.at_level(logging.INFO), Progress("training", 2, is_shown=False) as shown:
        shown.update(lambda: pytest.fail("described"))
    assert sys.stderr.getvalue() == ""
    assert messages(caplog) == []


def test_progress_on_terminal_is_bar_and_logs_nothing(caplog, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with caplog.at_level(logging.INFO), Progress("training", 2) as shown:
        shown.update(lambda: pytest.fail("described"))
    assert "training:  50%" in sys.stderr.getvalue()
    assert messages(caplog) == []


@pytest.mark.parametrize(("stream", "is_shown"), [(Terminal, True), (io.StringIO, False)])
def test_progress_bar_is_shown_on_terminal_only(monkeypatch, stream, is_shown):
    monkeypatch.setattr(sys, "stderr", stream())
    assert list(progress_bar([1, 2], desc="checking")) == [1, 2]
    assert ("checking" in sys.stderr.getvalue()) is is_shown
