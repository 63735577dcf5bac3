"""Stages found in image backbones with random weights, and the parameters that freezing covers."""

import pytest
import torch
from transformers.backbone_utils import load_backbone

from modeling_reftr import RefTRConfig
from modeling_reftr.backbone_reftr import find_stages, freeze_stages


FOUR_STAGES = {"depths": [1, 1, 2, 1]}
CONVNEXT = {**FOUR_STAGES, "hidden_sizes": [8, 16, 24, 32]}
SWIN = {**FOUR_STAGES, "embed_dim": 8, "num_heads": [1, 1, 2, 2]}
VIT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
# timm architecture -> names of its stages
TIMM = {
    "test_resnet": ["layer1", "layer2", "layer3", "layer4"],
    "test_efficientnet": ["blocks.1", "blocks.2", "blocks.3", "blocks.4"],
    "test_convnext": ["stages_0", "stages_1", "stages_2", "stages_3"],
    "test_byobnet": ["stages_0", "stages_1", "stages_2", "final_conv"],
    "test_vit": [],  # a timm transformer has one stride, and its features come from hooks
    "resnet50": ["layer1", "layer2", "layer3", "layer4"],
    "regnetx_002": ["s1", "s2", "s3", "s4"],
    "mobilenetv3_small_050": ["blocks.0", "blocks.1", "blocks.3", "blocks.5"],
    "densenet121": ["features_denseblock1", "features_denseblock2", "features_denseblock3", "features_norm5"],
    "vgg11_bn": ["features_13", "features_20", "features_27", "features_28"],  # pooling layers without parameters
    "darknet53": ["stages_1", "stages_2", "stages_3", "stages_4"],
    "pvt_v2_b0": ["stages_0", "stages_1", "stages_2", "stages_3"],
}
# transformers model_type -> (settings, name of the list of stages, number of stages)
TRANSFORMERS = {
    "resnet": ({**FOUR_STAGES, "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32]}, "encoder.stages", 4),
    "rt_detr_resnet": ({**FOUR_STAGES, "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32]}, "encoder.stages", 4),
    "hgnet_v2": ({}, "encoder.stages", 4),
    "convnext": (CONVNEXT, "encoder.stages", 4),
    "convnextv2": (CONVNEXT, "encoder.stages", 4),
    "dinov3_convnext": (CONVNEXT, "model.stages", 4),
    "focalnet": ({**FOUR_STAGES, "embed_dim": 8, "hidden_sizes": [8, 16, 24, 32]}, "focalnet.encoder.stages", 4),
    "swin": (SWIN, "swin.encoder.layers", 4),
    "swinv2": (SWIN, "encoder.layers", 4),
    "maskformer-swin": (SWIN, "model.encoder.layers", 4),
    "dinov2": (VIT, "encoder.layer", 3),
    "dinov3_vit": (VIT, "model.layer", 3),
    "vitdet": (VIT, "encoder.layer", 3),
}


def build(backbone_config: dict) -> torch.nn.Module:
    config = RefTRConfig(backbone_config=backbone_config, text_config={"model_type": "bert"})
    with torch.device("meta"):
        return load_backbone(config)


@pytest.fixture(params=[*TIMM, *TRANSFORMERS])
def backbone_and_stages(request):
    if request.param in TIMM:
        return build({"backbone": request.param}), [f"_backbone.{name}" for name in TIMM[request.param]]
    settings, name, count = TRANSFORMERS[request.param]
    return build({"model_type": request.param, **settings}), [f"{name}.{index}" for index in range(count)]


def test_find_stages_lists_stages_of_backbone(backbone_and_stages):
    backbone, stages = backbone_and_stages
    assert find_stages(backbone) == stages


def test_freeze_stages_freezes_stem_and_first_stages_only(backbone_and_stages):
    backbone, stages = backbone_and_stages
    names = [name for name, _ in backbone.named_parameters()]
    num_frozen = 0
    freeze_stages(backbone, 0)
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    for number, stage in enumerate(stages, start=1):
        freeze_stages(backbone, number)
        frozen = [name for name, parameter in backbone.named_parameters() if not parameter.requires_grad]
        inside = [name for name in names if name.startswith(f"{stage}.")]
        later = [name for name in names for other in stages[number:] if name.startswith(f"{other}.")]
        assert frozen == names[: len(frozen)]
        assert set(inside) <= set(frozen)
        assert not set(later) & set(frozen)
        assert len(frozen) > num_frozen or not inside
        num_frozen = len(frozen)
    with pytest.raises(ValueError, match=f"num_frozen_backbone_stages={len(stages) + 1}, but {len(stages)} stages"):
        freeze_stages(backbone, len(stages) + 1)


def test_freeze_stages_with_no_stages_found_names_backbone():
    with pytest.raises(
        ValueError, match="num_frozen_backbone_stages=1, but 0 stages were found in the backbone TimmB"
    ):
        freeze_stages(build({"backbone": "test_vit"}), 1)
