"""
Recipes: YAML files of settings that inherit from each other. Nothing here is a collective, and nothing imports torch.
"""

import difflib
import itertools
import re
import shlex
import sys
import textwrap
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path

import yaml

from data_scripts.escaping import for_terminal
from data_scripts.quoting import quote
from data_scripts.reading import read_text
from data_scripts.yaml_values import MAX_YAML_CHARACTERS, read_yaml
from training_reftr.launch import is_main_rank
from training_reftr.run_folder import RunFolder
from training_reftr.settings import FIELDS, TrainingSettings, check_names


PACKAGE = Path(__file__).resolve().parent
DEMO = "demo"  # the recipe that runs without arguments
# a folder of recipes was part of their names before
FORMER_NAME = re.compile(r"(flickr30k|refcoco\+|refcocog|refcoco|referit|shapes|visual_genome)_(.+)")
EXIT_CODE = 2  # of an invalid command line, as in argparse


def resource_folder(name: str) -> Path:
    """
    Return the folder of the recipes ("recipes") or of the Space ("demo").

    An installed copy has it inside this package, a checkout next to it.

    Raises:
        OSError: if neither is there.
    """
    for folder in (PACKAGE / name, PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise OSError(f"{str(PACKAGE / name)!r} is missing: the installation is incomplete, install the package again.")


def find_recipe(name: str) -> Path:
    """
    Return the file of a recipe.

    Args:
        name (`str`): a path, or the name of an installed recipe, such as "refcoco/r50_boxes".

    Raises:
        OSError: if there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    folder = resource_folder("recipes")
    inside = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else name
    installed = inside.removeprefix("recipes/").removesuffix(".yaml")
    former = FORMER_NAME.fullmatch(installed)
    for candidate in (installed, former and f"{former[1]}/{former[2]}"):
        if candidate in list_recipes():
            if candidate != installed:
                warnings.warn(
                    f"The recipe {name!r} is now called {candidate!r}; the former name will be removed.",
                    FutureWarning,
                    stacklevel=2,
                )
            return folder / f"{candidate}.yaml"
    nearest = difflib.get_close_matches(installed[:80], list_recipes(), n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise OSError(f"{quote(name)} is neither a file nor one of the recipes {', '.join(list_recipes())}.{hint}")


def list_recipes() -> list[str]:
    """Return the names of the installed recipes, without those that are only inherited."""
    folder = resource_folder("recipes")
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in sorted(folder.rglob("*.yaml"))]
    return [name for name in names if not name.startswith(("common/", "accelerate/"))]


def with_recipe(argv: list[str]) -> list[str]:
    """
    Return the arguments of a run, with the demo's recipe if there are none.

    Settings without a recipe would train the default model of 152 million parameters on the demo's dataset. They end
    the process with exit code 2, a list of recipes and an example. `--help` requires no recipe, and neither does an
    evaluation that names its model and dataset: `--eval_only` with `--dataset`, and `--init_from` or `--output_dir`.
    Resuming requires the recipe that the run was started with.

    Raises:
        SystemExit: with code 2, if settings are given without a recipe.
    """
    values = values_of(argv)
    if "-h" in argv or "help" in values or (argv and not argv[0].startswith("-")) or is_evaluation(values):
        return argv
    if values.keys() <= {"print_config"}:
        if is_main_rank():
            # a YAML comment, as --print_config writes YAML
            sys.stdout.write(f"# No recipe is given, so the demo runs: {shorten(find_recipe(DEMO))}.\n")
            sys.stdout.flush()
        return [DEMO, *argv]
    if is_main_rank():
        sys.stderr.write(for_terminal(describe_missing_recipe(argv, values)))
    sys.exit(EXIT_CODE)


def values_of(argv: list[str]) -> dict[str, str]:
    """Return name -> text of the settings on a command line; "true" where a name stands alone."""
    values = {}
    for argument, following in itertools.zip_longest(argv, argv[1:], fillvalue="--"):
        if argument.startswith("--"):
            name, given, value = argument[2:].partition("=")
            values[name.replace("-", "_")] = value if given else "true" if following.startswith("--") else following
    return values


def is_evaluation(values: dict[str, str]) -> bool:
    """Return whether the settings are complete for an evaluation."""
    given = {name for name, value in values.items() if value not in ("false", "null")}
    return {"eval_only", "dataset"} <= given and bool({"init_from", "output_dir"} & given)


def describe_missing_recipe(argv: list[str], values: dict[str, str]) -> str:
    """Return the error, the list of recipes, and an example that keeps the given settings."""
    names = ", ".join(list_recipes())
    recipes = textwrap.fill(names, width=100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    of_the_run = RunFolder(Path(values.get("output_dir", ""))).recipe
    example = shorten(of_the_run) if of_the_run.is_file() else DEMO
    return (
        "error: A recipe is required, which says what to train on which dataset. Recipes come first, settings change "
        f"them.\n\nrecipes:\n{recipes}\n\nexample:\n  reftr train {shlex.join([example, *argv])}\n"
    )


def shorten(path: Path) -> str:
    """Return a path relative to the current folder, where it lies below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def read_recipe(path: Path, heirs: tuple[Path, ...] = ()) -> dict[Path, dict]:
    """
    Read the settings of a recipe and of the recipes that it inherits.

    Args:
        path (`Path`): the recipe. Its `inherit` is a path relative to its own folder, the name of an installed
            recipe, or a list of them.
        heirs (`tuple[Path, ...]`): the recipes that inherit this one, outermost first.

    Returns:
        `dict[Path, dict]`: settings by file, in the order in which they are merged: inherited recipes first, the
        recipe itself last. A file that is inherited twice counts where it comes first.

    Raises:
        OSError: if the file does not exist.
        ValueError: if it is not a mapping, has an unknown field, or inherits itself.
    """
    path = path.resolve()
    if not path.is_file():
        raise OSError(f"The recipe {str(path)!r}{f', which {heirs[-1]} inherits,' if heirs else ''} does not exist.")
    if path in heirs:
        raise ValueError(f"The recipe inherits itself: {' -> '.join(map(str, (*heirs, path)))}.")
    if path.stat().st_size > MAX_YAML_CHARACTERS:
        raise ValueError(f"The recipe {str(path)!r} has {path.stat().st_size:,} bytes, too many for one.")
    values = read_yaml(read_text(path), f"The recipe {str(path)!r}") or {}
    if not isinstance(values, dict):
        raise ValueError(f"The recipe {str(path)!r} must be a mapping of fields to values.")
    parents = values.pop("inherit", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ValueError(f"inherit={quote(parents)} in the recipe {str(path)!r} must be a path or a list of paths.")
    check_names(values, {*FIELDS, "inherit"}, f"The recipe {str(path)!r}")
    layers = {}
    for parent in parents:
        layers |= {
            file: layer
            for file, layer in read_recipe(find_parent(path.parent, parent), (*heirs, path)).items()
            if file not in layers
        }
    return {**layers, path: values}


def find_parent(folder: Path, name: str) -> Path:
    """Return the file of an inherited recipe: a path relative to the heir's folder, or an installed recipe's name."""
    return folder / name if name.endswith(".yaml") or name not in list_recipes() else find_recipe(name)


def to_recipe(settings: TrainingSettings, without: Collection[str] = (), comments: Iterable[str] = ()) -> str:
    """
    Return the settings as a recipe.

    Args:
        settings ([`TrainingSettings`]): the settings.
        without (`Collection[str]`, *optional*): names of settings to leave out.
        comments (`Iterable[str]`, *optional*): lines to write above them as comments.
    """
    values = {name: value for name, value in settings.to_flat().items() if name not in without}
    lines = "".join(f"# {for_terminal(' '.join(comment.split()))}\n" for comment in comments)
    return lines + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
