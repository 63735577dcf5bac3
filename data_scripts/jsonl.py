"""
Read a user's own images from JSON Lines: one file per split, one line per image.

    data_dir/
        train.jsonl  validation.jsonl  test.jsonl      or any names: each file is a split
        pictures/1.jpg                                 anywhere in the folder

A line, here on several:

    {"image": "pictures/1.jpg",
     "expressions": [{"text": "the red car", "box": [10, 20, 110, 90]},
                     {"text": "the tree", "box": [200, 5, 260, 190], "polygon": [[200, 5, 260, 5, 230, 190]]},
                     {"text": "a car near a tree",
                      "phrases": [{"text": "a car", "box": [10, 20, 110, 90]},
                                  {"start": 11, "end": 17, "boxes": [[200, 5, 260, 190]]}]}]}

- `box` (or `boxes`, all boxes of the object; then their union is the answer): left, top, right and bottom, the last
  two exclusive, in pixels of the upright image. `box_format`, in the line or as a flag, declares another
  convention: "xywh" or "cxcywh" (center, width, height), and "xyxy_fraction", "xywh_thousand" and so on if numbers
  are 0..1 or 0..1000 of the image's width and height. All boxes together are compared with the declared convention.
- a mask, if there is one: `polygon` (lists of x, y, x, y, ...), `segmentation` (such polygons, or COCO's run-length
  encoding, compressed or not, at the image's size) or `mask` (an image file of one channel and the image's size,
  0 where the object is not). With a mask, `box` may be absent: it is the mask's.
- `category` (text) and `types` (list of texts) of the object and of the phrase, for reports.
- in the line: `image_id`, else the path; `width` and `height`, if the boxes were drawn on an image of that size,
  which tells whether its EXIF orientation was followed.

No line is skipped silently: bad lines are an error that lists them, unless `drop_bad_lines` leaves them out and counts
them.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Never

import datasets
import numpy as np

from .box_conventions import LIMITS, UNIT_RANGES, judge_splits, parse_box_format, to_boxes_xyxy
from .building import GroundingBuilder, Source, clip_boxes, fingerprint, format_listing, merge_boxes
from .masks import box_of, encode_counts, encode_mask, encode_polygons, to_segmentation
from .quoting import explain, quote
from .reading import (
    MAX_NAME,
    check_spans,
    check_text,
    check_texts,
    has_words,
    image_of,
    is_inside,
    is_number,
    open_file,
    read_frame,
    read_image_size,
)
from .schema import FEATURES


# FEATURES: datasets <= 3.6 copies the siblings that a script itself imports, and no further
__all__ = ["FEATURES", "SOURCES", "JsonLines", "JsonLinesConfig"]

DISTRIBUTION = (
    "A folder of your own data contains one file per split, such as train.jsonl and validation.jsonl, with one line "
    'of JSON per image: {"image": "pictures/1.jpg", "expressions": [{"text": "the red car", "box": [10, 20, 110, '
    "90]}]}."
)
MASK_FIELDS = ("polygon", "segmentation", "mask")
TARGET_FIELDS = ("box", "boxes", *MASK_FIELDS, "category", "types")
LINE_FIELDS = ("image", "expressions", "image_id", "width", "height", "box_format")


@dataclass
class JsonLinesConfig(datasets.BuilderConfig):
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
    """

    path: str | list | dict | None = None
    image_dir: str | None = None
    box_format: str = "xyxy"
    drop_bad_lines: bool = False
    allow_outside_paths: bool = False


class JsonLines(GroundingBuilder):
    """A user's own images and expressions from JSON Lines files. Rows are in the order of the lines."""

    BUILDER_CONFIG_CLASS = JsonLinesConfig
    BUILDER_CONFIGS = [JsonLinesConfig(name="jsonl", version=GroundingBuilder.VERSION)]
    DEFAULT_CONFIG_NAME = "jsonl"

    def __init__(
        self, *args: Any, hash: str | None = None, data_files: str | list | dict | None = None, **kwargs: Any
    ) -> None:
        if data_files is not None:
            kwargs["path"] = data_files
        data_dir, path = kwargs.get("data_dir"), kwargs.get("path")
        self.split_files = {} if data_dir is None and path is None else find_splits(Path(data_dir or ""), path)
        files = [file for files in self.split_files.values() for file in files if file.is_file()]
        image_dir = folder_of_images(data_dir, kwargs.get("image_dir"))
        masks = [mask for file in files for mask in mask_paths(file, image_dir or file.parent)]
        names = {split: [str(file) for file in files] for split, files in self.split_files.items()}
        super().__init__(*args, hash=fingerprint([*files, *masks], hash, names), **kwargs)

    @classmethod
    def annotation_files(cls, data_dir: Path, config_name: str) -> list[Path]:
        """Return the .jsonl files of a folder."""
        return sorted(data_dir.glob("*.jsonl"))

    def files_of(self, split: str) -> list[Path]:
        """Return the .jsonl files of a split."""
        return self.split_files.get(split, [])

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        parse_box_format(self.config.box_format)
        if not self.split_files:
            if self.config.data_dir is None:
                raise ValueError(
                    f"'jsonl' requires data_dir=... or path=..., the folder or the files to read. {DISTRIBUTION}"
                )
            raise OSError(f"There is no .jsonl file in {self.config.data_dir!r}. {DISTRIBUTION}")
        missing = [str(file) for files in self.split_files.values() for file in files if not file.is_file()]
        if missing:
            raise OSError(f"There is no file {', '.join(missing)}. {DISTRIBUTION}")
        good, bad, dropped, image_paths, written = {}, [], {}, {}, {}
        for split, files in self.split_files.items():
            if not re.fullmatch(r"\w+", split) or split == "all":
                raise ValueError(
                    f"{split!r} is not a valid name of a split; expected letters, digits and _, and not 'all'."
                )
            good[split], dropped[split], written[split], seen = [], Counter(), {}, {}
            lines = ((file, *line) for file in files for line in read_lines(file))
            for path, number, offset, line in lines:
                try:
                    value = parse_line(line)
                    image_path = self._image_path(path, value)
                    position = f"{path}, line {number}"
                    earlier = seen.setdefault(image_id_of(value), position)
                    require(earlier == position, "image", value["image"], f"another image than in {earlier}")
                    image_paths[image_path] = None
                    if os.path.isfile(image_path):
                        self._row(path, value, Counter(), written[split])
                    good[split].append((str(path), number, offset))
                except (OSError, ValueError) as error:
                    bad.append(f"{path}, line {number}: {error}")
                    dropped[split]["bad lines"] += 1
        suspected = judge_splits(written)
        if bad and not self.config.drop_bad_lines:
            hint = "".join(f"\n{judgement.message}." for judgement in suspected)
            raise ValueError(f"{len(bad)} bad lines (drop_bad_lines leaves them out):{format_listing(bad)}{hint}")
        for judgement in suspected:
            if judgement.is_certain:
                raise ValueError(f"{judgement.message}.")
            self.report_suspected(judgement.message)
        for split, counts in dropped.items():
            self.report_dropped(split, counts)
        self.require_images(image_paths, DISTRIBUTION)
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"split": split, "lines": lines})
            for split, lines in good.items()
        ]

    def _generate_examples(self, split: str, lines: list[tuple[str, int, int]]) -> Iterator[tuple[str, dict]]:
        changed = Counter()
        for path, number, offset in lines:
            with open(path, "rb") as file:
                file.seek(offset)
                value = parse_line(file.readline())
            yield f"{path}:{number}", self._row(Path(path), value, changed)
        self.report_changed(split, changed)

    def _image_path(self, path: Path, value: dict) -> Path:
        return self._inside(path, value["image"], "image")

    def _inside(self, path: Path, name: Any, field: str) -> Path:
        """Return the path of a file that a line of `path` names."""
        require(isinstance(name, str) and name.strip(), field, name, "the path of a file")
        require(len(name) <= MAX_NAME, field, name, f"the path of a file, of at most {MAX_NAME} characters")
        require("://" not in name, field, name, "the path of a file on this machine; addresses are not fetched")
        allowed = self.config.allow_outside_paths or is_inside(name)
        require(allowed, field, name, "a path in the folder (allow_outside_paths allows others)")
        return (folder_of_images(self.config.data_dir, self.config.image_dir) or path.parent) / name

    def _row(self, path: Path, value: dict, changed: Counter, written: dict | None = None) -> dict:
        """
        Return the row of a parsed line of a file; raises a ValueError or OSError where it is bad. Its boxes, bad ones
        too, are added to `written`: (what they are, box format) -> (boxes, sizes of their images).
        """
        image_path = self._image_path(path, value)
        size = annotated_size(value)
        frame = read_frame(image_path, size)
        width, height = frame.size
        require(size in (None, (width, height)), "width, height", size, f"the image's {(width, height)}")
        box_format = value.get("box_format", self.config.box_format)
        parse_box_format(box_format)
        if written is not None:
            for what, written_format, found in (("boxes", box_format, boxes_in(value)), (*POLYGONS, spans_in(value))):
                if found:
                    boxes, sizes = written.setdefault((what, written_format), ([], []))
                    boxes += found
                    sizes += [(width, height)] * len(found)
        image_id, objects, indices, sentences = image_id_of(value), {}, {}, []
        for index, expression in enumerate(value["expressions"]):
            field = f"expressions[{index}]"
            text, spans = read_expression(expression, field)
            phrases = []
            for start, end, target, where in spans:
                boxes = parse_boxes(target, where, box_format, width, height)
                mask = self._mask(path, target, where, height, width)
                kept = clip_boxes(boxes or [box_of(mask)], width, height, Counter(), changed)
                inside = len(kept) == max(1, len(boxes))
                require(inside, f"{where}.box", boxes, f"boxes in the image of {width} x {height}")
                item = {"box": merge_boxes(kept), "boxes": kept, "category": target.get("category")}
                key = json.dumps([item, mask])
                item = {"object_id": f"{image_id}_{len(objects)}", **item, "segmentation": mask}
                object_index = indices.setdefault(key, len(indices))
                objects.setdefault(key, item)
                phrases.append(
                    {"start": start, "end": end, "objects": [object_index], "types": target.get("types", [])}
                )
            sentences.append({"sentence_id": f"{image_id}_{index}", "text": text, "phrases": phrases})
        row = {"image_id": image_id, "image": image_of(image_path.absolute(), frame), "width": width, "height": height}
        return {**row, "objects": list(objects.values()), "sentences": sentences}

    def _mask(self, path: Path, target: dict, where: str, height: int, width: int) -> dict | None:
        """Return the run-length encoding of a target's mask, if it has one."""
        given = [name for name in MASK_FIELDS if name in target]
        require(len(given) < 2, where, given, "one of them")
        if not given:
            return None
        field, value = f"{where}.{given[0]}", target[given[0]]
        if given == ["mask"]:
            encoded = read_mask_image(self._inside(path, value, field), field, height, width)
        elif given == ["segmentation"] and isinstance(value, dict):
            encoded = read_run_lengths(value, field, height, width)
        else:
            encoded = read_polygons(value, field, height, width)
        segmentation = to_segmentation(encoded)
        require(segmentation is not None, field, value, "a mask with a pixel in the image")
        return segmentation


POLYGONS = ("polygons", "xyxy")  # of pixels, whatever the format of boxes is
# what the four numbers of a box are, by layout
NUMBERS = {
    "xyxy": "[left, top, right, bottom]",
    "xywh": "[left, top, width, height]",
    "cxcywh": "[center x, center y, width, height]",
}


def require(condition: object, field: str, value: Any, expected: str) -> None:
    """Raise a ValueError that names a field, its value and the expectation, unless a condition holds."""
    if not condition:
        raise ValueError(f"{field} is {quote(value)}; expected {expected}.")


def find_splits(data_dir: Path, path: str | list | dict | None) -> dict[str, list[Path]]:
    """Return the files of each split: what `path` says, or the .jsonl files of a folder, by name."""
    if path is None:
        return {file.stem: [file] for file in sorted(data_dir.glob("*.jsonl"))}
    splits = path if isinstance(path, dict) else {"train": path}
    return {
        split: [data_dir / file for file in ([files] if isinstance(files, str | Path) else files)]
        for split, files in splits.items()
    }


def folder_of_images(data_dir: str | None, image_dir: str | None) -> Path | None:
    """Return the folder that paths are relative to, if it is not that of their file."""
    return None if image_dir is None else Path(data_dir or "") / image_dir


def mask_paths(path: Path, folder: Path) -> list[Path]:
    """Return the mask files that a .jsonl file names, as far as it can be read."""
    paths = []
    for _, _, line in read_lines(path):
        for name in re.findall(rb'"mask"\s*:\s*("(?:[^"\\]|\\.)*")', line):
            try:
                paths.append(folder / json.loads(name))
            except ValueError:  # named when the line is read
                continue
    return [mask for mask in paths if os.path.isfile(mask)]


def read_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield (number from 1, offset in bytes, line) of each line of a file that is not blank."""
    with open(path, "rb") as file:
        offset = 0
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, offset, line
            offset += len(line)


def refuse_constant(name: str) -> Never:
    """Refuse NaN and infinity, which Python's reader accepts and JSON does not have."""
    raise ValueError(f"{name} is not a number")


def parse_line(line: bytes) -> dict:
    """
    Parse a line as JSON and refuse unknown fields.

    Raises:
        ValueError: where it is not.
    """
    try:
        value = json.loads(line.decode("utf-8-sig"), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {explain(error)}.") from error
    require(isinstance(value, dict), "the line", value, '{"image": ..., "expressions": [...]}')
    for name, entry in value.items():
        check_text(name, "the name of a field")
        check_texts(entry, name)
    known(value, LINE_FIELDS, "the line")
    if "image" not in value:
        raise ValueError("the line has no field 'image'; expected the path of an image.")
    expressions = value.get("expressions")
    require(isinstance(expressions, list) and expressions, "expressions", expressions, "a list of one or more")
    return value


def known(value: dict, names: tuple[str, ...], field: str) -> None:
    """Raise a ValueError for a field that is not one of these."""
    unknown = [name for name in value if name not in names]
    if unknown:
        raise ValueError(f"{field} has fields that are unknown, {quote(unknown)}; expected of {', '.join(names)}.")


def image_id_of(value: dict) -> str:
    """Return the image id of a line, by default the path of its image."""
    image_id = value.get("image_id", value["image"])
    number = isinstance(image_id, int) and not isinstance(image_id, bool)
    require(number or (isinstance(image_id, str) and image_id.strip()), "image_id", image_id, "text or an integer")
    return str(image_id)


def annotated_size(value: dict) -> tuple[int, int] | None:
    """Return the (width, height) of a line, None if it has none."""
    if "width" not in value and "height" not in value:
        return None
    size = (value.get("width"), value.get("height"))
    require(all(type(side) is int for side in size), "width, height", size, "two integers")
    return size


def read_expression(expression: Any, field: str) -> tuple[str, list]:
    """
    Return the text of an expression and (start, end, target, field) of its phrases, by default the entire text. A
    target is the mapping that has the box.
    """
    require(isinstance(expression, dict), field, expression, '{"text": ..., "box": ...}')
    text = expression.get("text")
    require(has_words(text), f"{field}.text", text, "words")
    if "phrases" not in expression:
        known(expression, ("text", "phrases", *TARGET_FIELDS), field)
        return text, [(0, len(text), expression, field)]
    known(expression, ("text", "phrases"), f"{field} (with phrases)")
    phrases = expression["phrases"]
    require(isinstance(phrases, list) and phrases, f"{field}.phrases", phrases, "a list of one or more")
    spans = []
    for index, phrase in enumerate(phrases):
        where = f"{field}.phrases[{index}]"
        require(isinstance(phrase, dict), where, phrase, '{"text": ..., "box": ...}')
        known(phrase, ("start", "end", "text", *TARGET_FIELDS), where)
        spans.append((*find_span(phrase, text, where), phrase, where))
    check_spans([(start, end) for start, end, *_ in spans], f"{field}.phrases")
    return text, spans


def find_span(phrase: dict, text: str, field: str) -> tuple[int, int]:
    """Return (start, end) of a phrase by its characters, or by its text, which must then occur once."""
    words = phrase.get("text")
    if "start" in phrase or "end" in phrase:
        start, end = phrase.get("start"), phrase.get("end")
        inside = type(start) is int and type(end) is int and 0 <= start < end <= len(text)
        require(inside, f"{field}.start, end", (start, end), f"characters of the {len(text)} of {quote(text)}")
        require(words in (None, text[start:end]), f"{field}.text", words, f"{quote(text[start:end])}, which is there")
    else:
        require(isinstance(words, str) and words, f"{field}.text", words, "words, or start and end")
        start = text.find(words)
        is_once = start >= 0 and text.find(words, start + 1) < 0
        require(is_once, f"{field}.text", words, f"words that are once in {quote(text)}, or start and end")
        end = start + len(words)
    require(has_words(text[start:end]), field, text[start:end], "words")
    return start, end


def targets_in(value: dict) -> list[dict]:
    """Return the expressions and phrases of a parsed line, whatever else is wrong with it."""
    found = []
    for expression in filter(is_dict, value["expressions"]):
        phrases = expression.get("phrases")
        found += [expression, *filter(is_dict, phrases if isinstance(phrases, list) else ())]
    return found


def boxes_in(value: dict) -> list[list]:
    """Return the boxes of a parsed line that are four numbers, as they are written, whatever else is wrong with it."""
    found = []
    for target in targets_in(value):
        boxes = target.get("boxes")
        found += [target.get("box"), *(boxes if isinstance(boxes, list) else ())]
    return [box for box in found if is_four_numbers(box)]


def spans_in(value: dict) -> list[list]:
    """Return the boxes_xyxy around the polygons of a parsed line, in the unit that they are written in."""
    found = []
    for target in targets_in(value):
        for field in ("polygon", "segmentation"):
            polygons = target.get(field)
            polygons = polygons if isinstance(polygons, list) else []
            for polygon in [polygons] if polygons and is_number(polygons[0]) else polygons:
                if isinstance(polygon, list) and len(polygon) >= 6 and all(is_number(number) for number in polygon):
                    across, down = polygon[0::2], polygon[1::2]
                    found.append([min(across), min(down), max(across), max(down)])
    return found


def is_dict(value: Any) -> bool:
    """Return whether a value is a JSON object."""
    return isinstance(value, dict)


def is_four_numbers(box: Any) -> bool:
    """Return whether a value is a list of four coordinates."""
    return isinstance(box, list) and len(box) == 4 and all(is_number(value) for value in box)


def parse_boxes(target: dict, field: str, box_format: str, width: int, height: int) -> list[list[float]]:
    """
    Return the boxes of a target as xyxy in pixels of an image of (width, height); none where it has a mask instead.
    Checks its category and types too.

    Raises:
        ValueError: where a box is not four finite numbers of the box format, or has no extent.
    """
    category, types = target.get("category"), target.get("types", [])
    require(category is None or isinstance(category, str), f"{field}.category", category, "text")
    texts = isinstance(types, list) and all(isinstance(word, str) for word in types)
    require(texts, f"{field}.types", types, "a list of texts")
    if "boxes" in target:
        require("box" not in target, field, ["box", "boxes"], "one of them")
        boxes, name = target["boxes"], "boxes"
        require(isinstance(boxes, list) and boxes, f"{field}.boxes", boxes, "a list of one or more")
    else:
        boxes, name = [target["box"]] if "box" in target else [], "box"
    if not boxes and not any(mask in target for mask in MASK_FIELDS):
        raise ValueError(f"{field} has no field 'box'; expected one, or 'boxes', or a mask.")
    layout, unit = parse_box_format(box_format)
    limit = LIMITS.get(unit)
    boxes_xyxy = []
    for box in boxes:
        require(is_four_numbers(box), f"{field}.{name}", box, f"{NUMBERS[layout]}, four numbers")
        in_unit = limit is None or max(map(abs, box)) <= limit
        require(in_unit, f"{field}.{name}", box, f"{NUMBERS[layout]} of {UNIT_RANGES.get(unit)}")
        ((x0, y0, x1, y1),) = to_boxes_xyxy([box], [(width, height)], layout, unit).tolist()
        has_extent = x0 < x1 and y0 < y1
        require(has_extent, f"{field}.{name}", box, f"{NUMBERS[layout]} of some extent (box_format is {box_format!r})")
        boxes_xyxy.append([x0, y0, x1, y1])
    return boxes_xyxy


def read_polygons(value: Any, field: str, height: int, width: int) -> dict:
    """Encode polygons, or a single one, as run lengths of (height, width)."""
    polygons = [value] if isinstance(value, list) and value and is_number(value[0]) else value
    good = isinstance(polygons, list) and polygons
    good = good and all(
        isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0 and all(map(is_number, polygon))
        for polygon in polygons
    )
    require(good, field, value, "polygons [[x, y, x, y, x, y, ...], ...] of three or more points")
    # the library walks along every edge, so a point far away takes its time and memory
    limits = np.array([width, height])
    near = all((np.abs(np.reshape(polygon, (-1, 2)) - limits / 2) <= 1.5 * limits).all() for polygon in polygons)
    require(near, field, value, f"points in the image of {width} x {height}, or at most as far outside of it")
    return encode_polygons(polygons, height, width)


def read_run_lengths(value: dict, field: str, height: int, width: int) -> dict:
    """Validate COCO's run-length encoding, compressed or not, of (height, width)."""
    known(value, ("size", "counts"), field)
    require(value.get("size") == [height, width], f"{field}.size", value.get("size"), f"the image's {[height, width]}")
    try:
        return encode_counts(value.get("counts"), height, width)
    except ValueError as error:
        raise ValueError(f"{field}: {error}; expected run lengths that sum to {height * width}.") from error


def read_mask_image(path: Path, field: str, height: int, width: int) -> dict:
    """Read a mask file of one channel as a run-length encoding of (height, width)."""
    require(os.path.isfile(path), field, str(path), "a file that is there")
    size = read_image_size(path)
    require(size == (width, height), field, size, f"a mask of (width, height) {(width, height)}, as the image")
    with open_file(path) as image:
        one_channel = image.mode in ("1", "L", "P", "I", "I;16", "F")
        require(one_channel, field, str(path), f"an image of one channel, not of mode {image.mode}")
        try:
            mask = np.asarray(image) != 0
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{field}: {str(path)!r} is damaged: {explain(error)}") from error
    return encode_mask(mask)


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
