"""Published RefTR weights -> the weights of `RefTRForVisualGrounding`."""

import re

import torch


# published name -> ours; each pattern is matched from the start of the key
RENAMES = [
    (r"img_backbone\.0\.body\.", "model.backbone._backbone."),
    (r"img_backbone\.1\.row_embed\.", "model.image_position_embedding.row_embeddings."),
    (r"img_backbone\.1\.col_embed\.", "model.image_position_embedding.column_embeddings."),
    (r"input_proj\.0\.", "model.image_projection."),
    (r"lang_backbone\.", "model.text_backbone."),
    (r"map_sentence\.", "model.text_projection."),
    (r"map_phrase\.", "model.phrase_projection."),
    (r"vl_transformer\.level_embed$", "model.level_embedding"),
    (r"vl_transformer\.lang_pos_embeddings\.", "model.text_position_embeddings."),
    (r"vl_transformer\.token_type_embeddings\.", "model.token_type_embeddings."),
    (r"vl_transformer\.encoder\.", "model.encoder."),
    (r"vl_transformer\.decoder\.norm\.", "model.decoder.layer_norm."),
    (r"vl_transformer\.decoder\.", "model.decoder."),
    (r"query_encoder\.query_embed\.", "model.query_encoder.query_embedding."),
    (r"query_encoder\.linear1\.", "model.query_encoder.context_query."),
    (r"query_encoder\.linear2\.", "model.query_encoder.context_key."),
    (r"query_encoder\.linear3\.", "model.query_encoder.context_value."),
    (r"query_encoder\.context_out\.0\.", "model.query_encoder.context_projection."),
    (r"query_encoder\.context_out\.1\.", "model.query_encoder.context_layer_norm."),
    (r"query_encoder\.fuse_encoder_query\.", "model.query_encoder.fusion."),
    (r"bbox_embed\.", "box_head."),
    (r"bbox_attention\.q_linear\.", "mask_head.query_projection."),
    (r"bbox_attention\.k_linear\.", "mask_head.key_projection."),
    (r"mask_head\.out_lay\.", "mask_head.output_convolution."),
    *[(rf"mask_head\.lay{number + 1}\.", f"mask_head.convolutions.{number}.") for number in range(5)],
    *[(rf"mask_head\.gn{number + 1}\.", f"mask_head.norms.{number}.") for number in range(5)],
    *[(rf"mask_head\.adapter{number + 1}\.", f"mask_head.adapters.{number}.") for number in range(3)],
]
PROJECTION_LAYERS = {"0": "linear1", "1": "layer_norm1", "4": "linear2", "5": "layer_norm2"}
ENCODER_NORMS = {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"}
DECODER_NORMS = {"norm1": "self_attn_layer_norm", "norm2": "cross_attn_layer_norm", "norm3": "final_layer_norm"}
FEED_FORWARD = {"linear1": "mlp.fc1", "linear2": "mlp.fc2"}

# left in files of 2021 by the text backbone and by a profiler; they hold no weights
IGNORED = re.compile(r"lang_backbone\.embeddings\.position_ids$|(.*\.)?(total_params|total_ops)$")


def rename_key(key: str) -> str:
    """
    Our name of a published key; a key that is not known comes back as it is.

    Example:

    ```python
    >>> from modeling_reftr.convert_reftr_checkpoint import rename_key

    >>> rename_key("vl_transformer.decoder.layers.0.multihead_attn.out_proj.bias")
    'model.decoder.layers.0.cross_attn.o_proj.bias'

    ```"""
    for pattern, replacement in RENAMES:
        if re.match(pattern, key):
            key = re.sub(pattern, replacement, key, count=1)
            break
    layer = re.match(r"(model\.(encoder|decoder)\.layers\.\d+\.)(\w+)\.(.*)", key)
    if layer:
        prefix, stack, module, rest = layer.groups()
        module = (ENCODER_NORMS if stack == "encoder" else DECODER_NORMS).get(module, module)
        module = {**FEED_FORWARD, "multihead_attn": "cross_attn"}.get(module, module)
        return f"{prefix}{module}.{rest.replace('out_proj.', 'o_proj.')}"
    projection = re.match(r"(model\.(?:text_projection|phrase_projection|query_encoder\.fusion)\.)(\d)\.(.*)", key)
    if projection and projection[2] in PROJECTION_LAYERS:
        return f"{projection[1]}{PROJECTION_LAYERS[projection[2]]}.{projection[3]}"
    return key


def convert_state_dict(published: dict[str, torch.Tensor], expected_keys) -> dict[str, torch.Tensor]:
    """
    Rename published weights to ours, splitting each packed `in_proj` into query, key and value.

    Args:
        published (`dict[str, torch.Tensor]`): the published model's state dict.
        expected_keys (iterable of `str`): the keys of our model, `model.state_dict()` will do.

    Returns:
        `dict[str, torch.Tensor]`: weights that `model.load_state_dict` takes with `strict=True`.

    Raises:
        ValueError: if a published key has no place in our model, or a weight of our model has no published key. The
            message lists them.
    """
    converted = {}
    sources = {}
    for key, value in published.items():
        if IGNORED.fullmatch(key):
            continue
        name = rename_key(key)
        packed = re.fullmatch(r"(.*)\.in_proj_(weight|bias)", name)
        if packed:
            names = [f"{packed[1]}.{part}_proj.{packed[2]}" for part in "qkv"]
            parts = value.chunk(3)
        else:
            names, parts = [name], [value]
        for part_name, part in zip(names, parts, strict=True):
            converted[part_name] = part.clone() if packed else part
            sources[part_name] = key
    # batch norm's counter of training steps is not published; a frozen batch norm has none
    expected_keys = {key for key in expected_keys if not key.endswith("num_batches_tracked")}
    unknown = sorted({sources[name] for name in converted if name not in expected_keys})
    missing = sorted(expected_keys - converted.keys())
    if unknown or missing:
        raise ValueError(
            f"These weights do not fit the model. Published keys without a place in it: {unknown or 'none'}. "
            f"Weights of it that are not published: {missing or 'none'}."
        )
    return converted
