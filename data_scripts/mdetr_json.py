"""
Read the annotations of MDETR, which GLIP and mmdetection use as well: COCO's JSON with one image entry per expression.

    {"images": [{"id": 0, "file_name": "COCO_train2014_000000581857.jpg", "height": 427, "width": 640,
                 "original_id": 581857, "caption": "the lady with the blue shirt", "dataset_name": "refcoco"}],
     "annotations": [{"image_id": 0, "bbox": [103.9, 300.0, 134.2, 177.4], "tokens_positive": [[4, 8]]}]}

- The entries of one image have one `file_name`, and their lines are joined.
- In RefCOCO, RefCOCO+ and RefCOCOg (`dataset_name`), the box is that of the expression: `tokens_positive` are its root
  noun alone, and are not read. Elsewhere each span of `tokens_positive` is a phrase, and all boxes of a span are its.
- There are no masks. The boxes of the Flickr30k files count pixels as the file does, which may be from 1, see
  `flickr30k_entities`.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from .findings import Findings
from .kinds import INTEGER, LIST, TEXT, check_fields
from .reading import load_json
from .records import expression_of_spans, size_fields, spans_of_tokens, to_box_list


# beginnings of `dataset_name` of which an expression is about one object
REFERRING = ("refcoco", "refexp", "referit", "refclef")


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
    if isinstance(dataset_name, str) and dataset_name.lower().startswith(REFERRING):
        boxes = [box for item in annotations for box in to_box_list(item.get("bbox"), "bbox")]
        return {"text": caption.strip(), "boxes": boxes}
    targets = []
    for item in annotations:
        spans = spans_of_tokens(item.get("tokens_positive"))
        if not spans:
            findings.leave_out("boxes without words of their caption")
        targets += [(span, {}, to_box_list(item.get("bbox"), "bbox")) for span in spans]
    return expression_of_spans(caption, targets)
