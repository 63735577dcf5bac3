"""
The indexes that the published RefTR was trained with, in its folder tree as it stands:

    data_dir/
        annotations/flickr/flickr_<split>.pth                captions of Flickr30k Entities with their phrases
        annotations_resc/<set>/<set>_<split>.pth             the index of ReSC: expressions and boxes
        refcoco/anns/<set>/<set>_<split by>_<split>.pth      expressions, boxes and masks
        refcoco/masks/<set>/<mask>.npy                       H x W, not 0 where the object is
        flickr30k/f30k_images  refcoco/images/train2014  referit/images  visualgenome/VG_100K

The indexes are lists of tuples written by `torch.save`, read here without running what else they may hold, and without
torch. They name no objects: expressions of a picture that share a box (and a mask) speak of one object. Boxes stay as
they are, fractions of pixels included; the published loaders cut them to whole pixels (`integer_boxes`).
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import datasets
import numpy as np
from pycocotools import mask as coco_mask

from .building import GroundingBuilder, Source, clip_boxes
from .reading import read_pickle, upright_size
from .schema import FEATURES  # noqa: F401  datasets <= 3.6 copies only what a script itself imports


DISTRIBUTION = (
    "The indexes and masks are linked in the README of https://github.com/ubc-vision/RefTR (annotations, refcoco/masks, "
    "refcoco/anns, annotations_resc/vg) and of https://github.com/zyang-ur/ReSC (annotations_resc); the pictures are "
    "those of COCO train2014, Flickr30k, ReferItGame and Visual Genome, in the folders of the first README's tree."
)
FLICKR_IMAGES = ("flickr30k/f30k_images",)
COCO_IMAGES = ("refcoco/images/train2014",)
TRAIN_VAL_TEST = ("train", "val", "test", "trainval")
TRAIN_VAL_A_B = ("train", "val", "testA", "testB", "trainval")

# what the items of a record are, in order; None: not read
RESC_SHORT = ("image", "box", "text")
RESC_LONG = ("image", None, "box", "text", None)
CAPTION = ("image", "starts", "boxes", "phrases", None, "text")
MASK = ("image", "mask", "box", "text")


@dataclass
class RefTRIndexConfig(datasets.BuilderConfig):
    """
    Args:
        image_dir (`str`, *optional*): folder of the pictures, in `data_dir` or absolute; absent: the published one.
        integer_boxes (`bool`): cut the figures of boxes to whole pixels as the published loaders do, before width and
            height are added to x and y.
        stem (`str`): the index files in `data_dir` without `_<split>.pth`. This and what follows is set by the name.
        splits (`tuple[str, ...]`): its splits. trainval is train and val together, but a file of its own in referit.
        image_dirs (`tuple[str, ...]`): where its pictures are.
        layout (`tuple[str | None, ...]`): what the items of a record are.
        box_format (`str`): "xyxy" or "xywh".
    """

    image_dir: str | None = None
    integer_boxes: bool = False
    stem: str = ""
    splits: tuple[str, ...] = ()
    image_dirs: tuple[str, ...] = ()
    layout: tuple[str | None, ...] = ()
    box_format: str = "xyxy"

    def split_files(self, split: str) -> list[str]:
        """The index files of a split, relative to `data_dir`."""
        parts = ("train", "val") if split == "trainval" and "referit" not in self.name else (split,)
        return [f"{self.stem}_{part}.pth" for part in parts]

    @property
    def mask_dir(self) -> str | None:
        """The folder of the masks in `data_dir`, if there are masks."""
        return f"refcoco/masks/{PurePosixPath(self.stem).parent.name}" if "mask" in self.layout else None


def configurations() -> list[RefTRIndexConfig]:
    """The sets that there are, by name: `resc_...` for the index of ReSC, `reftr_...` for RefTR's own."""
    resc = {
        "flickr": (TRAIN_VAL_TEST, FLICKR_IMAGES, RESC_SHORT, "xyxy"),
        "vg": (("all",), ("visualgenome/VG_100K", "visualgenome/VG_100K_2"), RESC_SHORT, "xywh"),
        "referit": (TRAIN_VAL_TEST, ("referit/images",), RESC_LONG, "xyxy"),
        "unc": (TRAIN_VAL_A_B, COCO_IMAGES, RESC_LONG, "xywh"),
        "unc+": (TRAIN_VAL_A_B, COCO_IMAGES, RESC_LONG, "xywh"),
        "gref": (("train", "val"), COCO_IMAGES, RESC_LONG, "xywh"),
        "gref_umd": (("train", "val", "test"), COCO_IMAGES, RESC_LONG, "xywh"),
    }
    own = {
        "flickr": ("annotations/flickr/flickr", TRAIN_VAL_TEST, FLICKR_IMAGES, CAPTION),
        "refcoco_unc": ("refcoco/anns/refcoco/refcoco_unc", TRAIN_VAL_A_B, COCO_IMAGES, MASK),
        "refcoco+_unc": ("refcoco/anns/refcoco+/refcoco+_unc", TRAIN_VAL_A_B, COCO_IMAGES, MASK),
        "refcocog_google": ("refcoco/anns/refcocog/refcocog_google", ("train", "val"), COCO_IMAGES, MASK),
        "refcocog_umd": ("refcoco/anns/refcocog/refcocog_umd", ("train", "val", "test"), COCO_IMAGES, MASK),
    }
    fields = {f"resc_{name}": (f"annotations_resc/{name}/{name}", *values) for name, values in resc.items()}
    fields |= {f"reftr_{name}": (*values, "xyxy") for name, values in own.items()}
    names = ("stem", "splits", "image_dirs", "layout", "box_format")
    return [
        RefTRIndexConfig(name=name, version=GroundingBuilder.VERSION, **dict(zip(names, values, strict=True)))
        for name, values in fields.items()
    ]


class RefTRIndex(GroundingBuilder):
    """The published indexes of RefTR and ReSC. Rows have the order in which the index first names their pictures."""

    BUILDER_CONFIG_CLASS = RefTRIndexConfig
    BUILDER_CONFIGS = configurations()

    @classmethod
    def annotation_files(cls, data_dir: Path, config_name: str) -> list[Path]:
        """The index files of a set, and the folder of its masks."""
        config = next(config for config in cls.BUILDER_CONFIGS if config.name == config_name)
        files = dict.fromkeys(file for split in config.splits for file in config.split_files(split))
        return [data_dir / name for name in (*files, config.mask_dir) if name is not None]

    def _split_generators(self, dl_manager):
        config, data_dir = self.config, Path(self.config.data_dir or "").absolute()
        self.need_files(self.annotation_files(data_dir, config.name), DISTRIBUTION)
        self.encoded = {}  # mask file -> run-length encoding, or None for a mask without a pixel; splits share masks
        files = dict.fromkeys(file for split in config.splits for file in config.split_files(split))
        indexes = {file: read_index(data_dir / file, config.layout) for file in files}
        folders = [data_dir / name for name in ([config.image_dir] if config.image_dir else config.image_dirs)]
        paths, masks = {}, {}
        for record in (record for index in indexes.values() for record in index):
            if record["image"] not in paths:
                choices = [folder / record["image"] for folder in folders]
                paths[record["image"]] = str(next((path for path in choices if path.is_file()), choices[0]))
            if "mask" in record:
                masks[record["mask"]] = data_dir / config.mask_dir / record["mask"]
        self.need_pictures(paths.values(), DISTRIBUTION)
        self.need_pictures(masks.values(), DISTRIBUTION, "masks")
        generators = []
        for split in config.splits:
            images = {}
            for file in config.split_files(split):
                for record in indexes[file]:
                    images.setdefault(record["image"], []).append(record)
            images = [(paths[name], records) for name, records in images.items()]
            generators.append(datasets.SplitGenerator(name=split, gen_kwargs={"split": split, "images": images}))
        return generators

    def _generate_examples(self, split, images):
        dropped = Counter()
        for path, records in images:
            row = self._row(path, records, dropped)
            if row["sentences"]:
                yield row["image_id"], row
            else:
                dropped["pictures without an expression"] += 1
        self.report_dropped(split, dropped)

    def _row(self, path: str, records: list[dict], dropped: Counter) -> dict:
        sizes = [self._encode(record["mask"])["size"] for record in records if "mask" in record]
        # the masks were made for the picture as published code reads it
        width, height = upright_size(path, tuple(sizes[0][::-1]) if sizes else None)
        image_id, objects, sentences = picture_id(path), {}, []
        for record in records:
            if not record["text"].strip():
                dropped["expressions without words"] += 1
                continue
            segmentation = self._segmentation(record, (width, height), path, dropped)
            phrases = []
            for start, end, box in zip(record["starts"], record["ends"], record["boxes"], strict=True):
                if not 0 <= start < end <= len(record["text"]):
                    dropped["phrases that are not at their place in the sentence"] += 1
                    continue
                box_xyxy = to_xyxy(box, self.config.box_format, self.config.integer_boxes)
                kept = clip_boxes([box_xyxy], width, height, dropped)
                if kept:
                    # the boxes name the object, as nothing else does
                    key = (*kept[0], record.get("mask"))
                    item = {"object_id": f"{image_id}_{len(objects)}", "box": kept[0], "boxes": kept}
                    item = {"index": len(objects), **item, "category": None, "segmentation": segmentation}
                    index = objects.setdefault(key, item)["index"]
                    phrases.append({"start": start, "end": end, "objects": [index], "types": []})
            if phrases:
                sentences.append({"sentence_id": record["sentence_id"], "text": record["text"], "phrases": phrases})
            else:
                dropped["expressions without a box"] += 1
        objects = [{name: value for name, value in item.items() if name != "index"} for item in objects.values()]
        row = {"image_id": image_id, "image": path, "width": width, "height": height}
        return {**row, "objects": objects, "sentences": sentences}

    def _encode(self, mask: str) -> dict:
        """A mask file's size and run-length encoding, None for a mask without a pixel; read once."""
        if mask not in self.encoded:
            self.encoded[mask] = encode_mask(Path(self.config.data_dir) / self.config.mask_dir / mask)
        return self.encoded[mask]

    def _segmentation(self, record: dict, size: tuple[int, int], path: str, dropped: Counter) -> dict | None:
        if "mask" not in record:
            return None
        encoded = self._encode(record["mask"])
        if tuple(encoded["size"]) != size[::-1]:
            raise ValueError(
                f"The mask {record['mask']!r} has (height, width) {tuple(encoded['size'])} and its picture {path!r} "
                f"{size[::-1]}: they must be the same, as for the published loaders."
            )
        if encoded["counts"] is None:
            dropped["masks without a pixel"] += 1
            return None
        return encoded


def read_index(path: Path, layout: tuple[str | None, ...]) -> list[dict]:
    """
    The records of an index file.

    Args:
        path (`Path`): the file.
        layout (`tuple[str | None, ...]`): what the items of a record are.

    Returns:
        `list[dict]`: of each record "sentence_id", "image" and "mask" (relative paths, "mask" only where there is one),
        "text", and lists "starts", "ends" (characters of the text; -1 for words that are not there) and "boxes".

    Raises:
        OSError, ValueError: see `reading.read_pickle`.
        ValueError: if a record is not as its layout says; it names the file and the record.
    """
    records = read_pickle(path)
    if not isinstance(records, list | tuple):
        raise ValueError(f"{str(path)!r} holds a {type(records).__name__} and not a list of records.")
    read = []
    for number, record in enumerate(records):
        try:
            read.append(read_record(record, layout, f"{path.stem}_{number}"))
        except (TypeError, ValueError) as error:
            names = ", ".join(name or "_" for name in layout)
            raise ValueError(f"{str(path)!r}, record {number} (from 0): {error}; expected ({names}).") from error
    return read


def read_record(record, layout: tuple[str | None, ...], sentence_id: str) -> dict:
    """One record of an index, see `read_index`."""
    if not isinstance(record, list | tuple) or len(record) != len(layout):
        items = f"{len(record)} items" if isinstance(record, list | tuple) else f"a {type(record).__name__}"
        raise ValueError(f"it is {items}")
    found = {name: value for name, value in zip(layout, record, strict=True) if name is not None}
    for name in ("image", "mask", "text"):
        if not isinstance(found.get(name, ""), str):
            raise ValueError(f"{name} is {found[name]!r} and not text")
    for name in ("image", "mask"):
        path = PurePosixPath(found.get(name, "picture").replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or not path.name or ":" in path.parts[0]:
            raise ValueError(f"{name} {found[name]!r} leads out of its folder")
    if "phrases" in found:
        starts, phrases = [int(start) for start in found["starts"]], list(found["phrases"])
        text = found["text"]
        # where the words are not at their place the phrase is dropped later, and counted
        there = [text[s : s + len(p)].lower() == p.lower() for s, p in zip(starts, phrases, strict=True)]
        ends = [s + len(p) if ok else -1 for s, p, ok in zip(starts, phrases, there, strict=True)]
        boxes = found["boxes"]
    else:
        starts, ends, boxes = [0], [len(found["text"])], [found["box"]]
    boxes = [[float(value) for value in box] for box in boxes]
    if len(boxes) != len(starts) or any(len(box) != 4 for box in boxes):
        raise ValueError(f"there are {len(starts)} phrases and the boxes {boxes}")
    paths = {name: found[name] for name in ("image", "mask") if name in found}
    return {"sentence_id": sentence_id, **paths, "text": found["text"], "starts": starts, "ends": ends, "boxes": boxes}


def to_xyxy(box: list[float], box_format: str, integer_boxes: bool) -> list[float]:
    """
    A box of "xyxy" or "xywh" as xyxy, cut to whole pixels first where asked, as the published loaders do.

    Example:

    ```python
    >>> from data_scripts.reftr_index import to_xyxy

    >>> to_xyxy([10.5, 20.5, 30.75, 40.75], "xywh", integer_boxes=False)
    [10.5, 20.5, 41.25, 61.25]
    >>> to_xyxy([10.5, 20.5, 30.75, 40.75], "xywh", integer_boxes=True)
    [10.0, 20.0, 40.0, 60.0]

    ```"""
    if integer_boxes and all(math.isfinite(value) for value in box):
        box = [float(int(value)) for value in box]
    x, y, right, bottom = box
    return [x, y, x + right, y + bottom] if box_format == "xywh" else box


def picture_id(path: str) -> str:
    """
    The id of a picture: the number in COCO's names, else the name without its ending.

    Example:

    ```python
    >>> from data_scripts.reftr_index import picture_id

    >>> picture_id("refcoco/images/train2014/COCO_train2014_000000581857.jpg"), picture_id("images/36979.jpg")
    ('581857', '36979')

    ```"""
    stem = PurePosixPath(path).stem
    match = re.fullmatch(r"COCO_[a-z]+\d+_0*(\d+)", stem)
    return match[1] if match else stem


def encode_mask(path: Path) -> dict:
    """
    An .npy file of (H, W), not 0 where the object is -> COCO run-length encoding; `counts` is None without a pixel.

    Raises:
        OSError: if the file is damaged.
        ValueError: if it holds objects, which can run code, or is not of numbers and two dimensions.
    """
    try:
        mask = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        if "allow_pickle" in str(error) or "Array can't be memory-mapped" in str(error):
            raise ValueError(f"The mask {str(path)!r} is refused: it holds objects and not numbers.") from error
        raise OSError(f"The mask {str(path)!r} is damaged: {error}") from error
    if not isinstance(mask, np.ndarray) or mask.ndim != 2 or mask.dtype.kind not in "biuf":
        raise ValueError(f"The mask {str(path)!r} is {getattr(mask, 'shape', mask)}; expected numbers of (H, W).")
    mask = np.asfortranarray(mask != 0, dtype=np.uint8)
    encoded = coco_mask.encode(mask) if mask.any() else {"size": list(mask.shape), "counts": None}
    counts = encoded["counts"]
    return {"size": list(encoded["size"]), "counts": counts and counts.decode("ascii")}


# published (images, objects, expressions), by split, where the index is known to hold all of the set
COUNTS = {
    "refcoco": {
        "train": (16_994, None, 120_624),
        "val": (1_500, None, 10_834),
        "testA": (750, None, 5_657),
        "testB": (750, None, 5_095),
    },
    "refcoco+": {
        "train": (16_992, None, 120_191),
        "val": (1_500, None, 10_758),
        "testA": (750, None, 5_726),
        "testB": (750, None, 4_889),
    },
    "referit": {
        "train": (None, None, 54_127),
        "val": (None, None, 5_842),
        "test": (None, None, 60_103),
    },
}
COUNTS_OF = {
    "resc_unc": "refcoco",
    "resc_unc+": "refcoco+",
    "resc_referit": "referit",
    "reftr_refcoco_unc": "refcoco",
    "reftr_refcoco+_unc": "refcoco+",
}
SOURCES = [
    Source(
        name=config.name,
        builder=RefTRIndex,
        config_name=config.name,
        splits=config.splits,
        files=tuple(
            str(path) + "/" * (path.suffix != ".pth") for path in RefTRIndex.annotation_files(Path(), config.name)
        )
        + tuple(f"{name}/" for name in config.image_dirs[:1]),
        distribution=DISTRIBUTION,
        counts=COUNTS.get(COUNTS_OF.get(config.name), {}),
    )
    for config in RefTRIndex.BUILDER_CONFIGS
]
