"""Data sets for visual grounding, one module a source and one schema for all."""

import hashlib
import inspect
from pathlib import Path

import datasets

from . import flickr30k_entities, jsonl, reftr_index
from .schema import FEATURES
from .shapes import Shapes


SOURCES = {source.name: source for module in (flickr30k_entities, jsonl, reftr_index) for source in module.SOURCES}
BUILDERS = {"shapes": Shapes, **{name: source.builder for name, source in SOURCES.items()}}


def source_hash(builder: type[datasets.DatasetBuilder]) -> str:
    """Changes whenever a builder's module or the schema does; without it, an edited builder gives its old rows."""
    sources = (Path(inspect.getfile(builder)), Path(__file__).with_name("schema.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def load(name: str, split: str | None = None, cache_dir: str | None = None, **config) -> datasets.Dataset:
    """
    Build a set, or take it from the cache where it was built before, and load it.

    Args:
        name (`str`): the set, one of `BUILDERS`.
        split (`str`, *optional*): one of its splits; absent: all of them, as a `DatasetDict`.
        cache_dir (`str`, *optional*): where built sets are kept, the datasets library's own cache by default.
        config: fields of the set's configuration, for example `image_size=64`.

    Returns:
        `datasets.Dataset`: a row an image, see `schema.FEATURES`.

    Raises:
        ValueError: if there is no such set.

    Example:

    ```python
    >>> import data_scripts

    >>> rows = data_scripts.load("shapes", split="test", num_train=1, num_validation=1, num_test=2)
    >>> rows[0]["sentences"][0]["phrases"][0]["types"]
    ['attribute']

    ```"""
    if name not in BUILDERS:
        raise ValueError(f"There is no data set {name!r}; there are: {', '.join(BUILDERS)}.")
    if name in SOURCES:
        config["config_name"] = SOURCES[name].config_name
    builder = BUILDERS[name](cache_dir=cache_dir, hash=source_hash(BUILDERS[name]), **config)
    try:
        builder.download_and_prepare()
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, (OSError, ValueError)):
            raise error.__cause__ from None  # what a builder found, and not that something was found
        raise
    return builder.as_dataset(split=split)


__all__ = ["BUILDERS", "FEATURES", "load"]
