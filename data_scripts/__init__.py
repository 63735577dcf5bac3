"""Data sets for visual grounding, one module a source and one schema for all."""

from .combine import coco_id, combine
from .loading import SOURCES, load
from .schema import FEATURES


__all__ = ["FEATURES", "SOURCES", "coco_id", "combine", "load"]
