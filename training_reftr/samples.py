"""
Samples: an image with some of its sentences, as arrays. Nothing here is a collective.

Between the reader and the collator images, boxes and masks are arrays; run lengths are decoded once, when a sample is
made.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from data_scripts.building import is_degenerate
from modeling_reftr import RefTRImageProcessor
from modeling_reftr.rle_reftr import from_coco_rle
from training_reftr.negatives import ImageContext
from training_reftr.sampling import is_learnable


@dataclass
class Sample:
    """
    An image with some of its sentences.

    Args:
        image (`np.ndarray` of shape `(height, width, 3)`): uint8, RGB.
        boxes_xyxy (`np.ndarray` of shape `(objects, 4)`): in pixels of `image`.
        masks (`np.ndarray` of shape `(objects, height, width)`, *optional*): bool; all False for an object without a
            mask.
        sentences (`list[dict]`): see `data_scripts.FEATURES`; their phrases name objects by index.
        row (`dict`): the annotations of these sentences, in pixels of the original image.
        key (`str`, *optional*): identifies a training sample, for random numbers.
        context ([`ImageContext`], *optional*): what all annotations of the image say.
    """

    image: np.ndarray
    boxes_xyxy: np.ndarray
    masks: np.ndarray | None
    sentences: list[dict]
    row: dict
    key: str = ""
    context: ImageContext | None = None


def make_sample(
    row: dict, image: np.ndarray, image_processor: RefTRImageProcessor, with_masks: bool = False
) -> Sample:
    """
    Make a sample of a row, with boxes and masks at the size of its image.

    Args:
        row (`dict`): see `data_scripts.FEATURES`; boxes and masks have its `height` and `width`.
        image (`np.ndarray` of shape `(height, width, 3)`): of the row, resized or not.
        image_processor ([`RefTRImageProcessor`]): resizes masks.
        with_masks (`bool`, *optional*, defaults to `False`): whether to decode masks.
    """
    size, new_size = (row["height"], row["width"]), image.shape[:2]
    boxes_xyxy = np.array([item["box"] for item in row["objects"]], dtype=np.float64).reshape(-1, 4)
    if size != new_size:
        limits = np.array([size[1], size[0]] * 2, dtype=np.float64)
        clipped = np.clip(boxes_xyxy, 0, limits)
        # annotations may exceed the image by a pixel, which is clipped before it is scaled
        is_close = (np.abs(boxes_xyxy - clipped) <= 1).all(axis=1, keepdims=True)
        boxes_xyxy = np.where(is_close, clipped, boxes_xyxy) * (np.array([new_size[1], new_size[0]] * 2) / limits)
    masks = None
    if with_masks:
        masks = np.zeros((len(row["objects"]), *new_size), dtype=bool)
        for index, item in enumerate(row["objects"]):
            if item["segmentation"] is not None:
                masks[index] = resize_mask(from_coco_rle(item["segmentation"]), new_size, image_processor)
    return Sample(image, boxes_xyxy, masks, row["sentences"], row)


def resize_mask(mask: np.ndarray, new_size: tuple[int, int], image_processor: RefTRImageProcessor) -> np.ndarray:
    """Resize a mask (height, width) to (height, width) `new_size` as the image processor does."""
    if mask.shape == new_size:
        return mask
    size = {"height": new_size[0], "width": new_size[1]}
    return image_processor.resize_masks(torch.from_numpy(mask)[None], new_size, size, do_resize=True)[0].numpy()


def without_misses(row: dict, learns_absence: bool = False) -> dict:
    """Return a row without the phrases and targets that cannot be learned, see `sampling.is_learnable`."""
    is_miss = [is_degenerate(item["box"]) for item in row["objects"]]
    if not any(is_miss) and all(phrase["objects"] for item in row["sentences"] for phrase in item["phrases"]):
        return row
    sentences = [
        {
            **sentence,
            "phrases": [
                {**phrase, "objects": [index for index in phrase["objects"] if not is_miss[index]]}
                for phrase in sentence["phrases"]
                if is_learnable(phrase, row["objects"], learns_absence)
            ],
        }
        for sentence in row["sentences"]
    ]
    return {**row, "sentences": sentences}


def take_sentences(row: dict, indices: Iterable[int]) -> dict:
    """Return a row with some of its sentences, in the given order, and the objects that they name."""
    sentences = [row["sentences"][index] for index in indices]
    named = sorted({index for item in sentences for phrase in item["phrases"] for index in phrase["objects"]})
    new_index = {index: number for number, index in enumerate(named)}
    return {
        **row,
        "objects": [row["objects"][index] for index in named],
        "sentences": [
            {
                **sentence,
                "phrases": [
                    {**phrase, "objects": [new_index[index] for index in phrase["objects"]]}
                    for phrase in sentence["phrases"]
                ],
            }
            for sentence in sentences
        ],
    }
