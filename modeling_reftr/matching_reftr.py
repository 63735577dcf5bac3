"""Targets of phrases, and the assignment of queries to them."""

from typing import NamedTuple

import torch
from torchvision.ops import box_convert
from transformers import PreTrainedConfig
from transformers.utils import is_scipy_available

from .overlap_reftr import generalized_box_iou


class Targets(NamedTuple):
    """
    What the phrases of a batch refer to, padded to the same number T of targets per phrase.

    Args:
        boxes_cxcywh (`torch.Tensor` of shape `(S, P, T, 4)`): in 0..1, float32, zero for padding.
        is_target (`torch.Tensor` of shape `(S, P, T)`): True for targets, False for padding.
        is_absent (`torch.Tensor` of shape `(S, P)`): True for real phrases that are known to refer to nothing.
        rows (`list[torch.Tensor | None]` of length `S`):
            See `number_targets`; None if each row of the label is the one target of the slot of its number.
    """

    boxes_cxcywh: torch.Tensor
    is_target: torch.Tensor
    is_absent: torch.Tensor
    rows: list[torch.Tensor | None]


def pad_targets(labels: list[dict[str, torch.Tensor]], phrase_mask: torch.Tensor) -> Targets:
    """
    Assign the targets of labels to the phrase slots.

    Args:
        labels (`list[dict]` of length `S`): see [`RefTRForVisualGrounding.forward`].
        phrase_mask (`torch.Tensor` of shape `(S, P)`): True for real phrases.

    Returns:
        [`Targets`]. A box that leaves 0..1 by more than 0.01, is empty, inverted or not a number is not a target.

    Raises:
        ValueError: if there is not one label per sentence, or a label has no boxes, more than the sentence has slots,
            or values for slots that the sentence does not have.
    """
    num_sentences, num_slots = phrase_mask.shape
    if len(labels) != num_sentences:
        raise ValueError(f"{len(labels)} labels for {num_sentences} sentences: give one dict per sentence.")
    rows, is_absent = [], torch.zeros_like(phrase_mask)
    for index, label in enumerate(labels):
        rows.append(number_targets(label, num_slots, f"labels[{index}]"))
        absent = label.get("is_absent")
        if absent is not None:
            if absent.ndim != 1 or len(absent) > num_slots:
                raise ValueError(
                    f"labels[{index}]['is_absent'] has shape {tuple(absent.shape)}, expected (phrases,) with at most "
                    f"{num_slots} phrases."
                )
            is_absent[index, : len(absent)] = absent.to(is_absent)
    # With one target per phrase, as published, nothing is read off the device
    num_targets = max([1, *(int(part[:, 1].max()) + 1 for part in rows if part is not None and len(part))])
    boxes = phrase_mask.new_zeros((num_sentences, num_slots, num_targets, 4), dtype=torch.float32)
    for index, (label, of_sentence) in enumerate(zip(labels, rows, strict=True)):
        if of_sentence is None:
            boxes[index, : len(label["boxes"]), 0] = label["boxes"].to(boxes)
        else:
            slots, numbers = of_sentence.to(boxes.device).unbind(1)
            boxes[index, slots, numbers] = label["boxes"].to(boxes)
    corners = box_convert(boxes, "cxcywh", "xyxy")
    # what is not a number fails every comparison
    is_box = (boxes[..., 2:] > 0).all(dim=-1) & ((corners >= -0.01) & (corners <= 1.01)).all(dim=-1)
    return Targets(boxes.where(is_box[..., None], 0), phrase_mask[..., None] & is_box, phrase_mask & is_absent, rows)


def number_targets(label: dict[str, torch.Tensor], num_slots: int, name: str) -> torch.Tensor | None:
    """
    Return the phrase slot of each row of a label, and its number among the targets of the phrase; None if the label
    has no `target_slots`, and each row is the one target of the slot of its number.

    Args:
        label (`dict[str, torch.Tensor]`): of a sentence.
        num_slots (`int`): P.
        name (`str`): of the label, for messages.

    Returns:
        `torch.Tensor` of shape `(rows, 2)`, on the CPU.

    Raises:
        ValueError: see `pad_targets`.

    Example:

    ```python
    >>> import torch
    >>> from modeling_reftr.matching_reftr import number_targets

    >>> number_targets({"boxes": torch.rand(3, 4), "target_slots": torch.tensor([2, 0, 2])}, 3, "label").tolist()
    [[2, 0], [0, 0], [2, 1]]

    ```"""
    if "boxes" not in label:
        raise ValueError(f"{name} has {sorted(label)}, but no boxes: give a box for each phrase.")
    boxes, slots = label["boxes"], label.get("target_slots")
    if boxes.ndim != 2 or boxes.shape[1] != 4 or (slots is None and len(boxes) > num_slots):
        raise ValueError(
            f"{name}['boxes'] has shape {tuple(boxes.shape)}, expected (phrases, 4) with at most {num_slots} phrases, "
            "or (targets, 4) with the phrase slot of each in 'target_slots'."
        )
    if slots is None:
        return None
    slots = slots.cpu()
    if slots.shape != (len(boxes),):
        raise ValueError(
            f"{name}['target_slots'] has shape {tuple(slots.shape)}, expected ({len(boxes)},): the phrase slot of "
            "each box."
        )
    if len(slots) and not 0 <= slots.min() <= slots.max() < num_slots:
        raise ValueError(
            f"{name}['target_slots'] is {slots.tolist()}; expected phrase slots from 0 to {num_slots - 1}."
        )
    # the earlier rows of the same slot
    numbers = (slots[:, None] == slots).tril(-1).sum(dim=1)
    return torch.stack((slots.long(), numbers), dim=1)


def matching_cost(
    boxes_cxcywh: torch.Tensor,
    targets: Targets,
    bbox_coefficient: float,
    giou_coefficient: float,
    presence: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Return the cost of each query for each target of its phrase, as in DETR (Carion et al., ECCV 2020, equation 2):
    the weighted box losses, less the probability of presence.

    Args:
        boxes_cxcywh (`torch.Tensor` of shape `(S, P, K, 4)`): predictions in 0..1.
        targets ([`Targets`]): of the batch.
        bbox_coefficient, giou_coefficient (`float`): weights of the L1 distance and of the generalised IoU.
        presence (`torch.Tensor` of shape `(S, P, K)`, *optional*): probabilities.

    Returns:
        `torch.Tensor` of shape `(S, P, K, T)`.
    """
    predicted, expected = boxes_cxcywh[..., None, :], targets.boxes_cxcywh[:, :, None]
    distance = (predicted - expected).abs().sum(dim=-1)
    giou = generalized_box_iou(box_convert(predicted, "cxcywh", "xyxy"), box_convert(expected, "cxcywh", "xyxy"))
    cost = bbox_coefficient * distance - giou_coefficient * giou
    return cost if presence is None else cost - presence[..., None]


def match_queries(cost: torch.Tensor, is_target: torch.Tensor) -> torch.Tensor:
    """
    Assign the first queries of each phrase to its targets, as many as it has, one to one, with the lowest total cost.

    All other queries are to find nothing. So the first query alone answers a phrase with one target, as in the
    published model.

    Args:
        cost (`torch.Tensor` of shape `(S, P, K, T)`): see `matching_cost`.
        is_target (`torch.Tensor` of shape `(S, P, T)`): True for targets, False for padding.

    Returns:
        `torch.Tensor` of shape `(S, P, K)`, on the CPU: the target of each query, -1 for none. With more targets than
        queries, some targets have no query.

    Raises:
        ImportError: if a phrase has several targets and several queries, and SciPy is not installed.

    Example:

    ```python
    >>> import torch
    >>> from modeling_reftr.matching_reftr import match_queries

    >>> cost = torch.tensor([[[[1.0, 2.0], [1.5, 9.0], [0.0, 0.0]]]])
    >>> match_queries(cost, torch.tensor([[[True, True]]])).tolist()
    [[[1, 0, -1]]]

    ```"""
    cost, is_target = cost.detach().float().cpu(), is_target.cpu()
    matches = torch.full(cost.shape[:3], -1)
    for sentence, slot in is_target.any(dim=-1).nonzero().tolist():
        targets = is_target[sentence, slot].nonzero().flatten()
        of_phrase = cost[sentence, slot, : len(targets), targets]
        if len(of_phrase) == 1:
            matches[sentence, slot, 0] = targets[of_phrase.argmin()]
            continue
        if not is_scipy_available():
            raise ImportError(
                "Several targets of a phrase are assigned by SciPy, which is not installed: install scipy."
            )
        from scipy.optimize import linear_sum_assignment

        queries, columns = linear_sum_assignment(of_phrase.numpy())
        matches[sentence, slot, queries] = targets[columns]
    return matches


class Assignment(NamedTuple):
    """
    The target of each query.

    Args:
        boxes_cxcywh (`torch.Tensor` of shape `(S, P, K, 4)`): the target's box in 0..1, zero for none.
        mask (`torch.Tensor` of shape `(S, P, K)`): True for queries with a target.
        weights (`torch.Tensor` of shape `(S, P, K)`, *optional*):
            1 over the number of queries of the phrase that have a target; None if that is 1 for all.
        matches (`torch.Tensor` of shape `(S, P, K)`, *optional*): see `match_queries`; None if there is one choice.
    """

    boxes_cxcywh: torch.Tensor
    mask: torch.Tensor
    weights: torch.Tensor | None = None
    matches: torch.Tensor | None = None


def assign_targets(
    boxes_cxcywh: torch.Tensor, targets: Targets, config: PreTrainedConfig, presence_logits: torch.Tensor | None = None
) -> Assignment:
    """
    Assign the queries of each phrase to its targets. With one query and one target per phrase, as published, there is
    nothing to choose, and the host does not wait for the device.

    Args:
        boxes_cxcywh (`torch.Tensor` of shape `(S, P, K, 4)`): predictions in 0..1.
        targets ([`Targets`]): of the batch.
        config (`RefTRConfig`): weights of the losses.
        presence_logits (`torch.Tensor` of shape `(S, P, K)`, *optional*): predictions.
    """
    if boxes_cxcywh.shape[2] == targets.is_target.shape[2] == 1:
        return Assignment(targets.boxes_cxcywh, targets.is_target)
    with torch.no_grad():
        presence = None if presence_logits is None else presence_logits.sigmoid()
        cost = matching_cost(
            boxes_cxcywh, targets, config.bbox_loss_coefficient, config.giou_loss_coefficient, presence
        )
        matches = match_queries(cost, targets.is_target).to(boxes_cxcywh.device)
        mask = matches >= 0
        boxes = targets.boxes_cxcywh.gather(2, matches.clamp(min=0)[..., None].expand(-1, -1, -1, 4))
        weights = mask / mask.sum(dim=-1, keepdim=True).clamp(min=1)
    return Assignment(boxes.where(mask[..., None], 0), mask, weights, matches)


class QueryPairs(NamedTuple):
    """
    Queries of a sentence, and the rows of its labels that they are assigned to.

    Args:
        queries (`torch.Tensor` of shape `(N,)`): `slot * K + number`.
        rows (`torch.Tensor` of shape `(N,)`): of the labels.
        weights (`torch.Tensor` of shape `(N,)`): see [`Assignment`].
        num_rows (`int`): rows of the labels.
    """

    queries: torch.Tensor
    rows: torch.Tensor
    weights: torch.Tensor
    num_rows: int


def pair_queries(assigned: Assignment, targets: Targets) -> list[QueryPairs] | None:
    """Return the pairs of each sentence; None if each query is assigned to the row of its number."""
    if assigned.matches is None and all(rows is None for rows in targets.rows):
        return None
    num_queries = assigned.mask.shape[-1]
    matches = torch.where(assigned.mask, 0, -1) if assigned.matches is None else assigned.matches
    matches, pairs = matches.cpu(), []
    weights = torch.ones(matches.shape) if assigned.weights is None else assigned.weights.cpu()
    for rows, of_sentence, weights_of_sentence in zip(targets.rows, matches, weights, strict=True):
        if rows is None:
            slots = torch.arange(len(of_sentence))
            numbers = torch.zeros_like(slots)
        else:
            slots, numbers = rows.unbind(1)
        row, query = (of_sentence[slots] == numbers[:, None]).nonzero().unbind(1)
        pairs.append(
            QueryPairs(slots[row] * num_queries + query, row, weights_of_sentence[slots[row], query], len(slots))
        )
    return pairs
