"""
Pictures at the model's size: read, turned upright and resized as the image processor does it, and kept in a folder
where one is given. Nothing here holds a collective; any number of processes may share a folder.
"""

import hashlib
import io
import logging
import math
import os
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from data_scripts.atomic_files import write_file
from data_scripts.checking import picture_of
from modeling_reftr.image_processing_reftr import open_image, resized_size
from modeling_reftr.orientation_reftr import turn_upright
from modeling_reftr.pixels_reftr import height_and_width


logger = logging.getLogger(__name__)

CHECKSUM_BYTES = 4
# of kept images: another one where the same file gives other pixels than before
CACHE_VERSION = 2


def read_picture(row: dict) -> Image.Image:
    """
    Return the image of a row that is not decoded, in the frame of its boxes.

    Raises:
        OSError, ValueError: see `open_image` and `check_frame`.
    """
    image = turn_upright(open_image(picture_of(row)), (row["height"], row["width"]))
    check_frame(row, image)
    return image


def check_frame(row: dict, image):
    """
    Refuse an image and boxes of which one was turned and the other was not.

    Raises:
        ValueError: if height and width of the image are those of the row in the other order.
    """
    row_size, size = (row["height"], row["width"]), height_and_width(image)
    if row_size == size[::-1] != size:
        raise ValueError(
            f"The image of {row['image_id']!r} has (height, width) {size} and its boxes are in {row_size}: one of "
            "them was turned. Correct the row; or, where the datasets library turned the image by its EXIF "
            "orientation, read the rows with datasets.Image(decode=False)."
        )


class PictureReader:
    """
    Reads pictures of rows at the size that the image processor resizes them to, with its own resizing.

    Args:
        image_processor ([`RefTRImageProcessor`]): what resizes.
        folder (`str`, *optional*): where resized pictures are kept.

    A kept picture is a `.npy` array with its CRC-32 behind it. Uncompressed, for of 640 x 480 pixels a PNG takes
    longer to read (11 to 13 ms) than a JPEG (2 ms), an array 0.4 ms; it takes 0.9 MB. Its name is a hash of the file's
    path, size and time of change (of its content, where the row holds it) and of how it is resized.
    """

    def __init__(self, image_processor, folder: str | None = None):
        self.image_processor = image_processor
        self.folder = None if folder is None else Path(folder)
        size = sorted(dict(image_processor.size).items())
        self.resizing = repr((CACHE_VERSION, image_processor.do_resize, size, int(image_processor.resample)))

    def __call__(self, row: dict) -> Image.Image:
        """
        The upright, resized picture of a row of which nothing is decoded yet.

        Raises:
            OSError: if the picture is missing or damaged, or the folder cannot be written.
            ValueError: if it has too many pixels.
        """
        if self.folder is None:
            return self.resize(read_picture(row))
        path = self.path_of(row)
        try:
            return Image.fromarray(decode_array(path.read_bytes()))
        except FileNotFoundError:
            pass  # not kept yet
        except ValueError as error:
            logger.warning(f"{str(path)!r} is damaged ({error}) and is made again.")
        picture = self.resize(read_picture(row))
        write_file(path, encode_array(np.asarray(picture)), durable=False)  # a damaged one is made again
        return picture

    def path_of(self, row: dict) -> Path:
        """
        Where a row's picture is kept.

        Raises:
            OSError: if the picture is missing.
        """
        image = row["image"]
        if image["bytes"] is not None:
            identity = hashlib.sha256(image["bytes"]).hexdigest()
        else:
            try:
                status = os.stat(image["path"])
            except FileNotFoundError as error:
                raise OSError(f"There is no picture at {image['path']!r}.") from error
            identity = f"{os.path.abspath(image['path'])} {status.st_size} {status.st_mtime_ns}"
        # the annotated size decides whether a picture is turned
        words = f"{identity} {row['height']} {row['width']} {self.resizing}"
        name = hashlib.sha256(words.encode()).hexdigest()
        return self.folder / name[:2] / f"{name[2:]}.npy"

    def resize(self, picture: Image.Image) -> Image.Image:
        """A picture of any mode -> RGB at the model's size."""
        processor = self.image_processor
        shorter, longer = processor.size["shortest_edge"], processor.size["longest_edge"]
        size = (picture.height, picture.width)
        is_rgb = picture.mode == "RGB" and "transparency" not in picture.info
        if is_rgb and shorter and longer and resized_size(*size, shorter, longer) == size:
            return picture
        pixels = processor(picture, do_rescale=False, do_normalize=False, do_pad=False, return_tensors="pt")
        return Image.fromarray(pixels["pixel_values"][0].permute(1, 2, 0).numpy())


def encode_array(array: np.ndarray) -> bytes:
    """An array as a `.npy` file with its checksum behind it."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    content = file.getvalue()
    return content + zlib.crc32(content).to_bytes(CHECKSUM_BYTES, "little")


def decode_array(content: bytes) -> np.ndarray:
    """
    What `encode_array` was given.

    Raises:
        ValueError: if a byte is missing or another, or it is not an RGB image of the size that it has.
    """
    content, checksum = content[:-CHECKSUM_BYTES], content[-CHECKSUM_BYTES:]
    if zlib.crc32(content).to_bytes(CHECKSUM_BYTES, "little") != checksum:
        raise ValueError("its checksum differs")
    file = io.BytesIO(content)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("it is not of the version that is written")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype != np.uint8 or shape[2:] != (3,) or math.prod(shape) != len(content) - file.tell():
        raise ValueError(f"its header claims {dtype} of {shape}")
    return np.load(io.BytesIO(content), allow_pickle=False)
