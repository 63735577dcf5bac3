"""`reftr`: every command as one, help that fits a screen, errors as sentences, many pictures in one go."""

import json
import subprocess
import sys

import pytest
from PIL import Image

import modeling_reftr
from reftr_cli.__main__ import COMMANDS, main
from tests.helpers.tiny import ROOT


LINES, COLUMNS = 40, 120  # of a screen


def test_the_commands(run):
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
        ("training_reftr.reproduce", "reftr reproduce", "usage: reftr reproduce"),
    ],
)
def test_former_command_runs_with_a_warning(former, command, text):
    result = subprocess.run([sys.executable, "-m", former, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert text in result.stdout
    assert f"`python -m {former}` is deprecated and will be removed: use `{command}`" in result.stderr


def screen_of(capsys, *words):
    """What a command prints, which ends there."""
    with pytest.raises(SystemExit) as end:
        main([*words])
    assert not end.value.code
    return capsys.readouterr().out


def error_of(*words):
    """The sentence that a command ends with."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    assert str(end.value.code).startswith("error: ")
    return end.value.code


@pytest.mark.parametrize(
    "words", [*([name] for name in COMMANDS), ["data", "build"], ["data", "export"]], ids="-".join
)
def test_help_fits_a_screen(capsys, monkeypatch, words):
    if words == ["demo"]:
        pytest.importorskip("gradio")
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    text = screen_of(capsys, *words, "--help")
    assert f"usage: reftr {' '.join(words)}" in text
    assert 3 <= len(text.splitlines()) <= LINES
    assert max(map(len, text.splitlines())) <= COLUMNS


def test_settings_are_explained_one_by_one_and_all(capsys):
    text = screen_of(capsys, "train", "--help", "learning_rate", "--num-epochs")
    assert "learning_rate = 0.0001\n" in text
    assert "num_epochs = 90\n" in text
    assert len(text.splitlines()) == 4
    assert len(screen_of(capsys, "train", "--help", "all").splitlines()) > 100


def test_errors_are_sentences(run, tmp_path):
    for words in (
        ("predict", "--model", tmp_path, "--image", "none.png", "--text", "a cup"),
        ("train", "none.yaml"),
        ("train", "recipes/demo.yaml", "--learning_rates", "1"),
        ("data", "build", "refcoco"),
        ("convert", "--checkpoint", "none.pth", "--output_dir", tmp_path / "out"),
        ("export", "--model", tmp_path, "--output", tmp_path / "out"),
        ("push", "--model", tmp_path),
    ):
        error_of(*words)
    result = run("-m", "reftr_cli", "push", "--model", tmp_path, check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.stderr


@pytest.fixture
def pictures(tmp_path, shapes):
    folder = tmp_path / "pictures"
    (folder / "inner").mkdir(parents=True)
    for index, name in enumerate(("a.png", "b.jpg", "inner/c.PNG")):
        shapes["test"][index]["image"].save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def predict(trained, image, *words):
    """The words of a command that asks the trained model."""
    return [str(word) for word in ("predict", "--model", trained[0], "--image", image, *words)]


def test_a_folder_of_pictures(capsys, trained, pictures, tmp_path):
    main(predict(trained, pictures, "--text", "the star", "the circle", "--output", tmp_path / "answers"))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["image"] for line in lines] == [str(pictures / name) for name in ("a.png", "b.jpg", "inner/c.PNG")]
    assert [[answer["phrase"] for answer in line["answers"]] for line in lines] == [["the star", "the circle"]] * 3
    main(predict(trained, pictures / "b.jpg", "--text", "the star"))
    one = json.loads(capsys.readouterr().out)
    assert one[0]["box"] == pytest.approx(lines[1]["answers"][0]["box"], abs=0.02)
    drawn = sorted((tmp_path / "answers").iterdir())
    assert [path.name for path in drawn] == ["00001_a.png", "00002_b.png", "00003_c.png"]
    for path in drawn:
        with Image.open(path) as picture:
            assert picture.width == 320


def test_a_file_of_questions(capsys, trained, pictures, tmp_path):
    """A broken picture or question is named in its line, and the others are answered."""
    (pictures / "broken.png").write_text("no picture")
    questions = [
        {"image": "a.png", "text": "the star"},
        {"image": "broken.png", "text": "the star"},
        {"image": "inner/c.PNG", "text": "the circle and the star", "phrases": ["the circle", "the star"]},
        {"image": "b.jpg", "text": ["the star", "ein Würfel ☕"]},
        {"image": "b.jpg"},
    ]
    path = pictures / "questions.jsonl"
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


def test_a_caption_with_phrases(capsys, trained, pictures):
    caption = ("--text", "the red circle is left of the star", "--phrases", "the star", "the red circle")
    main(predict(trained, pictures / "a.png", *caption))
    answers = json.loads(capsys.readouterr().out)
    assert [answer["phrase"] for answer in answers] == ["the star", "the red circle"]
    picture = pictures / "a.png"
    assert "--phrases requires one image" in error_of(*predict(trained, picture, "--text", "a", "b", "--phrases", "a"))
    assert "An expression to locate is required" in error_of(*predict(trained, picture))
