"""
Read COCO's JSON of instances, as many datasets and tools write it (COCO, LVIS, Objects365, CVAT, Roboflow).

    {"images": [{"id": 1, "file_name": "1.jpg", "width": 640, "height": 480}],
     "annotations": [{"image_id": 1, "category_id": 3, "bbox": [x, y, width, height], "segmentation": [[x, y, ...]]}],
     "categories": [{"id": 3, "name": "car"}]}

Annotations have no expressions in COCO itself: an annotation's own words are taken where it has any (`caption`,
`description` or the like, in it or in its `attributes`), else its category where the image has one such object. Groups
of objects (`iscrowd`) are left out unless they have words.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from .findings import Findings
from .kinds import INTEGER, INTEGER_OR_ABSENT, LIST, TEXT, check_fields
from .reading import load_json
from .records import LabeledObject, expressions_of_objects, size_fields, texts_of


def read_coco(
    path: Path, findings: Findings, box_format: str = "xywh", text_field: str | None = None
) -> Iterator[tuple[str, dict]]:
    """
    Yield (position, line) of each expression of a file.

    Args:
        path (`Path`): the file.
        findings ([`Findings`]): takes what is left out, and malformed entries.
        box_format (`str`, *optional*, defaults to `"xywh"`): convention of the boxes.
        text_field (`str`, *optional*): field or attribute of an annotation that has its words.

    Raises:
        OSError, ValueError: if the file is damaged, or has no lists of images and annotations.
    """
    content, where = load_json(path), f"{str(path)!r}"
    check_fields(content, dict.fromkeys(("images", "annotations"), LIST), where)
    categories = {}
    for number, category in enumerate(content.get("categories", [])):
        check_fields(category, {"id": INTEGER, "name": TEXT}, f"{where}, category {number}")
        categories[category["id"]] = category["name"]
    annotations = defaultdict(list)
    for number, item in enumerate(content["annotations"]):
        position = f"{where}, annotation {number}"
        with findings.entry(position):
            check_fields(item, {"image_id": INTEGER, "category_id": INTEGER_OR_ABSENT}, "the annotation")
            annotations[item["image_id"]].append((position, item))
    for number, image in enumerate(content["images"]):
        line, objects = None, []
        with findings.entry(f"{where}, image {number}"):
            check_fields(image, {"id": INTEGER, "file_name": TEXT}, "the image")
            size = size_fields(image.get("width"), image.get("height"))
            line = {"image": image["file_name"], **size, "box_format": box_format}
            for position, item in annotations.pop(image["id"], []):
                target = target_of_annotation(item)
                category = categories.get(item.get("category_id"))
                is_group = bool(item.get("iscrowd"))
                objects.append(LabeledObject(position, target, category, texts_of(item, text_field), is_group))
        located = [item for item in objects if item.target]
        findings.leave_out("annotations without a box or mask", len(objects) - len(located))
        for position, expression in expressions_of_objects(located, findings):
            yield position, {**line, "expressions": [expression]}
    findings.leave_out("annotations of images that the file lacks", sum(map(len, annotations.values())))


def target_of_annotation(item: dict) -> dict:
    """Return the fields of a line for the box and the mask of an annotation."""
    target = {} if item.get("bbox") in (None, []) else {"box": item["bbox"]}
    segmentation = item.get("segmentation")
    if isinstance(segmentation, list):  # COCO's own polygons of two points have no area
        segmentation = [part for part in segmentation if not isinstance(part, list) or len(part) >= 6]
    return {**target, "segmentation": segmentation} if segmentation else target
