"""
List the file formats of annotations: what reads and writes them, and what their tests compare with. It imports nothing
of the datasets library, since the help of commands shows it.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass


PARQUET = "parquet"


@dataclass(frozen=True)
class Format:
    """
    A file format of annotations.

    Args:
        name (`str`): its name in commands.
        content (`str`): which files these are.
        reader (`str`, *optional*): module and function that read them as lines, "coco_json.read_coco".
        is_dataset (`bool`): whether it is a dataset of this name for `data_scripts.load`.
        writer (`str`, *optional*): module and function that write lines, "coco_json.write_coco".
        written_by (`tuple[str, ...]`): the commands that write it, of "import", "export" and "predict".
        has_no_target (`bool`): whether it can say that an expression refers to nothing in its image.
        checked_by (`str`): what its tests compare it with.
    """

    name: str
    content: str
    reader: str | None = None
    is_dataset: bool = False
    writer: str | None = None
    written_by: tuple[str, ...] = ()
    has_no_target: bool = False
    checked_by: str = "files in the documented layout"


FORMATS: dict[str, Format] = {
    item.name: item
    for item in (
        Format(
            PARQUET,
            "our Parquet files with images",
            written_by=("export",),
            has_no_target=True,
            checked_by="`datasets.load_dataset`",
        ),
        Format(
            "jsonl",
            "our JSON Lines, or a JSON array of its lines",
            is_dataset=True,
            writer="jsonl.write_jsonl",
            written_by=("import", "export", "predict"),
            has_no_target=True,
        ),
        Format(
            "mdetr_json",
            "JSON of MDETR, GLIP and mmdetection",
            "mdetr_json.read_mdetr",
            is_dataset=True,
            writer="mdetr_json.write_mdetr",
            written_by=("export",),
            has_no_target=True,
            checked_by="pycocotools",
        ),
        Format(
            "odvg",
            "JSON Lines of mmdetection and Open-GroundingDINO",
            "odvg.read_odvg",
            is_dataset=True,
            writer="odvg.write_odvg",
            written_by=("export", "predict"),
        ),
        Format(
            "refer",
            "refs(*).json or .p, and instances.json, of the refer API",
            is_dataset=True,
            has_no_target=True,
            checked_by="pycocotools",
        ),
        Format(
            "grefcoco",
            "grefs(unc).json or .p, and instances.json",
            is_dataset=True,
            has_no_target=True,
            checked_by="pycocotools",
        ),
        Format("grit", "shards of img2dataset with GRIT's columns, tar or Parquet", is_dataset=True),
        Format("phrasecut", "refer_*.json of PhraseCut", "phrasecut.read_phrasecut", is_dataset=True),
        Format(
            "coco",
            "COCO's JSON of instances",
            "coco_json.read_coco",
            writer="coco_json.write_coco",
            written_by=("export",),
            checked_by="pycocotools",
        ),
        Format(
            "coco_results",
            "COCO's JSON of results",
            writer="coco_json.write_coco_results",
            written_by=("predict",),
            checked_by="pycocotools",
        ),
        Format(
            "label_studio",
            "JSON of Label Studio: exported annotations, predictions to import",
            "label_studio.read_label_studio",
            writer="label_studio.write_label_studio",
            written_by=("predict",),
            checked_by="label-studio-sdk",
        ),
        Format("cvat", "XML of CVAT for images 1.1", "cvat_xml.read_cvat"),
        Format("imagefolder", "metadata.jsonl of an imagefolder", "image_folder.read_image_folder"),
        Format(
            "image_text_bbox",
            "objects with image, text and bbox",
            "image_text_bbox.read_image_text_bbox",
            has_no_target=True,
        ),
        Format("qwen", "conversations with bbox_2d of Qwen-VL", "qwen_vl.read_qwen", has_no_target=True),
        Format(
            "loc_tokens",
            "location tokens of PaliGemma and Florence-2",
            "loc_tokens.read_loc_tokens",
            has_no_target=True,
        ),
    )
}
IMPORTED = tuple(name for name, item in FORMATS.items() if item.reader is not None)
EXPORTED = tuple(name for name, item in FORMATS.items() if "export" in item.written_by)
PREDICTED = tuple(name for name, item in FORMATS.items() if "predict" in item.written_by)


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
    reader = import_function(FORMATS[name].reader)
    known = list(inspect.signature(reader).parameters)[2:]
    unknown = [option for option in options if option not in known]
    if unknown:
        has = ", ".join(f"--{option}" for option in known) or "none"
        raise ValueError(f"--{unknown[0]} is not an option of the format {name!r}, which has {has}.")
    return reader


def writer_of(name: str, names: tuple[str, ...]) -> Callable:
    """
    Return the writer of a format: of lines, [`Findings`] and [`Written`] it makes the parts of a file's text.

    Args:
        name (`str`): the format.
        names (`tuple[str, ...]`): the formats of the command, `EXPORTED` or `PREDICTED`.

    Raises:
        ValueError: if it is not one of them.

    Example:

    ```python
    >>> from data_scripts.formats import PREDICTED, writer_of

    >>> writer_of("odvg", PREDICTED).__name__
    'write_odvg'

    ```"""
    if name not in names:
        raise ValueError(f"{name!r} is not a format to write here; use one of {', '.join(names)}.")
    return import_function(FORMATS[name].writer)


def import_function(name: str) -> Callable:
    """Return a function of this package by the names of its module and its own, "coco_json.read_coco"."""
    module, _, function = name.partition(".")
    return getattr(importlib.import_module(f"data_scripts.{module}"), function)


def suffix_of(name: str) -> str:
    """
    Return the ending of the files of a format.

    Example:

    ```python
    >>> from data_scripts.formats import suffix_of

    >>> suffix_of("odvg"), suffix_of("coco")
    ('.jsonl', '.json')

    ```"""
    return ".jsonl" if name in ("jsonl", "odvg") else ".json"


def describe_formats() -> str:
    """Return the table of all formats for the documentation, in Markdown."""
    rows = [("format", "read", "write", "no target", "checked by"), ("---",) * 5]
    for item in FORMATS.values():
        is_read = {"as a dataset": item.is_dataset or item.name == PARQUET, "import": item.reader is not None}
        read = ", ".join(name for name, is_way in is_read.items() if is_way)
        no_target = "yes" if item.has_no_target else ""
        rows.append((f"`{item.name}`: {item.content}", read, ", ".join(item.written_by), no_target, item.checked_by))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
