"""`reftr`: one entry point for every command, help that fits a screen, errors as sentences, many images at once."""

import json
import subprocess
import sys

import pytest
from PIL import Image

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


@pytest.fixture
def image_folder(tmp_path, shapes):
    folder = tmp_path / "images"
    (folder / "inner").mkdir(parents=True)
    for index, name in enumerate(("a.png", "b.jpg", "inner/c.PNG")):
        shapes["test"][index]["image"].save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


def predict(trained, image, *argv):
    """Return the argv of a command that asks the trained model."""
    return [str(argument) for argument in ("predict", "--model", trained[0], "--image", image, *argv)]


def test_predict_answers_folder_of_images(capsys, trained, image_folder, tmp_path):
    main(predict(trained, image_folder, "--text", "the star", "the circle", "--output", tmp_path / "answers"))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = ("a.png", "b.jpg", "inner/c.PNG")
    assert [line["image"] for line in lines] == [str(image_folder / name) for name in names]
    assert [[answer["phrase"] for answer in line["answers"]] for line in lines] == [["the star", "the circle"]] * 3
    main(predict(trained, image_folder / "b.jpg", "--text", "the star"))
    one = json.loads(capsys.readouterr().out)
    assert one[0]["box"] == pytest.approx(lines[1]["answers"][0]["box"], abs=0.02)
    drawn = sorted((tmp_path / "answers").iterdir())
    assert [path.name for path in drawn] == ["00001_a.png", "00002_b.png", "00003_c.png"]
    for path in drawn:
        with Image.open(path) as image:
            assert image.width == 320


def test_predict_answers_file_of_questions_despite_bad_ones(capsys, trained, image_folder, tmp_path):
    """A broken image or question is named in its line, and the others are answered."""
    (image_folder / "broken.png").write_text("not an image")
    questions = [
        {"image": "a.png", "text": "the star"},
        {"image": "broken.png", "text": "the star"},
        {"image": "inner/c.PNG", "text": "the circle and the star", "phrases": ["the circle", "the star"]},
        {"image": "b.jpg", "text": ["the star", "ein Würfel ☕"]},
        {"image": "b.jpg"},
    ]
    path = image_folder / "questions.jsonl"
    path.write_text("\n".join(json.dumps(question) for question in questions) + "\n\n")
    error = error_of(*predict(trained, path, "--output", tmp_path / "answers"))
    assert "2 of 5 questions failed" in error
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [[answer["phrase"] for answer in line.get("answers", [])] for line in lines] == [
        ["the star"],
        [],
        ["the circle", "the star"],
        ["the star", "ein Würfel ☕"],
        [],
    ]
    assert "broken.png" in lines[1]["error"]
    assert "'image' and a 'text'" in lines[4]["error"]
    assert len(list((tmp_path / "answers").iterdir())) == 3
    path.write_text('{"image": "a.png", "text": "the star"}\n{"picture": 1}\n')
    assert "line 2: 'image'" in error_of(*predict(trained, path))
    assert capsys.readouterr().out == ""
    assert "have their own texts" in error_of(*predict(trained, path, "--text", "the star"))


def test_predict_locates_phrases_of_caption(capsys, trained, image_folder):
    caption = ("--text", "the red circle is left of the star", "--phrases", "the star", "the red circle")
    main(predict(trained, image_folder / "a.png", *caption))
    answers = json.loads(capsys.readouterr().out)
    assert [answer["phrase"] for answer in answers] == ["the star", "the red circle"]
    image = image_folder / "a.png"
    assert "--phrases requires one image" in error_of(*predict(trained, image, "--text", "a", "b", "--phrases", "a"))
    assert "An expression to locate is required" in error_of(*predict(trained, image))
