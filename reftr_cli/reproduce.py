"""
Evaluate a published checkpoint as published, on its authors' files:

    reftr reproduce --data_dir data --checkpoint refcoco.pth --dataset refcoco_unc

converts the checkpoint and evaluates it on every split that is not for training: boxes rounded to integers, masks
resized in two steps, images of 640 pixels, in batches of 8 consecutive expressions, padded to the largest image of the
batch. `report.md` lists the metrics next to the published ones. It runs in one process.
"""

import argparse
import json
import sys
from pathlib import Path

from data_scripts.escaping import for_terminal


def published_settings(dataset: str) -> dict[str, str]:
    """
    Return the settings of the training script with which the published metrics of a dataset are measured.

    Raises:
        ValueError: if the dataset is unknown, or all its splits are for training.
    """
    from data_scripts.building import flags_of
    from data_scripts.loading import SOURCES

    if dataset not in SOURCES:
        raise ValueError(f"{dataset!r} is not a dataset; use one of {', '.join(SOURCES)}.")
    source = SOURCES[dataset]
    splits = [split for split in source.splits if not split.startswith("train")]
    if not splits:
        raise ValueError(f"{dataset!r} has only the splits {', '.join(source.splits)}, and none to evaluate on.")
    flags = {"integer_boxes": True} if "integer_boxes" in flags_of(source) else {}  # others have whole pixels already
    return {
        "dataset": dataset,
        "dataset_config": json.dumps(flags),
        "test_splits": ",".join(splits),
        "two_step_masks": "true",
        "evaluation_batching": "published",
    }


def main(argv: list[str] | None = None) -> int:
    """
    Convert, evaluate and print where the report is.

    Returns:
        `int`: the exit code.
    """
    parser = argparse.ArgumentParser(
        prog="reftr reproduce", description="Evaluate a published checkpoint as published."
    )
    parser.add_argument("--data_dir", required=True, help="folder of the dataset's files, as its authors publish them")
    parser.add_argument("--checkpoint", required=True, help="published .pth file")
    parser.add_argument(
        "--dataset", default="refcoco_unc", help="name of the dataset (default: %(default)s), see `reftr data list`"
    )
    parser.add_argument("--tokenizer", help="folder or Hub id; by default the published one, from the local cache")
    parser.add_argument(
        "--batch_size",
        type=int,
        default=8,
        help="expressions per batch; published: 8, and 16 for Flickr30k from DETR",
    )
    parser.add_argument("--output_dir", help="folder for model and report; by default runs/reproduce/DATASET")
    args = parser.parse_args(argv)

    settings = published_settings(args.dataset)
    output_dir = Path(args.output_dir or Path("runs", "reproduce", args.dataset))

    import train_reftr
    from modeling_reftr.convert_reftr_checkpoint import convert_checkpoint, describe_assumptions

    config = convert_checkpoint(args.checkpoint, output_dir / "model", tokenizer=args.tokenizer, overwrite=True)
    sys.stdout.write(f"Assumed as published: {describe_assumptions(config)}.\n")
    settings |= {"init_from": output_dir / "model", "output_dir": output_dir, "data_dir": args.data_dir}
    settings["evaluation_batch_size"] = args.batch_size
    exit_code = train_reftr.main(
        ["--eval_only", *(str(item) for name, value in settings.items() for item in (f"--{name}", value))]
    )
    if exit_code:  # interrupted, which the script reports
        return exit_code
    sys.stdout.write(for_terminal(f"Compared with the published metrics in {output_dir / 'report.md'}\n"))
    return 0
