"""Describe a dataset as text: counts next to the published ones, files, flags and statistics."""

import heapq
import inspect
import json
import shutil
import textwrap
from collections import Counter
from pathlib import Path
from statistics import mean, median
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from .building import BUILD_REPORT, REPORTED, Source, describe_reported, flags_of


COUNTS = ("images", "objects", "expressions")
# areas in square pixels up to which COCO calls an object small or medium
SMALL_AREA, MEDIUM_AREA = 32**2, 96**2
NUM_LONGEST = 3


def format_table(rows: list[list], indent: str = "") -> str:
    """
    Format rows of cells, the first of them the heading, as an aligned table; numbers are aligned to the right.

    Example:

    ```python
    >>> from data_scripts.reports import format_table

    >>> table = format_table([["split", "images"], ["train", 16994], ["testA", None]])
    >>> table.splitlines()
    ['split  images', 'train  16,994', 'testA       -']

    ```"""
    columns = list(zip(*rows, strict=True))
    aligns = ["<" if all(isinstance(value, str) for value in column[1:]) else ">" for column in columns]
    widths = [max(len(format_cell(value)) for value in column) for column in columns]
    template = "  ".join(f"{{:{align}{width}}}" for align, width in zip(aligns, widths, strict=True))
    lines = [template.format(*map(format_cell, row)) for row in rows]
    return "\n".join(indent + line.rstrip() for line in lines)


def format_cell(value: Any) -> str:
    """Format a number with thousands separators, None as "-", and text as it is."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def flatten(table: pa.Table, *path: str) -> pa.Array:
    """Return the values at a path of fields, with lists joined: `flatten(table, "objects", "object_id")`."""
    column = table[path[0]].combine_chunks()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    for name in path[1:]:
        column = pc.struct_field(pc.list_flatten(column), name)
    return column


def table_of(rows: datasets.Dataset, *columns: str) -> pa.Table:
    """Return some columns of a split as an Arrow table."""
    return rows.select_columns(list(columns)).with_format("arrow")[:]


def count_split(rows: datasets.Dataset) -> dict[str, int]:
    """
    Count the images, objects and expressions of a split; every phrase is an expression.

    Example:

    ```python
    >>> import data_scripts
    >>> from data_scripts.reports import count_split

    >>> count_split(data_scripts.load("shapes", split="test", num_train=1, num_validation=1, num_test=2))
    {'images': 2, 'objects': 6, 'expressions': 18}

    ```"""
    table = table_of(rows, "objects", "sentences")
    if not len(table):
        return dict.fromkeys(COUNTS, 0)
    numbers = (len(table), pc.sum(pc.list_value_length(table["objects"])).as_py())
    phrases = pc.sum(pc.list_value_length(flatten(table, "sentences", "phrases"))).as_py()
    return dict(zip(COUNTS, (*numbers, phrases or 0), strict=True))


def published_counts(source: Source, split: str) -> dict[str, int | None]:
    """Return the published counts of a split, None where they are unknown."""
    return dict(zip(COUNTS, source.counts.get(split, (None,) * 3), strict=True))


def format_counts(source: Source, counts: dict[str, dict[str, int]]) -> str:
    """Format the counts of each split next to the published ones."""
    if not any(value is not None for numbers in source.counts.values() for value in numbers):
        return format_table(
            [["split", *COUNTS], *([split, *map(found.get, COUNTS)] for split, found in counts.items())]
        )
    rows = [["split", *(heading for name in COUNTS for heading in (name, "published"))]]
    for split, found in counts.items():
        published = published_counts(source, split)
        rows.append([split, *(numbers[name] for name in COUNTS for numbers in (found, published))])
    return format_table(rows)


def read_build_report(folder: str | Path) -> dict[str, dict[str, dict[str, int]]] | None:
    """
    Read what the build of a dataset left out or changed.

    Args:
        folder (`str` or `Path`): the built dataset in the cache.

    Returns:
        `dict`: split, or "all" for what was found before the splits were made -> "left_out", "changed" and perhaps
            "suspected" -> reason -> number; a split of which there is nothing to report is absent. None where an
            earlier version built it.

    Raises:
        OSError: if the file is damaged.
    """
    path = Path(folder) / BUILD_REPORT
    if not path.is_file():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        valid = all(
            type(count) is int
            for kinds in report.values()
            for kind in REPORTED
            for count in kinds.get(kind, {}).values()
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        valid = False
    if not valid:
        raise OSError(f"{str(path)!r} is damaged. Remove its folder, and the dataset is built again.")
    return report


def format_build_report(report: dict[str, dict[str, dict[str, int]]] | None, what: str = "build") -> str:
    """
    Format what a build, or another step (`what`), left out or changed, a line for each split and kind; see
    `read_build_report`.

    Example:

    ```python
    >>> from data_scripts.reports import format_build_report

    >>> print(format_build_report({"train": {"left_out": {"bad lines": 2}, "changed": {}}}))
    Left out or changed by the build:
    - train: left out 2 bad lines

    ```"""
    if report is None:
        return "What the build left out or changed is not recorded. A build with an empty cache records it."
    lines = [
        # a reason may quote a file's name, which may have line ends
        f"- {split}: {' '.join(describe_reported(kind, kinds[kind]).split())}"
        for split, kinds in report.items()
        for kind in REPORTED
        if kinds.get(kind)
    ]
    return "\n".join(
        [f"Left out or changed by the {what}:", *lines] if lines else [f"The {what} left out and changed nothing."]
    )


def list_sources(sources: dict[str, Source]) -> str:
    """
    Format one line per dataset: its splits, published counts and required files; and one per living copy of those
    whose hosts are gone.
    """
    rows = [["name", "images", "expressions", "splits", "files"]]
    for name, source in sources.items():
        rows.append([name, total(source, "images"), total(source, "expressions"), ", ".join(source.splits)])
        rows[-1].append(", ".join(source.files) or "none, it is generated")
    copies = [["on the Hub", "of", "licence", "content"]]
    copies += [
        [copy.where, name, copy.license, copy.content] for name, source in sources.items() for copy in source.copies
    ]
    width = shutil.get_terminal_size((119, 24)).columns
    lines = [*format_table(rows).splitlines(), "", *format_table(copies).splitlines()]
    return "\n".join(line if len(line) <= width else line[: width - 3] + "..." for line in lines)


def total(source: Source, name: str) -> int | None:
    """Return a published count over all splits, None if one of them is unknown."""
    numbers = [published_counts(source, split)[name] for split in source.splits]
    return None if None in numbers else sum(numbers)


def describe_source(source: Source) -> str:
    """Describe a dataset before it is built: splits, files, their origin and flags."""
    counts = [["split", *COUNTS]]
    counts += [[split, *published_counts(source, split).values()] for split in source.splits]
    parts = [f"{source.name} (builder {source.builder.__name__}, configuration {source.config_name!r})"]
    parts.append("published counts:\n" + format_table(counts, indent="  "))
    parts.append("files in --data_dir:\n" + "\n".join(f"  {name}" for name in source.files or ("none",)))
    parts.append(textwrap.fill(source.distribution, 100))
    if source.copies:
        rows = [[copy.where, copy.content, copy.license] for copy in source.copies]
        parts.append(
            "living copies on the Hub:\n" + format_table([["name", "content", "licence"], *rows], indent="  ")
        )
    flags = [f"  --{name} ({item.default!r})" for name, item in flags_of(source).items()]
    if flags:
        documentation = inspect.getdoc(source.builder.BUILDER_CONFIG_CLASS) or ""
        parts.append("flags and their defaults:\n" + "\n".join(flags))
        parts.append(documentation.removeprefix("Args:\n"))
    return "\n\n".join(parts)


def compute_statistics(rows: datasets.Dataset) -> tuple[dict, list[str]]:
    """
    Compute statistics of a split, and find its longest sentences.

    Returns:
        `dict`: name of a statistic -> its value. `list[str]`: the sentences, the longest first.
    """
    sizes, phrases, words, areas, masks, longest, targets = [], [], [], [], 0, [], Counter()
    for row in rows.select_columns(["width", "height", "objects", "sentences"]):
        sizes.append((row["width"], row["height"]))
        for item in row["objects"]:
            x0, y0, x1, y1 = item["box"]
            areas.append(((x1 - x0) * (y1 - y0), (x1 - x0) * (y1 - y0) / (row["width"] * row["height"])))
            masks += item["segmentation"] is not None
        for sentence in row["sentences"]:
            phrases.append(len(sentence["phrases"]))
            targets.update(min(len(phrase["objects"]), 2) for phrase in sentence["phrases"])
            words.append(len(sentence["text"].split()))
        longest = heapq.nlargest(NUM_LONGEST, {*longest, *(item["text"] for item in row["sentences"])}, key=len)

    def share(count: int, of: list) -> str:
        return f"{100 * count / len(of):.1f}%" if of else "-"

    small = sum(area <= SMALL_AREA for area, _ in areas)
    large = sum(area > MEDIUM_AREA for area, _ in areas)
    statistics = {
        "images": len(sizes),
        "objects": len(areas),
        "sentences": len(words),
        "expressions (phrases)": sum(phrases),
        "expressions with no target": targets[0],
        "expressions with several targets": targets[2],
        "sentences per image": len(words) / len(sizes) if sizes else None,
        "phrases per sentence, mean": float(mean(phrases)) if phrases else None,
        "phrases per sentence, maximum": max(phrases, default=None),
        "words per sentence, mean": float(mean(words)) if words else None,
        "words per sentence, median": float(median(words)) if words else None,
        "words per sentence, maximum": max(words, default=None),
        "image width, median": round(median(width for width, _ in sizes)) if sizes else None,
        "image height, median": round(median(height for _, height in sizes)) if sizes else None,
        f"boxes up to {SMALL_AREA:,} px² (small)": share(small, areas),
        f"boxes up to {MEDIUM_AREA:,} px² (medium)": share(len(areas) - small - large, areas),
        "larger boxes": share(large, areas),
        "box of its image, median": f"{100 * median(part for _, part in areas):.1f}%" if areas else None,
        "objects with a mask": share(masks, areas),
    }
    return statistics, longest


def format_statistics(splits: dict[str, datasets.Dataset]) -> str:
    """Format the statistics of all splits side by side, and the longest sentences of each."""
    summaries = {split: compute_statistics(rows) for split, rows in splits.items()}
    names = next(iter(summaries.values()))[0]
    table = [
        ["", *summaries],
        *([name, *(statistics[name] for statistics, _ in summaries.values())] for name in names),
    ]
    lines = [format_table(table)]
    for split, (_, longest) in summaries.items():
        lines.append(f"\nlongest sentences of {split}:")
        for text in longest:
            lines.append(textwrap.shorten(f"  {len(text)} characters: {text}", 110, placeholder=" ..."))
    return "\n".join(lines)
