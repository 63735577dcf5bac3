"""What the builders of sets that lie on disk have in common."""

import hashlib
import inspect
import logging
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import datasets

from .schema import FEATURES


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """
    A set as one asks for it by name, and what is known about it.

    Args:
        name (`str`): what `data_scripts.load` takes, for example "refcocog_umd".
        builder (`type`): its builder.
        config_name (`str`): the builder's configuration.
        splits (`tuple[str, ...]`): its splits.
        files (`tuple[str, ...]`): the files that are needed, relative to `data_dir`, for people to read.
        distribution (`str`): how its authors distribute it, in a sentence.
        counts (`dict[str, tuple]`): published (images, objects, expressions) of each split, None where not known.
    """

    name: str
    builder: type
    config_name: str
    splits: tuple[str, ...]
    files: tuple[str, ...]
    distribution: str
    counts: dict[str, tuple[int | None, int | None, int | None]] = field(default_factory=dict)


def fingerprint(paths, *words) -> str:
    """A short hash of files by name, size and time of change, and of words; a folder stands for the files in it."""
    digest = hashlib.sha256(repr(words).encode())
    for path in sorted(map(Path, paths)):
        files = [(path.resolve(), path.stat())]
        if path.is_dir():
            with os.scandir(path.resolve()) as entries:
                files = sorted((entry.path, entry.stat()) for entry in entries if entry.is_file())
        for name, status in files:
            digest.update(f"{name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


class GroundingBuilder(datasets.GeneratorBasedBuilder):
    """
    A builder of rows of `schema.FEATURES` from files in `data_dir`. A builder says which annotation files it reads
    (`annotation_files`), and yields rows; a change of those files, of its own module or of the schema makes another
    cache.
    """

    VERSION = datasets.Version("1.0.0")

    def __init__(self, *args, hash=None, **kwargs):
        data_dir = kwargs.get("data_dir")
        name = kwargs.get("config_name") or self.DEFAULT_CONFIG_NAME
        paths = [] if data_dir is None else [p for p in self.annotation_files(Path(data_dir), name) if p.exists()]
        code = [Path(inspect.getfile(type(self)))]
        code += [code[0].with_name(f"{sibling}.py") for sibling in ("building", "schema", "reading")]
        sources = [path.read_text() for path in code if path.exists()]
        super().__init__(*args, hash=fingerprint(paths, hash, *sources), **kwargs)

    @classmethod
    def annotation_files(cls, data_dir: Path, config_name: str) -> list[Path]:
        """The annotation files (no pictures) that this configuration reads; a folder stands for the files in it."""
        raise NotImplementedError

    def _info(self):
        return datasets.DatasetInfo(description=inspect.getdoc(type(self)), features=FEATURES)

    def need_files(self, paths, distribution: str):
        """
        Raise where a file is missing.

        Raises:
            OSError: naming every file, where it was looked for, and how the authors distribute it.
        """
        if self.config.data_dir is None:
            raise ValueError(f"Say where the files of {self.config.name!r} are: data_dir=... . {distribution}")
        missing = [str(path) for path in paths if not Path(path).exists()]
        if missing:
            names = "\n  ".join(missing)
            raise OSError(
                f"{self.config.name!r} needs files that are not there (data_dir={self.config.data_dir!r}):"
                f"\n  {names}\n{distribution}"
            )

    def need_pictures(self, paths, distribution: str, what: str = "pictures"):
        """
        Raise where a picture (or one of another many files, `what`) is missing, with the number of them and the
        first twenty.

        Raises:
            OSError: naming them, and how the authors distribute them.
        """
        missing = [str(path) for path in paths if not Path(path).is_file()]
        if missing:
            names = "\n  ".join(missing[:20])
            raise OSError(
                f"{len(missing)} {what} of {self.config.name!r} are not there (data_dir={self.config.data_dir!r}):\n"
                f"  {names}{'' if len(missing) <= 20 else f'{chr(10)}  ...'}\n{distribution}"
            )

    def report_changed(self, split: str, changed: Counter):
        """Say once what was kept but is not as annotated: what was done -> number."""
        if changed:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(changed.items()))
            logger.warning(f"{self.config.name} {split}: {reasons}.")

    def report_dropped(self, split: str, dropped: Counter):
        """Say once what was left out of a split, and why: reason -> number."""
        if dropped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
            logger.warning(f"{self.config.name} {split}: left out {reasons}.")


def clip_box(box_xyxy, width: int, height: int) -> list[float] | None:
    """
    A box cut at its picture's edges; None where nothing of it is left, or where it is no box (inverted, without
    extent, not a number).

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


def clip_boxes(boxes_xyxy, width: int, height: int, dropped: Counter, changed: Counter) -> list[list[float]]:
    """What is left of boxes in their picture; counts those of which nothing is, and those that were cut."""
    kept = []
    for box_xyxy in boxes_xyxy:
        box = clip_box(box_xyxy, width, height)
        if box is None:
            dropped["boxes of which nothing is in the picture"] += 1
            continue
        if box != [float(value) for value in box_xyxy]:
            changed["boxes are cut at their picture's edge"] += 1
        kept.append(box)
    return kept


def merge_boxes(boxes_xyxy) -> list[float]:
    """The smallest box that holds them all."""
    left, top, right, bottom = zip(*boxes_xyxy, strict=True)
    return [min(left), min(top), max(right), max(bottom)]
