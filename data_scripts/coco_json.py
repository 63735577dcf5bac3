"""
Read and write COCO's JSON of instances, as many datasets and tools write it (COCO, LVIS, Objects365, CVAT, Roboflow).

    {"images": [{"id": 1, "file_name": "1.jpg", "width": 640, "height": 480}],
     "annotations": [{"image_id": 1, "category_id": 3, "bbox": [x, y, width, height], "segmentation": [[x, y, ...]]}],
     "categories": [{"id": 3, "name": "car"}]}

Annotations have no expressions in COCO itself: an annotation's own words are taken where it has any (`caption`,
`description` or the like, in it or in its `attributes`), else its category where the image has one such object. Words
that several annotations of an image have refer to all of these; the format has no words that refer to nothing. Groups
of objects (`iscrowd`) are left out unless they have words. An annotation that is written has the expressions of its
object as `captions`.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from .findings import Findings
from .kinds import INTEGER, INTEGER_OR_ABSENT, LIST, TEXT, check_fields
from .masks import area_of
from .reading import load_json
from .records import (
    LabeledObject,
    Written,
    box_around,
    expressions_of_objects,
    is_expression,
    json_array,
    leave_out_fields,
    objects_of,
    size_fields,
    texts_of,
    to_json,
    to_xywh,
)


NAMELESS = "object"  # the category of objects without one, since COCO requires one


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


def write_coco(lines: Iterable[dict], findings: Findings, about: Written) -> Iterator[str]:
    """
    Yield the text of a file: an image entry per line, an annotation per object, with its expressions as `captions`.

    Args:
        lines (iterable of `dict`): the lines, see `records`.
        findings ([`Findings`]): counts what is left out or changed.
        about ([`Written`]): their dataset; all its splits have the same numbers for its categories.

    Example:

    ```python
    >>> import json
    >>> from data_scripts.coco_json import write_coco
    >>> from data_scripts.findings import Findings
    >>> from data_scripts.records import Written

    >>> phrase = {"start": 0, "end": 7, "boxes": [[1, 2, 30, 40]], "category": "cup"}
    >>> expressions = [{"text": "the cup", "phrases": [phrase]}]
    >>> line = {"image": "1.jpg", "width": 40, "height": 30, "expressions": expressions}
    >>> content = json.loads("".join(write_coco([line], Findings(), Written("cups", ["cup"]))))
    >>> content["annotations"][0]["bbox"], content["annotations"][0]["captions"]
    ([1, 2, 29, 38], ['the cup'])

    ```"""
    names = dict.fromkeys([*about.categories, NAMELESS])
    category_ids = {name: number for number, name in enumerate(names, start=1)}
    annotations = []
    yield '{"images": '
    yield from json_array(entries_of_images(lines, findings, category_ids, annotations))
    yield ',\n"annotations": '
    yield from json_array(annotations)
    categories = [{"id": number, "name": name} for name, number in category_ids.items()]
    yield f',\n"categories": {to_json(categories)}}}\n'


def entries_of_images(
    lines: Iterable[dict], findings: Findings, category_ids: dict[str, int], annotations: list[dict]
) -> Iterator[dict]:
    """Yield the image entry of each line, and add its annotations to a list."""
    for number, line in enumerate(lines, start=1):
        leave_out_fields(line, {"types": "types of phrases"}, findings)
        objects = {}
        for expression in line["expressions"]:
            if not is_expression(expression):
                findings.changed["phrases of captions are expressions of their own"] += len(expression["phrases"])
            for phrase in expression["phrases"]:
                for item in objects_of(phrase):
                    key = to_json([item["boxes"], item.get("segmentation"), item.get("category")])
                    texts = objects.setdefault(key, (item, []))[1]
                    texts.append(expression["text"][phrase["start"] : phrase["end"]])
        for item, texts in objects.values():
            bbox = to_xywh(box_around(item, findings))
            findings.changed.update([f"objects without a category are of {NAMELESS!r}"] * ("category" not in item))
            mask = item.get("segmentation")
            segmentation = {} if mask is None else {"segmentation": mask}
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": category_ids[item.get("category", NAMELESS)],
                    "bbox": bbox,
                    "area": bbox[2] * bbox[3] if mask is None else area_of(mask),
                    "iscrowd": 0,
                    **segmentation,
                    "captions": texts,
                }
            )
        yield {"id": number, "file_name": line["image"], "width": line["width"], "height": line["height"]}


def write_coco_results(lines: Iterable[dict], findings: Findings, about: Written) -> Iterator[str]:
    """
    Yield the text of a file of results, which `pycocotools.coco.COCO.loadRes` reads: one per box, so none for a phrase
    that refers to nothing.

    Args:
        lines (iterable of `dict`): the lines, see `records`, and `result`, the `image_id` and the `category_id` of
            their image and category in the file that they are compared with.
        findings ([`Findings`]): counts what is left out.
        about ([`Written`]): their dataset, which results do not name.

    Example:

    ```python
    >>> import json
    >>> from data_scripts.coco_json import write_coco_results
    >>> from data_scripts.findings import Findings
    >>> from data_scripts.records import Written

    >>> phrase = {"start": 0, "end": 7, "boxes": [[1, 2, 30, 40]], "score": 1.0}
    >>> expressions = [{"text": "the cup", "phrases": [phrase]}]
    >>> line = {"image": "1.jpg", "result": {"image_id": 7, "category_id": 1}, "expressions": expressions}
    >>> json.loads("".join(write_coco_results([line], Findings(), Written("cups"))))
    [{'image_id': 7, 'category_id': 1, 'bbox': [1, 2, 29, 38], 'score': 1.0, 'label': 'the cup'}]

    ```"""
    yield from json_array(
        {
            **line["result"],
            "bbox": to_xywh(box),
            "score": item["score"],
            **({"segmentation": item["segmentation"]} if "segmentation" in item else {}),
            "label": expression["text"][phrase["start"] : phrase["end"]],
        }
        for line in lines
        for expression in line["expressions"]
        for phrase in expression["phrases"]
        for item in objects_of(phrase)
        for box in item["boxes"]
    )
    yield "\n"
