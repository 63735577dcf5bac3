"""Find phrases in their sentence."""

import operator
from typing import Any

from .inputs_reftr import to_list
from .phrase_search_reftr import PhraseSearcher
from .quoting_reftr import quote
from .text_reftr import MAX_CHARACTERS, check_text, is_blank


def find_phrases(sentence: str, phrases: Any) -> list[tuple[int, int]]:
    """
    Find phrases in their sentence and return their (start, end) characters.

    Args:
        sentence (`str`): the sentence.
        phrases (list of `str` or `(int, int)`): texts to find, or (start, end) characters to check.

    Raises:
        ValueError: if a phrase is blank or not in the sentence, a span is empty or out of range, or all phrases
            together have more than `MAX_CHARACTERS` characters.

    Example:

    ```python
    >>> from modeling_reftr.phrases_reftr import find_phrases

    >>> find_phrases("A dog beside a dog", ["a dog", "a dog"])
    [(0, 5), (13, 18)]

    ```"""
    if isinstance(phrases, str):
        raise ValueError(f"phrases={quote(phrases)} must be a list of phrases for each sentence.")
    searcher = None
    spans, length = [], 0
    for phrase in to_list(phrases, f"phrases of {quote(sentence)}"):
        if isinstance(phrase, str):
            searcher = searcher or PhraseSearcher(sentence)
            start, end = find_next(searcher, sentence, phrase)
        else:
            start, end = to_span(phrase, sentence)
            if not 0 <= start < end <= len(sentence) or is_blank(sentence[start:end]):
                raise ValueError(
                    f"The span ({start}, {end}) is not a part of {quote(sentence)}, which has {len(sentence)} "
                    "characters."
                )
        length += end - start
        if length > MAX_CHARACTERS:
            raise ValueError(
                f"The phrases of {quote(sentence)} have more than {MAX_CHARACTERS:,} characters together: pass fewer "
                "of them at once."
            )
        spans.append((start, end))
    return spans


def find_next(searcher: PhraseSearcher, sentence: str, phrase: str) -> tuple[int, int]:
    """
    Return the (start, end) characters of a phrase's next occurrence in its sentence.

    Raises:
        ValueError: if the phrase is blank or does not occur again.
    """
    if is_blank(check_text(phrase, "A phrase")):
        raise ValueError(f"A phrase of {quote(sentence)} is blank.")
    is_repeated = searcher.was_found(phrase)
    found = searcher.find_next(phrase)
    if found is None:
        times = " once more" if is_repeated else ""
        raise ValueError(f"The phrase {quote(phrase)} is not{times} in its sentence {quote(sentence)}.")
    return found


def to_span(phrase: Any, sentence: str) -> tuple[int, int]:
    """
    Convert a pair of integers to a (start, end) span.

    Raises:
        ValueError: if it is something else.
    """
    try:
        start, end = (operator.index(index) for index in to_list(phrase, "phrase"))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The phrase {quote(phrase)} of {quote(sentence)} must be a str or a pair of int, (start, end) "
            "characters; the phrases of one sentence are a list of them."
        ) from error
    return start, end


def phrase_text(phrase: Any, sentence: str) -> str:
    """Return the text of a phrase, given as a `str` or as (start, end) characters of its sentence."""
    return str(phrase) if isinstance(phrase, str) else sentence[slice(*to_span(phrase, sentence))]
