"""COCO run-length encoding is read and written alike by the model code, the dataset scripts and pycocotools."""

import contextlib

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from data_scripts import masks as dataset_masks
from modeling_reftr import rle_reftr


@pytest.fixture(params=range(6))
def mask(request):
    """Return a random mask, from empty to full."""
    rng = np.random.default_rng(request.param)
    return rng.random((13, 29)) < request.param / 5


def test_to_coco_rle_equals_pycocotools_and_dataset_scripts(mask):
    encoded = rle_reftr.to_coco_rle(mask)
    assert encoded == rle_reftr.to_coco_rle(torch.from_numpy(mask))
    for reference in (coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)), dataset_masks.encode_mask(mask)):
        assert encoded == {"size": list(reference["size"]), "counts": reference["counts"].decode("ascii")}


def test_from_coco_rle_restores_mask(mask):
    encoded = rle_reftr.to_coco_rle(mask)
    lengths = dataset_masks.uncompress_counts(encoded["counts"])
    assert lengths == rle_reftr.uncompress_counts(encoded["counts"])
    for counts in (encoded["counts"], encoded["counts"].encode(), lengths, np.array(lengths)):
        decoded = rle_reftr.from_coco_rle({**encoded, "counts": counts})
        assert decoded.dtype == bool
        np.testing.assert_array_equal(decoded, mask)


@pytest.mark.parametrize("counts", [[1000], [-5, 11], "~~~~", b"\xff\xff", [0, 10**9], ["x"], None, 7])
def test_from_coco_rle_rejects_invalid_run_lengths(counts):
    with pytest.raises(ValueError, match="The run lengths"):
        rle_reftr.from_coco_rle({"size": [2, 3], "counts": counts})


@pytest.mark.parametrize("size", [[2], [0, 3], [2.0, 3], "23", [10**5, 10**5], None])
def test_from_coco_rle_rejects_invalid_sizes(size):
    with pytest.raises(ValueError, match=r"must be \[height, width\]"):
        rle_reftr.from_coco_rle({"size": size, "counts": [6]})


@pytest.mark.parametrize("segmentation", [None, [1], {"size": [2, 3]}])
def test_from_coco_rle_rejects_other_values(segmentation):
    with pytest.raises(ValueError, match='must have "size"'):
        rle_reftr.from_coco_rle(segmentation)


def test_from_coco_rle_returns_no_uninitialized_memory():
    for _ in range(50):
        np.full(600, 1, np.uint8)  # memory that an uninitialized array would reuse
        with contextlib.suppress(ValueError):  # refused, unless chance left zeros there
            assert rle_reftr.from_coco_rle({"size": [20, 30], "counts": [1, 2]}).sum() == 2
