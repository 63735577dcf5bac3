"""
Build, check, preview, import and export datasets:

    reftr data list
    reftr data build refcoco_unc --data_dir data
"""

import argparse

from data_scripts.formats import EXPORTED, FORMATS, IMPORTED, PARQUET


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="reftr data",
        description="Build, check, preview, import and export datasets for visual grounding.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(command: str, description: str, needs_name: bool = True) -> argparse.ArgumentParser:
        epilog = "Flags of the dataset are given as --flag value; `list NAME` shows them." if needs_name else None
        added = commands.add_parser(
            command, help=description, description=description, epilog=epilog, allow_abbrev=False
        )
        if not needs_name:
            added.add_argument("name", nargs="?", metavar="NAME", help="a dataset, to describe it")
            return added
        added.add_argument("name", metavar="NAME", help="a dataset, see `list`; a folder; or user/name of the Hub")
        added.add_argument("--data_dir", metavar="DIR", help="folder of the dataset's files")
        added.add_argument(
            "--cache_dir", metavar="DIR", help="folder of built datasets (default: that of the library)"
        )
        added.add_argument("--num_proc", type=int, metavar="N", help="number of processes (default: 1)")
        added.add_argument(
            "--split_parts", metavar="YAML", help="cut splits by image: {validation: {train: 0.9, test: 0.1}}"
        )
        return added

    add("list", "list datasets, their splits, published counts and files", needs_name=False)
    build = add("build", "build every split and check that every image exists")
    build.add_argument("--verify", action="store_true", help="also decode every image")
    checks = add("check", "check every row and image; exit code 1 for errors, unexpected counts are warnings")
    checks.add_argument("--json", metavar="FILE", help="also write the report to a file")
    checks.add_argument("--limit", type=int, default=5, metavar="N", help="findings per kind to show (default: 5)")
    checks.add_argument(
        "--mask_tolerance",
        type=float,
        metavar="PIXELS",
        help="tolerated distance between the sides of a mask's bounding box and its box (default: 2.0)",
    )
    exports = add("export", "write Parquet files that datasets.load_dataset reads, or files of other formats")
    exports.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    others = ", ".join(EXPORTED)
    exports.add_argument("--format", default=PARQUET, metavar="FORMAT", help=f"{others} (default: %(default)s)")
    form = exports.add_mutually_exclusive_group()
    form.add_argument("--embed", action="store_true", help="copy the images into the export (default)")
    form.add_argument("--by_path", action="store_true", help="store the paths of the images on this machine")
    exports.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    exports.add_argument("--license", metavar="ID", help="licence for the card, e.g. cc-by-4.0 (default: if known)")
    exports.add_argument("--language", metavar="CODE", help="language of the texts, e.g. en (default: if known)")
    exports.add_argument("--push_to_hub", metavar="REPO", help="push to this repository (user/name)")
    exports.add_argument("--private", action="store_true", help="create the repository as private")
    previews = add("preview", "draw samples with boxes, masks and texts")
    previews.add_argument("--output", required=True, metavar="FILE.png", help="image to write")
    previews.add_argument("--split", help="split to draw from (default: the first)")
    previews.add_argument("--num", type=int, default=12, metavar="N", help="number of images (default: %(default)s)")
    previews.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    add("stats", "print statistics of images, boxes, phrases and texts")
    text = "write annotation files of other formats as JSON Lines, for the dataset jsonl"
    formats = "\n".join(f"  {name:<16}{FORMATS[name].content}" for name in IMPORTED)
    imports = commands.add_parser(
        "import",
        help=text,
        description=text,
        epilog=f"formats:\n{formats}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    imports.set_defaults(name=None)
    imports.add_argument("format", metavar="FORMAT", help="the format of the files")
    imports.add_argument("files", nargs="+", metavar="[SPLIT=]FILE", help="files, of the split train by default")
    imports.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    imports.add_argument("--image_dir", metavar="DIR", help="folder of the images (default: that of the first file)")
    imports.add_argument("--box_format", metavar="NAME", help="convention of the boxes, such as xyxy or xywh_thousand")
    imports.add_argument("--text_field", metavar="NAME", help="field or attribute that has the words of an object")
    imports.add_argument("--prompt", metavar="TEXT", help="what questions look like, with {} for the expression")
    imports.add_argument("--drop_bad_lines", action="store_true", help="leave out malformed and refused annotations")
    imports.add_argument("--overwrite", action="store_true", help="replace files of an earlier import")
    text = "list the COCO images that datasets hold out, to exclude them from pre-training on Visual Genome"
    held_out = commands.add_parser("held_out", help=text, description=text, allow_abbrev=False)
    held_out.set_defaults(name=None)
    held_out.add_argument("names", nargs="+", metavar="NAME", help="datasets of the RefCOCO family, e.g. refcoco_unc")
    held_out.add_argument("--data_dir", required=True, metavar="DIR", help="folder of the datasets' files")
    held_out.add_argument("--output", required=True, metavar="FILE.json", help="list to write")
    return parser


def main(argv: list[str] | None = None) -> int:
    """
    Run a command.

    Returns:
        `int`: the exit code, 1 if `check` found errors.

    Raises:
        ValueError, OSError: if the arguments, or the files of a dataset, are invalid.
    """
    args, rest = make_parser().parse_known_args(argv)
    if args.name is None and rest:
        raise ValueError(f"{rest[0]!r} is not an option of the command.")
    if getattr(args, "num_proc", None) is not None and args.num_proc < 1:
        raise ValueError(f"--num_proc {args.num_proc} must be at least 1.")

    from reftr_cli import data_commands

    return data_commands.run(args, rest)
