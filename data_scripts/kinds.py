"""Validate the values of annotation files as they are read."""

import re
from collections.abc import Callable
from typing import Any

from .quoting import quote
from .reading import is_file_name


Kind = tuple[str, Callable]
MISSING = object()


def is_integer(value: Any) -> bool:
    """Return whether it is a 64-bit integer, and not true or false."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def is_list(value: Any) -> bool:
    """Return whether it is a list or a tuple."""
    return isinstance(value, list | tuple)


def is_targets(value: Any) -> bool:
    """Return whether a value is an object id of a reference or a list of them; -1, for no object, excludes others."""
    numbers = value if is_list(value) else [-1 if value is None else value]
    return all(map(is_integer, numbers)) and (-1 not in numbers or set(numbers) == {-1})


# (description of the expected value, predicate)
INTEGER: Kind = ("an integer", is_integer)
INTEGER_OR_ABSENT: Kind = ("an integer", lambda value: value is None or value is MISSING or is_integer(value))
DIGITS_OR_NONE: Kind = (
    "an integer, also as text, or null",
    lambda value: (
        value is None or is_integer(value) or (isinstance(value, str) and re.fullmatch("[0-9]{1,18}", value))
    ),
)
TARGETS: Kind = ("an integer, a list of integers, or null or [-1] for none", is_targets)
TEXT: Kind = ("text", lambda value: isinstance(value, str))
SPLIT: Kind = (
    "the name of a split, of letters, digits and _",
    lambda value: isinstance(value, str) and re.fullmatch(r"\w{1,50}", value) is not None and value != "all",
)
FILE_NAME: Kind = ("the path of a file inside its folder", is_file_name)
LIST: Kind = ("a list", is_list)


def check_fields(record: Any, kinds: dict[str, Kind], where: str) -> None:
    """
    Validate the fields of a record that are read; others may be anything.

    Args:
        record: the value in the file.
        kinds (`dict[str, Kind]`): field -> what its value must be.
        where (`str`): the file and the position in it, as the beginning of the message.

    Raises:
        ValueError: if it is not an object, lacks a field, or a value is of another kind, naming the first.

    Example:

    ```python
    >>> from data_scripts.kinds import INTEGER, check_fields

    >>> check_fields({"id": [7]}, {"id": INTEGER}, "'instances.json', image 0")
    Traceback (most recent call last):
    ValueError: 'instances.json', image 0 has id=[7]; expected an integer.

    ```"""
    if not isinstance(record, dict):
        raise ValueError(f"{where} is {quote(record)}; expected an object with {', '.join(kinds)}.")
    for name, (expected, is_right) in kinds.items():
        value = record.get(name, MISSING)
        if not is_right(value):
            found = f"no {name}" if value is MISSING else f"{name}={quote(value)}"
            raise ValueError(f"{where} has {found}; expected {expected}.")


def check_list(value: Any, where: str) -> list:
    """
    Return a list as it is.

    Raises:
        ValueError: if it is anything else.
    """
    if not is_list(value):
        raise ValueError(f"{where} is {quote(value)}; expected a list.")
    return value
