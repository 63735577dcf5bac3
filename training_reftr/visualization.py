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
from PIL import Image, ImageDraw

from modeling_reftr import RefTRForVisualGrounding, RefTRProcessor
from modeling_reftr.drawing_reftr import draw_answers, make_grid
from modeling_reftr.rle_reftr import from_coco_rle
from training_reftr.data import GroundingCollator, move
from training_reftr.generalized import answers_of, best_score, has_one_target, is_exact, targets_in
from training_reftr.images import read_row_image


NUM_HEADS = 4  # as many as the published evaluation shows
PANEL_WIDTH = 512
GRID_WIDTH = 1400  # of predictions.png, if it has several columns
GAP = 8
DIAGRAM = 360  # side in pixels
BAR = "#4477aa"
FULL_ATTENTION = 4  # times uniform attention


def draw_validation_images(records: list[dict], rows: datasets.Dataset, num: int) -> Image.Image | None:
    """
    Draw a grid of chosen sentences of a split, see `choose_sentences`: predictions in the colors of their phrases,
    ground-truth boxes dashed, a failure marked in red. Return None if there is nothing to draw.

    Args:
        records (`list[dict]`): records of `evaluate`.
        rows (`datasets.Dataset`): rows of the split.
        num (`int`): maximum number of images.
    """
    sentences = group_by_sentence(records)
    chosen = choose_sentences(sentences, num)
    if not chosen:
        return None
    index_of = {image_id: index for index, image_id in enumerate(rows["image_id"])}
    undecoded = rows.cast_column("image", datasets.Image(decode=False))
    columns = min(len(chosen), 3 if len(chosen) in (3, 5, 6, 9) else 4)
    width = min((GRID_WIDTH - GAP) // columns - GAP, PANEL_WIDTH)
    images = []
    for group in chosen:
        row = undecoded[index_of[group[0]["image_id"]]]
        images.append(draw_sentence({**row, "image": Image.fromarray(read_row_image(row))}, group, width))
    num_good = sum(not describe_failure(group) for group in sentences)
    note = f"Dashed: ground truth. Chosen from {len(sentences)} texts, of which {num_good} are answered correctly."
    images.sort(key=lambda image: image.height, reverse=True)  # makes columns of similar height
    return make_grid(images, columns, GAP, note)


def group_by_sentence(records: list[dict]) -> list[list[dict]]:
    """Return the records of each sentence, in the order of the records."""
    sentences = defaultdict(list)
    for record in records:
        sentences[record["image_id"], record["sentence_id"]].append(record)
    return list(sentences.values())


def choose_sentences(sentences: list[list[dict]], num: int) -> list[list[dict]]:
    """
    Choose sentences to draw, the same ones for the same records: correct ones, and last one failure if there is any.

    The types of phrases take turns, beginning with captions of several phrases; within a type, sentences of images
    that are not chosen yet come first. The failure is the one whose worst IoU is the median of all failures, or of
    captions if no caption is correct.

    Args:
        sentences (`list[list[dict]]`): the records of each sentence, see `evaluate`.
        num (`int`): the maximum number of sentences.
    """
    failures = [group for group in sentences if describe_failure(group)]
    correct_by_type = defaultdict(list)
    for group in sentences:
        if not describe_failure(group):
            kind = group[0]["types"][0] if group[0]["types"] else ""
            correct_by_type["" if len(group) > 1 else f"phrase: {kind}"].append(group)
    captions = [group for group in failures if len(group) > 1]
    failures = captions if captions and not correct_by_type[""] else failures
    failures = sorted(failures, key=lambda group: min(record["iou"] for record in group))
    chosen, images = [], set()
    while len(chosen) < num - bool(failures) and any(correct_by_type.values()):
        for kind in sorted(correct_by_type):
            groups = correct_by_type[kind]
            if groups and len(chosen) < num - bool(failures):
                group = next((group for group in groups if group[0]["image_id"] not in images), groups[0])
                groups.remove(group)
                images.add(group[0]["image_id"])
                chosen.append(group)
    return (chosen + failures[len(failures) // 2 :][:1])[:num]


def recorded_mask_iou(record: dict) -> float | None:
    """Return the mask IoU of a record, as in the metrics; None without masks."""
    if "mask_pixels" not in record:
        return None
    intersection, union = record["mask_pixels"]
    return intersection / union if union else 0.0


def describe_failure(records: list[dict]) -> str:
    """Return why a sentence is a failure: the worst IoU of its boxes or masks, if it is at most 0.5; else nothing."""
    for record in records:
        if reason := describe_wrong_answers(record):
            return reason
    records = [record for record in records if has_one_target(record)]
    if not records:
        return ""
    iou = min(record["iou"] for record in records)
    masks = [value for value in map(recorded_mask_iou, records) if value is not None]
    if iou <= 0.5:
        return f"failure, IoU {iou:.2f}"
    return f"failure, mask IoU {min(masks):.2f}" if masks and min(masks) <= 0.5 else ""


def describe_wrong_answers(record: dict) -> str:
    """Return why the answers of a phrase are not exactly its targets, of a model or phrase with other than one."""
    if "query_scores" not in record:
        return ""
    targets, answers = targets_in(record), answers_of(record)
    if len(targets) == 1 and not answers:
        return f"failure, not found ({best_score(record):.2f})"
    if len(targets) != len(answers):
        return f"failure, {len(answers)} of {len(targets)} found" if targets else "failure, not there"
    return "" if len(targets) == 1 or is_exact(record) else "failure, other objects"


def label_of_record(record: dict) -> str:
    """Return the label of a drawn answer: the phrase with the IoU of its box, or with its score."""
    if "query_scores" not in record:
        return f"{record['words']} {record['iou']:.2f}"
    return f"{record['words']} ({best_score(record):.2f})"


def draw_sentence(row: dict, records: list[dict], width: int = 320) -> Image.Image:
    """Draw the predictions for all phrases of a sentence on one image of a width in pixels."""
    answers = [(record, box) for record in records for box, _ in answers_of(record) or [(None, 0.0)]]
    has_masks = any("pred_segmentation" in record for record in records)
    return draw_answers(
        row["image"],
        [box for _, box in answers],
        [label_of_record(record) for record, _ in answers],
        true_boxes_xyxy=[target["box"] for record in records for target in targets_in(record)],
        # a record has the mask of its best box
        masks=[decode(record["pred_segmentation"]) if box == record["pred_box"] else None for record, box in answers]
        if has_masks
        else (),
        title=find_sentence(row, records[0])["text"] if len(records) > 1 else "",
        width=width,
        failure=describe_failure(records),
        legend="",
    )


def draw_presence(generalized: dict) -> Image.Image:
    """
    Draw how certain scores are: a reliability diagram (bars: share of boxes that are right, by their score; dashed:
    where both are equal), and the risk-coverage curve (share of wrong boxes among the most certain ones).

    Args:
        generalized (`dict`): `reliability` and `risk_coverage`, see `generalized_metrics`.
    """
    panels = []
    for title in ("share right by score", "risk by coverage"):
        panel = Image.new("RGB", (DIAGRAM, DIAGRAM + 2 * GAP), "white")
        pen = ImageDraw.Draw(panel)
        pen.rectangle([0, 0, DIAGRAM - 1, DIAGRAM - 1], outline="black")
        if title.startswith("share"):
            for row in generalized["reliability"]:
                if row["count"]:
                    low, high = (DIAGRAM * side for side in row["bin"])
                    top = min(DIAGRAM * (1 - row["share_right"]), DIAGRAM - 3)
                    pen.rectangle([low, top, high, DIAGRAM - 1], fill=BAR, outline="white")
            for start in range(0, DIAGRAM, 2 * GAP):
                pen.line([start, DIAGRAM - start, start + GAP, DIAGRAM - start - GAP], fill="black")
        else:
            points = [(DIAGRAM * row["coverage"], DIAGRAM * (1 - row["risk"])) for row in generalized["risk_coverage"]]
            pen.line(points, fill=BAR, width=3)
        panels.append(draw_answers(panel, [], [], title=f"{title}, from 0 to 1", width=DIAGRAM))
    return make_grid(panels, columns=2, gap=GAP)


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
    inputs = move(GroundingCollator(processor)([{**row, "sentences": [sentence]}]), accelerator.device, processor)
    inputs.pop("labels")
    with accelerator.autocast():
        outputs = model.model(**inputs, output_attentions=True)
        num_text_tokens, num_queries = inputs["input_ids"].shape[1], model.config.num_queries_per_phrase
        query = record["phrase"] * num_queries
        if num_queries > 1:  # that of the best box
            logits = model.predict_presence(outputs)
            query += int(logits[0, record["phrase"]].argmax())
    weights = outputs.cross_attentions[-1][0, :, query, num_text_tokens:]
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
    answer = draw_answers(
        row["image"],
        [record["pred_box"]],
        [f"{record['words']} (IoU {record['iou']:.2f})" if has_one_target(record) else label_of_record(record)],
        true_boxes_xyxy=[target["box"] for target in targets_in(record)],
        masks=[decode(record["pred_segmentation"])] if "pred_segmentation" in record else (),
        title=sentence if sentence != record["words"] else "",
        width=PANEL_WIDTH,
        failure=describe_failure([record]),
    )
    truth = draw_answers(
        row["image"],
        [],
        [],
        true_boxes_xyxy=[target["box"] for target in targets_in(record)],
        true_masks=[decode(target["segmentation"]) for target in targets_in(record)],
        width=PANEL_WIDTH,
    )
    heads = maps[:NUM_HEADS]
    width = (2 * PANEL_WIDTH + GAP) // len(heads) - GAP
    panels = [
        draw_answers(
            heat(row["image"], head),
            [record["pred_box"]],
            [""],
            title=f"head {number}: {head.sum():.0%} on image",
            width=width,
        )
        for number, head in enumerate(heads, start=1)
    ]
    return make_grid([make_grid([answer, truth], columns=2), make_grid(panels, columns=len(panels))], columns=1, gap=0)


def heat(image: Image.Image, weights: np.ndarray) -> Image.Image:
    """
    Color a gray image by the attention of a head: from red to yellow.

    The brightness is the attention relative to a uniform one, full at `FULL_ATTENTION` times that, and at most the
    share of the head's attention that goes to the image: heads are comparable, and one that attends to the text only
    leaves the image gray.

    Args:
        image (`PIL.Image.Image`): the image.
        weights (`np.ndarray` of shape `(h, w)`): see `attend`; they sum to at most 1.
    """
    weights = np.minimum(weights * weights.size / FULL_ATTENTION, min(weights.sum(), 1.0))
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
