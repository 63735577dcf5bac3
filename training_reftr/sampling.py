"""
The order of an epoch: which sentences of an image form a sample, in which order, in which batch, on which process.

A sample is an image with some of its sentences. The order of the samples depends only on the seed, the epoch and the
rows. Global batches are cut from it one after the other, so that neither the number of processes nor that of
accumulation steps changes what an optimizer step sees, and a run that resumes with other numbers starts where the
former one ended. Nothing here is a collective: each process computes the complete order and takes its shard.
"""

import itertools
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_scripts.building import is_degenerate
from modeling_reftr import RefTRImageProcessor
from modeling_reftr.image_processing_reftr import resized_size
from training_reftr.fingerprint import Fingerprint, fingerprint_of


# Number of consecutive samples of similar shape. A global batch that divides this size comes from one bucket.
BUCKET_SIZE = 128
# Number of samples sorted by shape together, small enough that each epoch has other neighbors.
WINDOW = 32 * BUCKET_SIZE
SHAPE_STEPS = 20  # the shorter side is rounded to a twentieth of the longer one


class SampleIndex(NamedTuple):
    """Identify a sample by its row and the indices of its sentences; a streamed sample has its row with it."""

    epoch: int
    index: int
    sentences: tuple[int, ...]
    row: dict | None = None


def generator(*seeds: int) -> np.random.Generator:
    """Return a random number generator seeded with several integers."""
    return np.random.Generator(np.random.PCG64(seeds))


def shape_class(width: int | np.ndarray, height: int | np.ndarray) -> int | np.ndarray:
    """
    Return the class of an aspect ratio, from tall (negative) over square (0) to wide; images of one class are resized
    to similar sizes.

    Example:

    ```python
    >>> from training_reftr.sampling import shape_class

    >>> shape_class(640, 480), shape_class(1280, 964), shape_class(480, 640)
    (5, 5, -5)

    ```"""
    longer = np.maximum(width, height)
    steps = np.rint(SHAPE_STEPS * np.divide(width, longer)) - np.rint(SHAPE_STEPS * np.divide(height, longer))
    return steps.astype(int) if isinstance(steps, np.ndarray) else int(steps)


def shuffle(shapes: np.ndarray, lengths: np.ndarray, rng: np.random.Generator, by_shape: bool) -> np.ndarray:
    """
    Return a shuffled order of samples. With `by_shape`, sort each `WINDOW` by image shape and then by text length, cut
    it into buckets of `BUCKET_SIZE` samples, and shuffle the buckets. Samples that do not fill a bucket come last and
    unsorted, so that the samples an epoch drops are not all of one shape.

    Args:
        shapes, lengths (arrays of shape `(samples,)`): `shape_class` of the image, characters of the longest text.
    """
    order = np.argsort(rng.random(len(shapes)), kind="stable")
    if not by_shape:
        return order
    num_buckets = len(order) // BUCKET_SIZE
    sorted_windows = []
    for start in range(0, num_buckets * BUCKET_SIZE, WINDOW):
        window = order[start : min(start + WINDOW, num_buckets * BUCKET_SIZE)]
        sorted_windows.append(window[np.lexsort((lengths[window], shapes[window]))])
    if not sorted_windows:
        return order
    buckets = np.concatenate(sorted_windows).reshape(num_buckets, BUCKET_SIZE)
    buckets = buckets[np.argsort(rng.random(num_buckets), kind="stable")]
    return np.concatenate((buckets.ravel(), order[num_buckets * BUCKET_SIZE :]))


def shard_batch(sizes: list[int], rank: int, world_size: int) -> list[int]:
    """
    Return the indices of a global batch's samples that this process takes. Samples are distributed from the largest
    to the smallest, in alternating direction, so that all processes have the same number of samples and about the same
    number of sentences.

    Args:
        sizes (`list[int]`): sentences of each sample; the length is a multiple of `world_size`.

    Example:

    ```python
    >>> from training_reftr.sampling import shard_batch

    >>> [shard_batch([1, 8, 2, 7, 3, 6], rank, 2) for rank in (0, 1)]
    [[1, 2, 4], [0, 3, 5]]

    ```"""
    rounds = np.argsort(-np.asarray(sizes), kind="stable").reshape(-1, world_size)
    rounds[1::2] = rounds[1::2, ::-1].copy()
    return sorted(rounds[:, rank].tolist())


def is_learnable(phrase: dict, objects: list[dict], learns_absence: bool = False) -> bool:
    """
    Return whether a phrase can be trained on: the box of one of its objects has an extent, or it refers to nothing and
    the model learns absence. Evaluation counts phrases of objects without extent as misses.

    Example:

    ```python
    >>> from training_reftr.sampling import is_learnable

    >>> objects = [{"box": [3.0, 4.0, 3.0, 9.0]}, {"box": [3.0, 4.0, 8.0, 9.0]}]
    >>> [is_learnable({"objects": indices}, objects) for indices in ([0], [1], [0, 1], [])]
    [False, True, True, False]

    ```"""
    if not phrase["objects"]:
        return learns_absence
    return any(not is_degenerate(objects[index]["box"]) for index in phrase["objects"])


def learnable_indices(row: dict, learns_absence: bool = False) -> list[int]:
    """Return the indices of a row's sentences that can be trained on, see `is_learnable`."""
    return [
        index
        for index, sentence in enumerate(row["sentences"])
        if not sentence["phrases"]
        or any(is_learnable(phrase, row["objects"], learns_absence) for phrase in sentence["phrases"])
    ]


def learnable_sentences(table: pa.Table, learns_absence: bool = False) -> list[np.ndarray]:
    """Return `learnable_indices` of each row of a table with the columns objects and sentences."""
    counts = pc.list_value_length(table["sentences"]).to_numpy()
    indices = [np.arange(count) for count in counts]
    # converting a row to Python objects takes long, but few have something that cannot be learned
    is_open = np.zeros(len(indices), dtype=bool)
    if "objects" in table.column_names:
        boxes = column_of(table, "objects").flatten().field("box").flatten()
        boxes = boxes.to_numpy(zero_copy_only=False).reshape(-1, 4)
        is_miss = (boxes[:, 0] == boxes[:, 2]) | (boxes[:, 1] == boxes[:, 3])
        row_of_object = np.repeat(
            np.arange(len(indices)), pc.list_value_length(column_of(table, "objects")).to_numpy()
        )
        is_open[row_of_object[is_miss]] = True
        if not learns_absence:
            phrases = column_of(table, "sentences").flatten().field("phrases")
            row_of_sentence = np.repeat(np.arange(len(indices)), counts)
            num_phrases = pc.list_value_length(phrases).fill_null(0).to_numpy(zero_copy_only=False).astype(int)
            is_absent = pc.list_value_length(phrases.flatten().field("objects")).to_numpy(zero_copy_only=False) == 0
            is_open[np.repeat(row_of_sentence, num_phrases)[is_absent]] = True
    for index in np.flatnonzero(is_open).tolist():
        row = {name: table[name][index].as_py() for name in ("objects", "sentences")}
        indices[index] = np.array(learnable_indices(row, learns_absence), dtype=int)
    return indices


def column_of(table: pa.Table, name: str) -> pa.Array:
    """Return a column of a table in one piece."""
    column = table[name].combine_chunks()
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


class BuiltOrder:
    """
    Order the samples of a dataset in memory.

    An image with n sentences gives ceil(n / limit) samples per epoch, with its sentences distributed evenly and at
    random among them: with a limit of 8, 9 sentences become 5 and 4.

    Args:
        rows (`datasets.Dataset`): see `data_scripts.FEATURES`; images are not read.
        limit (`int`): maximum number of sentences per sample.
        seed (`int`): seed of the order.
        by_shape (`bool`): whether to group images of similar shape and texts of similar length, see `shuffle`.
        learns_absence (`bool`, *optional*, defaults to `False`): whether phrases that refer to nothing are trained on.
    """

    def __init__(
        self, rows: datasets.Dataset, limit: int, seed: int, by_shape: bool, learns_absence: bool = False
    ) -> None:
        self.rows = rows
        self.limit = limit
        self.seed = seed
        self.by_shape = by_shape
        none = np.zeros(0, int)
        counts, indices, lengths, shapes = [none], [none], [none], [none]
        names = [name for name in ("width", "height", "objects", "sentences") if name in rows.column_names]
        columns = rows.select_columns(names).with_format("arrow")
        for table in columns.iter(10_000):
            sentences = table["sentences"].combine_chunks()
            taken = learnable_sentences(table, learns_absence)
            counts.append(np.array([len(row) for row in taken], dtype=int))
            indices.append(np.concatenate([none, *taken]))
            sizes = pc.list_value_length(sentences).to_numpy(zero_copy_only=False)
            firsts = np.repeat(np.cumsum(sizes) - sizes, counts[-1])
            text_lengths = pc.utf8_length(sentences.flatten().field("text")).to_numpy(zero_copy_only=False)
            lengths.append(text_lengths[firsts + indices[-1]])
            shapes.append(shape_class(table["width"].to_numpy(), table["height"].to_numpy()))
        self.counts = np.concatenate(counts)
        self.indices = np.concatenate(indices)  # of each sentence that is trained on, in its row
        self.lengths = np.concatenate(lengths)
        self.shapes = np.concatenate(shapes)

    @property
    def num_samples(self) -> int:
        """Return the number of samples per epoch."""
        return int((-(-self.counts // self.limit)).sum())

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Return the number and the hash of the rows."""
        return fingerprint_of(self.rows)

    def samples(self, epoch: int, start: int = 0) -> Iterator[SampleIndex]:
        """Yield the samples of an epoch in order, from index `start` on."""
        rng = generator(self.seed, epoch)
        row_of_sentence = np.repeat(np.arange(len(self.counts)), self.counts)
        # Shuffle the sentences within each row.
        shuffled = np.lexsort((rng.random(len(row_of_sentence)), row_of_sentence))
        indices = self.indices[shuffled]

        samples_of_row = -(-self.counts // self.limit)
        rows = np.repeat(np.arange(len(self.counts)), samples_of_row)
        number = np.arange(len(rows)) - np.repeat(np.cumsum(samples_of_row) - samples_of_row, samples_of_row)
        size, remainder = np.divmod(self.counts, np.maximum(samples_of_row, 1))
        sizes = size[rows] + (number < remainder[rows])
        ends = np.cumsum(sizes)
        begins = ends - sizes
        longest = np.maximum.reduceat(self.lengths[shuffled], begins) if len(rows) else begins
        for sample in shuffle(self.shapes[rows], longest, rng, self.by_shape)[start:]:
            yield SampleIndex(epoch, int(rows[sample]), tuple(indices[begins[sample] : ends[sample]].tolist()))


def refuse_few(num_samples: int, batch_size: int, world_size: int) -> None:
    """Raise a ValueError if the samples do not fill one global batch."""
    if num_samples == 0:
        raise ValueError("No row of the training split has a sentence: there is nothing to learn from.")
    if num_samples < batch_size * world_size:
        raise ValueError(
            f"{num_samples} training samples do not fill one global batch of {batch_size * world_size} "
            f"({world_size} processes with batch_size={batch_size}); lower batch_size."
        )


class EpochSampler:
    """
    Yield the batches of this process in an epoch, each a list of samples. The incomplete last global batch is dropped;
    reshuffling makes it a different one every epoch.

    Args:
        order ([`BuiltOrder`]): order of the samples.
        batch_size (`int`): samples per process and batch.
        rank, world_size (`int`): rank of this process and number of processes.

    Raises:
        ValueError: if the samples do not fill one global batch.
    """

    def __init__(self, order: BuiltOrder, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.order = order
        self.global_batch_size = batch_size * world_size
        self.rank = rank
        self.world_size = world_size
        refuse_few(order.num_samples, batch_size, world_size)
        self.begin(0)

    def num_batches(self, progress: Iterable[tuple[int, int]] = (), epoch: int = 0) -> int:
        """
        Return the number of batches left in an epoch after `progress`, (global batch size, batches) each. It is the
        same in every `epoch`.
        """
        return max(0, self.order.num_samples - num_seen(progress)) // self.global_batch_size

    def begin(self, epoch: int, progress: Iterable[tuple[int, int]] = ()) -> None:
        """Set the epoch of the next iteration and the progress to skip."""
        self.epoch = epoch
        self.progress = list(progress)

    def __len__(self) -> int:
        return self.num_batches(self.progress)

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        return self.cut(len(self), self.order.samples(self.epoch, num_seen(self.progress)))

    def cut(self, num_batches: int, samples: Iterator[SampleIndex]) -> Iterator[list[SampleIndex]]:
        """Yield the shard of this process of each global batch."""
        for _ in range(num_batches):
            batch = list(itertools.islice(samples, self.global_batch_size))
            mine = shard_batch([len(sample.sentences) for sample in batch], self.rank, self.world_size)
            yield [batch[index] for index in mine]


def num_seen(progress: Iterable[tuple[int, int]]) -> int:
    """Return the number of samples in batches of several sizes, as left by runs that were resumed."""
    return sum(global_batch_size * num_batches for global_batch_size, num_batches in progress)


def evaluation_batches(
    rows: datasets.Dataset,
    batching: str,
    batch_size: int,
    image_processor: RefTRImageProcessor,
    rank: int,
    world_size: int,
) -> list[list[SampleIndex]]:
    """
    Return the evaluation batches of a process. All processes have the same number of batches: where they cannot be
    distributed evenly, some batches from the start are evaluated on two processes.

    Args:
        rows (`datasets.Dataset`): see `data_scripts.FEATURES`; images are not read.
        batching (`str`):
            "grouped": `batch_size` images with all their sentences, in the order of the rows. "unpadded": the same
            with images that are resized to one size, so that no image is padded. "published": `batch_size` consecutive
            sentences of the annotations, with images padded to the largest; the batches are the same on any number of
            processes.
        batch_size (`int`): number of images per batch, or of sentences with "published".
        image_processor ([`RefTRImageProcessor`]): image processor that resizes the images.
        rank, world_size (`int`): rank of this process and number of processes.

    Raises:
        ValueError: see `source_order`.
    """
    if batching == "grouped":
        share = -(-len(rows) // world_size)
        mine = [SampleIndex(0, (rank + number * world_size) % len(rows), ()) for number in range(share)]
        return [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    if batching == "published":
        batches = published_batches(source_order(rows), batch_size)
    else:
        batches = unpadded_batches(rows, batch_size, image_processor)
    share = -(-len(batches) // world_size)
    return [batches[(rank + number * world_size) % len(batches)] for number in range(share)]


def has_positions(rows: datasets.Dataset) -> bool:
    """Return whether rows have the column `positions`, which exports of earlier versions lack."""
    return "positions" in rows.column_names


def source_order(rows: datasets.Dataset) -> list[tuple[int, int, int]]:
    """
    Return (position in the annotations, row index, sentence index) of every sentence with phrases, sorted by position.

    Raises:
        ValueError: if the rows have no positions, or two sentences have the same one.
    """
    if not has_positions(rows):
        raise ValueError(
            "The rows have no column 'positions', the order of their annotations, which the published batches follow: "
            "build or export the dataset again, or choose another evaluation_batching."
        )
    order, num_sentences, with_positions = [], 0, set()
    for index, row in enumerate(rows.select_columns(["sentences", "positions"])):
        positions = row["positions"] or None
        with_positions |= {positions is not None} if row["sentences"] else set()
        if positions is None:
            positions = range(num_sentences, num_sentences + len(row["sentences"]))
        if len(positions) != len(row["sentences"]):
            raise ValueError(f"Row {index} has {len(positions)} positions for {len(row['sentences'])} sentences.")
        asked = [number for number, sentence in enumerate(row["sentences"]) if sentence["phrases"]]
        order += [(positions[number], index, number) for number in asked]
        num_sentences += len(row["sentences"])
    order.sort()
    if len(with_positions) > 1 or len({position for position, *_ in order}) < len(order):
        raise ValueError(
            "Rows of several splits or datasets have no common order of annotations, which the published batches "
            "follow: evaluate the splits one by one, or choose another evaluation_batching."
        )
    return order


def published_batches(order: list[tuple[int, int, int]], batch_size: int) -> list[list[SampleIndex]]:
    """
    Cut `source_order` into batches of consecutive sentences of the annotations. An image with several sentences in a
    batch becomes one sample with these sentences; sentences that the rows lack make a batch smaller.

    Example:

    ```python
    >>> from training_reftr.sampling import published_batches

    >>> batches = published_batches([(0, 7, 0), (1, 4, 0), (2, 7, 2), (5, 7, 1)], batch_size=4)
    >>> [[(sample.index, sample.sentences) for sample in batch] for batch in batches]
    [[(7, (0, 2)), (4, (0,))], [(7, (1,))]]

    ```"""
    batches = {}
    for position, index, sentence in order:
        batches.setdefault(position // batch_size, {}).setdefault(index, []).append(sentence)
    return [
        [SampleIndex(0, index, tuple(sentences)) for index, sentences in batch.items()] for batch in batches.values()
    ]


def unpadded_batches(
    rows: datasets.Dataset, batch_size: int, image_processor: RefTRImageProcessor
) -> list[list[SampleIndex]]:
    """Return batches of images that the image processor resizes to one size, each with all its sentences."""
    size = image_processor.size
    by_size = {}
    for index, (width, height) in enumerate(zip(rows["width"], rows["height"], strict=True)):
        if image_processor.do_resize and size["shortest_edge"]:
            height, width = resized_size(height, width, size["shortest_edge"], size["longest_edge"])
        elif image_processor.do_resize:
            height, width = size["height"], size["width"]
        by_size.setdefault((height, width), []).append(SampleIndex(0, index, ()))
    return [
        samples[start : start + batch_size]
        for samples in by_size.values()
        for start in range(0, len(samples), batch_size)
    ]
