"""
The published table from one's own files, in one command:

    python -m training_reftr.reproduce --data_dir data --checkpoint refcoco.pth --dataset refcoco_unc

converts a published checkpoint and evaluates it on every split of a set that is not for training, as published: boxes
cut to whole pixels, masks resized in two steps, pictures of 640 pixels, in batches of 8 expressions that follow each
other in the annotations, padded to the largest picture among them. `report.md` holds the figures beside the
published ones. One process; nothing here holds a collective.
"""

import argparse
import json
import sys
from pathlib import Path

import data_scripts
from data_scripts.building import flags_of
from data_scripts.loading import SOURCES
from modeling_reftr.convert_reftr_checkpoint import convert_checkpoint, describe_assumptions
from modeling_reftr.escaping import for_terminal


def published_settings(dataset: str) -> dict[str, str]:
    """
    Settings of the training script under which published figures of a set are measured.

    Raises:
        ValueError: if there is no such set, or all of it is for training.
    """
    if dataset not in SOURCES:
        raise ValueError(f"There is no data set {dataset!r}; there are: {', '.join(SOURCES)}.")
    source = SOURCES[dataset]
    splits = [split for split in source.splits if not split.startswith("train")]
    if not splits:
        raise ValueError(f"{dataset!r} has the splits {', '.join(source.splits)} alone: nothing to evaluate on.")
    flags = {"integer_boxes": True} if "integer_boxes" in flags_of(source) else {}  # others have whole pixels already
    return {
        "dataset": dataset,
        "dataset_config": json.dumps(flags),
        "test_splits": ",".join(splits),
        "two_step_masks": "true",
        "evaluation_batching": "published",
    }


def main(argv: list[str] | None = None) -> int:
    """The command: convert, evaluate, and say where the report is."""
    import train_reftr  # here, because the script imports this package

    parser = argparse.ArgumentParser(
        prog="python -m training_reftr.reproduce", description="The published table from a published checkpoint."
    )
    parser.add_argument("--data_dir", required=True, help="where the set's files are, as its authors publish them")
    parser.add_argument("--checkpoint", required=True, help="published .pth file")
    parser.add_argument("--dataset", default="refcoco_unc", help=f"one of {', '.join(data_scripts.SOURCES)}")
    parser.add_argument("--tokenizer", help="folder or Hub id; by default the published one if it is on this machine")
    parser.add_argument(
        "--batch_size",
        type=int,
        default=8,
        help="expressions in a batch; published: 8, and 16 for Flickr30k from DETR",
    )
    parser.add_argument("--output_dir", help="folder of model and report; by default runs/reproduce/DATASET")
    args = parser.parse_args(argv)

    settings = published_settings(args.dataset)
    output_dir = Path(args.output_dir or Path("runs", "reproduce", args.dataset))
    config = convert_checkpoint(args.checkpoint, output_dir / "model", tokenizer=args.tokenizer, overwrite=True)
    sys.stdout.write(f"Taken as published, because shapes do not tell: {describe_assumptions(config)}.\n")
    settings |= {"init_from": output_dir / "model", "output_dir": output_dir, "data_dir": args.data_dir}
    settings["evaluation_batch_size"] = args.batch_size
    exit_code = train_reftr.main(
        ["--eval_only", *(str(word) for name, value in settings.items() for word in (f"--{name}", value))]
    )
    if exit_code:  # it was interrupted, and says so
        return exit_code
    sys.stdout.write(for_terminal(f"Beside the published figures: {output_dir / 'report.md'}\n"))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(for_terminal(f"error: {error}"))
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)
