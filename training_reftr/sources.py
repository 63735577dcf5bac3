"""
Load the rows of a run: a dataset of `data_scripts`, or several joined; built, or streamed.
Nothing here is a collective, but a dataset that is not in the cache is built: let the main process go first.
"""

import logging
from pathlib import Path

import datasets

import data_scripts
from training_reftr.settings import DataSettings, check_names


logger = logging.getLogger(__name__)


def load_rows(data: DataSettings, eval_only: bool = False) -> dict[str, datasets.Dataset | datasets.IterableDataset]:
    """
    Load every split of the datasets that `dataset` names, as split -> rows (`data_scripts.FEATURES`).

    - A name that `data_scripts.load` takes, with `dataset_config` as its flags: one of `data_scripts.SOURCES`, a
      folder, or a dataset of the Hub.
    - Several, "a,b", with `dataset_config` as {name: flags}: the splits of `train_split` are joined without
      the images that any of the datasets holds out (`data_scripts.combining`); all other splits are named "a/val".

    With `streaming` the splits of `train_split` are streams of rows whose images are not decoded, and the
    others are read into memory, images by their path or content; nothing is built. With `eval_only`, files of other
    splits than `test_splits` may be missing: those splits are then not loaded.

    Raises:
        ValueError: if there is no such dataset, flag or split, several datasets are to be streamed, or a split is to
            be streamed and evaluated.
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


def split_of(rows: dict, name: str) -> datasets.Dataset | datasets.IterableDataset:
    """
    Return the rows of a split, or of several joined: "train+val".

    Raises:
        ValueError: if there is no such split, naming the existing ones.
    """
    names = name.split("+")
    for part in names:
        if part not in rows:
            raise ValueError(f"There is no split {part!r}; there are: {', '.join(rows)}.")
    return rows[name] if len(names) == 1 else datasets.concatenate_datasets([rows[part] for part in names])


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


def stream_rows(data: DataSettings, eval_only: bool) -> dict[str, datasets.Dataset | datasets.IterableDataset]:
    """Return the training splits as streams and the other splits in memory."""
    if names_several(data.dataset):
        raise ValueError(
            f"streaming takes one dataset, and dataset={data.dataset!r} names several: joining them requires all "
            "rows, to find the images that one of them holds out. Leave streaming out."
        )
    flags = {**folders_of(data), **data.dataset_config}
    rows = dict(data_scripts.load(data.dataset, streaming=True, decode=False, **flags))
    training = set() if eval_only else set(data.train_split.split("+"))
    evaluated = {data.validation_split, *data.test_splits.split(",")}
    both = sorted(training & {part for name in evaluated for part in name.split("+")})
    if both:
        raise ValueError(
            f"The split {both[0]!r} is streamed for training and evaluated too: choose another validation_split or "
            "test_splits, or leave streaming out."
        )
    return {name: part if name in training else in_memory(part) for name, part in rows.items()}


def in_memory(rows: datasets.IterableDataset) -> datasets.Dataset:
    """Read all rows of a stream into memory, images by their path or encoded content."""
    examples = list(rows)  # an empty list would have no columns
    columns = {name: [example[name] for example in examples] for name in rows.features}
    rows = datasets.Dataset.from_dict(columns, features=rows.features)
    return rows.cast_column("image", datasets.Image())
