"""Check texts before anything reads them."""

import re
import unicodedata


# A caption has a few hundred characters, and a model reads about a hundred tokens. Text is truncated after it was
# tokenized, which takes a second per half a million characters.
MAX_CHARACTERS = 100_000
REFUSED = re.compile("[\0\ud800-\udfff]")


def check_text(text: str, name: str) -> str:
    """
    Return a text unchanged if it can be encoded, written to a file and read again.

    Other control characters, invisible ones and those that change the direction of writing are accepted. Nothing is
    replaced, so that the (start, end) of phrases refer to the caller's characters.

    Args:
        text (`str`): the text.
        name (`str`): the name of the text, for messages.

    Raises:
        ValueError: if it is not a `str`, or has more than `MAX_CHARACTERS` characters, a NUL or a surrogate, which is
            half a character. Surrogates come from a JSON escape without its other half, and from Python for bytes of
            file names and arguments that are not UTF-8.

    Example:

    ```python
    >>> from modeling_reftr.text_reftr import check_text

    >>> check_text("the red cup", "text")
    'the red cup'
    >>> check_text("the \\ud83d cup", "text")
    Traceback (most recent call last):
    ValueError: text has '\\ud83d' at character 4, half of a surrogate pair, in 'the \\ud83d cup': remove it.

    ```"""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a str, got {type(text).__name__}.")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"{name} has {len(text):,} characters, more than {MAX_CHARACTERS:,}; it begins with {text[:40]!r}: give "
            "one expression or one caption."
        )
    if found := REFUSED.search(text):
        kind = "NUL" if found[0] == "\0" else "half of a surrogate pair"
        excerpt = text[max(0, found.start() - 40) : found.end() + 40]
        raise ValueError(f"{name} has {found[0]!r} at character {found.start()}, {kind}, in {excerpt!r}: remove it.")
    return text


def is_blank(text: str) -> bool:
    """
    Return whether a text has no visible character: all are spaces, control, format or unassigned characters, which
    BERT's tokenizers drop.

    Example:

    ```python
    >>> from modeling_reftr.text_reftr import is_blank

    >>> is_blank(" \\u200b\\x07"), is_blank("?"), is_blank("")
    (True, False, True)

    ```"""
    return all(
        character.isspace() or character == "\ufffd" or unicodedata.category(character).startswith("C")
        for character in text
    )
