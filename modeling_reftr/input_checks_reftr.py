"""Check the shapes of the model's inputs, before any of them is read."""

import torch


def check_required_inputs(
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    pixel_values: torch.Tensor | None,
    pixel_mask: torch.Tensor | None,
    image_features: object | None,
) -> None:
    """
    Check that text and images are given, each in one form.

    Raises:
        ValueError: if one of them is missing, is given twice, or is given in a form that the model does not read.
    """
    if inputs_embeds is not None:  # adapters of other tasks pass None
        raise ValueError("`inputs_embeds` is not supported: give `input_ids` of shape (sentences, tokens).")
    if input_ids is None:
        raise ValueError("`input_ids` of shape (sentences, tokens) is required.")
    if (pixel_values is None) == (image_features is None):
        raise ValueError("Exactly one of `pixel_values` and `image_features` is required: give either of them.")
    if pixel_values is None and pixel_mask is not None:
        raise ValueError(
            "`pixel_mask` belongs to `pixel_values`, but `image_features` were given, which hold their own: leave "
            "`pixel_mask` out."
        )


def check_kind(image_features: object | None, expected: type) -> None:
    """
    Check that image features are what `get_image_features` returns; None is allowed.

    Raises:
        ValueError: if they are of another type.
    """
    if image_features is not None and not isinstance(image_features, expected):
        raise ValueError(
            "`image_features` must be returned by `get_image_features(..., return_dict=True)`, got "
            f"{type(image_features).__name__}."
        )


def check_image_shapes(pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None) -> None:
    """
    Check that images and their mask fit together.

    Raises:
        ValueError: if they do not; the message names the shapes.
    """
    if pixel_values.ndim != 4:
        raise ValueError(
            f"`pixel_values` must have shape (images, channels, height, width), got {tuple(pixel_values.shape)}."
        )
    expected = (pixel_values.shape[0], *pixel_values.shape[-2:])
    if pixel_mask is not None and pixel_mask.shape != expected:
        raise ValueError(
            f"`pixel_mask` must have shape (images, height, width) = {expected} for `pixel_values` of shape "
            f"{tuple(pixel_values.shape)}, got {tuple(pixel_mask.shape)}."
        )


def check_text_shapes(
    max_text_positions: int,
    num_images: int,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    image_index: torch.Tensor | None,
) -> None:
    """
    Check that sentences fit together and to their images.

    Args:
        max_text_positions (`int`): largest number of tokens per sentence.
        num_images (`int`): number of images in the batch.
        input_ids, attention_mask, image_index: see [`RefTRForVisualGrounding.forward`].

    Raises:
        ValueError: if they do not; the message names the shapes.
    """
    if input_ids.ndim != 2 or attention_mask.shape != input_ids.shape:
        raise ValueError(
            "`input_ids` and `attention_mask` must both have shape (sentences, tokens), got "
            f"{tuple(input_ids.shape)} and {tuple(attention_mask.shape)}."
        )
    num_sentences, num_tokens = input_ids.shape
    if num_tokens > max_text_positions:
        raise ValueError(
            f"`input_ids` has {num_tokens} tokens per sentence, more than max_text_positions={max_text_positions}; "
            "truncate the text."
        )
    if image_index is None and num_sentences != num_images:
        raise ValueError(
            f"Got {num_sentences} sentences and {num_images} images: give `image_index`, or one sentence per image."
        )
    if image_index is not None and image_index.shape != (num_sentences,):
        raise ValueError(
            f"`image_index` must have shape (sentences,) = ({num_sentences},), got {tuple(image_index.shape)}."
        )


def check_phrase_shapes(
    max_text_positions: int,
    num_sentences: int,
    phrase_input_ids: torch.Tensor | None,
    phrase_attention_mask: torch.Tensor | None,
    phrase_spans: torch.Tensor | None,
    phrase_index: torch.Tensor | None,
) -> None:
    """
    Check that phrases fit together and to their sentences.

    Args:
        max_text_positions (`int`): largest number of tokens per phrase.
        num_sentences (`int`): number of sentences in the batch.
        phrase_input_ids, phrase_attention_mask, phrase_spans, phrase_index: see [`RefTRForVisualGrounding.forward`].

    Raises:
        ValueError: if they do not; the message names the shapes.
    """
    if (phrase_input_ids is None) != (phrase_spans is None):
        raise ValueError("`phrase_input_ids` and `phrase_spans` belong together: give both or neither.")
    if phrase_index is not None and (phrase_input_ids is None or phrase_index.shape[1:] != (2,)):
        raise ValueError(
            "`phrase_index` must have shape (real phrases, 2), the sentence and the slot of each phrase in "
            f"`phrase_input_ids`, got {tuple(phrase_index.shape)}."
        )
    if phrase_input_ids is None:
        return
    shape = tuple(phrase_input_ids.shape)
    if len(shape) != 3 or shape[0] != num_sentences:
        raise ValueError(
            f"`phrase_input_ids` must have shape (sentences, phrases, tokens) for {num_sentences} sentences, got "
            f"{shape}."
        )
    if shape[2] > max_text_positions:
        raise ValueError(
            f"`phrase_input_ids` has {shape[2]} tokens per phrase, more than max_text_positions={max_text_positions}; "
            "truncate the phrases."
        )
    if phrase_attention_mask is not None and phrase_attention_mask.shape != shape:
        raise ValueError(
            f"`phrase_attention_mask` must have the shape of `phrase_input_ids`, {shape}, got "
            f"{tuple(phrase_attention_mask.shape)}."
        )
    if phrase_spans.shape != (*shape[:2], 2):
        raise ValueError(
            f"`phrase_spans` must have shape (sentences, phrases, 2) for `phrase_input_ids` of shape {shape}, got "
            f"{tuple(phrase_spans.shape)}."
        )
