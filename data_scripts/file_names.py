"""Find files whose names in an annotation file are spelled differently from those on the disk."""

import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from .quoting import quote


class FoundFile(NamedTuple):
    """
    A file that an annotation file names.

    Args:
        path (`Path`): the file; if there is none, where it would be.
        exists (`bool`): whether there is one.
        is_respelled (`bool`): whether its name is spelled differently.
        folder (`Path`): the folder that it was found in.
    """

    path: Path
    exists: bool
    is_respelled: bool
    folder: Path


def fold_name(name: str) -> str:
    """
    Return a name without differences of case, Unicode normal form and percent-encoding.

    Example:

    ```python
    >>> from data_scripts.file_names import fold_name

    >>> fold_name("Caf%C3%A9.JPG"), fold_name("cafe\\u0301.jpg")
    ('café.jpg', 'café.jpg')

    ```"""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", unquote(name)).casefold())


class FileFinder:
    """
    Find files by their names: as they are spelled, else by the one name that differs only in case, Unicode normal
    form, percent-encoding, or backslashes for slashes. Folders are listed once, and only if a name is not found.
    """

    def __init__(self) -> None:
        self.listings: dict[Path, dict[str, list[str]]] = {}

    def find(self, folders: Sequence[Path], name: str) -> FoundFile:
        """
        Find a file in one of several folders.

        Args:
            folders (`list[Path]`): the folders that the name may be relative to.
            name (`str`): the name, with slashes or backslashes.

        Raises:
            ValueError: if several files have this name.
        """
        exact = [(folder / name, folder) for folder in folders if os.path.isfile(folder / name)]
        found = exact or [(path, folder) for folder in folders for path in self._respelled(folder, name)]
        if len(found) > 1:  # not if one folder is a link to another
            found = list({os.path.realpath(path): (path, folder) for path, folder in reversed(found)}.values())
        if len(found) > 1:
            paths = ", ".join(str(path) for path, _ in found[:3])
            raise ValueError(
                f"{quote(name)} may be any of {len(found)} files, {paths}; give their folder as image_dir."
            )
        if not found:
            return FoundFile(folders[0] / name, False, False, folders[0])
        return FoundFile(found[0][0], True, not exact, found[0][1])

    def _respelled(self, folder: Path, name: str) -> list[Path]:
        """Return the files in a folder whose name is the same when folded; none outside of the folder."""
        paths = [folder]
        for part in re.split(r"[/\\]+", unquote(name)):
            if part not in ("", "."):
                paths = [path / entry for path in paths for entry in self._list(path).get(fold_name(part), ())]
        return [path for path in paths if os.path.isfile(path)]

    def _list(self, folder: Path) -> dict[str, list[str]]:
        """Return the names in a folder by their folded form; none if it cannot be listed."""
        if folder not in self.listings:
            names = self.listings[folder] = {}
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        names.setdefault(fold_name(entry.name), []).append(entry.name)
            except OSError:
                pass
        return self.listings[folder]
