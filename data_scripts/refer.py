"""
Datasets in the layout of the refer API that are not RefCOCO, such as RRSIS-D, RefSegRS, RefDrone and RIS-LAD:

    data_dir/
        instances.json            images, annotations and categories, see `refcoco`
        refs(unc).json            references, or refs(unc).p; any name that `refs_file` tells
        images/                   or in another of `IMAGE_FOLDERS`, or in image_dir

Rows are those of `refcoco`, references with several objects or with none included. Splits are those of the
references. The name of an image is its `file_name` in `instances.json`, unless `image_name` says how to make it, as in
"{id:05d}.jpg" or "{stem}.tif". All boxes are compared with `box_format`, since not all of these datasets have COCO's.

`image_id` is "coco_<id>" for an image with a name of COCO 2014, else "<name of data_dir>_refer_<id>".
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from .box_conventions import judge_splits, parse_box_format, to_boxes_xyxy
from .building import GroundingBuilder, Source
from .kinds import check_fields
from .masks import box_of
from .pickles import read_pickle
from .quoting import explain, quote
from .reading import coco_number, is_file_name, is_four_numbers
from .refcoco import AS_JSON, RefCoco, RefCocoConfig, find_refs_file
from .schema import FEATURES


# others than the builder's: datasets <= 3.6 copies the siblings that a script itself imports, and no further
__all__ = ["FEATURES", "Refer", "ReferConfig", "SOURCES", "box_of", "check_fields", "read_pickle"]

# usual folders of the images, relative to data_dir; the first that contains one of them is used
IMAGE_FOLDERS = ("images", "JPEGImages", "", "../images", "../images/{folder}/JPEGImages", "../images/{folder}")
DISTRIBUTION = (
    "A dataset in the layout of the refer API has instances.json and a file of references, such as refs(unc).p, in "
    f"one folder, which is data_dir. {AS_JSON}"
)


@dataclass
class ReferConfig(RefCocoConfig):
    """
    Args:
        refs_file (`str`, *optional*): the name of the file of references in `data_dir`; absent: the only one whose
            name begins with "refs" or "grefs".
        image_dir (`str`, *optional*): the folder of the images; absent: the first of `IMAGE_FOLDERS` with any.
        image_name (`str`): the name of the file of an image, with the fields {file_name}, {stem} (that name without
            its ending) and {id} of the image in `instances.json`.
        box_format (`str`): convention of the boxes, see `box_conventions`.
        integer_boxes (`bool`): truncate the corners of boxes to integers, as the published loaders do, so that their
            metrics can be compared. Boxes that this leaves without extent, and masks without a pixel, are kept in
            splits that are not for training: the published evaluation counts them as misses.
    """

    refs_file: str | None = None
    image_name: str = "{file_name}"
    box_format: str = "xywh"


class Refer(RefCoco):
    """Referring expressions in the layout of the refer API, from any folder."""

    BUILDER_CONFIG_CLASS = ReferConfig
    BUILDER_CONFIGS = [ReferConfig(name="refer", version=GroundingBuilder.VERSION)]
    DEFAULT_CONFIG_NAME = "refer"

    @classmethod
    def annotation_files(cls, data_dir: Path, config_name: str) -> list[Path]:
        """Return all files that may be `instances.json` or references."""
        return [file for ending in ("json", "p") for file in sorted(Path(data_dir).glob(f"*.{ending}"))]

    def files_of(self, split: str) -> list[Path]:
        """Return the annotation files."""
        return self.find_files()

    def find_files(self) -> list[Path]:
        """
        Return `instances.json` and the file of the references, which exist.

        Raises:
            ValueError: if `refs_file` is not a name, or is absent where there are several such files.
            OSError: naming a file that does not exist.
        """
        self.require_files([], DISTRIBUTION)
        data_dir, name = Path(self.config.data_dir), self.config.refs_file
        if name is None:
            files = [file for file in self.annotation_files(data_dir, self.config.name) if is_refs_name(file.name)]
            stems = sorted({file.stem for file in files})
            if len(stems) > 1:
                names = ", ".join(file.name for file in files)
                raise ValueError(
                    f"{str(data_dir)!r} has several files of references, {names}; name one of them by refs_file."
                )
            refs_file = find_refs_file(data_dir, stems[0] if stems else "refs(unc)")
        elif Path(name).name == name and Path(name).suffix in (".json", ".p"):
            refs_file = data_dir / name
        else:
            raise ValueError(f"refs_file is {quote(name)}; expected the name of a .json or .p file in data_dir.")
        files = [data_dir / "instances.json", refs_file]
        self.require_files(files, DISTRIBUTION)
        return files

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        box_format = self.config.box_format
        self.convention = parse_box_format(box_format)
        self.written = ([], [])  # boxes as they are written, and the annotated sizes of their images
        generators = super()._split_generators(dl_manager)
        for judgement in judge_splits({"all": {("boxes", box_format): self.written}}):
            if judgement.is_certain:
                raise ValueError(f"{self.title!r}: {judgement.message}.")
            self.report_suspected(judgement.message)
        self.written = ([], [])
        return generators

    @property
    def image_source(self) -> str:
        """The beginning of the ids of images and objects."""
        return re.sub(r"\W", "_", self.folder_name) + "_refer"

    @property
    def folder_name(self) -> str:
        """The name of data_dir."""
        return Path(self.config.data_dir).absolute().name

    @property
    def uses_file_names(self) -> bool:
        """Whether images are found by the `file_name` of `instances.json`."""
        return "{file_name" in self.config.image_name or "{stem" in self.config.image_name

    @property
    def image_folders(self) -> tuple[str, ...]:
        """The usual folders of the images, relative to data_dir."""
        return tuple(name.replace("{folder}", self.folder_name) for name in IMAGE_FOLDERS)

    @property
    def distribution(self) -> str:
        """Where the images are looked for."""
        folders = ", ".join(name or "data_dir itself" for name in self.image_folders)
        return (
            "The images are looked for in image_dir, or below data_dir in the first of these folders that contains "
            f"one of them: {folders}. Their names are image_name={self.config.image_name!r} of instances.json."
        )

    def names_of_image(self, image: dict) -> tuple[str, ...]:
        """Return the names that the file of an image may have in its folder."""
        file_name = image.get("file_name", "")
        try:
            name = self.config.image_name.format(file_name=file_name, stem=Path(file_name).stem, id=image["id"])
            if not is_file_name(name):
                raise ValueError(f"it makes {quote(name)}")
        except (LookupError, AttributeError, ValueError, TypeError) as error:
            raise ValueError(
                f"image_name is {quote(self.config.image_name)}; expected the name of a file in its folder, with the "
                f"fields {{file_name}}, {{stem}} and {{id}}: {explain(error)}."
            ) from error
        return name, Path(name).name

    def id_of_image(self, image: dict) -> str:
        """Return the `image_id` of an image's row."""
        number = coco_number(self.names_of_image(image)[0])
        return super().id_of_image(image) if number is None else f"coco_{number}"

    def read_box(self, box: Any, annotated_size: tuple[int, int], scale: tuple[float, float]) -> list[float] | None:
        """Return an annotated box as xyxy, scaled by (horizontal, vertical); None if it is not a box."""
        if not is_four_numbers(box):
            return None
        for values, value in zip(self.written, (box, annotated_size), strict=True):
            values.append(value)
        (box_xyxy,) = to_boxes_xyxy([box], [annotated_size], *self.convention).tolist()
        return [value * factor for value, factor in zip(box_xyxy, scale * 2, strict=True)]


def is_refs_name(name: str) -> bool:
    """Return whether a file is one of references by its name."""
    return re.match("g?refs", name) is not None


SOURCES = [
    Source(
        name="refer",
        builder=Refer,
        config_name="refer",
        splits=("train", "val", "test"),
        files=("instances.json", "refs(unc).p", "images/"),
        distribution=DISTRIBUTION,
    )
]
