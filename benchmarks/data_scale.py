"""
Measure time and memory to build RefCOCO and Visual Genome, and to load them again: `python benchmarks/data_scale.py`.

The datasets are generated, in their authors' layout and with their size: RefCOCO with 20,000 images, 196,771
annotations with polygons, 50,000 of them referred to, and 142,210 expressions; Visual Genome with 108,077 images and
5.4 million regions (`--genome_share 0.2` for a fifth of them). All images are hard links to a JPEG of 640 x 480. Each
measurement runs in a separate process; no image is decoded.
"""

import argparse
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image


WIDTH, HEIGHT = 640, 480
REFCOCO = {"images": 20_000, "annotations": 196_771, "objects": 50_000, "expressions": 142_210}
GENOME = {"images": 108_077, "regions": 5_400_000}
GOALS = {"RefCOCO, build": "goal: under 45 s, 2 GB", "RefCOCO, load again": "goal: load under 2 s"}
GOALS["Visual Genome, build"] = "goal: under 3 GB"
WORDS = ("the", "man", "woman", "left", "right", "red", "blue", "shirt", "on", "of", "with", "bench", "behind", "dog")
# imports count for memory but not for time, because a user's script imports the package anyway
MEASURE = """
import json, resource, sys, time
start = time.perf_counter()
import data_scripts
imported, cpu = time.perf_counter(), time.process_time()
rows = data_scripts.load(sys.argv[1], **json.loads(sys.argv[2]))
end, cpu = time.perf_counter(), time.process_time() - cpu
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sys.stdout.write(json.dumps({
    "import": imported - start, "load": end - imported, "cpu": cpu, "gigabytes": peak / 1e6,
    "rows": {split: len(part) for split, part in rows.items()},
    "sentences": sum(len(item) for part in rows.values() for batch in part.select_columns(["sentences"])
                     .with_format("arrow").iter(1000) for item in batch["sentences"]),
}))
"""


def make_text(rng: random.Random, least: int, most: int) -> str:
    """Generate a text of random words."""
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


def link_images(folder: Path, names, content: bytes | None = None):
    """Link a JPEG, by default one of noise, under several names."""
    folder.mkdir(parents=True)
    if content is None:
        noise, file = np.random.default_rng(0).integers(0, 255, (HEIGHT // 8, WIDTH // 8, 3), np.uint8), io.BytesIO()
        Image.fromarray(noise).resize((WIDTH, HEIGHT)).save(file, "JPEG")
        content = file.getvalue()
    for index, name in enumerate(names):
        if index % 30_000 == 0:  # file systems limit the number of links per file
            source = folder.with_name(f"{folder.name}_{index}.jpg")
            source.write_bytes(content)
        os.link(source, folder / name)


def make_polygon(rng: random.Random) -> tuple[list, list]:
    """Generate an irregular outline of about 40 points, like annotated ones, and its box xywh."""
    x, y, radius = rng.uniform(80, WIDTH - 80), rng.uniform(80, HEIGHT - 80), rng.uniform(10, 75)
    polygon = []
    count = rng.randint(15, 60)
    for index in range(count):
        distance, angle = radius * rng.uniform(0.7, 1), 2 * math.pi * index / count
        polygon += [round(x + distance * math.cos(angle), 2), round(y + distance * math.sin(angle), 2)]
    left, top = min(polygon[::2]), min(polygon[1::2])
    return polygon, [left, top, round(max(polygon[::2]) - left, 2), round(max(polygon[1::2]) - top, 2)]


def make_refcoco(folder: Path):
    """Write RefCOCO's files in the layout of the refer API."""
    rng = random.Random(0)
    ids = sorted(rng.sample(range(1, 581_930), REFCOCO["images"]))
    link_images(folder / "images" / "train2014", (f"COCO_train2014_{number:012d}.jpg" for number in ids))
    annotations = []
    for index in range(REFCOCO["annotations"]):
        polygon, box_xywh = make_polygon(rng)
        annotations.append(
            {
                "id": index + 1,
                "image_id": ids[index % len(ids)],
                "category_id": index % 80 + 1,
                "bbox": box_xywh,
                "segmentation": [polygon],
                "area": box_xywh[2] * box_xywh[3],
                "iscrowd": 0,
            }
        )
    refs, sent_id = [], 0
    for index, annotation in enumerate(annotations[: REFCOCO["objects"]]):
        image = index % len(ids)
        split = "val" if image < 1500 else "testA" if image < 2250 else "testB" if image < 3000 else "train"
        count = (index + 1) * REFCOCO["expressions"] // REFCOCO["objects"] - sent_id
        sentences = []
        for _ in range(count):
            text = make_text(rng, 2, 6)
            sentences.append({"tokens": text.split(), "raw": text, "sent": text, "sent_id": sent_id})
            sent_id += 1
        refs.append(
            {
                "ref_id": index,
                "ann_id": annotation["id"],
                "category_id": annotation["category_id"],
                "image_id": annotation["image_id"],
                "file_name": f"COCO_train2014_{annotation['image_id']:012d}_{index}.jpg",
                "split": split,
                "sent_ids": [sentence["sent_id"] for sentence in sentences],
                "sentences": sentences,
            }
        )
    images = [
        {"id": number, "width": WIDTH, "height": HEIGHT, "file_name": f"COCO_train2014_{number:012d}.jpg"}
        for number in ids
    ]
    categories = [{"id": number, "name": f"thing {number}"} for number in range(1, 81)]
    (folder / "refcoco").mkdir()
    (folder / "refcoco" / "instances.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    (folder / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=0))


def make_genome(folder: Path, share: float):
    """Write a share of Visual Genome's files."""
    rng = random.Random(0)
    count = round(GENOME["images"] * share)
    regions = round(GENOME["regions"] * share)
    names = [f"{number}.jpg" for number in range(1, count + 1)]
    link_images(folder / "VG_100K", names[: count // 2])
    link_images(folder / "VG_100K_2", names[count // 2 :])
    written = 0
    with open(folder / "region_descriptions.json", "w") as file:
        for number in range(1, count + 1):
            entry = {"regions": [], "id": number}
            for _ in range(number * regions // count - written):
                written += 1
                entry["regions"].append(
                    {
                        "region_id": written,
                        "width": rng.randint(10, 300),
                        "height": rng.randint(10, 200),
                        "image_id": number,
                        "phrase": make_text(rng, 3, 8),
                        "y": rng.randint(0, 250),
                        "x": rng.randint(0, 300),
                    }
                )
            file.write(("[" if number == 1 else ", ") + json.dumps(entry))
        file.write("]")
    images = [
        {
            "width": WIDTH,
            "url": f"https://cs.stanford.edu/people/rak248/VG_100K_2/{number}.jpg",
            "height": HEIGHT,
            "image_id": number,
            "coco_id": number if number % 2 else None,
            "flickr_id": None,
        }
        for number in range(1, count + 1)
    ]
    (folder / "image_data.json").write_text(json.dumps(images))


def run_in_process(make, *args):
    """Run a function in a separate process, because a child process inherits the peak memory of its parent."""
    process = multiprocessing.get_context("spawn").Process(target=make, args=args)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{make.__name__} ended with {process.exitcode}")


def measure(title: str, name: str, folder: Path):
    """Load a dataset in a separate process and print its time and memory."""
    settings = {"data_dir": str(folder), "cache_dir": str(folder / "cache")}
    command = [sys.executable, "-c", MEASURE, name, json.dumps(settings)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    result = json.loads(output)
    sys.stdout.write(
        f"{title}: {result['load']:.1f} s, of them {result['cpu']:.1f} s on the processor "
        f"(imports: {result['import']:.1f} s), {result['gigabytes']:.2f} GB at most; "
        f"{sum(result['rows'].values()):,} rows {result['rows']}, "
        f"{result['sentences']:,} sentences{f' ({GOALS[title]})' if title in GOALS else ''}\n"
    )
    sys.stdout.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--genome_share", type=float, default=1.0, help="share of Visual Genome's size; 0 skips it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        refcoco = Path(folder) / "refcoco"
        run_in_process(make_refcoco, refcoco)
        measure("RefCOCO, build", "refcoco_unc", refcoco)
        measure("RefCOCO, load again", "refcoco_unc", refcoco)
        if args.genome_share:
            genome = Path(folder) / "genome"
            run_in_process(make_genome, genome, args.genome_share)
            size = (genome / "region_descriptions.json").stat().st_size / 1e6
            sys.stdout.write(f"region_descriptions.json: {size:,.0f} MB\n")
            measure("Visual Genome, build", "visual_genome", genome)
            measure("Visual Genome, load again", "visual_genome", genome)


if __name__ == "__main__":
    main()
