"""The command that resumes a run, the main rank, and the memory of a process."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from tests.helpers.tiny import ROOT
from training_reftr.launch import is_main_rank, reftr_command, resume_command, without_resume
from training_reftr.tracking import memory_in_use


@pytest.mark.parametrize(
    ("argv", "kept"),
    [
        (["a.yaml", "--resume", "auto", "--seed", "1"], ["a.yaml", "--seed", "1"]),
        (["--resume=auto", "a.yaml"], ["a.yaml"]),
        (["a.yaml", "--resume", "--seed", "1"], ["a.yaml", "--seed", "1"]),
        (["a.yaml", "--resume"], ["a.yaml"]),
        (["a.yaml", "--resume", "one", "--resume", "two", "b.yaml"], ["a.yaml", "b.yaml"]),
        (["--resume_what", "x"], ["--resume_what", "x"]),
    ],
)
def test_resume_command_replaces_resume_by_auto(argv, kept):
    assert without_resume(argv) == kept
    assert resume_command(argv).endswith(" ".join(["train_reftr.py", *kept, "--resume auto"]))


def test_is_main_rank_prefers_global_over_local_rank(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert is_main_rank()
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("RANK", "2")
    assert not is_main_rank()
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "0")
    assert is_main_rank()


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="only Linux has /proc/self/cmdline")
@pytest.mark.parametrize("name", ["torchrun", "another"])
def test_resume_command_repeats_launcher(tmp_path, name):
    """Quote arguments with spaces, and ignore a parent process that is not a launcher."""
    launcher, script = tmp_path / name, tmp_path / "train.py"
    launcher.write_text("import subprocess, sys; subprocess.run([sys.executable, *sys.argv[3:]], check=True)")
    script.write_text(
        f"import sys; sys.path.append({str(ROOT)!r}); from training_reftr.launch import resume_command;"
        "print(resume_command(sys.argv[1:]))"
    )
    argv = ["--nproc_per_node", "2", str(script), "my recipe.yaml", "--seed", "1"]
    command = [sys.executable, str(launcher), *argv]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()
    start = f"torchrun --nproc_per_node 2 {script}" if name == "torchrun" else f"{sys.executable} {script}"
    assert printed == f"{start} 'my recipe.yaml' --seed 1 --resume auto"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux has /proc/self/statm")
def test_memory_in_use_matches_resident_memory():
    expected = psutil.Process().memory_info().rss / 2**30
    assert memory_in_use(torch.device("cpu")) == pytest.approx(expected, rel=0.1)


def test_reftr_command_is_shortest_that_runs_in_same_environment(tmp_path, monkeypatch):
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", "/nowhere")
    assert reftr_command() == [str(folder / "python"), "-m", "reftr_cli"]
    (folder / "reftr").touch(mode=0o755)
    assert reftr_command() == [str(folder / "reftr")]
    monkeypatch.chdir(tmp_path)
    assert reftr_command() == [".venv/bin/reftr"]
    monkeypatch.setenv("PATH", str(folder))
    assert reftr_command() == ["reftr"]
