"""Select the answers of a model among its queries."""

from typing import Any, NamedTuple

import torch
from transformers.utils import ModelOutput

from .inputs_reftr import to_threshold


class RankedQueries(NamedTuple):
    """
    The queries of each phrase, from the highest score to the lowest.

    Args:
        boxes_cxcywh (`torch.Tensor` of shape `(S, P, K, 4)`): boxes in 0..1.
        scores (`torch.Tensor` of shape `(S, P, K)`): presence, or 1 from a model that does not predict it.
        is_answer (`torch.Tensor` of shape `(S, P, K)`): True for the queries that answer a real phrase.
        mask_logits (`torch.Tensor` of shape `(S, P, K, h1, w1)`, *optional*): only from a model that predicts masks.
    """

    boxes_cxcywh: torch.Tensor
    scores: torch.Tensor
    is_answer: torch.Tensor
    mask_logits: torch.Tensor | None = None


def rank_queries(outputs: ModelOutput | Any, threshold: float | None = None) -> RankedQueries:
    """
    Rank the queries of outputs, and select those that answer.

    Args:
        outputs ([`RefTRVisualGroundingOutput`]): outputs of the model.
        threshold (`float`, *optional*):
            The presence above which a query answers, by default the one that is stored in the model's configuration.
            A model without presence answers every phrase, with a score of 1.

    Raises:
        ValueError: if the threshold is not a number.

    Example:

    ```python
    >>> import torch
    >>> from types import SimpleNamespace
    >>> from modeling_reftr.presence_reftr import rank_queries

    >>> outputs = SimpleNamespace(
    ...     query_boxes=torch.rand(1, 1, 2, 4),
    ...     presence=torch.tensor([[[0.2, 0.9]]]),
    ...     presence_threshold=torch.tensor(0.5),
    ...     phrase_mask=torch.tensor([[True]]),
    ... )
    >>> rank_queries(outputs).is_answer.tolist()
    [[[True, False]]]

    ```"""
    threshold = None if threshold is None else to_threshold(threshold)
    presence, masks = getattr(outputs, "presence", None), getattr(outputs, "pred_masks", None)
    if presence is None:
        scores = torch.ones_like(outputs.pred_boxes[..., :1])
        is_answer = outputs.phrase_mask[..., None]
        if threshold is not None and threshold >= 1:
            is_answer = torch.zeros_like(is_answer)
        masks = None if masks is None else masks[:, :, None]
        return RankedQueries(outputs.pred_boxes[:, :, None], scores, is_answer, masks)
    threshold = outputs.presence_threshold if threshold is None else threshold
    scores, order = presence.sort(dim=-1, descending=True, stable=True)
    boxes = outputs.query_boxes.take_along_dim(order[..., None], dim=2)
    if masks is not None:
        masks = outputs.query_masks.take_along_dim(order[..., None, None], dim=2)
    return RankedQueries(boxes, scores, outputs.phrase_mask[..., None] & (scores > threshold), masks)
