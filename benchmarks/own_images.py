"""
Measure a trained demo on images that people draw themselves: plain coloured shapes on one background colour, in sizes
and aspect ratios of cameras and screens. They are asked for by colour and place; expressions that name nothing but the
shape are counted apart.

    python benchmarks/own_images.py --model runs/demo --output benchmarks/results/demo/own_images.json

The images share nothing with the generated dataset but its words: other colours of each name, no texture, no overlap,
no noise, JPEG compression, grey and transparent ones among them.
"""

import argparse
import io
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.ops import box_iou

from modeling_reftr import RefTRForVisualGrounding, RefTRProcessor, VisualGroundingPipeline
from modeling_reftr.decoding_reftr import open_image_file


SIZES = {
    "square": (480, 480),
    "4:3": (640, 480),
    "16:9": (1280, 720),
    "9:16": (720, 1280),
    "1:2": (300, 600),
    "2:1": (600, 300),
}
NUM_IMAGES = 20  # per size
SHAPE_ALONE = "shape alone"  # column of the expressions that name nothing but the shape, of all sizes
COLORS = {
    "red": ((220, 30, 30), (190, 50, 45), (235, 64, 52)),
    "green": ((40, 160, 60), (30, 140, 50), (70, 180, 80)),
    "blue": ((40, 80, 210), (30, 60, 190), (70, 110, 230)),
}
BACKGROUNDS = ((120, 120, 120), (150, 140, 130), (90, 95, 100), (165, 170, 160))
STAR = ((0.5, 0.0), (0.62, 0.36), (1.0, 0.36), (0.69, 0.59), (0.81, 0.95), (0.5, 0.73), (0.19, 0.95), (0.31, 0.59))
STAR = (*STAR, (0.0, 0.36), (0.38, 0.36))
GAP = 0.04  # between objects, in shorter sides


def draw_image(rng: np.random.Generator, width: int, height: int) -> tuple[Image.Image, list[dict]]:
    """Draw two or three objects of different colours, and return the image with their names and boxes (xyxy)."""
    image = Image.new("RGB", (width, height), BACKGROUNDS[rng.integers(len(BACKGROUNDS))])
    draw, shorter, objects = ImageDraw.Draw(image), min(width, height), []
    for color in rng.permutation(list(COLORS))[: rng.integers(2, 4)]:
        shape, side = str(rng.choice(["circle", "square", "star"])), rng.uniform(0.25, 0.42) * shorter
        for _ in range(100):
            left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
            box = (left, top, left + side, top + side)
            if all(is_apart(box, other["box"], GAP * shorter) for other in objects):
                break
        else:
            continue
        fill = COLORS[color][rng.integers(3)]
        if shape == "star":
            draw.polygon([(left + x * side, top + y * side) for x, y in STAR], fill=fill)
            box = (left, top, left + side, top + 0.95 * side)
        else:
            getattr(draw, {"circle": "ellipse", "square": "rectangle"}[shape])(box, fill=fill)
        objects.append({"color": str(color), "shape": shape, "box": box})
    return image, objects


def is_apart(box: tuple, other: tuple, gap: float) -> bool:
    """Return whether two boxes (xyxy) are at least `gap` pixels apart in one direction."""
    return any(box[axis] > other[axis + 2] + gap or other[axis] > box[axis + 2] + gap for axis in (0, 1))


def ask(objects: list[dict]) -> list[tuple[str, tuple]]:
    """Return expressions with the box of their object: by colour, by colour and shape, and by place."""
    questions = []
    for item in objects:
        questions.append((f"the {item['color']} shape", item["box"]))
        questions.append((f"the {item['color']} {item['shape']}", item["box"]))
    middles = [(item["box"][0] + item["box"][2]) / 2 for item in objects]
    if len(objects) > 1:
        questions.append(("the leftmost shape", objects[int(np.argmin(middles))]["box"]))
        questions.append(("the rightmost shape", objects[int(np.argmax(middles))]["box"]))
    return questions


def vary_file(image: Image.Image, number: int) -> Image.Image:
    """Return the image as files bring it: every second one as JPEG, every fifth one with an alpha channel."""
    if number % 5 == 4:
        return image.convert("RGBA")
    if number % 2:
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=80)
        return open_image_file(io.BytesIO(buffer.getvalue()))
    return image


def ask_by_shape(objects: list[dict]) -> list[tuple[str, tuple]]:
    """Return expressions that name nothing but the shape, where one object has it, with the box of the object."""
    shapes = [item["shape"] for item in objects]
    return [(f"the {item['shape']}", item["box"]) for item in objects if shapes.count(item["shape"]) == 1]


def measure(ground: VisualGroundingPipeline, num_images: int, seed: int) -> dict:
    """Return accuracy at IoU 0.5 and mean IoU per size of the images, and of all sizes with the shape alone."""
    ious = {name: [] for name in (*SIZES, SHAPE_ALONE)}
    for name, (width, height) in SIZES.items():
        for number in range(num_images):
            image, objects = draw_image(np.random.default_rng([seed, width, height, number]), width, height)
            questions, by_shape = ask(objects), ask_by_shape(objects)
            texts, boxes = zip(*questions, *by_shape, strict=True)
            answers = ground(vary_file(image, number), text=list(texts))
            found = torch.tensor([list(answer["box"].values()) for answer in answers], dtype=torch.float64)
            values = box_iou(found, torch.tensor(boxes, dtype=torch.float64)).diagonal().tolist()
            ious[name] += values[: len(questions)]
            ious[SHAPE_ALONE] += values[len(questions) :]
    return {
        name: {
            "accuracy@0.5": round(float(np.mean(np.array(values) > 0.5)), 4),
            "mean_iou": round(float(np.mean(values)), 4),
            "images": num_images * (len(SIZES) if name == SHAPE_ALONE else 1),
            "expressions": len(values),
        }
        for name, values in ious.items()
    }


def main():
    parser = argparse.ArgumentParser(description="Measure a trained demo on images that people draw themselves.")
    parser.add_argument("--model", required=True, nargs="+", help="folders of trained models, one per seed")
    parser.add_argument("--num_images", type=int, default=NUM_IMAGES, help="images of each size")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other images")
    parser.add_argument("--output", type=Path, help="JSON file to write the result to")
    options = parser.parse_args()
    result = {}
    for folder in options.model:
        model, processor = RefTRForVisualGrounding.from_pretrained(folder), RefTRProcessor.from_pretrained(folder)
        ground = VisualGroundingPipeline(model.eval(), processor=processor, device="cpu")
        result[Path(folder).name] = measure(ground, options.num_images, options.seed)
    text = json.dumps(result, indent=2) + "\n"
    if options.output:
        options.output.write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
