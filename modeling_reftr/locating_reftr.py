"""
Refuse the name of a model that is neither a folder nor a Hub id, before the library retries on the network.

This file imports neither torch nor this package: the commands run it by itself, before they import torch.
"""

import difflib
import os
import re
from collections.abc import Mapping
from typing import Any


HUB_ID = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*")
# files of which a repository with a model, a processor or a tokenizer has at least one
FILES = ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
NUM_REQUESTS = 2
MAX_SECONDS = 4  # per request; the library itself retries for a minute


def check_source(
    name: str | os.PathLike | None, arguments: Mapping[str, Any] | None = None, what: str = "RefTR"
) -> None:
    """
    Refuse a name at which there is nothing to load.

    A name that does not exist is a Hub id if it is of the form "owner/name" or "name", and there is no folder "owner".
    It is accepted if the cache or the Hub has it. Any other name, and a `Path`, is a path: the Hub is not asked.

    Args:
        name (`str` or `os.PathLike`): a path or a Hub id; None is accepted.
        arguments (`Mapping`, *optional*): keyword arguments of `from_pretrained`, such as `revision`.
        what (`str`, *optional*, defaults to `"RefTR"`): what is to be loaded, for messages.

    Raises:
        OSError: if there is nothing; the message is one sentence, which names similar folders.
    """
    if not isinstance(name, (str, os.PathLike)) or os.path.exists(name):
        return
    is_id = isinstance(name, str) and HUB_ID.fullmatch(name) is not None
    name, arguments = str(name), arguments or {}
    if is_id and is_cached(name, arguments):
        return
    owner = name.rpartition("/")[0]
    if not is_id or (owner and os.path.isdir(owner)):
        raise FileNotFoundError(describe_missing(name, what))
    if reason := find_hub_problem(name, arguments):
        raise FileNotFoundError(describe_missing(name, what, reason))


def is_cached(name: str, arguments: Mapping[str, Any]) -> bool:
    """Return whether a file of a Hub id is in the cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    folder, where = arguments.get("subfolder") or "", {key: arguments.get(key) for key in ("cache_dir", "revision")}
    try:
        return any(
            isinstance(try_to_load_from_cache(name, os.path.join(folder, file), **where), str) for file in FILES
        )
    except HFValidationError:
        return False


def find_hub_problem(name: str, arguments: Mapping[str, Any]) -> str | None:
    """Return why the Hub does not provide a repository that is not in the cache; None if it may."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE or arguments.get("local_files_only"):
        return "and the Hub is not asked, as offline mode is on"
    for _ in range(NUM_REQUESTS):
        try:
            url = hf_hub_url(name, FILES[0], revision=arguments.get("revision"))
            get_hf_file_metadata(url, token=arguments.get("token"), timeout=MAX_SECONDS)
        except RepositoryNotFoundError:
            return f"and {constants.ENDPOINT} has no such model (a private one requires `hf auth login`)"
        except HfHubHTTPError:  # without this file, or the revision: the library says what is missing
            return None
        except Exception as error:  # the client's own exceptions, and those of invalid names
            problem = " ".join(str(error).split()) or type(error).__name__
        else:
            return None
    return f"and {constants.ENDPOINT} cannot be reached: {problem[:200]}"


def describe_missing(name: str, what: str, reason: str = "") -> str:
    """Return the message of a name at which there is nothing, with similar folders as suggestions."""
    shown = name if len(name) <= 200 else f"{name[:200]}..."
    similar = find_similar(name)
    advice = f"did you mean {' or '.join(map(repr, similar))}?" if similar else ""
    if reason:
        return f"There is no {what} at {shown!r}, {reason}{f'; {advice}' if advice else '.'}"
    return f"There is no {what} at {shown!r}: {advice or 'give the path of a folder, or a Hub id (owner/name).'}"


def find_similar(name: str) -> list[str]:
    """Return paths of existing folders whose names resemble that of a missing one, the most similar first."""
    found = [os.sep if os.path.isabs(name) else ""]
    for part in filter(None, os.path.expanduser(name).split("/")):
        found = [
            os.path.join(folder, match)
            for folder in found
            for match in (
                [part]
                if os.path.exists(os.path.join(folder, part))
                else difflib.get_close_matches(part, subfolders_of(folder))
            )
        ]
    return found[:3]


def subfolders_of(folder: str) -> list[str]:
    """Return the names of the folders in a folder; none if it cannot be read."""
    try:
        with os.scandir(folder or os.curdir) as entries:
            return [entry.name for entry in entries if entry.is_dir()]
    except OSError:
        return []
