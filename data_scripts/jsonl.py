"""
Read a user's own images from JSON Lines: one file per split, one line per image.

    data_dir/
        train.jsonl  validation.jsonl  test.jsonl      or any names: each file is a split
        train.json                                     the same lines as one JSON array, if there is no .jsonl file
        pictures/1.jpg                                 anywhere in the folder

A line, here on several:

    {"image": "pictures/1.jpg",
     "expressions": [{"text": "the red car", "box": [10, 20, 110, 90]},
                     {"text": "the tree", "box": [200, 5, 260, 190], "polygon": [[200, 5, 260, 5, 230, 190]]},
                     {"text": "a car near a tree",
                      "phrases": [{"text": "a car", "box": [10, 20, 110, 90]},
                                  {"start": 11, "end": 17, "boxes": [[200, 5, 230, 190], [230, 9, 260, 190]]}]},
                     {"text": "both cars", "objects": [{"box": [10, 20, 110, 90]}, {"box": [120, 20, 190, 95]}]},
                     {"text": "the bus", "boxes": []}]}

- `box`: left, top, right and bottom, the last two exclusive, in pixels of the upright image. Several `boxes` are parts
  of one object, and the box around them is the one answer; several `objects` are answers of their own; and with
  `boxes: []` or `objects: []` nothing in the image is meant. `box_format`, in the line or as a flag, declares another
  convention: "xywh" or "cxcywh" (center, width, height), and "xyxy_fraction", "xywh_thousand" and so on if numbers
  are 0..1 or 0..1000 of the image's width and height. All boxes together are compared with the declared convention.
- a mask, if there is one: `polygon` (lists of x, y, x, y, ...), `segmentation` (such polygons, or COCO's run-length
  encoding, compressed or not, at the image's size) or `mask` (an image file of one channel and the image's size,
  0 where the object is not). With a mask, `box` may be absent: it is the mask's.
- `category` (text) of an object and `types` (list of texts) of a phrase, for reports. An entry of `objects` has the
  fields of an object: a box or boxes, a mask, `category`.
- in the line: `image_id`, else the path; `width` and `height`, if the boxes were drawn on an image of that size,
  which tells whether its EXIF orientation was followed.
- the text of a phrase is found as the processor finds it: complete words first, any case, any quotes and spaces. It
  must occur as often as it is listed.

Lines of one image (one `image_id`) are joined. A file that does not exist is the one whose name differs only in case,
Unicode normal form, percent-encoding, or backslashes for slashes. Both are counted.

No line is skipped silently: bad lines are an error that lists them, unless `drop_bad_lines` leaves them out and counts
them.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .box_conventions import BOX_FORMATS
from .building import GroundingBuilder, Source
from .file_names import FileFinder
from .findings import Findings
from .lines import LineBuilder, LineConfig
from .masks import box_of
from .phrase_search import PhraseSearcher
from .quoting import quote
from .reading import parse_line, read_entries
from .records import Written, is_expression, leave_out_fields, objects_of, target_of, to_json
from .schema import FEATURES


# BOX_FORMATS, FEATURES, PhraseSearcher, box_of, quote: datasets <= 3.6 copies the siblings that a script itself
# imports, and no further
__all__ = ["BOX_FORMATS", "FEATURES", "SOURCES", "JsonLines", "JsonLinesConfig", "PhraseSearcher", "box_of", "quote"]

DISTRIBUTION = (
    "A folder of your own data contains one file per split, such as train.jsonl and validation.jsonl, with one line "
    'of JSON per image: {"image": "pictures/1.jpg", "expressions": [{"text": "the red car", "box": [10, 20, 110, '
    "90]}]}."
)


@dataclass
class JsonLinesConfig(LineConfig):
    """
    Args:
        path (`str`, `list[str]` or `dict`, *optional*): a file or files for the split train, or split -> such, in
            place of the .jsonl files of `data_dir`; in `data_dir` or absolute. The library's `data_files` is the same.
        image_dir (`str`, *optional*): folder that the paths of images and masks are relative to, in `data_dir` or
            absolute; absent: that of the .jsonl file.
        box_format (`str`): of lines that do not say it, see `box_conventions`: "xyxy", "xywh" or "cxcywh" in pixels,
            or with "_fraction" (0..1) or "_thousand" (0..1000) of the image's width and height.
        drop_bad_lines (`bool`): leave out bad lines and count them; else they are an error.
        allow_outside_paths (`bool`): allow absolute paths and `..` in the files. Addresses are never fetched.
        ignore_unknown_fields (`bool`): ignore unknown fields and count them, unless they look like misspelled ones;
            else they are an error.
    """

    ignore_unknown_fields: bool = False


class JsonLines(LineBuilder):
    """A user's own images and expressions from JSON Lines files. Rows are in the order of the lines."""

    BUILDER_CONFIG_CLASS = JsonLinesConfig
    BUILDER_CONFIGS = [JsonLinesConfig(name="jsonl", version=GroundingBuilder.VERSION)]
    DEFAULT_CONFIG_NAME = "jsonl"
    DISTRIBUTION = DISTRIBUTION
    SCALES_TO_IMAGE = False

    def linked_files(self, files: list[Path], data_dir: str | None, image_dir: str | None) -> list[Path]:
        """Return the mask files that are named, as far as the lines can be read."""
        folder, finder = folder_of_images(data_dir, image_dir), FileFinder()
        return [mask for file in files for mask in mask_paths(file, folder or file.parent, finder)]

    def image_folders(self, path: Path) -> list[Path]:
        """Return the folder that the paths in a file are relative to."""
        return [folder_of_images(self.config.data_dir, self.config.image_dir) or path.parent]

    def read_file(self, path: Path, findings: Findings) -> Iterator[tuple[str, Any, dict]]:
        """Yield (position, (first byte, number of bytes), line) of each line of a file."""
        for where, offset, content in read_entries(path):
            line = None
            with findings.entry(where):
                line = parse_line(content)
            if line is not None:
                yield where, (offset, len(content)), line

    def load_line(self, path: Path, source: tuple[int, int]) -> dict:
        """Read a line again, so that the lines of large files are not all kept."""
        offset, length = source
        with open(path, "rb") as file:
            file.seek(offset)
            return parse_line(file.read(length))


def folder_of_images(data_dir: str | None, image_dir: str | None) -> Path | None:
    """Return the folder that paths are relative to, if it is not that of their file."""
    return None if image_dir is None else Path(data_dir or "") / image_dir


def mask_paths(path: Path, folder: Path, finder: FileFinder) -> list[Path]:
    """Return the mask files that a .jsonl file names, as far as it can be read."""
    paths = []
    with open(path, "rb") as file:
        for name in (name for line in file for name in re.findall(rb'"mask"\s*:\s*("(?:[^"\\]|\\.)*")', line)):
            try:
                paths.append(finder.find([folder], json.loads(name)))
            except ValueError:  # named when the line is read
                continue
    return [found.path for found in paths if found.exists]


def write_jsonl(lines: Iterable[dict], findings: Findings, about: Written) -> Iterator[str]:
    """
    Yield the text of lines.

    Args:
        lines (iterable of `dict`): the lines, see `records`.
        findings ([`Findings`]): counts what is left out.
        about ([`Written`]): their dataset, which lines do not name.

    Example:

    ```python
    >>> from data_scripts.findings import Findings
    >>> from data_scripts.jsonl import write_jsonl
    >>> from data_scripts.records import Written

    >>> phrase = {"start": 0, "end": 7, "boxes": [[1, 2, 3, 4]]}
    >>> line = {"image": "1.jpg", "expressions": [{"text": "the cup", "phrases": [phrase]}]}
    >>> print(*write_jsonl([line], Findings(), Written("cups")), end="")
    {"image": "1.jpg", "expressions": [{"text": "the cup", "box": [1, 2, 3, 4]}]}

    ```"""
    for line in lines:
        leave_out_fields(line, {"score": "scores"}, findings)
        fields = {name: line[name] for name in ("image", "image_id", "width", "height") if name in line}
        expressions = [shorten_expression(item) for item in line["expressions"]]
        yield f"{to_json({**fields, 'expressions': expressions})}\n"


def shorten_expression(expression: dict) -> dict:
    """Return an expression that is written without the phrase that is all of it, and one box as `box`."""
    phrases = []
    for phrase in expression["phrases"]:
        types = {"types": phrase["types"]} if "types" in phrase else {}
        target = {**target_of([shorten_object(item) for item in objects_of(phrase)]), **types}
        phrases.append(({"start": phrase["start"], "end": phrase["end"]}, target))
    if is_expression(expression):
        return {"text": expression["text"], **phrases[0][1]}
    return {"text": expression["text"], "phrases": [{**span, **target} for span, target in phrases]}


def shorten_object(item: dict) -> dict:
    """Return the fields of an object that is written."""
    boxes = item["boxes"]
    fields = {name: item[name] for name in ("category", "segmentation") if name in item}
    return {**({"box": boxes[0]} if len(boxes) == 1 else {"boxes": boxes}), **fields}


SOURCES = [
    Source(
        name="jsonl",
        builder=JsonLines,
        config_name="jsonl",
        splits=("train", "validation", "test"),
        files=("train.jsonl", "validation.jsonl", "test.jsonl"),
        distribution=DISTRIBUTION,
    )
]
