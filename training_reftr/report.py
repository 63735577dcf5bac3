"""
Evaluation report as Markdown and JSON. `report` is a collective: all processes call it.
"""

import json
import logging
from pathlib import Path

import datasets
from accelerate import Accelerator
from PIL import Image

from data_scripts.atomic_files import write_file
from data_scripts.building import LEFT_OUT, describe_reported, is_degenerate
from data_scripts.escaping import for_code, for_markdown
from data_scripts.masks import is_empty
from data_scripts.quoting import quote
from data_scripts.reports import read_build_report
from modeling_reftr import RefTRForVisualGrounding, RefTRProcessor
from modeling_reftr.answers_reftr import json_answer
from training_reftr.baselines import constant_box, shuffled_expressions
from training_reftr.build import image_size_of
from training_reftr.data import EvaluationData
from training_reftr.evaluation import evaluate, summarize
from training_reftr.generalized import answers_of, best_score, has_one_target, targets_in
from training_reftr.images import read_row_image
from training_reftr.metrics import THRESHOLDS
from training_reftr.published_results import (
    comparable_results,
    dataset_and_split,
    find_cut,
    flags_of_split,
    has_coco_images,
)
from training_reftr.sampling import has_positions
from training_reftr.settings import DataSettings, TrainingSettings
from training_reftr.visualization import draw_presence, draw_samples, draw_validation_images


logger = logging.getLogger(__name__)

BOX_COLUMNS = {
    "accuracy@0.5": "accuracy@0.5",
    "mean_iou": "mean IoU",
    **{f"precision@{threshold}": f"P@{threshold}" for threshold in THRESHOLDS[1:]},
    "num_phrases": "phrases",
}
RECALL_COLUMNS = {
    "merged_box_recall@1": "merged-box recall@1",
    "any_box_recall@1": "any-box recall@1",
    "num_phrases": "phrases",
}
MASK_COLUMNS = {
    "mask_mean_iou": "mIoU",
    "mask_overall_iou": "oIoU",
    **{f"mask_precision@{threshold}": f"P@{threshold}" for threshold in THRESHOLDS},
    "mask_mean_iou_resized": "mIoU, resized",
    "mask_num_phrases": "phrases",
}
EXACT_COLUMNS = {"pr_f1_iou@0.5": "answered exactly", "num_phrases": "phrases"}
ABSENT_COLUMNS = {"n_acc": "N-acc", "auroc": "AUROC of presence", "num_phrases": "phrases"}
GROUP_LABELS = {"none": "no target", "one": "one target", "several": "several targets"}
GENERALIZED_VALUES = {
    "pr_f1_generalized_iou@0.5": "exact by generalised IoU, as in the authors' script,",
    "n_acc": "N-acc",
    "t_acc": "T-acc",
    "presence_n_acc@t_acc_0.95": "N-acc at T-acc 0.95",
    "average_precision@0.5": "average precision of boxes",
    "mask_giou": "masks: gIoU",
    "mask_ciou": "cIoU",
    "expected_calibration_error": "expected calibration error",
}
METRIC_NAMES = {"accuracy@0.5": "boxes, accuracy@0.5", "mask_mean_iou_resized": "masks, mIoU at the resized size"}
BATCHINGS = {
    "grouped": "Evaluated in batches of {} images, each with all its expressions; the padding of a batch changes "
    "answers a little.",
    "published": "Evaluated in the published batches, of {} expressions that follow each other in the annotations.",
    "unpadded": "Evaluated in batches of at most {} images of one resized size: no image is padded.",
}
EXAMPLE_SIDE = 640  # pixels
BLIND_BASELINES = {"constant_box": "best constant box", "swapped_expressions": "expressions swapped"}


def select_splits(rows: dict, data: DataSettings) -> dict[str, datasets.Dataset]:
    """
    Return the splits that `test_splits` names, "testA,testB".

    Raises:
        ValueError: if it names no split, a missing split, or one without rows.
    """
    names = list(dict.fromkeys(name.strip() for name in data.test_splits.split(",") if name.strip()))
    if not names:
        raise ValueError(f"test_splits={quote(data.test_splits)} names no split; there are: {', '.join(rows)}.")
    for name in names:
        if name not in rows:
            raise ValueError(f"test_splits names {quote(name)}, but {data.dataset} has the splits {', '.join(rows)}.")
        if len(rows[name]) == 0:
            raise ValueError(f"The split {name!r} of {data.dataset} has no rows, so there is nothing to evaluate.")
    return {name: rows[name] for name in names}


def report(
    model: RefTRForVisualGrounding,
    processor: RefTRProcessor,
    rows: dict[str, datasets.Dataset],
    settings: TrainingSettings,
    accelerator: Accelerator,
) -> dict:
    """
    Evaluate the splits of `test_splits` and write the report, see [`RunFolder`].

    A collective: all processes call it, and the main process writes.

    Returns:
        `dict`: the content of metrics.json.

    Raises:
        ValueError: see `select_splits` and `evaluate`.
    """
    evaluation, init_from = settings.evaluation, settings.initialization.init_from
    splits = select_splits(rows, settings.data)
    run = settings.checkpoints.folder
    source = init_from if evaluation.eval_only and init_from else settings.checkpoints.output_dir
    metrics = {
        "model": str(source),
        "dataset": settings.data.dataset,
        "image_size": image_size_of(processor.image_processor),
        "two_step_masks": evaluation.two_step_masks,
        "evaluation_batching": evaluation.evaluation_batching,
        "evaluation_batch_size": evaluation.evaluation_batch_size,
        "splits": {},
    }
    if accelerator.is_main_process:
        run.path.mkdir(parents=True, exist_ok=True)
        run.remove_report()
    training_rows = find_training_rows(rows, settings.data)
    if licenses := licenses_of([*splits.values(), *([] if training_rows is None else [training_rows])]):
        metrics["dataset_license"] = licenses
    data = EvaluationData(splits, processor, settings, accelerator.process_index, accelerator.num_processes)
    for name, split in splits.items():
        records = evaluate(model, processor, split, settings, accelerator, name, data=data)
        cut = find_cut(settings.data.dataset, name, settings.data.dataset_config)
        boxes = {
            "integer_boxes": has_integer_boxes(name, settings.data),
            **({} if cut is None else {"cut_from": cut}),
            **count_targets(split, records, dataset_and_split(settings.data.dataset, name)[1], cut),
        }
        metrics["splits"][name] = (
            boxes | summarize(records) | blind_baselines(records, training_rows, name, settings.data)
        )
        if evaluation.visualize:
            folder = run.visualizations(name)
            draw_samples(model, processor, split, records, evaluation.visualize, folder, accelerator)
        if accelerator.is_main_process:
            with open(run.predictions, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(prediction(name, record), ensure_ascii=False) + "\n" for record in records)
            if evaluation.num_pictures and len(metrics["splits"]) == 1:
                draw_validation_images(records, split, evaluation.num_pictures).save(run.drawn_predictions)
                if "generalized" in metrics["splits"][name]:
                    draw_presence(metrics["splits"][name]["generalized"]).save(run.drawn_presence)
                undecoded = split.cast_column("image", datasets.Image(decode=False))
                metrics["example"] = save_example(undecoded[0], run.example)
    if accelerator.is_main_process:
        write_file(run.report, format_report(metrics))
        write_file(run.metrics, json.dumps(metrics, indent=2) + "\n")
    accelerator.wait_for_everyone()
    return metrics


def save_example(row: dict, path: Path) -> dict:
    """Write the image of a row that is not decoded, and return its name and up to three texts to ask about it."""
    image = Image.fromarray(read_row_image(row))
    image.thumbnail((EXAMPLE_SIDE, EXAMPLE_SIDE))
    image.save(path)
    texts = list(dict.fromkeys(sentence["text"] for sentence in row["sentences"]))
    return {"image": path.name, "texts": texts[:3]}


def licenses_of(parts: list[datasets.Dataset]) -> str:
    """Return the licences that the builders of some rows declare, each once; empty if they declare none."""
    return "; ".join(dict.fromkeys(part.info.license for part in parts if part.info.license))


def has_integer_boxes(split: str, data: DataSettings) -> bool:
    """Return whether the flags of a split's dataset truncate its boxes to integers."""
    return bool(flags_of_split(data.dataset, split, data.dataset_config).get("integer_boxes", False))


def left_out_of_build(rows: datasets.Dataset, split: str) -> dict[str, int] | None:
    """
    Return how many samples the build of a split left out, by reason, from the cache of its rows; None if they have no
    cache, as an export or a stream.
    """
    folders = {Path(file["filename"]).parent for file in rows.cache_files}
    report = read_build_report(folders.pop()) if len(folders) == 1 else None
    return None if report is None else report.get(split, {}).get(LEFT_OUT, {})


def count_targets(rows: datasets.Dataset, records: list[dict], split: str, cut: dict | None = None) -> dict:
    """
    Count the targets of a split that count as misses or are left out. `cut` is what a part of a split is cut from.

    Returns:
        `dict`: `left_out`, see `left_out_of_build`, of the complete split; `num_left_out`, expressions of the
        annotations that the rows lack before their last one, as far as `positions` tell (None: not at all);
        `num_without_extent` and `num_empty_masks`, phrases that nothing can hit and that count as misses; with masks
        `num_without_mask`, phrases whose mask is not known and does not count.
    """
    left_out = left_out_of_build(rows, split if cut is None else cut["split"])
    is_known = cut is None and has_positions(rows)
    positions = [position for row in rows["positions"] for position in row or ()] if is_known else []
    counts = {
        "left_out": left_out,
        "num_left_out": max(positions) + 1 - len(positions) if positions else None,
        "num_without_extent": sum(is_degenerate(record["box"]) for record in records if has_one_target(record)),
    }
    if any("pred_segmentation" in record for record in records):
        masks = [record["segmentation"] for record in records if has_one_target(record)]
        counts["num_empty_masks"] = sum(mask is not None and is_empty(mask) for mask in masks)
        counts["num_without_mask"] = masks.count(None)
    return counts


def find_training_rows(rows: dict, data: DataSettings) -> datasets.Dataset | None:
    """Return the rows of `train_split` ("train+val" for two), or None if they are missing or streamed."""
    parts = [rows.get(name) for name in data.train_split.split("+")]
    if not all(isinstance(part, datasets.Dataset) and len(part) for part in parts):
        return None
    return datasets.concatenate_datasets(parts)


def blind_baselines(
    records: list[dict], training_rows: datasets.Dataset | None, split: str, data: DataSettings
) -> dict:
    """
    Return the metrics of blind baselines: a constant box ignores the image, shuffled expressions ignore the text. A
    baseline that cannot be computed is left out with a warning.
    """
    found = {}
    if training_rows is None:
        logger.warning(
            f"{split}: no constant box, because the split {data.train_split!r} that it is chosen on was not loaded."
        )
    else:
        found["constant_box"] = constant_box(training_rows, records)
    swapped = shuffled_expressions(records)
    if swapped is None:
        logger.warning(f"{split}: no shuffled expressions, because no image has two objects with predictions.")
    else:
        found["swapped_expressions"] = swapped
    return found


def prediction(split: str, record: dict) -> dict:
    """
    Return the line of predictions.jsonl about one phrase: an answer in JSON, and how it was scored. From a model that
    predicts presence it is the best answer, with `answers`, all of them, and `num_targets`.
    """
    segmentation = {"segmentation": record["pred_segmentation"]} if "pred_segmentation" in record else {}
    box, score, several = record["pred_box"], None, {}
    if "query_scores" in record:
        answers = answers_of(record)
        box, score = answers[0][0] if answers else None, best_score(record)
        several = {
            "answers": [{"box": answer, "score": round(probability, 4)} for answer, probability in answers],
            "num_targets": len(targets_in(record)),
        }
        if segmentation and not answers:
            segmentation = {"segmentation": None}
    return {
        **json_answer(record["words"], box, score, **segmentation),
        "split": split,
        "image_id": record["image_id"],
        "sentence_id": record["sentence_id"],
        "phrase": record["phrase"],
        "words": record["words"],
        "pred_box_xyxy": record["pred_box"],
        "iou": record["iou"],
        "any_box_iou": record["any_box_iou"],
        **several,
    }


def format_report(metrics: dict) -> str:
    """Return the content of `report.md`: tables of every split, and the conditions of the evaluation."""
    head = [f"# {for_markdown(metrics['dataset'])}", "", f"Model: {for_code(metrics['model'])}.", ""]
    return "\n".join([*head, *format_results(metrics, "##")]) + "\n"


def format_results(metrics: dict, heading: str) -> list[str]:
    """Return tables of every split under headings of a level, "##", and then the conditions of the evaluation."""
    lines = format_comparison(metrics, heading)
    for name, values in metrics["splits"].items():
        lines += ["", f"{heading} {for_markdown(name)}"]
        if cut := values.get("cut_from"):
            lines += ["", describe_cut(cut)]
        entries = {"all phrases": values, **values["per_kind"]}
        with_baselines = entries | {label: values[key] for key, label in BLIND_BASELINES.items() if key in values}
        missing = [label for key, label in BLIND_BASELINES.items() if key not in values]
        targets = "truncated to integers, as published" if values["integer_boxes"] else "as annotated, not truncated"
        lines += ["", *format_columns("boxes", with_baselines, BOX_COLUMNS)]
        if "mask_mean_iou" in values:
            lines += ["", *format_columns("masks", entries, MASK_COLUMNS)]
        lines += ["", f"Boxes are compared with the ground truth {targets}."]
        lines += format_targets(values)
        if missing:
            lines += ["", f"Not computed, for lack of data: {', '.join(missing)}."]
        if "any_box_recall@1" in values:
            lines += [
                "",
                *format_columns("boxes", entries, RECALL_COLUMNS),
                "",
                "Objects of this split have several boxes. Merged: the prediction is compared with their union; any "
                "box: with each of them. The two protocols are not comparable.",
            ]
        if "generalized" in values:
            lines += format_generalized(values)
        if "mask_separation" in values:
            lines += [
                "",
                f"The masks of different objects in one caption have a mean IoU of {values['mask_separation']:.3f}; "
                f"that of the annotated masks is {values['mask_separation_target']:.3f}.",
            ]
    return [*lines, *format_conditions(metrics, heading)]


def format_generalized(values: dict) -> list[str]:
    """Return tables of the phrases that refer to none, one or several objects, and of how certain the scores are."""
    generalized = values["generalized"]
    entries = {"all phrases": {**values, **generalized}}
    entries |= {GROUP_LABELS[name]: group for name, group in generalized["per_group"].items()}
    entries |= generalized["per_kind"]
    lines = ["", *format_columns("none, one or several", entries, EXACT_COLUMNS)]
    absent = {name: kind for name, kind in generalized["per_kind"].items() if "auroc" in kind}
    if "presence_auroc" in values:
        presence = {
            "n_acc": values["n_acc"],
            "auroc": values["presence_auroc"],
            "num_phrases": values["num_no_target"],
        }
        lines += ["", *format_columns("no target", {"all of them": presence, **absent}, ABSENT_COLUMNS)]
    known = {label: values[name] for name, label in GENERALIZED_VALUES.items() if name in values}
    lines += [
        "",
        "A phrase is answered exactly if its boxes match all of its targets and nothing else, each with an IoU of at "
        f"least 0.5 (Pr@(F1=1) of gRefCOCO's GREC). Answers have a score over {generalized['threshold']:.3f}. "
        + "; ".join(f"{label} {value:.3f}" for label, value in known.items())
        + ".",
    ]
    bins = [row for row in generalized["reliability"] if row["count"]]
    lines += ["", "| score of the best box | phrases | mean score | share right |", "|---|---:|---:|---:|"]
    for row in bins:
        low, high = row["bin"]
        lines.append(
            f"| {low:.2f} to {high:.2f} | {row['count']} | {row['mean_confidence']:.3f} | {row['share_right']:.3f} |"
        )
    return lines


def describe_cut(cut: dict) -> str:
    """Return a sentence on a part of a split, see `published_results.find_cut`."""
    return (
        f"A part of the split {for_code(cut['split'])}, about {100 * cut['share']:g} % of its images: the results are "
        "not comparable with published ones, which are of complete splits."
    )


def format_conditions(metrics: dict, heading: str) -> list[str]:
    """Return the conditions of the evaluation, under a heading of a level."""
    lines = ["", f"{heading} Conditions of the evaluation", "", "A box is correct if its IoU is over 0.5."]
    if any("mask_mean_iou" in values for values in metrics["splits"].values()):
        steps = "in two steps, as published" if metrics["two_step_masks"] else "once, from logits to the original size"
        lines += [
            f"Masks are resized {steps}; their metrics are at the original size of the image, except for the mIoU at "
            "the size that images are resized to, which is the published metric.",
        ]
    if "evaluation_batching" in metrics:
        lines += ["", BATCHINGS[metrics["evaluation_batching"]].format(metrics["evaluation_batch_size"])]
    if has_coco_images(metrics["dataset"]):
        lines += [
            "",
            "The images of these datasets are from COCO's train2014: a detector trained on COCO (such as DETR) that "
            "weights come from has seen the held-out images, though not their expressions.",
        ]
    return lines


def format_targets(values: dict) -> list[str]:
    """Return sentences on the targets of a split that count as misses, and on those that do not count."""
    sentences = []
    reasons = values.get("left_out")
    if reasons is None and values.get("num_left_out"):
        reasons = {"expressions of the annotations": values["num_left_out"]}
    if reasons:
        of_split = f"of all of {for_code(values['cut_from']['split'])}, " if "cut_from" in values else ""
        sentences.append(
            f"Not evaluated: {of_split}the dataset {for_markdown(describe_reported(LEFT_OUT, reasons))}. "
            + ("" if values["integer_boxes"] else "The published evaluation counts boxes without extent as misses.")
        )
    if count := values.get("num_without_extent"):
        sentences.append(f"{count} phrases whose box has no extent count as misses, as published.")
    if count := values.get("num_empty_masks"):
        sentences.append(f"{count} phrases with an empty mask count with a mask IoU of 0, as published.")
    if count := values.get("num_without_mask"):
        sentences.append(
            f"{count} phrases have no mask and are left out of the mask metrics; the published evaluation counts an "
            "empty mask as an IoU of 0, and so does a dataset built with integer_boxes."
        )
    return [line for sentence in sentences for line in ("", sentence.strip())]


def format_columns(title: str, entries: dict[str, dict], columns: dict[str, str]) -> list[str]:
    """Return a Markdown table with one row per entry that has all columns, keyed as in metrics.json."""
    lines = [f"| {title} | {' | '.join(columns.values())} |", f"|---{'|---:' * len(columns)}|"]
    for label, values in entries.items():
        if columns.keys() <= values.keys():
            cells = [str(values[key]) if "num" in key else f"{values[key]:.3f}" for key in columns]
            lines.append(f"| {for_markdown(label)} | {' | '.join(cells)} |")
    return lines


def format_comparison(metrics: dict, heading: str) -> list[str]:
    """Return a table of the metrics next to published ones of the same dataset and split, in percent."""
    lines = []
    for split, values in metrics["splits"].items():
        for result in comparable_results(metrics["dataset"], split):
            if result.metric in values:
                lines.append(
                    f"| {for_markdown(split)} | {METRIC_NAMES[result.metric]} | {100 * values[result.metric]:.2f} "
                    f"| {result.percentages[split]:.2f} | {result.model}, {result.backbone}, pre-training: "
                    f"{result.pre_training} | {result.source}{'' if result.confirmed else ' (not confirmed)'} |"
                )
    if not lines:
        return []
    head = ["| split | metric | this model | published | published model | source |", "|---|---|---:|---:|---|---|"]
    if metrics.get("evaluation_batching", "published") != "published":
        lines += [
            "",
            "Published metrics are of images padded as --evaluation_batching published pads them: padding changes "
            "answers.",
        ]
    if not all(values["integer_boxes"] for values in metrics["splits"].values()):
        lines += [
            "",
            "Published metrics are of target boxes rounded to integers: --dataset_config.integer_boxes true.",
        ]
    return ["", f"{heading} Compared with published results", "", *head, *lines]


def format_metrics(metrics: dict) -> str:
    """Return the metrics of all splits as a table for a terminal."""
    blocks = []
    for split, values in metrics["splits"].items():
        with_masks = "mask_mean_iou" in values
        lines = [
            f"{split:<22}{'accuracy@0.5':>14}{'mean IoU':>10}{'mask mIoU' if with_masks else '':>11}{'phrases':>9}"
        ]
        entries = {"all phrases": values, **{f"  {kind}": part for kind, part in values["per_kind"].items()}}
        entries |= {label: values[key] for key, label in BLIND_BASELINES.items() if key in values}
        for name, part in entries.items():
            mask_mean_iou = f"{part['mask_mean_iou']:.3f}" if "mask_mean_iou" in part else ""
            lines.append(
                f"{name:<22}{part['accuracy@0.5']:>14.3f}{part['mean_iou']:>10.3f}{mask_mean_iou:>11}"
                f"{part['num_phrases']:>9}"
            )
        if "generalized" in values:
            known = {name: values[name] for name in ("pr_f1_iou@0.5", *GENERALIZED_VALUES) if name in values}
            lines += ["none, one or several: " + ", ".join(f"{name} {value:.3f}" for name, value in known.items())]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)
