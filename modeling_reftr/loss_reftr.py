"""RefTR's losses, plain functions of predictions and labels."""

import torch
from torchvision.ops import box_convert


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
    pred_boxes_cxcywh: torch.Tensor, target_boxes_cxcywh: torch.Tensor, mask: torch.Tensor, num_sentences
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
        ValueError: if there is not one label a sentence, a label has no boxes, or more than the sentence has slots.
    """
    num_sentences, num_slots = phrase_mask.shape
    if len(labels) != num_sentences:
        raise ValueError(f"{len(labels)} labels for {num_sentences} sentences: give one dict a sentence.")
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


def grounding_loss(
    pred_boxes: torch.Tensor,
    phrase_mask: torch.Tensor,
    labels: list[dict[str, torch.Tensor]],
    config,
    auxiliary_outputs: list[dict[str, torch.Tensor]] | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    RefTR's training loss: box losses of the last decoder layer and of every earlier one.

    Args:
        pred_boxes (`torch.Tensor` of shape `(S, P, 4)`): (cx, cy, w, h) in 0..1.
        phrase_mask (`torch.Tensor` of shape `(S, P)`): True for real phrases.
        labels (`list[dict]` of length `S`): `boxes` (P or fewer, 4) each, (cx, cy, w, h) in 0..1.
        config (`RefTRConfig`): the losses' weights.
        auxiliary_outputs (`list[dict]`, *optional*): `pred_boxes` of each earlier decoder layer.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*, defaults to S): sentences in the global batch.

    Returns:
        `tuple[torch.Tensor, dict[str, torch.Tensor]]`: the weighted sum, and its parts under their published names.

    Raises:
        ValueError: see `pad_target_boxes`.
    """
    target_boxes, mask = pad_target_boxes(labels, phrase_mask)
    num_sentences = len(labels) if num_items_in_batch is None else num_items_in_batch
    loss_dict = box_losses(pred_boxes, target_boxes, mask, num_sentences)
    for index, outputs in enumerate(auxiliary_outputs or []):
        losses = box_losses(outputs["pred_boxes"], target_boxes, mask, num_sentences)
        loss_dict.update({f"{name}_{index}": value for name, value in losses.items()})
    weights = {"loss_bbox": config.bbox_loss_coefficient, "loss_giou": config.giou_loss_coefficient}
    loss = sum(value * weights["_".join(name.split("_")[:2])] for name, value in loss_dict.items())
    return loss, loss_dict
