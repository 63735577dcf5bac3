"""
Convert lines, mappings in the form of a line of our JSON Lines (see `jsonl`), to rows of the schema. Readers of other
formats give such lines as well, so that a box, a mask and a phrase have one meaning whatever file they come from.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from .box_conventions import LIMITS, UNIT_RANGES, judge_splits, parse_box_format, to_boxes_xyxy
from .building import GroundingBuilder, clip_boxes, fingerprint, format_listing, merge_boxes
from .file_names import FileFinder, FoundFile
from .findings import Findings
from .masks import (
    box_of,
    decode_mask,
    encode_counts,
    encode_mask,
    encode_polygons,
    resize_to_nearest,
    to_segmentation,
)
from .phrase_search import PhraseSearcher
from .quoting import explain, quote
from .reading import (
    MAX_NAME,
    Frame,
    check_spans,
    check_text,
    check_texts,
    has_words,
    image_of,
    is_four_numbers,
    is_inside,
    is_number,
    open_file,
    read_frame,
    read_image_size,
)
from .records import objects_of


MASK_FIELDS = ("polygon", "segmentation", "mask")
OBJECT_FIELDS = ("box", "boxes", *MASK_FIELDS, "category")
TARGET_FIELDS = (*OBJECT_FIELDS, "objects", "types")
LINE_FIELDS = ("image", "expressions", "image_id", "width", "height", "box_format")
# how similar an unknown field is to a known one that is misspelled, for difflib
MISSPELLED = 0.8
POLYGONS = ("polygons", "xyxy")  # of pixels, whatever the format of boxes is
# what the four numbers of a box are, by layout
NUMBERS = {
    "xyxy": "[left, top, right, bottom]",
    "xywh": "[left, top, width, height]",
    "cxcywh": "[center x, center y, width, height]",
}
RESPELLED = "files are found under another spelling of their name"
JOINED = "lines are joined to the first one of their image"
SCALED = "images have another size than annotated, boxes and masks are scaled to it"


@dataclass
class LineConfig(datasets.BuilderConfig):
    """
    Args:
        path (`str`, `list[str]` or `dict`, *optional*): a file or files for the split train, or split -> such, in
            place of the files of `data_dir`; in `data_dir` or absolute. The library's `data_files` is the same.
        image_dir (`str`, *optional*): folder that the paths of images are relative to, in `data_dir` or absolute.
        box_format (`str`): convention of the boxes, see `box_conventions`.
        drop_bad_lines (`bool`): leave out bad lines and count them; else they are an error.
        allow_outside_paths (`bool`): allow absolute paths and `..` in the files. Addresses are never fetched.
    """

    path: str | list | dict | None = None
    image_dir: str | None = None
    box_format: str = "xyxy"
    drop_bad_lines: bool = False
    allow_outside_paths: bool = False


class Part(NamedTuple):
    """
    The fields of a line about its image.

    Args:
        image_id (`str`): of the image.
        path (`Path`): its file.
        frame ([`Frame`]): the frame that it is annotated in.
        sentences (`list`): pairs of a text and its phrases, each (start, end, objects, types); an object has `box`,
            `boxes`, `category` and `segmentation`.
    """

    image_id: str
    path: Path
    frame: Frame
    sentences: list[tuple[str, list[tuple]]]


class LineConverter:
    """
    Find the images of lines, validate their fields, and convert boxes and masks to pixels of the images.

    Args:
        box_format (`str`): of lines that do not say it.
        allow_outside_paths (`bool`): see `LineConfig`.
        ignore_unknown_fields (`bool`): ignore and count unknown fields; else they are an error.
        scales_to_image (`bool`): scale what was annotated on an image of another size; else it is an error.
    """

    def __init__(
        self,
        box_format: str = "xyxy",
        allow_outside_paths: bool = False,
        ignore_unknown_fields: bool = False,
        scales_to_image: bool = False,
    ) -> None:
        parse_box_format(box_format)
        self.box_format = box_format
        self.allow_outside_paths = allow_outside_paths
        self.ignore_unknown_fields = ignore_unknown_fields
        self.scales_to_image = scales_to_image
        self.finder = FileFinder()

    def find(self, name: Any, field: str, folders: Sequence[Path]) -> FoundFile:
        """
        Find a file that a line names.

        Raises:
            ValueError: if it is not the name of a file in one of the folders.
        """
        require(isinstance(name, str) and name.strip(), field, name, "the path of a file")
        require(len(name) <= MAX_NAME, field, name, f"the path of a file, of at most {MAX_NAME} characters")
        require("://" not in name, field, name, "the path of a file on this machine; addresses are not fetched")
        allowed = self.allow_outside_paths or is_inside(name)
        require(allowed, field, name, "a path in the folder (allow_outside_paths allows others)")
        return self.finder.find(folders, name)

    def find_image(self, line: dict, folders: Sequence[Path]) -> tuple[str, FoundFile]:
        """
        Find the image of a line. Return its id, by default its path in its folder, and the file.

        Raises:
            ValueError: if its path or its id is not valid.
        """
        found = self.find(line["image"], "image", folders)
        name = found.path.relative_to(found.folder).as_posix() if found.is_respelled else line["image"]
        image_id = line.get("image_id", name)
        number = isinstance(image_id, int) and not isinstance(image_id, bool)
        require(number or (isinstance(image_id, str) and image_id.strip()), "image_id", image_id, "text or an integer")
        return str(image_id), found

    def convert(
        self,
        line: dict,
        folders: Sequence[Path],
        changed: Counter,
        ignored: Counter,
        written: dict | None = None,
    ) -> Part:
        """
        Convert a line whose image exists.

        Args:
            line (`dict`): the line.
            folders (`list[Path]`): the folders that the paths of its files may be relative to.
            changed (`Counter`): counts what is kept with a change.
            ignored (`Counter`): counts fields that are ignored.
            written (`dict`, *optional*): takes its boxes, bad ones too: (what they are, box format) -> (boxes, sizes
                of their images).

        Raises:
            ValueError, OSError: if the line or a file that it names is bad.
        """
        unknown = ignored if self.ignore_unknown_fields else None
        check_line(line, unknown)
        image_id, found = self.find_image(line, folders)
        changed.update([RESPELLED] * found.is_respelled)
        size = annotated_size(line)
        frame = read_frame(found.path, size)
        if size not in (None, frame.size):
            require(self.scales_to_image, "width, height", size, f"the image's {frame.size}")
            line = scale_line(line, size, frame.size, self.box_format)
            changed[SCALED] += 1
        return Part(
            image_id, found.path, frame, self.convert_in_frame(line, frame, folders, changed, unknown, written)
        )

    def convert_in_frame(
        self,
        line: dict,
        frame: Frame,
        folders: Sequence[Path],
        changed: Counter,
        unknown: Counter | None = None,
        written: dict | None = None,
    ) -> list[tuple[str, list[tuple]]]:
        """Convert the expressions of a line in the frame of its image, see `convert` and `known`, to a `Part`'s."""
        box_format = line.get("box_format", self.box_format)
        parse_box_format(box_format)
        if written is not None:
            collect_boxes(line, box_format, frame.size, written)
        sentences = []
        for index, expression in enumerate(line["expressions"]):
            text, spans = read_expression(expression, f"expressions[{index}]", unknown)
            phrases = []
            for start, end, target, where in spans:
                objects = [
                    self._object(item, field, box_format, frame, folders, changed)
                    for item, field in read_objects(target, where, unknown)
                ]
                phrases.append((start, end, objects, target.get("types", [])))
            sentences.append((text, phrases))
        return sentences

    def _object(
        self, item: dict, where: str, box_format: str, frame: Frame, folders: Sequence[Path], changed: Counter
    ) -> dict:
        """Return an object of a line as that of a row, without its id."""
        width, height = frame.size
        boxes = parse_boxes(item, where, box_format, width, height)
        mask = self._mask(item, where, frame, folders, changed)
        kept = clip_boxes(boxes or [box_of(mask)], width, height, Counter(), changed)
        inside = len(kept) == max(1, len(boxes))
        require(inside, f"{where}.box", boxes, f"boxes in the image of {width} x {height}")
        return {"box": merge_boxes(kept), "boxes": kept, "category": item.get("category"), "segmentation": mask}

    def _mask(self, item: dict, where: str, frame: Frame, folders: Sequence[Path], changed: Counter) -> dict | None:
        """Return the run-length encoding of an object's mask, if it has one."""
        width, height = frame.size
        given = [name for name in MASK_FIELDS if name in item]
        require(len(given) < 2, where, given, "one of them")
        if not given:
            return None
        field, value = f"{where}.{given[0]}", item[given[0]]
        if given == ["mask"]:
            found = self.find(value, field, folders)
            changed.update([RESPELLED] * found.is_respelled)
            encoded = read_mask_image(found.path, field, height, width)
        elif given == ["segmentation"] and isinstance(value, dict):
            encoded = read_run_lengths(value, field, height, width)
        else:
            encoded = read_polygons(value, field, height, width)
        segmentation = to_segmentation(encoded)
        require(segmentation is not None, field, value, "a mask with a pixel in the image")
        return segmentation


class LineBuilder(GroundingBuilder):
    """A builder of files that a reader turns into lines. A row is an image, in the order of the first lines."""

    BUILDS_SPLITS_ALONE = True
    DISTRIBUTION = ""
    SCALES_TO_IMAGE = True
    ENDINGS = (".jsonl", ".json")  # of the files of a folder: those of the first ending that any has are read

    def __init__(
        self, *args: Any, hash: str | None = None, data_files: str | list | dict | None = None, **kwargs: Any
    ) -> None:
        if data_files is not None:
            kwargs["path"] = data_files
        data_dir, path = kwargs.get("data_dir"), kwargs.get("path")
        self.split_files = {}
        if path is not None:
            self.split_files = splits_of_path(Path(data_dir or ""), path)
        elif data_dir is not None:
            self.split_files = self.find_splits(Path(data_dir))
        files = [file for files in self.split_files.values() for file in files if file.is_file()]
        linked = self.linked_files(files, data_dir, kwargs.get("image_dir"))
        names = {split: [str(file) for file in files] for split, files in self.split_files.items()}
        super().__init__(*args, hash=fingerprint([*files, *linked], hash, names), **kwargs)

    @classmethod
    def find_splits(cls, data_dir: Path) -> dict[str, list[Path]]:
        """Return the files of each split in a folder: each file is a split of its name."""
        return {file.stem: [file] for file in cls.annotation_files(data_dir, cls.DEFAULT_CONFIG_NAME)}

    @classmethod
    def annotation_files(cls, data_dir: Path, config_name: str) -> list[Path]:
        """Return the files of all splits of a folder."""
        return next((files for end in cls.ENDINGS if (files := sorted(data_dir.glob(f"*{end}")))), [])

    def files_of(self, split: str) -> list[Path]:
        """Return the files of a split."""
        return self.split_files.get(split, [])

    def linked_files(self, files: list[Path], data_dir: str | None, image_dir: str | None) -> list[Path]:
        """Return other files than images that the files name, whose change makes another cache."""
        return []

    def image_folders(self, path: Path) -> list[Path]:
        """Return the folders that the paths of images in a file may be relative to."""
        raise NotImplementedError

    def read_file(self, path: Path, findings: Findings) -> Iterator[tuple[str, Any, dict]]:
        """Yield (position, what `load_line` makes the line of again, line) of each line of a file."""
        raise NotImplementedError

    def load_line(self, path: Path, source: Any) -> dict:
        """Return a line that `read_file` gave, in another process."""
        return source

    def make_converter(self) -> LineConverter:
        """Return the converter of the configuration."""
        return LineConverter(
            self.config.box_format,
            self.config.allow_outside_paths,
            getattr(self.config, "ignore_unknown_fields", False),
            self.SCALES_TO_IMAGE,
        )

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        converter = self.make_converter()
        if not self.split_files:
            if self.config.data_dir is None:
                raise ValueError(
                    f"{self.title!r} requires data_dir=... or path=..., the folder or the files to read. "
                    f"{self.DISTRIBUTION}"
                )
            raise OSError(
                f"There is no {' or '.join(self.ENDINGS)} file in {self.config.data_dir!r}. {self.DISTRIBUTION}"
            )
        self.require_splits(self.split_files)
        split_files = {split: files for split, files in self.split_files.items() if self.is_requested(split)}
        absent = [str(file) for files in split_files.values() for file in files if not file.is_file()]
        if absent:
            raise OSError(f"There is no file {', '.join(absent)}. {self.DISTRIBUTION}")
        rows, bad, left_out, changed, image_paths, written = {}, [], {}, {}, {}, {}
        for split, files in split_files.items():
            if not re.fullmatch(r"\w+", split) or split == "all":
                raise ValueError(
                    f"{split!r} is not a valid name of a split; expected letters, digits and _, and not 'all'."
                )
            rows[split], written[split], findings, seen = {}, {}, Findings(), {}
            for path in files:
                folders = self.image_folders(path)
                for where, source, line in self.read_file(path, findings):
                    with findings.entry(where):
                        ignored = Counter()
                        check_line(line, Counter() if converter.ignore_unknown_fields else None)
                        image_id, found = converter.find_image(line, folders)
                        image_paths[found.path] = None
                        frame = None
                        if found.exists:
                            frame = converter.convert(line, folders, Counter(), ignored, written[split]).frame
                        first, first_path, first_frame = seen.setdefault(image_id, (where, found.path, frame))
                        is_same = first_path == found.path
                        require(is_same, "image", line["image"], f"that of {first}, which has the same image_id")
                        is_same = first_frame == frame
                        require(is_same, "width, height", annotated_size(line), f"those of {first}, of the same image")
                        rows[split].setdefault(image_id, []).append((str(path), source))
                        findings.left_out.update(ignored)
            bad += findings.bad
            left_out[split], changed[split] = findings.counted(), findings.changed
        suspected = judge_splits(written)
        missing = self.describe_missing(image_paths, self.DISTRIBUTION)
        if bad and not self.config.drop_bad_lines:
            hints = [f"\n{judgement.message}." for judgement in suspected] + [f"\n{missing}"] * bool(missing)
            raise ValueError(
                f"{len(bad)} bad lines (drop_bad_lines leaves them out):{format_listing(bad)}{''.join(hints)}"
            )
        for judgement in suspected:
            if judgement.is_certain:
                raise ValueError(f"{judgement.message}.")
            self.report_suspected(judgement.message)
        for split in rows:
            self.report_dropped(split, left_out[split])
            self.report_changed(split, changed[split])
        if missing:
            raise OSError(missing)
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"split": split, "rows": list(sources.items())})
            for split, sources in rows.items()
        ]

    def _generate_examples(
        self, split: str, rows: list[tuple[str, list[tuple[str, Any]]]]
    ) -> Iterator[tuple[str, dict]]:
        changed, converter = Counter(), self.make_converter()
        paths = {path for _, sources in rows for path, _ in sources}
        folders = {path: self.image_folders(Path(path)) for path in paths}
        for image_id, sources in rows:
            parts = [
                converter.convert(self.load_line(Path(path), source), folders[path], changed, Counter())
                for path, source in sources
            ]
            changed.update({JOINED: len(parts) - 1} if len(parts) > 1 else {})
            yield image_id, row_of_parts(parts)
        self.report_changed(split, changed)


def row_of_parts(parts: list[Part]) -> dict:
    """Return the row of an image from what one or more lines say about it. Equal objects are one."""
    image_id, path, frame, _ = parts[0]
    objects, indices, sentences = [], {}, []
    for text, found in (sentence for part in parts for sentence in part.sentences):
        phrases = []
        for start, end, items, types in found:
            named = {}
            for item in items:
                index = indices.setdefault(json.dumps(item), len(objects))
                if index == len(objects):
                    objects.append({"object_id": f"{image_id}_{index}", **item})
                named[index] = None
            phrases.append({"start": start, "end": end, "objects": list(named), "types": types})
        sentences.append({"sentence_id": f"{image_id}_{len(sentences)}", "text": text, "phrases": phrases})
    width, height = frame.size
    row = {"image_id": image_id, "image": image_of(path.absolute(), frame), "width": width, "height": height}
    return {**row, "objects": objects, "sentences": sentences}


def require(condition: object, field: str, value: Any, expected: str) -> None:
    """Raise a ValueError that names a field, its value and the expectation, unless a condition holds."""
    if not condition:
        raise ValueError(f"{field} is {quote(value)}; expected {expected}.")


def splits_of_path(data_dir: Path, path: str | list | dict) -> dict[str, list[Path]]:
    """Return the files of each split that `path` of a configuration names."""
    splits = path if isinstance(path, dict) else {"train": path}
    return {
        split: [data_dir / file for file in ([files] if isinstance(files, str | Path) else files)]
        for split, files in splits.items()
    }


def check_line(line: Any, ignored: Counter | None = None) -> None:
    """
    Check that a line is a mapping with an image and expressions, and that its texts can be stored. Unknown fields are
    counted in `ignored`, see `known`.

    Raises:
        ValueError: if it is not.
    """
    require(isinstance(line, dict), "the line", line, '{"image": ..., "expressions": [...]}')
    for name, entry in line.items():
        check_text(name, "the name of a field")
        check_texts(entry, name)
    known(line, LINE_FIELDS, "the line", ignored)
    if "image" not in line:
        raise ValueError("the line has no field 'image'; expected the path of an image.")
    expressions = line.get("expressions")
    require(isinstance(expressions, list) and expressions, "expressions", expressions, "a list of one or more")


def known(value: dict, names: tuple[str, ...], field: str, ignored: Counter | None = None) -> None:
    """
    Raise a ValueError for a field that is not one of these. With a counter, only one that is a misspelled name is
    refused, and the others are counted.
    """
    unknown = [name for name in value if name not in names]
    meant = {name: near for name in unknown if (near := meant_name(name, names))}
    if ignored is not None and not meant:
        ignored.update(f"fields {quote(name)}, which are unknown" for name in unknown)
    elif unknown:
        guesses = "".join(f", {quote(name)} perhaps for {near!r}" for name, near in meant.items())
        raise ValueError(
            f"{field} has fields that are unknown, {quote(unknown)}{guesses}; expected of {', '.join(names)}."
        )


def meant_name(name: str, names: tuple[str, ...]) -> str | None:
    """
    Return the known name that an unknown one is a misspelling of, if it is one: as similar, of no more words.

    Example:

    ```python
    >>> from data_scripts.lines import meant_name

    >>> meant_name("bbox", ("box", "category")), meant_name("category_id", ("box", "category"))
    ('box', None)

    ```"""
    near = get_close_matches(name[:100].lower(), names, n=1, cutoff=MISSPELLED)
    return near[0] if near and name.count("_") <= near[0].count("_") else None


def annotated_size(value: dict) -> tuple[int, int] | None:
    """Return the (width, height) of a line, None if it has none."""
    if "width" not in value and "height" not in value:
        return None
    size = (value.get("width"), value.get("height"))
    require(all(type(side) is int and side > 0 for side in size), "width, height", size, "two integers")
    return size


def read_expression(expression: Any, field: str, ignored: Counter | None = None) -> tuple[str, list]:
    """
    Return the text of an expression and (start, end, target, field) of its phrases, by default the entire text. A
    target is the mapping that has the box, see `read_objects`. Unknown fields are counted in `ignored`, see `known`.
    """
    require(isinstance(expression, dict), field, expression, '{"text": ..., "box": ...}')
    text = expression.get("text")
    require(has_words(text), f"{field}.text", text, "words")
    if "phrases" not in expression:
        known(expression, ("text", "phrases", *TARGET_FIELDS), field, ignored)
        return text, [(0, len(text), expression, field)]
    known(expression, ("text", "phrases"), f"{field} (with phrases)", ignored)
    phrases = expression["phrases"]
    require(isinstance(phrases, list) and phrases, f"{field}.phrases", phrases, "a list of one or more")
    spans, searcher, found = [], PhraseSearcher(text), {}
    for index, phrase in enumerate(phrases):
        where = f"{field}.phrases[{index}]"
        require(isinstance(phrase, dict), where, phrase, '{"text": ..., "box": ...}')
        known(phrase, ("start", "end", "text", *TARGET_FIELDS), where, ignored)
        if "start" in phrase or "end" in phrase:
            start, end = check_span(phrase, text, where)
        else:
            words = phrase.get("text")
            require(isinstance(words, str) and words, f"{where}.text", words, "words, or start and end")
            # words that occur less often than they are listed are those that were found last
            found[words] = start, end = searcher.find_next(words) or found.get(words) or (0, 0)
            require(end, f"{where}.text", words, f"words that are once in {quote(text)}, or start and end")
        require(has_words(text[start:end]), where, text[start:end], "words")
        spans.append((start, end, phrase, where))
    for *_, phrase, where in spans:
        words = phrase.get("text")
        is_left = words in found and searcher.is_left(words)
        require(not is_left, f"{where}.text", words, f"words that are once in {quote(text)}, or start and end")
    check_spans([(start, end) for start, end, *_ in spans], f"{field}.phrases")
    return text, spans


def read_objects(target: dict, field: str, ignored: Counter | None = None) -> list[tuple[dict, str]]:
    """
    Return (object, field) of each object that an expression or phrase refers to; none if it refers to nothing in the
    image. An object is the mapping that has the box. Unknown fields are counted in `ignored`, see `known`.

    Raises:
        ValueError: if `objects` is not a list of objects, or there are other fields of an object where `objects` or
            `boxes: []` says what they are.
    """
    types = target.get("types", [])
    texts = isinstance(types, list) and all(isinstance(word, str) for word in types)
    require(texts, f"{field}.types", types, "a list of texts")
    is_listed = "objects" in target
    if not is_listed and target.get("boxes") != []:
        return [(target, field)]
    name = "objects" if is_listed else "boxes"
    given = [name, *(other for other in OBJECT_FIELDS if other in target and other != name)]
    require(len(given) == 1, field, given, "one of them" if is_listed else "boxes alone, since [] is for no object")
    objects = objects_of(target)
    require(isinstance(objects, list), f"{field}.objects", objects, "a list of objects, [] for none")
    for index, item in enumerate(objects):
        require(isinstance(item, dict), f"{field}.objects[{index}]", item, '{"box": ...}')
        known(item, OBJECT_FIELDS, f"{field}.objects[{index}]", ignored)
    return [(item, f"{field}.objects[{index}]") for index, item in enumerate(objects)]


def check_span(phrase: dict, text: str, field: str) -> tuple[int, int]:
    """Return the (start, end) of a phrase that is given by its characters, and perhaps by its text as well."""
    start, end, words = phrase.get("start"), phrase.get("end"), phrase.get("text")
    inside = type(start) is int and type(end) is int and 0 <= start < end <= len(text)
    require(inside, f"{field}.start, end", (start, end), f"characters of the {len(text)} of {quote(text)}")
    require(words in (None, text[start:end]), f"{field}.text", words, f"{quote(text[start:end])}, which is there")
    return start, end


def objects_in(value: dict) -> list[dict]:
    """Return the objects of a parsed line, whatever else is wrong with it."""
    found = []
    for expression in dicts_in(value, "expressions"):
        for target in (expression, *dicts_in(expression, "phrases")):
            found += [target, *dicts_in(target, "objects")]
    return found


def dicts_in(value: dict, name: str) -> list[dict]:
    """Return the JSON objects of a field that should be a list of them."""
    items = value.get(name)
    return [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []


def boxes_in(value: dict) -> list[list]:
    """Return the boxes of a parsed line that are four numbers, as they are written, whatever else is wrong with it."""
    found = []
    for item in objects_in(value):
        boxes = item.get("boxes")
        found += [item.get("box"), *(boxes if isinstance(boxes, list) else ())]
    return [box for box in found if is_four_numbers(box)]


def spans_in(value: dict) -> list[list]:
    """Return the boxes_xyxy around the polygons of a parsed line, in the unit that they are written in."""
    found = []
    for item in objects_in(value):
        for field in ("polygon", "segmentation"):
            polygons = item.get(field)
            polygons = polygons if isinstance(polygons, list) else []
            for polygon in [polygons] if polygons and is_number(polygons[0]) else polygons:
                if isinstance(polygon, list) and len(polygon) >= 6 and all(is_number(number) for number in polygon):
                    across, down = polygon[0::2], polygon[1::2]
                    found.append([min(across), min(down), max(across), max(down)])
    return found


def collect_boxes(line: dict, box_format: str, size: tuple[int, int], written: dict) -> None:
    """Add the boxes and polygons of a line, see `LineConverter.convert`."""
    for what, written_format, found in (("boxes", box_format, boxes_in(line)), (*POLYGONS, spans_in(line))):
        if found:
            boxes, sizes = written.setdefault((what, written_format), ([], []))
            boxes += found
            sizes += [size] * len(found)


def scale_line(line: dict, annotated: tuple[int, int], size: tuple[int, int], box_format: str = "xyxy") -> dict:
    """
    Return a line that was annotated on an image of another size, scaled to the image. What is not in pixels stays, and
    so does what cannot be read.

    Args:
        line (`dict`): the line.
        annotated, size (`tuple[int, int]`): (width, height) that it was annotated at, and of the image.
        box_format (`str`, *optional*, defaults to `"xyxy"`): of a line that does not say it.

    Example:

    ```python
    >>> from data_scripts.lines import scale_line

    >>> line = {"image": "1.jpg", "expressions": [{"text": "the car", "box": [10, 20, 30, 40]}]}
    >>> scale_line(line, (100, 100), (200, 50))["expressions"]
    [{'text': 'the car', 'box': [20.0, 10.0, 60.0, 20.0]}]

    ```"""
    across, down = size[0] / annotated[0], size[1] / annotated[1]
    is_pixels = parse_box_format(line.get("box_format", box_format))[1] == "pixels"

    def scale_numbers(numbers: Any) -> Any:
        if not isinstance(numbers, list) or not all(map(is_number, numbers)):
            return numbers
        return [number * (down if index % 2 else across) for index, number in enumerate(numbers)]

    def scale_target(target: Any) -> Any:
        if not isinstance(target, dict):
            return target
        scaled = dict(target)
        if is_pixels and "box" in scaled:
            scaled["box"] = scale_numbers(scaled["box"])
        if is_pixels and isinstance(scaled.get("boxes"), list):
            scaled["boxes"] = [scale_numbers(box) for box in scaled["boxes"]]
        for name in ("polygon", "segmentation"):
            value = scaled.get(name)
            if isinstance(value, list):
                is_flat = value and is_number(value[0])
                scaled[name] = scale_numbers(value) if is_flat else [scale_numbers(polygon) for polygon in value]
            elif isinstance(value, dict):
                scaled[name] = scale_run_lengths(value, annotated, size)
        for name in ("phrases", "objects"):
            if isinstance(scaled.get(name), list):
                scaled[name] = [scale_target(part) for part in scaled[name]]
        return scaled

    expressions = [scale_target(expression) for expression in line["expressions"]]
    scaled = {**line, "expressions": expressions}
    if "width" in line:
        scaled |= {"width": size[0], "height": size[1]}
    return scaled


def scale_run_lengths(value: dict, annotated: tuple[int, int], size: tuple[int, int]) -> dict:
    """Return run lengths of one (width, height) at another; those that cannot be read as they are."""
    width, height = annotated
    if value.get("size") != [height, width]:
        return value
    try:
        mask = decode_mask(encode_counts(value.get("counts"), height, width))
    except ValueError:
        return value
    return to_segmentation(encode_mask(resize_to_nearest(mask, size[1], size[0])), keep_empty=True)


def parse_boxes(item: dict, field: str, box_format: str, width: int, height: int) -> list[list[float]]:
    """
    Return the boxes of an object as xyxy in pixels of an image of (width, height); none where it has a mask instead.
    Checks its category too.

    Raises:
        ValueError: where a box is not four finite numbers of the box format, or has no extent.
    """
    category = item.get("category")
    require(category is None or isinstance(category, str), f"{field}.category", category, "text")
    if "boxes" in item:
        require("box" not in item, field, ["box", "boxes"], "one of them")
        boxes, name = item["boxes"], "boxes"
        require(isinstance(boxes, list) and boxes, f"{field}.boxes", boxes, "a list of one or more")
    else:
        boxes, name = [item["box"]] if "box" in item else [], "box"
    if not boxes and not any(mask in item for mask in MASK_FIELDS):
        raise ValueError(f"{field} has no field 'box'; expected one, or 'boxes', or a mask.")
    layout, unit = parse_box_format(box_format)
    limit = LIMITS.get(unit)
    boxes_xyxy = []
    for box in boxes:
        require(is_four_numbers(box), f"{field}.{name}", box, f"{NUMBERS[layout]}, four numbers")
        in_unit = limit is None or max(map(abs, box)) <= limit
        require(in_unit, f"{field}.{name}", box, f"{NUMBERS[layout]} of {UNIT_RANGES.get(unit)}")
        ((x0, y0, x1, y1),) = to_boxes_xyxy([box], [(width, height)], layout, unit).tolist()
        has_extent = x0 < x1 and y0 < y1
        require(has_extent, f"{field}.{name}", box, f"{NUMBERS[layout]} of some extent (box_format is {box_format!r})")
        boxes_xyxy.append([x0, y0, x1, y1])
    return boxes_xyxy


def read_polygons(value: Any, field: str, height: int, width: int) -> dict:
    """Encode polygons, or a single one, as run lengths of (height, width)."""
    polygons = [value] if isinstance(value, list) and value and is_number(value[0]) else value
    good = isinstance(polygons, list) and polygons
    good = good and all(
        isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0 and all(map(is_number, polygon))
        for polygon in polygons
    )
    require(good, field, value, "polygons [[x, y, x, y, x, y, ...], ...] of three or more points")
    # the library walks along every edge, so a point far away takes its time and memory
    limits = np.array([width, height])
    near = all((np.abs(np.reshape(polygon, (-1, 2)) - limits / 2) <= 1.5 * limits).all() for polygon in polygons)
    require(near, field, value, f"points in the image of {width} x {height}, or at most as far outside of it")
    return encode_polygons(polygons, height, width)


def read_run_lengths(value: dict, field: str, height: int, width: int) -> dict:
    """Validate COCO's run-length encoding, compressed or not, of (height, width)."""
    known(value, ("size", "counts"), field)
    require(value.get("size") == [height, width], f"{field}.size", value.get("size"), f"the image's {[height, width]}")
    try:
        return encode_counts(value.get("counts"), height, width)
    except ValueError as error:
        raise ValueError(f"{field}: {error}; expected run lengths that sum to {height * width}.") from error


def read_mask_image(path: Path, field: str, height: int, width: int) -> dict:
    """Read a mask file of one channel as a run-length encoding of (height, width)."""
    require(os.path.isfile(path), field, str(path), "a file that is there")
    size = read_image_size(path)
    require(size == (width, height), field, size, f"a mask of (width, height) {(width, height)}, as the image")
    with open_file(path) as image:
        one_channel = image.mode in ("1", "L", "P", "I", "I;16", "F")
        require(one_channel, field, str(path), f"an image of one channel, not of mode {image.mode}")
        try:
            mask = np.asarray(image) != 0
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{field}: {str(path)!r} is damaged: {explain(error)}") from error
    return encode_mask(mask)
