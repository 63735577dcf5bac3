"""Sizes of images and texts that a processor brings and settings change. Nothing here is a collective."""

import logging

from transformers.image_utils import SizeDict

from modeling_reftr import RefTRConfig, RefTRImageProcessor, RefTRProcessor
from training_reftr.settings import DataSettings


logger = logging.getLogger(__name__)


def set_sizes(processor: RefTRProcessor, data: DataSettings, config: RefTRConfig) -> None:
    """
    Set the size and padding of images and the longest text in tokens, with phrases and without, where `data` names
    them; None leaves what the processor brings.

    Raises:
        ValueError: if texts would have more tokens than the model has positions.
    """
    image_processor, max_text_length = processor.image_processor, data.max_text_length
    if data.image_size is not None:
        if image_size_of(image_processor) != data.image_size:
            logger.info(f"image_size={data.image_size} in place of the processor's {describe_size(image_processor)}.")
        image_processor.size = SizeDict(shortest_edge=data.image_size, longest_edge=data.image_size)
    if data.size_divisor is not None:
        image_processor.size_divisor = data.size_divisor
    if max_text_length is None:
        return
    if max_text_length > config.max_text_positions:
        raise ValueError(
            f"max_text_length={max_text_length} is more than model.max_text_positions={config.max_text_positions}: "
            "longer sentences would have no position."
        )
    processor.max_expression_length = processor.max_caption_length = max_text_length


def image_size_of(image_processor: RefTRImageProcessor) -> int | None:
    """Return the `image_size` that an image processor resizes to; None where it is not one number."""
    size = image_processor.size
    return size["longest_edge"] if size["longest_edge"] == size["shortest_edge"] else None


def describe_size(image_processor: RefTRImageProcessor) -> str:
    """Return a description of an image processor's size."""
    return str({name: value for name, value in dict(image_processor.size).items() if value is not None})


def max_text_length_of(processor: RefTRProcessor) -> int | None:
    """Return the `max_text_length` of a processor; None where captions and expressions differ."""
    same = processor.max_expression_length == processor.max_caption_length
    return processor.max_expression_length if same else None
