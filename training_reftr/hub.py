"""Push datasets, models and Spaces to the Hub."""

import fnmatch
import logging
import time
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError

from data_scripts.atomic_files import write_file


logger = logging.getLogger(__name__)

WAITS = (1, 4)  # seconds between tries, behind those of the client itself


def upload(
    folder: str | Path,
    repository: str,
    kind: str,
    private: bool | None = None,
    patterns: list[str] | None = None,
    message: str = "Upload",
    contents: dict[str, bytes] | None = None,
    **settings: Any,
) -> CommitInfo:
    """
    Upload a folder in one commit, completely or not at all.

    Large files that the Hub already has, as after an interrupted upload, are not sent again. Files of the repository
    that match `patterns` and are not in the folder are deleted.

    Args:
        folder (`str` or `Path`): the folder to upload.
        repository (`str`): "user/name", created if it does not exist.
        kind (`str`): "model", "dataset" or "space".
        private (`bool`, *optional*): whether a new repository is private. True refuses one that is public.
        patterns (`list[str]`, *optional*): files of the folder to upload; defaults to all.
        message (`str`, *optional*): commit message.
        contents (`dict[str, bytes]`, *optional*): further files by name, uploaded instead of those in the folder with
            the same name; the folder is not changed.
        settings: further arguments of `HfApi.create_repo`.

    Returns:
        `CommitInfo`: the commit with `oid` and `commit_url`.

    Raises:
        OSError: if the Hub cannot be reached, refuses it, or holds other files than were sent; folder and repository
            are unchanged.
    """
    folder = Path(folder)
    for wait in (*WAITS, None):
        try:
            make_repository(repository, kind, private, **settings)
            files = {name: folder / name for name in select_files(folder, patterns)} | (contents or {})
            commit = commit_files(files, repository, kind, patterns, message)
            check_uploaded(files, repository, kind, commit)
            return commit
        except Exception as error:  # the network, the server and the token each have exceptions of their own
            if wait is None or not is_passing(error):
                raise OSError(
                    f"{str(folder)!r} is complete, but was not pushed to {repository!r}: {reason_of(error)}"
                ) from error
            logger.warning(f"The push to {repository!r} failed ({reason_of(error)}); once more in {wait} seconds.")
            time.sleep(wait)


def write_contents(folder: str | Path, contents: dict[str, bytes]) -> None:
    """
    Write files into a folder atomically: half a card would be taken for one that somebody edited.

    Args:
        folder (`str` or `Path`): the folder.
        contents (`dict[str, bytes]`): the files by their names in the folder.
    """
    for name, content in contents.items():
        write_file(Path(folder) / name, content)


def make_repository(repository: str, kind: str, private: bool | None = None, **settings: Any) -> None:
    """
    Create a repository if it does not exist; `settings` are further arguments of `HfApi.create_repo`.

    Raises:
        OSError: if it exists and is public, but should be private.
        Exception: any error of the client, see `reason_of`.
    """
    api = HfApi()
    api.create_repo(repository, repo_type=kind, private=private, exist_ok=True, **settings)
    if private and not api.repo_info(repository, repo_type=kind).private:
        raise OSError(f"{repository!r} is there and public. Make it private in its settings first, or push without.")


def commit_files(
    files: dict[str, Path | bytes], repository: str, kind: str, patterns: list[str] | None, message: str
) -> CommitInfo:
    """Make one commit that adds these files, by path or content, and deletes other files that match the patterns."""
    api = HfApi()
    there = api.list_repo_files(repository, repo_type=kind)
    stale = [path for path in there if is_selected(path, patterns) and path not in {*files, ".gitattributes"}]
    operations = [CommitOperationAdd(path, source) for path, source in files.items()]
    operations += [CommitOperationDelete(path, is_folder=False) for path in stale]
    return api.create_commit(repository, operations, repo_type=kind, commit_message=message)


def reason_of(error: Exception) -> str:
    """Return an explanation of an error and its remedy."""
    reason = " ".join(str(error).split()) or type(error).__name__
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if status in (401, 403):
        return f"{reason} Log in with a token that may write there (`hf auth login`), then push again."
    if status is None and not isinstance(error, OSError):
        return f"{reason} See that the network is there, then push again."
    return f"{reason} Push again: what has arrived is not sent twice."


def is_passing(error: Exception) -> bool:
    """Return whether the same call may succeed later, because the server or the connection failed."""
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and (error.response.status_code >= 500 or error.response.status_code == 429)
    return not isinstance(error, (OSError, ValueError, TypeError))


def check_uploaded(files: dict[str, Path | bytes], repository: str, kind: str, commit: CommitInfo) -> None:
    """
    Ask the Hub what the commit holds.

    Raises:
        OSError: if files are missing or have another size, naming them.
    """
    found = HfApi().get_paths_info(repository, list(files), revision=commit.oid, repo_type=kind)
    there = {item.path: item.size for item in found}
    sizes = {
        path: len(source) if isinstance(source, bytes) else source.stat().st_size for path, source in files.items()
    }
    missing = [path for path, size in sizes.items() if there.get(path) != size]
    if missing:
        raise OSError(f"the commit {commit.oid} does not hold {', '.join(missing)} as they were sent.")


def select_files(folder: Path, patterns: list[str] | None) -> list[str]:
    """Return the files of a folder to upload, relative to it."""
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [path for path in paths if is_selected(path, patterns)]


def is_selected(path: str, patterns: list[str] | None) -> bool:
    """
    Return whether a path matches one of the patterns, in which a star does not match a slash.

    Example:

    ```python
    >>> from training_reftr.hub import is_selected

    >>> is_selected("model.safetensors", ["*.safetensors"]), is_selected("old/model.safetensors", ["*.safetensors"])
    (True, False)

    ```"""
    if patterns is None:
        return True
    return any(fnmatch.fnmatchcase(path, pattern) and path.count("/") == pattern.count("/") for pattern in patterns)
