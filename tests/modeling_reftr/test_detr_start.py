"""Initialization from DETR: backbone and encoder compute what DETR's do in any layout; other weights are kept."""

import logging

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig
from transformers.utils import logging as transformers_logging

from modeling_reftr import RefTRConfig, RefTRForVisualGrounding
from modeling_reftr.detr_reftr import init_from_detr


SIZES = {"d_model": 32, "encoder_layers": 2, "encoder_ffn_dim": 48, "encoder_attention_heads": 4}
SMALL_RESNET = {"embedding_size": 8, "hidden_sizes": [16, 24, 32, 40], "depths": [2, 1, 1, 1]}
TEXT = {"model_type": "bert", "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def randomise(model):
    """Give every weight and statistic a random value, so that an exchange of any two is detected."""
    torch.manual_seed(1)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            low = 0.5 if name.endswith("running_var") else -0.1
            value.copy_(torch.rand_like(value) * 0.2 + low)
    return model.eval()


def make_detr(use_timm_backbone, small=False):
    if use_timm_backbone:
        backbone = {"backbone": "resnet50", "use_timm_backbone": True, "use_pretrained_backbone": False}
    else:
        resnet = ResNetConfig(**SMALL_RESNET if small else {}, out_features=["stage4"])
        backbone = {"backbone_config": resnet, "use_timm_backbone": False, "use_pretrained_backbone": False}
    rest = {"decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 16, "num_queries": 3}
    return randomise(DetrForObjectDetection(DetrConfig(**SIZES, **rest, **backbone)))


def make_model(backbone_config=None, **overrides):
    settings = {
        **SIZES,
        "decoder_layers": 1,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 16,
        "text_config": {**TEXT, "max_position_embeddings": 16},
        "max_text_positions": 16,
        "projection_group_norm_groups": 8,
        "backbone_config": backbone_config,
    }
    return RefTRForVisualGrounding(RefTRConfig(**settings | overrides)).eval()


def original_layout(detr):
    """Return the weights of a transformers DETR under the names of the original release."""
    weights, packed = {}, {}
    for name, value in detr.state_dict().items():
        name = name.replace("model.backbone.model.", "backbone.0.body.")
        name = name.replace("model.encoder.", "transformer.encoder.").replace("model.decoder.", "transformer.decoder.")
        name = name.replace("mlp.fc", "linear").replace("o_proj", "out_proj")
        name = name.replace("self_attn_layer_norm", "norm1").replace("final_layer_norm", "norm2")
        name = name.replace("class_labels_classifier", "class_embed").replace("bbox_predictor", "bbox_embed")
        name = name.replace("model.input_projection", "input_proj")
        part = name.split(".")[-2]
        if part in ("q_proj", "k_proj", "v_proj"):
            packed.setdefault(name.replace(f"{part}.", "in_proj_"), {})[part[0]] = value
        else:
            weights[name] = value
    return weights | {key: torch.cat([parts[part] for part in "qkv"]) for key, parts in packed.items()}


def write(detr, layout, folder):
    """Write DETR in one of the supported layouts; return the source for `init_from_detr`."""
    if layout == "original":
        torch.save({"model": original_layout(detr)}, folder / "detr-r50.pth")
        return folder / "detr-r50.pth"
    if layout == "transformers":  # writes the legacy names
        detr.save_pretrained(folder)
    elif layout == "transformers, current names":
        save_file(detr.state_dict(), folder / "model.safetensors")
    elif layout == "pytorch_model.bin":
        torch.save(detr.state_dict(), folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def detr():
    return make_detr(use_timm_backbone=True)


@pytest.fixture(scope="module")
def original(detr, tmp_path_factory):
    return write(detr, "original", tmp_path_factory.mktemp("original"))


def check_start(model, detr, source):
    """Check that backbone and encoder compute what DETR's do and that every other weight is unchanged."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start = init_from_detr(model, source)
    pixel_values = torch.randn(1, 3, 64, 96)
    features = model.model.backbone(pixel_values).feature_maps[-1]
    expected, _ = detr.model.backbone(pixel_values, torch.ones(1, 64, 96, dtype=torch.bool))[-1]
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    encoder = detr.model.encoder.state_dict()
    for name, value in model.model.encoder.state_dict().items():
        assert torch.equal(value, encoder[name]), name
    for name, value in model.state_dict().items():
        if not name.startswith(("model.backbone.", "model.encoder.")):
            assert torch.equal(value, before[name]), name
    return start


@pytest.mark.parametrize("freeze_backbone_batch_norm", [True, False])
@pytest.mark.parametrize(
    ("use_timm_backbone", "layout"),
    [
        (True, "original"),
        (True, "transformers"),
        (True, "transformers, current names"),
        (False, "transformers"),
        (False, "pytorch_model.bin"),
    ],
)
def test_init_from_detr_reads_every_layout(use_timm_backbone, layout, freeze_backbone_batch_norm, tmp_path):
    detr = make_detr(use_timm_backbone)
    model = make_model(freeze_backbone_batch_norm=freeze_backbone_batch_norm)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    start = check_start(model, detr, write(detr, layout, tmp_path))
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == frozen
    packed = layout == "original"
    assert len(start.taken) == 5 * 53 + 2 * (12 if packed else 16)
    assert {key.split(".")[0] for key in start.left if "decoder" not in key} <= (
        {"input_proj", "class_embed", "bbox_embed", "model"}
        if packed
        else {"model", "class_labels_classifier", "bbox_predictor"}
    )
    assert any("input_proj" in key for key in start.left)
    assert not any("backbone" in key or "encoder.layers" in key for key in start.left)


@pytest.mark.parametrize("freeze_backbone_batch_norm", [True, False])
def test_init_from_detr_fills_transformers_resnet(freeze_backbone_batch_norm, tmp_path):
    detr = make_detr(use_timm_backbone=False, small=True)
    backbone_config = {"model_type": "resnet", **SMALL_RESNET, "out_indices": [1, 2, 3, 4]}
    model = make_model(backbone_config, freeze_backbone_batch_norm=freeze_backbone_batch_norm)
    check_start(model, detr, write(detr, "transformers", tmp_path))


def test_init_from_detr_fills_base_model(detr, original):
    model = make_model().model
    init_from_detr(model, original)
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, detr.model.encoder.state_dict()[name])


def test_init_from_detr_logs_loaded_weights(original, caplog):
    transformers_logging.enable_propagation()
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_info()
    with caplog.at_level(logging.INFO):
        start = init_from_detr(make_model(), original)
    transformers_logging.set_verbosity(level)
    transformers_logging.disable_propagation()
    assert (
        f"Taken from {original}: {len(start.taken)} weights of backbone and encoder. Left: bbox_embed" in caplog.text
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"d_model": 64}, r"encoder\..* has the shape \(32, 32\) in the checkpoint, but the model takes \(64, 64\)"),
        ({"encoder_ffn_dim": 40}, r"linear1\.weight has the shape \(48, 32\) .* takes \(40, 32\)"),
        ({"encoder_layers": 1}, r"Keys that it lacks: \['transformer\.encoder\.layers\.1\."),
        ({"encoder_layers": 3}, r"does not have: \['encoder\.layers\.2\."),
        ({"backbone_config": {"backbone": "resnet101"}}, r"does not have: \['backbone\._backbone\.layer3\.10\."),
        (
            {"backbone_config": {"backbone": "test_efficientnet_gn"}, "freeze_backbone_batch_norm": False},
            "is 'test_efficientnet_gn', but DETR's is a ResNet",
        ),
    ],
)
def test_init_from_detr_with_mismatch_leaves_model_unchanged(overrides, message, original):
    model = make_model(**{"num_frozen_backbone_stages": 0, **overrides})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        init_from_detr(model, original)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_init_from_detr_rejects_other_checkpoints(tmp_path):
    model = make_model()
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    with pytest.raises(ValueError, match="is not a DETR: no key is of an image backbone, the first key is 'weight'"):
        init_from_detr(model, tmp_path / "linear.pth")
    torch.save({"backbone.0.body.conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "half.pth")
    with pytest.raises(ValueError, match="no key is of an encoder"):
        init_from_detr(model, tmp_path / "half.pth")
    torch.save({"model": {"backbone.0.body.conv1.weight": print}}, tmp_path / "hostile.pth")
    with pytest.raises(ValueError, match=r"hostile\.pth is refused: it asks for print"):
        init_from_detr(model, tmp_path / "hostile.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=r"has no model\.safetensors"):
        init_from_detr(model, tmp_path / "empty")
    for missing in (tmp_path / "none", "none.pth", "none/detr.pth"):
        with pytest.raises(OSError, match="does not exist"):
            init_from_detr(model, missing)


def test_init_from_detr_downloads_from_hub_id(detr, tmp_path, monkeypatch):
    write(detr, "transformers", tmp_path)
    requested = []

    def fetch(name, file):
        requested.append((name, file))
        if name != "facebook/detr-resnet-50":
            raise OSError("404")
        return tmp_path / file

    monkeypatch.setattr("modeling_reftr.detr_reftr.check_source", lambda *_, **__: None)
    monkeypatch.setattr("modeling_reftr.detr_reftr.hf_hub_download", fetch)
    check_start(make_model(), detr, "facebook/detr-resnet-50")
    with pytest.raises(OSError, match="no folder nobody/nothing here, and the Hub gave no"):
        init_from_detr(make_model(), "nobody/nothing")
    assert requested == [("facebook/detr-resnet-50", "model.safetensors"), ("nobody/nothing", "model.safetensors")]
