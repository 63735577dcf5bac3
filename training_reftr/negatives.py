"""
Negatives: expressions about other images, which refer to nothing in an image. Nothing here is a collective.

An expression is not taken if it may be true of the image after all: if an object of its category is annotated there,
or if every word that says something occurs in the annotations of the image.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple


if TYPE_CHECKING:
    from training_reftr.samples import Sample


# words that are true of something in almost every image
UNSPECIFIC = frozenset(
    re.findall(
        r"\w+",
        "a an the this that these those it its his her their him them he she they who which one ones two both all "
        "every other of in on at by to from with and or not is are was were be has have near next between behind "
        "front above below under over left right top bottom middle center corner side leftmost rightmost topmost "
        "bottommost first last closest object objects thing things shape shapes item items something small large big "
        "little tall short",
    )
)
MAX_TRIES = 8  # of an expression for each negative
NEGATIVE = "negative"  # type of the phrases


class ImageContext(NamedTuple):
    """
    What the annotations of an image say.

    Args:
        categories (`frozenset[str]`): of all objects, in lower case.
        words (`frozenset[str]`): of all texts and categories, in lower case.
    """

    categories: frozenset[str]
    words: frozenset[str]


def words_of(text: str) -> frozenset[str]:
    """Return the words of a text that say something, in lower case."""
    return frozenset(re.findall(r"\w+", text.lower())) - UNSPECIFIC


def context_of(row: dict) -> ImageContext:
    """Return the context of a row with all of its annotations."""
    categories = frozenset(item["category"].lower() for item in row["objects"] if item["category"])
    texts = [*categories, *(sentence["text"] for sentence in row["sentences"])]
    return ImageContext(categories, frozenset().union(*map(words_of, texts)))


def may_fit(text: str, categories: Sequence[str], context: ImageContext) -> bool:
    """
    Return whether an expression about another image may be true of an image.

    Args:
        text (`str`): the expression.
        categories (`list[str]`): of its objects, in lower case; empty texts are not known.
        context ([`ImageContext`]): of the image.

    Example:

    ```python
    >>> from training_reftr.negatives import ImageContext, may_fit

    >>> context = ImageContext(frozenset({"dog"}), frozenset({"dog", "brown", "sofa"}))
    >>> [may_fit(*asked, context) for asked in (("the cat", ["cat"]), ("the pet", ["dog"]), ("brown sofa", [""]))]
    [False, True, True]

    ```"""
    words = words_of(text)
    return not words or words <= context.words or not context.categories.isdisjoint(categories)


def add_negatives(samples: list[Sample], ratio: float) -> list[Sample]:
    """
    Add expressions about other images of a batch to its samples, as sentences whose phrase refers to nothing.

    The choice is a function of the samples' keys. An image for which no expression is found gets fewer.

    Args:
        samples (`list[Sample]`): of a batch, with their contexts.
        ratio (`float`): negatives per sentence, on average.
    """
    rng = random.Random("/".join(sample.key for sample in samples))
    candidates = [candidates_of(sample) for sample in samples]
    extended = []
    for index, sample in enumerate(samples):
        expected = ratio * len(sample.sentences)
        num_wanted = int(expected) + (rng.random() < expected % 1)
        others = [
            candidate
            for part in (candidates[:index], candidates[index + 1 :])
            for found in part
            for candidate in found
        ]
        rng.shuffle(others)
        texts = []
        for text, categories in others[: MAX_TRIES * num_wanted]:
            if len(texts) < num_wanted and text not in texts and not may_fit(text, categories, sample.context):
                texts.append(text)
        extended.append(replace(sample, sentences=[*sample.sentences, *map(negative_sentence, texts)]))
    return extended


def candidates_of(sample: Sample) -> list[tuple[str, list[str]]]:
    """Return the expressions and phrases of a sample that refer to something, and the categories of their objects."""
    objects = sample.row["objects"]
    return [
        (
            sentence["text"][phrase["start"] : phrase["end"]],
            [objects[index]["category"].lower() for index in phrase["objects"]],
        )
        for sentence in sample.sentences
        for phrase in sentence["phrases"]
        if phrase["objects"]
    ]


def negative_sentence(text: str) -> dict:
    """Return a sentence that refers to nothing."""
    phrase = {"start": 0, "end": len(text), "objects": [], "types": [NEGATIVE]}
    return {"sentence_id": NEGATIVE, "text": text, "phrases": [phrase]}
