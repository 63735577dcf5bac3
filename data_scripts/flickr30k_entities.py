"""
Flickr30k Entities (Plummer et al., IJCV 2017) from its authors' files: images with five captions each, whose phrases
name chains of mentions, and the boxes of those chains.

    data_dir/
        Annotations/<image id>.xml    boxes of chains: annotations.zip
        Sentences/<image id>.txt      captions with phrases: annotations.zip
        train.txt  val.txt  test.txt  image ids
        UNRELATED_CAPTIONS            only for drop_unrelated_captions
        flickr30k-images/<image id>.jpg

A chain is one object: `boxes` are all its boxes, `box` is their union ("merged boxes"). The authors count pixels from
1; as in their own Python reader, 1 is subtracted from all four coordinates of a box, and the results are taken as the
box's edges (right and bottom exclusive). The text of a phrase without a box stays in the caption.
"""

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets

from .building import Copy, GroundingBuilder, Source, clip_boxes, describe_copies, merge_boxes
from .quoting import explain, quote
from .reading import check_text, has_words, image_of, parse_xml, read_frame, read_text
from .schema import FEATURES


# FEATURES: datasets <= 3.6 copies the siblings that a script itself imports, and no further
__all__ = ["FEATURES", "SOURCES", "Flickr30kEntities", "Flickr30kEntitiesConfig"]

SPLITS = ("train", "val", "test")
IMAGE_DIRS = ("flickr30k-images", "flickr30k_images", "f30k_images", "images", "flickr30k/f30k_images")
DISTRIBUTION = (
    "Annotations/ and Sentences/ are in annotations.zip, next to the lists train.txt, val.txt and test.txt and the "
    "file UNRELATED_CAPTIONS, at https://github.com/BryanPlummer/flickr30k_entities; the images are sent on "
    "request: https://shannon.cs.illinois.edu/DenotationGraph/. "
)
COPIES = (
    Copy("nlphuji/flickr30k", "images and captions without boxes, to be saved as <id>.jpg", "non-commercial research"),
)
DISTRIBUTION += describe_copies(COPIES)
# [/EN#<chain>/<type>[/<type>...] words]
PHRASE = re.compile(r"\[/EN#(\d+)((?:/[^\s/\[\]]+)*)(?: ([^\[\]]*))?\]")


@dataclass
class Flickr30kEntitiesConfig(datasets.BuilderConfig):
    """
    Args:
        image_dir (`str`, *optional*): folder of the images, in `data_dir` or absolute; absent: the first of
            `IMAGE_DIRS` that is there.
        drop_unrelated_captions (`bool`): leave out the captions that the authors list as not about their image, of
            which there are 21. The published metrics include them.
    """

    image_dir: str | None = None
    drop_unrelated_captions: bool = False


class Flickr30kEntities(GroundingBuilder):
    """Flickr30k Entities: captions of images, and boxes of their phrases. Rows have the order of the split lists."""

    BUILDER_CONFIG_CLASS = Flickr30kEntitiesConfig
    BUILDS_SPLITS_ALONE = True
    BUILDER_CONFIGS = [Flickr30kEntitiesConfig(name="flickr30k_entities", version=GroundingBuilder.VERSION)]
    DEFAULT_CONFIG_NAME = "flickr30k_entities"

    @classmethod
    def annotation_files(cls, data_dir: Path, config_name: str) -> list[Path]:
        """Return the split lists, the list of unrelated captions, and the folders of boxes and of captions."""
        names = ("Annotations", "Sentences", *(f"{split}.txt" for split in SPLITS), "UNRELATED_CAPTIONS")
        return [data_dir / name for name in names]

    def files_of(self, split: str) -> list[Path]:
        """Return the list of a split's images, and the folders of their captions and boxes."""
        return [Path(self.config.data_dir) / name for name in (f"{split}.txt", "Sentences", "Annotations")]

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        data_dir = Path(self.config.data_dir or "")
        annotations, sentences, *lists, unrelated = self.annotation_files(data_dir, self.config.name)
        optional = [unrelated] if self.config.drop_unrelated_captions else []
        self.require_splits(SPLITS)
        lists = {split: path for split, path in zip(SPLITS, lists, strict=True) if self.is_requested(split)}
        self.require_files([annotations, sentences, *lists.values(), *optional], DISTRIBUTION)
        image_ids = {split: read_image_ids(path) for split, path in lists.items()}
        everything = [image_id for split in lists for image_id in image_ids[split]]
        for folder, ending in ((annotations, "xml"), (sentences, "txt")):
            files = (folder / f"{image_id}.{ending}" for image_id in everything)
            self.require_images(files, DISTRIBUTION, f".{ending} files")
        image_dir = self._image_dir()
        self.require_images((image_dir / f"{image_id}.jpg" for image_id in everything), DISTRIBUTION)
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"split": split, "image_ids": image_ids[split]})
            for split in lists
        ]

    def _image_dir(self) -> Path:
        data_dir = Path(self.config.data_dir).absolute()
        names = IMAGE_DIRS if self.config.image_dir is None else (self.config.image_dir,)
        return next((data_dir / name for name in names if (data_dir / name).is_dir()), data_dir / names[0])

    def _generate_examples(self, split: str, image_ids: Iterable) -> Iterator[tuple[str, dict]]:
        data_dir, image_dir = Path(self.config.data_dir), self._image_dir()
        dropped, changed = Counter(), Counter()
        unrelated = set()
        if self.config.drop_unrelated_captions:
            unrelated = read_unrelated(data_dir / "UNRELATED_CAPTIONS")
        for image_id in image_ids:
            size, boxes = read_chain_boxes(data_dir / "Annotations" / f"{image_id}.xml")
            image = image_dir / f"{image_id}.jpg"
            frame = read_frame(image, size)
            width, height = frame.size
            scale = (width / size[0], height / size[1]) * 2
            if scale != (1.0, 1.0, 1.0, 1.0):
                changed["images have another size than annotated, boxes are scaled to it"] += 1
            objects = []
            for chain, chain_boxes in boxes.items():
                scaled = [[value * factor for value, factor in zip(box, scale, strict=True)] for box in chain_boxes]
                kept = clip_boxes(scaled, width, height, dropped, changed)
                if kept:
                    item = {"object_id": chain, "box": merge_boxes(kept), "boxes": kept}
                    objects.append({**item, "category": None, "segmentation": None})
            captions = read_captions(data_dir / "Sentences" / f"{image_id}.txt", image_id)
            sentences = boxed_sentences(captions, objects, unrelated, dropped)
            if not sentences:
                dropped["images without a boxed phrase"] += 1
                continue
            yield (
                image_id,
                {
                    "image_id": f"flickr30k_{image_id}",
                    "image": image_of(image, frame),
                    "width": width,
                    "height": height,
                    "objects": objects,
                    "sentences": sentences,
                },
            )
        self.report_dropped(split, dropped)
        self.report_changed(split, changed)


def boxed_sentences(captions: list, objects: list[dict], unrelated: set[str], dropped: Counter) -> list[dict]:
    """
    Return the sentences of an image, with the phrases that name an object, and fill in the objects'
    `category`, the first type that a phrase gives them.

    Args:
        captions (`list`): see `read_captions`.
        objects (`list[dict]`): of the schema; `object_id` is the chain.
        unrelated (`set[str]`): sentence ids to leave out.
        dropped (`Counter`): counts what is left out.
    """
    index_of = {item["object_id"]: index for index, item in enumerate(objects)}
    sentences = []
    for sentence_id, text, phrases in captions:
        if sentence_id in unrelated:
            dropped["captions that are not about their image"] += 1
            continue
        if text is None:
            dropped["captions whose brackets do not match"] += 1
            continue
        boxed = []
        for start, end, chain, types in phrases:
            if chain not in index_of or not has_words(text[start:end]):
                dropped["phrases without a box or without words"] += 1
                continue
            item = objects[index_of[chain]]
            item["category"] = item["category"] or next(iter(types), None)
            boxed.append({"start": start, "end": end, "objects": [index_of[chain]], "types": types})
        if boxed:
            sentences.append({"sentence_id": sentence_id, "text": text, "phrases": boxed})
        else:
            dropped["captions without a boxed phrase"] += 1
    return sentences


def parse_caption(line: str) -> tuple[str | None, list[tuple[int, int, str, list[str]]]]:
    """
    Parse a line of a sentence file into the plain caption and (start, end, chain, types) of each phrase, chain 0
    included; start and end are characters of the caption. The caption is None if brackets do not match.

    Example:

    ```python
    >>> from data_scripts.flickr30k_entities import parse_caption

    >>> parse_caption("[/EN#7/people A man] washes [/EN#9/vehicles/scene his bus] .")
    ('A man washes his bus .', [(0, 5, '7', ['people']), (13, 20, '9', ['vehicles', 'scene'])])

    ```"""
    line = " ".join(line.split())
    pieces, phrases, length, position = [], [], 0, 0
    for match in PHRASE.finditer(line):
        between, words = line[position : match.start()], (match[3] or "").strip()
        if not length or pieces[-1].endswith(" "):
            between = between.lstrip()  # one blank at most
        start = length + len(between)
        length = start + len(words)
        pieces += [piece for piece in (between, words) if piece]
        phrases.append((start, length, match[1], match[2].split("/")[1:]))
        position = match.end()
    rest = line[position:]
    text = "".join([*pieces, rest.lstrip() if not length or pieces[-1].endswith(" ") else rest]).rstrip()
    return (None, []) if "[/EN#" in text or "]" in text else (text, phrases)


def read_captions(path: Path, image_id: str) -> list[tuple[str, str | None, list]]:
    """
    Return (sentence id, plain caption, phrases) of each line of a sentence file, see `parse_caption`. A sentence id is
    `flickr30k_<image id>_<line>`, lines from 1, as UNRELATED_CAPTIONS counts them.

    Raises:
        ValueError: if a caption is refused by `check_text`.
    """
    content = path.read_bytes()
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:  # every byte has a letter there
        lines = content.decode("latin-1").split("\n")
    numbered = enumerate((line for line in lines if line.strip()), start=1)
    return [
        (f"flickr30k_{image_id}_{number}", *parse_caption(check_text(line, f"{str(path)!r}, caption {number}")))
        for number, line in numbered
    ]


def read_chain_boxes(path: Path) -> tuple[tuple[int, int], dict[str, list[list[float]]]]:
    """
    Return the annotated (width, height) and the boxes of each chain, xyxy in pixels from 0. Chain 0, and objects
    without a box, which are the complete scene or not in the image, are left out.

    Raises:
        ValueError: if the file is not an annotation, or has a document type, which can make a small file a huge one.
    """
    boxes = {}
    try:
        root = parse_xml(path)
        size = (int(read_number(root, "size/width")), int(read_number(root, "size/height")))
        if min(size) < 1:
            raise ValueError(f"its image has the size {quote(size)}")
        for item in root.iterfind("object"):
            bound = item.find("bndbox")
            if bound is None:
                continue
            box_xyxy = [read_number(bound, name) - 1 for name in ("xmin", "ymin", "xmax", "ymax")]
            for name in item.iterfind("name"):
                chain = (name.text or "0").strip()
                if chain != "0":
                    check_text(chain, "the name of an object")
                    boxes.setdefault(chain, []).append(box_xyxy)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{str(path)!r} is not an annotation of Flickr30k Entities: {explain(error)}.") from error
    return size, boxes


def read_number(element: ElementTree.Element, tag: str) -> float:
    """Return the number in a tag below an element; raise a ValueError if it is missing."""
    text = element.findtext(tag)
    if text is None:
        raise ValueError(f"<{element.tag}> has no <{tag}>")
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"<{tag}> of <{element.tag}> is {quote(text)}; expected a number") from error


def read_image_ids(path: Path) -> list[str]:
    """
    Return the image ids of a split list, in its order.

    Raises:
        ValueError: if a line is not an image id, or is listed twice.
    """
    image_ids = read_text(path).split()
    wrong = [image_id for image_id in image_ids if not re.fullmatch(r"\w+", image_id)]
    wrong += [image_id for image_id, count in Counter(image_ids).items() if count > 1]
    if wrong:
        raise ValueError(f"{str(path)!r}: {quote(wrong[0])} is not an image id, or is listed twice.")
    return image_ids


def read_unrelated(path: Path) -> set[str]:
    """
    Return the sentence ids of the captions that are not about their image. Lines are an image id and a caption
    number (from 1), after a first line with #.

    Raises:
        ValueError: if a line is neither.
    """
    sentence_ids = set()
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        if not re.fullmatch(r"\w+\s+\d+\s*", line):
            raise ValueError(f"{str(path)!r}, line {number}: {quote(line)} is not an image id and a caption's number.")
        sentence_ids.add("_".join(("flickr30k", *line.split())))
    return sentence_ids


# counted by phrases; the numbers of objects are not published by split
SOURCES = [
    Source(
        name="flickr30k_entities",
        builder=Flickr30kEntities,
        config_name="flickr30k_entities",
        splits=SPLITS,
        files=("Annotations/", "Sentences/", "train.txt", "val.txt", "test.txt", "flickr30k-images/"),
        distribution=DISTRIBUTION,
        counts={"train": (29_783, None, 427_193), "val": (1_000, None, 14_433), "test": (1_000, None, 14_481)},
        copies=COPIES,
        license="other",
        language="en",
    )
]
