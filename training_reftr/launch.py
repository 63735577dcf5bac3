"""The command that started this process, and the one that resumes it. Nothing here is a collective."""

import os
import shlex
import sys
from pathlib import Path


LAUNCHERS = ("accelerate", "torchrun", "torch.distributed.run", "torch.distributed.launch")


def is_main_rank() -> bool:
    """Return whether this is the main rank, also before the process group exists."""
    return os.environ.get("RANK", "0") == "0"


def resume_command(argv: list[str]) -> str:
    """
    Return the command that continues a run: the one that started it, launcher included, with `--resume auto`.

    Args:
        argv (`list[str]`): arguments of the command line.

    Example:

    ```python
    >>> from training_reftr.launch import resume_command

    >>> resume_command(["my recipe.yaml", "--resume", "runs/a/checkpoints/step_00000010"])
    "python train_reftr.py 'my recipe.yaml' --resume auto"

    ```"""
    return shlex.join([*command_before(argv), *without_resume(argv), "--resume", "auto"])


def without_resume(argv: list[str]) -> list[str]:
    """Return arguments without `--resume` and its value."""
    kept, is_value = [], False
    for word in argv:
        if is_value and not word.startswith("--"):
            is_value = False
            continue
        is_value = word == "--resume"
        if not is_value and not word.startswith("--resume="):
            kept.append(word)
    return kept


def command_before(argv: list[str]) -> list[str]:
    """Return the part of the command in front of the arguments, as it was typed."""
    command = sys.orig_argv
    if command[len(command) - len(argv) :] != list(argv) or "-c" in command[:2]:
        return ["python", "train_reftr.py"]
    try:
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")[:-1]
    except (OSError, UnicodeDecodeError):  # only Linux tells, and not of other users' processes
        parent = []
    # a launcher's command ends with the script and the settings that it was given
    script = command[-len(argv) - 1 :] if argv else command[-1:]
    if any(Path(word).name in LAUNCHERS for word in parent[:3]) and parent[-len(script) :] == script:
        command = parent
    words = command[: len(command) - len(argv)]
    # console scripts are shown by their names: /usr/bin/python /usr/bin/reftr train -> reftr train
    if len(words) > 1 and Path(words[1]).name in ("reftr", *LAUNCHERS) and Path(words[0]).name.startswith("python"):
        return [Path(words[1]).name, *words[2:]]
    return words
