"""
Read the JSON Lines that PaliGemma and Florence-2 are fine-tuned with, as Roboflow exports them.

    {"image": "1.jpg", "prefix": "detect car ; dog", "suffix": "<loc0123><loc0456><loc0789><loc1000> car ; ..."}
    {"image": "1.jpg", "prefix": "<OD>", "suffix": "car<loc_12><loc_34><loc_567><loc_890>dog<loc_..."}

- PaliGemma: top, left, bottom, right (y before x) of 0..1023, 1024ths of the image; the label follows.
- Florence-2: left, top, right, bottom of 0..999, of which each stands for the middle of a thousandth; the label is
  before them.
- A label is an expression, which refers to all boxes that have it. A name that PaliGemma is asked for, as the prefix
  "detect car ; dog" does, and that its answer lacks, refers to nothing in the image.
- Masks in `<seg>` tokens are not decoded.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .findings import Findings
from .kinds import TEXT, check_fields
from .quoting import quote
from .reading import has_words
from .records import (
    LabeledObject,
    expressions_of_objects,
    read_records,
    size_fields,
    target_of,
    words_of_category,
)


PALIGEMMA = re.compile(r"((?:<loc\d{4}>){4})((?:<seg\d{3}>)*)([^<;]*)")
FLORENCE = re.compile(r"([^<>]*)((?:<loc_\d{1,3}>)+)")
ASKED = re.compile(r"\s*(?:detect|segment)\s+([^<>]+)")
BINS = {"paligemma": 1024, "florence": 1000}


def read_loc_tokens(path: Path, findings: Findings) -> Iterator[tuple[str, dict]]:
    """
    Yield (position, line) of each image of a file that has an expression.

    Args:
        path (`Path`): the file.
        findings ([`Findings`]): takes what is left out, and malformed lines.

    Raises:
        OSError: if the file is missing or damaged.
    """
    for where, record in read_records(path, findings):
        expressions = []
        with findings.entry(where):
            check_fields(record, {"image": TEXT, "suffix": TEXT}, "the line")
            found = parse_loc_tokens(record["suffix"], findings)
            objects = [
                LabeledObject("", {"box": box}, label, [words_of_category(label)] if has_words(label) else ())
                for label, box in found
            ]
            absent = [name for name in names_asked(record.get("prefix")) if name not in dict(found)]
            findings.leave_out("answers without a box", not objects and not absent)
            expressions = [expression for _, expression in expressions_of_objects(objects, findings)]
            expressions += [{"text": words_of_category(name), **target_of([])} for name in absent]
        if expressions:
            size = size_fields(record.get("width"), record.get("height"))
            line = {"image": record["image"], **size, "box_format": "xyxy_fraction"}
            yield where, {**line, "expressions": expressions}


def names_asked(prefix: Any) -> list[str]:
    """
    Return the names that a prefix of PaliGemma asks for; none for another one.

    Example:

    ```python
    >>> from data_scripts.loc_tokens import names_asked

    >>> names_asked("detect car ; dog"), names_asked("<OD>")
    (['car', 'dog'], [])

    ```"""
    asked = ASKED.fullmatch(prefix) if isinstance(prefix, str) else None
    return [name for part in asked[1].split(";") if has_words(name := part.strip())] if asked else []


def parse_loc_tokens(suffix: str, findings: Findings) -> list[tuple[str, list[float]]]:
    """
    Return pairs of a label and its box, xyxy in fractions of the image.

    Raises:
        ValueError: if the tokens are not four per box.

    Example:

    ```python
    >>> from data_scripts.findings import Findings
    >>> from data_scripts.loc_tokens import parse_loc_tokens

    >>> parse_loc_tokens("<loc0256><loc0512><loc0768><loc1023> red car", Findings())
    [('red car', [0.5, 0.25, 0.9990234375, 0.75])]
    >>> parse_loc_tokens("car<loc_0><loc_249><loc_499><loc_999>", Findings())
    [('car', [0.0005, 0.2495, 0.4995, 0.9995])]

    ```"""
    found, num_tokens = [], len(re.findall("<loc", suffix))
    for tokens, masks, label in PALIGEMMA.findall(suffix):
        top, left, bottom, right = (int(number) / BINS["paligemma"] for number in re.findall(r"\d+", tokens))
        found.append((label.strip(), [left, top, right, bottom]))
        if masks:
            findings.changed["masks of <seg> tokens are left out"] += 1
    for label, tokens in FLORENCE.findall(suffix):
        numbers = [(int(number) + 0.5) / BINS["florence"] for number in re.findall(r"\d+", tokens)]
        found += [(label.strip(), numbers[index : index + 4]) for index in range(0, len(numbers), 4)]
    if any(len(box) != 4 for _, box in found) or num_tokens != 4 * len(found):
        raise ValueError(f"suffix is {quote(suffix)}; expected four <loc> tokens per box.")
    return found
