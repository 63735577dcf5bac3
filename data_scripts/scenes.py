"""
Shared by the builders that generate their images: settings, sizes of images, textured grounds, and sentences.

The kinds of expressions, `COUNTS`, are those of `data_scripts/shapes.py`; `data_scripts/questions.py` draws those for
none or several objects.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
from PIL import Image

from .masks import encode_mask, to_segmentation
from .reading import MAX_PIXELS


PLACES = {"leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "bottommost": (1, -1)}  # axis, direction
RELATIONS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}
COUNTS = {"attribute": 2, "place": 2, "relation": 2, "caption": 1}  # kind -> most sentences per image
MIN_SENTENCES = 3  # per image
MARGIN = 0.08  # in `image_size`: what is called left is left by this much, what is not, is not
MAX_ASPECT_RATIO = 4.0  # shorter sides than half of `image_size` leave no room for objects
MAX_POSITIONS = 20  # that are tried before an object is given up
MAX_SCENES = 1000  # that are tried before an image is given up


@dataclass
class SceneConfig(datasets.BuilderConfig):
    """
    Args:
        image_size (`int`): side of a square of an image's area in pixels, at least 32.
        min_aspect_ratio, max_aspect_ratio (`float`): width / height is drawn between these, log-uniformly: images
            have round(image_size * sqrt(ratio)) x round(image_size / sqrt(ratio)) pixels. From 0.25 to 4.
        num_train, num_validation, num_test (`int`): images per split, each with about seven expressions.
        min_visible (`float`): fraction of an object that objects in front of it leave visible, at least 0.1.
        absent_questions, half_right_questions, plural_questions (`int`): most expressions per image that fit nothing,
            fit nothing although each word fits something, or fit several objects.
        seed (`int`): another seed generates another dataset.
    """

    image_size: int = 96
    min_aspect_ratio: float = 1.0
    max_aspect_ratio: float = 1.0
    num_train: int = 5000
    num_validation: int = 200
    num_test: int = 200
    min_visible: float = 0.6
    absent_questions: int = 0
    half_right_questions: int = 0
    plural_questions: int = 0
    seed: int = 0

    def validate(self) -> None:
        """Validate the settings; raise a ValueError for one that no image can be generated with."""
        if self.image_size < 32:
            raise ValueError(f"image_size={self.image_size} must be at least 32 pixels.")
        if self.image_size**2 > MAX_PIXELS:
            raise ValueError(f"image_size={self.image_size}: images have no more than {MAX_PIXELS:,} pixels.")
        if not 1 / MAX_ASPECT_RATIO <= self.min_aspect_ratio <= self.max_aspect_ratio <= MAX_ASPECT_RATIO:
            raise ValueError(
                f"min_aspect_ratio={self.min_aspect_ratio} and max_aspect_ratio={self.max_aspect_ratio} must be from "
                f"{1 / MAX_ASPECT_RATIO} to {MAX_ASPECT_RATIO}, the first not above the second."
            )
        for name in ("num_train", "num_validation", "num_test"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 0.1 <= self.min_visible <= 1:
            raise ValueError(f"min_visible={self.min_visible} must be from 0.1 to 1.")
        for name in ("absent_questions", "half_right_questions", "plural_questions"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0: the most expressions per image.")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative.")

    @property
    def has_questions(self) -> bool:
        """Whether there are expressions that fit nothing, or several objects."""
        return self.absent_questions + self.half_right_questions + self.plural_questions > 0


def draw_image_size(rng: np.random.Generator, config: SceneConfig) -> tuple[int, int]:
    """
    Draw the (width, height) of an image, see `SceneConfig`.

    Example:

    ```python
    >>> import numpy as np
    >>> from data_scripts.scenes import SceneConfig, draw_image_size

    >>> draw_image_size(np.random.default_rng(0), SceneConfig(image_size=64, min_aspect_ratio=2, max_aspect_ratio=2))
    (91, 45)

    ```"""
    ratio = config.min_aspect_ratio
    if ratio < config.max_aspect_ratio:  # a constant ratio does not advance the rng
        ratio = math.exp(rng.uniform(math.log(ratio), math.log(config.max_aspect_ratio)))
    return round(config.image_size * math.sqrt(ratio)), round(config.image_size / math.sqrt(ratio))


def draw_ground(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Draw a dull ground with blotches, stripes and grain, (height, width, 3) in 0..255."""
    base = rng.uniform(70, 170) + rng.normal(0, 10, size=3)
    blotches = Image.fromarray(rng.normal(0, 20, size=(5, 5)).astype(np.float32))
    blotches = np.asarray(blotches.resize((width, height), Image.Resampling.BICUBIC))
    y, x = np.mgrid[:height, :width]
    angle, period = rng.uniform(0, np.pi), rng.uniform(0.1, 0.3) * math.sqrt(width * height)
    stripes = 10 * np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period)
    grain = rng.normal(0, 5, size=(height, width))
    return base + (blotches + stripes + grain)[..., None]


def middle_of(box: Sequence[float]) -> tuple[float, float]:
    """Return the middle of the box of an object's visible part, which places and relations refer to."""
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def box_of_mask(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the smallest box (xyxy) that contains a mask (height, width) with at least one pixel."""
    rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def find_extreme(middles: list, candidates: list[int], place: str, margin: float) -> int | None:
    """Return the extreme candidate as in `PLACES`; None unless there are two or more, and it leads by the margin."""
    axis, direction = PLACES[place]
    order = sorted(candidates, key=lambda index: direction * middles[index][axis])
    if len(order) < 2 or direction * (middles[order[1]][axis] - middles[order[0]][axis]) < margin:
        return None
    return order[0]


def find_related(middles: list, candidates: list[int], relation: str, anchor: int, margin: float) -> int | None:
    """
    Return the candidate in a relation of `RELATIONS` to another object; None unless there are two or more, one of them
    is in the relation by the margin, and none of the others is.
    """
    axis, direction = RELATIONS[relation]
    distances = {index: direction * (middles[anchor][axis] - middles[index][axis]) for index in candidates}
    inside = [index for index, distance in distances.items() if distance >= margin]
    outside = [index for index, distance in distances.items() if distance <= 0]
    is_unique = len(distances) > 1 and len(inside) == 1 and len(outside) == len(distances) - 1
    return inside[0] if is_unique else None


def draw_links(rng: np.random.Generator, middles: list, described: list[int], first: int, margin: float) -> list:
    """Draw up to two (relation, other object) that the first object is in, for a caption."""
    related = [
        (relation, other)
        for other in described
        for relation, (axis, direction) in RELATIONS.items()
        if other != first and direction * (middles[other][axis] - middles[first][axis]) >= margin
    ]
    links = []
    for choice in rng.permutation(len(related)):
        relation, other = related[choice]
        if other not in [linked for _, linked in links] and len(links) < 2:
            links.append((relation, other))
    return links


def select_sentences(rng: np.random.Generator, written: dict[str, list]) -> list[dict]:
    """Select sentences from kind -> [[(text, object index or None), ...], ...], few of each kind (`COUNTS`)."""
    sentences = []
    for kind, count in COUNTS.items():
        choices = written[kind]
        # an object is asked for before one is asked for twice
        asked = set()
        for choice in rng.permutation(len(choices)):
            parts = choices[choice]
            index = parts[0][1]
            if index not in asked and len(asked) < count:
                asked.add(index)
                sentences.append(join_parts(parts, kind))
    return sentences


def join_parts(parts: list, kind: str) -> dict:
    """Join [(text, object index or None), ...] to a sentence with a phrase for each part that names an object."""
    text, phrases = "", []
    for words, index in parts:
        if index is not None:
            span = {"start": len(text), "end": len(text) + len(words)}
            phrases.append({**span, "objects": [index], "types": [kind]})
        text += words
    return {"text": text, "phrases": phrases}


def make_scene_row(image_id: str, image: Image.Image, objects: list[tuple], sentences: list[dict]) -> dict:
    """Return a row of `schema.FEATURES` from an image, its objects (category, visible mask) and its sentences."""
    png = io.BytesIO()
    image.save(png, format="PNG")
    rows = []
    for number, (category, mask) in enumerate(objects):
        box = list(box_of_mask(mask))
        segmentation = to_segmentation(encode_mask(mask))
        named = {"object_id": f"{image_id}_{number}", "category": category}
        rows.append({**named, "box": box, "boxes": [box], "segmentation": segmentation})
    return {
        "image_id": image_id,
        "image": {"bytes": png.getvalue(), "path": f"{image_id}.png"},
        "width": image.width,
        "height": image.height,
        "objects": rows,
        "sentences": [
            {**sentence, "sentence_id": f"{image_id}_{number}"} for number, sentence in enumerate(sentences)
        ],
    }
