"""
Read and write ODVG JSON Lines, the annotations of Grounding DINO in mmdetection and Open-GroundingDINO.

    {"filename": "1.jpg", "height": 480, "width": 640,
     "grounding": {"caption": "a car near two trees",
                   "regions": [{"bbox": [10, 20, 110, 90], "phrase": "a car", "tokens_positive": [[0, 5]]},
                               {"bbox": [[200, 5, 260, 190], [300, 5, 360, 190]], "phrase": "two trees"}]}}

- Each box is an object: a phrase with several boxes or regions refers to all of them. A phrase without a region is not
  annotated, since nothing in a line could say that it refers to nothing.
- `tokens_positive` say where a phrase is in the caption; without them its text is looked for.
- `bbox` are the corners, in pixels in mmdetection, 0..1 in other tools, which the build recognizes and reports.
- `detection`, of lines without a caption: `{"instances": [{"bbox": [...], "category": "car"}]}`; categories that occur
  once in their image are expressions.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from .findings import Findings
from .kinds import LIST, TEXT, check_fields
from .records import (
    NO_TARGET,
    WITHOUT_WORDS,
    LabeledObject,
    Written,
    box_around,
    expression_of_spans,
    expressions_of_objects,
    leave_out_fields,
    objects_of,
    read_records,
    size_fields,
    spans_of_tokens,
    to_box_list,
    to_json,
)


def read_odvg(path: Path, findings: Findings, box_format: str = "xyxy") -> Iterator[tuple[str, dict]]:
    """
    Yield (position, line) of each line of a file that has expressions.

    Args:
        path (`Path`): the file.
        findings ([`Findings`]): takes what is left out, and malformed lines.
        box_format (`str`, *optional*, defaults to `"xyxy"`): convention of the boxes.

    Raises:
        OSError: if the file is missing or damaged.
    """
    for where, record in read_records(path, findings):
        expressions = []
        with findings.entry(where):
            check_fields(record, {"filename": TEXT}, "the line")
            if "grounding" in record:
                expressions = read_grounding(record["grounding"], findings)
            elif "detection" in record:
                expressions = read_detection(record["detection"], findings)
            else:
                raise ValueError("the line has neither 'grounding' nor 'detection'; expected one of them.")
        if expressions:
            size = size_fields(record.get("width"), record.get("height"))
            line = {"image": record["filename"], **size, "box_format": box_format}
            yield where, {**line, "expressions": expressions}


def read_grounding(grounding: dict, findings: Findings) -> list[dict]:
    """Return the expression of a caption with regions, in a list that is empty if there are none."""
    check_fields(grounding, {"caption": TEXT, "regions": LIST}, "grounding")
    targets = []
    for index, region in enumerate(grounding["regions"]):
        check_fields(region, {"bbox": LIST}, f"grounding.regions[{index}]")
        boxes, phrase = to_box_list(region["bbox"], f"grounding.regions[{index}].bbox"), region.get("phrase")
        spans = spans_of_tokens(region.get("tokens_positive") or [])
        spans = spans or [text for text in (phrase if isinstance(phrase, list) else [phrase]) if isinstance(text, str)]
        if not spans:
            findings.leave_out(WITHOUT_WORDS, len(boxes))
        targets += [(span, boxes) for span in spans]
    expression = expression_of_spans(grounding["caption"], targets)
    return [] if expression is None else [expression]


def read_detection(detection: dict, findings: Findings) -> list[dict]:
    """Return the categories of objects that occur once in their image as expressions."""
    check_fields(detection, {"instances": LIST}, "detection")
    objects = []
    for index, item in enumerate(detection["instances"]):
        check_fields(item, {"bbox": LIST, "category": TEXT}, f"detection.instances[{index}]")
        objects.append(LabeledObject("", {"box": item["bbox"]}, item["category"]))
    return [expression for _, expression in expressions_of_objects(objects, findings)]


def write_odvg(lines: Iterable[dict], findings: Findings, about: Written) -> Iterator[str]:
    """
    Yield the text of a file: a line per expression, a region per object.

    Args:
        lines (iterable of `dict`): the lines, see `records`.
        findings ([`Findings`]): counts what is left out.
        about ([`Written`]): their dataset, which the format does not name.

    Example:

    ```python
    >>> from data_scripts.findings import Findings
    >>> from data_scripts.odvg import write_odvg
    >>> from data_scripts.records import Written

    >>> phrase = {"start": 0, "end": 7, "boxes": [[1, 2, 3, 4]]}
    >>> expressions = [{"text": "the cup", "phrases": [phrase]}]
    >>> line = {"image": "1.jpg", "width": 40, "height": 30, "expressions": expressions}
    >>> (text,) = write_odvg([line], Findings(), Written("cups"))
    >>> text[:84]
    '{"filename": "1.jpg", "height": 30, "width": 40, "grounding": {"caption": "the cup",'

    ```"""
    for line in lines:
        leave_out_fields(
            line, {"segmentation": "masks", "category": "categories", "types": "types of phrases"}, findings
        )
        for expression in line["expressions"]:
            text, regions = expression["text"], []
            for phrase in expression["phrases"]:
                start, end = phrase["start"], phrase["end"]
                named = {"phrase": text[start:end], "tokens_positive": [[start, end]]}
                objects = objects_of(phrase)
                findings.leave_out(NO_TARGET, not objects)
                for item in objects:
                    score = {"score": item["score"]} if "score" in item else {}
                    regions.append({"bbox": box_around(item, findings), **named, **score})
            if not regions:
                continue
            size = {"height": line["height"], "width": line["width"]}
            record = {"filename": line["image"], **size, "grounding": {"caption": text, "regions": regions}}
            yield f"{to_json(record)}\n"
