"""Drawings of answers: each box in its color and on its place."""

import numpy as np
from PIL import Image

from modeling_reftr.drawing_reftr import draw_answers


def place_of(picture: np.ndarray, color: tuple[int, int, int], height: int) -> list[int]:
    """Left, top, right and bottom pixel of a color in the image, without the words under it."""
    rows, columns = np.nonzero((picture[:height] == color).all(axis=-1))
    return [columns.min(), rows.min(), columns.max(), rows.max()]


def test_boxes_are_drawn_to_scale_each_in_its_color():
    image = Image.new("RGB", (100, 50), "gray")
    boxes = [[10, 5, 40, 30], [90, 45, 60, 20], None]  # the second from its other corner
    picture = np.asarray(draw_answers(image, boxes, ["one", "two", "three"], [[50, 10, 55, 20]], width=400))
    assert place_of(picture, (216, 27, 189), 200) == [40, 20, 160, 120]
    assert place_of(picture, (0, 152, 168), 200) == [240, 80, 360, 180]
    assert place_of(picture, (255, 255, 255), 200) == [200, 40, 220, 80]
    assert (picture[200:] == (230, 119, 0)).all(axis=-1).any(), "the words of the third"
