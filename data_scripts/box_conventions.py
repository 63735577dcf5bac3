"""
In which convention boxes are written, and what all boxes of a dataset together look like.

A box is four numbers in a layout and a unit, which `box_format` names together, for example "xywh" or
"cxcywh_fraction":

- layouts: xyxy (left, top, right, bottom), xywh (left, top, width, height), cxcywh (center, width, height);
- units: pixels (the default, not written), fraction (0..1 of the image's width and height), thousand (0..1000 of it).

Four numbers alone do not tell which convention they are in; many boxes mostly do (`judge_boxes`).
"""

import re
from typing import NamedTuple

import numpy as np


LAYOUTS = ("xyxy", "xywh", "cxcywh")
UNITS = ("pixels", "fraction", "thousand")
BOX_FORMATS = tuple(layout if unit == "pixels" else f"{layout}_{unit}" for unit in UNITS for layout in LAYOUTS)
# y before x, as in <loc> tokens: it is recognized, so that it can be said, and not read
EXCHANGED = "yxyx"

# pixels, or a share of the image's side, by which annotations pass the edge without being of another convention
EDGE_PIXELS, EDGE_SHARE = 2.0, 0.02
# share of the boxes that must make no sense as they are read, and of those that must as something else: a number that
# is in 0..1000 of a small image is in its pixels too, so that of another unit more is asked for
SUSPECTED_SHARE, SUSPECTED_UNIT_SHARE, FITTING_SHARE = 0.03, 0.1, 0.99
MIN_SUSPECTED = 2
CERTAIN_SHARE = 0.4
# the highest number of a box in a unit, with what annotations pass an edge by
LIMITS = {"fraction": 1.1, "thousand": 1010}
UNIT_RANGES = {"fraction": "0..1 of the image's width and height", "thousand": "0..1000 of its width and height"}
# boxes and pixels from which on it says something that no coordinate passes a limit
MANY_BOXES, LARGE_SIDE, SMALL_SIDE = 20, 1200, 900


def parse_box_format(value) -> tuple[str, str]:
    """
    Return (layout, unit) of a box format. Capitals, and "-", " " or "/" for "_", are taken as well.

    Raises:
        ValueError: if there is no such format.

    Example:

    ```python
    >>> from data_scripts.box_conventions import parse_box_format

    >>> parse_box_format("xywh"), parse_box_format("CXCYWH fraction")
    (('xywh', 'pixels'), ('cxcywh', 'fraction'))

    ```"""
    parts = re.split(r"[_\-\s/]+", value.strip().lower()) if isinstance(value, str) else []
    layout, unit = (*parts, "pixels")[:2] if len(parts) in (1, 2) else ("", "")
    if layout not in LAYOUTS or unit not in UNITS:
        raise ValueError(f"box_format is {value!r}; expected one of {', '.join(BOX_FORMATS)}.")
    return layout, unit


def to_boxes_xyxy(boxes: np.ndarray, sizes: np.ndarray, layout: str, unit: str) -> np.ndarray:
    """
    Return boxes of any convention as xyxy in pixels.

    Args:
        boxes (`np.ndarray` of shape `(N, 4)`): as they are written.
        sizes (`np.ndarray` of shape `(N, 2)`): (width, height) of the image of each, in pixels.
        layout, unit (`str`): see `parse_box_format`; the layout may be `EXCHANGED`.

    Returns:
        `np.ndarray` of shape `(N, 4)`.

    Example:

    ```python
    >>> from data_scripts.box_conventions import to_boxes_xyxy

    >>> to_boxes_xyxy([[0.5, 0.5, 0.5, 1.0]], [[640, 480]], "cxcywh", "fraction").tolist()
    [[160.0, 0.0, 480.0, 480.0]]

    ```"""
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    scale = np.tile(np.asarray(sizes, dtype=np.float64).reshape(-1, 2), 2)
    if layout == EXCHANGED:
        boxes = boxes[:, [1, 0, 3, 2]]
    if unit != "pixels":
        boxes = boxes * scale / (1 if unit == "fraction" else 1000)
    first, last = boxes[:, :2], boxes[:, 2:]
    if layout == "xywh":
        return np.concatenate((first, first + last), axis=1)
    if layout == "cxcywh":
        return np.concatenate((first - last / 2, first + last / 2), axis=1)
    return np.array(boxes)


class Judgement(NamedTuple):
    """
    What boxes look like that were said to be of another convention.

    Args:
        box_format (`str`): what they look like, of `BOX_FORMATS`, or `EXCHANGED`.
        is_certain (`bool`): whether no real annotations look so.
        message (`str`): a sentence with the numbers.
    """

    box_format: str
    is_certain: bool
    message: str


def judge_boxes(boxes, sizes, box_format: str = "xyxy") -> Judgement | None:
    """
    Compare what boxes look like, taken together, with the convention that they are said to be of.

    Args:
        boxes (`(N, 4)`): as they are written, before anything is cut at an edge.
        sizes (`(N, 2)`): (width, height) of the image of each, in pixels.
        box_format (`str`): what they are said to be.

    Returns:
        `Judgement`, or None where nothing speaks against it. Boxes that make sense in several conventions are not
        judged: of few, small or central ones nobody can tell.

    Example:

    ```python
    >>> from data_scripts.box_conventions import judge_boxes

    >>> judge_boxes([[0.1, 0.2, 0.5, 0.9]], [[640, 480]]).box_format
    'xyxy_fraction'
    >>> judge_boxes([[10, 20, 110, 90]], [[640, 480]]) is None
    True

    ```"""
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    sizes = np.asarray(sizes, dtype=np.float64).reshape(-1, 2)
    is_finite = np.isfinite(boxes).all(axis=1)
    boxes, sizes = boxes[is_finite], sizes[is_finite]
    layout, unit = parse_box_format(box_format)
    if not len(boxes):
        return None
    found = find_unit(boxes, sizes, unit)
    if found is not None:
        found_unit, reason = found
        name = name_of(best_layout(boxes, sizes, layout, found_unit), found_unit)
        return Judgement(name, "fraction" in (found_unit, unit), advise(box_format, name, reason))
    wrong = 1 - fits(boxes, sizes, layout, unit).mean()
    num_wrong = round(wrong * len(boxes))
    if num_wrong < MIN_SUSPECTED or wrong < SUSPECTED_SHARE:
        return None
    candidates = [(other, unit) for other in (*LAYOUTS, EXCHANGED) if other != layout]
    if wrong >= SUSPECTED_UNIT_SHARE:
        limits = {"pixels": np.inf, "fraction": LIMITS["fraction"], "thousand": LIMITS["thousand"]}
        others = [other for other in UNITS if other != unit and boxes.max() <= limits[other]]
        candidates += [(other, other_unit) for other_unit in others for other in (layout, *LAYOUTS)]
    shares = [fits(boxes, sizes, *candidate).mean() for candidate in candidates]
    best = int(np.argmax(np.round(shares, 2)))
    if shares[best] < FITTING_SHARE:
        return None
    name = name_of(*candidates[best])
    reason = (
        f"{num_wrong} of {len(boxes)} are inverted or leave their images as {box_format!r}, and "
        f"{100 * shares[best]:.0f}% fit as {name!r}"
    )
    is_certain = wrong >= CERTAIN_SHARE and len(boxes) >= MANY_BOXES
    return Judgement(name, is_certain, advise(box_format, name, reason))


def advise(said: str, name: str, reason: str) -> str:
    """Return the sentence of a judgement: what boxes look like, why, and what to do."""
    remedy = f"set box_format={name!r}, or convert them"
    if name.startswith(EXCHANGED):
        remedy = "exchange x and y"
    return f"The boxes, said to be {said!r}, look like {name!r}: {reason}; if they are, {remedy}"


def find_unit(boxes: np.ndarray, sizes: np.ndarray, unit: str) -> tuple[str, str] | None:
    """Return the unit that the range of all numbers speaks for, and why, if it is another than is said."""
    highest = boxes.max()
    if unit != "fraction" and boxes.min() >= 1 - LIMITS["fraction"] and highest <= LIMITS["fraction"]:
        # of an image of a few pixels such boxes may be real
        return ("fraction", f"all numbers of {len(boxes)} boxes are in 0..1") if sizes.min() > 4 else None
    is_thousand = is_cut_at_1000(boxes, sizes)
    if unit == "fraction" and np.median(boxes) > 2:  # not a slip or two
        in_pixels = [fits(boxes, sizes, layout, "pixels").mean() for layout in LAYOUTS]
        is_thousand = highest <= LIMITS["thousand"] and (is_thousand or max(in_pixels) < FITTING_SHARE)
        return "thousand" if is_thousand else "pixels", f"the numbers of {len(boxes)} boxes go up to {highest:g}"
    if unit == "pixels" and is_thousand:
        return "thousand", f"no number is over 1000, also on images of over {LARGE_SIDE} pixels"
    if unit == "thousand":
        # numbers of 0..1000 pass the size of an image that is far smaller
        small = sizes.max(axis=1) <= SMALL_SIDE
        limits = np.tile(sizes[small], 2)
        if small.sum() >= MANY_BOXES and (boxes[small] <= limits + EDGE_PIXELS).all():
            return "pixels", f"no number of {small.sum()} boxes is over the size of its image"
    return None


def is_cut_at_1000(boxes: np.ndarray, sizes: np.ndarray) -> bool:
    """Return whether numbers go up to 1000 and no further, where images are so large that some would."""
    ends = [values[sides >= LARGE_SIDE] for values, sides in zip(boxes.T, np.tile(sizes, 2).T, strict=True)]
    ends = np.concatenate(ends)
    return boxes.max() <= 1000 and len(ends) >= 2 * MANY_BOXES and ends.max() >= 850


def fits(boxes: np.ndarray, sizes: np.ndarray, layout: str, unit: str) -> np.ndarray:
    """Return which boxes have an extent and lie in their images, but for what annotations pass an edge by; (N,)."""
    x0, y0, x1, y1 = to_boxes_xyxy(boxes, sizes, layout, unit).T
    width, height = sizes.T
    across, down = (np.maximum(EDGE_PIXELS, EDGE_SHARE * side) for side in (width, height))
    is_inside = (x0 >= -across) & (y0 >= -down) & (x1 <= width + across) & (y1 <= height + down)
    return (x0 < x1) & (y0 < y1) & is_inside


def best_layout(boxes: np.ndarray, sizes: np.ndarray, layout: str, unit: str) -> str:
    """Return the layout that most boxes fit in a unit; of equals the one that is said."""
    layouts = [layout, *(other for other in LAYOUTS if other != layout)]
    return max(layouts, key=lambda other: round(fits(boxes, sizes, other, unit).mean(), 2))


def name_of(layout: str, unit: str) -> str:
    """Return a box format by its parts."""
    return layout if unit == "pixels" else f"{layout}_{unit}"
