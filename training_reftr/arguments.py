"""
Settings from the command line: recipes, overridden by `--field value`. Nothing here is a collective, and nothing
imports torch unless the settings describe a model.
"""

import sys
import textwrap
from types import UnionType
from typing import Any, get_args

from data_scripts.quoting import quote
from data_scripts.reading import check_text
from data_scripts.yaml_values import read_yaml
from training_reftr.recipes import find_recipe, read_recipe, to_recipe
from training_reftr.settings import FIELDS, InitializationSettings, TrainingSettings, check_names, default_of


def read_argv(argv: list[str]) -> dict[str, Any]:
    """
    Read settings from command-line arguments.

    Args:
        argv (`list[str]`): `--name value`, `--name=value`, `--name` for true, or `--model.decoder_layers 3` for a key
            of a mapping. The value `null` resets a setting.

    Raises:
        ValueError: if a field does not exist, has no value, or is not a mapping with keys.
    """
    settings = {}
    argv = list(argv)
    while argv:
        argument = argv.pop(0)
        if not argument.startswith("--"):
            raise ValueError(f"{quote(argument)} is not a setting; recipes come first, then --field value ...")
        name, given, value = argument[2:].partition("=")
        if name.count(".") > MAX_DEPTH:
            raise ValueError(
                f"{quote(argument)} names a key inside more than {MAX_DEPTH} mappings; settings are not nested so "
                "deeply."
            )
        name, *keys = name.split(".")
        name = name.replace("-", "_")
        check_names([name], TYPES, "The command line")
        if keys and TYPES[name] is not dict:
            raise ValueError(f"{argument[:100]}: {name!r} has no keys; only {', '.join(MAPPINGS)} are mappings.")
        if not given:
            if argv and not argv[0].startswith("--"):
                value = argv.pop(0)
            elif TYPES[name] is bool:
                value = "true"
            else:
                raise ValueError(f"{argument[:100]} requires a value.")
        check_text(value, f"--{name}")
        if value == "null":
            value = None
        elif TYPES[name] in (dict, list[int]):
            value = read_yaml(value, f"{argument.split('=')[0][:100]} {quote(value)}")
        for key in reversed(keys):
            value = {key: value}
        settings[name] = merge(settings.get(name), value)
    return settings


def merge(base: Any, changes: Any) -> Any:
    """Merge mappings key by key, at any depth; any other value of `changes` replaces that of `base`."""
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    return base | {name: merge(base.get(name), value) for name, value in changes.items()}


def merge_settings(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """
    Merge settings with changes that take precedence.

    Changes also drop settings of `base` that they make obsolete: starting weights that contradict theirs, so that
    `--init_from` does not have to reset the recipe's `init_detr`; the flags of another dataset; and, if another model
    is evaluated, the fields of the one that the recipe trains.
    """
    dropped = set()
    for name, others in InitializationSettings.EXCLUDED.items():
        if changes.get(name) is not None:
            dropped.update(others)
        if any(changes.get(other) is not None for other in others):
            dropped.add(name)
    dropped -= changes.keys()
    if changes.get("dataset", base.get("dataset")) != base.get("dataset"):
        dropped.add("dataset_config")
    if changes.get("init_from") is not None and is_true(changes.get("eval_only", base.get("eval_only"))):
        dropped.update(("model", "tokenizer"))
    return merge({name: value for name, value in base.items() if name not in dropped}, changes)


def is_true(value: Any) -> bool:
    """Return whether a value, or its text, is true."""
    return value is True or (isinstance(value, str) and value.lower() == "true")


def to_type(name: str, value: Any) -> Any:
    """
    Convert a setting to the type of its field: numbers may be given as text, and one number for a list of one.

    Raises:
        ValueError: if it has another type.
    """
    kind = TYPES[name]
    if kind == list[int] and type(value) is int:
        return [value]
    if kind is bool and (isinstance(value, bool) or (isinstance(value, str) and value.lower() in ("true", "false"))):
        return is_true(value)
    if kind is dict and isinstance(value, dict):
        return value
    if kind == list[int] and isinstance(value, list) and all(type(item) is int for item in value):
        return value
    if kind in (str, int, float) and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        try:
            return kind(str(value))
        except ValueError:
            pass  # refused below
    raise ValueError(f"{name}={quote(value)} must be {TYPE_NAMES[kind]}.")


def parse_arguments(argv: list[str]) -> TrainingSettings:
    """
    Parse `[RECIPE ...] [--field value ...]`.

    The command line takes precedence over recipes, later recipes over earlier ones, and a recipe over those that it
    inherits. `--print_config` prints the resulting settings as a recipe and exits; `--help` describes them.

    Raises:
        OSError: if a recipe does not exist.
        ValueError: if a recipe is not a mapping, a field does not exist, or a value is invalid.
        SystemExit: after `--help` and `--print_config`.
    """
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(describe_settings([argument.lstrip("-").replace("-", "_") for argument in argv]))
        sys.exit()
    rest = [argument for argument in argv if argument != "--print_config"]
    values = {}
    while rest and not rest[0].startswith("-"):
        for layer in read_recipe(find_recipe(rest.pop(0))).values():
            values = merge_settings(values, layer)
    given = read_argv(rest)
    values = merge_settings(values, given)
    settings = TrainingSettings.from_flat(
        **{name: to_type(name, value) for name, value in values.items() if value is not None}
    )
    if settings.evaluation.eval_only:
        refuse_initialization(settings, given)
    if "--print_config" in argv:
        sys.stdout.write(to_recipe(settings))
        sys.exit()
    return settings


def refuse_initialization(settings: TrainingSettings, given: dict[str, Any]) -> None:
    """
    Refuse initialization settings on the command line of an evaluation, which would ignore them.

    In a recipe they say how the model was trained.

    Raises:
        ValueError: naming the first.
    """
    for name in ("init_detr", "init_backbone", "init_text", "resume"):
        if given.get(name) not in (None, "auto"):  # a script may ask for --resume auto whatever it starts
            raise ValueError(
                f"{name}={quote(given[name])} initializes training, and eval_only does not train: name the model to "
                "evaluate in init_from, or remove both to evaluate the one in output_dir."
            )
    if given.get("tokenizer") is not None and settings.initialization.init_from is None:
        raise ValueError(
            f"tokenizer={quote(given['tokenizer'])} has no effect on the model in "
            f"output_dir={settings.checkpoints.output_dir!r}, which has its own: remove tokenizer."
        )


def describe_settings(names: list[str]) -> str:
    """Return the text of `--help`: the names of all settings, or a description of those that are named."""
    chosen = [name for name in FIELDS if name in names or "all" in names]
    if not chosen:
        listed = textwrap.fill(", ".join(FIELDS), width=100, initial_indent="  ", subsequent_indent="  ")
        return HELP.format(settings=listed)
    described = []
    for name in chosen:
        default, text = default_of(name), FIELDS[name].metadata["help"]
        described.append(f"{name} = {'none' if default is None else default}")
        described.append(textwrap.fill(text, 100, initial_indent="    ", subsequent_indent="    "))
    return "\n".join(described) + "\n"


HELP = """usage: reftr train [RECIPE ...] [--setting value ...]
       accelerate launch train_reftr.py [RECIPE ...] [--setting value ...]

Train RefTR and report on it, or with --eval_only only report. A recipe is a YAML file of settings, or the name of an
installed one. Later recipes take precedence over earlier ones, and the command line over recipes:
--learning_rate 1e-4, --model.decoder_layers 3, --eval_only. Without arguments the demo runs; settings require a
recipe, except for
--eval_only --init_from MODEL --dataset NAME.

  reftr train demo --output_dir runs/demo
  reftr train demo --output_dir runs/demo --resume auto
  reftr train demo --output_dir runs/demo --eval_only
  reftr train refcoco/r50_boxes --print_config      print the resulting settings as a recipe
  reftr train --help learning_rate batch_size       describe settings and their defaults; all of them: --help all

settings:
{settings}
"""

TYPES = {
    # int | None -> int
    name: get_args(item.type)[0] if isinstance(item.type, UnionType) else item.type
    for name, item in FIELDS.items()
}
TYPE_NAMES = {
    str: "text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    dict: "a mapping of names to values",
    list[int]: "a list of integers",
}
MAX_DEPTH = 10  # of mappings that the name of a setting goes into
MAPPINGS = [name for name, kind in TYPES.items() if kind is dict]
