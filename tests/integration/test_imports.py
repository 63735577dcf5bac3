"""Layers of the project: no module imports from a higher layer, and commands start without torch."""

import ast
import subprocess
import sys
import time

import pytest

from reftr_cli.__main__ import COMMANDS
from tests.helpers.tiny import ROOT


# from the lowest layer to the highest; the modules uploaded to the Hub, *_reftr.py, import only siblings
LAYERS = ["data_scripts", "modeling_reftr", "metrics", "training_reftr", "train_reftr", "reftr_cli"]
PRODUCT = [
    path
    for layer in LAYERS
    for path in ([ROOT / f"{layer}.py"] if layer == "train_reftr" else sorted((ROOT / layer).rglob("*.py")))
]
# not uploaded: conversion reads pickles with the restricted reader of data_scripts
FORMER_COMMANDS = {"__main__", "demo", "export", "predict", "push"}
NOT_UPLOADED = {"convert_reftr_checkpoint", "checkpoint_claims", "__init__", *FORMER_COMMANDS}


def layer_of(module: str) -> str:
    return "metrics" if module.startswith("training_reftr.metrics") else module.partition(".")[0]


def imports_of(source: str) -> set[str]:
    """Return the absolute names of all modules that a source imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return found


def upward_imports(module: str, source: str) -> set[str]:
    """Return the imported modules of higher layers."""
    own = LAYERS.index(layer_of(module))
    return {name for name in imports_of(source) if layer_of(name) in LAYERS[own + 1 :]}


def module_of(path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", PRODUCT, ids=module_of)
def test_module_imports_nothing_from_higher_layer(path):
    assert upward_imports(module_of(path), path.read_text()) == set()


def test_upward_imports_finds_imports_inside_functions():
    source = "def load():\n    from modeling_reftr import RefTRConfig\n    import training_reftr.run\n"
    expected = {"modeling_reftr", "modeling_reftr.RefTRConfig", "training_reftr.run"}
    assert upward_imports("data_scripts.loading", source) == expected
    assert upward_imports("training_reftr.metrics.a.a", "import training_reftr.run") == {"training_reftr.run"}


@pytest.mark.parametrize("path", sorted((ROOT / "modeling_reftr").glob("*.py")), ids=module_of)
def test_hub_module_imports_only_siblings(path):
    if path.stem not in NOT_UPLOADED:
        assert {name for name in imports_of(path.read_text()) if layer_of(name) in LAYERS} == set()


@pytest.mark.parametrize("command", [*COMMANDS, ""])
def test_help_is_printed_without_importing_torch(command):
    code = (
        "import sys, time; start = time.process_time()\n"
        "from reftr_cli.__main__ import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'gradio'} & set(sys.modules)\n"
        "sys.exit(f'{heavy} {time.process_time() - start}')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *([command] if command else []), "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    heavy, seconds = result.stderr.splitlines()[-1].rsplit(" ", 1)
    assert heavy == "set()"
    assert float(seconds) < 0.5
    assert "usage: reftr" in result.stdout


def test_wrong_recipe_name_is_refused_before_importing_torch():
    start = time.monotonic()
    result = subprocess.run([sys.executable, "train_reftr.py", "none"], cwd=ROOT, capture_output=True, text=True)
    light = time.monotonic() - start
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch, transformers.models.auto"], cwd=ROOT, check=True)
    assert light < time.monotonic() - start
    assert result.stderr.startswith("error: 'none' is neither a file nor one of the recipes")


# names that independent parts of the project define again, because each works alone; tests compare their results
REPEATED = {
    *("quote", "explain", "_parts", "_array_parts", "check_text", "uncompress_counts", "to_run_lengths"),
    *("PhraseSearcher", "fold_text", "mark_words", "find_whole_words", "find_characters", "find_occurrences"),
    "is_word_character",
    *("mean", "entries", "precisions", "has_lists", "to_box", "to_number", "array_to_counts", "count_pixels"),
}


def definitions_of(path) -> set[str]:
    """Return the names of functions and classes at the top level of a module, without entry points of commands."""
    nodes = ast.parse(path.read_text()).body
    names = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return names - {"main", "make_parser"}


def test_function_name_has_one_meaning():
    modules = {}
    for path in {path.resolve() for path in PRODUCT}:
        for name in definitions_of(path):
            modules.setdefault(name, set()).add(module_of(path))
    repeated = {name: sorted(found) for name, found in modules.items() if len(found) > 1}
    assert {name: found for name, found in repeated.items() if name not in REPEATED} == {}
    assert repeated.keys() == REPEATED
    for name, found in repeated.items():
        layers = [layer_of(module) for module in found]
        assert all(layers.count(layer) == 1 for layer in layers if layer != "metrics"), (name, found)
