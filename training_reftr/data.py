"""
Batches of training and evaluation. Nothing here is a collective: all processes know the same order and take their
shard of it, see `sampling`.
"""

import itertools
import os
import pickle
import random
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data_scripts.building import is_degenerate
from modeling_reftr import RefTRImageProcessor, RefTRProcessor
from modeling_reftr.text_reftr import check_text
from training_reftr.augmentation import augment
from training_reftr.fingerprint import Fingerprint
from training_reftr.images import ImageReader, read_row_image, to_array
from training_reftr.negatives import add_negatives, context_of
from training_reftr.packing import pack_labels, unpack_labels
from training_reftr.samples import Sample, make_sample, take_sentences, without_misses
from training_reftr.sampling import BuiltOrder, EpochSampler, SampleIndex, evaluation_batches
from training_reftr.settings import TrainingSettings
from training_reftr.streams import StreamedOrder, StreamedRows, StreamFingerprint, StreamSampler, Ticket


class GroundingDataset(Dataset):
    """
    Samples by sample_index.

    Args:
        rows (`datasets.Dataset`): see `data_scripts.FEATURES`.
        prepare (`Callable[[dict, SampleIndex], Sample]`): makes a sample of a row whose image is not decoded.
    """

    def __init__(self, rows: datasets.Dataset, prepare: Callable[[dict, SampleIndex], Sample]) -> None:
        self.rows = rows.cast_column("image", datasets.Image(decode=False))
        self.prepare = prepare

    def __getitem__(self, sample_index: SampleIndex) -> Sample:
        return self.prepare(self.rows[sample_index.index], sample_index)


class StreamedDataset(Dataset):
    """
    Samples by ticket. The batch that a ticket names is always the same; to read the batches of a lane in their order
    takes a single pass over its shards.

    Args:
        order ([`StreamedOrder`]): reads the lanes.
        prepare (`Callable[[dict, SampleIndex], Sample]`): see [`GroundingDataset`].
    """

    def __init__(self, order: StreamedOrder, prepare: Callable[[dict, SampleIndex], Sample]) -> None:
        self.order = order
        self.prepare = prepare
        self.lane, self.position, self.samples = None, 0, iter(())

    def __getitems__(self, tickets: list[Ticket]) -> list[Sample]:
        """Return the samples of the one ticket of a batch."""
        ((lane, start, size),) = tickets
        if (self.lane, self.position) != (lane, start):
            self.samples = self.order.samples(lane, start)
        self.lane, self.position = None, 0  # an error ends the samples
        samples = [self.prepare(sample.row, sample) for sample in itertools.islice(self.samples, size)]
        self.lane, self.position = lane, start + size
        return samples


class TrainingSamples:
    """
    Make training samples: the sentences of an index and their objects, augmented at the model's size.

    A sample is a function of (seed, epoch, first sentence) alone.

    Args:
        reader ([`ImageReader`]): reads and resizes images.
        augmentation (`str`): see `augment`.
        seed (`int`): of the run.
        with_masks (`bool`): whether samples have masks.
        learns_absence (`bool`, *optional*, defaults to `False`): see `sampling.is_learnable`.
    """

    def __init__(
        self, reader: ImageReader, augmentation: str, seed: int, with_masks: bool, learns_absence: bool = False
    ) -> None:
        self.reader = reader
        self.augmentation = augmentation
        self.seed = seed
        self.with_masks = with_masks
        self.learns_absence = learns_absence

    def __call__(self, row: dict, sample_index: SampleIndex) -> Sample:
        """Make the sample of a row and its index."""
        context = context_of(row) if self.learns_absence else None
        row = take_sentences(without_misses(row, self.learns_absence), sample_index.sentences)
        sample = make_sample(row, self.reader(row), self.reader.image_processor, self.with_masks)
        sample.key = f"{self.seed}/{sample_index.epoch}/{row['sentences'][0]['sentence_id']}"
        sample.context = context
        return augment(sample, self.augmentation, random.Random(sample.key))


class EvaluationSamples:
    """
    Make evaluation samples: all sentences of a row, or those of the sample_index.

    Args:
        reader (`Callable`): reads the image of a row, resized or not.
        image_processor ([`RefTRImageProcessor`]): see `make_sample`.
    """

    def __init__(self, reader: Callable[[dict], np.ndarray], image_processor: RefTRImageProcessor) -> None:
        self.reader = reader
        self.image_processor = image_processor

    def __call__(self, row: dict, sample_index: SampleIndex) -> Sample:
        """Make the sample of a row and its index."""
        row = take_sentences(row, sample_index.sentences) if sample_index.sentences else row
        return make_sample(row, self.reader(row), self.image_processor)


class GroundingCollator:
    """
    Collate samples, or rows, into a batch of the model, through its processor.

    A batch is the processor's, with `labels`, and `targets`: for each sentence a list with a dict for each phrase, see
    `targets_of`.

    Args:
        processor ([`RefTRProcessor`]): makes the batch.
        with_targets (`bool`, *optional*, defaults to `True`): whether to add `targets`. Trainers that pass a whole
            batch to the model leave them out; each label then has the `size` (height, width) of its image in the batch
            without padding. With targets, sentences with a degenerate box, which an evaluation counts as misses, have
            labels without boxes.
        with_masks (`bool`, *optional*, defaults to `False`): whether labels have `masks`. Sentences with a phrase
            without a mask have none.
        are_resized (`bool`, *optional*, defaults to `False`): whether images have the model's size already.
        defers_normalization (`bool`, *optional*, defaults to `False`): whether images stay 8-bit, which takes a fifth
            of the bytes. `move` normalizes them.
        negative_ratio (`float`, *optional*, defaults to 0): expressions about other images per sentence of training
            samples, see `negatives`.
    """

    def __init__(
        self,
        processor: RefTRProcessor,
        with_targets: bool = True,
        with_masks: bool = False,
        are_resized: bool = False,
        defers_normalization: bool = False,
        negative_ratio: float = 0.0,
    ) -> None:
        self.processor = processor
        self.negative_ratio = negative_ratio
        self.defers_normalization = defers_normalization
        self.are_resized = are_resized
        self.with_targets = with_targets
        self.with_masks = with_masks

    def __call__(self, items: list[Sample | dict]) -> dict:
        """Collate samples, or rows of `data_scripts.FEATURES`."""
        samples = [item if isinstance(item, Sample) else self.read(item) for item in items]
        if self.negative_ratio:
            samples = add_negatives(samples, self.negative_ratio)
        texts, phrases, boxes, masks, targets = [], [], [], [], []
        are_expressions = True
        for sample in samples:
            texts.append([sentence["text"] for sentence in sample.sentences])
            spans_of_image = []
            boxes.append([])
            masks.append([])
            for number, sentence in enumerate(sample.sentences):
                check_text(sentence["text"], f"The text of sentence {sentence['sentence_id']!r}")
                spans = [(phrase["start"], phrase["end"]) for phrase in sentence["phrases"]]
                spans_of_image.append(spans)
                are_expressions = are_expressions and spans == [(0, len(sentence["text"]))]
                objects = [phrase["objects"] for phrase in sentence["phrases"]]
                boxes[-1].append(self.label_boxes(sample, objects))
                masks[-1].append(self.label_masks(sample, objects))
                targets.append(targets_of(sample, number))
            phrases.append(spans_of_image)
        batch = self.processor(
            # channels first, but in memory as decoded: resizing takes a seventh of the time
            images=[torch.from_numpy(sample.image).permute(2, 0, 1) for sample in samples],
            input_data_format="channels_first",
            text=texts,
            phrases=None if are_expressions else phrases,
            boxes=boxes,
            masks=masks if self.with_masks else None,
            do_defer_normalization=self.defers_normalization,
            **({"do_resize": False} if self.are_resized else {}),
        )
        if self.with_targets:
            return {**batch, "targets": targets}
        # a trainer's metrics see the labels, but not the inputs
        sizes = torch.stack([batch["pixel_mask"].amax(axis).sum(1) for axis in (2, 1)], dim=1)
        for label, size in zip(batch["labels"], sizes[batch["image_index"]], strict=True):
            label["size"] = size
        return dict(batch)

    def read(self, row: dict) -> Sample:
        """Make a sample of all sentences of a row, whose image may be decoded."""
        image_processor = self.processor.image_processor
        (image,) = image_processor.open_images([row["image"]], [(row["height"], row["width"])])
        return make_sample(row, to_array(row, image), image_processor, self.with_masks)

    def label_boxes(self, sample: Sample, objects: list[list[int]]) -> np.ndarray | list | None:
        """
        Return the boxes of a sentence's labels, as the processor takes them; None if an evaluation asks for a
        degenerate one.

        Args:
            sample ([`Sample`]): with the sentence.
            objects (`list[list[int]]`): those of each phrase.
        """
        named = [index for of_phrase in objects for index in of_phrase]
        if self.with_targets and any(is_degenerate(box) for box in sample.boxes_xyxy[named].tolist()):
            return None
        return by_phrase(sample.boxes_xyxy, objects)

    def label_masks(self, sample: Sample, objects: list[list[int]]) -> np.ndarray | list | None:
        """Return the masks of a sentence's labels, None if one of them is missing or empty; see `label_boxes`."""
        if sample.masks is None:
            return None
        named = [index for of_phrase in objects for index in of_phrase]
        return by_phrase(sample.masks, objects) if sample.masks[named].any(axis=(1, 2)).all() else None


def by_phrase(values: np.ndarray, objects: list[list[int]]) -> np.ndarray | list[np.ndarray]:
    """Return one value per phrase, or if phrases refer to none or several objects, an array for each of them."""
    if all(len(of_phrase) == 1 for of_phrase in objects):
        return values[[index for (index,) in objects]]
    return [values[of_phrase] for of_phrase in objects]


def targets_of(sample: Sample, number: int) -> list[dict]:
    """
    Return what each phrase of a sentence refers to, in pixels of the original image.

    Returns:
        `list[dict]`: for each phrase its ids, text, types and the size of the image; of the one object that it refers
        to `object_id`, `box`, `boxes` and `segmentation`, or `targets`, a list of such, if it refers to none or to
        several.
    """
    row, sentence = sample.row, sample.sentences[number]
    targets = []
    for index, phrase in enumerate(sentence["phrases"]):
        of_phrase = [
            {name: row["objects"][number][name] for name in ("object_id", "box", "boxes", "segmentation")}
            for number in phrase["objects"]
        ]
        targets.append(
            {
                "image_id": row["image_id"],
                "sentence_id": sentence["sentence_id"],
                "phrase": index,
                "words": sentence["text"][phrase["start"] : phrase["end"]],
                "types": phrase["types"],
                **(of_phrase[0] if len(of_phrase) == 1 else {"targets": of_phrase}),
                "image_size": (row["height"], row["width"]),
            }
        )
    return targets


class Failure(NamedTuple):
    """Replace a batch that could not be loaded by its error."""

    error: ValueError | OSError


class GuardedDataset(Dataset):
    """A dataset whose errors about files and values come as values, which loader processes hand on as they are."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitems__(self, indices: list) -> list | Failure:
        """Return the samples of a batch."""
        try:
            if hasattr(self.dataset, "__getitems__"):
                return self.dataset.__getitems__(indices)
            return [self.dataset[index] for index in indices]
        except (ValueError, OSError) as error:
            return Failure(portable(error))


class GuardedCollator:
    """
    A collator that hands a `Failure` on, and makes one of its own errors about files and values. In a loader process,
    it packs the labels.
    """

    def __init__(self, collate_fn: Callable) -> None:
        self.collate_fn = collate_fn

    def __call__(self, samples: list | Failure) -> dict | Failure:
        """Collate samples into a batch."""
        if isinstance(samples, Failure):
            return samples
        try:
            batch = self.collate_fn(samples)
        except (ValueError, OSError) as error:
            return Failure(portable(error))
        if get_worker_info() is not None and "labels" in batch:
            batch = {**batch, "labels": pack_labels(batch["labels"])}
        return batch


def portable(error: ValueError | OSError) -> ValueError | OSError:
    """Return an error that another process can be sent: itself, or one of its base class with its sentence."""
    try:
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    except Exception:  # whatever a class does that cannot be pickled
        pass
    return (OSError if isinstance(error, OSError) else ValueError)(str(error))


def isolate_loader_process(_: int) -> None:
    """
    Leave signals to the main process: a terminal's Ctrl-C, and the SIGTERM of a launcher, go to all processes of a
    group, and one without its loader processes cannot save.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()


class SampleLoader(DataLoader):
    """
    A loader whose errors about files and values are the same with any number of loader processes. These are started
    once, when it is first read, and end with it: where each starts by importing everything (`spawn`, `forkserver`),
    that takes longer than most evaluations.

    Raises:
        ValueError, OSError: as its dataset or collator raised it, when the batch is asked for.
    """

    def __init__(self, dataset: Dataset, collate_fn: Callable, num_workers: int, **settings: Any) -> None:
        if num_workers:
            # tokenizers warn, and stop using threads, where a process that used them is forked
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        super().__init__(
            GuardedDataset(dataset),
            collate_fn=GuardedCollator(collate_fn),
            worker_init_fn=isolate_loader_process,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else readings take numbers from the generator of weights and dropout
            **settings,
        )

    def __iter__(self) -> Iterator:
        return self._checked(super().__iter__())

    def _checked(self, batches: Iterator) -> Iterator:
        error = None
        for batch in batches:
            if isinstance(batch, Failure):
                error = batch.error
                break
            yield {**batch, "labels": unpack_labels(batch["labels"])} if "labels" in batch else batch
        # an iterator that an error's traceback keeps would be inherited by loader processes of later iterators
        del batches
        if error is not None:
            try:
                raise error
            finally:
                # the traceback would hold itself through this frame, and with it the loader, which is slow to end its
                # processes when the garbage collector finds it
                del batch, error


class TrainingData:
    """
    Batches of training, epoch by epoch, from one pool of workers.

    Order, choice of sentences and augmentation are a function of the seed and the epoch alone (`sampling`), for any
    number of workers and processes, and nothing draws from the process's own random generators. The order of a stream
    also depends on the number of workers and processes (`streams`). What does not fill a global batch waits for
    another epoch's order.

    Args:
        rows (`datasets.Dataset` or [`StreamedRows`]): see `data_scripts.FEATURES`.
        processor ([`RefTRProcessor`]): makes the batches.
        settings ([`TrainingSettings`]): the components `data` and `optimization`.
        rank, world_size (`int`): this process, and how many there are.
        with_masks (`bool`, *optional*, defaults to `False`): whether labels have masks.
        contents (`dict`, *optional*): samples of each shard of a stream, see `streams.count_together`; absent: they
            are counted here.
        learns_absence (`bool`, *optional*, defaults to `False`): whether phrases that refer to nothing are trained on,
            those of the rows and `negative_ratio` more.

    Raises:
        ValueError: if the samples do not fill one global batch.
    """

    def __init__(
        self,
        rows: datasets.Dataset | StreamedRows,
        processor: RefTRProcessor,
        settings: TrainingSettings,
        rank: int,
        world_size: int,
        with_masks: bool = False,
        contents: dict | None = None,
        learns_absence: bool = False,
    ) -> None:
        data, seed, batch_size = settings.data, settings.optimization.seed, settings.optimization.batch_size
        order = data.sentences_per_sample, seed, data.bucket_by_shape
        reader = ImageReader(processor.image_processor, data.image_cache)
        prepare = TrainingSamples(reader, data.augmentation, seed, with_masks, learns_absence)
        if isinstance(rows, StreamedRows):
            streamed = StreamedOrder(rows, *order, contents, learns_absence)
            self.sampler = StreamSampler(streamed, batch_size, rank, world_size, max(1, data.num_workers))
            dataset = StreamedDataset(streamed, prepare)
        else:
            self.sampler = EpochSampler(BuiltOrder(rows, *order, learns_absence), batch_size, rank, world_size)
            dataset = GroundingDataset(rows, prepare)
        self.loader = SampleLoader(
            dataset,
            batch_sampler=self.sampler,
            collate_fn=GroundingCollator(
                processor,
                with_masks=with_masks,
                are_resized=True,
                defers_normalization=True,
                negative_ratio=data.negative_ratio if learns_absence else 0.0,
            ),
            num_workers=data.num_workers,
        )

    @property
    def layout(self) -> tuple[int, ...]:
        """Return what the order of a stream depends on, processes and readers of a process; empty for built rows."""
        return self.sampler.layout[1:] if isinstance(self.sampler, StreamSampler) else ()

    @property
    def fingerprint(self) -> Fingerprint | StreamFingerprint:
        """Number and hash of the training rows; the first call reads all annotations."""
        return self.sampler.order.fingerprint

    def num_batches(self, epoch: int, progress: Iterable[tuple[int, ...]] = ()) -> int:
        """
        Batches of this process still to come in an epoch, the same on all processes.

        Args:
            epoch (`int`): which one.
            progress (list of `(int, int, ...)`, *optional*): what was seen of it before, in order: (batch_size *
                world_size, number of batches, and the `layout` then).
        """
        return self.sampler.num_batches(progress, epoch)

    def num_left_out(self, epoch: int, progress: Iterable[tuple[int, ...]]) -> int:
        """Return how many samples an epoch leaves out because the layout of a stream changed in it."""
        return self.sampler.plan(progress, epoch).num_left_out if self.layout else 0

    def batches(self, epoch: int, progress: Iterable[tuple[int, ...]] = ()) -> Iterator[dict]:
        """
        Yield the batches left in an epoch, as `GroundingCollator` gives them; asking for them ends those of an
        earlier call.

        Args:
            epoch, progress: see `num_batches`.
        """
        self.sampler.begin(epoch, progress)
        return iter(self.loader)


class SplitsDataset(Dataset):
    """Rows of several splits, each by the name of its split and its sample_index."""

    def __init__(self, splits: dict[str, GroundingDataset]) -> None:
        self.splits = splits

    def __getitem__(self, key: tuple[str, SampleIndex]) -> dict:
        split, sample_index = key
        return self.splits[split][sample_index]


class SplitSampler:
    """The batches of one of several splits, `split`."""

    def __init__(self, batches: dict[str, list[list[SampleIndex]]]) -> None:
        self.batches = batches
        self.split = next(iter(batches))

    def __len__(self) -> int:
        return len(self.batches[self.split])

    def __iter__(self) -> Iterator[list[tuple[str, SampleIndex]]]:
        split = self.split
        return ([(split, sample_index) for sample_index in batch] for batch in self.batches[split])


class EvaluationData:
    """
    Batches of evaluations, of several splits and any number of times, from one pool of workers. They are cut as
    `evaluation_batching` says (see `sampling.evaluation_batches`). All processes have equally many: where they do
    not come out even, some at the start are on two of them.

    Args:
        splits (`dict[str, datasets.Dataset]`): by name, see `data_scripts.FEATURES`.
        processor ([`RefTRProcessor`]): makes the batches.
        settings ([`TrainingSettings`]): the components `data` and `evaluation`.
        rank, world_size (`int`): this process, and how many there are.

    Raises:
        ValueError: if rows do not tell their order, or the image processor pads further than the batching means.
    """

    def __init__(
        self,
        splits: dict[str, datasets.Dataset],
        processor: RefTRProcessor,
        settings: TrainingSettings,
        rank: int,
        world_size: int,
    ) -> None:
        image_processor = processor.image_processor
        if settings.evaluation.evaluation_batching != "grouped" and (
            image_processor.size_divisor or image_processor.pad_size
        ):
            raise ValueError(
                f"evaluation_batching={settings.evaluation.evaluation_batching!r} pads images to the largest of their "
                f"batch, and the model's image processor pads further (size_divisor={image_processor.size_divisor}, "
                f"pad_size={image_processor.pad_size}): evaluate as 'grouped', or save the processor without them."
            )
        cache = settings.data.image_cache
        reader = read_row_image if cache is None else ImageReader(image_processor, cache)
        prepare = EvaluationSamples(reader, image_processor)
        batching = (
            settings.evaluation.evaluation_batching,
            settings.evaluation.evaluation_batch_size,
            image_processor,
            rank,
            world_size,
        )
        self.sampler = SplitSampler({name: evaluation_batches(rows, *batching) for name, rows in splits.items()})
        self.loader = SampleLoader(
            SplitsDataset({name: GroundingDataset(rows, prepare) for name, rows in splits.items()}),
            batch_sampler=self.sampler,
            collate_fn=GroundingCollator(processor, are_resized=cache is not None, defers_normalization=True),
            num_workers=settings.data.num_workers,
        )

    def batches(self, split: str) -> SampleLoader:
        """Yield the batches of this process of a split. Starting another split ends the iteration."""
        self.sampler.split = split
        return self.loader


def move(batch: dict, device: torch.device, processor: RefTRProcessor) -> dict:
    """
    Move the model inputs of a batch to a device, and normalize 8-bit images there; drop the targets, which metrics
    use.

    Args:
        batch (`dict`): made by a [`GroundingCollator`].
        device (`torch.device`): of the model.
        processor ([`RefTRProcessor`]): that of the collator.
    """
    # on a GPU the batch is in pinned memory, and the host goes on while it is copied
    is_pinned = torch.device(device).type == "cuda"

    def to_device(values: dict) -> dict:
        tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        return {name: value.to(device, non_blocking=is_pinned) for name, value in tensors.items()}

    inputs = {**to_device(batch), "labels": [to_device(label) for label in batch["labels"]]}
    if inputs["pixel_values"].dtype == torch.uint8:
        inputs["pixel_values"] = processor.image_processor.normalize_batch(
            inputs["pixel_values"], inputs.get("pixel_mask")
        )
    return inputs
