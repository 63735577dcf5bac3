"""Pictures of answers: boxes in colours, and the words that each one answers."""

import textwrap

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from .decoding_reftr import check_format
from .text_reftr import check_text


COLORS = ("#d81bbd", "#0098a8", "#e67700", "#7b2fd0", "#8a6d00", "#c2255c", "#2b8a3e", "#1864ab")
TRUTH_COLOR = "white"
MASK_OPACITY = 80  # of 255: the thing itself is to be seen
# a text of 100,000 characters would make an image of a gigabyte: characters of one that are drawn, and lines of all
MAX_LABEL = 1000
MAX_LINES = 200


def draw_answers(
    image: Image.Image,
    boxes_xyxy,
    phrases: list[str],
    true_boxes_xyxy=(),
    masks=(),
    title: str = "",
    width: int = 320,
) -> Image.Image:
    """
    A picture with its boxes and masks, and the words under it.

    Args:
        image (`PIL.Image.Image`): the picture.
        boxes_xyxy (`(phrases, 4)`): predicted boxes in pixels of the picture; None where there is no answer.
        phrases (`list[str]`): the words of each box, written in the colour of its box; of very long ones, and of very
            many, the first.
        true_boxes_xyxy (`(phrases, 4)`, *optional*): boxes to compare with, drawn in white.
        masks (list of bool `(height, width)` arrays at the picture's size, *optional*):
            Predicted masks, laid over the picture and outlined in the colour of their box; None: no answer.
        title (`str`, *optional*): words above the phrases, in black.
        width (`int`, *optional*, defaults to 320): of the result, in pixels.

    Returns:
        `PIL.Image.Image`: `width` wide, as high as picture and words need.

    Raises:
        ValueError: if the image was opened from a file of another format than `IMAGE_FORMATS`, or a text is not one
            that `check_text` takes.
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
            # smooth outlines: this mask is looked at, and not measured
            stencil = Image.fromarray(np.asarray(mask).astype(np.uint8) * 255).resize(canvas.size)
            stencil = stencil.point(lambda value: 255 * (value > 127))
            edge = ImageChops.subtract(stencil, stencil.filter(ImageFilter.MinFilter(line // 2 * 2 + 1)))
            opacity = stencil.point(lambda value: value * MASK_OPACITY // 255)
            canvas.paste(COLORS[index % len(COLORS)], (0, 0), ImageChops.lighter(opacity, edge))
    draw = ImageDraw.Draw(canvas)
    for box in true_boxes_xyxy:
        draw.rectangle(corners(box, scale), outline=TRUTH_COLOR, width=line)
    for index, box in enumerate(boxes_xyxy):
        if box is not None:
            draw.rectangle(corners(box, scale), outline=COLORS[index % len(COLORS)], width=line)

    font = ImageFont.load_default(size=max(12, width // 22))
    letters = max(8, int(width / font.getlength("n") * 1.05))
    lines = [(words, "black") for words in wrap(title, letters)]
    for index, phrase in enumerate(phrases):
        lines += [(words, COLORS[index % len(COLORS)]) for words in wrap(phrase, letters)]
    if len(lines) > MAX_LINES:
        lines = [*lines[:MAX_LINES], ("...", "black")]
    height = int(font.size * 1.35)
    sheet = Image.new("RGB", (width, canvas.height + height * len(lines) + 8), "white")
    sheet.paste(canvas, (0, 0))
    draw = ImageDraw.Draw(sheet)
    for number, (words, color) in enumerate(lines):
        draw.text((4, canvas.height + 2 + number * height), words, fill=color, font=font)
    return sheet


def wrap(text: str, letters: int) -> list[str]:
    """
    Return the beginning of a text, at most `MAX_LABEL` characters, in lines of so many letters.

    Example:

    ```python
    >>> from modeling_reftr.drawing_reftr import wrap

    >>> wrap("the red cup", 8), len(wrap("the red cup " * 1000, 8))
    (['the red', 'cup'], 126)

    ```"""
    return textwrap.wrap(text if len(text) <= MAX_LABEL else f"{text[:MAX_LABEL]}...", letters)


def corners(box_xyxy, scale: float) -> list[float]:
    """Scaled corners in the order that drawing asks for, whatever a box holds."""
    x0, y0, x1, y1 = (float(value) * scale for value in box_xyxy)
    return [min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)]


def make_grid(pictures: list[Image.Image], columns: int, gap: int = 8) -> Image.Image:
    """Pictures of one width in rows, each row as high as its highest."""
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    width = gap + sum(picture.width + gap for picture in max(rows, key=len))
    height = gap + sum(max(picture.height for picture in row) + gap for row in rows)
    grid = Image.new("RGB", (width, height), "white")
    top = gap
    for row in rows:
        left = gap
        for picture in row:
            grid.paste(picture, (left, top))
            left += picture.width + gap
        top += max(picture.height for picture in row) + gap
    return grid
