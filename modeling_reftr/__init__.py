"""RefTR ("Referring Transformer", NeurIPS 2021) for transformers."""

from .configuration_reftr import RefTRConfig
from .image_processing_reftr import RefTRImageProcessor
from .modeling_reftr import RefTRForVisualGrounding, RefTRModel, RefTRPreTrainedModel
from .processing_reftr import RefTRProcessor


__all__ = [
    "RefTRConfig",
    "RefTRForVisualGrounding",
    "RefTRImageProcessor",
    "RefTRModel",
    "RefTRPreTrainedModel",
    "RefTRProcessor",
]
