"""
Grounding metrics for `transformers.Trainer`. `Trainer` truncates the last batch by its number of rows, whereas a row
has several sentences here. Each batch is therefore scored before `Trainer` gathers it.
"""

import numpy as np
import torch
from torchvision.ops import box_convert
from transformers import EvalPrediction

from modeling_reftr.image_processing_reftr import resize_logits_in_two_steps
from training_reftr.metrics import BoxMetrics, MaskMetrics, box_ious


NO_MASK = -1  # in place of counted pixels; `Trainer` pads with a negative value too


@torch.no_grad()
def score_phrases(outputs: tuple[torch.Tensor, ...], labels: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """
    Score each phrase of a batch: the `preprocess_logits_for_metrics` of a `Trainer` whose batches come from
    `GroundingCollator(processor, with_targets=False)`.

    Args:
        outputs (`tuple[torch.Tensor]`):
            Outputs that the model's configuration keeps for `Trainer`: `pred_boxes` (S, P, 4), `phrase_mask` (S, P)
            and, from a model that predicts masks, `pred_masks` (S, P, h, w).
        labels (`list[dict]` of length `S`): of the batch, with `boxes`, `size` and, for some or all, `masks`.

    Returns:
        `torch.Tensor` of shape `(1, phrases, 3)`: for each phrase with one target the IoU of its box, 0 without an
        answer, and the number of pixels in the intersection and in the union of its masks at the size of the model's
        input, -1 without masks.
    """
    pred_boxes, phrase_mask, *pred_masks = outputs
    scores = []
    for index, label in enumerate(labels):
        slots, rows = slots_with_one_target(label)
        true_boxes = label["boxes"][rows].double()
        is_answered = phrase_mask[index, slots]
        pair = [box_convert(boxes, "cxcywh", "xyxy") for boxes in (pred_boxes[index, slots].double(), true_boxes)]
        ious = torch.from_numpy(box_ious(*(boxes.cpu() for boxes in pair)))
        ious = ious.to(is_answered.device).where(is_answered, 0.0)
        pixels = ious.new_full((len(slots), 2), NO_MASK)
        if pred_masks and "masks" in label:
            height, width = label["size"].tolist()
            for number, (slot, row) in enumerate(zip(slots.tolist(), rows.tolist(), strict=True)):
                true_mask = label["masks"][row]
                mask = resize_logits_in_two_steps(
                    pred_masks[0][index, slot], true_mask.shape, (height, width), (height, width), threshold=0.5
                )
                mask, true_mask = mask & bool(is_answered[number]), true_mask[:height, :width].bool()
                pixels[number] = torch.stack([(mask & true_mask).sum(), (mask | true_mask).sum()])
        scores.append(torch.cat((ious[:, None], pixels), dim=1))
    return torch.cat(scores)[None]


def slots_with_one_target(label: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the slots of the phrases of a label that have one target, and the rows of their targets."""
    if "target_slots" not in label:
        slots = torch.arange(len(label["boxes"]), device=label["boxes"].device)
        return slots, slots
    slots, counts = label["target_slots"].unique(return_counts=True)
    slots = slots[counts == 1]
    return slots, (label["target_slots"] == slots[:, None]).int().argmax(dim=1) if len(slots) else slots


def compute_metrics(prediction: EvalPrediction) -> dict[str, float | int]:
    """
    Return the metrics of all phrases: the `compute_metrics` of a `Trainer`, together with `score_phrases`.

    Args:
        prediction (`EvalPrediction`): its `predictions` are the scores that `score_phrases` returned.

    Returns:
        `dict`: the metrics of `BoxMetrics` and, if there are masks, of `MaskMetrics` at the size of the model's input,
        as `mask_mean_iou_resized` (the published metric) and so on.

    Raises:
        ValueError: if the predictions are not scores.

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers import EvalPrediction

    >>> from training_reftr.trainer_metrics import compute_metrics

    >>> scores = np.array([[[0.75, -1, -1], [0.25, -1, -1]], [[1.0, -1, -1], [-100, -100, -100]]])
    >>> values = compute_metrics(EvalPrediction(predictions=scores, label_ids=None))
    >>> values["num_phrases"], round(values["accuracy@0.5"], 2), round(values["mean_iou"], 2)
    (3, 0.67, 0.67)

    ```"""
    batches = prediction.predictions
    batches = batches if isinstance(batches, list) else [batches]
    if not all(isinstance(scores, np.ndarray) and scores.ndim == 3 and scores.shape[2] == 3 for scores in batches):
        raise ValueError(
            "The predictions are not scores of phrases: give Trainer preprocess_logits_for_metrics=score_phrases "
            "together with compute_metrics=compute_metrics."
        )
    scores = np.concatenate([scores.reshape(-1, 3) for scores in batches])
    ious, intersections, unions = scores[scores[:, 0] >= 0].T
    boxes, masks = BoxMetrics(), MaskMetrics()
    boxes.update(ious)
    has_mask = unions > NO_MASK
    if not has_mask.any():
        return boxes.compute()
    masks.update(intersections[has_mask], unions[has_mask])
    return boxes.compute() | {f"mask_{name}_resized": value for name, value in masks.compute().items()}
