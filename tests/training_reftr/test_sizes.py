"""Sizes of images and texts: given settings are applied, others keep the value of the processor."""

import pytest

from modeling_reftr import RefTRConfig
from training_reftr.build import image_size_of, max_text_length_of, set_sizes
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


def test_set_sizes_refuses_text_length_above_model_limit(processor):
    with pytest.raises(ValueError, match=r"max_text_length=61 is more than model\.max_text_positions=60"):
        set_sizes(processor, DataSettings(max_text_length=61), RefTRConfig(max_text_positions=60))
