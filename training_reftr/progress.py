"""The progress of training and evaluation, for one process. Nothing here is a collective."""

import contextlib
import logging
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType

from tqdm.contrib.logging import logging_redirect_tqdm

from data_scripts.progress import progress_bar


logger = logging.getLogger(__name__)

MAX_SECONDS = 300  # between two lines of the log


class Progress:
    """
    Show the progress of a loop: by a bar on a terminal, and otherwise by lines of the log.

    Args:
        description (`str`): name of the loop.
        total (`int`): number of its steps.
        done (`int`, *optional*, defaults to 0): number of steps that were done before.
        unit (`str`, *optional*, defaults to `"step"`): name of a step.
        num_lines (`int`, *optional*, defaults to 20):
            Lines of the log, at equal distances; those of a slow loop are at most five minutes apart. With 0, only a
            slow loop has lines.
        is_shown (`bool`, *optional*, defaults to `True`): whether this process shows it.
    """

    def __init__(
        self,
        description: str,
        total: int,
        done: int = 0,
        unit: str = "step",
        num_lines: int = 20,
        is_shown: bool = True,
    ) -> None:
        self.description, self.total, self.done, self.unit = description, total, done, unit
        self.bar = progress_bar(
            is_shown=is_shown, desc=description, total=total, initial=done, unit=unit, leave=bool(num_lines)
        )
        self.is_logged = is_shown and self.bar.disable
        self.interval = total / num_lines if num_lines else float("inf")
        self.start = self.logged_at = time.monotonic()
        self.num_before = self.num_logged = done
        # write lines of the log above the bar, not into it
        self.redirection = contextlib.nullcontext() if self.bar.disable else logging_redirect_tqdm()

    def __enter__(self) -> "Progress":
        self.redirection.__enter__()
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.bar.close()
        self.redirection.__exit__(exception_type, exception, traceback)

    def update(self, describe: Callable[[], str] | None = None) -> None:
        """
        Count a step.

        Args:
            describe (`Callable`, *optional*): returns values to log with the step; called only for a line of the log.
        """
        self.bar.update()
        self.done += 1
        now = time.monotonic()
        is_due = self.done - self.num_logged >= self.interval or now - self.logged_at >= MAX_SECONDS
        if not self.is_logged or not is_due:
            return
        self.logged_at, self.num_logged = now, self.done
        left = (now - self.start) / (self.done - self.num_before) * max(0, self.total - self.done)
        values = "" if describe is None else f"{describe()}, "
        logger.info(
            f"{self.description}: {self.unit} {self.done} of {self.total} ({self.done / self.total:.0%}), {values}"
            f"{timedelta(seconds=round(left))} remaining"
        )
