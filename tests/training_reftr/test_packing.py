"""Labels come out of a loader process as they went in, in few tensors."""

import pytest
import torch

from training_reftr.packing import PackedLabels, pack_labels, unpack_labels


def label(num_phrases, **others):
    return {"boxes": torch.rand(num_phrases, 4), "masks": torch.rand(num_phrases, 5, 6) > 0.5, **others}


@pytest.mark.parametrize(
    "labels",
    [
        [],
        [{}, {}],
        [label(2), label(1), label(3)],
        [label(2), {}, {"boxes": torch.rand(3, 4)}, label(0)],  # without a mask, without a label, without a phrase
        [label(1, size=torch.tensor([3, 4])), label(2, size=torch.tensor([5, 6]))],
    ],
)
def test_labels_are_unpacked_as_they_were(labels):
    packed = pack_labels(labels)
    assert isinstance(packed, PackedLabels)
    assert len(packed.tensors) <= 3
    unpacked = unpack_labels(packed)
    assert [list(item) for item in unpacked] == [list(item) for item in labels]
    for item, expected in zip(unpacked, labels, strict=True):
        for name, value in item.items():
            assert value.dtype == expected[name].dtype
            assert torch.equal(value, expected[name])


def test_labels_of_different_sizes_are_left_alone():
    labels = [{"masks": torch.zeros(1, 2, 3)}, {"masks": torch.zeros(1, 3, 2)}]
    assert pack_labels(labels) is labels
    assert unpack_labels(labels) is labels
