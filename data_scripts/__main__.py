"""The commands of data sets: `python -m data_scripts --help`."""

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path

from modeling_reftr.escaping import TerminalFormatter, for_terminal

from . import SOURCES
from .building import flags_of, listing
from .checking import MASK_TOLERANCE, check, find_broken_pictures, format_findings, judge_rows
from .exporting import check_output, export, push
from .loading import load_with_report
from .preview import check_name, draw_preview
from .quoting import quote
from .reading import check_text
from .reports import (
    count_split,
    describe_source,
    format_build_report,
    format_counts,
    format_statistics,
    list_sources,
)
from .visual_genome import write_held_out
from .yaml_values import read_yaml


def parse_flags(source, words: list[str]) -> dict:
    """
    What argparse leaves over, as fields of a set's configuration: `--name value`, or `--name` for true.

    Raises:
        ValueError: for anything that is no flag of the set.
    """
    known, flags = flags_of(source), {}
    while words:
        word, *words = words
        name, is_joined, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in known:
            has = ", ".join(f"--{name}" for name in known) or "none"
            raise ValueError(
                f"{quote(word)} is neither an option of the command nor a flag of {source.name!r} ({has})."
            )
        if not is_joined:
            value, words = (words[0], words[1:]) if words and not words[0].startswith("--") else ("true", words)
        where = f"--{name} {quote(value)}"
        is_text = known[name].type in (str, "str")
        flags[name] = check_text(value, where) if is_text else read_yaml(value, where)
    return flags


def write(text: str):
    """Write a text to stdout, with its line's end."""
    sys.stdout.write(for_terminal(text) + "\n")


def load_splits(args) -> tuple[dict, dict | None]:
    """Build the dataset that the command names, or find it in the cache: split -> rows, and the build's report."""
    return load_with_report(
        args.name, data_dir=args.data_dir, cache_dir=args.cache_dir, num_proc=args.num_proc, **args.flags
    )


def run_list(args):
    """`list`: all sets, or all about one."""
    write(list_sources(SOURCES) if args.name is None else describe_source(args.source))


def run_build(args):
    """`build`: counts of every split, and pictures that are missing or broken."""
    splits, build_report = load_splits(args)
    broken = find_broken_pictures(splits, args.verify, args.num_proc)
    write(format_counts(args.source, {split: count_split(rows) for split, rows in splits.items()}))
    for judgement in judge_rows(splits):
        write(f"warning: {judgement.message}.")
    write(format_build_report(build_report))
    if broken:
        names = listing([f"{item.split}: {item.message}" for item in broken])
        raise OSError(f"{len(broken)} pictures of {args.name!r} cannot be read:{names}")
    write(f"All pictures {'decode' if args.verify else 'are there (--verify decodes them as well)'}.")


def run_check(args):
    """`check`: everything that can be wrong with rows and pictures; errors make the exit code 1."""
    splits, build_report = load_splits(args)
    keeps_misses = bool(args.flags.get("integer_boxes"))
    report = check(args.source, splits, args.num_proc, args.mask_tolerance, keeps_misses, build_report)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    write(format_counts(args.source, report["splits"]))
    write(format_build_report(build_report))
    for kind in ("warnings", "errors"):
        if report[kind]:
            write(format_findings(report[kind], kind[:-1], args.limit))
    write(f"{args.name}: {len(report['errors'])} errors, {len(report['warnings'])} warnings.")
    return 1 if report["errors"] else 0


def run_export(args):
    """`export`: Parquet files with a card, and the way to the Hub where it is asked for."""
    if args.push_to_hub and args.by_path:
        raise ValueError("--by_path leaves the pictures on this machine: nothing for --push_to_hub.")
    if args.private and not args.push_to_hub:
        raise ValueError("--private says nothing without --push_to_hub.")
    check_output(Path(args.output).absolute(), args.overwrite)
    splits, build_report = load_splits(args)
    folder = export(
        args.source, splits, args.output, not args.by_path, args.num_proc, args.overwrite, {**args.flags}, build_report
    )
    write(f'Written to {folder}; datasets.load_dataset("{folder}") reads it.')
    if args.push_to_hub:
        write(f"Pushed: {push(folder, args.push_to_hub, args.private or None)}")


def run_preview(args):
    """`preview`: a picture of samples."""
    check_name(args.output)
    splits, _ = load_splits(args)
    split = args.split or next(iter(splits))
    if split not in splits:
        raise ValueError(f"{args.name!r} has no split {split!r}; it has: {', '.join(splits)}.")
    picture = draw_preview(splits[split], args.num, args.seed)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    picture.save(args.output)
    write(f"Written to {args.output}.")


def run_stats(args):
    """`stats`: figures of every split."""
    splits, build_report = load_splits(args)
    write(format_statistics(splits))
    write(f"\n{format_build_report(build_report)}")


def run_held_out(args):
    """`held_out`: the list of pictures that sets hold out, for training on other sets with the same pictures."""
    count = write_held_out(args.output, args.names, args.data_dir)
    write(f"Written to {args.output}: {count:,} pictures; --held_out_file {args.output} leaves them out.")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="reftr data",
        description="Build data sets for visual grounding, check them, look at them, and hand them on.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(command, run, description, needs_name=True):
        epilog = "Flags of the set itself are given as --flag value; `list NAME` shows them." if needs_name else None
        added = commands.add_parser(
            command, help=description, description=description, epilog=epilog, allow_abbrev=False
        )
        added.set_defaults(run=run)
        if not needs_name:
            added.add_argument("name", nargs="?", metavar="NAME", help="a set, for all that is known of it")
            return added
        added.add_argument("name", metavar="NAME", help="a set, see `list`")
        added.add_argument("--data_dir", metavar="DIR", help="where the set's files are")
        added.add_argument("--cache_dir", metavar="DIR", help="where built sets are kept (default: the library's own)")
        added.add_argument("--num_proc", type=int, metavar="N", help="processes (default: 1)")
        return added

    add("list", run_list, "sets, their splits, published counts and files", needs_name=False)
    build = add("build", run_build, "build every split, and see that every picture is there")
    build.add_argument("--verify", action="store_true", help="decode every picture")
    checks = add("check", run_check, "check every row and picture: exit code 1 for errors, counts are warnings")
    checks.add_argument("--json", metavar="FILE", help="write the report there as well")
    checks.add_argument("--limit", type=int, default=5, metavar="N", help="lines of a kind to show (default: 5)")
    checks.add_argument(
        "--mask_tolerance",
        type=float,
        default=MASK_TOLERANCE,
        metavar="PIXELS",
        help="by which a mask's bounding box may differ from its box on each side (default: %(default)s)",
    )
    exports = add("export", run_export, "write Parquet files that datasets.load_dataset reads")
    exports.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    form = exports.add_mutually_exclusive_group()
    form.add_argument("--embed", action="store_true", help="pictures inside the files (default)")
    form.add_argument("--by_path", action="store_true", help="pictures by their paths on this machine")
    exports.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    exports.add_argument("--push_to_hub", metavar="REPO", help="upload it to this repository (user/name)")
    exports.add_argument("--private", action="store_true", help="to a private one")
    previews = add("preview", run_preview, "draw samples with boxes, masks and words")
    previews.add_argument("--output", required=True, metavar="FILE.png", help="picture to write")
    previews.add_argument("--split", help="split to draw from (default: the first)")
    previews.add_argument("--num", type=int, default=12, metavar="N", help="pictures (default: %(default)s)")
    previews.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    add("stats", run_stats, "figures of images, boxes, phrases and words")
    text = "list the COCO pictures that sets hold out, which pre-training on Visual Genome is to leave out"
    held_out = commands.add_parser("held_out", help=text, description=text, allow_abbrev=False)
    held_out.set_defaults(run=run_held_out, name=None)
    held_out.add_argument("names", nargs="+", metavar="NAME", help="sets of the RefCOCO family, e.g. refcoco_unc")
    held_out.add_argument("--data_dir", required=True, metavar="DIR", help="where the sets' files are")
    held_out.add_argument("--output", required=True, metavar="FILE.json", help="list to write")
    return parser


def main(argv: list[str] | None = None) -> int:
    """
    Run a command.

    Returns:
        `int`: the exit code, 1 where `check` found errors.

    Raises:
        ValueError, OSError: a sentence for whoever typed the command.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(TerminalFormatter("%(levelname)s: %(message)s"))
    logging.getLogger(__package__).addHandler(handler)  # not to the root: datasets shows its own messages
    args, rest = make_parser().parse_known_args(argv)
    if args.name is None and rest:
        raise ValueError(f"{rest[0]!r} is no option of the command.")
    if args.name is not None:
        if args.name not in SOURCES:
            raise ValueError(f"There is no data set {args.name!r}; there are: {', '.join(SOURCES)}.")
        args.source = SOURCES[args.name]
        args.flags = parse_flags(args.source, rest)
    if getattr(args, "num_proc", None) is not None and args.num_proc < 1:
        raise ValueError(f"--num_proc {args.num_proc} must be at least 1.")
    with quiet_forks():
        return args.run(args) or 0


@contextlib.contextmanager
def quiet_forks():
    """
    Leave Ctrl-C, which a terminal sends to all processes of a command, to the main one. It ends those that build: they
    would print tracebacks, and block the others if they ended while they hold a queue.

    Raises:
        KeyboardInterrupt: in the main process, also where the datasets library raises another error on its account.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone receives signals
        yield
        return
    process, is_interrupted = os.getpid(), False

    def interrupt(*_):
        nonlocal is_interrupted
        if os.getpid() == process:
            is_interrupted = True
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception as error:
        if is_interrupted:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(for_terminal(f"error: {error}"))
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)
