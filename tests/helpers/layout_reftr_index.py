"""Generate the published indexes and images in the published folder tree, with a few records per file."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image


COCO = "COCO_train2014_000000581857.jpg"
COCO_GREY = "COCO_train2014_000000000009.jpg"
COCO_TALL = "COCO_train2014_000000000025.jpg"
RESC_SPLITS = {
    "unc": ("train", "val", "testA", "testB"),
    "unc+": ("train", "val", "testA", "testB"),
    "gref": ("train", "val"),
    "gref_umd": ("train", "val", "test"),
}
MASK_SPLITS = {
    "refcoco_unc": ("train", "val", "testA", "testB"),
    "refcoco+_unc": ("train", "val", "testA", "testB"),
    "refcocog_google": ("train", "val"),
    "refcocog_umd": ("train", "val", "test"),
}


def save(records, path: Path, legacy: bool = True):
    """Save records in the format of torch before 1.6, like the published files, or in the current one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(records, path, _use_new_zipfile_serialization=not legacy)


def rectangle(height, width, box):
    mask = np.zeros((height, width), np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 1
    return mask


def make_reftr_index(folder: Path) -> dict:
    """Write the folder tree, and return expected boxes."""
    folders = {
        "flickr30k/f30k_images": {"36979.jpg": (50, 40), "1001.jpg": (30, 30), "7.jpg": (20, 60)},
        "refcoco/images/train2014": {COCO: (64, 48), COCO_GREY: (40, 30), COCO_TALL: (30, 50)},
        "referit/images": {"2033.jpg": (48, 36), "40.jpg": (36, 48)},
        "visualgenome/VG_100K": {"1.jpg": (80, 60), "2417000.jpg": (30, 30)},
        "visualgenome/VG_100K_2": {"2.jpg": (60, 80), "9.jpg": (30, 30)},
    }
    for name, images in folders.items():
        (folder / name).mkdir(parents=True)
        for file, size in images.items():
            Image.new("L" if file == COCO_GREY else "RGB", size, 90).save(folder / name / file)

    resc = folder / "annotations_resc"
    none = [("r1", ["none"])]
    for name, splits in RESC_SPLITS.items():
        for split in splits:
            # boxes xywh, as lists, arrays and tensors
            records = [
                (COCO, "0.pth", [10.75, 20.5, 30.5, 17.25], f"the lady with the blue shirt {split}", none),
                (COCO_GREY, "1.pth", np.array([5, 5, 10, 10]), "Left Man", none),
                (COCO, "0.pth", (10.75, 20.5, 30.5, 17.25), "blue shirt", none),
                (COCO, "2.pth", torch.tensor([60.0, 40.0, 10.0, 10.0]), "corner", none),
                (COCO_TALL, "3.pth", torch.tensor([2, 3, 20, 40], dtype=torch.int32), " a café ", []),
            ]
            save(records, resc / name / f"{name}_{split}.pth", legacy=name != "gref")
    for split in ("train", "val", "test", "trainval"):
        records = [
            ("2033.jpg", "2033_1", [4, 5, 20, 30], f"sky {split}", none),
            ("40.jpg", "40_3", np.array([0, 0, 36, 24], np.float32), "top half", [("r7", ["top"])]),
        ]
        save(records * (2 if split == "trainval" else 1), resc / "referit" / f"referit_{split}.pth")
        if split != "trainval":
            records = [("36979.jpg", [1, 2, 30, 20], "A man"), ("1001.jpg", [0, 0, 30, 30], "a dog")]
            records += [("7.jpg", torch.tensor([1.0, 2.0, 3.0, 4.0]), "a cat")]
            save(records, resc / "flickr" / f"flickr_{split}.pth")
            caption = "A man with two buses ."
            records = [
                ("36979.jpg", [0, 11], [[1, 2, 30, 20], [5.5, 6, 10, 12]], ["A man", "two buses"], None, caption),
                ("36979.jpg", [3], [[1, 2, 30, 20]], ["a man"], None, "by a man ."),
                # boxes as one tensor, and the same phrase twice, at different offsets
                ("7.jpg", (0, 6), torch.tensor([[0, 0, 5, 5], [9, 9, 30, 70]]), ("a cat", "a cat"), [], "a cat a cat"),
            ]
            save(records, folder / "annotations" / "flickr" / f"flickr_{split}.pth")
    records = [("1.jpg", [1, 2, 30, 20], "tree"), ("2.jpg", [9.5, 9, 4, 4.5], "car")]
    records += [("2417000.jpg", [0, 0, 30, 30], "all of it"), ("9.jpg", (1, 1, 1, 1), "a dot"), *records[:1]]
    save(records, resc / "vg" / "vg_all.pth")

    for name, splits in MASK_SPLITS.items():
        family = name.split("_")[0]
        masks = folder / "refcoco" / "masks" / family
        masks.mkdir(parents=True, exist_ok=True)
        np.save(masks / "0.npy", rectangle(48, 64, (10, 20, 41, 37)))
        np.save(masks / "0_again.npy", rectangle(48, 64, (10, 20, 41, 37)))
        np.save(masks / "1.npy", rectangle(30, 40, (5, 5, 15, 15)).astype(bool))
        np.save(masks / "2.npy", np.zeros((48, 64)))
        np.save(masks / "3.npy", np.asfortranarray(rectangle(50, 30, (2, 3, 22, 43)) * 255.0))
        for split in splits:
            records = [
                (COCO, "0.npy", [10.75, 20.5, 41.25, 37.75], "blue shirt"),
                (COCO_GREY, "1.npy", [5, 5, 15, 15], "left man"),
                (COCO, "0_again.npy", [10.75, 20.5, 41.25, 37.75], f"the lady {split}"),
                (COCO, "2.npy", [0, 0, 10, 10], "nothing to see"),
                (COCO_TALL, "3.npy", np.array([2, 3, 22, 43]), "a café"),
            ]
            save(records, folder / "refcoco" / "anns" / family / f"{name}_{split}.pth")
    return {"coco_box_xyxy": [10.75, 20.5, 41.25, 37.75], "coco_box_whole_xyxy": [10, 20, 40, 37]}
