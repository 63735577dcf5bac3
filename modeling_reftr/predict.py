"""
Answer questions about one's own picture:

    python -m modeling_reftr.predict --model runs/demo --image photo.jpg --text "the red circle" --output out.png

prints the answers as JSON and draws them.
"""

import argparse
import json
import sys

import torch
from PIL import Image

from .drawing_reftr import draw_boxes
from .modeling_reftr import RefTRForVisualGrounding
from .processing_reftr import RefTRProcessor


def predict(model, processor, image: Image.Image, texts: list[str]) -> list[dict]:
    """
    Ask a model about one picture, which is encoded once.

    Args:
        model ([`RefTRForVisualGrounding`]), processor ([`RefTRProcessor`]): as loaded.
        image (`PIL.Image.Image`): the picture, upright.
        texts (`list[str]`): the expressions.

    Returns:
        `list[dict]`, one an expression: `phrase`, and `box` as (x0, y0, x1, y1) in pixels of the picture.
    """
    inputs = processor(image, texts).to(model.device)
    with torch.no_grad():
        outputs = model(**inputs)
    answers = processor.post_process_grounding(outputs, [(image.height, image.width)])
    return [
        {"phrase": text, "box": [round(value, 2) for value in answer["boxes"][0].tolist()]}
        for text, answer in zip(texts, answers, strict=True)
    ]


def main(argv: list[str] | None = None):
    """The command: answers as JSON on stdout."""
    parser = argparse.ArgumentParser(prog="python -m modeling_reftr.predict", description="Boxes from words.")
    parser.add_argument("--model", required=True, help="RefTR folder or Hub id")
    parser.add_argument("--image", required=True, help="picture to look at")
    parser.add_argument("--text", required=True, nargs="+", help="one or several expressions, each in quotes")
    parser.add_argument("--output", help="where to draw the answers (.png, .jpg, ...)")
    args = parser.parse_args(argv)

    model = RefTRForVisualGrounding.from_pretrained(args.model).eval()
    processor = RefTRProcessor.from_pretrained(args.model)
    (image,) = processor.image_processor.open_images(args.image)
    answers = predict(model, processor, image, args.text)
    if args.output:
        boxes, phrases = ([answer[name] for answer in answers] for name in ("box", "phrase"))
        draw_boxes(image, boxes, phrases, width=max(320, min(960, image.width))).save(args.output)
    sys.stdout.write(json.dumps(answers, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
