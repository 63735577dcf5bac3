"""
Blind baselines: a constant box ignores the image and the text, shuffled expressions ignore the text. Nothing here is
a collective.
"""

import random
from collections import defaultdict

import numpy as np
from datasets import Dataset, IterableDataset

from training_reftr.evaluation import grounding_metrics, largest_iou
from training_reftr.generalized import has_one_target
from training_reftr.metrics import THRESHOLDS, box_ious


def shuffled_expressions(records: list[dict]) -> dict | None:
    """
    Return the metrics with the expressions of each image shuffled between its objects.

    Each object is compared with the box predicted for an expression about another object of its image. A model that
    ignores the text scores here as it does otherwise. Images with a single object cannot be shuffled and are not
    counted, nor are phrases with none or several targets.

    Args:
        records (`list[dict]`): see `training_reftr.evaluation.evaluate`.

    Returns:
        `dict`, *optional*: see `grounding_metrics`; None if no image has several objects.
    """
    by_image = defaultdict(list)
    for record in filter(has_one_target, records):
        by_image[record["image_id"]].append(record)
    ious = []
    for group in by_image.values():
        for index, record in enumerate(group):
            others = group[index + 1 :] + group[:index]
            other = next(
                (other for other in others if other["object_id"] != record["object_id"] and other["pred_box"]), None
            )
            if other is not None:
                ious.append(largest_iou(other["pred_box"], [record["box"]]))
    return grounding_metrics(ious) if ious else None


def constant_box(
    train_rows: Dataset | IterableDataset, records: list[dict], num_phrases: int = 2000, num_candidates: int = 500
) -> dict:
    """
    Return the metrics of one box for all phrases, which ignores image and text.

    The box is the one, relative to its image, that matches most of the boxes of some training phrases. Phrases with
    none or several targets are not counted.

    Args:
        train_rows (`Dataset` or `IterableDataset`): see `data_scripts.FEATURES`.
        records (`list[dict]`): see `training_reftr.evaluation.evaluate`.
        num_phrases (`int`, *optional*, defaults to 2000): training phrases to choose the box by.
        num_candidates (`int`, *optional*, defaults to 500): boxes to choose from.

    Returns:
        `dict`: see `grounding_metrics`, and the box as `box_xyxy`, relative to the image.
    """
    rng = random.Random(0)
    boxes = []
    columns = train_rows.select_columns(["width", "height", "objects", "sentences"])
    if isinstance(columns, IterableDataset):
        columns = list(columns.take(num_phrases))
    for index in rng.sample(range(len(columns)), min(len(columns), num_phrases)):
        row = columns[index]
        phrases = [phrase for sentence in row["sentences"] for phrase in sentence["phrases"] if phrase["objects"]]
        for number in rng.choice(phrases)["objects"] if phrases else ():
            box = np.array(row["objects"][number]["box"])
            boxes.append(box / [row["width"], row["height"], row["width"], row["height"]])
    boxes = np.stack(boxes)
    candidates = np.concatenate((boxes[:num_candidates], boxes.mean(axis=0, keepdims=True)))
    hits = (box_ious(candidates[:, None], boxes) > THRESHOLDS[0]).sum(axis=1)
    best = candidates[hits.argmax()]
    records = list(filter(has_one_target, records))
    sizes = np.array([record["image_size"][::-1] * 2 for record in records]).reshape(-1, 4)
    ious = box_ious(best, np.array([record["box"] for record in records]).reshape(-1, 4) / sizes)
    return {**grounding_metrics(ious.tolist()), "box_xyxy": [round(value, 4) for value in best.tolist()]}
