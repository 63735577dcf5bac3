"""Load datasets by name, building those that are not in the cache."""

from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetGenerationError

from . import cutouts, flickr30k_entities, jsonl, line_formats, refcoco, reftr_index, shapes, visual_genome
from .building import Source, builder_error_of, flags_of
from .reports import format_build_report, read_build_report
from .schema import FEATURES


# all datasets that `load` takes; each module of builders lists its own
MODULES = (shapes, cutouts, jsonl, refcoco, flickr30k_entities, visual_genome, reftr_index, line_formats)
SOURCES: dict[str, Source] = {source.name: source for module in MODULES for source in module.SOURCES}


def load(
    name: str,
    split: str | None = None,
    data_dir: str | None = None,
    cache_dir: str | None = None,
    streaming: bool = False,
    num_proc: int | None = None,
    decode: bool = True,
    **config: Any,
) -> datasets.Dataset | datasets.DatasetDict | datasets.IterableDataset | datasets.IterableDatasetDict:
    """
    Load a dataset, building it if it is not in the cache.

    A change of the annotation files, of the builder or of a flag builds it again.

    An image is turned as its EXIF orientation says, unless only its stored size agrees with the size that it was
    annotated at. Where it is not turned, the row has the content of the file without its orientation, since the
    datasets library would turn it; all other rows have paths. So every reader sees the frame that `width`, `height`,
    boxes and masks are in.

    Args:
        name (`str`): the dataset, one of `SOURCES`.
        split (`str`, *optional*): one of its splits; absent: all of them, in a dict.
        data_dir (`str`, *optional*): the folder of its files, as its authors distribute them.
        cache_dir (`str`, *optional*): the cache of built datasets, by default that of the datasets library.
        streaming (`bool`): yield the rows from the files in turn, writing nothing.
        num_proc (`int`, *optional*): number of processes that build it.
        decode (`bool`): decode the images; else their path or content is given, as by `datasets.Image(decode=False)`.
        config: flags of the dataset's configuration, for example `image_size=64`.

    Returns:
        `datasets.Dataset`, or `IterableDataset` when streaming: one row per image, see `schema.FEATURES`.

    Raises:
        ValueError: if the dataset or a flag is unknown, `data_dir` is missing, or nothing is left in a split.
        OSError: if files are missing or damaged, naming them.

    Example:

    ```python
    >>> import data_scripts

    >>> rows = data_scripts.load("shapes", split="test", num_train=1, num_validation=1, num_test=2)
    >>> rows[0]["sentences"][0]["phrases"][0]["types"]
    ['attribute']

    ```"""
    builder = _make_builder(name, data_dir, cache_dir, config)
    if streaming:
        rows = builder.as_streaming_dataset(split=split)
        parts = rows if split is None else {split: rows}
        undecoded = {name: part.cast_column("image", datasets.Image(decode=False)) for name, part in parts.items()}
        empty = [name for name, part in undecoded.items() if next(iter(part), None) is None]
        _refuse_empty(builder, empty, builder.make_report())
        if split is None:
            return datasets.IterableDatasetDict({key: _stream_as_stored(part, decode) for key, part in rows.items()})
        return _stream_as_stored(rows, decode)
    _build(builder, num_proc, split)
    try:
        rows = builder.as_dataset(split=split)
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        sizes = ", ".join(f"{part}: {info.num_examples}" for part, info in builder.info.splits.items())
        raise ValueError(f"split={split!r} of {name!r} has no rows; its splits have {sizes} rows.") from error
    return rows if decode else rows.cast_column("image", datasets.Image(decode=False))


def load_with_report(
    name: str, data_dir: str | None = None, cache_dir: str | None = None, num_proc: int | None = None, **config: Any
) -> tuple[datasets.DatasetDict, dict | None]:
    """
    Load all splits as `load` does, with the report of what their build left out or changed.

    Args:
        name, data_dir, cache_dir, num_proc, config: see `load`.

    Returns:
        `DatasetDict`: split -> rows. `dict` or None: see `reports.read_build_report`.

    Raises:
        ValueError, OSError: see `load`.

    Example:

    ```python
    >>> from data_scripts.loading import load_with_report

    >>> splits, report = load_with_report("shapes", num_train=1, num_validation=1, num_test=2)
    >>> len(splits["test"]), report
    (2, {})

    ```"""
    builder = _make_builder(name, data_dir, cache_dir, config)
    _build(builder, num_proc)
    return builder.as_dataset(), read_build_report(builder.cache_dir)


def _make_builder(name: str, data_dir: str | None, cache_dir: str | None, config: dict) -> datasets.DatasetBuilder:
    """Return the builder of a dataset by its name; raise a ValueError for unknown names and flags."""
    if name not in SOURCES:
        raise ValueError(f"There is no dataset {name!r}; choose from: {', '.join(SOURCES)}.")
    source = SOURCES[name]
    flags = flags_of(source)
    unknown = sorted(set(config) - set(flags))
    if unknown:
        raise ValueError(f"{name!r} has no flag {', '.join(unknown)}; it has: {', '.join(flags)}.")
    if data_dir is not None:
        config = {**config, "data_dir": str(data_dir)}
    return source.builder(config_name=source.config_name, cache_dir=cache_dir, **config)


def _build(builder: datasets.DatasetBuilder, num_proc: int | None, split: str | None = None) -> None:
    """Build a dataset that is not in the cache; raise the builder's own error, and one for an empty split."""
    try:
        builder.download_and_prepare(num_proc=num_proc)
    except DatasetGenerationError as error:
        raise builder_error_of(error) from error
    # the library loads no split without rows
    empty = [name for name, info in builder.info.splits.items() if split in (None, name) and not info.num_examples]
    _refuse_empty(builder, empty, read_build_report(builder.cache_dir))


def _refuse_empty(builder: datasets.DatasetBuilder, empty: list[str], report: dict | None) -> None:
    """Raise a ValueError if there are splits without rows, with the files that they are read from."""
    if empty:
        files = dict.fromkeys(str(file) for name in empty for file in builder.files_of(name))
        read_from = ", ".join(map(repr, files)) or "no file"
        raise ValueError(
            f"Nothing is left in {', '.join(empty)} of {builder.config.name!r}, read from {read_from}. "
            f"{format_build_report(report)}"
        )


def _stream_as_stored(rows: datasets.IterableDataset, decode: bool) -> datasets.IterableDataset:
    """Return a stream of `_as_stored` rows; a stream that decodes cannot be cast to one that does not."""
    rows = rows if decode else rows.cast_column("image", datasets.Image(decode=False))
    return rows.map(_as_stored, features=FEATURES if decode else rows.features)


def _as_stored(row: dict) -> dict:
    """Return a streamed row with its boxes in single precision, as the cache returns them."""
    for item in row["objects"]:
        item["box"] = np.float32(item["box"]).tolist()
        item["boxes"] = [np.float32(box).tolist() for box in item["boxes"]]
    return row
