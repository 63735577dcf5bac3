"""Shared fixtures: the shapes dataset, its tokenizer and processor, a tiny model, and a trained run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import data_scripts
from modeling_reftr import RefTRConfig, RefTRForVisualGrounding, RefTRImageProcessor, RefTRProcessor
from tests.helpers.processes import ENVIRONMENT, run_process
from tests.helpers.tiny import ROOT, TINY_MODEL, TINY_SET, TINY_TEXT
from training_reftr.tokenizer_training import all_sentences, train_tokenizer


# scorecard row -> its counts of passed and of all trials, from the tests that are marked with it
ROWS = {}


def pytest_addoption(parser):
    parser.addoption(
        "--scorecard", metavar="FILE", help="run every trial of the marked tests, and write the counts to this file"
    )


def pytest_configure(config):
    if config.getoption("--scorecard"):
        os.environ["SCORECARD"] = config.getoption("--scorecard")  # xdist workers collect tests themselves


def pytest_collection_modifyitems(config, items):
    if config.getoption("--scorecard"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("row") is None])
        items[:] = [item for item in items if item.get_closest_marker("row") is not None]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    marker = item.get_closest_marker("row")
    if marker is not None and (report.when == "call" or report.failed):
        report.user_properties.append(("row", marker.args[0]))
    return report


def pytest_runtest_logreport(report):
    row = dict(report.user_properties).get("row")
    if row is not None and (report.when == "call" or report.failed):
        passed, of = dict(report.user_properties).get("counted", (int(report.passed), 1))
        counts = ROWS.setdefault(row, {"passed": 0, "of": 0})
        counts["passed"] += passed
        counts["of"] += of


def pytest_sessionfinish(session):
    path = session.config.getoption("--scorecard")
    if path and not hasattr(session.config, "workerinput"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        rows = dict(sorted(ROWS.items(), key=lambda item: (item[0][0], int(item[0][1:]))))
        Path(path).write_text(json.dumps(rows, indent=2) + "\n")


def pytest_terminal_summary(terminalreporter):
    if terminalreporter.config.getoption("--scorecard"):
        for row, counts in sorted(ROWS.items(), key=lambda item: (item[0][0], int(item[0][1:]))):
            terminalreporter.write_line(f"{row:<5}{counts['passed']:>6} of {counts['of']}")


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def shapes(data_cache):
    return data_scripts.load("shapes", cache_dir=data_cache, **TINY_SET)


@pytest.fixture(scope="session")
def tokenizer(shapes):
    return train_tokenizer(all_sentences(shapes["train"]), max_length=64)


@pytest.fixture
def processor(tokenizer):
    return RefTRProcessor(RefTRImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}), tokenizer)


@pytest.fixture
def make_model(tokenizer):
    """Return a function that builds a tiny model in eval mode; overrides are fields of its config."""

    def make(**overrides):
        torch.manual_seed(0)
        text_config = {**TINY_TEXT, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        config = RefTRConfig(**{**TINY_MODEL, "text_config": text_config, **overrides})
        model = RefTRForVisualGrounding(config).eval()
        # the last box layer of a new model is zero; random weights make the answers of inputs differ
        torch.nn.init.normal_(model.box_head.layers[-1].weight, std=0.5)
        return model

    return make


@pytest.fixture
def run():
    """Return a function that runs a command like a user: in a separate process, in the checkout, with one thread."""

    def run_command(*command, cwd=ROOT, timeout=300, check=True, **environment):
        argv = [str(argument) for argument in command]
        if environment or argv[0] == "-c" or argv[:2] == ["-m", "torch.distributed.run"]:
            result = subprocess.run(
                [sys.executable, *argv],
                cwd=cwd,
                env={**os.environ, **ENVIRONMENT, **environment},
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        else:
            result = run_process(argv, cwd, timeout)
        if check and result.returncode:
            raise RuntimeError(f"{command} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}")
        return result

    return run_command


@pytest.fixture(scope="session")
def recipe(tmp_path_factory, data_cache):
    """Write a recipe that trains a tiny model within seconds."""
    folder = tmp_path_factory.mktemp("recipe")
    settings = {
        "dataset": "shapes",
        "dataset_config": TINY_SET,
        "data_cache_dir": data_cache,
        "image_size": 64,
        "model": {**TINY_MODEL, "text_config": {**TINY_TEXT}},
        "expressions_per_image": 7,
        "num_epochs": 2,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "backbone_learning_rate": 1e-3,
        "text_learning_rate": 1e-3,
        "num_workers": 0,
        "log_every": 1,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="session")
def trained(recipe, shapes, tmp_path_factory):
    """Run the training script, and return its output folder and its result."""
    output = tmp_path_factory.mktemp("run")
    result = subprocess.run(
        [sys.executable, "train_reftr.py", str(recipe), "--output_dir", str(output)],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=300,
        umask=0o027,  # an unusual one, see tests/training_reftr/test_permissions.py
    )
    assert result.returncode == 0, result.stderr
    return output, result
