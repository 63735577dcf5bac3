"""
The order of a stream, whose rows are read shard by shard while a model trains.

An epoch of a stream is the sequence of the samples of its shards, which are in another order in each epoch. The
sequence is cut into consecutive lanes of equal length, one for each loader process of each process. A loader process
reads the shards of its lane one after the other, and shuffles the samples window by window. Where lanes begin follows
from the number of samples in each shard, so that all processes take the same number of steps without waiting for each
other, and the position of a run is the number of batches that it has taken. A checkpoint stores that number alone:
unlike `IterableDataset.state_dict`, it restores the shuffled windows too, and serves other numbers of processes.

Several streams are mixed by weight: each lane has a part of each of them, and an epoch ends when one is used up.

Only `count_together` is a collective.
"""

import dataclasses
import hashlib
import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import datasets
import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object

from data_scripts.streaming import SplitStream
from training_reftr.fingerprint import LENGTH, Fingerprint, tables_of
from training_reftr.sampling import (
    BUCKET_SIZE,
    SampleIndex,
    generator,
    learnable_indices,
    learnable_sentences,
    refuse_few,
    shape_class,
    shuffle,
)


logger = logging.getLogger(__name__)

# Number of samples that are shuffled together, smaller than for built rows because a loader process holds their rows.
WINDOW = 16 * BUCKET_SIZE


@dataclasses.dataclass
class StreamedRows:
    """
    Rows that are read from shards, of one or several streams.

    Args:
        streams (`list[list[SplitStream]]`): each stream as the splits that it consists of.
        weights (`list[float]`): share of each stream in the samples of an epoch; they sum to 1.
    """

    streams: list[list[SplitStream]]
    weights: list[float]

    @classmethod
    def of(cls, rows: datasets.IterableDataset) -> "StreamedRows":
        """Return rows of a single stream."""
        return cls([[SplitStream.of(rows)]], [1.0])

    @property
    def num_shards(self) -> int:
        """Return the number of shards of all streams."""
        return sum(len(self.shards_of(stream)) for stream in range(len(self.streams)))

    def shards_of(self, stream: int) -> list[tuple[SplitStream, int]]:
        """Return the shards of a stream, each as the split that it belongs to and its number there."""
        return [(part, shard) for part in self.streams[stream] for shard in range(part.num_shards)]

    def annotations(self) -> Iterator[dict]:
        """Yield all rows without their images."""
        for stream in range(len(self.streams)):
            for part, shard in self.shards_of(stream):
                yield from part.read_annotations(shard)


class ShardContents(NamedTuple):
    """The number of rows and samples in a shard, and a hash of its annotations."""

    num_rows: int
    num_samples: int
    digest: str


class StreamFingerprint(NamedTuple):
    """The number of rows of a stream, and a hash of the hashes of its shards, see [`Fingerprint`]."""

    num_rows: int
    digests: list[str]

    def hexdigest(self) -> str:
        """Return the hash of all rows; that of a single shard is its own."""
        if len(self.digests) == 1:
            return self.digests[0]
        return hashlib.blake2b("\n".join(self.digests).encode()).hexdigest()[:LENGTH]


def count_shards(
    rows: StreamedRows, limit: int, rank: int = 0, world_size: int = 1, learns_absence: bool = False
) -> dict[tuple, ShardContents]:
    """
    Count the samples in the shards that a process is to count, reading their annotations.

    Args:
        rows ([`StreamedRows`]): the stream.
        limit (`int`): maximum number of sentences per sample.
        rank, world_size (`int`): this process takes every `world_size`-th shard.
        learns_absence (`bool`, *optional*, defaults to `False`): see `sampling.is_learnable`.

    Returns:
        `dict`: (stream, shard) -> its contents.
    """
    shards = [
        (stream, number, *shard)
        for stream in range(len(rows.streams))
        for number, shard in enumerate(rows.shards_of(stream))
    ]
    contents = {}
    for stream, number, part, shard in shards[rank::world_size]:
        num_samples, fingerprint = 0, Fingerprint()
        for table in tables_of(part.read_annotations(shard)):
            counts = np.array([len(indices) for indices in learnable_sentences(table, learns_absence)], dtype=int)
            num_samples += int((-(-counts // limit)).sum())
            fingerprint.add(table)
        contents[stream, number] = ShardContents(fingerprint.num_rows, num_samples, fingerprint.hexdigest())
    return contents


def count_together(
    rows: StreamedRows, limit: int, accelerator: Accelerator, learns_absence: bool = False
) -> dict[tuple, ShardContents]:
    """
    Count the samples in all shards, each process a part of them. A collective.

    Raises:
        ValueError, OSError: on all processes, if a shard cannot be read or has an invalid text.
    """
    start = time.monotonic()
    contents, error = {}, None
    try:
        contents = count_shards(rows, limit, accelerator.process_index, accelerator.num_processes, learns_absence)
    except (ValueError, OSError) as raised:
        error = (OSError if isinstance(raised, OSError) else ValueError)(str(raised))
    gathered = gather_object([(contents, error)])
    for _, error in gathered:
        if error is not None:
            raise error
    contents = {shard: counted for part, _ in gathered for shard, counted in part.items()}
    if accelerator.is_main_process:
        num_rows = sum(shard.num_rows for shard in contents.values())
        seconds = time.monotonic() - start
        logger.info(f"Counted {num_rows:,} streamed images in {len(contents):,} shards in {seconds:.0f} s.")
    return contents


Interval = tuple[int, int]


def cut(intervals: Iterable[Interval], start: int, size: int) -> list[Interval]:
    """
    Return a part of the numbers in intervals (first, end).

    Args:
        intervals (`Iterable[Interval]`): in order.
        start, size (`int`): of the part, counted in the numbers of the intervals.

    Example:

    ```python
    >>> from training_reftr.streams import cut

    >>> cut([(0, 10), (50, 60)], start=8, size=5)
    [(8, 10), (50, 53)]

    ```"""
    parts = []
    for first, end in intervals:
        begin, stop = max(start, 0), min(start + size, end - first)
        if begin < stop:
            parts.append((first + begin, first + stop))
        start -= end - first
    return parts


def length_of(intervals: Iterable[Interval]) -> int:
    """Return how many numbers are in intervals."""
    return sum(end - first for first, end in intervals)


class Lane(NamedTuple):
    """
    What one loader process reads of an epoch: of each stream a part of its sequence of samples.

    Args:
        epoch (`int`): of the sequence.
        number (`tuple[int, ...]`): identifies the lane in its epoch, for random numbers.
        parts (`tuple`): the intervals of each stream.
    """

    epoch: int
    number: tuple[int, ...]
    parts: tuple[tuple[Interval, ...], ...]

    @property
    def sizes(self) -> list[int]:
        """Return the number of samples of each stream."""
        return [length_of(part) for part in self.parts]


class Plan(NamedTuple):
    """
    The lanes of a run in an epoch.

    Args:
        lanes (`list[Lane]`): by process, then by reader.
        rest (`list[list[Interval]]`): what no lane has of each stream, since it does not fill a global batch.
        layout (`tuple[int, int, int]`): global batch size, processes and readers of a process.
        num_batches, num_taken (`int`): batches of a process in its lanes, and how many of them were taken before.
        num_left_out (`int`): samples of all streams that are left out, since the windows that they belong to were
            read in part with another layout.
    """

    lanes: list[Lane]
    rest: list[list[Interval]]
    layout: tuple[int, int, int]
    num_batches: int
    num_taken: int = 0
    num_left_out: int = 0

    def num_read(self, num_batches: int) -> list[int]:
        """Return the samples that are read of each lane when each process has taken `num_batches`."""
        global_batch_size, num_processes, num_readers = self.layout
        batch_size = global_batch_size // num_processes
        return [len(range(lane.number[2], num_batches, num_readers)) * batch_size for lane in self.lanes]


class Ticket(NamedTuple):
    """Tell a loader process which batch to read: `size` samples of a lane from `start` on."""

    lane: Lane
    start: int
    size: int


class StreamedOrder:
    """
    Order the samples of a stream: shards are shuffled per epoch, samples within windows of `WINDOW`.

    Args:
        rows ([`StreamedRows`]): the stream.
        limit (`int`): maximum number of sentences per sample.
        seed (`int`): seed of the order.
        by_shape (`bool`): see `sampling.shuffle`.
        contents (`dict`, *optional*): see `count_together`; absent: all shards are counted now.
        learns_absence (`bool`, *optional*, defaults to `False`): see `sampling.is_learnable`.
    """

    def __init__(
        self,
        rows: StreamedRows,
        limit: int,
        seed: int,
        by_shape: bool,
        contents: dict | None = None,
        learns_absence: bool = False,
    ) -> None:
        self.shards = [rows.shards_of(stream) for stream in range(len(rows.streams))]
        self.weights = rows.weights
        self.limit = limit
        self.seed = seed
        self.by_shape = by_shape
        self.learns_absence = learns_absence
        contents = count_shards(rows, limit, learns_absence=learns_absence) if contents is None else contents
        contents = [contents[shard] for shard in sorted(contents)]
        self.fingerprint = StreamFingerprint(
            sum(shard.num_rows for shard in contents), [shard.digest for shard in contents]
        )
        counts = iter([shard.num_samples for shard in contents])
        self.counts = [np.array([next(counts) for _ in shards]) for shards in self.shards]

    @property
    def num_samples(self) -> int:
        """Return the number of samples per epoch."""
        return self.num_available([[(0, int(counts.sum()))] for counts in self.counts], 0)

    def num_available(self, remaining: Sequence[Sequence[Interval]], num_lanes: int) -> int:
        """Return how many samples the rest of each stream gives in lanes, at the streams' weights."""
        # the first stream takes what rounding leaves of the others in each lane
        margins = [num_lanes * (len(self.weights) - 1)] + [0] * (len(self.weights) - 1)
        return int(
            min(
                max(0, length_of(part) - margin) / weight
                for part, margin, weight in zip(remaining, margins, self.weights, strict=True)
            )
        )

    def plan(self, epoch: int, progress: Iterable[Sequence[int]], layout: tuple[int, int, int]) -> Plan:
        """
        Return the lanes that a run reads from now on in an epoch.

        Args:
            epoch (`int`): which one.
            progress (`Iterable`): what was read of it before, in order: (global batch size, batches of a process,
                processes, readers of a process).
            layout (`tuple[int, int, int]`): global batch size, processes and readers of a process.
        """
        legs = list(progress)
        num_taken = legs.pop()[1] if legs and (legs[-1][0], *legs[-1][2:]) == layout else 0
        remaining = [[(0, int(counts.sum()))] for counts in self.counts]
        num_left_out = 0
        for number, (size, num_batches, *processes) in enumerate(legs):
            plan = self.divide((epoch, number), remaining, (size, *processes))
            # another layout reads on where the windows end that were begun
            remaining = plan.rest
            for lane, num_read in zip(plan.lanes, plan.num_read(num_batches), strict=True):
                sources = self.sources(lane)
                end = min(len(sources), -(-num_read // WINDOW) * WINDOW)
                num_left_out += end - num_read
                for stream, start in enumerate(np.bincount(sources[:end], minlength=len(remaining)).tolist()):
                    remaining[stream] += cut(lane.parts[stream], start, lane.sizes[stream] - start)
        plan = self.divide((epoch, len(legs)), remaining, layout)
        return plan._replace(num_taken=num_taken, num_left_out=num_left_out)

    def divide(self, leg: tuple[int, int], remaining: list[list[Interval]], layout: Sequence[int]) -> Plan:
        """Cut the rest of each stream into lanes for a leg (epoch, its number there), see `plan`."""
        global_batch_size, num_processes, num_readers = layout
        num_batches = self.num_available(remaining, num_processes * num_readers) // global_batch_size
        lanes, starts = [], [0] * len(remaining)
        for rank, reader in itertools.product(range(num_processes), range(num_readers)):
            size = len(range(reader, num_batches, num_readers)) * (global_batch_size // num_processes)
            sizes = [int(size * weight) for weight in self.weights[1:]]
            sizes = [size - sum(sizes), *sizes]
            parts = tuple(tuple(cut(*part)) for part in zip(remaining, starts, sizes, strict=True))
            lanes.append(Lane(leg[0], (leg[1], rank, reader), parts))
            starts = [start + size for start, size in zip(starts, sizes, strict=True)]
        rest = [cut(part, start, length_of(part) - start) for part, start in zip(remaining, starts, strict=True)]
        return Plan(lanes, rest, tuple(layout), num_batches)

    def sources(self, lane: Lane) -> np.ndarray:
        """Return the stream of each sample of a lane, in a random order."""
        sources = np.repeat(np.arange(len(lane.parts), dtype=np.int16), lane.sizes)
        return sources if len(lane.parts) == 1 else self.rng(lane).permutation(sources)

    def rng(self, lane: Lane, *window: int) -> np.random.Generator:
        """Return the random number generator of a lane, or of one of its windows."""
        return generator(self.seed, lane.epoch, *lane.number, *window)

    def samples(self, lane: Lane, start: int = 0) -> Iterator[SampleIndex]:
        """Yield the samples of a lane in order, from `start` on; shards before that are not opened."""
        sources = self.sources(lane)
        window = start // WINDOW
        skipped = np.bincount(sources[: window * WINDOW], minlength=len(lane.parts)).tolist()
        readers = [
            self.read(stream, lane.epoch, cut(part, skip, length_of(part) - skip))
            for stream, (part, skip) in enumerate(zip(lane.parts, skipped, strict=True))
        ]
        read = (next(readers[source]) for source in sources[window * WINDOW :])
        return itertools.islice(self.shuffled(read, lane, window), start - window * WINDOW, None)

    def shuffled(self, samples: Iterator[SampleIndex], lane: Lane, window: int) -> Iterator[SampleIndex]:
        """Yield samples window by window, in the order of `shuffle`; the next window is read meanwhile."""
        ahead = list(itertools.islice(samples, WINDOW))
        for number in itertools.count(window):
            if not ahead:
                return
            held, ahead = ahead, []
            shapes = np.array([shape_class(sample.row["width"], sample.row["height"]) for sample in held])
            texts = [[len(sample.row["sentences"][index]["text"]) for index in sample.sentences] for sample in held]
            lengths = np.array([max(lengths) for lengths in texts])
            for index in shuffle(shapes, lengths, self.rng(lane, number), self.by_shape).tolist():
                sample, held[index] = held[index], None
                yield sample
                ahead += itertools.islice(samples, 1)

    def read(self, stream: int, epoch: int, intervals: Iterable[Interval]) -> Iterator[SampleIndex]:
        """Yield the samples in intervals of the sequence of an epoch, opening the shards that they are in."""
        order = generator(self.seed, epoch, stream).permutation(len(self.shards[stream]))
        ends = np.cumsum(self.counts[stream][order])
        for start, end in intervals:
            while start < end:
                position = int(np.searchsorted(ends, start, side="right"))
                shard, last = int(order[position]), int(ends[position])
                first = last - int(self.counts[stream][shard])
                stop = min(end, last)
                yield from self.read_shard(stream, shard, epoch, start - first, stop - first)
                start = stop

    def read_shard(self, stream: int, shard: int, epoch: int, start: int, end: int) -> Iterator[SampleIndex]:
        """
        Yield the samples of a shard from index `start` to `end`, in the order of its rows.

        Raises:
            ValueError: if it has fewer samples than when it was counted.
        """
        part, number = self.shards[stream][shard]
        rng_of = (self.seed, epoch, stream, shard)
        num_yielded = 0
        samples = cut_into_samples(part.read(number), epoch, self.limit, rng_of, self.learns_absence)
        for sample in itertools.islice(samples, start, end):
            yield sample
            num_yielded += 1
        if num_yielded < end - start:
            raise ValueError(
                f"Shard {number} of the stream has {start + num_yielded} samples of {self.counts[stream][shard]}: the "
                "training files have changed since they were counted. Start the run again."
            )


def cut_into_samples(
    rows: Iterable[dict], epoch: int, limit: int, seeds: tuple[int, ...], learns_absence: bool = False
) -> Iterator[SampleIndex]:
    """Yield the samples of each row, in the order of the rows; `seeds` and the row decide on their sentences."""
    for index, row in enumerate(rows):
        indices = learnable_indices(row, learns_absence)
        if len(indices) > 1:
            indices = np.array(indices)[generator(*seeds, index).permutation(len(indices))].tolist()
        num_samples = -(-len(indices) // limit)
        for part in np.array_split(indices, num_samples) if num_samples else ():
            yield SampleIndex(epoch, index, tuple(part.tolist()), row)


class StreamSampler:
    """
    Yield tickets for the batches of this process in an epoch, in turn for each of its readers.

    Args:
        order ([`StreamedOrder`]): order of the samples.
        batch_size (`int`): samples per process and batch.
        rank, world_size (`int`): rank of this process and number of processes.
        num_readers (`int`): readers of a process, each of which has its own lane.

    Raises:
        ValueError: if the samples do not fill one global batch.
    """

    def __init__(self, order: StreamedOrder, batch_size: int, rank: int, world_size: int, num_readers: int) -> None:
        self.order = order
        self.batch_size = batch_size
        self.rank = rank
        self.layout = batch_size * world_size, world_size, num_readers
        refuse_few(order.num_samples, batch_size, world_size)
        self.begin(0)

    def plan(self, progress: Iterable[Sequence[int]], epoch: int) -> Plan:
        """Return the lanes of all processes after `progress`, see `StreamedOrder.plan`."""
        return self.order.plan(epoch, progress, self.layout)

    def num_batches(self, progress: Iterable[Sequence[int]] = (), epoch: int = 0) -> int:
        """Return the number of batches left in an epoch after `progress`."""
        plan = self.plan(progress, epoch)
        return max(0, plan.num_batches - plan.num_taken)

    def begin(self, epoch: int, progress: Iterable[Sequence[int]] = ()) -> None:
        """Set the epoch of the next iteration and the progress to skip."""
        self.epoch = epoch
        self.progress = list(progress)

    def __len__(self) -> int:
        return self.num_batches(self.progress, self.epoch)

    def __iter__(self) -> Iterator[list[Ticket]]:
        plan = self.plan(self.progress, self.epoch)
        num_readers = self.layout[2]
        lanes = plan.lanes[self.rank * num_readers : (self.rank + 1) * num_readers]
        return (
            # loader processes take tickets in turn, so that each of them gets those of one lane
            [Ticket(lanes[number % num_readers], number // num_readers * self.batch_size, self.batch_size)]
            for number in range(plan.num_taken, plan.num_batches)
        )
