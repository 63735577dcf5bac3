"""Checks of what callers pass, shared by the image processor, the processor and the pipeline."""

import math
import re
from collections.abc import Iterable, Mapping, Set

from transformers.utils import logging


logger = logging.get_logger(__name__)

# a word after which a dot ends no sentence
ABBREVIATION = re.compile(
    r"\w|st|mrs?|ms|dr|prof|sr|jr|nos?|nr|vs|etc|approx|ca|cf|figs?|inc|ltd|corp|dept|ave|blvd|rd|hwy|mt|ft|rev|sgt|capt"
    r"|lt|gov|sen|pres|vol|ed|est|temp|e\.g|i\.e|[ap]\.m|u\.[sk]|jan|feb|apr|jun|jul|aug|sept?|oct|nov|dec"
)
# a word with which the next sentence goes on about the same thing
CONTINUATION = re.compile(
    r"(he|she|it|they|his|hers?|its|their|there|this|that|these|those|who|which|and|but|or|so|not)\b"
)


def to_list(values, name: str) -> list:
    """
    Return a sequence (list, tuple, array, tensor, Series, column of a dataset, ...) as a list of its entries.

    Raises:
        ValueError: if it is a text, a mapping, a set, an iterator or a single value.

    Example:

    ```python
    >>> from modeling_reftr.inputs_reftr import to_list

    >>> to_list(("the dog", "the cat"), "text")
    ['the dog', 'the cat']

    ```"""
    is_sequence = all(hasattr(values, method) for method in ("__len__", "__iter__", "__getitem__"))
    if not is_sequence or isinstance(values, (str, bytes, Mapping, Set)) or getattr(values, "ndim", 1) == 0:
        raise ValueError(f"{name}={str(values)[:80]!r} must be a list, got {type(values).__name__}.")
    return list(values)


def to_sizes(sizes, num_images: int, name: str, are_optional: bool = False) -> list[tuple[float, float] | None]:
    """
    Return one (height, width) for each image.

    Args:
        sizes (list of `(height, width)`, or array or tensor of shape `(num_images, 2)`): in pixels.
        num_images (`int`): how many there have to be.
        name (`str`): of the argument, for messages.
        are_optional (`bool`, *optional*, defaults to `False`): whether an image may have None.

    Raises:
        ValueError: if there is not one pair of positive numbers for each image. A bare pair stands for no image, for
            of two images it could be anything.
    """
    sizes = to_list(sizes, name)
    if len(sizes) != num_images:
        raise ValueError(
            f"{len(sizes)} {name} for {num_images} images: give one (height, width) for each image, whatever number "
            "of sentences asks about it."
        )
    pairs = []
    for size in sizes:
        if size is None and are_optional:
            pairs.append(None)
            continue
        try:
            height, width = (float(side) for side in to_list(size, name))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{name} must hold one (height, width) for each of {num_images} images, got {size!r} for one of them."
            ) from error
        if not (0 < height < math.inf and 0 < width < math.inf):
            raise ValueError(f"{name} must hold positive numbers of pixels, got {(height, width)} (height, width).")
        pairs.append((height, width))
    return pairs


def split_expressions(text: str) -> list[str]:
    """
    Split a text at the dots that end an expression, as in "the red square. the green star.", the form in which
    Grounding DINO takes several. A text of one expression comes back as a list of one.

    Example:

    ```python
    >>> from modeling_reftr.inputs_reftr import split_expressions

    >>> split_expressions("the st. bernard dog. the cat.")
    ['the st. bernard dog', 'the cat']

    ```"""
    parts, begin = [], 0
    for match in re.finditer(r"\s*\.(?:\s+|$)", text):
        words = text[begin : match.start()].lower().split()
        if words and not ABBREVIATION.fullmatch(words[-1]):
            parts.append(text[begin : match.start()].strip())
            begin = match.end()
    rest = text[begin:].strip()
    return [*parts, rest] if rest else parts


def is_joined(text: str) -> bool:
    """Return whether a text looks like several expressions that are separated by dots."""
    first, *others = split_expressions(text) or [text]
    if not others or any(CONTINUATION.match(part.lower()) for part in others):
        return False
    # without a dot at the end only articles tell a list from a sentence with a dot in it
    has_articles = all(part.lower().startswith(("a ", "an ", "the ")) for part in (first, *others))
    return text.rstrip().endswith(".") or has_articles


def warn_about_joined_expressions(texts: Iterable[str]):
    """Log once in a process that a text which looks like several expressions is answered as one."""
    if any("." in text and is_joined(text) for text in texts):
        # one message for all texts: it is logged once because it is always the same
        logger.warning_once(
            'A text such as "the red square. the green star." is read as one expression and gets one box. To ask for '
            'each, give a list: text=["the red square", "the green star"].'
        )
