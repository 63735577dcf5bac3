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

from .drawing_reftr import draw_answers
from .modeling_reftr import RefTRForVisualGrounding
from .processing_reftr import RefTRProcessor, from_coco_rle


def predict(model, processor, image: Image.Image, texts: list[str]) -> list[dict]:
    """
    Ask a model about one picture, which is encoded once.

    Args:
        model ([`RefTRForVisualGrounding`]), processor ([`RefTRProcessor`]): as loaded.
        image (`PIL.Image.Image`): the picture, upright.
        texts (`list[str]`): the expressions.

    Returns:
        `list[dict]`, one an expression: `phrase`, `box` as (x0, y0, x1, y1) in pixels of the picture, and from a model
        that predicts masks `segmentation`, COCO's run-length encoding.
    """
    inputs = processor(image, texts).to(model.device)
    with torch.no_grad():
        outputs = model(**inputs)
    size = [(image.height, image.width)]
    if outputs.pred_masks is None:
        answers = processor.post_process_grounding(outputs, size)
    else:
        answers = processor.post_process_referring_segmentation(outputs, size, return_coco_rle=True)
    return [
        {
            "phrase": text,
            "box": [round(value, 2) for value in answer["boxes"][0].tolist()],
            **({"segmentation": answer["segmentations"][0]} if "segmentations" in answer else {}),
        }
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
        masks = [from_coco_rle(answer["segmentation"]) for answer in answers if "segmentation" in answer]
        width = max(320, min(960, image.width))
        draw_answers(image, boxes, phrases, masks=masks, width=width).save(args.output)
    sys.stdout.write(json.dumps(answers, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
