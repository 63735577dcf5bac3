"""One's own data in JSON Lines: two splits, boxes, phrases and every kind of mask."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def make_jsonl(folder: Path):
    """Write train.jsonl, validation.jsonl and pictures/."""
    (folder / "pictures").mkdir(parents=True)
    for name in ("a", "b", "c"):
        Image.new("RGB", (40, 30), "gray").save(folder / "pictures" / f"{name}.png")
    mask = np.zeros((30, 40), np.uint8)
    mask[5:15, 10:30] = 255
    Image.fromarray(mask).save(folder / "pictures" / "mask.png")
    phrases = [
        {"text": "a car", "box": [1, 2, 11, 12]},
        {"start": 11, "end": 17, "boxes": [[0, 0, 5, 5], [9, 9, 12, 12]]},
    ]
    lines = {
        "train": [
            {
                "image": "pictures/a.png",
                "expressions": [{"text": "the red car", "box": [1, 2, 11, 12], "types": ["car"]}],
            },
            {"image": "pictures/b.png", "expressions": [{"text": "a car near a tree", "phrases": phrases}]},
        ],
        "validation": [
            {
                "image": "pictures/c.png",
                "box_format": "xywh",
                "expressions": [
                    {"text": "drawn", "mask": "pictures/mask.png"},
                    {"text": "lengths", "segmentation": {"size": [30, 40], "counts": [305, 10, 885]}},
                    {"text": "a polygon", "polygon": [[2, 2, 12, 2, 12, 9]], "box": [2, 2, 10, 7]},
                ],
            }
        ],
    }
    for split, rows in lines.items():
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
