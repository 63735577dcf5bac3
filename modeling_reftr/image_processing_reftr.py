"""RefTR's image processor: resize, normalise, pad; boxes back to the picture."""

import base64
import contextlib
import io
import math
import os

import numpy as np
import torch
from huggingface_hub import get_session
from PIL import ExifTags, Image, ImageOps
from torch import nn
from torchvision.ops import box_convert
from torchvision.transforms.v2 import functional as tvF
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_transforms import group_images_by_shape, reorder_images
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    PILImageResampling,
    SizeDict,
    make_flat_list_of_images,
)
from transformers.processing_utils import ImagesKwargs

from .inputs_reftr import to_sizes, warn_about_joined_expressions


# a picture of this size takes half a gigabyte as float tensor; a file of a few kilobytes can claim to be larger
MAX_PIXELS = 50_000_000


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


def turn_upright(image: Image.Image, annotated_size: tuple[int, int] | None = None) -> Image.Image:
    """
    Turn a picture as its EXIF orientation says, as OpenCV does, unless only the stored size agrees with the annotated
    (height, width).
    """
    if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
        return image  # exif_transpose would copy it
    turned = ImageOps.exif_transpose(image)
    if annotated_size is not None:
        stored_agrees = (image.height, image.width) == tuple(annotated_size)
        turned_agrees = (turned.height, turned.width) == tuple(annotated_size)
        if stored_agrees and not turned_agrees:
            return image
    return turned


def picture_size(image) -> tuple[int, int]:
    """(height, width) of a PIL picture, or of an array with its channels first, last or absent."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    shape = tuple(image.shape)
    if len(shape) == 2 or shape[-1] in (1, 3, 4):
        return shape[:2]
    return shape[-2:]


def check_picture(image, name: str = "A picture"):
    """
    Refuse a picture, of which nothing was decoded yet, that would take gigabytes; and arrays that are not numbers.

    Raises:
        ValueError: if it has no pixel or more than `MAX_PIXELS`, or an array has values that are not finite.
    """
    height, width = picture_size(image)
    if not 0 < height * width <= MAX_PIXELS:
        raise ValueError(
            f"{name} has {width} x {height} pixels; between 1 and {MAX_PIXELS:,} are taken: make it smaller first."
        )
    if isinstance(image, np.ndarray) and image.dtype.kind == "f":
        is_finite = np.isfinite(image).all()
    else:
        is_finite = not isinstance(image, torch.Tensor) or image.isfinite().all()
    if not is_finite:
        raise ValueError(f"{name} of {width} x {height} pixels has values that are not finite numbers.")


@contextlib.contextmanager
def reading(name: str):
    """Turn whatever a decoder raises into an OSError, or a ValueError of a picture too large, with its name."""
    try:
        yield
    except FileNotFoundError as error:
        raise OSError(f"There is no picture at {name!r}.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name!r} has more than {MAX_PIXELS:,} pixels: make it smaller first.") from error
    except Exception as error:
        raise OSError(f"{name!r} cannot be read as a picture: {error}") from error


def open_picture(source: str | os.PathLike) -> Image.Image:
    """
    A picture by its path, its URL, or its content in base64 ("data:image/png;base64,..."); every pixel of it is read.

    Raises:
        ValueError: if it has more than `MAX_PIXELS` pixels; found out before any is decoded.
        OSError: if a file is missing or is no picture.
    """
    name = str(source)[:200]
    with reading(name):
        if name.startswith(("http://", "https://")):
            answer = get_session().get(source, follow_redirects=True)
            answer.raise_for_status()
            source = io.BytesIO(answer.content)
        elif name.startswith("data:"):
            source = io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True))
        image = Image.open(source)
    check_picture(image, repr(name))
    with reading(name):
        image.load()
    return image


def add_channels(image):
    """A grey (height, width) array or tensor with an axis for its channel; anything else as it is."""
    return image[..., None] if getattr(image, "ndim", None) == 2 else image


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
        ValueError: if a picture is larger than `pad_size`, or `size_divisor` is under 1.
    """
    sizes = [tuple(image.shape[-2:]) for image in images]
    height, width = (max(lengths) for lengths in zip(*sizes, strict=True))
    if pad_size is not None:
        if not (pad_size.height and pad_size.width) or pad_size.height < height or pad_size.width < width:
            raise ValueError(f"pad_size={pad_size} must be {{'height', 'width'}}, at least {height} and {width}.")
        height, width = pad_size.height, pad_size.width
    elif size_divisor is not None:
        if size_divisor < 1:
            raise ValueError(f"size_divisor={size_divisor} must be at least 1.")
        height, width = (math.ceil(length / size_divisor) * size_divisor for length in (height, width))
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
    mask = (padded.sigmoid() > threshold)[..., : resized_size[0], : resized_size[1]]
    return nn.functional.interpolate(mask.float(), size=tuple(target_size), mode="nearest")[0, 0].bool()


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

    def fetch_images(self, image_url_or_urls):
        """
        Open what is given by name: a path, a URL, or the content itself in base64 ("data:image/png;base64,...").

        Raises:
            ValueError: if a picture has more than `MAX_PIXELS` pixels.
            OSError: if a file is missing or is no picture.
        """
        images = image_url_or_urls
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image) for image in images]
        return open_picture(images) if isinstance(images, (str, os.PathLike)) else super().fetch_images(images)

    def open_images(self, images, annotated_sizes=None) -> list:
        """
        Whatever `images` is, a flat list of upright pictures.

        Args:
            images: a picture (PIL, array, tensor, path, URL) or a list of them.
            annotated_sizes (list of `(height, width)`, *optional*): the size each picture was annotated at.

        Raises:
            ValueError: if there are no images, not one annotated size an image, or a picture has more than
                `MAX_PIXELS` pixels or values that are not numbers.
            OSError: if a file is missing or is no picture.
        """
        if images is None or (isinstance(images, (list, tuple)) and len(images) == 0):
            raise ValueError("There are no images: give one picture or a list of them.")
        images = self.fetch_images(images)
        images = make_flat_list_of_images(
            [add_channels(image) for image in images] if isinstance(images, (list, tuple)) else add_channels(images)
        )
        for image in images:
            check_picture(image)
        if annotated_sizes is None:
            annotated_sizes = [None] * len(images)
        annotated_sizes = to_sizes(annotated_sizes, len(images), "annotated_sizes", are_optional=True)
        return [
            turn_upright(image, size) if isinstance(image, Image.Image) else image
            for image, size in zip(images, annotated_sizes, strict=True)
        ]

    def preprocess(self, images, annotated_sizes=None, **kwargs) -> BatchFeature:
        """
        Args:
            images: a picture (PIL, array, tensor, path, URL) or a list of them.
            annotated_sizes (list of `(height, width)`, *optional*):
                The size each picture was annotated at, which decides whether its EXIF orientation is followed.
            kwargs: any of the processor's settings, for this call.

        Returns:
            `BatchFeature`: `pixel_values` (I, 3, H, W) and `pixel_mask` (I, H, W), int64, 1 = picture.

        Raises:
            ValueError, OSError: see `open_images`.
        """
        return super().preprocess(self.open_images(images, annotated_sizes), **kwargs)

    def process_image(self, image, **kwargs) -> torch.Tensor:
        """One picture of any mode -> uint8 or float (3, height, width); 16-bit values are brought to 8 bits."""
        if isinstance(image, Image.Image) and image.mode == "RGB" and "transparency" not in image.info:
            # channels last in memory, as it was decoded: resizing takes a seventh of the time, and nothing is copied
            return torch.from_numpy(np.array(image)).permute(2, 0, 1).to(kwargs.get("device"))
        if isinstance(image, Image.Image) and (image.mode.startswith("I;16") or image.mode == "I"):
            image = np.asarray(image).astype(np.int64)
            image = image if image.max() > 255 else image * 257
            image = (image.clip(0, 65535) // 257).astype(np.uint8)
        elif isinstance(image, np.ndarray) and image.dtype == np.uint16:
            image = (image // 257).astype(np.uint8)
        elif isinstance(image, torch.Tensor) and image.dtype == torch.uint16:
            image = (image.int() // 257).to(torch.uint8)
        return super().process_image(image, **kwargs)

    def resize(self, image: torch.Tensor, size: SizeDict, resample=None, **kwargs) -> torch.Tensor:
        """
        Resize (..., height, width) by the published rule (`resized_size`), or to an exact `{"height", "width"}`.

        Raises:
            ValueError: if `size` is neither.
        """
        if size.shortest_edge and size.longest_edge:
            height, width = resized_size(*image.shape[-2:], size.shortest_edge, size.longest_edge)
            size = SizeDict(height=height, width=width)
        elif not (size.height and size.width):
            raise ValueError(
                f"size={size} must be {{'shortest_edge', 'longest_edge'}} (aspect kept) or {{'height', 'width'}}."
            )
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
        Bring the masks of one picture to its resized size (nearest) and pad them.

        Args:
            masks (array of shape `(phrases, height, width)`): at the picture's own size.
            padded_size (`(height, width)`): of the batch.
            size, do_resize (*optional*): as for the pictures, by default the processor's own.

        Returns:
            `torch.Tensor` of shape `(phrases, *padded_size)`, bool.
        """
        size = self.size if size is None else size
        masks = torch.as_tensor(np.asarray(masks)).bool().to(torch.uint8)
        if self.do_resize if do_resize is None else do_resize:
            size = size if isinstance(size, SizeDict) else SizeDict(**size)
            masks = self.resize(masks, size, resample=PILImageResampling.NEAREST)
        height, width = masks.shape[-2:]
        return tvF.pad(masks, [0, 0, padded_size[1] - width, padded_size[0] - height]).bool()

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
            ValueError: if the model predicts no masks, or there is not one size for each image.
        """
        if outputs.pred_masks is None:
            raise ValueError("There are no masks: the model's configuration has predict_masks=False.")
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
        results = []
        for boxes, mask in zip(self.post_process_boxes(outputs, target_sizes), outputs.phrase_mask, strict=True):
            labels = mask.nonzero().flatten() if threshold < 1 else mask.new_zeros(0, dtype=torch.long)
            results.append({"scores": boxes.new_ones(len(labels)), "labels": labels, "boxes": boxes[labels]})
        return results


RefTRImageProcessor.register_for_auto_class("AutoImageProcessor")

__all__ = ["RefTRImageProcessor"]
