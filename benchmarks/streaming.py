"""
Measure what a stream costs, for the plan in docs/many_gpus.md: `python benchmarks/streaming.py`.

It writes Parquet files as an export does, with captions of three phrases. It prints the bytes of annotations per row,
and how many rows a CPU second counts.
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
from training_reftr.streams import StreamedRows, count_shards


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


def annotation_bytes(file: Path) -> int:
    """Return the bytes of a Parquet file that are not images."""
    metadata = pq.read_metadata(file)
    columns = [
        metadata.row_group(group).column(column)
        for group in range(metadata.num_row_groups)
        for column in range(metadata.num_columns)
    ]
    images = sum(column.total_compressed_size for column in columns if column.path_in_schema.startswith("image."))
    return file.stat().st_size - images


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = make_rows(folder, NUM_ROWS)
        (folder / "export" / "data").mkdir(parents=True)
        files = [folder / "export" / "data" / f"train-{index:05d}.parquet" for index in range(NUM_SHARDS)]
        for index, file in enumerate(files):
            write_shard((rows.shard(NUM_SHARDS, index), file, "train", True))
        annotations = sum(annotation_bytes(file) for file in files) / NUM_ROWS
        stream = open_streams(str(folder / "export"), cache_dir=str(folder / "cache"))["train"]
        stream = StreamedRows([[stream]], [1.0])
        start = time.process_time()
        count_shards(stream, 8)
        counted = NUM_ROWS / (time.process_time() - start)
    sys.stdout.write(f"{annotations:,.0f} bytes of annotations per row; a CPU second counts {counted:,.0f} rows\n")


if __name__ == "__main__":
    main()
