"""
RefCOCO, RefCOCO+, RefCOCOg, ReferItGame (RefCLEF) and gRefCOCO, from the files of the refer API as their authors
publish them:

    data_dir/
      refcoco/  refcoco+/  refcocog/  refclef/  grefcoco/
        instances.json            images, annotations (box xywh in pixels, polygons or run lengths), categories
        refs(unc).p               pickled list of references; also (google), (umd), (berkeley), and grefs(unc).p
        refs(unc).json            the same list as JSON, read in place of the pickle if it exists
      images/train2014/COCO_train2014_000000581857.jpg     or in another of `IMAGE_FOLDERS`
      images/saiapr_tc-12/...                              RefCLEF's; in folders as distributed, or flat

A row has the objects of one image that a split's references name, and their expressions; rows are sorted by
image id, objects and sentences stand in the order of the references, and `positions` number the sentences among
all those of its split's references, as the refer API and the published indexes order them. The word after the
underscore of a configuration says who cut the splits; RefCLEF's references of "testAB" are in testA and in testB, as
the refer API counts them.

A reference names any number of objects, in gRefCOCO also several or none: `ann_id` is then a list, [-1] or null. Its
phrases have all of them. A crowd, which gRefCOCO's own reader refuses, is an object like others, and is counted.

`image_id` is "coco_<id>" for images of COCO and "saiapr_<id>" for RefCLEF's, so that datasets that share images can be
told apart from those that do not (`reading.coco_id`).
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from .building import (
    KEPT_BOXES,
    KEPT_MASKS,
    Copy,
    GroundingBuilder,
    Source,
    clip_box,
    describe_copies,
    format_listing,
    integer_box,
    is_degenerate,
    is_for_training,
)
from .kinds import FILE_NAME, INTEGER, INTEGER_OR_ABSENT, LIST, SPLIT, TARGETS, TEXT, check_fields, check_list, is_list
from .masks import (
    decode_mask,
    encode_counts,
    encode_mask,
    encode_polygons,
    is_empty,
    merge_masks,
    resize_to_nearest,
    to_segmentation,
)
from .pickles import read_pickle
from .quoting import quote
from .reading import Frame, check_text, has_words, image_of, is_four_numbers, is_number, load_json
from .schema import FEATURES


# FEATURES, quote: datasets <= 3.6 copies the siblings that a script itself imports, and no further
__all__ = ["FEATURES", "SOURCES", "RefCoco", "RefCocoConfig", "quote"]


# usual folders of the images, relative to data_dir; the first that contains one of them is used
IMAGE_FOLDERS = {
    "coco": (
        "images/train2014",
        "train2014",
        "images/mscoco/images/train2014",
        "images/mscoco/train2014",
        "refcoco/images/train2014",
        "coco/train2014",
        "../train2014",
        "../images/train2014",
        "../coco/train2014",
    ),
    "saiapr": ("images/saiapr_tc-12", "saiapr_tc-12", "referit/images", "../saiapr_tc-12", "../referit/images"),
}
# licences as the authors of Ref-L4 state those of the annotations
APACHE, CC_BY = "annotations: Apache-2.0", "annotations: CC BY 4.0"
COPIES = {
    "refcoco_unc": (
        Copy("jxu124/refcoco", "all splits, without images", APACHE),
        Copy("lmms-lab/RefCOCO", "testA, testB and a val mixed with google's, with images; no train", APACHE),
        Copy("moondream/refcoco-m", "half of val with other masks, with images", "MIT"),
    ),
    "refcoco_google": (Copy("lmms-lab/RefCOCO", "test, with images; no train", APACHE),),
    "refcoco+_unc": (
        Copy("jxu124/refcocoplus", "all splits, without images", APACHE),
        Copy("lmms-lab/RefCOCOplus", "testA, testB and val, with images; no train", APACHE),
    ),
    "refcocog_umd": (
        Copy("jxu124/refcocog", "all splits, without images", CC_BY),
        Copy("lmms-lab/RefCOCOg", "test and a val mixed with google's, with images; no train", CC_BY),
    ),
    "grefcoco": (Copy("FudanCVL/gRefCOCO", "grefcoco/ with all splits, without images", "licence: see its card"),),
}
# configuration -> folder, and file of the references without its ending
REFERENCES = {
    "refcoco_unc": ("refcoco", "refs(unc)"),
    "refcoco_google": ("refcoco", "refs(google)"),
    "refcoco+_unc": ("refcoco+", "refs(unc)"),
    "refcocog_umd": ("refcocog", "refs(umd)"),
    "refcocog_google": ("refcocog", "refs(google)"),
    "refclef_unc": ("refclef", "refs(unc)"),
    "refclef_berkeley": ("refclef", "refs(berkeley)"),
    "grefcoco": ("grefcoco", "grefs(unc)"),
}
AS_JSON = "The references may also be JSON, refs(...).json in place of refs(...).p."
ANNOTATIONS = (
    "The refer API's authors distributed the annotations as refcoco.zip, refcoco+.zip, refcocog.zip and refclef.zip "
    f"(github.com/lichengunc/refer), from a host that no longer answers; extract them into data_dir. {AS_JSON}"
)
GREFCOCO_ANNOTATIONS = (
    "gRefCOCO's authors distribute grefs(unc).json and instances.json (github.com/henghuiding/gRefCOCO); place them "
    "in the folder grefcoco of data_dir."
)
IMAGE_SOURCES = {
    "coco": "The images are COCO's train2014.zip (cocodataset.org).",
    "saiapr": "The images are saiapr_tc-12.zip, the subset of ImageCLEF that the refer API's authors distributed.",
}


CROWDS = "objects are crowds"
UNREADABLE = "unreadable"  # stands for a segmentation until it is encoded
MAX_SPLITS = 20


@dataclass
class RefCocoConfig(datasets.BuilderConfig):
    """
    Args:
        image_dir (`str`, *optional*): the folder of the images; absent: the first of `IMAGE_FOLDERS` with any.
        integer_boxes (`bool`): truncate the corners of boxes to integers, as the published loaders do, so that their
            metrics can be compared. Boxes that this leaves without extent, and masks without a pixel, are kept in
            splits that are not for training: the published evaluation counts them as misses.
    """

    image_dir: str | None = None
    integer_boxes: bool = False


class RefCoco(GroundingBuilder):
    """Referring expressions of the refer API: RefCOCO, RefCOCO+, RefCOCOg, ReferItGame, gRefCOCO."""

    BUILDER_CONFIG_CLASS = RefCocoConfig
    BUILDS_SPLITS_ALONE = True
    BUILDER_CONFIGS = [RefCocoConfig(name=name, version=GroundingBuilder.VERSION) for name in REFERENCES]
    DEFAULT_CONFIG_NAME = "refcoco_unc"

    @classmethod
    def annotation_files(cls, data_dir: Path, config_name: str) -> list[Path]:
        """Return `instances.json` and the file of the references."""
        folder, stem = REFERENCES[config_name]
        return [Path(data_dir) / folder / "instances.json", find_refs_file(Path(data_dir) / folder, stem)]

    def find_files(self) -> list[Path]:
        """
        Return `instances.json` and the file of the references, which exist.

        Raises:
            ValueError, OSError: see `require_files`.
        """
        files = [] if self.config.data_dir is None else self.annotation_files(self.config.data_dir, self.config.name)
        self.require_files(files, describe_annotations(self.config.name))
        return files

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        instances_file, refs_file = self.find_files()
        refs = read_refs(refs_file)
        splits = dict.fromkeys(split for ref in refs for split in splits_of(ref["split"]))
        if not 1 <= len(splits) <= MAX_SPLITS:
            raise ValueError(f"{str(refs_file)!r} has {len(splits)} splits; expected from 1 to {MAX_SPLITS}.")
        self.require_splits(splits)
        refs = [ref for ref in refs if any(map(self.is_requested, splits_of(ref["split"])))]
        images, annotations, categories = read_instances(
            instances_file, {number for ref in refs for number in target_ids(ref)}, self.uses_file_names
        )
        required = {ref["image_id"] for ref in refs}
        unknown = sorted(required - images.keys())
        if unknown:
            raise OSError(
                f"{str(refs_file)!r} names {len(unknown)} images that {str(instances_file)!r} lacks: the two files "
                f"do not belong together. Their ids:{format_listing(unknown)}"
            )
        paths = self.find_image_paths([images[image_id] for image_id in sorted(required)])
        frames = self.read_frames(
            {path: annotated_size_of(images[image_id]) for image_id, path in paths.items()}, self.distribution
        )
        generators = []
        for split in filter(self.is_requested, splits):
            by_image, position = defaultdict(list), 0
            for ref in refs:
                if split in splits_of(ref["split"]):
                    by_image[ref["image_id"]].append((position, ref))
                    position += len(ref["sentences"])
            dropped, changed = Counter(), Counter()
            records = []
            for image_id in sorted(by_image):
                path = paths[image_id]
                record = self.make_record(
                    images[image_id],
                    path,
                    frames[path],
                    by_image[image_id],
                    annotations,
                    categories,
                    dropped,
                    changed,
                    keep_misses=self.config.integer_boxes and not is_for_training(split),
                )
                if record["sentences"]:
                    records.append(record)
            self.report_dropped(split, dropped)
            self.report_changed(split, changed)
            generators.append(datasets.SplitGenerator(name=split, gen_kwargs={"split": split, "records": records}))
        return generators

    def _generate_examples(self, split: str, records: list) -> Iterator[tuple[str, dict]]:
        changed = Counter()
        for record in records:
            annotated_size = record["annotated_size"]
            objects = []
            for item in record["objects"]:
                segmentation = encode_segmentation(
                    item["segmentation"],
                    annotated_size,
                    (record["width"], record["height"]),
                    self.config.integer_boxes,
                )
                if segmentation is None and item["segmentation"]:
                    changed["objects lost a mask that is empty or cannot be read"] += 1
                elif segmentation is not None and is_empty(segmentation):
                    changed[KEPT_MASKS] += 1
                objects.append({**item, "segmentation": segmentation})
            row = {
                key: value for key, value in record.items() if key not in ("annotated_size", "keep_misses", "frame")
            }
            row["image"] = image_of(record["image"], record["frame"])
            yield record["image_id"], {**row, "objects": objects}
        self.report_changed(split, changed)

    @property
    def image_source(self) -> str:
        """Whose images they are, "coco" or "saiapr": the beginning of their ids."""
        return "saiapr" if self.config.name.startswith("refclef") else "coco"

    @property
    def uses_file_names(self) -> bool:
        """Whether images are found by the `file_name` of `instances.json`."""
        return self.image_source == "saiapr"

    @property
    def image_folders(self) -> tuple[str, ...]:
        """The usual folders of the images, relative to data_dir."""
        return IMAGE_FOLDERS[self.image_source]

    @property
    def distribution(self) -> str:
        """Where the images come from and where they are looked for."""
        return (
            f"{IMAGE_SOURCES[self.image_source]} They are looked for in image_dir, or below data_dir in the first of "
            f"these folders that contains one of them: {', '.join(self.image_folders)}."
        )

    def names_of_image(self, image: dict) -> tuple[str, ...]:
        """Return the names that the file of an image may have in its folder."""
        if self.image_source == "coco":  # the refs' own file_name ends with a number and is not a file
            return (f"COCO_train2014_{image['id']:012d}.jpg",)
        return (image["file_name"], Path(image["file_name"]).name)

    def id_of_image(self, image: dict) -> str:
        """Return the `image_id` of an image's row."""
        return f"{self.image_source}_{image['id']}"

    def read_box(self, box: Any, annotated_size: tuple[int, int], scale: tuple[float, float]) -> list[float] | None:
        """Return an annotated box as xyxy, scaled by (horizontal, vertical); None if it is not a box."""
        return xywh_to_xyxy(box, scale)

    def find_image_paths(self, images: list[dict]) -> dict[int, str]:
        """Return the path of each image by its id, whether or not the file exists."""
        names = {image["id"]: self.names_of_image(image) for image in images}
        if self.config.image_dir is not None:
            folder = Path(self.config.image_dir)
        else:
            folders = [Path(self.config.data_dir) / folder for folder in self.image_folders]
            used = (
                folder
                for folder in folders
                if any(os.path.isfile(folder / name) for some in names.values() for name in some)
            )
            folder = next(used, folders[0])
        found = {image_id: folder / some[0] for image_id, some in names.items()}
        for image_id, (first, *others) in names.items():
            if others and not os.path.isfile(found[image_id]):
                found[image_id] = next(
                    (folder / name for name in others if os.path.isfile(folder / name)), folder / first
                )
        return {image_id: str(path) for image_id, path in found.items()}

    def make_object(
        self,
        annotation: dict,
        annotated_size: tuple[int, int],
        frame: Frame,
        changed: Counter,
        keep_misses: bool,
    ) -> dict | None:
        """Return the object of an annotation, counting what is changed; None if it has no box in the image."""
        width, height = frame.size
        scale = (width / annotated_size[0], height / annotated_size[1])
        annotated_box = self.read_box(annotation.get("bbox"), annotated_size, scale)
        box_xyxy = annotated_box and clip_box(annotated_box, width, height)
        if annotated_box and self.config.integer_boxes:
            box_xyxy = integer_box(annotated_box, width, height, keep_misses)
            if box_xyxy is not None:
                annotated_box = [float(int(value)) for value in annotated_box]
        if box_xyxy is None:
            return None
        if box_xyxy != annotated_box:
            changed["boxes are cut at their image's edge"] += 1
        if is_degenerate(box_xyxy):
            changed[KEPT_BOXES] += 1
        if self.config.name == "grefcoco" and annotation.get("iscrowd"):
            changed[CROWDS] += 1
        segmentation = annotation.get("segmentation")
        if segmentation and not is_segmentation(segmentation):
            segmentation = UNREADABLE  # a deeply nested value cannot be sent to another process
        object_id = f"{self.image_source}_{annotation['id']}"
        return {"object_id": object_id, "box": box_xyxy, "boxes": [box_xyxy], "segmentation": segmentation}

    def make_record(
        self,
        image: dict,
        path: str,
        frame: Frame,
        refs: list[tuple[int, dict]],
        annotations: dict[int, dict],
        categories: dict[int, str],
        dropped: Counter,
        changed: Counter,
        keep_misses: bool = False,
    ) -> dict:
        """
        Return a row with the segmentations as annotated, counting what is left out and changed; `refs` are pairs
        of the position of a reference's first sentence and the reference.
        """
        width, height = frame.size
        annotated_size = annotated_size_of(image) or frame.size
        if annotated_size != frame.size:
            changed["images have another size than annotated, boxes and masks are scaled to it"] += 1
        objects, sentences, positions, indices = [], [], [], {}
        for first_position, ref in refs:
            said = [
                (position, sentence)
                for position, sentence in enumerate(ref["sentences"], first_position)
                if has_words(sentence.get("sent"))
            ]
            if len(said) < len(ref["sentences"]):
                dropped["expressions without words"] += len(ref["sentences"]) - len(said)
            if not said:
                continue
            targets = target_ids(ref)
            if any(number not in annotations for number in targets):
                dropped["expressions of objects that instances.json lacks"] += len(said)
                continue
            # of several objects all or none are added
            found, found_changes = {}, Counter()
            for number in targets:
                if number not in indices:
                    annotation = annotations[number]
                    found[number] = self.make_object(annotation, annotated_size, frame, found_changes, keep_misses)
            if None in found.values():
                dropped["expressions of objects without a box in the image"] += len(said)
                continue
            changed.update(found_changes)
            for number, item in found.items():
                indices[number] = len(objects)
                objects.append({**item, "category": categories.get(annotations[number].get("category_id"))})
            for position, sentence in said:
                text = sentence["sent"].strip()  # `raw` is not in lower case
                named = [indices[number] for number in targets]
                phrase = {"start": 0, "end": len(text), "objects": named, "types": []}
                sentence_id = f"{self.config.name}_{sentence['sent_id']}"
                sentences.append({"sentence_id": sentence_id, "text": text, "phrases": [phrase]})
                positions.append(position)
        return {
            "image_id": self.id_of_image(image),
            "image": path,
            "width": width,
            "height": height,
            "annotated_size": annotated_size,
            "keep_misses": keep_misses,
            "frame": frame,
            "objects": objects,
            "sentences": sentences,
            "positions": positions,
        }


def read_instances(
    path: Path, annotation_ids: set[int], with_file_names: bool = False
) -> tuple[dict[int, dict], dict[int, dict], dict[int, str]]:
    """
    Return images by id, annotations by id, and names of categories by id of an `instances.json`.

    Args:
        path (`Path`): the file.
        annotation_ids (`set[int]`): the annotations that are wanted.
        with_file_names (`bool`, *optional*, defaults to `False`): whether images are found by their `file_name`.

    Raises:
        OSError: if the file is missing or damaged.
        ValueError: if a value that is read is of another kind, or a file name leads out of its folder.
    """
    instances, where = load_json(path), f"{str(path)!r}"
    check_fields(instances, dict.fromkeys(("images", "annotations", "categories"), LIST), where)
    image_kinds = {"id": INTEGER, **({"file_name": FILE_NAME} if with_file_names else {})}
    for number, image in enumerate(instances["images"]):
        check_fields(image, image_kinds, f"{where}, image {number}")
    for number, category in enumerate(instances["categories"]):
        check_fields(category, {"id": INTEGER, "name": TEXT}, f"{where}, category {number}")
        check_text(category["name"], f"{where}, the name of category {category['id']}")
    annotations = {}
    for number, item in enumerate(instances["annotations"]):
        check_fields(item, {"id": INTEGER}, f"{where}, annotation {number}")
        if item["id"] in annotation_ids:
            check_fields(item, {"category_id": INTEGER_OR_ABSENT}, f"{where}, annotation {number}")
            annotations[item["id"]] = item
    images = {image["id"]: image for image in instances["images"]}
    return images, annotations, {category["id"]: category["name"] for category in instances["categories"]}


def find_refs_file(folder: Path, stem: str) -> Path:
    """Return the file of references with a name without its ending: JSON if there is one, else a pickle."""
    as_json = folder / f"{stem}.json"
    return as_json if as_json.is_file() else folder / f"{stem}.p"


def read_refs(path: Path) -> list[dict]:
    """
    Return the references of a `refs(...).p` or `refs(...).json`, in their order: dicts with `ann_id`, `image_id`,
    `split` and `sentences`.

    Raises:
        OSError: if the file is missing or damaged.
        ValueError: if it contains anything but references.
    """
    refs, where = load_json(path) if path.suffix == ".json" else read_pickle(path), f"{str(path)!r}"
    for number, ref in enumerate(check_list(refs, where)):
        position = f"{where}, reference {number}"
        check_fields(ref, {"ann_id": TARGETS, "image_id": INTEGER, "split": SPLIT, "sentences": LIST}, position)
        for index, sentence in enumerate(ref["sentences"]):
            check_fields(sentence, {"sent_id": INTEGER}, f"{position}, sentence {index}")
            if isinstance(sentence.get("sent"), str):  # others are counted as expressions without words
                check_text(sentence["sent"], f"{position}.sentences[{index}].sent")
    return refs


def target_ids(ref: dict) -> list[int]:
    """
    Return the ids of the objects that a reference names, each once; none where it has no target.

    Example:

    ```python
    >>> from data_scripts.refcoco import target_ids

    >>> target_ids({"ann_id": 7}), target_ids({"ann_id": [7, 9, 7]}), target_ids({"ann_id": [-1]})
    ([7], [7, 9], [])

    ```"""
    value = ref["ann_id"]
    numbers = value if is_list(value) else [-1 if value is None else value]
    return [number for number in dict.fromkeys(numbers) if number != -1]


def splits_of(split: str) -> tuple[str, ...]:
    """
    Return the splits that a reference counts in, by the rule of the refer API's `getRefIds`: a reference of RefCLEF's
    "testAB" counts in testA and in testB, and each other one in its own split alone.

    Example:

    ```python
    >>> from data_scripts.refcoco import splits_of

    >>> splits_of("testAB"), splits_of("testA"), splits_of("val")
    (('testA', 'testB'), ('testA',), ('val',))

    ```"""
    letters = split.removeprefix("test")
    if split.startswith("test") and len(letters) > 1 and set(letters) <= set("ABC"):
        return tuple(f"test{letter}" for letter in sorted(set(letters)))
    return (split,)


def annotated_size_of(image: dict) -> tuple[int, int] | None:
    """Return (width, height) of an entry of an annotation file; None if it has none."""
    size = (image.get("width"), image.get("height"))
    return size if all(is_number(side) and side > 0 for side in size) else None


def is_segmentation(value: Any) -> bool:
    """
    Return whether it has the layout of a segmentation of COCO, whatever its numbers are.

    Example:

    ```python
    >>> from data_scripts.refcoco import is_segmentation

    >>> is_segmentation([[1, 1, 3, 1, 3, 3]]), is_segmentation([[[1, 1], [3, 1], [3, 3]]])
    (True, False)

    ```"""
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, dict):
            sides, counts = part.get("size"), part.get("counts")
            is_size = isinstance(sides, list) and all(type(side) is int for side in sides)
            if len(part) > 2 or not is_size or not isinstance(counts, str | list):
                return False
            part = counts if isinstance(counts, list) else []
        if not isinstance(part, list) or not all(type(number) in (int, float) for number in part):
            return False
    return True


def xywh_to_xyxy(box_xywh: Any, scale: tuple[float, float] = (1.0, 1.0)) -> list[float] | None:
    """
    Convert an annotated box [x, y, width, height] to [left, top, right, bottom], scaled by (horizontal, vertical);
    return None if it is not a box.

    Example:

    ```python
    >>> from data_scripts.refcoco import xywh_to_xyxy

    >>> xywh_to_xyxy([100, 200, 20, 10], scale=(0.5, 1.0))
    [50.0, 200.0, 60.0, 210.0]

    ```"""
    if not is_four_numbers(box_xywh):
        return None
    x, y, width, height = box_xywh
    across, down = scale
    return [x * across, y * down, (x + width) * across, (y + height) * down]


def encode_segmentation(
    segmentation: Any, annotated_size: tuple[int, int], size: tuple[int, int], keep_empty: bool = False
) -> dict | None:
    """
    Encode a segmentation of COCO as run lengths at the image's real size.

    Args:
        segmentation: polygons `[[x, y, x, y, ...], ...]`, run lengths `{"size": [height, width], "counts"}` with
            counts as a list or a string, or a list of such run lengths.
        annotated_size (`tuple[int, int]`): (width, height) that polygons are drawn on.
        size (`tuple[int, int]`): the image's (width, height); where it is another, the mask is scaled.
        keep_empty (`bool`, *optional*, defaults to `False`): return a mask without a pixel as one.

    Returns:
        `dict`: `{"size": [height, width], "counts": str}`, or None where nothing is left of it, or it cannot be read.

    Example:

    ```python
    >>> from data_scripts.refcoco import encode_segmentation

    >>> encode_segmentation([[1, 1, 3, 1, 3, 3, 1, 3]], (4, 4), (4, 4))
    {'size': [4, 4], 'counts': '52203'}

    ```"""
    parts = [segmentation] if isinstance(segmentation, dict) else segmentation
    if not isinstance(parts, list):
        return None
    try:
        runs = [run for part in parts if (run := encode_part(part, annotated_size, size)) is not None]
    except (ValueError, TypeError, KeyError, OverflowError):
        return None
    if not runs:
        return None
    return to_segmentation(merge_masks(runs), keep_empty)


def encode_part(part: Any, annotated_size: tuple[int, int], size: tuple[int, int]) -> dict | None:
    """Encode a polygon or run lengths at `size` (width, height), counts in bytes; None for fewer than 3 points."""
    width, height = size
    if isinstance(part, dict):
        rows, columns = part["size"]
        encoded = encode_counts(part["counts"], rows, columns)
        if (columns, rows) == tuple(size):
            return encoded
        return encode_mask(resize_to_nearest(decode_mask(encoded), height, width))
    if len(part) < 6 or len(part) % 2:
        return None
    points = np.array(part, dtype=np.float64).reshape(-1, 2)
    if not np.isfinite(points).all():
        return None
    if tuple(annotated_size) != (width, height):
        points *= (width / annotated_size[0], height / annotated_size[1])
    # an edge is followed pixel by pixel, however far away it is
    np.clip(points, (-width, -height), (2 * width, 2 * height), out=points)
    return encode_polygons([points.ravel().tolist()], height, width)


def describe_annotations(name: str) -> str:
    """Return where the annotations of a dataset come from, in a few sentences."""
    return f"{annotations_of(name)} {describe_copies(COPIES.get(name, ()))}".rstrip()


def annotations_of(name: str) -> str:
    """Return how the authors of a dataset distribute its annotations."""
    return GREFCOCO_ANNOTATIONS if name == "grefcoco" else ANNOTATIONS


def _source(name: str, counts: dict[str, tuple]) -> Source:
    folder, stem = REFERENCES[name]
    ending = "json" if name == "grefcoco" else "p"
    image_folder = "images/saiapr_tc-12/" if folder == "refclef" else "images/train2014/"
    return Source(
        name=name,
        builder=RefCoco,
        config_name=name,
        splits=tuple(counts),
        files=(f"{folder}/instances.json", f"{folder}/{stem}.{ending}", image_folder),
        distribution=f"{annotations_of(name)} {IMAGE_SOURCES['saiapr' if folder == 'refclef' else 'coco']}",
        counts=counts,
        copies=COPIES.get(name, ()),
        license="other",
        language="en",
    )


# (images, objects, expressions); None where no two sources agree. gRefCOCO's images are those of refcoco_unc; for all
# splits together, 60,287 objects and 278,232 expressions are published, 80,022 of several objects and 32,202 of none
SOURCES = [
    _source(
        "refcoco_unc",
        {
            "train": (16994, 42404, 120624),
            "val": (1500, 3811, 10834),
            "testA": (750, 1975, 5657),
            "testB": (750, 1810, 5095),
        },
    ),
    _source(
        "refcoco_google",
        {"train": (19213, 40000, None), "val": (4559, 5000, None), "test": (4527, 5000, None)},
    ),
    _source(
        "refcoco+_unc",
        {
            "train": (16992, 42278, 120191),
            "val": (1500, 3805, 10758),
            "testA": (750, 1975, 5726),
            "testB": (750, 1798, 4889),
        },
    ),
    _source(
        "refcocog_umd",
        {"train": (21899, 42226, 80512), "val": (1300, 2573, 4896), "test": (2600, 5023, 9602)},
    ),
    _source("refcocog_google", {"train": (24698, 44822, 85474), "val": (4650, 5000, 9536)}),
    _source("refclef_unc", dict.fromkeys(("train", "val", "testA", "testB", "testC"), (None, None, None))),
    _source(
        "refclef_berkeley",
        {"train": (None, None, 54127), "val": (None, None, 5842), "test": (None, None, 60103)},
    ),
    _source(
        "grefcoco",
        {
            "train": (16994, None, None),
            "val": (1500, None, None),
            "testA": (750, None, None),
            "testB": (750, None, None),
        },
    ),
]
