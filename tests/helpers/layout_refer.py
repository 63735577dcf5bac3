"""Generate files in the refer API's layout that are not RefCOCO: gRefCOCO, and a dataset of aerial images."""

import json
import pickle
from pathlib import Path

from tests.helpers.layout_refcoco import compressed, rectangle, rectangle_mask, run_lengths, save_picture, sentence


SIZE = (40, 30)
CATEGORIES = [{"id": 1, "name": "person", "supercategory": "person"}, {"id": 2, "name": "cup"}]


def write_references(refs: list, path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json.dumps(refs).encode() if path.suffix == ".json" else pickle.dumps(refs, 2))


def make_grefcoco(folder: Path, ending: str = "json") -> dict:
    """
    Write gRefCOCO below `folder`. Images 1 and 2 are of train, 3 of val, 4 of testA, 5 of testB; its references name
    one object, several, an object twice, a crowd, none in each spelling, a missing object, and one without a box.
    """
    images, annotations, refs = [], [], []
    boxes = {
        11: (1, [2, 3, 10, 12]),
        12: (1, [20, 3, 9, 12]),
        13: (1, [5, 18, 30, 10]),
        14: (1, [90, 90, 5, 5]),  # outside its image
        21: (2, [2, 2, 8, 8]),
        31: (3, [2, 2, 8, 8]),
        32: (3, [20, 2, 8, 8]),
        41: (4, [3, 3, 9, 9]),
        51: (5, [3, 3, 9, 9]),
    }
    for number in range(1, 6):
        file_name = f"COCO_train2014_{number:012d}.jpg"
        images.append({"id": number, "width": SIZE[0], "height": SIZE[1], "file_name": file_name})
        save_picture(folder / "images/train2014" / file_name, SIZE)
    for number, (image_id, (x, y, width, height)) in boxes.items():
        segmentation = [rectangle(x, y, x + width, y + height)]
        if number == 13:  # a crowd
            mask = rectangle_mask(SIZE, (x, y, x + width, y + height))
            segmentation = {"size": [SIZE[1], SIZE[0]], "counts": run_lengths(mask)}
        annotations.append(
            {
                "id": number,
                "image_id": image_id,
                "category_id": 1 + number % 2,
                "bbox": [float(x), float(y), float(width), float(height)],
                "segmentation": segmentation,
                "iscrowd": int(number == 13),
                "area": float(width * height),
            }
        )
    for image_id, split, ann_id, sentences in (
        (1, "train", [11, 12], ["both people", "the two people"]),
        (1, "train", [12], ["the right one"]),
        (1, "train", [-1], ["the dog", "a cat"]),
        (1, "train", [13, 11], ["the crowd and the left one"]),
        (2, "train", [], ["nobody"]),
        (2, "train", None, ["nothing"]),
        (2, "train", -1, ["no one"]),
        (2, "train", [21, 21], ["the cup"]),
        (1, "train", [11, 999], ["with one that is missing"]),
        (1, "train", [11, 14], ["with one outside"]),
        (3, "val", [32, 31], ["both, right to left"]),
        (4, "testA", [41], ["of testA"]),
        (5, "testB", [51], ["of testB"]),
    ):
        first = sum(len(ref["sentences"]) for ref in refs)
        categories = [1 + number % 2 for number in ann_id] if isinstance(ann_id, list) else -1
        refs.append(
            {
                "ref_id": len(refs),
                "ann_id": ann_id,
                "category_id": categories or [-1],
                "image_id": image_id,
                "file_name": f"COCO_train2014_{image_id:012d}_{len(refs)}.jpg",
                "split": split,
                "sent_ids": list(range(first, first + len(sentences))),
                "sentences": [sentence(first + index, text) for index, text in enumerate(sentences)],
                "no_target": not boxes.keys() & set(ann_id if isinstance(ann_id, list) else []),
            }
        )
    path = folder / "grefcoco" / f"grefs(unc).{ending}"
    write_references(refs, path)
    instances = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (path.parent / "instances.json").write_text(json.dumps(instances))
    return {"refs_file": path, "instances_file": path.parent / "instances.json"}


def make_refer(folder: Path, name: str = "refs(unc).p", image_folder: str = "../images/rrsisd/JPEGImages") -> dict:
    """Write a dataset like RRSIS-D to `folder`: 12 images with two objects each, masks as lists of run lengths."""
    images, annotations, refs = [], [], []
    for number in range(1, 13):
        file_name = f"{number:05d}.jpg"
        images.append({"id": number, "width": SIZE[0], "height": SIZE[1], "file_name": file_name})
        save_picture(folder / image_folder / file_name, SIZE)
        for index, (x, y, width, height) in enumerate([(2, 3, 10, 12), (20, 9, 15, 20)]):
            mask = rectangle_mask(SIZE, (x, y, x + width, y + height))
            annotations.append(
                {
                    "id": 10 * number + index,
                    "image_id": number,
                    "category_id": 2,
                    "bbox": [x, y, width, height],
                    "segmentation": [compressed(mask)],
                    "iscrowd": 0,
                }
            )
            refs.append(
                {
                    "ref_id": len(refs),
                    "ann_id": 10 * number + index,
                    "category_id": 2,
                    "image_id": number,
                    "file_name": file_name,
                    "split": "test" if number == 12 else "val" if number == 11 else "train",
                    "sent_ids": [len(refs)],
                    "sentences": [sentence(len(refs), f"the field {len(refs)}")],
                }
            )
    write_references(refs, folder / name)
    instances = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (folder / "instances.json").write_text(json.dumps(instances))
    return {"refs_file": folder / name, "instances_file": folder / "instances.json"}
