"""`reftr predict`: readable or JSON answers about one or many images, despite questions that fail."""

import json
import os
import pty
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps

from reftr_cli.__main__ import main
from reftr_cli.predict import expand_source
from tests.cli.test_command_line import error_of
from tests.helpers.processes import ENVIRONMENT
from tests.helpers.tiny import ROOT


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
    assert "have their own texts" in error_of(*predict(trained, path, "--text", "the star"))


def test_predict_locates_phrases_of_caption(capsys, trained, image_folder):
    caption = ("--text", "the red circle is left of the star", "--phrases", "the star", "the red circle")
    main(predict(trained, image_folder / "a.png", *caption))
    answers = json.loads(capsys.readouterr().out)
    assert [answer["phrase"] for answer in answers] == ["the star", "the red circle"]
    image = image_folder / "a.png"
    assert "--phrases requires one image" in error_of(*predict(trained, image, "--text", "a", "b", "--phrases", "a"))
    assert "An expression to locate is required" in error_of(*predict(trained, image))


@pytest.fixture(scope="module")
def mask_model(trained, tmp_path_factory):
    """Save a model that predicts masks, with random weights, next to the processor of the trained one."""
    from modeling_reftr import RefTRConfig, RefTRForVisualGrounding, RefTRProcessor

    folder = tmp_path_factory.mktemp("masks")
    config = RefTRConfig.from_pretrained(trained[0], predict_masks=True, auxiliary_loss=False)
    RefTRForVisualGrounding(config).save_pretrained(folder)
    RefTRProcessor.from_pretrained(trained[0]).save_pretrained(folder)
    return folder, None


def run_on_terminal(argv):
    """Run `reftr` with stdout on a terminal, and return its exit code, its stdout and its stderr."""
    control, terminal = pty.openpty()
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-m", "reftr_cli", *argv], stdout=terminal, stderr=subprocess.PIPE, env=environment, cwd=ROOT
    ) as process:
        os.close(terminal)
        printed = b""
        try:
            while part := os.read(control, 4096):
                printed += part
        except OSError:  # Linux reports the end of a terminal as an error
            pass
        errors = process.stderr.read().decode()
    os.close(control)
    return process.returncode, printed.decode().replace("\r\n", "\n"), errors


def test_predict_on_terminal_prints_readable_line_per_answer(mask_model, image_folder, tmp_path):
    output = tmp_path / "new" / "out.png"
    argv = predict(mask_model, image_folder / "a.png", "--text", "the star", "a red\ncircle", "--output", output)
    code, printed, errors = run_on_terminal(argv)
    assert code == 0, errors
    sides = r"\[-?\d+\.\d, -?\d+\.\d, -?\d+\.\d, -?\d+\.\d\]"
    line = rf"box {sides}  mask \d+\.\d% of the image"
    assert re.fullmatch(rf"the star      {line}\na red circle  {line}\n", printed)
    assert errors.endswith(f"Written: {output}\n")
    assert output.exists()


def test_predict_of_several_images_on_terminal_names_each(trained, image_folder):
    (image_folder / "b.jpg").write_text("not an image")
    code, printed, errors = run_on_terminal(predict(trained, image_folder, "--text", "the star"))
    first, star, second, error, *_ = printed.splitlines()
    assert (first, second) == (str(image_folder / "a.png"), str(image_folder / "b.jpg"))
    assert re.fullmatch(r"  the star  box \[.*\]", star)
    assert error.startswith("  error: ")
    assert code == 1
    assert errors.splitlines()[-1] == 'error: 1 of 3 questions failed: see "error" in their lines.'


def test_predict_with_json_on_terminal_prints_json(capsys, monkeypatch, trained, image_folder):
    argv = predict(trained, image_folder / "a.png", "--text", "the star")
    main(argv)
    printed = capsys.readouterr().out
    assert printed == json.dumps(json.loads(printed), indent=2) + "\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    main([*argv, "--json"])
    assert capsys.readouterr().out == printed
    main(argv)
    assert capsys.readouterr().out.startswith("the star  box [")


def test_describe_answers_says_which_text_was_truncated(capsys, monkeypatch, trained, image_folder):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    caption = "the star " * 100 + "the circle"
    main(predict(trained, image_folder / "a.png", "--text", caption, "--phrases", "the star", "the circle"))
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("the star    box [")
    assert second == "the circle  no answer: it is past the end of the truncated text"


def images_of(printed):
    """Return the images of lines of JSON."""
    return [json.loads(line)["image"] for line in printed.splitlines()]


def test_predict_answers_lists_folders_and_patterns_together(capsys, trained, image_folder, tmp_path):
    """Draw images with the same name into different files."""
    other = tmp_path / "other" / "a.png"
    other.parent.mkdir()
    other.write_bytes((image_folder / "a.png").read_bytes())
    sources = (other, image_folder / "inner", str(image_folder / "*"), str(image_folder / "**" / "[c]*.PNG"))
    argv = predict(trained, sources[0], *sources[1:], "--text", "the star", "--output", tmp_path / "answers")
    main([*argv, "--image", str(image_folder / "a.png")])
    printed, errors = capsys.readouterr()
    names = ("inner/c.PNG", "a.png", "b.jpg", "inner/c.PNG", "a.png")
    assert images_of(printed) == [str(other), *(str(image_folder / name) for name in names)]
    drawn = sorted(path.name for path in (tmp_path / "answers").iterdir())
    assert drawn == ["00001_a.png", "00002_c.png", "00003_a.png", "00004_b.png", "00005_c.png", "00006_a.png"]
    assert errors.endswith(f"Written: 6 images in {tmp_path / 'answers'}\n")


def test_expand_source_keeps_urls_and_existing_files_with_special_characters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a[1].png").touch()
    assert expand_source("a[1].png") == ["a[1].png"]
    assert expand_source("https://host/a.png?width=9") == ["https://host/a.png?width=9"]
    assert expand_source("*.png") == ["a[1].png"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("images/*.bmp", "--text", "a"), "error: The pattern 'images/*.bmp' matches no images."),
        (("images/*.txt", "--text", "a"), "error: The pattern 'images/*.txt' matches no images."),
        (("images", "empty", "--text", "a"), "error: The folder 'empty' contains no images."),
        (("images/*.png",), "error: The images of 'images/*.png' require an expression to locate: add --text ..."),
        (("questions.jsonl",), "error: The file 'questions.jsonl' contains no questions; expected lines such as"),
        (("images", "--text", "a", "--output", "a.png"), "error: --output 'a.png' is a file, and several images are"),
        (("a.png", "--text", "a", "--output", "images"), "error: --output 'images' must have the extension of an"),
    ],
)
def test_predict_refuses_arguments_before_loading_model(argv, message, trained, image_folder, monkeypatch):
    monkeypatch.chdir(image_folder.parent)
    monkeypatch.setattr("modeling_reftr.RefTRForVisualGrounding.from_pretrained", lambda *_: pytest.fail("loaded"))
    (image_folder.parent / "empty").mkdir()
    (image_folder.parent / "questions.jsonl").write_text("\n\n")
    (image_folder.parent / "a.png").write_bytes((image_folder / "a.png").read_bytes())
    assert error_of(*predict(trained, *argv)).startswith(message)


def test_predict_reports_malformed_lines_and_answers_others(capsys, trained, image_folder):
    """Keep `id` and `text` of each question, and name what is wrong with each other line."""
    path = image_folder / "questions.jsonl"
    lines = [
        b'{"id": 7, "image": "a.png", "text": "the star", "split": "val"}',
        b"not JSON",
        b'{"id": "\xff", "image": "a.png", "text": "the star"}',
        b'{"id": "x", "text": "the star"}',
        b'{"image": 3, "text": "the star"}',
        b"[1, 2]",
        b'{"image": "a.png", "text": 5}',
        b'{"image": "a.png", "text": ["the star", null]}',
        b'{"image": "a.png", "text": "the star", "phrases": 1}',
        b'{"image": "a\\u0000.png", "text": "the star"}',
        b"",
        b'{"id": [null], "image": "b.jpg", "text": ["the star"]}',
    ]
    path.write_bytes(b"\n".join(lines))
    assert error_of(*predict(trained, path)).endswith('9 of 11 questions failed: see "error" in their lines.')
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [list(line) for line in (printed[0], printed[3], printed[-1])] == [
        ["image", "id", "text", "answers"],
        ["image", "id", "text", "error"],
        ["image", "id", "text", "answers"],
    ]
    assert (printed[0]["id"], printed[0]["text"]) == (7, "the star")
    assert (printed[-1]["id"], printed[-1]["text"]) == ([None], ["the star"])
    assert [line["image"] for line in printed[1:5]] == [None] * 4
    for number, line in enumerate(printed[1:10], start=2):
        assert line["error"].startswith(f"'{path}', line {number}: "), line


# mode -> format of a file that stores it
MODES = {"L": "JPEG", "CMYK": "JPEG", "RGB": "JPEG", "P": "PNG", "LA": "PNG", "RGBA": "PNG", "I;16": "PNG"}


def write_image(file, mode):
    """Write an image of a mode: transparent on the left if it can be, turned by its EXIF orientation if it is RGB."""
    pixels = np.random.default_rng(0).integers(0, 255, (6, 10), np.uint8).repeat(15, axis=0).repeat(15, axis=1)
    image, options = Image.fromarray(pixels), {}
    if mode == "I;16":
        image = Image.fromarray(pixels.astype(np.uint16) * 257)
    elif mode == "P":
        image, options = image.quantize(16), {"transparency": 3}
    elif mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(np.arange(150, dtype=np.uint8)[None].repeat(90, axis=0)))
    if mode == "RGB":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    (image if mode in ("I;16", "P") else image.convert(mode)).save(file, MODES[mode], **options)
    with Image.open(file) as saved:
        assert saved.mode == mode


def as_shown(file):
    """Return an image as a viewer shows it on a white page."""
    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.mode == "I;16":
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


@pytest.mark.parametrize("mode", MODES)
def test_predict_answers_on_image_of_any_mode_as_on_what_it_shows(capsys, trained, tmp_path, mode):
    write_image(tmp_path / "own", mode)
    as_shown(tmp_path / "own").save(tmp_path / "shown.png")
    boxes, drawn = [], []
    for name in ("own", "shown.png"):
        main(predict(trained, tmp_path / name, "--text", "the star", "--output", tmp_path / "out.png"))
        boxes.append(json.loads(capsys.readouterr().out)[0]["box"])
        with Image.open(tmp_path / "out.png") as image:
            drawn.append(image.tobytes())
    assert boxes[0] == boxes[1]
    assert drawn[0] == drawn[1]
