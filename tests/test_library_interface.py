"""What any model of transformers can do: outputs, copies, resized vocabularies, saving and loading of all parts."""

import pytest
import torch
from test_modeling import assert_same_boxes
from transformers import AutoImageProcessor, AutoProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_reftr import RefTRImageProcessor
from training_reftr.data import GroundingCollator


ATTENTION_BACKBONE = {
    "model_type": "vitdet",
    "image_size": 64,
    "patch_size": 8,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "out_indices": [2],
}


@pytest.fixture
def batch(shapes, processor):
    """Three images with their sentences, one phrase or several."""
    return GroundingCollator(processor)([shapes["test"][index] for index in range(3)])


# image features


def test_image_features_have_the_library_s_fields(batch, make_model):
    model = make_model()
    features = model.get_image_features(batch["pixel_values"], batch["pixel_mask"])
    assert isinstance(features, BaseModelOutputWithPooling)
    assert features.hidden_states is None
    assert features.attentions is None
    last_map = features.feature_maps[-1]
    num_images, channels, height, width = last_map.shape
    assert features.last_hidden_state.shape == (num_images, height * width, channels)
    assert torch.equal(features.last_hidden_state[0, width + 2], last_map[0, :, 1, 2])
    projected = model.model.image_projection(last_map)
    assert torch.equal(features.pooler_output, projected.flatten(2).transpose(1, 2))
    as_tuple = model.get_image_features(batch["pixel_values"], batch["pixel_mask"], return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], features.last_hidden_state)
    with pytest.raises(ValueError, match=r"return_dict=True.*got tuple"):
        model(image_features=as_tuple, **single_inputs_of(batch))


def single_inputs_of(batch):
    return {name: batch[name] for name in ("input_ids", "attention_mask", "image_index")}


@pytest.mark.parametrize(
    ("backbone", "num_states", "num_attentions"), [(None, 4, 0), (ATTENTION_BACKBONE, 3, 2)], ids=["timm", "vitdet"]
)
@pytest.mark.parametrize("by_config", [False, True])
def test_image_features_give_hidden_states_and_attentions(
    batch, make_model, backbone, num_states, num_attentions, by_config
):
    model = make_model(**({} if backbone is None else {"backbone_config": backbone}))
    model.set_attn_implementation("eager")
    images = {name: batch[name] for name in ("pixel_values", "pixel_mask")}
    expected = model.get_image_features(**images)
    asked = {"output_hidden_states": True, "output_attentions": True}
    if by_config:
        model.config.update(asked)
    features = model.get_image_features(**images, **({} if by_config else asked))
    assert len(features.hidden_states) == num_states
    assert len(features.attentions) == num_attentions
    assert all(weights.ndim == 4 for weights in features.attentions)
    assert all(torch.equal(features[name], expected[name]) for name in ("last_hidden_state", "pooler_output"))
    # the forward, whose own hidden states these are not
    texts = single_inputs_of(batch)
    outputs = model(**images, **texts, return_dict=True)
    assert_same_boxes(outputs, model(image_features=features, **texts))
    assert (outputs.encoder_hidden_states is not None) == by_config


# processors


def test_saving_a_processor_changes_nothing_and_loading_gives_its_equal(processor, tmp_path):
    before = processor.to_dict()
    processor.save_pretrained(tmp_path)
    assert processor.to_dict() == before
    for loaded in (type(processor).from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is type(processor)
        assert loaded.to_dict() == before
        assert loaded.to_json_string() == processor.to_json_string()
        assert repr(loaded.image_processor) == repr(processor.image_processor)
    alone = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(alone) is RefTRImageProcessor
    assert alone.to_dict() == processor.image_processor.to_dict()
    alone.save_pretrained(tmp_path / "alone")
    assert RefTRImageProcessor.from_pretrained(tmp_path / "alone").to_dict() == alone.to_dict()
