"""Find phrases in their sentence."""

import bisect
import operator
import unicodedata
from collections.abc import Container, Iterator
from typing import Any

from .inputs_reftr import to_list
from .quoting_reftr import quote
from .text_reftr import MAX_CHARACTERS, check_text, is_blank


# Halves of surrogate pairs, which `check_text` rejects, so that they cannot occur in a text.
WORD_START, WORD_END = "\ud800", "\udfff"


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
            start, end = searcher.find_next(phrase)
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


class PhraseSearcher:
    """
    Search phrases in a sentence regardless of case, whole words first, a repeated phrase at its next occurrence.

    Args:
        sentence (`str`): the sentence.
    """

    def __init__(self, sentence: str) -> None:
        self.sentence = sentence
        self.folded, self.starts = fold_case(sentence)
        self.marked, self.marked_positions = mark_words(self.folded)
        # folded phrase -> where its next search begins, and whether whole words may still be found there
        self.searches: dict[str, tuple[int, bool]] = {}

    def find_next(self, phrase: str) -> tuple[int, int]:
        """
        Return the (start, end) characters of a phrase's next occurrence.

        Raises:
            ValueError: if the phrase is blank or does not occur again.
        """
        wanted, _ = fold_case(check_text(phrase, "A phrase").strip())
        if is_blank(wanted):
            raise ValueError(f"A phrase of {quote(self.sentence)} is blank.")
        begin, may_be_words = self.searches.get(wanted, (0, True))
        index = find_whole_words(self.marked, self.marked_positions, wanted, begin) if may_be_words else None
        may_be_words = index is not None
        index = find_characters(self.folded, wanted, self.starts, begin) if index is None else index
        if index is None:
            times = "" if begin == 0 else " once more"
            raise ValueError(f"The phrase {quote(phrase)} is not{times} in its sentence {quote(self.sentence)}.")
        self.searches[wanted] = index + len(wanted), may_be_words
        return self.starts[index], self.starts[index + len(wanted)]


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


def fold_case(text: str) -> tuple[str, dict[int, int]]:
    """
    Fold the case of a text, and map the indices where its characters begin back to the original text.

    A character may become several (the capital I with a dot, sharp s, ligatures), and only complete characters can be
    mapped back.

    Example:

    ```python
    >>> from modeling_reftr.phrases_reftr import fold_case

    >>> fold_case("Maß")
    ('mass', {0: 0, 1: 1, 2: 2, 4: 3})

    ```"""
    pieces = [character.casefold() for character in text]
    starts, length = {}, 0
    for index, piece in enumerate(pieces):
        starts[length] = index
        length += len(piece)
    starts[length] = len(text)
    return "".join(pieces), starts


def mark_words(text: str) -> tuple[str, list[int]]:
    """
    Mark the boundaries of words, so that a search for marked words finds whole words only, in one step.

    `WORD_START` is inserted wherever the previous character is not part of a word, and `WORD_END` wherever the next
    one is not.

    Returns:
        `tuple`: the marked text, and the index in it, marks included, of each index of the text and of its end.

    Example:

    ```python
    >>> from modeling_reftr.phrases_reftr import WORD_END, WORD_START, mark_words

    >>> marked, positions = mark_words("up, a")
    >>> marked.replace(WORD_START, "[").replace(WORD_END, "]"), positions
    ('[up],][ [a]', [0, 2, 3, 5, 8, 10])

    ```"""
    pieces, positions, length, is_inside = [], [], 0, False
    for index, character in enumerate(text):
        was_inside, is_inside = is_inside, is_word_character(character)
        end = WORD_END if index > 0 and not is_inside else ""
        pieces += end, "" if was_inside else WORD_START, character
        positions.append(length)
        length += len(end) + (not was_inside) + 1
    return "".join([*pieces, WORD_END]), [*positions, length]


def find_whole_words(marked: str, positions: list[int], wanted: str, begin: int) -> int | None:
    """
    Return the first index from `begin` on where `wanted` occurs in a text as whole words, or None.

    Args:
        marked (`str`), positions (`list[int]`): the result of `mark_words` for the text.
        wanted (`str`): the text to find.
        begin (`int`): an index of the text.
    """
    index = marked.find(mark_words(wanted)[0], positions[begin])
    return None if index < 0 else bisect.bisect_right(positions, index) - 1


def find_characters(text: str, wanted: str, starts: Container[int], begin: int) -> int | None:
    """Return the first index from `begin` on where `wanted` occurs between two of `starts`, or None."""
    for index in find_occurrences(text, wanted, begin):
        if index in starts and index + len(wanted) in starts:
            return index
    return None


def find_occurrences(text: str, wanted: str, begin: int) -> Iterator[int]:
    """
    Yield all indices from `begin` on where `wanted` occurs in `text`, in time linear in the text.

    If it occurs twice at a distance of at most half its length, it repeats itself at that distance, and comparing the
    characters of one more repetition suffices to find it again.

    Example:

    ```python
    >>> from modeling_reftr.phrases_reftr import find_occurrences

    >>> list(find_occurrences("banananas", "ana", 0))
    [1, 3, 5]

    ```"""
    index, distance = text.find(wanted, begin), 0
    while index >= 0:
        yield index
        end = index + len(wanted)
        if distance and text[end : end + distance] == text[end - distance : end]:
            index += distance
            continue
        following = text.find(wanted, index + 1)
        if 0 < following - index <= len(wanted) // 2:
            distance = following - index
        index = following


def is_word_character(character: str) -> bool:
    """Return whether a character is part of a word: a letter, a digit, an underscore, or a mark on one of them."""
    return character.isalnum() or character == "_" or unicodedata.category(character).startswith("M")
