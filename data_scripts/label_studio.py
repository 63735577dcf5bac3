"""
Read the JSON export of Label Studio, a list of tasks, and write tasks with predictions, which it imports.

    [{"data": {"image": "/data/upload/1/0a1b2c3d-car.jpg"},
      "annotations": [{"result": [
          {"id": "r1", "type": "rectanglelabels", "original_width": 640, "original_height": 480,
           "value": {"x": 10, "y": 20, "width": 30, "height": 40, "rotation": 0, "rectanglelabels": ["car"]}},
          {"id": "r1", "type": "textarea", "value": {"text": ["the red car"]}}]}]}]

- Coordinates are percent of the image.
- The words of a region are the texts with its id, or its `meta`; else its label where the annotation has one such
  region.
- Regions with the same words are the answers to one expression. Words without a region are not annotated.
- A rotated rectangle or image is refused: a box cannot have its corners.
- The image is a URL, which is not fetched: a file is searched for by the last parts of its path.

Predictions have rectangles named `label` (and masks named `mask`) for the image named `image`, whose words are in the
text area named `text`. Files are served by Label Studio from a local folder, at `/data/local-files/?d=`.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote_plus, unquote, urlsplit

import numpy as np

from .findings import Findings
from .kinds import LIST, check_fields
from .masks import decode_segmentation
from .quoting import quote
from .reading import is_number
from .records import (
    NO_TARGET,
    LabeledObject,
    Written,
    expressions_of_objects,
    json_array,
    leave_out_fields,
    objects_of,
    read_records,
    size_fields,
    words_in,
)


ROTATED = "regions that are rotated"
LOCAL_FILES = "/data/local-files/?d="
LABEL = "object"  # of predicted regions; their words are texts
RUN_BITS = (3, 4, 8, 16)  # how many bits the length of a run in a brush mask may have
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


def write_label_studio(lines: Iterable[dict], findings: Findings, about: Written) -> Iterator[str]:
    """
    Yield the text of a file of tasks with predictions: a task per image, a region per box and one per mask.

    Args:
        lines (iterable of `dict`): the lines, see `records`.
        findings ([`Findings`]): counts what is left out or changed.
        about ([`Written`]): who predicted, by name, as `model_version`.

    Example:

    ```python
    >>> import json
    >>> from data_scripts.findings import Findings
    >>> from data_scripts.label_studio import write_label_studio
    >>> from data_scripts.records import Written

    >>> phrase = {"start": 0, "end": 7, "boxes": [[4, 3, 24, 18]], "score": 1.0}
    >>> expressions = [{"text": "the cup", "phrases": [phrase]}]
    >>> line = {"image": "1.jpg", "width": 40, "height": 30, "expressions": expressions}
    >>> (task,) = json.loads("".join(write_label_studio([line], Findings(), Written("reftr"))))
    >>> task["data"]["image"], [result["type"] for result in task["predictions"][0]["result"]]
    ('/data/local-files/?d=1.jpg', ['rectanglelabels', 'textarea'])

    ```"""
    tasks = {}
    for line in lines:
        leave_out_fields(line, {"category": "categories", "types": "types of phrases"}, findings)
        size, results = tasks.setdefault(line["image"], ((line["width"], line["height"]), []))
        for expression in line["expressions"]:
            for phrase in expression["phrases"]:
                words = expression["text"][phrase["start"] : phrase["end"]]
                objects = objects_of(phrase)
                findings.leave_out(NO_TARGET, not objects)
                for item in objects:
                    results += results_of_object(item, words, size, len(results), findings)
    yield from json_array(
        {
            "data": {"image": url_of_image(image)},
            "predictions": [{"model_version": about.name, "result": results}],
        }
        for image, (_, results) in tasks.items()
    )
    yield "\n"


def url_of_image(image: str) -> str:
    """
    Return the address that Label Studio shows an image from: its own, or that of a file in a local folder.

    Example:

    ```python
    >>> from data_scripts.label_studio import url_of_image

    >>> url_of_image("photos/a b.jpg"), url_of_image("https://host/1.jpg")
    ('/data/local-files/?d=photos/a%20b.jpg', 'https://host/1.jpg')

    ```"""
    if "://" in image:
        return image
    return LOCAL_FILES + quote_plus(image.lstrip("/"), safe="/").replace("+", "%20")


def results_of_object(
    item: dict, words: str, size: tuple[int, int], number: int, findings: Findings
) -> Iterator[dict]:
    """Yield the rectangles and the mask of an object with its words; `number` is that of the next result of a task."""
    width, height = size
    shared = {"to_name": "image", "original_width": width, "original_height": height, "image_rotation": 0}
    score = {"score": item["score"]} if "score" in item else {}
    for index, box in enumerate(item["boxes"]):
        clipped = np.clip(box, 0, [width, height, width, height])
        findings.changed.update(["boxes are clipped to their images"] * bool((clipped != box).any()))
        x0, y0, x1, y1 = (clipped / [width, height, width, height] * 100).tolist()
        value = {"x": x0, "y": y0, "width": x1 - x0, "height": y1 - y0, "rotation": 0}
        region = {"id": f"r{number + 2 * index}", **shared}
        labels = {**value, "rectanglelabels": [LABEL]}
        yield {**region, "type": "rectanglelabels", "from_name": "label", "value": labels, **score}
        yield {**region, "type": "textarea", "from_name": "text", "value": {**value, "text": [words]}}
    if "segmentation" in item:
        rle = encode_brush(decode_segmentation(item["segmentation"]))
        yield {
            "id": f"m{number}",
            **shared,
            "type": "brushlabels",
            "from_name": "mask",
            "value": {"format": "rle", "rle": rle, "brushlabels": [LABEL]},
            "meta": {"text": [words]},
            **score,
        }


def encode_brush(mask: np.ndarray) -> list[int]:
    """
    Return the bytes of a mask as Label Studio stores it: runs of 8-bit values, four equal ones per pixel.

    Args:
        mask (`np.ndarray` of shape `(height, width)`): nonzero in the object.

    Example:

    ```python
    >>> import numpy as np
    >>> from data_scripts.label_studio import encode_brush

    >>> encode_brush(np.array([[0, 1]]))
    [0, 0, 0, 8, 57, 27, 252, 96, 17, 255, 128]

    ```"""
    values = np.ravel(mask) != 0
    ends = [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist(), values.size]
    bits = [f"{4 * values.size:032b}{8 - 1:05b}", *(f"{size - 1:04b}" for size in RUN_BITS)]
    for start, end in itertools.pairwise(ends):
        value, left = 255 * int(values[start]), 4 * (end - start)
        while left:
            length = min(left, 1 << RUN_BITS[-1])
            index = next(index for index, size in enumerate(RUN_BITS) if length <= 1 << size)
            bits.append(f"1{index:02b}{length - 1:0{RUN_BITS[index]}b}{value:08b}")
            left -= length
    text = "".join(bits)
    num_bytes = -(-len(text) // 8)
    return list(int(text.ljust(8 * num_bytes, "0"), 2).to_bytes(num_bytes, "big"))
