"""`reftr predict --answers`: questions shared over processes, continued after a kill, merged in order."""

import json

import pytest

import data_scripts
from reftr_cli.__main__ import main
from reftr_cli.shared_answers import SharedAnswers
from tests.cli.test_command_line import error_of
from tests.helpers.processes import run_ranks, start_ranks
from tests.helpers.tiny import TINY_SET


@pytest.fixture
def image_folder(tmp_path, shapes):
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(7):
        shapes["test"][index % len(shapes["test"])]["image"].save(folder / f"{index}.png")
    return folder


def command(trained, *argv):
    return [str(argument) for argument in ("predict", "--model", trained[0], *argv)]


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def numbers_of(folder):
    """Return the numbers of the questions in the file of each process."""
    return {file.name: [line["number"] for line in lines_of(file)] for file in sorted(folder.glob("answers_*"))}


def test_processes_share_questions_and_merge_answers_in_order(trained, image_folder, tmp_path, capsys):
    argv = command(trained, "--image", image_folder, "--text", "the star", "the circle", "--answers")
    run_ranks(["-m", "reftr_cli", *argv, str(tmp_path / "two")], 2)
    assert numbers_of(tmp_path / "two") == {
        "answers_00000_of_00002.jsonl": [0, 2, 4, 6],
        "answers_00001_of_00002.jsonl": [1, 3, 5],
    }
    main([*argv, str(tmp_path / "one")])
    merged = [lines_of(tmp_path / name / "answers.jsonl") for name in ("one", "two")]
    assert merged[0] == merged[1]
    assert [line["image"] for line in merged[0]] == [str(image_folder / f"{index}.png") for index in range(7)]
    assert [[answer["label"] for answer in line["answers"]] for line in merged[0]] == [["the star", "the circle"]] * 7
    assert "Written: 7 lines" in capsys.readouterr().err


def test_killed_processes_are_continued_by_another_number_of_them(trained, image_folder, tmp_path):
    argv = command(trained, "--image", image_folder, "--text", "the star", "--answers")
    main([*argv, str(tmp_path / "whole")])
    folder = tmp_path / "killed"
    run_ranks(["-m", "reftr_cli", *argv, str(folder)], 2)
    first, second = sorted(folder.glob("answers_*"))
    first.write_bytes(b"".join(first.read_bytes().splitlines(True)[:2]) + b'{"number": 4, "ima')
    second.unlink()
    (folder / "answers.jsonl").unlink()
    main([*argv, str(folder)])
    answered = lines_of(folder / "answers_00000_of_00001.jsonl")
    assert [line["number"] for line in answered] == [1, 3, 4, 5, 6]
    assert lines_of(folder / "answers.jsonl") == lines_of(tmp_path / "whole" / "answers.jsonl")
    # the process that was killed drops the part of a line, and has nothing left to do
    run_ranks(["-m", "reftr_cli", *argv, str(folder)], 2)
    assert numbers_of(folder)[first.name] == [0, 2]


def test_process_that_ends_first_leaves_merging_to_the_last(trained, image_folder, tmp_path):
    argv = ["-m", "reftr_cli", *command(trained, "--image", image_folder, "--text", "the star", "--answers")]
    folder = tmp_path / "answers"
    first, second = start_ranks([*argv, str(folder)], 2)
    second.kill()
    second.communicate(60)
    output = "".join(text or "" for text in first.communicate(120))
    assert first.returncode == 0
    assert "are open on other processes" in output
    assert not (folder / "answers.jsonl").exists()
    run_ranks([*argv, str(folder)], 2)
    assert len(lines_of(folder / "answers.jsonl")) == 7


def test_failed_questions_are_named_and_asked_again(trained, image_folder, tmp_path):
    broken = image_folder / "3.png"
    content = broken.read_bytes()
    broken.write_text("not an image")
    argv = command(trained, "--image", image_folder, "--text", "the star", "--answers", tmp_path / "answers")
    assert "1 of 7 questions failed" in error_of(*argv)
    merged = tmp_path / "answers" / "answers.jsonl"
    assert "3.png" in lines_of(merged)[3]["error"]
    broken.write_bytes(content)
    main(argv)
    assert all("answers" in line for line in lines_of(merged))
    assert numbers_of(tmp_path / "answers") == {"answers_00000_of_00001.jsonl": [*range(7), 3]}


def test_dataset_is_asked_its_own_sentences(trained, tmp_path, monkeypatch, data_cache):
    rows = data_scripts.load("shapes", cache_dir=data_cache, **TINY_SET)["test"]
    monkeypatch.setattr(data_scripts, "load", lambda name, split, data_dir: rows)
    main(command(trained, "--dataset", "shapes", "--answers", tmp_path / "answers"))
    lines = lines_of(tmp_path / "answers" / "answers.jsonl")
    assert [line["image"] for line in lines] == rows["image_id"][:]
    for line, row in zip(lines, rows, strict=True):
        assert line["id"] == [sentence["sentence_id"] for sentence in row["sentences"]]
        phrases = [
            sentence["text"][phrase["start"] : phrase["end"]]
            for sentence in row["sentences"]
            for phrase in sentence["phrases"]
        ]
        assert [answer["label"] for answer in line["answers"]] == phrases


def test_other_questions_and_contradictions_are_refused(trained, image_folder, tmp_path):
    images = ("--image", image_folder, "--text", "the star", "--answers", tmp_path / "answers")
    main(command(trained, *images))
    assert "has answers to other questions" in error_of(*command(trained, *images[:3], "the circle", *images[4:]))
    (tmp_path / "answers" / "answers_00000_of_00001.jsonl").write_text("[]\n")
    assert "line 1 is" in error_of(*command(trained, *images))
    assert "leave --output, --save and --phrases out" in error_of(*command(trained, *images, "--output", "a"))
    assert "--image, or --dataset" in error_of(*command(trained, *images, "--dataset", "shapes"))
    assert "give --answers DIR" in error_of(*command(trained, "--dataset", "shapes"))


def test_last_answer_counts_and_an_error_does_not_replace_it(tmp_path):
    shared = SharedAnswers(tmp_path, "questions", 2)
    for number, line in ((0, {"error": "gone"}), (0, {"answers": [1]}), (0, {"error": "gone"}), (1, {"error": "x"})):
        shared.add(number, line)
    assert shared.open_questions() == [1]
    assert shared.merge() == (0, 1)
    assert lines_of(tmp_path / "answers.jsonl") == [{"answers": [1]}, {"error": "x"}]
