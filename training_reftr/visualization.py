"""
Images of a model's predictions. `draw_samples` is a collective: all processes call it.
"""

import copy
import re
from collections import defaultdict
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from modeling_reftr import RefTRForVisualGrounding, RefTRProcessor
from modeling_reftr.drawing_reftr import draw_answers, make_grid
from modeling_reftr.rle_reftr import from_coco_rle
from training_reftr.data import GroundingCollator, move
from training_reftr.images import read_row_image


NUM_HEADS = 4  # as many as the published evaluation shows
PANEL_WIDTH = 480
GAP = 8


def draw_validation_images(records: list[dict], rows: datasets.Dataset, num: int) -> Image.Image | None:
    """
    Draw a grid of the first images of a split with one sentence each, alternating between phrase types: predicted
    boxes and masks in the colors of their phrases, target boxes in white. Return None if there is nothing to draw.

    Args:
        records (`list[dict]`): records of `evaluate`.
        rows (`datasets.Dataset`): rows of the split.
        num (`int`): maximum number of images.
    """
    sentences = defaultdict(list)
    for record in records:
        sentences[record["image_id"], record["sentence_id"]].append(record)
    by_kind = defaultdict(list)
    for group in sentences.values():
        by_kind[group[0]["types"][0] if group[0]["types"] else ""].append(group)
    index_of = {image_id: index for index, image_id in enumerate(rows["image_id"])}
    undecoded = rows.cast_column("image", datasets.Image(decode=False))
    used, images = set(), []
    while len(images) < num and any(by_kind.values()):
        for kind in sorted(by_kind):
            # Prefer images that are not drawn yet.
            fresh = (group for group in by_kind[kind] if group[0]["image_id"] not in used)
            group = next(fresh, None) or next(iter(by_kind[kind]), None)
            if group is None or len(images) == num:
                continue
            by_kind[kind].remove(group)
            used.add(group[0]["image_id"])
            row = undecoded[index_of[group[0]["image_id"]]]
            images.append(draw_sentence({**row, "image": Image.fromarray(read_row_image(row))}, group))
    return make_grid(images, columns=4) if images else None


def draw_sentence(row: dict, records: list[dict]) -> Image.Image:
    """Draw the predictions for all phrases of a sentence on one image."""
    return draw_answers(
        row["image"],
        [record["pred_box"] for record in records],
        [f"{record['words']} ({record['iou']:.2f})" for record in records],
        true_boxes_xyxy=[record["box"] for record in records],
        masks=[decode(record["pred_segmentation"]) for record in records if "pred_segmentation" in record],
        title=find_sentence(row, records[0])["text"] if len(records) > 1 else "",
    )


@torch.no_grad()
def draw_samples(
    model: torch.nn.Module,
    processor: RefTRProcessor,
    rows: datasets.Dataset,
    records: list[dict],
    num: int,
    folder: Path,
    accelerator: Accelerator,
) -> None:
    """
    Draw phrases spread evenly over a split, one PNG file per phrase in `folder`: the prediction, the target, and the
    cross-attention of `NUM_HEADS` heads of the last decoder layer. A collective; the main process writes.

    Args:
        records (`list[dict]`): records of `evaluate` for `rows`.
        num (`int`): maximum number of phrases.
    """
    model = copy.deepcopy(accelerator.unwrap_model(model)).eval()
    model.set_attn_implementation({"": "eager"})  # the other implementations do not return attention weights
    index_of = {image_id: index for index, image_id in enumerate(rows["image_id"])}
    undecoded = rows.cast_column("image", datasets.Image(decode=False))
    num = min(num, len(records))
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.png"):  # left by an earlier evaluation
            path.unlink()
    for number in range(num):
        record = records[number * len(records) // num]
        row = undecoded[index_of[record["image_id"]]]
        row = {**row, "image": Image.fromarray(read_row_image(row))}
        maps = attend(model, processor, row, record, accelerator)
        if accelerator.is_main_process:
            # File names are limited to 255 bytes.
            name = re.sub(r"[^\w.+-]+", "_", f"{number:04d}_{record['sentence_id'][:60]}_{record['phrase']}")
            draw_sample(row, record, maps).save(folder / f"{name}.png")


def attend(
    model: RefTRForVisualGrounding, processor: RefTRProcessor, row: dict, record: dict, accelerator: Accelerator
) -> np.ndarray:
    """
    Return the cross-attention of a phrase's query to the image in the last decoder layer, of shape (heads, h, w)
    without padding. The weights of a head sum to at most 1; the rest of its attention goes to the text.
    """
    sentence = find_sentence(row, record)
    inputs = move(GroundingCollator(processor)([{**row, "sentences": [sentence]}]), accelerator.device)
    inputs.pop("labels")
    with accelerator.autocast():
        outputs = model.model(**inputs, output_attentions=True)
    weights = outputs.cross_attentions[-1][0, :, record["phrase"], inputs["input_ids"].shape[1] :]
    weights = weights.unflatten(-1, outputs.feature_maps[-1].shape[-2:]).float().cpu().numpy()
    is_image = outputs.image_mask[0].unflatten(-1, weights.shape[-2:]).cpu().numpy()
    return weights[:, is_image.any(axis=1)][:, :, is_image.any(axis=0)]


def draw_sample(row: dict, record: dict, maps: np.ndarray) -> Image.Image:
    """
    Draw one phrase: prediction and target side by side, the attention of the heads below.

    Args:
        row (`dict`): row of the image.
        record (`dict`): record of the phrase, see `evaluate`.
        maps (`np.ndarray` of shape `(heads, h, w)`): see `attend`.
    """
    sentence = find_sentence(row, record)["text"]
    words = f"answer: {record['words']}" if record["pred_box"] else f"no answer: {record['words']}"
    title = sentence if sentence != record["words"] else ""
    answer = draw_answers(
        row["image"],
        [record["pred_box"]],
        [f"{words} (IoU {record['iou']:.2f})"],
        true_boxes_xyxy=[record["box"]],
        masks=[decode(record["pred_segmentation"])] if "pred_segmentation" in record else (),
        title=title,
        width=PANEL_WIDTH,
    )
    truth = draw_answers(
        row["image"],
        [record["box"]],
        ["truth"],
        masks=[decode(record["segmentation"])],
        width=PANEL_WIDTH,
    )
    heads = maps[:NUM_HEADS]
    width = (2 * PANEL_WIDTH + GAP) // len(heads) - GAP
    panels = [
        draw_answers(
            heat(row["image"], head),
            [record["pred_box"]],
            [f"head {number}: {head.sum():.0%} on image"],
            width=width,
        )
        for number, head in enumerate(heads, start=1)
    ]
    return make_grid([make_grid([answer, truth], columns=2), make_grid(panels, columns=len(panels))], columns=1, gap=0)


def heat(image: Image.Image, weights: np.ndarray) -> Image.Image:
    """Color a gray image by `weights` (h, w): yellow at their maximum, red at half of it."""
    weights = weights / max(weights.max(), 1e-12)
    layer = Image.fromarray((weights * 255).astype(np.uint8)).resize(image.size, Image.Resampling.BICUBIC)
    share = np.asarray(layer, dtype=np.float32)[..., None] / 255
    grey = np.asarray(image.convert("L").convert("RGB"), dtype=np.float32) * 0.6
    color = np.concatenate((np.full_like(share, 255), 255 * (2 * share - 1).clip(0, 1), np.zeros_like(share)), axis=-1)
    opacity = 0.8 * share
    return Image.fromarray((grey + opacity * (color - grey)).astype(np.uint8))


def find_sentence(row: dict, record: dict) -> dict:
    """Return the sentence of a record in its row."""
    return next(sentence for sentence in row["sentences"] if sentence["sentence_id"] == record["sentence_id"])


def decode(segmentation: dict | None) -> np.ndarray | None:
    """Decode a mask from its run-length encoding; None stays None."""
    return None if segmentation is None else from_coco_rle(segmentation)
