"""Each dropout of the model: what is left of a layer in training where one of the three drops everything."""

import pytest
import torch
from torch import nn

from modeling_reftr import RefTRConfig
from modeling_reftr.modeling_reftr import RefTRDecoderLayer, RefTREncoderLayer, RefTRProjection


ALL = 0.9999999  # a probability of 1 is refused
SIZES = {"d_model": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 4, "projection_group_norm_groups": 8}
SIZES |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 48}


@pytest.fixture(params=["eager", "sdpa"])
def make(request):
    """Builds a module in training mode, with biases that are not zero; of the three dropouts only those given."""

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
    """Queries, their positions, a memory and its positions."""
    torch.manual_seed(1)
    return [torch.randn(2, length, 32) for length in (5, 5, 7, 7)]


def test_dropout_of_an_encoder_layer_is_behind_attention_and_feed_forward(make, states):
    layer = make(RefTREncoderLayer, dropout=ALL)
    expected = layer.final_layer_norm(layer.self_attn_layer_norm(states[0]))
    torch.testing.assert_close(layer(*states[:2]), expected)


def test_dropout_of_a_decoder_layer_is_behind_both_attentions_and_feed_forward(make, states):
    layer = make(RefTRDecoderLayer, dropout=ALL)
    expected = layer.final_layer_norm(layer.cross_attn_layer_norm(layer.self_attn_layer_norm(states[0])))
    torch.testing.assert_close(layer(*states), expected)


def test_dropout_of_a_projection_is_between_its_layers(make, states):
    projection = make(RefTRProjection, 32, dropout=ALL)
    expected = projection.layer_norm2(projection.linear2.bias).relu().expand(2, 5, 32)
    torch.testing.assert_close(projection(states[0]), expected)


def test_activation_dropout_is_inside_the_feed_forward_blocks(make, states):
    for kind in (RefTREncoderLayer, RefTRDecoderLayer):
        layer = make(kind, activation_dropout=ALL)
        torch.testing.assert_close(layer.mlp(states[0]), layer.mlp.fc2.bias.expand(2, 5, 32))


def test_attention_dropout_is_that_of_the_weights(make, states):
    encoder, decoder = (make(kind, attention_dropout=ALL) for kind in (RefTREncoderLayer, RefTRDecoderLayer))
    for attention in (encoder.self_attn, decoder.self_attn, decoder.cross_attn):
        for memory in ((), states[2:]):
            output, _ = attention(*states[:2], *memory)
            torch.testing.assert_close(output, attention.o_proj.bias.expand(2, 5, 32))


def test_nothing_is_dropped_in_evaluation(make, states):
    settings = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.5)
    for kind, given in ((RefTREncoderLayer, states[:2]), (RefTRDecoderLayer, states)):
        assert torch.equal(make(kind, **settings).eval()(*given), make(kind).eval()(*given))


def test_every_layer_norm_but_the_text_encoders_has_the_epsilon_that_is_asked_for(make_model):
    model = make_model(layer_norm_eps=0.25, predict_masks=True)
    norms = {name: module.eps for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    ours = {name: eps for name, eps in norms.items() if not name.startswith("model.text_backbone.")}
    assert set(ours.values()) == {0.25}
    assert len(ours) == 2 + 2 * 3 + 1 + 3 * 2 + 1  # encoder, decoder and its own, projections, query encoder
    assert 0.25 not in {eps for name, eps in norms.items() if name not in ours}
