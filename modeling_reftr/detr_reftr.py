"""Initialize a model with the image backbone and encoder of a DETR trained on COCO, as the published RefTR was."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download
from transformers.utils import logging

from .convert_reftr_checkpoint import our_names, place_weights, read_weights
from .locating_reftr import check_source
from .modeling_reftr import RefTRPreTrainedModel
from .quoting_reftr import quote


logger = logging.get_logger(__name__)

# in the original layout, and in transformers' former (conv_encoder, fc1) and current layouts
DETR_BACKBONE = re.compile(r"(?:detr\.)?(?:model\.)?backbone\.(?:0\.body|conv_encoder\.model|model)\.(.+)")
DETR_ENCODER = re.compile(r"(?:detr\.)?(?:(?:transformer|model)\.)?encoder\.(.+)")


@dataclass
class DETRStart:
    """
    Which weights of a DETR were used.

    Args:
        taken (`list[str]`): keys whose weights were copied to the model.
        left (`list[str]`): keys that were not used.
    """

    taken: list[str]
    left: list[str]


def resnet_name(name: str) -> str:
    """
    Return the name in torchvision and timm of a weight of a transformers ResNet; other names are returned unchanged.

    Example:

    ```python
    >>> from modeling_reftr.detr_reftr import resnet_name

    >>> resnet_name("encoder.stages.0.layers.2.layer.1.normalization.bias")
    'layer1.2.bn2.bias'

    ```"""
    name = name.replace("embedder.embedder.convolution.", "conv1.").replace("embedder.embedder.normalization.", "bn1.")
    block = re.fullmatch(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.(.+)", name)
    if not block:
        return name
    rest = (
        block[3].replace("shortcut.convolution.", "downsample.0.").replace("shortcut.normalization.", "downsample.1.")
    )
    part = re.fullmatch(r"layer\.(\d+)\.(convolution|normalization)\.(.+)", rest)
    if part:
        rest = f"{'conv' if part[2] == 'convolution' else 'bn'}{int(part[1]) + 1}.{part[3]}"
    return f"layer{int(block[1]) + 1}.{block[2]}.{rest}"


def detr_names(key: str) -> list[str]:
    """
    Return the names of a DETR's key in a [`RefTRModel`] with a timm ResNet; none if it is not used.

    Example:

    ```python
    >>> from modeling_reftr.detr_reftr import detr_names

    >>> detr_names("model.encoder.layers.0.fc1.weight")
    ['encoder.layers.0.mlp.fc1.weight']
    >>> detr_names("class_embed.weight")
    []

    ```"""
    if backbone := DETR_BACKBONE.fullmatch(key):
        return [f"backbone._backbone.{resnet_name(backbone[1])}"]
    if encoder := DETR_ENCODER.fullmatch(key):
        original = re.sub(r"^(layers\.\d+)\.fc([12])\.", r"\1.linear\2.", encoder[1])
        return [name.removeprefix("model.") for name in our_names(f"vl_transformer.encoder.{original}")]
    return []


def locate_weights(source: str | os.PathLike) -> list[Path]:
    """
    Return the weight files of a file, folder or Hub id.

    Raises:
        OSError: if there are none.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(path.glob("model*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
        if not files:
            raise FileNotFoundError(f"{path} has no model.safetensors and no pytorch_model.bin.")
        return files
    if path.suffix in (".pth", ".pt", ".bin", ".safetensors") or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise FileNotFoundError(f"{path} does not exist; give the file, folder or Hub id (owner/name) of a DETR.")
    check_source(source, what="DETR")
    try:
        return [Path(hf_hub_download(str(source), "model.safetensors"))]
    except (OSError, ValueError) as error:
        raise OSError(f"There is no folder {path} here, and the Hub gave no model.safetensors of that id.") from error


def init_from_detr(model: RefTRPreTrainedModel, source: str | os.PathLike) -> DETRStart:
    """
    Copy the image backbone and encoder of a DETR into a model, as the published RefTR was initialized.

    DETR's decoder, queries, heads and input projection are not used.

    Args:
        model ([`RefTRForVisualGrounding`] or [`RefTRModel`]):
            With a timm or transformers ResNet, and widths and encoder layers like the DETR's. It is changed in place.
        source (`str` or `os.PathLike`):
            The original file (`detr-r50-e632da11.pth`), a folder of transformers' DETR, or the Hub id of one
            (`facebook/detr-resnet-50`), which is fetched.

    Returns:
        [`DETRStart`]: the keys of the source that were taken and left.

    Raises:
        OSError: if there is nothing at `source`.
        ValueError: if it is not a DETR, is refused (see `read_weights`), or does not fit the model; the model is as
            before then.
    """
    base = model.base_model
    backbone_config = base.config.backbone_config
    architecture = getattr(backbone_config, "backbone", None) or backbone_config.model_type
    if not architecture.startswith("resnet"):
        raise ValueError(f"The image backbone of the model is {architecture!r}, but DETR's is a ResNet.")
    weights = {key: value for file in locate_weights(source) for key, value in read_weights(file).items()}
    left = sorted(key for key in weights if not detr_names(key))
    taken = {key: value for key, value in weights.items() if detr_names(key)}
    for pattern, part in ((DETR_BACKBONE, "image backbone"), (DETR_ENCODER, "encoder")):
        if not any(pattern.fullmatch(key) for key in taken):
            raise ValueError(
                f"{source} is not a DETR: no key is of an {part}, the first key is {quote(next(iter(weights), None))}."
            )
    expected, own_names = {}, {}
    for name, value in base.state_dict().items():
        if name.startswith(("backbone.", "encoder.")):
            is_transformers = name.startswith("backbone.") and not name.startswith("backbone._backbone.")
            common = f"backbone._backbone.{resnet_name(name.removeprefix('backbone.'))}" if is_transformers else name
            expected[common], own_names[common] = value, name
    placed = place_weights(taken, expected, detr_names)
    base.load_state_dict({own_names[name]: value for name, value in placed.items()}, strict=False)
    logger.info(
        f"Taken from {source}: {len(taken)} weights of backbone and encoder. Left: {', '.join(left) or 'none'}."
    )
    return DETRStart(sorted(taken), left)
