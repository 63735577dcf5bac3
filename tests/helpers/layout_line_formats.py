"""Generate files in the formats that `line_formats` reads: MDETR's JSON, ODVG JSON Lines and PhraseCut."""

import json
from pathlib import Path

from PIL import Image


COCO = "COCO_train2014_000000581857.jpg"
FLICKR = "1000092795.jpg"
MDETR = {
    "train": {
        "images": [
            {
                "id": number,
                "file_name": COCO,
                "height": 427,
                "width": 640,
                "original_id": 581857,
                "caption": caption,
                "dataset_name": "refcoco",
                "tokens_negative": [[0, len(caption)]],
            }
            for number, caption in enumerate(["the lady with the blue shirt", "lady with back to us"])
        ],
        "annotations": [
            # the span is that of the root noun
            {"id": 0, "image_id": 0, "bbox": [103.93, 299.99, 134.22, 127.01], "tokens_positive": [[4, 8]]},
            {"id": 1, "image_id": 1, "bbox": [103.93, 299.99, 134.22, 127.01], "tokens_positive": [[0, 4]]},
        ],
        "categories": [{"supercategory": "object", "id": 1, "name": "object"}],
        "info": [],
        "licenses": [],
    },
    "val": {
        "images": [
            {
                "id": 7,
                "file_name": FLICKR,
                "height": 50,
                "width": 40,
                "caption": "Two young guys with shaggy hair look at their hands .",
                "dataset_name": "flickr",
                "original_img_id": 1000092795,
                "sentence_id": 0,
            },
            {"id": 8, "file_name": FLICKR, "height": 50, "width": 40, "caption": "Nobody", "dataset_name": "flickr"},
        ],
        "annotations": [
            {"id": 0, "image_id": 7, "bbox": [1, 2, 9, 30], "tokens_positive": [[0, 14]]},
            {"id": 1, "image_id": 7, "bbox": [20, 2, 10, 30], "tokens_positive": [[0, 14]]},
            {"id": 2, "image_id": 7, "bbox": [3, 2, 5, 6], "tokens_positive": [[20, 31], [40, 51]]},
            {"id": 3, "image_id": 7, "bbox": [3, 2, 5, 6], "tokens_positive": []},
            {"id": 4, "image_id": 99, "bbox": [3, 2, 5, 6], "tokens_positive": [[0, 3]]},
        ],
    },
}
ODVG = {
    "train": [
        {
            "filename": "a.jpg",
            "height": 30,
            "width": 40,
            "grounding": {
                "caption": "A car near two trees and a bench",
                "regions": [
                    {"bbox": [1, 2, 11, 12], "phrase": "a car", "tokens_positive": [[0, 5]]},
                    {"bbox": [20, 2, 25, 12], "phrase": "two trees", "tokens_positive": [[11, 20]]},
                    {"bbox": [30, 2, 35, 12], "phrase": "two trees", "tokens_positive": [[11, 20]]},
                    {"bbox": [[3, 20, 9, 25]], "phrase": ["A bench"]},
                    {"bbox": [3, 20, 9, 25]},
                ],
            },
        },
        {
            "filename": "b.jpg",
            "grounding": {"caption": "the dog", "regions": [{"bbox": [1, 2, 9, 9], "phrase": "the dog"}]},
        },
    ],
    "val": [
        {
            "filename": "c.jpg",
            "height": 30,
            "width": 40,
            "detection": {
                "instances": [
                    {"bbox": [1, 2, 11, 12], "label": 3, "category": "cat"},
                    {"bbox": [20, 2, 25, 12], "label": 4, "category": "dog"},
                    {"bbox": [30, 2, 35, 12], "label": 4, "category": "dog"},
                ]
            },
        }
    ],
}
PHRASECUT = {
    "train": [
        {
            "task_id": "2375429__1",
            "image_id": 2375429,
            "phrase": "walking people",
            "phrase_structure": {"name": "people", "attributes": ["walking"], "relation_descriptions": []},
            "ann_ids": [1, 2],
            "instance_boxes": [[1, 2, 10, 10], [20, 2, 6, 8]],
            "Polygons": [[[[1, 2], [11, 2], [11, 12], [1, 12]]], [[[20, 2], [26, 2], [26, 10], [20, 10]], [[21, 3]]]],
        },
        {
            "task_id": "2375429__2",
            "image_id": 2375429,
            "phrase": "sky",
            "ann_ids": [3],
            "instance_boxes": [[0, 0, 40, 5]],
            "Polygons": [[[[0, 0], [40, 0], [40, 5], [0, 5]]]],
        },
    ],
    "miniv": [
        {
            "task_id": "61512__2",
            "image_id": 61512,
            "phrase": "car",
            "ann_ids": [4],
            "instance_boxes": [[5, 5, 10, 10]],
            "Polygons": [[[[5, 5], [15, 5], [15, 15], [5, 15]]]],
        }
    ],
}
IMAGE_DATA = [
    {"image_id": 2375429, "coco_id": 271471, "flickr_id": 1, "height": 30, "width": 40, "split": "train", "url": ""},
    {"image_id": 61512, "coco_id": None, "flickr_id": None, "height": 30, "width": 40, "split": "val", "url": ""},
]


def save(path: Path, size: tuple[int, int]):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "gray").save(path)


def write_json(path: Path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def make_mdetr_json(folder: Path):
    for split, content in MDETR.items():
        write_json(folder / f"finetune_refcoco_{split}.json", content)
    save(folder / "train2014" / COCO, (640, 427))
    save(folder / "flickr30k-images" / FLICKR, (40, 50))


def make_odvg(folder: Path):
    for name in "abc":
        save(folder / "images" / f"{name}.jpg", (40, 30))
    for split, lines in ODVG.items():
        (folder / f"my_{split}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def make_phrasecut(folder: Path):
    for split, content in PHRASECUT.items():
        write_json(folder / f"refer_{split}.json", content)
    write_json(folder / "image_data_split.json", IMAGE_DATA)
    save(folder / "VG_100K" / "2375429.jpg", (40, 30))
    save(folder / "VG_100K_2" / "61512.jpg", (40, 30))


def make_line_formats(folder: Path, name: str):
    """Write the files and images of one format."""
    {"mdetr_json": make_mdetr_json, "odvg": make_odvg, "phrasecut": make_phrasecut}[name](folder)
