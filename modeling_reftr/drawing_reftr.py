"""
Draw boxes, masks and the phrases that they belong to.

All drawings of the project are made here, and mark the same thing in the same way: predictions in the color of their
phrase, whose text is at the corner of the box; the outside of all masks dimmed; ground truth by dashed white lines.
Every line has a light and a dark edge, so that it is visible on any image.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFilter

from .decoding_reftr import check_format
from .fonts_reftr import Pen
from .text_reftr import check_text


COLORS = ("#d81bbd", "#0098a8", "#e67700", "#7b2fd0", "#8a6d00", "#c2255c", "#2b8a3e", "#1864ab")
LIGHT, DARK = "white", "black"
FAILURE_COLOR = "#d00000"
TRUTH_LEGEND = "dashed: ground truth"
MASK_OPACITY = 45  # alpha (0-255), low enough to keep the object visible
OUTSIDE_BRIGHTNESS = 0.55  # of the image outside of all masks
# A text of 100,000 characters would give an image of a gigabyte: limit the characters per phrase and all lines.
MAX_LABEL = 1000
MAX_LINES = 200
MAX_TAG_LINES = 2
EDGE = 2  # pixels of the light and the dark edge of a line
MAX_TAG_SHARE = 0.3  # of the area of the image that tags cover
MAX_ASPECT = 3  # height of a drawn image over the width of the drawing; higher images are drawn narrower


def draw_answers(
    image: Image.Image,
    boxes_xyxy: Sequence[Sequence[float] | None],
    phrases: Sequence[str],
    true_boxes_xyxy: Sequence[Sequence[float]] = (),
    masks: Sequence[np.ndarray | None] = (),
    title: str = "",
    width: int = 320,
    *,
    true_masks: Sequence[np.ndarray | None] = (),
    failure: str = "",
    legend: str = TRUTH_LEGEND,
) -> Image.Image:
    """
    Draw boxes and masks onto an image, with their phrases at the boxes.

    A phrase is written in a tag in the color of its box, at the box, where it covers no other tag. A phrase that is
    too long for a tag, or for which there is no space, has a number instead and is listed below the image; so is a
    phrase without a box.

    Args:
        image (`PIL.Image.Image`): the image, of any mode and size.
        boxes_xyxy (`(phrases, 4)`): predicted boxes in pixels of the image; None for a phrase without an answer.
        phrases (`list[str]`): the phrase of each box. Long phrases and long lists are cut.
        true_boxes_xyxy (`(boxes, 4)`, *optional*): ground-truth boxes, drawn as dashed white lines.
        masks (list of bool `(height, width)` arrays of the image's size, *optional*):
            Predicted masks, tinted and outlined in the color of their box; None without an answer. The image is dimmed
            outside of all masks.
        title (`str`, *optional*): a text below the image, in black.
        width (`int`, *optional*, defaults to 320): the width of the result in pixels.
        true_masks (list of bool `(height, width)` arrays, *optional*): ground-truth masks, outlined in white.
        failure (`str`, *optional*): a text that marks the drawing as a failure, in white on red.
        legend (`str`, *optional*): what the dashed boxes are; written below the image if there are any.

    Returns:
        `PIL.Image.Image`: an RGB image, `width` pixels wide. The upper left corner of the input is at (0, 0), unless
        the input is higher than three times its width: then it is centered.

    Raises:
        ValueError: if the image was opened from a file of a format not in `IMAGE_FORMATS`, or a text is not accepted
            by `check_text`.
    """
    check_format(image)
    for name, text in (("title", title), ("failure", failure), ("legend", legend)):
        check_text(text, name)
    for index, phrase in enumerate(phrases):
        check_text(phrase, f"phrase {index}")
    scale = min(width / image.width, MAX_ASPECT * width / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    canvas = image.convert("RGB").resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    line = min(max(3, width // 110), 6)
    stencils = [make_stencil(mask, size) for mask in masks]
    true_stencils = [make_stencil(mask, size) for mask in true_masks]
    canvas = dim_outside(canvas, [stencil for stencil in (*stencils, *true_stencils) if stencil is not None])
    for index, stencil in enumerate(stencils):
        if stencil is not None:
            canvas.paste(color_of(index), (0, 0), stencil.point(lambda value: value * MASK_OPACITY // 255))
    for index, stencil in enumerate(stencils):
        draw_contour(canvas, stencil, color_of(index), line)
    for stencil in true_stencils:
        draw_contour(canvas, stencil, LIGHT, line)
    corners = [None if box is None else scale_corners(box, scale, size) for box in boxes_xyxy]
    for index, box in enumerate(corners):
        draw_box(canvas, box, color_of(index), line)
    for box in true_boxes_xyxy:
        draw_dashed_box(canvas, scale_corners(box, scale, size), line)
    pen = Pen(min(max(13, round(10 + width / 80)), 22))
    listed = draw_tags(canvas, corners, phrases, pen)
    if canvas.width < width:
        background = Image.new("RGB", (width, canvas.height), "#dddddd")
        background.paste(canvas, ((width - canvas.width) // 2, 0))
        canvas = background
    return add_text_below(canvas, pen, failure, title, listed, legend if len(true_boxes_xyxy) else "")


def color_of(index: int) -> str:
    """Return the color of a phrase."""
    return COLORS[index % len(COLORS)]


def contrasting(color: str) -> str:
    """
    Return whether black or white text is more readable on a color.

    Example:

    ```python
    >>> from modeling_reftr.drawing_reftr import contrasting

    >>> contrasting("#7b2fd0"), contrasting("#ffcc00")
    ('white', 'black')

    ```"""
    channels = [value / 255 for value in ImageColor.getrgb(color)[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # A contrast of 3.3; on saturated colors white looks more readable than its contrast says.
    return "white" if luminance < 0.27 else "black"


# masks


def make_stencil(mask: np.ndarray | None, size: tuple[int, int]) -> Image.Image | None:
    """Resize a mask to (width, height) as an image of mode "L", 255 in the mask; None if it has no pixel."""
    if mask is None or not np.any(mask):
        return None
    # Resize smoothly: this mask is displayed, not evaluated.
    stencil = Image.fromarray(np.asarray(mask).astype(np.uint8) * 255)
    factor = size[0] / stencil.width
    stencil = stencil.resize(size)
    if factor > 1:
        stencil = stencil.filter(ImageFilter.GaussianBlur(0.4 * factor))  # single pixels remain
    for threshold in (127, 0):  # a mask of few pixels of a large image has no pixel over half
        binary = stencil.point(lambda value, threshold=threshold: 255 * (value > threshold))
        if binary.getbbox():
            return binary
    return None


def dim_outside(canvas: Image.Image, stencils: list[Image.Image]) -> Image.Image:
    """Return an RGB image that is dimmed outside of all stencils; as it is if there are none."""
    if not stencils:
        return canvas
    union = stencils[0]
    for stencil in stencils[1:]:
        union = ImageChops.lighter(union, stencil)
    dimmed = canvas.point(lambda value: value * OUTSIDE_BRIGHTNESS)
    return Image.composite(canvas, dimmed, union)


def draw_contour(canvas: Image.Image, stencil: Image.Image | None, color: str, line: int) -> None:
    """Outline a stencil on an RGB image: inside by a line of a color, outside by a light and a dark edge."""
    if stencil is None:
        return
    rim = (EDGE, EDGE, max(EDGE, stencil.width - EDGE), max(EDGE, stencil.height - EDGE))
    within = Image.new("L", stencil.size)
    within.paste(stencil.crop(rim), rim)  # keep the edges within the image
    stencil, box = within, within.getbbox()
    if box is None:
        return
    margin = line + EDGE + 1  # look only at the surroundings of the mask
    left, top = box[0] - margin, box[1] - margin
    part = stencil.crop((left, top, box[2] + margin, box[3] + margin))
    # Blurring is faster than Pillow's minimum and maximum filters, and tells pixels near the outline as well.
    inner = part.filter(ImageFilter.BoxBlur(line)).point(lambda value: 255 * (value == 255))
    light, dark = (
        part.filter(ImageFilter.BoxBlur(radius)).point(lambda value: 255 * (value > 0)) for radius in (1, EDGE)
    )
    for outside, inside, edge in ((dark, light, DARK), (light, part, LIGHT), (part, inner, color)):
        canvas.paste(edge, (left, top), ImageChops.subtract(outside, inside))


# boxes


def scale_corners(box_xyxy: Sequence[float], scale: float, size: tuple[int, int]) -> list[int]:
    """
    Return the first and last pixels of a box on an image of (width, height), as [x0, y0, x1, y1].

    Pillow rejects inverted boxes, so corners are sorted; they are moved into the image, so that every side and its
    edges are visible.
    """
    values = [float(value) * scale for value in box_xyxy]
    x0, x1 = (min(max(EDGE, round(value)), size[0] - 1 - EDGE) for value in sorted(values[0::2]))
    y0, y1 = (min(max(EDGE, round(value)), size[1] - 1 - EDGE) for value in sorted(values[1::2]))
    return [x0, y0, x1, y1]


def draw_box(canvas: Image.Image, corners: list[int] | None, color: str, line: int) -> None:
    """Draw a box: a line of a color inside of its corners, a light and a dark edge outside."""
    if corners is None:
        return
    draw, (x0, y0, x1, y1) = ImageDraw.Draw(canvas), corners
    draw.rectangle((x0 - 2, y0 - 2, x1 + 2, y1 + 2), outline=DARK)
    draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=LIGHT)
    draw.rectangle((x0, y0, x1, y1), outline=color, width=line)


def draw_dashed_box(canvas: Image.Image, corners: list[int], line: int) -> None:
    """Draw a box in white dashes with a dark edge, between which a box beneath it stays visible."""
    draw, (x0, y0, x1, y1) = ImageDraw.Draw(canvas), corners
    dash = 3 * line
    horizontal = [(start, min(start + dash, x1)) for start in range(x0, x1 + 1, 2 * dash)]
    vertical = [(start, min(start + dash, y1)) for start in range(y0, y1 + 1, 2 * dash)]
    half, rest = (line - 1) // 2, (line - 1) // 2
    dashes = [(a, y - half, b, y + rest) for y in (y0, y1) for a, b in horizontal]
    dashes += [(x - half, a, x + rest, b) for x in (x0, x1) for a, b in vertical]
    for left, top, right, bottom in dashes:
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), fill=DARK)
    for part in dashes:
        draw.rectangle(part, fill=LIGHT)


# texts


def cut_text(text: str) -> str:
    """Return the beginning of a text, at most `MAX_LABEL` characters."""
    return text if len(text) <= MAX_LABEL else f"{text[:MAX_LABEL]}..."


def draw_tags(
    canvas: Image.Image, corners: list[list[int] | None], phrases: Sequence[str], pen: Pen
) -> list[tuple[str, str]]:
    """
    Write phrases, or their numbers, in tags at their boxes.

    Returns:
        `list[tuple[str, str]]`: the text and the color of the phrases to list below the image.
    """
    draw = ImageDraw.Draw(canvas)
    boxes = np.array([box for box in corners if box is not None], dtype=float).reshape(-1, 4)
    placed, listed = np.zeros((0, 4)), []
    free_area = MAX_TAG_SHARE * canvas.width * canvas.height
    for index, phrase in enumerate(phrases):
        phrase, number = cut_text(phrase).strip(), str(index + 1)
        box = corners[index] if index < len(corners) else None
        lines = [] if box is None else pen.wrap(phrase, 0.8 * canvas.width, MAX_TAG_LINES + 1)
        # A tag of the complete phrase, otherwise of its number.
        for texts in (lines if 0 < len(lines) <= MAX_TAG_LINES else [], [number] if lines else []):
            size = (math.ceil(max(map(pen.measure, texts), default=0)) + 8, len(texts) * pen.line_height)
            if not texts or size[0] * size[1] > free_area:
                continue
            place = find_place(box, size, canvas.size, placed, boxes)
            if place is None:
                continue
            placed, free_area = np.vstack([placed, place]), free_area - size[0] * size[1]
            draw_tag(draw, place, texts, color_of(index), pen)
            break
        else:
            texts = []
        if phrase and (box is None or texts != lines):
            text = f"no answer: {phrase}" if box is None else phrase
            listed.append((f"{number}: {text}" if len(phrases) > 1 else text, color_of(index)))
    return listed


def draw_tag(draw: ImageDraw.ImageDraw, place: Sequence[float], texts: list[str], color: str, pen: Pen) -> None:
    """Write lines of text on a rectangle of a color."""
    x0, y0, x1, y1 = map(int, place)
    draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=color, outline=contrasting(color))
    for number, text in enumerate(texts):
        pen.write(draw, (x0 + 4, y0 + number * pen.line_height), text, contrasting(color))


def find_place(
    corners: list[int], size: tuple[int, int], canvas_size: tuple[int, int], placed: np.ndarray, boxes: np.ndarray
) -> np.ndarray | None:
    """
    Find where a tag at a box covers no other tag and least of the boxes' content.

    Args:
        corners (`(4,)`): the box.
        size (`tuple[int, int]`): width and height of the tag.
        canvas_size (`tuple[int, int]`): width and height of the image.
        placed (`np.ndarray` of shape `(tags, 4)`): the other tags.
        boxes (`np.ndarray` of shape `(boxes, 4)`): all boxes.

    Returns:
        `np.ndarray` of shape `(4,)`: the rectangle of the tag, within the image; None if there is no such place.
    """
    (x0, y0, x1, y1), (width, height) = corners, size
    if width > canvas_size[0] or height > canvas_size[1] / 2:
        return None
    # In order of preference: above and below the box, within its upper and lower side, to its right and left.
    steps = np.linspace(0, 1, 5)
    along = [x0 + step * (x1 + 1 - width - x0) for step in steps]
    down = [y0 + step * (y1 + 1 - height - y0) for step in steps]
    candidates = [(x, y) for y in (y0 - height - 2, y1 + 3, y0, y1 + 1 - height) for x in along]
    candidates += [(x, y) for x in (x1 + 3, x0 - width - 2) for y in down]
    starts = np.clip(np.array(candidates), 0, np.array(canvas_size) - size).round()
    places = np.concatenate([starts, starts + size], axis=1)
    is_free = ~(overlaps(places, placed + np.array([-1, -1, 1, 1])) > 0).any(axis=1)
    if not is_free.any():
        return None
    # Moving a tag along its box costs little, covering the content of a box as much as it covers.
    covered = overlaps(places, boxes).sum(axis=1) / (width * height)
    moved = np.arange(len(places)) / len(places)
    cost = np.where(is_free, covered + 0.5 * moved, np.inf)
    return places[cost.argmin()]


def overlaps(rectangles: np.ndarray, others: np.ndarray) -> np.ndarray:
    """
    Return the areas that rectangles have in common.

    Args:
        rectangles (`np.ndarray` of shape `(n, 4)`): rectangles (x0, y0, x1, y1).
        others (`np.ndarray` of shape `(m, 4)`): others.

    Returns:
        `np.ndarray` of shape `(n, m)`.
    """
    low = np.maximum(rectangles[:, None, :2], others[None, :, :2])
    high = np.minimum(rectangles[:, None, 2:], others[None, :, 2:])
    return np.prod((high - low).clip(0), axis=-1)


def add_text_below(
    canvas: Image.Image, pen: Pen, failure: str, title: str, listed: list[tuple[str, str]], legend: str
) -> Image.Image:
    """Return an image with texts below it: why it is a failure, the title, phrases in their colors, and the legend."""
    indent = pen.size + 6  # for the color of a phrase
    width, height = canvas.width - 8, pen.line_height
    lines = [(line, LIGHT, None) for line in pen.wrap(cut_text(failure), width)]
    num_failure = len(lines)
    lines += [(line, DARK, None) for line in pen.wrap(cut_text(title), width)]
    for text, color in listed[:MAX_LINES]:
        wrapped = pen.wrap(cut_text(text), width - indent)
        lines += [(line, DARK, LIGHT if number else color) for number, line in enumerate(wrapped)]
        if len(lines) > MAX_LINES:
            break
    if len(lines) > MAX_LINES or len(listed) > MAX_LINES:
        lines = [*lines[:MAX_LINES], ("...", DARK, None)]
    lines += [(line, "#555555", None) for line in pen.wrap(cut_text(legend), width)]
    sheet = Image.new("RGB", (canvas.width, canvas.height + height * len(lines) + (6 if lines else 0)), "white")
    sheet.paste(canvas, (0, 0))
    draw = ImageDraw.Draw(sheet)
    if num_failure:
        draw.rectangle((0, 0, canvas.width - 1, canvas.height - 1), outline=FAILURE_COLOR, width=3)
        draw.rectangle((0, canvas.height, canvas.width - 1, canvas.height + num_failure * height), fill=FAILURE_COLOR)
    for number, (text, color, swatch) in enumerate(lines):
        x, y = 4, canvas.height + 2 + number * height
        if swatch is not None:
            draw.rectangle((x, y + 3, x + pen.size - 2, y + height - 5), fill=swatch)
            x += indent
        pen.write(draw, (x, y), text, color)
    return sheet


def make_grid(images: list[Image.Image], columns: int, gap: int = 8, note: str = "") -> Image.Image:
    """Arrange images of one width in columns, each next image in the shortest column, with a note below them."""
    bottoms = [gap] * min(columns, len(images))
    corners = []
    for image in images:
        column = bottoms.index(min(bottoms))
        corners.append((column, bottoms[column]))
        bottoms[column] += image.height + gap
    width = max(image.width for image in images)
    grid = Image.new("RGB", (gap + len(bottoms) * (width + gap), max(bottoms)), "white")
    for image, (column, top) in zip(images, corners, strict=True):
        grid.paste(image, (gap + column * (width + gap), top))
    return add_text_below(grid, Pen(16), "", note, [], "") if note else grid
