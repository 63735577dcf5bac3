"""The texts that are taken, checked before anything reads them."""

import re
import unicodedata


# A caption has a few hundred characters, and a model reads some hundred tokens. What is cut afterwards is tokenized
# first, which takes a second for every half a million characters.
MAX_CHARACTERS = 100_000
REFUSED = re.compile("[\0\ud800-\udfff]")


def check_text(text, name: str) -> str:
    """
    Return a text as it is, if it is one that can be encoded, written to a file and read again. Other control
    characters, invisible ones and those that change the direction of writing are taken: nothing is replaced, so that
    the (start, end) of phrases mean the characters that the caller counts.

    Args:
        text (`str`): the text.
        name (`str`): what it is, to begin the message with.

    Raises:
        ValueError: if it is not a `str`, has more than `MAX_CHARACTERS` characters, a NUL, or a surrogate, which is
            half a character. JSON spells one as an escape without its other half, and Python puts one for each byte of
            a file name or an argument that is not UTF-8.

    Example:

    ```python
    >>> from modeling_reftr.text_reftr import check_text

    >>> check_text("the red cup", "text")
    'the red cup'
    >>> check_text("the \\ud83d cup", "text")
    Traceback (most recent call last):
    ValueError: text has '\\ud83d' at character 4, half of a surrogate pair, in 'the \\ud83d cup': write it without.

    ```"""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a str, got {type(text).__name__}.")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"{name} has {len(text):,} characters, more than {MAX_CHARACTERS:,}; it begins with {text[:40]!r}: give "
            "one expression or one caption."
        )
    if found := REFUSED.search(text):
        what = "NUL" if found[0] == "\0" else "half of a surrogate pair"
        excerpt = text[max(0, found.start() - 40) : found.end() + 40]
        raise ValueError(
            f"{name} has {found[0]!r} at character {found.start()}, {what}, in {excerpt!r}: write it without."
        )
    return text


def is_blank(text: str) -> bool:
    """
    Return whether no character of a text is visible: all are spaces, control, format or unassigned characters, which
    BERT's tokenizers leave out.

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
