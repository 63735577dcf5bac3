"""
The indexes that the published RefTR was trained with, in its folder tree as it stands:

    data_dir/
        annotations/flickr/flickr_<split>.pth                captions of Flickr30k Entities with their phrases
        annotations_resc/<set>/<set>_<split>.pth             the index of ReSC: expressions and boxes
        refcoco/anns/<set>/<set>_<split by>_<split>.pth      expressions, boxes and masks
        refcoco/masks/<set>/<mask>.npy                       H x W, not 0 where the object is
        flickr30k/f30k_images  refcoco/images/train2014  referit/images  visualgenome/VG_100K

The index of ReSC is also found where TransVG, CLIP-VG, HiVG and OneRef have it, and their images with it:

    data_dir/
        <set>/<set>_<split>.pth                              or in another of `RESC_FOLDERS`
        ln_data/other/images/mscoco/images/train2014         or another of `IMAGE_DIRS`

The indexes are lists of tuples written by `torch.save`, read here without running other code in them, and without
torch. They name no objects: expressions of an image that share a box (and a mask) refer to one object. Boxes stay as
they are, fractions of pixels included; the published loaders truncate them to integers (`integer_boxes`).
"""

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath

import datasets
import numpy as np

from .building import (
    KEPT_BOXES,
    KEPT_MASKS,
    Copy,
    GroundingBuilder,
    Source,
    clip_boxes,
    describe_copies,
    integer_box,
    is_degenerate,
    is_for_training,
)
from .masks import encode_mask, is_empty, to_segmentation
from .pickles import read_pickle
from .quoting import explain, quote
from .reading import MAX_PIXELS, check_spans, check_text, check_texts, has_words, image_of, is_file_name, read_frame
from .schema import FEATURES


# FEATURES: datasets <= 3.6 copies the siblings that a script itself imports, and no further
__all__ = ["FEATURES", "INDEXES", "SOURCES", "RefTRIndex", "RefTRIndexConfig"]

DISTRIBUTION = (
    "The indexes and masks are linked in the READMEs of https://github.com/ubc-vision/RefTR (annotations, "
    "refcoco/masks, refcoco/anns, annotations_resc/vg) and of https://github.com/zyang-ur/ReSC (annotations_resc); "
    "the images are those of COCO train2014, Flickr30k, ReferItGame and Visual Genome, in the folders of the first "
    "README's tree. The trees of TransVG, CLIP-VG, HiVG and OneRef are read as well, <set>/<set>_<split>.pth with "
    "images in ln_data or image_data."
)
COPIES = (Copy("linhuixiao/OneRef", "indexes of ReSC, without images", "licence: see its card"),)
# folders of the sets of ReSC's index; the first that contains one of a set's files is used
RESC_FOLDERS = ("annotations_resc", "", "data", "ref_data_shuffled", "ref_data_shuffled/single_dataset")


@dataclass(frozen=True)
class Index:
    """
    The files of a dataset and their layout.

    Args:
        stem (`str`): the index files in `data_dir` without `_<split>.pth`.
        splits (`tuple[str, ...]`): its splits.
        image_source (`str`): which images, of `IMAGE_DIRS`; ids of images begin with it.
        layout (`tuple[str | None, ...]`): what the items of a record are.
        box_format (`str`): "xyxy" or "xywh".
        parts (`dict[str, tuple[str, ...]]`): the files of a split, where it is not one of its own name.
    """

    stem: str
    splits: tuple[str, ...]
    image_source: str
    layout: tuple[str | None, ...]
    box_format: str = "xyxy"
    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def find(self, data_dir: Path) -> "Index":
        """Return the index as it is in a folder: ReSC's in the first of `RESC_FOLDERS` that has any of its files."""
        folder, _, name = self.stem.partition("/")
        if folder != RESC_FOLDERS[0]:
            return self
        choices = [replace(self, stem=str(PurePosixPath(folder, name))) for folder in RESC_FOLDERS]
        return next((index for index in choices if any((data_dir / file).is_file() for file in index.files)), self)

    def split_files(self, split: str) -> list[str]:
        """Return the index files of a split, relative to `data_dir`."""
        return [f"{self.stem}_{part}.pth" for part in self.parts.get(split, (split,))]

    @property
    def files(self) -> list[str]:
        """All index files, relative to `data_dir`."""
        return list(dict.fromkeys(file for split in self.splits for file in self.split_files(split)))

    @property
    def mask_dir(self) -> str | None:
        """The folder of the masks in `data_dir`, if there are masks."""
        return f"refcoco/masks/{PurePosixPath(self.stem).parent.name}" if "mask" in self.layout else None


def _in_image_roots(*names: str) -> tuple[str, ...]:
    """Return folders of images in those that TransVG, CLIP-VG, HiVG and OneRef name in `data_root`."""
    roots = ("", "ln_data", "image_data", "../ln_data", "../image_data")
    return tuple(str(PurePosixPath(root, name)) for root in roots for name in names)


# source of images -> folders that they may be in, the published one first
IMAGE_DIRS = {
    "coco": ("refcoco/images/train2014", *_in_image_roots("other/images/mscoco/images/train2014", "train2014")),
    "flickr30k": (
        "flickr30k/f30k_images",
        *_in_image_roots("Flickr30k/flickr30k-images", "Flickr30k/flickr30k_images"),
    ),
    "saiapr": _in_image_roots("referit/images"),
    "vg": ("visualgenome/VG_100K", "visualgenome/VG_100K_2"),
}
TRAIN_VAL_TEST = ("train", "val", "test", "trainval")
TRAIN_VAL_A_B = ("train", "val", "testA", "testB", "trainval")
BOTH = {"trainval": ("train", "val")}

MAX_PHRASES = 1000  # of a sentence
# what the items of a record are, in order; None: not read
RESC_SHORT = ("image", "box", "text")
RESC_LONG = ("image", None, "box", "text", None)
CAPTION = ("image", "starts", "boxes", "phrases", None, "text")
MASK = ("image", "mask", "box", "text")

# the index of ReSC, and RefTR's own
INDEXES = {
    "resc_flickr": Index("annotations_resc/flickr/flickr", TRAIN_VAL_TEST, "flickr30k", RESC_SHORT, "xyxy", BOTH),
    # the datasets library means something else by a split "all"
    "resc_vg": Index("annotations_resc/vg/vg", ("train",), "vg", RESC_SHORT, "xywh", {"train": ("all",)}),
    "resc_referit": Index("annotations_resc/referit/referit", TRAIN_VAL_TEST, "saiapr", RESC_LONG, "xyxy"),
    "resc_unc": Index("annotations_resc/unc/unc", TRAIN_VAL_A_B, "coco", RESC_LONG, "xywh", BOTH),
    "resc_unc+": Index("annotations_resc/unc+/unc+", TRAIN_VAL_A_B, "coco", RESC_LONG, "xywh", BOTH),
    "resc_gref": Index("annotations_resc/gref/gref", ("train", "val"), "coco", RESC_LONG, "xywh"),
    "resc_gref_umd": Index("annotations_resc/gref_umd/gref_umd", ("train", "val", "test"), "coco", RESC_LONG, "xywh"),
    "reftr_flickr": Index("annotations/flickr/flickr", TRAIN_VAL_TEST, "flickr30k", CAPTION, "xyxy", BOTH),
    "reftr_refcoco_unc": Index("refcoco/anns/refcoco/refcoco_unc", TRAIN_VAL_A_B, "coco", MASK, "xyxy", BOTH),
    "reftr_refcoco+_unc": Index("refcoco/anns/refcoco+/refcoco+_unc", TRAIN_VAL_A_B, "coco", MASK, "xyxy", BOTH),
    "reftr_refcocog_google": Index("refcoco/anns/refcocog/refcocog_google", ("train", "val"), "coco", MASK),
    "reftr_refcocog_umd": Index("refcoco/anns/refcocog/refcocog_umd", ("train", "val", "test"), "coco", MASK),
}


@dataclass
class RefTRIndexConfig(datasets.BuilderConfig):
    """
    Args:
        image_dir (`str`, *optional*): folder of the images, in `data_dir` or absolute; absent: those of `IMAGE_DIRS`.
        integer_boxes (`bool`): truncate the coordinates of boxes to integers as the published loaders do, before
            width and height are added to x and y. Boxes that this leaves without extent, and masks without a pixel,
            are kept in splits that are not for training: the published evaluation counts them as misses.
    """

    image_dir: str | None = None
    integer_boxes: bool = False


class RefTRIndex(GroundingBuilder):
    """The published indexes of RefTR and ReSC. Rows have the order in which the index first names their images."""

    BUILDER_CONFIG_CLASS = RefTRIndexConfig
    BUILDS_SPLITS_ALONE = True
    BUILDER_CONFIGS = [RefTRIndexConfig(name=name, version=GroundingBuilder.VERSION) for name in INDEXES]

    @classmethod
    def annotation_files(cls, data_dir: Path, config_name: str) -> list[Path]:
        """Return the index files of a dataset, and the folder of its masks."""
        index = INDEXES[config_name].find(Path(data_dir)) if config_name in INDEXES else None
        names = (*index.files, *filter(None, [index.mask_dir])) if index else ()
        return [data_dir / name for name in names]

    @cached_property
    def index(self) -> Index:
        """The files of this dataset in its folder, and their layout."""
        return INDEXES[self.config.name].find(Path(self.config.data_dir or ""))

    def files_of(self, split: str) -> list[Path]:
        """Return the index files of a split."""
        return [Path(self.config.data_dir) / file for file in self.index.split_files(split)]

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        index, data_dir = self.index, Path(self.config.data_dir or "").absolute()
        self.require_splits(index.splits)
        splits = list(filter(self.is_requested, index.splits))
        files = list(dict.fromkeys(file for split in splits for file in index.split_files(split)))
        names = (*files, *filter(None, [index.mask_dir]))
        self.require_files(
            (data_dir / name for name in names),
            f"{DISTRIBUTION} {describe_copies(copies_of(self.config.name))}".rstrip(),
        )
        self.masks = {}  # mask file -> see `read_mask_array`; splits share masks
        records = {file: read_index(data_dir / file, index.layout) for file in files}
        column = index.layout.index("image")
        folders = IMAGE_DIRS[index.image_source] if self.config.image_dir is None else (self.config.image_dir,)
        folders = [folder for folder in folders if (data_dir / folder).is_dir()] or folders[:1]
        paths = {}
        for name in names_of(records.values(), column):
            choices = [data_dir / folder / name for folder in folders]
            paths[name] = str(next((path for path in choices if os.path.isfile(path)), choices[0]))
        self.require_images(paths.values(), DISTRIBUTION)
        if index.mask_dir:
            masks = names_of(records.values(), index.layout.index("mask"))
            self.require_images((data_dir / index.mask_dir / name for name in masks), DISTRIBUTION, "masks")
        generators = []
        for split in splits:
            images, position = {}, 0
            for file in index.split_files(split):
                name = PurePosixPath(file).name
                for number, record in enumerate(records[file]):
                    _, mine = images.setdefault(record[column], (paths[record[column]], []))
                    mine.append((position, name, number, record))
                    position += 1
            gen_kwargs = {"split": split, "images": list(images.values())}
            generators.append(datasets.SplitGenerator(name=split, gen_kwargs=gen_kwargs))
        return generators

    def _generate_examples(self, split: str, images: list) -> Iterator[tuple[str, dict]]:
        dropped, changed = Counter(), Counter()
        for path, records in images:
            records = [
                {"position": position, **read_record(*record, self.index.layout)} for position, *record in records
            ]
            row = self._row(path, records, dropped, changed, self.config.integer_boxes and not is_for_training(split))
            if row["sentences"]:
                yield row["image_id"], row
            else:
                dropped["images without an expression"] += 1
        self.report_dropped(split, dropped)
        self.report_changed(split, changed)

    def _row(self, path: str, records: list[dict], dropped: Counter, changed: Counter, keep_misses: bool) -> dict:
        # a mask tells for which size of its image it was made, stored or upright
        sizes = [self._read_mask(record["mask"])[0] for record in records[:1] if "mask" in record]
        frame = read_frame(path, *(tuple(size[::-1]) for size in sizes))
        width, height = frame.size
        image_id, objects, indices, sentences = f"{self.index.image_source}_{image_number(path)}", {}, {}, []
        positions = []
        for record in records:
            if not has_words(record["text"]):
                dropped["expressions without words"] += 1
                continue
            segmentation = self._segmentation(record, (width, height), path, dropped, changed, keep_misses)
            phrases = []
            for start, end, box in zip(record["starts"], record["ends"], record["boxes"], strict=True):
                if not 0 <= start < end:
                    dropped["phrases that are not at their position in the sentence"] += 1
                    continue
                box_xyxy = record_box_to_xyxy(box, self.index.box_format, self.config.integer_boxes)
                miss = integer_box(box_xyxy, width, height, keep_misses=True) if keep_misses else None
                if miss is not None and is_degenerate(miss):
                    kept = [miss]
                    changed[KEPT_BOXES] += 1
                else:
                    kept = clip_boxes([box_xyxy], width, height, dropped, changed)
                if kept:
                    key = (*kept[0], segmentation and segmentation["counts"])
                    index = indices.setdefault(key, len(indices))
                    item = {"object_id": f"{image_id}_{index}", "box": kept[0], "boxes": kept}
                    objects.setdefault(key, {**item, "category": None, "segmentation": segmentation})
                    phrases.append({"start": start, "end": end, "objects": [index], "types": []})
            if phrases:
                sentences.append({"sentence_id": record["sentence_id"], "text": record["text"], "phrases": phrases})
                positions.append(record["position"])
            else:
                dropped["expressions without a box"] += 1
        row = {"image_id": image_id, "image": image_of(path, frame), "width": width, "height": height}
        return {**row, "objects": list(objects.values()), "sentences": sentences, "positions": positions}

    def _read_mask(self, mask: str) -> tuple[tuple[int, int], dict]:
        """Read a mask by `read_mask_array`, each file once."""
        if mask not in self.masks:
            self.masks[mask] = read_mask_array(Path(self.config.data_dir) / self.index.mask_dir / mask)
        return self.masks[mask]

    def _segmentation(
        self, record: dict, size: tuple[int, int], path: str, dropped: Counter, changed: Counter, keep_misses: bool
    ) -> dict | None:
        if "mask" not in record:
            return None
        shape, segmentation = self._read_mask(record["mask"])
        if shape != size[::-1]:
            raise ValueError(
                f"The mask {quote(record['mask'])} has (height, width) {shape} and its image {path!r} "
                f"{size[::-1]}: they must be the same, as for the published loaders."
            )
        if is_empty(segmentation):
            if not keep_misses:
                dropped["masks without a pixel"] += 1
                return None
            changed[KEPT_MASKS] += 1
        return segmentation


def copies_of(name: str) -> tuple[Copy, ...]:
    """Return where else the index files of a dataset are."""
    return COPIES if name.startswith("resc_") else ()


def names_of(indexes: Iterable[list[tuple]], column: int) -> list[str]:
    """Return the distinct names in a column of the records of indexes, in order."""
    return list(dict.fromkeys(record[column] for records in indexes for record in records))


def read_index(path: Path, layout: tuple[str | None, ...]) -> list[tuple]:
    """
    Return the records of an index file as they are; `read_record` parses one.

    Args:
        path (`Path`): the file.
        layout (`tuple[str | None, ...]`): what the items of a record are.

    Raises:
        OSError, ValueError: see `pickles.read_pickle`.
        ValueError: if it is not a list of such records, or an image or mask is not inside its folder.
    """
    records = read_pickle(path)
    if not isinstance(records, list | tuple):
        raise ValueError(f"{str(path)!r} is {quote(records)}; expected a list of records.")
    expected = f"expected ({', '.join(name or '_' for name in layout)})."
    for number, record in enumerate(records):
        if not isinstance(record, list | tuple) or len(record) != len(layout):
            raise ValueError(f"{str(path)!r}, record {number}: {quote(record)} is not a record; {expected}")
        for name in ("image", "mask"):
            value = record[layout.index(name)] if name in layout else "none"
            if not is_file_name(value):
                raise ValueError(
                    f"{str(path)!r}, record {number}: {quote(value)} is not a file of the {name} folder; {expected}"
                )
    return records


def read_record(file: str, number: int, record: tuple, layout: tuple[str | None, ...]) -> dict:
    """
    Parse a record of an index.

    Args:
        file (`str`): name of the index file.
        number (`int`): the record's number in it, from 0.
        record (`tuple`): the record as stored.
        layout (`tuple[str | None, ...]`): what its items are.

    Returns:
        `dict`: "sentence_id", "text", lists "starts", "ends" (characters of the text; end -1 for a phrase that is not
        there) and "boxes" of four coordinates, and "mask" where there is one.

    Raises:
        ValueError: if an item is not what it should be.
    """
    found = {name: value for name, value in zip(layout, record, strict=True) if name is not None}
    text = found["text"]
    starts, phrases = found.get("starts", [0]), found.get("phrases", [text])
    boxes = found.get("boxes", [found.get("box")])
    try:
        if not isinstance(text, str):
            raise TypeError(f"its text is {quote(text)}")
        check_text(text, "the text")
        if not len(starts) == len(phrases) == len(boxes) <= MAX_PHRASES or any(len(box) != 4 for box in boxes):
            raise ValueError(
                f"{len(starts)} starts, {len(phrases)} phrases and {len(boxes)} boxes of four numbers, at most "
                f"{MAX_PHRASES} of each"
            )
        if not all(isinstance(words, str) for words in phrases):
            raise TypeError("a phrase of it is not text")
        check_texts(phrases, "phrases")
        check_spans([(0, len(words)) for words in phrases], "phrases")
        starts, boxes = [int(start) for start in starts], [[float(value) for value in box] for box in boxes]
    except (TypeError, ValueError, OverflowError) as error:
        expected = ", ".join(name or "_" for name in layout)
        raise ValueError(
            f"{file!r}, record {number}: {explain(error)}; expected ({expected}) in {quote(record)}."
        ) from error
    ends = [
        start + len(words) if has_words(words) and text[start : start + len(words)].lower() == words.lower() else -1
        for start, words in zip(starts, phrases, strict=True)
    ]
    mask = {"mask": found["mask"]} if "mask" in found else {}
    sentence_id = f"{file.removesuffix('.pth')}_{number}"
    return {"sentence_id": sentence_id, "text": text, "starts": starts, "ends": ends, "boxes": boxes, **mask}


def record_box_to_xyxy(box: list[float], box_format: str, integer_boxes: bool) -> list[float]:
    """
    Convert a box of "xyxy" or "xywh" to xyxy, optionally truncated to integers first, as the published loaders do.

    Example:

    ```python
    >>> from data_scripts.reftr_index import record_box_to_xyxy

    >>> record_box_to_xyxy([10.5, 20.5, 30.75, 40.75], "xywh", integer_boxes=False)
    [10.5, 20.5, 41.25, 61.25]
    >>> record_box_to_xyxy([10.5, 20.5, 30.75, 40.75], "xywh", integer_boxes=True)
    [10.0, 20.0, 40.0, 60.0]

    ```"""
    if integer_boxes and all(math.isfinite(value) for value in box):
        box = [float(int(value)) for value in box]
    x, y, right, bottom = box
    return [x, y, x + right, y + bottom] if box_format == "xywh" else box


def image_number(path: str) -> str:
    """
    Return what identifies an image in its source: the number in COCO's names, else the name without its ending.

    Example:

    ```python
    >>> from data_scripts.reftr_index import image_number

    >>> image_number("train2014/COCO_train2014_000000581857.jpg"), image_number("images/36979.jpg")
    ('581857', '36979')

    ```"""
    stem = PurePosixPath(path).stem
    match = re.fullmatch(r"COCO_[a-z]+\d+_0*(\d+)", stem)
    return match[1] if match else stem


def read_mask_array(path: Path) -> tuple[tuple[int, int], dict]:
    """
    Read an .npy file of (H, W), nonzero inside the object: its shape, and the `segmentation` of the schema, which
    may be empty.

    Raises:
        OSError: if the file is damaged.
        ValueError: if it contains objects, which can run code, or is not of numbers and two dimensions.
    """
    try:
        # never unpickles, and maps no more than the file has
        mask = np.lib.format.open_memmap(str(path), mode="r")
    except Exception as error:  # a damaged header can raise anything
        if "Python objects in dtype" in str(error):
            raise ValueError(f"The mask {str(path)!r} is refused: it contains objects and not numbers.") from error
        raise OSError(f"The mask {str(path)!r} is damaged: {explain(error)}") from error
    if mask.ndim != 2 or mask.dtype.kind not in "biuf":
        raise ValueError(f"The mask {str(path)!r} is {mask.dtype} of {mask.shape}; expected numbers of (H, W).")
    if not 0 < mask.size <= MAX_PIXELS:
        height, width = mask.shape
        raise ValueError(f"The mask {str(path)!r} has {width} x {height} pixels, more than {MAX_PIXELS:,}, or none.")
    return tuple(mask.shape), to_segmentation(encode_mask(mask), keep_empty=True)


# published (images, objects, expressions), by split, if the index is known to be the complete dataset
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
        name=name,
        builder=RefTRIndex,
        config_name=name,
        splits=index.splits,
        files=(*index.files, *filter(None, [index.mask_dir]), IMAGE_DIRS[index.image_source][0]),
        distribution=DISTRIBUTION,
        counts=COUNTS.get(COUNTS_OF.get(name), {}),
        copies=copies_of(name),
        license="other",
        language="en",
    )
    for name, index in INDEXES.items()
]
