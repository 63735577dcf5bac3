# Copyright 2026 The RefTR for transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Image processor for RefTR: resize, normalize and pad images, and scale boxes and masks back to them."""

# first, because older releases of transformers lack names that are imported below
from .requirements_reftr import MINIMUM_TRANSFORMERS as MINIMUM_TRANSFORMERS


# isort: split
import base64
import contextlib
import io
import math
import os
from collections.abc import Iterator, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
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
    ImageInput,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs
from transformers.utils import ModelOutput, TensorType

from .configuration_reftr import AUTO_MAP
from .decoding_reftr import MAX_PIXELS, is_undecoded, open_image_file, without_decoding
from .fetching_reftr import MAX_BYTES, fetch
from .inputs_reftr import (
    check_setting,
    is_sequence,
    take_renamed_argument,
    to_list,
    to_sizes,
    to_threshold,
    warn_about_joined_expressions,
)
from .loading_reftr import IMAGE_PROCESSOR_FILES, naming_files
from .locating_reftr import check_source
from .orientation_reftr import load_as_stored, read_orientation, turn_upright
from .pixels_reftr import blend_onto_white, check_image, height_and_width, to_channels_first, to_rgb
from .presence_reftr import RankedQueries, rank_queries
from .quoting_reftr import explain, quote


MASK_RESAMPLINGS = ("nearest", "nearest-exact")  # modes of torch.nn.functional.interpolate
MAX_IMAGE_DEPTH = 3  # of nested lists of images


def resized_size(height: int, width: int, shortest_edge: int, longest_edge: int) -> tuple[int, int]:
    """
    Return the (height, width) of an image after the published resize, which keeps the aspect ratio.

    The library's `get_size_with_aspect_ratio` rounds differently. No side is shorter than 1 pixel.

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


@contextlib.contextmanager
def naming_image(name: str) -> Iterator[None]:
    """Turn every error of a decoder into an OSError (a ValueError for an image too large) with the image's name."""
    try:
        yield
    except FileNotFoundError as error:
        raise OSError(f"There is no image at {name}.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has more than {MAX_PIXELS:,} pixels: resize it to a smaller size first.") from error
    except Exception as error:
        raise OSError(f"{name} cannot be read as an image: {explain(error)}") from error


def open_image(source: str | os.PathLike | bytes | BinaryIO, allow_private: bool = False) -> Image.Image:
    """
    Open and decode an image of one of `IMAGE_FORMATS` without applying its orientation, see `turn_upright`.

    Args:
        source (`str`, `os.PathLike`, `bytes` or binary file):
            A path, a URL, the content in base64 ("data:image/png;base64,...") or as bytes, or an open file. Only a
            `str` is interpreted as a URL or base64.
        allow_private (`bool`, *optional*, defaults to `False`):
            Whether to fetch a URL at an address of this machine or of a private network.

    Raises:
        ValueError: if the image has more than `MAX_PIXELS` pixels, which is found before decoding.
        OSError: if a file is missing, has another format or damaged EXIF data; or if a URL is at a private address,
            takes more than 20 seconds or, like base64, has more than 64 MB.

    Example:

    ```python
    >>> from modeling_reftr import open_image

    >>> open_image(b"P5 2 1 255 ab").size
    (2, 1)

    ```"""
    is_named = isinstance(source, (str, os.PathLike)) or hasattr(source, "name")
    name = repr(str(source)[:200]) if is_named else "The content"
    with naming_image(name):
        if isinstance(source, str) and source[:8].lower().startswith(("http://", "https://")):
            source = fetch(source, allow_private)
        elif isinstance(source, str) and source[:5].lower() == "data:":
            if len(source) > MAX_BYTES * 4 / 3:
                raise OSError(f"it has more than {MAX_BYTES:,} bytes")
            source = base64.b64decode(source.partition(",")[2], validate=True)
        image = open_image_file(io.BytesIO(source) if isinstance(source, bytes) else source)
    check_image(image, name)
    with naming_image(name):
        image = load_as_stored(image)
        read_orientation(image)
    return image


def open_undecoded(image: dict[str, Any]) -> Image.Image:
    """
    Open an image of a dataset's row, a dict of "bytes" and "path", see `open_image`. URLs are not fetched.

    Raises:
        ValueError: if it has neither bytes nor a path, or see `open_image`.
        OSError: see `open_image`.
    """
    if image["bytes"] is not None:
        return open_image(image["bytes"])
    if image["path"] is None:
        raise ValueError("An image of a row must have bytes or a path, got neither.")
    return open_image(Path(image["path"]))


def add_channels(image: Any, input_data_format: str | ChannelDimension | None = None) -> Any:
    """Add an axis of one channel to an array or a tensor (height, width), where `find_channel_axis` expects it."""
    if getattr(image, "ndim", None) != 2:
        return image
    is_last = isinstance(image, np.ndarray)
    if input_data_format is not None:
        is_last = ChannelDimension(input_data_format) == ChannelDimension.LAST
    return image[..., None] if is_last else image[None]


def is_one_image(value: Any) -> bool:
    """
    Return whether a value is a single image: a PIL image, a path, a URL, an undecoded image, or a numeric array or
    tensor of other than four dimensions, which is a batch.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_reftr.image_processing_reftr import is_one_image

    >>> is_one_image("photo.jpg"), is_one_image(np.zeros((48, 64, 3))), is_one_image(np.array(["a.jpg", "b.jpg"]))
    (True, True, False)

    ```"""
    if isinstance(value, np.ndarray) and value.dtype.kind in "OSTU":
        return value.ndim > 1  # one dimension is a list; pixels that are not numeric are rejected later
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return value.ndim != 4
    return isinstance(value, (str, os.PathLike, Image.Image)) or is_undecoded(value)


def flatten_images(images: Any) -> list:
    """
    Return one image, a batch (array or tensor of four dimensions), or a sequence of either as a flat list of images.

    Raises:
        ValueError: if there is something else among them.
    """
    if is_one_image(images):
        return [images]
    if is_sequence(images):
        return [image for part in to_list(images, "images") for image in flatten_images(part)]
    raise ValueError(
        "An image must be a PIL image, an array, a tensor, a path or a URL, and several must be a list of them, got "
        f"{type(images).__name__}."
    )


def output_size(height: int, width: int, size: SizeDict) -> tuple[int, int]:
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


def check_size(size: SizeDict, name: str) -> None:
    """
    Reject a size that is out of range, before anything of that size is allocated.

    Raises:
        ValueError: if a side is not a positive integer, or the product of the sides exceeds `MAX_PIXELS`.
    """
    sides = dict(size)
    is_integer = all(isinstance(side, Integral) and not isinstance(side, bool) for side in sides.values())
    if not is_integer or min(sides.values(), default=1) < 1 or math.prod(map(int, sides.values())) > MAX_PIXELS:
        raise ValueError(
            f"{name}={quote(sides)} must hold positive integers (pixels), whose product is at most {MAX_PIXELS:,}."
        )


def check_numbers(
    values: Any, name: str, num_channels: tuple[int, ...] = (3,), requires_positive: bool = False
) -> None:
    """
    Reject a setting that is neither a number nor one number per channel.

    Args:
        values: the setting.
        name (`str`): its name, for messages.
        num_channels (`tuple[int]`, *optional*, defaults to `(3,)`): the numbers of channels that an image may have.
        requires_positive (`bool`, *optional*, defaults to `False`): whether the numbers must be positive.

    Raises:
        ValueError: if it is something else, or a number is not finite, or not positive where that is required.
    """
    numbers = list(values) if isinstance(values, (list, tuple, np.ndarray)) else [values]
    is_real = all(isinstance(number, Real) and not isinstance(number, bool) for number in numbers)
    if not is_real or len(numbers) not in (1, *num_channels) or not all(abs(number) < 1e30 for number in numbers):
        raise ValueError(
            f"{name}={quote(values)} must be a finite number, or one for each of "
            f"{' or '.join(map(str, num_channels))} channels."
        )
    if requires_positive and min(numbers) <= 0:
        raise ValueError(f"{name}={quote(values)} must be positive.")


def resize_nearest(masks: torch.Tensor, size: tuple[int, int], mode: str = "nearest") -> torch.Tensor:
    """Resize bool masks (N, height, width) to `size`, with a mode of `MASK_RESAMPLINGS`; by default as published."""
    if tuple(masks.shape[-2:]) == tuple(size):
        return masks
    return nn.functional.interpolate(masks[:, None].to(torch.uint8), size=tuple(size), mode=mode)[:, 0].bool()


def pad_batch(
    images: list[torch.Tensor],
    pad_size: SizeDict | None = None,
    size_divisor: int | None = None,
    mask_dtype: torch.dtype = torch.long,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Stack images into a batch, padded with zeros at the bottom and on the right.

    Each image is copied once; the library's `pad`, followed by stacking, takes a quarter of all preprocessing.

    Args:
        images (list of `(3, height, width)` tensors): the images.
        pad_size (`SizeDict`, *optional*): height and width of the batch, by default those of its largest images.
        size_divisor (`int`, *optional*): without `pad_size`, round height and width up to multiples of this number.
        mask_dtype (`torch.dtype`, *optional*, defaults to int64): the dtype of the mask.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the images (I, 3, H, W) and their mask (I, H, W), 1 = image.

    Raises:
        ValueError: if an image is larger than `pad_size`, or the padded size exceeds `MAX_PIXELS` pixels.
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
            f"{MAX_PIXELS:,} pixels: resize them, use smaller batches, or a smaller size_divisor."
        )
    pixel_values = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    pixel_mask = images[0].new_zeros(len(images), height, width, dtype=mask_dtype)
    for index, (image, size) in enumerate(zip(images, sizes, strict=True)):
        pixel_values[index, :, : size[0], : size[1]] = image
        pixel_mask[index, : size[0], : size[1]] = 1
    return pixel_values, pixel_mask


def resize_logits(
    logits: torch.Tensor,
    padded_size: Sequence[int],
    resized_size: Sequence[int],
    target_size: Sequence[int],
    threshold: float,
) -> torch.Tensor:
    """
    Resize the logits of one mask bilinearly, once, to the size of the original image.

    Args:
        logits (`torch.Tensor` of shape `(h1, w1)`): logits that cover the whole padded image.
        padded_size (`(height, width)`): the size of the padded image.
        resized_size (`(height, width)`): the size of the image in it.
        target_size (`(height, width)`): the size of the result.
        threshold (`float`): the probability above which a pixel belongs to the mask.

    Returns:
        `torch.Tensor` of shape `target_size`, bool.
    """
    coordinates = []
    for padded, resized, target in zip(padded_size, resized_size, target_size, strict=True):
        # Centers of the result's pixels in the coordinates of grid_sample: -1 and 1 are the edges of the padded image.
        coordinates.append((torch.arange(target, device=logits.device) + 0.5) / target * (resized / padded) * 2 - 1)
    grid = torch.stack(torch.meshgrid(*coordinates, indexing="ij")[::-1], dim=-1)
    sampled = nn.functional.grid_sample(
        logits[None, None].float(), grid[None], mode="bilinear", padding_mode="border", align_corners=False
    )
    return sampled[0, 0].sigmoid() > threshold


def resize_logits_in_two_steps(
    logits: torch.Tensor,
    padded_size: Sequence[int],
    resized_size: Sequence[int],
    target_size: Sequence[int],
    threshold: float,
) -> torch.Tensor:
    """Resize as published: like `resize_logits`, but apply the threshold at the padded size in between."""
    padded = nn.functional.interpolate(logits[None, None].float(), size=tuple(padded_size), mode="bilinear")
    mask = (padded.sigmoid() > threshold)[0, :, : resized_size[0], : resized_size[1]]
    return resize_nearest(mask, target_size)[0]


class RefTRImageProcessorKwargs(ImagesKwargs, total=False):
    """
    size_divisor (`int`, *optional*):
        Pad batches to multiples of this number of pixels.
    do_defer_normalization (`bool`, *optional*):
        Return images that are neither rescaled nor normalized, for `normalize_batch`.
    mask_resampling (`str`, *optional*):
        Mode of `torch.nn.functional.interpolate` that resizes target masks, "nearest" or "nearest-exact".
    """

    size_divisor: int | None
    do_defer_normalization: bool | None
    mask_resampling: str | None


class RefTRImageProcessor(TorchvisionBackend):
    r"""
    Construct a RefTR image processor.

    As published, it resizes the longer side to about 640 pixels with the aspect ratio kept, normalizes with the mean
    and standard deviation of ImageNet, and pads the images of a batch with zeros at the bottom and on the right.
    Images of any mode are converted to RGB and turned upright by their EXIF orientation.

    Args:
        size (`dict`, *optional*, defaults to `{"shortest_edge": 640, "longest_edge": 640}`):
            Resize the shorter side to `shortest_edge`, or less where the longer side would exceed `longest_edge`.
        size_divisor (`int`, *optional*):
            Pad batches to multiples of this number of pixels, which gives `torch.compile` fewer shapes. Padding
            changes answers slightly.
        do_defer_normalization (`bool`, *optional*, defaults to `False`):
            Leave 8-bit images as uint8 and return a bool `pixel_mask`, which together take a fifth of the bytes.
            `normalize_batch` normalizes them later, such as on a GPU.
        mask_resampling (`str`, *optional*, defaults to `"nearest"`):
            How target masks are resized. The published `"nearest"` rounds coordinates down, which shifts a mask by
            up to half a pixel; `"nearest-exact"` does not. The shift matters for images of about 100 pixels.
        do_resize, do_rescale, do_normalize, do_pad, image_mean, image_std, pad_size, ...: see `BaseImageProcessor`.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_reftr import RefTRImageProcessor

    >>> images = [np.zeros((60, 100, 3), dtype=np.uint8), np.zeros((80, 80, 3), dtype=np.uint8)]
    >>> inputs = RefTRImageProcessor()(images, return_tensors="pt")
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
    do_defer_normalization = None
    mask_resampling = "nearest"
    valid_kwargs = RefTRImageProcessorKwargs
    model_input_names = ["pixel_values", "pixel_mask"]

    def __init__(self, **kwargs: Any) -> None:
        for name, value in kwargs.items():
            check_setting(value, name)
        for name in kwargs.keys() - self.valid_kwargs.__annotations__.keys():
            own = getattr(type(self), name, None)
            if callable(own) or isinstance(own, property) or name.startswith("__"):
                raise ValueError(f"{quote(name)} is not a setting of an image processor, but part of its code.")
        super().__init__(**kwargs)
        # Saving a processor sets both entries; set from the start, they keep saving from changing the object.
        self.auto_map = {name: AUTO_MAP[name] for name in ("AutoImageProcessor", "AutoProcessor")}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> "RefTRImageProcessor | tuple[RefTRImageProcessor, dict]":
        """
        Load an image processor, see `ImageProcessingMixin.from_pretrained`.

        Raises:
            ValueError: if a file is damaged; the message names it.
            OSError: if there is no image processor.
        """
        check_source(pretrained_model_name_or_path, kwargs)
        with naming_files(pretrained_model_name_or_path, IMAGE_PROCESSOR_FILES, kwargs):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def _standardize_kwargs(self, **kwargs: Any) -> dict[str, Any]:
        """
        Standardize and validate settings, when a processor is made and in every call.

        Raises:
            ValueError: if a setting is invalid, such as a size of a billion.
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
            raise ValueError(f"size_divisor={quote(divisor)} must be at least 1, an integer number of pixels.")
        if kwargs.get("mask_resampling", "nearest") not in MASK_RESAMPLINGS:
            known = " or ".join(map(repr, MASK_RESAMPLINGS))
            raise ValueError(f"mask_resampling={quote(kwargs['mask_resampling'])} must be {known}.")
        # Without the conversion to RGB an image may keep its opacity.
        num_channels = (3, 4) if kwargs.get("do_convert_rgb") is False else (3,)
        for name in ("image_mean", "image_std", "rescale_factor"):
            if kwargs.get(name) is not None:
                check_numbers(kwargs[name], name, num_channels, requires_positive=name == "image_std")
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

    def fetch_images(self, image_url_or_urls: Any, depth: int = 0) -> Any:
        """
        Open images given by name: a path, a URL, base64 content ("data:image/png;base64,..."), or a dict of "bytes"
        and "path" as from `datasets.Image(decode=False)`.

        Args:
            image_url_or_urls: an image, or a list of images or of lists.
            depth (`int`, *optional*, defaults to 0): the number of enclosing lists.

        Raises:
            ValueError: if an image has more than `MAX_PIXELS` pixels, or lists are nested too deeply.
            OSError: if a file is missing or is not an image.
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

    def open_images(
        self,
        images: ImageInput | None,
        original_sizes: Sequence[tuple[int, int] | None] | None = None,
        input_data_format: str | ChannelDimension | None = None,
    ) -> list:
        """
        Open images and return a flat list of upright ones (`turn_upright`).

        Upright images have no orientation left, so that opening them again does not change them.

        Args:
            images: an image (PIL, array, tensor, path, URL), a batch (array or tensor of four dimensions), or a list
                of either.
            original_sizes (list of `(height, width)`, *optional*): the size that each image was annotated at.
            input_data_format (*optional*): see `find_channel_axis`.

        Raises:
            ValueError: if there are no images, or not one original size per image, or an image has more than
                `MAX_PIXELS` pixels or not 1, 3 or 4 channels.
            OSError: if a file is missing or is not an image.
        """
        images = [] if images is None else flatten_images(self.fetch_images(images))
        images = [add_channels(image, input_data_format) for image in images]
        if not images:
            raise ValueError("There are no images: give one image or a list of them.")
        for image in images:
            check_image(image, input_data_format=input_data_format)
        if original_sizes is None:
            original_sizes = [None] * len(images)
        original_sizes = to_sizes(original_sizes, len(images), "original_sizes", are_optional=True)
        return [
            turn_upright(image, size) if isinstance(image, Image.Image) else image
            for image, size in zip(images, original_sizes, strict=True)
        ]

    def preprocess(
        self,
        images: ImageInput,
        original_sizes: Sequence[tuple[int, int] | None] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Preprocess images for the model.

        Args:
            images:
                An image (PIL, array, tensor, path, URL) or a list of them. `scale_to_8_bits` scales the values of
                each array and tensor to 0..255, unless `do_rescale=False`, or a `rescale_factor` other than 1 / 255,
                declares what they are.
            original_sizes (list of `(height, width)`, *optional*):
                The size that each image was annotated at, which decides whether its EXIF orientation is followed.
            kwargs: settings of the processor, for this call.

        Returns:
            `BatchFeature`: `pixel_values` (I, 3, H, W), and `pixel_mask` (I, H, W), int64, 1 = image, or bool with
            `do_defer_normalization`.

        Raises:
            ValueError, OSError: see `open_images` and `scale_to_8_bits`.
        """
        return self.preprocess_with_sizes(images, original_sizes, **kwargs)[0]

    def preprocess_with_sizes(
        self,
        images: ImageInput,
        original_sizes: Sequence[tuple[int, int] | None] | None = None,
        **kwargs: Any,
    ) -> tuple[BatchFeature, list[tuple[int, int]]]:
        """
        Preprocess images and return the size that each had before.

        Args:
            images, original_sizes, kwargs: see `preprocess`.

        Returns:
            `tuple`: the result of `preprocess`, and the (height, width) of each upright image.

        Raises:
            ValueError, OSError: see `preprocess`.
        """
        original_sizes = take_renamed_argument(kwargs, "annotated_sizes", "original_sizes", original_sizes)
        for name, value in kwargs.items():
            check_setting(value, name)
        input_data_format = kwargs.get("input_data_format")
        images = self.open_images(images, original_sizes, input_data_format)
        sizes = [height_and_width(image, input_data_format) for image in images]
        try:
            return super().preprocess(images, **kwargs), sizes
        except StrictDataclassError as error:  # the library's, for a setting of another type
            raise ValueError(" ".join(str(error).split())) from error

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: str | torch.device | None = None,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """
        Convert an image of any type to a tensor (3, height, width), see `to_rgb` and `to_channels_first`.

        Raises:
            ValueError: if the range of its values is ambiguous.
        """
        if isinstance(image, Image.Image):
            if do_convert_rgb:
                # Keep the channels last in memory, as decoded: resizing is seven times faster and nothing is copied.
                return torch.from_numpy(to_rgb(image)).permute(2, 0, 1).to(device)
            image, input_data_format = np.array(image), ChannelDimension.LAST
        must_scale = bool(do_rescale) and math.isclose(rescale_factor, 1 / 255)
        pixels = to_channels_first(image, input_data_format, must_scale, device)
        if not do_convert_rgb:
            return pixels
        if len(pixels) == 4:
            return blend_onto_white(pixels) if must_scale else self.convert_to_rgb(pixels)
        return pixels.expand(3, -1, -1)

    def resize(
        self, image: torch.Tensor, size: SizeDict, resample: PILImageResampling | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """
        Resize images (..., height, width) by the published rule (`resized_size`), or to exactly
        `{"height", "width"}`.

        Raises:
            ValueError: if `size` is neither.
        """
        size = SizeDict(**dict(zip(("height", "width"), output_size(*image.shape[-2:], size), strict=True)))
        if tuple(image.shape[-2:]) == (size.height, size.width):
            return image
        if image.dtype == torch.uint8 and 1 in (*image.shape[-2:], size.height, size.width):
            # torch's 8-bit kernel mistakes an image one pixel wide for one with its channels last, and fails.
            resized = super().resize(image.float(), size=size, resample=resample, **kwargs)
            return resized.round().clamp(0, 255).to(torch.uint8)
        return super().resize(image, size=size, resample=resample, **kwargs)

    def _preprocess(
        self,
        images: list[torch.Tensor],
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling | None,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | list[float] | None,
        image_std: float | list[float] | None,
        do_pad: bool,
        pad_size: SizeDict | None,
        disable_grouping: bool | None,
        return_tensors: str | TensorType | None,
        size_divisor: int | None = None,
        do_defer_normalization: bool | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        if len({image.dtype for image in images}) > 1:
            disable_grouping = True  # stacking would convert all images to the dtype of one
        grouped_images, order = group_images_by_shape(images, disable_grouping=disable_grouping)
        for shape, stacked in grouped_images.items():
            if do_resize:
                stacked = self.resize(stacked, size=size, resample=resample)
            if not do_defer_normalization:
                stacked = self.rescale_and_normalize(
                    stacked.contiguous(), do_rescale, rescale_factor, do_normalize, image_mean, image_std
                )
            grouped_images[shape] = stacked
        images = reorder_images(grouped_images, order)
        data = {"pixel_values": images}
        if do_pad:
            mask_dtype = torch.bool if do_defer_normalization else torch.long
            data["pixel_values"], data["pixel_mask"] = pad_batch(images, pad_size, size_divisor, mask_dtype)
            if return_tensors is None:
                data = {name: list(tensor) for name, tensor in data.items()}
        return BatchFeature(data, tensor_type=return_tensors)

    def normalize_batch(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Rescale and normalize a batch made with `do_defer_normalization`, by the processor's own settings.

        Args:
            pixel_values (`torch.Tensor` of shape `(I, 3, H, W)`): the images of a batch, on any device.
            pixel_mask (`torch.Tensor` of shape `(I, H, W)`, *optional*): False for padding; absent: there is none.

        Returns:
            `torch.Tensor` of shape `(I, 3, H, W)`: the `pixel_values` without `do_defer_normalization`, bit for bit.

        Example:

        ```python
        >>> import numpy as np
        >>> from modeling_reftr import RefTRImageProcessor

        >>> image_processor = RefTRImageProcessor()
        >>> images = [np.zeros((60, 100, 3), dtype=np.uint8), np.zeros((80, 80, 3), dtype=np.uint8)]
        >>> batch = image_processor(images, do_defer_normalization=True, return_tensors="pt")
        >>> batch["pixel_values"].dtype, batch["pixel_mask"].dtype
        (torch.uint8, torch.bool)
        >>> expected = image_processor(images, return_tensors="pt")["pixel_values"]
        >>> image_processor.normalize_batch(**batch).equal(expected)
        True

        ```"""
        settings = self._standardize_kwargs(image_mean=self.image_mean, image_std=self.image_std)
        normalized = self.rescale_and_normalize(
            pixel_values,
            self.do_rescale,
            self.rescale_factor,
            self.do_normalize,
            settings["image_mean"],
            settings["image_std"],
        )
        # Padding is zero after normalization, not before.
        return normalized if pixel_mask is None else normalized.masked_fill_(~pixel_mask[:, None], 0)

    def resize_masks(
        self,
        masks: np.ndarray | torch.Tensor,
        padded_size: tuple[int, int],
        size: SizeDict | dict[str, int] | None = None,
        do_resize: bool | None = None,
    ) -> torch.Tensor:
        """
        Resize the masks of one image by `mask_resampling`, by default as the published loader does, and pad them.

        torch's "nearest" rounds coordinates down; "nearest-exact" and Pillow's "nearest", which the library uses for
        masks, round them to the nearest integer.

        Args:
            masks (array of shape `(phrases, height, width)`): masks at the image's own size.
            padded_size (`(height, width)`): the padded size of the batch.
            size, do_resize (*optional*): settings of the images, by default the processor's own.

        Returns:
            `torch.Tensor` of shape `(phrases, *padded_size)`, bool.
        """
        size = self.size if size is None else size
        masks = torch.as_tensor(np.asarray(masks)).bool()
        if self.do_resize if do_resize is None else do_resize:
            size = size if isinstance(size, SizeDict) else SizeDict(**size)
            masks = resize_nearest(masks, output_size(*masks.shape[-2:], size), self.mask_resampling)
        height, width = masks.shape[-2:]
        if (height, width) == tuple(padded_size):
            return masks
        return tvF.pad(masks, [0, 0, padded_size[1] - width, padded_size[0] - height])

    def sizes_of_sentences(
        self, target_sizes: TensorType | Sequence[tuple[int, int]], outputs: ModelOutput
    ) -> torch.Tensor:
        """
        Return the (height, width) of each sentence's image, (S, 2), given those of the images.

        Args:
            target_sizes (`torch.Tensor` of shape `(I, 2)` or list of `(height, width)`): one size per image.
            outputs ([`RefTRVisualGroundingOutput`]):
                Outputs of the model. Their `pixel_mask` (I, H, W) determines the number of images, including those
                without a sentence. Outputs with neither `pixel_mask` nor `image_index` have one image per sentence.

        Raises:
            ValueError: if there is not one size per image, or the number of images is unknown.
        """
        num_sentences = len(outputs.pred_boxes)
        image_index = getattr(outputs, "image_index", None)
        pixel_mask = getattr(outputs, "pixel_mask", None)
        if pixel_mask is None and image_index is not None:
            raise ValueError(
                "The outputs have an image_index but no pixel_mask, which determines the number of images: pass the "
                "model's outputs with all their fields."
            )
        num_images = num_sentences if pixel_mask is None else len(pixel_mask)
        target_sizes = torch.tensor(to_sizes(target_sizes, num_images, "target_sizes"), dtype=torch.float64)
        return target_sizes if image_index is None else target_sizes[image_index.cpu()]

    def post_process_boxes(
        self, outputs: ModelOutput, target_sizes: TensorType | Sequence[tuple[int, int]] | None = None
    ) -> torch.Tensor:
        """
        Convert the predicted boxes to (x0, y0, x1, y1) in pixels of the original images.

        Args:
            outputs ([`RefTRVisualGroundingOutput`]): outputs of the model.
            target_sizes (`torch.Tensor` of shape `(I, 2)` or list of `(height, width)`, *optional*):
                The original size of each image, in the order of `pixel_values`: one per image, however many sentences
                refer to it. By default boxes stay in 0..1.

        Returns:
            `torch.Tensor` of shape `(S, P, 4)`.

        Raises:
            ValueError: if there is not one size per image.

        Example:

        ```python
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from modeling_reftr import RefTRImageProcessor

        >>> outputs = SimpleNamespace(pred_boxes=torch.tensor([[[0.5, 0.5, 0.5, 1.0]]]))
        >>> RefTRImageProcessor().post_process_boxes(outputs, target_sizes=[(480, 640)])
        tensor([[[160.,   0., 480., 480.]]])

        ```"""
        return self.scale_boxes(outputs.pred_boxes, outputs, target_sizes)

    def scale_boxes(
        self,
        boxes_cxcywh: torch.Tensor,
        outputs: ModelOutput,
        target_sizes: TensorType | Sequence[tuple[int, int]] | None = None,
    ) -> torch.Tensor:
        """
        Convert boxes of outputs to (x0, y0, x1, y1) in pixels of the original images.

        Args:
            boxes_cxcywh (`torch.Tensor` of shape `(S, ..., 4)`): in 0..1 of the images.
            outputs, target_sizes: see `post_process_boxes`.

        Returns:
            `torch.Tensor` of shape `(S, ..., 4)`.

        Raises:
            ValueError: if there is not one size per image.
        """
        boxes_xyxy = box_convert(boxes_cxcywh, "cxcywh", "xyxy")
        if target_sizes is None:
            return boxes_xyxy
        height, width = self.sizes_of_sentences(target_sizes, outputs).to(boxes_xyxy).unbind(1)
        scale = torch.stack((width, height, width, height), dim=1)
        return boxes_xyxy * scale.reshape(-1, *[1] * (boxes_xyxy.ndim - 2), 4)

    def post_process_masks(
        self,
        outputs: ModelOutput,
        target_sizes: TensorType | Sequence[tuple[int, int]] | None = None,
        threshold: float = 0.5,
        two_step: bool = False,
        queries: RankedQueries | None = None,
    ) -> list[torch.Tensor]:
        """
        Convert the predicted logits to masks at the size of the original images.

        Args:
            outputs ([`RefTRVisualGroundingOutput`]): outputs of a model with `config.predict_masks`.
            target_sizes (`torch.Tensor` of shape `(I, 2)` or list of `(height, width)`, *optional*):
                The original size of each image, see `post_process_boxes`. By default masks have the size that the
                image was resized to.
            threshold (`float`, *optional*, defaults to 0.5): the probability above which a pixel belongs to the mask.
            two_step (`bool`, *optional*, defaults to `False`):
                Resize as published: to the padded size, where the threshold is applied, then to the original size by
                the nearest pixel. By default logits are resized once, directly to the original size.
            queries ([`RankedQueries`], *optional*):
                The queries whose answers get a mask. By default the best one of each real phrase.

        Returns:
            `list[torch.Tensor]`: for each sentence the masks of its real phrases, or of the answers of `queries`, bool
            (masks, height, width).

        Raises:
            ValueError: if the model does not predict masks, there is not one size per image, or a size has more than
                `MAX_PIXELS` pixels.
        """
        if outputs.pred_masks is None:
            raise ValueError("There are no masks: the model's configuration has predict_masks=False.")
        threshold = to_threshold(threshold)
        num_sentences = len(outputs.pred_masks)
        image_index = outputs.image_index
        image_index = list(range(num_sentences)) if image_index is None else image_index.tolist()
        # The pixel mask ends where the image in it ends.
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
        all_logits, is_wanted = outputs.pred_masks, outputs.phrase_mask
        if queries is not None:
            all_logits, is_wanted = queries.mask_logits, queries.is_answer
        for logits, is_real, resized, target in zip(all_logits, is_wanted, resized_sizes, target_sizes, strict=True):
            resize = resize_logits_in_two_steps if two_step else resize_logits
            # Resize one mask at a time: the float values of a photograph take many megabytes.
            resized_masks = [
                resize(mask, outputs.pixel_mask.shape[-2:], resized, target, threshold) for mask in logits[is_real]
            ]
            masks.append(torch.stack(resized_masks) if resized_masks else is_real.new_zeros(0, *target))
        return masks

    def post_process_object_detection(
        self,
        outputs: ModelOutput,
        threshold: float | None = None,
        target_sizes: TensorType | Sequence[tuple[int, int]] | None = None,
    ) -> list[dict[str, torch.Tensor]]:
        """
        Convert outputs for the library's `zero-shot-object-detection` pipeline.

        Prefer [`RefTRProcessor.post_process_grounded_object_detection`], which returns one dict per image.

        Args:
            outputs ([`RefTRVisualGroundingOutput`]): outputs of the model.
            threshold (`float`, *optional*):
                The score above which boxes are kept, see [`RefTRProcessor.post_process_grounding`].
            target_sizes: see `post_process_boxes`.

        Returns:
            `list[dict]`: for each sentence `scores` (boxes,), `labels` (boxes,), the slots of the phrases, and `boxes`
            (boxes, 4), xyxy in pixels.

        Raises:
            ValueError: see `post_process_boxes`.
        """
        label = getattr(outputs, "candidate_label", None)  # the text, which that pipeline passes to no processor
        if isinstance(label, str):
            warn_about_joined_expressions([label])
        queries = rank_queries(outputs, threshold)
        boxes_xyxy = self.scale_boxes(queries.boxes_cxcywh, outputs, target_sizes)
        results = []
        for boxes, scores, is_answer in zip(boxes_xyxy, queries.scores, queries.is_answer, strict=True):
            labels = is_answer.nonzero()[:, 0]
            results.append({"scores": scores[is_answer], "labels": labels, "boxes": boxes[is_answer]})
        return results


RefTRImageProcessor.register_for_auto_class("AutoImageProcessor")

__all__ = ["RefTRImageProcessor"]
