"""RefTR's losses, plain functions of predictions and labels."""

import torch
from torch import nn
from torchvision.ops import box_convert
from transformers import PreTrainedConfig

from .matching_reftr import Assignment, QueryPairs, Targets, assign_targets, pad_targets, pair_queries
from .overlap_reftr import generalized_box_iou, paired_box_iou


PRESENCE_IOU = 0.5  # of a box that answers its phrase, as in the accuracy of referring expression comprehension


def box_losses(
    pred_boxes_cxcywh: torch.Tensor,
    target_boxes_cxcywh: torch.Tensor,
    mask: torch.Tensor,
    num_sentences: torch.Tensor | int,
    weights: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """
    Return the L1 and generalised-IoU losses as published: summed over phrases, divided by the number of sentences.

    Args:
        pred_boxes_cxcywh, target_boxes_cxcywh (`torch.Tensor` of shape `(S, P, K, 4)`): (cx, cy, w, h) in 0..1.
        mask (`torch.Tensor` of shape `(S, P, K)`): True for the queries that count.
        num_sentences (`int` or `torch.Tensor`): sentences in the global batch.
        weights (`torch.Tensor` of shape `(S, P, K)`, *optional*): of the queries; absent: 1.

    Returns:
        `dict[str, torch.Tensor]`: `loss_bbox` and `loss_giou`, each of shape ().

    Example:

    ```python
    >>> import torch
    >>> from modeling_reftr.loss_reftr import box_losses

    >>> predicted, target = torch.tensor([[[[0.25, 0.5, 0.5, 1.0]]]]), torch.tensor([[[[0.5, 0.5, 1.0, 1.0]]]])
    >>> box_losses(predicted, target, mask=torch.tensor([[[True]]]), num_sentences=1)
    {'loss_bbox': tensor(0.7500), 'loss_giou': tensor(0.5000)}

    ```"""
    l1 = (pred_boxes_cxcywh - target_boxes_cxcywh).abs().sum(dim=-1)
    giou = 1 - generalized_box_iou(
        box_convert(pred_boxes_cxcywh, "cxcywh", "xyxy"), box_convert(target_boxes_cxcywh, "cxcywh", "xyxy")
    )
    if weights is not None:
        l1, giou = l1 * weights, giou * weights
    zero = l1.new_zeros(())
    return {
        "loss_bbox": torch.where(mask, l1, zero).sum() / num_sentences,
        "loss_giou": torch.where(mask, giou, zero).sum() / num_sentences,
    }


def mask_losses(
    pred_masks: torch.Tensor,
    phrase_mask: torch.Tensor,
    labels: list[dict[str, torch.Tensor]],
    num_sentences: torch.Tensor | int,
    size: tuple[int, int],
    pixel_mask: torch.Tensor | None = None,
    pairs: list[QueryPairs] | None = None,
) -> dict[str, torch.Tensor]:
    """
    Return the focal (Lin et al., ICCV 2017; alpha 0.25, gamma 2) and dice losses as published: summed over the phrases
    that have a mask, divided by the number of sentences. Logits are resized bilinearly to the size of padded images.

    Args:
        pred_masks (`torch.Tensor` of shape `(S, Q, h1, w1)`): logits of the queries.
        phrase_mask (`torch.Tensor` of shape `(S, Q)`): True for the queries of real phrases.
        labels (`list[dict]` of length `S`): `masks` (rows, *size), True where the target is; or none.
        num_sentences (`int` or `torch.Tensor`): sentences in the global batch.
        size (`(height, width)`): of the padded images.
        pixel_mask (`torch.Tensor` of shape `(S, *size)`, *optional*):
            Nonzero for the pixels that count; absent: all, padding as background.
        pairs (`list[QueryPairs]`, *optional*): which queries predict which masks; absent: each the one of its number.

    Returns:
        `dict[str, torch.Tensor]`: `loss_mask` (focal, mean over pixels) and `loss_dice`, each of shape ().

    Raises:
        ValueError: if masks are not of the padded image's size, or are not as many as expected.

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
    logits, targets, counted, pixels, weights = [], [], [], [], []
    for index, label in enumerate(labels):
        masks = label.get("masks")
        if masks is None:
            continue
        most = pred_masks.shape[1] if pairs is None else pairs[index].num_rows
        if masks.ndim != 3 or masks.shape[1:] != tuple(size) or len(masks) > most:
            raise ValueError(
                f"labels[{index}]['masks'] has shape {tuple(masks.shape)}, expected (targets, {size[0]}, {size[1]}), "
                f"the size of the padded image, with at most {most} targets."
            )
        queries, rows = slice(len(masks)), slice(None)
        if pairs is not None:
            has_mask = pairs[index].rows < len(masks)
            queries, rows = pairs[index].queries[has_mask], pairs[index].rows[has_mask]
            weights.append(pairs[index].weights[has_mask].to(pred_masks))
        logits.append(pred_masks[index, queries])
        targets.append(masks[rows].to(pred_masks.device).bool())
        counted.append(phrase_mask[index, queries])
        if pixel_mask is not None:
            pixels.append(pixel_mask[index].expand(len(logits[-1]), -1, -1))
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
    if weights:
        focal, dice = focal * torch.cat(weights), dice * torch.cat(weights)
    counted, zero = torch.cat(counted), logits.new_zeros(())
    return {
        "loss_mask": torch.where(counted, focal, zero).sum() / num_sentences,
        "loss_dice": torch.where(counted, dice, zero).sum() / num_sentences,
    }


def presence_loss(
    presence_logits: torch.Tensor,
    pred_boxes_cxcywh: torch.Tensor,
    assigned: Assignment,
    is_known: torch.Tensor,
    num_sentences: torch.Tensor | int,
) -> torch.Tensor:
    """
    Return the binary cross-entropy of presence: mean over the queries of a phrase, summed over phrases, divided by the
    number of sentences. A query is to answer if it is assigned to a target that its box overlaps by an IoU of more
    than `PRESENCE_IOU`.

    Args:
        presence_logits (`torch.Tensor` of shape `(S, P, K)`): predictions.
        pred_boxes_cxcywh (`torch.Tensor` of shape `(S, P, K, 4)`): (cx, cy, w, h) in 0..1.
        assigned ([`Assignment`]): of the queries.
        is_known (`torch.Tensor` of shape `(S, P)`): True for the phrases that count.
        num_sentences (`int` or `torch.Tensor`): sentences in the global batch.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    overlap = paired_box_iou(
        box_convert(pred_boxes_cxcywh.detach(), "cxcywh", "xyxy"), box_convert(assigned.boxes_cxcywh, "cxcywh", "xyxy")
    )
    is_right = (assigned.mask & (overlap > PRESENCE_IOU)).to(presence_logits.dtype)
    entropy = nn.functional.binary_cross_entropy_with_logits(presence_logits, is_right, reduction="none").mean(dim=-1)
    return torch.where(is_known, entropy, entropy.new_zeros(())).sum() / num_sentences


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
    presence_logits: torch.Tensor | None = None,
    query_boxes: torch.Tensor | None = None,
    query_masks: torch.Tensor | None = None,
    targets: Targets | None = None,
    assigned: Assignment | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    Return RefTR's training loss: box losses of the last decoder layer and of every earlier one, mask losses, and the
    presence loss.

    Args:
        pred_boxes (`torch.Tensor` of shape `(S, P, 4)`): (cx, cy, w, h) in 0..1.
        phrase_mask (`torch.Tensor` of shape `(S, P)`): True for real phrases.
        labels (`list[dict]` of length `S`): see [`RefTRForVisualGrounding.forward`].
        config (`RefTRConfig`): the losses' weights.
        auxiliary_outputs (`list[dict]`, *optional*): `pred_boxes`, or `query_boxes`, of each earlier decoder layer.
        pred_masks (`torch.Tensor` of shape `(S, P, h1, w1)`, *optional*): logits.
        pixel_mask (`torch.Tensor` of shape `(I, H, W)`, with `pred_masks`): 1 for the image, 0 for padding.
        image_index (`torch.Tensor` of shape `(S,)`, *optional*): the image of each sentence; absent: in order.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*, defaults to S): sentences in the global batch.
        presence_logits (`torch.Tensor` of shape `(S, P, K)`, *optional*): of the queries.
        query_boxes (`torch.Tensor` of shape `(S, P, K, 4)`, *optional*): of the queries; absent: `pred_boxes`.
        query_masks (`torch.Tensor` of shape `(S, P, K, h1, w1)`, *optional*): of the queries; absent: `pred_masks`.
        targets ([`Targets`], *optional*): of the labels, if they are known.
        assigned ([`Assignment`], *optional*): of the queries of the last layer, if it is known.

    Returns:
        `tuple[torch.Tensor, dict[str, torch.Tensor]]`: the weighted sum, and its parts under their published names.

    Raises:
        ValueError: see `pad_targets` and `mask_losses`.
    """
    targets = pad_targets(labels, phrase_mask) if targets is None else targets
    num_sentences = len(labels) if num_items_in_batch is None else num_items_in_batch
    query_boxes = pred_boxes[:, :, None] if query_boxes is None else query_boxes
    if assigned is None:
        assigned = assign_targets(query_boxes, targets, config, presence_logits)
    loss_dict = box_losses(query_boxes, assigned.boxes_cxcywh, assigned.mask, num_sentences, assigned.weights)
    for index, outputs in enumerate(auxiliary_outputs or []):
        boxes = outputs["query_boxes"] if "query_boxes" in outputs else outputs["pred_boxes"][:, :, None]
        earlier = assign_targets(boxes, targets, config)
        losses = box_losses(boxes, earlier.boxes_cxcywh, earlier.mask, num_sentences, earlier.weights)
        loss_dict.update({f"{name}_{index}": value for name, value in losses.items()})
    if presence_logits is not None:
        is_known = targets.is_target.any(dim=-1) | targets.is_absent
        loss_dict["loss_presence"] = presence_loss(presence_logits, query_boxes, assigned, is_known, num_sentences)
    query_masks = pred_masks if query_masks is None else query_masks.flatten(1, 2)
    if query_masks is not None:
        counted_pixels = None
        if not config.mask_loss_over_padding:
            counted_pixels = pixel_mask if image_index is None else pixel_mask[image_index]
        size = tuple(pixel_mask.shape[-2:])
        loss_dict |= mask_losses(
            query_masks,
            phrase_mask.repeat_interleave(query_boxes.shape[2], dim=1),
            labels,
            num_sentences,
            size,
            counted_pixels,
            pair_queries(assigned, targets),
        )
    weights = {
        "loss_bbox": config.bbox_loss_coefficient,
        "loss_giou": config.giou_loss_coefficient,
        "loss_mask": config.mask_loss_coefficient,
        "loss_dice": config.dice_loss_coefficient,
        "loss_presence": config.presence_loss_coefficient,
    }
    loss = sum(value * weights["_".join(name.split("_")[:2])] for name, value in loss_dict.items())
    return loss, loss_dict
