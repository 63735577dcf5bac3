"""
Read the JSON export of Label Studio: a list of tasks.

    [{"data": {"image": "/data/upload/1/0a1b2c3d-car.jpg"},
      "annotations": [{"result": [
          {"id": "r1", "type": "rectanglelabels", "original_width": 640, "original_height": 480,
           "value": {"x": 10, "y": 20, "width": 30, "height": 40, "rotation": 0, "rectanglelabels": ["car"]}},
          {"id": "r1", "type": "textarea", "value": {"text": ["the red car"]}}]}]}]

- Coordinates are percent of the image.
- The words of a region are the texts with its id, or its `meta`; else its label where the annotation has one such
  region.
- A rotated rectangle or image is refused: a box cannot have its corners.
- The image is a URL, which is not fetched: a file is searched for by the last parts of its path.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from .findings import Findings
from .kinds import LIST, check_fields
from .quoting import quote
from .reading import is_number
from .records import LabeledObject, expressions_of_objects, read_records, size_fields, words_in


ROTATED = "regions that are rotated"
IMAGE_FILE = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?|ppm|avif)$", re.IGNORECASE)


def read_label_studio(path: Path, findings: Findings) -> Iterator[tuple[str, dict]]:
    """
    Yield (position, line) of each expression of a file.

    Args:
        path (`Path`): the file.
        findings ([`Findings`]): takes what is left out, and malformed tasks.

    Raises:
        OSError: if the file is missing or damaged.
    """
    for where, task in read_records(path, findings):
        image, annotations = None, []
        with findings.entry(where):
            check_fields(task, {"annotations": LIST}, "the task")
            image = image_of_task(task)
            for annotation in task["annotations"]:
                check_fields(annotation, {"result": LIST}, "annotations")
                if annotation.get("was_cancelled"):
                    findings.leave_out("annotations that were skipped")
                else:
                    annotations.append(annotation["result"])
        if image is not None and not annotations:
            findings.leave_out("tasks without an annotation")
        for results in annotations:
            yield from lines_of_results(where, image, results, findings)


def lines_of_results(where: str, image: str, results: list, findings: Findings) -> Iterator[tuple[str, dict]]:
    """Yield (position, line) of each expression of one annotation of a task."""
    words, regions = defaultdict(list), []
    for result in results:
        if not isinstance(result, dict) or not isinstance(result.get("value"), dict):
            findings.refuse(where, f"a result is {quote(result)}; expected an object with a value.")
        elif result.get("type") == "textarea":
            words[result.get("id")] += words_in(result["value"].get("text"))
        else:
            regions.append(result)
    objects, sizes = [], {}
    for result in regions:
        position = f"{where}, region {quote(result.get('id'))}"
        with findings.entry(position):
            target = target_of_region(result, position, findings)
            if target is not None:
                meta = result.get("meta")
                noted = words_in(meta.get("text")) if isinstance(meta, dict) else []
                texts = words.pop(result.get("id"), []) or noted
                sizes[position] = size_fields(result.get("original_width"), result.get("original_height"))
                objects.append(LabeledObject(position, target, label_of(result), texts))
    findings.leave_out("texts without a region", sum(map(len, words.values())))
    for position, expression in expressions_of_objects(objects, findings):
        line = {"image": image, **sizes[position], "box_format": "xywh_fraction"}
        yield position, {**line, "expressions": [expression]}


def target_of_region(result: dict, where: str, findings: Findings) -> dict | None:
    """
    Return the fields of a line for a region; None where it is refused, or of a type that has none.

    Raises:
        ValueError: if its numbers are malformed.
    """
    kind, value = str(result.get("type")), result["value"]
    for name, rotation in (
        ("value.rotation", value.get("rotation")),
        ("image_rotation", result.get("image_rotation")),
    ):
        if rotation:
            findings.refuse(where, f"{name} is {quote(rotation)}; expected 0: draw it again without.", ROTATED)
            return None
    if kind.startswith("rectangle"):
        numbers = [value.get(name) for name in ("x", "y", "width", "height")]
        if not all(map(is_number, numbers)):
            raise ValueError(f"value is {quote(value)}; expected x, y, width and height in percent.")
        return {"box": [number / 100 for number in numbers]}
    if kind.startswith("polygon"):
        size = size_fields(result.get("original_width"), result.get("original_height"))
        points = value.get("points")
        are_points = isinstance(points, list) and all(
            isinstance(point, list) and len(point) == 2 and all(map(is_number, point)) for point in points
        )
        if not are_points or not size:
            raise ValueError(f"value.points is {quote(points)}; expected [x, y] in percent, and the original size.")
        return {"polygon": [[n for x, y in points for n in (x * size["width"] / 100, y * size["height"] / 100)]]}
    findings.leave_out(f"results of type {quote(kind)}")
    return None


def label_of(result: dict) -> str | None:
    """Return the first label of a region, which is in a field of its type's name."""
    labels = result["value"].get(result.get("type"))
    return labels[0] if isinstance(labels, list) and labels and isinstance(labels[0], str) else None


def image_of_task(task: dict) -> str:
    """
    Return the path in the URL of a task's image.

    Raises:
        ValueError: if the task has none, or several.
    """
    data = task.get("data")
    data = data if isinstance(data, dict) else {}
    urls = [data["image"]] if isinstance(data.get("image"), str) else [url for url in data.values() if is_image(url)]
    if len(urls) != 1:
        raise ValueError(f"data is {quote(data)}; expected the URL of one image, as 'image'.")
    parts = urlsplit(urls[0])
    local = parse_qs(parts.query).get("d")  # files that Label Studio serves from a folder
    return (local[0] if local else unquote(parts.path)).lstrip("/")


def is_image(url: Any) -> bool:
    """Return whether a value is the URL of an image by its name."""
    return isinstance(url, str) and IMAGE_FILE.search(urlsplit(url).path) is not None
