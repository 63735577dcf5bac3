"""Features of every transformers model: outputs, copies, resized vocabularies, saving and loading of all parts."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoImageProcessor, AutoModelForZeroShotObjectDetection, AutoProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_reftr import RefTRForVisualGrounding, RefTRImageProcessor
from tests.modeling_reftr.test_modeling import assert_same_boxes, model_inputs
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
    """Collate three images with their sentences, one phrase or several."""
    return GroundingCollator(processor)([shapes["test"][index] for index in range(3)])


# image features


def test_image_features_have_library_fields(batch, make_model):
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
        model(image_features=as_tuple, **text_inputs_of(batch))


def text_inputs_of(batch):
    return {name: batch[name] for name in ("input_ids", "attention_mask", "image_index")}


@pytest.mark.parametrize(
    ("backbone", "num_states", "num_attentions"), [(None, 4, 0), (ATTENTION_BACKBONE, 3, 2)], ids=["timm", "vitdet"]
)
@pytest.mark.parametrize("by_config", [False, True])
def test_image_features_include_requested_hidden_states_and_attentions(
    batch, make_model, backbone, num_states, num_attentions, by_config
):
    model = make_model(**({} if backbone is None else {"backbone_config": backbone}))
    model.set_attn_implementation("eager")
    images = {name: batch[name] for name in ("pixel_values", "pixel_mask")}
    expected = model.get_image_features(**images)
    requested = {"output_hidden_states": True, "output_attentions": True}
    if by_config:
        model.config.update(requested)
    features = model.get_image_features(**images, **({} if by_config else requested))
    assert len(features.hidden_states) == num_states
    assert len(features.attentions) == num_attentions
    assert all(weights.ndim == 4 for weights in features.attentions)
    assert all(torch.equal(features[name], expected[name]) for name in ("last_hidden_state", "pooler_output"))
    # the forward does not return these as its own hidden states
    texts = text_inputs_of(batch)
    outputs = model(**images, **texts, return_dict=True)
    assert_same_boxes(outputs, model(image_features=features, **texts))
    assert (outputs.encoder_hidden_states is not None) == by_config


# processors


def test_processor_is_unchanged_by_saving_and_equal_after_loading(processor, tmp_path):
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


# resized vocabularies


def with_new_token(processor, shapes):
    """Return a copy of a processor with one more token, and inputs with that token in text and phrase."""
    processor = copy.deepcopy(processor)
    processor.tokenizer.add_tokens(["zebra"])
    text, phrases = "the zebra left of the star", ["the zebra", "the star"]
    inputs = dict(processor(shapes["test"][0]["image"], text, phrases=phrases))
    assert len(processor.tokenizer) - 1 in inputs["phrase_input_ids"]
    return processor, inputs


@pytest.mark.parametrize(
    "settings", [{}, {"pad_to_multiple_of": 64}, {"mean_resizing": False}], ids=["larger", "padded", "plain"]
)
def test_model_with_resized_vocabulary_reads_new_tokens(processor, shapes, make_model, tmp_path, settings):
    processor, inputs = with_new_token(processor, shapes)
    model = make_model()
    size = model.config.text_config.vocab_size
    old_inputs = dict(processor(shapes["test"][0]["image"], "the red circle and the star", phrases=["the star"]))
    with torch.no_grad():  # a retained graph would have gradients of the old size
        before = model(**old_inputs)
        assert not model(**inputs).phrase_mask.any()  # the token is in the text, which cannot be read
    model.resize_token_embeddings(len(processor.tokenizer), **settings)
    new_size = model.config.text_config.vocab_size
    assert new_size == (-(-(size + 1) // 64) * 64 if "pad_to_multiple_of" in settings else size + 1)
    assert_same_boxes(model(**old_inputs), before)
    outputs = model(**inputs)
    assert outputs.phrase_mask.all()
    with torch.no_grad(), model.cache_text():
        for _ in range(2):
            assert_same_boxes(model(**inputs), outputs)

    labels = [{"boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.2, 0.2]])}]
    model(**inputs, labels=labels).loss.backward()
    assert model.get_input_embeddings().weight.grad[size].any()

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModelForZeroShotObjectDetection.from_pretrained(tmp_path)
    assert loaded.config.text_config.vocab_size == loaded.get_input_embeddings().num_embeddings == new_size
    loaded_inputs = AutoProcessor.from_pretrained(tmp_path)(
        shapes["test"][0]["image"], "the zebra left of the star", phrases=["the zebra", "the star"]
    )
    assert torch.equal(loaded_inputs["phrase_input_ids"], inputs["phrase_input_ids"])
    assert_same_boxes(loaded(**loaded_inputs), outputs)


def test_model_with_smaller_vocabulary_masks_lost_tokens(processor, shapes, make_model, tmp_path):
    model, image = make_model(), shapes["test"][0]["image"]
    kept, lost = sorted(["red", "circle", "star"], key=processor.tokenizer.convert_tokens_to_ids)[::2]
    inputs = processor([image, image], [kept, lost], phrases=[[kept], [lost]])
    with torch.no_grad():
        before = model(**inputs)
    model.resize_token_embeddings(processor.tokenizer.convert_tokens_to_ids(lost))
    outputs = model(**inputs)
    assert outputs.phrase_mask.tolist() == [[True], [False]]
    assert outputs.pred_boxes.isfinite().all()
    assert_same_boxes(outputs, before, outputs.phrase_mask)
    model.save_pretrained(tmp_path)
    assert_same_boxes(RefTRForVisualGrounding.from_pretrained(tmp_path)(**inputs), outputs)


def test_set_input_embeddings_changes_vocabulary_size(processor, shapes, make_model):
    model = make_model()
    _, inputs = with_new_token(processor, shapes)
    embeddings = torch.nn.Embedding(model.config.text_config.vocab_size + 1, 32)
    model.set_input_embeddings(embeddings)
    assert model.get_input_embeddings() is model.model.text_backbone.get_input_embeddings() is embeddings
    assert model.config.text_config.vocab_size == embeddings.num_embeddings
    assert model(**inputs).phrase_mask.all()


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["word_embeddings", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["word_embeddings"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"word_embeddings": [5]}},
        {"target_modules": "all-linear", "task_type": "FEATURE_EXTRACTION"},
    ],
    ids=["lora", "saved", "tokens", "task"],
)
def test_model_with_new_lora_adapters_gives_same_answer(batch, make_model, settings):
    model = make_model()
    inputs = model_inputs(batch)
    expected = model(**inputs)
    tuned = get_peft_model(model, LoraConfig(r=2, **settings)).eval()
    assert_same_boxes(tuned(**inputs), expected)


def test_model_rejects_inputs_embeds(batch, make_model):
    with pytest.raises(ValueError, match="`inputs_embeds` is not supported"):
        make_model()(**text_inputs_of(batch), inputs_embeds=torch.zeros(1, 2, 32))


# outputs


@pytest.mark.parametrize("part", [None, "text_config", "backbone_config"])
def test_model_without_return_dict_gives_same_values_as_tuple(batch, make_model, part):
    model, inputs = make_model(), model_inputs(batch)
    expected = model(**inputs)
    (model.config if part is None else getattr(model.config, part)).return_dict = False
    outputs = model(**inputs)
    assert isinstance(outputs, tuple) == isinstance(model.model(**inputs), tuple) == (part is None)
    assert torch.equal(outputs[0], expected.pred_boxes)
    assert torch.equal(model(**inputs, return_dict=True).pred_boxes, expected.pred_boxes)
    features = model.get_image_features(batch["pixel_values"], return_dict=True)
    texts = text_inputs_of(batch)
    boxes = model(image_features=features, **texts, return_dict=True).pred_boxes
    assert torch.equal(model(image_features=features, **texts, return_dict=False)[0], boxes)


def test_model_returns_hidden_states_of_requested_layers(batch, make_model):
    """Negative indices count from the end, also if encoder and decoder have different numbers of layers."""
    model, inputs = make_model(encoder_layers=3), model_inputs(batch)
    every = model(**inputs, output_hidden_states=True)
    some = model(**inputs, output_hidden_states=[0, -1])
    for name, num_layers in {"encoder_hidden_states": 3, "decoder_hidden_states": 2}.items():
        assert len(every[name]) == len(some[name]) == num_layers + 1
        for index, (states, expected) in enumerate(zip(some[name], every[name], strict=True)):
            if index in (0, num_layers):
                assert torch.equal(states, expected), name
            else:
                assert states is None, name
    assert torch.equal(every.encoder_hidden_states[-1], every.encoder_last_hidden_state)


def test_model_switches_attention_and_rejects_unsupported_one(batch, make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    inputs = model_inputs(batch)
    model = RefTRForVisualGrounding.from_pretrained(tmp_path, attn_implementation="eager")
    parts = (model.config, model.model.encoder.config, model.model.text_backbone.config)
    assert {part._attn_implementation for part in parts} == {"eager"}
    weights = model(**inputs, output_attentions=True).cross_attentions
    assert len(weights) == 2
    expected = model(**inputs)
    model.set_attn_implementation("sdpa")
    assert {part._attn_implementation for part in parts} == {"sdpa"}
    assert_same_boxes(model(**inputs), expected)
    for name in ("flash_attention_2", "nonsense"):
        with pytest.raises(ValueError, match="support"):
            model.set_attn_implementation(name)
        with pytest.raises(ValueError, match="support"):
            RefTRForVisualGrounding.from_pretrained(tmp_path, attn_implementation=name)
    assert_same_boxes(model(**inputs), expected)


# copies


def test_model_processor_and_outputs_survive_copy_and_pickle(batch, make_model, processor, shapes):
    model, inputs = make_model(), model_inputs(batch)
    with torch.no_grad():
        outputs = model(**inputs)
        features = model.get_image_features(batch["pixel_values"])
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(**inputs).pred_boxes, outputs.pred_boxes)
            assert twin.config.to_dict() == model.config.to_dict()
        for value in (outputs, features, model.model(**inputs)):
            for twin in (copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
                assert type(twin) is type(value)
                assert twin.keys() == value.keys()
        twin = pickle.loads(pickle.dumps(features))
        texts = text_inputs_of(batch)
        assert torch.equal(
            model(image_features=twin, **texts).pred_boxes, model(image_features=features, **texts).pred_boxes
        )
    image = shapes["test"][0]["image"]
    expected = processor(image, "the red circle")
    for twin in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert twin.to_dict() == processor.to_dict()
        found = twin(image, "the red circle")
        assert all(torch.equal(found[name], value) for name, value in expected.items())
