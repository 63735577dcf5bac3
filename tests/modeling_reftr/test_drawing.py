"""Drawings of answers: positions and colors of boxes, masks and labels, on any image and in bounded size."""

import colorsys
import itertools
import time

import numpy as np
import pytest
from PIL import Image

from modeling_reftr import drawing_reftr
from modeling_reftr.drawing_reftr import COLORS, EDGE, draw_answers, make_grid


HUES = [tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue / 12, 1, 1)) for hue in range(12)]
BACKGROUNDS = ["white", "black", "gray", *HUES, *COLORS]


def rgb(color: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(color[1:]))


def find_color(drawing: np.ndarray, color: tuple[int, int, int], height: int) -> list[int]:
    """Return the left, top, right and bottom pixel of a color in the image, without the text below it."""
    rows, columns = np.nonzero((drawing[:height] == color).all(axis=-1))
    return [columns.min(), rows.min(), columns.max(), rows.max()]


def make_disc(center: tuple[int, int], radius: int, side: int = 100) -> np.ndarray:
    ys, xs = np.mgrid[:side, :side]
    return (xs - center[0]) ** 2 + (ys - center[1]) ** 2 < radius**2


def find_luminance(drawing: Image.Image) -> np.ndarray:
    return np.asarray(drawing.convert("L")).astype(int)


@pytest.fixture
def tags(monkeypatch):
    """Record the rectangle and the lines of each tag that is drawn."""
    drawn, draw_tag = [], drawing_reftr.draw_tag

    def record(draw, place, texts, *rest):
        drawn.append((place, texts))
        draw_tag(draw, place, texts, *rest)

    monkeypatch.setattr(drawing_reftr, "draw_tag", record)
    return drawn


def have_overlap(one, other) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


# boxes


def test_draw_answers_scales_boxes_and_assigns_colors():
    image = Image.new("RGB", (100, 50), "gray")
    boxes = [[10, 5, 40, 30], [90, 45, 60, 20], None]  # the second from its opposite corner
    drawing = np.asarray(draw_answers(image, boxes, ["", "", "three"], width=400))
    assert find_color(drawing, (216, 27, 189), 200) == [40, 20, 160, 120]
    assert find_color(drawing, (0, 152, 168), 200) == [240, 80, 360, 180]
    assert (drawing[200:] == (230, 119, 0)).all(axis=-1).any(), "the third is listed below"


def test_draw_answers_keeps_boxes_at_borders_within_image():
    drawing = np.asarray(draw_answers(Image.new("RGB", (100, 100), COLORS[0]), [[-9, 0, 100, 120]], [""], width=400))
    for side in (drawing[: EDGE + 3, 200], drawing[200, : EDGE + 3], drawing[-EDGE - 3 :, 200]):
        assert {(0, 0, 0), (255, 255, 255), rgb(COLORS[0])} <= {tuple(pixel) for pixel in side.tolist()}


def test_draw_answers_dashes_true_boxes_over_predicted_ones():
    image = Image.new("RGB", (100, 100), "gray")
    drawing = np.asarray(draw_answers(image, [[20, 20, 80, 80]], [""], [[20, 20, 80, 80]], width=400))
    colors = {tuple(pixel) for pixel in drawing[80, 80:320].tolist()}
    assert {(255, 255, 255), (0, 0, 0), rgb(COLORS[0])} <= colors
    assert drawing.shape[0] > 400, "the legend is below the image"
    assert draw_answers(image, [[20, 20, 80, 80]], [""], width=400).height == 400


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_true_box_is_visible_on_any_color(background):
    drawing = draw_answers(Image.new("RGB", (100, 100), background), [], [], [[20, 20, 80, 80]], width=400)
    luminance = find_luminance(drawing)[75:86, 80:320]
    assert np.ptp(luminance) > 200, "white dashes with black edges"


# masks


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_mask_contour_is_visible_on_any_color(background):
    """Every direction from the center crosses a light and a dark line, also on the color of the mask itself."""
    image = Image.new("RGB", (100, 100), background)
    for index in range(len(COLORS)):
        masks = [None] * index + [make_disc((50, 50), 25)]
        luminance = find_luminance(
            draw_answers(image, [None] * (index + 1), [""] * (index + 1), masks=masks, width=400)
        )
        for angle in np.linspace(0, 2 * np.pi, 16, endpoint=False):
            steps = np.arange(85, 115)
            xs, ys = (200 + steps * np.cos(angle)).astype(int), (200 + steps * np.sin(angle)).astype(int)
            assert np.ptp(luminance[ys, xs]) > 200


def test_draw_answers_dims_outside_of_all_masks():
    masks = [make_disc((25, 25), 15), None, make_disc((70, 70), 15)]
    drawing = np.asarray(
        draw_answers(Image.new("RGB", (100, 100), "white"), [None] * 3, [""] * 3, masks=masks, width=400)
    )
    assert drawing[100, 100].min() > 200
    assert drawing[280, 280].min() > 180
    assert drawing[200, 380].max() < 160
    blank = draw_answers(Image.new("RGB", (100, 100), "white"), [None], [""], masks=[np.zeros((100, 100), bool)])
    assert np.asarray(blank)[:320].min() == 255, "nothing is dimmed without a mask"


def test_mask_of_one_pixel_of_large_image_is_drawn():
    mask = np.zeros((2000, 2000), bool)
    mask[1000, 1000] = True
    drawing = np.asarray(draw_answers(Image.new("RGB", (2000, 2000), "gray"), [None], [""], masks=[mask]))
    assert np.ptp(drawing[150:170, 150:170]) > 200


def test_true_mask_has_white_contour():
    drawing = np.asarray(
        draw_answers(Image.new("RGB", (100, 100), "gray"), [], [], true_masks=[make_disc((50, 50), 25)], width=400)
    )
    assert find_color(drawing, (255, 255, 255), 400) == pytest.approx([100, 100, 300, 300], abs=5)


# labels


def test_labels_of_close_boxes_do_not_overlap(tags):
    boxes = [[40, 40, 60, 60], [42, 42, 62, 62], [38, 44, 58, 64], [44, 38, 64, 58]]
    phrases = ["the red cup", "the blue cup", "the green cup", "the left cup"]
    draw_answers(Image.new("RGB", (100, 100), "gray"), boxes, phrases, width=340)
    assert [texts for _, texts in tags] == [[phrase] for phrase in phrases]
    for (one, _), (other, _) in itertools.combinations(tags, 2):
        assert not have_overlap(one, other)


@pytest.mark.parametrize(
    "box", [[0, 0, 100, 100], [0, 0, 5, 5], [95, 95, 100, 100], [0, 95, 5, 100], [95, 0, 99, 4], [-50, 40, 0, 60]]
)
def test_labels_stay_within_image(tags, box):
    drawing = np.asarray(draw_answers(Image.new("RGB", (100, 100), "gray"), [box], ["the cup left of the man"]))
    ((place, _),) = tags
    assert place[0] >= 0
    assert place[1] >= 0
    assert place[2] <= 320
    assert place[3] <= 320
    x0, y0, x1, y1 = place.astype(int)
    colors = {tuple(pixel) for pixel in drawing[y0:y1, x0:x1].reshape(-1, 3).tolist()}
    assert {rgb(COLORS[0]), (255, 255, 255)} <= colors, "white text on the color of the box"


@pytest.mark.parametrize("color", COLORS)
def test_label_text_contrasts_with_its_tag(color):
    def luminance(value):
        channels = [part / 255 for part in value]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in channels]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    text = {"white": 1.0, "black": 0.0}[drawing_reftr.contrasting(color)]
    low, high = sorted((text, luminance(rgb(color))))
    assert (high + 0.05) / (low + 0.05) > 3


def test_long_label_gets_number_and_is_listed(tags):
    long = "the woman with the striped umbrella who is standing left of the second bus behind the tree"
    image = Image.new("RGB", (100, 100), "gray")
    drawing = draw_answers(image, [[10, 10, 50, 50], [60, 60, 90, 90]], [long, "the bus"])
    assert [texts for _, texts in tags] == [["1"], ["the bus"]]
    assert drawing.height > 320 + 20


def test_draw_answers_marks_failure_in_red():
    image = Image.new("RGB", (100, 100), "gray")
    drawing = np.asarray(draw_answers(image, [[10, 10, 50, 50]], ["a"], failure="failure, IoU 0.12"))
    assert (drawing == (208, 0, 0)).all(axis=-1)[320:].mean() > 0.5
    assert (drawing[:320, 0] == (208, 0, 0)).all()
    assert not (np.asarray(draw_answers(image, [[10, 10, 50, 50]], ["a"])) == (208, 0, 0)).all(axis=-1).any()


# sizes


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (64, 8), (8, 64), (1, 5000), (5000, 1), (25, 200), (4000, 3000)])
def test_draw_answers_accepts_any_size(size):
    box, mask = [0, 0, size[0] / 2, size[1] / 2], np.ones(size[::-1], bool)
    for phrase in ("the red cup", "the red cup " * 50):
        drawing = draw_answers(Image.new("RGB", size, "gray"), [box], [phrase], [box], masks=[mask], true_masks=[mask])
        assert drawing.width == 320
        assert drawing.height <= 3 * 320 + 50 + 20 * len(phrase) / 20


def test_draw_answers_upscales_smoothly():
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, 32:] = 255
    row = np.asarray(draw_answers(Image.fromarray(pixels), [], [], width=320))[160, :, 0].astype(int)
    assert np.abs(np.diff(row)).max() < 128, "no steps of whole pixels"
    mask = make_disc((32, 32), 20, 64)
    stencil = np.asarray(drawing_reftr.make_stencil(mask, (320, 320))) > 0
    ends = stencil[70:250].shape[1] - stencil[70:250, ::-1].argmax(axis=1)
    assert np.abs(np.diff(ends)).max() <= 4, "steps of mask pixels would be five"
    assert (stencil != (make_disc((162, 162), 100, 320))).mean() < 0.02


def test_draw_answers_limits_size_and_time_for_200_phrases(tags):
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 85, (200, 2))
    boxes = np.concatenate([corners, corners + 15], axis=1).tolist()
    phrases = [f"the cup number {index} " * 40 for index in range(200)]
    masks = [make_disc(tuple(corner), 20) for corner in corners]
    start = time.process_time()
    drawing = draw_answers(Image.new("RGB", (100, 100), "gray"), boxes, phrases, boxes, masks=masks)
    assert time.process_time() - start < 20
    assert drawing.height < 320 + 210 * 25
    area = sum((place[2] - place[0]) * (place[3] - place[1]) for place, _ in tags)
    assert 0 < area <= 0.3 * 320 * 320
    for (one, _), (other, _) in itertools.combinations(tags, 2):
        assert not have_overlap(one, other)


def test_make_grid_puts_next_image_into_shortest_column():
    tiles = [Image.new("RGB", (10, height), color) for height, color in ((30, "red"), (10, "green"), (10, "blue"))]
    grid = make_grid(tiles, columns=2, gap=2)
    assert grid.size == (26, 34)
    assert grid.getpixel((14, 2)) == (0, 128, 0)
    assert grid.getpixel((14, 14)) == (0, 0, 255)
    assert make_grid(tiles[:2], columns=1, gap=0).size == (10, 40)


def test_make_grid_writes_note_below():
    tiles = [Image.new("RGB", (100, 50), "gray")] * 3
    plain, noted = make_grid(tiles, 2), make_grid(tiles, 2, note="chosen")
    assert plain.size == (8 + 2 * 108, 8 + 2 * 58)
    assert noted.height > plain.height
    assert np.asarray(noted)[plain.height :].min() < 100


def test_drawing_of_same_answers_is_same():
    image = Image.effect_noise((64, 64), 50)
    arguments = (image, [[10, 10, 30, 30]], ["the café 人"], [[12, 12, 30, 30]], [make_disc((20, 20), 9, 64)])
    assert draw_answers(*arguments).tobytes() == draw_answers(*arguments).tobytes()
