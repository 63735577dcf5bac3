"""Find words that a tokenizer does not know, and warn about them."""

import functools
import unicodedata
from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast
from transformers.utils import logging


logger = logging.get_logger(__name__)

CONTINUATION = "##"  # of a piece of a word, in the vocabulary of a WordPiece tokenizer
MAX_WORDS = 10  # in a warning
MAX_CHARACTERS = 40  # of a word in a warning


def spells_unknown_words(tokenizer: PreTrainedTokenizerFast) -> bool:
    """
    Return whether a tokenizer splits words that are not in its vocabulary into characters.

    The vocabulary of a tokenizer that was trained on a dataset consists of its words and characters, and a model that
    was trained with it has hardly read other words. Published models know longer pieces of words as well.
    """
    lengths = {len(token) for token in tokenizer.get_vocab() if token.startswith(CONTINUATION)}
    return lengths == {len(CONTINUATION) + 1}


def find_unknown_words(
    text: str,
    token_ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    tokenizer: PreTrainedTokenizerFast,
    are_spelled: bool,
) -> list[str]:
    """
    Return the words of a text that a tokenizer does not know, without punctuation.

    Args:
        text (`str`): the text, as the tokenizer received it.
        token_ids (`list[int]`), offsets (list of `(start, end)`): its tokens, and the characters of each.
        tokenizer (`PreTrainedTokenizerFast`): the tokenizer.
        are_spelled (`bool`): see `spells_unknown_words`.
    """
    words = []  # start, end, and whether it is unknown
    for token, (start, end) in zip(tokenizer.convert_ids_to_tokens(token_ids), offsets, strict=True):
        if start == end:  # a special token
            continue
        if token.startswith(CONTINUATION) and words:
            words[-1] = (words[-1][0], end, words[-1][2] or are_spelled)
        else:
            words.append((start, end, token == tokenizer.unk_token))
    unknown = [text[start:end] for start, end, is_unknown in words if is_unknown]
    return [word for word in unknown if not all(unicodedata.category(character)[0] == "P" for character in word)]


@functools.lru_cache(maxsize=256)
def warn_about_unknown_words(words: tuple[str, ...]) -> None:
    """Warn once about words that a tokenizer does not know; the cache forgets the oldest."""
    quoted = ", ".join(repr(word[:MAX_CHARACTERS]) for word in words[:MAX_WORDS])
    more = f" and {len(words) - MAX_WORDS} more" if len(words) > MAX_WORDS else ""
    logger.warning(
        f"The model's tokenizer does not know the word{'' if len(words) == 1 else 's'} {quoted}{more}: answers to "
        f"{'it' if len(words) == 1 else 'them'} are guesses."
    )
