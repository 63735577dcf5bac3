"""Run commands under their former names."""

import runpy
import sys
import warnings


def run_renamed(former: str, *command: str) -> None:
    """
    Run `reftr` in place of a module that was a command, with a warning.

    Args:
        former (`str`): the former command, such as "python -m data_scripts".
        command (`str`): the arguments of `reftr` that take its place. The package is named rather than imported,
            because it stands above the caller.
    """
    instead = " ".join(("reftr", *command))
    warnings.warn(f"`{former}` is deprecated and will be removed: use `{instead}`.", FutureWarning, stacklevel=2)
    sys.argv[1:1] = command
    runpy.run_module("reftr_cli", run_name="__main__", alter_sys=True)
