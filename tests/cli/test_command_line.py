"""`reftr`: one entry point for every command, help that fits a screen, errors as sentences."""

import subprocess
import sys

import pytest

import modeling_reftr
from reftr_cli.__main__ import COMMANDS, main
from tests.helpers.tiny import ROOT


LINES, COLUMNS = 40, 120  # of a screen


def test_reftr_lists_commands_and_refuses_unknown_one(run):
    text = run("-m", "reftr_cli").stdout
    assert text == run("-m", "reftr_cli", "--help").stdout
    for name in COMMANDS:
        assert f"\n  {name} " in text
    assert run("-m", "reftr_cli", "--version").stdout.strip() == modeling_reftr.__version__
    result = run("-m", "reftr_cli", "predicted", check=False)
    assert result.returncode == 1
    assert "'predicted' is not a command" in result.stderr


@pytest.mark.parametrize(
    ("former", "command", "text"),
    [
        ("data_scripts", "reftr data", "usage: reftr data"),
        ("modeling_reftr", "reftr", "usage: reftr COMMAND"),
        ("modeling_reftr.predict", "reftr predict", "usage: reftr predict"),
        ("modeling_reftr.export", "reftr export", "usage: reftr export"),
        ("modeling_reftr.push", "reftr push", "usage: reftr push"),
        ("modeling_reftr.demo", "reftr demo", "usage: reftr demo"),
        ("modeling_reftr.convert_reftr_checkpoint", "reftr convert", "usage: reftr convert"),
        ("training_reftr.reproduce", "reftr reproduce", "usage: reftr reproduce"),
    ],
)
def test_deprecated_command_runs_with_warning(former, command, text):
    result = subprocess.run([sys.executable, "-m", former, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert text in result.stdout
    assert f"`python -m {former}` is deprecated and will be removed: use `{command}`" in result.stderr


def screen_of(capsys, *argv):
    """Return the output of a command that exits after printing it."""
    with pytest.raises(SystemExit) as end:
        main([*argv])
    assert not end.value.code
    return capsys.readouterr().out


def error_of(*argv):
    """Return the error sentence that a command exits with."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in argv])
    assert str(end.value.code).startswith("error: ")
    return end.value.code


@pytest.mark.parametrize("argv", [*([name] for name in COMMANDS), ["data", "build"], ["data", "export"]], ids="-".join)
def test_command_help_fits_screen(capsys, monkeypatch, argv):
    if argv == ["demo"]:
        pytest.importorskip("gradio")
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    text = screen_of(capsys, *argv, "--help")
    assert f"usage: reftr {' '.join(argv)}" in text
    assert 3 <= len(text.splitlines()) <= LINES
    assert max(map(len, text.splitlines())) <= COLUMNS


def test_train_help_explains_given_or_all_settings(capsys):
    text = screen_of(capsys, "train", "--help", "learning_rate", "--num-epochs")
    assert "learning_rate = 0.0001\n" in text
    assert "num_epochs = 90\n" in text
    assert len(text.splitlines()) == 4
    assert len(screen_of(capsys, "train", "--help", "all").splitlines()) > 100


def test_command_errors_are_sentences_without_traceback(run, tmp_path):
    for argv in (
        ("predict", "--model", tmp_path, "--image", "none.png", "--text", "a cup"),
        ("train", "none.yaml"),
        ("train", "recipes/demo.yaml", "--learning_rates", "1"),
        ("data", "build", "refcoco"),
        ("convert", "--checkpoint", "none.pth", "--output_dir", tmp_path / "out"),
        ("export", "--model", tmp_path, "--output", tmp_path / "out"),
        ("push", "--model", tmp_path),
    ):
        error_of(*argv)
    result = run("-m", "reftr_cli", "push", "--model", tmp_path, check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.stderr
