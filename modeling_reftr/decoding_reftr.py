"""Define the image formats that are decoded, and open files of these formats only."""

import os
import struct
import sys
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError


# Formats of photographs and masks: cameras and phones write JPEG and MPO (a JPEG followed by more images), the web
# uses PNG, WEBP, GIF and AVIF (which servers send under names that end in .jpg), scanners and microscopes TIFF, and
# older datasets BMP and PPM (with PGM and PBM). Pillow knows forty more: one starts a program for any file with
# matching content, whatever its name (EPS: Ghostscript), one has Windows draw (WMF), and the others, JPEG2000 among
# them, are rarely used and rarely tested. Images in these formats must be converted once.
IMAGE_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
ACCEPTED_FORMATS = f"{', '.join(IMAGE_FORMATS[:-1])} and {IMAGE_FORMATS[-1]}"
# MPO is opened as JPEG. AVIF is last because Pillow before 11.3 does not know it.
_DECODERS = tuple(name for name in IMAGE_FORMATS if name != "MPO")
# An image of this size takes half a gigabyte as a float tensor, and a file of a few kilobytes can claim to be larger.
MAX_PIXELS = 50_000_000


def open_image_file(source: str | os.PathLike | BinaryIO) -> Image.Image:
    """
    Open an image file of one of `IMAGE_FORMATS`, judged by its content and not by its name, without decoding it.

    Args:
        source (`str`, `os.PathLike` or binary file): the file.

    Raises:
        OSError: if the file is missing or has another format, which is named if its first bytes identify it.
    """
    try:
        return Image.open(source, formats=_DECODERS)
    except (UnidentifiedImageError, KeyError):  # a KeyError means that this Pillow lacks a decoder
        pass
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            prefix = file.read(16)
    else:
        source.seek(0)
        prefix = source.read(16)
    found = detect_format(prefix)
    if found in IMAGE_FORMATS:
        raise OSError(f"it begins as {found}, but is damaged, or this Pillow was built without {found}")
    raise OSError(
        f"its content looks like {'no known format' if found is None else found}, and the accepted formats are "
        f"{ACCEPTED_FORMATS}: convert it to one of them"
    )


def detect_format(prefix: bytes) -> str | None:
    """
    Return Pillow's name of a file's format, or None if its first 16 bytes do not identify it.

    Example:

    ```python
    >>> from modeling_reftr.decoding_reftr import detect_format

    >>> detect_format(b"%!PS-Adobe-3.0 E")
    'EPS'

    ```"""
    if prefix[4:12] in (b"ftypheic", b"ftypheix"):
        return "HEIC"  # written by many phones, unknown to Pillow
    Image.init()
    for name, (_, accepts) in Image.OPEN.items():
        try:
            if accepts is not None and accepts(prefix):
                return name
        except (struct.error, IndexError):
            continue  # the prefix is shorter than this format's signature
    return None


def check_format(image: Image.Image) -> None:
    """
    Reject a PIL image that was opened from a file of another format, before anything decodes it.

    Raises:
        ValueError: if its `format` is not in `IMAGE_FORMATS`. Images made in memory have none and are accepted.
    """
    if image.format is not None and image.format not in IMAGE_FORMATS:
        raise ValueError(
            f"A PIL image of the format {image.format} is not accepted, only {ACCEPTED_FORMATS}: convert its file, "
            'or, if you trust it, decode it yourself with image.convert("RGB").'
        )


def is_undecoded(image: Any) -> bool:
    """Return whether a value is an image as from `datasets.Image(decode=False)`, a dict of "bytes" and "path"."""
    return isinstance(image, dict) and image.keys() == {"bytes", "path"}


def without_decoding(images: Any) -> Any:
    """
    Return a dataset of the datasets library, or one of its columns, with images that are not decoded.

    That library would decode any format that Pillow knows. Other values, and a dataset with a custom transform, are
    returned unchanged.

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
    datasets = sys.modules.get("datasets")  # unless it was imported, no value is one of its datasets
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
