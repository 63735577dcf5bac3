"""RefTR ("Referring Transformer", NeurIPS 2021) for transformers."""

from .configuration_reftr import RefTRConfig
from .modeling_reftr import RefTRForVisualGrounding, RefTRModel, RefTRPreTrainedModel


__all__ = ["RefTRConfig", "RefTRForVisualGrounding", "RefTRModel", "RefTRPreTrainedModel"]
