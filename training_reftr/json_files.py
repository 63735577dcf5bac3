"""JSON files of a run's folder, read with errors that name the file. Nothing here is a collective."""

import json
from collections.abc import Iterator
from pathlib import Path


def read_json(path: Path) -> dict:
    """
    Return the object that a JSON file holds.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not UTF-8, not JSON, or not an object, naming the file.
    """
    try:
        return parse_object(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}.") from error


def read_json_lines(path: Path) -> Iterator[tuple[int, bytes, dict | ValueError]]:
    """Yield (number, line, its object or why it is not one) of each line of a JSON Lines file that is not blank."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            try:
                yield number, line, parse_object(line)
            except ValueError as error:
                yield number, line, error


def parse_object(content: bytes) -> dict:
    """
    Return the object that JSON in UTF-8 says.

    Raises:
        ValueError: if it is not one, with the reason.
    """
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError("its values are nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    return value
