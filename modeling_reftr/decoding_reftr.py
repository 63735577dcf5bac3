"""The formats that images are decoded from, and the one call that opens them."""

import os
import struct
import sys
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError


# What photographs and masks come in: cameras and phones write JPEG and MPO (a JPEG with more images behind it), the
# web PNG, WEBP, GIF and AVIF (servers send the latter under names that end in .jpg), scanners and microscopes TIFF,
# and older datasets BMP and PPM (with PGM and PBM). Pillow knows forty more. One starts a program for any file whose
# content asks for it, whatever its name (EPS: Ghostscript), one has Windows draw (WMF), and the others are seldom
# used and seldom tested, among them JPEG2000: whoever has such images converts them once.
IMAGE_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
ACCEPTED = f"{', '.join(IMAGE_FORMATS[:-1])} and {IMAGE_FORMATS[-1]}"
# MPO is a JPEG until it is opened; AVIF is last because Pillow before 11.3 does not know it
_DECODERS = tuple(name for name in IMAGE_FORMATS if name != "MPO")
# An image of this size takes half a gigabyte as a float tensor, and a file of a few kilobytes can claim to be larger.
MAX_PIXELS = 50_000_000


def open_file(source: str | os.PathLike | BinaryIO) -> Image.Image:
    """
    Open an image file of one of `IMAGE_FORMATS`, by its content and not by its name. Nothing is decoded yet.

    Args:
        source (`str`, `os.PathLike` or binary file): the file.

    Raises:
        OSError: if it is missing, or in another format, which is named where its first bytes tell it.
    """
    try:
        return Image.open(source, formats=_DECODERS)
    except (UnidentifiedImageError, KeyError):  # a KeyError is of a decoder that this Pillow does not have
        pass
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            prefix = file.read(16)
    else:
        source.seek(0)
        prefix = source.read(16)
    found = name_format(prefix)
    if found in IMAGE_FORMATS:
        raise OSError(f"it begins as {found}, but is damaged, or this Pillow was built without {found}")
    raise OSError(
        f"its content looks like {'no known format' if found is None else found}, and the accepted formats are "
        f"{ACCEPTED}: convert it to one of them"
    )


def name_format(prefix: bytes) -> str | None:
    """
    Return Pillow's name of the format that a file is in, None where its first 16 bytes do not tell.

    Example:

    ```python
    >>> from modeling_reftr.decoding_reftr import name_format

    >>> name_format(b"%!PS-Adobe-3.0 E")
    'EPS'

    ```"""
    if prefix[4:12] in (b"ftypheic", b"ftypheix"):
        return "HEIC"  # of many phones; Pillow itself does not know it
    Image.init()
    for name, (_, accepts) in Image.OPEN.items():
        try:
            if accepts is not None and accepts(prefix):
                return name
        except (struct.error, IndexError):
            continue  # fewer bytes than it compares
    return None


def check_format(image: Image.Image):
    """
    Refuse a PIL image that was opened from a file of another format, before anything decodes it.

    Raises:
        ValueError: if its `format` is none of `IMAGE_FORMATS`. One that was made in memory has none, and is taken.
    """
    if image.format is not None and image.format not in IMAGE_FORMATS:
        raise ValueError(
            f"A PIL image of the format {image.format} is refused, and the accepted formats are {ACCEPTED}: convert "
            'its file, or, if you trust it, decode it yourself by image.convert("RGB").'
        )


def is_undecoded(image) -> bool:
    """Return whether this is an image as `datasets.Image(decode=False)` gives it, a dict of "bytes" and "path"."""
    return isinstance(image, dict) and image.keys() == {"bytes", "path"}


def without_decoding(images):
    """
    Return a dataset of the datasets library, or one of its columns, with images that are not decoded; anything else as
    it is. That library would decode whatever Pillow knows. A dataset with a transform of its own stays as it is, too.

    Example:

    ```python
    >>> import datasets
    >>> from modeling_reftr.decoding_reftr import without_decoding

    >>> rows = datasets.Dataset.from_dict({"image": ["1.jpg"]}).cast_column("image", datasets.Image())
    >>> list(without_decoding(rows["image"]))
    [{'bytes': None, 'path': '1.jpg'}]

    ```"""
    if hasattr(images, "source") and hasattr(images, "column_name"):  # Column and IterableColumn of datasets
        return type(images)(without_decoding(images.source), images.column_name)
    if hasattr(images, "dataset") and hasattr(images, "key"):  # KeyDataset of transformers
        return type(images)(without_decoding(images.dataset), images.key)
    datasets = sys.modules.get("datasets")  # without it nothing is one of its datasets
    if datasets is None or not isinstance(images, (datasets.Dataset, datasets.IterableDataset)):
        return images
    if isinstance(images, datasets.Dataset) and images.format["type"] is not None:
        if images.format["type"] == "custom":
            return images
        images = images.with_format(None)
    for name, feature in (images.features or {}).items():
        if isinstance(feature, datasets.Image):
            images = images.cast_column(name, datasets.Image(decode=False))
    return images
