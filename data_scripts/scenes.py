"""Shared by the builders that generate their images: settings, sizes of images, and textured grounds."""

import math
from dataclasses import dataclass

import datasets
import numpy as np
from PIL import Image

from .reading import MAX_PIXELS


MAX_ASPECT_RATIO = 4.0  # shorter sides than half of `image_size` leave no room for objects


@dataclass
class SceneConfig(datasets.BuilderConfig):
    """
    Args:
        image_size (`int`): side of a square of an image's area in pixels, at least 32.
        min_aspect_ratio, max_aspect_ratio (`float`): width / height is drawn between these, log-uniformly: images
            have round(image_size * sqrt(ratio)) x round(image_size / sqrt(ratio)) pixels. From 0.25 to 4.
        num_train, num_validation, num_test (`int`): images per split, each with about six expressions.
        seed (`int`): another seed generates another dataset.
    """

    image_size: int = 96
    min_aspect_ratio: float = 1.0
    max_aspect_ratio: float = 1.0
    num_train: int = 5000
    num_validation: int = 200
    num_test: int = 200
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
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative.")


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
