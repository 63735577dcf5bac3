"""Datasets for visual grounding, one module per source and one schema for all."""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .combining import combine
    from .loading import SOURCES, load
    from .reading import coco_id
    from .schema import FEATURES

__all__ = ["FEATURES", "SOURCES", "coco_id", "combine", "load"]

_MODULES = {
    "FEATURES": "schema",
    "SOURCES": "loading",
    "coco_id": "reading",
    "combine": "combining",
    "load": "loading",
}


def __getattr__(name: str) -> Any:
    # the datasets library takes most of a second to import, and the commands' help does not use it
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
