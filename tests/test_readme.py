"""What the README shows is what there is: its Python runs, its figures are the committed ones, its files exist."""

import os
import re
import shlex
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image

from benchmarks.quote_results import quote
from conftest import ROOT
from modeling_reftr import RefTRForVisualGrounding
from training_reftr.arguments import parse_arguments


README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_figures_are_the_committed_results():
    assert "| all expressions |" in README
    assert quote(README) == README


def test_python_runs(trained, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained[0], tmp_path / "runs" / "demo")
    # as the demo's, with masks
    RefTRForVisualGrounding.from_pretrained(trained[0], predict_masks=True).save_pretrained(tmp_path / "runs" / "demo")
    os.symlink(ROOT / "metrics", tmp_path / "metrics")
    Image.fromarray(np.full((90, 150, 3), 99, np.uint8)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    code = blocks("python")
    assert len(code) == 5
    names = {}
    for block in code:
        exec(block, names)
    printed = capsys.readouterr().out
    assert "'boxes': tensor(" in printed
    assert "'score': 1.0, 'label': 'the red circle'" in printed
    assert "torch.Size([1, 90, 150])" in printed
    assert "\n0.8\n" in printed
    assert names["inputs"]["phrase_spans"].shape == (1, 2, 2)


def test_commands_name_what_there_is():
    commands = [line for block in blocks("bash") for line in block.replace("\\\n", "").splitlines()]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for command in commands:
        if command.startswith("make "):
            assert command.split()[1] in targets, command
        if "train_reftr.py" in command:
            words = shlex.split(command.split("train_reftr.py")[1])
            parse_arguments([str(ROOT / words[0]), *words[1:]])
    assert len(commands) >= 6


def test_links_and_pictures_exist():
    paths = [path for path in re.findall(r"\]\(([^)]+)\)", README) if "://" not in path]
    assert paths
    for path in paths:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "recipes").glob("*.yaml")))
def test_recipes_are_read(recipe):
    settings = yaml.safe_load((ROOT / "recipes" / recipe).read_text())
    assert parse_arguments([str(ROOT / "recipes" / recipe)]).dataset == settings["dataset"]
