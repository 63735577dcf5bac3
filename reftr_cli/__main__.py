"""
Run a command of `reftr`; `python -m reftr_cli` does the same.

    reftr predict --model runs/demo --image photo.jpg --text "the red circle"
"""

import importlib
import importlib.metadata
import sys

from data_scripts.escaping import for_terminal


# command -> (module whose `main` takes the arguments after the command, help text)
COMMANDS = {
    "predict": ("reftr_cli.predict", "answer texts about images with boxes and masks"),
    "train": ("reftr_cli.train", "train or evaluate with a recipe; `accelerate launch train_reftr.py` for many GPUs"),
    "data": ("reftr_cli.data", "list, build, check, preview, import and export datasets"),
    "convert": ("reftr_cli.convert", "convert published checkpoints to folders, and back"),
    "reproduce": ("reftr_cli.reproduce", "evaluate a published checkpoint as published"),
    "export": ("reftr_cli.export", "export a model as one graph, for ONNX Runtime or torch.export"),
    "push": ("reftr_cli.push", "push a model with its card, and a Space, to the Hub"),
    "demo": ("reftr_cli.demo", "serve a page that runs a model in the browser"),
}
HELP = "\n".join(
    [
        "usage: reftr COMMAND ...",
        "",
        *(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()),
        "",
        "`reftr COMMAND --help` describes a command.",
    ]
)


def main(argv: list[str] | None = None) -> int:
    """
    Run a command.

    Args:
        argv (`list[str]`, *optional*): the arguments, `sys.argv[1:]` by default.

    Returns:
        `int`: the exit code.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(f"{HELP}\n")
        return 0
    if argv[0] == "--version":
        sys.stdout.write(f"{read_version()}\n")
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        sys.exit(for_terminal(f"error: {name!r} is not a command; use one of {', '.join(COMMANDS)}."))
    try:
        return importlib.import_module(COMMANDS[name][0]).main(rest) or 0
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        sys.exit(for_terminal(f"error: {error}"))
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        return 130


def read_version() -> str:
    """Return the installed version; only a checkout that is not installed imports the model for it."""
    try:
        return importlib.metadata.version("modeling-reftr")
    except importlib.metadata.PackageNotFoundError:
        return importlib.import_module("modeling_reftr").__version__


if __name__ == "__main__":
    sys.exit(main())
