"""RefTR: boxes (and masks) from an image and words, after "Referring Transformer", Li & Sigal, NeurIPS 2021."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoModel
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
from transformers.utils import ModelOutput, TransformersKwargs, is_timm_available, requires_backends
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_reftr import RefTRConfig
from .fusing_reftr import fused_copy
from .loading_reftr import CONFIG_FILES, WEIGHT_FILES, check_index, naming_files
from .loss_reftr import grounding_loss
from .quoting_reftr import quote
from .saving_reftr import apply_default_permissions
from .text_cache_reftr import TextCache, active_text_cache


if TYPE_CHECKING:
    # saving copies the files that this one names: so does the pipeline come into a model's folder
    from .pipeline_reftr import VisualGroundingPipeline  # noqa: F401

if is_timm_available():
    from timm.layers import freeze_batch_norm_2d


# I images, S sentences, P phrase slots a sentence, L tokens a sentence, d = config.d_model, h x w cells of the last
# feature map. An image token is one of its cells. Boxes are in the image without its padding.


@dataclass
class RefTRImageFeatures(BaseModelOutputWithPooling):
    """
    Image features that do not depend on the text.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(I, h * w, channels)`):
            The backbone's last feature map as a sequence of image tokens.
        pooler_output (`torch.Tensor` of shape `(I, h * w, d)`):
            The same projected to the model's width, which the encoder reads.
        hidden_states (`tuple[torch.Tensor]`, *optional*, with `output_hidden_states=True`):
            The backbone's hidden states; of a timm backbone, its feature maps.
        attentions (`tuple[torch.Tensor]`, *optional*, with `output_attentions=True`):
            The backbone's attention weights; of a timm backbone, none.
        feature_maps (`tuple[torch.Tensor]`):
            The backbone's feature maps, each (I, channels, height, width).
        image_position_embeddings (`torch.Tensor` of shape `(I, h * w, d)`):
            Positions of the image tokens, without the level and token-type embeddings.
        image_mask (`torch.Tensor` of shape `(I, h * w)`):
            True for cells of the picture, False for padding.
        pixel_mask (`torch.Tensor` of shape `(I, H, W)`):
            1 for the picture, 0 for padding.
    """

    feature_maps: tuple[torch.Tensor, ...] | None = None
    image_position_embeddings: torch.Tensor | None = None
    image_mask: torch.Tensor | None = None
    pixel_mask: torch.Tensor | None = None


@dataclass
class RefTRDecoderOutput(BaseModelOutputWithCrossAttentions):
    """
    Args:
        intermediate_hidden_states (`torch.Tensor` of shape `(decoder_layers, S, P, d)`):
            Every layer's output behind the shared final layer norm.
    """

    intermediate_hidden_states: torch.Tensor | None = None


@dataclass
class RefTRModelOutput(ModelOutput):
    """
    Args:
        last_hidden_state (`torch.Tensor` of shape `(S, P, d)`):
            The decoder's output, a vector a phrase.
        intermediate_hidden_states (`torch.Tensor` of shape `(decoder_layers, S, P, d)`):
            Every decoder layer's output behind the shared final layer norm.
        phrase_mask (`torch.Tensor` of shape `(S, P)`):
            True for real phrases, False for padding.
        phrase_places (`torch.Tensor` of shape `(N,)`, *optional*, returned for several phrases):
            The slots that were encoded, `sentence * P + slot`, or `S * P` where `phrase_index` points nowhere.
        encoder_last_hidden_state (`torch.Tensor` of shape `(S, L + h * w, d)`):
            The encoder's output, text tokens first, then image tokens.
        feature_maps (`tuple[torch.Tensor]`):
            The backbone's feature maps, each (I, channels, height, width).
        image_features (`torch.Tensor` of shape `(I, h * w, d)`):
            The last feature map projected to the model's width.
        image_mask (`torch.Tensor` of shape `(I, h * w)`):
            True for cells of the picture, False for padding.
        pixel_mask (`torch.Tensor` of shape `(I, H, W)`):
            1 for the picture, 0 for padding.
        image_index (`torch.Tensor` of shape `(S,)`, *optional*):
            The image each sentence was read with: the input, 0 where that points nowhere.
        decoder_hidden_states, decoder_attentions, cross_attentions, encoder_hidden_states, encoder_attentions
            (`tuple[torch.Tensor]`, *optional*): each layer's, on request.
    """

    last_hidden_state: torch.Tensor | None = None
    intermediate_hidden_states: torch.Tensor | None = None
    phrase_mask: torch.Tensor | None = None
    phrase_places: torch.Tensor | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
    feature_maps: tuple[torch.Tensor, ...] | None = None
    image_features: torch.Tensor | None = None
    image_mask: torch.Tensor | None = None
    pixel_mask: torch.Tensor | None = None
    image_index: torch.Tensor | None = None
    decoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    decoder_attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
    encoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    encoder_attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class RefTRVisualGroundingOutput(ModelOutput):
    """
    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, returned with `labels`):
            Weighted sum of `loss_dict`.
        loss_dict (`dict[str, torch.Tensor]`, *optional*, returned with `labels`):
            `loss_bbox` and `loss_giou`, and the same with `_0`, `_1`, ... for the earlier decoder layers; with masks
            also `loss_mask` (focal) and `loss_dice`.
        pred_boxes (`torch.Tensor` of shape `(S, P, 4)`):
            (center_x, center_y, width, height) in 0..1 of the picture without its padding, for every phrase slot.
            What stands in padding slots means nothing: see `phrase_mask`.
        phrase_mask (`torch.Tensor` of shape `(S, P)`):
            True for real phrases, False for padding.
        auxiliary_outputs (`list[dict[str, torch.Tensor]]`, *optional*, returned if `config.auxiliary_loss`):
            `pred_boxes` of each earlier decoder layer.
        pred_masks (`torch.Tensor` of shape `(S, P, h1, w1)`, *optional*, returned if `config.predict_masks`):
            Logits of each phrase's mask over the whole padded picture, at the size of the backbone's fourth to last
            feature map (a quarter of the picture for a ResNet).
        mask_attentions (`torch.Tensor` of shape `(S, P, heads, h, w)`, *optional*, with `output_attentions=True`):
            The maps that the mask head starts from; heads and cells together sum to 1.
        image_index, input_ids, phrase_input_ids, pixel_mask (`torch.Tensor`, *optional*):
            The inputs of these names, for the processor's post-processing.
        last_hidden_state, intermediate_hidden_states, encoder_last_hidden_state, decoder_hidden_states,
            decoder_attentions, cross_attentions, encoder_hidden_states, encoder_attentions: see [`RefTRModelOutput`].
    """

    loss: torch.Tensor | None = None
    loss_dict: dict[str, torch.Tensor] | None = None
    pred_boxes: torch.Tensor | None = None
    phrase_mask: torch.Tensor | None = None
    auxiliary_outputs: list[dict[str, torch.Tensor]] | None = None
    pred_masks: torch.Tensor | None = None
    mask_attentions: torch.Tensor | None = None
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


def expand_attention_mask(config, inputs_embeds, attention_mask, encoder_hidden_states=None):
    """
    A (batch, tokens) mask, 1 = may be seen, in the form that the attention implementation reads. It is never left out
    where nothing is masked: to find that out the host would wait for the device.
    """
    return create_bidirectional_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        encoder_hidden_states=encoder_hidden_states,
        allow_is_bidirectional_skip=False,
    )


def scatter_phrases(values: torch.Tensor, places: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """
    Lay values of phrases into their slots, zero elsewhere.

    Args:
        values (`torch.Tensor` of shape `(N, ...)`): one a phrase.
        places (`torch.Tensor` of shape `(N,)`): `sentence * P + slot` of each, or `S * P`, which is left out.
        shape (`(S, P)`): sentences and slots.

    Returns:
        `torch.Tensor` of shape `(S, P, ...)`
    """
    slots = values.new_zeros(shape[0] * shape[1] + 1, *values.shape[1:]).index_put((places,), values)
    return slots[:-1].unflatten(0, shape)


class RefTRSinePositionEmbedding(nn.Module):
    """
    Sines and cosines of the cell's place in the *valid* part of the image, with a half-cell offset that DETR's
    embedding does not have. A row or column that is all padding gives angles near -3e6: they are part of the
    published model, whose mask head reads padded cells.
    """

    def __init__(self, config: RefTRConfig):
        super().__init__()
        self.num_features = config.d_model // 2
        self.temperature = config.position_embedding_temperature

    def forward(self, mask: torch.Tensor) -> torch.Tensor:
        """`mask` (I, h, w), True = picture -> (I, h * w, d), y features first, always in float32."""
        feature = torch.arange(self.num_features, device=mask.device)
        frequencies = self.temperature ** (2 * (feature // 2).float() / self.num_features)
        embeddings = []
        for axis in (1, 2):
            place = mask.cumsum(axis, dtype=torch.float32)
            place = (place - 0.5) / (place.narrow(axis, -1, 1) + 1e-6) * 2 * math.pi
            angles = place[..., None] / frequencies
            embeddings.append(torch.stack((angles[..., 0::2].sin(), angles[..., 1::2].cos()), dim=-1).flatten(-2))
        return torch.cat(embeddings, dim=-1).flatten(1, 2)


class RefTRLearnedPositionEmbedding(nn.Module):
    """A learned vector for each column and row, column half first."""

    def __init__(self, config: RefTRConfig):
        super().__init__()
        self.row_embeddings = nn.Embedding(config.max_image_positions, config.d_model // 2)
        self.column_embeddings = nn.Embedding(config.max_image_positions, config.d_model // 2)

    def forward(self, mask: torch.Tensor) -> torch.Tensor:
        """`mask` (I, h, w) -> (I, h * w, d). Raises ValueError if the feature map has more rows than embeddings."""
        batch_size, height, width = mask.shape
        limit = self.row_embeddings.num_embeddings
        if max(height, width) > limit:
            raise ValueError(
                f"A feature map of {height} x {width} has no learned positions past max_image_positions={limit}; "
                "use smaller pictures or position_embedding_type='sine'."
            )
        columns = self.column_embeddings(torch.arange(width, device=mask.device)).expand(height, width, -1)
        rows = self.row_embeddings(torch.arange(height, device=mask.device))[:, None].expand(height, width, -1)
        return torch.cat((columns, rows), dim=-1).flatten(0, 1).expand(batch_size, -1, -1)


class RefTRProjection(nn.Module):
    """Two linear layers, each with layer norm and ReLU, and dropout between them."""

    def __init__(self, config: RefTRConfig, input_size: int):
        super().__init__()
        self.linear1 = nn.Linear(input_size, config.d_model)
        self.layer_norm1 = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.linear2 = nn.Linear(config.d_model, config.d_model)
        self.layer_norm2 = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., input_size) -> (..., d)."""
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
    """Attention with its weights written out, the fallback of `ALL_ATTENTION_FUNCTIONS`."""
    attention_weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        attention_weights = attention_weights + attention_mask
    attention_weights = nn.functional.softmax(attention_weights, dim=-1)
    attention_weights = nn.functional.dropout(attention_weights, p=dropout, training=module.training)
    return torch.matmul(attention_weights, value).transpose(1, 2).contiguous(), attention_weights


class RefTRAttention(nn.Module):
    """Multi-head attention, to itself or to other states. Positions are added to queries and keys, not to values."""

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
        Args:
            hidden_states, position_embeddings (`torch.Tensor` of shape `(batch, queries, d)`): what asks.
            key_value_states, key_position_embeddings (`torch.Tensor` of shape `(batch, keys, d)`, *optional*):
                What is looked at. Absent: the queries themselves.
            attention_mask (*optional*): as `expand_attention_mask` makes it.

        Returns:
            `tuple`: new states (batch, queries, d), and the weights (batch, heads, queries, keys) where the attention
            implementation gives them.
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
    """The feed-forward block of a layer."""

    def __init__(self, config: RefTRConfig, ffn_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(config.d_model, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, config.d_model)
        self.activation = ACT2FN[config.activation_function]
        self.activation_dropout = nn.Dropout(config.activation_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., d)."""
        return self.fc2(self.activation_dropout(self.activation(self.fc1(hidden_states))))


class RefTREncoderLayer(GradientCheckpointingLayer):
    """Post-norm self-attention and feed-forward over text and image tokens."""

    def __init__(self, config: RefTRConfig):
        super().__init__()
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
        """States and positions (S, L + h * w, d), mask as `expand_attention_mask` makes it -> states."""
        attention_output, _ = self.self_attn(
            hidden_states, position_embeddings, attention_mask=attention_mask, **kwargs
        )
        hidden_states = self.self_attn_layer_norm(hidden_states + self.dropout(attention_output))
        return self.final_layer_norm(hidden_states + self.dropout(self.mlp(hidden_states)))


class RefTRDecoderLayer(GradientCheckpointingLayer):
    """Post-norm self-attention among phrases, cross-attention to the encoder's output, feed-forward."""

    def __init__(self, config: RefTRConfig):
        super().__init__()
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
        """States and positions (S, P, d), the memory's (S, L + h * w, d), masks of both -> states (S, P, d)."""
        attention_output, _ = self.self_attn(
            hidden_states, position_embeddings, attention_mask=attention_mask, **kwargs
        )
        hidden_states = self.self_attn_layer_norm(hidden_states + self.dropout(attention_output))
        attention_output, _ = self.cross_attn(
            hidden_states,
            position_embeddings,
            key_value_states=encoder_hidden_states,
            key_position_embeddings=encoder_position_embeddings,
            attention_mask=encoder_attention_mask,
            **kwargs,
        )
        hidden_states = self.cross_attn_layer_norm(hidden_states + self.dropout(attention_output))
        return self.final_layer_norm(hidden_states + self.dropout(self.mlp(hidden_states)))


class RefTRQueryEncoder(nn.Module):
    """Makes the decoder's input and query position of each phrase from its words and their context."""

    def __init__(self, config: RefTRConfig):
        super().__init__()
        self.context_query = nn.Linear(config.d_model, config.d_model)
        self.context_key = nn.Linear(config.d_model, config.d_model)
        self.context_value = nn.Linear(config.d_model, config.d_model)
        self.context_projection = nn.Linear(config.d_model, config.d_model)
        self.context_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.fusion = RefTRProjection(config, 2 * config.d_model)
        self.query_embedding = nn.Embedding(1, 2 * config.d_model)

    def forward(
        self, text_memory: torch.Tensor, context_mask: torch.Tensor, phrase_features: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            text_memory (`torch.Tensor` of shape `(S, L, d)`): the encoder's output at the text positions.
            context_mask (`torch.Tensor` of shape `(S, P, L)`): True for the tokens that a phrase may see, one or more.
            phrase_features (`torch.Tensor` of shape `(S, P, d)`): the phrases by themselves.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: decoder input and query position, each (S, P, d).
        """
        sentence_token = text_memory[:, :1]
        scores = self.context_query(sentence_token) @ self.context_key(text_memory).transpose(1, 2)
        scores = scores.float().masked_fill(~context_mask, -torch.inf)
        context = scores.softmax(dim=-1).to(text_memory.dtype) @ self.context_value(text_memory)
        context = self.context_layer_norm(self.context_projection(context)) + sentence_token
        fused = self.fusion(torch.cat((context, phrase_features), dim=-1))
        query_embedding = self.query_embedding(torch.zeros(1, dtype=torch.long, device=fused.device))
        return (torch.cat((fused, fused), dim=-1) + query_embedding).chunk(2, dim=-1)


class RefTRBoxHead(nn.Module):
    """Three linear layers from a phrase's state to the logits of its box; the last starts at zero, as published."""

    def __init__(self, config: RefTRConfig):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(config.d_model, output_size) for output_size in (config.d_model, config.d_model, 4)
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., 4): logits of (center_x, center_y, width, height)."""
        for layer in self.layers[:-1]:
            hidden_states = layer(hidden_states).relu()
        return self.layers[-1](hidden_states)


class RefTRMaskHead(nn.Module):
    """
    Masks of phrases: an attention map of each over the image, then 3x3 convolutions that take up one finer feature map
    of the backbone after the other, each half as wide as the one before.
    """

    def __init__(self, config: RefTRConfig, backbone_channels: list[int]):
        super().__init__()
        if len(backbone_channels) < 4:
            raise ValueError(
                f"predict_masks=True reads four feature maps, the backbone gives {len(backbone_channels)}; set "
                "backbone_config.out_indices to its last four stages."
            )
        self.num_heads = config.decoder_attention_heads
        self.scaling = (config.d_model // self.num_heads) ** -0.5
        self.query_projection = nn.Linear(config.d_model, config.d_model)
        self.key_projection = nn.Linear(config.d_model, config.d_model)
        # image, memory and attention maps side by side, then from the coarsest feature map to the finest
        widths = [2 * config.d_model + self.num_heads] + [config.d_model // divisor for divisor in (2, 4, 8, 16)]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)
            for inputs, outputs in zip([widths[0], *widths], widths, strict=False)
        )
        self.norms = nn.ModuleList(
            nn.GroupNorm(math.gcd(config.mask_head_group_norm_groups, width), width) for width in widths
        )
        self.adapters = nn.ModuleList(
            nn.Conv2d(channels, width, kernel_size=1)
            for channels, width in zip(backbone_channels[-2:-5:-1], widths[1:4], strict=True)
        )
        self.output_convolution = nn.Conv2d(widths[-1], 1, kernel_size=3, padding=1)

    def forward(
        self,
        queries: torch.Tensor,
        image_features: torch.Tensor,
        image_memory: torch.Tensor,
        image_mask: torch.Tensor,
        feature_maps: tuple[torch.Tensor, ...],
        image_index: torch.Tensor | None = None,
        phrase_places: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            queries (`torch.Tensor` of shape `(S, P, d)`): the decoder's output.
            image_features (`torch.Tensor` of shape `(I, h * w, d)`): the projected image.
            image_memory (`torch.Tensor` of shape `(S, h * w, d)`): the encoder's output at the image tokens.
            image_mask (`torch.Tensor` of shape `(I, h * w)`):
                True for the picture. Padding gets no attention; convolutions and group norms read it, as published.
            feature_maps (`tuple[torch.Tensor]`): the backbone's, each (I, channels, height, width).
            image_index (`torch.Tensor` of shape `(S,)`, *optional*): the image of each sentence; absent: in order.
            phrase_places (`torch.Tensor` of shape `(N,)`, *optional*):
                The slots to make masks for, see [`RefTRModelOutput`]; absent: all.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: logits (S, P, h1, w1), and attention maps (S, P, heads, h, w), zero in
            slots that no mask was made for.
        """
        shape, size = queries.shape[:2], feature_maps[-1].shape[-2:]
        if phrase_places is None:
            phrase_places = torch.arange(shape[0] * shape[1], device=queries.device)
        # N phrases from here on
        rows = phrase_places.clamp(max=shape[0] * shape[1] - 1)
        sentence = rows // shape[1]
        image = sentence if image_index is None else image_index[sentence]

        queries = self.query_projection(queries.flatten(0, 1)[rows]).unflatten(-1, (self.num_heads, -1))
        keys = self.key_projection(image_memory).unflatten(-1, (self.num_heads, -1))[sentence]
        scores = torch.einsum("phc,pnhc->phn", queries * self.scaling, keys).float()
        # where a picture is all padding, all of it is seen: a softmax over nothing is not a number
        is_seen = (image_mask | ~image_mask.any(dim=-1, keepdim=True))[image]
        scores = scores.masked_fill(~is_seen[:, None], -torch.inf)
        attentions = scores.flatten(1).softmax(dim=-1).to(queries.dtype).unflatten(1, (self.num_heads, *size))

        states = torch.cat((image_features[image], image_memory[sentence]), dim=-1).transpose(1, 2).unflatten(-1, size)
        states = torch.cat((states, attentions), dim=1)
        for convolution, norm in zip(self.convolutions[:2], self.norms[:2], strict=True):
            states = norm(convolution(states)).relu()
        for feature_map, adapter, convolution, norm in zip(
            feature_maps[-2:-5:-1], self.adapters, self.convolutions[2:], self.norms[2:], strict=True
        ):
            states = nn.functional.interpolate(states, size=feature_map.shape[-2:], mode="nearest")
            states = norm(convolution(states + adapter(feature_map)[image])).relu()
        logits = self.output_convolution(states)[:, 0]
        return tuple(scatter_phrases(values, phrase_places, shape) for values in (logits, attentions))


class RefTRPreTrainedModel(PreTrainedModel):
    """What RefTR can do within transformers, how its weights start, and how a checkpoint is loaded."""

    config: RefTRConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    # those that add what several of their parts give, and no forward of ours brings to one device
    _no_split_modules = [
        "RefTREncoderLayer",
        "RefTRDecoderLayer",
        "RefTRLearnedPositionEmbedding",
        "RefTRQueryEncoder",
        "RefTRMaskHead",
        "TimmBackbone",
    ]
    _supports_sdpa = True
    # no Flash Attention: of a padding mask over the memory, the library's path hides the decoder's last queries
    _supports_flash_attn = False
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected = [r"num_batches_tracked"]
    is_fused = False  # True for what `fused_copy` returns

    def save_pretrained(self, save_directory, *args, **kwargs):
        """
        Save the model as the library does; others may read its weights where the umask lets them read files.

        Raises:
            ValueError: if the model is a fused copy, whose weights `from_pretrained` could not read.
        """
        if self.is_fused:
            raise ValueError(
                "A fused copy has no batch norms of its own that could be saved: save the model that it was made of."
            )
        super().save_pretrained(save_directory, *args, **kwargs)
        apply_default_permissions(Path(save_directory).glob("*model*.safetensors"))

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False):
        # For code outside of the library it passes over modules whose parameters all lie in their children. It need
        # not: `_init_weights` asks each parameter whether it was loaded.
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """As published: PyTorch's defaults but where a case below says otherwise."""
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
                # published as one (3d, d) matrix, whose fans give a bound smaller by sqrt(2)
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

    def freeze_parameters(self):
        """Stop training what the configuration freezes."""
        if self.base_model is not self:
            self.base_model.freeze_parameters()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """
        See `PreTrainedModel.from_pretrained`, which thaws every parameter; frozen stages are frozen again. Weights are
        read from safetensors alone: a pickle, which others would have written, can claim any size.

        Raises:
            ValueError: if a file is damaged, naming it.
            OSError: if there is no model.
        """
        source = pretrained_model_name_or_path
        with naming_files(source, CONFIG_FILES + WEIGHT_FILES, kwargs):
            if source is not None:
                check_index(source, kwargs.get("subfolder"))
            loaded = super().from_pretrained(source, *model_args, **{**kwargs, "use_safetensors": True})
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.freeze_parameters()
        return loaded

    def fused_copy(self):
        """
        Return a copy for inference that is faster and gives the same answers but for rounding: the batch norms of the
        image backbone are folded into its convolutions, which are laid out channels last.

        The copy is in evaluation mode, without gradients, not compiled, and shares nothing with this model, which may
        be training or answering in another thread. Its state dict is its own: without the folded norms. It cannot be
        saved for `from_pretrained`; save the model that it was made of.

        Returns:
            The copy.

        Raises:
            ValueError: if weights of the model are offloaded: fuse first, then offload the copy.
        """
        return fused_copy(self)


class RefTREncoder(RefTRPreTrainedModel):
    """The visual-language encoder, over text tokens and image tokens together."""

    _can_record_outputs = {
        "hidden_states": OutputRecorder(RefTREncoderLayer, num_hidden_layers_key="encoder_layers"),
        "attentions": OutputRecorder(RefTRAttention, index=1),
    }

    def __init__(self, config: RefTRConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(RefTREncoderLayer(config) for _ in range(config.encoder_layers))
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        inputs_embeds: torch.Tensor,
        position_embeddings: torch.Tensor,
        attention_mask: torch.Tensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """
        Args:
            inputs_embeds (`torch.Tensor` of shape `(S, L + h * w, d)`): text tokens, then image tokens.
            position_embeddings (`torch.Tensor` of shape `(S, L + h * w, d)`): their positions.
            attention_mask (`torch.Tensor` of shape `(S, L + h * w)`): 1 for real tokens, 0 for padding.
        """
        hidden_states = inputs_embeds
        attention_mask = expand_attention_mask(self.config, inputs_embeds, attention_mask)
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_embeddings, attention_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states)


class RefTRDecoder(RefTRPreTrainedModel):
    """The query decoder, one query a phrase."""

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
        """
        Args:
            inputs_embeds (`torch.Tensor` of shape `(S, P, d)`): the queries, one a phrase.
            position_embeddings (`torch.Tensor` of shape `(S, P, d)`): their positions.
            attention_mask (`torch.Tensor` of shape `(S, P)`): which queries the others may see, one or more.
            encoder_hidden_states (`torch.Tensor` of shape `(S, L + h * w, d)`): the encoder's output.
            encoder_position_embeddings (`torch.Tensor` of shape `(S, L + h * w, d)`): its positions.
            encoder_attention_mask (`torch.Tensor` of shape `(S, L + h * w)`): 1 for real tokens, 0 for padding.
        """
        hidden_states = inputs_embeds
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
            # the norm is applied to a copy: the next layer reads the states without it
            intermediate_hidden_states.append(self.layer_norm(hidden_states))
        return RefTRDecoderOutput(
            last_hidden_state=intermediate_hidden_states[-1],
            intermediate_hidden_states=torch.stack(intermediate_hidden_states),
        )


class RefTRModel(RefTRPreTrainedModel):
    """Image backbone, text backbone, visual-language encoder, query encoder and query decoder, without a head."""

    def __init__(self, config: RefTRConfig):
        super().__init__(config)
        self.backbone = load_backbone(config)
        if config.freeze_backbone_batch_norm:
            requires_backends(self, "timm")
            self.backbone = freeze_batch_norm_2d(self.backbone)
        self.image_projection = nn.Sequential(
            nn.Conv2d(self.backbone.channels[-1], config.d_model, kernel_size=1),
            nn.GroupNorm(config.projection_group_norm_groups, config.d_model),
        )
        if config.position_embedding_type == "learned":
            self.image_position_embedding = RefTRLearnedPositionEmbedding(config)
        else:
            self.image_position_embedding = RefTRSinePositionEmbedding(config)

        self.text_backbone = AutoModel.from_config(config.text_config, trust_remote_code=False)
        if getattr(self.text_backbone, "pooler", None) is None:
            raise ValueError(
                f"text_config.model_type={quote(config.text_config.model_type)} has no pooled output, which "
                "RefTR reads the phrases from; use an encoder that has one, for example bert or roberta."
            )
        self.text_projection = RefTRProjection(config, config.text_config.hidden_size)
        self.phrase_projection = RefTRProjection(config, config.text_config.hidden_size)

        self.text_position_embeddings = nn.Embedding(config.max_text_positions, config.d_model)
        self.token_type_embeddings = nn.Embedding(2, config.d_model)  # row 0: text, row 1: image
        self.level_embedding = nn.Parameter(torch.empty(1, config.d_model))
        self.encoder = RefTREncoder(config)
        self.query_encoder = RefTRQueryEncoder(config)
        self.decoder = RefTRDecoder(config)
        self.post_init()
        self.freeze_parameters()

    def get_input_embeddings(self) -> nn.Module:
        """The text backbone's word embeddings."""
        return self.text_backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        """Replace the text backbone's word embeddings; `config.text_config.vocab_size` follows."""
        self.text_backbone.set_input_embeddings(value)
        self.config.text_config.vocab_size = value.num_embeddings

    def freeze_parameters(self):
        """
        Stop training the backbone's stem and its first `config.num_frozen_backbone_stages` stages (0: nothing).

        Raises:
            ValueError: if the backbone has fewer stages or does not tell where they end.
        """
        num_stages = self.config.num_frozen_backbone_stages
        if num_stages == 0:
            return
        if hasattr(self.backbone, "_backbone"):  # timm; what it gives at stride 2 is the stem
            feature_info = self.backbone._backbone.feature_info.info
            stages = [stage["module"] for stage in feature_info if stage["reduction"] > 2]
            stages = [name for stage in stages for name in (stage, stage.replace(".", "_"))]
            last_modules = [name for name, _ in self.backbone._backbone.named_modules() if name in stages]
            prefix = "_backbone."
        else:
            encoder = self.backbone.get_submodule("encoder") if hasattr(self.backbone, "encoder") else nn.Module()
            lists = [name for name, module in encoder.named_children() if isinstance(module, nn.ModuleList)]
            last_modules = [
                f"{name}.{index}" for name in lists[:1] for index in range(len(encoder.get_submodule(name)))
            ]
            prefix = "encoder."
        if num_stages > len(last_modules):
            raise ValueError(
                f"num_frozen_backbone_stages={num_stages}, but {len(last_modules)} stages were found in the backbone "
                f"{type(self.backbone).__name__}; give a number up to that, 0 to train all of it."
            )
        # a backbone registers its parameters in the order in which it uses them
        last_module = f"{prefix}{last_modules[num_stages - 1]}."
        parameters = list(self.backbone.named_parameters())
        end = 1 + max(index for index, (name, _) in enumerate(parameters) if name.startswith(last_module))
        for _, parameter in parameters[:end]:
            parameter.requires_grad_(False)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RefTRImageFeatures:
        """
        Encode images, once for all that is asked about them.

        Args:
            pixel_values (`torch.Tensor` of shape `(I, 3, H, W)`): normalised pictures, padded bottom and right.
            pixel_mask (`torch.Tensor` of shape `(I, H, W)`, *optional*): 1 for the picture, 0 for padding.
            output_hidden_states, output_attentions, return_dict (`bool`, *optional*): see `ModelOutput`.

        Returns:
            [`RefTRImageFeatures`], or a tuple with `return_dict=False`.

        Raises:
            ValueError: if the shapes do not fit together.
        """
        if pixel_values.ndim != 4:
            raise ValueError(
                f"pixel_values must be (images, channels, height, width), got {tuple(pixel_values.shape)}."
            )
        if pixel_mask is None:
            pixel_mask = pixel_values.new_ones((pixel_values.shape[0], *pixel_values.shape[-2:]), dtype=torch.long)
        if pixel_mask.shape != (pixel_values.shape[0], *pixel_values.shape[-2:]):
            raise ValueError(
                f"pixel_mask {tuple(pixel_mask.shape)} does not fit pixel_values {tuple(pixel_values.shape)}: it must "
                "be (images, height, width)."
            )
        wants_states = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        wants_attentions = kwargs.get("output_attentions", self.config.output_attentions)
        # timm's wrapper raises when asked for attentions, and changes itself during a call that asks for hidden states
        is_timm = hasattr(self.backbone, "_backbone")
        outputs = self.backbone(
            pixel_values.to(self.dtype),
            output_hidden_states=False if is_timm else wants_states,
            output_attentions=False if is_timm else wants_attentions,
            return_dict=True,
        )
        feature_maps = outputs[0]  # by position: timm's wrapper gives a tuple where its own configuration says so
        if is_timm:
            hidden_states = feature_maps if wants_states else None
            attentions = () if wants_attentions else None
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

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor):
        """
        Encode (N, L) tokens with their mask by the text backbone, or by the cache within `cache_text`.

        Returns:
            The text backbone's output: last_hidden_state (N, L, text width) and pooler_output (N, text width).
        """
        # a compiled graph has no part in it: the cache looks token ids up on the host
        cache = None if torch.compiler.is_compiling() else self._text_cache
        return (cache or self._encode_text)(input_ids, attention_mask)

    @property
    def _text_cache(self) -> TextCache | None:
        return active_text_cache(self)

    def _encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor):
        if self.text_backbone._supports_attention_backend:
            # such a backbone takes a mask that is ready, and would wait for the device to make its own
            embeds = torch.empty((), dtype=self.dtype, device=input_ids.device).expand(*input_ids.shape, 1)
            attention_mask = expand_attention_mask(self.text_backbone.config, embeds, attention_mask)
        return self.text_backbone(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)

    def cache_text(self, max_tokens: int = 100_000):
        """
        Return a context within which a sentence or phrase that comes again does not go through the text backbone
        again: for inference with weights that stay as they are. Answers are the same but for rounding.

        It holds for the calls of the thread (or asynchronous task) that entered it; the model is not changed, and
        calls from other threads are as without it. What is compiled does not use it.

        Args:
            max_tokens (`int`, *optional*, defaults to 100,000):
                How many tokens' states are held, 4 bytes times the text width each (BERT-base: 307 MB in all).

        Returns:
            A context manager, which gives the [`TextCache`].

        Raises:
            ValueError: if gradients are on or the model is in training mode.
        """
        if self.training or torch.is_grad_enabled():
            raise ValueError("cache_text() is for inference: call model.eval(), and use it within torch.no_grad().")
        return TextCache(self._encode_text, max_tokens).active_for(self)

    def known_tokens(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (..., L) that can be looked up, and which texts (...) hold no real token outside the vocabulary."""
        # not the embedding's own size: adapters wrap the embedding in modules without one
        is_known = (input_ids >= 0) & (input_ids < self.config.text_config.vocab_size)
        return input_ids.where(is_known, 0), (is_known | ~attention_mask.bool()).all(dim=-1)

    def encode_phrases(
        self,
        phrase_input_ids: torch.Tensor,
        phrase_attention_mask: torch.Tensor,
        phrase_mask: torch.Tensor,
        phrase_index: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Run the real phrases alone through the text backbone.

        Args:
            phrase_input_ids, phrase_attention_mask (`torch.Tensor` of shape `(S, P, Lp)`): the phrases by themselves.
            phrase_mask (`torch.Tensor` of shape `(S, P)`): True for real phrases.
            phrase_index (`torch.Tensor` of shape `(N, 2)`, *optional*): sentence and slot of the phrases to encode.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: features (S, P, d), zero where nothing was encoded, and the places
            (N,) of what was, see [`RefTRModelOutput`].
        """
        if phrase_index is None:
            # where no phrase is real, the first slot stands in: the text backbone does not take an empty batch
            encoded = phrase_mask.clone()
            encoded[:1, :1] |= ~phrase_mask.any()
            phrase_index = encoded.nonzero()
        (num_sentences, num_slots), (sentence, slot) = phrase_mask.shape, phrase_index.unbind(1)
        is_slot = (sentence >= 0) & (sentence < num_sentences) & (slot >= 0) & (slot < num_slots)
        places = torch.where(is_slot, sentence * num_slots + slot, num_sentences * num_slots)
        rows = places.clamp(max=num_sentences * num_slots - 1)
        pooled = self.encode_text(
            phrase_input_ids.flatten(0, 1)[rows], phrase_attention_mask.flatten(0, 1)[rows]
        ).pooler_output
        return scatter_phrases(self.phrase_projection(pooled).to(places.device), places, phrase_mask.shape), places

    @can_return_tuple
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
        """
        See [`RefTRForVisualGrounding.forward`] for the arguments.

        Returns:
            [`RefTRModelOutput`]

        Raises:
            ValueError: if shapes or counts do not fit together.
        """
        kwargs.pop("token_type_ids", None)  # tokenizers make them; a sentence of RefTR is one segment
        if kwargs.pop("inputs_embeds", None) is not None:  # adapters of other tasks give None
            raise ValueError("`inputs_embeds` is not supported: give `input_ids` of shape (sentences, tokens).")
        if input_ids is None:
            raise ValueError("RefTR answers words: give input_ids of shape (sentences, tokens).")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if (pixel_values is None) == (image_features is None):
            raise ValueError("RefTR looks at pictures: give either pixel_values or image_features.")
        if pixel_values is None and pixel_mask is not None:
            raise ValueError("pixel_mask belongs to pixel_values; image_features hold the one they were made with.")
        if not isinstance(image_features, RefTRImageFeatures | None):
            raise ValueError(
                f"`image_features` must be what `get_image_features(..., return_dict=True)` returns, got "
                f"{type(image_features).__name__}."
            )
        # the backbones: images once each, sentences once each
        image = image_features
        if image is None:
            image = self.get_image_features(
                pixel_values, pixel_mask, output_hidden_states=False, output_attentions=False, return_dict=True
            )
        self._check_text_shapes(
            image.pooler_output.shape[0],
            input_ids,
            attention_mask,
            image_index,
            phrase_input_ids,
            phrase_attention_mask,
            phrase_spans,
            phrase_index,
        )
        length = input_ids.shape[1]
        # what points nowhere (a token, an image, a span, a phrase) is not followed, and its phrases are masked
        input_ids, can_answer = self.known_tokens(input_ids, attention_mask)

        # `device_map` may have spread the parts: what they give is brought to where the inputs are
        device = input_ids.device
        text_type, image_type = self.token_type_embeddings(torch.arange(2, device=device)).to(device)
        image_features, image_mask = image.pooler_output.to(device), image.image_mask
        # a parameter of this module itself is read in this forward alone: offloading brings it for that time
        image_positions = image.image_position_embeddings.to(device) + (self.level_embedding + image_type)
        image_positions = image_positions.to(image_features.dtype)
        if image_index is not None:
            is_image = (image_index >= 0) & (image_index < image_features.shape[0])
            image_index, can_answer = image_index.where(is_image, 0), can_answer & is_image
            image_features, image_positions, image_mask = (
                states[image_index] for states in (image_features, image_positions, image_mask)
            )
        text = self.encode_text(input_ids, attention_mask)
        text_features = self.text_projection(text.last_hidden_state).to(device)
        token = torch.arange(length, device=device)
        text_positions = self.text_position_embeddings(token).to(device) + text_type
        text_positions = text_positions.expand(input_ids.shape[0], -1, -1)

        # the visual-language encoder, from here on a sentence at a time
        position_embeddings = torch.cat((text_positions.to(image_positions.dtype), image_positions), dim=1)
        memory_mask = torch.cat((attention_mask.bool(), image_mask), dim=1)
        encoder_outputs = self.encoder(
            inputs_embeds=torch.cat((text_features, image_features), dim=1),
            position_embeddings=position_embeddings,
            attention_mask=memory_mask,
            return_dict=True,
            **kwargs,
        )
        memory = encoder_outputs.last_hidden_state

        # a query a phrase; without phrases the sentence is the one phrase
        is_real = attention_mask.bool()
        phrase_places = None
        if phrase_input_ids is None:
            phrase_mask = attention_mask.sum(dim=1, keepdim=True) > 2
            phrase_features = self.phrase_projection(text.pooler_output)[:, None]
            order = is_real.cumsum(dim=1)
            context_mask = (is_real & (order > 1) & (order < order[:, -1:]))[:, None]
        else:
            if phrase_attention_mask is None:
                phrase_attention_mask = torch.ones_like(phrase_input_ids)
            phrase_input_ids, is_known = self.known_tokens(phrase_input_ids, phrase_attention_mask)
            start, end = phrase_spans.unbind(-1)
            is_span = (start >= 0) & (start < end) & (end <= is_real.sum(dim=1, keepdim=True))
            phrase_mask = (phrase_attention_mask.sum(dim=-1) > 2) & is_known & is_span
            phrase_features, phrase_places = self.encode_phrases(
                phrase_input_ids, phrase_attention_mask, phrase_mask, phrase_index
            )
            is_encoded = scatter_phrases(torch.ones_like(phrase_places), phrase_places, phrase_mask.shape)
            phrase_mask = phrase_mask & is_encoded.bool()
            context_mask = (token >= start[..., None]) & (token < end[..., None]) & is_real[:, None]
        phrase_mask = phrase_mask & can_answer[:, None]
        # where nothing may be seen, [CLS] stands in: a softmax over nothing is not a number
        context_mask = context_mask | (~context_mask.any(dim=-1, keepdim=True) & (token == 0))
        queries, query_positions = self.query_encoder(memory[:, :length], context_mask, phrase_features)

        decoder_outputs = self.decoder(
            inputs_embeds=queries,
            position_embeddings=query_positions,
            attention_mask=phrase_mask | ~phrase_mask.any(dim=1, keepdim=True),
            encoder_hidden_states=memory,
            encoder_position_embeddings=position_embeddings,
            encoder_attention_mask=memory_mask,
            return_dict=True,
            **kwargs,
        )
        return RefTRModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            intermediate_hidden_states=decoder_outputs.intermediate_hidden_states,
            phrase_mask=phrase_mask,
            phrase_places=phrase_places,
            encoder_last_hidden_state=memory,
            feature_maps=image.feature_maps,
            image_features=image.pooler_output,
            image_mask=image.image_mask,
            pixel_mask=image.pixel_mask,
            image_index=image_index,
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )

    def _check_text_shapes(
        self,
        num_images,
        input_ids,
        attention_mask,
        image_index,
        phrase_input_ids,
        phrase_attention_mask,
        phrase_spans,
        phrase_index,
    ):
        """Raise a ValueError that names the shapes, where two inputs do not fit together."""
        if input_ids.ndim != 2 or attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"input_ids {tuple(input_ids.shape)} and attention_mask {tuple(attention_mask.shape)} must both be "
                "(sentences, tokens)."
            )
        num_sentences, length = input_ids.shape
        if length > self.config.max_text_positions:
            raise ValueError(
                f"input_ids holds {length} tokens a sentence, more than max_text_positions="
                f"{self.config.max_text_positions}; truncate the text."
            )
        if image_index is None and num_sentences != num_images:
            raise ValueError(
                f"{num_sentences} sentences and {num_images} images: without image_index they must be as many."
            )
        if image_index is not None and image_index.shape != (num_sentences,):
            raise ValueError(
                f"image_index {tuple(image_index.shape)} must name one image for each of {num_sentences} sentences."
            )
        if (phrase_input_ids is None) != (phrase_spans is None):
            raise ValueError("phrase_input_ids and phrase_spans belong together: give both or neither.")
        if phrase_index is not None and (phrase_input_ids is None or phrase_index.shape[1:] != (2,)):
            raise ValueError(
                f"phrase_index {tuple(phrase_index.shape)} must be (real phrases, 2), sentence and slot of each of "
                "phrase_input_ids."
            )
        if phrase_input_ids is None:
            return
        if phrase_input_ids.ndim != 3 or phrase_input_ids.shape[0] != num_sentences:
            raise ValueError(
                f"phrase_input_ids {tuple(phrase_input_ids.shape)} must be (sentences, phrases, tokens) for "
                f"{num_sentences} sentences."
            )
        if phrase_input_ids.shape[2] > self.config.max_text_positions:
            raise ValueError(
                f"phrase_input_ids holds {phrase_input_ids.shape[2]} tokens a phrase, more than max_text_positions="
                f"{self.config.max_text_positions}; truncate the phrases."
            )
        if phrase_attention_mask is not None and phrase_attention_mask.shape != phrase_input_ids.shape:
            raise ValueError(
                f"phrase_attention_mask {tuple(phrase_attention_mask.shape)} does not fit phrase_input_ids "
                f"{tuple(phrase_input_ids.shape)}."
            )
        if phrase_spans.shape != (*phrase_input_ids.shape[:2], 2):
            raise ValueError(
                f"phrase_spans {tuple(phrase_spans.shape)} must be (sentences, phrases, 2) like phrase_input_ids "
                f"{tuple(phrase_input_ids.shape)}."
            )


class RefTRForVisualGrounding(RefTRPreTrainedModel):
    """RefTR with its heads: a box for every phrase of every sentence, and a mask if `config.predict_masks`."""

    def __init__(self, config: RefTRConfig):
        super().__init__(config)
        self.model = RefTRModel(config)
        self.box_head = RefTRBoxHead(config)
        if config.predict_masks:
            self.mask_head = RefTRMaskHead(config, self.model.backbone.channels)
        self.loss_function = grounding_loss
        self.post_init()
        self.freeze_parameters()

    def freeze_parameters(self):
        """Stop training what the configuration freezes: the backbone's first stages, or all but the mask head."""
        self.model.freeze_parameters()
        if self.config.freeze_grounding:
            for module in (self.model, self.box_head):
                module.requires_grad_(False)

    def train(self, mode: bool = True):
        """As any module, but what `config.freeze_grounding` freezes stays without dropout and batch statistics."""
        super().train(mode)
        if self.config.freeze_grounding:
            for module in (self.model, self.box_head):
                module.eval()
        return self

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RefTRImageFeatures:
        """See [`RefTRModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, pixel_mask, **kwargs)

    def cache_text(self, max_tokens: int = 100_000):
        """See [`RefTRModel.cache_text`]."""
        return self.model.cache_text(max_tokens)

    @can_return_tuple
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
        """
        Several threads may call one model at once, and each is answered as it is alone: a call does not change it.

        Text padding, phrase padding and grouping sentences by image never change an answer at one padded picture
        size. Picture padding does, a little, as published: convolutions and group norm see it. Keep pictures of like
        size together.

        Args:
            pixel_values (`torch.Tensor` of shape `(I, 3, H, W)`, *optional*):
                Normalised pictures, padded bottom and right. Absent: `image_features` stands for them.
            pixel_mask (`torch.Tensor` of shape `(I, H, W)`, *optional*):
                1 for the picture, 0 for padding. Absent: no padding.
            input_ids, attention_mask (`torch.Tensor` of shape `(S, L)`):
                The sentences, [CLS] first and padding last; 1 for real tokens.
            image_index (`torch.Tensor` of shape `(S,)`, *optional*):
                Which image each sentence speaks of. Absent: one sentence an image, in order.
            phrase_input_ids, phrase_attention_mask (`torch.Tensor` of shape `(S, P, Lp)`, *optional*):
                The phrases by themselves. One with nothing between its special tokens is padding. Absent: one phrase,
                the whole sentence.
            phrase_spans (`torch.Tensor` of shape `(S, P, 2)`, *optional*):
                Where each phrase stands in its sentence, token positions [start, end), [CLS] counted as 0.
            phrase_index (`torch.Tensor` of shape `(N, 2)`, *optional*):
                Sentence and slot of each real phrase, as the processor gives them. Absent: they are looked for, which
                makes the host wait for the device, and breaks the graph of `torch.compile`.
            labels (`list[dict]` of length `S`, *optional*):
                `boxes` (P or fewer, 4) of each sentence, aligned with its phrase slots, (center_x, center_y, width,
                height) in 0..1 of the picture without its padding. A box that leaves it, is empty, inverted or not a
                number has no part in the loss. With `config.predict_masks` also `masks` (P or fewer, H, W), True where
                the phrase is, of the padded picture.
            num_items_in_batch (`int` or `torch.Tensor`, *optional*, defaults to S):
                Sentences in the global batch (all ranks, all accumulation steps), which the loss is divided by.
            image_features ([`RefTRImageFeatures`], *optional*):
                What `get_image_features` gave for the images, in place of `pixel_values` and `pixel_mask`: many
                questions, asked one after the other, cost the image backbone once.

        Returns:
            [`RefTRVisualGroundingOutput`]. Where a token, an image index, a span or a phrase index points nowhere, the
            answer is finite and `phrase_mask` is False: to refuse it, the host would have to wait for the device.

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
        device = outputs.phrase_mask.device
        layer_boxes = self.box_head(outputs.intermediate_hidden_states).float().sigmoid().to(device)
        auxiliary_outputs = None
        if self.config.auxiliary_loss:
            auxiliary_outputs = [{"pred_boxes": boxes} for boxes in layer_boxes[:-1]]
        pred_masks, mask_attentions = None, None
        return_attentions = kwargs.get("output_attentions", self.config.output_attentions)
        if self.config.predict_masks:
            pred_masks, mask_attentions = self.mask_head(
                outputs.last_hidden_state,
                outputs.image_features,
                outputs.encoder_last_hidden_state[:, input_ids.shape[1] :],
                outputs.image_mask,
                outputs.feature_maps,
                outputs.image_index,
                outputs.phrase_places,
            )
            pred_masks = pred_masks.float().to(device)
        loss, loss_dict = None, None
        if labels is not None:
            loss, loss_dict = self.loss_function(
                layer_boxes[-1],
                outputs.phrase_mask,
                labels,
                config=self.config,
                auxiliary_outputs=auxiliary_outputs,
                pred_masks=pred_masks,
                pixel_mask=outputs.pixel_mask,
                image_index=outputs.image_index,
                num_items_in_batch=num_items_in_batch,
            )
        return RefTRVisualGroundingOutput(
            loss=loss,
            loss_dict=loss_dict,
            pred_boxes=layer_boxes[-1],
            phrase_mask=outputs.phrase_mask,
            auxiliary_outputs=auxiliary_outputs,
            pred_masks=pred_masks,
            mask_attentions=mask_attentions if return_attentions else None,
            image_index=outputs.image_index,
            input_ids=input_ids,
            phrase_input_ids=phrase_input_ids,
            pixel_mask=outputs.pixel_mask,
            last_hidden_state=outputs.last_hidden_state,
            intermediate_hidden_states=outputs.intermediate_hidden_states,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )


RefTRModel.register_for_auto_class("AutoModel")
RefTRForVisualGrounding.register_for_auto_class("AutoModelForZeroShotObjectDetection")

__all__ = ["RefTRForVisualGrounding", "RefTRImageFeatures", "RefTRModel", "RefTRPreTrainedModel"]
