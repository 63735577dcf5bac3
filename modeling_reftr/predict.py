"""
Answer questions about one's own pictures:

    reftr predict --model runs/demo --image photo.jpg --text "the red circle" "the star" --output out.png
    reftr predict --model runs/demo --image pictures/ --text "the red circle" --output answers/
    reftr predict --model runs/demo --image questions.jsonl --output answers/

The first prints the answers as JSON and draws them. A folder, or a file of questions, a line of JSON each such as
{"image": "1.jpg", "text": ["the red circle"]}, with "phrases" for captions, gives a line of JSON for each question,
and in the folder `answers` a drawing of each; what cannot be answered has an "error" there, and the exit code is 1.
A line that is not a question, or not UTF-8, is an error before any is answered.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from training_reftr.json_files import read_json_lines

from .decoding_reftr import IMAGE_FORMATS
from .escaping import for_stdout, for_terminal
from .modeling_reftr import RefTRForVisualGrounding
from .pipeline_reftr import VisualGroundingPipeline
from .processing_reftr import RefTRProcessor, to_coco_rle


def to_json(answer: dict) -> dict:
    """An answer of the pipeline as JSON has it: `box` [xmin, ymin, xmax, ymax], and the mask in COCO's run lengths."""
    written = {
        "phrase": answer["phrase"],
        "box": answer["box"] and [round(side, 2) for side in answer["box"].values()],
    }
    if "mask" in answer:
        written["segmentation"] = answer["mask"] and to_coco_rle(torch.from_numpy(np.asarray(answer["mask"]) > 0))
    return written


def image_suffixes() -> set[str]:
    """Return how the names of files of the accepted formats end, ".jpg" for example."""
    return {suffix for suffix, name in Image.registered_extensions().items() if name in IMAGE_FORMATS}


def read_questions(path: Path, texts: list[str] | None) -> list[tuple[str | None, dict]]:
    """
    Read the questions of a folder, whose pictures are asked `texts`, or of a file in JSON Lines, whose pictures lie
    beside it.

    Returns:
        `list[tuple]`: the file and line of each question, None for those of a folder, and the question.

    Raises:
        ValueError: if a folder has no picture, there is no text, or a line is no question.
    """
    if path.is_dir():
        pictures = sorted(file for file in path.rglob("*") if file.suffix.lower() in image_suffixes())
        if not pictures:
            raise ValueError(f"The folder {str(path)!r} has no picture in it.")
        if not texts:
            raise ValueError(f"Name what to look for in the pictures of {str(path)!r}: --text ...")
        return [(None, {"image": str(picture), "text": texts}) for picture in pictures]
    if texts:
        raise ValueError(f"The questions of {str(path)!r} bring their texts: leave --text out.")
    questions = []
    for number, _, question in read_json_lines(path):
        place = f"{str(path)!r}, line {number}"
        image = question.get("image") if isinstance(question, dict) else None
        if not isinstance(image, str):
            fault = question if isinstance(question, ValueError) else "'image' must be a str"
            raise ValueError(f'{place}: {fault}; expected {{"image": "1.jpg", "text": ["the cup"]}}.')
        questions.append((place, {**question, "image": str(path.parent / image)}))
    return questions


def answer_all(ground: VisualGroundingPipeline, questions: list[tuple], output: Path | None) -> int:
    """A line of JSON on stdout for each question, and a drawing in the folder `output`; how many had no answer."""
    num_failed = 0
    for number, (place, question) in enumerate(tqdm(questions, desc="answering", unit="picture"), start=1):
        line = {"image": question["image"]}
        try:
            answers = ground(question)
            line["answers"] = [to_json(answer) for answer in answers]
            if output:
                picture = ground.draw(question["image"], answers)
                # a name has up to 255 bytes
                picture.save(output / f"{number:05d}_{Path(question['image']).stem[:60]}.png")
        except (ValueError, OSError) as error:
            num_failed += 1
            line["error"] = str(error) if place is None else f"{place}: {error}"
        sys.stdout.write(for_stdout(line) + "\n")
    return num_failed


def main(argv: list[str] | None = None):
    """The command: answers as JSON on stdout."""
    parser = argparse.ArgumentParser(prog="reftr predict", description="Boxes and masks from words.")
    parser.add_argument("--model", required=True, help="RefTR folder or Hub id")
    parser.add_argument("--image", required=True, help="picture, folder of pictures, or .jsonl file of questions")
    parser.add_argument("--text", nargs="+", help="one or several expressions, each in quotes")
    parser.add_argument("--phrases", nargs="+", help="the phrases of one --text, a caption, that are asked for")
    parser.add_argument("--output", help="where to draw: a file (.png, .jpg, ...), or a folder for several pictures")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps ...; absent: an accelerator if there is one")
    args = parser.parse_args(argv)

    path = Path(args.image)
    are_many = path.is_dir() or path.suffix == ".jsonl"
    if not args.text and not are_many:
        raise ValueError('Name what to look for: --text "the red circle" ...')
    if args.phrases and (are_many or len(args.text) != 1):
        raise ValueError("--phrases are of one caption, the only --text, about one picture; several go into a .jsonl.")
    questions = read_questions(path, args.text) if are_many else []

    model = RefTRForVisualGrounding.from_pretrained(args.model).fused_copy()
    processor = RefTRProcessor.from_pretrained(args.model)
    ground = VisualGroundingPipeline(model, processor=processor, device=args.device)
    if are_many:
        output = Path(args.output) if args.output else None
        if output:
            output.mkdir(parents=True, exist_ok=True)
        num_failed = answer_all(ground, questions, output)
        if num_failed:
            raise ValueError(f'{num_failed} of {len(questions)} questions have no answer: see "error" in their lines.')
        return
    phrases = args.phrases and [args.phrases]
    answers = ground(args.image, text=args.text, phrases=phrases)
    if args.output:
        ground.draw(args.image, answers).save(args.output)
    sys.stdout.write(for_stdout([to_json(answer) for answer in answers], indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(for_terminal(f"error: {error}"))
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)
