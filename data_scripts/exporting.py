"""Export a dataset as a folder of Parquet files that plain `datasets.load_dataset` reads, here or from the Hub."""

import json
import math
import multiprocessing
import os
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import yaml
from datasets.table import embed_table_storage

from .atomic_files import atomic_folder
from .building import Source
from .escaping import for_code, for_markdown
from .progress import progress_bar
from .reading import check_text, is_as_stored
from .reports import COUNTS, count_split, format_build_report


# bytes of images per file, the limit of the datasets library itself
MAX_SHARD_BYTES = 500_000_000
# rows that a reader of a stream loads at a time
ROW_GROUP_SIZE = 100
README, DATA = "README.md", "data"
# marks a card as written by this module, and not by a person
MARK = "Written by `python -m data_scripts export "


def undecoded_images(rows: datasets.Dataset) -> datasets.arrow_dataset.Column:
    """Return the images of rows by path and content."""
    return rows.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))["image"]


def count_image_bytes(rows: datasets.Dataset) -> int:
    """
    Return the number of bytes of a split's images as files.

    Raises:
        OSError: naming an image that does not exist.
    """
    total = 0
    for image in undecoded_images(rows):
        total += len(image["bytes"]) if image["bytes"] is not None else os.stat(image["path"]).st_size
    return total


def with_absolute_path(row: dict) -> dict:
    """Return a row whose image has a path that is right from any folder, or its content where no path would do."""
    image = row["image"]
    if is_as_stored(image):
        return {"image": image}  # other readers would turn the file at its path
    if image["bytes"] is not None:
        raise ValueError(
            f"The images of this dataset are in its rows ({row['image_id']!r} is not a file): they cannot be "
            "exported by path. Leave out --by_path."
        )
    return {"image": {"bytes": None, "path": os.path.abspath(image["path"])}}


def write_shard(task: tuple[datasets.Dataset, Path, bool]) -> int:
    """Write one Parquet file of (rows, path, whether to embed the images); returns the number of rows."""
    rows, path, embed = task
    rows = rows.with_format("arrow")
    with pq.ParquetWriter(path, rows.features.arrow_schema) as writer:
        for start in range(0, len(rows), ROW_GROUP_SIZE):
            table = rows[start : start + ROW_GROUP_SIZE]
            writer.write_table(embed_table_storage(table) if embed else table)
    return len(rows)


def write_dataset_card(
    path: Path,
    folder: Path,
    source: Source,
    splits: dict[str, datasets.Dataset],
    embed: bool,
    flags: dict,
    build_report: dict | None,
) -> None:
    """
    Write the dataset card of an export to `folder`: which file is of which split, what is in it and what is not, and
    where it comes from.
    """
    settings = {
        "pretty_name": source.name,
        "task_categories": ["zero-shot-object-detection"],
        "tags": ["visual-grounding", "referring-expression-comprehension", "phrase-grounding"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"{DATA}/{split}-*.parquet"} for split in splits],
            }
        ],
    }
    info = next(iter(splits.values())).info
    if info.license:
        settings["license"] = info.license.lower().replace(" ", "-")  # as the Hub spells it: cc-by-sa-4.0
    credit = f" {for_markdown(info.citation)}" if info.citation else ""
    counts = {split: count_split(rows) for split, rows in splits.items()}
    table = [["split", *COUNTS], ["---"] * (1 + len(COUNTS))]
    table += [[split, *(f"{numbers[name]:,}" for name in COUNTS)] for split, numbers in counts.items()]
    lines = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    placement = "inside the files" if embed else "by their paths on the machine that wrote it"
    if any(is_as_stored(image) for rows in splits.values() for image in undecoded_images(rows)):
        placement += "; without an EXIF orientation where boxes were drawn on the image as it is stored"
    chosen = "".join(f" {for_code(f'{name}={value!r}')}" for name, value in flags.items()) or " none"
    listed = "\n".join(map(for_markdown, format_build_report(build_report).split("\n")))
    path.write_text(
        f"""---
{yaml.safe_dump(settings, sort_keys=False)}---

# {source.name}

Visual grounding: images ({placement}), objects, and the sentences that refer to them. A row is an image.

{lines}

{listed}

```python
from datasets import load_dataset

rows = load_dataset({json.dumps(str(folder), ensure_ascii=False)}, split="{next(iter(splits))}")
```

- `objects`: `box` is xyxy in pixels of the upright image, right and bottom exclusive; `boxes` are all boxes of an
  object that has several, `box` their union; `segmentation` is COCO's run-length encoding, or null.
- `sentences`: `text[start:end]` of each phrase names the `objects` with these indices. A referring expression is a
  sentence whose one phrase is all of it.
- `positions`: the number of each sentence in the annotations of its split, where rows are ordered otherwise, or null.

Source: {source.distribution} Licences of images and annotations are their authors'.{credit}

{MARK}{source.name}`; flags:{chosen}.
""",
        encoding="utf-8",
    )


def check_output(output: Path, overwrite: bool) -> None:
    """
    Refuse a folder that must not be replaced.

    Raises:
        OSError: if it exists, unless it is an earlier export and is to be overwritten.
        ValueError: if its name is not UTF-8.
    """
    check_text(str(output), "output")
    if not output.exists():
        return
    if not overwrite:
        raise OSError(f"{str(output)!r} exists. Choose another --output, or replace it by --overwrite.")
    if not output.is_dir() or not {entry.name for entry in output.iterdir()} <= {README, DATA}:
        raise OSError(f"{str(output)!r} is not replaced: it contains more than an export ({README} and {DATA}/).")


def export_dataset(
    source: Source,
    splits: dict[str, datasets.Dataset],
    output: str | Path,
    embed: bool = True,
    num_proc: int | None = None,
    overwrite: bool = False,
    flags: dict | None = None,
    build_report: dict | None = None,
) -> Path:
    """
    Write a dataset as Parquet files with a dataset card, atomically.

    ```
    output/README.md
    output/data/train-00000-of-00002.parquet ...
    ```

    Args:
        source (`Source`): the dataset.
        splits (`dict[str, datasets.Dataset]`): split -> rows.
        output (`str` or `Path`): the folder.
        embed (`bool`, *optional*, defaults to `True`): images inside the files, as they are; else by their paths.
        num_proc (`int`, *optional*): processes, one by default.
        overwrite (`bool`, *optional*, defaults to `False`): replace an earlier export.
        flags (`dict`, *optional*): the flags that the dataset was built with, for the card.
        build_report (`dict`, *optional*): what its build left out or changed, see `reports.read_build_report`, for the
            card.

    Returns:
        `Path`: `output`.

    Raises:
        OSError: if `output` exists, or an image does not.
        ValueError: if images that are not files are to be exported by path.
    """
    output = Path(output).absolute()
    check_output(output, overwrite)
    with atomic_folder(output, overwrite) as folder:
        (folder / DATA).mkdir()
        tasks = []
        for split, rows in splits.items():
            num_shards = max(1, min(len(rows), math.ceil(count_image_bytes(rows) / MAX_SHARD_BYTES))) if embed else 1
            rows = rows.cast_column("image", datasets.Image(decode=False))
            if not embed:
                rows = rows.map(with_absolute_path, features=rows.features, desc=f"paths of {split}")
            rows = rows.cast_column("image", datasets.Image())
            for index in range(num_shards):
                path = folder / DATA / f"{split}-{index:05d}-of-{num_shards:05d}.parquet"
                tasks.append((rows.shard(num_shards, index, contiguous=True), path, embed))
        with progress_bar(total=sum(map(len, splits.values())), desc="exporting", unit="image") as progress:
            if num_proc is None or num_proc == 1:
                for task in tasks:
                    progress.update(write_shard(task))
            else:
                with multiprocessing.Pool(num_proc) as pool:
                    for count in pool.imap_unordered(write_shard, tasks):
                        progress.update(count)
        write_dataset_card(folder / README, output, source, splits, embed, flags or {}, build_report)
    return output
