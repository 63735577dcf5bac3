"""RefTR ("Referring Transformer", NeurIPS 2021) for transformers."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor

from .configuration_reftr import RefTRConfig
from .image_processing_reftr import RefTRImageProcessor
from .modeling_reftr import RefTRForVisualGrounding, RefTRModel, RefTRPreTrainedModel
from .processing_reftr import RefTRProcessor


AutoConfig.register("reftr", RefTRConfig)
AutoModel.register(RefTRConfig, RefTRModel)
AutoImageProcessor.register(RefTRConfig, image_processor_classes={"torchvision": RefTRImageProcessor})
AutoProcessor.register(RefTRConfig, RefTRProcessor)

__all__ = [
    "RefTRConfig",
    "RefTRForVisualGrounding",
    "RefTRImageProcessor",
    "RefTRModel",
    "RefTRPreTrainedModel",
    "RefTRProcessor",
]
