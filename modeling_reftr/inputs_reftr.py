"""Check and convert arguments, for the image processor, the processor and the pipeline."""

import math
import re
import warnings
from collections.abc import Iterable, Mapping, Set
from typing import Any

from transformers.utils import logging

from .quoting_reftr import quote


logger = logging.get_logger(__name__)

MAX_DEPTH = 10  # of nested arguments
MAX_SETTING = 1000  # characters of a setting in Python notation: lists and dicts of numbers and names are short
# Words after which a dot does not end a sentence.
ABBREVIATION = re.compile(
    r"\w|st|mrs?|ms|dr|prof|sr|jr|nos?|nr|vs|etc|approx|ca|cf|figs?|inc|ltd|corp|dept|ave|blvd|rd|hwy|mt|ft|rev|sgt|capt"
    r"|lt|gov|sen|pres|vol|ed|est|temp|e\.g|i\.e|[ap]\.m|u\.[sk]|jan|feb|apr|jun|jul|aug|sept?|oct|nov|dec"
)
# Words at the beginning of a sentence that continues the previous one.
CONTINUATION = re.compile(
    r"(he|she|it|they|his|hers?|its|their|there|this|that|these|those|who|which|and|but|or|so|not)\b"
)


def is_sequence(values: Any) -> bool:
    """
    Return whether values are a sequence: a list, a tuple, an array or tensor of at least one dimension, a Series, a
    dataset or a column of one. A text, a mapping, a set, a table, an iterator and a single value are not.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_reftr.inputs_reftr import is_sequence

    >>> is_sequence(("the dog",)), is_sequence(np.array(["the dog"])), is_sequence("the dog"), is_sequence(np.array(1))
    (True, True, False, False)

    ```"""
    if isinstance(values, (str, bytes, Mapping, Set)) or hasattr(values, "columns"):
        return False
    return hasattr(values, "__len__") and hasattr(values, "__getitem__") and getattr(values, "ndim", 1) > 0


def to_list(values: Any, name: str) -> list:
    """
    Convert a sequence, see `is_sequence`, to a list. Every argument that accepts a list is converted here.

    Raises:
        ValueError: if it is not a sequence.

    Example:

    ```python
    >>> from modeling_reftr.inputs_reftr import to_list

    >>> to_list(("the dog", "the cat"), "text")
    ['the dog', 'the cat']

    ```"""
    if not is_sequence(values):
        raise ValueError(f"{name}={quote(values)} must be a list, got {type(values).__name__}.")
    if hasattr(values, "to_pylist"):  # an array of pyarrow, whose entries are not Python objects
        return values.to_pylist()
    if hasattr(values, "__iter__"):  # a Series iterates in order, while its [0] is the row with the label 0
        return list(values)
    return [values[index] for index in range(len(values))]  # a dataset of torch


def take_renamed_argument(kwargs: dict[str, Any], old_name: str, new_name: str, value: Any) -> Any:
    """
    Remove a deprecated keyword argument and return its value, or `value` where only the new name was used.

    Raises:
        ValueError: if both names were used.
    """
    if old_name not in kwargs:
        return value
    if value is not None:
        raise ValueError(f"`{old_name}` is the deprecated name of `{new_name}`: pass only `{new_name}`.")
    warnings.warn(f"`{old_name}` is deprecated, use `{new_name}`.", FutureWarning, stacklevel=3)
    return kwargs.pop(old_name)


def check_setting(value: Any, name: str) -> None:
    """
    Reject a setting that is too large to be one, before the library writes all of it into a message.

    Lists that contain each other can take any number of characters.

    Raises:
        ValueError: if it takes more than `MAX_SETTING` characters, is an integer of more than 64 bits, or an array
            of objects.
    """
    try:
        is_short = not quote(value, MAX_SETTING).endswith("...")
    except RecursionError:
        is_short = False
    is_huge = isinstance(value, int) and value.bit_length() > 63
    if not is_short or is_huge or getattr(getattr(value, "dtype", None), "kind", None) == "O":
        raise ValueError(f"{name}={quote(value)} is too large for a setting; give numbers, names or short lists.")


def nesting_depth(values: Any) -> int:
    """
    Return how deeply a value is nested, judged by first entries; at most `MAX_DEPTH`, as a list may contain itself.

    Example:

    ```python
    >>> from modeling_reftr.inputs_reftr import nesting_depth

    >>> nesting_depth(7), nesting_depth([7, 8]), nesting_depth([[7, 8]])
    (0, 1, 2)

    ```"""
    depth = 0
    while is_sequence(values) and depth < MAX_DEPTH:
        depth += 1
        values = next(iter(values)) if len(values) else None
    return depth


def to_threshold(value: Any) -> float:
    """
    Convert a threshold, a number of any type, to a float.

    Raises:
        ValueError: if it is not one number.
    """
    try:
        if is_sequence(value):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"threshold={quote(value)} must be one number from 0 to 1.") from error


def to_sizes(sizes: Any, num_images: int, name: str, are_optional: bool = False) -> list[tuple[float, float] | None]:
    """
    Convert sizes to one (height, width) per image.

    A single pair is rejected: for two images it would be ambiguous.

    Args:
        sizes (list of `(height, width)`, or array or tensor of shape `(num_images, 2)`): sizes in pixels.
        num_images (`int`): the number of images.
        name (`str`): the name of the argument, for messages.
        are_optional (`bool`, *optional*, defaults to `False`): whether the size of an image may be None.

    Raises:
        ValueError: if there is not one pair of positive numbers per image.
    """
    sizes = to_list(sizes, name)
    if len(sizes) != num_images:
        raise ValueError(
            f"{len(sizes)} {name} for {num_images} images: give one (height, width) per image, however many sentences "
            "refer to it."
        )
    pairs = []
    for size in sizes:
        if size is None and are_optional:
            pairs.append(None)
            continue
        try:
            height, width = (float(side) for side in to_list(size, name))
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"{name} must hold one (height, width) for each of {num_images} images, got {quote(size)} for one of "
                "them."
            ) from error
        if not (0 < height < math.inf and 0 < width < math.inf):
            raise ValueError(f"{name} must hold positive numbers of pixels, got {(height, width)} (height, width).")
        pairs.append((height, width))
    return pairs


def split_expressions(text: str) -> list[str]:
    """
    Split a text at the dots that end an expression, as in "the red square. the green star.", the form in which
    Grounding DINO takes several. A text of one expression gives a list of one.

    Example:

    ```python
    >>> from modeling_reftr.inputs_reftr import split_expressions

    >>> split_expressions("the st. bernard dog. the cat.")
    ['the st. bernard dog', 'the cat']

    ```"""
    parts, begin, word = [], 0, None
    for match in re.finditer(r"\S+", text):
        if match[0].endswith("."):
            # A dot that stands alone belongs to the word before it.
            word, end = (match[0][:-1], match.end() - 1) if len(match[0]) > 1 else (word, match.start())
            if word is not None and not ABBREVIATION.fullmatch(word.lower()):
                parts.append(text[begin:end].strip())
                begin, word = match.end(), None
                continue
        word = match[0]
    rest = text[begin:].strip()
    return [*parts, rest] if rest else parts


def is_joined(text: str) -> bool:
    """Return whether a text looks like several expressions that are separated by dots."""
    first, *others = split_expressions(text) or [text]
    if not others or any(CONTINUATION.match(part.lower()) for part in others):
        return False
    # Without a dot at the end, only articles distinguish a list from a sentence that contains a dot.
    has_articles = all(part.lower().startswith(("a ", "an ", "the ")) for part in (first, *others))
    return text.rstrip().endswith(".") or has_articles


def warn_about_joined_expressions(texts: Iterable[str]) -> None:
    """Warn once per process that a text which looks like several expressions is answered as one."""
    if any("." in text and is_joined(text) for text in texts):
        # The message does not quote the text: `warning_once` remembers messages.
        logger.warning_once(
            'A text such as "the red square. the green star." is read as one expression and gets one box. To ask for '
            'each, give a list: text=["the red square", "the green star"].'
        )
