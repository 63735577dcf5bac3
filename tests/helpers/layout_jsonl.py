"""Generate a user's JSON Lines: two splits, a dozen images, boxes, phrases and every kind of mask."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


# image name without its suffix -> (size, mode)
PICTURES = {
    **dict.fromkeys("abcdefgh", ((40, 30), "RGB")),
    "grey": ((40, 30), "L"),
    "palette": ((40, 30), "P"),
    "inner/see-through": ((30, 50), "RGBA"),
    "übung 1": ((60, 20), "RGB"),
}
BOX = [1, 2, 11, 12]
POLYGON = [2, 2, 12, 2, 12, 9]
PHRASES = [
    {"text": "a car", "box": BOX},
    {"start": 11, "end": 17, "boxes": [[0, 0, 5, 5], [9, 9, 12, 12]]},
]
# split -> lines
LINES = {
    "train": [
        {"image": "pictures/a.png", "expressions": [{"text": "the red car", "box": BOX, "types": ["car"]}]},
        {"image": "pictures/b.png", "expressions": [{"text": "a car near a tree", "phrases": PHRASES}]},
        {"image": "pictures/grey.png", "expressions": [{"text": "it", "box": [0, 0, 40, 30]}] * 2},
        {"image": "pictures/palette.png", "expressions": [{"text": "over the edge", "box": [-3, 5, 99, 12.5]}]},
        {"image": "pictures/inner/see-through.png", "expressions": [{"text": "the glass", "box": [0, 0, 9, 50]}]},
        {"image": "pictures/übung 1.png", "image_id": 17, "expressions": [{"text": "die Tür ☕", "box": BOX}]},
        # the same image on two lines, with one id per line
        {"image": "pictures/d.png", "image_id": "d1", "expressions": [{"text": "two", "boxes": [BOX, [0, 0, 2, 2]]}]},
        {"image": "pictures/d.png", "image_id": "d2", "expressions": [{"text": "one", "box": BOX, "category": "car"}]},
    ],
    "validation": [
        {
            "image": "pictures/c.png",
            "box_format": "xywh",
            "expressions": [
                {"text": "drawn", "mask": "pictures/mask.png"},
                {"text": "lengths", "segmentation": {"size": [30, 40], "counts": [305, 10, 885]}},
                {"text": "a polygon", "polygon": [POLYGON], "box": [2, 2, 10, 7]},
            ],
        },
        {"image": "pictures/e.png", "expressions": [{"text": "flat", "polygon": POLYGON}]},
        {"image": "pictures/f.png", "expressions": [{"text": "of COCO", "segmentation": [POLYGON, POLYGON[::-1]]}]},
        {"image": "pictures/g.png", "expressions": [{"text": "a mask and a box", "mask": "mask.png", "box": BOX}]},
        {"image": "pictures/h.png", "expressions": [{"text": "the lot of it " * 40, "box": BOX}]},
    ],
}


def make_jsonl(folder: Path):
    """Write train.jsonl, validation.jsonl, the images and two masks."""
    for name, (size, mode) in PICTURES.items():
        path = folder / "pictures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, "gray").convert(mode).save(path)
    mask = np.zeros((30, 40), np.uint8)
    mask[5:15, 10:30] = 255
    for path in (folder / "pictures" / "mask.png", folder / "mask.png"):
        Image.fromarray(mask).save(path)
    for split, lines in LINES.items():
        text = "".join(f"{json.dumps(line, ensure_ascii=split == 'train')}\n" for line in lines)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
