"""Write annotation files of other formats as JSON Lines, which the dataset `jsonl` reads."""

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from .atomic_files import replaced_files
from .box_conventions import judge_boxes, judge_splits, parse_box_format
from .building import ALL_SPLITS, CHANGED, LEFT_OUT, SUSPECTED, describe_reported, format_listing
from .file_names import FoundFile, fold_name
from .findings import Findings
from .formats import reader_of
from .line_formats import find_image_folders
from .lines import (
    RESPELLED,
    SCALED,
    LineConverter,
    annotated_size,
    boxes_in,
    check_line,
    read_expression,
    require,
    scale_line,
)
from .reading import Frame, is_inside, read_frame


SHORTENED = "images are found by the end of their path"
UPLOADED = re.compile("[0-9a-f]{8}-(.+)")  # Label Studio puts a random prefix before the names of uploaded files


class ReadLine(NamedTuple):
    """
    A line that a reader gave.

    Args:
        where (`str`): its position.
        line (`dict`): the line, with the image's path relative to the folder of images.
        found (`FoundFile`): its image.
        frame ([`Frame`], *optional*): of the image, or of the annotated size where there is none; None if unknown.
    """

    where: str
    line: dict
    found: FoundFile
    frame: Frame | None


@dataclass
class ImportReport:
    """
    What an import wrote.

    Args:
        counts (`dict`): split -> number of "images", "expressions" and "boxes".
        build (`dict`): what was left out, changed or suspected, in the form of `reports.read_build_report`.
        missing (`list[str]`): paths of images that do not exist.
        box_format (`str`, *optional*): the convention that the boxes were recognized as, if it was not said.
    """

    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    build: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    box_format: str | None = None


def import_files(
    name: str,
    splits: dict[str, Sequence[str | Path]],
    output: str | Path,
    image_dir: str | Path | None = None,
    drop_bad_lines: bool = False,
    overwrite: bool = False,
    **options: str,
) -> ImportReport:
    """
    Write files of another format as JSON Lines, one file per split, atomically. Images stay where they are.

    Args:
        name (`str`): the format, one of `formats.IMPORTED`.
        splits (`dict`): split -> files.
        output (`str` or `Path`): folder of the JSON Lines.
        image_dir (`str` or `Path`, *optional*): folder of the images, by default that of the first file. Paths of
            images are written relative to it.
        drop_bad_lines (`bool`, *optional*, defaults to `False`): leave out malformed and refused annotations.
        overwrite (`bool`, *optional*, defaults to `False`): replace files of an earlier import.
        options: options of the reader, such as `box_format`.

    Returns:
        [`ImportReport`].

    Raises:
        ValueError: if annotations are malformed or refused, listing them, or the convention of the boxes is wrong or
            cannot be recognized.
        OSError: if a file is missing or damaged, or exists already.

    Example:

    ```python
    >>> import json, tempfile
    >>> from pathlib import Path
    >>> from data_scripts.importing import import_files

    >>> folder = Path(tempfile.mkdtemp())
    >>> record = {"image": "1.jpg", "width": 64, "height": 48, "sent": "the cup", "bbox": [1, 2, 30, 40]}
    >>> _ = (folder / "val.json").write_text(json.dumps([record]))
    >>> report = import_files("image_text_bbox", {"validation": [folder / "val.json"]}, folder / "out")
    >>> report.counts, report.missing
    ({'validation': {'images': 1, 'expressions': 1, 'boxes': 1}}, ['1.jpg'])

    ```"""
    reader, output = reader_of(name, options), Path(output)
    check_splits(splits, output, overwrite)
    base = Path(image_dir if image_dir is not None else Path(next(iter(splits.values()))[0]).parent)
    if not base.is_dir():
        raise OSError(f"There is no folder {str(base)!r}; give that of the images as --image_dir.")
    folders = [folder for folder in find_image_folders(base) if ".." not in folder.relative_to(base).parts]
    report, converter, bad = ImportReport(), LineConverter(scales_to_image=True), []
    read, findings, owners = {}, {}, {}
    for split, files in splits.items():
        findings[split], read[split] = Findings(), []
        for file in files:
            for where, line in reader(Path(file), findings[split], **options):
                with findings[split].entry(where):
                    item = locate_line(where, line, converter, folders, base, owners, findings[split].changed)
                    read[split].append(item)
    if any("box_format" not in item.line for items in read.values() for item in items):
        report.box_format = recognize_box_format([item for items in read.values() for item in items])
    lines, written = {}, {}
    for split, items in read.items():
        lines[split], written[split] = {}, {}
        for item in items:
            with findings[split].entry(item.where):
                add_line(item, report.box_format, converter, findings[split].changed, lines[split], written[split])
        bad += findings[split].bad
    suspected = judge_splits(written)
    if bad and not drop_bad_lines:
        hint = "".join(f"\n{judgement.message}." for judgement in suspected)
        raise ValueError(f"{len(bad)} bad annotations (drop_bad_lines leaves them out):{format_listing(bad)}{hint}")
    for judgement in suspected:
        if judgement.is_certain:
            raise ValueError(f"{judgement.message}.")
    for split, entries in lines.items():
        kinds = {LEFT_OUT: findings[split].counted(), CHANGED: findings[split].changed}
        report.build |= {split: {kind: dict(sorted(counts.items())) for kind, counts in kinds.items() if counts}}
        report.counts[split] = count_lines(list(entries.values()))
    if suspected:
        report.build[ALL_SPLITS] = {SUSPECTED: {judgement.message: 1 for judgement in suspected}}
    empty = [split for split, counts in report.counts.items() if not counts["images"]]
    if empty:
        reasons = sum((findings[split].counted() for split in empty), Counter())
        left_out = describe_reported(LEFT_OUT, reasons) if reasons else "its files are empty"
        raise ValueError(f"Nothing is left in {', '.join(empty)}: {left_out}.")
    missing = (str(item.line["image"]) for items in read.values() for item in items if not item.found.exists)
    report.missing = list(dict.fromkeys(missing))
    with replaced_files(output) as folder:
        for split, entries in lines.items():
            with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
                file.writelines(f"{json.dumps(line, ensure_ascii=False)}\n" for line in entries.values())
    return report


def check_splits(splits: dict[str, Sequence[str | Path]], output: Path, overwrite: bool) -> None:
    """
    Check the names and files of splits, and that nothing is replaced that should not be.

    Raises:
        ValueError: if a name is not valid.
        OSError: if a file does not exist, or one to write does.
    """
    for split, files in splits.items():
        if not re.fullmatch(r"\w+", split) or split == ALL_SPLITS:
            raise ValueError(f"{split!r} is not a valid name of a split; expected letters, digits and _, not 'all'.")
        absent = [str(file) for file in files if not os.path.isfile(file)]
        if absent:
            raise OSError(f"There is no file {', '.join(absent)}.")
        target = output / f"{split}.jsonl"
        if target.exists() and not overwrite:
            raise OSError(f"{str(target)!r} exists. Choose another --output, or replace it by --overwrite.")


def locate_line(
    where: str,
    line: dict,
    converter: LineConverter,
    folders: list[Path],
    base: Path,
    owners: dict[Path, tuple[str, dict]],
    changed: Counter,
) -> ReadLine:
    """
    Find the image of a line in folders of `base`: by its path, else by the longest end of its path. `owners` has the
    path that each image was found by, and its frames by the annotated size.

    Raises:
        ValueError, OSError: if the line is malformed, or its image cannot be read.
    """
    check_line(line)
    require(isinstance(line["image"], str), "image", line["image"], "the path of a file")
    name, size = line["image"].replace("\\", "/"), annotated_size(line)
    parts = [part for part in PurePosixPath(name).parts if part not in ("/", "..", ".") and ":" not in part]
    for first in range(len(parts)):
        ends = ["/".join(parts[first:])]
        if uploaded := UPLOADED.fullmatch(parts[-1]):
            ends.append("/".join([*parts[first:-1], uploaded[1]]))
        for end in ends:
            found = converter.find(end, "image", folders)
            if found.exists:
                other, _ = owners.setdefault(found.path, (name, {}))
                is_same = fold_name(name).endswith(fold_name(other)) or fold_name(other).endswith(fold_name(name))
                require(is_same, "image", name, f"another end of its path than {other!r}: both would be {end!r}")
                changed.update([SHORTENED] * (end != name) + [RESPELLED] * found.is_respelled)
                frames = owners[found.path][1]
                if size not in frames:
                    frames[size] = read_frame(found.path, size)
                image = Path(os.path.relpath(found.path, base)).as_posix()
                return ReadLine(where, {**line, "image": image}, found, frames[size])
    found = converter.find(name if is_inside(name) else "/".join(parts[-1:]), "image", folders)
    image = found.path.relative_to(found.folder).as_posix()
    return ReadLine(where, {**line, "image": image}, found, None if size is None else Frame(*size))


def recognize_box_format(items: list[ReadLine]) -> str:
    """
    Return the convention of boxes that may be pixels or thousandths, from all of them.

    Raises:
        ValueError: if they fit both, or the sizes of their images are unknown.
    """
    boxes, sizes = [], []
    for item in items:
        if "box_format" not in item.line and item.frame is not None:
            found = boxes_in(item.line)
            boxes += found
            sizes += [item.frame.size] * len(found)
    judgement = judge_boxes(boxes, sizes, "xyxy") if boxes else None
    if judgement is not None:
        parse_box_format(judgement.box_format)  # y before x has no name
        return judgement.box_format
    if boxes and judge_boxes(boxes, sizes, "xyxy_thousand") is not None:
        return "xyxy"
    raise ValueError(
        f"The {len(boxes)} boxes of images of known size may be in pixels or in 0..1000: say --box_format xyxy or "
        "--box_format xyxy_thousand."
    )


def add_line(
    item: ReadLine, box_format: str | None, converter: LineConverter, changed: Counter, lines: dict, written: dict
) -> None:
    """
    Validate a line and add it to those of its image.

    Raises:
        ValueError, OSError: if it is malformed.
    """
    line, size = item.line, annotated_size(item.line)
    if "box_format" not in line and box_format is not None:
        line = {**line, "box_format": box_format}
    if item.frame is None:  # neither the image nor its size is known
        for index, expression in enumerate(line["expressions"]):
            read_expression(expression, f"expressions[{index}]")
    else:
        if size not in (None, item.frame.size):
            line = scale_line(line, size, item.frame.size)
            changed[SCALED] += 1
        converter.convert_in_frame(line, item.frame, [], Counter(), None, written)
    if line.get("box_format") == "xyxy":
        line = {name: value for name, value in line.items() if name != "box_format"}
    key = json.dumps({name: value for name, value in line.items() if name != "expressions"}, sort_keys=True)
    if key in lines:
        lines[key]["expressions"] += line["expressions"]
    else:
        lines[key] = {**line, "expressions": list(line["expressions"])}


def count_lines(lines: list[dict]) -> dict[str, int]:
    """Return the number of images, expressions and boxes of lines."""
    return {
        "images": len({line["image"] for line in lines}),
        "expressions": sum(len(line["expressions"]) for line in lines),
        "boxes": sum(len(boxes_in(line)) for line in lines),
    }
