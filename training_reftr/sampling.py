"""
The order of an epoch: which sentences of a picture come together, in what order, in which batch, on which process.

A sample is a *visit*: a picture with some of its sentences. The order of the visits is a function of (seed, epoch) and
of the rows alone. Batches of all processes together are cut from it one after the other, so that neither the number
of processes nor that of accumulation steps changes what an update sees, and a run that goes on with another number of
them begins where the one before it ended. No function here holds a collective: each process knows the whole order
and takes its part.
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
from modeling_reftr.image_processing_reftr import resized_size
from training_reftr.fingerprint import Fingerprint, annotations, fingerprint_of


# visits of like shape that follow each other: a global batch of this size, or one that it is a multiple of, is cut
# from one cell; of larger batches each part is
CELL = 128
# visits that are sorted by shape together; few enough for other neighbours in each epoch
WINDOW = 32 * CELL
# of a stream, whose rows are held in memory meanwhile: its shuffle buffer
STREAM_WINDOW = 16 * CELL
SHAPE_STEPS = 20  # a side is rounded to so many parts of the longer one


class Visit(NamedTuple):
    """A sample: a row and some of its sentences, by their places; the row itself where it is streamed."""

    epoch: int
    index: int
    sentences: tuple[int, ...]
    row: dict | None = None


def generator(*seeds: int) -> np.random.Generator:
    """Random numbers that are a function of some whole numbers."""
    return np.random.Generator(np.random.PCG64(seeds))


def shape_class(width, height):
    """
    Pictures of one class are resized to about the same size: from tall (negative) over square (0) to wide.

    Example:

    ```python
    >>> from training_reftr.sampling import shape_class

    >>> shape_class(640, 480), shape_class(1280, 964), shape_class(480, 640)
    (5, 5, -5)

    ```"""
    longer = np.maximum(width, height)
    steps = np.rint(SHAPE_STEPS * np.divide(width, longer)) - np.rint(SHAPE_STEPS * np.divide(height, longer))
    return steps.astype(int) if isinstance(steps, np.ndarray) else int(steps)


def shuffle(shapes: np.ndarray, lengths: np.ndarray, draw: np.random.Generator, by_shape: bool) -> np.ndarray:
    """
    An order of visits: shuffled, and with `by_shape` sorted within each `WINDOW` by shape and then by length of their
    texts, cut into cells of `CELL` visits, and the cells shuffled. What does not fill a cell comes last, unsorted, so
    that no kind of picture is what an epoch leaves over.

    Args:
        shapes, lengths (arrays of shape `(visits,)`): `shape_class` of the picture, characters of the longest text.
    """
    order = np.argsort(draw.random(len(shapes)), kind="stable")
    if not by_shape:
        return order
    num_cells = len(order) // CELL
    sorted_windows = []
    for start in range(0, num_cells * CELL, WINDOW):
        window = order[start : min(start + WINDOW, num_cells * CELL)]
        sorted_windows.append(window[np.lexsort((lengths[window], shapes[window]))])
    if not sorted_windows:
        return order
    cells = np.concatenate(sorted_windows).reshape(num_cells, CELL)
    cells = cells[np.argsort(draw.random(num_cells), kind="stable")]
    return np.concatenate((cells.ravel(), order[num_cells * CELL :]))


def deal(sizes: list[int], rank: int, world_size: int) -> list[int]:
    """
    Which visits of a global batch this process takes: dealt like cards, the largest first and each round the other
    way about, so that all processes hold the same number of visits and about the same number of sentences.

    Args:
        sizes (`list[int]`): sentences of each visit; a multiple of `world_size` of them.

    Example:

    ```python
    >>> from training_reftr.sampling import deal

    >>> [deal([1, 8, 2, 7, 3, 6], rank, 2) for rank in (0, 1)]
    [[1, 2, 4], [0, 3, 5]]

    ```"""
    rounds = np.argsort(-np.asarray(sizes), kind="stable").reshape(-1, world_size)
    rounds[1::2] = rounds[1::2, ::-1].copy()
    return sorted(rounds[:, rank].tolist())


def is_learnable(phrase: dict, objects: list[dict]) -> bool:
    """
    Return whether a phrase can be trained on: its object's box has an extent. Evaluation counts the others as misses.

    Example:

    ```python
    >>> from training_reftr.sampling import is_learnable

    >>> objects = [{"box": [3.0, 4.0, 3.0, 9.0]}, {"box": [3.0, 4.0, 8.0, 9.0]}]
    >>> [is_learnable({"objects": [index]}, objects) for index in (0, 1)]
    [False, True]

    ```"""
    return not (phrase["objects"] and is_degenerate(objects[phrase["objects"][0]]["box"]))


def learnable_places(row: dict) -> list[int]:
    """Return the places of a row's sentences that have something to train on, see `is_learnable`."""
    return [
        place
        for place, sentence in enumerate(row["sentences"])
        if not sentence["phrases"] or any(is_learnable(phrase, row["objects"]) for phrase in sentence["phrases"])
    ]


def learnable_sentences(table: pa.Table) -> list[np.ndarray]:
    """Return `learnable_places` of each row of a table with the columns objects and sentences."""
    counts = pc.list_value_length(table["sentences"]).to_numpy()
    places = [np.arange(count) for count in counts]
    first = 0
    for objects in table["objects"].chunks if "objects" in table.column_names else ():
        boxes = objects.flatten().field("box").flatten().to_numpy(zero_copy_only=False).reshape(-1, 4)
        is_miss = (boxes[:, 0] == boxes[:, 2]) | (boxes[:, 1] == boxes[:, 3])
        if is_miss.any():  # seldom: rows become Python objects
            row_of_object = np.repeat(np.arange(len(objects)), pc.list_value_length(objects).to_numpy())
            for index in np.unique(row_of_object[is_miss]).tolist():
                row = {"objects": objects[index].as_py(), "sentences": table["sentences"][first + index].as_py()}
                places[first + index] = np.array(learnable_places(row), dtype=int)
        first += len(objects)
    return places


class BuiltOrder:
    """
    The visits of rows that are built.

    An image of n sentences is visited ceil(n / limit) times an epoch, with as many of its sentences each time, drawn
    without putting back: 9 sentences with a limit of 8 are 5 and 4.

    Args:
        rows (`datasets.Dataset`): see `data_scripts.FEATURES`; no picture of them is read.
        limit (`int`): sentences of a visit; 1 visits each sentence by itself.
        seed (`int`): of the order.
        by_shape (`bool`): bring like pictures and texts together, see `shuffle`.
    """

    def __init__(self, rows: datasets.Dataset, limit: int, seed: int, by_shape: bool):
        self.rows = rows
        self.limit = limit
        self.seed = seed
        self.by_shape = by_shape
        none = np.zeros(0, int)
        counts, places, lengths, shapes = [none], [none], [none], [none]
        names = [name for name in ("width", "height", "objects", "sentences") if name in rows.column_names]
        columns = rows.select_columns(names).with_format("arrow")
        for table in columns.iter(10_000):
            sentences = table["sentences"].combine_chunks()
            taken = learnable_sentences(table)
            counts.append(np.array([len(row) for row in taken], dtype=int))
            places.append(np.concatenate([none, *taken]))
            sizes = pc.list_value_length(sentences).to_numpy(zero_copy_only=False)
            firsts = np.repeat(np.cumsum(sizes) - sizes, counts[-1])
            text_lengths = pc.utf8_length(sentences.flatten().field("text")).to_numpy(zero_copy_only=False)
            lengths.append(text_lengths[firsts + places[-1]])
            shapes.append(shape_class(table["width"].to_numpy(), table["height"].to_numpy()))
        self.counts = np.concatenate(counts)
        self.places = np.concatenate(places)  # of each sentence that is learned from, in its row
        self.lengths = np.concatenate(lengths)
        self.shapes = np.concatenate(shapes)

    @property
    def num_visits(self) -> int:
        """Visits of an epoch."""
        return int((-(-self.counts // self.limit)).sum())

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Number and hash of the rows."""
        return fingerprint_of(self.rows)

    def visits(self, epoch: int, start: int = 0) -> Iterator[Visit]:
        """The epoch's visits in order, from the one at `start` on."""
        draw = generator(self.seed, epoch)
        row_of_sentence = np.repeat(np.arange(len(self.counts)), self.counts)
        # the sentences of each row in an order of their own, row by row
        drawn = np.lexsort((draw.random(len(row_of_sentence)), row_of_sentence))
        places = self.places[drawn]

        visits_of_row = -(-self.counts // self.limit)
        rows = np.repeat(np.arange(len(self.counts)), visits_of_row)
        number = np.arange(len(rows)) - np.repeat(np.cumsum(visits_of_row) - visits_of_row, visits_of_row)
        size, remainder = np.divmod(self.counts, np.maximum(visits_of_row, 1))
        sizes = size[rows] + (number < remainder[rows])
        ends = np.cumsum(sizes)
        begins = ends - sizes
        longest = np.maximum.reduceat(self.lengths[drawn], begins) if len(rows) else begins
        for visit in shuffle(self.shapes[rows], longest, draw, self.by_shape)[start:]:
            yield Visit(epoch, int(rows[visit]), tuple(places[begins[visit] : ends[visit]].tolist()))


class StreamedOrder:
    """
    The visits of rows that are streamed: files in an order of the epoch's, visits shuffled within windows of
    `STREAM_WINDOW`. Every process reads all rows, without decoding a picture, and decodes those of its own visits:
    so the order is the same on any number of them, and none runs out before the others.

    Args:
        rows (`datasets.IterableDataset`), limit, seed, by_shape: see `BuiltOrder`.
    """

    def __init__(self, rows: datasets.IterableDataset, limit: int, seed: int, by_shape: bool):
        self.rows = rows.cast_column("image", datasets.Image(decode=False))
        self.limit = limit
        self.seed = seed
        self.by_shape = by_shape

    @cached_property
    def _contents(self) -> tuple[int, Fingerprint]:
        """Visits of an epoch and fingerprint of the rows, by reading the stream once."""
        num_visits, fingerprint = 0, Fingerprint()
        for table in annotations(self.rows):
            counts = np.array([len(places) for places in learnable_sentences(table)], dtype=int)
            num_visits += int((-(-counts // self.limit)).sum())
            fingerprint.add(table)
        return num_visits, fingerprint

    @property
    def num_visits(self) -> int:
        """Visits of an epoch."""
        return self._contents[0]

    @property
    def fingerprint(self) -> Fingerprint:
        """Number and hash of the rows."""
        return self._contents[1]

    def visits(self, epoch: int, start: int = 0) -> Iterator[Visit]:
        """The epoch's visits in order, from the one at `start` on."""
        draw = generator(self.seed, epoch)
        num_files = self.rows.num_shards
        # one after the other: the library's own shuffling reads several at a time, by threads that it waits 5 s for
        files = (self.rows.shard(num_files, index) for index in draw.permutation(num_files).tolist())
        rows = itertools.chain.from_iterable(files)
        return itertools.islice(self.shuffled(self.cut(rows, epoch, draw), draw), start, None)

    def cut(self, rows: Iterable[dict], epoch: int, draw: np.random.Generator) -> Iterator[Visit]:
        """The visits of each row, in the rows' order."""
        for index, row in enumerate(rows):
            places = learnable_places(row)
            places = np.array(places, dtype=int)[draw.permutation(len(places))]
            if len(places):
                for part in np.array_split(places, -(-len(places) // self.limit)):
                    yield Visit(epoch, index, tuple(part.tolist()), row)

    def shuffled(self, visits: Iterator[Visit], draw: np.random.Generator) -> Iterator[Visit]:
        """Visits window by window, in the order of `shuffle`."""
        while window := list(itertools.islice(visits, STREAM_WINDOW)):
            shapes = np.array([shape_class(visit.row["width"], visit.row["height"]) for visit in window])
            texts = [[len(visit.row["sentences"][place]["text"]) for place in visit.sentences] for visit in window]
            for place in shuffle(shapes, np.array([max(lengths) for lengths in texts]), draw, self.by_shape):
                yield window[place]


class EpochSampler:
    """
    This process's batches of an epoch, each a list of visits. What does not fill a global batch waits for another
    epoch's order.

    Args:
        order (`BuiltOrder` or `StreamedOrder`): the visits.
        batch_size (`int`): visits of a process and batch.
        rank, world_size (`int`): this process, and how many there are.

    Raises:
        ValueError: if the visits do not fill one global batch.
    """

    def __init__(self, order, batch_size: int, rank: int = 0, world_size: int = 1):
        self.order = order
        self.global_batch_size = batch_size * world_size
        self.rank = rank
        self.world_size = world_size
        if order.num_visits == 0:
            raise ValueError("No row of the training split has a sentence: there is nothing to learn from.")
        if order.num_visits < self.global_batch_size:
            raise ValueError(
                f"{order.num_visits} training samples do not fill one global batch of {self.global_batch_size} "
                f"({world_size} processes with batch_size={batch_size}); lower batch_size."
            )
        self.begin(0)

    def num_batches(self, progress: Iterable[tuple[int, int]] = ()) -> int:
        """Batches still to come in an epoch of which (global batch size, number of batches) were seen, in turn."""
        return max(0, self.order.num_visits - num_seen(progress)) // self.global_batch_size

    def begin(self, epoch: int, progress: Iterable[tuple[int, int]] = ()):
        """Set what the next iteration goes through: an epoch, without what it has seen before."""
        self.epoch = epoch
        self.progress = list(progress)

    def __len__(self) -> int:
        return self.num_batches(self.progress)

    def __iter__(self) -> Iterator[list[Visit]]:
        return self.cut(self.epoch, len(self), self.order.visits(self.epoch, num_seen(self.progress)))

    def cut(self, epoch: int, num_batches: int, visits: Iterator[Visit]) -> Iterator[list[Visit]]:
        """This process's part of each global batch."""
        for number in range(num_batches):
            batch = list(itertools.islice(visits, self.global_batch_size))
            if len(batch) < self.global_batch_size:
                raise ValueError(
                    f"Epoch {epoch} ended after {number} of {num_batches} batches: the training files have changed "
                    "since they were counted. Start the run again."
                )
            mine = deal([len(visit.sentences) for visit in batch], self.rank, self.world_size)
            yield [batch[place] for place in mine]


def num_seen(progress: Iterable[tuple[int, int]]) -> int:
    """Visits of some batches of some sizes: each run cut its batches from where the one before it ended."""
    return sum(global_batch_size * num_batches for global_batch_size, num_batches in progress)


def evaluation_batches(
    rows: datasets.Dataset, batching: str, batch_size: int, image_processor, rank: int, world_size: int
) -> list[list[Visit]]:
    """
    Return a process's batches of an evaluation. All processes have equally many: where they do not come out even, some
    at the start are on two of them.

    Args:
        rows (`datasets.Dataset`): see `data_scripts.FEATURES`; no image of them is read.
        batching (`str`):
            "grouped": `batch_size` images, each with all its sentences, in the rows' order. "unpadded": the same of
            images that are resized to one size, so that none is padded. "published": `batch_size` sentences that
            follow each other in the annotations, their images padded to the largest; the batches are the same on any
            number of processes.
        batch_size (`int`): images, or with "published" sentences, of a batch.
        image_processor ([`RefTRImageProcessor`]): what resizes.
        rank, world_size (`int`): this process, and how many there are.

    Raises:
        ValueError: see `source_order`.
    """
    if batching == "grouped":
        share = -(-len(rows) // world_size)
        mine = [Visit(0, (rank + number * world_size) % len(rows), ()) for number in range(share)]
        return [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    if batching == "published":
        batches = published_batches(source_order(rows), batch_size)
    else:
        batches = unpadded_batches(rows, batch_size, image_processor)
    share = -(-len(batches) // world_size)
    return [batches[(rank + number * world_size) % len(batches)] for number in range(share)]


def has_positions(rows: datasets.Dataset) -> bool:
    """Return whether rows have the column of positions, which exports of earlier versions lack."""
    return "positions" in rows.column_names


def source_order(rows: datasets.Dataset) -> list[tuple[int, int, int]]:
    """
    Return (position in the annotations, row, place in the row) of every sentence that asks for something, by position.

    Raises:
        ValueError: if the rows do not tell, or two sentences are at one position.
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
        asked = [place for place, sentence in enumerate(row["sentences"]) if sentence["phrases"]]
        order += [(positions[place], index, place) for place in asked]
        num_sentences += len(row["sentences"])
    order.sort()
    if len(with_positions) > 1 or len({position for position, *_ in order}) < len(order):
        raise ValueError(
            "Rows of several splits or datasets have no common order of annotations, which the published batches "
            "follow: evaluate the splits one by one, or choose another evaluation_batching."
        )
    return order


def published_batches(order: list[tuple[int, int, int]], batch_size: int) -> list[list[Visit]]:
    """
    Cut `source_order` into batches of sentences that follow each other in the annotations. An image that comes several
    times in a batch is visited once, with these sentences; what is not in the rows leaves a batch smaller.

    Example:

    ```python
    >>> from training_reftr.sampling import published_batches

    >>> batches = published_batches([(0, 7, 0), (1, 4, 0), (2, 7, 2), (5, 7, 1)], batch_size=4)
    >>> [[(visit.index, visit.sentences) for visit in batch] for batch in batches]
    [[(7, (0, 2)), (4, (0,))], [(7, (1,))]]

    ```"""
    batches = {}
    for position, index, place in order:
        batches.setdefault(position // batch_size, {}).setdefault(index, []).append(place)
    return [[Visit(0, index, tuple(places)) for index, places in batch.items()] for batch in batches.values()]


def unpadded_batches(rows: datasets.Dataset, batch_size: int, image_processor) -> list[list[Visit]]:
    """Return batches of images that the image processor resizes to one size, each with all its sentences."""
    size = image_processor.size
    by_size = {}
    for index, (width, height) in enumerate(zip(rows["width"], rows["height"], strict=True)):
        if image_processor.do_resize and size["shortest_edge"]:
            height, width = resized_size(height, width, size["shortest_edge"], size["longest_edge"])
        elif image_processor.do_resize:
            height, width = size["height"], size["width"]
        by_size.setdefault((height, width), []).append(Visit(0, index, ()))
    return [
        visits[start : start + batch_size]
        for visits in by_size.values()
        for start in range(0, len(visits), batch_size)
    ]
