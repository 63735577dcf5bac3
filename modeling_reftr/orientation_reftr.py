"""Turn images upright by their EXIF orientation."""

import threading

from PIL import ExifTags, Image


# The transposition that turns an image of each EXIF orientation upright, as in PIL.ImageOps.exif_transpose.
TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
INVERSE_TRANSPOSES = {**TRANSPOSES, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
# Pillow marks the EXIF data of an image as read before it reads them: a second thread would find none.
EXIF_LOCK = threading.Lock()
# The fields of `Image.info` in which Pillow looks for an orientation.
ORIENTATION_FIELDS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")


def keeps_stored_orientation(
    orientation: int, stored_size: tuple[int, int], original_size: tuple[int, int] | None
) -> bool:
    """
    Return whether an image was annotated as it is stored, so that its EXIF orientation must be ignored.

    This is so if only the stored size agrees with the annotated one. All other images follow their orientation,
    including square ones and those of the orientations 2 to 4.

    Args:
        orientation (`int`): the EXIF orientation, 1 to 8; from 5 on, height and width are exchanged.
        stored_size (`(height, width)`): the size of the stored pixels.
        original_size (`(height, width)`, *optional*): the size that the image was annotated at, if known.

    Example:

    ```python
    >>> from modeling_reftr.orientation_reftr import keeps_stored_orientation

    >>> keeps_stored_orientation(6, (30, 40), (30, 40)), keeps_stored_orientation(6, (30, 40), (40, 30))
    (True, False)

    ```"""
    stored_size = tuple(stored_size)
    turned_size = stored_size[::-1] if orientation >= 5 else stored_size
    return original_size is not None and stored_size == tuple(original_size) != turned_size


def read_orientation(image: Image.Image) -> int:
    """
    Return the EXIF orientation of an image, 1 to 8; 1 if it has none or an invalid one.

    Raises:
        OSError: if the EXIF data is damaged.
    """
    try:
        if image.format == "PNG":
            # The EXIF data of a PNG may follow its pixels. Decode outside of the lock, which all threads share.
            image.load()
        with EXIF_LOCK:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return orientation if orientation in TRANSPOSES else 1
    except Exception as error:
        raise OSError(f"The EXIF data of an image of {image.width} x {image.height} pixels is damaged: {error}") from (
            error
        )


def load_as_stored(image: Image.Image) -> Image.Image:
    """
    Decode an image without applying its orientation.

    Pillow turns a TIFF while it decodes it; here it is turned back and keeps its orientation.

    Raises:
        OSError: if the image or its EXIF data is damaged.
    """
    orientation = read_orientation(image) if image.format == "TIFF" else 1
    image.load()
    if orientation == 1:
        return image
    stored = image.transpose(INVERSE_TRANSPOSES[orientation])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored.info["exif"] = exif.tobytes()
    return stored


def turn_upright(image: Image.Image, original_size: tuple[int, int] | None = None) -> Image.Image:
    """
    Turn an image upright by its EXIF orientation, as OpenCV does, unless `keeps_stored_orientation`.

    The result has no orientation, so it is not turned a second time. The given image is not changed.

    Args:
        image (`PIL.Image.Image`): the image.
        original_size (`(height, width)`, *optional*): the size that the image was annotated at.

    Raises:
        OSError: if the EXIF data is damaged.
    """
    image = load_as_stored(image) if image.format == "TIFF" else image
    orientation = read_orientation(image)
    if orientation == 1:
        return image
    if keeps_stored_orientation(orientation, (image.height, image.width), original_size):
        upright = image.copy()
    else:
        upright = image.transpose(TRANSPOSES[orientation])
    for field in ORIENTATION_FIELDS:
        upright.info.pop(field, None)
    return upright
