"""Deeply nested recipes, arguments and JSON files: every reader raises a short error within seconds."""

import pytest

import data_scripts
import reftr_cli.data as data_command
from data_scripts.reports import read_build_report
from data_scripts.yaml_values import MAX_YAML_CHARACTERS
from modeling_reftr import RefTRConfig
from reftr_cli import predict
from tests.helpers.tiny import ROOT, TINY_MODEL, TINY_TEXT
from tests.modeling_reftr.test_damaged_files import DEPTH
from training_reftr.arguments import parse_arguments
from training_reftr.card import card_files
from training_reftr.checkpoints import STATE, load_state
from training_reftr.json_files import read_json_lines


DEMO = str(ROOT / "recipes" / "demo.yaml")
YAML = {
    "brackets": "[" * 1_000,
    "braces": "{a: " * DEPTH + "1" + "}" * DEPTH,
    "dashes": "- " * DEPTH + "1",
    "question marks": "? " * DEPTH + "1",
    "levels": "".join(f"{' ' * level}a:\n" for level in range(1_000)),
    "an alias of itself": "&a [*a]",
    "a key that is an alias": "&a {*a : 1}",
    "aliases": "[&a0 [1], " + ", ".join(f"&a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)) + "]",
    "merge keys": "a: &a {b: 1}\nc: {<<: *a}",
    "long": "a: " + "x" * MAX_YAML_CHARACTERS,
    "digits": "9" * 5_000,
}
JSON = {
    "brackets": "[" * DEPTH,
    "closed brackets": "[" * DEPTH + "]" * DEPTH,
    "braces": '{"a":' * DEPTH + "1" + "}" * DEPTH,
    "inside": '{"image": ' + "[" * DEPTH + "]" * DEPTH + "}",
    "digits": '{"image": ' + "9" * 5_000 + "}",
}


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize("text", YAML.values(), ids=YAML)
def test_yaml_readers_reject_hostile_text(tmp_path, text):
    recipe = write(tmp_path / "recipe.yaml", text)
    readers = {
        "recipe": lambda: parse_arguments([str(recipe)]),
        "settings of a recipe": lambda: parse_arguments(
            [str(write(tmp_path / "other.yaml", f"dataset_config: {text}" if "\n" not in text else text))]
        ),
        "argument": lambda: parse_arguments([DEMO, "--dataset_config", text]),
        "argument of another kind": lambda: parse_arguments([DEMO, "--num_epochs", text]),
        "flag of a dataset": lambda: data_command.main(["stats", "shapes", "--num_train", text]),
        "card": lambda: card_files(folder),
    }
    folder = tmp_path / "model"
    RefTRConfig(**TINY_MODEL, text_config=TINY_TEXT).save_pretrained(folder)
    write(folder / "recipe.yaml", text)
    for name, read in readers.items():
        with pytest.raises((ValueError, OSError)) as raised:
            read()
        assert 10 < len(str(raised.value)) < 1000, name
    with pytest.raises(ValueError, match=r"recipe\.yaml"):
        parse_arguments([str(recipe)])


def test_recipe_with_20_000_brackets_is_refused(tmp_path):
    recipe = write(tmp_path / "recipe.yaml", "model: " + "[" * DEPTH + "]" * DEPTH)
    with pytest.raises(ValueError, match=r"recipe\.yaml.* is not YAML: its values are nested too deeply"):
        parse_arguments([str(recipe)])


@pytest.mark.parametrize("text", [".".join("a" * DEPTH), "model" + ".a" * DEPTH, "model." + "." * DEPTH])
def test_parse_arguments_rejects_deeply_nested_names(text):
    with pytest.raises(ValueError, match=r".") as raised:
        parse_arguments([DEMO, f"--{text}", "1", f"--{text}", "2"])
    assert len(str(raised.value)) < 1000


def test_parse_arguments_rejects_values_near_recursion_limit():
    for depth in (100, 300, 400, 900):
        with pytest.raises(ValueError, match=r"."):
            parse_arguments([DEMO, "--dataset_config", "[" * depth + "]" * depth])
        with pytest.raises(ValueError, match=r"."):
            parse_arguments([DEMO, "--model", "{a: " * depth + "1" + "}" * depth])


@pytest.mark.parametrize("text", JSON.values(), ids=JSON)
def test_json_readers_reject_hostile_text(tmp_path, text):
    path = write(tmp_path / "file.json", text)
    lines = write(tmp_path / "train.jsonl", text + "\n")
    data = {"data_dir": str(tmp_path), "cache_dir": str(tmp_path / "cache")}
    folder = tmp_path / "model"
    RefTRConfig(**TINY_MODEL, text_config=TINY_TEXT).save_pretrained(folder)
    write(tmp_path / "build_report.json", text)
    write(tmp_path / STATE, text)

    def card(name):
        for other in ("metrics.json", "origin.json", "metrics.jsonl"):
            (folder / other).unlink(missing_ok=True)
        write(folder / name, text)
        return card_files(folder)

    def questions():
        ((_, problem),) = predict.read_questions([str(lines)], None)
        raise ValueError(problem)  # of its line of output

    readers = {
        "questions": (questions, "train.jsonl', line 1"),
        "dataset": (lambda: data_scripts.load("jsonl", **data), "train.jsonl"),
        "configuration": (lambda: RefTRConfig.from_pretrained(path), "cannot be used"),
        "state of a run": (lambda: load_state(tmp_path), STATE),
        "build report": (lambda: read_build_report(tmp_path), "is damaged"),
        "metrics": (lambda: card("metrics.json"), "metrics.json"),
        "origin": (lambda: card("origin.json"), "origin.json"),
    }
    for name, (read, message) in readers.items():
        with pytest.raises((ValueError, OSError)) as raised:
            read()
        assert message in str(raised.value), name
        assert len(str(raised.value)) < 1000, name
    ((number, _, fault),) = read_json_lines(lines)
    assert number == 1
    assert isinstance(fault, ValueError)
    assert card("metrics.jsonl")  # an incomplete line is skipped
