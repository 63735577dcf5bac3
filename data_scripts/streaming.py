"""
Read the rows of a split shard by shard, so that several processes can share the work. A shard is a file of an export,
or what a builder reads at once.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import datasets

from .building import GroundingBuilder
from .loading import make_builder, stream
from .named_rows import checked_texts, stream_annotations
from .reading import coco_id
from .split_parts import check_split_parts, cut_splits


# rows that are converted to Python at once
BATCH_ROWS = 64


@dataclass
class SplitStream:
    """
    The rows of a split, which are read when they are asked for.

    Args:
        rows (`datasets.IterableDataset`): see `schema.FEATURES`; images are not decoded.
        annotations (`datasets.IterableDataset`): the same shards without images, which are not read where the format
            stores columns apart.
        title (`str`, *optional*): dataset and split for messages about texts, which are then checked as they are
            read; absent: a builder has checked them.
        held_out (`frozenset`, *optional*): images that are left out, see `image_key`.
    """

    rows: datasets.IterableDataset
    annotations: datasets.IterableDataset
    title: str | None = None
    held_out: frozenset = frozenset()

    @classmethod
    def of(cls, rows: datasets.IterableDataset) -> "SplitStream":
        """Return the stream of rows that are checked already."""
        rows = rows.cast_column("image", datasets.Image(decode=False))
        return cls(rows, rows.remove_columns("image"))

    @property
    def num_shards(self) -> int:
        """Return the number of shards."""
        return self.rows.num_shards

    def read(self, shard: int) -> Iterator[dict]:
        """Yield the rows of a shard."""
        return self._read(self.rows, shard)

    def read_annotations(self, shard: int) -> Iterator[dict]:
        """Yield the rows of a shard without their images."""
        return self._read(self.annotations, shard)

    def _read(self, rows: datasets.IterableDataset, shard: int) -> Iterator[dict]:
        examples = iterate(rows.shard(self.num_shards, shard))
        if self.title is not None:
            examples = checked_texts(examples, self.title)
        if self.held_out:
            return (row for row in examples if image_key(row) not in self.held_out)
        return examples


def image_key(row: dict) -> int | str:
    """Return what identifies a row's image across datasets: its COCO id, or its image_id."""
    known = coco_id(row["image_id"])
    return row["image_id"] if known is None else known


def iterate(rows: datasets.IterableDataset) -> Iterator[dict]:
    """Yield all rows, also in a loader process of torch, where `iter(rows)` would yield a part of them."""
    for batch in rows.iter(BATCH_ROWS):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def open_streams(
    name: str,
    data_dir: str | None = None,
    cache_dir: str | None = None,
    split_parts: Mapping[str, Mapping[str, float]] | None = None,
    **config: Any,
) -> dict[str, SplitStream]:
    """
    Open the splits of a dataset as streams; of its rows, only the first of each split is read.

    Args:
        name, data_dir, cache_dir, split_parts, config: see `loading.load`.

    Returns:
        `dict[str, SplitStream]`: split -> its stream.

    Raises:
        ValueError, OSError: see `loading.load`; for what is wrong with a later row, when it is read.

    Example:

    ```python
    >>> from data_scripts.streaming import open_streams

    >>> stream = open_streams("shapes", num_train=3, num_validation=1, num_test=1)["train"]
    >>> sum(1 for shard in range(stream.num_shards) for _ in stream.read_annotations(shard))
    3

    ```"""
    check_split_parts(split_parts or {})
    builder = make_builder(name, data_dir, cache_dir, config, streaming=True)
    splits = cut_splits(stream(builder, None, decode=False), split_parts or {}, name)
    if isinstance(builder, GroundingBuilder):
        return {split: SplitStream.of(rows) for split, rows in splits.items()}
    annotations = cut_splits(stream_annotations(name, cache_dir, config, builder), split_parts or {}, name)
    return {split: SplitStream(rows, annotations[split], f"{name!r} {split}") for split, rows in splits.items()}
