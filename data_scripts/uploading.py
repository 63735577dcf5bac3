"""One way to the Hub for all that goes there: data sets, models, Spaces."""

import logging
import time
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects


logger = logging.getLogger(__name__)

WAITS = (1, 4)  # seconds between tries, behind those of the client itself


def upload(
    folder: str | Path,
    repository: str,
    kind: str,
    private: bool | None = None,
    patterns: list[str] | None = None,
    message: str = "Upload",
    **settings,
) -> CommitInfo:
    """
    Upload a folder in one commit: all of it is there afterwards, or nothing. Large files that are there already, as
    after an upload that was broken off, are not sent again; files of the repository that match `patterns` and are not
    in the folder go.

    Args:
        folder (`str` or `Path`): what to upload.
        repository (`str`): "user/name"; made where it is not there.
        kind (`str`): "model", "dataset" or "space".
        private (`bool`, *optional*): whether a new repository is private.
        patterns (`list[str]`, *optional*): which files of the folder; absent: all.
        message (`str`, *optional*): of the commit.
        settings: others of `HfApi.create_repo`.

    Returns:
        `CommitInfo`: the commit, `oid` and `commit_url`.

    Raises:
        OSError: if the Hub is out of reach, refuses it, or holds other files than were sent; the folder stays.
    """
    for wait in (*WAITS, None):
        try:
            api = HfApi()
            api.create_repo(repository, repo_type=kind, private=private, exist_ok=True, **settings)
            commit = api.upload_folder(
                repo_id=repository,
                repo_type=kind,
                folder_path=folder,
                allow_patterns=patterns,
                delete_patterns=patterns,
                commit_message=message,
            )
            check_uploaded(api, Path(folder), repository, kind, patterns, commit)
            return commit
        except Exception as error:  # the network, the server and the token each have exceptions of their own
            reason = " ".join(str(error).split()) or type(error).__name__
            if wait is None or not is_passing(error):
                raise OSError(
                    f"{str(folder)!r} is complete, but was not pushed to {repository!r}: {reason} Log in (`hf auth "
                    "login`) and see that the network is there, then push again."
                ) from error
            logger.warning(f"The upload to {repository!r} failed ({reason}); once more in {wait} seconds.")
            time.sleep(wait)


def is_passing(error: Exception) -> bool:
    """Whether the same call may succeed later: the server or the connection failed, and did not refuse."""
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and (error.response.status_code >= 500 or error.response.status_code == 429)
    return not isinstance(error, (OSError, ValueError, TypeError))


def check_uploaded(api: HfApi, folder: Path, repository: str, kind: str, patterns, commit: CommitInfo):
    """
    Ask the Hub what the commit holds.

    Raises:
        OSError: naming the files that are not there, or of another size.
    """
    sizes = {path: (folder / path).stat().st_size for path in select_files(folder, patterns)}
    found = api.get_paths_info(repository, list(sizes), revision=commit.oid, repo_type=kind)
    there = {item.path: item.size for item in found}
    missing = sorted(path for path, size in sizes.items() if there.get(path) != size)
    if missing:
        raise OSError(f"the commit {commit.oid} does not hold {', '.join(missing)} as they were sent.")


def select_files(folder: Path, patterns: list[str] | None) -> list[str]:
    """The files of a folder that an upload takes, relative to it, as the client selects them."""
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return list(filter_repo_objects(paths, allow_patterns=patterns, ignore_patterns=DEFAULT_IGNORE_PATTERNS))
