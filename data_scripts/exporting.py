"""Export a dataset as a folder of Parquet files that plain `datasets.load_dataset` reads, here or from the Hub."""

import json
import math
import multiprocessing
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import yaml
from datasets.info import DatasetInfosDict
from datasets.table import embed_table_storage
from huggingface_hub import DatasetCardData

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
# how the names of splits begin, in their usual order
SPLIT_ORDER = ("train", "val", "dev", "test")
# rows from which on the Hub calls a dataset larger, and what it calls it below
SIZE_CATEGORIES = {
    10**3: "n<1K",
    10**4: "1K<n<10K",
    10**5: "10K<n<100K",
    10**6: "100K<n<1M",
    10**7: "1M<n<10M",
    10**8: "10M<n<100M",
}
UNDETERMINED = "und"  # the ISO 639 code of an unknown language
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
    return {"image": {"bytes": None, "path": path_of_image(row)}}


def path_of_image(row: dict) -> str:
    """
    Return the absolute path of a row's image.

    Raises:
        ValueError: if it is not a file.
    """
    if row["image"]["bytes"] is not None:
        raise ValueError(
            f"The images of this dataset are in its rows ({row['image_id']!r} is not a file): they cannot be "
            "exported by path. Leave out --by_path."
        )
    return os.path.abspath(row["image"]["path"])


def in_usual_order(names: Iterable[str]) -> list[str]:
    """
    Return names of splits in their usual order: those of training, validation, test, others.

    Example:

    ```python
    >>> from data_scripts.exporting import in_usual_order

    >>> in_usual_order(["testB", "extra", "val", "testA", "train"])
    ['train', 'val', 'testA', 'testB', 'extra']

    ```"""

    def rank(name: str) -> tuple[int, str]:
        begins = [index for index, start in enumerate(SPLIT_ORDER) if name.startswith(start)]
        return min(begins, default=len(SPLIT_ORDER)), name

    return sorted(names, key=rank)


def size_category(num_rows: int) -> str:
    """
    Return the category that the Hub has for a number of rows.

    Example:

    ```python
    >>> from data_scripts.exporting import size_category

    >>> size_category(999), size_category(1000)
    ('n<1K', '1K<n<10K')

    ```"""
    return next((name for limit, name in SIZE_CATEGORIES.items() if num_rows < limit), "100M<n<1B")


def write_shard(task: tuple[datasets.Dataset, Path, str, bool]) -> tuple[str, int, int]:
    """Write one Parquet file of (rows, path, split, whether to embed the images); returns (split, rows, bytes)."""
    rows, path, split, embed = task
    rows, num_bytes = rows.with_format("arrow"), 0
    with pq.ParquetWriter(path, rows.features.arrow_schema) as writer:
        for start in range(0, len(rows), ROW_GROUP_SIZE):
            table = rows[start : start + ROW_GROUP_SIZE]
            table = embed_table_storage(table) if embed else table
            writer.write_table(table)
            num_bytes += table.nbytes
    return split, len(rows), num_bytes


def write_dataset_card(
    path: Path,
    folder: Path,
    source: Source,
    splits: dict[str, datasets.Dataset],
    embed: bool,
    flags: dict,
    build_report: dict | None,
    dataset_info: dict | None = None,
    license: str | None = None,
    language: str | None = None,
) -> None:
    """
    Write the dataset card of an export to `folder`: which file is of which split, what is in it and what is not, and
    where it comes from. `license` and `language` are those of the source if they are not given.
    """
    info = next(iter(splits.values())).info
    license_of_rows = (info.license or "").lower().replace(" ", "-")  # as the Hub spells it: cc-by-sa-4.0
    # a folder may have any name
    name = source.name if re.fullmatch(r"[\w./+ -]+", source.name) else "a folder"
    settings = {
        "pretty_name": name,
        "license": license or license_of_rows or source.license,
        "language": [language or source.language or UNDETERMINED],
        "size_categories": [size_category(sum(map(len, splits.values())))],
        "task_categories": ["zero-shot-object-detection"],
        "tags": ["visual-grounding", "referring-expression-comprehension", "phrase-grounding"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"{DATA}/{split}-*.parquet"} for split in splits],
            }
        ],
        **({} if dataset_info is None else {"dataset_info": dataset_info}),
    }
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

# {name}

Visual grounding: images ({placement}), objects, and the sentences that refer to them. A row is an image.

{lines}

{listed}

```python
from datasets import load_dataset

rows = load_dataset({json.dumps(str(folder), ensure_ascii=False)}, split="{next(iter(splits))}")
```

- `objects`: `box` is xyxy in pixels of the upright image, right and bottom exclusive; `boxes` are all boxes of an
  object that has several, `box` their union; `segmentation` is COCO's run-length encoding, or null.
- `sentences`: `text[start:end]` of each phrase names the `objects` with these indices, each of which is an answer; if
  there are none, it refers to nothing in the image. A referring expression is a sentence with one phrase, all of it.
- `positions`: the number of each sentence in the annotations of its split, where rows are ordered otherwise, or null.

Source: {source.distribution} Licences of images and annotations are their authors'.{credit}

{MARK}{name}`; flags:{chosen}.
""",
        encoding="utf-8",
    )


def describe_files(folder: Path, splits: dict[str, datasets.Dataset], num_bytes: dict[str, int]) -> dict:
    """
    Return the `dataset_info` of a card, which tells the Hub the features, rows and bytes of files.

    Args:
        folder (`Path`): the files.
        splits (`dict[str, datasets.Dataset]`): split -> rows.
        num_bytes (`dict[str, int]`): split -> bytes of its rows as tables.
    """
    entries = {
        name: datasets.SplitInfo(name=name, num_bytes=num_bytes[name], num_examples=len(rows))
        for name, rows in splits.items()
    }
    info = datasets.DatasetInfo(
        features=next(iter(splits.values())).features,
        splits=datasets.SplitDict(entries),
        download_size=sum(file.stat().st_size for file in folder.iterdir()),
        dataset_size=sum(num_bytes.values()),
    )
    data = DatasetCardData()
    DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    return data.to_dict()["dataset_info"]


def check_output(output: Path, overwrite: bool, names: Collection[str] = (README, DATA)) -> None:
    """
    Refuse a folder that must not be replaced.

    Args:
        output (`Path`): the folder.
        overwrite (`bool`): whether to replace an earlier export.
        names (`tuple[str, ...]`, *optional*): what an export contains.

    Raises:
        OSError: if it exists, unless it is an earlier export and is to be overwritten.
        ValueError: if its name is not UTF-8.
    """
    check_text(str(output), "output")
    if not output.exists():
        return
    if not overwrite:
        raise OSError(f"{str(output)!r} exists. Choose another --output, or replace it by --overwrite.")
    if not output.is_dir() or not {entry.name for entry in output.iterdir()} <= set(names):
        raise OSError(f"{str(output)!r} is not replaced: it contains more than an export ({', '.join(names)}).")


def export_dataset(
    source: Source,
    splits: dict[str, datasets.Dataset],
    output: str | Path,
    embed: bool = True,
    num_proc: int | None = None,
    overwrite: bool = False,
    flags: dict | None = None,
    build_report: dict | None = None,
    license: str | None = None,
    language: str | None = None,
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
        license (`str`, *optional*): the licence, as an id of the Hub, for the card; absent: that of the source.
        language (`str`, *optional*): the language of the texts, as a code of ISO 639, for the card; absent: the
            source's.

    Returns:
        `Path`: `output`.

    Raises:
        OSError: if `output` exists, or an image does not.
        ValueError: if images that are not files are to be exported by path.
    """
    output = Path(output).absolute()
    check_output(output, overwrite)
    splits = {split: splits[split] for split in in_usual_order(splits)}
    num_bytes = dict.fromkeys(splits, 0)
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
                tasks.append((rows.shard(num_shards, index, contiguous=True), path, split, embed))
        with progress_bar(total=sum(map(len, splits.values())), desc="exporting", unit="image") as progress:

            def take(written: Iterable[tuple[str, int, int]]) -> None:
                for split, count, size in written:
                    num_bytes[split] += size
                    progress.update(count)

            if num_proc is None or num_proc == 1:
                take(map(write_shard, tasks))
            else:
                with multiprocessing.Pool(num_proc) as pool:
                    take(pool.imap_unordered(write_shard, tasks))
        info = describe_files(folder / DATA, splits, num_bytes)
        write_dataset_card(
            folder / README, output, source, splits, embed, flags or {}, build_report, info, license, language
        )
    return output
