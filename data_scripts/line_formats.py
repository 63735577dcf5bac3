"""
Datasets in file formats of other projects, which readers turn into lines (see `jsonl`): `mdetr_json`, `odvg` and
`phrasecut`. Each reader's module describes its format.

    data_dir/
        finetune_refcoco_train.json  finetune_refcoco_val.json     a file per split, which the end of its name tells
        train2014/COCO_train2014_000000581857.jpg                  in data_dir, or in one of `IMAGE_FOLDERS`

A folder with the files of several datasets requires `path`, split -> file. Boxes and masks that were annotated on an
image of another size are scaled to it.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .box_conventions import BOX_FORMATS
from .building import GroundingBuilder, Source
from .file_names import FileFinder
from .findings import Findings
from .kinds import check_fields
from .lines import LineBuilder, LineConfig, LineConverter
from .masks import box_of
from .mdetr_json import read_mdetr
from .odvg import read_odvg
from .phrase_search import PhraseSearcher
from .phrasecut import read_phrasecut
from .quoting import quote
from .reading import load_json
from .records import read_records
from .schema import FEATURES


# others than the builder's: datasets <= 3.6 copies the siblings that a script itself imports, and no further
__all__ = [
    "BOX_FORMATS",
    "FEATURES",
    "FileFinder",
    "LineFormats",
    "LineFormatsConfig",
    "PhraseSearcher",
    "SOURCES",
    "box_of",
    "check_fields",
    "load_json",
    "quote",
    "read_records",
]

READERS: dict[str, Callable] = {"mdetr_json": read_mdetr, "odvg": read_odvg, "phrasecut": read_phrasecut}
DISTRIBUTIONS = {
    "mdetr_json": (
        "MDETR's annotations are finetune_refcoco_train.json, final_flickr_separateGT_train.json and the like; GLIP's "
        "authors distribute them as mdetr_annotations/ (huggingface.co/GLIPModel/GLIP)."
    ),
    "odvg": "ODVG is the format of mmdetection's and Open-GroundingDINO's training data, a .jsonl file per split.",
    "phrasecut": (
        "PhraseCut's authors publish refer_train.json, refer_val.json, refer_test.json and refer_miniv.json "
        "(github.com/ChenyunWu/PhraseCutDataset); the images are Visual Genome's images.zip and images2.zip."
    ),
}
IMAGE_FOLDERS = (
    *("", "images", "train2014", "images/train2014", "coco/train2014", "../train2014", "../coco/train2014"),
    *("flickr30k-images", "flickr30k_images", "../flickr30k/flickr30k_images"),
    *("VG_100K", "VG_100K_2", "images/VG_100K", "images/VG_100K_2", "../gqa/images"),
)
LOOKED_FOR = "The images are looked for in image_dir or data_dir, and there in images, train2014, VG_100K and so on."
SPLITS = re.compile("train|trainval|val|valid|validation|dev|test|test[A-C]|testAB|minival|miniv")


@dataclass
class LineFormatsConfig(LineConfig):
    """
    Args:
        path (`str`, `list[str]` or `dict`, *optional*): a file or files for the split train, or split -> such, in
            place of the files of `data_dir`; in `data_dir` or absolute. The library's `data_files` is the same.
        image_dir (`str`, *optional*): folder of the images, in `data_dir` or absolute; absent: `data_dir`. They are
            looked for in it and in its `IMAGE_FOLDERS`.
        box_format (`str`, *optional*): convention of the boxes, see `box_conventions`; absent: that of the format.
        drop_bad_lines (`bool`): leave out malformed entries and count them; else they are an error.
        allow_outside_paths (`bool`): allow absolute paths and `..` in the files. Addresses are never fetched.
    """

    box_format: str | None = None


class LineFormats(LineBuilder):
    """Images with expressions and captions, in file formats of other projects."""

    BUILDER_CONFIG_CLASS = LineFormatsConfig
    BUILDER_CONFIGS = [LineFormatsConfig(name=name, version=GroundingBuilder.VERSION) for name in READERS]
    DEFAULT_CONFIG_NAME = "mdetr_json"

    @property
    def DISTRIBUTION(self) -> str:
        """What the files are, and where the images are looked for."""
        return f"{DISTRIBUTIONS[self.config.name]} {LOOKED_FOR}"

    @classmethod
    def find_splits(cls, data_dir: Path) -> dict[str, list[Path]]:
        """
        Return the file of each split, by its name; files with other names are not read.

        Raises:
            ValueError: if several files are of one split.
        """
        files, named = {}, cls.annotation_files(data_dir, cls.DEFAULT_CONFIG_NAME)
        for file in [file for file in named if split_of_name(file.stem)] or named:
            files.setdefault(split_of_name(file.stem) or re.sub(r"\W", "_", file.stem), []).append(file)
        several = {split: found for split, found in files.items() if len(found) > 1}
        for split, found in several.items():
            names = ", ".join(file.name for file in found)
            raise ValueError(f"{str(data_dir)!r} has several files of {split!r}, {names}; name those to read by path.")
        return files

    def image_folders(self, path: Path) -> list[Path]:
        """Return the folders that images may be in."""
        base = path.parent if self.config.data_dir is None else Path(self.config.data_dir)
        return find_image_folders(base / (self.config.image_dir or ""))

    def read_file(self, path: Path, findings: Findings) -> Iterator[tuple[str, Any, dict]]:
        """Yield (position, line, line) of each line that the format's reader makes of a file."""
        options = {} if self.config.box_format is None else {"box_format": self.config.box_format}
        for where, line in READERS[self.config.name](path, findings, **options):
            yield where, line, line

    def make_converter(self) -> LineConverter:
        """Return the converter of the configuration; each line says its box format."""
        return LineConverter(allow_outside_paths=self.config.allow_outside_paths, scales_to_image=True)


def find_image_folders(base: Path) -> list[Path]:
    """Return a folder and those of `IMAGE_FOLDERS` in it that exist."""
    return [base, *(folder for name in IMAGE_FOLDERS if name and (folder := base / name).is_dir())]


def split_of_name(stem: str) -> str | None:
    """
    Return the split that the name of a file tells; None without one.

    Example:

    ```python
    >>> from data_scripts.line_formats import split_of_name

    >>> split_of_name("finetune_refcoco+_testA"), split_of_name("final_mixed_train_no_coco"), split_of_name("my-data")
    ('testA', 'train', None)

    ```"""
    found = [part for part in re.split(r"[_\-.\s]+", stem) if SPLITS.fullmatch(part)]
    return found[-1] if found else None


def _line_source(name: str, splits: tuple[str, ...], files: tuple[str, ...]) -> Source:
    distribution = f"{DISTRIBUTIONS[name]} {LOOKED_FOR}"
    return Source(
        name=name,
        builder=LineFormats,
        config_name=name,
        splits=splits,
        files=files,
        distribution=distribution,
    )


SOURCES = [
    _line_source("mdetr_json", ("train", "val", "test"), ("*_train.json", "*_val.json", "*_test.json", "train2014/")),
    _line_source("odvg", ("train", "val"), ("train.jsonl", "val.jsonl", "images/")),
    _line_source(
        "phrasecut",
        ("train", "val", "test", "miniv"),
        ("refer_train.json", "refer_val.json", "refer_test.json", "refer_miniv.json", "VG_100K/", "VG_100K_2/"),
    ),
]
