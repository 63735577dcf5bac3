"""
Convert boxes of other conventions, and judge which convention the boxes of a dataset look like.

A box is four numbers in a layout and a unit, which `box_format` names together, for example "xywh" or
"cxcywh_fraction":

- layouts: xyxy (left, top, right, bottom), xywh (left, top, width, height), cxcywh (center, width, height);
- units: pixels (the default, not written), fraction (0..1 of the image's width and height), thousand (0..1000 of it).

Four numbers alone do not tell which convention they are in; many boxes mostly do (`judge_boxes`).
"""

import re
from typing import Any, NamedTuple

import numpy as np

from .quoting import quote


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
# rounding error of sums of fractions with six decimals, as a share of the image's side
ROUNDING = 1e-6
# share of the boxes, and number of them, that are in 0..1 where something is to be said of them; all but slips where
# it is said of the dataset
SOME_SHARE, SOME_BOXES, SOME_SIDE, MOST_SHARE = 0.02, 3, 32, 0.95
# how far the boxes of a dataset reach in another unit, in shares of the image's sides, if it is the true one: else
# they may be objects in a corner of their images. Of few boxes less is asked for
REACH, REACH_OF_MISFITS, REACH_OF_FEW = 0.9, 0.8, 0.5
# boxes and pixels from which on it says something that no coordinate passes a limit
MANY_BOXES, LARGE_SIDE, SMALL_SIDE = 20, 1200, 900


def parse_box_format(value: Any) -> tuple[str, str]:
    """
    Return (layout, unit) of a box format. Capitals, and "-", " " or "/" for "_", are taken as well.

    Raises:
        ValueError: if the format does not exist.

    Example:

    ```python
    >>> from data_scripts.box_conventions import parse_box_format

    >>> parse_box_format("xywh"), parse_box_format("CXCYWH fraction")
    (('xywh', 'pixels'), ('cxcywh', 'fraction'))

    ```"""
    parts = re.split(r"[_\-\s/]+", value.strip().lower()) if isinstance(value, str) else []
    layout, unit = (*parts, "pixels")[:2] if len(parts) in (1, 2) else ("", "")
    if layout not in LAYOUTS or unit not in UNITS:
        raise ValueError(f"box_format is {quote(value)}; expected one of {', '.join(BOX_FORMATS)}.")
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
        first, last = first, first + last
    elif layout == "cxcywh":
        first, last = first - last / 2, first + last / 2
    boxes_xyxy = np.concatenate((first, last), axis=1)
    # a sum of rounded fractions may end beyond an edge, which would count as a box that is cut there
    boxes_xyxy[np.abs(boxes_xyxy) < ROUNDING * scale] = 0
    return np.where(np.abs(boxes_xyxy - scale) < ROUNDING * scale, scale, boxes_xyxy)


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


def judge_splits(splits: dict[str, dict[tuple[str, str], tuple]]) -> list[Judgement]:
    """
    Judge the boxes of each split by themselves, for each may come from another tool; if there is nothing to say of
    any, judge those of all splits together, which are more.

    Args:
        splits (`dict`): split -> (what they are, "boxes" or "polygons"; their box format) -> (boxes, sizes), see
            `judge_boxes`.

    Returns:
        `list[Judgement]`: those that there are.
    """
    together = {}
    for groups in splits.values():
        for key, group in groups.items():
            together.setdefault(key, []).append(group)
    together = {
        key: [np.concatenate(arrays) for arrays in zip(*groups, strict=True)] for key, groups in together.items()
    }

    def judge(groups: dict, split: str | None = None) -> list[Judgement]:
        found = [
            judge_boxes(*group, box_format, f"The {what}" if split is None else f"The {what} of {split!r}")
            for (what, box_format), group in groups.items()
        ]
        return [judgement for judgement in found if judgement is not None]

    if len(splits) > 1:
        found = [judgement for split, groups in splits.items() for judgement in judge(groups, split)]
        if found:
            return found
    return judge(together)


def judge_boxes(
    boxes: np.ndarray | list, sizes: np.ndarray | list, box_format: str = "xyxy", what: str = "The boxes"
) -> Judgement | None:
    """
    Compare what boxes look like, taken together, with the convention that they are said to be of.

    Args:
        boxes (`(N, 4)`): as they are written, before anything is cut at an edge.
        sizes (`(N, 2)`): (width, height) of the image of each, in pixels.
        box_format (`str`): what they are said to be.
        what (`str`, *optional*, defaults to `"The boxes"`): how the sentence begins.

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
        is_meant = are_fractions(boxes, sizes) if found_unit == "fraction" else np.full(len(boxes), True)
        name = name_of(best_layout(boxes[is_meant], sizes[is_meant], layout, found_unit), found_unit)
        is_certain = "fraction" in (found_unit, unit) and is_meant.mean() >= MOST_SHARE
        return Judgement(name, is_certain, advise(what, box_format, name, reason))
    wrong = 1 - fits(boxes, sizes, layout, unit).mean()
    num_wrong = round(wrong * len(boxes))
    if num_wrong < MIN_SUSPECTED or wrong < SUSPECTED_SHARE:
        return None
    candidates = [(other, unit) for other in (*LAYOUTS, EXCHANGED) if other != layout]
    if wrong >= SUSPECTED_UNIT_SHARE:
        limits = {"pixels": np.inf, "fraction": LIMITS["fraction"], "thousand": LIMITS["thousand"]}
        # fractions over 1 are slips, if they are not of another magnitude altogether, see `find_unit`
        others = [other for other in UNITS if unit not in (other, "fraction") and boxes.max() <= limits[other]]
        least = REACH_OF_MISFITS if len(boxes) >= MANY_BOXES else REACH_OF_FEW
        candidates += [
            (other, other_unit)
            for other_unit in others
            for other in (layout, *LAYOUTS)
            if reach_of(boxes, sizes, other, other_unit) >= least
        ]
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
    return Judgement(name, is_certain, advise(what, box_format, name, reason))


def advise(what: str, said: str, name: str, reason: str) -> str:
    """Return the sentence of a judgement: what boxes look like, why, and what to do."""
    remedy = f"set box_format={name!r}, or convert them"
    if name.startswith(EXCHANGED):
        remedy = "exchange x and y"
    if what.startswith("The polygons"):
        remedy = "convert them to pixels"
    return f"{what}, said to be {said!r}, look like {name!r}: {reason}; if they are, {remedy}"


def find_unit(boxes: np.ndarray, sizes: np.ndarray, unit: str) -> tuple[str, str] | None:
    """Return the unit that the range of all numbers speaks for, and why, if it is another than is said."""
    highest = boxes.max()
    if unit != "fraction":
        found = are_fractions(boxes, sizes)
        is_some = found.sum() >= SOME_BOXES and found.mean() >= SOME_SHARE and sizes[found].min() > SOME_SIDE
        if found.mean() >= MOST_SHARE or is_some:
            whose = f"{len(boxes)} boxes" if found.all() else f"{found.sum()} of {len(boxes)} boxes"
            return "fraction", f"all numbers of {whose} are in 0..1"
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
        is_inside = small.sum() >= MANY_BOXES and (boxes[small] <= limits + EDGE_PIXELS).all()
        if is_inside and best_reach(boxes[small], sizes[small], "pixels") >= REACH:
            return "pixels", f"no number of {small.sum()} boxes is over the size of its image"
    return None


def is_cut_at_1000(boxes: np.ndarray, sizes: np.ndarray) -> bool:
    """Return whether numbers go up to 1000 and no further, where images are so large that some would."""
    ends = [values[sides >= LARGE_SIDE] for values, sides in zip(boxes.T, np.tile(sizes, 2).T, strict=True)]
    ends = np.concatenate(ends)
    is_cut = boxes.max() <= 1000 and len(ends) >= 2 * MANY_BOXES and ends.max() >= 850
    return is_cut and best_reach(boxes, sizes, "thousand") >= REACH


def are_fractions(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return which boxes have all numbers in 0..1; (N,). In an image of a few pixels such boxes may be real."""
    in_range = (boxes >= 1 - LIMITS["fraction"]) & (boxes <= LIMITS["fraction"])
    return in_range.all(axis=1) & (sizes.min(axis=1) > 4)


def reach_of(boxes: np.ndarray, sizes: np.ndarray, layout: str, unit: str) -> float:
    """Return how far the boxes that fit a convention reach: the lesser share of their images' width and height."""
    good = fits(boxes, sizes, layout, unit)
    ends = to_boxes_xyxy(boxes, sizes, layout, unit)[:, 2:] / sizes
    return float(ends[good].max(axis=0, initial=0).min())


def best_reach(boxes: np.ndarray, sizes: np.ndarray, unit: str) -> float:
    """Return how far boxes reach in a unit, in the layout that most of them fit, see `reach_of`."""
    return reach_of(boxes, sizes, best_layout(boxes, sizes, LAYOUTS[0], unit), unit)


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
