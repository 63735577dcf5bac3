"""RefTR's image processor: resize, normalise, pad; boxes back to the picture."""

from .requirements_reftr import MINIMUM_TRANSFORMERS  # noqa: F401 -- first: older releases lack names used below


# isort: split
import base64
import contextlib
import io
import math
import os
import threading
from numbers import Integral, Real
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import ExifTags, Image, ImageCms
from torch import nn
from torchvision.ops import box_convert
from torchvision.transforms.v2 import functional as tvF
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_transforms import group_images_by_shape, reorder_images
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs

from .configuration_reftr import AUTO_MAP
from .decoding_reftr import MAX_PIXELS, check_format, is_undecoded, open_file, without_decoding
from .fetching_reftr import MAX_BYTES, fetch
from .inputs_reftr import check_setting, is_sequence, to_list, to_sizes, to_threshold, warn_about_joined_expressions
from .loading_reftr import IMAGE_PROCESSOR_FILES, naming_files
from .quoting_reftr import explain, quote


MAX_IMAGE_DEPTH = 3  # of nested lists of images


def resized_size(height: int, width: int, shortest_edge: int, longest_edge: int) -> tuple[int, int]:
    """
    Height and width after the published resize, which keeps the aspect ratio; never under 1 pixel. The library's own
    `get_size_with_aspect_ratio` rounds otherwise.

    Example:

    ```python
    >>> from modeling_reftr.image_processing_reftr import resized_size

    >>> resized_size(500, 333, shortest_edge=640, longest_edge=640)
    (639, 426)

    ```"""
    shorter, longer = min(height, width), max(height, width)
    short = shortest_edge
    if longer / shorter * short > longest_edge:
        short = round(longest_edge * shorter / longer)
    if shorter == short:
        return height, width
    long = int(short * longer / shorter)
    new_height, new_width = (short, long) if height <= width else (long, short)
    return max(1, new_height), max(1, new_width)


# what turns an image of an EXIF orientation upright, as in PIL.ImageOps.exif_transpose
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
UNDONE_TURNS = {**TURNS, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
# an image that one thread is reading the EXIF data of has none for another: Pillow marks it as read beforehand
EXIF_LOCK = threading.Lock()
# the fields of `Image.info` in which Pillow finds an orientation
ORIENTATION_FIELDS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")


def keeps_stored_frame(orientation: int, stored_size: tuple[int, int], annotated_size: tuple[int, int] | None) -> bool:
    """
    Return whether an image stays as it is stored: only its stored size agrees with the annotated one. Anything else
    follows the EXIF orientation, square images and orientations 2 to 4 included.

    Args:
        orientation (`int`): of EXIF, 1 to 8; from 5 on, height and width change places.
        stored_size, annotated_size (`(height, width)`): `annotated_size` is None where it is unknown.

    Example:

    ```python
    >>> from modeling_reftr.image_processing_reftr import keeps_stored_frame

    >>> keeps_stored_frame(6, (30, 40), (30, 40)), keeps_stored_frame(6, (30, 40), (40, 30))
    (True, False)

    ```"""
    stored_size = tuple(stored_size)
    turned_size = stored_size[::-1] if orientation >= 5 else stored_size
    return annotated_size is not None and stored_size == tuple(annotated_size) != turned_size


def read_orientation(image: Image.Image) -> int:
    """
    Return the EXIF orientation of an image, 1 to 8; 1 where it has none or one that does not exist.

    Raises:
        OSError: if the EXIF data is damaged.
    """
    try:
        if image.format == "PNG":
            image.load()  # its EXIF may stand behind its pixels; one thread would decode for all under the lock
        with EXIF_LOCK:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return orientation if orientation in TURNS else 1
    except Exception as error:
        raise OSError(f"The EXIF data of an image of {image.width} x {image.height} pixels is damaged: {error}") from (
            error
        )


def load_as_stored(image: Image.Image) -> Image.Image:
    """
    Decode an image. A TIFF, which Pillow turns while it decodes, is turned back and keeps its orientation.

    Raises:
        OSError: if the image or its EXIF data is damaged.
    """
    orientation = read_orientation(image) if image.format == "TIFF" else 1
    image.load()
    if orientation == 1:
        return image
    stored = image.transpose(UNDONE_TURNS[orientation])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored.info["exif"] = exif.tobytes()
    return stored


def turn_upright(image: Image.Image, annotated_size: tuple[int, int] | None = None) -> Image.Image:
    """
    Turn an image as its EXIF orientation says, as OpenCV does, unless `keeps_stored_frame`. The result carries no
    orientation, so nothing turns it a second time. The given image is not changed.

    Args:
        annotated_size (`(height, width)`, *optional*): the size that the image was annotated at.

    Raises:
        OSError: if the EXIF data is damaged.
    """
    image = load_as_stored(image) if image.format == "TIFF" else image
    orientation = read_orientation(image)
    if orientation == 1:
        return image
    if keeps_stored_frame(orientation, (image.height, image.width), annotated_size):
        turned = image.copy()
    else:
        turned = image.transpose(TURNS[orientation])
    for field in ORIENTATION_FIELDS:
        turned.info.pop(field, None)
    return turned


def find_channel_axis(image: np.ndarray | torch.Tensor, input_data_format=None) -> int | None:
    """
    Return the axis of an image's channels: 0 or 2, None for a grey image of two dimensions. Where both ends of a shape
    could be channels, a NumPy array has them last and a tensor first.

    Args:
        input_data_format (`str` or `ChannelDimension`, *optional*): "channels_first" or "channels_last", if known.

    Raises:
        ValueError: if there are not 1, 3 or 4 channels.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_reftr.image_processing_reftr import find_channel_axis

    >>> find_channel_axis(np.zeros((480, 640, 3))), find_channel_axis(np.zeros((3, 480, 640)))
    (2, 0)

    ```"""
    shape = tuple(image.shape)
    if len(shape) == 2:
        return None
    if len(shape) != 3:
        raise ValueError(f"An image must have two or three dimensions, got the shape {shape}.")
    if input_data_format is not None:
        axes = [0 if ChannelDimension(input_data_format) == ChannelDimension.FIRST else 2]
    else:
        axes = [0, 2] if isinstance(image, torch.Tensor) else [2, 0]
    for axis in axes:
        if shape[axis] in (1, 3, 4):
            return axis
    raise ValueError(
        f"An image must have 1, 3 or 4 channels, first or last; the shape {shape} has "
        f"{' or '.join(str(shape[axis]) for axis in axes)}. Give (height, width, 3) or (3, height, width)."
    )


def picture_size(image, input_data_format=None) -> tuple[int, int]:
    """
    Return (height, width) of a PIL image, an array or a tensor, see `find_channel_axis`.

    Raises:
        ValueError: if an array has not 1, 3 or 4 channels.
    """
    if isinstance(image, Image.Image):
        return image.height, image.width
    shape, axis = tuple(image.shape), find_channel_axis(image, input_data_format)
    return shape if axis is None else shape[1:] if axis == 0 else shape[:2]


def check_picture(image, name: str = "A picture", input_data_format=None):
    """
    Refuse an image that would take gigabytes, or a PIL image of another format than `IMAGE_FORMATS`; of a file nothing
    is decoded yet.

    Raises:
        ValueError: if it has no pixel or more than `MAX_PIXELS`, an array has not 1, 3 or 4 channels, or a PIL image
            is of another format.
    """
    if isinstance(image, Image.Image):
        check_format(image)
    height, width = picture_size(image, input_data_format)
    if not 0 < height * width <= MAX_PIXELS:
        raise ValueError(
            f"{name} has {width} x {height} pixels; between 1 and {MAX_PIXELS:,} are taken: make it smaller first."
        )


# relative error of values at the ends of their range, as interpolation leaves it
RANGE_TOLERANCE = 1e-4


def scale_to_8_bits(pixels: torch.Tensor) -> torch.Tensor:
    """
    Bring the values of one image to 0..255.

    | values | are taken as |
    | --- | --- |
    | bool | 0 and 255 |
    | uint8 | 0..255 |
    | floating point in 0..1 | multiplied by 255 and rounded |
    | floating point in 0..255, the largest at least 2 | 0..255 |
    | uint16, the largest over 255 | divided by 257 and rounded |
    | wider integers in 0..255, the largest at least 2 | 0..255 |

    Everything else is refused, because two ranges are possible, or none: negative values, values that are not finite,
    int8, complex numbers. An image of zeros alone is black in every range.

    Args:
        pixels (`torch.Tensor` of shape `(channels, height, width)`): of any dtype.

    Returns:
        `torch.Tensor` of that shape: uint8, or float32 where floating-point values in 0..255 are no whole numbers.

    Raises:
        ValueError: if the range is not clear.

    Example:

    ```python
    >>> import torch
    >>> from modeling_reftr.image_processing_reftr import scale_to_8_bits

    >>> scale_to_8_bits(torch.tensor([[[0.0, 0.5, 1.0]]]))
    tensor([[[  0, 128, 255]]], dtype=torch.uint8)
    >>> scale_to_8_bits(torch.tensor([[[0, 65535]]], dtype=torch.uint16))
    tensor([[[  0, 255]]], dtype=torch.uint8)

    ```"""
    dtype = str(pixels.dtype).removeprefix("torch.")
    height, width = pixels.shape[-2:]
    name = f"An image of {width} x {height} pixels"
    if pixels.dtype == torch.uint8:
        return pixels
    if pixels.dtype == torch.bool:
        return pixels.to(torch.uint8) * 255
    if pixels.is_complex() or pixels.dtype == torch.int8:
        raise ValueError(f"{name} has values of dtype {dtype}, which is not one of images: convert it to uint8.")
    if pixels.is_floating_point():
        return scale_floats(pixels.float(), name, dtype)
    is_16_bit = pixels.dtype == torch.uint16
    pixels = pixels.to(torch.int64)  # the unsigned ones can do next to nothing
    low, high = (value.item() for value in pixels.aminmax())
    if low == high == 0:
        return pixels.to(torch.uint8)
    if is_16_bit and high > 255:
        return ((pixels + 128) // 257).to(torch.uint8)
    if is_16_bit or low < 0 or not 2 <= high <= 255:
        raise ValueError(
            f"{name} has {dtype} values from {low} to {high}, which may be of several ranges: give uint8 in 0..255, "
            "uint16 in 0..65535, or floating point in 0..1."
        )
    return pixels.to(torch.uint8)


def scale_floats(pixels: torch.Tensor, name: str, dtype: str) -> torch.Tensor:
    """Bring float32 values of an image to 0..255, see `scale_to_8_bits`."""
    low, high = (value.item() for value in pixels.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name} has values that are not finite numbers.")
    limit = 1 if high <= 1 + RANGE_TOLERANCE else 255
    highs = [high] if len(pixels) < 4 else [part.max().item() for part in (pixels[:3], pixels[3:])]
    is_clear = all(value == 0 or (value >= 2) == (limit == 255) for value in highs)
    if low < -RANGE_TOLERANCE * limit or high > limit * (1 + RANGE_TOLERANCE) or not is_clear:
        raise ValueError(
            f"{name} has {dtype} values from {low:g} to {high:g}{'' if len(highs) == 1 else ' (colors and opacity)'}, "
            "which are neither all in 0..1 nor all in 0..255: scale or clip them to one of the two, or give "
            "do_rescale=False for values that are final."
        )
    rounded = (pixels * (255 // limit)).clamp(0, 255).round()
    if limit == 1 or torch.equal(rounded, pixels):
        return rounded.to(torch.uint8)
    return pixels.clamp(0, 255)


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """
    Return an array of any byte order, strides or protection as a tensor.

    Raises:
        ValueError: if it holds no numbers.
    """
    if image.dtype.kind not in "buifc":
        raise ValueError(f"An image of dtype {image.dtype} holds no numbers: give uint8 in 0..255.")
    dtype = np.dtype(np.float64) if image.dtype == np.longdouble else image.dtype.newbyteorder("=")
    # torch takes no negative strides, and warns of memory that is protected
    if dtype != image.dtype or not image.flags.writeable or min(image.strides, default=0) < 0:
        image = np.array(image, dtype=dtype, order="C")
    return torch.from_numpy(np.asarray(image))


def to_channels_first(image, input_data_format=None, do_rescale: bool = True, device=None) -> torch.Tensor:
    """
    Return an image as a tensor of 8-bit range with its channels first.

    Args:
        image (`np.ndarray` or `torch.Tensor`): of two dimensions, or three with 1, 3 or 4 channels, see
            `find_channel_axis`.
        input_data_format (`str` or `ChannelDimension`, *optional*): "channels_first" or "channels_last", if known.
        do_rescale (`bool`, *optional*, defaults to `True`): whether values are brought to 0..255
            (`scale_to_8_bits`); else they are final.
        device (`torch.device`, *optional*): where the tensor is to be.

    Returns:
        `torch.Tensor` of shape `(channels, height, width)`.

    Raises:
        ValueError: if it is no image, or the range of its values is not clear.
    """
    axis = find_channel_axis(image, input_data_format)
    pixels = (to_tensor(image) if isinstance(image, np.ndarray) else image.detach()).to(device)
    pixels = pixels[None] if axis is None else pixels.movedim(axis, 0)
    if do_rescale:
        return scale_to_8_bits(pixels).contiguous()
    if pixels.is_complex():
        raise ValueError(f"An image of shape {tuple(image.shape)} has complex values: give real ones.")
    if pixels.is_floating_point():
        if not pixels.isfinite().all():
            height, width = pixels.shape[-2:]
            raise ValueError(f"An image of {width} x {height} pixels has values that are not finite numbers.")
        return pixels.float().contiguous()
    return pixels.to(torch.uint8 if pixels.dtype in (torch.bool, torch.uint8) else torch.int64).contiguous()


def to_rgb(image: Image.Image) -> np.ndarray:
    """
    Return a PIL image of any mode as an array (height, width, 3) of uint8; transparent pixels are white.

    Raises:
        ValueError: if the range of a mode of 16 or 32 bits is not clear, see `scale_to_8_bits`.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return np.array(image)
    if image.mode[0] in "IF":
        values = np.asarray(image)
        if image.mode == "I" and values.min() >= 0 and 255 < values.max() <= 65535:
            values = values.astype(np.uint16)  # Pillow's mode for 16 bits where I;16 cannot be
        return np.repeat(to_channels_first(values).round().to(torch.uint8).permute(1, 2, 0).numpy(), 3, axis=2)
    if image.mode == "LAB":
        profiles = (ImageCms.createProfile(space) for space in ("LAB", "sRGB"))
        image = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    elif image.mode.endswith("a"):  # multiplied by their opacity
        image = image.convert(f"{image.mode[:-1]}A")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def to_pil_image(image) -> Image.Image:
    """
    Return an array or a tensor as the image that the model sees, of mode RGB; a PIL image as it is.

    Raises:
        ValueError: see `to_channels_first`.
    """
    if isinstance(image, Image.Image):
        return image
    pixels = to_channels_first(image)
    pixels = blend_onto_white(pixels) if len(pixels) == 4 else pixels.expand(3, -1, -1)
    return Image.fromarray(pixels.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def blend_onto_white(pixels: torch.Tensor) -> torch.Tensor:
    """Return RGBA pixels (4, height, width) in 0..255 as RGB over white."""
    opacity = pixels[3:].float() / 255
    blended = pixels[:3].float() * opacity + 255 * (1 - opacity)
    return blended if pixels.is_floating_point() else blended.round().to(pixels.dtype)


@contextlib.contextmanager
def reading(name: str):
    """Turn whatever a decoder raises into an OSError, or a ValueError of a picture too large, with its name."""
    try:
        yield
    except FileNotFoundError as error:
        raise OSError(f"There is no picture at {name}.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has more than {MAX_PIXELS:,} pixels: make it smaller first.") from error
    except Exception as error:
        raise OSError(f"{name} cannot be read as a picture: {explain(error)}") from error


def open_image(source: str | os.PathLike | bytes | BinaryIO, allow_private: bool = False) -> Image.Image:
    """
    Open an image of one of `IMAGE_FORMATS` and decode it as it is stored: `turn_upright` is for its orientation.

    Args:
        source (`str`, `os.PathLike`, `bytes` or binary file):
            A path, a URL, the content itself in base64 ("data:image/png;base64,...") or as bytes, or a file. Only a
            `str` is taken for a URL or for base64.
        allow_private (`bool`, *optional*, defaults to `False`):
            Whether a URL may be at an address of this machine or of a private network.

    Raises:
        ValueError: if it has more than `MAX_PIXELS` pixels; found out before any is decoded.
        OSError: if a file is missing, is in another format or has damaged EXIF data, or a URL is at a private
            address, takes more than 20 seconds, or has, like base64, more than 64 MB.

    Example:

    ```python
    >>> from modeling_reftr import open_image

    >>> open_image(b"P5 2 1 255 ab").size
    (2, 1)

    ```"""
    is_named = isinstance(source, (str, os.PathLike)) or hasattr(source, "name")
    name = repr(str(source)[:200]) if is_named else "The content"
    with reading(name):
        if isinstance(source, str) and source[:8].lower().startswith(("http://", "https://")):
            source = fetch(source, allow_private)
        elif isinstance(source, str) and source[:5].lower() == "data:":
            if len(source) > MAX_BYTES * 4 / 3:
                raise OSError(f"it has more than {MAX_BYTES:,} bytes")
            source = base64.b64decode(source.partition(",")[2], validate=True)
        image = open_file(io.BytesIO(source) if isinstance(source, bytes) else source)
    check_picture(image, name)
    with reading(name):
        image = load_as_stored(image)
        read_orientation(image)
    return image


def open_undecoded(image: dict) -> Image.Image:
    """
    Open an image of a row, a dict of its "bytes" or else its "path", see `open_image`. No URL is fetched.

    Raises:
        ValueError: if it has neither.
        ValueError, OSError: see `open_image`.
    """
    if image["bytes"] is not None:
        return open_image(image["bytes"])
    if image["path"] is None:
        raise ValueError("An image of a row must have bytes or a path, and this one has neither.")
    return open_image(Path(image["path"]))


def add_channels(image, input_data_format=None):
    """Give an array or a tensor (height, width) an axis of one channel where `find_channel_axis` looks for it."""
    if getattr(image, "ndim", None) != 2:
        return image
    is_last = isinstance(image, np.ndarray)
    if input_data_format is not None:
        is_last = ChannelDimension(input_data_format) == ChannelDimension.LAST
    return image[..., None] if is_last else image[None]


def is_one_image(value) -> bool:
    """
    Return whether a value stands for one image: a PIL image, a path, a URL, an image that is not decoded, or an array
    or tensor of numbers, of which four dimensions are a batch.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_reftr.image_processing_reftr import is_one_image

    >>> is_one_image("photo.jpg"), is_one_image(np.zeros((48, 64, 3))), is_one_image(np.array(["a.jpg", "b.jpg"]))
    (True, True, False)

    ```"""
    if isinstance(value, np.ndarray) and value.dtype.kind in "OSTU":
        return value.ndim > 1  # of one dimension it is a list; pixels that are no numbers are refused later
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return value.ndim != 4
    return isinstance(value, (str, os.PathLike, Image.Image)) or is_undecoded(value)


def flatten_images(images) -> list:
    """
    Return one image, a batch (array or tensor of four dimensions) or a sequence of either as a flat list of images.

    Raises:
        ValueError: if something else is among them.
    """
    if is_one_image(images):
        return [images]
    if is_sequence(images):
        return [image for part in to_list(images, "images") for image in flatten_images(part)]
    raise ValueError(
        "An image is a PIL image, an array, a tensor, a path or a URL, and several are a list of them, got "
        f"{type(images).__name__}."
    )


def find_new_size(height: int, width: int, size: SizeDict) -> tuple[int, int]:
    """
    Return the (height, width) that an image is resized to: by the published rule (`resized_size`), or exactly.

    Raises:
        ValueError: if `size` is neither `{"shortest_edge", "longest_edge"}` nor `{"height", "width"}`.
    """
    if size.shortest_edge and size.longest_edge:
        return resized_size(height, width, size.shortest_edge, size.longest_edge)
    if not (size.height and size.width):
        raise ValueError(
            f"size={size} must be {{'shortest_edge', 'longest_edge'}} (aspect kept) or {{'height', 'width'}}."
        )
    return size.height, size.width


def check_size(size: SizeDict, name: str):
    """
    Refuse a size that no image is resized or padded to, before anything of it is allocated.

    Raises:
        ValueError: if a side is not a whole number from 1 on, or the sides make more than `MAX_PIXELS` pixels.
    """
    sides = dict(size)
    is_whole = all(isinstance(side, Integral) and not isinstance(side, bool) for side in sides.values())
    if not is_whole or min(sides.values(), default=1) < 1 or math.prod(map(int, sides.values())) > MAX_PIXELS:
        raise ValueError(
            f"{name}={quote(sides)} must have whole numbers of pixels from 1 on, whose product is at most "
            f"{MAX_PIXELS:,}."
        )


def check_numbers(values, name: str, num_channels: tuple[int, ...] = (3,), is_positive: bool = False):
    """
    Refuse a setting that is neither a number nor one for each channel.

    Args:
        values: the setting.
        name (`str`): what it is called, for messages.
        num_channels (`tuple[int]`, *optional*, defaults to `(3,)`): how many channels an image may have.
        is_positive (`bool`, *optional*, defaults to `False`): whether the numbers must be positive.

    Raises:
        ValueError: if it is something else, a number is not finite, or is not positive and has to be.
    """
    numbers = list(values) if isinstance(values, (list, tuple, np.ndarray)) else [values]
    is_real = all(isinstance(number, Real) and not isinstance(number, bool) for number in numbers)
    if not is_real or len(numbers) not in (1, *num_channels) or not all(abs(number) < 1e30 for number in numbers):
        raise ValueError(
            f"{name}={quote(values)} must be a finite number, or one for each of "
            f"{' or '.join(map(str, num_channels))} channels."
        )
    if is_positive and min(numbers) <= 0:
        raise ValueError(f"{name}={quote(values)} must be positive.")


def resize_to_nearest(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize bool masks (N, height, width) to `size` by the published rule for masks, torch's "nearest"."""
    if tuple(masks.shape[-2:]) == tuple(size):
        return masks
    return nn.functional.interpolate(masks[:, None].to(torch.uint8), size=tuple(size), mode="nearest")[:, 0].bool()


def pad_batch(
    images: list[torch.Tensor], pad_size: SizeDict | None = None, size_divisor: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Pictures in one batch, with zeros bottom and right. Each is written once; the library's `pad` and stacking after
    it take a quarter of all preprocessing.

    Args:
        images (list of `(3, height, width)` tensors): normalised.
        pad_size (`SizeDict`, *optional*): height and width of the batch; absent: of its largest pictures.
        size_divisor (`int`, *optional*): without `pad_size`, height and width are brought to multiples of it.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: (I, 3, H, W), and the mask (I, H, W), int64, 1 = picture.

    Raises:
        ValueError: if a picture is larger than `pad_size`, or the batch would have more than `MAX_PIXELS` pixels for
            each of them.
    """
    sizes = [tuple(image.shape[-2:]) for image in images]
    height, width = (max(lengths) for lengths in zip(*sizes, strict=True))
    if pad_size is not None:
        if not (pad_size.height and pad_size.width) or pad_size.height < height or pad_size.width < width:
            raise ValueError(f"pad_size={pad_size} must be {{'height', 'width'}}, at least {height} and {width}.")
        height, width = pad_size.height, pad_size.width
    elif size_divisor is not None:
        height, width = (-(-length // size_divisor) * size_divisor for length in (height, width))
    if height * width > MAX_PIXELS:
        raise ValueError(
            f"Images of (height, width) {sizes[:8]} would be padded to {(height, width)} in a batch, more than "
            f"{MAX_PIXELS:,} pixels: resize them, ask for fewer at a time, or take a smaller size_divisor."
        )
    pixel_values = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    pixel_mask = images[0].new_zeros(len(images), height, width, dtype=torch.long)
    for index, (image, size) in enumerate(zip(images, sizes, strict=True)):
        pixel_values[index, :, : size[0], : size[1]] = image
        pixel_mask[index, : size[0], : size[1]] = 1
    return pixel_values, pixel_mask


def resize_logits(logits: torch.Tensor, padded_size, resized_size, target_size, threshold: float) -> torch.Tensor:
    """
    A mask at the picture's own size from logits over the padded picture, resized bilinearly once.

    Args:
        logits (`torch.Tensor` of shape `(h1, w1)`): over the whole padded picture.
        padded_size, resized_size, target_size (`(height, width)`):
            Of the padded picture, of the part of it that is the picture, and of the result.
        threshold (`float`): probability over which a pixel belongs to the mask.

    Returns:
        `torch.Tensor` of shape `target_size`, bool.
    """
    places = []
    for padded, resized, target in zip(padded_size, resized_size, target_size, strict=True):
        # middles of the result's pixels, as grid_sample wants them: -1 and 1 are the padded picture's edges
        places.append((torch.arange(target, device=logits.device) + 0.5) / target * (resized / padded) * 2 - 1)
    grid = torch.stack(torch.meshgrid(*places, indexing="ij")[::-1], dim=-1)
    sampled = nn.functional.grid_sample(
        logits[None, None].float(), grid[None], mode="bilinear", padding_mode="border", align_corners=False
    )
    return sampled[0, 0].sigmoid() > threshold


def resize_logits_in_two_steps(
    logits: torch.Tensor, padded_size, resized_size, target_size, threshold: float
) -> torch.Tensor:
    """As `resize_logits`, by way of the padded size, where the threshold is applied: as published."""
    padded = nn.functional.interpolate(logits[None, None].float(), size=tuple(padded_size), mode="bilinear")
    mask = (padded.sigmoid() > threshold)[0, :, : resized_size[0], : resized_size[1]]
    return resize_to_nearest(mask, target_size)[0]


class RefTRImageProcessorKwargs(ImagesKwargs, total=False):
    """
    size_divisor (`int`, *optional*):
        Pad batches to multiples of so many pixels.
    """

    size_divisor: int | None


class RefTRImageProcessor(TorchvisionBackend):
    r"""
    Published preprocessing: the longer side resized to about 640 pixels with the aspect ratio kept, ImageNet mean and
    standard deviation, zeros bottom and right of smaller pictures of a batch. Pictures of any mode come out as RGB,
    turned as EXIF says.

    Args:
        size (`dict`, *optional*, defaults to `{"shortest_edge": 640, "longest_edge": 640}`):
            The shorter side is brought to `shortest_edge`, or less where the longer would pass `longest_edge`.
        size_divisor (`int`, *optional*):
            Pad batches to multiples of so many pixels: fewer shapes to compile for. Padding changes answers a little.
        do_resize, do_rescale, do_normalize, do_pad, image_mean, image_std, pad_size, ...: see `BaseImageProcessor`.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_reftr import RefTRImageProcessor

    >>> pictures = [np.zeros((60, 100, 3), dtype=np.uint8), np.zeros((80, 80, 3), dtype=np.uint8)]
    >>> inputs = RefTRImageProcessor()(pictures, return_tensors="pt")
    >>> inputs["pixel_values"].shape, inputs["pixel_mask"].shape
    (torch.Size([2, 3, 640, 640]), torch.Size([2, 640, 640]))

    ```"""

    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"shortest_edge": 640, "longest_edge": 640}
    default_to_square = False
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_pad = True
    size_divisor = None
    valid_kwargs = RefTRImageProcessorKwargs
    model_input_names = ["pixel_values", "pixel_mask"]

    def __init__(self, **kwargs):
        for name, value in kwargs.items():
            check_setting(value, name)
        for name in kwargs.keys() - self.valid_kwargs.__annotations__.keys():
            own = getattr(type(self), name, None)
            if callable(own) or isinstance(own, property) or name.startswith("__"):
                raise ValueError(f"{quote(name)} is not a setting of an image processor, but part of its code.")
        super().__init__(**kwargs)
        # saving a processor writes both here: with them from the start, saving does not change the object
        self.auto_map = {name: AUTO_MAP[name] for name in ("AutoImageProcessor", "AutoProcessor")}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """
        See `ImageProcessingMixin.from_pretrained`.

        Raises:
            ValueError: if a file is damaged, naming it.
            OSError: if there is no image processor.
        """
        with naming_files(pretrained_model_name_or_path, IMAGE_PROCESSOR_FILES, kwargs):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def _standardize_kwargs(self, **kwargs) -> dict:
        """
        Bring settings to one form, as the library does when a processor is made and in every call.

        Raises:
            ValueError: if one of them is nonsense, such as a size of a billion.
        """
        try:
            kwargs = super()._standardize_kwargs(**kwargs)
        except (TypeError, IndexError, ValueError) as error:
            sizes = {name: kwargs.get(name) for name in ("size", "crop_size", "pad_size")}
            raise ValueError(f"One of {quote(sizes, 300)} is not a size: {explain(error)}") from error
        for name in ("size", "pad_size"):
            if kwargs[name] is not None:
                check_size(kwargs[name], name)
        divisor = kwargs.get("size_divisor")
        if divisor is not None and (not isinstance(divisor, Integral) or isinstance(divisor, bool) or divisor < 1):
            raise ValueError(f"size_divisor={quote(divisor)} must be at least 1, a whole number of pixels.")
        # without the conversion to RGB an image may keep its opacity
        num_channels = (3, 4) if kwargs.get("do_convert_rgb") is False else (3,)
        for name in ("image_mean", "image_std", "rescale_factor"):
            if kwargs.get(name) is not None:
                check_numbers(kwargs[name], name, num_channels, is_positive=name == "image_std")
        if kwargs.get("rescale_factor") == 0:
            raise ValueError("rescale_factor=0 makes every image black: give another number, or do_rescale=False.")
        if kwargs.get("device") is not None:
            try:
                torch.device(kwargs["device"])
            except (RuntimeError, TypeError) as error:
                raise ValueError(f"device={quote(kwargs['device'])} is not a device: {explain(error)}") from error
        for name, value in kwargs.items():
            if name.startswith("do_") and not isinstance(value, (bool, type(None))):
                raise ValueError(f"{name}={quote(value)} must be true or false.")
        return kwargs

    def fetch_images(self, image_url_or_urls, depth: int = 0):
        """
        Open what is given by name: a path, a URL, or the content itself in base64 ("data:image/png;base64,..."); and
        what `datasets.Image(decode=False)` gives, a dict of "bytes" and "path".

        Args:
            image_url_or_urls: an image, or a list of images, or of lists.
            depth (`int`, *optional*, defaults to 0): of lists around it.

        Raises:
            ValueError: if a picture has more than `MAX_PIXELS` pixels, or lists are nested too deeply.
            OSError: if a file is missing or is no picture.
        """
        images = without_decoding(image_url_or_urls)
        if is_sequence(images) and not is_one_image(images):
            if depth == MAX_IMAGE_DEPTH:
                raise ValueError(
                    f"images are nested more than {depth} deep, in {quote(images)}: give a list of images."
                )
            return [self.fetch_images(image, depth + 1) for image in to_list(images, "images")]
        if is_undecoded(images):
            return open_undecoded(images)
        return open_image(images) if isinstance(images, (str, os.PathLike)) else images

    def open_images(self, images, annotated_sizes=None, input_data_format=None) -> list:
        """
        Return a flat list of upright images (`turn_upright`). To open them once more changes nothing: they carry no
        orientation.

        Args:
            images: an image (PIL, array, tensor, path, URL), a batch of them (array or tensor of four dimensions), or
                a list of either.
            annotated_sizes (list of `(height, width)`, *optional*): the size each image was annotated at.
            input_data_format (*optional*): see `find_channel_axis`.

        Raises:
            ValueError: if there are no images, not one annotated size per image, or an image has more than
                `MAX_PIXELS` pixels or not 1, 3 or 4 channels.
            OSError: if a file is missing or is no image.
        """
        images = [] if images is None else flatten_images(self.fetch_images(images))
        images = [add_channels(image, input_data_format) for image in images]
        if not images:
            raise ValueError("There are no images: give one picture or a list of them.")
        for image in images:
            check_picture(image, input_data_format=input_data_format)
        if annotated_sizes is None:
            annotated_sizes = [None] * len(images)
        annotated_sizes = to_sizes(annotated_sizes, len(images), "annotated_sizes", are_optional=True)
        return [
            turn_upright(image, size) if isinstance(image, Image.Image) else image
            for image, size in zip(images, annotated_sizes, strict=True)
        ]

    def preprocess(self, images, annotated_sizes=None, **kwargs) -> BatchFeature:
        """
        Prepare images for the model.

        Args:
            images: an image (PIL, array, tensor, path, URL) or a list of them. Values of arrays and tensors are
                brought to 0..255 by `scale_to_8_bits`, each image by itself, unless `do_rescale=False` says that they
                are final, or another `rescale_factor` than 1 / 255 says what they are.
            annotated_sizes (list of `(height, width)`, *optional*):
                The size each image was annotated at, which decides whether its EXIF orientation is followed.
            kwargs: any of the processor's settings, for this call.

        Returns:
            `BatchFeature`: `pixel_values` (I, 3, H, W) and `pixel_mask` (I, H, W), int64, 1 = image.

        Raises:
            ValueError, OSError: see `open_images` and `scale_to_8_bits`.
        """
        return self.preprocess_with_sizes(images, annotated_sizes, **kwargs)[0]

    def preprocess_with_sizes(
        self, images, annotated_sizes=None, **kwargs
    ) -> tuple[BatchFeature, list[tuple[int, int]]]:
        """
        Prepare images for the model, and return with them the size that each had before.

        Args:
            images, annotated_sizes, kwargs: see `preprocess`.

        Returns:
            `tuple`: what `preprocess` returns, and (height, width) of each upright image.

        Raises:
            ValueError, OSError: see `preprocess`.
        """
        for name, value in kwargs.items():
            check_setting(value, name)
        input_data_format = kwargs.get("input_data_format")
        images = self.open_images(images, annotated_sizes, input_data_format)
        sizes = [picture_size(image, input_data_format) for image in images]
        try:
            return super().preprocess(images, **kwargs), sizes
        except StrictDataclassError as error:  # the library's, of a setting of another type
            raise ValueError(" ".join(str(error).split())) from error

    def process_image(
        self,
        image,
        do_convert_rgb: bool | None = None,
        input_data_format=None,
        device=None,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        Return one image of any kind as a tensor (3, height, width): see `to_rgb` and `to_channels_first`.

        Raises:
            ValueError: if the range of its values is not clear.
        """
        if isinstance(image, Image.Image):
            if do_convert_rgb:
                # channels last in memory, as it was decoded: resizing takes a seventh of the time, without a copy
                return torch.from_numpy(to_rgb(image)).permute(2, 0, 1).to(device)
            image, input_data_format = np.array(image), ChannelDimension.LAST
        is_to_scale = bool(do_rescale) and math.isclose(rescale_factor, 1 / 255)
        pixels = to_channels_first(image, input_data_format, is_to_scale, device)
        if not do_convert_rgb:
            return pixels
        if len(pixels) == 4:
            return blend_onto_white(pixels) if is_to_scale else self.convert_to_rgb(pixels)
        return pixels.expand(3, -1, -1)

    def resize(self, image: torch.Tensor, size: SizeDict, resample=None, **kwargs) -> torch.Tensor:
        """
        Resize (..., height, width) by the published rule (`resized_size`), or to an exact `{"height", "width"}`.

        Raises:
            ValueError: if `size` is neither.
        """
        size = SizeDict(**dict(zip(("height", "width"), find_new_size(*image.shape[-2:], size), strict=True)))
        if tuple(image.shape[-2:]) == (size.height, size.width):
            return image
        if image.dtype == torch.uint8 and 1 in (*image.shape[-2:], size.height, size.width):
            # torch's 8-bit kernel takes a picture one pixel wide for one with its channels last, and fails
            resized = super().resize(image.float(), size=size, resample=resample, **kwargs)
            return resized.round().clamp(0, 255).to(torch.uint8)
        return super().resize(image, size=size, resample=resample, **kwargs)

    def _preprocess(
        self,
        images: list[torch.Tensor],
        do_resize: bool,
        size: SizeDict,
        resample,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean,
        image_std,
        do_pad: bool,
        pad_size: SizeDict | None,
        disable_grouping: bool | None,
        return_tensors,
        size_divisor: int | None = None,
        **kwargs,
    ) -> BatchFeature:
        if len({image.dtype for image in images}) > 1:
            disable_grouping = True  # stacked, they would take the dtype of one of them
        grouped_images, order = group_images_by_shape(images, disable_grouping=disable_grouping)
        for shape, stacked in grouped_images.items():
            if do_resize:
                stacked = self.resize(stacked, size=size, resample=resample)
            grouped_images[shape] = self.rescale_and_normalize(
                stacked.contiguous(), do_rescale, rescale_factor, do_normalize, image_mean, image_std
            )
        images = reorder_images(grouped_images, order)
        data = {"pixel_values": images}
        if do_pad:
            data["pixel_values"], data["pixel_mask"] = pad_batch(images, pad_size, size_divisor)
            if return_tensors is None:
                data = {name: list(tensor) for name, tensor in data.items()}
        return BatchFeature(data, tensor_type=return_tensors)

    def resize_masks(
        self, masks, padded_size: tuple[int, int], size: SizeDict | dict | None = None, do_resize: bool | None = None
    ) -> torch.Tensor:
        """
        Resize the masks of one image as the published loader does, by torch's "nearest", and pad them. "nearest"
        rounds coordinates down; Pillow's, which the library takes for masks, and "nearest-exact" round them to the
        nearest.

        Args:
            masks (array of shape `(phrases, height, width)`): at the image's own size.
            padded_size (`(height, width)`): of the batch.
            size, do_resize (*optional*): as for the images, by default the processor's own.

        Returns:
            `torch.Tensor` of shape `(phrases, *padded_size)`, bool.
        """
        size = self.size if size is None else size
        masks = torch.as_tensor(np.asarray(masks)).bool()
        if self.do_resize if do_resize is None else do_resize:
            size = size if isinstance(size, SizeDict) else SizeDict(**size)
            masks = resize_to_nearest(masks, find_new_size(*masks.shape[-2:], size))
        height, width = masks.shape[-2:]
        return tvF.pad(masks, [0, 0, padded_size[1] - width, padded_size[0] - height])

    def sizes_of_sentences(self, target_sizes, outputs) -> torch.Tensor:
        """
        Return the (height, width) of each sentence's image, (S, 2), from those of the images.

        Args:
            target_sizes (`torch.Tensor` of shape `(I, 2)` or list of `(height, width)`): one for each image.
            outputs ([`RefTRVisualGroundingOutput`]):
                Of the model; their `pixel_mask` (I, H, W) tells the number of images, whichever of them were asked
                about. Outputs with neither `pixel_mask` nor `image_index` have one image for each sentence.

        Raises:
            ValueError: if there is not one size for each image, or the number of images cannot be told.
        """
        num_sentences = len(outputs.pred_boxes)
        image_index = getattr(outputs, "image_index", None)
        pixel_mask = getattr(outputs, "pixel_mask", None)
        if pixel_mask is None and image_index is not None:
            raise ValueError(
                "The outputs have an image_index and no pixel_mask, which tells the number of images: pass the "
                "model's outputs with all their fields."
            )
        num_images = num_sentences if pixel_mask is None else len(pixel_mask)
        target_sizes = torch.tensor(to_sizes(target_sizes, num_images, "target_sizes"), dtype=torch.float64)
        return target_sizes if image_index is None else target_sizes[image_index.cpu()]

    def post_process_boxes(self, outputs, target_sizes=None) -> torch.Tensor:
        """
        Args:
            outputs ([`RefTRVisualGroundingOutput`]): of the model.
            target_sizes (`torch.Tensor` of shape `(I, 2)` or list of `(height, width)`, *optional*):
                The original size of each image, in the order of `pixel_values`: one for each image, also where
                several sentences ask about an image or none does. Absent: boxes stay in 0..1.

        Returns:
            `torch.Tensor` of shape `(S, P, 4)`: xyxy in pixels.

        Raises:
            ValueError: if there is not one size for each image.

        Example:

        ```python
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from modeling_reftr import RefTRImageProcessor

        >>> outputs = SimpleNamespace(pred_boxes=torch.tensor([[[0.5, 0.5, 0.5, 1.0]]]))
        >>> RefTRImageProcessor().post_process_boxes(outputs, target_sizes=[(480, 640)])
        tensor([[[160.,   0., 480., 480.]]])

        ```"""
        boxes_xyxy = box_convert(outputs.pred_boxes, "cxcywh", "xyxy")
        if target_sizes is None:
            return boxes_xyxy
        height, width = self.sizes_of_sentences(target_sizes, outputs).to(boxes_xyxy).unbind(1)
        return boxes_xyxy * torch.stack((width, height, width, height), dim=1)[:, None]

    def post_process_masks(
        self, outputs, target_sizes=None, threshold: float = 0.5, two_step: bool = False
    ) -> list[torch.Tensor]:
        """
        Args:
            outputs ([`RefTRVisualGroundingOutput`]): of a model with `config.predict_masks`.
            target_sizes (`torch.Tensor` of shape `(I, 2)` or list of `(height, width)`, *optional*):
                The original size of each image, see `post_process_boxes`. Absent: masks have the size that the image
                was resized to.
            threshold (`float`, *optional*, defaults to 0.5): probability over which a pixel belongs to the mask.
            two_step (`bool`, *optional*, defaults to `False`):
                Resize as published: to the padded size, where the threshold is applied, then to the original size by
                the nearest pixel. Else logits are resized once, straight to the original size.

        Returns:
            `list[torch.Tensor]`, one a sentence: bool, (phrases, height, width), for its real phrases.

        Raises:
            ValueError: if the model predicts no masks, there is not one size for each image, or one has more than
                `MAX_PIXELS` pixels.
        """
        if outputs.pred_masks is None:
            raise ValueError("There are no masks: the model's configuration has predict_masks=False.")
        threshold = to_threshold(threshold)
        num_sentences = len(outputs.pred_masks)
        image_index = outputs.image_index
        image_index = list(range(num_sentences)) if image_index is None else image_index.tolist()
        # a picture's own size is where its pixel mask ends
        sizes = torch.stack([outputs.pixel_mask.amax(axis).sum(1) for axis in (2, 1)], dim=1).long().tolist()
        resized_sizes = [sizes[index] for index in image_index]
        if target_sizes is None:
            target_sizes = resized_sizes
        else:
            target_sizes = self.sizes_of_sentences(target_sizes, outputs).long().tolist()
            for height, width in target_sizes:
                if height * width > MAX_PIXELS:
                    raise ValueError(
                        f"target_sizes has {(height, width)} (height, width), and masks have at most {MAX_PIXELS:,} "
                        "pixels."
                    )
        masks = []
        for logits, is_real, resized, target in zip(
            outputs.pred_masks, outputs.phrase_mask, resized_sizes, target_sizes, strict=True
        ):
            resize = resize_logits_in_two_steps if two_step else resize_logits
            # one at a time: at the size of a photograph they are large
            resized_masks = [
                resize(mask, outputs.pixel_mask.shape[-2:], resized, target, threshold) for mask in logits[is_real]
            ]
            masks.append(torch.stack(resized_masks) if resized_masks else is_real.new_zeros(0, *target))
        return masks

    def post_process_object_detection(self, outputs, threshold: float = 0.0, target_sizes=None) -> list[dict]:
        """
        What the `zero-shot-object-detection` pipeline reads. RefTR answers each phrase with one box and has no score:
        every score is 1.0.

        Args:
            outputs ([`RefTRVisualGroundingOutput`]): of the model.
            threshold (`float`, *optional*, defaults to 0.0): from 1.0 on, nothing is kept.
            target_sizes: see `post_process_boxes`.

        Returns:
            `list[dict]`, one a sentence: `scores` (phrases,), `labels` (phrases,), the phrases' slots, and `boxes`
            (phrases, 4), xyxy in pixels.

        Raises:
            ValueError: see `post_process_boxes`.
        """
        label = getattr(outputs, "candidate_label", None)  # that pipeline's text, which passes no processor
        if isinstance(label, str):
            warn_about_joined_expressions([label])
        threshold = to_threshold(threshold)
        results = []
        for boxes, mask in zip(self.post_process_boxes(outputs, target_sizes), outputs.phrase_mask, strict=True):
            labels = mask.nonzero().flatten() if threshold < 1 else mask.new_zeros(0, dtype=torch.long)
            results.append({"scores": boxes.new_ones(len(labels)), "labels": labels, "boxes": boxes[labels]})
        return results


RefTRImageProcessor.register_for_auto_class("AutoImageProcessor")

__all__ = ["RefTRImageProcessor"]
