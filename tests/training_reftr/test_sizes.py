"""Sizes of images and texts: given settings are applied, others keep the value of the processor."""

import numpy as np
import pytest
from transformers.image_utils import SizeDict

from modeling_reftr import RefTRConfig
from training_reftr.build import image_size_of, keeps_aspect_ratio, max_text_length_of, set_sizes
from training_reftr.settings import DataSettings


def test_set_sizes_changes_only_given_sizes(processor):
    config = RefTRConfig(max_text_positions=60)
    image_processor = processor.image_processor
    set_sizes(processor, DataSettings(), config)
    assert (image_size_of(image_processor), image_processor.size_divisor, max_text_length_of(processor)) == (
        64,
        None,
        None,
    )
    set_sizes(processor, DataSettings(image_size=48, size_divisor=32, max_text_length=60), config)
    assert dict(image_processor.size) == {**dict(image_processor.size), "shortest_edge": 48, "longest_edge": 48}
    assert image_processor.size_divisor == 32
    assert (processor.max_expression_length, processor.max_caption_length) == (60, 60)
    assert (image_size_of(image_processor), max_text_length_of(processor)) == (48, 60)


def test_set_sizes_without_aspect_ratio_resizes_to_squares(processor):
    config, image_processor = RefTRConfig(max_text_positions=60), processor.image_processor
    set_sizes(processor, DataSettings(keep_aspect_ratio=False), config)
    assert not keeps_aspect_ratio(image_processor)
    assert image_size_of(image_processor) == 64
    images = [np.zeros((20, 60, 3), dtype=np.uint8), np.zeros((60, 20, 3), dtype=np.uint8)]
    inputs = image_processor(images, return_tensors="pt")
    assert inputs["pixel_values"].shape == (2, 3, 64, 64)
    assert inputs["pixel_mask"].all()
    set_sizes(processor, DataSettings(image_size=48), config)
    assert (image_processor.size.height, image_processor.size.width) == (48, 48)
    set_sizes(processor, DataSettings(keep_aspect_ratio=True), config)
    assert (image_processor.size.shortest_edge, image_processor.size.longest_edge) == (48, 48)


def test_set_sizes_refuses_squares_of_unknown_size(processor):
    processor.image_processor.size = SizeDict(shortest_edge=48, longest_edge=96)
    with pytest.raises(ValueError, match=r"keep_aspect_ratio=False requires image_size.*'longest_edge': 96"):
        set_sizes(processor, DataSettings(keep_aspect_ratio=False), RefTRConfig(max_text_positions=60))


def test_set_sizes_refuses_text_length_above_model_limit(processor):
    with pytest.raises(ValueError, match=r"max_text_length=61 is more than model\.max_text_positions=60"):
        set_sizes(processor, DataSettings(max_text_length=61), RefTRConfig(max_text_positions=60))
