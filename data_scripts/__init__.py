"""Data sets for visual grounding, one module a source and one schema for all."""

import datasets

from . import shapes
from .building import Source, prepare
from .schema import FEATURES


SOURCES: dict[str, Source] = {source.name: source for module in (shapes,) for source in module.SOURCES}


def source_of(name: str) -> Source:
    """
    The set of this name.

    Raises:
        ValueError: if there is no such set.
    """
    if name not in SOURCES:
        raise ValueError(f"There is no data set {name!r}; there are: {', '.join(SOURCES)}.")
    return SOURCES[name]


def load(
    name: str,
    split: str | None = None,
    data_dir: str | None = None,
    streaming: bool = False,
    cache_dir: str | None = None,
    **flags,
) -> datasets.Dataset:
    """
    Build a set, or take it from the cache where it was built before, and load it.

    Args:
        name (`str`): the set, one of `SOURCES`.
        split (`str`, *optional*): one of its splits; absent: all of them, as a `DatasetDict`.
        data_dir (`str`, *optional*): where its files are.
        streaming (`bool`, *optional*, defaults to `False`): rows as they are made, nothing is built.
        cache_dir (`str`, *optional*): where built sets are kept, the datasets library's own cache by default.
        flags: fields of the set's configuration, for example `image_size=64`.

    Returns:
        `datasets.Dataset`: a row an image, see `schema.FEATURES`.

    Raises:
        ValueError: if there is no such set or flag.

    Example:

    ```python
    >>> import data_scripts

    >>> rows = data_scripts.load("shapes", split="test", num_train=1, num_validation=1, num_test=2)
    >>> rows[0]["sentences"][0]["phrases"][0]["types"]
    ['attribute']

    ```"""
    source = source_of(name)
    if streaming:
        builder = source.builder(config_name=source.config_name, data_dir=data_dir, cache_dir=cache_dir, **flags)
        return builder.as_streaming_dataset(split=split)
    return prepare(source, data_dir, cache_dir, **flags).as_dataset(split=split)


__all__ = ["FEATURES", "SOURCES", "load"]
