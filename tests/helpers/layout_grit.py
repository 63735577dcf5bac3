"""Generate shards of GRIT as img2dataset writes them, tars and Parquet."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


CAPTION = "a wire hanger with a paper cover that reads we heart our customers"
# the published example: the referring expression of the hanger has the paper cover in it
COVER, HANGER = [0.0196, 0.3105, 0.9622, 0.9603, 0.79298526], [0.0194, 0.0276, 0.9593, 0.9695, 0.67520964]
NOUN_CHUNKS = [[19, 32, *COVER], [0, 13, *HANGER]]
REF_EXPS = [[19, 66, *COVER], [0, 66, *HANGER]]
TWO_DOGS = [[0, 8, 0.125, 0.1, 0.375, 0.5, 0.9], [0, 8, 0.5, 0.1, 0.75, 0.5, 0.7]]
CROSSING = [[0, 8, 0.9, 0.2, 1.04, 0.6, 0.9], [0, 8, 1.01, 0.2, 1.04, 0.6, 0.8], [90, 95, 0.1, 0.1, 0.2, 0.2, 0.9]]


def jpeg(size=(40, 30), orientation=None) -> bytes:
    file, image = io.BytesIO(), Image.new("RGB", size, "gray")
    exif = image.getexif()
    if orientation:
        exif[0x0112] = orientation
    image.save(file, "JPEG", exif=exif)
    return file.getvalue()


def make_sample(key: int, caption: str = CAPTION, noun_chunks=NOUN_CHUNKS, ref_exps=REF_EXPS, **changes) -> dict:
    """Return a sample: its metadata as img2dataset has it, and `image`, the content of its file or None."""
    return {
        "id": 1795296605919 + key,
        "noun_chunks": noun_chunks,
        "ref_exps": ref_exps,
        "clip_similarity_vitb32": 0.353,
        "caption": caption,
        "url": f"https://somewhere/{key}.jpg",
        "key": f"{key:09d}",
        "status": "success",
        "error_message": None,
        "width": 40,
        "height": 30,
        "original_width": 1000,
        "original_height": 751,
        "image": jpeg(),
        **changes,
    }


def make_samples() -> list[dict]:
    """Return samples of two shards: the published example, a phrase with two boxes, and what is left out."""
    dead = {"image": None, "status": "failed_to_download", "width": None, "height": None}
    dead |= {"original_width": None, "original_height": None}
    return [
        make_sample(0),
        make_sample(1, "two dogs in the snow", TWO_DOGS, TWO_DOGS),
        make_sample(2, **dead),
        make_sample(10000, "the sea at night", CROSSING, [[0, 7, 0.2, 0.2, 0.4, 0.6, 0.9]]),
        make_sample(10001, "nothing", [[0, 7, 0.1, 0.2, 0.3, 0.4, 0.2]], []),
    ]


def write_tar(path: Path, samples: list[dict]):
    """Write the samples that have an image, three files each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for sample in samples:
            if sample["image"] is None:
                continue
            metadata = {name: value for name, value in sample.items() if name != "image"}
            files = {
                "jpg": sample["image"],
                "json": json.dumps(metadata).encode(),
                "txt": str(sample["caption"]).encode(),
            }
            for ending, content in files.items():
                entry = tarfile.TarInfo(f"{sample['key']}.{ending}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def write_parquet(path: Path, samples: list[dict], with_images: bool = True):
    """Write all samples as rows; those without an image have null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**sample, "jpg": sample["image"]} for sample in samples]
    for row in rows:
        del row["image"]
        if not with_images:
            del row["jpg"]
        for column in ("noun_chunks", "ref_exps"):
            row[column] = [np.float64(entry).tolist() for entry in row[column]]
    pq.write_table(pa.Table.from_pylist(rows), path)


def make_grit(folder: Path, ending: str = "tar", samples: list[dict] | None = None, per_shard: int = 3):
    """Write samples in shards; tars have metadata as Parquet beside them, without images."""
    samples = make_samples() if samples is None else samples
    for number, start in enumerate(range(0, len(samples), per_shard)):
        part = samples[start : start + per_shard]
        if ending == "tar":
            write_tar(folder / f"{number:05d}.tar", part)
            (folder / f"{number:05d}_stats.json").write_text("{}")
            part = make_samples()[:1]
        write_parquet(folder / f"{number:05d}.parquet", part, with_images=ending == "parquet")
