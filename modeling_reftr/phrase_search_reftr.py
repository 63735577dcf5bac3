"""
Search phrases in a sentence. `data_scripts` and `modeling_reftr` have a copy each, since the latter is uploaded to the
Hub alone.
"""

import bisect
import unicodedata
from collections.abc import Container, Iterator


# Halves of surrogate pairs, which `check_text` rejects, so that they cannot occur in a text.
WORD_START, WORD_END = "\ud800", "\udfff"
# What texts are typed with in place of the quotes of a keyboard.
QUOTES = {**dict.fromkeys("\u2018\u2019\u201a\u201b\u02bc", "'"), **dict.fromkeys("\u201c\u201d\u201e\u201f", '"')}


class PhraseSearcher:
    """
    Search phrases in a sentence, complete words first, a repeated phrase at its next occurrence. Case, the shape of
    quotes, and the kind and number of spaces do not matter.

    Args:
        sentence (`str`): the sentence.

    Example:

    ```python
    >>> from modeling_reftr.phrase_search_reftr import PhraseSearcher

    >>> searcher = PhraseSearcher("The man\u2019s car, near a  car")
    >>> searcher.find_next("the man's car"), searcher.find_next("a car"), searcher.find_next("a car")
    ((0, 13), (20, 26), None)

    ```"""

    def __init__(self, sentence: str) -> None:
        self.folded, self.starts = fold_text(sentence)
        self.marked, self.marked_positions = mark_words(self.folded)
        # folded phrase -> where its next search begins, and whether whole words may still be found there
        self.searches: dict[str, tuple[int, bool]] = {}

    def find_next(self, phrase: str) -> tuple[int, int] | None:
        """Return the (start, end) characters of a phrase's next occurrence; None if there is none."""
        wanted, _ = fold_text(phrase.strip())
        if not wanted:
            return None
        begin, may_be_words = self.searches.get(wanted, (0, True))
        index = find_whole_words(self.marked, self.marked_positions, wanted, begin) if may_be_words else None
        may_be_words = index is not None
        index = find_characters(self.folded, wanted, self.starts, begin) if index is None else index
        if index is None:
            return None
        self.searches[wanted] = index + len(wanted), may_be_words
        return self.starts[index], self.starts[index + len(wanted)]

    def was_found(self, phrase: str) -> bool:
        """Return whether a phrase was found before."""
        return fold_text(phrase.strip())[0] in self.searches

    def is_left(self, phrase: str) -> bool:
        """Return whether a phrase that was found occurs once more, as complete words if it was found as such."""
        wanted, _ = fold_text(phrase.strip())
        begin, are_words = self.searches[wanted]
        if not are_words:
            return find_characters(self.folded, wanted, self.starts, begin) is not None
        return find_whole_words(self.marked, self.marked_positions, wanted, begin) is not None


def fold_text(text: str) -> tuple[str, dict[int, int]]:
    """
    Fold the case, the quotes and the spaces of a text, and map the indices where its characters begin back to the
    original text. A run of spaces and line ends becomes one space.

    A character may become several (the capital I with a dot, sharp s, ligatures), and only complete characters can be
    mapped back.

    Example:

    ```python
    >>> from modeling_reftr.phrase_search_reftr import fold_text

    >>> fold_text("Maß")
    ('mass', {0: 0, 1: 1, 2: 2, 4: 3})

    ```"""
    pieces, starts, length, was_space = [], {}, 0, False
    for index, character in enumerate(text):
        starts[length] = index
        is_space = character.isspace()
        piece = ("" if was_space else " ") if is_space else QUOTES.get(character) or character.casefold()
        pieces.append(piece)
        length, was_space = length + len(piece), is_space
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
    >>> from modeling_reftr.phrase_search_reftr import WORD_END, WORD_START, mark_words

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
    >>> from modeling_reftr.phrase_search_reftr import find_occurrences

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
