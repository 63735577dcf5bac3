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
    "The indexes and masks are linked in the READMEs of https://github.com/ubc-vision/RefTR (annotations, "
    "refcoco/masks, refcoco/anns, annotations_resc/vg) and of https://github.com/zyang-ur/ReSC (annotations_resc); "
    "the pictures are those of COCO train2014, Flickr30k, ReferItGame and Visual Genome, in the folders of the first "
    "README's tree."
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
        splits (`tuple[str, ...]`): its splits. trainval is train and val together, but a file of its own in referit;
            the file vg_all is the split train, as the datasets library means something else by "all".
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
        if self.name == "resc_vg":
            parts = ("all",)
        elif split == "trainval" and self.name != "resc_referit":
            parts = ("train", "val")
        else:
            parts = (split,)
        return [f"{self.stem}_{part}.pth" for part in parts]

    @property
    def mask_dir(self) -> str | None:
        """The folder of the masks in `data_dir`, if there are masks."""
        return f"refcoco/masks/{PurePosixPath(self.stem).parent.name}" if "mask" in self.layout else None


def configurations() -> list[RefTRIndexConfig]:
    """The sets that there are, by name: `resc_...` for the index of ReSC, `reftr_...` for RefTR's own."""
    resc = {
        "flickr": (TRAIN_VAL_TEST, FLICKR_IMAGES, RESC_SHORT, "xyxy"),
        "vg": (("train",), ("visualgenome/VG_100K", "visualgenome/VG_100K_2"), RESC_SHORT, "xywh"),
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
        configs = [config for config in cls.BUILDER_CONFIGS if config.name == config_name]
        files = dict.fromkeys(
            name for config in configs for split in config.splits for name in config.split_files(split)
        )
        folders = [config.mask_dir for config in configs if config.mask_dir]
        return [data_dir / name for name in (*files, *folders)]

    def _split_generators(self, dl_manager):
        config, data_dir = self.config, Path(self.config.data_dir or "").absolute()
        needed = self.annotation_files(data_dir, config.name)
        self.need_files(needed, DISTRIBUTION)
        self.encoded = {}  # mask file -> see `encode_mask`; splits share masks
        indexes = {path: read_index(path, config.layout) for path in needed if path.suffix == ".pth"}
        folders = [data_dir / name for name in ([config.image_dir] if config.image_dir else config.image_dirs)]
        paths = {}
        for name in names_of(indexes.values(), config.layout.index("image")):
            choices = [folder / name for folder in folders]
            paths[name] = str(next((path for path in choices if path.is_file()), choices[0]))
        self.need_pictures(paths.values(), DISTRIBUTION)
        if config.mask_dir:
            masks = names_of(indexes.values(), config.layout.index("mask"))
            self.need_pictures((data_dir / config.mask_dir / name for name in masks), DISTRIBUTION, "masks")
        generators = []
        for split in config.splits:
            images = {}
            for path in (data_dir / name for name in config.split_files(split)):
                for number, record in enumerate(indexes[path]):
                    name = record[config.layout.index("image")]
                    images.setdefault(name, (paths[name], []))[1].append((path.name, number, record))
            gen_kwargs = {"split": split, "images": list(images.values())}
            generators.append(datasets.SplitGenerator(name=split, gen_kwargs=gen_kwargs))
        return generators

    def _generate_examples(self, split, images):
        dropped = Counter()
        for path, records in images:
            row = self._row(path, [read_record(*record, self.config.layout) for record in records], dropped)
            if row["sentences"]:
                yield row["image_id"], row
            else:
                dropped["pictures without an expression"] += 1
        self.report_dropped(split, dropped)

    def _row(self, path: str, records: list[dict], dropped: Counter) -> dict:
        # a mask tells for which size of its picture it was made, stored or upright
        sizes = [self._encode(record["mask"])["size"] for record in records[:1] if "mask" in record]
        width, height = upright_size(path, *(tuple(size[::-1]) for size in sizes))
        image_id, objects, sentences = picture_id(path), {}, []
        for record in records:
            if not record["text"].strip():
                dropped["expressions without words"] += 1
                continue
            segmentation = self._segmentation(record, (width, height), path, dropped)
            phrases = []
            for start, end, box in zip(record["starts"], record["ends"], record["boxes"], strict=True):
                if not 0 <= start < end:
                    dropped["phrases that are not at their place in the sentence"] += 1
                    continue
                box_xyxy = to_xyxy(box, self.config.box_format, self.config.integer_boxes)
                kept = clip_boxes([box_xyxy], width, height, dropped)
                if kept:
                    key = (*kept[0], record.get("mask"))
                    index = list(objects).index(key) if key in objects else len(objects)
                    item = {"object_id": f"{image_id}_{index}", "box": kept[0], "boxes": kept}
                    objects.setdefault(key, {**item, "category": None, "segmentation": segmentation})
                    phrases.append({"start": start, "end": end, "objects": [index], "types": []})
            if phrases:
                sentences.append({"sentence_id": record["sentence_id"], "text": record["text"], "phrases": phrases})
            else:
                dropped["expressions without a box"] += 1
        row = {"image_id": image_id, "image": path, "width": width, "height": height}
        return {**row, "objects": list(objects.values()), "sentences": sentences}

    def _encode(self, mask: str) -> dict:
        """See `encode_mask`; each file is read once."""
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


def names_of(indexes, place: int) -> list[str]:
    """The different names at a place of the records of indexes, in order."""
    return list(dict.fromkeys(record[place] for records in indexes for record in records))


def read_index(path: Path, layout: tuple[str | None, ...]) -> list[tuple]:
    """
    The records of an index file as they are; `read_record` makes sense of one.

    Args:
        path (`Path`): the file.
        layout (`tuple[str | None, ...]`): what the items of a record are.

    Raises:
        OSError, ValueError: see `reading.read_pickle`.
        ValueError: if it is no list of such records, or a picture or mask is not inside its folder.
    """
    records = read_pickle(path)
    if not isinstance(records, list | tuple):
        raise ValueError(f"{str(path)!r} holds a {type(records).__name__} and not a list of records.")
    expected = f"expected ({', '.join(name or '_' for name in layout)})."
    for number, record in enumerate(records):
        if not isinstance(record, list | tuple) or len(record) != len(layout):
            raise ValueError(f"{str(path)!r}, record {number}: {str(record)[:200]} is none; {expected}")
    for place in (layout.index(name) for name in ("image", "mask") if name in layout):
        wrong = [record[place] for record in records if not isinstance(record[place], str)][:1]
        wrong += [name for name in ([] if wrong else names_of([records], place)) if not is_inside(name)]
        if wrong:
            raise ValueError(f"{str(path)!r}: {wrong[0]!r} is no {layout[place]} file inside its folder; {expected}")
    return records


def is_inside(name: str) -> bool:
    """Whether a relative path stays in its folder, on every system."""
    path = PurePosixPath(name.replace("\\", "/"))
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts and ":" not in path.parts[0]


def read_record(file: str, number: int, record: tuple, layout: tuple[str | None, ...]) -> dict:
    """
    A record of an index.

    Args:
        file (`str`): name of the index file.
        number (`int`): the record's place in it, from 0.
        record (`tuple`): what stands there.
        layout (`tuple[str | None, ...]`): what its items are.

    Returns:
        `dict`: "sentence_id", "text", lists "starts", "ends" (characters of the text; end -1 for words that are not
        there) and "boxes" of four figures, and "mask" where there is one.

    Raises:
        ValueError: if an item is not what it should be.
    """
    found = {name: value for name, value in zip(layout, record, strict=True) if name is not None}
    text = found["text"]
    try:
        starts, phrases = [int(start) for start in found.get("starts", [0])], found.get("phrases", [text])
        boxes = [[float(value) for value in box] for box in found.get("boxes", [found.get("box")])]
        if not all(isinstance(words, str) for words in (text, *phrases)):
            raise TypeError("text that is none")
        if not len(starts) == len(phrases) == len(boxes) or any(len(box) != 4 for box in boxes):
            raise ValueError(f"{len(starts)} starts, {len(phrases)} phrases and {len(boxes)} boxes of four figures")
    except (TypeError, ValueError, OverflowError) as error:
        expected = ", ".join(name or "_" for name in layout)
        raise ValueError(f"{file!r}, record {number}: {error}; expected ({expected}) in {record}.") from error
    ends = [
        start + len(words) if words.strip() and text[start : start + len(words)].lower() == words.lower() else -1
        for start, words in zip(starts, phrases, strict=True)
    ]
    mask = {"mask": found["mask"]} if "mask" in found else {}
    sentence_id = f"{file.removesuffix('.pth')}_{number}"
    return {"sentence_id": sentence_id, "text": text, "starts": starts, "ends": ends, "boxes": boxes, **mask}


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
        # never unpickles, and maps no more than the file has
        mask = np.lib.format.open_memmap(str(path), mode="r")
    except Exception as error:  # a damaged header can raise anything
        if "Python objects in dtype" in str(error):
            raise ValueError(f"The mask {str(path)!r} is refused: it holds objects and not numbers.") from error
        raise OSError(f"The mask {str(path)!r} is damaged: {error}") from error
    if mask.ndim != 2 or mask.dtype.kind not in "biuf":
        raise ValueError(f"The mask {str(path)!r} is {mask.dtype} of {mask.shape}; expected numbers of (H, W).")
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
