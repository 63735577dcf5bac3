"""
Convert the columns of datasets that are on the Hub to objects and sentences. A layout is recognized by its columns.

A converter takes all rows of one image, without the image, and returns a record:

    {"annotated_size": (width, height) or None,
     "objects": [{"object_id", "boxes", "category", "segmentation"}],      as they are written
     "sentences": [{"sentence_id", "text", "objects": [index, ...]}]}      one for each text of the rows, in order

A sentence without objects says that its text refers to nothing in the image.
`boxes` are in the layout's `box_format` and may be empty where there is a mask; `segmentation` is in one of COCO's
formats, polygons or run lengths. `named_rows.NamedRows` clips, scales and counts.
"""

import json
import re
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import datasets

from .kinds import FILE_NAME, INTEGER, LIST, SPLIT, TEXT, Kind, check_fields
from .quoting import explain, quote


NUMBERS: Kind = ("four numbers", lambda value: isinstance(value, list) and is_box(value))
IMAGE: Kind = ("an image", lambda value: True)  # it is read apart from the other columns
# fields of `columns`, those that are required first
MAPPED = ("image", "text", "box", "mask", "category", "image_id", "width", "height")
# the layout of `jsonl`, which the library opens as a table of its own
JSON_LINES = {"image", "expressions"}


class Layout(NamedTuple):
    """
    The columns of a dataset, and how they are read.

    Args:
        name (`str`): where it is found.
        kinds (`dict[str, Kind]`): required columns -> what their values must be.
        convert (callable): rows of one image -> record, see above.
        texts (`str`): the column with the expressions of a row: a list of them, or one text.
        box_format (`str`): of `box_conventions.BOX_FORMATS`.
        key (`str`, *optional*): the column whose values identify the image of a row; None: each row is an image.
        image (`str`, *optional*): the column of images; None: `key` is the path of a file.
        image_id (`str`, *optional*): the column that names images, where it is another than `key`.
        split (`str`, *optional*): the column with the authors' name of a row's split; None: splits are those of the
            files.
        split_names (`dict[str, str]`): split of the files -> what it is called here.
        has_partial_masks (`bool`): whether a mask may be only a part of the object's, and is then left out.
    """

    name: str
    kinds: dict[str, Kind]
    convert: Callable[[list[dict]], dict]
    texts: str
    box_format: str
    key: str | None = None
    image: str | None = None
    image_id: str | None = None
    split: str | None = None
    split_names: dict[str, str] = {}
    has_partial_masks: bool = False


class Objects:
    """Collect the objects of an image, each once."""

    def __init__(self) -> None:
        self.items = []
        self._indices = {}

    def add(self, key: Any, boxes: list, segmentation: Any = None, category: str | None = None) -> int:
        """Return the index of an object, which is new if its key is. A key that is a text or an integer is its id."""
        if key not in self._indices:
            index = self._indices[key] = len(self.items)
            object_id = str(key) if isinstance(key, str | int) else str(index)
            item = {"object_id": object_id, "boxes": boxes, "category": category, "segmentation": segmentation}
            self.items.append(item)
        return self._indices[key]


def is_box(value: Any) -> bool:
    """Return whether a value is a list of four numbers, which may be infinite or not a number."""
    return isinstance(value, list) and len(value) == 4 and all(type(number) in (int, float) for number in value)


def parse_column(row: dict, name: str) -> dict:
    """
    Return the JSON object in a column of text.

    Raises:
        ValueError: if it is not one.
    """
    try:
        value = json.loads(row[name])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is {quote(row[name])}; expected JSON: {explain(error)}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {quote(row[name])}; expected a JSON object.")
    return value


def image_name(name: str) -> str:
    """
    Return the name of an image file by which its rows are known as those of one image. Refs of COCO images have names
    that end with a number of their own.

    Example:

    ```python
    >>> from data_scripts.layouts import image_name

    >>> image_name("COCO_train2014_000000581857_16.jpg"), image_name("val/1_2.jpg")
    ('COCO_train2014_000000581857.jpg', 'val/1_2.jpg')

    ```"""
    return re.sub(r"(COCO_\w+2014_\d{12})_\d+(?=\.\w+$)", r"\1", name)


def convert_refer_rows(rows: list[dict]) -> dict:
    """Convert rows of jxu124/refcoco, refcocoplus and refcocog, each a reference of the refer API."""
    info = parse_column(rows[0], "raw_image_info")
    size = (info.get("width"), info.get("height"))
    objects, sentences = Objects(), []
    for row in rows:
        # `bbox` is xyxy; that of `raw_anns`, from which the polygons are, is xywh
        polygons = parse_column(row, "raw_anns").get("segmentation")
        index = objects.add(row["ann_id"], [row["bbox"]], polygons)
        for number, sentence in enumerate(row["sentences"]):
            # `sent` is in lower case, `raw` and `captions` may not be
            check_fields(sentence, {"sent": TEXT, "sent_id": INTEGER}, f"sentences[{number}]")
            sentences.append({"sentence_id": str(sentence["sent_id"]), "text": sentence["sent"], "objects": [index]})
    return {
        "annotated_size": size if all(type(side) is int and side > 0 for side in size) else None,
        "objects": objects.items,
        "sentences": sentences,
    }


def convert_question_rows(rows: list[dict]) -> dict:
    """Convert rows of lmms-lab/RefCOCO, RefCOCOplus and RefCOCOg, each a reference with its image."""
    objects, sentences = Objects(), []
    for row in rows:
        # a single polygon as one list of numbers, even where the object has several; there is no annotation id
        polygon = row["segmentation"]
        key = (tuple(row["bbox"]), tuple(polygon))
        index = objects.add(key, [row["bbox"]], [polygon] if polygon else None)
        # `question` is a prompt that names no object, the expressions are `answer`
        for number, text in enumerate(row["answer"]):
            sentences.append({"sentence_id": f"{row['question_id']}_{number}", "text": text, "objects": [index]})
    return {"annotated_size": None, "objects": objects.items, "sentences": sentences}


def convert_samples(rows: list[dict]) -> dict:
    """Convert a row of moondream/refcoco-m, an image with its objects."""
    objects, sentences = Objects(), []
    for number, sample in enumerate(row_list(rows[0]["samples"])):
        check_fields(sample, {"id": INTEGER, "sentences": LIST, "bbox": NUMBERS}, f"samples[{number}]")
        mask = sample.get("mask")
        index = objects.add(sample["id"], [sample["bbox"]], mask, sample.get("category"))
        for position, text in enumerate(sample["sentences"]):
            sentences.append({"sentence_id": f"{sample['id']}_{position}", "text": text, "objects": [index]})
    return {"annotated_size": None, "objects": objects.items, "sentences": sentences}


def convert_captions(rows: list[dict]) -> dict:
    """Convert rows of JierunChen/Ref-L4, each a caption of a box."""
    objects, sentences = Objects(), []
    for row in rows:
        index = objects.add(row["bbox_id"], [row["bbox"]])
        sentences.append({"sentence_id": str(row["id"]), "text": row["caption"], "objects": [index]})
    return {"annotated_size": (rows[0]["width"], rows[0]["height"]), "objects": objects.items, "sentences": sentences}


def row_list(value: Any) -> list[dict]:
    """Return a list of structures, also where the library gives it as lists by name."""
    if isinstance(value, dict):
        return [dict(zip(value, values, strict=True)) for values in zip(*value.values(), strict=True)]
    return value


LAYOUTS = [
    Layout(
        "jxu124/refcoco",
        {
            "ann_id": INTEGER,
            "split": SPLIT,
            "sentences": LIST,
            "raw_anns": TEXT,
            "raw_image_info": TEXT,
            "image_path": FILE_NAME,
            "bbox": NUMBERS,
        },
        convert_refer_rows,
        texts="sentences",
        box_format="xyxy",
        key="image_path",
        # the files call val "validation" and testA "test"
        split="split",
    ),
    Layout(
        "lmms-lab/RefCOCO",
        {
            "question_id": TEXT,
            "image": IMAGE,
            "answer": LIST,
            "segmentation": LIST,
            "bbox": NUMBERS,
            "file_name": TEXT,
        },
        convert_question_rows,
        texts="answer",
        box_format="xywh",
        key="file_name",
        image="image",
        # RefCOCO's mixes the val of unc (3,811 objects) with that of google (5,000), RefCOCOg's that of umd (2,573)
        # with that of google (5,000): results on it are not results on a published val
        split_names={"val": "val_lmms_lab", "validation": "val_lmms_lab"},
        has_partial_masks=True,
    ),
    Layout(
        # its validation is the val of RefCOCO (unc) without 47 % of the objects, with other masks: it keeps its name
        "moondream/refcoco-m",
        {"image": IMAGE, "image_id": INTEGER, "file_name": TEXT, "samples": LIST},
        convert_samples,
        texts="samples",
        box_format="xywh",
        image="image",
        image_id="file_name",
    ),
    Layout(
        "JierunChen/Ref-L4",
        {
            "id": ("a text or an integer", lambda value: isinstance(value, str | int)),
            "caption": TEXT,
            "bbox": NUMBERS,
            "bbox_id": ("a text or an integer", lambda value: isinstance(value, str | int)),
            "width": INTEGER,
            "height": INTEGER,
            "file_name": FILE_NAME,
            "split": SPLIT,
        },
        convert_captions,
        texts="caption",
        box_format="xywh",
        key="file_name",
        split="split",
    ),
]


def find_layout(name: str, columns: Collection[str]) -> Layout:
    """
    Return the layout of a dataset by its columns.

    Args:
        name (`str`): the dataset, for the message.
        columns (`Collection[str]`): its columns.

    Raises:
        ValueError: if there is none, naming the columns, the layouts and what to do.
    """
    for layout in LAYOUTS:
        if set(layout.kinds) <= set(columns):
            return layout
    if set(columns) >= JSON_LINES:
        raise ValueError(
            f"{name!r} has the columns {', '.join(columns)}, those of JSON Lines: load it as the dataset 'jsonl' with "
            "the folder as data_dir."
        )
    known = "; ".join(f"{layout.name}: {', '.join(layout.kinds)}" for layout in LAYOUTS)
    raise ValueError(
        f"{name!r} has the columns {', '.join(columns)}, which are neither those of an export nor of a known layout "
        f"({known}). Name the columns to read, for example columns: {{image: image, text: caption, box: bbox}} in the "
        "recipe's dataset_config."
    )


def make_layout(name: str, columns: dict, box_format: str, features: datasets.Features) -> Layout:
    """
    Return the layout that a user describes.

    Args:
        name (`str`): the dataset, for messages.
        columns (`dict[str, str]`): fields of `MAPPED` -> columns, or "column.field" in one of structures.
        box_format (`str`): of `box_conventions.BOX_FORMATS`.
        features (`datasets.Features`): of the dataset.

    Raises:
        ValueError: if a field is unknown or missing, or there is no such column.
    """
    if not isinstance(columns, dict) or not all(isinstance(path, str) for path in columns.values()):
        raise ValueError(f"columns is {quote(columns)}; expected a mapping such as {{image: image, text: caption}}.")
    unknown = [field for field in columns if field not in MAPPED]
    missing = [field for field in ("image", "text") if field not in columns]
    if not columns.keys() & {"box", "mask"}:
        missing.append("box")
    if unknown or missing:
        problem = f"has the unknown field {quote(unknown[0])}" if unknown else f"lacks {', '.join(missing)}"
        raise ValueError(f"columns {problem}; its fields are {', '.join(MAPPED)}, with image, text, and box or mask.")
    roots = {field: path.split(".")[0] for field, path in columns.items()}
    for field, root in roots.items():
        # an image, and what tells images apart, is a column of its own
        if (columns[field] if field in ("image", "image_id") else root) not in features:
            raise ValueError(f"columns.{field} is {columns[field]!r}; {name!r} has the columns {', '.join(features)}.")
    feature = features.get(columns["image"])
    is_file = isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")
    kinds = dict.fromkeys(roots.values(), IMAGE)
    if is_file:
        kinds[columns["image"]] = FILE_NAME
    if "image_id" in columns:
        kinds[columns["image_id"]] = ("a text or an integer", lambda value: isinstance(value, str | int))
    return Layout(
        "columns",
        kinds,
        partial(convert_columns, columns=columns),
        texts=columns["text"],
        box_format=box_format,
        key=columns["image"] if is_file else columns.get("image_id"),
        image=None if is_file else columns["image"],
        image_id=columns.get("image_id"),
    )


def value_at(row: dict, path: str) -> Any:
    """
    Return the value of a column, or of a field of its structures: for lists of structures a list.

    Raises:
        ValueError: if there is no such field.

    Example:

    ```python
    >>> from data_scripts.layouts import value_at

    >>> value_at({"objects": [{"name": "a cup"}, {"name": "a bus"}]}, "objects.name")
    ['a cup', 'a bus']

    ```"""
    value = row
    for name in path.split("."):
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(part, dict) and name in part for part in parts):
            raise ValueError(f"{path} is not there: {name!r} is not a field of {quote(value)}.")
        value = [part[name] for part in parts] if isinstance(value, list) else value[name]
    return value


def convert_columns(rows: list[dict], columns: dict[str, str]) -> dict:
    """
    Convert the rows of an image by the columns that a user names. A row has one box or mask and one or more texts
    about it; or a list of boxes or masks, with as many texts, or lists of texts; or a list and one text, which refers
    to all of them, and to nothing in the image if the list is empty.

    Raises:
        ValueError: if the columns of a row are none of these.
    """
    objects, sentences = Objects(), []
    for row in rows:
        values = {field: value_at(row, path) for field, path in columns.items() if field != "image"}
        for found, texts in mapped_targets(values, columns):
            named = [objects.add((json.dumps([boxes, mask]),), boxes, mask, name) for boxes, mask, name in found]
            for sentence in texts:
                sentences.append({"sentence_id": str(len(sentences)), "text": sentence, "objects": named})
    size = tuple(value_at(rows[0], columns[side]) if side in columns else None for side in ("width", "height"))
    annotated_size = size if all(type(side) is int and side > 0 for side in size) else None
    return {"annotated_size": annotated_size, "objects": objects.items, "sentences": sentences}


def mapped_targets(values: dict, columns: dict[str, str]) -> list[tuple[list[tuple], list[str]]]:
    """Return the objects, each (boxes, mask, category), and the texts about them of a row, see `convert_columns`."""
    box, mask, category, text = (values.get(field) for field in ("box", "mask", "category", "text"))
    targets = box if box is not None else mask
    is_one = is_box(box) if box is not None else not is_list_of_masks(mask)
    has_own_masks = isinstance(mask, list) and isinstance(targets, list) and len(mask) == len(targets)
    # several boxes of one mask are parts of an object
    if is_one or (isinstance(text, str) and mask is not None and not has_own_masks):
        boxes = [box] if is_box(box) else (box or [])
        name = category if isinstance(category, str) else None
        return [([(check_boxes(boxes, columns), mask, name)], texts_in(text, columns))]
    is_shared = isinstance(text, str) or targets == []
    if not isinstance(targets, list) or not (is_shared or (isinstance(text, list) and len(text) == len(targets))):
        where = columns["box"] if box is not None else columns["mask"]
        raise ValueError(
            f"{where} is {quote(targets)} and {columns['text']} is {quote(text)}; expected one box or mask, or a list "
            "with as many texts or one."
        )
    masks = mask if has_own_masks else [None] * len(targets)
    has_own_names = isinstance(category, list) and len(category) == len(targets)
    names = category if has_own_names else [category] * len(targets)
    boxes = [[one] for one in box] if box is not None else [[]] * len(targets)
    objects = [
        (check_boxes(one, columns), part, name if isinstance(name, str) else None)
        for one, part, name in zip(boxes, masks, names, strict=True)
    ]
    if is_shared:
        return [(objects, texts_in(text, columns))]
    return [([item], texts_in(some, columns)) for item, some in zip(objects, text, strict=True)]


def is_list_of_masks(mask: Any) -> bool:
    """Return whether a value is a list of run lengths; a list of lists is the polygons of one mask."""
    return isinstance(mask, list) and bool(mask) and all(isinstance(part, dict) for part in mask)


def check_boxes(boxes: list, columns: dict[str, str]) -> list:
    """Return boxes as they are; raise a ValueError if one is not four numbers."""
    for box in boxes:
        if not is_box(box):
            raise ValueError(f"{columns['box']} is {quote(box)}; expected four numbers.")
    return boxes


def texts_in(text: Any, columns: dict[str, str]) -> list[str]:
    """Return the texts of an object; raise a ValueError if they are not text."""
    texts = text if isinstance(text, list) else [text]
    if not all(isinstance(part, str) for part in texts):
        raise ValueError(f"{columns['text']} is {quote(text)}; expected a text or a list of texts.")
    return texts
