"""
Measure what a stream costs, for the plan in docs/many_gpus.md: `python benchmarks/streaming.py`.

It writes Parquet files as an export does, with JPEGs of 640 x 480 pixels and captions of three phrases. It prints the
bytes of annotations and images per row, and how many rows a CPU second counts, or reads with their images.
"""

import os
import sys
import tempfile
import time
from pathlib import Path


os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

import datasets
import numpy as np
import pyarrow.parquet as pq

from benchmarks.data_flow import WORDS, make_photograph
from data_scripts import FEATURES
from data_scripts.exporting import write_shard
from data_scripts.streaming import open_streams
from training_reftr.streams import StreamedOrder, StreamedRows, StreamSampler, count_shards


NUM_ROWS, NUM_SHARDS, NUM_PHOTOGRAPHS = 1000, 2, 16


def make_rows(folder: Path, num_rows: int) -> datasets.Dataset:
    """Return rows of photographs, each with a caption of 12 words and the boxes of three of its phrases."""
    rng = np.random.default_rng(0)
    for number in range(NUM_PHOTOGRAPHS):
        make_photograph(folder / f"{number}.jpg", 640, 480)
    rows = []
    for number in range(num_rows):
        words = [str(word) for word in rng.choice(WORDS, 12)]
        ends = np.cumsum([len(word) + 1 for word in words]) - 1
        boxes = [[float(value) for value in (*xy, *(xy + 200))] for xy in rng.uniform(0, 250, (3, 2))]
        phrases = [
            {"start": int(ends[4 * index] + 1), "end": int(ends[4 * index + 2]), "objects": [index], "types": []}
            for index in range(3)
        ]
        objects = [
            {"object_id": f"{number}_{index}", "box": box, "boxes": [box], "category": None, "segmentation": None}
            for index, box in enumerate(boxes)
        ]
        sentence = {"sentence_id": str(number), "text": " ".join(words), "phrases": phrases}
        image = str(folder / f"{number % NUM_PHOTOGRAPHS}.jpg")
        row = {"image_id": f"{number:09d}", "image": image, "width": 640, "height": 480, "positions": None}
        rows.append({**row, "objects": objects, "sentences": [sentence]})
    return datasets.Dataset.from_list(rows, features=FEATURES)


def column_bytes(file: Path) -> tuple[int, int]:
    """Return the bytes of a Parquet file that are not images, and those that are."""
    metadata = pq.read_metadata(file)
    columns = [
        metadata.row_group(group).column(column)
        for group in range(metadata.num_row_groups)
        for column in range(metadata.num_columns)
    ]
    images = sum(column.total_compressed_size for column in columns if column.path_in_schema.startswith("image."))
    return file.stat().st_size - images, images


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = make_rows(folder, NUM_ROWS)
        (folder / "export" / "data").mkdir(parents=True)
        files = [folder / "export" / "data" / f"train-{index:05d}.parquet" for index in range(NUM_SHARDS)]
        for index, file in enumerate(files):
            write_shard((rows.shard(NUM_SHARDS, index), file, "train", True))
        annotations, images = np.sum([column_bytes(file) for file in files], axis=0) / NUM_ROWS
        stream = open_streams(str(folder / "export"), cache_dir=str(folder / "cache"))["train"]
        stream = StreamedRows([[stream]], [1.0])
        start = time.process_time()
        contents = count_shards(stream, 8)
        counted = NUM_ROWS / (time.process_time() - start)
        order = StreamedOrder(stream, 8, 0, True, contents)
        start = time.process_time()
        (lane,) = {ticket.lane for (ticket,) in StreamSampler(order, 8, 0, 1, 1)}
        num_read = sum(1 for _ in order.samples(lane))
        read = num_read / (time.process_time() - start)
    sys.stdout.write(
        f"{annotations:,.0f} bytes of annotations and {images:,.0f} of image per row; a CPU second counts "
        f"{counted:,.0f} rows, or reads {read:,.0f} rows with their images, which are not decoded\n"
    )


if __name__ == "__main__":
    main()
