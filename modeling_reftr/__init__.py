"""
RefTR ("Referring Transformer", NeurIPS 2021) for transformers.

Importing this package registers RefTR with the Auto classes and with `pipeline`. It imports torch and torchvision, as
importing a model from transformers does.
"""

# first, because older releases of transformers lack names that are imported below
from .requirements_reftr import MINIMUM_TRANSFORMERS as MINIMUM_TRANSFORMERS


# isort: split
import transformers
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_reftr import RefTRConfig as RefTRConfig
from .image_processing_reftr import RefTRImageProcessor as RefTRImageProcessor
from .image_processing_reftr import open_image as open_image
from .modeling_reftr import RefTRForVisualGrounding as RefTRForVisualGrounding
from .modeling_reftr import RefTRModel as RefTRModel
from .modeling_reftr import RefTRPreTrainedModel as RefTRPreTrainedModel
from .pipeline_reftr import VisualGroundingPipeline as VisualGroundingPipeline
from .predictor_reftr import RefTRPredictor as RefTRPredictor
from .processing_reftr import RefTRProcessor as RefTRProcessor
from .version_reftr import VERSION as VERSION


__version__ = VERSION

transformers.AutoConfig.register(RefTRConfig.model_type, RefTRConfig)
transformers.AutoModel.register(RefTRConfig, RefTRModel)
transformers.AutoModelForZeroShotObjectDetection.register(RefTRConfig, RefTRForVisualGrounding)
transformers.AutoImageProcessor.register(RefTRConfig, image_processor_classes={"torchvision": RefTRImageProcessor})
transformers.AutoProcessor.register(RefTRConfig, RefTRProcessor)
PIPELINE_REGISTRY.register_pipeline(
    "visual-grounding",
    VisualGroundingPipeline,
    pt_model=transformers.AutoModelForZeroShotObjectDetection,
    type="multimodal",
)
