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
"""RefTR model configuration."""

# first, because older releases of transformers lack names that are imported below
from .requirements_reftr import MINIMUM_TRANSFORMERS as MINIMUM_TRANSFORMERS


# isort: split
import copy
import functools
import math
import os
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import logging

from .inputs_reftr import check_setting
from .loading_reftr import CONFIG_FILES, DamagedFilesError, describe_error, naming_files
from .locating_reftr import check_source
from .quoting_reftr import quote
from .version_reftr import VERSION


logger = logging.get_logger(__name__)

MASK_CONDITIONINGS = ("attention", "scaled_attention")
SUB_CONFIGS = {"backbone_config", "text_config"}
# where a saved folder keeps our classes; written by every save, whatever a loaded file said
AUTO_MAP = {
    "AutoConfig": "configuration_reftr.RefTRConfig",
    "AutoModel": "modeling_reftr.RefTRModel",
    "AutoModelForZeroShotObjectDetection": "modeling_reftr.RefTRForVisualGrounding",
    "AutoImageProcessor": "image_processing_reftr.RefTRImageProcessor",
    "AutoProcessor": "processing_reftr.RefTRProcessor",
}
CUSTOM_PIPELINES = {
    "visual-grounding": {
        "impl": "pipeline_reftr.VisualGroundingPipeline",
        "pt": ["AutoModelForZeroShotObjectDetection"],
        "type": "multimodal",
    }
}


# the largest integer under a name with such a word in it: layers, labels and positions are created one by one, or as
# a table, before any weight is read, and a file of a hundred bytes can ask for a billion of them
MAX_COUNTS = {"label": 100_000, "layer": 1_000, "position": 1_000_000, "": 10**9}

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def check_values(values: dict, prefix: str) -> None:
    """
    Refuse values that no model has, nested ones included.

    The configurations of backbones accept them, and fail with an error of some library when the model is built or
    called.

    Args:
        values (`dict`): values of a configuration.
        prefix (`str`): prefix of their names in the message.

    Raises:
        ValueError: if a number is not finite, exceeds its limit in `MAX_COUNTS`, or is a number of heads less than 1,
            or if a switch for outputs is not a boolean, or is on in the image backbone.
    """
    for name, value in values.items():
        limit = next(limit for word, limit in MAX_COUNTS.items() if word in str(name))
        full_name = f"{prefix}{name}"
        if name in ("output_attentions", "output_hidden_states"):
            if not isinstance(value, (bool, type(None))) or (value and prefix == "backbone_config."):
                expected = "false: ask for outputs in the call" if prefix else "true or false"
                raise ValueError(f"{full_name}={quote(value, 40)} must be {expected}.")
        elif isinstance(value, dict) and name not in ("id2label", "label2id"):  # whose keys are arbitrary
            check_values(value, f"{full_name}.")
        elif isinstance(value, int) and abs(value) > limit:
            raise ValueError(f"{full_name} is over {limit:,}, more than any model has; correct the configuration.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{full_name}={value} must be a finite number.")
        elif "heads" in str(name) and isinstance(value, int) and value < 1:
            raise ValueError(f"{full_name}={value} must be at least 1.")


def check_config_file(source: str | os.PathLike, arguments: dict | None = None) -> None:
    """
    Refuse a `config.json` of any model with invalid values, see `check_values`.

    `AutoTokenizer` reads it with a configuration class of its own, which builds a table of any number of labels. A
    missing file is not an error.

    Args:
        source (`str` or `os.PathLike`): folder or Hub id.
        arguments (`dict`, *optional*): arguments of `from_pretrained`, of which those that locate the file are used.

    Raises:
        ValueError: if it is damaged, naming it.
    """
    arguments = {name: value for name, value in (arguments or {}).items() if name in HUB_ARGUMENTS}
    try:
        with naming_files(source, CONFIG_FILES, arguments):
            check_values(PreTrainedConfig.get_config_dict(source, **arguments)[0], "")
    except OSError as error:  # the folder has only a tokenizer or a processor
        logger.debug(f"There is no config.json in {source}: {error}")


def without_foreign_code(values: dict) -> dict:
    """
    Return the values of a configuration file, nested ones included, without references to code.

    Raises:
        ValueError: if a value names attention code to fetch.
    """
    kept = {}
    for name, value in values.items():
        if name in ("attn_implementation", "_attn_implementation") and "/" in str(value):
            raise ValueError(
                f"{name}={quote(value)} in the configuration names code to download; to use it, pass it to "
                "from_pretrained."
            )
        if name not in ("auto_map", "custom_pipelines"):
            kept[name] = without_foreign_code(value) if isinstance(value, dict) else value
    return kept


def raise_value_errors(config_class: type) -> type:
    """Make a strict configuration class raise ValueError instead of the errors of `strict`."""
    strict_init = config_class.__init__

    @functools.wraps(strict_init)
    def __init__(self: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        for name in config_class.__annotations__.keys() & kwargs.keys() - SUB_CONFIGS:
            check_setting(kwargs[name], name)
        try:
            strict_init(self, *args, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(f"{config_class.__name__}: {error.__cause__ or error}") from error

    config_class.__init__ = __init__
    return config_class


@raise_value_errors
@strict
class RefTRConfig(PreTrainedConfig):
    r"""
    Configuration of a RefTR model ("Referring Transformer: A One-step Approach to Multi-task Visual Grounding",
    Li & Sigal, NeurIPS 2021). The defaults give the published model with ResNet-50 and BERT-base.

    Args:
        backbone_config (`PreTrainedConfig` or `dict`, *optional*, defaults to a timm ResNet-50 giving stages 1 to 4):
            Image backbone, any configuration that `AutoBackbone` takes. Boxes are read off the last feature map that
            the backbone gives. `{"output_stride": 16}` on a timm ResNet is the published DC5 variant.
        text_config (`PreTrainedConfig` or `dict`, *optional*, defaults to BERT-base-uncased):
            Text encoder with a pooled output.
        d_model (`int`, *optional*, defaults to 256):
            Width of the encoder, the query encoder and the decoder.
        encoder_layers, decoder_layers (`int`, *optional*, default to 6):
            Layers of the visual-language encoder and of the query decoder (ReferIt without pre-training: 3 decoder
            layers).
        encoder_attention_heads, decoder_attention_heads (`int`, *optional*, default to 8):
            Attention heads of each layer.
        encoder_ffn_dim, decoder_ffn_dim (`int`, *optional*, default to 2048):
            Width of the feed-forward blocks.
        activation_function (`str`, *optional*, defaults to `"relu"`):
            Activation of the feed-forward blocks.
        dropout, attention_dropout, activation_dropout (`float`, *optional*, default to 0.1):
            Dropout after attention and feed-forward and inside the text projections; on attention weights; after
            the activation of the feed-forward blocks.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of every layer norm but the text encoder's.
        projection_group_norm_groups (`int`, *optional*, defaults to 32):
            Groups of the group norm behind the 1x1 projection of the image features.
        position_embedding_type (`str`, *optional*, defaults to `"sine"`):
            Image positions, `"sine"` or `"learned"`.
        position_embedding_temperature (`float`, *optional*, defaults to 10000):
            Base of the sine embedding's frequencies.
        max_image_positions (`int`, *optional*, defaults to 50):
            Rows and columns of the learned image positions.
        pre_norm (`bool`, *optional*, defaults to `False`):
            Whether the layers of encoder and decoder normalize their inputs, as in DETR's `--pre_norm` (Carion et al.,
            ECCV 2020), in place of the sums, as published. From scratch, it learns in fewer steps.
        add_positions_to_image_tokens (`bool`, *optional*, defaults to `False`):
            Whether image positions are also added to the image tokens, so that the values of attention contain them.
            As published, only queries and keys do, and a model from scratch learns to locate objects from the padding
            of its convolutions, which takes longer.
        max_text_positions (`int`, *optional*, defaults to 128):
            Longest sentence in tokens.
        freeze_backbone_batch_norm (`bool`, *optional*, defaults to `True`):
            Keep statistics and affine of the backbone's batch norms as they were loaded. The one switch for it.
        num_frozen_backbone_stages (`int`, *optional*, defaults to 1):
            0 trains the entire backbone; N > 0 freezes the stem and the first N stages. Training a backbone from
            scratch requires 0 here and `freeze_backbone_batch_norm=False`.
        predict_masks (`bool`, *optional*, defaults to `False`):
            Whether the head predicts masks as well as boxes, from the backbone's last four feature maps.
        mask_head_group_norm_groups (`int`, *optional*, defaults to 8):
            Most groups of the mask head's group norms; fewer where they do not divide a layer's channels.
        mask_conditioning (`str`, *optional*, defaults to `"attention"`):
            How the mask head knows the phrase: `"attention"`, by attention maps whose values sum to 1 over heads and
            positions, as published; `"scaled_attention"`, multiplied by their number, so that they have mean 1 as the
            other input channels, which distinguishes the masks of a sentence's phrases.
        freeze_grounding (`bool`, *optional*, defaults to `False`):
            Train the mask head alone, and the presence head; everything else stays as it was loaded, and without
            dropout.
        freeze_answers (`bool`, *optional*, defaults to `False`):
            Train the presence head alone: boxes and masks stay as they were loaded, to the bit.
        num_queries_per_phrase (`int`, *optional*, defaults to 1):
            Queries of the decoder for each phrase, as many as objects that a phrase can refer to. The published model
            has one; more require `predict_presence`.
        predict_presence (`bool`, *optional*, defaults to `False`):
            Whether the model predicts, for the box of each query, the probability that it is an answer to the phrase.
            It is low for all queries of a phrase that refers to nothing in the image.
        presence_temperature (`float`, *optional*, defaults to 1.0):
            What the logits of presence are divided by, fitted to the validation split after training.
        presence_threshold (`float`, *optional*, defaults to 0.5):
            Presence above which a box is an answer, fitted to the validation split after training.
        auxiliary_loss (`bool`, *optional*, defaults to `True`):
            Whether the earlier decoder layers' boxes are returned and trained too.
        bbox_loss_coefficient, giou_loss_coefficient (`float`, *optional*, default to 1.0):
            Weights of the L1 and the generalised-IoU box losses.
        mask_loss_coefficient, dice_loss_coefficient (`float`, *optional*, default to 1.0):
            Weights of the focal and the dice mask losses.
        presence_loss_coefficient (`float`, *optional*, defaults to 1.0):
            Weight of the presence loss.
        mask_loss_over_padding (`bool`, *optional*, defaults to `True`):
            Whether pixels of a batch's padding count as background in the mask losses, as published.
        init_xavier_std (`float`, *optional*, defaults to 1.0):
            Gain of the xavier-uniform initialisation of encoder, decoder and projections.
        box_head_init_std (`float`, *optional*, defaults to 0.0):
            Standard deviation of the box head's last weights. The published 0 makes the first boxes equal, and a model
            without pretrained backbones slow to leave them: about 0.07 trains much faster from scratch.

    Raises:
        ValueError: if a value is out of its range or two values do not fit together.

    Example:

    ```python
    >>> from modeling_reftr import RefTRConfig, RefTRForVisualGrounding

    >>> config = RefTRConfig(d_model=64, encoder_ffn_dim=128, decoder_ffn_dim=128)
    >>> config.backbone_config.backbone
    'resnet50'

    ```"""

    model_type = "reftr"
    # `Trainer` collects what an evaluation is about: pred_boxes, phrase_mask and pred_masks, in this order
    keys_to_ignore_at_inference = [
        "loss_dict",
        "auxiliary_outputs",
        "mask_attentions",
        "presence_logits",
        "presence",
        "presence_threshold",
        "query_boxes",
        "query_masks",
        "image_index",
        "input_ids",
        "phrase_input_ids",
        "pixel_mask",
        "last_hidden_state",
        "intermediate_hidden_states",
        "encoder_last_hidden_state",
        "decoder_hidden_states",
        "decoder_attentions",
        "cross_attentions",
        "encoder_hidden_states",
        "encoder_attentions",
    ]
    sub_configs_defaults = {
        "backbone_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="timm_backbone",
            init_kwargs={"backbone": "resnet50", "out_indices": [1, 2, 3, 4]},
        ),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert"),
    }
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
    }

    backbone_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    is_encoder_decoder: bool = True
    d_model: int = 256
    encoder_layers: int = 6
    encoder_attention_heads: int = 8
    encoder_ffn_dim: int = 2048
    decoder_layers: int = 6
    decoder_attention_heads: int = 8
    decoder_ffn_dim: int = 2048
    activation_function: str = "relu"
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.1
    activation_dropout: float | int = 0.1
    layer_norm_eps: float = 1e-5
    projection_group_norm_groups: int = 32
    position_embedding_type: str = "sine"
    position_embedding_temperature: float | int = 10000
    max_image_positions: int = 50
    pre_norm: bool = False
    add_positions_to_image_tokens: bool = False
    max_text_positions: int = 128
    freeze_backbone_batch_norm: bool = True
    num_frozen_backbone_stages: int = 1
    predict_masks: bool = False
    mask_head_group_norm_groups: int = 8
    mask_conditioning: str = "attention"
    num_queries_per_phrase: int = 1
    predict_presence: bool = False
    presence_temperature: float | int = 1.0
    presence_threshold: float | int = 0.5
    freeze_grounding: bool = False
    freeze_answers: bool = False
    auxiliary_loss: bool = True
    bbox_loss_coefficient: float | int = 1.0
    giou_loss_coefficient: float | int = 1.0
    mask_loss_coefficient: float | int = 1.0
    dice_loss_coefficient: float | int = 1.0
    presence_loss_coefficient: float | int = 1.0
    mask_loss_over_padding: bool = True
    init_xavier_std: float | int = 1.0
    box_head_init_std: float | int = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        if "backbone" in kwargs:
            raise ValueError(
                f"backbone={quote(kwargs['backbone'])} is not taken, because a name alone can reach the network; give "
                "backbone_config, for example {'model_type': 'timm_backbone', 'backbone': 'resnet50', "
                "'out_indices': [1, 2, 3, 4]}."
            )
        if isinstance(self.backbone_config, dict) and "model_type" not in self.backbone_config:
            self.backbone_config = {"model_type": "timm_backbone", **self.backbone_config}
        check_values({**vars(self), **kwargs}, "")
        for part in ("backbone_config", "text_config"):
            values = getattr(self, part)
            if isinstance(values, dict):
                is_timm = part == "backbone_config" and values.get("model_type") == "timm_backbone"
                inside = {"backbone", "backbone_config", "architecture"} & set(values)
                if inside := sorted(inside - {"backbone"} if is_timm else inside):
                    raise ValueError(
                        f"{part} of model_type={quote(values.get('model_type'))} has {', '.join(inside)} inside: "
                        "models of models can reach the network while they are built; give a plain encoder."
                    )
        kwargs.pop("auto_map", None)
        kwargs.pop("custom_pipelines", None)
        saved_by = kwargs.pop("reftr_version", VERSION)
        if saved_by != VERSION:
            logger.warning_once(
                f"This model was saved by version {saved_by} of RefTR's code, and is read by version {VERSION}: "
                "answers may differ where CHANGELOG.md says so."
            )
        super().__post_init__(**kwargs)

        self.auto_map = dict(AUTO_MAP)

    @property
    def custom_pipelines(self) -> dict:
        """The pipelines of a saved folder; none if they are registered, or the library would ask to trust them."""
        from transformers.pipelines import PIPELINE_REGISTRY  # takes seconds, and only pipelines ask for this

        is_registered = CUSTOM_PIPELINES.keys() <= PIPELINE_REGISTRY.supported_tasks.keys()
        return {} if is_registered else copy.deepcopy(CUSTOM_PIPELINES)

    def to_dict(self) -> dict:
        """See `PreTrainedConfig.to_dict`."""
        code = {"custom_pipelines": copy.deepcopy(CUSTOM_PIPELINES), "reftr_version": VERSION}
        return {**super().to_dict(), **code}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "RefTRConfig":
        """
        See `PreTrainedConfig.from_pretrained`.

        Raises:
            ValueError: if the file is damaged, naming it.
            OSError: if there is none.
        """
        check_source(pretrained_model_name_or_path, kwargs)
        with naming_files(pretrained_model_name_or_path, CONFIG_FILES, kwargs):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs: Any) -> "RefTRConfig | tuple[RefTRConfig, dict]":
        """
        See `PreTrainedConfig.from_dict`. A file cannot make us run code of others: see `without_foreign_code`.

        Raises:
            ValueError: if a value is of another kind or out of its range.
        """
        try:
            if not isinstance(config_dict, dict):
                raise ValueError(f"it must be a JSON object, and it is {type(config_dict).__name__}")
            return super().from_dict(without_foreign_code(config_dict), **kwargs)
        except MemoryError:
            raise
        except Exception as error:  # the library's configurations raise anything of a value of another kind
            raise DamagedFilesError("config.json", describe_error(error)) from error

    def validate_sizes(self) -> None:
        """Refuse widths and counts that no model can be built from."""
        at_least_one = (
            "d_model",
            "encoder_layers",
            "decoder_layers",
            "encoder_attention_heads",
            "decoder_attention_heads",
            "encoder_ffn_dim",
            "decoder_ffn_dim",
            "projection_group_norm_groups",
            "mask_head_group_norm_groups",
            "max_image_positions",
            "max_text_positions",
            "num_queries_per_phrase",
        )
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={quote(getattr(self, name))} must be at least 1.")
        if self.num_frozen_backbone_stages < 0:
            raise ValueError(
                f"num_frozen_backbone_stages={self.num_frozen_backbone_stages} must be 0 (train the entire backbone) "
                "or the number of stages to freeze behind the stem."
            )
        divisors = {
            "encoder_attention_heads": self.encoder_attention_heads,
            "decoder_attention_heads": self.decoder_attention_heads,
            "projection_group_norm_groups": self.projection_group_norm_groups,
        }
        for name, divisor in divisors.items():
            if self.d_model % divisor:
                raise ValueError(f"d_model={self.d_model} is not a multiple of {name}={divisor}.")
        if self.d_model % 4:
            raise ValueError(
                f"d_model={self.d_model} is not a multiple of 4: image positions are sines and cosines of x and y."
            )

    def validate_ranges(self) -> None:
        """Refuse probabilities, weights and choices out of their range."""
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={quote(getattr(self, name))} must be at least 0 and less than 1.")
        not_negative = ("bbox_loss_coefficient", "giou_loss_coefficient", "box_head_init_std")
        for name in (*not_negative, "mask_loss_coefficient", "dice_loss_coefficient", "presence_loss_coefficient"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={quote(getattr(self, name))} must be a finite number of at least 0.")
        for name in ("layer_norm_eps", "position_embedding_temperature", "init_xavier_std", "presence_temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={quote(getattr(self, name))} must be a finite number greater than 0.")
        if self.position_embedding_type not in ("sine", "learned"):
            raise ValueError(
                f"position_embedding_type={quote(self.position_embedding_type)} must be 'sine' or 'learned'."
            )
        from transformers.activations import ACT2FN  # here, because it imports torch

        if self.activation_function not in ACT2FN:
            raise ValueError(
                f"activation_function={quote(self.activation_function)} is not one of {', '.join(sorted(ACT2FN))}."
            )

    def validate_backbone(self) -> None:
        """Refuse names of timm architectures that would reach the network or the disk, in either sub-configuration."""
        for part in ("backbone_config", "text_config"):
            for field in ("backbone", "architecture"):
                name = getattr(getattr(self, part), field, None)
                if name is not None and ":" in str(name):
                    raise ValueError(
                        f"{part}.{field}={quote(name)} names a location to load from; give the plain name of a timm "
                        "architecture, for example 'resnet50'."
                    )

    def validate_presence(self) -> None:
        """Refuse queries and heads that do not fit together, and a threshold that is not a probability."""
        if self.num_queries_per_phrase > 1 and not self.predict_presence:
            raise ValueError(
                f"num_queries_per_phrase={self.num_queries_per_phrase} requires predict_presence=True, which selects "
                "the queries that answer."
            )
        if self.freeze_answers and not self.predict_presence:
            raise ValueError(
                "freeze_answers=True trains the presence head alone, but predict_presence=False has none."
            )
        if not 0 <= self.presence_threshold <= 1:
            raise ValueError(f"presence_threshold={self.presence_threshold} must be a probability, from 0 to 1.")

    def validate_masks(self) -> None:
        """Refuse masks that cannot be trained or built."""
        if self.freeze_grounding and not self.predict_masks:
            raise ValueError("freeze_grounding=True trains the mask head alone, but predict_masks=False has none.")
        if self.mask_conditioning not in MASK_CONDITIONINGS:
            raise ValueError(
                f"mask_conditioning={quote(self.mask_conditioning)} must be one of {', '.join(MASK_CONDITIONINGS)}."
            )
        if self.predict_masks and self.d_model < 32:
            raise ValueError(
                f"d_model={self.d_model} is too narrow for predict_masks=True, whose last layer is d_model / 16 wide: "
                "at least 32."
            )

    def validate_text_length(self) -> None:
        """Refuse a sentence limit that the text encoder cannot reach."""
        limit = getattr(self.text_config, "max_position_embeddings", None)
        if limit is not None and self.max_text_positions > limit:
            raise ValueError(
                f"max_text_positions={self.max_text_positions} is more than text_config.max_position_embeddings="
                f"{limit}: longer sentences would have no position in the text encoder."
            )


RefTRConfig.register_for_auto_class()

__all__ = ["RefTRConfig"]
