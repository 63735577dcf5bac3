"""Position of each dropout: the output of a layer in training mode if one of the three drops everything."""

import pytest
import torch
from torch import nn

from modeling_reftr import RefTRConfig
from modeling_reftr.modeling_reftr import RefTRDecoderLayer, RefTREncoderLayer, RefTRProjection


ALL = 0.9999999  # the configuration rejects a probability of 1
SIZES = {"d_model": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 4, "projection_group_norm_groups": 8}
SIZES |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 48}


@pytest.fixture(params=["eager", "sdpa"])
def make(request):
    """Return a builder of modules in training mode with nonzero biases and only the given dropouts."""

    def build(kind, *args, **settings):
        dropouts = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)
        config = RefTRConfig(**SIZES, **{**dropouts, **settings}, attn_implementation=request.param)
        torch.manual_seed(0)
        module = kind(config, *args)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)
        return module.train()

    return build


@pytest.fixture
def states():
    """Return queries, their positions, a memory and its positions."""
    torch.manual_seed(1)
    return [torch.randn(2, length, 32) for length in (5, 5, 7, 7)]


def test_encoder_layer_applies_dropout_after_each_sublayer(make, states):
    layer = make(RefTREncoderLayer, dropout=ALL)
    expected = layer.final_layer_norm(layer.self_attn_layer_norm(states[0]))
    torch.testing.assert_close(layer(*states[:2]), expected)


def test_decoder_layer_applies_dropout_after_each_sublayer(make, states):
    layer = make(RefTRDecoderLayer, dropout=ALL)
    expected = layer.final_layer_norm(layer.cross_attn_layer_norm(layer.self_attn_layer_norm(states[0])))
    torch.testing.assert_close(layer(*states), expected)


def test_projection_applies_dropout_between_linear_layers(make, states):
    projection = make(RefTRProjection, 32, dropout=ALL)
    expected = projection.layer_norm2(projection.linear2.bias).relu().expand(2, 5, 32)
    torch.testing.assert_close(projection(states[0]), expected)


def test_feed_forward_applies_activation_dropout_before_last_layer(make, states):
    for kind in (RefTREncoderLayer, RefTRDecoderLayer):
        layer = make(kind, activation_dropout=ALL)
        torch.testing.assert_close(layer.mlp(states[0]), layer.mlp.fc2.bias.expand(2, 5, 32))


def test_attention_dropout_applies_to_attention_weights(make, states):
    encoder, decoder = (make(kind, attention_dropout=ALL) for kind in (RefTREncoderLayer, RefTRDecoderLayer))
    for attention in (encoder.self_attn, decoder.self_attn, decoder.cross_attn):
        for memory in ((), states[2:]):
            output, _ = attention(*states[:2], *memory)
            torch.testing.assert_close(output, attention.o_proj.bias.expand(2, 5, 32))


def test_layers_in_eval_mode_apply_no_dropout(make, states):
    settings = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.5)
    for kind, inputs in ((RefTREncoderLayer, states[:2]), (RefTRDecoderLayer, states)):
        assert torch.equal(make(kind, **settings).eval()(*inputs), make(kind).eval()(*inputs))


def test_layer_norms_outside_text_encoder_use_configured_epsilon(make_model):
    model = make_model(layer_norm_eps=0.25, predict_masks=True)
    norms = {name: module.eps for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    ours = {name: eps for name, eps in norms.items() if not name.startswith("model.text_backbone.")}
    assert set(ours.values()) == {0.25}
    assert len(ours) == 2 + 2 * 3 + 1 + 3 * 2 + 1  # encoder, decoder with its final norm, projections, query encoder
    assert 0.25 not in {eps for name, eps in norms.items() if name not in ours}
