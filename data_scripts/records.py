"""
Helpers of readers, which turn annotation files of other formats into lines (see `jsonl`), and of writers, which turn
lines into these formats.

A line that is written has all its fields: `image`, `width`, `height`, and expressions with `text` and `phrases`, each
with `start` and `end`, `types` if it has them, and the fields of its object: `boxes` (xyxy, in pixels), and
`category`, `segmentation` and `score` if it has them. A phrase that refers to several objects has them as `objects`,
and one that refers to nothing in the image has `boxes: []`, see `objects_of`.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .findings import Findings
from .quoting import quote
from .reading import has_words, is_number, parse_line, read_entries


AMBIGUOUS = "objects whose category is that of another object of their image"
WITHOUT_WORDS = "objects without words"
GROUPS = "groups of objects of one category"
SAME_WORDS = "objects have the words of another object of their image, and are answers to one expression"
NO_TARGET = "phrases that refer to nothing in their image"
# fields that hold an expression, in the order in which they are looked for
TEXT_FIELDS = ("caption", "captions", "expression", "expressions", "description", "sentence", "sentences", "text")


def read_records(path: Path, findings: Findings) -> Iterator[tuple[str, dict]]:
    """Yield (position, object) of each line of a file, or of each entry of one JSON array."""
    for where, _, content in read_entries(path):
        record = None
        with findings.entry(where):
            record = parse_line(content)
        if record is not None:
            yield where, record


def size_fields(width: Any, height: Any) -> dict[str, int]:
    """
    Return the fields of a line that say the annotated size, none where it is not known.

    Example:

    ```python
    >>> from data_scripts.records import size_fields

    >>> size_fields(640.0, 480), size_fields(None, 480), size_fields(0, 0)
    ({'width': 640, 'height': 480}, {}, {})

    ```"""
    size = (width, height)
    if not all(is_number(side) and side >= 1 and int(side) == side for side in size):
        return {}
    return {"width": int(width), "height": int(height)}


def to_box_list(value: Any, field: str) -> list[list]:
    """
    Return the boxes of a field that is one box or a list of them.

    Raises:
        ValueError: if it is something else.

    Example:

    ```python
    >>> from data_scripts.records import to_box_list

    >>> to_box_list([1, 2, 3, 4], "bbox"), to_box_list([[1, 2, 3, 4], [5, 6, 7, 8]], "bbox")
    ([[1, 2, 3, 4]], [[1, 2, 3, 4], [5, 6, 7, 8]])

    ```"""
    boxes = [value] if isinstance(value, list) and value and is_number(value[0]) else value
    if not isinstance(boxes, list) or not boxes or not all(isinstance(box, list) for box in boxes):
        raise ValueError(f"{field} is {quote(value)}; expected a box of four numbers, or a list of boxes.")
    return boxes


def target_of(objects: Sequence[dict]) -> dict:
    """
    Return the fields of an expression or phrase that refers to these objects.

    Args:
        objects (`list[dict]`): the fields of each object, such as `box`.

    Example:

    ```python
    >>> from data_scripts.records import target_of

    >>> target_of([]), target_of([{"box": [1, 2, 3, 4]}])
    ({'boxes': []}, {'box': [1, 2, 3, 4]})
    >>> target_of([{"box": [1, 2, 3, 4]}, {"box": [5, 6, 7, 8]}])
    {'objects': [{'box': [1, 2, 3, 4]}, {'box': [5, 6, 7, 8]}]}

    ```"""
    if len(objects) == 1:
        return dict(objects[0])
    return {"objects": list(objects)} if objects else {"boxes": []}


def objects_of(target: dict) -> list[dict]:
    """
    Return the fields of each object that an expression or phrase refers to, the reverse of `target_of`; the one of a
    single object has the other fields of the phrase as well.

    Example:

    ```python
    >>> from data_scripts.records import objects_of

    >>> objects_of({"boxes": []}), objects_of({"objects": [{"box": [1, 2, 3, 4]}]})
    ([], [{'box': [1, 2, 3, 4]}])

    ```"""
    if "objects" in target:
        return target["objects"]
    return [] if target.get("boxes") == [] else [target]


def expression_of_spans(caption: str, targets: Iterable[tuple[tuple[int, int] | str, list]]) -> dict | None:
    """
    Return the expression of a caption from the phrases of its objects; None if there are none.

    Args:
        caption (`str`): the caption.
        targets (iterable): a phrase, (start, end) or its text, and the boxes of objects that it refers to; no boxes if
            it refers to nothing in the image.

    Example:

    ```python
    >>> from data_scripts.records import expression_of_spans

    >>> boxes = [[1, 2, 3, 4]], [[5, 6, 7, 8]]
    >>> expression_of_spans("two cars", [((0, 8), box) for box in boxes])["phrases"]
    [{'start': 0, 'end': 8, 'objects': [{'box': [1, 2, 3, 4]}, {'box': [5, 6, 7, 8]}]}]

    ```"""
    objects = {}
    for span, boxes in targets:
        objects.setdefault(span, []).extend({"box": box} for box in boxes)
    phrases = [
        {**({"text": span} if isinstance(span, str) else {"start": span[0], "end": span[1]}), **target_of(found)}
        for span, found in objects.items()
    ]
    return {"text": caption, "phrases": phrases} if phrases else None


def spans_of_tokens(value: Any) -> list[tuple[int, int]]:
    """
    Return the spans of `tokens_positive`, (start, end) characters of a caption. Each of several names the object.

    Raises:
        ValueError: if they are not pairs of integers.
    """
    spans = [value] if isinstance(value, list) and value and type(value[0]) is int else value
    if not isinstance(spans, list) or not all(
        isinstance(span, list) and len(span) == 2 and all(type(index) is int for index in span) for span in spans
    ):
        raise ValueError(f"tokens_positive is {quote(value)}; expected a list of [start, end].")
    return list(dict.fromkeys((start, end) for start, end in spans))


class LabeledObject(NamedTuple):
    """
    An annotated object of an image.

    Args:
        where (`str`): its position, for messages.
        target (`dict`): the fields of a line that locate it: `box`, `polygon` and so on.
        category (`str`, *optional*): its category.
        texts (`list[str]`): its own expressions.
        is_group (`bool`): whether it is several objects of its category, which the category does not name.
    """

    where: str
    target: dict
    category: str | None = None
    texts: Sequence[str] = ()
    is_group: bool = False


def expressions_of_objects(objects: Sequence[LabeledObject], findings: Findings) -> Iterator[tuple[str, dict]]:
    """
    Yield (position, expression) of objects: their own texts, else their category where no other object of the image
    has it. Objects with the same text of their own are the answers to it.

    Args:
        objects (`list[LabeledObject]`): all objects of an image.
        findings ([`Findings`]): counts those without an expression, and those that share one.

    Example:

    ```python
    >>> from data_scripts.findings import Findings
    >>> from data_scripts.records import LabeledObject, expressions_of_objects

    >>> findings = Findings()
    >>> cats = [LabeledObject("", {}, "cat")] * 2
    >>> animals = [LabeledObject("", {"box": [1, 2, 3, 4]}, "dog"), *cats]
    >>> [expression for _, expression in expressions_of_objects(animals, findings)]
    [{'text': 'dog', 'category': 'dog', 'box': [1, 2, 3, 4]}]
    >>> findings.left_out
    Counter({'objects whose category is that of another object of their image': 2})

    ```"""
    counts = Counter(item.category for item in objects)
    named = {}  # an object may have a text several times: it is several expressions
    for where, target, category, texts, is_group in objects:
        is_named = has_words(category)
        fields = {"category": category, **target} if is_named else target
        if texts:
            times = Counter()
            for text in map(str.strip, texts):
                named.setdefault((text, times[text]), (where, []))[1].append(fields)
                times[text] += 1
        elif not is_named:
            findings.leave_out(WITHOUT_WORDS)
        elif is_group:
            findings.leave_out(GROUPS)
        elif counts[category] > 1:
            findings.leave_out(AMBIGUOUS)
        else:
            named[category, None] = (where, [fields])
    for (text, number), (where, found) in named.items():
        findings.changed.update({SAME_WORDS: len(found)} if len(found) > 1 else {})
        yield where, {"text": words_of_category(text) if number is None else text, **target_of(found)}


def words_of_category(category: str) -> str:
    """Return the name of a category as the words of an expression."""
    return category.replace("_", " ").strip()


def words_in(value: Any) -> list[str]:
    """Return the texts with words of a value that is one text or a list of them."""
    return [text for text in (value if isinstance(value, list) else [value]) if has_words(text)]


def texts_of(record: dict, text_field: str | None = None) -> list[str]:
    """
    Return the expressions that an annotation has itself: in a field, or in an attribute.

    Args:
        record (`dict`): the annotation; `attributes` may be a mapping in it.
        text_field (`str`, *optional*): the field or the attribute; absent: the first of `TEXT_FIELDS` with words.

    Example:

    ```python
    >>> from data_scripts.records import texts_of

    >>> texts_of({"id": 1, "caption": "the red car"}), texts_of({"attributes": {"color": "red"}}, "color")
    (['the red car'], ['red'])

    ```"""
    attributes = record.get("attributes")
    for fields in (record, attributes if isinstance(attributes, dict) else {}):
        for name in TEXT_FIELDS if text_field is None else (text_field,):
            texts = words_in(fields.get(name))
            if texts:
                return texts
    return []


class Written(NamedTuple):
    """
    What writers say about a dataset.

    Args:
        name (`str`): its name.
        categories (`list[str]`): the categories of its objects in all splits.
    """

    name: str
    categories: Sequence[str] = ()


def is_expression(expression: dict) -> bool:
    """
    Return whether the one phrase of an expression that is written is all of its text.

    Example:

    ```python
    >>> from data_scripts.records import is_expression

    >>> is_expression({"text": "a cup", "phrases": [{"start": 0, "end": 5, "boxes": [[1, 2, 3, 4]]}]})
    True

    ```"""
    return [(phrase["start"], phrase["end"]) for phrase in expression["phrases"]] == [(0, len(expression["text"]))]


def leave_out_fields(line: dict, names: dict[str, str], findings: Findings) -> None:
    """
    Count the fields of the phrases of a line, and of their objects, that a format does not have.

    Args:
        line (`dict`): the line.
        names (`dict[str, str]`): field -> what is left out.
        findings ([`Findings`]): counts them.
    """
    for expression in line["expressions"]:
        for phrase in expression["phrases"]:
            for field, reason in names.items():
                findings.leave_out(reason, sum(field in part for part in (phrase, *phrase.get("objects", ()))))


def box_around(item: dict, findings: Findings) -> list[float]:
    """
    Return the box of an object that is written, in a format that has one box per object.

    Args:
        item (`dict`): the object, see `objects_of`.
        findings ([`Findings`]): counts objects with several boxes.

    Example:

    ```python
    >>> from data_scripts.findings import Findings
    >>> from data_scripts.records import box_around

    >>> box_around({"boxes": [[1, 2, 3, 4], [5, 6, 7, 8]]}, Findings())
    [1, 2, 7, 8]

    ```"""
    from .building import merge_boxes

    findings.changed.update(["objects with several boxes have the box around them"] * (len(item["boxes"]) > 1))
    return merge_boxes(item["boxes"])


def to_xywh(box_xyxy: Sequence[float]) -> list[float]:
    """
    Return a box as left, top, width and height, without the errors of subtraction.

    Example:

    ```python
    >>> from data_scripts.records import to_xywh

    >>> to_xywh([103.93, 299.99, 238.15, 477.41])
    [103.93, 299.99, 134.22, 177.42]

    ```"""
    x0, y0, x1, y1 = box_xyxy
    return [x0, y0, round(x1 - x0, 9), round(y1 - y0, 9)]


def to_json(value: Any) -> str:
    """Return a value as JSON in one line, with all characters as they are."""
    return json.dumps(value, ensure_ascii=False)


def json_array(items: Iterable[Any]) -> Iterator[str]:
    """
    Yield the parts of a JSON array, an item per line.

    Example:

    ```python
    >>> from data_scripts.records import json_array

    >>> "".join(json_array([1, {"a": 2}]))
    '[\\n1,\\n{"a": 2}\\n]'

    ```"""
    yield "["
    for number, item in enumerate(items):
        yield f"{',' if number else ''}\n{to_json(item)}"
    yield "\n]"
