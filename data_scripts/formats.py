"""
List the file formats of annotations: what reads and writes them, and what their readers are checked by. It imports
nothing of the datasets library, since the help of commands shows it.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """
    A file format of annotations.

    Args:
        name (`str`): its name in commands.
        reads (`str`): which files these are.
        reader (`str`, *optional*): module and function that read them as lines, "coco_json.read_coco".
        is_dataset (`bool`): whether it is a dataset of this name for `data_scripts.load`.
        is_written (`bool`): whether `reftr data import` writes it.
        checked_by (`str`): what its tests compare it with.
    """

    name: str
    reads: str
    reader: str | None = None
    is_dataset: bool = False
    is_written: bool = False
    checked_by: str = "files in the documented layout"


FORMATS: dict[str, Format] = {
    item.name: item
    for item in (
        Format("jsonl", "our JSON Lines, or a JSON array of its lines", is_dataset=True, is_written=True),
        Format(
            "mdetr_json",
            "JSON of MDETR, GLIP and mmdetection",
            "mdetr_json.read_mdetr",
            is_dataset=True,
            checked_by="pycocotools",
        ),
        Format("odvg", "JSON Lines of mmdetection and Open-GroundingDINO", "odvg.read_odvg", is_dataset=True),
        Format("phrasecut", "refer_*.json of PhraseCut", "phrasecut.read_phrasecut", is_dataset=True),
        Format("coco", "COCO's JSON of instances", "coco_json.read_coco", checked_by="pycocotools"),
        Format("label_studio", "JSON export of Label Studio", "label_studio.read_label_studio"),
        Format("cvat", "XML of CVAT for images 1.1", "cvat_xml.read_cvat"),
        Format("imagefolder", "metadata.jsonl of an imagefolder", "image_folder.read_image_folder"),
        Format("image_text_bbox", "objects with image, text and bbox", "image_text_bbox.read_image_text_bbox"),
        Format("qwen", "conversations with bbox_2d of Qwen-VL", "qwen_vl.read_qwen"),
        Format("loc_tokens", "location tokens of PaliGemma and Florence-2", "loc_tokens.read_loc_tokens"),
    )
}
IMPORTED = tuple(name for name, item in FORMATS.items() if item.reader is not None)


def reader_of(name: str, options: dict) -> Callable:
    """
    Return the reader of a format.

    Args:
        name (`str`): one of `IMPORTED`.
        options (`dict`): options for it.

    Raises:
        ValueError: if there is no such format, or it has no such option.

    Example:

    ```python
    >>> from data_scripts.formats import reader_of

    >>> reader_of("coco", {"box_format": "xyxy"}).__name__
    'read_coco'

    ```"""
    if name not in IMPORTED:
        raise ValueError(f"{name!r} is not a format to import; use one of {', '.join(IMPORTED)}.")
    module, _, function = FORMATS[name].reader.partition(".")
    reader = getattr(importlib.import_module(f"data_scripts.{module}"), function)
    known = list(inspect.signature(reader).parameters)[2:]
    unknown = [option for option in options if option not in known]
    if unknown:
        has = ", ".join(f"--{option}" for option in known) or "none"
        raise ValueError(f"--{unknown[0]} is not an option of the format {name!r}, which has {has}.")
    return reader


def describe_formats() -> str:
    """Return the table of all formats for the documentation, in Markdown."""
    rows = [
        ("format", "files", "`reftr data` and recipes", "`reftr data import`", "written", "tests compare with"),
        ("---",) * 6,
    ]
    for item in FORMATS.values():
        flags = (item.is_dataset, item.reader is not None, item.is_written)
        rows.append((f"`{item.name}`", item.reads, *("yes" if flag else "" for flag in flags), item.checked_by))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
