"""
Read conversations about boxes that Qwen-VL and its kin are fine-tuned with, in a JSON array or JSON Lines.

    {"image": "1.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nLocate the red car in this image and output the bbox coordinates."},
        {"from": "gpt", "value": "[{\\"bbox_2d\\": [10, 20, 110, 90], \\"label\\": \\"the red car\\"}]"}]}

- An answer has `bbox_2d` in JSON, or the marks of Qwen2-VL, `<|box_start|>(x, y),(x, y)<|box_end|>`.
- The text of a box is its `label`, else what the question asks for (`PROMPTS`). Boxes with the same text are the
  answers to one expression. If the answer to such a question is an empty list, `[]`, the expression refers to nothing.
- `bbox_2d` are pixels for Qwen2.5-VL, and 0..1000 for Qwen2-VL and Qwen3-VL. Nothing in the file says so: lines have
  no `box_format` unless it is given, and who reads them compares all boxes with the images.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .findings import Findings
from .quoting import quote
from .reading import has_words
from .records import (
    LabeledObject,
    expressions_of_objects,
    read_records,
    size_fields,
    target_of,
    to_box_list,
    words_of_category,
)


# what questions look like; {} is the expression
PROMPTS = (
    "<ref>{}</ref>",
    "<|object_ref_start|>{}<|object_ref_end|>",
    "Locate {} in this image",
    "Locate {} in the image",
    "Locate {},",
    "region this sentence describes: {}",
)
ANSWERERS, ASKERS = ("gpt", "assistant", "model"), ("human", "user")
ENTRY = re.compile(r"\{[^{}]*\"bbox_2d\"[^{}]*\}")
EMPTY = re.compile(r"\s*(```(json)?)?\s*\[\s*\]\s*(```)?\s*")
MARKED = re.compile(
    r"(?:<\|object_ref_start\|>(.*?)<\|object_ref_end\|>)?<\|box_start\|>\s*"
    r"\((\d+),\s*(\d+)\),\s*\((\d+),\s*(\d+)\)\s*<\|box_end\|>"
)


def read_qwen(
    path: Path, findings: Findings, box_format: str | None = None, prompt: str | None = None
) -> Iterator[tuple[str, dict]]:
    """
    Yield (position, line) of each answer of a file that has boxes.

    Args:
        path (`Path`): the file.
        findings ([`Findings`]): takes what is left out, and malformed conversations.
        box_format (`str`, *optional*): convention of `bbox_2d`; absent: lines do not say it.
        prompt (`str`, *optional*): what questions look like, with {} for the expression; absent: one of `PROMPTS`.

    Raises:
        ValueError: if the prompt has no {}.
        OSError: if the file is missing or damaged.
    """
    if prompt is not None and "{}" not in prompt:
        raise ValueError(f'prompt is {quote(prompt)}; expected {{}} where the expression is, as in "Locate {{}}.".')
    patterns = [pattern_of_prompt(text) for text in (PROMPTS if prompt is None else (prompt,))]
    for where, record in read_records(path, findings):
        turns, image = [], None
        with findings.entry(where):
            turns, image = turns_of(record), image_of_conversation(record)
        question = ""
        for index, (role, text) in enumerate(turns):
            if role in ASKERS:
                question = text
                continue
            position, expressions, said = f"{where}, turn {index}", [], box_format
            asked = expression_of_question(question, patterns)
            with findings.entry(position):
                objects, is_thousand = objects_of_answer(text, asked, position)
                expressions = [expression for _, expression in expressions_of_objects(objects, findings)]
                if asked and EMPTY.fullmatch(text):
                    expressions, said = [{"text": asked, **target_of([])}], "xyxy"  # of no box
                else:
                    findings.leave_out("answers without a box", not objects)
                said = "xyxy_thousand" if is_thousand else said
            for expression in expressions:
                line = {"image": image, **size_fields(record.get("width"), record.get("height"))}
                line |= {} if said is None else {"box_format": said}
                yield position, {**line, "expressions": [expression]}


def pattern_of_prompt(prompt: str) -> re.Pattern:
    """Return the pattern that finds the expression of a question; one at the end goes on to the end of the line."""
    before, _, after = prompt.partition("{}")
    return re.compile(re.escape(before) + ("(.+?)" if after else "(.+)") + re.escape(after), re.IGNORECASE)


def expression_of_question(question: str, patterns: list[re.Pattern]) -> str | None:
    """
    Return the expression that a question asks for, None if it has another form.

    Example:

    ```python
    >>> from data_scripts.qwen_vl import expression_of_question, pattern_of_prompt

    >>> expression_of_question("Locate the red car in this image.", [pattern_of_prompt("Locate {} in this image")])
    'the red car'

    ```"""
    found = (pattern.search(question) for pattern in patterns)
    return next((match[1].strip() for match in found if match), None)


def objects_of_answer(answer: str, asked: str | None, where: str) -> tuple[list[LabeledObject], bool]:
    """
    Return the objects of an answer, and whether its boxes are certainly in 0..1000. Boxes without a label are what was
    asked for.

    Raises:
        ValueError: if an entry is malformed.
    """
    marked = [([float(number) for number in match.groups()[1:]], match[1]) for match in MARKED.finditer(answer)]
    found = marked or [
        (box, entry.get("label"))
        for entry in entries_of_answer(answer)
        for box in to_box_list(entry["bbox_2d"], "bbox_2d")
    ]
    objects = []
    for box, label in found:
        is_labeled = has_words(label)
        words = words_of_category(label) if is_labeled else asked
        objects.append(LabeledObject(where, {"box": box}, label if is_labeled else None, [words] if words else ()))
    return objects, bool(marked)


def entries_of_answer(answer: str) -> list[dict]:
    """
    Return the JSON objects with `bbox_2d` of an answer, which may have other text around them.

    Raises:
        ValueError: if one is not JSON.
    """
    entries = []
    for text in ENTRY.findall(answer):
        try:
            entries.append(json.loads(text))
        except ValueError as error:
            raise ValueError(f"the answer has {quote(text)}, which is not JSON.") from error
    return entries


def turns_of(record: dict) -> list[tuple[str, str]]:
    """
    Return pairs of the role and the text of a conversation, by any of the names for them.

    Raises:
        ValueError: if it is not one.
    """
    turns = record.get("conversations", record.get("messages"))
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"it has the fields {quote(list(record))}; expected 'conversations' or 'messages', a list.")
    pairs = [(turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))) for turn in turns]
    for role, text in pairs:
        if role not in (*ASKERS, *ANSWERERS, "system") or not isinstance(text, str | list):
            raise ValueError(
                f"a turn is {quote((role, text))}; expected a text of {', '.join((*ASKERS, *ANSWERERS))}."
            )
    return [(role, text_of_parts(text)) for role, text in pairs if role != "system"]


def text_of_parts(content: Any) -> str:
    """Return the text of a turn, which may be a list of parts."""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))


def image_of_conversation(record: dict) -> str:
    """
    Return the image of a conversation.

    Raises:
        ValueError: if it has none, or several.
    """
    images = record.get("image", record.get("images"))
    images = images if isinstance(images, list) else [images]
    if len(images) != 1 or not isinstance(images[0], str):
        raise ValueError(f"image is {quote(images)}; expected one path.")
    return images[0]
