"""
Measure time and memory to build a dataset of the size of Flickr30k Entities (31,783 images with five captions and
about nine boxes each, in its authors' layout) into an empty cache, and to open it again:
`python benchmarks/data_scale_flickr.py [--images 31783] [--num_proc 1]`. The files are first generated in a
temporary folder (about 400 MB on disk).
"""

import argparse
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from data_scripts.flickr30k_entities import Flickr30kEntities


WORDS = (
    "a",
    "man",
    "in",
    "the",
    "red",
    "shirt",
    "with",
    "two",
    "small",
    "dogs",
    "on",
    "green",
    "grass",
    "near",
    "old",
)
TYPES = ("people", "clothing", "bodyparts", "animals", "vehicles", "instruments", "scene", "other", "vehicles/scene")


def write_dataset(folder: Path, num_images: int):
    """Write as many images, boxes, phrases and words as the real dataset has on average."""
    rng = random.Random(0)
    for name in ("Annotations", "Sentences", "flickr30k-images"):
        (folder / name).mkdir()
    Image.new("RGB", (500, 375), "green").save(folder / "image.jpg", quality=20)
    image = (folder / "image.jpg").read_bytes()
    image_ids = [str(100_000 + 7 * number) for number in range(num_images)]
    for number, image_id in enumerate(image_ids):
        chains = [str(8 * number + chain + 1) for chain in range(8)]
        objects = [f"<object><name>{chains[7]}</name><nobndbox>0</nobndbox><scene>1</scene></object>"]
        for index in range(9):
            x, y = rng.randint(1, 400), rng.randint(1, 300)
            bound = f"<xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + 70}</xmax><ymax>{y + 60}</ymax>"
            objects.append(f"<object><name>{chains[index % 7]}</name>\n<bndbox>{bound}</bndbox></object>")
        size = "<size><width>500</width><height>375</height><depth>3</depth></size>"
        annotation = f"<annotation><filename>{image_id}.jpg</filename>{size}{''.join(objects)}</annotation>"
        (folder / "Annotations" / f"{image_id}.xml").write_text(annotation)
        lines = []
        for _ in range(5):
            parts = []
            for chain in rng.sample(chains, 3):
                words = " ".join(rng.choices(WORDS, k=2))
                parts += [f"[/EN#{chain}/{rng.choice(TYPES)} {words}]", *rng.choices(WORDS, k=2)]
            lines.append(f"{' '.join(parts)} .\n")
        (folder / "Sentences" / f"{image_id}.txt").write_text("".join(lines))
        (folder / "flickr30k-images" / f"{image_id}.jpg").write_bytes(image)
    held_out = num_images // 32
    (folder / "val.txt").write_text("\n".join(image_ids[:held_out]))
    (folder / "test.txt").write_text("\n".join(image_ids[held_out : 2 * held_out]))
    (folder / "train.txt").write_text("\n".join(image_ids[2 * held_out :]))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", "--pictures", type=int, default=31_783)
    parser.add_argument("--num_proc", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_dataset(folder, args.images)
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            builder = Flickr30kEntities(data_dir=str(folder), cache_dir=str(folder / "cache"))
            builder.download_and_prepare(num_proc=args.num_proc)
            rows = builder.as_dataset()
            seconds.append(time.perf_counter() - start)
        counts = {split: len(part) for split, part in rows.items()}
        phrases = sum(len(s["phrases"]) for split in rows.values() for row in split["sentences"] for s in row)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    sys.stdout.write(
        f"{args.images} images, {args.num_proc} process(es): built in {seconds[0]:.1f} s (goal: under 120 s), "
        f"opened again in {seconds[1]:.2f} s, peak memory {peak / 1024:.0f} MB; rows {counts}, {phrases} phrases\n"
    )


if __name__ == "__main__":
    main()
