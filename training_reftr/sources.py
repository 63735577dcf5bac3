"""
Load the rows of a run: a dataset of `data_scripts`, or several joined; built, or streamed.
Nothing here is a collective, but a dataset that is not in the cache is built: let the main process go first.
"""

import itertools
import logging
from dataclasses import replace
from pathlib import Path

import datasets

import data_scripts
from data_scripts.combining import HELD_OUT
from data_scripts.streaming import SplitStream, image_key, open_streams
from training_reftr.settings import DataSettings, check_names
from training_reftr.streams import StreamedRows


logger = logging.getLogger(__name__)


def load_rows(data: DataSettings, eval_only: bool = False) -> dict[str, datasets.Dataset | StreamedRows]:
    """
    Load every split of the datasets that `dataset` names, as split -> rows (`data_scripts.FEATURES`).

    - A name that `data_scripts.load` takes, with `dataset_config` as its flags: one of `data_scripts.SOURCES`, a
      folder, or a dataset of the Hub.
    - Several, "a,b", with `dataset_config` as {name: flags}: the splits of `train_split` are joined without
      the images that any of the datasets holds out (`data_scripts.combining`); all other splits are named "a/val".

    With `streaming` the splits of `train_split` are streams, several datasets mixed by `stream_weights`, and those
    that are evaluated are read into memory, images by their path or content; nothing is built. With `eval_only`, files
    of other splits than `test_splits` may be missing: those splits are then not loaded.

    Raises:
        ValueError: if there is no such dataset, flag or split, or a split is to be streamed and evaluated.
        OSError: if files are missing or damaged, naming them.
    """
    if data.streaming:
        rows = stream_rows(data, eval_only)
    elif names_several(data.dataset):
        rows = join_datasets(data)
    elif eval_only:
        rows = load_evaluated(data)
    else:
        rows = dict(data_scripts.load(data.dataset, **{**folders_of(data), **data.dataset_config}))
    if not eval_only:
        split_of(rows, data.train_split)
    return rows


def load_evaluated(data: DataSettings) -> dict[str, datasets.Dataset]:
    """Load all splits, or only those of `test_splits` where files of the others are missing."""
    flags = {**folders_of(data), **data.dataset_config}
    try:
        return dict(data_scripts.load(data.dataset, **flags))
    except OSError as error:
        splits = [name.strip() for name in data.test_splits.split(",") if name.strip()]
        if not splits:
            raise
        rows = dict(data_scripts.load(data.dataset, split=splits, **flags))
        logger.warning(f"Only {', '.join(splits)} are loaded: {str(error).splitlines()[0]}")
        return rows


def names_several(dataset: str) -> bool:
    """Return whether several datasets are named; a folder's name may have a comma too."""
    return "," in dataset and not Path(dataset).is_dir()


def split_of(rows: dict, name: str) -> datasets.Dataset | StreamedRows:
    """
    Return the rows of a split, or of several joined: "train+val".

    Raises:
        ValueError: if there is no such split, naming the existing ones.
    """
    names = name.split("+")
    for part in names:
        if part not in rows:
            raise ValueError(f"There is no split {part!r}; there are: {', '.join(rows)}.")
    if len(names) == 1:
        return rows[name]
    parts = [rows[part] for part in names]
    if isinstance(parts[0], StreamedRows):
        streams = zip(*(part.streams for part in parts), strict=True)
        return StreamedRows([list(itertools.chain(*splits)) for splits in streams], parts[0].weights)
    return datasets.concatenate_datasets(parts)


def folders_of(data: DataSettings) -> dict:
    """Return the folders in which `data_scripts.load` finds and caches files, unless a dataset's flags set them."""
    return {"data_dir": data.data_dir, "cache_dir": data.data_cache_dir}


def join_datasets(data: DataSettings) -> dict[str, datasets.Dataset]:
    """Join the training splits of several datasets, and keep the other splits of each."""
    names = data.dataset.split(",")
    check_names(data.dataset_config, names, "dataset_config")
    flags_of = {name: {**folders_of(data), **data.dataset_config.get(name, {})} for name in names}
    splits = {name: data_scripts.load(name, **flags) for name, flags in flags_of.items()}
    training = data.train_split.split("+")
    rows = {
        split: data_scripts.combine(list(flags_of.items()), split=split, trained=tuple(training)) for split in training
    }
    others = {
        f"{name}/{split}": part[split] for name, part in splits.items() for split in part if split not in training
    }
    return rows | others


def stream_rows(data: DataSettings, eval_only: bool) -> dict[str, datasets.Dataset | StreamedRows]:
    """Return the splits that are evaluated in memory, and all others as streams."""
    names = data.dataset.split(",") if names_several(data.dataset) else [data.dataset]
    flags = {names[0]: data.dataset_config} if len(names) == 1 else data.dataset_config
    check_names(flags, names, "dataset_config")
    check_names(data.stream_weights, names, "stream_weights")
    opened = {name: open_streams(name, **{**folders_of(data), **flags.get(name, {})}) for name in names}
    training = [] if eval_only else data.train_split.split("+")
    evaluated = {
        part.strip() for name in (data.validation_split, *data.test_splits.split(",")) for part in name.split("+")
    }
    own_names = {name.rpartition("/")[2] if len(names) > 1 else name for name in evaluated}
    both = sorted(own_names & set(training))
    if both:
        raise ValueError(
            f"The split {both[0]!r} is streamed for training and evaluated too: choose another validation_split or "
            "test_splits, or leave streaming out."
        )
    rows = {}
    for split in training:
        for name in names:
            if split not in opened[name]:
                raise ValueError(f"There is no split {split!r} in {name!r}; there are: {', '.join(opened[name])}.")
        rows[split] = mix({name: opened[name][split] for name in names}, data.stream_weights)
    others = {
        split if len(names) == 1 else f"{name}/{split}": part
        for name, splits in opened.items()
        for split, part in splits.items()
        if split not in training
    }
    if len(names) > 1:
        leave_out(rows, [part for name, part in others.items() if name.rpartition("/")[2].startswith(HELD_OUT)])
    for name, part in others.items():
        rows[name] = in_memory(part) if name in evaluated else StreamedRows([[part]], [1.0])
    return rows


def mix(splits: dict[str, SplitStream], weights: dict[str, float]) -> StreamedRows:
    """Return rows of a split of several datasets by their weights; without weights, all rows as one stream."""
    if not weights:
        return StreamedRows([list(splits.values())], [1.0])
    for name in splits:
        if name not in weights:
            raise ValueError(f"stream_weights has no weight of {name!r}: give one for each dataset, or none.")
    total = sum(weights.values())
    return StreamedRows([[part] for part in splits.values()], [weights[name] / total for name in splits])


def leave_out(rows: dict[str, StreamedRows], held_out: list[SplitStream]) -> None:
    """Leave the images of held-out splits out of the rows to train on, split -> rows."""
    keys = frozenset(
        image_key(row) for part in held_out for shard in range(part.num_shards) for row in part.read_annotations(shard)
    )
    for part in rows.values():
        part.streams = [[replace(split, held_out=keys) for split in stream] for stream in part.streams]


def in_memory(stream: SplitStream) -> datasets.Dataset:
    """Read all rows of a stream into memory, images by their path or encoded content."""
    features = stream.rows.features
    examples = [row for shard in range(stream.num_shards) for row in stream.read(shard)]
    # an empty list would have no columns
    columns = {name: [example[name] for example in examples] for name in features}
    return datasets.Dataset.from_dict(columns, features=features).cast_column("image", datasets.Image())
