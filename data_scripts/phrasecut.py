"""
Read PhraseCut (Wu et al., CVPR 2020) from its authors' files: phrases about images of Visual Genome, with all their
instances as boxes and polygons.

    refer_train.json  refer_val.json  refer_test.json  refer_miniv.json
        [{"task_id": "2375429__8", "image_id": 2375429, "phrase": "walking people", "ann_ids": [1, 2],
          "instance_boxes": [[x, y, width, height], ...],
          "Polygons": [an instance: [a part: [[x, y], [x, y], ...], ...], ...]}, ...]
    image_data_split.json       optional: sizes and COCO ids of the images
    VG_100K/  VG_100K_2/        or one folder of all images, <image_id>.jpg

Each instance is an object with its box and its mask, and a phrase refers to all its instances. `image_id` is that of
`visual_genome`, so that images that other datasets hold out can be left out by `combine`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .findings import Findings
from .kinds import DIGITS_OR_NONE, INTEGER, LIST, TEXT, check_fields, check_list
from .quoting import quote
from .reading import is_number, load_json
from .records import read_records, size_fields, target_of


IMAGES_FILE = "image_data_split.json"


def read_phrasecut(path: Path, findings: Findings, box_format: str = "xywh") -> Iterator[tuple[str, dict]]:
    """
    Yield (position, line) of each phrase of a file.

    Args:
        path (`Path`): the file.
        findings ([`Findings`]): takes what is left out, and malformed entries.
        box_format (`str`, *optional*, defaults to `"xywh"`): convention of the boxes.

    Raises:
        OSError, ValueError: if the file, or the image_data_split.json in its folder, is damaged.
    """
    images = read_image_data(path.with_name(IMAGES_FILE))
    for where, record in read_records(path, findings):
        line = None
        with findings.entry(where):
            check_fields(
                record, {"image_id": INTEGER, "phrase": TEXT, "instance_boxes": LIST, "Polygons": LIST}, "the entry"
            )
            image_id = record["image_id"]
            expression = {"text": record["phrase"].strip(), **target_of(list_instances(record, findings))}
            image = images.get(image_id, {})
            coco = "" if image.get("coco_id") is None else f"_coco_{image['coco_id']}"
            size = size_fields(image.get("width"), image.get("height"))
            line = {"image": f"{image_id}.jpg", "image_id": f"vg_{image_id}{coco}", **size, "box_format": box_format}
            line["expressions"] = [expression]
        if line is not None:
            yield where, line


def read_image_data(path: Path) -> dict[int, dict]:
    """Return the entries of `image_data_split.json` by image id; none if the file does not exist."""
    if not path.is_file():
        return {}
    where, images = f"{str(path)!r}", {}
    for number, image in enumerate(check_list(load_json(path), where)):
        check_fields(image, {"image_id": INTEGER, "coco_id": DIGITS_OR_NONE}, f"{where}, image {number}")
        images[image["image_id"]] = image
    return images


def list_instances(record: dict, findings: Findings) -> list[dict]:
    """
    Return the box and the polygons [x, y, x, y, ...] of each instance of a phrase. Parts of fewer than three points
    have no area.

    Raises:
        ValueError: if there is no box, or `Polygons` is not a list of as many instances, of parts, of points [x, y],
            nor empty.

    Example:

    ```python
    >>> from data_scripts.findings import Findings
    >>> from data_scripts.phrasecut import list_instances

    >>> polygons = [[[[1, 2], [3, 4], [5, 6]], [[7, 8]]]]
    >>> list_instances({"instance_boxes": [[1, 2, 4, 4]], "Polygons": polygons}, Findings())
    [{'box': [1, 2, 4, 4], 'polygon': [[1, 2, 3, 4, 5, 6]]}]

    ```"""
    boxes = record["instance_boxes"]
    instances = record["Polygons"] or [[]] * len(boxes)
    if not boxes:
        raise ValueError("instance_boxes is []; expected a box for each instance of the phrase.")
    if len(instances) != len(boxes):
        raise ValueError(f"Polygons has {len(instances)} instances; expected {len(boxes)}, as instance_boxes.")
    found = []
    for index, (box, parts) in enumerate(zip(boxes, instances, strict=True)):
        polygons = []
        for part in check_list(parts, f"Polygons[{index}]"):
            if not isinstance(part, list) or not all(is_point(point) for point in part):
                raise ValueError(f"Polygons[{index}] has {quote(part)}; expected a list of points [x, y].")
            if len(part) >= 3:
                polygons.append([number for point in part for number in point])
            else:
                findings.changed["polygons of fewer than three points are left out of their mask"] += 1
        found.append({"box": box, **({"polygon": polygons} if polygons else {})})
    return found


def is_point(value: Any) -> bool:
    """Return whether a value is a list of two coordinates."""
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))
