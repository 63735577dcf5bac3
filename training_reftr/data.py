"""
Rows of a data set -> batches of the model, grouped by image. No function here holds a collective: each process takes
its own part of one order that all of them know.
"""

import random
from collections.abc import Iterator

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerFast


class GroundingDataset(Dataset):
    """
    Images of a set, each with some of its sentences.

    Args:
        rows (`datasets.Dataset`): see `data_scripts.FEATURES`.
        expressions_per_image (`int`, *optional*): sentences to draw for an image; absent: all.
        seed (`int`): of the draw, which depends on nothing but (seed, epoch, index).
    """

    def __init__(self, rows, expressions_per_image: int | None = None, seed: int = 0):
        self.rows = rows
        self.expressions_per_image = expressions_per_image
        self.seed = seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: tuple[int, int]) -> dict:
        epoch, index = place
        row = self.rows[index]
        count = self.expressions_per_image
        if count is not None and count < len(row["sentences"]):
            draw = random.Random(f"{self.seed}/{epoch}/{index}")
            row["sentences"] = draw.sample(row["sentences"], count)
        return row


class EpochSampler(Sampler):
    """
    This process's part of the epoch's order, as (epoch, index): an order that is a function of (seed, epoch) alone,
    cut into global batches, each cut into one piece a process. What does not fill a global batch waits for another
    epoch's order.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.global_batch_size = batch_size * world_size
        if num_rows < self.global_batch_size:
            raise ValueError(
                f"{num_rows} training images do not fill one global batch of {self.global_batch_size} "
                f"({world_size} processes with batch_size={batch_size}); lower batch_size."
            )
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.epoch = 0

    def __len__(self) -> int:
        return self.num_rows // self.global_batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = list(range(self.num_rows))
        random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        for number in range(len(self)):
            begin = number * self.global_batch_size + self.rank * self.batch_size
            yield [(self.epoch, index) for index in order[begin : begin + self.batch_size]]


class GroundingCollator:
    """
    Rows -> what the model takes, through the processor as a user would call it.

    Returns a batch of the processor, and under `targets` a list of (sentence id, phrase number, words, types, object
    id, true box, boxes and mask, picture size) for each phrase, in the batch's order; `with_targets=False` leaves
    them out, for trainers that hand a whole batch to the model. `with_masks=True` adds `masks` to the labels of
    sentences all of whose phrases have one.
    """

    def __init__(self, processor, with_targets: bool = True, with_masks: bool = False):
        self.processor = processor
        self.with_targets = with_targets
        self.with_masks = with_masks

    def __call__(self, rows: list[dict]) -> dict:
        """Rows of the schema -> what the model takes, `labels` included, and `targets` where they are wanted."""
        texts, phrases, boxes, masks, targets = [], [], [], [], []
        whole = True
        for row in rows:
            texts.append([sentence["text"] for sentence in row["sentences"]])
            phrases.append([])
            boxes.append([])
            masks.append([])
            for sentence in row["sentences"]:
                spans = [(phrase["start"], phrase["end"]) for phrase in sentence["phrases"]]
                whole = whole and spans == [(0, len(sentence["text"]))]
                objects = [row["objects"][phrase["objects"][0]] for phrase in sentence["phrases"]]
                phrases[-1].append(spans)
                boxes[-1].append([item["box"] for item in objects])
                encoded = [item["segmentation"] for item in objects]
                masks[-1].append(None if None in encoded else encoded)
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
            images=[row["image"] for row in rows],
            text=texts,
            phrases=None if whole else phrases,
            boxes=boxes,
            masks=masks if self.with_masks else None,
            annotated_sizes=[(row["height"], row["width"]) for row in rows],
        )
        return {**batch, "targets": targets} if self.with_targets else dict(batch)


class TrainingData:
    """Batches of this process."""

    def __init__(self, rows, processor, args, rank: int, world_size: int, with_masks: bool = False):
        self.rows, self.args, self.rank, self.world_size = rows, args, rank, world_size
        self.dataset = GroundingDataset(rows, args.expressions_per_image, args.seed)
        self.collate = GroundingCollator(processor, with_masks=with_masks)
        if len(rows) < args.batch_size * world_size:
            raise ValueError("too few rows")

    def remaining(self, epoch, progress):
        """The order that is left."""
        order = list(range(len(self.rows)))
        random.Random(f"{self.args.seed}/{epoch}").shuffle(order)
        for size, count in progress:
            order = order[size * count :]
        return order

    def num_batches(self, epoch: int, progress=()) -> int:
        """Batches left."""
        return len(self.remaining(epoch, progress)) // (self.args.batch_size * self.world_size)

    def batches(self, epoch: int, progress=()):
        """Collated batches."""
        order, size = self.remaining(epoch, progress), self.args.batch_size
        mine = []
        for number in range(self.num_batches(epoch, progress)):
            begin = number * size * self.world_size + self.rank * size
            mine.append([(epoch, index) for index in order[begin : begin + size]])
        yield from DataLoader(
            self.dataset,
            batch_sampler=mine,
            collate_fn=self.collate,
            num_workers=self.args.num_workers,
            generator=torch.Generator(),
        )


def evaluation_loader(rows, processor, args, rank: int, world_size: int) -> DataLoader:
    """
    This process's share of the images, each with all its sentences. All processes have equally many, so that they run
    equally many batches: where images do not come out even, some at the start of the set are on two of them.
    """
    share = -(-len(rows) // world_size)
    mine = [(rank + number * world_size) % len(rows) for number in range(share)]
    size = args.evaluation_batch_size
    return DataLoader(
        GroundingDataset(rows),
        batch_sampler=[[(0, index) for index in mine[start : start + size]] for start in range(0, len(mine), size)],
        collate_fn=GroundingCollator(processor),
        num_workers=min(args.num_workers, 1),
    )


def train_tokenizer(sentences, max_length: int, vocab_size: int = 4000) -> PreTrainedTokenizerFast:
    """
    A small lower-casing WordPiece tokenizer, trained on sentences, with BERT's special tokens.

    Args:
        sentences (iterable of `str`): what to learn the words from.
        max_length (`int`): the longest input of the model, in tokens.
        vocab_size (`int`): at most so many tokens.
    """
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special_tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=special_tokens, show_progress=False)
    tokenizer.train_from_iterator(sentences, trainer)
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
    inputs = {name: value.to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    inputs["labels"] = [{name: value.to(device) for name, value in label.items()} for label in batch["labels"]]
    return inputs
