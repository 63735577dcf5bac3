"""What the commands of `reftr data` run."""

import contextlib
import json
import logging
import os
import re
import shlex
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from data_scripts import SOURCES
from data_scripts.annotation_export import export_annotations
from data_scripts.building import Source, flags_of, format_listing
from data_scripts.checking import MASK_TOLERANCE, check, find_broken_images, format_findings, judge_rows
from data_scripts.escaping import TerminalFormatter, for_terminal
from data_scripts.exporting import DATA, MARK, README, check_output, export_dataset
from data_scripts.formats import EXPORTED, FORMATS, PARQUET, suffix_of, writer_of
from data_scripts.importing import import_files
from data_scripts.loading import find_source, load_with_report
from data_scripts.progress import disable_library_bars
from data_scripts.quoting import quote
from data_scripts.reading import check_text
from data_scripts.reports import (
    count_split,
    describe_source,
    format_build_report,
    format_counts,
    format_statistics,
    format_table,
    list_sources,
)
from data_scripts.visual_genome import write_held_out
from data_scripts.yaml_values import read_yaml
from reftr_cli.preview import check_name, draw_preview
from training_reftr.hub import upload, write_contents


def parse_flags(source: Source, argv: list[str]) -> dict:
    """
    Parse the arguments that argparse does not know as fields of a dataset's configuration.

    Args:
        source (`Source`): the dataset.
        argv (`list[str]`): `--name value`, `--name=value`, or `--name` for true.

    Raises:
        ValueError: if an argument is not a flag of the dataset.
    """
    known, flags = flags_of(source), {}
    while argv:
        argument, *argv = argv
        name, is_joined, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or name not in known:
            has = ", ".join(f"--{name}" for name in known) or "none"
            raise ValueError(
                f"{quote(argument)} is neither an option of the command nor a flag of {source.name!r} ({has})."
            )
        if not is_joined:
            value, argv = (argv[0], argv[1:]) if argv and not argv[0].startswith("--") else ("true", argv)
        where = f"--{name} {quote(value)}"
        is_text = known[name].type in (str, "str")
        flags[name] = check_text(value, where) if is_text else read_yaml(value, where)
    return flags


def write(text: str) -> None:
    """Write a line to stdout."""
    sys.stdout.write(for_terminal(text) + "\n")


def load_splits(args: Namespace) -> tuple[dict, dict | None]:
    """Load the dataset named by the command, from the cache if it is there, and its build report."""
    folders = {"data_dir": args.data_dir, "cache_dir": args.cache_dir, "num_proc": args.num_proc}
    return load_with_report(args.name, **folders, **args.flags)


def run_list(args: Namespace) -> None:
    """List all datasets, or describe one."""
    write(list_sources(SOURCES) if args.name is None else describe_source(args.source))


def run_build(args: Namespace) -> None:
    """Build every split, count it, and fail on missing or broken images."""
    splits, build_report = load_splits(args)
    broken = find_broken_images(splits, args.verify, args.num_proc)
    write(format_counts(args.source, {split: count_split(rows) for split, rows in splits.items()}))
    for judgement in judge_rows(splits):
        write(f"warning: {judgement.message}.")
    write(format_build_report(build_report))
    if broken:
        names = format_listing([f"{item.split}: {item.message}" for item in broken])
        raise OSError(f"{len(broken)} images of {args.name!r} cannot be read:{names}")
    write(f"All images {'decode' if args.verify else 'exist (--verify also decodes them)'}.")


def run_check(args: Namespace) -> int:
    """Check every row and image, and return the exit code: 1 if there are errors."""
    splits, build_report = load_splits(args)
    tolerance = MASK_TOLERANCE if args.mask_tolerance is None else args.mask_tolerance
    keeps_misses = bool(args.flags.get("integer_boxes"))
    report = check(args.source, splits, args.num_proc, tolerance, keeps_misses, build_report)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    write(format_counts(args.source, report["splits"]))
    write(format_build_report(build_report))
    for kind in ("warnings", "errors"):
        if report[kind]:
            write(format_findings(report[kind], kind[:-1], args.limit))
    write(f"{args.name}: {len(report['errors'])} errors, {len(report['warnings'])} warnings.")
    return 1 if report["errors"] else 0


def run_export(args: Namespace) -> None:
    """Write Parquet files with a card, and push them if asked."""
    if args.push_to_hub and args.by_path:
        raise ValueError(
            "--by_path does not copy the images, so the export cannot be pushed: remove --by_path or --push_to_hub."
        )
    if args.private and not args.push_to_hub:
        raise ValueError("--private has no effect without --push_to_hub: add it or remove --private.")
    if args.format != PARQUET:
        export_format(args)
        return
    check_output(Path(args.output).absolute(), args.overwrite)
    splits, build_report = load_splits(args)
    settings = {"num_proc": args.num_proc, "overwrite": args.overwrite, "flags": {**args.flags}}
    terms = {"license": args.license, "language": args.language}
    folder = export_dataset(
        args.source, splits, args.output, not args.by_path, build_report=build_report, **settings, **terms
    )
    write(f'Written to {folder}; datasets.load_dataset("{folder}") reads it.')
    if args.push_to_hub:
        write(f"Pushed: {push_export(folder, args.push_to_hub, args.private or None)}")


def export_format(args: Namespace) -> None:
    """
    Write annotation files of another format.

    Raises:
        ValueError: if there is no such format, or an option is for Parquet files alone.
    """
    writer_of(args.format, EXPORTED)
    for name in ("push_to_hub", "license", "language"):
        if getattr(args, name):
            raise ValueError(f"--{name} is for Parquet files: remove it or --format {args.format}.")
    splits, _ = load_splits(args)
    report = export_annotations(args.format, args.source, splits, args.output, args.by_path, args.overwrite)
    write(format_split_counts(report.counts))
    write(format_build_report(report.build, "export"))
    output, image_dir = shlex.quote(args.output), shlex.quote(str(report.image_dir))
    flag = f" --image_dir {image_dir}" if args.by_path else ""
    if FORMATS[args.format].is_dataset:
        command = f"reftr data check {args.format} --data_dir {output}{flag}"
    else:
        files = shlex.join(f"{split}={Path(args.output, split)}{suffix_of(args.format)}" for split in report.counts)
        command = f"reftr data import {args.format} {files}{flag} --output ..."
    write(f"Written to {args.output}; `{command}` reads it.")


def format_split_counts(counts: dict[str, dict[str, int]]) -> str:
    """Format the counts of splits as a table."""
    columns = list(next(iter(counts.values())))
    rows = ([split, *(numbers[name] for name in columns)] for split, numbers in counts.items())
    return format_table([["split", *columns], *rows])


def run_preview(args: Namespace) -> None:
    """Draw samples into one image."""
    check_name(args.output)
    splits, _ = load_splits(args)
    split = args.split or next(iter(splits))
    if split not in splits:
        raise ValueError(f"{args.name!r} has no split {split!r}; use one of {', '.join(splits)}.")
    image = draw_preview(splits[split], args.num, args.seed)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    image.save(args.output)
    write(f"Written to {args.output}.")


def run_stats(args: Namespace) -> None:
    """Print statistics of every split."""
    splits, build_report = load_splits(args)
    write(format_statistics(splits))
    write(f"\n{format_build_report(build_report)}")


def run_import(args: Namespace) -> None:
    """Write annotation files of another format as JSON Lines."""
    splits = {}
    for argument in args.files:
        split, is_named, file = argument.partition("=")
        if not is_named or os.path.exists(argument):
            split, file = "train", argument
        splits.setdefault(split, []).append(Path(file))
    given = {name: getattr(args, name) for name in ("box_format", "text_field", "prompt")}
    options = {name: value for name, value in given.items() if value is not None}
    report = import_files(
        args.format, splits, args.output, args.image_dir, args.drop_bad_lines, args.overwrite, **options
    )
    write(format_split_counts(report.counts))
    if report.box_format is not None:
        write(
            f"The boxes were recognized as {report.box_format}, from those of all images; --box_format says another."
        )
    write(format_build_report(report.build, "import"))
    base = Path(args.image_dir) if args.image_dir else splits[next(iter(splits))][0].parent
    if report.missing:
        names = format_listing(report.missing)
        write(f"warning: {len(report.missing)} images are not in {str(base)!r}, nor checked boxes with them:{names}")
    is_beside = os.path.realpath(base) == os.path.realpath(args.output)
    flag = "" if is_beside else f" --image_dir {shlex.quote(os.path.abspath(base))}"
    write(f"Written to {args.output}; `reftr data check jsonl --data_dir {shlex.quote(args.output)}{flag}` checks it.")


def run_held_out(args: Namespace) -> None:
    """List the images that datasets hold out, to exclude them from training on others."""
    count = write_held_out(args.output, args.names, args.data_dir)
    write(f"Written to {args.output}: {count:,} images; --held_out_file {args.output} excludes them.")


def push_export(folder: str | Path, repository: str, private: bool | None = None) -> str:
    """
    Upload an exported dataset to the Hub.

    Args:
        folder (`str` or `Path`): an export with embedded images.
        repository (`str`): "user/name", created if it does not exist.
        private (`bool`, *optional*): whether a new repository is private.

    Returns:
        `str`: the URL of the commit.

    Raises:
        OSError: if the Hub cannot be reached or refuses it; the folder is unchanged.
    """
    message, patterns = "Upload Parquet files and card", [README, f"{DATA}/*"]
    card = (Path(folder) / README).read_text(encoding="utf-8")
    if MARK in card:
        card = re.sub(r'(?m)^(rows = load_dataset\().*(, split="\w+"\))$', rf'\1"{repository}"\2', card, count=1)
    contents = {README: card.encode("utf-8")}
    commit = upload(folder, repository, "dataset", private, patterns, message, contents)
    write_contents(folder, contents)  # the card names the repository
    return str(commit.commit_url)


@contextlib.contextmanager
def quiet_forks() -> Iterator[None]:
    """
    Handle Ctrl-C in the main process only; a terminal sends it to all processes of a command.

    The main process ends its workers. By themselves they would print tracebacks, and block each other if they ended
    while holding a queue.

    Raises:
        KeyboardInterrupt: in the main process, even if the datasets library raises another error because of it.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield
        return
    process, is_interrupted = os.getpid(), False

    def interrupt(*_: object) -> None:
        nonlocal is_interrupted
        if os.getpid() == process:
            is_interrupted = True
            raise KeyboardInterrupt
        # a worker that the main process ends in the middle of its work cannot close what it has open
        sys.unraisablehook = lambda _: None

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception as error:
        if is_interrupted:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)


COMMANDS = {
    "list": run_list,
    "build": run_build,
    "check": run_check,
    "export": run_export,
    "preview": run_preview,
    "stats": run_stats,
    "import": run_import,
    "held_out": run_held_out,
}


def run(args: Namespace, flags: list[str]) -> int:
    """
    Run a command with its parsed arguments.

    Args:
        args (`Namespace`): see `reftr_cli.data.make_parser`.
        flags (`list[str]`): arguments for the dataset's configuration, see `parse_flags`.

    Returns:
        `int`: the exit code.

    Raises:
        ValueError, OSError: if the dataset, a flag, or a file is invalid.
    """
    disable_library_bars()
    handler = logging.StreamHandler()
    handler.setFormatter(TerminalFormatter("%(levelname)s: %(message)s"))
    logging.getLogger("data_scripts").addHandler(handler)  # not to the root: datasets prints its own messages
    if args.name is not None:
        args.source = find_source(args.name)
        args.flags = parse_flags(args.source, flags)
        if getattr(args, "split_parts", None) is not None:
            args.flags["split_parts"] = read_yaml(args.split_parts, f"--split_parts {quote(args.split_parts)}")
    with quiet_forks():
        return COMMANDS[args.command](args) or 0
