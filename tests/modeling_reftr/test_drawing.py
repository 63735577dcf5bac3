"""Drawings of answers: position and color of each box."""

import numpy as np
from PIL import Image

from modeling_reftr.drawing_reftr import draw_answers


def find_color(drawing: np.ndarray, color: tuple[int, int, int], height: int) -> list[int]:
    """Return the left, top, right and bottom pixel of a color in the image, without the labels below it."""
    rows, columns = np.nonzero((drawing[:height] == color).all(axis=-1))
    return [columns.min(), rows.min(), columns.max(), rows.max()]


def test_draw_answers_scales_boxes_and_assigns_colors():
    image = Image.new("RGB", (100, 50), "gray")
    boxes = [[10, 5, 40, 30], [90, 45, 60, 20], None]  # the second from its opposite corner
    drawing = np.asarray(draw_answers(image, boxes, ["one", "two", "three"], [[50, 10, 55, 20]], width=400))
    assert find_color(drawing, (216, 27, 189), 200) == [40, 20, 160, 120]
    assert find_color(drawing, (0, 152, 168), 200) == [240, 80, 360, 180]
    assert find_color(drawing, (255, 255, 255), 200) == [200, 40, 220, 80]
    assert (drawing[200:] == (230, 119, 0)).all(axis=-1).any(), "the label of the third"
