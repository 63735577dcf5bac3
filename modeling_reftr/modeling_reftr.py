# Copyright 2026 The RefTR for transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""PyTorch RefTR model ("Referring Transformer", Li & Sigal, NeurIPS 2021)."""

import math
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import load_backbone
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithCrossAttentions,
    BaseModelOutputWithPooling,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, auto_docstring, requires_backends
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .backbone_reftr import freeze_stages
from .configuration_reftr import RefTRConfig
from .fusing_reftr import fused_copy
from .input_checks_reftr import (
    check_image_shapes,
    check_kind,
    check_phrase_shapes,
    check_required_inputs,
    check_text_shapes,
)
from .loading_reftr import CONFIG_FILES, WEIGHT_FILES, check_index, naming_files
from .locating_reftr import check_source
from .loss_reftr import grounding_loss
from .matching_reftr import assign_targets, pad_targets
from .quoting_reftr import quote
from .saving_reftr import apply_default_permissions
from .text_cache_reftr import TextCache, active_text_cache


if TYPE_CHECKING:
    # `save_pretrained` copies every file that this one imports, and the pipeline has to travel with the model
    from .pipeline_reftr import VisualGroundingPipeline as VisualGroundingPipeline


# Shapes: I images, S sentences, P phrase slots per sentence, K = config.num_queries_per_phrase queries per phrase, L
# tokens per sentence, d = config.d_model, and h x w positions of the backbone's last feature map, each of which is an
# image token. Boxes are relative to the image without padding.

TEXT_TYPE, IMAGE_TYPE = 0, 1  # rows of the token type embeddings


@auto_docstring(custom_intro="Image features that do not depend on the text.")
@dataclass
class RefTRImageFeatures(BaseModelOutputWithPooling):
    r"""
    last_hidden_state (`torch.Tensor` of shape `(I, h * w, channels)`):
        Last feature map of the backbone as a sequence of image tokens.
    pooler_output (`torch.Tensor` of shape `(I, h * w, d)`):
        Image tokens projected to the width of the model, as the encoder reads them.
    hidden_states (`tuple[torch.Tensor]`, *optional*, returned with `output_hidden_states=True`):
        Hidden states of the backbone, or the feature maps if it is a timm backbone.
    attentions (`tuple[torch.Tensor]`, *optional*, returned with `output_attentions=True`):
        Attention weights of the backbone, empty if it is a timm backbone.
    feature_maps (`tuple[torch.Tensor]`):
        Feature maps of the backbone, each of shape (I, channels, height, width).
    image_position_embeddings (`torch.Tensor` of shape `(I, h * w, d)`):
        Position embeddings of the image tokens, without the level and token type embeddings.
    image_mask (`torch.Tensor` of shape `(I, h * w)`):
        True for image tokens, False for padding.
    pixel_mask (`torch.Tensor` of shape `(I, H, W)`):
        1 for pixels of the image, 0 for padding.
    """

    feature_maps: tuple[torch.Tensor, ...] | None = None
    image_position_embeddings: torch.Tensor | None = None
    image_mask: torch.Tensor | None = None
    pixel_mask: torch.Tensor | None = None


@auto_docstring(custom_intro="Output of the query decoder.")
@dataclass
class RefTRDecoderOutput(BaseModelOutputWithCrossAttentions):
    r"""
    intermediate_hidden_states (`torch.Tensor` of shape `(decoder_layers, S, P * K, d)`):
        Output of every decoder layer, each after the shared final layer norm.
    """

    intermediate_hidden_states: torch.Tensor | None = None


@auto_docstring(custom_intro="Output of the model without heads.")
@dataclass
class RefTRModelOutput(ModelOutput):
    r"""
    last_hidden_state (`torch.Tensor` of shape `(S, P * K, d)`):
        Output of the decoder, one vector per query, those of a phrase in a row.
    intermediate_hidden_states (`torch.Tensor` of shape `(decoder_layers, S, P * K, d)`):
        Output of every decoder layer, each after the shared final layer norm.
    phrase_mask (`torch.Tensor` of shape `(S, P)`):
        True for real phrases, False for padding.
    phrase_slots (`torch.Tensor` of shape `(N,)`, *optional*, returned for several phrases per sentence):
        Flat indices `sentence * P + slot` of the phrases that were encoded, or `S * P` where `phrase_index` is
        out of range.
    encoder_last_hidden_state (`torch.Tensor` of shape `(S, L + h * w, d)`):
        Output of the encoder, text tokens first, then image tokens.
    feature_maps (`tuple[torch.Tensor]`):
        Feature maps of the backbone, each of shape (I, channels, height, width).
    image_features (`torch.Tensor` of shape `(I, h * w, d)`):
        Image tokens projected to the width of the model.
    image_mask (`torch.Tensor` of shape `(I, h * w)`):
        True for image tokens, False for padding.
    pixel_mask (`torch.Tensor` of shape `(I, H, W)`):
        1 for pixels of the image, 0 for padding.
    image_index (`torch.Tensor` of shape `(S,)`, *optional*):
        Image of each sentence as given, 0 where it was out of range.
    encoder_position_embeddings (`torch.Tensor` of shape `(S, L + h * w, d)`):
        Positions of the tokens of the encoder.
    encoder_mask (`torch.Tensor` of shape `(S, L + h * w)`):
        True for real tokens of the encoder, False for padding.
    """

    last_hidden_state: torch.Tensor | None = None
    intermediate_hidden_states: torch.Tensor | None = None
    phrase_mask: torch.Tensor | None = None
    phrase_slots: torch.Tensor | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
    feature_maps: tuple[torch.Tensor, ...] | None = None
    image_features: torch.Tensor | None = None
    image_mask: torch.Tensor | None = None
    pixel_mask: torch.Tensor | None = None
    image_index: torch.Tensor | None = None
    encoder_position_embeddings: torch.Tensor | None = None
    encoder_mask: torch.Tensor | None = None
    decoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    decoder_attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
    encoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    encoder_attentions: tuple[torch.Tensor, ...] | None = None

    @property
    def phrase_places(self) -> torch.Tensor | None:
        """Return `phrase_slots` under its deprecated name."""
        warnings.warn("`phrase_places` is deprecated, use `phrase_slots`.", FutureWarning, stacklevel=2)
        return self.phrase_slots


@auto_docstring(custom_intro="Output of the model with its heads.")
@dataclass
class RefTRVisualGroundingOutput(ModelOutput):
    r"""
    loss (`torch.Tensor` of shape `()`, *optional*, returned with `labels`):
        Weighted sum of `loss_dict`.
    loss_dict (`dict[str, torch.Tensor]`, *optional*, returned with `labels`):
        `loss_bbox` and `loss_giou`, and the same with `_0`, `_1`, ... for the earlier decoder layers; with masks
        also `loss_mask` (focal) and `loss_dice`; with `config.predict_presence` also `loss_presence`.
    pred_boxes (`torch.Tensor` of shape `(S, P, 4)`):
        Boxes (center_x, center_y, width, height) of every phrase slot, normalized to the image without padding.
        Boxes of padding slots have no meaning, see `phrase_mask`. Of several queries, that of the highest presence.
    phrase_mask (`torch.Tensor` of shape `(S, P)`):
        True for real phrases, False for padding.
    auxiliary_outputs (`list[dict[str, torch.Tensor]]`, *optional*, returned if `config.auxiliary_loss`):
        `pred_boxes` of each earlier decoder layer, and with several queries `query_boxes`.
    pred_masks (`torch.Tensor` of shape `(S, P, h1, w1)`, *optional*, returned if `config.predict_masks`):
        Mask logits of each phrase over the padded image, in the resolution of the backbone's fourth to last
        feature map (a quarter of the image for a ResNet).
    mask_attentions (`torch.Tensor` of shape `(S, P, heads, h, w)`, *optional*, with `output_attentions=True`):
        Attention maps that the mask head starts from. The values of all heads and positions sum to 1.
    presence_logits (`torch.Tensor` of shape `(S, P, K)`, *optional*, returned if `config.predict_presence`):
        Logits of the probability that the box of a query is an answer to its phrase.
    presence (`torch.Tensor` of shape `(S, P, K)`, *optional*, returned if `config.predict_presence`):
        That probability: the sigmoid of the logits divided by `config.presence_temperature`.
    presence_threshold (`torch.Tensor` of shape `()`, *optional*, returned if `config.predict_presence`):
        `config.presence_threshold`, for the post-processing.
    query_boxes (`torch.Tensor` of shape `(S, P, K, 4)`, *optional*, returned if `config.predict_presence`):
        Boxes of all queries, as `pred_boxes`.
    query_masks (`torch.Tensor` of shape `(S, P, K, h1, w1)`, *optional*, with `config.predict_masks` as well):
        Mask logits of all queries, as `pred_masks`.
    image_index (`torch.Tensor` of shape `(S,)`, *optional*):
        Image of each sentence as given, 0 where it was out of range.
    input_ids (`torch.Tensor` of shape `(S, L)`):
        The input of this name, for the post-processing.
    phrase_input_ids (`torch.Tensor` of shape `(S, P, Lp)`, *optional*):
        The input of this name, for the post-processing.
    pixel_mask (`torch.Tensor` of shape `(I, H, W)`):
        1 for pixels of the image, 0 for padding.
    last_hidden_state (`torch.Tensor` of shape `(S, P * K, d)`):
        Output of the decoder, one vector per query, those of a phrase in a row.
    intermediate_hidden_states (`torch.Tensor` of shape `(decoder_layers, S, P * K, d)`):
        Output of every decoder layer, each after the shared final layer norm.
    encoder_last_hidden_state (`torch.Tensor` of shape `(S, L + h * w, d)`):
        Output of the encoder, text tokens first, then image tokens.
    """

    loss: torch.Tensor | None = None
    loss_dict: dict[str, torch.Tensor] | None = None
    pred_boxes: torch.Tensor | None = None
    phrase_mask: torch.Tensor | None = None
    auxiliary_outputs: list[dict[str, torch.Tensor]] | None = None
    pred_masks: torch.Tensor | None = None
    mask_attentions: torch.Tensor | None = None
    presence_logits: torch.Tensor | None = None
    presence: torch.Tensor | None = None
    presence_threshold: torch.Tensor | None = None
    query_boxes: torch.Tensor | None = None
    query_masks: torch.Tensor | None = None
    image_index: torch.Tensor | None = None
    input_ids: torch.Tensor | None = None
    phrase_input_ids: torch.Tensor | None = None
    pixel_mask: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    intermediate_hidden_states: torch.Tensor | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
    decoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    decoder_attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
    encoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    encoder_attentions: tuple[torch.Tensor, ...] | None = None


# outputs of RefTRModel that RefTRForVisualGrounding returns unchanged
SHARED_OUTPUTS = tuple(
    field.name for field in fields(RefTRModelOutput) if field.name in RefTRVisualGroundingOutput.__dataclass_fields__
)


class RefTRTokens(NamedTuple):
    """
    Tokens as the encoder reads them.

    Args:
        features (`torch.Tensor` of shape `(S, tokens, d)`): features of the tokens.
        position_embeddings (`torch.Tensor` of shape `(S, tokens, d)`): positions, with the token type embeddings.
        mask (`torch.Tensor` of shape `(S, tokens)`): True for real tokens, False for padding.
    """

    features: torch.Tensor
    position_embeddings: torch.Tensor
    mask: torch.Tensor


class RefTRPhrases(NamedTuple):
    """
    Phrases as the query encoder reads them.

    Args:
        features (`torch.Tensor` of shape `(S, P, d)`): features of each phrase on its own.
        mask (`torch.Tensor` of shape `(S, P)`): True for real phrases, False for padding.
        context_mask (`torch.Tensor` of shape `(S, P, L)`): True for the tokens of its sentence that a phrase spans.
        slots (`torch.Tensor` of shape `(N,)`, *optional*): see `phrase_slots` of [`RefTRModelOutput`].
    """

    features: torch.Tensor
    mask: torch.Tensor
    context_mask: torch.Tensor
    slots: torch.Tensor | None = None


def expand_attention_mask(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None = None,
) -> Any:
    """
    Expand a mask of shape (batch, tokens) to the form that the attention implementation reads.

    The mask is never dropped, even if nothing is masked: to find that out, the host would wait for the device.
    """
    return create_bidirectional_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        encoder_hidden_states=encoder_hidden_states,
        allow_is_bidirectional_skip=False,
    )


def scatter_phrases(values: torch.Tensor, slots: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """
    Scatter values of phrases to their slots, zero elsewhere.

    Args:
        values (`torch.Tensor` of shape `(N, ...)`): one value per phrase.
        slots (`torch.Tensor` of shape `(N,)`): flat index `sentence * P + slot` of each; `S * P` drops the value.
        shape (`(S, P)`): number of sentences and of slots.

    Returns:
        `torch.Tensor` of shape `(S, P, ...)`
    """
    scattered = values.new_zeros(shape[0] * shape[1] + 1, *values.shape[1:]).index_put((slots,), values)
    return scattered[:-1].unflatten(0, shape)


class RefTRSinePositionEmbedding(nn.Module):
    """
    Sine and cosine position embedding of a feature map, normalized to the image without padding.

    Unlike in DETR, positions are pixel centers of the feature map. Rows and columns of padding give angles near
    -3e6, which are part of the published model: its mask head reads padded positions.
    """

    def __init__(self, config: RefTRConfig):
        super().__init__()
        self.num_features = config.d_model // 2
        self.temperature = config.position_embedding_temperature

    def forward(self, mask: torch.Tensor) -> torch.Tensor:
        """Return float32 embeddings (I, h * w, d), y features first, for a mask (I, h, w), True for the image."""
        feature = torch.arange(self.num_features, device=mask.device)
        frequencies = self.temperature ** (2 * (feature // 2).float() / self.num_features)
        embeddings = []
        for axis in (1, 2):
            position = mask.cumsum(axis, dtype=torch.float32)
            position = (position - 0.5) / (position.narrow(axis, -1, 1) + 1e-6) * 2 * math.pi
            angles = position[..., None] / frequencies
            embeddings.append(torch.stack((angles[..., 0::2].sin(), angles[..., 1::2].cos()), dim=-1).flatten(-2))
        return torch.cat(embeddings, dim=-1).flatten(1, 2)


class RefTRLearnedPositionEmbedding(nn.Module):
    """Learned position embedding of a feature map: the embedding of the column, then that of the row."""

    def __init__(self, config: RefTRConfig):
        super().__init__()
        self.row_embeddings = nn.Embedding(config.max_image_positions, config.d_model // 2)
        self.column_embeddings = nn.Embedding(config.max_image_positions, config.d_model // 2)

    def forward(self, mask: torch.Tensor) -> torch.Tensor:
        """
        Return embeddings (I, h * w, d) for a mask (I, h, w).

        Raises:
            ValueError: if the feature map has more rows or columns than there are embeddings.
        """
        batch_size, height, width = mask.shape
        limit = self.row_embeddings.num_embeddings
        if max(height, width) > limit:
            raise ValueError(
                f"The feature map of {height} x {width} positions is larger than max_image_positions={limit}; use "
                "smaller images or position_embedding_type='sine'."
            )
        columns = self.column_embeddings(torch.arange(width, device=mask.device)).expand(height, width, -1)
        rows = self.row_embeddings(torch.arange(height, device=mask.device))[:, None].expand(height, width, -1)
        return torch.cat((columns, rows), dim=-1).flatten(0, 1).expand(batch_size, -1, -1)


class RefTRProjection(nn.Module):
    """Projection of two linear layers, each followed by layer norm and ReLU, with dropout between them."""

    def __init__(self, config: RefTRConfig, input_size: int):
        super().__init__()
        self.linear1 = nn.Linear(input_size, config.d_model)
        self.layer_norm1 = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.linear2 = nn.Linear(config.d_model, config.d_model)
        self.layer_norm2 = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Project states of shape (..., input_size) to (..., d)."""
        hidden_states = self.dropout(self.layer_norm1(self.linear1(hidden_states)).relu())
        return self.layer_norm2(self.linear2(hidden_states)).relu()


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention with explicit weights, the fallback of `ALL_ATTENTION_FUNCTIONS`."""
    attention_weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        attention_weights = attention_weights + attention_mask
    attention_weights = nn.functional.softmax(attention_weights, dim=-1)
    attention_weights = nn.functional.dropout(attention_weights, p=dropout, training=module.training)
    return torch.matmul(attention_weights, value).transpose(1, 2).contiguous(), attention_weights


class RefTRAttention(nn.Module):
    """Multi-head self- or cross-attention. Positions are added to queries and keys, not to values."""

    def __init__(self, config: RefTRConfig, num_attention_heads: int):
        super().__init__()
        self.config = config
        self.head_dim = config.d_model // num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.k_proj = nn.Linear(config.d_model, config.d_model)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.o_proj = nn.Linear(config.d_model, config.d_model)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        key_position_embeddings: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Attend from queries to keys and values.

        Args:
            hidden_states, position_embeddings (`torch.Tensor` of shape `(batch, queries, d)`):
                Queries and their positions.
            key_value_states, key_position_embeddings (`torch.Tensor` of shape `(batch, keys, d)`, *optional*):
                Keys and values and their positions. Defaults to the queries (self-attention).
            attention_mask (*optional*): mask as returned by `expand_attention_mask`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor | None]`: new states (batch, queries, d), and the attention weights
            (batch, heads, queries, keys) if the attention implementation returns them.
        """
        if key_value_states is None:
            key_value_states, key_position_embeddings = hidden_states, position_embeddings

        def split_heads(states: torch.Tensor) -> torch.Tensor:
            return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attention_output, attention_weights = attention_interface(
            self,
            split_heads(self.q_proj(hidden_states + position_embeddings)),
            split_heads(self.k_proj(key_value_states + key_position_embeddings)),
            split_heads(self.v_proj(key_value_states)),
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(attention_output.flatten(-2)), attention_weights


class RefTRMLP(nn.Module):
    """Feed-forward block of a layer."""

    def __init__(self, config: RefTRConfig, ffn_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(config.d_model, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, config.d_model)
        self.activation = ACT2FN[config.activation_function]
        self.activation_dropout = nn.Dropout(config.activation_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return new states of the same shape (..., d)."""
        return self.fc2(self.activation_dropout(self.activation(self.fc1(hidden_states))))


def add_residual(
    hidden_states: torch.Tensor,
    block: Callable[[torch.Tensor], torch.Tensor],
    norm: nn.Module,
    dropout: nn.Module,
    pre_norm: bool,
) -> torch.Tensor:
    """Add the output of a block to its input, and normalize: after the addition as published, or before the block."""
    if pre_norm:
        return hidden_states + dropout(block(norm(hidden_states)))
    return norm(hidden_states + dropout(block(hidden_states)))


class RefTREncoderLayer(GradientCheckpointingLayer):
    """Encoder layer: self-attention and feed-forward over text and image tokens, each with a layer norm."""

    def __init__(self, config: RefTRConfig):
        super().__init__()
        self.pre_norm = config.pre_norm
        self.self_attn = RefTRAttention(config, config.encoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.mlp = RefTRMLP(config, config.encoder_ffn_dim)
        self.final_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        Args:
            hidden_states, position_embeddings (`torch.Tensor` of shape `(S, L + h * w, d)`): tokens and positions.
            attention_mask (*optional*): mask as returned by `expand_attention_mask`.

        Returns:
            `torch.Tensor` of shape `(S, L + h * w, d)`
        """

        def attend(states: torch.Tensor) -> torch.Tensor:
            return self.self_attn(states, position_embeddings, attention_mask=attention_mask, **kwargs)[0]

        hidden_states = add_residual(hidden_states, attend, self.self_attn_layer_norm, self.dropout, self.pre_norm)
        return add_residual(hidden_states, self.mlp, self.final_layer_norm, self.dropout, self.pre_norm)


class RefTRDecoderLayer(GradientCheckpointingLayer):
    """Decoder layer: self-attention among queries, cross-attention to the encoder's output, feed-forward."""

    def __init__(self, config: RefTRConfig):
        super().__init__()
        self.pre_norm = config.pre_norm
        self.self_attn = RefTRAttention(config, config.decoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.cross_attn = RefTRAttention(config, config.decoder_attention_heads)
        self.cross_attn_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.mlp = RefTRMLP(config, config.decoder_ffn_dim)
        self.final_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_position_embeddings: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        Args:
            hidden_states, position_embeddings (`torch.Tensor` of shape `(S, P * K, d)`): queries and positions.
            encoder_hidden_states, encoder_position_embeddings (`torch.Tensor` of shape `(S, L + h * w, d)`):
                Output of the encoder and its positions.
            attention_mask, encoder_attention_mask (*optional*): masks as returned by `expand_attention_mask`.

        Returns:
            `torch.Tensor` of shape `(S, P * K, d)`
        """

        def attend_to_phrases(states: torch.Tensor) -> torch.Tensor:
            return self.self_attn(states, position_embeddings, attention_mask=attention_mask, **kwargs)[0]

        def attend_to_memory(states: torch.Tensor) -> torch.Tensor:
            attention_output, _ = self.cross_attn(
                states,
                position_embeddings,
                key_value_states=encoder_hidden_states,
                key_position_embeddings=encoder_position_embeddings,
                attention_mask=encoder_attention_mask,
                **kwargs,
            )
            return attention_output

        dropout, pre_norm = self.dropout, self.pre_norm
        hidden_states = add_residual(hidden_states, attend_to_phrases, self.self_attn_layer_norm, dropout, pre_norm)
        hidden_states = add_residual(hidden_states, attend_to_memory, self.cross_attn_layer_norm, dropout, pre_norm)
        return add_residual(hidden_states, self.mlp, self.final_layer_norm, dropout, pre_norm)


class RefTRQueryEncoder(nn.Module):
    """Encode each phrase and its context in the sentence to decoder inputs and query positions, K of each."""

    def __init__(self, config: RefTRConfig):
        super().__init__()
        self.context_query = nn.Linear(config.d_model, config.d_model)
        self.context_key = nn.Linear(config.d_model, config.d_model)
        self.context_value = nn.Linear(config.d_model, config.d_model)
        self.context_projection = nn.Linear(config.d_model, config.d_model)
        self.context_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.fusion = RefTRProjection(config, 2 * config.d_model)
        self.query_embedding = nn.Embedding(config.num_queries_per_phrase, 2 * config.d_model)

    def forward(
        self, text_memory: torch.Tensor, context_mask: torch.Tensor, phrase_features: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            text_memory (`torch.Tensor` of shape `(S, L, d)`): output of the encoder at the text tokens.
            context_mask (`torch.Tensor` of shape `(S, P, L)`): True for the tokens that a phrase spans.
            phrase_features (`torch.Tensor` of shape `(S, P, d)`): features of each phrase on its own.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: decoder inputs and query positions, each of shape (S, P * K, d).
        """
        # Phrases that span no token attend to [CLS], because a softmax over nothing is NaN
        token = torch.arange(context_mask.shape[-1], device=context_mask.device)
        context_mask = context_mask | (~context_mask.any(dim=-1, keepdim=True) & (token == 0))
        sentence_token = text_memory[:, :1]
        scores = self.context_query(sentence_token) @ self.context_key(text_memory).transpose(1, 2)
        scores = scores.float().masked_fill(~context_mask, -torch.inf)
        context = scores.softmax(dim=-1).to(text_memory.dtype) @ self.context_value(text_memory)
        context = self.context_layer_norm(self.context_projection(context)) + sentence_token
        fused = self.fusion(torch.cat((context, phrase_features), dim=-1))
        query_embeddings = self.query_embedding(torch.arange(self.query_embedding.num_embeddings, device=fused.device))
        queries = torch.cat((fused, fused), dim=-1)[:, :, None] + query_embeddings
        return queries.flatten(1, 2).chunk(2, dim=-1)


class RefTRBoxHead(nn.Module):
    """MLP of three layers that predicts the box of a phrase. The last layer starts at zero, as published."""

    def __init__(self, config: RefTRConfig):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(config.d_model, output_size) for output_size in (config.d_model, config.d_model, 4)
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return logits (..., 4) of (center_x, center_y, width, height) for states (..., d)."""
        for layer in self.layers[:-1]:
            hidden_states = layer(hidden_states).relu()
        return self.layers[-1](hidden_states)


class RefTRPresenceHead(nn.Module):
    """
    Predict whether the box of a query is an answer to its phrase. A layer of cross-attention lets each query compare
    what it found with the text and the image once more, before an MLP of two layers decides.
    """

    def __init__(self, config: RefTRConfig):
        super().__init__()
        self.config = config
        self.cross_attn = RefTRAttention(config, config.decoder_attention_heads)
        self.cross_attn_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.mlp = RefTRMLP(config, config.decoder_ffn_dim)
        self.final_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.hidden = nn.Linear(config.d_model, config.d_model)
        self.output = nn.Linear(config.d_model, 1)

    def forward(
        self,
        queries: torch.Tensor,
        memory: torch.Tensor,
        memory_position_embeddings: torch.Tensor,
        memory_mask: torch.Tensor,
    ) -> torch.Tensor:
        """
        Predict the presence of the answers of queries.

        Args:
            queries (`torch.Tensor` of shape `(S, Q, d)`): output of the decoder.
            memory, memory_position_embeddings (`torch.Tensor` of shape `(S, L + h * w, d)`):
                Output of the encoder and positions of its tokens.
            memory_mask (`torch.Tensor` of shape `(S, L + h * w)`): True for real tokens.

        Returns:
            `torch.Tensor` of shape `(S, Q)`: logits.
        """
        attention_mask = expand_attention_mask(self.config, queries, memory_mask, memory)

        def attend(states: torch.Tensor) -> torch.Tensor:
            return self.cross_attn(
                states, torch.zeros_like(states), memory, memory_position_embeddings, attention_mask
            )[0]

        dropout, pre_norm = self.dropout, self.config.pre_norm
        states = add_residual(queries, attend, self.cross_attn_layer_norm, dropout, pre_norm)
        states = add_residual(states, self.mlp, self.final_layer_norm, dropout, pre_norm)
        return self.output(self.hidden(states).relu())[..., 0]


class RefTRMaskInputConvolution(nn.Conv2d):
    """
    First 3x3 convolution of the mask head, over image features, encoder output and attention maps.

    A convolution is linear in its channels: those of an image are convolved once for all its sentences, those of a
    sentence once for all its phrases, and only the attention maps once per phrase.
    """

    def __init__(self, d_model: int, num_heads: int):
        width = 2 * d_model + num_heads
        super().__init__(width, width, kernel_size=3, padding=1)
        self.input_widths = (d_model, d_model, num_heads)

    def forward(
        self,
        image_features: torch.Tensor,
        image_memory: torch.Tensor,
        attentions: torch.Tensor,
        image: torch.Tensor,
        sentence: torch.Tensor,
    ) -> torch.Tensor:
        """
        Convolve the inputs of each phrase.

        Args:
            image_features (`torch.Tensor` of shape `(I, d, h, w)`): projected feature maps of the images.
            image_memory (`torch.Tensor` of shape `(S, d, h, w)`): encoder output of the sentences.
            attentions (`torch.Tensor` of shape `(N, heads, h, w)`): attention maps of the phrases.
            image, sentence (`torch.Tensor` of shape `(N,)`): index of each phrase's image and sentence.

        Returns:
            `torch.Tensor` of shape `(N, 2 * d + heads, h, w)`.
        """
        image_weight, memory_weight, attention_weight = self.weight.split(self.input_widths, dim=1)
        of_images = nn.functional.conv2d(image_features, image_weight, padding=self.padding)
        of_sentences = nn.functional.conv2d(image_memory, memory_weight, padding=self.padding)
        of_phrases = nn.functional.conv2d(attentions, attention_weight, padding=self.padding)
        # Added here, because ONNX Runtime quantizes no convolution that has a bias and a part of a weight
        return of_images[image] + (of_sentences + self.bias[:, None, None])[sentence] + of_phrases


class RefTRMaskHead(nn.Module):
    """
    Mask head in the manner of DETR: attention maps of each phrase over the image, then 3x3 convolutions of decreasing
    width, which add one finer feature map of the backbone after another.
    """

    def __init__(self, config: RefTRConfig, backbone_channels: list[int]):
        super().__init__()
        if len(backbone_channels) < 4:
            raise ValueError(
                f"predict_masks=True requires four feature maps, the backbone returns {len(backbone_channels)}; set "
                "backbone_config.out_indices to its last four stages."
            )
        self.num_heads = config.decoder_attention_heads
        self.scaling = (config.d_model // self.num_heads) ** -0.5
        self.query_projection = nn.Linear(config.d_model, config.d_model)
        self.key_projection = nn.Linear(config.d_model, config.d_model)
        # The first layer reads image features, encoder output and attention maps, the next ones add feature maps from
        # the coarsest to the finest
        widths = [2 * config.d_model + self.num_heads] + [config.d_model // divisor for divisor in (2, 4, 8, 16)]
        self.convolutions = nn.ModuleList([RefTRMaskInputConvolution(config.d_model, self.num_heads)])
        self.convolutions.extend(
            nn.Conv2d(inputs, outputs, kernel_size=3, padding=1) for inputs, outputs in pairwise(widths)
        )
        self.norms = nn.ModuleList(
            nn.GroupNorm(math.gcd(config.mask_head_group_norm_groups, width), width) for width in widths
        )
        self.adapters = nn.ModuleList(
            nn.Conv2d(channels, width, kernel_size=1)
            for channels, width in zip(backbone_channels[-2:-5:-1], widths[1:4], strict=True)
        )
        self.output_convolution = nn.Conv2d(widths[-1], 1, kernel_size=3, padding=1)
        self.conditioning = config.mask_conditioning

    def forward(
        self,
        queries: torch.Tensor,
        image_features: torch.Tensor,
        image_memory: torch.Tensor,
        image_mask: torch.Tensor,
        feature_maps: tuple[torch.Tensor, ...],
        image_index: torch.Tensor | None = None,
        query_slots: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Predict the masks of queries.

        Args:
            queries (`torch.Tensor` of shape `(S, Q, d)`): output of the decoder.
            image_features (`torch.Tensor` of shape `(I, h * w, d)`): image tokens projected to the model's width.
            image_memory (`torch.Tensor` of shape `(S, h * w, d)`): output of the encoder at the image tokens.
            image_mask (`torch.Tensor` of shape `(I, h * w)`):
                True for image tokens. Padding gets no attention, but convolutions and group norms read it, as
                published.
            feature_maps (`tuple[torch.Tensor]`): feature maps of the backbone, each (I, channels, height, width).
            image_index (`torch.Tensor` of shape `(S,)`, *optional*):
                Image of each sentence. Defaults to one sentence per image, in order.
            query_slots (`torch.Tensor` of shape `(N,)`, *optional*):
                Flat indices `sentence * Q + query` of those to predict masks for, or `S * Q`. Defaults to all.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: logits (S, Q, h1, w1), and attention maps (S, Q, heads, h, w), zero
            for queries without a mask.
        """
        shape, size = queries.shape[:2], feature_maps[-1].shape[-2:]
        if query_slots is None:
            query_slots = torch.arange(shape[0] * shape[1], device=queries.device)
        # From here on tensors have one row per query that gets a mask
        rows = query_slots.clamp(max=shape[0] * shape[1] - 1)
        sentence = rows // shape[1]
        image = sentence if image_index is None else image_index[sentence]

        queries = self.query_projection(queries.flatten(0, 1)[rows]).unflatten(-1, (self.num_heads, -1))
        keys = self.key_projection(image_memory).unflatten(-1, (self.num_heads, -1))[sentence]
        scores = torch.einsum("phc,pnhc->phn", queries * self.scaling, keys).float()
        # An image that is all padding is attended to as a whole, because a softmax over nothing is NaN
        is_visible = (image_mask | ~image_mask.any(dim=-1, keepdim=True))[image]
        scores = scores.masked_fill(~is_visible[:, None], -torch.inf)
        attentions = scores.flatten(1).softmax(dim=-1).to(queries.dtype).unflatten(1, (self.num_heads, *size))

        maps = (tokens.transpose(1, 2).unflatten(-1, size) for tokens in (image_features, image_memory))
        # CODEPATH: published checkpoints are trained without it; with it, phrases of a sentence get masks of their own
        scaled = attentions * attentions[0].numel() if self.conditioning == "scaled_attention" else attentions
        states = self.norms[0](self.convolutions[0](*maps, scaled, image, sentence))
        states = self.norms[1](self.convolutions[1](states.relu())).relu()
        for feature_map, adapter, convolution, norm in zip(
            feature_maps[-2:-5:-1], self.adapters, self.convolutions[2:], self.norms[2:], strict=True
        ):
            states = nn.functional.interpolate(states, size=feature_map.shape[-2:], mode="nearest")
            states = norm(convolution(states + adapter(feature_map)[image])).relu()
        logits = self.output_convolution(states)[:, 0]
        return scatter_phrases(logits, query_slots, shape), scatter_phrases(attentions, query_slots, shape)


# arguments of the forward methods
INPUTS_DOCSTRING = r"""
pixel_values (`torch.Tensor` of shape `(I, 3, H, W)`, *optional*):
    Normalized images, padded at the bottom and right. Required unless `image_features` is given.
pixel_mask (`torch.Tensor` of shape `(I, H, W)`, *optional*):
    1 for pixels of the image, 0 for padding. Defaults to no padding.
input_ids (`torch.Tensor` of shape `(S, L)`):
    Tokens of the sentences, [CLS] first and padding last.
attention_mask (`torch.Tensor` of shape `(S, L)`, *optional*):
    1 for real tokens, 0 for padding. Defaults to no padding.
image_index (`torch.Tensor` of shape `(S,)`, *optional*):
    Index of the image that each sentence refers to. Defaults to one sentence per image, in order.
phrase_input_ids (`torch.Tensor` of shape `(S, P, Lp)`, *optional*):
    Phrases, each tokenized on its own. A phrase without a token between its special tokens is padding.
    Defaults to one phrase per sentence, the entire sentence.
phrase_attention_mask (`torch.Tensor` of shape `(S, P, Lp)`, *optional*):
    1 for real tokens of the phrases, 0 for padding.
phrase_spans (`torch.Tensor` of shape `(S, P, 2)`, *optional*):
    Token positions [start, end) of each phrase in its sentence, where [CLS] is 0.
phrase_index (`torch.Tensor` of shape `(N, 2)`, *optional*):
    Sentence and slot of each real phrase, as returned by the processor. If not given, they are searched
    for, which makes the host wait for the device and breaks the graph of `torch.compile`.
image_features ([`RefTRImageFeatures`], *optional*):
    Output of `get_image_features`, in place of `pixel_values` and `pixel_mask`, so that several calls
    about an image encode it once.
"""

LABELS_DOCSTRING = r"""
labels (`list[dict]` of length `S`, *optional*):
    `boxes` (P or fewer, 4) of each sentence, aligned with its phrase slots, as (center_x, center_y, width,
    height) normalized to the image without padding. Boxes that leave the image, are empty, inverted or NaN
    are ignored by the loss. With `config.predict_masks` also `masks` (P or fewer, H, W) of the padded
    image, True for pixels of the object. If phrases refer to none or to several objects, `target_slots` (targets,)
    gives the phrase slot of each of the `boxes` (targets, 4) and `masks`, and `is_absent` (P or fewer) is True for
    phrases that refer to nothing; phrases with neither are ignored by the loss.
num_items_in_batch (`int` or `torch.Tensor`, *optional*, defaults to S):
    Number of sentences in the global batch (all ranks, all accumulation steps), which divides the loss.
"""


@auto_docstring(custom_intro="Base class that handles weight initialization, loading and saving of RefTR models.")
class RefTRPreTrainedModel(PreTrainedModel):
    config: RefTRConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    # These add outputs of several of their submodules, which have to be on one device
    _no_split_modules = [
        "RefTREncoderLayer",
        "RefTRDecoderLayer",
        "RefTRLearnedPositionEmbedding",
        "RefTRQueryEncoder",
        "RefTRMaskHead",
        "RefTRPresenceHead",
        "TimmBackbone",
    ]
    _supports_sdpa = True
    # Flash Attention is off: with a padding mask over the encoder's output, the library hides the last decoder queries
    _supports_flash_attn = False
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected = [r"num_batches_tracked"]
    is_fused = False  # True for models that `fused_copy` returns

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """
        Save the model, see `PreTrainedModel.save_pretrained`. Weights get the permissions of any new file.

        Raises:
            ValueError: if the model is a fused copy, whose weights `from_pretrained` could not read.
        """
        if self.is_fused:
            raise ValueError(
                "A fused copy cannot be saved, because its batch norms are gone: save the model that it was made of."
            )
        super().save_pretrained(save_directory, *args, **kwargs)
        apply_default_permissions(Path(save_directory).glob("*model*.safetensors"))

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # The library skips modules of custom code whose parameters are all in submodules, for fear of overwriting
        # loaded weights. `_init_weights` checks each parameter for that itself.
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    # trf-ignore: TRF018 -- the defaults of the library differ from the published ones for every layer
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize weights as published: the defaults of PyTorch, except in the cases below."""
        xavier_std = self.config.init_xavier_std
        if isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            bound = module.in_features**-0.5
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, RefTRAttention):
            for projection in (module.q_proj, module.k_proj, module.v_proj):
                # The published model has one (3d, d) matrix, whose fans give a bound smaller by sqrt(2)
                init.xavier_uniform_(projection.weight, gain=xavier_std / math.sqrt(2))
            init.xavier_uniform_(module.o_proj.weight, gain=xavier_std)
            for projection in (module.q_proj, module.k_proj, module.v_proj, module.o_proj):
                init.zeros_(projection.bias)
        elif isinstance(module, RefTRMLP):
            init.xavier_uniform_(module.fc1.weight, gain=xavier_std)
            init.xavier_uniform_(module.fc2.weight, gain=xavier_std)
        elif isinstance(module, RefTRLearnedPositionEmbedding):
            init.uniform_(module.row_embeddings.weight)
            init.uniform_(module.column_embeddings.weight)
        elif isinstance(module, RefTRBoxHead):
            init.normal_(module.layers[-1].weight, std=self.config.box_head_init_std)
            init.zeros_(module.layers[-1].bias)
        elif isinstance(module, RefTRPresenceHead):
            # all answers are equally probable at first
            init.zeros_(module.output.weight)
            init.zeros_(module.output.bias)
        elif isinstance(module, RefTRMaskHead):
            for projection in (module.query_projection, module.key_projection):
                init.xavier_uniform_(projection.weight)
                init.zeros_(projection.bias)
            for convolution in (*module.convolutions, *module.adapters, module.output_convolution):
                init.kaiming_uniform_(convolution.weight, a=1)
                init.zeros_(convolution.bias)
        elif isinstance(module, RefTRModel):
            init.xavier_uniform_(module.text_position_embeddings.weight, gain=xavier_std)
            init.xavier_uniform_(module.token_type_embeddings.weight, gain=xavier_std)
            init.xavier_uniform_(module.image_projection[0].weight, gain=xavier_std)
            init.zeros_(module.image_projection[0].bias)
            init.normal_(module.level_embedding)

    def freeze_parameters(self) -> None:
        """Stop training the parameters that the configuration freezes."""
        if self.base_model is not self:
            self.base_model.freeze_parameters()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args: Any, **kwargs: Any
    ) -> Self | tuple[Self, dict]:
        """
        Load a model, see `PreTrainedModel.from_pretrained`.

        The library unfreezes every parameter; those that the configuration freezes are frozen again. Weights are read
        from safetensors only, because a pickle of others can claim any amount of memory.

        Raises:
            ValueError: if a file is damaged, naming it.
            OSError: if there is no model.
        """
        source = pretrained_model_name_or_path
        check_source(source, kwargs)
        with naming_files(source, CONFIG_FILES + WEIGHT_FILES, kwargs):
            if source is not None:
                check_index(source, kwargs.get("subfolder"))
            loaded = super().from_pretrained(source, *model_args, **{**kwargs, "use_safetensors": True})
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.freeze_parameters()
        return loaded

    def fused_copy(self) -> Self:
        """
        Return a copy for faster inference. Its answers are the same up to rounding.

        The batch norms of the image backbone are folded into the preceding convolutions, whose weights are in
        channels-last layout. The copy is in evaluation mode, without gradients and not compiled. It shares no memory
        with this model, which may be training or answering in another thread. It cannot be saved for
        `from_pretrained`, because its state dict lacks the folded norms; save this model instead.

        Raises:
            ValueError: if weights of the model are offloaded: fuse first, then offload the copy.
        """
        return fused_copy(self)


class RefTREncoder(RefTRPreTrainedModel):
    """Visual-language encoder: a transformer encoder over text tokens and image tokens."""

    _can_record_outputs = {
        "hidden_states": OutputRecorder(RefTREncoderLayer, num_hidden_layers_key="encoder_layers"),
        "attentions": OutputRecorder(RefTRAttention, index=1),
    }

    def __init__(self, config: RefTRConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(RefTREncoderLayer(config) for _ in range(config.encoder_layers))
        # post-norm layers return normalized states already
        self.layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps) if config.pre_norm else nn.Identity()
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring(custom_intro="Encode text tokens and image tokens.")
    def forward(
        self,
        inputs_embeds: torch.Tensor,
        position_embeddings: torch.Tensor,
        attention_mask: torch.Tensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        r"""
        inputs_embeds (`torch.Tensor` of shape `(S, L + h * w, d)`):
            Text tokens, then image tokens.
        position_embeddings (`torch.Tensor` of shape `(S, L + h * w, d)`):
            Positions of the tokens.
        attention_mask (`torch.Tensor` of shape `(S, L + h * w)`):
            1 for real tokens, 0 for padding.
        """
        hidden_states = inputs_embeds
        attention_mask = expand_attention_mask(self.config, inputs_embeds, attention_mask)
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_embeddings, attention_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=self.layer_norm(hidden_states))


class RefTRDecoder(RefTRPreTrainedModel):
    """Query decoder: a transformer decoder with K queries per phrase."""

    _can_record_outputs = {
        "hidden_states": OutputRecorder(RefTRDecoderLayer, num_hidden_layers_key="decoder_layers"),
        "attentions": OutputRecorder(RefTRAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(RefTRAttention, index=1, layer_name="cross_attn"),
    }

    def __init__(self, config: RefTRConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(RefTRDecoderLayer(config) for _ in range(config.decoder_layers))
        self.layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring(custom_intro="Decode queries.")
    def forward(
        self,
        inputs_embeds: torch.Tensor,
        position_embeddings: torch.Tensor,
        attention_mask: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_position_embeddings: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RefTRDecoderOutput:
        r"""
        inputs_embeds (`torch.Tensor` of shape `(S, P * K, d)`):
            Queries, K per phrase.
        position_embeddings (`torch.Tensor` of shape `(S, P * K, d)`):
            Positions of the queries.
        attention_mask (`torch.Tensor` of shape `(S, P * K)`):
            True for queries of real phrases, False for padding.
        encoder_hidden_states (`torch.Tensor` of shape `(S, L + h * w, d)`):
            Output of the encoder.
        encoder_position_embeddings (`torch.Tensor` of shape `(S, L + h * w, d)`):
            Positions of its tokens.
        encoder_attention_mask (`torch.Tensor` of shape `(S, L + h * w)`):
            1 for real tokens, 0 for padding.
        """
        hidden_states = inputs_embeds
        # Padding is visible where a sentence has no real phrase, because a softmax over nothing is NaN
        attention_mask = attention_mask.bool()
        attention_mask = attention_mask | ~attention_mask.any(dim=1, keepdim=True)
        attention_mask = expand_attention_mask(self.config, inputs_embeds, attention_mask)
        encoder_attention_mask = expand_attention_mask(
            self.config, inputs_embeds, encoder_attention_mask, encoder_hidden_states
        )
        intermediate_hidden_states = []
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings,
                encoder_hidden_states,
                encoder_position_embeddings,
                attention_mask,
                encoder_attention_mask,
                **kwargs,
            )
            # The next layer reads the states without the final layer norm
            intermediate_hidden_states.append(self.layer_norm(hidden_states))
        return RefTRDecoderOutput(
            last_hidden_state=intermediate_hidden_states[-1],
            intermediate_hidden_states=torch.stack(intermediate_hidden_states),
        )


@auto_docstring(
    custom_intro="""
    RefTR without heads: image and text backbones, visual-language encoder, query encoder and query decoder.
    """
)
class RefTRModel(RefTRPreTrainedModel):
    def __init__(self, config: RefTRConfig):
        super().__init__(config)
        self.backbone = load_backbone(config)
        # CODEPATH: all published checkpoints freeze them; models trained from scratch may not
        if config.freeze_backbone_batch_norm:
            requires_backends(self, "timm")
            from timm.layers import freeze_batch_norm_2d  # takes half a second

            self.backbone = freeze_batch_norm_2d(self.backbone)
        self.image_projection = nn.Sequential(
            nn.Conv2d(self.backbone.channels[-1], config.d_model, kernel_size=1),
            nn.GroupNorm(config.projection_group_norm_groups, config.d_model),
        )
        # CODEPATH: all published checkpoints use sine embeddings; "learned" is the other choice of the published code
        if config.position_embedding_type == "learned":
            self.image_position_embedding = RefTRLearnedPositionEmbedding(config)
        else:
            self.image_position_embedding = RefTRSinePositionEmbedding(config)

        self.text_backbone = AutoModel.from_config(config.text_config, trust_remote_code=False)
        if getattr(self.text_backbone, "pooler", None) is None:
            raise ValueError(
                f"text_config.model_type={quote(config.text_config.model_type)} has no pooled output, which RefTR "
                "requires for the features of phrases; use an encoder that has one, for example bert or roberta."
            )
        self.text_projection = RefTRProjection(config, config.text_config.hidden_size)
        self.phrase_projection = RefTRProjection(config, config.text_config.hidden_size)

        self.text_position_embeddings = nn.Embedding(config.max_text_positions, config.d_model)
        self.token_type_embeddings = nn.Embedding(2, config.d_model)
        self.level_embedding = nn.Parameter(torch.empty(1, config.d_model))
        self.encoder = RefTREncoder(config)
        self.query_encoder = RefTRQueryEncoder(config)
        self.decoder = RefTRDecoder(config)
        self.post_init()
        self.freeze_parameters()

    def get_input_embeddings(self) -> nn.Module:
        """Return the word embeddings of the text backbone."""
        return self.text_backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings of the text backbone and update `config.text_config.vocab_size`."""
        self.text_backbone.set_input_embeddings(value)
        self.config.text_config.vocab_size = value.num_embeddings

    def freeze_parameters(self) -> None:
        """Stop training the backbone's stem and its first `config.num_frozen_backbone_stages` stages."""
        freeze_stages(self.backbone, self.config.num_frozen_backbone_stages)

    @can_return_tuple
    @auto_docstring(
        custom_intro="Encode images. The features can be passed to any number of calls as `image_features`."
    )
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RefTRImageFeatures:
        r"""
        pixel_values (`torch.Tensor` of shape `(I, 3, H, W)`):
            Normalized images, padded at the bottom and right.
        pixel_mask (`torch.Tensor` of shape `(I, H, W)`, *optional*):
            1 for pixels of the image, 0 for padding.

        Returns:
            [`RefTRImageFeatures`], or a tuple with `return_dict=False`.

        Raises:
            ValueError: if the shapes do not fit together.
        """
        check_image_shapes(pixel_values, pixel_mask)
        if pixel_mask is None:
            pixel_mask = pixel_values.new_ones((pixel_values.shape[0], *pixel_values.shape[-2:]), dtype=torch.long)
        output_hidden_states = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        output_attentions = kwargs.get("output_attentions", self.config.output_attentions)
        # The timm wrapper raises an error if asked for attentions, and modifies itself if asked for hidden states
        is_timm = hasattr(self.backbone, "_backbone")
        outputs = self.backbone(
            pixel_values.to(self.dtype),
            output_hidden_states=False if is_timm else output_hidden_states,
            output_attentions=False if is_timm else output_attentions,
            return_dict=True,
        )
        feature_maps = outputs[0]  # by index: the timm wrapper returns a tuple if its own configuration says so
        if is_timm:
            hidden_states = feature_maps if output_hidden_states else None
            attentions = () if output_attentions else None
        else:
            hidden_states, attentions = outputs.hidden_states, outputs.attentions
        projected = self.image_projection(feature_maps[-1])
        mask = nn.functional.interpolate(pixel_mask[:, None].float(), size=projected.shape[-2:], mode="nearest")
        mask = mask[:, 0].bool()
        return RefTRImageFeatures(
            last_hidden_state=feature_maps[-1].flatten(2).transpose(1, 2),
            pooler_output=projected.flatten(2).transpose(1, 2),
            hidden_states=hidden_states,
            attentions=attentions,
            feature_maps=feature_maps,
            image_position_embeddings=self.image_position_embedding(mask),
            image_mask=mask.flatten(1),
            pixel_mask=pixel_mask,
        )

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> BaseModelOutputWithPooling:
        """
        Encode texts by the text backbone, or look them up inside a `cache_text` context.

        Args:
            input_ids, attention_mask (`torch.Tensor` of shape `(N, L)`): token ids, and 1 for real tokens.

        Returns:
            Output of the text backbone: last_hidden_state (N, L, text width) and pooler_output (N, text width).
        """
        # The cache looks token ids up on the host, which a compiled graph cannot do
        cache = None if torch.compiler.is_compiling() else self._text_cache
        return (cache or self._encode_text)(input_ids, attention_mask)

    @property
    def _text_cache(self) -> TextCache | None:
        return active_text_cache(self)

    def _encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> BaseModelOutputWithPooling:
        if self.text_backbone._supports_attention_backend:
            # Such a backbone takes an expanded mask as it is; to expand one, it would wait for the device
            embeds = torch.empty((), dtype=self.dtype, device=input_ids.device).expand(*input_ids.shape, 1)
            attention_mask = expand_attention_mask(self.text_backbone.config, embeds, attention_mask)
        return self.text_backbone(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)

    def cache_text(self, max_tokens: int = 100_000) -> AbstractContextManager[TextCache]:
        """
        Return a context in which each distinct sentence or phrase is encoded by the text backbone only once.

        It is meant for inference with constant weights. Answers are the same up to rounding. The cache applies to
        calls of the thread (or asynchronous task) that entered the context; the model does not change, and calls from
        other threads do not use the cache. Compiled models do not use it either.

        Args:
            max_tokens (`int`, *optional*, defaults to 100,000):
                Number of tokens whose states are held, each of 4 bytes times the width of the text backbone
                (BERT-base: 307 MB in all).

        Returns:
            A context manager, which yields the [`TextCache`].

        Raises:
            ValueError: if gradients are on or the model is in training mode.
        """
        if self.training or torch.is_grad_enabled():
            raise ValueError("`cache_text` is for inference: call model.eval(), and use it within torch.no_grad().")
        return TextCache(self._encode_text, max_tokens).active_for(self)

    def replace_unknown_tokens(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Replace token ids outside of the vocabulary by 0.

        Args:
            input_ids, attention_mask (`torch.Tensor` of shape `(..., L)`): token ids, and 1 for real tokens.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: token ids (..., L), and True for texts (...) whose real tokens are all
            known.
        """
        # The embedding may be wrapped by an adapter, which does not have its size
        is_known = (input_ids >= 0) & (input_ids < self.config.text_config.vocab_size)
        return input_ids.where(is_known, 0), (is_known | ~attention_mask.bool()).all(dim=-1)

    def replace_unknown(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        image_index: torch.Tensor | None,
        num_images: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """
        Replace unknown tokens and images of sentences.

        Their phrases are masked, because the host would have to wait for the device to raise an error.

        Returns:
            `tuple`: `input_ids`, `image_index`, and (S,) True for sentences without unknown tokens and image.
        """
        input_ids, is_answerable = self.replace_unknown_tokens(input_ids, attention_mask)
        if image_index is not None:
            is_image = (image_index >= 0) & (image_index < num_images)
            image_index, is_answerable = image_index.where(is_image, 0), is_answerable & is_image
        return input_ids, image_index, is_answerable

    def embed_token_type(self, token_type: int, device: torch.device) -> torch.Tensor:
        """Return the embedding (1, d) of a token type."""
        return self.token_type_embeddings(torch.full((1,), token_type, device=device)).to(device)

    def embed_images(
        self, image: RefTRImageFeatures, image_index: torch.Tensor | None, device: torch.device
    ) -> RefTRTokens:
        """
        Return the image tokens of each sentence.

        Args:
            image ([`RefTRImageFeatures`]): features of the images.
            image_index (`torch.Tensor` of shape `(S,)`, *optional*): image of each sentence; defaults to their order.
            device (`torch.device`): device of the inputs. `device_map` may have put parts of the model on others.
        """
        features, mask = image.pooler_output.to(device), image.image_mask
        # CODEPATH: published checkpoints are trained without it; models from scratch learn positions faster with it
        if self.config.add_positions_to_image_tokens:
            features = features + image.image_position_embeddings.to(features)
        # Offloading loads a parameter of this module itself during `forward` only
        image_type = self.embed_token_type(IMAGE_TYPE, device)
        position_embeddings = image.image_position_embeddings.to(device) + (self.level_embedding + image_type)
        position_embeddings = position_embeddings.to(features.dtype)
        if image_index is None:
            return RefTRTokens(features, position_embeddings, mask)
        return RefTRTokens(features[image_index], position_embeddings[image_index], mask[image_index])

    def embed_text(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> RefTRTokens:
        """
        Return the text tokens of each sentence.

        Args:
            hidden_states (`torch.Tensor` of shape `(S, L, text width)`): output of the text backbone.
            attention_mask (`torch.Tensor` of shape `(S, L)`): 1 for real tokens.
        """
        device = attention_mask.device
        features = self.text_projection(hidden_states).to(device)
        token = torch.arange(attention_mask.shape[1], device=device)
        text_type = self.embed_token_type(TEXT_TYPE, device)
        position_embeddings = self.text_position_embeddings(token).to(device) + text_type
        return RefTRTokens(features, position_embeddings.expand(features.shape[0], -1, -1), attention_mask.bool())

    def embed_sentences(self, pooler_output: torch.Tensor, attention_mask: torch.Tensor) -> RefTRPhrases:
        """
        Return each sentence as its only phrase. Its context is what stands between the special tokens.

        Args:
            pooler_output (`torch.Tensor` of shape `(S, text width)`): pooled output of the text backbone.
            attention_mask (`torch.Tensor` of shape `(S, L)`): 1 for real tokens.
        """
        phrase_mask = attention_mask.sum(dim=1, keepdim=True) > 2
        is_real = attention_mask.bool()
        order = is_real.cumsum(dim=1)
        context_mask = (is_real & (order > 1) & (order < order[:, -1:]))[:, None]
        return RefTRPhrases(self.phrase_projection(pooler_output)[:, None], phrase_mask, context_mask)

    def embed_phrases(
        self,
        attention_mask: torch.Tensor,
        phrase_input_ids: torch.Tensor,
        phrase_attention_mask: torch.Tensor | None,
        phrase_spans: torch.Tensor,
        phrase_index: torch.Tensor | None,
    ) -> RefTRPhrases:
        """
        Return several phrases per sentence.

        Args:
            attention_mask (`torch.Tensor` of shape `(S, L)`): 1 for real tokens of the sentences.
            phrase_input_ids, phrase_attention_mask, phrase_spans, phrase_index:
                See [`RefTRForVisualGrounding.forward`].
        """
        if phrase_attention_mask is None:
            phrase_attention_mask = torch.ones_like(phrase_input_ids)
        is_real = attention_mask.bool()
        phrase_input_ids, is_known = self.replace_unknown_tokens(phrase_input_ids, phrase_attention_mask)
        start, end = phrase_spans.unbind(-1)
        is_span = (start >= 0) & (start < end) & (end <= is_real.sum(dim=1, keepdim=True))
        phrase_mask = (phrase_attention_mask.sum(dim=-1) > 2) & is_known & is_span
        features, slots = self.encode_phrases(phrase_input_ids, phrase_attention_mask, phrase_mask, phrase_index)
        is_encoded = scatter_phrases(torch.ones_like(slots), slots, phrase_mask.shape)
        phrase_mask = phrase_mask & is_encoded.bool()
        token = torch.arange(is_real.shape[1], device=is_real.device)
        context_mask = (token >= start[..., None]) & (token < end[..., None]) & is_real[:, None]
        return RefTRPhrases(features, phrase_mask, context_mask, slots)

    def encode_phrases(
        self,
        phrase_input_ids: torch.Tensor,
        phrase_attention_mask: torch.Tensor,
        phrase_mask: torch.Tensor,
        phrase_index: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Encode real phrases by the text backbone, each on its own.

        Args:
            phrase_input_ids, phrase_attention_mask (`torch.Tensor` of shape `(S, P, Lp)`): tokens of the phrases.
            phrase_mask (`torch.Tensor` of shape `(S, P)`): True for real phrases.
            phrase_index (`torch.Tensor` of shape `(N, 2)`, *optional*): sentence and slot of the phrases to encode.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: features (S, P, d), zero for phrases that were not encoded, and the
            slots (N,) of those that were, see `phrase_slots` of [`RefTRModelOutput`].
        """
        if phrase_index is None:
            # The first slot is encoded if no phrase is real: the text backbone does not take an empty batch
            encoded = phrase_mask.clone()
            encoded[:1, :1] |= ~phrase_mask.any()
            phrase_index = encoded.nonzero()
        (num_sentences, num_slots), (sentence, slot) = phrase_mask.shape, phrase_index.unbind(1)
        is_slot = (sentence >= 0) & (sentence < num_sentences) & (slot >= 0) & (slot < num_slots)
        slots = torch.where(is_slot, sentence * num_slots + slot, num_sentences * num_slots)
        rows = slots.clamp(max=num_sentences * num_slots - 1)
        pooled = self.encode_text(
            phrase_input_ids.flatten(0, 1)[rows], phrase_attention_mask.flatten(0, 1)[rows]
        ).pooler_output
        return scatter_phrases(self.phrase_projection(pooled).to(slots.device), slots, phrase_mask.shape), slots

    @can_return_tuple
    @auto_docstring(
        custom_intro="""
        Encode images, sentences and phrases. Raises a `ValueError` if shapes or counts do not fit together.
        """,
        custom_args=INPUTS_DOCSTRING,
    )
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        phrase_input_ids: torch.Tensor | None = None,
        phrase_attention_mask: torch.Tensor | None = None,
        phrase_spans: torch.Tensor | None = None,
        phrase_index: torch.Tensor | None = None,
        image_features: RefTRImageFeatures | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RefTRModelOutput:
        kwargs.pop("token_type_ids", None)  # returned by tokenizers, but a sentence of RefTR is one segment
        check_required_inputs(input_ids, kwargs.pop("inputs_embeds", None), pixel_values, pixel_mask, image_features)
        check_kind(image_features, RefTRImageFeatures)
        if image_features is None:
            image_features = self.get_image_features(
                pixel_values, pixel_mask, output_hidden_states=False, output_attentions=False, return_dict=True
            )
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        phrase_inputs = (phrase_input_ids, phrase_attention_mask, phrase_spans, phrase_index)
        limit, num_images = self.config.max_text_positions, image_features.pooler_output.shape[0]
        check_text_shapes(limit, num_images, input_ids, attention_mask, image_index)
        check_phrase_shapes(limit, input_ids.shape[0], *phrase_inputs)
        input_ids, image_index, is_answered = self.replace_unknown(input_ids, attention_mask, image_index, num_images)

        image_tokens = self.embed_images(image_features, image_index, input_ids.device)
        text = self.encode_text(input_ids, attention_mask)
        text_tokens = self.embed_text(text.last_hidden_state, attention_mask)
        features, positions, mask = (torch.cat(pair, dim=1) for pair in zip(text_tokens, image_tokens, strict=True))
        kwargs["return_dict"] = True
        encoder_outputs = self.encoder(features, positions, mask, **kwargs)
        memory = encoder_outputs.last_hidden_state

        if phrase_input_ids is None:
            phrases = self.embed_sentences(text.pooler_output, attention_mask)
        else:
            phrases = self.embed_phrases(attention_mask, *phrase_inputs)
        phrase_mask = phrases.mask & is_answered[:, None]
        text_memory = memory[:, : input_ids.shape[1]]
        queries, query_positions = self.query_encoder(text_memory, phrases.context_mask, phrases.features)
        query_mask = phrase_mask.repeat_interleave(self.config.num_queries_per_phrase, dim=1)
        decoder_outputs = self.decoder(queries, query_positions, query_mask, memory, positions, mask, **kwargs)
        return RefTRModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            intermediate_hidden_states=decoder_outputs.intermediate_hidden_states,
            phrase_mask=phrase_mask,
            phrase_slots=phrases.slots,
            encoder_last_hidden_state=memory,
            feature_maps=image_features.feature_maps,
            image_features=image_features.pooler_output,
            image_mask=image_features.image_mask,
            pixel_mask=image_features.pixel_mask,
            image_index=image_index,
            encoder_position_embeddings=positions,
            encoder_mask=mask,
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


@auto_docstring(
    custom_intro="""
    RefTR for visual grounding: predicts a box, and a mask if `config.predict_masks`, for every phrase of a sentence.
    """
)
class RefTRForVisualGrounding(RefTRPreTrainedModel):
    def __init__(self, config: RefTRConfig):
        super().__init__(config)
        self.model = RefTRModel(config)
        self.box_head = RefTRBoxHead(config)
        # CODEPATH: published RES checkpoints have a mask head, REC and phrase grounding checkpoints do not
        if config.predict_masks:
            self.mask_head = RefTRMaskHead(config, self.model.backbone.channels)
        # CODEPATH: no published checkpoint has it; it tells phrases that refer to nothing, and which queries answer
        if config.predict_presence:
            self.presence_head = RefTRPresenceHead(config)
        self.loss_function = grounding_loss
        self.post_init()
        self.freeze_parameters()

    @property
    def frozen_modules(self) -> list[nn.Module]:
        """The modules whose parameters the configuration freezes completely."""
        # CODEPATH: no published checkpoint sets them; they train a head on a frozen grounding model
        modules = []
        if self.config.freeze_grounding or self.config.freeze_answers:
            modules += [self.model, self.box_head]
        if self.config.freeze_answers and self.config.predict_masks:
            modules.append(self.mask_head)
        return modules

    def freeze_parameters(self) -> None:
        """Stop training the first stages of the backbone, or all but some heads, as the configuration says."""
        self.model.freeze_parameters()
        for module in self.frozen_modules:
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Set the training mode. Completely frozen modules stay in evaluation mode."""
        super().train(mode)
        for module in self.frozen_modules:
            module.eval()
        return self

    @auto_docstring(custom_intro="Encode images, see [`RefTRModel.get_image_features`].")
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RefTRImageFeatures:
        r"""
        pixel_values (`torch.Tensor` of shape `(I, 3, H, W)`):
            Normalized images, padded at the bottom and right.
        pixel_mask (`torch.Tensor` of shape `(I, H, W)`, *optional*):
            1 for pixels of the image, 0 for padding.
        """
        return self.model.get_image_features(pixel_values, pixel_mask, **kwargs)

    def cache_text(self, max_tokens: int = 100_000) -> AbstractContextManager[TextCache]:
        """Return a context in which each text is encoded once, see [`RefTRModel.cache_text`]."""
        return self.model.cache_text(max_tokens)

    @can_return_tuple
    @auto_docstring(
        custom_intro="""
        Predict a box, and with `config.predict_masks` a mask, for every phrase.

        A call does not change the model, so that several threads may call it at once. Padding of texts and phrases and
        the grouping of sentences by image do not change an answer at a given size of the padded images. Padding of
        images does, a little, as published: convolutions and group norms read it. Batch images of similar size.
        """,
        custom_args=INPUTS_DOCSTRING + LABELS_DOCSTRING,
    )
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        phrase_input_ids: torch.Tensor | None = None,
        phrase_attention_mask: torch.Tensor | None = None,
        phrase_spans: torch.Tensor | None = None,
        phrase_index: torch.Tensor | None = None,
        labels: list[dict[str, torch.Tensor]] | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        image_features: RefTRImageFeatures | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RefTRVisualGroundingOutput:
        r"""
        Return the boxes, and the masks if configured, of all phrases.

        Returns:
            [`RefTRVisualGroundingOutput`]. If a token, an image index, a span or a phrase index is out of range, the
            answer is finite and `phrase_mask` is False: to raise an error, the host would have to wait for the device.

        Raises:
            ValueError: if shapes or counts do not fit together.

        Example:

        ```python
        >>> import torch
        >>> from modeling_reftr import RefTRConfig, RefTRForVisualGrounding

        >>> model = RefTRForVisualGrounding(
        ...     RefTRConfig(
        ...         backbone_config={"backbone": "test_resnet", "out_indices": [1, 2, 3, 4]},
        ...         text_config={"model_type": "bert", "num_hidden_layers": 1},
        ...         d_model=32,
        ...         encoder_layers=1,
        ...         decoder_layers=1,
        ...     )
        ... ).eval()
        >>> outputs = model(
        ...     pixel_values=torch.zeros(1, 3, 64, 96),
        ...     input_ids=torch.tensor([[101, 2417, 3608, 102], [101, 2630, 3608, 102]]),
        ...     image_index=torch.tensor([0, 0]),
        ... )
        >>> outputs.pred_boxes.shape
        torch.Size([2, 1, 4])

        ```"""
        outputs: RefTRModelOutput = self.model(
            pixel_values=pixel_values,
            pixel_mask=pixel_mask,
            input_ids=input_ids,
            attention_mask=attention_mask,
            image_index=image_index,
            phrase_input_ids=phrase_input_ids,
            phrase_attention_mask=phrase_attention_mask,
            phrase_spans=phrase_spans,
            phrase_index=phrase_index,
            image_features=image_features,
            return_dict=True,
            **kwargs,
        )
        num_text_tokens = input_ids.shape[1]
        query_boxes, query_boxes_of_earlier_layers = self.predict_boxes(outputs)
        presence_logits = self.predict_presence(outputs)
        targets = assigned = query_slots = None
        if labels is not None:
            targets = pad_targets(labels, outputs.phrase_mask)
            assigned = assign_targets(query_boxes, targets, self.config, presence_logits)
            if self.training and self.config.num_queries_per_phrase > 1:
                # only the masks of queries with a target have a loss; one is predicted if there are none
                query_slots = assigned.mask.flatten().nonzero().flatten()
                query_slots = query_slots if len(query_slots) else query_slots.new_zeros(1)
        query_masks, query_attentions = self.predict_masks(outputs, num_text_tokens, query_slots)
        best = None if self.config.num_queries_per_phrase == 1 else presence_logits.argmax(dim=-1)
        predictions = {
            "pred_boxes": select_queries(query_boxes, best),
            "pred_masks": None if query_masks is None else select_queries(query_masks, best),
        }
        # CODEPATH: published REC checkpoints are trained with it, RES checkpoints are not
        if self.config.auxiliary_loss:
            predictions["auxiliary_outputs"] = [
                {"pred_boxes": select_queries(boxes, best), **({} if best is None else {"query_boxes": boxes})}
                for boxes in query_boxes_of_earlier_layers
            ]
        # CODEPATH: no published checkpoint has it; without it, every phrase has one answer
        if self.config.predict_presence:
            predictions |= {
                "presence_logits": presence_logits,
                "query_boxes": query_boxes,
                "query_masks": query_masks,
            }
        loss, loss_dict = None, None
        if labels is not None:
            loss, loss_dict = self.loss_function(
                **predictions,
                phrase_mask=outputs.phrase_mask,
                labels=labels,
                targets=targets,
                assigned=assigned,
                config=self.config,
                pixel_mask=outputs.pixel_mask,
                image_index=outputs.image_index,
                num_items_in_batch=num_items_in_batch,
            )
        if self.config.predict_presence:
            predictions["presence"] = (presence_logits / self.config.presence_temperature).sigmoid()
            predictions["presence_threshold"] = presence_logits.new_full((), self.config.presence_threshold)
        if query_attentions is not None and kwargs.get("output_attentions", self.config.output_attentions):
            predictions["mask_attentions"] = select_queries(query_attentions, best)
        return RefTRVisualGroundingOutput(
            loss=loss,
            loss_dict=loss_dict,
            input_ids=input_ids,
            phrase_input_ids=phrase_input_ids,
            **predictions,
            **{name: getattr(outputs, name) for name in SHARED_OUTPUTS},
        )

    def predict_boxes(self, outputs: RefTRModelOutput) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the boxes (S, P, K, 4) of all queries, of the last decoder layer and of each earlier one."""
        layer_boxes = self.box_head(outputs.intermediate_hidden_states).float().sigmoid()
        layer_boxes = layer_boxes.to(outputs.phrase_mask.device)
        *earlier, last = layer_boxes.unflatten(2, (-1, self.config.num_queries_per_phrase))
        return last, earlier

    def predict_masks(
        self, outputs: RefTRModelOutput, num_text_tokens: int, query_slots: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """
        Return mask logits (S, P, K, h1, w1) of queries, and the attention maps (S, P, K, heads, h, w) that the mask
        head starts from; None without a mask head.

        Args:
            outputs ([`RefTRModelOutput`]): of the model without heads.
            num_text_tokens (`int`): L.
            query_slots (`torch.Tensor` of shape `(N,)`, *optional*):
                Flat indices `(sentence * P + slot) * K + query` of the queries, the masks of others are zero. Defaults
                to those of all real phrases.
        """
        # CODEPATH: published RES checkpoints have a mask head, the others do not
        if not self.config.predict_masks:
            return None, None
        num_queries = self.config.num_queries_per_phrase
        if query_slots is None and outputs.phrase_slots is not None:
            first = outputs.phrase_slots[:, None] * num_queries
            query_slots = (first + torch.arange(num_queries, device=first.device)).flatten()
            # a phrase out of range has one index for all of its queries
            query_slots = query_slots.clamp(max=outputs.phrase_mask.numel() * num_queries)
        pred_masks, mask_attentions = self.mask_head(
            outputs.last_hidden_state,
            outputs.image_features,
            outputs.encoder_last_hidden_state[:, num_text_tokens:],
            outputs.image_mask,
            outputs.feature_maps,
            outputs.image_index,
            query_slots,
        )
        pred_masks = pred_masks.float().to(outputs.phrase_mask.device)
        return tuple(values.unflatten(1, (-1, num_queries)) for values in (pred_masks, mask_attentions))

    def predict_presence(self, outputs: RefTRModelOutput) -> torch.Tensor | None:
        """Return the logits (S, P, K) that the boxes of queries are answers; None without a presence head."""
        # CODEPATH: no published checkpoint has a presence head
        if not self.config.predict_presence:
            return None
        logits = self.presence_head(
            outputs.last_hidden_state,
            outputs.encoder_last_hidden_state,
            outputs.encoder_position_embeddings,
            outputs.encoder_mask,
        )
        return logits.float().to(outputs.phrase_mask.device).unflatten(1, (-1, self.config.num_queries_per_phrase))


def select_queries(values: torch.Tensor, best: torch.Tensor | None) -> torch.Tensor:
    """
    Return the values of one query per phrase.

    Args:
        values (`torch.Tensor` of shape `(S, P, K, ...)`): of all queries.
        best (`torch.Tensor` of shape `(S, P)`, *optional*): the query to select; absent: the only one.

    Returns:
        `torch.Tensor` of shape `(S, P, ...)`.
    """
    if best is None:
        return values[:, :, 0]
    index = best.reshape(*best.shape, *[1] * (values.ndim - 2)).expand(-1, -1, 1, *values.shape[3:])
    return values.gather(2, index)[:, :, 0]


RefTRModel.register_for_auto_class("AutoModel")
RefTRForVisualGrounding.register_for_auto_class("AutoModelForZeroShotObjectDetection")

__all__ = ["RefTRForVisualGrounding", "RefTRImageFeatures", "RefTRModel", "RefTRPreTrainedModel"]
