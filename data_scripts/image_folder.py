"""
Read the metadata.jsonl of an `imagefolder` of the datasets library.

    {"file_name": "1.jpg", "objects": {"bbox": [[x, y, width, height]], "categories": ["car"]}}
    {"file_name": "2.jpg", "text": "the red car", "bbox": [x, y, width, height]}

`objects` are lists of equal length, or a list of objects. The words of an object are its own (`caption`, `text` or the
like), else its category where the image has one such object. Words that several objects have refer to all of these.
Numbers of categories have no names in this file.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .findings import Findings
from .kinds import TEXT, check_fields
from .quoting import quote
from .records import LabeledObject, expressions_of_objects, read_records, size_fields, texts_of


CATEGORY_NAMES = ("category", "categories", "label", "labels", "class", "classes", "name")


def read_image_folder(
    path: Path, findings: Findings, box_format: str = "xywh", text_field: str | None = None
) -> Iterator[tuple[str, dict]]:
    """
    Yield (position, line) of each image of a file that has an expression.

    Args:
        path (`Path`): metadata.jsonl.
        findings ([`Findings`]): takes what is left out, and malformed lines.
        box_format (`str`, *optional*, defaults to `"xywh"`): convention of the boxes.
        text_field (`str`, *optional*): the field of an object that has its words.

    Raises:
        ValueError: if the file is of another type.
        OSError: if the file is missing or damaged.
    """
    if path.suffix.lower() in (".csv", ".parquet"):
        raise ValueError(
            f"{str(path)!r} is a {path.suffix[1:]} file; expected metadata.jsonl. Load the folder itself as a "
            "dataset, with columns: it may have any of these files."
        )
    for where, record in read_records(path, findings):
        expressions = []
        with findings.entry(where):
            check_fields(record, {"file_name": TEXT}, "the line")
            objects = []
            for item in list_objects(record):
                categories = (item[name] for name in CATEGORY_NAMES if isinstance(item.get(name), str))
                target = {"box": item.get("bbox", item.get("box"))}
                objects.append(LabeledObject("", target, next(categories, None), texts_of(item, text_field)))
            expressions = [expression for _, expression in expressions_of_objects(objects, findings)]
        if expressions:
            size = size_fields(record.get("width"), record.get("height"))
            line = {"image": record["file_name"], **size, "box_format": box_format}
            yield where, {**line, "expressions": expressions}


def list_objects(record: dict) -> list[dict]:
    """
    Return the objects of a line as a list.

    Raises:
        ValueError: if they are not lists of equal length.

    Example:

    ```python
    >>> from data_scripts.image_folder import list_objects

    >>> list_objects({"objects": {"bbox": [[1, 2, 3, 4]], "categories": ["car"]}})
    [{'bbox': [1, 2, 3, 4], 'categories': 'car'}]

    ```"""
    objects: Any = record.get("objects", [record] if "bbox" in record else None)
    if isinstance(objects, dict):
        lists = {name: values for name, values in objects.items() if isinstance(values, list)}
        if "bbox" in lists and len({len(values) for values in lists.values()}) == 1:
            return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
    elif isinstance(objects, list) and all(isinstance(item, dict) for item in objects):
        return objects
    raise ValueError(f'objects is {quote(objects)}; expected {{"bbox": [...], "categories": [...]}} of equal length.')
