"""
Load the rows of a run: datasets of `data_scripts`, several joined, or a folder of Parquet files; built, or streamed.
Nothing here is a collective, but a dataset that is not in the cache is built: let the main process go first.
"""

import logging
from pathlib import Path

import datasets

import data_scripts
from data_scripts.checking import judge_rows
from data_scripts.quoting import explain, quote
from data_scripts.reading import check_text, has_words
from data_scripts.schema import OPTIONAL
from training_reftr.settings import DataSettings, check_names


logger = logging.getLogger(__name__)
TEXT_COLUMNS = {"image_id", "sentences"}


def load_rows(data: DataSettings, eval_only: bool = False) -> dict[str, datasets.Dataset | datasets.IterableDataset]:
    """
    Load every split of the datasets that `dataset` names, as split -> rows (`data_scripts.FEATURES`).

    - A name of `data_scripts.SOURCES`, with `dataset_config` as its flags.
    - Several, "a,b", with `dataset_config` as {name: flags}: the splits of `train_split` are joined without
      the images that any of the datasets holds out (`data_scripts.combining`); all other splits are named "a/val".
    - A folder of Parquet files as `reftr data export` writes them.

    With `streaming` the splits of `train_split` are streams of rows whose images are not decoded, and the
    others are read into memory, images by their path or content; nothing is built.

    Raises:
        ValueError: if there is no such dataset, flag or split, several datasets are to be streamed, or a split is to
            be streamed and evaluated.
        OSError: if files are missing or damaged, naming them.
    """
    if data.streaming:
        rows = stream_rows(data, eval_only)
    elif is_folder(data.dataset):
        rows = load_folder(data)
        refuse_other_texts(rows, data.dataset)
        refuse_other_boxes(rows, data.dataset)
    elif "," in data.dataset:
        rows = join_datasets(data)
    else:
        rows = dict(data_scripts.load(data.dataset, **{**folders_of(data), **data.dataset_config}))
    for name, part in rows.items():
        missing = sorted(set(data_scripts.FEATURES) - {*OPTIONAL, *(part.column_names or data_scripts.FEATURES)})
        if missing:
            raise ValueError(
                f"{data.dataset!r} {name} has no columns {', '.join(missing)}: export a dataset by "
                "`reftr data export`, or describe your own in JSON Lines."
            )
    if not eval_only:
        split_of(rows, data.train_split)
    return rows


def load_folder(data: DataSettings) -> dict[str, datasets.Dataset]:
    """
    Load the splits of a folder of Parquet files.

    Raises:
        ValueError: if a split has no rows, which the library does not load, naming its files.
    """
    builder = datasets.load_dataset_builder(data.dataset, cache_dir=data.data_cache_dir)
    builder.download_and_prepare()
    refuse_empty(builder, data.dataset, [name for name, info in builder.info.splits.items() if not info.num_examples])
    return dict(builder.as_dataset())


def stream_folder(data: DataSettings) -> dict[str, datasets.IterableDataset]:
    """
    Stream the splits of a folder of Parquet files, images not decoded. All texts are read once, without the images.

    Raises:
        ValueError: if a split has no rows, naming its files, or a text is refused.
    """
    builder = datasets.load_dataset_builder(data.dataset, cache_dir=data.data_cache_dir)
    rows = builder.as_streaming_dataset()
    rows = {name: part.cast_column("image", datasets.Image(decode=False)) for name, part in rows.items()}
    refuse_empty(builder, data.dataset, [name for name, part in rows.items() if next(iter(part), None) is None])
    # the reader of Parquet leaves out the images, which would be read once more
    columns = {"columns": list(TEXT_COLUMNS)} if hasattr(builder.config, "columns") else {}
    has_texts = all(set(part.column_names or ()) >= TEXT_COLUMNS for part in rows.values())
    if has_texts:
        refuse_other_texts(datasets.load_dataset(data.dataset, streaming=True, **columns), data.dataset)
    return rows


def refuse_empty(builder: datasets.DatasetBuilder, dataset: str, empty: list[str]) -> None:
    """Raise a ValueError if a split of a folder has no rows, naming its files."""
    for name in empty:
        files = ", ".join(repr(str(file)) for file in builder.config.data_files[name])
        raise ValueError(f"The split {name!r} of {dataset!r} has no rows: {files} is empty. Fill or remove it.")


def refuse_other_texts(rows: dict, dataset: str) -> None:
    """Raise a ValueError if a text of somebody's files is blank or refused by `check_text`, naming its image."""
    for name, part in rows.items():
        if not set(part.column_names or ()) >= TEXT_COLUMNS:
            continue  # the caller raises for missing columns
        image_id = None
        try:
            for row in part.select_columns(list(TEXT_COLUMNS)):
                image_id = row["image_id"]
                for sentence in row["sentences"]:
                    if not has_words(check_text(sentence["text"], "a text")):
                        raise ValueError("a text is blank")
        except ValueError as error:  # one of Arrow's where bytes are not UTF-8
            raise ValueError(f"{dataset!r} {name}, image {quote(image_id)} or after it: {explain(error)}.") from error


def refuse_other_boxes(rows: dict, dataset: str) -> None:
    """Raise a ValueError if the boxes of somebody's files are not xyxy in pixels; warn if that is unlikely."""
    if not all(set(data_scripts.FEATURES) <= set(part.column_names) for part in rows.values()):
        return  # the caller raises for missing columns
    for judgement in judge_rows(rows):
        if judgement.is_certain:
            raise ValueError(f"{dataset!r}: {judgement.message}.")
        logger.warning(f"{dataset!r}: {judgement.message}.")


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


def is_folder(dataset: str) -> bool:
    """
    Return whether `dataset` is a folder of Parquet files, not the name of a dataset.

    Raises:
        OSError: if it is a path with no Parquet file in it.
    """
    if all(name in data_scripts.SOURCES for name in dataset.split(",")) or not (
        "/" in dataset or Path(dataset).is_dir()
    ):
        return False
    if next(Path(dataset).rglob("*.parquet"), None) is None:
        raise OSError(
            f"There is no folder {dataset!r} of Parquet files: give one that `reftr data export` wrote, "
            f"or one of the datasets {', '.join(data_scripts.SOURCES)}."
        )
    return True


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
    if is_folder(data.dataset):
        rows = stream_folder(data)
    elif "," in data.dataset:
        raise ValueError(
            f"streaming takes one dataset, and dataset={data.dataset!r} names several: joining them requires all "
            "rows, to find the images that one of them holds out. Leave streaming out."
        )
    else:
        rows = dict(
            data_scripts.load(
                data.dataset, streaming=True, decode=False, **{**folders_of(data), **data.dataset_config}
            )
        )
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
