"""RefTR ("Referring Transformer", NeurIPS 2021) for transformers. Nothing is imported before it is asked for."""

import importlib
from typing import TYPE_CHECKING

from .auto_classes import register_when_imported


if TYPE_CHECKING:
    from .configuration_reftr import RefTRConfig
    from .image_processing_reftr import RefTRImageProcessor, open_image
    from .modeling_reftr import RefTRForVisualGrounding, RefTRModel, RefTRPreTrainedModel
    from .pipeline_reftr import VisualGroundingPipeline
    from .processing_reftr import RefTRProcessor

_MODULES = {
    "RefTRConfig": "configuration_reftr",
    "RefTRForVisualGrounding": "modeling_reftr",
    "RefTRImageProcessor": "image_processing_reftr",
    "RefTRModel": "modeling_reftr",
    "RefTRPreTrainedModel": "modeling_reftr",
    "RefTRProcessor": "processing_reftr",
    "VisualGroundingPipeline": "pipeline_reftr",
    "open_image": "image_processing_reftr",
}

__all__ = [
    "RefTRConfig",
    "RefTRForVisualGrounding",
    "RefTRImageProcessor",
    "RefTRModel",
    "RefTRPreTrainedModel",
    "RefTRProcessor",
    "VisualGroundingPipeline",
    "open_image",
]


def __getattr__(name: str):
    if name == "__version__":
        return importlib.import_module(".configuration_reftr", __name__).VERSION
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_when_imported()
