"""
Pictures of a model's answers. `draw_samples` runs the model, so every process calls it; the other functions draw what
records say.
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

from modeling_reftr.drawing_reftr import draw_answers, make_grid
from modeling_reftr.rle_reftr import from_coco_rle
from training_reftr.data import GroundingCollator, move
from training_reftr.images import read_row_image


NUM_HEADS = 4  # as many as the published evaluation shows
PANEL_WIDTH = 480
GAP = 8


def draw_validation_images(records: list[dict], rows, num: int) -> Image.Image | None:
    """
    A grid of the first pictures of a split with a sentence each, the kinds of expression in turn: predicted boxes and
    masks in the colours of the words, true boxes in white. None where there is nothing to draw.

    Args:
        records (`list[dict]`): what `evaluate` gives.
        rows (`datasets.Dataset`): the split they are of.
        num (`int`): pictures at most.
    """
    sentences = defaultdict(list)
    for record in records:
        sentences[record["image_id"], record["sentence_id"]].append(record)
    by_kind = defaultdict(list)
    for group in sentences.values():
        by_kind[group[0]["types"][0] if group[0]["types"] else ""].append(group)
    index_of = {image_id: index for index, image_id in enumerate(rows["image_id"])}
    undecoded = rows.cast_column("image", datasets.Image(decode=False))
    used, pictures = set(), []
    while len(pictures) < num and any(by_kind.values()):
        for kind in sorted(by_kind):
            # one sentence a picture, while there are pictures
            fresh = (group for group in by_kind[kind] if group[0]["image_id"] not in used)
            group = next(fresh, None) or next(iter(by_kind[kind]), None)
            if group is None or len(pictures) == num:
                continue
            by_kind[kind].remove(group)
            used.add(group[0]["image_id"])
            row = undecoded[index_of[group[0]["image_id"]]]
            pictures.append(draw_sentence({**row, "image": Image.fromarray(read_row_image(row))}, group))
    return make_grid(pictures, columns=4) if pictures else None


def draw_sentence(row: dict, records: list[dict]) -> Image.Image:
    """The answers to all phrases of a sentence in one picture."""
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
    model, processor, rows, records: list[dict], num: int, folder: Path, accelerator: Accelerator
) -> None:
    """
    Phrases spread evenly over a split, a PNG each in `folder`: the answer, the truth, and where the last decoder layer
    looks from the phrase, in `NUM_HEADS` of its heads. All processes call it, the main one writes.

    Args:
        records (`list[dict]`): what `evaluate` gives for `rows`.
        num (`int`): phrases at most.
    """
    model = copy.deepcopy(accelerator.unwrap_model(model)).eval()
    model.set_attn_implementation({"": "eager"})  # the others do not tell where they look
    index_of = {image_id: index for index, image_id in enumerate(rows["image_id"])}
    undecoded = rows.cast_column("image", datasets.Image(decode=False))
    num = min(num, len(records))
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.png"):  # of an earlier evaluation
            path.unlink()
    for number in range(num):
        record = records[number * len(records) // num]
        row = undecoded[index_of[record["image_id"]]]
        row = {**row, "image": Image.fromarray(read_row_image(row))}
        maps = attend(model, processor, row, record, accelerator)
        if accelerator.is_main_process:
            # a name has up to 255 bytes
            name = re.sub(r"[^\w.+-]+", "_", f"{number:04d}_{record['sentence_id'][:60]}_{record['phrase']}")
            draw_sample(row, record, maps).save(folder / f"{name}.png")


def attend(model, processor, row: dict, record: dict, accelerator: Accelerator) -> np.ndarray:
    """
    The cross-attention of a phrase's query over the picture in the last decoder layer, (heads, h, w), without padding:
    of each head the share of its attention that a cell gets; the rest goes to the words.
    """
    sentence = find_sentence(row, record)
    inputs = move(GroundingCollator(processor)([{**row, "sentences": [sentence]}]), accelerator.device)
    inputs.pop("labels")
    with accelerator.autocast():
        outputs = model.model(**inputs, output_attentions=True)
    weights = outputs.cross_attentions[-1][0, :, record["phrase"], inputs["input_ids"].shape[1] :]
    weights = weights.unflatten(-1, outputs.feature_maps[-1].shape[-2:]).float().cpu().numpy()
    is_picture = outputs.image_mask[0].unflatten(-1, weights.shape[-2:]).cpu().numpy()
    return weights[:, is_picture.any(axis=1)][:, :, is_picture.any(axis=0)]


def draw_sample(row: dict, record: dict, maps: np.ndarray) -> Image.Image:
    """
    A sheet about one phrase: answer and truth side by side, below them the heads' attention.

    Args:
        row (`dict`): of the split.
        record (`dict`): of the phrase, see `evaluate`.
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
            [f"head {number}: {head.sum():.0%} on picture"],
            width=width,
        )
        for number, head in enumerate(heads, start=1)
    ]
    return make_grid([make_grid([answer, truth], columns=2), make_grid(panels, columns=len(panels))], columns=1, gap=0)


def heat(image: Image.Image, weights: np.ndarray) -> Image.Image:
    """A grey picture that is yellow where `weights` (h, w) are largest, red where they are half of that."""
    weights = weights / max(weights.max(), 1e-12)
    layer = Image.fromarray((weights * 255).astype(np.uint8)).resize(image.size, Image.Resampling.BICUBIC)
    share = np.asarray(layer, dtype=np.float32)[..., None] / 255
    grey = np.asarray(image.convert("L").convert("RGB"), dtype=np.float32) * 0.6
    color = np.concatenate((np.full_like(share, 255), 255 * (2 * share - 1).clip(0, 1), np.zeros_like(share)), axis=-1)
    opacity = 0.8 * share
    return Image.fromarray((grey + opacity * (color - grey)).astype(np.uint8))


def find_sentence(row: dict, record: dict) -> dict:
    """The sentence of a record in its row."""
    return next(sentence for sentence in row["sentences"] if sentence["sentence_id"] == record["sentence_id"])


def decode(segmentation: dict | None) -> np.ndarray | None:
    """A mask out of its run lengths, None where there is none."""
    return None if segmentation is None else from_coco_rle(segmentation)
