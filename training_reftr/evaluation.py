"""
Evaluation: a record for each phrase, and figures from the records. `evaluate` gathers, so every process calls it;
the other functions are arithmetic.
"""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from tqdm.auto import tqdm

from modeling_reftr import RefTRForVisualGrounding, RefTRProcessor
from modeling_reftr.rle_reftr import from_coco_rle, to_coco_rle
from training_reftr.data import EvaluationData, move
from training_reftr.metrics import BoxMetrics, MaskMetrics, box_ious, recalls
from training_reftr.settings import EvaluationSettings, TrainingSettings


# where a process holds parts of weights
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


@torch.no_grad()
def evaluate(
    model,
    processor,
    rows,
    settings: TrainingSettings,
    accelerator: Accelerator,
    description: str,
    should_stop: Callable[[], bool] | None = None,
    data: EvaluationData | None = None,
) -> list[dict] | None:
    """
    Ask the model about every phrase of a split, each once however many processes share the work: all run the same
    number of batches, and what two of them answered is kept once.

    Args:
        description (`str`): the name of the split.
        should_stop (*optional*): asked once a batch on every process, and to answer the same on all of them.
        data ([`EvaluationData`], *optional*): knows the split by the name `description`, and lends its workers.

    Returns:
        `list[dict]`, on every process, in the split's order of image, sentence and phrase: the target as the collator
        gives it, `pred_box` (xyxy in pixels), `iou`, and `any_box_iou`, the largest with any of the object's boxes. A
        phrase past the cut of its sentence has `pred_box` None and IoUs of 0. With masks also `pred_segmentation`
        (COCO's run-length encoding, or None), and, where the truth is known, `mask_pixels` and `resized_mask_pixels`:
        (intersection, union) at the picture's original size, and at the size that it is resized to, where the
        published evaluation compares. None, on every process, where `should_stop` ended it.

        A fused copy of the model is asked, so that the one that trains is not touched; a model in shards cannot be
        copied, and is in evaluation mode meanwhile.

    Raises:
        ValueError: if the model gives a box that is not finite, or the split has a phrase twice.
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
    with for_inference(model, accelerator) as asked, asked.cache_text():
        batches = data.batches(description)
        for batch in tqdm(batches, desc=description, disable=not accelerator.is_main_process, leave=False):
            records += answer_batch(asked, processor, batch, settings.evaluation, accelerator)
            is_stopped = should_stop is not None and should_stop()
            if is_stopped:
                break
    return None if is_stopped else put_in_order(gather_object(records), keys)


@contextlib.contextmanager
def for_inference(model, accelerator: Accelerator):
    """
    Give a model that answers, for the time of an evaluation: a fused copy, which is not compiled; or the model itself,
    in evaluation mode, where each process holds parts of its weights.
    """
    # without the wrapper, whose forward also synchronizes buffers
    model = accelerator.unwrap_model(model)
    if accelerator.distributed_type not in SHARDED:
        yield model.fused_copy()
        return
    was_training = model.training
    try:
        # what is compiled for training is not compiled again for evaluation's shapes
        with torch.compiler.set_stance("force_eager"):
            yield model.eval()
    finally:
        model.train(was_training)


def phrase_keys(rows) -> list[tuple[str, str, int]]:
    """
    What each phrase of a split is known by, in its order: image, sentence, and the phrase's number in the sentence.

    Raises:
        ValueError: if two are known by the same.
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
            f"{repeated[0][0]!r}: each is to count once, so every sentence of an image needs an id of its own."
        )
    return keys


def put_in_order(records: list[dict], keys: list[tuple[str, str, int]]) -> list[dict]:
    """
    One record for each of `phrase_keys`, in their order, from records in any order, some of them twice.

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


def answer_batch(
    model: RefTRForVisualGrounding,
    processor: RefTRProcessor,
    batch: dict,
    evaluation: EvaluationSettings,
    accelerator: Accelerator,
) -> list[dict]:
    """The records of a batch, see `evaluate`."""
    inputs = move(batch, accelerator.device)
    inputs.pop("labels")
    with accelerator.autocast():
        outputs = model(**inputs)
    size_of = {
        image: targets[0]["image_size"]
        for image, targets in zip(batch["image_index"].tolist(), batch["targets"], strict=True)
    }
    sizes = [size_of[image] for image in range(len(batch["pixel_mask"]))]  # every image of a batch is asked about
    answers = processor.post_process_grounding(outputs, sizes)
    if outputs.pred_masks is None:
        masks = [()] * len(answers)
    else:
        masks = zip(
            processor.image_processor.post_process_masks(outputs, sizes, two_step=evaluation.two_step_masks),
            processor.image_processor.post_process_masks(outputs, two_step=True),
            strict=True,
        )
    records = []
    for targets, answer, masks_of_sentence in zip(batch["targets"], answers, masks, strict=True):
        places = {slot: place for place, slot in enumerate(answer["phrase_indices"])}
        for target in targets:
            place = places.get(target["phrase"])
            record = {**target, "pred_box": None, "iou": 0.0, "any_box_iou": 0.0}
            if place is not None:
                record |= compare_boxes(answer["boxes"][place].float().cpu(), target)
            if masks_of_sentence:
                record |= compare_masks(*masks_of_sentence, place, target, processor)
            records.append(record)
    return records


def compare_boxes(pred_box: torch.Tensor, target: dict) -> dict:
    """The fields about boxes of one phrase's record. Raises ValueError if the predicted box is not finite."""
    if not pred_box.isfinite().all():
        raise ValueError(
            f"The model's box for {target['words']!r} ({target['sentence_id']}) is {pred_box.tolist()}: its weights "
            "are broken, or mixed_precision is too coarse for it."
        )
    return {
        "pred_box": pred_box.tolist(),
        "iou": largest_iou(pred_box.tolist(), [target["box"]]),
        "any_box_iou": largest_iou(pred_box.tolist(), target["boxes"]),
    }


def largest_iou(box_xyxy: list[float], boxes_xyxy: list[list[float]]) -> float:
    """Return the largest IoU of a box with any of others; with one that has no extent it is 0, as published."""
    return box_ious(box_xyxy, boxes_xyxy).max().item()


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
    """
    Figures of all phrases, and under `per_kind` of each of their types (a phrase of two types counts in both):
    `grounding_metrics`, `mask_metrics`, and, where objects have several boxes, `recalls`.
    """
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

    return metrics(records) | {"per_kind": {kind: metrics(group) for kind, group in sorted(by_kind.items())}}
