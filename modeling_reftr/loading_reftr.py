"""Name the file in errors about a model's files, whichever library raised them."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import safe_open

from .quoting_reftr import explain, quote


CONFIG_FILES = ("config.json",)
WEIGHT_FILES = ("model.safetensors.index.json", "model.safetensors", "adapter_config.json")
IMAGE_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "chat_template.json",
    "chat_template.jinja",
)


class DamagedFilesError(ValueError, RuntimeError):
    """
    Raised if files of a model cannot be used. It is a `ValueError`, as all data errors of this package, and a
    `RuntimeError`, as the library's error of weights that do not fit.

    Args:
        names (`str`): the files; only "config.json" if a configuration is built without knowing its folder.
        reason (`str`): what is wrong, without a full stop.
        source (`str`, *optional*): the folder or Hub id that they are of.
    """

    def __init__(self, names: str, reason: str, source: str | None = None):
        super().__init__(names, reason, source)
        self.names, self.reason, self.source = names, reason, source

    def __str__(self) -> str:
        of = "" if self.source is None else f" of {self.source!r}"
        return f"{self.names}{of} cannot be used: {self.reason}."


@contextlib.contextmanager
def naming_files(source: str | os.PathLike | None, names: Iterable[str], arguments: dict) -> Iterator[None]:
    """
    Name the files in errors that a library raises about them.

    Errors that name a file already, a `TypeError` about an argument of the caller, and an `OSError` without a damaged
    file, which says what is missing, are not changed.

    Args:
        source (`str` or `os.PathLike`): the folder, file or Hub id to load; None if there is none.
        names (`Iterable[str]`): the files to read, the most likely to be damaged first.
        arguments (`dict`): keyword arguments of the caller.

    Raises:
        DamagedFilesError: in place of the original error.
    """
    try:
        yield
    except MemoryError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of Rust code
            raise
        is_named = isinstance(error, DamagedFilesError)
        if not isinstance(source, (str, os.PathLike)) or (is_named and error.source) or names_one(error, arguments):
            raise
        source = str(source)
        if is_named:
            raise DamagedFilesError(error.names, error.reason, source) from error
        files = {name: path for name in names if (path := find_file(source, name, arguments))}
        for name, path in files.items():
            if reason := find_damage(path):
                raise DamagedFilesError(name, reason, source) from error
        if isinstance(error, OSError) or not files or (isinstance(error, ValueError) and names_a_file(error, files)):
            raise
        given = f" (with {', '.join(sorted(arguments))} as given)" if arguments else ""
        raise DamagedFilesError(" or ".join(files), describe_error(error) + given, source) from error


def names_one(error: Exception, arguments: dict) -> bool:
    """Return whether an error is Python's about a keyword argument that the caller gave."""
    return isinstance(error, TypeError) and any(
        f"unexpected keyword argument '{name}'" in str(error) for name in arguments
    )


def names_a_file(error: Exception, names: Iterable[str]) -> bool:
    """Return whether the message of an error has the name of one of the files."""
    return any(name in str(error) for name in names)


def find_file(source: str, name: str, arguments: dict) -> Path | None:
    """Return the path of a file of a folder, or of a Hub id in the cache; None if it does not exist."""
    if Path(source).is_file():
        return Path(source)
    name = str(PurePosixPath(arguments.get("subfolder") or "", name))
    if Path(source).is_dir():
        path = Path(source, name)
        return path if path.is_file() else None
    try:
        cached = try_to_load_from_cache(
            source, name, cache_dir=arguments.get("cache_dir"), revision=arguments.get("revision")
        )
    except HFValidationError:  # a path that is not there
        return None
    return Path(cached) if isinstance(cached, str) else None


def find_damage(path: Path) -> str | None:
    """Return why a file cannot be read as what its name says, None if it can."""
    try:
        if path.suffix == ".json":
            read_object(path)
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
    except Exception as error:  # safetensors has an exception of its own
        return describe_error(error)
    return None


def read_object(path: Path) -> dict:
    """
    Return the object of a JSON file.

    Raises:
        ValueError: if it is not UTF-8, not JSON, nested too deeply, or not an object, with the reason.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("its values are nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"it must be a JSON object, and it is {type(value).__name__}")
    return value


def check_index(folder: str | os.PathLike, subfolder: str = "") -> None:
    """
    Refuse an index of sharded weights that names no file, or one outside its folder.

    Raises:
        DamagedFilesError: if it does.
    """
    path = Path(folder, subfolder or "", "model.safetensors.index.json")
    if not path.is_file() or path.with_name("model.safetensors").is_file():
        return
    with naming_files(folder, [path.name], {"subfolder": subfolder}):
        index = read_object(path)
        shards = index.get("weight_map")
        if not isinstance(shards, dict) or not isinstance(index.get("metadata"), dict) or not shards:
            raise ValueError("it must have a weight_map of names of weights to files, and metadata")
        for shard in shards.values():
            if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise ValueError(f"weight_map names {quote(shard)}, which is not a safetensors file next to it")
            if not path.with_name(shard).is_file():
                raise ValueError(f"weight_map names {quote(shard)}, which is not there")
            if reason := find_damage(path.with_name(shard)):
                raise DamagedFilesError(shard, reason, str(folder))


def describe_error(error: BaseException) -> str:
    """Return the message of an exception on one line, with its type if it is not a sentence, without a full stop."""
    text = " ".join(explain(error).split())
    kind = type(error).__name__
    if type(error) not in (Exception, OSError, ValueError, RuntimeError) and not text.startswith(kind):
        text = f"{kind}: {text}"
    return text.rstrip(".!: ")
