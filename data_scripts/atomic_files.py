"""
Write files and folders that are never half written: whatever interrupts a process, readers find either the former
content or the complete new one.

Everything is written under a temporary name next to its target, `.<name>.<random>.incomplete`, synced to disk and
renamed. A killed process leaves the temporary name behind; see `remove_leftovers`.
"""

import contextlib
import fnmatch
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


SUFFIX = ".incomplete"


def temporary_path(path: Path) -> Path:
    """Return a new hidden name next to a path, on the same file system, so that it can be renamed to the path."""
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}{SUFFIX}")


def write_file(path: str | Path, content: bytes | str, durable: bool = True) -> None:
    """
    Write a file atomically.

    Args:
        path (`str` or `Path`): the file. Its permissions stay if it is replaced; a symbolic link is followed.
        content (`bytes` or `str`): what to write; text is written as UTF-8.
        durable (`bool`, *optional*, defaults to `True`):
            Whether to wait until the content is on the disk. False is for caches, which can be written again.

    Raises:
        OSError: if the file cannot be written; the former file stays.
    """
    with atomic_file(path, durable) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@contextlib.contextmanager
def atomic_file(path: str | Path, durable: bool = True) -> Iterator[Path]:
    """
    Yield a temporary path to write a file to, which replaces `path` when the block ends without an exception.

    Example:

    ```python
    >>> import os, tempfile
    >>> from data_scripts.atomic_files import atomic_file

    >>> folder = tempfile.mkdtemp()
    >>> with atomic_file(f"{folder}/counts.txt") as temporary:
    ...     _ = temporary.write_text("42")
    >>> os.listdir(folder)
    ['counts.txt']

    ```"""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        yield temporary
        if durable:
            sync(temporary)
        with contextlib.suppress(FileNotFoundError):  # another process may remove it at any time
            temporary.chmod(path.stat().st_mode & 0o7777)
        temporary.replace(path)
        if durable:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """
    Yield a temporary folder, which becomes `path` when the block ends without an exception.

    Args:
        path (`str` or `Path`): the folder; a symbolic link is followed.
        overwrite (`bool`, *optional*, defaults to `False`):
            Replace a folder that exists, with all that is in it. It is deleted after the new one has taken its name.

    Raises:
        OSError: if the folder exists and is not to be replaced, or cannot be written; the former folder stays.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not (overwrite and path.is_dir()):
        raise FileExistsError(f"{str(path)!r} exists. Choose another folder, or remove it first.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        temporary.mkdir()
        yield temporary
        sync_tree(temporary)
        if path.exists():
            exchange(temporary, path)
        else:
            temporary.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def exchange(temporary: Path, path: Path) -> None:
    """Rename a complete temporary folder to a path that exists, then delete what was there."""
    former = temporary_path(path)
    path.rename(former)
    try:
        temporary.rename(path)
    except BaseException:
        former.rename(path)
        raise
    shutil.rmtree(former)


@contextlib.contextmanager
def replaced_files(folder: str | Path, last: str = "") -> Iterator[Path]:
    """
    Yield a temporary folder, whose files replace those of the same names in `folder` when the block ends without an
    exception; other files of `folder` stay.

    Each file is replaced by one rename, after all of them are on the disk.

    Args:
        folder (`str` or `Path`): the folder, made if it does not exist.
        last (`str`, *optional*): pattern of the files that are replaced after all others, such as "*.safetensors".

    Raises:
        OSError: if a file cannot be written; the former files stay.
    """
    folder = Path(os.path.realpath(folder))
    folder.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(folder / "files")
    try:
        temporary.mkdir()
        yield temporary
        sync_tree(temporary)
        for file in sorted(temporary.iterdir(), key=lambda file: (fnmatch.fnmatchcase(file.name, last), file.name)):
            file.replace(folder / file.name)
        sync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder; an interruption leaves nothing under its name."""
    temporary = temporary_path(path)
    path.rename(temporary)
    shutil.rmtree(temporary)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left in a folder; no other process may be writing there."""
    for leftover in folder.glob(f".*{SUFFIX}"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def sync(path: Path) -> None:
    """Bring the content of a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Bring a folder with all files and folders in it to the disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file's content, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
