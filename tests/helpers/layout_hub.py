"""Generate small datasets in the columns of those on the Hub, with their traps."""

import io
import json
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from tests.helpers.layout_refcoco import rectangle


SIZE = (64, 48)
# numbers of COCO images -> boxes xyxy of their objects; some are of an odd size, and the last is past two edges
BOXES = {
    11: [[4.5, 6.0, 20.25, 30.0], [30.0, 8.0, 60.0, 40.0]],
    12: [[10.0, 10.0, 22.0, 34.0]],
    13: [[-2.0, 20.0, 30.0, 52.0]],
}


def file_name(number: int) -> str:
    return f"COCO_train2014_{number:012d}.jpg"


def encoded(number: int, size=SIZE, orientation: int | None = None) -> bytes:
    """Return the content of a JPEG."""
    pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    image, file = Image.fromarray(pixels), io.BytesIO()
    exif = image.getexif()
    if orientation:
        exif[0x0112] = orientation
    image.save(file, "JPEG", exif=exif)
    return file.getvalue()


def save_images(folder: Path, numbers=BOXES, **options) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / file_name(number)).write_bytes(encoded(number, **options))


def to_xywh(box_xyxy) -> list[float]:
    x0, y0, x1, y1 = box_xyxy
    return [x0, y0, x1 - x0, y1 - y0]


def run_lengths(box_xyxy, size=SIZE) -> dict:
    """Return the compressed run lengths of a box."""
    mask = np.zeros((size[1], size[0]), np.uint8, order="F")
    x0, y0, x1, y1 = (max(0, round(value)) for value in box_xyxy)
    mask[y0:y1, x0:x1] = 1
    found = coco_mask.encode(mask)
    return {"counts": found["counts"].decode(), "size": [int(side) for side in found["size"]]}


def texts_of(number: int, index: int) -> list[str]:
    return [f"object {index} of {number}", f"it, number {index}"]


def refer_row(number: int, index: int, ref_id: int, split: str) -> dict:
    """Return a row of jxu124/refcoco."""
    box = BOXES[number][index]
    sentences = [
        {"raw": text.upper(), "sent": text, "sent_id": 10 * ref_id + position, "tokens": text.split()}
        for position, text in enumerate(texts_of(number, index))
    ]
    annotation_id = 100 * number + index
    annotation = {
        "segmentation": [rectangle(*box)], "area": 1.0, "iscrowd": 0, "image_id": number, "bbox": to_xywh(box),
        "category_id": 1, "id": annotation_id,
    }  # fmt: skip
    info = {"file_name": file_name(number), "height": SIZE[1], "width": SIZE[0], "id": number, "license": 3}
    return {
        "sent_ids": [sentence["sent_id"] for sentence in sentences],
        "file_name": file_name(number).replace(".jpg", f"_{ref_id}.jpg"),
        "ann_id": annotation_id,
        "ref_id": ref_id,
        "image_id": number,
        "split": split,
        "sentences": sentences,
        "category_id": 1,
        "raw_anns": json.dumps(annotation),
        "raw_image_info": json.dumps(info),
        "raw_sentences": json.dumps(sentences),
        "image_path": f"coco/train2014/{file_name(number)}",
        "bbox": box,
        "captions": [sentence["raw"] for sentence in sentences],
        "global_image_id": f"coco.{number}",
        "anns_id": str(annotation_id),
    }


def refer_splits() -> dict[str, datasets.Dataset]:
    """Return the splits of jxu124/refcoco as its files name them; the refs of image 11 are not adjacent."""
    rows = {
        "train": [refer_row(11, 0, 0, "train"), refer_row(12, 0, 1, "train"), refer_row(11, 1, 2, "train")],
        "validation": [refer_row(12, 0, 3, "val")],
        "test": [refer_row(13, 0, 4, "testA")],
        "testB": [refer_row(11, 1, 5, "testB")],
    }
    return {split: datasets.Dataset.from_list(part) for split, part in rows.items()}


def question_row(number: int, index: int, **changes) -> dict:
    """Return a row of lmms-lab/RefCOCO."""
    box = BOXES[number][index]
    return {
        "question_id": str(100 * number + index),
        "image": {"bytes": encoded(number), "path": file_name(number)},
        "question": "Please carefully observe the area circled in the image and come up with a caption for it.",
        "answer": texts_of(number, index),
        "segmentation": rectangle(*box),
        "bbox": to_xywh(box),
        "iscrowd": 0,
        "file_name": file_name(number).replace(".jpg", f"_{index}.jpg"),
        **changes,
    }


QUESTION_FEATURES = datasets.Features(
    {
        "question_id": datasets.Value("string"),
        "image": datasets.Image(),
        "question": datasets.Value("string"),
        "answer": [datasets.Value("string")],
        "segmentation": [datasets.Value("float32")],
        "bbox": [datasets.Value("float32")],
        "iscrowd": datasets.Value("int8"),
        "file_name": datasets.Value("string"),
    }
)


def question_splits() -> dict[str, datasets.Dataset]:
    """Return the splits of lmms-lab/RefCOCO; one polygon is only a part of its object."""
    rows = {
        "val": [
            question_row(11, 0),
            question_row(12, 0),
            question_row(11, 1, segmentation=rectangle(30, 8, 40, 40)),
        ],
        "test": [question_row(13, 0)],
        "testA": [question_row(12, 0)],
    }
    return {split: datasets.Dataset.from_list(part, features=QUESTION_FEATURES) for split, part in rows.items()}


SAMPLE_FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "image_id": datasets.Value("int64"),
        "file_name": datasets.Value("string"),
        "samples": [
            {
                "id": datasets.Value("int64"),
                "image_id": datasets.Value("int64"),
                "category": datasets.Value("string"),
                "supercategory": datasets.Value("string"),
                "label": datasets.Value("string"),
                "sentences": [datasets.Value("string")],
                "bbox": [datasets.Value("float32")],
                "mask": {"counts": datasets.Value("string"), "size": [datasets.Value("int32")]},
            }
        ],
    }
)


def sample_row(number: int) -> dict:
    """Return a row of moondream/refcoco-m."""
    samples = [
        {
            "id": 100 * number + index,
            "image_id": number,
            "category": "cup",
            "supercategory": "kitchen",
            "label": "",
            "sentences": texts_of(number, index),
            "bbox": to_xywh(box),
            "mask": run_lengths(box),
        }
        for index, box in enumerate(BOXES[number])
    ]
    image = {"bytes": encoded(number), "path": None}
    return {"image": image, "image_id": number, "file_name": file_name(number), "samples": samples}


def sample_splits() -> dict[str, datasets.Dataset]:
    """Return the only split of moondream/refcoco-m."""
    rows = [sample_row(number) for number in BOXES]
    return {"validation": datasets.Dataset.from_list(rows, features=SAMPLE_FEATURES)}


def write_samples(folder: Path, numbers) -> Path:
    """Write a dataset of any number of images in the columns of moondream/refcoco-m; return the folder."""
    rows = []
    for number in numbers:
        image = {"bytes": encoded(number), "path": None}
        rows.append({**sample_row(11), "image": image, "image_id": number, "file_name": file_name(number)})
    folder.mkdir(parents=True)
    datasets.Dataset.from_list(rows, features=SAMPLE_FEATURES).to_parquet(folder / "validation.parquet")
    return folder


def caption_row(number: int, index: int, split: str, **changes) -> dict:
    """Return a row of JierunChen/Ref-L4."""
    box = to_xywh(BOXES[number][index])
    return {
        "id": f"{number}_{index}",
        "caption": texts_of(number, index)[0],
        "bbox": box,
        "bbox_area": box[2] * box[3],
        "bbox_id": f"bbox_{number}_{index}",
        "ori_category_id": "o365_12",
        "image_id": f"coco_{number}",
        "height": SIZE[1],
        "width": SIZE[0],
        "file_name": file_name(number),
        "is_rewrite": True,
        "split": split,
        **changes,
    }


def caption_splits() -> dict[str, datasets.Dataset]:
    """Return the splits of JierunChen/Ref-L4; two captions are of one box."""
    rows = {
        "val": [
            caption_row(11, 0, "val"),
            caption_row(12, 0, "val"),
            caption_row(11, 0, "val", id="rewritten", caption="a long caption of the same object"),
        ],
        "test": [caption_row(13, 0, "test")],
    }
    return {split: datasets.Dataset.from_list(part) for split, part in rows.items()}


SPLITS = {"refer": refer_splits, "question": question_splits, "sample": sample_splits, "caption": caption_splits}


def write_layout(folder: Path, layout: str) -> Path:
    """Write the Parquet files of a layout of `SPLITS`, and its images where its rows have none; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    configs = []
    for split, rows in SPLITS[layout]().items():
        (folder / "data").mkdir(exist_ok=True)
        rows.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
        configs.append(f"  - split: {split}\n    path: data/{split}-*")
    listed = "\n".join(configs)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{listed}\n---\n")
    if layout in ("refer", "caption"):
        save_images(folder.parent / "images" / "train2014")
    return folder
