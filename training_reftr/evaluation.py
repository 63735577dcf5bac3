"""
Evaluation: one record per phrase, and metrics computed from the records. `evaluate` is a collective: all processes
call it.
"""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object

from data_scripts.masks import mask_iou
from modeling_reftr import RefTRForVisualGrounding, RefTRProcessor
from modeling_reftr.modeling_reftr import RefTRVisualGroundingOutput
from modeling_reftr.presence_reftr import RankedQueries, rank_queries
from modeling_reftr.rle_reftr import from_coco_rle, to_coco_rle
from training_reftr.data import EvaluationData, move
from training_reftr.generalized import generalized_metrics, has_one_target, targets_in
from training_reftr.metrics import BoxMetrics, MaskMetrics, box_ious, mean, recalls
from training_reftr.progress import Progress
from training_reftr.settings import EvaluationSettings, TrainingSettings


# Strategies that shard the weights over processes.
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    processor: RefTRProcessor,
    rows: datasets.Dataset,
    settings: TrainingSettings,
    accelerator: Accelerator,
    description: str,
    should_stop: Callable[[], bool] | None = None,
    data: EvaluationData | None = None,
) -> list[dict] | None:
    """
    Predict every phrase of a split once. All processes run the same number of batches; predictions made on two of them
    are deduplicated. A collective.

    The predictions are made by a fused copy of the model, so that the model being trained is not modified. A sharded
    model cannot be copied and is put into evaluation mode meanwhile.

    Args:
        description (`str`): name of the split.
        should_stop (`Callable`, *optional*): called after each batch on every process; must return the same on all.
        data ([`EvaluationData`], *optional*): data that contains the split as `description`, to reuse its workers.

    Returns:
        `list[dict]`, on every process, one per phrase in the order of the split: the target of the collator,
        `pred_box` (xyxy in pixels), `iou`, and `any_box_iou`, the largest IoU with any of the object's boxes. A phrase
        removed by truncation has `pred_box` None and IoUs of 0. With masks also `pred_segmentation` (COCO's run-length
        encoding, or None) and, where the target has a mask, `mask_pixels` and `resized_mask_pixels`: (intersection,
        union) at the image's original size, and at its resized size, which the published evaluation uses. From a model
        that predicts presence, and of phrases with none or several targets, also `query_boxes` and `query_scores` of
        all queries, from the highest score to the lowest, the `threshold` above which they are answers, and with masks
        `answer_pixels`, (intersection, union) of the masks of all answers together at the original size. None, on
        every process, if `should_stop` ended the evaluation.

    Raises:
        ValueError: if the model predicts a box that is not finite, or the split has a phrase twice.
    """
    keys = phrase_keys(rows)
    records, is_stopped = [], False
    if data is None:
        data = EvaluationData(
            {description: rows},
            processor,
            settings,
            accelerator.process_index,
            accelerator.num_processes,
        )
    batches = data.batches(description)
    progress = Progress(description, len(batches), unit="batch", num_lines=0, is_shown=accelerator.is_main_process)
    with progress, for_inference(model, accelerator) as inference_model, inference_model.cache_text():
        for batch in batches:
            records += predict_batch(inference_model, processor, batch, settings.evaluation, accelerator)
            progress.update()
            is_stopped = should_stop is not None and should_stop()
            if is_stopped:
                break
    return None if is_stopped else order_records(gather_object(records), keys)


@contextlib.contextmanager
def for_inference(model: torch.nn.Module, accelerator: Accelerator) -> Iterator[RefTRForVisualGrounding]:
    """
    Yield the model to evaluate: a fused copy, which is not compiled, or the model itself in evaluation mode if its
    weights are sharded.
    """
    # Remove the wrapper of DDP, whose forward also synchronizes buffers.
    model = accelerator.unwrap_model(model)
    if accelerator.distributed_type not in SHARDED:
        yield model.fused_copy()
        return
    was_training = model.training
    try:
        # Do not recompile the training graph for the shapes of the evaluation.
        with torch.compiler.set_stance("force_eager"):
            yield model.eval()
    finally:
        model.train(was_training)


def phrase_keys(rows: datasets.Dataset) -> list[tuple[str, str, int]]:
    """
    Return the key of each phrase of a split: image id, sentence id, and index of the phrase in the sentence.

    Raises:
        ValueError: if two phrases have the same key.
    """
    keys = [
        (row["image_id"], sentence["sentence_id"], number)
        for row in rows.select_columns(["image_id", "sentences"])
        for sentence in row["sentences"]
        for number in range(len(sentence["phrases"]))
    ]
    repeated = [key for key, count in Counter(keys).items() if count > 1]
    if repeated:
        raise ValueError(
            f"The split has {len(repeated)} phrases twice, the first in the sentence {repeated[0][1]!r} of the image "
            f"{repeated[0][0]!r}: each must count once, so every sentence of an image requires a unique id."
        )
    return keys


def order_records(records: list[dict], keys: list[tuple[str, str, int]]) -> list[dict]:
    """
    Return one record for each of `phrase_keys`, in their order, from records in any order and with duplicates.

    Raises:
        ValueError: if a phrase has no record.
    """
    found = {}
    for record in records:
        found.setdefault((record["image_id"], record["sentence_id"], record["phrase"]), record)
    missing = [key for key in keys if key not in found]
    if missing:
        raise ValueError(f"{len(missing)} of {len(keys)} phrases were not evaluated, the first of them {missing[0]}.")
    return [found[key] for key in keys]


def predict_batch(
    model: RefTRForVisualGrounding,
    processor: RefTRProcessor,
    batch: dict,
    evaluation: EvaluationSettings,
    accelerator: Accelerator,
) -> list[dict]:
    """Return the records of a batch, see `evaluate`."""
    inputs = move(batch, accelerator.device, processor)
    inputs.pop("labels")
    with accelerator.autocast():
        outputs = model(**inputs)
    size_of = {
        image: targets[0]["image_size"]
        for image, targets in zip(batch["image_index"].tolist(), batch["targets"], strict=True)
    }
    sizes = [size_of[image] for image in range(len(batch["pixel_mask"]))]  # every image of a batch has a sentence
    queries = rank_queries(outputs)
    boxes_xyxy = processor.image_processor.scale_boxes(outputs.pred_boxes, outputs, sizes).float().cpu()
    query_boxes = processor.image_processor.scale_boxes(queries.boxes_cxcywh, outputs, sizes).float().cpu()
    query_scores, is_answered = queries.scores.float().cpu(), outputs.phrase_mask.cpu()
    threshold = 0.0 if outputs.presence is None else outputs.presence_threshold.item()
    masks = PhraseMasks.of(outputs, sizes, queries, evaluation.two_step_masks, processor)
    records = []
    for number, targets in enumerate(batch["targets"]):
        for target in targets:
            slot = target["phrase"]
            has_answer = slot < is_answered.shape[1] and bool(is_answered[number, slot])
            record = {**target, "pred_box": None, "iou": 0.0, "any_box_iou": 0.0}
            if has_answer:
                record |= compare_boxes(boxes_xyxy[number, slot], target)
            if outputs.presence is not None or not has_one_target(target):
                record["query_boxes"] = query_boxes[number, slot].tolist() if has_answer else []
                record["query_scores"] = query_scores[number, slot].tolist() if has_answer else []
                record["threshold"] = threshold
            if masks is not None:
                record |= masks.compare(number, slot if has_answer else None, record, processor)
            records.append(record)
    return records


@dataclass
class PhraseMasks:
    """
    The masks of a batch.

    Args:
        best, resized (`list[torch.Tensor]`): for each sentence the masks of its real phrases, bool (phrases, height,
            width), at the original size and at the resized one.
        answers (`list[torch.Tensor]`): for each sentence those of all answers, at the original size.
        phrase_mask (`torch.Tensor` of shape `(S, P)`): True for real phrases.
        is_answer (`torch.Tensor` of shape `(S, P, K)`): True for answers.
    """

    best: list[torch.Tensor]
    resized: list[torch.Tensor]
    answers: list[torch.Tensor]
    phrase_mask: torch.Tensor
    is_answer: torch.Tensor

    @classmethod
    def of(
        cls,
        outputs: RefTRVisualGroundingOutput,
        sizes: list[tuple[int, int]],
        queries: RankedQueries,
        two_step: bool,
        processor: RefTRProcessor,
    ) -> "PhraseMasks | None":
        """Return the masks of outputs, at the original sizes (height, width) of the images; None without masks."""
        if outputs.pred_masks is None:
            return None
        convert = processor.image_processor.post_process_masks
        best = convert(outputs, sizes, two_step=two_step)
        answers = best if outputs.presence is None else convert(outputs, sizes, two_step=two_step, queries=queries)
        resized = convert(outputs, two_step=True)
        return cls(best, resized, answers, outputs.phrase_mask.cpu(), queries.is_answer.cpu())

    def compare(self, number: int, slot: int | None, record: dict, processor: RefTRProcessor) -> dict:
        """
        Return the fields of a phrase's record about its masks.

        Args:
            number (`int`): of the sentence in the batch.
            slot (`int`, *optional*): of the phrase; None: it has no prediction.
            record (`dict`): what is known of it.
            processor ([`RefTRProcessor`]): resizes the truth.
        """
        index = None if slot is None else int(self.phrase_mask[number, :slot].sum())
        target = record if has_one_target(record) else {"segmentation": None}
        fields = compare_masks(self.best[number], self.resized[number], index, target, processor)
        truths = [target["segmentation"] for target in targets_in(record)]
        if "query_scores" in record and None not in truths:
            truths = [torch.from_numpy(from_coco_rle(truth)) for truth in truths]
            union = torch.zeros(record["image_size"], dtype=torch.bool)
            expected = torch.stack(truths).any(dim=0) if truths else union
            if slot is not None:
                is_answer = self.is_answer[number]
                start = int(is_answer[:slot].sum())
                answers = self.answers[number][start : start + int(is_answer[slot].sum())].cpu()
                union = answers.any(dim=0) if len(answers) else union
            fields["answer_pixels"] = ((union & expected).sum().item(), (union | expected).sum().item())
        return fields


def compare_boxes(pred_box: torch.Tensor, target: dict) -> dict:
    """
    Return the fields of a phrase's record about its box.

    Raises:
        ValueError: if the predicted box is not finite.
    """
    if not pred_box.isfinite().all():
        raise ValueError(
            f"The model's box for {target['words']!r} ({target['sentence_id']}) is {pred_box.tolist()}: its weights "
            "are broken, or mixed_precision is too coarse for it."
        )
    targets, box = targets_in(target), pred_box.tolist()
    return {
        "pred_box": box,
        "iou": max((largest_iou(box, [item["box"]]) for item in targets), default=0.0),
        "any_box_iou": max((largest_iou(box, item["boxes"]) for item in targets), default=0.0),
    }


def largest_iou(box_xyxy: list[float], boxes_xyxy: list[list[float]]) -> float:
    """Return the largest IoU of a box with any of others; with one that has no extent it is 0, as published."""
    return box_ious(box_xyxy, boxes_xyxy).max().item()


def compare_masks(
    masks: torch.Tensor, resized_masks: torch.Tensor, index: int | None, target: dict, processor: RefTRProcessor
) -> dict:
    """Return the fields of a phrase's record about its mask, which is `masks[index]`; None if it has no prediction."""
    fields = {"pred_segmentation": None if index is None else to_coco_rle(masks[index])}
    if target["segmentation"] is None:
        return fields
    truth = torch.from_numpy(from_coco_rle(target["segmentation"]))
    resized_truth = processor.image_processor.resize_masks(truth[None], resized_masks.shape[-2:])[0]
    for name, answers, expected in (
        ("mask_pixels", masks, truth),
        ("resized_mask_pixels", resized_masks, resized_truth),
    ):
        answer = torch.zeros_like(expected) if index is None else answers[index].cpu()
        fields[name] = ((answer & expected).sum().item(), (answer | expected).sum().item())
    return fields


def grounding_metrics(ious: Iterable[float]) -> dict[str, float | int]:
    """Return the `BoxMetrics` of IoUs."""
    metrics = BoxMetrics()
    metrics.update(ious)
    return metrics.compute()


def mask_metrics(records: list[dict]) -> dict[str, float | int]:
    """
    Return the `MaskMetrics` of the records with masks, prefixed with `mask_`, and `mask_mean_iou_resized`, the
    published metric; empty if no record has a mask.
    """
    records = [record for record in records if "mask_pixels" in record]
    if not records:
        return {}
    metrics, resized = MaskMetrics(), MaskMetrics()
    metrics.update(*zip(*(record["mask_pixels"] for record in records), strict=True))
    resized.update(*zip(*(record["resized_mask_pixels"] for record in records), strict=True))
    values = {f"mask_{name}": value for name, value in metrics.compute().items()}
    return values | {"mask_mean_iou_resized": resized.compute()["mean_iou"]}


def mask_separation(records: list[dict]) -> dict[str, float]:
    """
    Return how well the masks of a caption tell its objects apart.

    Returns:
        `dict`: the mean IoU over pairs of phrases of one sentence that name different objects, of the predicted masks
        (`mask_separation`) and of the annotated ones (`mask_separation_target`), to which it should be close; empty
        without such pairs.
    """
    by_sentence = defaultdict(list)
    for record in records:
        if record.get("segmentation") is not None and record.get("pred_segmentation") is not None:
            by_sentence[record["image_id"], record["sentence_id"]].append(record)
    pairs = [
        pair
        for group in by_sentence.values()
        for pair in combinations(group, 2)
        if pair[0]["object_id"] != pair[1]["object_id"]
    ]
    if not pairs:
        return {}
    return {
        "mask_separation": mean([mask_iou(*(record["pred_segmentation"] for record in pair)) for pair in pairs]),
        "mask_separation_target": mean([mask_iou(*(record["segmentation"] for record in pair)) for pair in pairs]),
    }


def summarize(records: list[dict]) -> dict:
    """
    Return the metrics of an evaluation.

    Args:
        records (`list[dict]`): see `evaluate`.

    Returns:
        `dict`: of the phrases that refer to one object, and under `per_kind` those of each phrase type (a phrase of
        two types counts in both): `grounding_metrics`, `mask_metrics`, and, where objects have several boxes,
        `recalls`; `mask_separation` of all of them. From a model that predicts presence, or with phrases that refer to
        none or several objects, also the `generalized_metrics` of all phrases.
    """
    all_records, records = records, [record for record in records if has_one_target(record)]
    by_kind = defaultdict(list)
    for record in records:
        for kind in record["types"]:
            by_kind[kind].append(record)
    several_boxes = any(len(record["boxes"]) > 1 for record in records)

    def metrics(group: list[dict]) -> dict:
        values = grounding_metrics(record["iou"] for record in group)
        if several_boxes:
            values |= recalls([record["iou"] for record in group], [record["any_box_iou"] for record in group])
        return values | mask_metrics(group)

    per_kind = {kind: metrics(group) for kind, group in sorted(by_kind.items())}
    values = metrics(records) | mask_separation(records)
    if any("query_scores" in record for record in all_records):
        all_records = [with_queries(record) for record in all_records]
        values |= generalized_metrics(all_records, all_records[0]["threshold"])
    return values | {"per_kind": per_kind}


def with_queries(record: dict) -> dict:
    """Return a record with `query_boxes` and `query_scores`; a model without presence has one certain answer."""
    if "query_scores" in record:
        return record
    boxes = [] if record["pred_box"] is None else [record["pred_box"]]
    fields = {"query_boxes": boxes, "query_scores": [1.0] * len(boxes), "threshold": 0.0}
    return {**record, **fields, **({"answer_pixels": record["mask_pixels"]} if "mask_pixels" in record else {})}


def default_best_metric(metrics: Collection[str], predicts_presence: bool) -> str:
    """
    Return the metric that selects the best model.

    Args:
        metrics (`Collection[str]`): names of the metrics of an evaluation.
        predicts_presence (`bool`): whether the model predicts presence.
    """
    if predicts_presence:
        return "pr_f1_iou@0.5"
    return "mask_mean_iou" if "mask_mean_iou" in metrics else "accuracy@0.5"
