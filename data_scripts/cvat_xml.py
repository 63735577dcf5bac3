"""
Read "CVAT for images 1.1", the XML of CVAT.

    <annotations>
      <image id="0" name="1.jpg" width="640" height="480">
        <box label="car" xtl="10" ytl="20" xbr="110" ybr="90">
          <attribute name="description">the red car</attribute>
        </box>
        <polygon label="tree" points="200,5;260,5;230,190"/>
        <mask label="dog" rle="3, 4, 5" left="7" top="8" width="3" height="4"/>
      </image>
    </annotations>

The words of a shape are an attribute of it (`description`, `caption` or the like), else its label where the image has
one such shape; words that several shapes have refer to all of these. A rotated box is refused. Tracks of videos, and
shapes without an area, are left out.
"""

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .findings import Findings
from .masks import encode_mask, to_segmentation
from .quoting import explain, quote
from .reading import MAX_PIXELS, parse_xml
from .records import LabeledObject, expressions_of_objects, texts_of


def read_cvat(path: Path, findings: Findings, text_field: str | None = None) -> Iterator[tuple[str, dict]]:
    """
    Yield (position, line) of each expression of a file.

    Args:
        path (`Path`): the file.
        findings ([`Findings`]): takes what is left out, and malformed shapes.
        text_field (`str`, *optional*): the attribute of a shape that has its words.

    Raises:
        OSError, ValueError: if the file is missing, or is not CVAT's.
    """
    try:
        root = parse_xml(path)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not XML of CVAT: {explain(error)}.") from error
    if root.tag != "annotations":
        raise ValueError(f"{str(path)!r} begins with <{root.tag}>; expected <annotations> of CVAT for images 1.1.")
    findings.left_out.update(
        {"tracks of videos": len(root.findall("track"))} if root.find("track") is not None else {}
    )
    for number, image in enumerate(root.iterfind("image")):
        where, line, objects = f"{str(path)!r}, image {number}", None, []
        with findings.entry(where):
            size = (read_attribute(image, "width"), read_attribute(image, "height"))
            line = {"image": image.get("name"), "width": int(size[0]), "height": int(size[1]), "box_format": "xyxy"}
        for index, shape in enumerate(image if line else ()):
            position = f"{where}, shape {index}"
            with findings.entry(position):
                if float(shape.get("rotation") or 0):
                    message = f"rotation is {quote(shape.get('rotation'))}; expected 0: draw it again without."
                    findings.refuse(position, message, "shapes that are rotated")
                    continue
                target = target_of_shape(shape, line["width"], line["height"])
                if target is None:
                    findings.leave_out(f"shapes of type {quote(shape.tag)}")
                    continue
                attributes = {item.get("name"): item.text for item in shape.iterfind("attribute")}
                texts = texts_of({"attributes": attributes}, text_field)
                objects.append(LabeledObject(position, target, shape.get("label"), texts))
        for position, expression in expressions_of_objects(objects, findings):
            yield position, {**line, "expressions": [expression]}


def target_of_shape(shape: ElementTree.Element, width: int, height: int) -> dict | None:
    """
    Return the fields of a line for a shape in an image of (width, height); None where it has no area.

    Raises:
        ValueError: if its numbers are malformed.
    """
    if shape.tag == "box":
        return {"box": [read_attribute(shape, name) for name in ("xtl", "ytl", "xbr", "ybr")]}
    if shape.tag == "polygon":
        points = shape.get("points", "")
        return {"polygon": [[float(number) for point in points.split(";") for number in point.split(",")]]}
    if shape.tag == "mask":
        return {"segmentation": read_mask_shape(shape, width, height)}
    return None


def read_mask_shape(shape: ElementTree.Element, width: int, height: int) -> dict:
    """
    Return the run lengths of a mask, which CVAT stores row by row in the rectangle around it.

    Raises:
        ValueError: if they do not fill the rectangle, or it leaves the image.
    """
    left, top, across, down = (int(read_attribute(shape, name)) for name in ("left", "top", "width", "height"))
    is_inside = min(left, top) >= 0 and 0 < across <= width - left and 0 < down <= height - top
    lengths = [int(number) for number in shape.get("rle", "").split(",")]
    if not is_inside or width * height > MAX_PIXELS or min(lengths) < 0 or sum(lengths) != across * down:
        raise ValueError(f"the mask has rle {quote(shape.get('rle'))}; expected lengths that fill {across} x {down}.")
    mask = np.zeros((height, width), np.uint8)
    values = np.repeat(np.arange(len(lengths)) % 2, lengths)
    mask[top : top + down, left : left + across] = values.reshape(down, across)
    return to_segmentation(encode_mask(mask), keep_empty=True)


def read_attribute(element: ElementTree.Element, name: str) -> float:
    """Return a number that is an attribute of an element; raise a ValueError if it is missing."""
    try:
        return float(element.get(name, ""))
    except ValueError as error:
        raise ValueError(f"{name} of <{element.tag}> is {quote(element.get(name))}; expected a number.") from error
