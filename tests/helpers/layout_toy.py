"""A minimal dataset source and its files, to test the dataset commands with any builder."""

import dataclasses
import json
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from data_scripts import SOURCES
from data_scripts.building import GroundingBuilder, Source


SPLITS = ("train", "testA")


@dataclasses.dataclass
class ToyConfig(datasets.BuilderConfig):
    """
    Args:
        limit (`int`): maximum number of rows per split, 0 for all.
        prefix (`str`): prefix of every text.
    """

    limit: int = 0
    prefix: str = ""


class Toy(GroundingBuilder):
    """Yield the rows of `<split>.json`, with images in `pictures/`."""

    BUILDER_CONFIG_CLASS = ToyConfig
    BUILDER_CONFIGS = [ToyConfig(name="toy")]
    DEFAULT_CONFIG_NAME = "toy"

    @classmethod
    def annotation_files(cls, data_dir, config_name):
        return [Path(data_dir) / f"{split}.json" for split in SPLITS]

    def _split_generators(self, dl_manager):
        self.require_files(self.annotation_files(self.config.data_dir or "", "toy"), "Ask the tests.")
        generators = []
        for split in SPLITS:
            rows = json.loads((Path(self.config.data_dir) / f"{split}.json").read_text())
            self.require_images([Path(self.config.data_dir) / row["image"] for row in rows], "Ask the tests.")
            generators.append(
                datasets.SplitGenerator(name=split, gen_kwargs={"rows": rows[: self.config.limit or None]})
            )
        return generators

    def _generate_examples(self, rows):
        for index, row in enumerate(rows):
            if row["image_id"] == "raises":
                raise ValueError("The row 'raises' cannot be read: take it out.")
            row["image"] = str(Path(self.config.data_dir) / row["image"])
            for sentence in row["sentences"]:
                sentence["text"] = self.config.prefix + sentence["text"]
            yield index, row


SOURCES["toy"] = Source(
    name="toy",
    builder=Toy,
    config_name="toy",
    splits=SPLITS,
    files=("train.json", "testA.json", "pictures/"),
    distribution="Its files are made by the tests.",
    counts={"train": (6, 6, 6), "testA": (2, None, None)},
)


def make_row(split: str, index: int, size=(48, 32)) -> dict:
    """Return a row with one object and one expression about it."""
    width, height = size
    mask = np.zeros((height, width), np.uint8)
    mask[8:20, 10:30] = 1
    counts = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
    name = f"{split}_{index}"
    text = f"the bright patch of picture {index}"
    return {
        "image_id": name,
        "image": f"pictures/{name}.jpg",
        "width": width,
        "height": height,
        "objects": [
            {
                "object_id": f"{name}_0",
                "box": [10.4, 8.2, 29.8, 20.0],
                "boxes": [[10.4, 8.2, 29.8, 20.0]],
                "category": "patch",
                "segmentation": {"size": [height, width], "counts": counts},
            }
        ],
        "sentences": [
            {
                "sentence_id": f"{name}_s0",
                "text": text,
                "phrases": [{"start": 0, "end": len(text), "objects": [0], "types": []}],
            }
        ],
    }


def save_picture(path: Path, size=(48, 32), seed=0, **settings):
    """Save an image of noise with a bright patch in the box of `make_row`."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 120, (size[1], size[0], 3), dtype=np.uint8)
    pixels[8:20, 10:30] += 110
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **settings)


def make_toy(folder: Path, rows: dict | None = None) -> dict:
    """Write `<split>.json` and the images of rows, by default six and two valid ones, and return the rows."""
    if rows is None:
        rows = {"train": [make_row("train", i) for i in range(6)], "testA": [make_row("testA", i) for i in range(2)]}
    for split, items in rows.items():
        (folder / f"{split}.json").write_text(json.dumps(items))
        for seed, row in enumerate(items):
            save_picture(folder / row["image"], seed=seed)
    return rows
