"""
Whether a command line of the training script names a recipe, decided before torch is imported, which takes seconds.
Nothing here holds a collective.
"""

import itertools
import os
import shlex
import sys
import textwrap
from pathlib import Path

from modeling_reftr.escaping import for_terminal


FOLDER = Path(__file__).resolve().parents[1] / "recipes"
DEMO = FOLDER / "demo.yaml"
EXIT_CODE = 2  # of a wrong command line, as argparse has it


def with_recipe(argv: list[str]) -> list[str]:
    """
    Return the arguments of a run, which name a recipe: those given, or the demo's recipe where there are none.

    Without a recipe, settings alone would train the default model, of 152 million parameters, on the shapes that the
    demo draws. So they end the process with exit code 2, the list of recipes and an example on stderr. `--help` needs
    no recipe, and neither does an evaluation that says what it evaluates: `--eval_only` with `--dataset`, and
    `--init_from` or `--output_dir`. To resume needs the recipe that the run was started with.

    Raises:
        SystemExit: with code 2, where settings are given and no recipe.
    """
    values = values_of(argv)
    if "-h" in argv or "help" in values or (argv and not argv[0].startswith("-")) or is_evaluation(values):
        return argv
    is_main_process = os.environ.get("RANK", "0") == "0"
    if values.keys() <= {"print_config"} and DEMO.is_file():
        if is_main_process:
            # a comment in YAML, which --print_config writes
            sys.stdout.write(f"# No recipe is named: this is the embedded demo, {shorten(DEMO)}.\n")
            sys.stdout.flush()
        return [str(DEMO), *argv]
    if is_main_process:
        sys.stderr.write(for_terminal(explain(argv, values)))
    sys.exit(EXIT_CODE)


def values_of(argv: list[str]) -> dict[str, str]:
    """Return name -> text of the settings on a command line; "true" where a name stands alone."""
    values = {}
    for word, following in itertools.zip_longest(argv, argv[1:], fillvalue="--"):
        if word.startswith("--"):
            name, given, value = word[2:].partition("=")
            values[name.replace("-", "_")] = value if given else "true" if following.startswith("--") else following
    return values


def is_evaluation(values: dict[str, str]) -> bool:
    """Return whether the settings say all that an evaluation needs."""
    given = {name for name, value in values.items() if value not in ("false", "null")}
    return {"eval_only", "dataset"} <= given and bool({"init_from", "output_dir"} & given)


def explain(argv: list[str], values: dict[str, str]) -> str:
    """Return what is wrong, the recipes that there are, and an example that keeps the settings given."""
    names = ", ".join(path.name for path in sorted(FOLDER.glob("*.yaml")))
    recipes = textwrap.fill(names, width=100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    of_the_run = Path(values.get("output_dir", ""), "recipe.yaml")
    example = next((shorten(path) for path in (of_the_run, DEMO) if path.is_file()), "RECIPE.yaml")
    return (
        "error: No recipe is named, which says what to train on which dataset. Recipes come first, settings change "
        f"them.\n\nin {shorten(FOLDER)}:\n{recipes or '  none: they are part of the checkout of the project'}\n\n"
        f"example:\n  reftr train {shlex.join([example, *argv])}\n"
    )


def shorten(path: Path) -> str:
    """Return a path relative to the current folder, where it lies below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
