"""
Evaluation: a record for each phrase, and figures from the records. `evaluate` gathers, so every process calls it;
the other functions are arithmetic.
"""

import random
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import IterableDataset
from torchvision.ops import box_iou
from tqdm.auto import tqdm

from modeling_reftr.processing_reftr import from_coco_rle, to_coco_rle
from training_reftr.data import evaluation_loader, move
from training_reftr.metrics import THRESHOLDS, BoxMetrics, MaskMetrics


@torch.no_grad()
def evaluate(model, processor, rows, args, accelerator: Accelerator, description: str) -> list[dict]:
    """
    Ask the model about every phrase of a split, each once however many processes share the work.

    Returns:
        `list[dict]`, on every process, in the split's order of sentence and phrase: the target as the collator gives
        it, `pred_box` (xyxy in pixels) and `iou`. A phrase past the cut of its sentence has `pred_box` None, `iou` 0.
        With masks also `pred_segmentation` (COCO's run-length encoding, or None), and, where the truth is known,
        `mask_pixels` and `resized_mask_pixels`: (intersection, union) at the picture's original size, and at the size
        that it is resized to, where the published evaluation compares.
    """
    # without the wrapper, whose forward talks to the other processes: they may hold fewer batches
    model = accelerator.unwrap_model(model).eval()
    records = []
    loader = evaluation_loader(rows, processor, args, accelerator.process_index, accelerator.num_processes)
    for batch in tqdm(loader, desc=description, disable=not accelerator.is_main_process, leave=False):
        inputs = move(batch, accelerator.device)
        inputs.pop("labels")
        with accelerator.autocast():
            outputs = model(**inputs)
        sizes = [targets[0]["image_size"] for targets in batch["targets"]]
        answers = processor.post_process_grounding(outputs, sizes)
        if outputs.pred_masks is None:
            masks = [()] * len(answers)
        else:
            masks = zip(
                processor.image_processor.post_process_masks(outputs, sizes, two_step=args.two_step_masks),
                processor.image_processor.post_process_masks(outputs, two_step=True),
                strict=True,
            )
        for targets, answer, masks_of_sentence in zip(batch["targets"], answers, masks, strict=True):
            places = {slot: place for place, slot in enumerate(answer["phrase_indices"])}
            for target in targets:
                place = places.get(target["phrase"])
                record = {**target, "pred_box": None, "iou": 0.0}
                if place is not None:
                    pred_box = answer["boxes"][place].float().cpu()
                    record["pred_box"] = pred_box.tolist()
                    record["iou"] = box_iou(pred_box[None], torch.tensor([target["box"]])).item()
                if masks_of_sentence:
                    record |= compare_masks(*masks_of_sentence, place, target, processor)
                records.append(record)
    model.train()
    order = {image_id: index for index, image_id in enumerate(rows["image_id"])}
    return sorted(gather_object(records), key=lambda record: order[record["image_id"]])


def compare_masks(masks, resized_masks, place: int | None, target: dict, processor) -> dict:
    """The fields about masks of one phrase's record, whose answer is at `place`, or which has none."""
    fields = {"pred_segmentation": None if place is None else to_coco_rle(masks[place])}
    if target["segmentation"] is None:
        return fields
    truth = torch.from_numpy(from_coco_rle(target["segmentation"]))
    resized_truth = processor.image_processor.resize_masks(truth[None], resized_masks.shape[-2:])[0]
    for name, answers, expected in (
        ("mask_pixels", masks, truth),
        ("resized_mask_pixels", resized_masks, resized_truth),
    ):
        answer = torch.zeros_like(expected) if place is None else answers[place].cpu()
        fields[name] = ((answer & expected).sum().item(), (answer | expected).sum().item())
    return fields


def grounding_metrics(ious: Iterable[float]) -> dict[str, float | int]:
    """`BoxMetrics` of a list of IoUs."""
    metrics = BoxMetrics()
    metrics.update(ious)
    return metrics.compute()


def mask_metrics(records: list[dict]) -> dict[str, float | int]:
    """
    `MaskMetrics` of the records that have masks, each name behind `mask_`, and `mask_mean_iou_resized`, the published
    figure; empty where no record has.
    """
    records = [record for record in records if "mask_pixels" in record]
    if not records:
        return {}
    metrics, resized = MaskMetrics(), MaskMetrics()
    metrics.update(*zip(*(record["mask_pixels"] for record in records), strict=True))
    resized.update(*zip(*(record["resized_mask_pixels"] for record in records), strict=True))
    values = {f"mask_{name}": value for name, value in metrics.compute().items()}
    return values | {"mask_mean_iou_resized": resized.compute()["mean_iou"]}


def summarize(records: list[dict]) -> dict:
    """`grounding_metrics` and `mask_metrics` of all phrases, and under `per_kind` of each of their types."""
    by_kind = defaultdict(list)
    for record in records:
        for kind in record["types"]:
            by_kind[kind].append(record)

    def metrics(group: list[dict]) -> dict:
        return grounding_metrics(record["iou"] for record in group) | mask_metrics(group)

    return metrics(records) | {"per_kind": {kind: metrics(group) for kind, group in sorted(by_kind.items())}}


def swapped_expressions(records: list[dict]) -> dict:
    """
    Figures of the same answers when the expressions are swapped between the objects of an image: each object is held
    against the box that the model gave for words about another one. A model that does not read scores here as it
    does otherwise. Phrases of images where only one object is asked for cannot be swapped and are not counted.
    """
    by_image = defaultdict(list)
    for record in records:
        by_image[record["image_id"]].append(record)
    ious = []
    for group in by_image.values():
        for index, record in enumerate(group):
            others = group[index + 1 :] + group[:index]
            other = next(
                (other for other in others if other["object_id"] != record["object_id"] and other["pred_box"]), None
            )
            if other is not None:
                ious.append(box_iou(torch.tensor([other["pred_box"]]), torch.tensor([record["box"]])).item())
    return grounding_metrics(ious)


def constant_box(train_rows, records: list[dict], num_phrases: int = 2000, num_candidates: int = 500) -> dict:
    """
    Figures of the best answer that looks at nothing: of the boxes of some training phrases (relative to their
    picture), the one that hits most of them, given to every phrase of `records`.
    """
    draw = random.Random(0)
    boxes = []
    columns = train_rows.select_columns(["width", "height", "objects", "sentences"])
    if isinstance(columns, IterableDataset):
        columns = list(columns.take(num_phrases))
    for index in draw.sample(range(len(columns)), min(len(columns), num_phrases)):
        row = columns[index]
        phrases = [phrase for sentence in row["sentences"] for phrase in sentence["phrases"]]
        box = row["objects"][draw.choice(phrases)["objects"][0]]["box"]
        boxes.append(np.array(box) / [row["width"], row["height"], row["width"], row["height"]])
    boxes = torch.from_numpy(np.stack(boxes))
    candidates = torch.cat((boxes[:num_candidates], boxes.mean(dim=0, keepdim=True)))
    hits = (box_iou(candidates, boxes) > THRESHOLDS[0]).sum(dim=1)
    best = candidates[hits.argmax()]
    sizes = torch.tensor([record["image_size"][::-1] * 2 for record in records], dtype=torch.float64)
    true_boxes = torch.tensor([record["box"] for record in records], dtype=torch.float64)
    ious = box_iou(best[None], true_boxes / sizes)[0]
    return {**grounding_metrics(ious.tolist()), "box_xyxy": [round(value, 4) for value in best.tolist()]}
