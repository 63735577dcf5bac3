"""Validate the rows of a dataset against the schema, and its image files."""

import math
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .box_conventions import Judgement, judge_splits
from .building import SUSPECTED, Source, is_degenerate, merge_boxes
from .masks import box_of, check_counts
from .progress import progress_bar
from .reading import NamedBytes, check_decodes, has_words, read_frame, read_image_size
from .reports import COUNTS, count_split, flatten, published_counts, table_of


# images that a process takes at a time
PART_SIZE = 64
# pixels by which a mask's bounding box may differ from the box on each side: a polygon's edge falls on whole pixels,
# and so do boxes that are cut to them
MASK_TOLERANCE = 2.0
BOX_TOLERANCE = 0.01
MISS = "miss"
NO_PIXEL = "no pixel belongs to it"
WHY_MISS = "it cannot be learned, and counts as a miss in an evaluation, as published"


class Finding(NamedTuple):
    """A finding about a row: its kind, split, image and message."""

    kind: str
    split: str
    image_id: str | None
    message: str


def image_file_of(row: dict) -> Path | NamedBytes:
    """
    Return the image of a row that is not decoded: its path, which is never a URL, or its content.

    Raises:
        ValueError: if it has neither.
    """
    image = row["image"]
    if image["bytes"] is None and image["path"] is None:
        raise ValueError(f"The image of {row['image_id']!r} must have bytes or a path, and has neither.")
    if image["bytes"] is None:
        return Path(image["path"])
    return NamedBytes(image["bytes"], image["path"] or row["image_id"])


def validate_image(row: dict, decode: bool) -> list[tuple[str, str]]:
    """Return (kind, message) where a row's image is missing, not an image or, if `decode`, damaged."""
    try:
        (check_decodes if decode else read_image_size)(image_file_of(row))
    except (OSError, ValueError) as error:
        return [("picture", str(error))]  # a kind of finding in reports of `reftr data check --json`
    return []


def validate_boxes(row: dict, keeps_misses: bool = False) -> list[tuple[str, str]]:
    """Return (kind, message) where a box is malformed, leaves the image, or is not the union of the object's boxes."""
    problems, width, height = [], row["width"], row["height"]
    for item in row["objects"]:
        if is_miss(item["box"], width, height):
            message = f"object {item['object_id']!r}: {item['box']} has no extent: {WHY_MISS}"
            problems.append((MISS if keeps_misses else "box", message))
            continue
        bad = [box for box in (item["box"], *item["boxes"]) if not is_box_within(box, width, height)]
        for box in bad[:1]:
            problems.append(
                ("box", f"object {item['object_id']!r}: {box} is not a box in an image of {width} x {height}")
            )
        if not bad:
            union = merge_boxes(item["boxes"]) if item["boxes"] else None
            if union is None or not are_close(union, item["box"], BOX_TOLERANCE):
                problems.append(("box", f"object {item['object_id']!r}: {item['box']} is not the union of its boxes"))
    return problems


def is_box_within(box_xyxy: Sequence[float], width: int, height: int) -> bool:
    """Return whether this is a box with an extent that lies inside its image."""
    if len(box_xyxy) != 4 or not all(map(math.isfinite, box_xyxy)):
        return False
    x0, y0, x1, y1 = box_xyxy
    return 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height


def is_miss(box_xyxy: Sequence[float], width: int, height: int) -> bool:
    """Return whether this is a box inside its image that has no extent, which can be neither learned nor hit."""
    if len(box_xyxy) != 4 or not all(map(math.isfinite, box_xyxy)):
        return False
    x0, y0, x1, y1 = box_xyxy
    return is_degenerate(box_xyxy) and 0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height


def are_close(first_xyxy: Sequence[float], second_xyxy: Sequence[float], tolerance: float) -> bool:
    """Return whether all sides of two boxes are within a tolerance."""
    return all(abs(a - b) <= tolerance for a, b in zip(first_xyxy, second_xyxy, strict=True))


def validate_masks(row: dict, tolerance: float, keeps_misses: bool = False) -> list[tuple[str, str]]:
    """Return (kind, message) where a mask has another size than the image, is malformed, or disagrees with its box."""
    problems, size = [], [row["height"], row["width"]]
    for item in row["objects"]:
        if item["segmentation"] is None or is_miss(item["box"], row["width"], row["height"]):
            continue
        if list(item["segmentation"]["size"]) != size:
            problem = f"its size is {item['segmentation']['size']}, the image's {size} (height, width)"
        else:
            problem = validate_mask(item["segmentation"]["counts"], size, item["box"], tolerance)
        if problem == NO_PIXEL:
            message = f"mask of object {item['object_id']!r}: {problem}: {WHY_MISS}"
            problems.append((MISS if keeps_misses else "mask", message))
        elif problem:
            problems.append(("mask", f"mask of object {item['object_id']!r}: {problem}"))
    return problems


def validate_mask(counts: str, size: list[int], box_xyxy: Sequence[float], tolerance: float) -> str | None:
    """Return what is wrong with a mask, None if nothing is."""
    try:
        lengths = check_counts(counts, *size)
    except ValueError as error:
        return str(error)
    if not sum(lengths[1::2]):
        return NO_PIXEL
    found = box_of({"size": size, "counts": counts})
    if len(box_xyxy) == 4 and not are_close(found, box_xyxy, tolerance):
        box = [round(value, 1) for value in box_xyxy]
        return f"it spans {found}, its box is {box}: more than {tolerance:g} pixels apart"
    return None


def validate_sentences(row: dict) -> list[tuple[str, str]]:
    """Return (kind, message) where a sentence is blank, or a phrase lies outside it, is blank or names bad objects."""
    problems = []
    for sentence in row["sentences"]:
        text, where = sentence["text"], f"sentence {sentence['sentence_id']!r}"
        if not has_words(text):
            problems.append(("sentence", f"{where} is blank"))
            continue
        for phrase in sentence["phrases"]:
            start, end = phrase["start"], phrase["end"]
            if not 0 <= start < end <= len(text):
                problems.append(("phrase", f"{where}: {start}:{end} is not a span of its {len(text)} characters"))
            elif not has_words(text[start:end]):
                problems.append(("phrase", f"{where}: {start}:{end} contains no word"))
            if not all(0 <= index < len(row["objects"]) for index in phrase["objects"]):
                problems.append(("phrase", f"{where}: objects {phrase['objects']} of {len(row['objects'])}"))
            elif len(set(phrase["objects"])) < len(phrase["objects"]):
                problems.append(("phrase", f"{where}: {text[start:end]!r} names an object twice"))
    return problems


def validate_row(row: dict, mask_tolerance: float, keeps_misses: bool = False) -> list[tuple[str, str]]:
    """Return (kind, message) of everything that is wrong with a row and its image."""
    problems = validate_image(row, decode=True)
    if not problems:
        size = (row["width"], row["height"])
        found = read_frame(image_file_of(row), annotated_size=size).size
        if found != size:
            problems.append(("picture", f"the image has {found[0]} x {found[1]} pixels, the row says {size}"))
    problems += validate_boxes(row, keeps_misses) + validate_masks(row, mask_tolerance, keeps_misses)
    return problems + validate_sentences(row)


def validate_part(
    find: Callable[[dict], list[tuple[str, str]]], rows: datasets.Dataset
) -> tuple[int, list[tuple[str, str, str]]]:
    """Return (number of rows, [(kind, image id, message)]) of a part of a split; runs in a worker process."""
    return len(rows), [(kind, row["image_id"], message) for row in rows for kind, message in find(row)]


def validate_splits(
    splits: dict[str, datasets.Dataset],
    find: Callable[[dict], list[tuple[str, str]]],
    num_proc: int | None,
    description: str,
) -> list[Finding]:
    """
    Return what `find(row) -> [(kind, message)]` finds in all rows, with images not decoded.

    Args:
        splits (`dict[str, datasets.Dataset]`): split -> rows.
        find (callable): one that another process can take over.
        num_proc (`int`, *optional*): processes, one by default.
        description (`str`): label of the progress bar.
    """
    parts = []
    for split, rows in splits.items():
        rows = rows.cast_column("image", datasets.Image(decode=False))
        starts = range(0, len(rows), PART_SIZE)
        parts += [(split, rows.select(range(start, min(start + PART_SIZE, len(rows))))) for start in starts]
    findings = []
    with progress_bar(total=sum(map(len, splits.values())), desc=description, unit="image") as progress:

        def take(results: Iterable) -> None:
            for (split, _), (count, problems) in zip(parts, results, strict=True):
                findings.extend(Finding(kind, split, image_id, message) for kind, image_id, message in problems)
                progress.update(count)

        work, inputs = partial(validate_part, find), (rows for _, rows in parts)
        if num_proc is None or num_proc == 1:
            take(map(work, inputs))
        else:
            with multiprocessing.Pool(num_proc) as pool:
                take(pool.imap(work, inputs))
    return findings


def find_broken_images(
    splits: dict[str, datasets.Dataset], decode: bool, num_proc: int | None = None
) -> list[Finding]:
    """Return the images that are missing, not images or, if `decode`, damaged."""
    description = "decoding images" if decode else "reading headers"
    return validate_splits(splits, partial(validate_image, decode=decode), num_proc, description)


def repeated_values(values: pa.Array) -> list:
    """Return the values that occur more than once."""
    counted = pc.value_counts(values)
    return counted.field("values").filter(pc.greater(counted.field("counts"), 1)).to_pylist()


def find_repeated_ids(splits: dict[str, datasets.Dataset]) -> tuple[list[Finding], list[Finding]]:
    """Return ids that occur twice in one split (errors), and those that two splits share (warnings)."""
    errors, warnings, seen = [], [], {}
    for split, rows in splits.items():
        if not len(rows):
            continue
        table = table_of(rows, "image_id", "objects", "sentences")
        for name, path in {
            "image_id": ("image_id",),
            "object_id": ("objects", "object_id"),
            "sentence_id": ("sentences", "sentence_id"),
        }.items():
            values = flatten(table, *path)
            errors += [
                Finding("id", split, None, f"{name} {value!r} comes more than once")
                for value in repeated_values(values)
            ]
            values = values.unique()
            for other, others in seen.setdefault(name, {}).items():
                shared = pc.sum(pc.is_in(values, value_set=others)).as_py()
                if shared:
                    warnings.append(Finding("shared", split, None, f"{shared} {name}s are in {other!r} as well"))
            seen[name][split] = values
    return errors, warnings


def find_silent_sentences(splits: dict[str, datasets.Dataset]) -> list[Finding]:
    """Count sentences without a phrase, which ask for nothing: one warning per split."""
    warnings = []
    for split, rows in splits.items():
        if len(rows):
            lengths = pc.list_value_length(flatten(table_of(rows, "sentences"), "sentences", "phrases"))
            count = pc.sum(pc.equal(lengths, 0)).as_py()
            if count:
                warnings.append(Finding("sentence", split, None, f"{count} sentences have no phrase"))
    return warnings


def check(
    source: Source,
    splits: dict[str, datasets.Dataset],
    num_proc: int | None = None,
    mask_tolerance: float = MASK_TOLERANCE,
    keeps_misses: bool = False,
    build_report: dict | None = None,
) -> dict:
    """
    Check every row and image of a dataset.

    Args:
        source (`Source`): the dataset, for its published counts.
        splits (`dict[str, datasets.Dataset]`): split -> rows.
        num_proc (`int`, *optional*): processes, one by default.
        mask_tolerance (`float`, *optional*, defaults to 2.0):
            Pixels by which a mask's bounding box may differ from its box on each side.
        keeps_misses (`bool`, *optional*, defaults to `False`):
            Whether boxes without extent and masks without a pixel are meant to be there, as `integer_boxes` keeps
            them: they are warnings then, else errors.
        build_report (`dict`, *optional*): what the build left out or changed, see `reports.read_build_report`.

    Returns:
        `dict`: `name`; `splits`, split -> counts and `published` counts; `build`, the build report; `errors` and
            `warnings`, each a list of `{kind, split, image_id, message}`.
    """
    find = partial(validate_row, mask_tolerance=mask_tolerance, keeps_misses=keeps_misses)
    errors = validate_splits(splits, find, num_proc, "checking")
    repeated, warnings = find_repeated_ids(splits)
    if keeps_misses:
        warnings += [finding for finding in errors if finding.kind == MISS]
        errors = [finding for finding in errors if finding.kind != MISS]
    warnings += find_silent_sentences(splits)
    report = {}
    for split, rows in splits.items():
        counts, published = count_split(rows), published_counts(source, split)
        report[split] = {**counts, "published": published}
        for name in COUNTS:
            if published[name] is not None and published[name] != counts[name]:
                message = f"{counts[name]:,} {name}, published are {published[name]:,}"
                warnings.append(Finding("count", split, None, message))
    for split, kinds in (build_report or {}).items():
        warnings += [Finding("convention", split, None, message) for message in kinds.get(SUSPECTED, ())]
    for judgement in judge_rows(splits):
        finding = Finding("convention", ", ".join(splits), None, judgement.message)
        (errors if judgement.is_certain else warnings).append(finding)
    return {
        "name": source.name,
        "splits": report,
        "build": build_report,
        "errors": [finding._asdict() for finding in errors + repeated],
        "warnings": [finding._asdict() for finding in warnings],
    }


def judge_rows(splits: dict[str, datasets.Dataset]) -> list[Judgement]:
    """
    Return what the boxes of rows look like, if they are not what the schema says: xyxy in pixels.

    Args:
        splits (`dict[str, datasets.Dataset]`): split -> rows; none is decoded.
    """
    found = {}
    for split, rows in splits.items():
        boxes, sizes = [np.zeros((0, 4))], [np.zeros((0, 2))]
        for table in rows.select_columns(["width", "height", "objects"]).with_format("arrow").iter(10_000):
            part, counts = boxes_of_images(table["objects"].combine_chunks())
            boxes.append(part)
            sizes.append(
                np.stack((table["width"].to_numpy(), table["height"].to_numpy()), axis=1).repeat(counts, axis=0)
            )
        found[split] = {("boxes", "xyxy"): (np.concatenate(boxes), np.concatenate(sizes))}
    return judge_splits(found)


def boxes_of_images(objects: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Return the boxes_xyxy (N, 4) in a column of objects, malformed ones left out, and how many each image has."""
    boxes = pc.struct_field(pc.list_flatten(objects), "box")
    image = pc.list_parent_indices(objects).to_numpy(zero_copy_only=False)
    is_box = pc.equal(pc.list_value_length(boxes), 4).to_numpy(zero_copy_only=False).astype(bool)
    values = pc.list_flatten(boxes.filter(pa.array(is_box))).to_numpy(zero_copy_only=False)
    return values.reshape(-1, 4), np.bincount(image[is_box], minlength=len(objects))


def format_findings(findings: list[dict], title: str, limit: int) -> str:
    """Format one line per kind of finding with its number, and the first `limit` findings."""
    lines = []
    for kind, count in Counter(finding["kind"] for finding in findings).items():
        lines.append(f"{title}: {kind}: {count}")
        chosen = [finding for finding in findings if finding["kind"] == kind]
        for finding in chosen[:limit]:
            image = "" if finding["image_id"] is None else f", image {finding['image_id']!r}"
            lines.append(f"  {finding['split']}{image}: {finding['message']}")
        if count > limit:
            lines.append(f"  ... and {count - limit} more")
    return "\n".join(lines)
