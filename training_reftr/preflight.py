"""
Refuse a run in which a part of the model would learn nothing, before it starts and before anything is written.
Nothing here is a collective: all processes raise the same error.
"""

import logging
from collections.abc import Iterator

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch import nn

from modeling_reftr import RefTRConfig
from training_reftr.optimization import learning_rate_setting
from training_reftr.settings import DataSettings, OptimizationSettings
from training_reftr.streams import StreamedRows


logger = logging.getLogger(__name__)


def part_of(name: str) -> str:
    """
    Return the part of the model that a weight belongs to.

    Example:

    ```python
    >>> from training_reftr.preflight import part_of

    >>> part_of("model.encoder.layers.0.fc1.weight"), part_of("mask_head.output_convolution.bias")
    ('encoder', 'mask_head')

    ```"""
    return name.removeprefix("model.").split(".")[0]


def refuse_untrained_parts(model: nn.Module, random_weights: set[str], optimization: OptimizationSettings) -> None:
    """
    Refuse a part of the model whose random weights would not be trained.

    Args:
        model ([`RefTRForVisualGrounding`]): as training starts.
        random_weights (`set[str]`): names of the weights that were not loaded.
        optimization ([`OptimizationSettings`]): with the learning rates.

    Raises:
        ValueError: naming the part and the setting that keeps it from learning.
    """
    parts = {}
    for name, parameter in model.named_parameters():
        reason = reason_not_to_learn(name, parameter, model.config, optimization)
        parts.setdefault(part_of(name), []).append(reason if name in random_weights else None)
    stuck = {part: reasons[0] for part, reasons in parts.items() if all(reasons)}
    if stuck:
        listed = ", ".join(f"{part} ({reason})" for part, reason in stuck.items())
        raise ValueError(
            f"Random weights would stay random in {listed}. Let these parts learn, or start from weights for them "
            "(init_from, init_detr, init_backbone, init_text)."
        )


def refuse_idle_model(model: nn.Module, optimization: OptimizationSettings, negative_ratio: float = 0.0) -> None:
    """
    Refuse a model without trained parameters, a head without a loss, or negatives that no head learns from.

    Raises:
        ValueError: saying why.
    """
    config = model.config
    if negative_ratio and not config.predict_presence:
        raise ValueError(
            f"negative_ratio={negative_ratio:g} asks about what is not in an image, and model.predict_presence=False "
            "does not learn that: set model.predict_presence, or leave negative_ratio out."
        )
    reasons = [
        reason_not_to_learn(name, parameter, config, optimization) for name, parameter in model.named_parameters()
    ]
    if all(reasons):
        raise ValueError(f"Nothing would be learned: {', '.join(dict.fromkeys(reasons))}.")
    losses = {} if config.freeze_grounding or config.freeze_answers else {"boxes": ("bbox", "giou")}
    losses |= {"masks": ("mask", "dice")} if config.predict_masks and not config.freeze_answers else {}
    losses |= {"presence": ("presence",)} if config.predict_presence else {}
    for target, names in losses.items():
        if not any(getattr(config, f"{name}_loss_coefficient") for name in names):
            zeros = " and ".join(f"model.{name}_loss_coefficient=0" for name in names)
            raise ValueError(f"The {target} would learn nothing, because {zeros}: give one of them a weight.")


def reason_not_to_learn(
    name: str, parameter: nn.Parameter, config: RefTRConfig, optimization: OptimizationSettings
) -> str | None:
    """Return the setting that keeps a parameter as it is, None where it is trained."""
    if not parameter.requires_grad:
        if config.freeze_answers and part_of(name) != "presence_head":
            return "model.freeze_answers=True"
        if config.freeze_grounding and part_of(name) not in ("mask_head", "presence_head"):
            return "model.freeze_grounding=True"
        return f"model.num_frozen_backbone_stages={config.num_frozen_backbone_stages}"
    setting = learning_rate_setting(name)
    return None if getattr(optimization, setting) > 0 else f"{setting}=0"


def refuse_empty_splits(rows: dict, data: DataSettings) -> None:
    """
    Refuse a training or validation split without rows.

    Args:
        rows (`dict`): split -> rows, see `load_rows`; streams are counted by `TrainingData`.
        data ([`DataSettings`]): names the splits, "train+val" for two.

    Raises:
        ValueError: naming the setting and the split.
    """
    for setting in ("train_split", "validation_split"):
        name = getattr(data, setting)
        parts = [rows[part] for part in name.split("+")]
        if all(isinstance(part, datasets.Dataset) for part in parts) and not sum(map(len, parts)):
            use = "learn from" if setting == "train_split" else "choose the best model by"
            raise ValueError(f"{setting}={name!r} of {data.dataset} has no rows: there is nothing to {use}.")


def refuse_few_samples(num_batches: int, optimization: OptimizationSettings, num_processes: int) -> None:
    """
    Refuse an epoch that is shorter than one optimizer step.

    Args:
        num_batches (`int`): batches of a process and epoch.
        optimization ([`OptimizationSettings`]): with `batch_size` and `gradient_accumulation_steps`.
        num_processes (`int`): processes that train together.

    Raises:
        ValueError: saying how many batches there are.
    """
    if num_batches < optimization.gradient_accumulation_steps:
        raise ValueError(
            f"An epoch has {num_batches} batches (batch_size={optimization.batch_size}, {num_processes} processes), "
            f"fewer than gradient_accumulation_steps={optimization.gradient_accumulation_steps}, so no "
            "optimizer step could be taken: lower one of the two."
        )


def refuse_missing_labels(rows: datasets.Dataset | StreamedRows, data: DataSettings, with_masks: bool) -> str | None:
    """
    Refuse training rows without a label for a head that is trained.

    Args:
        rows (`datasets.Dataset` or [`StreamedRows`]): see `data_scripts.FEATURES`. A stream is read up to the first
            label, without images.
        data ([`DataSettings`]): names the split, for the message.
        with_masks (`bool`): whether masks are trained.

    Returns:
        `str`, *optional*: a warning, where some sentences have no mask; a stream is not counted.

    Raises:
        ValueError: if no sentence has a phrase, or with masks none has a mask for all of its phrases.
    """
    if isinstance(rows, StreamedRows):
        labels = (label for row in rows.annotations() for label in labels_of_row(row))
        has_boxes = has_masks = False
        for is_box, is_mask in labels:
            has_boxes, has_masks = has_boxes or is_box, has_masks or is_mask
            if has_boxes and (has_masks or not with_masks):
                return None
        num_boxes = num_masks = 0
    else:
        num_boxes, num_masks = count_labels(rows, with_masks)
        has_boxes, has_masks = num_boxes > 0, num_masks > 0
    if not has_boxes:
        raise ValueError(
            f"No sentence of train_split={data.train_split!r} has a phrase that names an object: nothing to learn."
        )
    if with_masks and not has_masks:
        raise ValueError(
            f"model.predict_masks=True, but no sentence of train_split={data.train_split!r} has a mask for all of its "
            "phrases: the mask head would learn nothing. Train without masks (--model.predict_masks false), or on a "
            "dataset with segmentations."
        )
    if with_masks and num_masks < num_boxes:
        return f"{num_boxes - num_masks:,} of {num_boxes:,} training sentences have no mask and train the boxes alone."
    return None


def labels_of_row(row: dict) -> Iterator[tuple[bool, bool]]:
    """Yield for each sentence of a row whether it refers to an object, and whether each of its objects has a mask."""
    for sentence in row["sentences"]:
        named = [index for phrase in sentence["phrases"] for index in phrase["objects"]]
        yield bool(named), bool(named) and all(row["objects"][index]["segmentation"] is not None for index in named)


def count_labels(rows: datasets.Dataset, with_masks: bool) -> tuple[int, int]:
    """
    Count the sentences that refer to objects, and those whose objects all have masks, from columns alone.

    Args:
        rows (`datasets.Dataset`): see `data_scripts.FEATURES`.
        with_masks (`bool`): whether masks are looked for; otherwise none are counted.

    Returns:
        `(int, int)`: sentences with a box, sentences with a mask.
    """
    num_boxes = num_masks = 0
    columns = rows.select_columns(["objects", "sentences"] if with_masks else ["sentences"]).with_format("arrow")
    for table in columns.iter(10_000):
        sentences = table["sentences"].combine_chunks()
        phrases = sentences.flatten().field("phrases")
        # the objects of each phrase, as indices into those of their row
        named = phrases.flatten().field("objects")
        num_phrases, num_named = lengths_of(phrases), lengths_of(named)
        sentence_of_object = np.repeat(np.repeat(np.arange(len(num_phrases)), num_phrases), num_named)
        named_of_sentence = np.bincount(sentence_of_object, minlength=len(num_phrases))
        num_boxes += np.count_nonzero(named_of_sentence)
        if not with_masks:
            continue
        objects = table["objects"].combine_chunks()
        num_sentences, num_objects = lengths_of(sentences), lengths_of(objects)
        row_of_object = np.repeat(np.arange(len(num_sentences)), num_sentences)[sentence_of_object]
        indices = named.flatten().to_numpy(zero_copy_only=False)
        indices = indices + (np.cumsum(num_objects) - num_objects)[row_of_object]
        has_mask = objects.flatten().field("segmentation").is_valid().to_numpy(zero_copy_only=False)[indices]
        masks_of_sentence = np.bincount(sentence_of_object, weights=has_mask, minlength=len(num_phrases))
        num_masks += np.count_nonzero((masks_of_sentence == named_of_sentence) & (named_of_sentence > 0))
    return num_boxes, num_masks


def lengths_of(lists: pa.Array) -> np.ndarray:
    """Return how many items each list of an Arrow array has."""
    return pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False).astype(int)


def find_unfinished_warmup(num_warmup_steps: int, num_steps: int) -> str | None:
    """Return a warning where a run ends before its learning rates have reached their peak."""
    if num_warmup_steps < num_steps:
        return None
    return (
        f"The warm-up of {num_warmup_steps} steps is not over when the run ends after {num_steps}: the learning rates "
        "do not reach their peak."
    )
