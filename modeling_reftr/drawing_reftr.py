"""Draw boxes, masks and the phrases that they belong to."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from .decoding_reftr import check_format
from .text_reftr import check_text


COLORS = ("#d81bbd", "#0098a8", "#e67700", "#7b2fd0", "#8a6d00", "#c2255c", "#2b8a3e", "#1864ab")
TRUTH_COLOR = "white"
MASK_OPACITY = 80  # alpha (0-255), low enough to keep the object visible
# A text of 100,000 characters would give an image of a gigabyte: limit the characters per phrase and all lines.
MAX_LABEL = 1000
MAX_LINES = 200


def draw_answers(
    image: Image.Image,
    boxes_xyxy: Sequence[Sequence[float] | None],
    phrases: list[str],
    true_boxes_xyxy: Sequence[Sequence[float]] = (),
    masks: Sequence[np.ndarray | None] = (),
    title: str = "",
    width: int = 320,
) -> Image.Image:
    """
    Draw boxes and masks onto an image, with their phrases below it.

    Args:
        image (`PIL.Image.Image`): the image.
        boxes_xyxy (`(phrases, 4)`): predicted boxes in pixels of the image; None for a phrase without an answer.
        phrases (`list[str]`):
            The phrase of each box, in the color of its box. Long phrases and long lists are cut.
        true_boxes_xyxy (`(phrases, 4)`, *optional*): ground-truth boxes, drawn in white.
        masks (list of bool `(height, width)` arrays of the image's size, *optional*):
            Predicted masks, blended over the image and outlined in the color of their box; None without an answer.
        title (`str`, *optional*): a text above the phrases, in black.
        width (`int`, *optional*, defaults to 320): the width of the result in pixels.

    Returns:
        `PIL.Image.Image`: `width` pixels wide, as high as the image and the text require.

    Raises:
        ValueError: if the image was opened from a file of a format not in `IMAGE_FORMATS`, or a text is not accepted
            by `check_text`.
    """
    check_format(image)
    check_text(title, "title")
    for index, phrase in enumerate(phrases):
        check_text(phrase, f"phrase {index}")
    scale = width / image.width
    canvas = image.convert("RGB").resize((width, max(1, round(image.height * scale))), Image.Resampling.BILINEAR)
    line = max(2, width // 120)
    for index, mask in enumerate(masks):
        if mask is not None:
            paste_mask(canvas, mask, COLORS[index % len(COLORS)], line)
    draw = ImageDraw.Draw(canvas)
    for box in true_boxes_xyxy:
        draw.rectangle(scaled_corners(box, scale), outline=TRUTH_COLOR, width=line)
    for index, box in enumerate(boxes_xyxy):
        if box is not None:
            draw.rectangle(scaled_corners(box, scale), outline=COLORS[index % len(COLORS)], width=line)
    return add_text_below(canvas, title, phrases)


def paste_mask(canvas: Image.Image, mask: np.ndarray, color: str, line: int) -> None:
    """Blend a mask over an RGB image in a color, and outline it with a line of that width."""
    # Resize smoothly: this mask is displayed, not evaluated.
    stencil = Image.fromarray(np.asarray(mask).astype(np.uint8) * 255).resize(canvas.size)
    stencil = stencil.point(lambda value: 255 * (value > 127))
    edge = ImageChops.subtract(stencil, stencil.filter(ImageFilter.MinFilter(line // 2 * 2 + 1)))
    opacity = stencil.point(lambda value: value * MASK_OPACITY // 255)
    canvas.paste(color, (0, 0), ImageChops.lighter(opacity, edge))


def add_text_below(canvas: Image.Image, title: str, phrases: list[str]) -> Image.Image:
    """Return an image with a title in black and phrases in their colors below it."""
    font = ImageFont.load_default(size=max(12, canvas.width // 22))
    letters = max(8, int(canvas.width / font.getlength("n") * 1.05))
    lines = [(line, "black") for line in wrap(title, letters)]
    for index, phrase in enumerate(phrases):
        lines += [(line, COLORS[index % len(COLORS)]) for line in wrap(phrase, letters)]
    if len(lines) > MAX_LINES:
        lines = [*lines[:MAX_LINES], ("...", "black")]
    line_height = int(font.size * 1.35)
    sheet = Image.new("RGB", (canvas.width, canvas.height + line_height * len(lines) + 8), "white")
    sheet.paste(canvas, (0, 0))
    draw = ImageDraw.Draw(sheet)
    for number, (line, color) in enumerate(lines):
        draw.text((4, canvas.height + 2 + number * line_height), line, fill=color, font=font)
    return sheet


def wrap(text: str, letters: int) -> list[str]:
    """
    Wrap the beginning of a text, at most `MAX_LABEL` characters, into lines of at most `letters` letters.

    Example:

    ```python
    >>> from modeling_reftr.drawing_reftr import wrap

    >>> wrap("the red cup", 8), len(wrap("the red cup " * 1000, 8))
    (['the red', 'cup'], 126)

    ```"""
    return textwrap.wrap(text if len(text) <= MAX_LABEL else f"{text[:MAX_LABEL]}...", letters)


def scaled_corners(box_xyxy: Sequence[float], scale: float) -> list[float]:
    """Scale a box and sort its corners, as Pillow rejects inverted boxes."""
    x0, y0, x1, y1 = (float(value) * scale for value in box_xyxy)
    return [min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)]


def make_grid(images: list[Image.Image], columns: int, gap: int = 8) -> Image.Image:
    """Arrange images of one width in rows, each row as high as its highest image."""
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    width = gap + sum(image.width + gap for image in max(rows, key=len))
    height = gap + sum(max(image.height for image in row) + gap for row in rows)
    grid = Image.new("RGB", (width, height), "white")
    top = gap
    for row in rows:
        left = gap
        for image in row:
            grid.paste(image, (left, top))
            left += image.width + gap
        top += max(image.height for image in row) + gap
    return grid
