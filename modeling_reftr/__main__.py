"""
`reftr`, all commands as one; `python -m modeling_reftr` is the same.

    reftr predict --model runs/demo --image photo.jpg --text "the red circle"
"""

import importlib
import sys

from .escaping import for_terminal


# command -> (module, whose `main` takes the words after the command; what it does)
COMMANDS = {
    "predict": ("modeling_reftr.predict", "answer words about pictures with boxes and masks"),
    "train": ("train_reftr", "train or evaluate by a recipe; `accelerate launch train_reftr.py` for many GPUs"),
    "data": ("data_scripts.__main__", "list, build, check, preview and export data sets"),
    "convert": ("modeling_reftr.convert_reftr_checkpoint", "published checkpoints to folders, and back"),
    "export": ("modeling_reftr.export", "a model as one graph, for ONNX Runtime or torch.export"),
    "push": ("modeling_reftr.push", "a model with its card, and a Space, to the Hub"),
    "demo": ("modeling_reftr.demo", "a page in the browser to ask a model"),
}
HELP = "\n".join(
    [
        "usage: reftr COMMAND ...",
        "",
        *(f"  {name:<9} {text}" for name, (_, text) in COMMANDS.items()),
        "",
        "`reftr COMMAND --help` says more of each.",
    ]
)


def main(argv: list[str] | None = None) -> int:
    """
    Run a command.

    Returns:
        `int`: its exit code.
    """
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(f"{HELP}\n")
        return 0
    if words[0] == "--version":
        from modeling_reftr import __version__  # here, because it takes a second

        sys.stdout.write(f"{__version__}\n")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        sys.exit(f"error: There is no command {name!r}; there are: {', '.join(COMMANDS)}.")
    if name == "train":  # before torch is imported, which takes seconds
        rest = importlib.import_module("training_reftr.recipe_choice").with_recipe(rest)
    try:
        return importlib.import_module(COMMANDS[name][0]).main(rest) or 0
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        sys.exit(for_terminal(f"error: {error}"))
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
