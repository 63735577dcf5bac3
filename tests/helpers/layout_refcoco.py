"""Generate small files of the refer API in its authors' layout, with the irregularities of the real files."""

import json
import struct
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask


# the first real record of refs(unc).p, and its entry of instances.json (with an invented outline)
FIRST_IMAGE = {"id": 581857, "width": 427, "height": 640, "file_name": "COCO_train2014_000000581857.jpg"}
FIRST_REF = {
    "ref_id": 0,
    "ann_id": 1719310,
    "category_id": 1,
    "image_id": 581857,
    "file_name": "COCO_train2014_000000581857_16.jpg",
    "split": "train",
    "sent_ids": [0, 1, 2],
    "sentences": [
        {
            "tokens": ["the", "lady", "with", "the", "blue", "shirt"],
            "raw": "THE LADY WITH THE BLUE SHIRT",
            "sent": "the lady with the blue shirt",
            "sent_id": 0,
        },
        {
            "tokens": ["lady", "with", "back", "to", "us"],
            "raw": "Lady with back to us.",
            "sent": "lady with back to us",
            "sent_id": 1,
        },
        {"tokens": ["blue", "shirt"], "raw": "blue shirt", "sent": "blue shirt", "sent_id": 2},
    ],
}
FIRST_BOX_XYWH = [103.93, 299.99, 134.22, 177.42]

SPLITS = {
    "refcoco_unc": ("val", "testA", "testB"),
    "refcoco_google": ("val", "test"),
    "refcoco+_unc": ("val", "testA", "testB"),
    "refcocog_umd": ("val", "test"),
    "refcocog_google": ("val",),
    "refclef_unc": ("val", "testA", "testB", "testC"),
    "refclef_berkeley": ("val", "test"),
}


def python2_pickle(value) -> bytes:
    """Pickle a value like Python 2's cPickle in protocol 2, where a str is bytes."""

    def write(value):
        if isinstance(value, dict):
            return b"}(" + b"".join(write(key) + write(item) for key, item in value.items()) + b"u"
        if isinstance(value, list):
            return b"](" + b"".join(map(write, value)) + b"e"
        if isinstance(value, str):
            text = value.encode("latin-1")
            return b"T" + struct.pack("<i", len(text)) + text
        return b"J" + struct.pack("<i", value)

    return b"\x80\x02" + write(value) + b"."


def rectangle(x0, y0, x1, y1) -> list[float]:
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def rectangle_mask(size, box_xyxy) -> np.ndarray:
    """Return a mask (height, width) of an image of size (width, height), true in a box of integer coordinates."""
    mask = np.zeros((size[1], size[0]), bool)
    x0, y0, x1, y1 = box_xyxy
    mask[y0:y1, x0:x1] = True
    return mask


def run_lengths(mask: np.ndarray) -> list[int]:
    """Return the uncompressed COCO counts of a mask: column by column, zeros first."""
    counts, last = [], False
    for value in mask.ravel(order="F"):
        if not counts or value != last:
            counts += [0] if not counts and value else []
            counts.append(0)
        counts[-1] += 1
        last = value
    return counts


def compressed(mask: np.ndarray) -> dict:
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def sentence(number: int, sent: str) -> dict:
    return {"tokens": sent.split(), "raw": sent.upper() + ".", "sent": sent, "sent_id": number}


def save_picture(path: Path, size, orientation: int | None = None, mode: str = "RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    exif = image.getexif()
    if orientation:
        exif[0x0112] = orientation
    image.convert(mode).save(path, exif=exif, **options)


def make_refcoco(folder: Path, name: str = "refcoco_unc", images: str | None = None) -> dict:
    """
    Write one dataset below `folder`, with its images in `folder / images`. Its images:

    581857  the first real record, in train (RefCLEF has other images, with numbers as well)
    20      a crowd as uncompressed run lengths, a mask as compressed ones, and a box across two edges
    30      annotated at twice the size of the JPEG, in polygons and in run lengths
    40      a JPEG with an orientation, annotated upright
    50      a JPEG with an orientation, annotated as stored: it is not rotated
    60      only invalid annotations
    70      a grey JPEG, an object in two parts, one inside the other's box, and a text that is not ASCII
    71      an object with two references that are not adjacent
    72      an object without a segmentation, and one with an empty list
    73      an object and its polygon that begin outside the image
    74      a progressive JPEG; two objects with the same box
    80      without a reference: its image does not exist
    100...  one image per further split; 100 is in val, and for RefCOCOg (google) also in train
    110     only for RefCLEF (unc): references of testAB, testBC, testAC and testA, in this order

    Returns:
        `dict`: expectations of the tests: "refs_file", "instances_file", "image_dir", "splits", "expected" (image
        number -> list of (box xyxy, mask or None)), "dropped" (number of expressions).
    """
    dataset, split_by = name.rsplit("_", 1)
    refclef = dataset == "refclef"
    image_dir = folder / (images or ("images/saiapr_tc-12" if refclef else "images/train2014"))
    instances = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "cup"}],
    }
    refs = []

    def add_image(number, annotated, stored=None, orientation=None, **options):
        file_name = f"{number // 1000:02d}/images/{number}.jpg" if refclef else f"COCO_train2014_{number:012d}.jpg"
        instances["images"].append(
            {"id": number, "width": annotated[0], "height": annotated[1], "file_name": file_name}
        )
        save_picture(image_dir / file_name, stored or annotated, orientation, **options)

    def add(number, box_xywh, segmentation, sentences, split="train", category=2, crowd=0, annotation_id=None):
        annotation_id = annotation_id or 1000 * number + len(refs)
        if box_xywh is not None:
            instances["annotations"].append(
                {
                    "id": annotation_id,
                    "image_id": number,
                    "category_id": category,
                    "bbox": box_xywh,
                    "segmentation": segmentation,
                    "iscrowd": crowd,
                    "area": 1.0,
                }
            )
        first = 3 + sum(len(ref["sentences"]) for ref in refs)
        refs.append(
            {
                "ref_id": len(refs),
                "ann_id": annotation_id,
                "category_id": category,
                "image_id": number,
                "file_name": f"COCO_train2014_{number:012d}_{len(refs)}.jpg",
                "split": split,
                "sent_ids": list(range(first, first + len(sentences))),
                "sentences": [sentence(first + index, sent) for index, sent in enumerate(sentences)],
            }
        )

    add_image(FIRST_IMAGE["id"], (FIRST_IMAGE["width"], FIRST_IMAGE["height"]))
    instances["annotations"].append(
        {
            "id": FIRST_REF["ann_id"],
            "image_id": FIRST_REF["image_id"],
            "category_id": 1,
            "bbox": FIRST_BOX_XYWH,
            "segmentation": [rectangle(104, 300, 238, 477), rectangle(110, 310, 120, 320)],
            "iscrowd": 0,
            "area": 1.0,
        }
    )
    refs.append(FIRST_REF)

    size = (40, 30)
    crowd = rectangle_mask(size, (5, 10, 25, 28))
    cut = rectangle_mask(size, (30, 20, 40, 30))
    add_image(20, size)
    add(20, [5.0, 10.0, 20.0, 18.0], {"size": [30, 40], "counts": run_lengths(crowd)}, ["a crowd"], crowd=1)
    # RefCLEF stores lists of compressed run lengths
    runs = [compressed(cut)] if refclef else compressed(cut)
    add(20, [30.0, 20.0, 15.5, 12.0], runs, ["the corner", " the same corner "])

    doubled = rectangle_mask((80, 60), (20, 20, 60, 40))
    add_image(30, (80, 60), stored=size)
    add(30, [20.0, 20.0, 40.0, 20.0], [rectangle(20, 20, 60, 40)], ["annotated larger"])
    add(30, [20.0, 20.0, 40.0, 20.0], {"size": [60, 80], "counts": run_lengths(doubled)}, ["larger, as runs"])

    add_image(40, (30, 40), stored=size, orientation=6)
    add(40, [2.0, 3.0, 20.0, 35.0], [rectangle(2, 3, 22, 38)], ["turned"])
    add_image(50, size, stored=size, orientation=6)
    add(50, [2.0, 3.0, 35.0, 20.0], [rectangle(2, 3, 37, 23)], ["as stored"])

    add_image(60, size)
    nan = float("nan")
    for box_xywh, sent in (
        ([nan, 1.0, 5.0, 5.0], "not a number"),
        ([5.0, 5.0, 0.0, 9.0], "without width"),
        ([20.0, 20.0, -9.0, 5.0], "inverted"),
        ([90.0, 5.0, 9.0, 9.0], "outside"),
        ([], "empty"),
        (None, "no annotation"),
        ([1.0, 1.0, 9.0, 9.0], "   "),
    ):
        add(60, box_xywh, [rectangle(1, 1, 9, 9)], [sent])

    add_image(70, size, mode="L")
    add(70, [2.0, 2.0, 20.0, 10.0], [rectangle(2, 2, 8, 12), rectangle(15, 4, 22, 12)], ["a café, don't ask"])
    add_image(71, size)
    add(71, [4.0, 4.0, 9.0, 9.0], [rectangle(4, 4, 13, 13)], ["said once"], annotation_id=710)
    add(71, [20.0, 4.0, 9.0, 9.0], [rectangle(20, 4, 29, 13)], ["another"])
    refs.append({**refs[-2], "ref_id": len(refs), "sent_ids": [9000], "sentences": [sentence(9000, "said again")]})
    add_image(72, size)
    add(72, [4.0, 4.0, 9.5, 9.5], None, ["without a mask"])
    add(72, [20.0, 4.0, 9.0, 9.0], [], ["an empty one"], category=77)  # an unknown category, too
    add_image(73, size)
    add(73, [-4.0, -3.0, 14.0, 13.0], [rectangle(-4, -3, 10, 10)], ["over two edges"])
    add_image(74, size, progressive=True)
    add(74, [6.0, 7.0, 8.0, 9.0], [rectangle(6, 7, 14, 16)], ["one", "the one", "it"])
    add(74, [6.0, 7.0, 8.0, 9.0], [rectangle(6, 7, 9, 16), rectangle(11, 7, 14, 16)], ["its two ends"])
    instances["images"].append({"id": 80, "width": 9, "height": 9, "file_name": "COCO_train2014_000000000080.jpg"})
    instances["annotations"].append({"id": 8000, "image_id": 80, "category_id": 1, "bbox": [1, 1, 2, 2]})

    for index, split in enumerate(SPLITS[name]):
        number = 100 + index
        add_image(number, size)
        add(number, [1.0, 2.0, 30.0, 20.0], [rectangle(1, 2, 31, 22)], [f"of {split}"], split)
    if name == "refcocog_google":
        add(100, [3.0, 4.0, 9.0, 9.0], [rectangle(3, 4, 12, 13)], ["of train, in an image of val"])

    if name == "refclef_unc":
        add_image(110, size)
        for index, split in enumerate(("testAB", "testBC", "testAC", "testA")):
            add(
                110,
                [1.0 + index, 2.0, 9.0, 9.0],
                [rectangle(1 + index, 2, 10 + index, 11)],
                [f"{split} of 110"],
                split,
            )

    annotation_dir = folder / dataset
    annotation_dir.mkdir(parents=True, exist_ok=True)
    (annotation_dir / "instances.json").write_text(json.dumps(instances))
    (annotation_dir / f"refs({split_by}).p").write_bytes(python2_pickle(refs))
    x, y, width, height = FIRST_BOX_XYWH
    return {
        "instances_file": annotation_dir / "instances.json",
        "refs_file": annotation_dir / f"refs({split_by}).p",
        "image_dir": image_dir,
        "splits": ("train", *SPLITS[name]),
        "dropped": 7,
        "expected": {
            581857: [([x, y, x + width, y + height], rectangle_mask((427, 640), (104, 300, 238, 477)))],
            20: [([5, 10, 25, 28], crowd), ([30, 20, 40, 30], cut)],
            30: [([10, 10, 30, 20], rectangle_mask(size, (10, 10, 30, 20)))] * 2,
            40: [([2, 3, 22, 38], rectangle_mask((30, 40), (2, 3, 22, 38)))],
            50: [([2, 3, 37, 23], rectangle_mask(size, (2, 3, 37, 23)))],
            70: [
                ([2, 2, 22, 12], rectangle_mask(size, (2, 2, 8, 12)) | rectangle_mask(size, (15, 4, 22, 12))),
            ],
            71: [
                ([4, 4, 13, 13], rectangle_mask(size, (4, 4, 13, 13))),
                ([20, 4, 29, 13], rectangle_mask(size, (20, 4, 29, 13))),
            ],
            72: [([4, 4, 13.5, 13.5], None), ([20, 4, 29, 13], None)],
            73: [([0, 0, 10, 10], rectangle_mask(size, (0, 0, 10, 10)))],
            74: [
                ([6, 7, 14, 16], rectangle_mask(size, (6, 7, 14, 16))),
                ([6, 7, 14, 16], rectangle_mask(size, (6, 7, 9, 16)) | rectangle_mask(size, (11, 7, 14, 16))),
            ],
        },
    }
