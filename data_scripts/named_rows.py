"""
Read datasets that `datasets.load_dataset` opens by their name: folders of this machine, and datasets of the Hub.

Rows of `schema.FEATURES`, as `reftr data export` writes them, are used as they are. Others are converted by their
columns (`layouts`): to rows of one image each, in the order in which the dataset first names it.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

from .box_conventions import judge_splits, parse_box_format, to_boxes_xyxy
from .building import GroundingBuilder, Source, builder_error_of, clip_boxes, fingerprint, merge_boxes
from .checking import MASK_TOLERANCE, are_close, judge_rows
from .kinds import check_fields
from .layouts import Layout, find_layout, image_name, make_layout, value_at
from .masks import box_of
from .quoting import explain, quote
from .reading import (
    check_text,
    coco_number,
    frame_content,
    has_words,
    image_of,
    is_number,
    read_frame,
)
from .refcoco import IMAGE_FOLDERS, encode_segmentation
from .schema import FEATURES, OPTIONAL


logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
TEXT_COLUMNS = {"image_id", "sentences"}
DISTRIBUTION = (
    "The rows name files of images: they are looked for in image_dir, or below data_dir and the dataset's own folder, "
    f"there also in {', '.join(IMAGE_FOLDERS['coco'])}. COCO's are those of train2014.zip (cocodataset.org)."
)
# tolerated difference of a mask and its box, as a share of the box, in addition to `MASK_TOLERANCE`: polygons are
# drawn by hand
MASK_SHARE = 0.02


@dataclass
class NamedRowsConfig(datasets.BuilderConfig):
    """
    Args:
        revision (`str`, *optional*): the commit, tag or branch of a dataset of the Hub; absent: its main branch.
        subset (`str`, *optional*): the configuration of a dataset that has several.
        columns (`dict[str, str]`): the columns to read, where they are not those of a known layout: `image` (an image,
            or the path of its file), `text` (an expression, or a list), `box` or `mask` (run lengths or polygons of
            COCO), and perhaps `category`, `image_id`, `width` and `height` (the size that boxes are drawn at). A field
            of structures is "column.field".
        box_format (`str`): of the boxes in `columns`, see `box_conventions`: "xyxy", "xywh" or "cxcywh" in pixels, or
            with "_fraction" (0..1) or "_thousand" (0..1000) of the image's width and height.
        image_dir (`str`, *optional*): folder of the images, where the rows have paths of files; absent: the first of
            the usual folders below `data_dir`, or of the dataset's own folder, that has one of them.
    """

    revision: str | None = None
    subset: str | None = None
    columns: dict = field(default_factory=dict)
    box_format: str = "xyxy"
    image_dir: str | None = None


class NamedRows(GroundingBuilder):
    """Rows of a dataset of the Hub or of a folder, converted by their columns."""

    BUILDER_CONFIG_CLASS = NamedRowsConfig
    BUILDS_SPLITS_ALONE = True

    def __init__(
        self,
        *args: Any,
        name: str,
        opened: datasets.DatasetBuilder,
        layout: Layout,
        hash: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.dataset, self.opened, self.layout = name, opened, layout
        config_name = re.sub(r"\W+", "_", name)[-80:]
        # what was opened is identified by the folder that it is prepared in
        super().__init__(
            *args, config_name=config_name, hash=fingerprint([], opened.cache_dir, layout.name, hash), **kwargs
        )

    @property
    def title(self) -> str:
        """The name of the dataset in messages."""
        return self.dataset

    @classmethod
    def annotation_files(cls, data_dir: Path, config_name: str) -> list[Path]:
        """Return no file: the rows are those of `opened`."""
        return []

    def files_of(self, split: str) -> list[str]:
        """Return the files of `opened`, as splits of the files may be named otherwise here."""
        return [str(file) for files in (self.opened.config.data_files or {}).values() for file in files]

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        if dl_manager.is_streaming:
            return self._stream_generators()
        layout = self.layout
        parts = self.opened.as_dataset()
        rows = datasets.concatenate_datasets([self._undecoded(part) for part in parts.values()])
        rows_of_splits = {}
        if layout.split is None:
            start = 0
            for split, part in parts.items():
                rows_of_splits[layout.split_names.get(split, split)] = range(start, start + len(part))
                start += len(part)
        else:
            for index, split in enumerate(rows[layout.split][:]):
                rows_of_splits.setdefault(split, []).append(index)
            for split in rows_of_splits:
                check_fields({layout.split: split}, {layout.split: layout.kinds[layout.split]}, self.title)
        self.require_splits(rows_of_splits)
        self.paths = {}
        numbers = {split: indices for split, indices in rows_of_splits.items() if self.is_requested(split)}
        if layout.image is None:
            names = rows[layout.key][:]
            self._find_images(dict.fromkeys(names[index] for indices in numbers.values() for index in indices))
        return [
            datasets.SplitGenerator(
                name=split, gen_kwargs={"split": split, "rows": rows, "images": self._group(rows, indices)}
            )
            for split, indices in numbers.items()
        ]

    def _stream_generators(self) -> list[datasets.SplitGenerator]:
        if self.layout.key is not None:
            raise ValueError(
                f"{self.title!r} has a row for each expression, and streaming requires a row for each image. Leave "
                "streaming out, or export it once by `reftr data export` and stream that."
            )
        generators = []
        parts = self.opened.as_streaming_dataset()
        self.require_splits(parts)
        for split, part in parts.items():
            if self.is_requested(split):
                part = self._undecoded(part)
                shards = [part.shard(part.num_shards, index) for index in range(part.num_shards)]
                gen_kwargs = {"split": split, "rows": None, "images": list(enumerate(shards))}
                generators.append(datasets.SplitGenerator(name=split, gen_kwargs=gen_kwargs))
        return generators

    def _undecoded(self, rows: Any) -> Any:
        """Return rows whose images are not decoded."""
        if self.layout.image is None:
            return rows
        return rows.cast_column(self.layout.image, datasets.Image(decode=False))

    def _find_images(self, names: dict[str, None]) -> None:
        """Set `paths`, file name -> path, and require that the files exist."""
        for name in names:
            check_fields({self.layout.key: name}, {self.layout.key: self.layout.kinds[self.layout.key]}, self.title)
        if self.config.image_dir is not None:
            folders = [Path(self.config.data_dir or "", self.config.image_dir)]
        else:
            bases = [Path(base) for base in (self.config.data_dir, self.dataset) if base and os.path.isdir(base)]
            folders = [base / folder for base in bases for folder in ("", *IMAGE_FOLDERS["coco"])]
        if not folders:
            raise ValueError(
                f"{self.title!r} has no images, only names of files: give data_dir or image_dir. {DISTRIBUTION}"
            )

        def paths_in(folder: Path, flat: bool) -> dict[str, str]:
            return {name: os.path.abspath(folder / (os.path.basename(name) if flat else name)) for name in names}

        choices = [(folder, flat) for folder in folders for flat in (False, True)]
        used = (choice for choice in choices if any(map(os.path.isfile, paths_in(*choice).values())))
        self.paths = paths_in(*next(used, choices[0]))
        self.require_images(self.paths.values(), DISTRIBUTION)

    def _group(self, rows: datasets.Dataset, indices: Any) -> list[tuple[list[int], list[int] | None]]:
        """Return (row numbers, positions of their sentences in the split or None) of each image of a split."""
        layout = self.layout
        if layout.key is None:
            return [([index], None) for index in indices]
        root = layout.texts.split(".")[0]
        columns = rows.select_columns(list(dict.fromkeys((layout.key, root)))).select(indices)
        groups, position = {}, 0
        for index, row in zip(indices, columns, strict=True):
            numbers, positions = groups.setdefault(image_name(str(row[layout.key])), ([], []))
            count = count_texts(value_at(row, layout.texts))
            numbers.append(index)
            positions += range(position, position + count)
            position += count
        return list(groups.values())

    def _generate_examples(
        self, split: str, rows: datasets.Dataset | None, images: list
    ) -> Iterator[tuple[str, dict]]:
        dropped, changed = Counter(), Counter()
        written = None if rows is None else {}  # a stream is not judged, since it may be read in parts
        for name, group, positions, image in self._groups(split, rows, images):
            where = f"{self.title!r}, {name}"
            for row in group:
                check_fields(row, self.layout.kinds, where)
            try:
                example = self._make_row(name, group, image, positions, dropped, changed, written)
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{where}: {explain(error)}") from error
            if example["sentences"]:
                yield name, example
            else:
                dropped["images without an expression"] += 1
        for judgement in judge_splits({split: written} if written else {}):
            if judgement.is_certain:
                raise ValueError(f"{self.title!r}: {judgement.message}.")
            self.report_suspected(judgement.message)
        self.report_dropped(split, dropped)
        self.report_changed(split, changed)

    def _groups(
        self, split: str, rows: datasets.Dataset | None, images: list
    ) -> Iterator[tuple[str, list[dict], list | None, Any]]:
        """Yield (name, rows without their image, positions, image that is not decoded or None) of each image."""
        column = self.layout.image
        if rows is None:
            for index, shard in images:
                for number, row in enumerate(shard):
                    yield f"{split}_{index}_{number}", [{**row, column: None}], None, row[column]
            return
        annotations = rows if column is None else rows.remove_columns(column)
        for numbers, positions in images:
            columns = annotations[numbers]
            group = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            image = None if column is None else rows[numbers[0]][column]
            yield f"{split}_{numbers[0]}", group, positions, image

    def _make_row(
        self,
        name: str,
        group: list[dict],
        image: Any,
        positions: list[int] | None,
        dropped: Counter,
        changed: Counter,
        written: dict | None,
    ) -> dict:
        """Return the row of an image, counting what is left out and changed; boxes are added to `written`, if any."""
        layout = self.layout
        record = layout.convert(group)
        frame, stored, file = self._open_frame(group[0], image, record["annotated_size"])
        width, height = frame.size
        annotated_size = record["annotated_size"] or frame.size
        scale = [width / annotated_size[0], height / annotated_size[1]] * 2
        if scale != [1.0] * 4:
            changed["images have another size than annotated, boxes and masks are scaled to it"] += 1
        image_id = self._image_id(name, group[0], file)
        convention = parse_box_format(layout.box_format)
        indices, objects = {}, []
        for index, item in enumerate(record["objects"]):
            sizes = [annotated_size] * len(item["boxes"])
            if written is not None:
                all_boxes, all_sizes = written.setdefault(("boxes", layout.box_format), ([], []))
                all_boxes += item["boxes"]
                all_sizes += sizes
            boxes = to_boxes_xyxy(item["boxes"], sizes, *convention).tolist()
            boxes = [[value * factor for value, factor in zip(box, scale, strict=True)] for box in boxes]
            segmentation = encode_segmentation(as_coco(item["segmentation"]), annotated_size, frame.size)
            if segmentation is None and item["segmentation"]:
                changed["objects lost a mask that is empty or cannot be read"] += 1
            if not item["boxes"] and segmentation is not None:
                boxes = [box_of(segmentation)]
            kept = clip_boxes([box for box in boxes if all(map(is_number, box))], width, height, dropped, changed)
            if not kept:
                continue
            box = merge_boxes(kept)
            if layout.has_partial_masks and segmentation is not None and not is_mask_of(segmentation, box):
                changed["objects lost a mask that is not of all their box"] += 1
                segmentation = None
            indices[index] = len(objects)
            objects.append(
                {
                    "object_id": f"{image_id}_{item['object_id']}",
                    "box": box,
                    "boxes": kept,
                    "category": item["category"],
                    "segmentation": segmentation,
                }
            )
        sentences, kept_positions = [], []
        for order, sentence in enumerate(record["sentences"]):
            text = check_text(sentence["text"], "a text").strip()
            named = dict.fromkeys(indices.get(index) for index in sentence["objects"])
            if not has_words(text):
                dropped["expressions without words"] += 1
            elif None in named:
                dropped["expressions of objects without a box in the image"] += 1
            else:
                phrase = {"start": 0, "end": len(text), "objects": list(named), "types": []}
                sentence_id = f"{image_id}_{sentence['sentence_id']}"
                sentences.append({"sentence_id": sentence_id, "text": text, "phrases": [phrase]})
                kept_positions.append(None if positions is None else positions[order])
        row = {"image_id": image_id, "image": stored, "width": width, "height": height}
        row |= {"objects": objects, "sentences": sentences}
        return row if positions is None else {**row, "positions": kept_positions}

    def _open_frame(self, row: dict, image: Any, annotated_size: tuple[int, int] | None) -> tuple:
        """Return (frame, what the row stores of the image, name of its file or None)."""
        if self.layout.image is None:
            path = self.paths[row[self.layout.key]]
            frame = read_frame(path, annotated_size)
            return frame, image_of(path, frame), row[self.layout.key]
        if not isinstance(image, dict) or not (image.get("bytes") or image.get("path")):
            raise ValueError(f"{self.layout.image} is {quote(image)}; expected an image.")
        if image["bytes"] is None:
            frame = read_frame(image["path"], annotated_size)
            return frame, image_of(image["path"], frame), image["path"]
        frame, stored = frame_content(image["bytes"], image["path"], annotated_size)
        return frame, stored, stored["path"]

    def _image_id(self, name: str, row: dict, file: str | None) -> str:
        """Return the id of an image: that of COCO, the dataset's own, or its name in the split."""
        column = self.layout.image_id or self.layout.key
        own = image_name(str(row[column])) if column else file
        known = coco_number(own or "")
        if known is not None:
            return f"coco_{known}"
        return check_text(own, "the name of an image") if column else name


def as_coco(segmentation: Any) -> Any:
    """Return polygons as a list of them, where there is a single one."""
    is_flat = isinstance(segmentation, list) and segmentation and is_number(segmentation[0])
    return [segmentation] if is_flat else segmentation


def is_mask_of(segmentation: dict, box_xyxy: list[float]) -> bool:
    """Return whether a mask spans its box, but for what polygons that are drawn by hand differ by."""
    x0, y0, x1, y1 = box_xyxy
    return are_close(box_of(segmentation), box_xyxy, MASK_TOLERANCE + MASK_SHARE * max(x1 - x0, y1 - y0))


def count_texts(value: Any) -> int:
    """Return the number of texts, or structures, in a value that may be a list of such lists."""
    return sum(map(count_texts, value)) if isinstance(value, list) else 1


def source_of(name: str) -> Source:
    """
    Return the source of a folder or a dataset of the Hub. Nothing is opened.

    Raises:
        OSError: if it is a path, and there is no such folder.
    """
    if not os.path.isdir(name):
        owner = name.rpartition("/")[0]
        # a name below a folder that exists is a path
        if not HUB_ID.fullmatch(name) or os.path.isdir(owner):
            raise OSError(
                f"There is no folder {name!r}: give one that `reftr data export` wrote or that datasets.load_dataset "
                "opens, or a dataset of the Hub (user/name)."
            )
    return Source(
        name=name,
        builder=NamedRows,
        config_name="",
        splits=(),
        files=("images, if the rows name files of them",),
        distribution="The rows of a folder, or of a dataset of the Hub, that datasets.load_dataset opens.",
    )


def open_named(
    name: str,
    data_dir: str | None,
    cache_dir: str | None,
    config: dict,
    requested: list[str] | None = None,
    streaming: bool = False,
) -> datasets.DatasetBuilder:
    """
    Return the builder of a folder or a dataset of the Hub: the library's own if its rows are those of `FEATURES`, else
    a `NamedRows`. A folder of this name takes precedence over the Hub.

    Args:
        name (`str`): path of a folder, or "user/name".
        data_dir (`str`, *optional*): folder of images, where rows name files.
        cache_dir (`str`, *optional*): the cache of built datasets.
        config (`dict`): fields of `NamedRowsConfig`.
        requested (`list[str]`, *optional*): the splits to convert; absent: all.
        streaming (`bool`): whether the rows are to be streamed: then nothing is prepared.

    Raises:
        ValueError: if the columns are not known, a split has no rows, or a revision is asked of a folder.
        OSError: if it cannot be opened, saying why.
    """
    opened = open_files(name, config.get("subset"), config.get("revision"), cache_dir)
    try:
        features = features_of(opened, name, streaming, cache_dir, config)
    except DatasetGenerationError as error:
        raise OSError(f"{name!r} cannot be read: {explain(builder_error_of(error))}") from error
    columns = config.get("columns")
    if not columns and set(features) >= set(FEATURES) - set(OPTIONAL):
        unused = [flag for flag in ("box_format", "image_dir") if flag in config]
        if unused:
            raise ValueError(f"{name!r} has the columns of an export, which {unused[0]} is not for: leave it out.")
        return opened
    if columns:
        layout = make_layout(name, columns, config.get("box_format", "xyxy"), features)
    else:
        layout = find_layout(name, list(features))
        if "box_format" in config:
            raise ValueError(
                f"box_format is only for columns; {name!r} has those of {layout.name}, whose boxes are known."
            )
    if data_dir is not None:
        config = {**config, "data_dir": str(data_dir)}
    return NamedRows(name=name, opened=opened, layout=layout, cache_dir=cache_dir, requested=requested, **config)


def open_files(
    name: str, subset: str | None, revision: str | None, cache_dir: str | None, **options: Any
) -> datasets.DatasetBuilder:
    """
    Return the library's builder of a folder or a dataset of the Hub, with options of its configuration.

    Raises:
        ValueError: if a revision is asked of a folder, or of a dataset that is read from the cache and has another.
        OSError: if it cannot be opened, saying why.
    """
    is_folder = os.path.isdir(name)
    if is_folder and revision is not None:
        raise ValueError(f"revision={revision!r} is for datasets of the Hub, and {name!r} is a folder: leave it out.")
    # in these forms, the library cannot confuse a folder with a dataset of the Hub
    path = os.path.abspath(name) if is_folder else f"hf://datasets/{name}"
    try:
        builder = datasets.load_dataset_builder(path, name=subset, revision=revision, cache_dir=cache_dir, **options)
    except Exception as error:  # those of the clients are of many kinds
        where = f"The folder {name!r}" if is_folder else f"There is no folder {name!r}, and the dataset of this name"
        hint = "" if is_folder else " of the Hub"
        raise OSError(f"{where}{hint} cannot be opened: {explain(error)}") from error
    # offline, the library opens any revision that is in the cache
    if revision is not None and ".cache." in type(builder).__module__ and builder.hash != revision:
        raise ValueError(
            f"revision={revision!r} of {name!r} is not in the cache, which has {builder.hash!r}, and the Hub is not "
            "reached."
        )
    return builder


def features_of(
    opened: datasets.DatasetBuilder, name: str, streaming: bool, cache_dir: str | None, config: dict
) -> datasets.Features:
    """
    Return the features of a dataset, which is prepared for that unless it is to be streamed.

    Raises:
        ValueError: if a split has no rows, naming its files.
    """
    if not streaming:
        opened.download_and_prepare()
        # the library loads no split without rows
        refuse_empty(opened, name, [split for split, info in opened.info.splits.items() if not info.num_examples])
        return opened.info.features
    parts = opened.as_streaming_dataset()
    part = next(iter(parts.values()))
    features = part.features or part._resolve_features().features
    if hasattr(opened.config, "columns"):  # a column of values takes fewer bytes to read than one of images
        column = next((column for column, kind in features.items() if isinstance(kind, datasets.Value)), None)
        columns = None if column is None else [column]
        parts = open_files(
            name, config.get("subset"), config.get("revision"), cache_dir, columns=columns
        ).as_streaming_dataset()
    refuse_empty(opened, name, [split for split, part in parts.items() if is_empty_stream(part)])
    return features


def is_empty_stream(part: datasets.IterableDataset) -> bool:
    """Return whether a stream has no rows; no image is decoded."""
    return next(iter(part.with_format("arrow")), None) is None


def refuse_empty(opened: datasets.DatasetBuilder, name: str, empty: list[str]) -> None:
    """Raise a ValueError if a split has no rows, naming its files."""
    for split in empty:
        files = ", ".join(repr(str(file)) for file in (opened.config.data_files or {}).get(split, ())) or "its file"
        raise ValueError(f"The split {split!r} of {name!r} has no rows: {files} is empty. Fill or remove it.")


def refuse_other_rows(rows: dict, name: str) -> None:
    """
    Refuse invalid values in rows that have the columns of `FEATURES` already, and that no builder has read.

    Args:
        rows (`dict`): split -> rows, all texts of which are read.
        name (`str`): the dataset, for messages.

    Raises:
        ValueError: if a text is blank or refused by `check_text`, or the boxes are not xyxy in pixels. If that is only
            likely, it is logged.
    """
    refuse_other_texts(rows, name)
    for judgement in judge_rows(rows):
        if judgement.is_certain:
            raise ValueError(f"{name!r}: {judgement.message}.")
        logger.warning(f"{name!r}: {judgement.message}.")


def refuse_other_texts(rows: dict, name: str) -> None:
    """Raise the ValueError of `checked_texts` for the texts of rows, split -> rows."""
    for split, part in rows.items():
        for _ in checked_texts(part.select_columns(list(TEXT_COLUMNS)), f"{name!r} {split}"):
            pass


def checked_texts(rows: Iterable[dict], where: str) -> Iterator[dict]:
    """
    Yield rows whose texts are valid.

    Args:
        rows (`Iterable[dict]`): with `TEXT_COLUMNS`.
        where (`str`): dataset and split, for messages.

    Raises:
        ValueError: if a text is blank or refused by `check_text`, naming its image.
    """
    image_id = None
    try:
        for row in rows:
            image_id = row["image_id"]
            for sentence in row["sentences"]:
                if not has_words(check_text(sentence["text"], "a text")):
                    raise ValueError("a text is blank")
            yield row
    except ValueError as error:  # one of Arrow's where bytes are not UTF-8
        raise ValueError(f"{where}, image {quote(image_id)} or after it: {explain(error)}.") from error


def stream_annotations(name: str, cache_dir: str | None, config: dict, opened: datasets.DatasetBuilder) -> dict:
    """
    Return streams of rows of `FEATURES` without their images, split -> rows, with the shards of `opened`. The reader
    of Parquet does not read the images.
    """
    columns = [column for column in FEATURES if column != "image" and column not in OPTIONAL]
    if hasattr(opened.config, "columns"):
        opened = open_files(name, config.get("subset"), config.get("revision"), cache_dir, columns=columns)
    return {split: part.select_columns(columns) for split, part in opened.as_streaming_dataset().items()}
