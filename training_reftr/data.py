"""
Rows of a data set -> batches of the model. No function here holds a collective: each process takes its own part of
one order that all of them know (`sampling`).
"""

import os
import pickle
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import datasets
import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast

from data_scripts.building import is_degenerate
from data_scripts.masks import is_empty
from modeling_reftr import RefTRProcessor
from modeling_reftr.pixels_reftr import height_and_width
from modeling_reftr.rle_reftr import from_coco_rle, to_coco_rle
from modeling_reftr.text_reftr import check_text
from training_reftr.augmentation import augment
from training_reftr.fingerprint import Fingerprint
from training_reftr.pictures import PictureReader, check_frame, read_picture
from training_reftr.sampling import BuiltOrder, EpochSampler, StreamedOrder, Visit, evaluation_batches, is_learnable
from training_reftr.settings import TrainingSettings


class GroundingDataset(Dataset):
    """
    Rows by their visit, their pictures read by the project's rule (see `pictures.read_picture`).

    Args:
        rows (`datasets.Dataset`, *optional*): see `data_scripts.FEATURES`; absent where visits bring their rows.
        reader (`Callable`): a row whose picture is not decoded -> its picture.
        prepare (`Callable`, *optional*): a read row and its visit -> the row that is learned from, or asked about.
    """

    def __init__(self, rows, reader: Callable[[dict], Image.Image], prepare=None):
        self.rows = None if rows is None else rows.cast_column("image", datasets.Image(decode=False))
        self.reader = reader
        self.prepare = prepare

    def __getitem__(self, visit: Visit) -> dict:
        row = self.rows[visit.index] if visit.row is None else visit.row
        row = {**row, "image": self.reader(row)}
        return row if self.prepare is None else self.prepare(row, visit)


class Preparation:
    """
    What becomes of a row on its way to training: the visit's sentences and their objects, at the size of the picture,
    augmented. A function of (seed, epoch, sentence) alone.
    """

    def __init__(self, image_processor, augmentation: str, seed: int, with_masks: bool):
        self.image_processor = image_processor
        self.augmentation = augmentation
        self.seed = seed
        self.with_masks = with_masks

    def __call__(self, row: dict, visit: Visit) -> dict:
        """A row with its picture at the model's size, and the visit -> the row that is learned from."""
        row = take_sentences(without_misses(row), visit.sentences)
        if not self.with_masks:
            row["objects"] = [{**item, "segmentation": None} for item in row["objects"]]
        row = fit_to_picture(row, self.image_processor)
        draw = random.Random(f"{self.seed}/{visit.epoch}/{row['sentences'][0]['sentence_id']}")
        return augment(row, self.augmentation, draw)


def without_misses(row: dict) -> dict:
    """Return a row whose sentences have no phrases that cannot be learned, see `sampling.is_learnable`."""
    if not any(is_degenerate(item["box"]) for item in row["objects"]):
        return row
    sentences = [
        {**sentence, "phrases": [phrase for phrase in sentence["phrases"] if is_learnable(phrase, row["objects"])]}
        for sentence in row["sentences"]
    ]
    return {**row, "sentences": sentences}


def prepare_evaluated(row: dict, visit: Visit) -> dict:
    """Return the row that a visit of an evaluation asks about: all of it, or the visit's sentences."""
    return take_sentences(row, visit.sentences) if visit.sentences else row


def take_sentences(row: dict, places) -> dict:
    """A row with some of its sentences, in this order, and the objects that they name."""
    sentences = [row["sentences"][place] for place in places]
    named = sorted({index for item in sentences for phrase in item["phrases"] for index in phrase["objects"]})
    new_index = {index: number for number, index in enumerate(named)}
    return {
        **row,
        "objects": [row["objects"][index] for index in named],
        "sentences": [
            {
                **sentence,
                "phrases": [
                    {**phrase, "objects": [new_index[index] for index in phrase["objects"]]}
                    for phrase in sentence["phrases"]
                ],
            }
            for sentence in sentences
        ],
    }


def fit_to_picture(row: dict, image_processor) -> dict:
    """A row whose picture was resized, with its size, boxes and masks at that of the picture."""
    old_size, new_size = (row["height"], row["width"]), height_and_width(row["image"])
    if old_size == new_size:
        return row
    limits = np.array([old_size[1], old_size[0]] * 2, dtype=np.float64)
    scale = np.array([new_size[1], new_size[0]] * 2) / limits

    def fit(item: dict) -> dict:
        # what passes the edge by a pixel, as annotations may, is cut there before it grows
        box, *boxes = [
            np.clip(box, 0, limits) if np.all(np.abs(box - np.clip(box, 0, limits)) <= 1) else box
            for box in map(np.float64, [item["box"], *item["boxes"]])
        ]
        segmentation = item["segmentation"]
        if segmentation is not None:
            mask = from_coco_rle(segmentation)[None]
            size = {"height": new_size[0], "width": new_size[1]}
            segmentation = to_coco_rle(image_processor.resize_masks(mask, new_size, size, do_resize=True)[0])
        moved = {"box": (box * scale).tolist(), "boxes": [(box * scale).tolist() for box in boxes]}
        return {**item, **moved, "segmentation": segmentation}

    return {**row, "height": new_size[0], "width": new_size[1], "objects": [fit(item) for item in row["objects"]]}


class GroundingCollator:
    """
    Rows -> what the model takes, through the processor as a user would call it.

    Returns a batch of the processor, and under `targets` a list of (sentence id, phrase number, words, types, object
    id, true box, boxes and mask, picture size) for each phrase, in the batch's order. `with_targets=False`, for
    trainers that hand a whole batch to the model, leaves them out and adds to each sentence's label the `size`
    (height, width) of its picture in the batch, without padding. `with_masks=True` adds `masks` to the labels of
    sentences all of whose phrases have one with a pixel in it. Beside targets, a sentence with a box without extent,
    which an evaluation asks for, has labels without boxes. `are_resized=True` takes pictures that have the model's
    size already, and brings boxes and masks to it.
    """

    def __init__(self, processor, with_targets: bool = True, with_masks: bool = False, are_resized: bool = False):
        self.processor = processor
        self.are_resized = are_resized
        self.with_targets = with_targets
        self.with_masks = with_masks

    def __call__(self, rows: list[dict]) -> dict:
        """Rows of the schema -> what the model takes, `labels` included, and `targets` where they are wanted."""
        texts, phrases, boxes, masks, targets = [], [], [], [], []
        whole = True
        image_processor = self.processor.image_processor
        images = image_processor.open_images(
            [row["image"] for row in rows], [(row["height"], row["width"]) for row in rows]
        )
        for row, image in zip(rows, images, strict=True):
            if not self.are_resized:
                check_frame(row, image)
            fitted = fit_to_picture({**row, "image": image}, image_processor)
            texts.append([sentence["text"] for sentence in row["sentences"]])
            phrases.append([])
            boxes.append([])
            masks.append([])
            for sentence in row["sentences"]:
                check_text(sentence["text"], f"The text of sentence {sentence['sentence_id']!r}")
                spans = [(phrase["start"], phrase["end"]) for phrase in sentence["phrases"]]
                whole = whole and spans == [(0, len(sentence["text"]))]
                objects = [row["objects"][phrase["objects"][0]] for phrase in sentence["phrases"]]
                phrases[-1].append(spans)
                seen = [fitted["objects"][phrase["objects"][0]] for phrase in sentence["phrases"]]
                is_asked_only = self.with_targets and any(is_degenerate(item["box"]) for item in seen)
                boxes[-1].append(None if is_asked_only else [item["box"] for item in seen])
                encoded = [item["segmentation"] for item in seen]
                masks[-1].append(None if any(mask is None or is_empty(mask) for mask in encoded) else encoded)
                targets.append(
                    [
                        {
                            "image_id": row["image_id"],
                            "sentence_id": sentence["sentence_id"],
                            "phrase": number,
                            "words": sentence["text"][phrase["start"] : phrase["end"]],
                            "types": phrase["types"],
                            "object_id": item["object_id"],
                            "box": item["box"],
                            "boxes": item["boxes"],
                            "segmentation": item["segmentation"],
                            "image_size": (row["height"], row["width"]),
                        }
                        for number, (phrase, item) in enumerate(zip(sentence["phrases"], objects, strict=True))
                    ]
                )
        batch = self.processor(
            images=images,
            text=texts,
            phrases=None if whole else phrases,
            boxes=boxes,
            masks=masks if self.with_masks else None,
            **({"do_resize": False} if self.are_resized else {}),
        )
        if self.with_targets:
            return {**batch, "targets": targets}
        # a trainer's metrics see the labels, and of the inputs nothing
        sizes = torch.stack([batch["pixel_mask"].amax(axis).sum(1) for axis in (2, 1)], dim=1)
        for label, size in zip(batch["labels"], sizes[batch["image_index"]], strict=True):
            label["size"] = size
        return dict(batch)


class Failure(NamedTuple):
    """In place of a batch: why it could not be made."""

    error: ValueError | OSError


class GuardedDataset(Dataset):
    """A dataset whose errors about files and values come as values, which loader processes hand on as they are."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitems__(self, indices: list) -> list | Failure:
        """The samples of a batch."""
        try:
            return [self.dataset[index] for index in indices]
        except (ValueError, OSError) as error:
            return Failure(portable(error))


class GuardedCollator:
    """A collator that hands a `Failure` on, and makes one of its own errors about files and values."""

    def __init__(self, collate_fn: Callable):
        self.collate_fn = collate_fn

    def __call__(self, samples: list | Failure) -> dict | Failure:
        """The batch of samples."""
        if isinstance(samples, Failure):
            return samples
        try:
            return self.collate_fn(samples)
        except (ValueError, OSError) as error:
            return Failure(portable(error))


def portable(error: ValueError | OSError) -> ValueError | OSError:
    """Return an error that another process can be sent: itself, or one of its base class with its sentence."""
    try:
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    except Exception:  # whatever a class does that cannot be pickled
        pass
    return (OSError if isinstance(error, OSError) else ValueError)(str(error))


def isolate_loader_process(_: int):
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

    def __init__(self, dataset: Dataset, collate_fn: Callable, num_workers: int, **settings):
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
            yield batch
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
    number of workers and processes, and nothing draws from the process's own random generators. What does not fill a
    global batch waits for another epoch's order.

    Args:
        rows (`datasets.Dataset` or `datasets.IterableDataset`): see `data_scripts.FEATURES`. A stream is read through
            once to count its samples, which takes no picture's decoding.
        processor ([`RefTRProcessor`]): makes the batches.
        settings ([`TrainingSettings`]): the components `data` and `optimization`.
        rank, world_size (`int`): this process, and how many there are.
        with_masks (`bool`, *optional*, defaults to `False`): whether labels have masks.

    Raises:
        ValueError: if the samples do not fill one global batch.
    """

    def __init__(
        self,
        rows: datasets.Dataset | datasets.IterableDataset,
        processor: RefTRProcessor,
        settings: TrainingSettings,
        rank: int,
        world_size: int,
        with_masks: bool = False,
    ):
        is_streamed = isinstance(rows, datasets.IterableDataset)
        order = (StreamedOrder if is_streamed else BuiltOrder)(
            rows,
            settings.data.expressions_per_image if settings.data.group_by_image else 1,
            settings.optimization.seed,
            settings.data.bucket_by_shape,
        )
        self.sampler = EpochSampler(order, settings.optimization.batch_size, rank, world_size)
        image_processor = processor.image_processor
        self.loader = SampleLoader(
            GroundingDataset(
                None if is_streamed else rows,
                PictureReader(image_processor, settings.data.image_cache),
                Preparation(image_processor, settings.data.augmentation, settings.optimization.seed, with_masks),
            ),
            batch_sampler=self.sampler,
            collate_fn=GroundingCollator(processor, with_masks=with_masks, are_resized=True),
            num_workers=settings.data.num_workers,
        )

    @property
    def fingerprint(self) -> Fingerprint:
        """Number and hash of the training rows; the first call reads all annotations."""
        return self.sampler.order.fingerprint

    def num_batches(self, epoch: int, progress: Iterable[tuple[int, int]] = ()) -> int:
        """
        Batches of this process still to come in an epoch, the same on all processes.

        Args:
            epoch (`int`): which one.
            progress (list of `(int, int)`, *optional*): what was seen of it before, in order: (batch_size *
                world_size, number of batches).
        """
        return self.sampler.num_batches(progress)

    def batches(self, epoch: int, progress: Iterable[tuple[int, int]] = ()) -> Iterator[dict]:
        """
        The batches still to come in an epoch, as `GroundingCollator` gives them; asking for them ends those of an
        earlier call.

        Args:
            epoch, progress: see `num_batches`.
        """
        self.sampler.begin(epoch, progress)
        return iter(self.loader)


class SplitsDataset(Dataset):
    """Rows of several splits, each by the name of its split and its visit."""

    def __init__(self, splits: dict[str, GroundingDataset]):
        self.splits = splits

    def __getitem__(self, place: tuple[str, Visit]) -> dict:
        split, visit = place
        return self.splits[split][visit]


class SplitSampler:
    """The batches of one of several splits, `split`."""

    def __init__(self, batches: dict[str, list[list[Visit]]]):
        self.batches = batches
        self.split = next(iter(batches))

    def __len__(self) -> int:
        return len(self.batches[self.split])

    def __iter__(self) -> Iterator[list[tuple[str, Visit]]]:
        split = self.split
        return ([(split, visit) for visit in batch] for batch in self.batches[split])


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
    ):
        image_processor = processor.image_processor
        if settings.evaluation.evaluation_batching != "grouped" and (
            image_processor.size_divisor or image_processor.pad_size
        ):
            raise ValueError(
                f"evaluation_batching={settings.evaluation.evaluation_batching!r} pads images to the largest of their "
                f"batch, and the model's image processor pads further (size_divisor={image_processor.size_divisor}, "
                f"pad_size={image_processor.pad_size}): evaluate as 'grouped', or save the processor without them."
            )
        reader = (
            read_picture
            if settings.data.image_cache is None
            else PictureReader(image_processor, settings.data.image_cache)
        )
        batching = (
            settings.evaluation.evaluation_batching,
            settings.evaluation.evaluation_batch_size,
            image_processor,
            rank,
            world_size,
        )
        self.sampler = SplitSampler({name: evaluation_batches(rows, *batching) for name, rows in splits.items()})
        self.loader = SampleLoader(
            SplitsDataset({name: GroundingDataset(rows, reader, prepare_evaluated) for name, rows in splits.items()}),
            batch_sampler=self.sampler,
            collate_fn=GroundingCollator(processor, are_resized=settings.data.image_cache is not None),
            num_workers=settings.data.num_workers,
        )

    def batches(self, split: str) -> SampleLoader:
        """This process's batches of a split. Asking for those of another one ends it."""
        self.sampler.split = split
        return self.loader


def train_tokenizer(sentences, max_length: int, vocab_size: int = 4000) -> PreTrainedTokenizerFast:
    """
    A small lower-casing WordPiece tokenizer with BERT's special tokens: the characters of the sentences, and their
    most frequent words. The same sentences always give the same one, on every process; the trainer of the tokenizers
    library breaks ties at random.

    Args:
        sentences (iterable of `str`): what to learn the words from.
        max_length (`int`): the longest input of the model, in tokens.
        vocab_size (`int`): at most so many tokens, unless there are more characters.
    """
    normalizer, pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    counts = Counter(
        word
        for sentence in sentences
        for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(sentence))
    )
    characters = sorted({character for word in counts for character in word})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *characters, *(f"##{character}" for character in characters)]
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    pieces += words[: max(0, vocab_size - len(pieces))]
    tokenizer = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


def all_sentences(rows) -> Iterator[str]:
    """Every sentence of a set, without reading its pictures."""
    for sentences in rows.select_columns("sentences"):
        for sentence in sentences["sentences"]:
            yield sentence["text"]


def move(batch: dict, device: torch.device) -> dict:
    """The model's inputs of a batch on a device; targets are for the metrics and stay."""
    # on a GPU the batch is in pinned memory, and the host goes on while it is copied
    is_pinned = torch.device(device).type == "cuda"

    def to_device(values: dict) -> dict:
        tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        return {name: value.to(device, non_blocking=is_pinned) for name, value in tensors.items()}

    return {**to_device(batch), "labels": [to_device(label) for label in batch["labels"]]}
