"""Training requires a recipe: command lines without one run the demo or exit before torch is imported."""

import json
import os
import re
import subprocess
import sys

import psutil
import pytest
import yaml

from reftr_cli.__main__ import main as reftr
from tests.helpers.tiny import ROOT
from training_reftr.recipes import list_recipes, with_recipe


DEMO = str(ROOT / "recipes" / "demo.yaml")
SCRIPT = [str(ROOT / "train_reftr.py")]
PROGRAMS = pytest.mark.parametrize("program", [SCRIPT, ["-m", "reftr_cli", "train"]], ids=["script", "reftr"])


def start(*command, cwd):
    """Start Python with these arguments and with stderr redirected to stdout."""
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@PROGRAMS
def test_train_without_arguments_announces_demo(tmp_path, program):
    process = start(*program, cwd=tmp_path)
    line = process.stdout.readline()
    process.kill()
    process.communicate()
    assert line == f"# No recipe is given, so the demo runs: {DEMO}.\n"


def test_print_config_without_arguments_prints_demo(capsys):
    with pytest.raises(SystemExit) as end:
        reftr(["train", "--print_config"])
    assert not end.value.code
    text = capsys.readouterr().out
    assert text.startswith("# No recipe is given, so the demo runs: ")
    demo = yaml.safe_load((ROOT / "recipes" / "demo.yaml").read_text())
    assert yaml.safe_load(text)["model"]["d_model"] == demo["model"]["d_model"] == 64


SETTINGS_WITHOUT_RECIPE = [
    ["--num_epochs", "3"],
    ["--num-epochs=3"],
    ["--init_from", "runs/demo"],
    ["--dataset", "shapes", "--output_dir", "runs/x"],
    ["--resume", "auto"],
    ["--resume", "auto", "--output_dir", "runs/x"],
    ["--dry_run"],
    ["--num_epochs", "3", "recipes/demo.yaml"],
    ["--print_config", "--num_epochs", "3"],
    ["--eval_only"],
    ["--eval_only", "--init_from", "runs/demo"],
    ["--eval_only", "--dataset", "shapes"],
    ["--eval_only", "false", "--dataset", "shapes", "--init_from", "x"],
    ["--eval_only=false", "--dataset", "shapes", "--init_from", "x"],
    ["--eval_only", "--dataset", "shapes", "--init_from", "null"],
]


@pytest.mark.parametrize("argv", SETTINGS_WITHOUT_RECIPE, ids=" ".join)
def test_settings_without_recipe_exit_with_code_2(capsys, argv):
    with pytest.raises(SystemExit) as end:
        with_recipe(argv)
    assert end.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("error: A recipe is required")
    for name in list_recipes():
        assert re.search(rf"[\s,]{re.escape(name)}[\s,]", text)
    assert f"  reftr train demo {argv[0]}" in text


def test_resume_without_recipe_suggests_recipe_of_run(capsys, tmp_path):
    (tmp_path / "recipe.yaml").write_text("dataset: shapes\n")
    with pytest.raises(SystemExit):
        with_recipe(["--resume", "auto", "--output_dir", str(tmp_path)])
    assert f"reftr train {tmp_path / 'recipe.yaml'} --resume auto --output_dir {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        [DEMO],
        [DEMO, "--num_epochs", "3"],
        ["--help"],
        ["--help", "all"],
        ["-h"],
        ["--num_epochs", "3", "--help"],
        ["--eval_only", "--dataset", "shapes", "--init_from", "runs/demo"],
        ["--eval_only", "true", "--dataset=shapes", "--output_dir=runs/demo"],
    ],
    ids=" ".join,
)
def test_with_recipe_keeps_complete_command_lines(argv):
    assert with_recipe(argv) == argv


@PROGRAMS
def test_train_without_recipe_exits_before_importing_torch(tmp_path, program):
    process = start("-X", "importtime", *program, "--num_epochs", "3", cwd=tmp_path)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 2, text
    assert "reftr train demo --num_epochs 3" in text
    imported = set(re.findall(r"\| +([\w.]+)$", text, flags=re.MULTILINE))
    assert "shlex" in imported
    assert not imported & {"torch", "transformers", "numpy"}


def test_with_recipe_prints_only_on_main_rank(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as end:
        with_recipe(["--num_epochs", "3"])
    assert end.value.code == 2
    assert capsys.readouterr().err == ""
    assert with_recipe([]) == ["demo"]
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_accelerate_launch_without_arguments_runs_demo(tmp_path):
    """Run the launch command of the README literally, and end it after its first steps."""
    process = start("-m", "accelerate.commands.launch", "--cpu", *SCRIPT, cwd=tmp_path)
    lines = []
    for line in process.stdout:
        lines.append(line)
        # the record of step 50 is written after its line
        if " step 100 " in line or len(lines) > 1000:
            break
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    process.kill()
    process.communicate()
    spoken = [line for line in lines if "No recipe is given" in line]
    assert len(spoken) == 1
    assert " step 100 " in lines[-1]
    records = [json.loads(line) for line in (tmp_path / "runs" / "reftr" / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["step"] == 50
