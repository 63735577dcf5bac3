"""How this process was started, and which commands follow. Nothing here is a collective, or imports torch."""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path


LAUNCHERS = ("accelerate", "torchrun", "torch.distributed.run", "torch.distributed.launch")


def is_main_rank() -> bool:
    """Return whether this is the main rank, also before the process group exists."""
    return os.environ.get("RANK", "0") == "0"


def is_alone_by_mistake(num_processes: int, environment: Mapping[str, str]) -> bool:
    """
    Return whether the variables of a launcher are those of several processes where there is one.

    Args:
        num_processes (`int`): how many there are.
        environment (`Mapping`): variables of this process.

    Example:

    ```python
    >>> from training_reftr.launch import is_alone_by_mistake

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
    for argument in argv:
        if is_value and not argument.startswith("--"):
            is_value = False
            continue
        is_value = argument == "--resume"
        if not is_value and not argument.startswith("--resume="):
            kept.append(argument)
    return kept


def command_before(argv: list[str]) -> list[str]:
    """Return the part of the command in front of the arguments, as it was typed."""
    command = sys.orig_argv
    if command[len(command) - len(argv) :] != list(argv) or "-c" in command[:2]:
        return ["python", "train_reftr.py"]
    try:
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")[:-1]
    except (OSError, UnicodeDecodeError):  # only Linux has this file, and it hides other users' processes
        parent = []
    # a launcher's command ends with the script and the settings that it was given
    script = command[-len(argv) - 1 :] if argv else command[-1:]
    if any(Path(argument).name in LAUNCHERS for argument in parent[:3]) and parent[-len(script) :] == script:
        command = parent
    start = command[: len(command) - len(argv)]
    # console scripts are shown by their names: /usr/bin/python /usr/bin/reftr train -> reftr train
    if len(start) > 1 and Path(start[1]).name in ("reftr", *LAUNCHERS) and Path(start[0]).name.startswith("python"):
        return [Path(start[1]).name, *start[2:]]
    return start


def reftr_command() -> list[str]:
    """Return the shortest beginning of a `reftr` command that runs in the environment of this process."""
    script = Path(sys.executable).with_name("reftr")
    if not script.is_file():
        return [sys.executable, "-m", "reftr_cli"]
    found = shutil.which("reftr")
    if found is not None and Path(found) == script:
        return ["reftr"]
    return [os.path.relpath(script) if script.is_relative_to(Path.cwd()) else str(script)]
