"""Collect what a reader of annotation files leaves out, changes or cannot read."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field


BAD_LINES = "bad lines"


@dataclass
class Findings:
    """
    What a reader reports about a file, in addition to its lines.

    Args:
        left_out (`Counter`): reason -> number of annotations that have no equivalent in a line.
        changed (`Counter`): change -> number of annotations that are kept with it.
        bad (`list[str]`): sentences about annotations that are malformed or refused, each with its position.
        bad_reasons (`Counter`): reason -> number of the bad ones.

    Example:

    ```python
    >>> from data_scripts.findings import Findings

    >>> findings = Findings()
    >>> with findings.entry("'a.json', image 3"):
    ...     raise ValueError("box is None; expected four numbers.")
    >>> findings.bad, findings.counted()
    (["'a.json', image 3: box is None; expected four numbers."], Counter({'bad lines': 1}))

    ```"""

    left_out: Counter = field(default_factory=Counter)
    changed: Counter = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    bad_reasons: Counter = field(default_factory=Counter)

    @contextlib.contextmanager
    def entry(self, where: str) -> Iterator[None]:
        """Read one entry of a file; an error of the block makes it a bad one."""
        try:
            yield
        except (OSError, ValueError) as error:
            self.refuse(where, str(error))

    def leave_out(self, reason: str, number: int = 1) -> None:
        """Count annotations that have no equivalent in a line."""
        if number:
            self.left_out[reason] += number

    def refuse(self, where: str, message: str, reason: str = BAD_LINES) -> None:
        """Refuse an annotation."""
        self.bad.append(f"{where}: {message}")
        self.bad_reasons[reason] += 1

    def counted(self) -> Counter:
        """Return what is left out if the bad ones are, reason -> number."""
        return self.left_out + self.bad_reasons
