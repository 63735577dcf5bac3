"""Settings of a tiny model and dataset, to train and evaluate within seconds."""

import os
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]

TINY_TEXT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
TINY_MODEL = {
    "backbone_config": {"backbone": "test_efficientnet_gn", "out_indices": [1, 2, 3, 4], "output_stride": 8},
    "freeze_backbone_batch_norm": False,
    "num_frozen_backbone_stages": 0,
    "max_text_positions": 64,
    "d_model": 32,
    "projection_group_norm_groups": 8,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}
TINY_SET = {"image_size": 64, "num_train": 48, "num_validation": 9, "num_test": 10}


def trials(count: int, short: int) -> range:
    """Return the trials of a test: all of them for the scorecard, a few in the everyday suite."""
    return range(count if "SCORECARD" in os.environ else short)
