"""Save the answers of `reftr predict` in formats of annotation tools and evaluations, see `data_scripts.formats`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_scripts.atomic_files import atomic_file
from data_scripts.escaping import for_terminal
from data_scripts.findings import Findings
from data_scripts.formats import PREDICTED, writer_of
from data_scripts.reading import coco_number
from data_scripts.records import Written, target_of


if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from modeling_reftr import VisualGroundingPipeline


class PredictionFiles:
    """
    Files that answers are saved to.

    Args:
        targets (`list[tuple[str, str]]`): (format, file) of each, a format of `formats.PREDICTED`.
        model (`str`): the model, by name.

    Raises:
        ValueError: if there is no such format, or a file is a folder.
    """

    def __init__(self, targets: Sequence[tuple[str, str]], model: str) -> None:
        for name, file in targets:
            writer_of(name, PREDICTED)
            if Path(file).is_dir():
                raise ValueError(f"--save {name} {file!r} is a folder; expected the name of a file.")
        self.targets = targets
        self.model = model
        self.findings = Findings()
        self.lines: list[dict] = []
        self.results: dict[int, dict] = {}

    def expect(self, questions: list[dict | str]) -> None:
        """Take the questions, and what is wrong with those that are none, which decide the ids in COCO's results."""
        if any(name == "coco_results" for name, _ in self.targets):
            numbers = [number for number, question in enumerate(questions) if isinstance(question, dict)]
            results = results_of_questions([questions[number] for number in numbers])
            self.results = dict(zip(numbers, results, strict=True))

    def add(self, ground: VisualGroundingPipeline, number: int, question: dict, answers: list[dict]) -> None:
        """Take the answers to the question of an index."""
        from modeling_reftr.pixels_reftr import height_and_width

        if not self.targets:
            return
        height, width = height_and_width(ground.open_image(question["image"]))
        line = line_of_answers(question, answers, self.findings)
        result = {"result": self.results[number]} if self.results else {}
        self.lines.append({"image": question["image"], "width": width, "height": height, **result, **line})

    def write(self) -> list[str]:
        """Write the files, each atomically, and return a sentence about each."""
        from data_scripts.building import CHANGED, LEFT_OUT, describe_reported

        sentences = []
        for name, file in self.targets:
            findings = Findings(self.findings.left_out.copy())
            writer = writer_of(name, PREDICTED)
            lines = self.lines if name == "coco_results" else [line for line in self.lines if line["expressions"]]
            with atomic_file(file) as temporary, open(temporary, "w", encoding="utf-8") as opened:
                opened.writelines(writer(lines, findings, Written(self.model)))
            counted = {LEFT_OUT: findings.left_out, CHANGED: findings.changed}
            reported = [describe_reported(kind, counts) for kind, counts in counted.items() if counts]
            sentences.append(for_terminal(f"Written: {file}{'; '.join(['', *reported])}"))
        return sentences


def results_of_questions(questions: list[dict]) -> list[dict]:
    """
    Return the `image_id` and the `category_id` of each question in COCO's results: `image_id` of the questions, else
    the numbers in COCO's names of files, else those of the images in order, from 1; `category_id` of the question, by
    default 1.

    Raises:
        ValueError: if an id is not an integer, or some questions have no `image_id`.

    Example:

    ```python
    >>> from reftr_cli.prediction_files import results_of_questions

    >>> results_of_questions([{"image": name} for name in ("b.jpg", "a.jpg", "b.jpg")])[2]
    {'image_id': 1, 'category_id': 1}
    >>> results_of_questions([{"image": "COCO_train2014_000000581857.jpg", "category_id": 3}])
    [{'image_id': 581857, 'category_id': 3}]

    ```"""
    given = [question.get("image_id") for question in questions]
    categories = [question.get("category_id", 1) for question in questions]
    for name, ids in (("image_id", [value for value in given if value is not None]), ("category_id", categories)):
        wrong = [value for value in ids if type(value) is not int]
        if wrong:
            raise ValueError(f"{name} of a question is {wrong[0]!r}; expected an integer, as COCO's results require.")
    named = [coco_number(question["image"]) for question in questions]
    if None in given and any(value is not None for value in given):
        number = given.index(None)
        raise ValueError(f"The question about {questions[number]['image']!r} has no image_id, and others have one.")
    numbers = {image: number for number, image in enumerate(dict.fromkeys(item["image"] for item in questions), 1)}
    if None in given:
        given = [numbers[item["image"]] for item in questions] if None in named else named
    return [
        {"image_id": image_id, "category_id": category_id}
        for image_id, category_id in zip(given, categories, strict=True)
    ]


def line_of_answers(question: dict, answers: list[dict[str, Any]], findings: Findings) -> dict:
    """
    Return the expressions of a line, see `data_scripts.records`, for a question and its answers, in pixels.

    Args:
        question (`dict`): `text` and perhaps `phrases`.
        answers (`list[dict]`): of the pipeline.
        findings ([`Findings`]): counts phrases without an answer.

    Example:

    ```python
    >>> from data_scripts.findings import Findings
    >>> from reftr_cli.prediction_files import line_of_answers

    >>> box = {"xmin": 1.0, "ymin": 2.0, "xmax": 3.0, "ymax": 4.0}
    >>> line_of_answers({"text": "a cup"}, [{"label": "a cup", "score": 1.0, "box": box}], Findings())["expressions"]
    [{'text': 'a cup', 'phrases': [{'start': 0, 'end': 5, 'boxes': [[1.0, 2.0, 3.0, 4.0]], 'score': 1.0}]}]

    ```"""
    from modeling_reftr.answers_reftr import answer_to_json, flatten_question
    from modeling_reftr.phrases_reftr import find_phrases

    sentences, phrases = flatten_question(question["text"], question.get("phrases"))
    found, expressions = group_by_phrase(answers), []
    for sentence, of_sentence in zip(sentences, phrases or [None] * len(sentences), strict=True):
        spans = [(0, len(sentence))] if of_sentence is None else find_phrases(sentence, of_sentence)
        answered = []
        for start, end in spans:
            of_phrase = [answer_to_json(answer) for answer in next(found)]
            if of_phrase[0]["box"] is None and not of_phrase[0]["score"]:
                findings.leave_out("phrases past the end of a truncated text")
                continue
            objects = [fields_of_answer(answer) for answer in of_phrase if answer["box"] is not None]
            answered.append({"start": start, "end": end, **target_of(objects)})
        if answered:
            expressions.append({"text": sentence, "phrases": answered})
    return {"expressions": expressions}


def group_by_phrase(answers: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield the answers of each phrase: one, or from a model that predicts presence those of one `phrase_index`."""
    numbered = ((answer.get("phrase_index", number), answer) for number, answer in enumerate(answers))
    for _, pairs in itertools.groupby(numbered, key=lambda pair: pair[0]):
        yield [answer for _, answer in pairs]


def fields_of_answer(answer: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an object of a line, see `data_scripts.records`, for an answer in JSON."""
    mask = {"segmentation": answer["segmentation"]} if "segmentation" in answer else {}
    return {"boxes": [answer["box"]], "score": answer["score"], **mask}
