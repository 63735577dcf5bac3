"""RefTR's losses, plain functions of predictions and labels."""

import torch
from torch import nn
from torchvision.ops import box_convert
from transformers import PreTrainedConfig


def generalized_box_iou(boxes1_xyxy: torch.Tensor, boxes2_xyxy: torch.Tensor, eps: float = 1e-7) -> torch.Tensor:
    """
    Generalised IoU (Rezatofighi et al., CVPR 2019) of boxes pair by pair, without the boolean indexing of
    torchvision's loss, which makes the host wait for the device.

    Args:
        boxes1_xyxy, boxes2_xyxy (`torch.Tensor` of shape `(..., 4)`): corners, top left first.
        eps (`float`, *optional*, defaults to 1e-7): keeps two boxes without extent from a division by zero.

    Returns:
        `torch.Tensor` of shape `(...)`: from -1 to 1.

    Example:

    ```python
    >>> import torch
    >>> from modeling_reftr.loss_reftr import generalized_box_iou

    >>> generalized_box_iou(torch.tensor([0.0, 0.0, 0.5, 1.0]), torch.tensor([0.0, 0.0, 1.0, 1.0]))
    tensor(0.5000)

    ```"""
    (left1, top1, right1, bottom1), (left2, top2, right2, bottom2) = boxes1_xyxy.unbind(-1), boxes2_xyxy.unbind(-1)
    width = (torch.min(right1, right2) - torch.max(left1, left2)).clamp(min=0)
    height = (torch.min(bottom1, bottom2) - torch.max(top1, top2)).clamp(min=0)
    intersection = width * height
    union = (right1 - left1) * (bottom1 - top1) + (right2 - left2) * (bottom2 - top2) - intersection
    hull_width = torch.max(right1, right2) - torch.min(left1, left2)
    hull = hull_width * (torch.max(bottom1, bottom2) - torch.min(top1, top2))
    return intersection / (union + eps) - (hull - union) / (hull + eps)


def box_losses(
    pred_boxes_cxcywh: torch.Tensor,
    target_boxes_cxcywh: torch.Tensor,
    mask: torch.Tensor,
    num_sentences: torch.Tensor | int,
) -> dict[str, torch.Tensor]:
    """
    L1 and generalised-IoU losses as published: summed over phrases, divided by the number of sentences.

    Args:
        pred_boxes_cxcywh, target_boxes_cxcywh (`torch.Tensor` of shape `(S, P, 4)`): (cx, cy, w, h) in 0..1.
        mask (`torch.Tensor` of shape `(S, P)`): True for the phrases that count.
        num_sentences (`int` or `torch.Tensor`): sentences in the global batch.

    Returns:
        `dict[str, torch.Tensor]`: `loss_bbox` and `loss_giou`, each of shape ().

    Example:

    ```python
    >>> import torch
    >>> from modeling_reftr.loss_reftr import box_losses

    >>> predicted, target = torch.tensor([[[0.25, 0.5, 0.5, 1.0]]]), torch.tensor([[[0.5, 0.5, 1.0, 1.0]]])
    >>> box_losses(predicted, target, mask=torch.tensor([[True]]), num_sentences=1)
    {'loss_bbox': tensor(0.7500), 'loss_giou': tensor(0.5000)}

    ```"""
    l1 = (pred_boxes_cxcywh - target_boxes_cxcywh).abs().sum(dim=-1)
    giou = 1 - generalized_box_iou(
        box_convert(pred_boxes_cxcywh, "cxcywh", "xyxy"), box_convert(target_boxes_cxcywh, "cxcywh", "xyxy")
    )
    zero = l1.new_zeros(())
    return {
        "loss_bbox": torch.where(mask, l1, zero).sum() / num_sentences,
        "loss_giou": torch.where(mask, giou, zero).sum() / num_sentences,
    }


def pad_target_boxes(
    labels: list[dict[str, torch.Tensor]], phrase_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Lay the labels' boxes into the phrase slots.

    Args:
        labels (`list[dict]` of length `S`): `boxes` (P or fewer, 4) each.
        phrase_mask (`torch.Tensor` of shape `(S, P)`): True for real phrases.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: boxes (S, P, 4) in float32, zero where there is none, and a mask (S, P) of
        the real phrases that have one. A box that leaves 0..1 by more than 0.01, is empty, inverted or not a number
        counts as none.

    Raises:
        ValueError: if there is not one label per sentence, a label has no boxes, or more than the sentence has slots.
    """
    num_sentences, num_slots = phrase_mask.shape
    if len(labels) != num_sentences:
        raise ValueError(f"{len(labels)} labels for {num_sentences} sentences: give one dict per sentence.")
    target_boxes = phrase_mask.new_zeros((num_sentences, num_slots, 4), dtype=torch.float32)
    for index, label in enumerate(labels):
        if "boxes" not in label:
            raise ValueError(f"labels[{index}] has {sorted(label)}, but no boxes: give a box for each phrase.")
        boxes = label["boxes"]
        if boxes.ndim != 2 or boxes.shape[1] != 4 or len(boxes) > num_slots:
            raise ValueError(
                f"labels[{index}]['boxes'] has shape {tuple(boxes.shape)}, expected (phrases, 4) with at most "
                f"{num_slots} phrases."
            )
        target_boxes[index, : len(boxes)] = boxes.to(target_boxes)
    corners = box_convert(target_boxes, "cxcywh", "xyxy")
    # what is not a number fails every comparison
    is_box = (target_boxes[..., 2:] > 0).all(dim=-1) & ((corners >= -0.01) & (corners <= 1.01)).all(dim=-1)
    return target_boxes.where(is_box[..., None], 0), phrase_mask & is_box


def mask_losses(
    pred_masks: torch.Tensor,
    phrase_mask: torch.Tensor,
    labels: list[dict[str, torch.Tensor]],
    num_sentences: torch.Tensor | int,
    size: tuple[int, int],
    pixel_mask: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """
    Focal (Lin et al., ICCV 2017; alpha 0.25, gamma 2) and dice losses as published: summed over the phrases that have
    a mask, divided by the number of sentences. Logits are resized bilinearly to the size of the padded image.

    Args:
        pred_masks (`torch.Tensor` of shape `(S, P, h1, w1)`): logits.
        phrase_mask (`torch.Tensor` of shape `(S, P)`): True for real phrases.
        labels (`list[dict]` of length `S`): `masks` (P or fewer, *size), True where the phrase is; or none.
        num_sentences (`int` or `torch.Tensor`): sentences in the global batch.
        size (`(height, width)`): of the padded images.
        pixel_mask (`torch.Tensor` of shape `(S, *size)`, *optional*):
            Nonzero for the pixels that count; absent: all, padding as background.

    Returns:
        `dict[str, torch.Tensor]`: `loss_mask` (focal, mean over pixels) and `loss_dice`, each of shape ().

    Raises:
        ValueError: if masks are not of the padded image's size, or more than the sentence has slots.

    Example:

    ```python
    >>> import torch
    >>> from modeling_reftr.loss_reftr import mask_losses

    >>> right = torch.tensor([[[[9.0, -9.0], [9.0, -9.0]]]])
    >>> labels = [{"masks": right[0] > 0}]
    >>> losses = mask_losses(right, torch.tensor([[True]]), labels, num_sentences=1, size=(2, 2))
    >>> {name: round(value.item(), 3) for name, value in losses.items()}
    {'loss_mask': 0.0, 'loss_dice': 0.0}

    ```"""
    logits, targets, counted, pixels = [], [], [], []
    for index, label in enumerate(labels):
        masks = label.get("masks")
        if masks is None:
            continue
        if masks.ndim != 3 or masks.shape[1:] != tuple(size) or len(masks) > pred_masks.shape[1]:
            raise ValueError(
                f"labels[{index}]['masks'] has shape {tuple(masks.shape)}, expected (phrases, {size[0]}, {size[1]}), "
                f"the size of the padded image, with at most {pred_masks.shape[1]} phrases."
            )
        logits.append(pred_masks[index, : len(masks)])
        targets.append(masks.to(pred_masks.device).bool())
        counted.append(phrase_mask[index, : len(masks)])
        if pixel_mask is not None:
            pixels.append(pixel_mask[index].expand(len(masks), -1, -1))
    if sum(map(len, logits)) == 0:
        # keep every weight in the graph: DDP fails on unused parameters
        nothing = pred_masks.sum() * 0
        return {"loss_mask": nothing, "loss_dice": nothing}
    logits = nn.functional.interpolate(torch.cat(logits)[:, None], size=tuple(size), mode="bilinear")[:, 0].flatten(1)
    targets = torch.cat(targets).flatten(1).to(logits.dtype)
    counts = torch.cat(pixels).flatten(1).bool().to(logits.dtype) if pixels else torch.ones_like(targets)
    probability = logits.sigmoid()
    cross_entropy = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    missed = probability + targets - 2 * probability * targets  # 1 - the probability given to the truth
    focal = (0.25 * targets + 0.75 * (1 - targets)) * cross_entropy * missed.square()
    focal = (focal * counts).sum(dim=1) / counts.sum(dim=1).clamp(min=1)
    probability, targets = probability * counts, targets * counts
    dice = 1 - (2 * (probability * targets).sum(dim=1) + 1) / (probability.sum(dim=1) + targets.sum(dim=1) + 1)
    counted, zero = torch.cat(counted), logits.new_zeros(())
    return {
        "loss_mask": torch.where(counted, focal, zero).sum() / num_sentences,
        "loss_dice": torch.where(counted, dice, zero).sum() / num_sentences,
    }


def grounding_loss(
    pred_boxes: torch.Tensor,
    phrase_mask: torch.Tensor,
    labels: list[dict[str, torch.Tensor]],
    config: PreTrainedConfig,
    auxiliary_outputs: list[dict[str, torch.Tensor]] | None = None,
    pred_masks: torch.Tensor | None = None,
    pixel_mask: torch.Tensor | None = None,
    image_index: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    RefTR's training loss: box losses of the last decoder layer and of every earlier one, and mask losses.

    Args:
        pred_boxes (`torch.Tensor` of shape `(S, P, 4)`): (cx, cy, w, h) in 0..1.
        phrase_mask (`torch.Tensor` of shape `(S, P)`): True for real phrases.
        labels (`list[dict]` of length `S`):
            `boxes` (P or fewer, 4) each, (cx, cy, w, h) in 0..1, and with masks `masks` (P or fewer, H, W).
        config (`RefTRConfig`): the losses' weights.
        auxiliary_outputs (`list[dict]`, *optional*): `pred_boxes` of each earlier decoder layer.
        pred_masks (`torch.Tensor` of shape `(S, P, h1, w1)`, *optional*): logits.
        pixel_mask (`torch.Tensor` of shape `(I, H, W)`, with `pred_masks`): 1 for the image, 0 for padding.
        image_index (`torch.Tensor` of shape `(S,)`, *optional*): the image of each sentence; absent: in order.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*, defaults to S): sentences in the global batch.

    Returns:
        `tuple[torch.Tensor, dict[str, torch.Tensor]]`: the weighted sum, and its parts under their published names.

    Raises:
        ValueError: see `pad_target_boxes` and `mask_losses`.
    """
    target_boxes, mask = pad_target_boxes(labels, phrase_mask)
    num_sentences = len(labels) if num_items_in_batch is None else num_items_in_batch
    loss_dict = box_losses(pred_boxes, target_boxes, mask, num_sentences)
    for index, outputs in enumerate(auxiliary_outputs or []):
        losses = box_losses(outputs["pred_boxes"], target_boxes, mask, num_sentences)
        loss_dict.update({f"{name}_{index}": value for name, value in losses.items()})
    if pred_masks is not None:
        counted_pixels = None
        if not config.mask_loss_over_padding:
            counted_pixels = pixel_mask if image_index is None else pixel_mask[image_index]
        size = tuple(pixel_mask.shape[-2:])
        loss_dict |= mask_losses(pred_masks, phrase_mask, labels, num_sentences, size, counted_pixels)
    weights = {
        "loss_bbox": config.bbox_loss_coefficient,
        "loss_giou": config.giou_loss_coefficient,
        "loss_mask": config.mask_loss_coefficient,
        "loss_dice": config.dice_loss_coefficient,
    }
    loss = sum(value * weights["_".join(name.split("_")[:2])] for name, value in loss_dict.items())
    return loss, loss_dict
