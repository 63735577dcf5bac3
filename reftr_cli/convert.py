"""
Convert published RefTR checkpoints to folders for `RefTRForVisualGrounding.from_pretrained`, and back:

    reftr convert --checkpoint refcoco.pth --output_dir reftr-refcoco
    reftr convert --checkpoint reftr-refcoco --output_dir back.safetensors --to_published

The published code loads the latter after
`torch.save({"model": safetensors.torch.load_file("back.safetensors")}, "back.pth")`.
"""

import argparse
import sys

from data_scripts.escaping import for_terminal


def refuse_ignored_options(args: argparse.Namespace) -> None:
    """
    Refuse options that this direction of the conversion ignores.

    Raises:
        ValueError: if there is one.
    """
    ignored = {"--config": args.config, "--tokenizer": args.tokenizer, "--no_processor": args.no_processor}
    if not args.to_published:
        ignored = {"--tokenizer": args.tokenizer} if args.no_processor else {}
    other = "--to_published" if args.to_published else "--no_processor"
    for option, value in ignored.items():
        if value:
            raise ValueError(f"{option} has no effect with {other}: remove one of them.")


def main(argv: list[str] | None = None) -> None:
    """Print what was assumed and written."""
    parser = argparse.ArgumentParser(
        prog="reftr convert",
        description="Convert published RefTR checkpoints to folders for from_pretrained, and back.",
    )
    parser.add_argument("--checkpoint", required=True, help="published file; with --to_published a RefTR folder")
    parser.add_argument(
        "--output_dir", required=True, help="folder to write; with --to_published also a .safetensors file"
    )
    parser.add_argument("--config", help="config.json or its folder; by default derived from the shapes")
    parser.add_argument("--tokenizer", help="folder or Hub id; by default the published one, from the local cache")
    parser.add_argument("--no_processor", action="store_true", help="write the model without its processor")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    parser.add_argument(
        "--to_published",
        action="store_true",
        help="convert back to published names in safetensors; the published code loads them after "
        'torch.save({"model": safetensors.torch.load_file(FILE)}, "checkpoint.pth")',
    )
    args = parser.parse_args(argv)

    refuse_ignored_options(args)

    from modeling_reftr.convert_reftr_checkpoint import (
        convert_checkpoint,
        convert_to_published,
        describe_assumptions,
    )

    if args.to_published:
        written = convert_to_published(args.checkpoint, args.output_dir, overwrite=args.overwrite)
        sys.stdout.write(for_terminal(f"Written: {written}\n"))
        return
    config = convert_checkpoint(
        args.checkpoint,
        args.output_dir,
        config=args.config,
        tokenizer=args.tokenizer,
        with_processor=not args.no_processor,
        overwrite=args.overwrite,
    )
    if args.config is None:
        sys.stdout.write(
            f"Assumed as published, because shapes do not determine them: {describe_assumptions(config)}. "
            "Use --config to change them.\n"
        )
    sys.stdout.write(for_terminal(f"Written: {args.output_dir}\n"))
