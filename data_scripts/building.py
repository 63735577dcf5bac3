"""
Base class and helpers of the builders, which read datasets from local files.

A builder module also works as a script of datasets up to 3.6 (`load_dataset("data_scripts/shapes.py",
trust_remote_code=True)`), which copies the script and the siblings that it imports to another folder. So a builder
module

- imports by `from .sibling import name` at the start of a line and with nothing behind it, no comment either
  (the library reads text, not Python);
- imports itself from every sibling that its siblings import from, for the library does not look into those;
- has its builder first: of several builders in a module only that one is found;
- reads no other file, and imports nothing that is not installed with datasets 3.6, numpy, pillow and
  pycocotools.
"""

import builtins
import hashlib
import inspect
import json
import logging
import math
import os
import posixpath
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets.exceptions import DatasetGenerationError
from datasets.utils import tqdm

from .reading import Frame, read_frame
from .schema import FEATURES


logger = logging.getLogger(__name__)

MAX_LISTED = 100  # names in a message
# what `integer_boxes` keeps, see `integer_box`
KEPT_BOXES = "boxes without extent are kept, to be counted as misses"
KEPT_MASKS = "masks without a pixel are kept, to be counted as misses"
# in the folder of a built dataset: split -> a kind of `REPORTED` -> reason -> number, see `reports.read_build_report`
BUILD_REPORT = "build_report.json"
REPORTED = LEFT_OUT, CHANGED, SUSPECTED = "left_out", "changed", "suspected"
ALL_SPLITS = "all"  # what is left out before the splits are made; the library refuses a split of this name


class Copy(NamedTuple):
    """
    Where data can be found whose authors' host is gone, or files of it in another layout.

    Args:
        where (`str`): a repository, "user/name" of the Hub.
        content (`str`): what it has, in a few words.
        license (`str`): the licence that is stated for it, in a few words.
    """

    where: str
    content: str
    license: str


def describe_copies(copies: Sequence[Copy]) -> str:
    """
    Return the living copies of a dataset as a sentence; empty if there are none.

    Example:

    ```python
    >>> from data_scripts.building import Copy, describe_copies

    >>> describe_copies([Copy("someone/photos", "annotations", "CC BY 4.0")])
    'Living copies: someone/photos (annotations; CC BY 4.0).'

    ```"""
    listed = ", ".join(f"{copy.where} ({copy.content}; {copy.license})" for copy in copies)
    return f"Living copies: {listed}." if listed else ""


@dataclass(frozen=True)
class Source:
    """
    A dataset that can be loaded by name, with what is published about it.

    Args:
        name (`str`): the name that `data_scripts.load` takes, for example "refcocog_umd".
        builder (`type`): its builder.
        config_name (`str`): the builder's configuration.
        splits (`tuple[str, ...]`): its splits.
        files (`tuple[str, ...]`): the required files, relative to `data_dir`, as shown to users.
        distribution (`str`): how its authors distribute it, in a sentence.
        counts (`dict[str, tuple]`): published (images, objects, expressions) of each split, None where not known.
        copies (`tuple[Copy, ...]`): where else its files are.
        license (`str`): the licence of an export on the Hub: an id of the Hub; "other" where images and annotations
            have licences of their own, and "unknown" where only the user knows it.
        language (`str`, *optional*): of its texts, as a code of ISO 639; None where only the user knows it.
    """

    name: str
    builder: type
    config_name: str
    splits: tuple[str, ...]
    files: tuple[str, ...]
    distribution: str
    counts: dict[str, tuple[int | None, int | None, int | None]] = field(default_factory=dict)
    copies: tuple[Copy, ...] = ()
    license: str = "unknown"
    language: str | None = None


def flags_of(source: Source) -> dict[str, Field]:
    """Return the fields that a dataset's configuration adds to those of the library, by name."""
    own = {item.name for item in fields(datasets.BuilderConfig)}
    return {item.name: item for item in fields(source.builder.BUILDER_CONFIG_CLASS) if item.name not in own}


def builder_error_of(error: DatasetGenerationError) -> Exception:
    """Return the error of a builder: the library wraps it, and from another process only its text arrives."""
    cause = error.__cause__
    while isinstance(cause, DatasetGenerationError):
        cause = cause.__cause__
    if isinstance(cause, ValueError | OSError):
        return cause
    for found in re.finditer(r"^(\w+): (.*?)\n\n", str(cause), re.MULTILINE | re.DOTALL):
        kind = getattr(builtins, found[1], None)
        for base in (ValueError, OSError):
            if isinstance(kind, type) and issubclass(kind, base):
                return base(found[2])
    return error


def fingerprint(paths: Iterable[str | Path], *values: object) -> str:
    """Return a short hash of values and of files by name, size and modification time; a folder is its files."""
    digest = hashlib.sha256(repr(values).encode())
    for path in sorted(map(Path, paths)):
        files = [(path.resolve(), path.stat())]
        if path.is_dir():
            with os.scandir(path.resolve()) as entries:
                files = sorted((entry.path, entry.stat()) for entry in entries if entry.is_file())
        for name, status in files:
            # a name of bytes that are not UTF-8 is refused where it is read, and not here
            digest.update(f"{name} {status.st_size} {status.st_mtime_ns}".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def format_listing(lines: list[str]) -> str:
    """Return lines as an indented list after a line break; a long list ends with the number of further lines."""
    shown = lines if len(lines) <= MAX_LISTED else [*lines[:MAX_LISTED], f"... and {len(lines) - MAX_LISTED} more"]
    return "".join(f"\n  {line}" for line in shown)


def modules_of(path: Path) -> set[Path]:
    """Return the file of a module and, recursively, of the siblings that it imports by `from .sibling import name`."""
    found, pending = set(), [path]
    while pending:
        module = pending.pop()
        found.add(module)
        named = re.findall(r"^from \.(\w+) import", module.read_text(), re.MULTILINE)
        pending += {module.with_name(f"{name}.py") for name in named} - found
    return found


class GroundingBuilder(datasets.GeneratorBasedBuilder):
    """
    A builder of rows of `schema.FEATURES` from files in `data_dir`. A builder says which annotation files it reads
    (`annotation_files`), and yields rows; a change of those files, of its own module or of one that it imports makes
    another cache.
    """

    VERSION = datasets.Version("1.0.0")
    # whether `_split_generators` reads only the files of `requested` splits
    BUILDS_SPLITS_ALONE = False

    def __init__(
        self, *args: Any, hash: str | None = None, requested: Collection[str] | None = None, **kwargs: Any
    ) -> None:
        data_dir = kwargs.get("data_dir")
        name = kwargs.get("config_name") or self.DEFAULT_CONFIG_NAME
        paths = [] if data_dir is None else [p for p in self.annotation_files(Path(data_dir), name) if p.exists()]
        sources = [path.read_text() for path in sorted(modules_of(Path(inspect.getfile(type(self)))))]
        self.requested = None if requested is None else frozenset(requested)
        alone = () if requested is None else ("splits", *sorted(requested))
        super().__init__(*args, hash=fingerprint(paths, hash, *sources, *alone), **kwargs)
        self.reported = []  # (split, a kind of REPORTED, reason -> number)

    @property
    def title(self) -> str:
        """The name of the dataset in messages."""
        return self.config.name

    def is_requested(self, split: str) -> bool:
        """Return whether a split is to be built: all are, unless some were `requested`."""
        return self.requested is None or split in self.requested

    def require_splits(self, splits: Collection[str]) -> None:
        """
        Require that the `requested` splits exist.

        Args:
            splits (`Collection[str]`): all splits of the dataset.

        Raises:
            ValueError: naming the first that does not, and those that do.
        """
        for split in sorted(self.requested or ()):
            if split not in splits:
                raise ValueError(f"There is no split {split!r} in {self.title!r}; there are: {', '.join(splits)}.")

    def _download_and_prepare(
        self, dl_manager: datasets.DownloadManager, verification_mode: Any, **settings: Any
    ) -> None:
        """Build as the library does, and add the build report to the folder before the library renames it."""
        self.reported.clear()
        self._take_parts()  # of a build that was killed
        super()._download_and_prepare(dl_manager, verification_mode, **settings)
        self.reported += self._take_parts()
        self._write_json(BUILD_REPORT, self.make_report())

    def make_report(self) -> dict[str, dict[str, dict[str, int]]]:
        """Return the reports so far, in the form of `reports.read_build_report`."""
        order = {split: number for number, split in enumerate(self.info.splits or ())}
        report = {}
        for split, kind, counts in sorted(self.reported, key=lambda entry: order.get(entry[0], -1)):
            kinds = report.setdefault(split, {LEFT_OUT: Counter(), CHANGED: Counter()})
            kinds.setdefault(kind, Counter()).update(counts)
        return {
            split: {kind: dict(sorted(counts.items())) for kind, counts in kinds.items()}
            for split, kinds in report.items()
        }

    def _prepare_split_single(self, *args: Any, **settings: Any) -> Iterator[tuple]:
        """Write shards as the library does; a worker process leaves its reports as a file in the same folder."""
        before = len(self.reported)
        for job_id, done, content in super()._prepare_split_single(*args, **settings):
            if done:
                self._write_json(f"{BUILD_REPORT}.{settings['split_info'].name}-{job_id:05d}", self.reported[before:])
                del self.reported[before:]
            yield job_id, done, content

    def _write_json(self, name: str, value: Any) -> None:
        with self._fs.open(posixpath.join(self._output_dir, name), "w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def _take_parts(self) -> list[list]:
        """Read and remove the reports that `_prepare_split_single` left in the folder that is being written."""
        self._fs.invalidate_cache()
        paths = [path for path in self._fs.ls(self._output_dir, detail=False) if f"/{BUILD_REPORT}." in path]
        entries = []
        for path in sorted(paths):
            with self._fs.open(path, "r", encoding="utf-8") as file:
                entries += json.loads(file.read())
            self._fs.rm(path)
        return entries

    @classmethod
    def annotation_files(cls, data_dir: Path, config_name: str) -> list[Path]:
        """Return the annotation files (no images) that this configuration reads; a folder stands for its files."""
        raise NotImplementedError

    def files_of(self, split: str) -> list[Path]:
        """Return the annotation files that a split is read from."""
        data_dir = self.config.data_dir
        return [] if data_dir is None else self.annotation_files(Path(data_dir), self.config.name)

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(description=inspect.getdoc(type(self)), features=FEATURES)

    def require_files(self, paths: Iterable[str | Path], distribution: str) -> None:
        """
        Require that files exist.

        Raises:
            OSError: naming every missing file, the folder, and how the authors distribute it.
        """
        if self.config.data_dir is None:
            raise ValueError(f"{self.title!r} requires data_dir=..., the folder of its files. {distribution}")
        missing = [str(path) for path in paths if not Path(path).exists()]
        if missing:
            raise OSError(
                f"{self.title!r} requires files that do not exist (data_dir={self.config.data_dir!r}):"
                f"{format_listing(missing)}\n{distribution}"
            )

    def require_images(self, paths: Iterable[str | Path], distribution: str, what: str = "images") -> None:
        """
        Require that images, or many other files (`what`), exist.

        Raises:
            OSError: with their number and their names (`format_listing`), and how the authors distribute them.
        """
        message = self.describe_missing(paths, distribution, what)
        if message:
            raise OSError(message)

    def describe_missing(self, paths: Iterable[str | Path], distribution: str, what: str = "images") -> str:
        """Return the message of `require_images`; it is empty if all files exist."""
        missing = [str(path) for path in paths if not os.path.isfile(path)]
        if not missing:
            return ""
        return (
            f"{len(missing)} {what} of {self.title!r} do not exist (data_dir={self.config.data_dir!r}):"
            f"{format_listing(missing)}\n{distribution}"
        )

    def read_frames(self, annotated_sizes: dict, distribution: str) -> dict[str, Frame]:
        """
        Return the frames that images are annotated in, from their headers.

        Args:
            annotated_sizes (`dict`): path of each image -> its annotated (width, height), or None.
            distribution (`str`): how the authors distribute the images, in a sentence.

        Returns:
            `dict`: path -> [`Frame`], see `reading.read_frame`.

        Raises:
            OSError: naming the missing images, or the unreadable ones (`format_listing`).
        """
        self.require_images(annotated_sizes, distribution)
        frames, unreadable = {}, []
        for path, annotated_size in tqdm(annotated_sizes.items(), desc="Reading the images' headers"):
            try:
                frames[path] = read_frame(path, annotated_size)
            except (OSError, ValueError) as error:
                unreadable.append(str(error))
        if unreadable:
            raise OSError(
                f"{len(unreadable)} images of {self.title!r} cannot be read; copy them again:"
                f"{format_listing(unreadable)}\n{distribution}"
            )
        return frames

    def report_changed(self, split: str, changed: Counter) -> None:
        """Log and record annotations that were kept with a change: description of the change -> number."""
        self._report(split, CHANGED, changed)

    def report_suspected(self, message: str) -> None:
        """Log and record that the boxes of the dataset look like another convention than the declared one."""
        self._report(ALL_SPLITS, SUSPECTED, Counter({message: 1}))

    def report_dropped(self, split: str, dropped: Counter) -> None:
        """Log and record annotations that a split leaves out: reason -> number."""
        self._report(split, LEFT_OUT, dropped)

    def _report(self, split: str, kind: str, counts: Counter) -> None:
        if counts:
            self.reported.append((split, kind, dict(counts)))
            logger.warning(f"{self.title} {split}: {describe_reported(kind, counts)}.")


def describe_reported(kind: str, counts: dict[str, int]) -> str:
    """
    Return what was left out, changed or suspected, reason -> number, as part of a sentence.

    Example:

    ```python
    >>> from data_scripts.building import LEFT_OUT, describe_reported

    >>> describe_reported(LEFT_OUT, {"bad lines": 1200, "expressions without words": 2})
    'left out 1200 bad lines, 2 expressions without words'

    ```"""
    if kind == SUSPECTED:
        return "; ".join(sorted(counts))
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
    return f"left out {reasons}" if kind == LEFT_OUT else reasons


def clip_box(box_xyxy: Sequence[float], width: int, height: int) -> list[float] | None:
    """
    Clip a box to its image. Return None if nothing of it is left or it is not a box (inverted, without extent, not a
    number).

    Example:

    ```python
    >>> from data_scripts.building import clip_box

    >>> clip_box([-3, 5, 20, 900], width=640, height=480)
    [0.0, 5.0, 20.0, 480.0]
    >>> clip_box([20, 5, 20, 9], width=640, height=480) is None
    True

    ```"""
    x0, y0, x1, y1 = (float(value) for value in box_xyxy)
    x0, y0, x1, y1 = max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))
    return [x0, y0, x1, y1] if x0 < x1 and y0 < y1 else None


def integer_box(box_xyxy: Sequence[float], width: int, height: int, keep_misses: bool = False) -> list[float] | None:
    """
    Truncate a box to integers as the published loaders do, and clip it to its image; None where it is inverted,
    not finite, or has no extent afterwards. `keep_misses` keeps one without extent: the published evaluation counts it
    as a miss.

    Example:

    ```python
    >>> from data_scripts.building import integer_box

    >>> integer_box([1.9, 2.2, 2.1, 9.7], width=640, height=480)
    [1.0, 2.0, 2.0, 9.0]
    >>> integer_box([20.4, 5, 20.8, 900], width=640, height=480) is None
    True
    >>> integer_box([20.4, 5, 20.8, 900], width=640, height=480, keep_misses=True)
    [20.0, 5.0, 20.0, 480.0]

    ```"""
    if not all(math.isfinite(value) for value in box_xyxy):
        return None
    x0, y0, x1, y1 = (int(value) for value in box_xyxy)
    if x0 > x1 or y0 > y1:
        return None
    limits = (width, height, width, height)
    box = [float(min(max(value, 0), limit)) for value, limit in zip((x0, y0, x1, y1), limits, strict=True)]
    return None if is_degenerate(box) and not keep_misses else box


def is_for_training(split: str) -> bool:
    """Return whether a split is one to train on by its name: train, trainval."""
    return split.startswith("train")


def is_degenerate(box_xyxy: Sequence[float]) -> bool:
    """
    Return whether a box has no extent, as `integer_box` may leave it.

    Example:

    ```python
    >>> from data_scripts.building import is_degenerate

    >>> is_degenerate([20.0, 5.0, 20.0, 480.0]), is_degenerate([1.0, 2.0, 2.0, 9.0])
    (True, False)

    ```"""
    x0, y0, x1, y1 = box_xyxy
    return x0 == x1 or y0 == y1


def clip_boxes(
    boxes_xyxy: Iterable[Sequence[float]], width: int, height: int, dropped: Counter, changed: Counter
) -> list[list[float]]:
    """Clip boxes to their image, counting those that are dropped and those that are changed."""
    kept = []
    for box_xyxy in boxes_xyxy:
        box = clip_box(box_xyxy, width, height)
        if box is None:
            dropped["boxes of which nothing is in the image"] += 1
            continue
        if box != [float(value) for value in box_xyxy]:
            changed["boxes are cut at their image's edge"] += 1
        kept.append(box)
    return kept


def merge_boxes(boxes_xyxy: Iterable[Sequence[float]]) -> list[float]:
    """Return the smallest box that contains all boxes."""
    left, top, right, bottom = zip(*boxes_xyxy, strict=True)
    return [min(left), min(top), max(right), max(bottom)]
