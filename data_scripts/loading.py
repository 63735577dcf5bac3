"""Load datasets by name, building those that are not in the cache."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from datasets.config import DATASET_INFO_FILENAME
from datasets.exceptions import DatasetGenerationError

from . import (
    cutouts,
    flickr30k_entities,
    grit,
    jsonl,
    line_formats,
    refcoco,
    refer,
    reftr_index,
    shapes,
    visual_genome,
)
from .building import GroundingBuilder, Source, builder_error_of, flags_of
from .named_rows import open_named, refuse_other_rows, refuse_other_texts, source_of, stream_annotations
from .reports import format_build_report, read_build_report
from .schema import FEATURES
from .split_parts import check_split_parts, cut_splits


# all datasets that `load` takes by a name of ours; each module of builders lists its own
MODULES = (
    *(shapes, cutouts, jsonl, refcoco, refer, flickr30k_entities, visual_genome, reftr_index, line_formats),
    grit,
)
SOURCES: dict[str, Source] = {source.name: source for module in MODULES for source in module.SOURCES}


def load(
    name: str,
    split: str | Sequence[str] | None = None,
    data_dir: str | None = None,
    cache_dir: str | None = None,
    streaming: bool = False,
    num_proc: int | None = None,
    decode: bool = True,
    split_parts: Mapping[str, Mapping[str, float]] | None = None,
    **config: Any,
) -> datasets.Dataset | datasets.DatasetDict | datasets.IterableDataset | datasets.IterableDatasetDict:
    """
    Load a dataset, building it if it is not in the cache.

    A change of the annotation files, of the builder or of a flag builds it again. Of a dataset that is not built yet,
    only the `split` that is asked for is, and the files of the others may be missing.

    An image is turned as its EXIF orientation says, unless only its stored size agrees with the size that it was
    annotated at. Where it is not turned, the row has the content of the file without its orientation, since the
    datasets library would turn it; all other rows have paths. So every reader sees the frame that `width`, `height`,
    boxes and masks are in.

    Args:
        name (`str`): the dataset: one of `SOURCES`; a folder that `datasets.load_dataset` opens, such as an export; or
            a dataset of the Hub (user/name), which is downloaded unless it is in the cache. Rows of other columns than
            those of an export are converted, see `named_rows`.
        split (`str` or `list[str]`, *optional*): one of its splits, or several, in a dict; absent: all of them.
        data_dir (`str`, *optional*): the folder of its files, as its authors distribute them.
        cache_dir (`str`, *optional*): the cache of built datasets, by default that of the datasets library.
        streaming (`bool`): yield the rows from the files in turn, writing nothing.
        num_proc (`int`, *optional*): number of processes that build it.
        decode (`bool`): decode the images; else their path or content is given, as by `datasets.Image(decode=False)`.
        split_parts (`dict`, *optional*): splits to cut in parts by image, split -> part -> share, see `split_parts`;
            `split` may then be a part, "train_of_validation".
        config: flags of the dataset's configuration, for example `image_size=64`, or `revision` of one of the Hub.

    Returns:
        `datasets.Dataset`, or `IterableDataset` when streaming: one row per image, see `schema.FEATURES`.

    Raises:
        ValueError: if the dataset or a flag is unknown, `data_dir` is missing, or nothing is left in a split.
        OSError: if files are missing or damaged, naming them, or there is no such folder or dataset of the Hub.

    Example:

    ```python
    >>> import data_scripts

    >>> rows = data_scripts.load("shapes", split="test", num_train=1, num_validation=1, num_test=2)
    >>> rows[0]["sentences"][0]["phrases"][0]["types"]
    ['attribute']

    ```"""
    if split_parts is not None:
        settings = {"data_dir": data_dir, "cache_dir": cache_dir, "num_proc": num_proc, **config}
        return _load_parts(name, split, split_parts, streaming, decode, settings)
    wanted = names_of_splits(split)
    builder = make_builder(name, data_dir, cache_dir, config, wanted, streaming)
    if streaming:
        if not isinstance(builder, GroundingBuilder):
            refuse_other_texts(stream_annotations(name, cache_dir, config, builder), name)
        if split is None or isinstance(split, str):
            return stream(builder, split, decode)
        return datasets.IterableDatasetDict({part: stream(builder, part, decode) for part in split})
    _build(builder, num_proc, wanted)
    try:
        if split is None or isinstance(split, str):
            rows = builder.as_dataset(split=split)
        else:
            rows = datasets.DatasetDict({part: builder.as_dataset(split=part) for part in split})
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        sizes = ", ".join(f"{part}: {info.num_examples}" for part, info in builder.info.splits.items())
        raise ValueError(f"split={split!r} of {name!r} has no rows; its splits have {sizes} rows.") from error
    if not isinstance(builder, GroundingBuilder):
        refuse_other_rows(rows if isinstance(rows, dict) else {split: rows}, name)
    return rows if decode else rows.cast_column("image", datasets.Image(decode=False))


def _load_parts(
    name: str,
    split: str | Sequence[str] | None,
    split_parts: Mapping[str, Mapping[str, float]],
    streaming: bool,
    decode: bool,
    settings: dict,
) -> Any:
    """Return what `load` does with `split_parts`; of the other splits, only those that `split` names are loaded."""
    split_of_part = check_split_parts(split_parts)
    names = [split] if isinstance(split, str) else split
    for item in names or ():
        used = names_of_splits(item)
        if item not in split_of_part and (used is None or {*used} & {*split_of_part, *split_parts}):
            known = ", ".join(split_of_part)
            raise ValueError(f"split={item!r} of {name!r} is cut in parts: name {known}, or a split that is not cut.")
    complete = None if names is None else list(dict.fromkeys(split_of_part.get(item, item) for item in names))
    # a stream that decodes would decode the images of all parts
    rows = dict(load(name, complete, streaming=streaming, decode=decode and not streaming, **settings))
    # the splits that are not loaded are not cut
    rows = cut_splits(rows, {item: split_parts[item] for item in complete or split_parts if item in split_parts}, name)
    if streaming and decode:
        rows = {item: _decoded(part) for item, part in rows.items()}
    if isinstance(split, str):
        return rows[split]
    splits = datasets.IterableDatasetDict if streaming else datasets.DatasetDict
    return splits({item: rows[item] for item in names or rows})


def _decoded(rows: datasets.IterableDataset) -> datasets.IterableDataset:
    """Return a stream with decoded images; a cast of one that does not decode changes its features alone."""
    return rows.map(_decode, features=datasets.Features({**rows.features, "image": datasets.Image()}))


def _decode(row: dict) -> dict:
    """Return a row with its image decoded."""
    return {**row, "image": datasets.Image().decode_example(row["image"])}


def load_with_report(
    name: str,
    data_dir: str | None = None,
    cache_dir: str | None = None,
    num_proc: int | None = None,
    split_parts: Mapping[str, Mapping[str, float]] | None = None,
    **config: Any,
) -> tuple[datasets.DatasetDict, dict | None]:
    """
    Load all splits as `load` does, with the report of what their build left out or changed.

    Args:
        name, data_dir, cache_dir, num_proc, split_parts, config: see `load`.

    Returns:
        `DatasetDict`: split -> rows. `dict` or None: see `reports.read_build_report`; empty for rows that are used as
            they are. It is of complete splits.

    Raises:
        ValueError, OSError: see `load`.

    Example:

    ```python
    >>> from data_scripts.loading import load_with_report

    >>> splits, report = load_with_report("shapes", num_train=1, num_validation=1, num_test=2)
    >>> len(splits["test"]), report
    (2, {})

    ```"""
    check_split_parts(split_parts or {})
    builder = make_builder(name, data_dir, cache_dir, config)
    _build(builder, num_proc)
    rows, report = builder.as_dataset(), {}
    if isinstance(builder, GroundingBuilder):
        report = read_build_report(builder.cache_dir)
    else:
        refuse_other_rows(rows, name)
    return datasets.DatasetDict(cut_splits(rows, split_parts or {}, name)), report


def find_source(name: str) -> Source:
    """
    Return what is known of a dataset by its name, without opening it.

    Args:
        name (`str`): see `load`.

    Raises:
        ValueError: if it is neither one of `SOURCES` nor the form of a path or of a name on the Hub.
        OSError: if it is a path, and there is no such folder.

    Example:

    ```python
    >>> from data_scripts.loading import find_source

    >>> find_source("someone/photos").name
    'someone/photos'

    ```"""
    if name in SOURCES:
        return SOURCES[name]
    if "/" not in name and not os.path.isdir(name):
        raise ValueError(
            f"There is no dataset {name!r}; choose from: {', '.join(SOURCES)}; or give a folder, or a dataset of the "
            "Hub (user/name)."
        )
    return source_of(name)


def names_of_splits(split: str | Sequence[str] | None) -> list[str] | None:
    """
    Return the names of splits in what `load` takes; None for all of them.

    Example:

    ```python
    >>> from data_scripts.loading import names_of_splits

    >>> names_of_splits("train[:10%]+val"), names_of_splits(["test"]), names_of_splits(None)
    (['train', 'val'], ['test'], None)

    ```"""
    if split is None or str(split) == "all":
        return None
    parts = [split] if isinstance(split, str) else split
    return [name.split("[")[0].strip() for part in parts for name in str(part).split("+")]


def make_builder(
    name: str,
    data_dir: str | None,
    cache_dir: str | None,
    config: dict,
    wanted: list[str] | None = None,
    streaming: bool = False,
) -> datasets.DatasetBuilder:
    """
    Return the builder of a dataset by its name; raise a ValueError for unknown names and flags. Where the dataset is
    not built yet, it is a builder of the wanted splits alone.
    """
    source = find_source(name)
    flags = flags_of(source)
    unknown = sorted(set(config) - set(flags))
    if unknown:
        raise ValueError(f"{name!r} has no flag {', '.join(unknown)}; it has: {', '.join(flags)}.")

    def make(requested: list[str] | None = None) -> datasets.DatasetBuilder:
        if name not in SOURCES:
            return open_named(name, data_dir, cache_dir, config, requested, streaming)
        folder = {} if data_dir is None else {"data_dir": str(data_dir)}
        alone = {} if requested is None else {"requested": requested}
        return source.builder(config_name=source.config_name, cache_dir=cache_dir, **config, **folder, **alone)

    builder = make()
    is_partial = wanted is not None and getattr(builder, "BUILDS_SPLITS_ALONE", False)
    if is_partial and (streaming or not os.path.isfile(os.path.join(builder.cache_dir, DATASET_INFO_FILENAME))):
        return make(wanted)
    return builder


def _build(builder: datasets.DatasetBuilder, num_proc: int | None, wanted: list[str] | None = None) -> None:
    """Build a dataset that is not in the cache; raise the builder's own error, and one for an empty split."""
    try:
        builder.download_and_prepare(num_proc=num_proc)
    except DatasetGenerationError as error:
        raise builder_error_of(error) from error
    if isinstance(builder, GroundingBuilder):
        # the library loads no split without rows
        splits = {name: info for name, info in builder.info.splits.items() if wanted is None or name in wanted}
        empty = [name for name, info in splits.items() if not info.num_examples]
        _refuse_empty(builder, empty, read_build_report(builder.cache_dir))


def _refuse_empty(builder: GroundingBuilder, empty: list[str], report: dict | None) -> None:
    """Raise a ValueError if there are splits without rows, with the files that they are read from."""
    if empty:
        files = dict.fromkeys(str(file) for name in empty for file in builder.files_of(name))
        read_from = ", ".join(map(repr, files)) or "no file"
        raise ValueError(
            f"Nothing is left in {', '.join(empty)} of {builder.title!r}, read from {read_from}. "
            f"{format_build_report(report)}"
        )


def stream(
    builder: datasets.DatasetBuilder, split: str | None, decode: bool
) -> datasets.IterableDataset | datasets.IterableDatasetDict:
    """Return the streams of a builder; raise a ValueError for a split without rows."""
    rows = builder.as_streaming_dataset(split=split)
    parts = rows if split is None else {split: rows}
    if isinstance(builder, GroundingBuilder):
        undecoded = {name: part.cast_column("image", datasets.Image(decode=False)) for name, part in parts.items()}
        empty = [name for name, part in undecoded.items() if next(iter(part), None) is None]
        _refuse_empty(builder, empty, builder.make_report())
        parts = {name: _stream_as_stored(part, decode) for name, part in parts.items()}
    elif not decode:
        parts = {name: part.cast_column("image", datasets.Image(decode=False)) for name, part in parts.items()}
    return datasets.IterableDatasetDict(parts) if split is None else parts[split]


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
