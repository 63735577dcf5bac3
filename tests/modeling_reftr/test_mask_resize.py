"""Every resize of a mask equals that of the published loader, pixel by pixel."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from data_scripts.masks import resize_to_nearest
from data_scripts.refcoco import encode_segmentation
from modeling_reftr import RefTRImageProcessor, RefTRProcessor
from modeling_reftr.rle_reftr import from_coco_rle, to_coco_rle
from tests.helpers.golden import GOLDEN
from training_reftr.augmentation import crop_and_scale
from training_reftr.data import GroundingCollator
from training_reftr.evaluation import compare_masks
from training_reftr.samples import Sample, make_sample


@pytest.fixture(scope="module")
def published():
    """Return pairs of masks and the masks resized by the published loader, (3, height, width) each."""
    golden = np.load(GOLDEN / "mask_resize.npz")
    pairs = []
    for number in range(len(golden) // 3):
        pair = []
        for name, shape in zip(("masks", "resized"), golden[f"shapes_{number}"], strict=True):
            bits = np.unpackbits(golden[f"{name}_{number}"])[: shape.prod()]
            pair.append(bits.reshape(shape).astype(bool))
        pairs.append(tuple(pair))
    return pairs


@pytest.fixture(scope="module")
def full_size_processor(tokenizer):
    return RefTRProcessor(RefTRImageProcessor(), tokenizer)


def test_processor_label_masks_match_published_resize(published, full_size_processor):
    assert len(published) == 12
    for masks, resized in published:
        image = Image.new("RGB", masks.shape[:0:-1])
        texts = ["the ellipse", "the square", "the stripes"]
        labels = full_size_processor(image, texts, masks=list(masks))["labels"]
        found = torch.cat([label["masks"] for label in labels]).numpy()
        assert found.shape == resized.shape
        assert [(a != b).sum() for a, b in zip(found, resized, strict=True)] == [0, 0, 0], masks.shape


def test_collator_masks_match_published_resize(published, full_size_processor):
    """Collate rows whose masks are run-length encoded before and after the resize."""
    masks, resized = published[0]
    height, width = masks.shape[1:]
    box = {"box": [0, 0, 9, 9], "boxes": [[0, 0, 9, 9]], "category": None}
    row = {
        "image_id": "1",
        "image": Image.new("RGB", (width, height)),
        "width": width,
        "height": height,
        "objects": [{**box, "object_id": str(n), "segmentation": to_coco_rle(torch.from_numpy(mask))}
                    for n, mask in enumerate(masks)],
        "sentences": [
            {"sentence_id": str(n), "text": "it", "phrases": [{"start": 0, "end": 2, "objects": [n], "types": []}]}
            for n in range(len(masks))
        ],
    }  # fmt: skip
    small = np.zeros((*resized.shape[1:], 3), np.uint8)
    sample = make_sample(row, small, full_size_processor.image_processor, with_masks=True)
    assert (sample.masks == resized).all()
    for item in (sample, row):
        collate = GroundingCollator(full_size_processor, with_masks=True, are_resized=item is sample)
        labels = collate([item])["labels"]
        assert (torch.cat([label["masks"] for label in labels]).numpy() == resized).all()


def test_evaluation_target_masks_match_published_resize(published, full_size_processor):
    for masks, resized in published:
        for mask, answer in zip(masks, torch.from_numpy(resized), strict=True):
            target = {"segmentation": to_coco_rle(torch.from_numpy(mask))}
            answers = torch.from_numpy(mask)[None], answer[None]
            record = compare_masks(*answers, 0, target, full_size_processor)
            assert record["resized_mask_pixels"] == (answer.sum(), answer.sum())


def test_dataset_masks_match_published_resize(published):
    """Masks annotated at another size than that of the image are resized without torch."""
    for masks, resized in published:
        height, width = resized.shape[1:]
        for mask, expected in zip(masks, resized, strict=True):
            assert (resize_to_nearest(mask, height, width) == expected).all()
            runs = to_coco_rle(torch.from_numpy(mask))
            found = encode_segmentation(runs, mask.shape[::-1], (width, height))
            assert found is None if not expected.any() else (from_coco_rle(found) == expected).all()


def test_resize_to_nearest_equals_torch():
    rng = np.random.default_rng(0)
    for old, new in [(1, 1), (1, 9), (9, 1), (7, 14), *rng.integers(1, 1300, (300, 2)).tolist()]:
        line = np.arange(old)[None]
        expected = torch.nn.functional.interpolate(torch.from_numpy(line)[None].float(), size=new, mode="nearest")
        assert (resize_to_nearest(line, 1, new) == expected[0].numpy()).all(), (old, new)


def test_augmented_masks_equal_resize_to_nearest():
    mask = np.random.default_rng(0).random((53, 71)) < 0.5
    box = [0.0, 0.0, 71.0, 53.0]  # a box that must not be cropped, so the image is only scaled
    sample = Sample(np.zeros((53, 71, 3), np.uint8), np.array([box]), mask[None], [], row={})
    for seed in range(5):  # five different scales
        new = crop_and_scale(sample, random.Random(seed))
        found = new.masks[0]
        assert found.shape == new.image.shape[:2]
        assert (found == resize_to_nearest(mask, *found.shape)).all()
