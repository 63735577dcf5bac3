"""RefTRConfig: published defaults, and errors that name invalid values."""

import re

import pytest

from modeling_reftr import RefTRConfig


def test_config_defaults_match_published_model():
    config = RefTRConfig()
    assert config.backbone_config.model_type == "timm_backbone"
    assert config.backbone_config.backbone == "resnet50"
    assert config.backbone_config.out_indices == [1, 2, 3, 4]
    assert (config.text_config.model_type, config.text_config.hidden_size) == ("bert", 768)
    assert (config.d_model, config.encoder_layers, config.decoder_layers) == (256, 6, 6)
    assert (config.encoder_attention_heads, config.encoder_ffn_dim) == (8, 2048)
    assert (config.decoder_attention_heads, config.decoder_ffn_dim, config.activation_function) == (8, 2048, "relu")
    assert (config.dropout, config.attention_dropout, config.activation_dropout) == (0.1, 0.1, 0.1)
    assert (config.layer_norm_eps, config.projection_group_norm_groups, config.mask_head_group_norm_groups) == (
        1e-5,
        32,
        8,
    )
    assert (config.position_embedding_type, config.position_embedding_temperature) == ("sine", 10000)
    assert (config.max_image_positions, config.max_text_positions) == (50, 128)
    assert (config.bbox_loss_coefficient, config.giou_loss_coefficient) == (1.0, 1.0)
    assert (config.mask_loss_coefficient, config.dice_loss_coefficient) == (1.0, 1.0)
    assert (config.auxiliary_loss, config.mask_loss_over_padding, config.freeze_grounding) == (True, True, False)
    assert (config.init_xavier_std, config.box_head_init_std) == (1.0, 0.0)
    assert config.freeze_backbone_batch_norm is True
    assert config.num_frozen_backbone_stages == 1
    assert config.predict_masks is False


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"box_head_init_std": -1.0}, "box_head_init_std=-1.0"),
        ({"d_model": 30}, "d_model=30 is not a multiple of encoder_attention_heads=8"),
        ({"d_model": 96, "projection_group_norm_groups": 5}, "projection_group_norm_groups=5"),
        (
            {
                "d_model": 6,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
                "projection_group_norm_groups": 2,
            },
            "d_model=6 is not a multiple of 4",
        ),
        ({"d_model": 0}, "d_model=0 must be at least 1"),
        ({"decoder_layers": 0}, "decoder_layers=0 must be at least 1"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and less than 1"),
        ({"attention_dropout": -0.1}, "attention_dropout=-0.1 must be at least 0 and less than 1"),
        ({"activation_dropout": 2}, "activation_dropout=2 must be at least 0 and less than 1"),
        ({"giou_loss_coefficient": float("nan")}, "giou_loss_coefficient=nan"),
        ({"num_frozen_backbone_stages": -1}, "num_frozen_backbone_stages=-1"),
        ({"position_embedding_type": "cosine"}, "position_embedding_type='cosine' must be 'sine' or 'learned'"),
        ({"activation_function": "rellu"}, "activation_function='rellu' is not one of"),
        ({"max_text_positions": 1000}, "max_text_positions=1000 is more than"),
        ({"d_model": "256"}, "expected int, got str"),
        ({"backbone": "resnet50"}, "give backbone_config"),
        ({"backbone_config": {"backbone": "hf-hub:someone/model"}}, "names a location to load from"),
        ({"backbone_config": {"backbone": "local-dir:/tmp"}}, "names a location to load from"),
        ({"text_config": {"model_type": "no-such-model"}}, "no-such-model"),
    ],
)
def test_config_rejects_invalid_values(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RefTRConfig(**settings)


def test_config_round_trips_through_save_pretrained(tmp_path):
    config = RefTRConfig(d_model=64, backbone_config={"backbone": "resnet18", "output_stride": 16})
    config.save_pretrained(tmp_path)
    assert RefTRConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
