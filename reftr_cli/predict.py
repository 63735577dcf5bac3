"""
Locate expressions in images:

    reftr predict --model runs/demo --image photo.jpg --text "the red circle" "the star" --output out.png
    reftr predict --model runs/demo --image images/ more/*.jpg --text "the red circle" --output answers/
    reftr predict --model runs/demo --image questions.jsonl --output answers/

On a terminal, an answer is a readable line; with `--json`, and where the output is piped or redirected, it is JSON.
The first form prints the answers of one image and draws them. Several images, folders, patterns such as
"images/*.jpg", and files with one question per line, such as {"image": "1.jpg", "text": ["the red circle"]}, with
"phrases" for captions, print one line of JSON per question and draw each answer into the folder `answers`. A question
that fails, or a line that is not a question, has an "error" in its line, and the exit code is 1. `--save FORMAT FILE`
also writes all answers to a file for an evaluation or an annotation tool. A model that predicts presence answers an
expression with none, one or several boxes, those with a score over `--threshold`.

    accelerate launch --num_processes 4 -m reftr_cli predict --model runs/demo --image images/ --text "the star" \\
        --answers answers
    reftr predict --model runs/demo --dataset refcoco_unc --split testA --data_dir refer --answers answers

The last forms write the answers into a folder, on any number of processes, see `shared_answers`; the same command
continues an interrupted run. A dataset has its own texts and phrases.
"""

from __future__ import annotations

import argparse
import glob
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_scripts.escaping import for_stdout, for_terminal
from data_scripts.formats import PREDICTED
from data_scripts.progress import disable_library_bars, progress_bar
from reftr_cli.prediction_files import PredictionFiles
from reftr_cli.shared_answers import MERGED, SharedAnswers
from training_reftr.json_files import read_json_lines
from training_reftr.locating import check_model


if TYPE_CHECKING:
    from modeling_reftr import VisualGroundingPipeline


EXAMPLE = '{"image": "1.jpg", "text": ["the cup"]}'
KEPT = ("id", "text")  # fields of a question that its line of output repeats
PATTERN = re.compile(r"[*?[]")
MAX_LABEL = 60  # characters to align


def image_suffixes() -> set[str]:
    """Return the file name extensions of the accepted image formats, such as ".jpg"."""
    from PIL import Image

    from modeling_reftr.decoding_reftr import IMAGE_FORMATS

    return {suffix for suffix, name in Image.registered_extensions().items() if name in IMAGE_FORMATS}


def is_pattern(source: str) -> bool:
    """Return whether a source is a pattern of file names, and neither a file of this name nor a URL."""
    return bool(PATTERN.search(source)) and "://" not in source and not Path(source).exists()


def is_question_file(source: str) -> bool:
    """Return whether a source is a JSON Lines file of questions."""
    return Path(source).suffix == ".jsonl"


def is_for_many(sources: list[str]) -> bool:
    """Return whether sources may name several images: one line of output per image."""
    return len(sources) > 1 or is_question_file(sources[0]) or is_pattern(sources[0]) or Path(sources[0]).is_dir()


def expand_source(source: str) -> list[str]:
    """
    Return the images that a source names.

    Args:
        source (`str`): an image, a folder, whose images are found at any depth, or a pattern of file names.

    Raises:
        ValueError: if a folder has no images, or a pattern matches none.
    """
    if Path(source).is_dir():
        files, problem = map(str, Path(source).rglob("*")), f"The folder {source!r} contains no images."
    elif is_pattern(source):
        files, problem = glob.iglob(source, recursive=True), f"The pattern {source!r} matches no images."
    else:
        return [source]
    suffixes = image_suffixes()
    images = sorted(file for file in files if Path(file).suffix.lower() in suffixes)
    if not images:
        raise ValueError(problem)
    return images


def read_questions(sources: list[str], texts: list[str] | None) -> list[tuple[dict, dict | str]]:
    """
    Read the questions about images, which are all asked `texts`, and those of JSON Lines files.

    Args:
        sources (`list[str]`): see `expand_source`, and JSON Lines files.
        texts (`list[str]`, *optional*): the expressions to locate in images.

    Returns:
        `list[tuple]`: for each question the fields that its line of output begins with, and the question, or what is
        wrong with it.

    Raises:
        ValueError: if there are no images or questions, or the texts are missing or superfluous.
    """
    questions = []
    for source in sources:
        if is_question_file(source):
            if texts:
                raise ValueError(f"The questions in {source!r} have their own texts: remove --text.")
            of_file = list(read_question_file(Path(source)))
            if not of_file:
                raise ValueError(f"The file {source!r} contains no questions; expected lines such as {EXAMPLE}.")
            questions += of_file
        else:
            images = expand_source(source)
            if not texts:
                raise ValueError(f"The images of {source!r} require an expression to locate: add --text ...")
            questions += [({"image": image}, {"image": image, "text": texts}) for image in images]
    return questions


def read_question_file(path: Path) -> Iterator[tuple[dict, dict | str]]:
    """Yield the questions of a JSON Lines file, see `read_questions`; paths of images are relative to its folder."""
    for number, _, value in read_json_lines(path):
        where = f"{str(path)!r}, line {number}"
        fields, image = {"image": None}, None
        if isinstance(value, dict):
            fields |= {name: value[name] for name in KEPT if name in value}
            image = value.get("image")
        if isinstance(image, str):
            fields["image"] = str(path.parent / image)
            yield fields, {**value, "image": fields["image"], "where": where}
        else:
            problem = value if isinstance(value, ValueError) else "'image' must be a str"
            yield fields, f"{where}: {problem}; expected {EXAMPLE}."


def answer_question(ground: VisualGroundingPipeline, question: dict | str) -> list[dict]:
    """
    Answer a question of `read_questions`.

    Raises:
        ValueError, OSError: if it has no answer; the message names its line, if it is of a file.
    """
    if isinstance(question, str):
        raise ValueError(question)
    where = question.pop("where", None)
    try:
        return ground(question)
    except (ValueError, OSError) as error:
        raise ValueError(str(error) if where is None else f"{where}: {error}") from error


def answer_all(
    ground: VisualGroundingPipeline,
    questions: list[tuple],
    output: Path | None,
    is_json: bool,
    files: PredictionFiles,
) -> tuple[int, int]:
    """
    Print the answers of each question, draw them into the folder `output`, and add them to `files`.

    Returns:
        `tuple`: how many questions failed, and how many files were written.
    """
    from modeling_reftr.answers_reftr import answer_to_json

    num_failed = num_written = 0
    # readable answers show the progress themselves
    bar = progress_bar(questions, desc="predicting", unit="image", is_shown=not sys.stdout.isatty())
    for number, (fields, question) in enumerate(bar, start=1):
        try:
            answers = answer_question(ground, question)
            files.add(ground, number - 1, question, answers)
            if output:
                drawing = ground.draw(fields["image"], answers)
                # file names are limited to 255 bytes
                drawing.save(output / f"{number:05d}_{Path(fields['image']).stem[:60]}.png")
                num_written += 1
            line, text = {"answers": [answer_to_json(answer) for answer in answers]}, describe_answers(answers)
        except (ValueError, OSError) as error:
            num_failed += 1
            line, text = {"error": str(error)}, f"error: {error}"
        readable = f"{fields['image'] or 'no image'}\n{textwrap.indent(text, '  ')}"
        sys.stdout.write(for_stdout({**fields, **line}) if is_json else for_terminal(readable))
        sys.stdout.write("\n")
    return num_failed, num_written


class DatasetQuestions(Sequence):
    """
    The questions of the rows of a dataset, as those of `read_questions`: one about each image, with all of its
    sentences.

    Args:
        name, split, data_dir (`str`): see `data_scripts.load`.

    Raises:
        ValueError, OSError: if it cannot be loaded.
    """

    def __init__(self, name: str, split: str, data_dir: str | None) -> None:
        import data_scripts

        self.rows = data_scripts.load(name, split=split, data_dir=data_dir)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[dict, dict]:
        row = self.rows[index]
        sentences = row["sentences"]
        fields = {"image": row["image_id"], "id": [sentence["sentence_id"] for sentence in sentences]}
        question = {"image": row["image"], "text": [sentence["text"] for sentence in sentences]}
        spans = [[(phrase["start"], phrase["end"]) for phrase in sentence["phrases"]] for sentence in sentences]
        if any(part != [(0, len(text))] for part, text in zip(spans, question["text"], strict=True)):
            question["phrases"] = spans
        return {**fields, "text": question["text"]}, question


def answer_shared(ground: VisualGroundingPipeline, questions: Sequence, shared: SharedAnswers) -> None:
    """
    Answer the questions of this process that are open, and merge the answers of all processes when all have ended.

    Raises:
        ValueError: if questions failed.
    """
    from modeling_reftr.answers_reftr import answer_to_json

    numbers = shared.open_questions()
    for number in progress_bar(numbers, desc="predicting", unit="image", is_shown=shared.rank == 0):
        fields, question = questions[number]
        try:
            answers = answer_question(ground, question)
            shared.add(number, {**fields, "answers": [answer_to_json(answer) for answer in answers]})
        except (ValueError, OSError) as error:
            shared.add(number, {**fields, "error": str(error)})
    num_open, num_failed = shared.merge()
    if num_open:
        sys.stderr.write(for_terminal(f"Answered {len(numbers)} questions; {num_open} are open on other processes.\n"))
        return
    sys.stderr.write(for_terminal(f"Written: {len(questions)} lines in {shared.folder / MERGED}\n"))
    if num_failed:
        raise ValueError(f'{num_failed} of {len(questions)} questions failed: see "error" in their lines.')


def describe_answers(answers: list[dict[str, Any]]) -> str:
    """Return a readable line per answer: its label, its box in pixels, the area of its mask, and its presence."""
    import numpy as np

    labels = [" ".join(answer["label"].split()) for answer in answers]
    width = min(MAX_LABEL, max(map(len, labels), default=0))
    lines = []
    for label, answer in zip(labels, answers, strict=True):
        if answer["box"] is None:
            reason = "no answer: it is past the end of the truncated text"
            if answer["score"]:
                reason = f"not found ({answer['score']:.2f})"
            lines.append(f"{label:<{width}}  {reason}")
            continue
        sides = ", ".join(f"{side:.1f}" for side in answer["box"].values())
        mask = answer.get("mask")
        area = "" if mask is None else f"  mask {np.asarray(mask).mean() / 255:.1%} of the image"
        score = f"  score {answer['score']:.2f}" if "phrase_index" in answer else ""
        lines.append(f"{label:<{width}}  box [{sides}]{area}{score}")
    return "\n".join(lines)


def validate_output(output: str, is_folder: bool) -> None:
    """
    Refuse a name that cannot be written, before anything is loaded.

    Raises:
        ValueError: if it is a file and should be a folder, or has no extension of an image format.
    """
    from PIL import Image

    if is_folder and Path(output).is_file():
        raise ValueError(f"--output {output!r} is a file, and several images are drawn into a folder.")
    if not is_folder and (Path(output).is_dir() or Path(output).suffix.lower() not in Image.registered_extensions()):
        raise ValueError(
            f"--output {output!r} must have the extension of an image format, such as .png or .jpg: one image is "
            "drawn into a file."
        )


def device_of_process() -> str | None:
    """Return the accelerator of this process, of several on a machine; None for the default one."""
    import torch

    if "LOCAL_RANK" not in os.environ or not torch.accelerator.is_available():
        return None
    return f"{torch.accelerator.current_accelerator().type}:{os.environ['LOCAL_RANK']}"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="reftr predict", description="Locate expressions in images with bounding boxes and masks."
    )
    parser.add_argument("--model", required=True, help="RefTR folder or Hub id")
    parser.add_argument(
        "--image",
        nargs="+",
        action="extend",
        default=[],
        help='images, folders of images, patterns such as "images/*.jpg", or .jsonl files of questions',
    )
    parser.add_argument("--text", nargs="+", help="one or several expressions, each in quotes")
    parser.add_argument("--phrases", nargs="+", help="phrases to locate, when --text is one caption")
    parser.add_argument(
        "--threshold",
        type=float,
        help="score above which a box is an answer (default: that of the model); for models that predict presence",
    )
    parser.add_argument("--output", help="where to draw: a file (.png, .jpg, ...), or a folder for several images")
    parser.add_argument(
        "--save",
        nargs=2,
        action="append",
        default=[],
        metavar=("FORMAT", "FILE"),
        help=f"also write the answers to a file: {', '.join(PREDICTED)}; may be repeated",
    )
    parser.add_argument("--dataset", help="a dataset to answer in place of images, with its texts and phrases")
    parser.add_argument("--split", default="test", help="its split (default: test)")
    parser.add_argument("--data_dir", help="folder of its files")
    parser.add_argument(
        "--answers",
        metavar="DIR",
        help="write the answers into a folder, on all processes of a launcher; the same command continues",
    )
    parser.add_argument("--json", action="store_true", help="print JSON on a terminal, too")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ...; by default an accelerator if there is one")
    return parser


def main(argv: list[str] | None = None) -> None:
    """
    Print the answers, readable on a terminal and as JSON elsewhere, and on stderr the files that were written.

    Raises:
        ValueError: if arguments contradict each other, or a question has no answer.
    """
    args = make_parser().parse_args(argv)
    if bool(args.image) == bool(args.dataset):
        raise ValueError("Name what to answer: --image, or --dataset with --answers, not both.")
    if args.dataset and (args.text or args.phrases or not args.answers):
        raise ValueError("--dataset has its own texts, and writes into a folder: give --answers DIR, without --text.")
    if args.answers and (args.output or args.save or args.phrases):
        raise ValueError("--answers is a folder of JSON Lines: leave --output, --save and --phrases out.")
    are_many = bool(args.answers) or is_for_many(args.image)
    if not args.text and not are_many:
        raise ValueError('An expression to locate is required: add --text "the red circle" ...')
    if args.phrases and (are_many or len(args.text) != 1):
        raise ValueError("--phrases requires one image and one --text, the caption; use a .jsonl file for several.")
    if args.output:
        validate_output(args.output, is_folder=are_many)
    files = PredictionFiles(args.save, Path(args.model).name)
    check_model(args.model)
    if args.dataset:
        questions = DatasetQuestions(args.dataset, args.split, args.data_dir)
        title = f"{args.dataset} {args.split}"
    else:
        questions = read_questions(args.image, args.text) if are_many else []
        title = repr(questions)
    shared = None
    if args.answers:
        threshold = "" if args.threshold is None else f" above {args.threshold}"
        shared = SharedAnswers(Path(args.answers), f"{args.model} {title}{threshold}", len(questions))
    else:
        files.expect([question for _, question in questions])

    from modeling_reftr import RefTRForVisualGrounding, RefTRProcessor, VisualGroundingPipeline
    from modeling_reftr.answers_reftr import answer_to_json

    disable_library_bars()
    model = RefTRForVisualGrounding.from_pretrained(args.model).fused_copy()
    processor = RefTRProcessor.from_pretrained(args.model)
    device = args.device or device_of_process()
    ground = VisualGroundingPipeline(model, processor=processor, device=device, threshold=args.threshold)
    if shared is not None:
        answer_shared(ground, questions, shared)
        return
    output = Path(args.output) if args.output else None
    if output:
        (output if are_many else output.parent).mkdir(parents=True, exist_ok=True)
    is_json = args.json or not sys.stdout.isatty()
    if are_many:
        num_failed, num_written = answer_all(ground, questions, output, is_json, files)
        sys.stderr.writelines(f"{sentence}\n" for sentence in files.write())
        if output:
            sys.stderr.write(for_terminal(f"Written: {num_written} images in {output}\n"))
        if num_failed:
            raise ValueError(f'{num_failed} of {len(questions)} questions failed: see "error" in their lines.')
        return
    (image,) = args.image
    question = {"image": image, "text": args.text, "phrases": args.phrases and [args.phrases]}
    answers = ground(question)
    files.expect([question])
    files.add(ground, 0, question, answers)
    printed = for_stdout([answer_to_json(answer) for answer in answers], indent=2)
    sys.stdout.write(printed if is_json else for_terminal(describe_answers(answers)))
    sys.stdout.write("\n")
    if output:
        ground.draw(image, answers).save(output)
        sys.stderr.write(for_terminal(f"Written: {output}\n"))
    sys.stderr.writelines(f"{sentence}\n" for sentence in files.write())
