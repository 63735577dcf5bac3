"""
GRIT (Peng et al., Kosmos-2): captions of images of the web, whose phrases have boxes, from the shards that img2dataset
writes when it downloads the images:

    data_dir/
        00000.tar  00001.tar  ...             output_format webdataset: <key>.jpg and <key>.json of each image
        00000.parquet  00001.parquet  ...     output_format parquet: columns jpg, key, caption, ...

Shards may be in subfolders. If a folder has tars, its Parquet files are their metadata, and are not read.
A sample has

- `caption`;
- `noun_chunks` and `ref_exps`, lists of [start, end, x1, y1, x2, y2, score]: a phrase of the caption, by its
  characters, and one of its boxes in 0..1. `ref_exps` are the noun chunks with what belongs to them ("a cup" and "a
  cup on the table"), and equal to them if nothing does. Phrases overlap; each box of a phrase is an object;
- `id`, else the key of img2dataset, as the image's id.

The authors' own Parquet files have addresses in place of images. Download the images with their shape kept, and the
columns of the phrases:

    img2dataset --url_list GRIT --input_format parquet --url_col url --caption_col caption --output_format webdataset
        --resize_mode keep_ratio --save_additional_columns '["id","noun_chunks","ref_exps"]' --output_folder data_dir

Shards are read one sample at a time: `load("grit", streaming=True)` opens a shard when its first row is asked for, and
`datasets.distributed.split_dataset_by_node` and the workers of a loader divide the shards. Without streaming, a build
copies all images. Images that could not be downloaded, phrases and boxes that are left out are counted, by shard when
streamed; a malformed sample is an error, unless `drop_bad_samples` leaves it out and counts it.
"""

import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import datasets
import pyarrow.parquet as pq

from .box_conventions import LIMITS, to_boxes_xyxy
from .building import Copy, GroundingBuilder, Source, clip_boxes, describe_copies
from .kinds import LIST, TEXT, check_fields
from .quoting import explain, quote
from .reading import (
    MAX_ENTRY_BYTES,
    check_spans,
    check_text,
    frame_content,
    has_words,
    is_number,
    parse_line,
)
from .schema import FEATURES


# FEATURES: datasets <= 3.6 copies the siblings that a script itself imports, and no further
__all__ = ["FEATURES", "SOURCES", "Grit", "GritConfig"]

SPANS = ("noun_chunks", "ref_exps")
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
FIELDS = ("key", "caption", *SPANS, "id", "width", "height", "original_width", "original_height")
BATCH_SIZE = 64  # rows of a Parquet file that are in memory at once
COPIES = (Copy("zzliang/GRIT", "addresses, captions and boxes, without images", "licence: see its card"),)
DISTRIBUTION = (
    "GRIT has addresses of images: download them with img2dataset, --output_format webdataset or parquet, "
    "--caption_col caption, --resize_mode keep_ratio and "
    '--save_additional_columns \'["id","noun_chunks","ref_exps"]\', into data_dir.'
)


@dataclass
class GritConfig(datasets.BuilderConfig):
    """
    Args:
        spans (`str`): the phrases of a caption: "noun_chunks", "ref_exps", or "both".
        min_score (`float`): leave out boxes whose score, in 0..1, is lower.
        drop_bad_samples (`bool`): leave out malformed samples and count them; else they are an error.
    """

    spans: str = "both"
    min_score: float = 0.0
    drop_bad_samples: bool = False


class Grit(GroundingBuilder):
    """Captions of images of the web with boxes of their phrases, from shards. A row is a sample, in their order."""

    BUILDER_CONFIG_CLASS = GritConfig
    BUILDER_CONFIGS = [GritConfig(name="grit", version=GroundingBuilder.VERSION)]
    DEFAULT_CONFIG_NAME = "grit"

    @classmethod
    def annotation_files(cls, data_dir: Path, config_name: str) -> list[Path]:
        """Return the shards of a folder and of those in it: the tars, or else the Parquet files."""
        tars = sorted(data_dir.rglob("*.tar"))
        return tars or sorted(data_dir.rglob("*.parquet"))

    def _info(self) -> datasets.DatasetInfo:
        if self.config.spans not in (*SPANS, "both"):
            raise ValueError(f"spans is {quote(self.config.spans)}; expected 'noun_chunks', 'ref_exps' or 'both'.")
        if not is_number(self.config.min_score):
            raise ValueError(f"min_score is {quote(self.config.min_score)}; expected a number in 0..1.")
        return super()._info()

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        self.require_files([], DISTRIBUTION)
        shards = [str(path) for path in self.files_of("train")]
        if not shards:
            raise OSError(
                f"There is no .tar or .parquet file in {self.config.data_dir!r}. {DISTRIBUTION} "
                f"{describe_copies(COPIES)}"
            )
        # the library divides lists of these among processes
        return [datasets.SplitGenerator(name="train", gen_kwargs={"split": "train", "shards": shards})]

    def _generate_examples(self, split: str, shards: list[str]) -> Iterator[tuple[str, dict]]:
        columns = SPANS if self.config.spans == "both" else (self.config.spans,)
        dropped, changed = Counter(), Counter()
        for shard in shards:
            for number, sample in enumerate(read_shard(shard)):
                where, row = f"{shard!r}, sample {number} ({quote(sample.get('key'))})", None
                try:
                    row = row_of_sample(sample, columns, self.config.min_score, dropped, changed)
                except (ValueError, OSError) as error:
                    if not self.config.drop_bad_samples:
                        raise ValueError(f"{where}: {error} (drop_bad_samples leaves such samples out)") from error
                    dropped["bad samples"] += 1
                if row is not None:
                    yield f"{shard}:{number}", row
        self.report_dropped(split, dropped)
        self.report_changed(split, changed)


def row_of_sample(
    sample: dict, columns: tuple[str, ...], min_score: float, dropped: Counter, changed: Counter
) -> dict | None:
    """
    Return the row of a sample, counting what is left out and changed; None if nothing is left of it.

    Args:
        sample (`dict`): see `read_shard`.
        columns (`tuple[str, ...]`): the lists of phrases that are read.
        min_score (`float`): see `GritConfig`.
        dropped, changed (`Counter`): reason -> number.

    Raises:
        ValueError, OSError: if the sample is malformed, or its image cannot be read.
    """
    if sample["image"] is None:
        dropped["images that were not downloaded"] += 1
        return None
    if "error" in sample:
        raise ValueError(sample["error"])
    absent = [name for name in ("caption", *columns) if sample.get(name) is None]
    if absent:
        raise ValueError(f"it has no {' and no '.join(absent)}. {DISTRIBUTION}")
    check_fields(sample, {"caption": TEXT, **dict.fromkeys(columns, LIST)}, "it")
    caption, size = check_text(sample["caption"], "caption"), (sample.get("width"), sample.get("height"))
    original_size = (sample.get("original_width"), sample.get("original_height"))
    if not keeps_shape(size, original_size):
        raise ValueError(f"its image of {original_size} was padded or cropped to {size}. {DISTRIBUTION}")
    is_size = all(type(side) is int and side > 0 for side in size)
    frame, image = frame_content(sample["image"], sample["name"], size if is_size else None)
    number = sample["key"] if sample.get("id") is None else sample["id"]
    if number is None:
        raise ValueError("it has no id and no key.")
    image_id = check_text(f"grit_{number}", "id")
    objects, indices, phrases = [], {}, []
    for (start, end), boxes in read_phrases(sample, columns, min_score, dropped).items():
        if end > len(caption) or not has_words(caption[start:end]):
            dropped["phrases that are not in their caption"] += 1
            continue
        boxes_xyxy = to_boxes_xyxy(boxes, [frame.size] * len(boxes), "xyxy", "fraction").tolist()
        kept = clip_boxes(boxes_xyxy, *frame.size, dropped, changed)
        if not kept:
            continue
        named = {}
        for box in kept:
            index = indices.setdefault(str(box), len(objects))
            if index == len(objects):
                item = {"object_id": f"{image_id}_{index}", "box": box, "boxes": [box]}
                objects.append({**item, "category": None, "segmentation": None})
            named[index] = None
        phrases.append({"start": start, "end": end, "objects": list(named), "types": []})
    if not phrases:
        dropped["images without a phrase"] += 1
        return None
    check_spans([(phrase["start"], phrase["end"]) for phrase in phrases], "phrases")
    return {
        "image_id": image_id,
        "image": image,
        "width": frame.width,
        "height": frame.height,
        "objects": objects,
        "sentences": [{"sentence_id": f"{image_id}_0", "text": caption, "phrases": phrases}],
    }


def read_phrases(
    sample: dict, columns: tuple[str, ...], min_score: float, dropped: Counter
) -> dict[tuple[int, int], list]:
    """
    Return the boxes of each phrase of a sample, (start, end) -> boxes, each once.

    Raises:
        ValueError: if an entry is not [start, end, x1, y1, x2, y2, score] with a box in 0..1.

    Example:

    ```python
    >>> from collections import Counter
    >>> from data_scripts.grit import read_phrases

    >>> sample = {"ref_exps": [[0, 5, 0.1, 0.2, 0.3, 0.4, 0.9], [0, 5, 0.5, 0.2, 0.6, 0.4, 0.7]]}
    >>> read_phrases(sample, ("ref_exps",), 0.8, Counter())
    {(0, 5): [[0.1, 0.2, 0.3, 0.4]]}

    ```"""
    phrases = {}
    for column in columns:
        for index, entry in enumerate(sample[column]):
            where = f"{column}[{index}] is {quote(entry)}"
            if not isinstance(entry, list) or len(entry) != 7 or not all(map(is_number, entry)):
                raise ValueError(f"{where}; expected [start, end, x1, y1, x2, y2, score].")
            start, end, *box, score = entry
            if start != int(start) or end != int(end) or not 0 <= start < end:
                raise ValueError(f"{where}; expected characters start < end of the caption.")
            if max(map(abs, box)) > LIMITS["fraction"]:
                raise ValueError(f"{where}; expected a box in 0..1 of the image's width and height.")
            if score < min_score:
                dropped["boxes of a score below min_score"] += 1
                continue
            boxes = phrases.setdefault((int(start), int(end)), [])
            if box not in boxes:  # a referring expression that equals its noun chunk
                boxes.append(box)
    return phrases


def keeps_shape(size: tuple, original_size: tuple) -> bool:
    """
    Return whether a downloaded image has the shape of the original one, so that boxes fit; True where one is unknown.

    Args:
        size, original_size (`(width, height)`): in pixels, or None.

    Example:

    ```python
    >>> from data_scripts.grit import keeps_shape

    >>> keeps_shape((256, 173), (1024, 693)), keeps_shape((256, 256), (1024, 693))
    (True, False)

    ```"""
    if not all(type(side) is int and side > 0 for side in (*size, *original_size)):
        return True
    (width, height), (original_width, original_height) = size, original_size
    # sides are rounded to pixels
    return abs(width * original_height - height * original_width) <= original_width + original_height


def read_shard(path: str | Path) -> Iterator[dict]:
    """
    Yield the samples of a shard in turn.

    Args:
        path (`str` or `Path`): a .tar or .parquet file of img2dataset.

    Yields:
        `dict`: the fields of the sample, and `image`, the content of its file or None, and `name`, that of the file.

    Raises:
        OSError: if the shard is missing, damaged or cut, naming it.
        ValueError: if a Parquet file has no images.
    """
    path = Path(path)
    try:
        if path.suffix == ".tar":
            with open(path, "rb") as file:
                yield from read_tar(file)
        else:
            yield from read_parquet(path)
    except Exception as error:  # a damaged file can raise anything
        if str(path) in str(error):
            raise
        raise OSError(f"{str(path)!r} is damaged: {explain(error)}. Run img2dataset again for it.") from error


def read_tar(file: BinaryIO) -> Iterator[dict]:
    """Yield the samples of a tar: consecutive files of one name up to its first point."""
    with tarfile.open(fileobj=file, mode="r:") as archive:
        sample = None
        for member in archive:
            folder, name = posixpath.split(member.name)
            key, _, ending = name.partition(".")
            if not member.isfile() or not ending:
                continue
            if member.issparse():  # a few bytes may claim to be any number
                raise tarfile.ReadError(f"{quote(member.name)} is a sparse file")
            if sample is None or sample["file"] != (folder, key):
                if sample is not None:
                    yield sample
                sample = {"file": (folder, key), "key": key, "image": None, "name": None}
            ending = ending.lower()
            if ending in IMAGE_ENDINGS:
                sample |= {"image": archive.extractfile(member).read(), "name": name}
            elif ending == "json":
                if member.size > MAX_ENTRY_BYTES:
                    raise tarfile.ReadError(
                        f"{quote(member.name)} has {member.size} bytes, more than annotations have"
                    )
                sample = {**read_metadata(archive.extractfile(member).read()), **sample}
            archive.members = []  # else it keeps one for each file
        if sample is not None:
            yield sample
        # an archive ends with zeros: the library also stops at a damaged header, and where a file is cut between two
        file.seek(archive.offset)
        end = file.read(2 * tarfile.BLOCKSIZE)
        if len(end) < 2 * tarfile.BLOCKSIZE or any(end):
            raise tarfile.ReadError(f"it is cut or damaged at byte {archive.offset}")


def read_metadata(content: bytes) -> dict:
    """Return the fields of a .json file that are read; none, with the reason as `error`, if it is not JSON."""
    try:
        record = parse_line(content)
    except ValueError as error:
        return {"error": str(error)}
    return {name: record[name] for name in FIELDS if name in record}


def read_parquet(path: Path) -> Iterator[dict]:
    """Yield the rows of a Parquet file, a few in memory at a time."""
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        column = next((name for name in IMAGE_ENDINGS if name in names), None)
        if column is None:
            raise ValueError(
                f"{str(path)!r} has the columns {quote(names)}, and none of images, {', '.join(IMAGE_ENDINGS)}. "
                f"{DISTRIBUTION}"
            )
        columns = [name for name in (*FIELDS, column) if name in names]
        for batch in file.iter_batches(BATCH_SIZE, columns=columns):
            for row in batch.to_pylist():
                yield {"key": None, **row, "image": row[column], "name": f"{row.get('key')}.{column}"}


SOURCES = [
    Source(
        name="grit",
        builder=Grit,
        config_name="grit",
        splits=("train",),
        files=("00000.tar ...", "or 00000.parquet ..., shards of img2dataset"),
        distribution=DISTRIBUTION,
        copies=COPIES,
        license="other",
        language="en",
    )
]
