"""Escape text of unknown origin for terminals, Markdown and JSON."""

import json
import logging
import re
import sys
from typing import Any


def for_terminal(text: str) -> str:
    """
    Return a text whose only control characters are line ends and tabs. Others could move the cursor, change colours
    or the direction of writing, or not be written at all: they are spelled as Python spells them.

    Example:

    ```python
    >>> from data_scripts.escaping import for_terminal

    >>> print(for_terminal("the \\x1b[31mred\\u202e cup"))
    the \\x1b[31mred\\u202e cup

    ```"""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in "\n\t" else character.encode("unicode_escape").decode()
        for character in text
    )


class TerminalFormatter(logging.Formatter):
    """Format log records, which quote names and texts of data, for a terminal, see `for_terminal`."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        return for_terminal(super().format(record))


def for_markdown(text: str) -> str:
    """
    Return a text that Markdown and HTML show as it is, on one line, in a sentence, a heading or the cell of a table.

    Example:

    ```python
    >>> from data_scripts.escaping import for_markdown

    >>> for_markdown("a | [b](c) <script>")
    'a &#124; &#91;b&#93;(c) &lt;script&gt;'

    ```"""
    text = for_terminal(" ".join(text.split()))
    return re.sub(
        r"[&<>|`*~\[\]\\]|(?<!\w)_|_(?!\w)", lambda match: ENTITIES.get(match[0]) or f"&#{ord(match[0])};", text
    )


def for_code(text: str) -> str:
    """
    Return a text as inline code in Markdown, between as many backticks as it takes. In a table, use `for_markdown`,
    because a bar ends the cell even in code.

    Example:

    ```python
    >>> from data_scripts.escaping import for_code

    >>> for_code("runs/demo"), for_code("a`b")
    ('`runs/demo`', '`` a`b ``')

    ```"""
    text = for_terminal(" ".join(text.split()))
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}" if len(fence) == 1 and text else f"{fence} {text} {fence}"


def for_stdout(value: Any, indent: int | None = None) -> str:
    """
    Return a value as JSON for the standard output: letters as they are where it can write them, and escapes in place
    of all that is invisible or is half of a character.

    Example:

    ```python
    >>> from data_scripts.escaping import for_stdout

    >>> print(for_stdout(["猫", "a\\ud800"]))
    ["\\u732b", "a\\ud800"]

    ```"""
    text = json.dumps(value, ensure_ascii=False)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    is_written = text.isprintable() and text.encode(encoding, "ignore").decode(encoding) == text
    return json.dumps(value, ensure_ascii=not is_written, indent=indent)


# what can begin HTML or an element of Markdown; an underscore within a word cannot
MARKUP = re.compile(r"[&<>|`*~\[\]\\]|(?<!\w)_|_(?!\w)")
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
