"""Progress bars, which are shown on terminals and in notebooks only: in a file, each of their states is a line."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


def progress_bar(iterable: Iterable | None = None, is_shown: bool = True, **options: Any) -> tqdm:
    """
    Return a progress bar of tqdm, which is disabled if stderr is not a terminal.

    Args:
        iterable (`Iterable`, *optional*): what to iterate over.
        is_shown (`bool`, *optional*, defaults to `True`): whether to show the bar on a terminal.
        options: other arguments of `tqdm`.
    """
    return tqdm(iterable, disable=None if is_shown else True, **options)


def disable_library_bars() -> None:
    """Disable the progress bars of the libraries that are imported if stderr is not a terminal."""
    if sys.stderr.isatty():
        return
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
    if "transformers" in sys.modules:
        sys.modules["transformers"].logging.disable_progress_bar()
