"""
Read the simplest files of referring expressions, in a JSON array or JSON Lines, as the evaluation files of Qwen-VL,
InternVL and LLaVA are.

    {"image": "coco/train2014/COCO_train2014_000000581857.jpg", "sent": "the lady with the blue shirt",
     "bbox": [103, 300, 238, 427], "height": 427, "width": 640}

The fields have one of the names in `IMAGE_NAMES`, `TEXT_NAMES` and `BOX_NAMES`. Each box of a list is an object that
the text refers to; it refers to nothing in the image if the list is empty.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .findings import Findings
from .quoting import quote
from .records import read_records, size_fields, target_of, to_box_list, words_in


IMAGE_NAMES = ("image", "image_path", "file_name", "filename", "img", "img_path")
TEXT_NAMES = (
    "text",
    "sent",
    "sents",
    "sentence",
    "sentences",
    "expression",
    "expressions",
    "caption",
    "phrase",
    "query",
)
BOX_NAMES = ("bbox", "box", "boxes", "bboxes")


def read_image_text_bbox(
    path: Path, findings: Findings, box_format: str = "xyxy", text_field: str | None = None
) -> Iterator[tuple[str, dict]]:
    """
    Yield (position, line) of each object of a file.

    Args:
        path (`Path`): the file.
        findings ([`Findings`]): takes what is left out, and malformed objects.
        box_format (`str`, *optional*, defaults to `"xyxy"`): convention of the boxes.
        text_field (`str`, *optional*): the field that has the words, if it has another name.

    Raises:
        OSError: if the file is missing or damaged.
    """
    for where, record in read_records(path, findings):
        line = None
        with findings.entry(where):
            image = first_field(record, IMAGE_NAMES)
            texts = words_in(first_field(record, TEXT_NAMES if text_field is None else (text_field,)))
            value = first_field(record, BOX_NAMES)
            target = target_of([{"box": box} for box in ([] if value == [] else to_box_list(value, "bbox"))])
            size = size_fields(record.get("width"), record.get("height"))
            line = {"image": image, **size, "box_format": box_format}
            line["expressions"] = [{"text": text.strip(), **target} for text in texts]
            findings.leave_out("objects without words", not texts)
        if line is not None and line["expressions"]:
            yield where, line


def first_field(record: dict, names: tuple[str, ...]) -> Any:
    """
    Return the field of a record that has one of several names.

    Raises:
        ValueError: if it has none of them.
    """
    for name in names:
        if name in record:
            return record[name]
    raise ValueError(f"it has the fields {quote(list(record))}; expected one of {', '.join(names)}.")
