"""
Run transformers' own model and configuration tests on RefTR, by `make test-peer`.

The suite skips tests that do not apply, and gives the reasons in its report:

- absent hardware or libraries: one or several accelerators, Flash Attention, MPS, DeepSpeed, the kernels library;
- features that RefTR does not have: a language modelling head, `inputs_embeds` (the text has its own backbone),
sliding
  windows, rotary positions (`base_model_class`), experts, tensor parallelism, modules kept in float32, weights that
  are renamed during loading, resizable positions;
- "does not support SDPA" and "does not have both a non-text modality tower and a language sub-model": of the three
  tests of SDPA dispatch, one is for models without sub-configurations and one for generators; the third one is run;
- hidden states by layer: RefTR returns them separately for encoder and decoder, the test expects one `hidden_states`.
"""

import copy
import unittest
import unittest.mock

import torch
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor, random_attention_mask

from modeling_reftr import RefTRConfig, RefTRForVisualGrounding, RefTRModel


class RefTRModelTester:
    """Build a tiny model, and inputs of two images, each with one sentence of two phrases."""

    def __init__(self, parent):
        self.parent = parent
        self.predict_masks = False
        self.batch_size = 2
        self.image_size = 64
        self.seq_length = 7
        self.num_phrases = 2
        self.num_image_tokens = (self.image_size // 8) ** 2
        self.vocab_size = 99
        self.is_training = True
        # timm returns the requested feature maps; convolutions do not return attentions
        self.num_backbone_hidden_states = 4
        self.num_backbone_attentions = 0
        # sizes that the suite reads to check shapes
        self.hidden_size = 32
        self.num_hidden_layers = 2
        self.num_attention_heads = 4
        self.encoder_seq_length = self.seq_length + self.num_image_tokens
        self.decoder_seq_length = self.num_phrases

    def get_backbone_config(self):
        # the suite reads the width of the last feature map from `hidden_size`
        return {
            "backbone": "test_efficientnet_gn",
            "out_indices": [1, 2, 3, 4],
            "output_stride": 8,
            "hidden_size": 64,
        }

    def get_config(self):
        return RefTRConfig(
            backbone_config=self.get_backbone_config(),
            text_config={
                "model_type": "bert",
                "vocab_size": self.vocab_size,
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 37,
                "max_position_embeddings": 64,
            },
            max_text_positions=64,
            d_model=self.hidden_size,
            projection_group_norm_groups=8,
            encoder_layers=self.num_hidden_layers,
            decoder_layers=self.num_hidden_layers,
            encoder_attention_heads=self.num_attention_heads,
            decoder_attention_heads=self.num_attention_heads,
            encoder_ffn_dim=37,
            decoder_ffn_dim=37,
            # the model is not pretrained, and the suite requires a gradient of every parameter
            freeze_backbone_batch_norm=False,
            num_frozen_backbone_stages=0,
            # the suite expects different boxes for different inputs, which a new head does not predict
            box_head_init_std=0.5,
            predict_masks=self.predict_masks,
        )

    def prepare_config_and_inputs_for_common(self):
        phrases = (self.batch_size, self.num_phrases)
        inputs = {
            "pixel_values": floats_tensor([self.batch_size, 3, self.image_size, self.image_size]),
            "pixel_mask": torch.ones(self.batch_size, self.image_size, self.image_size, dtype=torch.long),
            "input_ids": ids_tensor([self.batch_size, self.seq_length], self.vocab_size),
            "attention_mask": random_attention_mask([self.batch_size, self.seq_length]).flip(1),
            "phrase_input_ids": ids_tensor([*phrases, 4], self.vocab_size),
            "phrase_attention_mask": torch.ones(*phrases, 4, dtype=torch.long),
            "phrase_spans": torch.tensor([[1, 3], [3, 5]]).expand(*phrases, 2).contiguous(),
            "phrase_index": torch.cartesian_prod(*map(torch.arange, phrases)),
        }
        return self.get_config(), inputs


class RefTRModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (RefTRModel, RefTRForVisualGrounding)
    is_encoder_decoder = True
    _is_composite = True
    test_can_init_all_missing_weights_before_2023 = True
    additional_model_inputs = [
        "pixel_mask",
        "input_ids",
        "attention_mask",
        "phrase_input_ids",
        "phrase_attention_mask",
        "phrase_spans",
    ]

    def setUp(self):
        self.model_tester = RefTRModelTester(self)
        self.config_tester = ConfigTester(self, config_class=RefTRConfig, has_text_modality=False)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = copy.deepcopy(inputs_dict)
        if return_labels and model_class is RefTRForVisualGrounding:
            boxes = torch.tensor([[0.3, 0.4, 0.2, 0.2], [0.6, 0.5, 0.3, 0.1]])
            masks = torch.zeros(len(boxes), self.model_tester.image_size, self.model_tester.image_size)
            masks[:, 8:32, 16:48] = 1
            inputs["labels"] = [{"boxes": boxes, "masks": masks} for _ in range(self.model_tester.batch_size)]
        return inputs

    def only_with_a_loss(self, test):
        """Restrict a test to the class with a loss: the suite expects one of every class that it does not know."""
        with unittest.mock.patch.object(type(self), "all_model_classes", (RefTRForVisualGrounding,)):
            test()

    def test_training(self):
        self.only_with_a_loss(super().test_training)

    def test_training_gradient_checkpointing(self):
        self.only_with_a_loss(super().test_training_gradient_checkpointing)

    def test_training_gradient_checkpointing_use_reentrant_false(self):
        self.only_with_a_loss(super().test_training_gradient_checkpointing_use_reentrant_false)

    def test_training_gradient_checkpointing_use_reentrant_true(self):
        self.only_with_a_loss(super().test_training_gradient_checkpointing_use_reentrant_true)

    def test_model_outputs_equivalence(self):
        """Convert boolean outputs to integers, because the suite subtracts outputs from each other."""

        def with_numbers(model_class):
            def forward(model, *args, **kwargs):
                outputs = model_class.forward(model, *args, **kwargs)
                if isinstance(outputs, tuple):
                    return tuple(
                        value.long() if getattr(value, "dtype", None) == torch.bool else value for value in outputs
                    )
                for name, value in outputs.items():
                    if getattr(value, "dtype", None) == torch.bool:
                        outputs[name] = value.long()
                return outputs

            return type(model_class.__name__, (model_class,), {"forward": forward})

        classes = tuple(with_numbers(model_class) for model_class in self.all_model_classes)
        with unittest.mock.patch.object(type(self), "all_model_classes", classes):
            super().test_model_outputs_equivalence()

    def test_attention_outputs(self):
        """Check the shapes of attentions, as in DETR's tests: the suite expects the outputs of a translation model."""
        tester = self.model_tester
        config, inputs = tester.prepare_config_and_inputs_for_common()
        config._attn_implementation = "eager"
        heads, layers = tester.num_attention_heads, tester.num_hidden_layers
        memory, queries = tester.encoder_seq_length, tester.num_phrases
        expected = {
            "encoder_attentions": (tester.batch_size, heads, memory, memory),
            "decoder_attentions": (tester.batch_size, heads, queries, queries),
            "cross_attentions": (tester.batch_size, heads, queries, memory),
        }
        for model_class in self.all_model_classes:
            by_config = copy.deepcopy(config)
            by_config.output_attentions = True
            for model, options in (
                (model_class._from_config(config, attn_implementation="eager"), {"output_attentions": True}),
                (model_class._from_config(by_config, attn_implementation="eager"), {}),
            ):
                with torch.no_grad():
                    outputs = model.eval()(**inputs, **options)
                for name, shape in expected.items():
                    assert [tuple(weights.shape) for weights in outputs[name]] == [shape] * layers, name

    def _image_features_get_expected_num_attentions(self, model_tester=None):
        return self.model_tester.num_backbone_attentions

    def _image_features_get_expected_num_hidden_states(self, model_tester=None):
        return self.model_tester.num_backbone_hidden_states

    def test_config(self):
        self.config_tester.run_common_tests()


class RefTRWithMasksModelTest(RefTRModelTest):
    """Run the same tests with the mask head."""

    all_model_classes = (RefTRForVisualGrounding,)

    def setUp(self):
        super().setUp()
        self.model_tester.predict_masks = True


class VisionTransformerTester(RefTRModelTester):
    """Build the same model with a vision transformer of the library as the backbone."""

    def __init__(self, parent):
        super().__init__(parent)
        self.num_backbone_hidden_states = 3
        self.num_backbone_attentions = 2

    def get_backbone_config(self):
        return {
            "model_type": "vitdet",
            "image_size": self.image_size,
            "patch_size": 8,
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "out_indices": [2],
        }


class RefTRWithVisionTransformerTest(RefTRModelTest):
    """Run the same tests with a vision transformer as the backbone."""

    def setUp(self):
        super().setUp()
        self.model_tester = VisionTransformerTester(self)
