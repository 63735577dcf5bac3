"""
Region descriptions of Visual Genome, from the files that its authors publish:

    data_dir/
      region_descriptions.json    [{"id", "regions": [{"region_id", "phrase", "x", "y", "width", "height"}, ...]}, ...]
      image_data.json             [{"image_id", "width", "height", "coco_id", ...}, ...]
      VG_100K/  VG_100K_2/        the images, <image_id>.jpg, in either folder; or both below images/

A row is an image with an object and a sentence for each region, in the order of region_descriptions.json, which is
read image by image (it has 5.4 million regions).

About half of the images are COCO's, among them validation and test images of RefCOCO, RefCOCO+ and RefCOCOg.
Name those datasets in `exclude`, or their list of held-out images in `held_out_file`, and the images stay out.
`image_id` is "vg_<id>", or "vg_<id>_coco_<COCO's id>" (`reading.coco_id`).
"""

import json
import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from datasets.utils import tqdm

from .atomic_files import write_file
from .building import ALL_SPLITS, GroundingBuilder, Source, clip_box, fingerprint
from .kinds import DIGITS_OR_NONE, INTEGER, LIST, check_fields, check_list
from .masks import box_of
from .pickles import read_pickle
from .quoting import quote
from .reading import check_text, has_words, image_of, load_json, scan_list
from .refcoco import RefCoco, annotated_size_of, read_refs, xywh_to_xyxy
from .schema import FEATURES


# box_of, read_pickle, FEATURES: datasets <= 3.6 copies the siblings that a script itself imports, and no further
__all__ = [
    "FEATURES",
    "SOURCES",
    "VisualGenome",
    "VisualGenomeConfig",
    "box_of",
    "held_out_coco_ids",
    "read_pickle",
    "write_held_out",
]


logger = logging.getLogger(__name__)

IMAGE_FOLDERS = ("VG_100K", "VG_100K_2", "images/VG_100K", "images/VG_100K_2", "images/VG_100K_2/VG_100K_2")
DISTRIBUTION = (
    "Visual Genome's authors publish region_descriptions.json.zip, image_data.json.zip, images.zip (VG_100K) and "
    "images2.zip (VG_100K_2); extract them into data_dir."
)
IMAGES_A_SHARD = 1000


@dataclass
class VisualGenomeConfig(datasets.BuilderConfig):
    """
    Args:
        exclude (`list[str]`): datasets of the refer API, for example ["refcoco_unc", "refcocog_umd"], whose validation
            and test images are left out.
        exclude_data_dir (`str`, *optional*): the folder of their files, `data_dir` by default.
        held_out_file (`str`, *optional*): a list of COCO ids to leave out, as `write_held_out` writes it.
        validation_images (`int`): number of images selected for a split "validation"; with 0 all are in "train".
        seed (`int`): another seed selects others.
        image_dir (`str`, *optional*): one folder of all images; absent: each is looked for in `IMAGE_FOLDERS`.
    """

    exclude: list[str] = field(default_factory=list)
    exclude_data_dir: str | None = None
    held_out_file: str | None = None
    validation_images: int = 0
    seed: int = 0
    image_dir: str | None = None


class VisualGenome(GroundingBuilder):
    """Region descriptions of Visual Genome, without images that other datasets hold out."""

    BUILDER_CONFIG_CLASS = VisualGenomeConfig
    BUILDER_CONFIGS = [VisualGenomeConfig(name="visual_genome", version=GroundingBuilder.VERSION)]
    DEFAULT_CONFIG_NAME = "visual_genome"

    def __init__(self, *args: Any, hash: str | None = None, **kwargs: Any) -> None:
        excluded_from = kwargs.get("exclude_data_dir") or kwargs.get("data_dir")
        files = [] if kwargs.get("held_out_file") is None else [Path(kwargs["held_out_file"])]
        if excluded_from is not None:
            files += [refs_file(name, excluded_from) for name in kwargs.get("exclude", ())]
        super().__init__(*args, hash=fingerprint([path for path in files if path.exists()], hash), **kwargs)

    @classmethod
    def annotation_files(cls, data_dir: Path, config_name: str) -> list[Path]:
        """Return the files of regions and of images."""
        return [Path(data_dir) / "region_descriptions.json", Path(data_dir) / "image_data.json"]

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        config = self.config
        files = [] if config.data_dir is None else self.annotation_files(config.data_dir, config.name)
        self.require_files(files, DISTRIBUTION)
        regions_file, images_file = files
        images = read_images(images_file)
        held_out = self.held_out()
        dropped = Counter()
        described = set()
        spans = {}  # image id -> (first byte, number of bytes) in region_descriptions.json
        holders = ", ".join([*config.exclude, *([config.held_out_file] if config.held_out_file else [])])
        for start, length, entry in tqdm(scan_list(regions_file), desc="Reading the regions", unit=" images"):
            check_fields(entry, {"id": INTEGER, "regions": LIST}, f"{str(regions_file)!r}, the image at byte {start}")
            image = images.get(entry["id"])
            described.add(entry["id"])
            if image is None:
                dropped["images that image_data.json lacks"] += 1
            elif image["coco_id"] in held_out:
                dropped[f"images that are held out in {holders}"] += 1
            elif entry["id"] in spans:
                dropped["images that are there twice"] += 1
            else:
                spans[entry["id"]] = (start, length)
        if images.keys() - described:
            dropped["images that region_descriptions.json lacks"] = len(images.keys() - described)
        paths = self.find_image_paths(spans)
        frames = self.read_frames(
            {paths[image_id]: annotated_size_of(images[image_id]) for image_id in spans},
            f"{DISTRIBUTION} They are looked for in image_dir, or below data_dir in {', '.join(IMAGE_FOLDERS)}.",
        )
        self.report_dropped(ALL_SPLITS, dropped)
        if not spans:
            raise ValueError(
                f"No image of {str(regions_file)!r} is left; check image_data.json, exclude and held_out_file."
            )
        if not 0 <= config.validation_images < len(spans):
            raise ValueError(
                f"validation_images={config.validation_images} must be at least 0, and less than the {len(spans)} "
                "images that there are."
            )
        selected = set(random.Random(config.seed).sample(sorted(spans), config.validation_images))
        generators = []
        for split, wanted in (("train", spans.keys() - selected), ("validation", selected)):
            records = [
                {
                    "image_id": image_id,
                    "coco_id": images[image_id]["coco_id"],
                    "path": paths[image_id],
                    "frame": frames[paths[image_id]],
                    "annotated_size": annotated_size_of(images[image_id]) or frames[paths[image_id]].size,
                    "span": span,
                }
                for image_id, span in spans.items()
                if image_id in wanted
            ]
            if records:
                shards = [records[first : first + IMAGES_A_SHARD] for first in range(0, len(records), IMAGES_A_SHARD)]
                gen_kwargs = {"split": split, "regions_file": str(regions_file), "shards": shards}
                generators.append(datasets.SplitGenerator(name=split, gen_kwargs=gen_kwargs))
        return generators

    def _generate_examples(
        self, split: str, regions_file: str, shards: list[list[dict]]
    ) -> Iterator[tuple[str, dict]]:
        dropped, changed = Counter(), Counter()
        with open(regions_file, "rb") as file:
            for record in (record for shard in shards for record in shard):
                start, length = record["span"]
                file.seek(start)
                try:
                    row = make_row(record, json.loads(file.read(length))["regions"], dropped, changed)
                except ValueError as error:
                    raise ValueError(f"{regions_file!r}, image {record['image_id']}: {error}") from error
                if row["sentences"]:
                    yield row["image_id"], row
                else:
                    dropped["images without a region"] += 1
        self.report_dropped(split, dropped)
        self.report_changed(split, changed)

    def held_out(self) -> set[int]:
        """Return the COCO ids that the configuration leaves out."""
        config = self.config
        if not config.exclude and config.held_out_file is None:
            logger.warning(
                f"{config.name}: nothing is left out; validation and test images of RefCOCO, RefCOCO+ and RefCOCOg "
                'are among the images. Name the datasets that you evaluate on: exclude=["refcoco_unc", ...].'
            )
        ids = set() if config.held_out_file is None else read_held_out(config.held_out_file)
        return ids | held_out_coco_ids(config.exclude, config.exclude_data_dir or config.data_dir)

    def find_image_paths(self, image_ids: Iterable) -> dict[int, str]:
        """Return the path of each image by its id, whether or not the file exists."""
        if self.config.image_dir is not None:
            folders = [Path(self.config.image_dir)]
        else:
            folders = [Path(self.config.data_dir) / folder for folder in IMAGE_FOLDERS]
        present = {
            path.name: str(path) for folder in reversed(folders) if folder.is_dir() for path in folder.iterdir()
        }
        return {
            image_id: present.get(f"{image_id}.jpg", str(folders[0] / f"{image_id}.jpg")) for image_id in image_ids
        }


def make_row(record: dict, regions: list[dict], dropped: Counter, changed: Counter) -> dict:
    """Return the row of an image, counting the regions that are left out or changed."""
    width, height = record["frame"].size
    scale = (width / record["annotated_size"][0], height / record["annotated_size"][1])
    if scale != (1.0, 1.0):
        changed["images have another size than annotated, boxes are scaled to it"] += 1
    objects, sentences = [], []
    for number, region in enumerate(regions):
        check_fields(region, {"region_id": INTEGER}, f"region {number}")
        if not has_words(region.get("phrase")):
            dropped["regions without words"] += 1
            continue
        text = check_text(region["phrase"].strip(), f"the phrase of region {region.get('region_id')}")
        annotated_box = xywh_to_xyxy([region.get(key) for key in ("x", "y", "width", "height")], scale)
        box_xyxy = annotated_box and clip_box(annotated_box, width, height)
        if box_xyxy is None:
            dropped["regions without a box in the image"] += 1
            continue
        if box_xyxy != annotated_box:
            changed["boxes are cut at their image's edge"] += 1
        phrase = {"start": 0, "end": len(text), "objects": [len(objects)], "types": []}
        name = f"vg_{region['region_id']}"
        objects.append(
            {"object_id": name, "box": box_xyxy, "boxes": [box_xyxy], "category": None, "segmentation": None}
        )
        sentences.append({"sentence_id": name, "text": text, "phrases": [phrase]})
    coco = "" if record["coco_id"] is None else f"_coco_{record['coco_id']}"
    return {
        "image_id": f"vg_{record['image_id']}{coco}",
        "image": image_of(record["path"], record["frame"]),
        "width": width,
        "height": height,
        "objects": objects,
        "sentences": sentences,
    }


def read_images(path: Path) -> dict[int, dict]:
    """
    Return `image_data.json` by image id.

    Raises:
        OSError: if the file is missing or damaged.
        ValueError: if it is not a list of images with ids.
    """
    where = f"{str(path)!r}"
    images = {}
    for number, image in enumerate(check_list(load_json(path), where)):
        check_fields(image, {"image_id": INTEGER, "coco_id": DIGITS_OR_NONE}, f"{where}, image {number}")
        images[image["image_id"]] = {
            "width": image.get("width"),
            "height": image.get("height"),
            "coco_id": None if image["coco_id"] is None else int(image["coco_id"]),
        }
    return images


def refs_file(name: str, data_dir: str | Path) -> Path:
    """Return the file that lists which images a dataset of the refer API holds out."""
    known = [config.name for config in RefCoco.BUILDER_CONFIGS if not config.name.startswith("refclef")]
    if name not in known:
        raise ValueError(f"{name!r} is not a dataset with images of COCO; choose from: {', '.join(known)}.")
    return RefCoco.annotation_files(Path(data_dir), name)[1]


def held_out_coco_ids(names: list[str], data_dir: str | Path) -> set[int]:
    """
    Return the COCO ids of all validation and test images of datasets of the refer API.

    Args:
        names (`list[str]`): the datasets, for example ["refcoco_unc", "refcoco+_unc", "refcocog_umd"].
        data_dir (`str` or `Path`): the folder of their files.

    Raises:
        ValueError: if a dataset is not known, or its images are not COCO's.
        OSError: if a file is missing or damaged.
    """
    files = [refs_file(name, data_dir) for name in names]
    return {ref["image_id"] for path in files for ref in read_refs(path) if ref["split"] != "train"}


def write_held_out(path: str | Path, names: list[str], data_dir: str | Path) -> int:
    """
    Write a list of held-out images for `held_out_file`, so that Visual Genome is built without those
    datasets.

    Args:
        path (`str` or `Path`): the file to write, JSON: `{"sets": [...], "coco_ids": [...]}`.
        names, data_dir: see `held_out_coco_ids`.

    Returns:
        `int`: the number of images.
    """
    ids = sorted(held_out_coco_ids(names, data_dir))
    write_file(path, json.dumps({"sets": list(names), "coco_ids": ids}) + "\n")
    return len(ids)


def read_held_out(path: str | Path) -> set[int]:
    """
    Read the COCO ids of a file that `write_held_out` wrote.

    Raises:
        OSError: if it is missing or damaged.
        ValueError: if it does not contain a list of ids.
    """
    content = load_json(path)
    ids = content.get("coco_ids") if isinstance(content, dict) else None
    if not isinstance(ids, list) or not all(type(value) is int for value in ids):
        raise ValueError(
            f"{str(path)!r} contains {quote(content)}, which is not a list of held-out images: expected "
            '{"coco_ids": [1, 2, ...]}.'
        )
    return set(ids)


SOURCES = [
    Source(
        name="visual_genome",
        builder=VisualGenome,
        config_name="visual_genome",
        splits=("train",),
        files=("region_descriptions.json", "image_data.json", "VG_100K/", "VG_100K_2/"),
        distribution=DISTRIBUTION,
        counts={"train": (108077, None, None)},
        license="cc-by-4.0",
        language="en",
    )
]
