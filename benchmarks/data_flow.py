"""
Measure the savings of the training data flow: `python benchmarks/data_flow.py`.

- Share of padded pixels and tokens with and without buckets, on generated sizes and texts like RefCOCO's.
- Seconds to compute the order of an epoch with as many rows and sentences as Visual Genome.
- Time to read and resize a JPEG of 4000 x 3000 pixels, and to read it from the image cache.
- CPU time of a loader process per image of 640 x 480 pixels with seven expressions, and the bytes of a batch's images.

To compare two versions, run this file with each of them in `PYTHONPATH`.
"""

import io
import os
import sys
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from data_scripts import FEATURES
from modeling_reftr import RefTRImageProcessor, RefTRProcessor, open_image
from modeling_reftr.image_processing_reftr import resized_size
from training_reftr.data import TrainingData
from training_reftr.images import ImageReader
from training_reftr.sampling import BuiltOrder, EpochSampler
from training_reftr.settings import TrainingSettings
from training_reftr.tokenizer_training import train_tokenizer


# (width, height) -> percentage of images of this size; the remaining images have random sizes up to 640
SIZES = {(640, 480): 42, (640, 427): 18, (480, 640): 12, (640, 426): 6, (427, 640): 5, (500, 375): 4, (640, 640): 3}
WORDS = np.array(["man", "the", "left", "red", "umbrella", "on", "in", "shirt", "a", "second", "from", "standing"])


def make_rows(num_rows: int, sentences_per_row: float = 7.1, seed: int = 0) -> datasets.Dataset:
    """Generate rows without images, with image sizes like COCO's and texts of 1 to 30 words, 3.5 on average."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(300, 641, (num_rows, 2))
    weights = np.array([*SIZES.values(), 100 - sum(SIZES.values())]) / 100
    for row, choice in enumerate(rng.choice(len(weights), num_rows, p=weights)):
        if choice < len(SIZES):
            sizes[row] = list(SIZES)[choice]
    counts = 1 + rng.poisson(sentences_per_row - 1, num_rows)
    num_words = np.minimum(1 + rng.geometric(0.28, counts.sum()), 30)
    chosen = WORDS[rng.integers(0, len(WORDS), num_words.sum())]
    texts = [" ".join(part) for part in np.split(chosen, np.cumsum(num_words)[:-1])]
    sentences = pa.StructArray.from_arrays([pa.array(texts)], names=["text"])
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    table = pa.table(
        {
            "width": sizes[:, 0].astype(np.int32),
            "height": sizes[:, 1].astype(np.int32),
            "sentences": pa.ListArray.from_arrays(pa.array(offsets), sentences),
        }
    )
    return datasets.Dataset(table)


def padded_shares(rows, batch_size: int, world_size: int, by_shape: bool, limit: int = 8) -> tuple[float, float]:
    """Return the shares of padding in an epoch's pixels and tokens, over all processes."""
    widths, heights, sentences = rows["width"][:], rows["height"][:], rows["sentences"][:]
    sizes = [resized_size(height, width, 640, 640) for height, width in zip(heights, widths, strict=True)]
    lengths = [[len(sentence["text"].split()) + 2 for sentence in row] for row in sentences]
    order = BuiltOrder(rows, limit, 0, by_shape)
    pixels, all_pixels, tokens, all_tokens = 0, 0, 0, 0
    for rank in range(world_size):
        for batch in EpochSampler(order, batch_size, rank, world_size):
            batch_sizes = np.array([sizes[sample.index] for sample in batch])
            batch_lengths = [lengths[sample.index][index] for sample in batch for index in sample.sentences]
            pixels += batch_sizes.prod(axis=1).sum()
            all_pixels += len(batch) * batch_sizes.max(axis=0).prod()
            tokens += sum(batch_lengths)
            all_tokens += len(batch_lengths) * max(batch_lengths)
    return 1 - pixels / all_pixels, 1 - tokens / all_tokens


def make_photograph(path: Path, width: int = 4000, height: int = 3000):
    """Write a JPEG with camera-like noise."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (height // 50, width // 50, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC)).astype(np.int16)
    pixels = pixels + rng.integers(-8, 9, (height, width, 1), dtype=np.int16)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def seconds(action, rounds: int = 5) -> float:
    """Return the shortest of several times of an action."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def cache_seconds(folder: Path) -> tuple[float, float, float]:
    """Measure reading and resizing a photograph, reading it from the cache, and decoding it from a PNG instead."""
    make_photograph(folder / "photograph.jpg")
    image = {"path": str(folder / "photograph.jpg"), "bytes": None}
    row = {"image_id": "photograph", "image": image, "width": 4000, "height": 3000}
    plain = ImageReader(RefTRImageProcessor())
    cached = ImageReader(RefTRImageProcessor(), str(folder / "cache"))
    png = io.BytesIO()
    Image.fromarray(cached(row)).save(png, "PNG")
    return (
        seconds(lambda: plain(row)),
        seconds(lambda: cached(row)),
        seconds(lambda: open_image(png.getvalue())),
    )


def make_photograph_rows(folder: Path, num_rows: int = 32, num_sentences: int = 7) -> datasets.Dataset:
    """Write JPEGs of 640 x 480 pixels; return their rows, each with three objects and some expressions."""
    text = "second man from the left"
    rows = []
    for number in range(num_rows):
        path = folder / f"{number}.jpg"
        make_photograph(path, 640, 480)
        boxes = [[100.0 * index, 50, 100 * index + 200, 400] for index in range(3)]
        rows.append(
            {
                "image_id": str(number),
                "image": str(path),
                "width": 640,
                "height": 480,
                "objects": [
                    {"object_id": str(index), "box": box, "boxes": [box], "category": None, "segmentation": None}
                    for index, box in enumerate(boxes)
                ],
                "sentences": [
                    {
                        "sentence_id": f"{number}_{index}",
                        "text": text,
                        "phrases": [{"start": 0, "end": len(text), "objects": [index % 3], "types": []}],
                    }
                    for index in range(num_sentences)
                ],
                "positions": list(range(number * num_sentences, (number + 1) * num_sentences)),
            }
        )
    return datasets.Dataset.from_list(rows, features=FEATURES)


def loader_costs(rows: datasets.Dataset, augmentation: str, epochs: tuple[int, int] = (1, 7)) -> tuple[float, float]:
    """Return the CPU seconds of a loader process per image, without its start, and the megabytes of a batch."""
    processor = RefTRProcessor(RefTRImageProcessor(), train_tokenizer(WORDS, max_length=512))
    settings = TrainingSettings.from_flat(batch_size=8, num_workers=1, augmentation=augmentation)
    seconds_of = []
    for num_epochs in epochs:
        before = os.times()
        data = TrainingData(rows, processor, settings, rank=0, world_size=1)
        for epoch in range(num_epochs):
            for batch in data.batches(epoch):
                size = sum(value.nbytes for value in batch.values() if isinstance(value, torch.Tensor))
        del data  # ends its process, whose times count from then on
        after = os.times()
        seconds_of.append(sum(after[2:4]) - sum(before[2:4]))
    return (seconds_of[1] - seconds_of[0]) / (epochs[1] - epochs[0]) / len(rows), size / 1e6


def main():
    rows = make_rows(16_994)
    for limit, kind in ((8, "grouped by image"), (1, "one sentence a sample")):
        for batch_size, world_size in ((8, 1), (8, 4), (24, 1), (32, 4), (32, 8)):
            without, with_buckets = (
                padded_shares(rows, batch_size, world_size, by_shape, limit) for by_shape in (False, True)
            )
            sys.stdout.write(
                f"{kind}, {world_size} x {batch_size}: padding of pixels {without[0]:.1%} -> {with_buckets[0]:.1%}, "
                f"of tokens {without[1]:.1%} -> {with_buckets[1]:.1%}\n"
            )
    rows = make_rows(108_077, 50)
    for limit in (8, 1):
        start = time.perf_counter()
        order = BuiltOrder(rows, limit, 0, True)
        read = time.perf_counter() - start
        next(order.samples(0))
        total = time.perf_counter() - start
        sys.stdout.write(
            f"108,077 rows, {len(order.lengths):,} sentences, {order.num_samples:,} samples: read in {read:.1f} s, "
            f"first batch of an epoch after {total - read:.1f} s more\n"
        )
    with tempfile.TemporaryDirectory() as folder:
        plain, cached, png = cache_seconds(Path(folder))
    sys.stdout.write(
        f"a JPEG of 4000 x 3000: read and resized in {plain * 1000:.1f} ms, from the cache in {cached * 1000:.1f} ms "
        f"({plain / cached:.0f} times as fast); as PNG it would take {png * 1000:.1f} ms\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        rows = make_photograph_rows(Path(folder))
        for augmentation in ("none", "published", "strong"):
            cpu, size = loader_costs(rows, augmentation)
            sys.stdout.write(
                f"augmentation {augmentation}: {cpu * 1000:.1f} ms of a loader process per image of 640 x 480, "
                f"{size:.1f} MB in a batch of 8\n"
            )


if __name__ == "__main__":
    main()
