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
from torchvision.ops import box_iou
from tqdm.auto import tqdm

from training_reftr.data import evaluation_loader, move


IOU_THRESHOLD = 0.5  # a hit is strictly more


@torch.no_grad()
def evaluate(model, processor, rows, args, accelerator: Accelerator, description: str) -> list[dict]:
    """
    Ask the model about every phrase of a split, each once however many processes share the work.

    Returns:
        `list[dict]`, on every process, in the split's order of sentence and phrase: the target as the collator gives
        it, `pred_box` (xyxy in pixels) and `iou`. A phrase past the cut of its sentence has `pred_box` None, `iou` 0.
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
        for targets, answer in zip(batch["targets"], answers, strict=True):
            boxes = dict(zip(answer["phrase_indices"], answer["boxes"].float().cpu(), strict=True))
            for target in targets:
                pred_box = boxes.get(target["phrase"])
                iou = 0.0
                if pred_box is not None:
                    iou = box_iou(pred_box[None], torch.tensor([target["box"]])).item()
                    pred_box = pred_box.tolist()
                records.append({**target, "pred_box": pred_box, "iou": iou})
    model.train()
    order = {image_id: index for index, image_id in enumerate(rows["image_id"])}
    return sorted(gather_object(records), key=lambda record: order[record["image_id"]])


def grounding_metrics(ious: Iterable[float]) -> dict[str, float | int]:
    """`accuracy@0.5` (IoU strictly over 0.5), `mean_iou` and `num_phrases` of a list of IoUs."""
    ious = np.asarray(list(ious), dtype=np.float64)
    return {
        "accuracy@0.5": float((ious > IOU_THRESHOLD).mean()) if len(ious) else 0.0,
        "mean_iou": float(ious.mean()) if len(ious) else 0.0,
        "num_phrases": len(ious),
    }


def summarize(records: list[dict]) -> dict:
    """`grounding_metrics` of all phrases, and under `per_kind` of each of their types."""
    by_kind = defaultdict(list)
    for record in records:
        for kind in record["types"]:
            by_kind[kind].append(record["iou"])
    summary = grounding_metrics(record["iou"] for record in records)
    summary["per_kind"] = {kind: grounding_metrics(ious) for kind, ious in sorted(by_kind.items())}
    return summary


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
    for index in draw.sample(range(len(columns)), min(len(columns), num_phrases)):
        row = columns[index]
        phrases = [phrase for sentence in row["sentences"] for phrase in sentence["phrases"]]
        box = row["objects"][draw.choice(phrases)["objects"][0]]["box"]
        boxes.append(np.array(box) / [row["width"], row["height"], row["width"], row["height"]])
    boxes = torch.from_numpy(np.stack(boxes))
    candidates = torch.cat((boxes[:num_candidates], boxes.mean(dim=0, keepdim=True)))
    hits = (box_iou(candidates, boxes) > IOU_THRESHOLD).sum(dim=1)
    best = candidates[hits.argmax()]
    sizes = torch.tensor([record["image_size"][::-1] * 2 for record in records], dtype=torch.float64)
    true_boxes = torch.tensor([record["box"] for record in records], dtype=torch.float64)
    ious = box_iou(best[None], true_boxes / sizes)[0]
    return {**grounding_metrics(ious.tolist()), "box_xyxy": [round(value, 4) for value in best.tolist()]}
