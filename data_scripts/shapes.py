"""
Coloured shapes on textured grounds, with expressions that single one of them out: a generated dataset.

Four kinds of expression, named in each phrase's `types`:

- attribute: "the small red star", unique by size, colour and shape;
- place: "the leftmost circle", the extreme one of two or more;
- relation: "the star below the blue square", where the words before the relation fit two or more objects;
- caption: "the red circle is left of the star", several phrases, each unique by attributes.

On request three more, for none or several of the objects: see `data_scripts/questions.py`.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageDraw

from .building import GroundingBuilder, Source
from .masks import encode_mask
from .questions import Description, draw_questions
from .quoting import quote
from .reading import MAX_PIXELS
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


# MAX_PIXELS, encode_mask, quote: datasets <= 3.6 copies the siblings that a script itself imports, and no further
__all__ = ["FEATURES", "MAX_PIXELS", "SOURCES", "Shapes", "encode_mask", "quote"]

# few of each, so that a model from scratch learns what every word means within minutes
COLORS = {"red": (215, 45, 40), "green": (45, 165, 65), "blue": (45, 85, 215)}
SHAPES = ("circle", "square", "star")
SIZES = {"small": (0.1, 0.12), "large": (0.17, 0.21)}  # radius, in shorter sides of an image
MIN_SCALE = 0.5  # smaller objects have too few pixels for their shape to be seen
MAX_DIAMETER = 0.85  # of an object, in shorter sides of an image
MAX_OBJECTS = 6
SPLITS = ("train", "validation", "test")

REPEATED_COLORS = 1 / 12

SUPERSAMPLING = 4


@dataclass
class ShapesConfig(SceneConfig):
    """
    Args:
        image_size (`int`): side of a square of an image's area in pixels, at least 32.
        min_aspect_ratio, max_aspect_ratio (`float`): width / height is drawn between these, log-uniformly: images
            have round(image_size * sqrt(ratio)) x round(image_size / sqrt(ratio)) pixels. From 0.25 to 4.
        num_train, num_validation, num_test (`int`): images per split, each with about seven expressions.
        max_objects (`int`): objects per image, from 2 to this number, which is at most 6. Scenes of more objects are
            given up more often, because of large objects. The colours of more than three objects repeat.
        object_scale (`float`): factor of the size of all objects, at most what fits into the shorter side of an image.
        min_visible (`float`): fraction of an object that objects in front of it leave visible, at least 0.1.
        repeated_colors (`float`): share of the training scenes in which a colour may come twice, in steps of 1/12. In
            the others a colour is enough to name an object; here expressions depend on its size and shape, which
            takes longer to learn. The other splits always have 1/12, so that results are comparable.
        absent_questions, half_right_questions, plural_questions (`int`): most expressions per image that fit nothing,
            fit nothing although each word fits something, or fit several objects.
        seed (`int`): another seed generates another dataset.
    """

    max_objects: int = 3
    object_scale: float = 1.0
    repeated_colors: float = REPEATED_COLORS

    def validate(self) -> None:
        """Validate the settings; raise a ValueError for one that no image can be generated with."""
        super().validate()
        if not 2 <= self.max_objects <= MAX_OBJECTS:
            raise ValueError(f"max_objects={self.max_objects} must be from 2 to {MAX_OBJECTS}.")
        limit = MAX_DIAMETER / (2 * SIZES["large"][1])
        if not MIN_SCALE <= self.object_scale <= limit:
            raise ValueError(
                f"object_scale={self.object_scale} must be from {MIN_SCALE} to {limit:.2f}, where the largest object "
                "fits into the shorter side of an image."
            )
        if not 0 <= self.repeated_colors <= 1:
            raise ValueError(f"repeated_colors={self.repeated_colors} must be from 0 to 1, a share of the scenes.")


class Shapes(GroundingBuilder):
    """Builder of the dataset; every image is a function of (seed, split, index)."""

    BUILDER_CONFIG_CLASS = ShapesConfig
    BUILDER_CONFIGS = [ShapesConfig(name="default", version=GroundingBuilder.VERSION)]
    DEFAULT_CONFIG_NAME = "default"

    def _info(self) -> datasets.DatasetInfo:
        self.config.validate()
        return datasets.DatasetInfo(description=__doc__, features=FEATURES)

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        return [
            datasets.SplitGenerator(
                name=split, gen_kwargs={"split": split, "indices": list(range(getattr(self.config, f"num_{split}")))}
            )
            for split in SPLITS
        ]

    def _generate_examples(self, split: str, indices: Iterable[int]) -> Iterator[tuple[str, dict]]:
        for index in indices:
            yield index, draw_row(split, index, self.config)


@dataclass
class Shape:
    """One object of a scene; centre and radius in pixels, covered share of each pixel, middle of the visible part."""

    size: str
    color: str
    shape: str
    center: tuple[float, float]
    radius: float
    alpha: np.ndarray | None = None
    visible: np.ndarray | None = None
    middle: tuple[float, float] | None = None

    def fits(self, size: str | None, color: str | None, shape: str | None) -> bool:
        """Return whether the shape has these attributes, None being any."""
        return size in (None, self.size) and color in (None, self.color) and shape in (None, self.shape)


def draw_row(split: str, index: int, config: ShapesConfig) -> dict:
    """
    Place shapes until there are enough sentences about them, then draw and describe the scene.

    Raises:
        ValueError: if none of many scenes has enough, because of the settings.
    """
    rng = np.random.default_rng([config.seed, SPLITS.index(split), index])
    width, height = draw_image_size(rng, config)
    repeated_colors = config.repeated_colors if split == "train" else REPEATED_COLORS
    for _ in range(MAX_SCENES):
        shapes = place_shapes(rng, width, height, config, repeated_colors)
        sentences = write_sentences(rng, shapes, config.image_size) if shapes else []
        if len(sentences) >= MIN_SENTENCES:
            break
    else:
        raise ValueError(
            f"None of {MAX_SCENES} scenes has room for its objects and {MIN_SENTENCES} unambiguous sentences: lower "
            f"object_scale={config.object_scale}, min_visible={config.min_visible} or "
            f"max_objects={config.max_objects}."
        )
    image = draw_scene(rng, width, height, shapes)
    if config.has_questions:
        # another generator leaves the images and the sentences above as they are
        sentences += ask_about_shapes(
            np.random.default_rng([config.seed, SPLITS.index(split), index, 1]), shapes, config
        )
    objects = [(shape.shape, shape.visible) for shape in shapes]
    return make_scene_row(f"shapes_{split}_{index:06d}", image, objects, sentences)


def place_shapes(
    rng: np.random.Generator, width: int, height: int, config: ShapesConfig, repeated_colors: float
) -> list[Shape]:
    """
    Draw positions of two or more shapes, later ones in front; return none if one hides too much of another. The share
    `repeated_colors` of the scenes may have a colour twice.
    """
    count = rng.integers(2, config.max_objects + 1)
    may_repeat = bool(rng.integers(12) < 12 * repeated_colors)
    colors = rng.choice(list(COLORS), size=count, replace=may_repeat or count > len(COLORS))
    num_positions = MAX_POSITIONS if config.max_objects > 3 else 1  # the images of up to three stay the same
    shapes = []
    for color in colors:
        size, kind = str(rng.choice(list(SIZES))), str(rng.choice(SHAPES))
        radius = rng.uniform(*SIZES[size]) * config.object_scale * min(width, height)
        for _ in range(num_positions):
            center = tuple(rng.uniform(radius + 1, np.array([width, height]) - radius - 1))
            shape = Shape(size, str(color), kind, center, radius)
            shape.alpha = draw_alpha(shape, width, height)
            if place_in_front(shape, shapes, config.min_visible):
                break
        else:
            return []
    for shape in shapes:
        shape.middle = middle_of(box_of_mask(shape.visible))
    return shapes


def place_in_front(shape: Shape, others: list[Shape], min_visible: float) -> bool:
    """Add a shape in front of others and return True, unless it leaves too little of one visible."""
    shape.visible = shape.alpha > 0.5
    remaining = [other.visible & ~shape.visible for other in others]
    if any(
        visible.sum() < min_visible * (other.alpha > 0.5).sum()
        for visible, other in zip(remaining, others, strict=True)
    ):
        return False
    for visible, other in zip(remaining, others, strict=True):
        other.visible = visible
    others.append(shape)
    return True


def draw_scene(rng: np.random.Generator, width: int, height: int, shapes: list[Shape]) -> Image.Image:
    """Draw an image of shapes, later ones in front."""
    canvas = draw_ground(rng, width, height)
    for shape in shapes:
        shade = np.array(COLORS[shape.color]) + rng.normal(0, 8, size=3)
        grain = rng.normal(0, 6, size=(height, width, 1))
        canvas += shape.alpha[..., None] * (shade + grain - canvas)
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


def draw_alpha(shape: Shape, width: int, height: int) -> np.ndarray:
    """Return the share of each pixel that the shape covers, (height, width) in 0..1."""
    left, top = (int(middle - shape.radius) - 1 for middle in shape.center)
    side = math.ceil(2 * shape.radius) + 3
    window = (min(side, width - left), min(side, height - top))
    center = (np.array(shape.center) - (left, top)) * SUPERSAMPLING
    radius = shape.radius * SUPERSAMPLING
    image = Image.new("L", (window[0] * SUPERSAMPLING, window[1] * SUPERSAMPLING))
    draw = ImageDraw.Draw(image)

    if shape.shape == "circle":
        draw.ellipse([*(center - 0.9 * radius), *(center + 0.9 * radius)], fill=255)
    elif shape.shape == "square":
        draw.rectangle([*(center - 0.8 * radius), *(center + 0.8 * radius)], fill=255)
    else:  # star
        angles = np.arange(10) * np.pi / 5
        points = np.stack((np.sin(angles), -np.cos(angles)), axis=1) * np.array([1, 0.45] * 5)[:, None]
        draw.polygon([tuple(point) for point in center + radius * points], fill=255)
    alpha = np.zeros((height, width))
    alpha[top : top + window[1], left : left + window[0]] = np.asarray(image.reduce(SUPERSAMPLING)) / 255
    return alpha


def describe_shape(attributes: tuple) -> str:
    """Describe (size, color, shape), each of which may be None: "small red star", "red shape"."""
    size, color, shape = attributes
    return " ".join(word for word in (size, color, shape or "shape") if word)


def attributes_of(shape: Shape) -> list[tuple]:
    """Return every description of an object by its attributes."""
    return [
        (size, color, kind)
        for size in (None, shape.size)
        for color in (None, shape.color)
        for kind in (None, shape.shape)
    ]


def weight_of(attributes: tuple) -> float:
    """Return how often a description (size, color, shape) is drawn, relative to others."""
    size, color, _ = attributes
    return (12.0 if color else 1.0) * (0.2 if size else 1.0)


def draw_description(rng: np.random.Generator, choices: list[tuple]) -> tuple:
    """Draw one of several descriptions; the colour is mostly named, and the size only if required."""
    weights = np.array([weight_of(words) for words in choices])
    return choices[rng.choice(len(choices), p=weights / weights.sum())]


def matches(shapes: list[Shape], attributes: tuple) -> list[int]:
    """Return the indices of the shapes that have these attributes (size, color, shape), None being any."""
    return [index for index, shape in enumerate(shapes) if shape.fits(*attributes)]


def unique_attributes(shapes: list[Shape]) -> list[list[tuple]]:
    """Return the descriptions of each shape that fit no other one."""
    return [
        [words for words in attributes_of(shape) if any(words) and matches(shapes, words) == [index]]
        for index, shape in enumerate(shapes)
    ]


def choose_anchor_words(choices: list[tuple]) -> tuple:
    """Choose the fullest description that is not the longest: two words where they do, else what there is."""
    return min(choices, key=lambda words: abs(2 - sum(word is not None for word in words)))


def write_sentences(rng: np.random.Generator, shapes: list[Shape], image_size: int) -> list[dict]:
    """Write up to seven unambiguous sentences, of fewer kinds if the scene does not allow all."""
    margin = MARGIN * image_size
    by_attribute = unique_attributes(shapes)
    written = {
        "attribute": [
            [(f"the {describe_shape(draw_description(rng, choices))}", index)]
            for index, choices in enumerate(by_attribute)
            if choices
        ],
        "place": places(shapes, margin),
        "relation": relations(shapes, by_attribute, margin),
        "caption": captions(rng, shapes, by_attribute, margin),
    }
    return select_sentences(rng, written)


def places(shapes: list[Shape], margin: float) -> list:
    """Describe the extreme one of two or more shapes, by a margin: "the leftmost red shape"."""
    found = []
    middles = [shape.middle for shape in shapes]
    descriptions = sorted({words for shape in shapes for words in attributes_of(shape)}, key=str)
    for words in descriptions:
        candidates = matches(shapes, words)
        for place in PLACES:
            index = find_extreme(middles, candidates, place, margin)
            if index is not None:
                found.append([(f"the {place} {describe_shape(words)}", index)])
    return found


def relations(shapes: list[Shape], by_attribute: list, margin: float) -> list:
    """Describe one of two or more shapes by its relation to another: "the star below the blue square"."""
    found = []
    middles = [shape.middle for shape in shapes]
    descriptions = sorted({words for shape in shapes for words in attributes_of(shape)}, key=str)
    for anchor, anchor_words in enumerate(by_attribute):
        if not anchor_words:
            continue
        told_by = choose_anchor_words(anchor_words)
        for words in descriptions:
            candidates = [index for index in matches(shapes, words) if index != anchor]
            for relation in RELATIONS:
                index = find_related(middles, candidates, relation, anchor, margin)
                if index is not None:
                    found.append([(f"the {describe_shape(words)} {relation} the {describe_shape(told_by)}", index)])
    return found


def captions(rng: np.random.Generator, shapes: list[Shape], by_attribute: list, margin: float) -> list:
    """Describe several unique shapes: "the red circle is left of the star and above the small cross"."""
    described = [index for index, choices in enumerate(by_attribute) if choices]
    found = []
    for first in described:
        links = draw_links(rng, [shape.middle for shape in shapes], described, first, margin)
        if not links:
            continue

        def name(index: Any) -> str:
            return f"the {describe_shape(draw_description(rng, by_attribute[index]))}"

        parts = [(name(first), first)]
        for number, (relation, other) in enumerate(links):
            parts += [(f" {'and' if number else 'is'} {relation} ", None), (name(other), other)]
        found.append(parts)
    return found


def ask_about_shapes(rng: np.random.Generator, shapes: list[Shape], config: ShapesConfig) -> list[dict]:
    """Draw the expressions for none or several shapes that the settings ask for."""
    descriptions = {"known": [], "absent": [], "half_right": []}
    for words in itertools.product((None, *SIZES), (None, *COLORS), (None, *SHAPES)):
        size, color, kind = words
        objects = matches(shapes, words)
        text = describe_shape(words)
        length = sum(word is not None for word in words)
        description = Description(text, f"{text}s", objects, length, weight_of(words))
        if objects:
            descriptions["known"].append(description)
        elif not (matches(shapes, (None, color, None)) and matches(shapes, (None, None, kind))):
            descriptions["absent"].append(description)
        elif matches(shapes, (size, None, None)):  # else it is not clear that a shape is not small, or not large
            descriptions["half_right"].append(description)
    anchors = [
        (describe_shape(choose_anchor_words(choices)), index)
        for index, choices in enumerate(unique_attributes(shapes))
        if choices
    ]
    return draw_questions(rng, config, [shape.middle for shape in shapes], descriptions, anchors)


SOURCES = [
    Source(
        "shapes",
        Shapes,
        "default",
        SPLITS,
        (),
        "Drawn here; there is nothing to download.",
        license="apache-2.0",
        language="en",
    )
]
