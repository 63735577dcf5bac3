"""
Locate expressions in images:

    reftr predict --model runs/demo --image photo.jpg --text "the red circle" "the star" --output out.png
    reftr predict --model runs/demo --image images/ --text "the red circle" --output answers/
    reftr predict --model runs/demo --image questions.jsonl --output answers/

The first form prints the answers as JSON and draws them. A folder of images, or a file with one question per line
such as {"image": "1.jpg", "text": ["the red circle"]}, with "phrases" for captions, prints one line of JSON per
question and draws each answer into the folder `answers`. A question that fails has an "error" in its line, and the
exit code is 1. A line that is not a question, or not UTF-8, fails before any question is answered.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from data_scripts.escaping import for_stdout
from training_reftr.json_files import read_json_lines
from training_reftr.locating import check_model


if TYPE_CHECKING:
    from modeling_reftr import VisualGroundingPipeline


EXAMPLE = '{"image": "1.jpg", "text": ["the cup"]}'


def image_suffixes() -> set[str]:
    """Return the file name extensions of the accepted image formats, such as ".jpg"."""
    from PIL import Image

    from modeling_reftr.decoding_reftr import IMAGE_FORMATS

    return {suffix for suffix, name in Image.registered_extensions().items() if name in IMAGE_FORMATS}


def read_questions(path: Path, texts: list[str] | None) -> list[tuple[str | None, dict]]:
    """
    Read questions from a folder of images, which are all asked `texts`, or from a JSON Lines file.

    Args:
        path (`Path`): the folder or the file. Image paths in the file are relative to its folder.
        texts (`list[str]`, *optional*): the expressions for a folder.

    Returns:
        `list[tuple]`: for each question its file and line (None in a folder), and the question.

    Raises:
        ValueError: if the folder has no images, the texts are missing or superfluous, or a line is not a question.
    """
    if path.is_dir():
        images = sorted(file for file in path.rglob("*") if file.suffix.lower() in image_suffixes())
        if not images:
            raise ValueError(f"The folder {str(path)!r} contains no images.")
        if not texts:
            raise ValueError(f"The images of {str(path)!r} require an expression to locate: add --text ...")
        return [(None, {"image": str(image), "text": texts}) for image in images]
    if texts:
        raise ValueError(f"The questions in {str(path)!r} have their own texts: remove --text.")
    questions = []
    for number, _, question in read_json_lines(path):
        where = f"{str(path)!r}, line {number}"
        image = question.get("image") if isinstance(question, dict) else None
        if not isinstance(image, str):
            problem = question if isinstance(question, ValueError) else "'image' must be a str"
            raise ValueError(f"{where}: {problem}; expected {EXAMPLE}.")
        questions.append((where, {**question, "image": str(path.parent / image)}))
    return questions


def answer_all(ground: VisualGroundingPipeline, questions: list[tuple], output: Path | None) -> int:
    """Print one line of JSON per question, draw answers into the folder `output`, and return how many failed."""
    from modeling_reftr.answers_reftr import answer_to_json

    num_failed = 0
    for number, (where, question) in enumerate(tqdm(questions, desc="predicting", unit="image"), start=1):
        line = {"image": question["image"]}
        try:
            answers = ground(question)
            line["answers"] = [answer_to_json(answer) for answer in answers]
            if output:
                drawing = ground.draw(question["image"], answers)
                # file names are limited to 255 bytes
                drawing.save(output / f"{number:05d}_{Path(question['image']).stem[:60]}.png")
        except (ValueError, OSError) as error:
            num_failed += 1
            line["error"] = str(error) if where is None else f"{where}: {error}"
        sys.stdout.write(for_stdout(line) + "\n")
    return num_failed


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="reftr predict", description="Locate expressions in images with bounding boxes and masks."
    )
    parser.add_argument("--model", required=True, help="RefTR folder or Hub id")
    parser.add_argument("--image", required=True, help="image, folder of images, or .jsonl file of questions")
    parser.add_argument("--text", nargs="+", help="one or several expressions, each in quotes")
    parser.add_argument("--phrases", nargs="+", help="phrases to locate, when --text is one caption")
    parser.add_argument("--output", help="where to draw: a file (.png, .jpg, ...), or a folder for several images")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ...; by default an accelerator if there is one")
    return parser


def main(argv: list[str] | None = None) -> None:
    """
    Print the answers as JSON.

    Raises:
        ValueError: if arguments contradict each other, or a question has no answer.
    """
    args = make_parser().parse_args(argv)
    path = Path(args.image)
    are_many = path.is_dir() or path.suffix == ".jsonl"
    if not args.text and not are_many:
        raise ValueError('An expression to locate is required: add --text "the red circle" ...')
    if args.phrases and (are_many or len(args.text) != 1):
        raise ValueError("--phrases requires one image and one --text, the caption; use a .jsonl file for several.")
    questions = read_questions(path, args.text) if are_many else []
    check_model(args.model)

    from modeling_reftr import RefTRForVisualGrounding, RefTRProcessor, VisualGroundingPipeline
    from modeling_reftr.answers_reftr import answer_to_json

    model = RefTRForVisualGrounding.from_pretrained(args.model).fused_copy()
    processor = RefTRProcessor.from_pretrained(args.model)
    ground = VisualGroundingPipeline(model, processor=processor, device=args.device)
    if are_many:
        output = Path(args.output) if args.output else None
        if output:
            output.mkdir(parents=True, exist_ok=True)
        num_failed = answer_all(ground, questions, output)
        if num_failed:
            raise ValueError(f'{num_failed} of {len(questions)} questions failed: see "error" in their lines.')
        return
    answers = ground(args.image, text=args.text, phrases=args.phrases and [args.phrases])
    if args.output:
        ground.draw(args.image, answers).save(args.output)
    sys.stdout.write(for_stdout([answer_to_json(answer) for answer in answers], indent=2) + "\n")
