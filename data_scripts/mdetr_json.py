"""
Read and write the annotations of MDETR, which GLIP and mmdetection use as well: COCO's JSON with one image entry per
expression.

    {"images": [{"id": 0, "file_name": "COCO_train2014_000000581857.jpg", "height": 427, "width": 640,
                 "original_id": 581857, "caption": "the lady with the blue shirt", "dataset_name": "refcoco"}],
     "annotations": [{"image_id": 0, "bbox": [103.9, 300.0, 134.2, 177.4], "tokens_positive": [[4, 8]]}]}

- The entries of one image have one `file_name`, and their lines are joined.
- In RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO (`dataset_name`), boxes are those of the expression: `tokens_positive`
  are its root noun alone, and are not read. Elsewhere each span of `tokens_positive` is a phrase.
- Each annotation is an object: a phrase with several refers to all of them; in Flickr30k, they are the boxes of one
  object. One with `"empty": true`, as gRefCOCO's authors write it, says that the phrase refers to nothing in the
  image; a caption without annotations does not.
- There are no masks. The boxes of the Flickr30k files count pixels as the file does, which may be from 1, see
  `flickr30k_entities`.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .findings import Findings
from .kinds import INTEGER, LIST, TEXT, check_fields
from .reading import load_json
from .records import (
    Written,
    box_around,
    expression_of_spans,
    is_expression,
    json_array,
    leave_out_fields,
    objects_of,
    size_fields,
    spans_of_tokens,
    target_of,
    to_box_list,
    to_json,
    to_xywh,
)


# beginnings of `dataset_name` of which a caption is one expression
REFERRING = ("refcoco", "grefcoco", "refexp", "referit", "refclef")
# beginning of `dataset_name` of which the boxes of a phrase are those of one object
UNITED = "flickr"
CATEGORIES = [{"supercategory": "object", "id": 1, "name": "object"}]


def read_mdetr(path: Path, findings: Findings, box_format: str = "xywh") -> Iterator[tuple[str, dict]]:
    """
    Yield (position, line) of each caption of a file that has a box.

    Args:
        path (`Path`): the file.
        findings ([`Findings`]): takes what is left out, and malformed entries.
        box_format (`str`, *optional*, defaults to `"xywh"`): convention of the boxes.

    Raises:
        OSError, ValueError: if the file is damaged, or has no lists of images and annotations.
    """
    content, where = load_json(path), f"{str(path)!r}"
    check_fields(content, dict.fromkeys(("images", "annotations"), LIST), where)
    annotations = defaultdict(list)
    for number, item in enumerate(content["annotations"]):
        with findings.entry(f"{where}, annotation {number}"):
            check_fields(item, {"image_id": INTEGER}, "the annotation")
            annotations[item["image_id"]].append(item)
    for number, image in enumerate(content["images"]):
        position, expression = f"{where}, image {number}", None
        with findings.entry(position):
            check_fields(image, {"id": INTEGER, "file_name": TEXT, "caption": TEXT}, "the image")
            expression = make_expression(image, annotations.pop(image["id"], []), findings)
        if expression is not None:
            size = size_fields(image.get("width"), image.get("height"))
            line = {"image": image["file_name"], **size, "box_format": box_format}
            yield position, {**line, "expressions": [expression]}
    findings.leave_out("boxes of images that the file lacks", sum(map(len, annotations.values())))


def make_expression(image: dict, annotations: list[dict], findings: Findings) -> dict | None:
    """Return the expression of an image entry; None where it has no box."""
    caption, dataset_name = image["caption"], image.get("dataset_name")
    if not annotations:
        findings.leave_out("captions without a box")
        return None
    if is_referring(dataset_name):
        return {"text": caption.strip(), **target_of([{"box": box} for item in annotations for box in boxes_of(item)])}
    targets = []
    for item in annotations:
        spans = spans_of_tokens(item.get("tokens_positive"))
        if not spans:
            findings.leave_out("boxes without words of their caption")
        targets += [(span, boxes_of(item)) for span in spans]
    expression = expression_of_spans(caption, targets)
    if expression is None or not isinstance(dataset_name, str) or not dataset_name.lower().startswith(UNITED):
        return expression
    phrases = [
        {"start": phrase["start"], "end": phrase["end"], "boxes": [item["box"] for item in objects_of(phrase)]}
        for phrase in expression["phrases"]
    ]
    return {**expression, "phrases": phrases}


def boxes_of(annotation: dict) -> list[list]:
    """Return the boxes of an annotation; none if it says that its phrase refers to nothing."""
    return [] if annotation.get("empty") is True else to_box_list(annotation.get("bbox"), "bbox")


def is_referring(dataset_name: Any) -> bool:
    """Return whether each caption of a dataset is one expression, by its name."""
    return isinstance(dataset_name, str) and dataset_name.lower().startswith(REFERRING)


def write_mdetr(lines: Iterable[dict], findings: Findings, about: Written) -> Iterator[str]:
    """
    Yield the text of a file: an image entry per expression, an annotation per object.

    Args:
        lines (iterable of `dict`): the lines, see `records`.
        findings ([`Findings`]): counts what is left out.
        about ([`Written`]): their dataset. The part of its name before `_` is `dataset_name`, as "refcoco+" of
            refcoco+_unc; expressions with phrases are never of a dataset of `REFERRING`.

    Example:

    ```python
    >>> import json
    >>> from data_scripts.findings import Findings
    >>> from data_scripts.mdetr_json import write_mdetr
    >>> from data_scripts.records import Written

    >>> expressions = [{"text": "the cup", "phrases": [{"start": 0, "end": 7, "boxes": [[1, 2, 30, 40]]}]}]
    >>> line = {"image": "1.jpg", "width": 40, "height": 30, "expressions": expressions}
    >>> content = json.loads("".join(write_mdetr([line], Findings(), Written("cups"))))
    >>> content["images"][0]["caption"], content["annotations"][0]["bbox"]
    ('the cup', [1, 2, 29, 38])

    ```"""
    annotations = []
    yield '{"images": '
    yield from json_array(entries_of_lines(lines, findings, about, annotations))
    yield ',\n"annotations": '
    yield from json_array(annotations)
    yield f',\n"categories": {to_json(CATEGORIES)}, "info": [], "licenses": []}}\n'


def entries_of_lines(
    lines: Iterable[dict], findings: Findings, about: Written, annotations: list[dict]
) -> Iterator[dict]:
    """Yield the image entry of each expression, and add its annotations to a list."""
    name, number = about.name.partition("_")[0], 0
    for original_id, line in enumerate(lines, start=1):
        leave_out_fields(
            line, {"segmentation": "masks", "category": "categories", "types": "types of phrases"}, findings
        )
        for expression in line["expressions"]:
            number += 1
            for phrase in expression["phrases"]:
                boxes = [to_xywh(box_around(item, findings)) for item in objects_of(phrase)]
                for x0, y0, width, height in boxes or [(0, 0, 0, 0)]:
                    annotations.append(
                        {
                            "id": len(annotations) + 1,
                            "image_id": number,
                            "category_id": 1,
                            "bbox": [x0, y0, width, height],
                            "area": width * height,
                            "iscrowd": 0,
                            "empty": not boxes,
                            "tokens_positive": [[phrase["start"], phrase["end"]]],
                        }
                    )
            is_caption = is_referring(name) and not is_expression(expression)
            yield {
                "id": number,
                "file_name": line["image"],
                "height": line["height"],
                "width": line["width"],
                "original_id": original_id,
                "caption": expression["text"],
                "dataset_name": "captions" if is_caption else name,
                "tokens_negative": [[0, len(expression["text"])]],
            }
