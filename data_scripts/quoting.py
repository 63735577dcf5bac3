"""
Quote values in messages.

A rejected value may be a text of gigabytes, or a list from a small file that unfolds to 10 ** 30 entries; `repr` would
write all of it before it could be cut.
"""

from collections.abc import Iterator
from os import PathLike
from typing import Any


MAX_LENGTH = 100  # characters of a quoted value


def quote(value: Any, max_length: int = MAX_LENGTH) -> str:
    """
    Return the beginning of a value's `repr`, in time and memory that depend on `max_length` alone.

    Args:
        value: any value. Objects that are not data are named by their type, and their code is not run.
        max_length (`int`, *optional*, defaults to 100):
            The maximum number of characters; the end of a longer `repr` is replaced by "...".

    Example:

    ```python
    >>> from data_scripts.quoting import quote

    >>> quote({"box": [1, 2.5, None, "x"]})
    "{'box': [1, 2.5, None, 'x']}"
    >>> quote("word " * 1000, max_length=20)
    "'word word word w..."
    >>> nested = []
    >>> for _ in range(30):
    ...     nested = [nested] * 10
    >>> quote(nested, max_length=40)
    '[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[], [],...'

    ```"""
    text = ""
    for part in _parts(value, max_length):
        text += part
        if len(text) > max_length:
            return f"{text[: max_length - 3]}..."
    return text


def explain(error: BaseException, max_length: int = 300) -> str:
    """
    Return the beginning of an exception's message.

    Libraries quote all of a value that they reject, and a KeyError formats its key only when it is converted to text.

    Example:

    ```python
    >>> from data_scripts.quoting import explain

    >>> explain(ValueError("no number"))
    'no number'
    >>> explain(KeyError("split"))
    "KeyError: 'split'"

    ```"""
    is_text = all(isinstance(value, str) for value in error.args) or isinstance(error, OSError | UnicodeError)
    if is_text and error.args and not isinstance(error, KeyError):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {', '.join(quote(value, max_length) for value in error.args[:3])}"
    text = text.strip().removesuffix(":")
    return text if len(text) <= max_length else f"{text[: max_length - 3]}..."


def _parts(value: Any, max_length: int) -> Iterator[str]:
    """Yield the parts of a value's `repr`, none of them empty, so that the caller can stop early."""
    kind = type(value)
    if isinstance(value, str | bytes | bytearray):
        yield repr(kind(value[: max_length + 1]) if kind in (str, bytes, bytearray) else str(value[: max_length + 1]))
    elif kind is int and value.bit_length() > 4 * max_length:
        yield f"<int of {value.bit_length()} bits>"
    elif value is None or kind in (bool, int, float, complex):
        yield repr(value)
    elif isinstance(value, dict):
        yield "{"
        for index, (key, item) in enumerate(dict.items(value)):
            yield from (", ",) if index else ()
            yield from _parts(key, max_length)
            yield ": "
            yield from _parts(item, max_length)
        yield "}"
    elif isinstance(value, list | tuple | set | frozenset):
        opening, closing = "[]" if isinstance(value, list) else "()" if isinstance(value, tuple) else "{}"
        yield opening
        for index, item in enumerate(value):
            yield from (", ",) if index else ()
            yield from _parts(item, max_length)
        yield f",{closing}" if closing == ")" and len(value) == 1 else closing
    elif isinstance(value, PathLike):
        yield repr(str(value))
    elif kind.__module__.partition(".")[0] in ("numpy", "torch") and hasattr(value, "tolist"):
        yield from _array_parts(value, max_length)
    else:
        yield f"<{kind.__module__}.{kind.__qualname__}>"


def _array_parts(value: Any, max_length: int) -> Iterator[str]:
    """Yield the numbers of a small array or tensor, or the shape of a large one."""
    size, dtype = 1, str(value.dtype).removeprefix("torch.")
    for side in value.shape:
        size *= max(int(side), 1)  # a million empty rows take as many characters as numbers
    is_dense = getattr(value, "is_cpu", True) and not getattr(value, "is_sparse", False)
    if size <= max_length and is_dense and not getattr(value.dtype, "hasobject", False):
        yield from _parts(value.tolist(), max_length)
    else:
        yield f"<{type(value).__name__} of {dtype} and shape {quote(tuple(value.shape), max_length)}>"
