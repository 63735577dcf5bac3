"""Overlap of boxes pair by pair, without boolean indexing, which makes the host wait for the device."""

import torch


def generalized_box_iou(boxes1_xyxy: torch.Tensor, boxes2_xyxy: torch.Tensor, eps: float = 1e-7) -> torch.Tensor:
    """
    Return the generalised IoU (Rezatofighi et al., CVPR 2019) of boxes. Shapes are broadcast.

    Args:
        boxes1_xyxy, boxes2_xyxy (`torch.Tensor` of shape `(..., 4)`): corners, top left first.
        eps (`float`, *optional*, defaults to 1e-7): keeps two boxes without extent from a division by zero.

    Returns:
        `torch.Tensor` of shape `(...)`: from -1 to 1.

    Example:

    ```python
    >>> import torch
    >>> from modeling_reftr.overlap_reftr import generalized_box_iou

    >>> generalized_box_iou(torch.tensor([0.0, 0.0, 0.5, 1.0]), torch.tensor([0.0, 0.0, 1.0, 1.0]))
    tensor(0.5000)

    ```"""
    (left1, top1, right1, bottom1), (left2, top2, right2, bottom2) = boxes1_xyxy.unbind(-1), boxes2_xyxy.unbind(-1)
    intersection, union = intersection_and_union(boxes1_xyxy, boxes2_xyxy)
    hull_width = torch.max(right1, right2) - torch.min(left1, left2)
    hull = hull_width * (torch.max(bottom1, bottom2) - torch.min(top1, top2))
    return intersection / (union + eps) - (hull - union) / (hull + eps)


def paired_box_iou(boxes1_xyxy: torch.Tensor, boxes2_xyxy: torch.Tensor, eps: float = 1e-7) -> torch.Tensor:
    """
    Return the IoU of boxes. Shapes are broadcast.

    Args:
        boxes1_xyxy, boxes2_xyxy (`torch.Tensor` of shape `(..., 4)`): corners, top left first.
        eps (`float`, *optional*, defaults to 1e-7): keeps two boxes without extent from a division by zero.

    Returns:
        `torch.Tensor` of shape `(...)`: from 0 to 1.
    """
    intersection, union = intersection_and_union(boxes1_xyxy, boxes2_xyxy)
    return intersection / (union + eps)


def intersection_and_union(boxes1_xyxy: torch.Tensor, boxes2_xyxy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the areas that boxes share and cover; shapes (..., 4) are broadcast."""
    (left1, top1, right1, bottom1), (left2, top2, right2, bottom2) = boxes1_xyxy.unbind(-1), boxes2_xyxy.unbind(-1)
    width = (torch.min(right1, right2) - torch.max(left1, left2)).clamp(min=0)
    height = (torch.min(bottom1, bottom2) - torch.max(top1, top2)).clamp(min=0)
    intersection = width * height
    return intersection, (right1 - left1) * (bottom1 - top1) + (right2 - left2) * (bottom2 - top2) - intersection
