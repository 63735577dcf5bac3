"""Convert images of any type to pixels: 8-bit values, RGB, channels first."""

import math

import numpy as np
import torch
from PIL import Image, ImageCms
from transformers.image_utils import ChannelDimension

from .decoding_reftr import MAX_PIXELS, check_format


RANGE_TOLERANCE = 1e-4  # relative error that interpolation leaves at the ends of a range


def find_channel_axis(
    image: np.ndarray | torch.Tensor, input_data_format: str | ChannelDimension | None = None
) -> int | None:
    """
    Return the axis of an image's channels: 0 or 2, or None for a grayscale image of two dimensions.

    If both the first and the last axis could be channels, a NumPy array has them last and a tensor first.

    Args:
        image (`np.ndarray` or `torch.Tensor`): the image.
        input_data_format (`str` or `ChannelDimension`, *optional*): "channels_first" or "channels_last", if known.

    Raises:
        ValueError: if there are not 1, 3 or 4 channels.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_reftr.pixels_reftr import find_channel_axis

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


def height_and_width(
    image: Image.Image | np.ndarray | torch.Tensor, input_data_format: str | ChannelDimension | None = None
) -> tuple[int, int]:
    """
    Return the (height, width) of an image, whose channels are found by `find_channel_axis`.

    Raises:
        ValueError: if an array does not have 1, 3 or 4 channels.
    """
    if isinstance(image, Image.Image):
        return image.height, image.width
    shape, axis = tuple(image.shape), find_channel_axis(image, input_data_format)
    return shape if axis is None else shape[1:] if axis == 0 else shape[:2]


def check_image(
    image: Image.Image | np.ndarray | torch.Tensor,
    name: str = "An image",
    input_data_format: str | ChannelDimension | None = None,
) -> None:
    """
    Reject an image that would take gigabytes, or a PIL image of a format not in `IMAGE_FORMATS`, before decoding it.

    Raises:
        ValueError: if the image has no pixels or more than `MAX_PIXELS`, an array does not have 1, 3 or 4 channels, or
            a PIL image has another format.
    """
    if isinstance(image, Image.Image):
        check_format(image)
    height, width = height_and_width(image, input_data_format)
    if not 0 < height * width <= MAX_PIXELS:
        raise ValueError(
            f"{name} has {width} x {height} pixels, expected 1 to {MAX_PIXELS:,}: resize it to a smaller size first."
        )


def scale_to_8_bits(pixels: torch.Tensor) -> torch.Tensor:
    """
    Scale the values of one image to 0..255.

    | values | treatment |
    | --- | --- |
    | bool | 0 and 255 |
    | uint8 | unchanged |
    | floating point in 0..1 | multiplied by 255 and rounded |
    | floating point in 0..255, the largest at least 2 | unchanged |
    | uint16, the largest over 255 | divided by 257 and rounded |
    | wider integers in 0..255, the largest at least 2 | unchanged |

    Other values are rejected because their range is ambiguous or invalid: negative values, values that are not finite,
    int8, complex numbers. An image of zeros is black in every range.

    Args:
        pixels (`torch.Tensor` of shape `(channels, height, width)`): values of any dtype.

    Returns:
        `torch.Tensor` of the same shape: uint8, or float32 for floating-point values in 0..255 with fractions.

    Raises:
        ValueError: if the range is ambiguous.

    Example:

    ```python
    >>> import torch
    >>> from modeling_reftr.pixels_reftr import scale_to_8_bits

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
        raise ValueError(f"{name} has the dtype {dtype}, which images do not have: convert it to uint8.")
    if pixels.is_floating_point():
        return scale_floats(pixels.float(), name, dtype)
    is_16_bit = pixels.dtype == torch.uint16
    pixels = pixels.to(torch.int64)  # torch implements few operations for unsigned integers
    low, high = (value.item() for value in pixels.aminmax())
    if low == high == 0:
        return pixels.to(torch.uint8)
    if is_16_bit and high > 255:
        return ((pixels + 128) // 257).to(torch.uint8)
    if is_16_bit or low < 0 or not 2 <= high <= 255:
        raise ValueError(
            f"{name} has {dtype} values from {low} to {high}, whose range is ambiguous: give uint8 in 0..255, uint16 "
            "in 0..65535, or floating point in 0..1."
        )
    return pixels.to(torch.uint8)


def scale_floats(pixels: torch.Tensor, name: str, dtype: str) -> torch.Tensor:
    """Scale the float32 values of an image to 0..255, see `scale_to_8_bits`."""
    low, high = (value.item() for value in pixels.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name} has values that are not finite.")
    limit = 1 if high <= 1 + RANGE_TOLERANCE else 255
    highs = [high] if len(pixels) < 4 else [part.max().item() for part in (pixels[:3], pixels[3:])]
    is_clear = all(value == 0 or (value >= 2) == (limit == 255) for value in highs)
    if low < -RANGE_TOLERANCE * limit or high > limit * (1 + RANGE_TOLERANCE) or not is_clear:
        raise ValueError(
            f"{name} has {dtype} values from {low:g} to {high:g}{'' if len(highs) == 1 else ' (colors and opacity)'}, "
            "which are neither all in 0..1 nor all in 0..255: scale or clip them to one of the two, or pass "
            "do_rescale=False if they must not be scaled."
        )
    rounded = (pixels * (255 // limit)).clamp(0, 255).round()
    if limit == 1 or torch.equal(rounded, pixels):
        return rounded.to(torch.uint8)
    return pixels.clamp(0, 255)


def array_to_tensor(image: np.ndarray) -> torch.Tensor:
    """
    Convert an array of any byte order, strides and flags to a tensor.

    Raises:
        ValueError: if the array is not numeric.
    """
    if image.dtype.kind not in "buifc":
        raise ValueError(f"An image must be numeric, got the dtype {image.dtype}: give uint8 in 0..255.")
    dtype = np.dtype(np.float64) if image.dtype == np.longdouble else image.dtype.newbyteorder("=")
    # torch rejects negative strides and warns about read-only memory.
    if dtype != image.dtype or not image.flags.writeable or min(image.strides, default=0) < 0:
        image = np.array(image, dtype=dtype, order="C")
    return torch.from_numpy(np.asarray(image))


def to_channels_first(
    image: np.ndarray | torch.Tensor,
    input_data_format: str | ChannelDimension | None = None,
    do_rescale: bool = True,
    device: str | torch.device | None = None,
) -> torch.Tensor:
    """
    Convert an image to a tensor with the channels first and values in 0..255.

    Args:
        image (`np.ndarray` or `torch.Tensor`):
            An image of two dimensions, or of three with 1, 3 or 4 channels, see `find_channel_axis`.
        input_data_format (`str` or `ChannelDimension`, *optional*): "channels_first" or "channels_last", if known.
        do_rescale (`bool`, *optional*, defaults to `True`):
            Whether to scale values to 0..255 (`scale_to_8_bits`); otherwise they are left as they are.
        device (`torch.device`, *optional*): the device of the result.

    Returns:
        `torch.Tensor` of shape `(channels, height, width)`.

    Raises:
        ValueError: if the value is not an image, or the range of its values is ambiguous.
    """
    axis = find_channel_axis(image, input_data_format)
    pixels = (array_to_tensor(image) if isinstance(image, np.ndarray) else image.detach()).to(device)
    pixels = pixels[None] if axis is None else pixels.movedim(axis, 0)
    if do_rescale:
        return scale_to_8_bits(pixels).contiguous()
    if pixels.is_complex():
        raise ValueError(f"An image must have real values, got complex ones in the shape {tuple(image.shape)}.")
    if pixels.is_floating_point():
        if not pixels.isfinite().all():
            height, width = pixels.shape[-2:]
            raise ValueError(f"An image of {width} x {height} pixels has values that are not finite.")
        return pixels.float().contiguous()
    return pixels.to(torch.uint8 if pixels.dtype in (torch.bool, torch.uint8) else torch.int64).contiguous()


def to_rgb(image: Image.Image) -> np.ndarray:
    """
    Convert a PIL image of any mode to a uint8 array (height, width, 3) with transparent pixels white.

    Raises:
        ValueError: if a mode of 16 or 32 bits has an ambiguous range, see `scale_to_8_bits`.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return np.array(image)
    if image.mode[0] in "IF":
        values = np.asarray(image)
        if image.mode == "I" and values.min() >= 0 and 255 < values.max() <= 65535:
            values = values.astype(np.uint16)  # Pillow stores some 16-bit images in its 32-bit mode
        return np.repeat(to_channels_first(values).round().to(torch.uint8).permute(1, 2, 0).numpy(), 3, axis=2)
    if image.mode == "LAB":
        profiles = (ImageCms.createProfile(space) for space in ("LAB", "sRGB"))
        image = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    elif image.mode.endswith("a"):  # colors premultiplied by their opacity
        image = image.convert(f"{image.mode[:-1]}A")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def to_pil_image(image: Image.Image | np.ndarray | torch.Tensor) -> Image.Image:
    """
    Convert an image of any type to the RGB image that the model sees; return an opaque RGB image unchanged.

    Raises:
        ValueError: see `to_channels_first` and `to_rgb`.
    """
    if isinstance(image, Image.Image):
        is_seen = image.mode == "RGB" and not image.has_transparency_data
        return image if is_seen else Image.fromarray(to_rgb(image))
    pixels = to_channels_first(image)
    pixels = blend_onto_white(pixels) if len(pixels) == 4 else pixels.expand(3, -1, -1)
    return Image.fromarray(pixels.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def blend_onto_white(pixels: torch.Tensor) -> torch.Tensor:
    """Blend RGBA pixels (4, height, width) in 0..255 onto white and return RGB."""
    opacity = pixels[3:].float() / 255
    blended = pixels[:3].float() * opacity + 255 * (1 - opacity)
    return blended if pixels.is_floating_point() else blended.round().to(pixels.dtype)
