"""Runs survive faults. Each test names its row of the scorecard; `make scorecard` runs every trial of each."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.faults import finish, kill, losses_of, start, steps_of, wait_for, write_recipe
from tests.helpers.processes import start_ranks
from tests.helpers.tiny import ROOT, trials
from training_reftr.checkpoints import checkpoints_of, find_latest_valid_checkpoint, load_state, validate_checkpoint
from training_reftr.settings import TrainingSettings


LAST_STEP = 12


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, data_cache):
    return write_recipe(tmp_path_factory.mktemp("faults") / "faults.yaml", data_cache, ema_decay=0.7)


class UndisturbedRuns(dict):
    """Folder of an undisturbed run per number of processes, with one global batch size; trained on first access."""

    def __init__(self, recipe: Path, tmp_path_factory):
        super().__init__()
        self.recipe, self.tmp_path_factory = recipe, tmp_path_factory

    def __missing__(self, ranks: int) -> Path:
        folder = self.tmp_path_factory.mktemp(f"undisturbed{ranks}")
        finish(run(self.recipe, folder, ranks))
        self[ranks] = folder
        return folder


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory):
    return UndisturbedRuns(recipe, tmp_path_factory)


def run(recipe, output_dir, ranks=1, *argv, **settings):
    """Start a run whose global batch size is 8 on any number of ranks."""
    batch_size = ("--batch_size", 8 // ranks)
    return start(recipe, "--output_dir", output_dir, *batch_size, *argv, ranks=ranks, **settings)


def assert_same(first: Path, second: Path):
    """Assert that two runs logged the same metrics and ended with bit-identical models and optimizers."""
    assert losses_of(first) == losses_of(second)
    for name in ("model.safetensors", "optimizer.safetensors", "average.safetensors"):
        one, two = (load_file(folder / f"checkpoints/step_{LAST_STEP:08d}" / name) for folder in (first, second))
        assert one.keys() == two.keys()
        assert [key for key in one if not torch.equal(one[key], two[key])] == []


@pytest.mark.row("R12")
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("trial", trials(10, short=1))
def test_resume_after_kill_repeats_every_loss(recipe, undisturbed, tmp_path, ranks, trial):
    step = random.Random(f"{ranks}/{trial}").randint(1, LAST_STEP - 4)
    process = run(recipe, tmp_path, ranks)
    wait_for(lambda: step in steps_of(tmp_path), process)
    kill(process)
    assert steps_of(tmp_path)[0] < LAST_STEP
    output = finish(run(recipe, tmp_path, ranks, "--resume", "auto"))
    assert "Going on from" in output
    assert_same(tmp_path, undisturbed[ranks])


@pytest.mark.row("R13")
@pytest.mark.parametrize("trial", trials(20, short=1))
def test_resume_after_kill_while_saving_repeats_every_loss(recipe, undisturbed, tmp_path, trial):
    step = 1 + trial % (LAST_STEP - 4)
    incomplete = f"checkpoints/.step_{step:08d}.*.incomplete"
    process = run(recipe, tmp_path)
    wait_for(lambda: any(tmp_path.glob(incomplete)) or step in steps_of(tmp_path), process)
    time.sleep(0.001 * trial)
    kill(process)
    complete = steps_of(tmp_path)
    output = finish(run(recipe, tmp_path, 1, "--resume", "auto"))
    if complete:
        assert f"step {complete[0]}, epoch" in output  # not older than the last complete checkpoint
    assert_same(tmp_path, undisturbed[1])
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.slow
@pytest.mark.row("R14")
@pytest.mark.parametrize("trial", trials(5, short=1))
def test_run_on_full_disk_keeps_previous_checkpoint(recipe, undisturbed, tmp_path, trial):
    """Limit the file size after two checkpoints, so that the next write fails as on a full disk."""
    size = (undisturbed[1] / "checkpoints" / f"step_{LAST_STEP:08d}" / "optimizer.safetensors").stat().st_size
    limit = [size // 2, size - 1, 100, size // 10, size // 3][trial]
    before = (
        "import resource, training_reftr.checkpoints as checkpoints\n"
        "write_checkpoint = checkpoints.write_checkpoint\n"
        "def limited(path, write):\n"
        "    if path.name == 'step_00000003':\n"
        f"        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))\n"
        "    write_checkpoint(path, write)\n"
        "checkpoints.write_checkpoint = limited"
    )
    # a variable makes `start` use a pipe for the output: an output file would hit the limit as well
    output = finish(run(recipe, tmp_path, before=before, PYTHONUNBUFFERED="1"), expected=1)
    assert "error: The checkpoint of step 3 was not written" in output
    assert "Traceback" not in output
    assert steps_of(tmp_path) == [2, 1]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    finish(run(recipe, tmp_path, 1, "--resume", "auto"))
    assert_same(tmp_path, undisturbed[1])


@pytest.mark.row("R15")
@pytest.mark.parametrize("trial", trials(10, short=10))
def test_checkpoint_with_flipped_bit_is_skipped(undisturbed, tmp_path, trial, caplog):
    shutil.copytree(undisturbed[1] / "checkpoints", tmp_path / "checkpoints")
    latest, before = checkpoints_of(tmp_path)[:2]
    rng = random.Random(trial)
    file = rng.choice([path for path in sorted(latest.iterdir()) if path.stat().st_size])
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    assert find_latest_valid_checkpoint(tmp_path) == before
    assert latest.name in caplog.text


@pytest.mark.slow
def test_resume_skips_damaged_checkpoint_and_keeps_it(recipe, undisturbed, tmp_path):
    shutil.copytree(undisturbed[1], tmp_path / "run")
    latest, before = checkpoints_of(tmp_path / "run")
    with open(latest / "model.safetensors", "r+b") as file:
        file.seek(2000)
        file.write(b"damaged")
    refused = finish(run(recipe, tmp_path / "run", 1, "--resume", latest), expected=1)
    assert "is not as it was written" in refused
    output = finish(run(recipe, tmp_path / "run", 1, "--resume", "auto"))
    assert f"step {load_state(before).step}, epoch" in output
    assert_same(tmp_path / "run", undisturbed[1])
    assert (latest.parent / f"{latest.name}.damaged").is_dir()  # the damaged checkpoint is kept


@pytest.mark.row("R16")
@pytest.mark.parametrize("keep", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(5, marks=pytest.mark.slow)])
def test_run_keeps_latest_checkpoints_and_best_model(recipe, tmp_path, keep):
    finish(run(recipe, tmp_path, 1, "--keep_checkpoints", keep))
    assert steps_of(tmp_path) == list(range(LAST_STEP, LAST_STEP - keep, -1))
    assert all(validate_checkpoint(path) is None for path in checkpoints_of(tmp_path))
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert not list(tmp_path.glob(".*.incomplete"))
    state = load_state(checkpoints_of(tmp_path)[0])
    metrics = {
        step: values["validation/accuracy@0.5"]
        for step, values in losses_of(tmp_path).items()
        if "validation/accuracy@0.5" in values
    }
    assert metrics.keys() == {6, 12}
    assert (tmp_path / "model.safetensors").exists()
    assert state.best is None or state.best in metrics.values()


@pytest.mark.row("R17")
@pytest.mark.slow
@pytest.mark.parametrize("trial", trials(20, short=1))
def test_run_saves_checkpoint_on_sigterm_to_one_rank(recipe, undisturbed, tmp_path, trial):
    """Send SIGTERM to the only process or to one of two, in training or evaluation: all save and end."""
    ranks, in_evaluation = 2 - trial % 2, trial % 4 < 2
    slow = (
        "import time, training_reftr.evaluation as evaluation\n"
        "move = evaluation.move\n"
        "def slow(*args):\n"
        f"    open({str(tmp_path / 'evaluating')!r}, 'w').close()\n"
        "    time.sleep(0.3)\n"
        "    return move(*args)\n"
        "evaluation.move = slow"
    )
    argv = ("--checkpoint_every", 0, "--evaluation_batch_size", 1)
    process = run(recipe, tmp_path, ranks, *argv, before=slow)
    log = tmp_path / "metrics.jsonl"
    if in_evaluation:
        wait_for((tmp_path / "evaluating").exists, process)
    else:
        wait_for(lambda: log.exists() and log.read_text().count("\n") > trial % 4, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split() if ranks > 1 else []
    os.kill(int(children[-1]) if children else process.pid, signal.SIGTERM)
    output = finish(process, expected=None, timeout=120)
    assert process.returncode != 0
    assert "Traceback (most recent call last)" not in output or ranks > 1
    (step,) = steps_of(tmp_path)
    assert step <= 6
    if in_evaluation:
        assert step == 6
        assert load_state(checkpoints_of(tmp_path)[0]).is_evaluation_due
    finish(run(recipe, tmp_path, ranks, "--resume", "auto"))
    assert_same(tmp_path, undisturbed[ranks])


# phase of a run -> module and function that `linger` slows down
MOMENTS = {
    "training": ("training_reftr.step", "check_finite"),
    "evaluation": ("training_reftr.evaluation", "predict_batch"),
    "saving": ("data_scripts.atomic_files", "sync_tree"),
    "building": ("train_reftr", "load_rows"),
    "reporting": ("training_reftr.report", "format_report"),
}


# any variable makes `start` launch a new interpreter, which forks its own loader processes
OWN_IMPORTS = {"PYTHONHASHSEED": "0"}


def linger(moment: str, tmp_path: Path, seconds: float = 0.3) -> str:
    """Return Python code that delays each call of a function and creates a file when the call begins."""
    module, name = MOMENTS[moment]
    names = f"import {module} as module" if module != "train_reftr" else "import training_reftr.sources as module"
    return (
        f"import time\n{names}\n"
        f"original = module.{name}\n"
        "def lasting(*args, **kwargs):\n"
        f"    open({str(tmp_path / moment)!r}, 'w').close()\n"
        f"    time.sleep({seconds})\n"
        "    return original(*args, **kwargs)\n"
        f"module.{name} = lasting"
    )


@pytest.mark.row("R24")
@pytest.mark.parametrize("trial", trials(20, short=2))
def test_interrupted_run_saves_itself_and_resumes_bit_identically(recipe, undisturbed, tmp_path, trial):
    """Send SIGINT or SIGTERM to the only process or to the launcher of two, with and without loader processes."""
    number = [signal.SIGINT, signal.SIGTERM][trial % 2]
    ranks = 2 if trial % 4 == 3 else 1
    moment = ["training", "evaluation", "saving"][trial // 2 % 3]
    workers = ("--num_workers", trial // 4 % 2 * 2)
    own = OWN_IMPORTS if trial // 4 % 2 else {}
    argv = ("--checkpoint_every", 2, "--evaluation_batch_size", 1, *workers)
    process = run(recipe, tmp_path / "run", ranks, *argv, before=linger(moment, tmp_path), **own)
    wait_for((tmp_path / moment).exists, process)
    time.sleep(0.1 * random.Random(trial).random())
    os.kill(process.pid, number)
    output = finish(process, expected=128 + number if ranks == 1 else 1, timeout=120)
    assert f"{number.name}: the run is saved. Continue with:\n" in output
    assert "--resume auto\n" in output
    assert "Traceback" not in output.partition("Continue with")[0]  # a launcher adds its own traceback after it
    assert ranks > 1 or "Traceback" not in output
    assert validate_checkpoint(checkpoints_of(tmp_path / "run")[0]) is None
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    finish(run(recipe, tmp_path / "run", ranks, *workers, "--resume", "auto"))
    assert_same(tmp_path / "run", undisturbed[ranks])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["building", "reporting"])
def test_interrupt_outside_training_ends_run_at_once(recipe, tmp_path, moment, number):
    process = run(recipe, tmp_path / "run", 1, "--max_steps", 1, before=linger(moment, tmp_path, seconds=100))
    wait_for((tmp_path / moment).exists, process)
    os.kill(process.pid, number)
    output = finish(process, expected=128 + number, timeout=20)
    assert f"{number.name}: ended at once, nothing more was saved. Continue with:\n" in output
    assert "Traceback" not in output
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert not (tmp_path / "run" / ".lock").exists()
    assert (tmp_path / "run").exists() == (moment == "reporting")


def test_interrupt_during_import_ends_run_without_traceback(recipe, tmp_path):
    argv = [sys.executable, "train_reftr.py", recipe, "--output_dir", tmp_path / "run"]
    started = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    time.sleep(1)
    started.send_signal(signal.SIGINT)
    assert started.communicate(timeout=20)[0] == ""
    assert started.returncode == 130


def test_signal_to_one_rank_ends_all_ranks_with_its_exit_code(recipe, tmp_path):
    """Use no launcher that would forward the signal, as on a cluster that preempts one node."""
    argv = ["train_reftr.py", recipe, "--output_dir", tmp_path, "--batch_size", 4]
    ranks = start_ranks(argv, 2)
    wait_for(lambda: 1 in steps_of(tmp_path), ranks[0])
    ranks[1].send_signal(signal.SIGINT)
    for process in ranks:
        output = finish(process, expected=130)
        assert "Traceback" not in output
    assert 1 < steps_of(tmp_path)[0] < LAST_STEP


@pytest.mark.parametrize("moment", ["training", pytest.param("saving", marks=pytest.mark.slow)])
def test_second_interrupt_ends_run_at_once(recipe, undisturbed, tmp_path, moment):
    process = run(recipe, tmp_path / "run", 1, "--checkpoint_every", 2, before=linger(moment, tmp_path, seconds=100))
    wait_for((tmp_path / moment).exists, process)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    output = finish(process, expected=130, timeout=20)
    assert "SIGINT: saving after this step; Ctrl-C ends at once, unsaved." in output
    assert "SIGINT: ended at once, nothing more was saved. Continue with:\n" in output
    assert "Traceback" not in output
    assert steps_of(tmp_path / "run") == []
    assert not list((tmp_path / "run").rglob(".*"))
    finish(run(recipe, tmp_path / "run", 1, "--resume", "auto"))
    assert_same(tmp_path / "run", undisturbed[1])


@pytest.mark.row("R23")
@pytest.mark.parametrize("trial", trials(20, short=1))
def test_second_run_in_folder_is_refused_and_first_unharmed(recipe, undisturbed, tmp_path, trial):
    """Start two runs at once or one during another, as a new run, a resume and an evaluation."""
    argv = [(), (), ("--resume", "auto"), ("--eval_only",)][trial % 4]
    ranks = 2 if trial % 8 == 6 else 1
    # with a launcher it takes seconds until the ranks try to lock the folder
    before = linger("training", tmp_path.with_name(f"{tmp_path.name}_moments"), seconds=2) if ranks == 2 else ""
    tmp_path.with_name(f"{tmp_path.name}_moments").mkdir()
    first = run(recipe, tmp_path, 1, before=before)
    if trial % 4:
        wait_for(lambda: trial // 4 in steps_of(tmp_path) or (trial < 4 and (tmp_path / ".lock").exists()), first)
    second = run(recipe, tmp_path, ranks, *argv)
    output = {process: finish(process, expected=None) for process in (first, second)}
    codes = {process: process.returncode for process in (first, second)}
    assert sorted(codes.values()) == [0, 1], output
    refused = first if codes[first] else second
    assert trial % 4 == 0 or refused is second
    other = second if refused is first else first
    message = f"error: Another run is writing to {str(tmp_path)!r}: process {other.pid} on {socket.gethostname()}. "
    assert output[refused].count(message) == (ranks if refused is second else 1)
    assert ranks > 1 or "Traceback" not in output[refused]
    assert_same(tmp_path, undisturbed[1])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, LAST_STEP + 1))
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("moment", [pytest.param("training", marks=pytest.mark.slow), "saving"])
def test_killed_loader_process_is_named_in_error(recipe, tmp_path, moment):
    kill_loader = (
        "import os, psutil, signal\n"
        f"{linger(moment, tmp_path, seconds=3)}\n"
        "def killing(*args, **kwargs):\n"
        f"    if os.path.exists({str(tmp_path / 'run' / 'checkpoints')!r}):\n"
        "        psutil.Process().children()[-1].send_signal(signal.SIGKILL)\n"
        "    return lasting(*args, **kwargs)\n"
        f"module.{MOMENTS[moment][1]} = killing"
    )
    process = run(recipe, tmp_path / "run", 1, "--num_workers", 2, before=kill_loader, **OWN_IMPORTS)
    output = finish(process, expected=1, timeout=60)
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert re.match(
        r"error: A loader process \(pid \d+\) was killed by signal: Killed; most often memory is full", line
    )
    assert "Traceback" not in output
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_run_saves_extra_checkpoint_on_sigusr1(recipe, undisturbed, tmp_path):
    process = run(recipe, tmp_path, 1, "--checkpoint_every", 0, "--keep_checkpoints", 9)
    log = tmp_path / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_text(), process)
    os.kill(process.pid, signal.SIGUSR1)
    finish(process)
    assert len(steps_of(tmp_path)) == 3  # one per epoch, and one more
    assert_same(tmp_path, undisturbed[1])


@pytest.mark.row("R7")
@pytest.mark.parametrize("value", ["nan", pytest.param("inf", marks=pytest.mark.slow)])
@pytest.mark.slow
@pytest.mark.parametrize("trial", trials(3, short=1))
def test_non_finite_loss_stops_all_ranks_before_step(recipe, undisturbed, tmp_path, value, trial):
    step, rank = 2 + trial, 1
    before = (
        "import os, torch, modeling_reftr.modeling_reftr as modeling\n"
        "forward, calls = modeling.RefTRForVisualGrounding.forward, []\n"
        "def hurt(self, *args, **kwargs):\n"
        "    outputs = forward(self, *args, **kwargs)\n"
        "    calls.append(self.training)\n"
        f"    if os.environ['RANK'] == '{rank}' and sum(calls) == {step}:\n"
        f"        outputs.loss = outputs.loss * float('{value}')\n"
        "    return outputs\n"
        "modeling.RefTRForVisualGrounding.forward = hurt"
    )
    process = run(recipe, tmp_path, 2, before=before)
    output = finish(process, expected=None, timeout=120)
    assert process.returncode != 0
    assert f"The loss is not finite in step {step}" in output
    assert f"process {rank}: loss {value}, image/sentence shapes_train_" in output
    assert steps_of(tmp_path)[0] == step - 1
    finish(run(recipe, tmp_path, 2, "--resume", "auto"))
    assert_same(tmp_path, undisturbed[2])


@pytest.mark.slow
@pytest.mark.row("R11")
@pytest.mark.parametrize("trial", trials(5, short=1))
def test_run_ends_when_one_rank_is_killed(recipe, tmp_path, trial):
    process = run(recipe, tmp_path, 2, "--num_epochs", 1000)
    wait_for(lambda: len(steps_of(tmp_path)) > 0, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    start_time = time.monotonic()
    os.kill(int(children[trial % 2]), signal.SIGKILL)
    finish(process, expected=None, timeout=60)
    assert process.returncode != 0
    assert time.monotonic() - start_time < 60


@pytest.mark.slow
def test_hanging_run_ends_with_stack_traces(recipe, tmp_path):
    before = "import time, training_reftr.step as step\nmove = step.move\nstep.move = lambda *args: time.sleep(1000)"
    process = run(recipe, tmp_path, 1, "--watchdog_minutes", 0.05, before=before)
    output = finish(process, expected=None, timeout=60)
    assert process.returncode != 0
    assert "Timeout" in output
    assert "train_reftr.py" in output


@pytest.mark.row("R19")
@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2)])
def test_resume_with_other_process_count_repeats_no_sample(recipe, undisturbed, tmp_path, first, second):
    """Keep 8 images per process, so that the global batch changes, and record the samples of every step."""
    before = (
        "import os, training_reftr.step as step\n"
        "move = step.move\n"
        "def noted(batch, *args):\n"
        f"    with open({str(tmp_path / 'seen')!r}, 'a') as file:\n"
        "        file.write(''.join(t[0]['sentence_id'] + '\\n' for t in batch['targets']))\n"
        "    return move(batch, *args)\n"
        "step.move = noted"
    )
    argv = ("--batch_size", 8, "--num_epochs", 1, "--checkpoint_every", 1)
    output_dir = tmp_path / "run"
    finish(start(recipe, "--output_dir", output_dir, *argv, "--max_steps", 1, ranks=first, before=before))
    output = finish(start(recipe, "--output_dir", output_dir, *argv, "--resume", "auto", ranks=second, before=before))
    assert len(re.findall("samples of all processes in a batch", output)) == 1
    seen = (tmp_path / "seen").read_text().split()
    assert len(seen) == len(set(seen))
    images = {name.rpartition("_")[0] for name in seen}
    assert len(images) > 30


def test_resume_auto_without_checkpoint_starts_new_run(recipe, tmp_path):
    output = finish(run(recipe, tmp_path, 1, "--resume", "auto", "--max_steps", 1))
    assert "There is no checkpoint" in output
    refused = finish(run(recipe, tmp_path, 1, "--resume", tmp_path / "nowhere"), expected=1)
    assert "nowhere' is not a complete checkpoint" in refused


@pytest.mark.parametrize(("split", "num_steps"), [("train", 6), ("train+validation", 7)])
def test_dry_run_estimates_time_and_writes_nothing(recipe, tmp_path, split, num_steps):
    output = finish(run(recipe, tmp_path / "none", 1, "--dry_run", "--train_split", split))
    assert re.search(rf"An epoch of {num_steps} steps takes about [\d.]+ hours", output)
    assert not (tmp_path / "none").exists()


def test_dry_run_of_evaluation_is_refused():
    with pytest.raises(ValueError, match="dry_run rehearses training"):
        TrainingSettings.from_flat(dry_run=True, eval_only=True)


@pytest.mark.slow
def test_tracker_receives_losses_and_images_across_resume(recipe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    finish(run(recipe, tmp_path, 1, "--trackers", "tensorboard", "--num_pictures", 2, "--max_steps", 7))
    finish(run(recipe, tmp_path, 1, "--trackers", "tensorboard", "--num_pictures", 2, "--resume", "auto"))
    events = EventAccumulator(str(next(tmp_path.rglob("events.*")).parent))
    events.Reload()
    steps = [event.step for event in events.Scalars("train/loss")]
    assert steps == list(range(1, LAST_STEP + 1))
    assert "validation/predictions" in " ".join(events.Tags()["images"])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == steps


@pytest.mark.slow
def test_run_refuses_checkpoints_of_another_run(recipe, undisturbed, tmp_path):
    """Neither resume from checkpoints of another run by accident nor overwrite them."""
    shutil.copytree(undisturbed[1], tmp_path / "run")
    older = checkpoints_of(tmp_path / "run")[1]
    before = sorted(path.name for path in older.parent.iterdir())
    for argv in ((), ("--resume", older), ("--resume", checkpoints_of(undisturbed[1])[0])):
        output = finish(run(recipe, tmp_path / "run", 1, *argv), expected=1)
        assert "has checkpoints of another run, or later ones: step_00000012" in output
        assert sorted(path.name for path in older.parent.iterdir()) == before
    output = finish(run(recipe, tmp_path / "other", 1, "--resume", older))
    assert_same(tmp_path / "run", undisturbed[1])
    assert steps_of(tmp_path / "other")[0] == LAST_STEP
