"""The converter's core: every published key is used, or ignored by name, or refused."""

import json

import pytest
import torch

from golden import GOLDEN, golden_config, golden_model, load_case, published_state_dict
from modeling_reftr import RefTRForVisualGrounding
from modeling_reftr.convert_reftr_checkpoint import convert_state_dict


@pytest.fixture(scope="module")
def case():
    return load_case("rec_bert")[0]


@pytest.fixture(scope="module")
def expected(case):
    with torch.device("meta"):
        return RefTRForVisualGrounding(golden_config(case)).state_dict()


def test_packed_attention_is_split(case, expected):
    published = published_state_dict(case)
    converted = convert_state_dict(published, expected)
    packed = published["vl_transformer.encoder.layers.0.self_attn.in_proj_weight"]
    parts = [converted[f"model.encoder.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(torch.cat(parts), packed)


def test_leftovers_of_2021_are_ignored(case, expected):
    published = published_state_dict(case)
    leftovers = {
        "lang_backbone.embeddings.position_ids": torch.arange(128)[None],
        "total_params": torch.zeros(1),
        "bbox_embed.layers.0.total_ops": torch.zeros(1),
    }
    assert (
        convert_state_dict({**published, **leftovers}, expected).keys()
        == convert_state_dict(published, expected).keys()
    )


def test_unknown_and_missing_keys_are_listed(case, expected):
    published = published_state_dict(case)
    del published["bbox_embed.layers.2.bias"]
    published["bbox_attention.q_linear.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="do not fit") as error:
        convert_state_dict(published, expected)
    assert "bbox_attention.q_linear.weight" in str(error.value)
    assert "box_head.layers.2.bias" in str(error.value)


def test_unfrozen_batch_norm_takes_the_same_weights():
    case, _ = load_case("rec_bert")
    model = golden_model(case, freeze_backbone_batch_norm=False)
    frozen = golden_model(case)
    picture = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(
        model.model.encode_images(picture).image_features,
        frozen.model.encode_images(picture).image_features,
        atol=1e-5,
        rtol=1e-5,
    )


def test_golden_files_are_the_cases_compared():
    names = {path.stem for path in GOLDEN.glob("*.json")} - {"preprocess_sizes", "full_size_keys"}
    assert names == {"rec_bert", "rec_roberta", "multiphrase_bert", "res_bert"}
    for name in names:
        assert json.loads((GOLDEN / f"{name}.json").read_text())["name"] == name
