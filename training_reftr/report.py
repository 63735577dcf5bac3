"""What a run leaves for people: metrics.json, predictions.png, a table. Called on the main process."""

import json
from collections import defaultdict
from pathlib import Path

from modeling_reftr.drawing_reftr import draw_answers, make_grid
from modeling_reftr.processing_reftr import from_coco_rle


def write_report(output_dir: Path, metrics: dict, records: list[dict], rows, num_pictures: int):
    """Write `metrics.json` and, unless `num_pictures` is 0, `predictions.png` into the run's folder."""
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    if num_pictures:
        draw_predictions(records, rows, num_pictures).save(output_dir / "predictions.png")


def draw_predictions(records: list[dict], rows, num_pictures: int):
    """A grid of the first pictures of a split, one sentence each, the kinds of expression in turn."""
    sentences = defaultdict(list)
    for record in records:
        sentences[record["sentence_id"]].append(record)
    by_kind = defaultdict(list)
    for group in sentences.values():
        by_kind[group[0]["types"][0] if group[0]["types"] else ""].append(group)
    kinds = sorted(by_kind)
    index_of = {image_id: index for index, image_id in enumerate(rows["image_id"])}
    used, pictures = set(), []
    while len(pictures) < num_pictures and any(by_kind.values()):
        for kind in kinds:
            # one sentence a picture, while there are pictures
            fresh = [group for group in by_kind[kind] if group[0]["image_id"] not in used] or by_kind[kind]
            if not fresh or len(pictures) == num_pictures:
                continue
            group = fresh[0]
            by_kind[kind].remove(group)
            used.add(group[0]["image_id"])
            row = rows[index_of[group[0]["image_id"]]]
            sentence = next(item for item in row["sentences"] if item["sentence_id"] == group[0]["sentence_id"])
            phrases = [sentence["phrases"][record["phrase"]] for record in group]
            words = [sentence["text"][phrase["start"] : phrase["end"]] for phrase in phrases]
            pictures.append(
                draw_answers(
                    row["image"],
                    [record["pred_box"] for record in group],
                    [f"{word} ({record['iou']:.2f})" for word, record in zip(words, group, strict=True)],
                    true_boxes_xyxy=[record["box"] for record in group],
                    masks=[
                        record["pred_segmentation"] and from_coco_rle(record["pred_segmentation"])
                        for record in group
                        if "pred_segmentation" in record
                    ],
                    title=sentence["text"] if len(group) > 1 else "",
                )
            )
    return make_grid(pictures, columns=4)


def format_table(metrics: dict) -> str:
    """The figures as people read them."""
    with_masks = "mask_mean_iou" in metrics
    lines = [f"{'':<22}{'accuracy@0.5':>14}{'mean IoU':>10}{'mask mIoU' if with_masks else '':>11}{'phrases':>9}"]
    entries = {"all phrases": metrics, **{f"  {kind}": values for kind, values in metrics["per_kind"].items()}}
    entries["best constant box"] = metrics["constant_box"]
    entries["expressions swapped"] = metrics["swapped_expressions"]
    for name, values in entries.items():
        mask_mean_iou = f"{values['mask_mean_iou']:.3f}" if "mask_mean_iou" in values else ""
        lines.append(
            f"{name:<22}{values['accuracy@0.5']:>14.3f}{values['mean_iou']:>10.3f}{mask_mean_iou:>11}"
            f"{values['num_phrases']:>9}"
        )
    return "\n".join(lines)


def validation_pictures(records, rows, num):
    """skeleton"""
    return draw_predictions(records, rows, num)


def report(model, processor, rows, args, accelerator):
    """skeleton"""
    import sys

    from training_reftr.evaluation import constant_box, evaluate, summarize, swapped_expressions

    records = evaluate(model.to(accelerator.device), processor, rows[args.test_splits], args, accelerator, "test")
    if not accelerator.is_main_process:
        return
    metrics = {
        "model": str(args.init_from),
        "dataset": args.dataset,
        "split": args.test_splits,
        **summarize(records),
        "constant_box": constant_box(rows[args.train_split], records),
        "swapped_expressions": swapped_expressions(records),
    }
    write_report(Path(args.output_dir), metrics, records, rows[args.test_splits], args.num_pictures)
    sys.stdout.write(f"{format_table(metrics)}\n{Path(args.output_dir) / 'predictions.png'}\n")
