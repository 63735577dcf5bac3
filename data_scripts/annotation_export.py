"""
Export a dataset as annotation files of other formats, with a copy of its images or with their paths:

    output/train.json  output/val.json  ...     a file per split
    output/images/...                           the images, whose names in the files begin with "images/"

Ids of objects and sentences are not written, and equal objects of an image are one. A format that groups sentences by
their objects loses their order.
"""

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import datasets
import numpy as np
from tqdm import tqdm

from .atomic_files import atomic_folder
from .building import CHANGED, LEFT_OUT, Source, describe_reported, is_degenerate
from .exporting import check_output, in_usual_order, path_of_image
from .findings import Findings
from .formats import EXPORTED, FORMATS, PARQUET, suffix_of, writer_of
from .importing import count_lines
from .masks import is_empty
from .progress import progress_bar
from .reading import is_as_stored, name_format
from .records import NO_TARGET, Written, target_of


OTHERS = tuple(name for name in EXPORTED if name != PARQUET)
IMAGES = "images"  # folder of the copied images
COLUMNS = ["image_id", "image", "width", "height", "objects", "sentences"]


@dataclass
class ExportReport:
    """
    What an export wrote.

    Args:
        image_dir (`Path`): the folder that the names of images are relative to.
        counts (`dict`): split -> number of "images", "expressions" and "boxes".
        build (`dict`): what was left out or changed, in the form of `reports.read_build_report`.
    """

    image_dir: Path
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    build: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)


def export_annotations(
    name: str,
    source: Source,
    splits: dict[str, datasets.Dataset],
    output: str | Path,
    by_path: bool = False,
    overwrite: bool = False,
) -> ExportReport:
    """
    Write a dataset in another format, a file per split, atomically.

    Args:
        name (`str`): the format, one of `formats.EXPORTED` but Parquet.
        source (`Source`): the dataset.
        splits (`dict[str, datasets.Dataset]`): split -> rows.
        output (`str` or `Path`): the folder.
        by_path (`bool`, *optional*, defaults to `False`): leave images where they are, and name them relative to the
            folder that they have in common; else they are copied. Images that are annotated as they are stored,
            against their EXIF orientation, are left out, since other readers would turn their files.
        overwrite (`bool`, *optional*, defaults to `False`): replace an earlier export.

    Returns:
        [`ExportReport`].

    Raises:
        OSError: if `output` exists, or an image does not.
        ValueError: if nothing is left in a split, or images that are not files are to be named by path.

    Example:

    ```python
    >>> import json, tempfile
    >>> from pathlib import Path
    >>> import data_scripts
    >>> from data_scripts.annotation_export import export_annotations

    >>> output = Path(tempfile.mkdtemp()) / "out"
    >>> rows = data_scripts.load("shapes", num_train=1, num_validation=1, num_test=2)
    >>> report = export_annotations("coco", data_scripts.SOURCES["shapes"], rows, output)
    >>> sorted(path.name for path in output.iterdir())
    ['images', 'test.json', 'train.json', 'validation.json']
    >>> len(json.loads((output / "test.json").read_text())["images"]), report.counts["test"]["images"]
    (2, 2)

    ```"""
    writer, output = writer_of(name, OTHERS), Path(output).absolute()
    files = {split: f"{split}{suffix_of(name)}" for split in in_usual_order(splits)}
    check_output(output, overwrite, [*files.values(), IMAGES])
    about = Written(source.name, categories_of(splits))
    common = common_folder(splits)
    report = ExportReport(common if by_path else output)
    with (
        atomic_folder(output, overwrite) as folder,
        progress_bar(total=sum(map(len, splits.values())), desc="exporting", unit="image") as progress,
    ):
        names = ImageNames(common, None if by_path else folder)
        for split, file_name in files.items():
            findings, counts = Findings(), Counter()
            lines = lines_of_rows(splits[split], names, FORMATS[name].has_no_target, findings, counts, progress)
            with open(folder / file_name, "w", encoding="utf-8") as file:
                file.writelines(writer(lines, findings, about))
            kinds = {LEFT_OUT: findings.left_out, CHANGED: findings.changed}
            report.build[split] = {kind: dict(sorted(found.items())) for kind, found in kinds.items() if found}
            if not counts["images"]:
                left_out = describe_reported(LEFT_OUT, findings.left_out) if findings.left_out else "it is empty"
                raise ValueError(f"Nothing is left in {split} of {source.name!r} to write as {name}: {left_out}.")
            report.counts[split] = dict(counts)
    return report


def lines_of_rows(
    rows: datasets.Dataset,
    names: "ImageNames",
    has_no_target: bool,
    findings: Findings,
    counts: Counter,
    progress: tqdm,
) -> Iterator[dict]:
    """Yield the line of each row that has one, see `line_of_row`, and count what is in it."""
    for row in rows.select_columns(COLUMNS).cast_column("image", datasets.Image(decode=False)):
        progress.update()
        if names.folder is None and is_as_stored(row["image"]):
            findings.leave_out("images annotated against their EXIF orientation, which have no path")
            continue
        line = line_of_row(row, findings, has_no_target)
        if line is not None:
            line = {"image": names.name(row), **line}
            counts.update(count_lines([line]))
            yield line


def line_of_row(row: dict, findings: Findings, has_no_target: bool = True) -> dict | None:
    """
    Return a row as a line that is written, see `records`, without the name of its image; None without a sentence to
    write.

    Args:
        row (`dict`): see `schema.FEATURES`.
        findings ([`Findings`]): counts what is left out of a line or changed.
        has_no_target (`bool`, *optional*, defaults to `True`): write phrases that refer to nothing in the image; else
            they are left out.

    Example:

    ```python
    >>> from data_scripts.annotation_export import line_of_row
    >>> from data_scripts.findings import Findings

    >>> objects = [{"box": [1, 2, 3, 4], "boxes": [[1, 2, 3, 4]], "category": None, "segmentation": None}]
    >>> phrases = [{"start": 0, "end": 5, "objects": [0], "types": []}]
    >>> sentences = [{"text": "a cup", "phrases": phrases}]
    >>> row = {"image_id": "1.jpg", "width": 9, "height": 9, "objects": objects, "sentences": sentences}
    >>> line_of_row(row, Findings())["expressions"]
    [{'text': 'a cup', 'phrases': [{'start': 0, 'end': 5, 'boxes': [[1.0, 2.0, 3.0, 4.0]]}]}]

    ```"""
    expressions, named = [], set()
    for sentence in row["sentences"]:
        spans = {}
        for phrase in sentence["phrases"]:
            indices, types = spans.setdefault((phrase["start"], phrase["end"]), ([], []))
            indices += phrase["objects"]
            types += phrase["types"]
        named.update(index for indices, _ in spans.values() for index in indices)
        if not spans:
            findings.leave_out("sentences without a phrase")
            continue
        phrases = []
        for (start, end), (indices, types) in spans.items():
            objects = [object_to_write(row["objects"][index], findings) for index in dict.fromkeys(indices)]
            if None in objects or not (objects or has_no_target):
                findings.leave_out("phrases of objects without extent" if objects else NO_TARGET)
                continue
            words = {"types": list(dict.fromkeys(types))} if types else {}
            phrases.append({"start": start, "end": end, **target_of(objects), **words})
        if phrases:
            expressions.append({"text": sentence["text"], "phrases": phrases})
    findings.leave_out("objects that no sentence names", len(row["objects"]) - len(named))
    if not expressions:
        findings.leave_out("images without a sentence to write")
        return None
    return {**{name: row[name] for name in ("image_id", "width", "height")}, "expressions": expressions}


def object_to_write(item: dict, findings: Findings) -> dict | None:
    """Return what a line that is written has of an object of a row; None if the object has no extent."""
    boxes = item["boxes"] if len(item["boxes"]) > 1 else [item["box"]]
    boxes = [shorten_numbers(box) for box in boxes if not is_degenerate(box)]
    if not boxes:
        return None
    category = {} if item["category"] is None else {"category": item["category"]}
    segmentation = item["segmentation"]
    if segmentation is not None and is_empty(segmentation):
        findings.leave_out("masks without a pixel")
        segmentation = None
    return {"boxes": boxes, **category, **({} if segmentation is None else {"segmentation": segmentation})}


def shorten_numbers(box: list[float]) -> list[float]:
    """
    Return numbers in single precision with no more digits than they have.

    Example:

    ```python
    >>> from data_scripts.annotation_export import shorten_numbers

    >>> shorten_numbers([103.93000030517578, 299.989990234375, 238.14999389648438, 477.4100036621094])
    [103.93, 299.99, 238.15, 477.41]

    ```"""
    return [float(str(np.float32(number))) for number in box]


def categories_of(splits: dict[str, datasets.Dataset]) -> list[str]:
    """Return the categories of the objects of all splits, sorted."""
    found = set()
    for rows in splits.values():
        for batch in rows.select_columns(["objects"]).with_format("arrow").iter(10_000):
            objects = batch["objects"].combine_chunks()
            found.update(objects.flatten().field("category").unique().to_pylist())
    return sorted(found - {None})


def common_folder(splits: dict[str, datasets.Dataset]) -> Path:
    """Return the innermost folder of all images that are files; the current one without such images."""
    folders = set()
    for rows in splits.values():
        for batch in rows.select_columns(["image"]).with_format("arrow").iter(10_000):
            images = batch["image"].combine_chunks()
            paths = images.field("path").filter(images.field("bytes").is_null()).to_pylist()
            folders.update(os.path.dirname(os.path.abspath(path)) for path in paths)
    return Path(os.path.commonpath(folders)) if folders else Path.cwd()


class ImageNames:
    """
    The names of images in the files of an export.

    Args:
        common (`Path`): the folder of all images that are files.
        folder (`Path`, *optional*): the folder that they are copied to, into `IMAGES`; None to leave them.
    """

    def __init__(self, common: Path, folder: Path | None) -> None:
        self.common = common
        self.folder = folder
        self.copied: dict[str, str] = {}  # splits may share images
        self.taken: set[str] = set()

    def name(self, row: dict) -> str:
        """
        Return the name of a row's image, and copy it.

        Raises:
            OSError: if it does not exist.
            ValueError: if it is not a file and is to be left where it is.
        """
        image = row["image"]
        if self.folder is not None and image["bytes"] is not None:
            name = self.take(name_of_content(image, str(row["image_id"])))
            self.path_of(name).write_bytes(image["bytes"])
            return name
        path = path_of_image(row)
        relative = Path(os.path.relpath(path, self.common)).as_posix()
        if not os.path.isfile(path):
            raise OSError(f"There is no image at {path!r}.")
        if self.folder is None:
            return relative
        if path not in self.copied:
            self.copied[path] = self.take(relative)
            shutil.copyfile(path, self.path_of(self.copied[path]))
        return self.copied[path]

    def take(self, name: str) -> str:
        """Return the name of a copy, with a number if that of another copy is the same."""
        path, number = PurePosixPath(IMAGES, name), 1
        free = str(path)
        while free.lower() in self.taken:
            number += 1
            free = str(path.with_name(f"{path.stem}_{number}{path.suffix}"))
        self.taken.add(free.lower())
        return free

    def path_of(self, name: str) -> Path:
        """Return the file of a copy, whose folder it makes."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def name_of_content(image: dict, image_id: str) -> str:
    """
    Return a name for an image that is not a file: its own, or its id.

    Example:

    ```python
    >>> from data_scripts.annotation_export import name_of_content

    >>> name_of_content({"path": None, "bytes": b"\\xff\\xd8\\xff\\xe0"}, "photos/7")
    '7.jpeg'

    ```"""
    own = PurePosixPath((image["path"] or image_id).replace("\\", "/"))
    suffix = own.suffix if re.fullmatch(r"\.\w{1,5}", own.suffix) else ""
    stem = re.sub(r"[^\w.+-]", "_", own.name.removesuffix(suffix))[:100] or "image"
    kind = name_format(image["bytes"][:16]) or "PNG"
    return f"{stem}{suffix or f'.{kind.lower()}'}"
