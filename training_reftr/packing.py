"""
Labels of a batch in few tensors, for the way from a loader process: it sends each tensor as a file of its own, so that
a hundred small ones take longer than the work on them. Nothing here is a collective.
"""

from typing import NamedTuple

import torch


class PackedLabels(NamedTuple):
    """
    The labels of a batch.

    Args:
        tensors (`dict[str, torch.Tensor]`): by name, the tensors of all sentences, joined along the first dimension.
        lengths (`list[dict[str, int]]`): for each sentence, the length of each of its tensors.
    """

    tensors: dict[str, torch.Tensor]
    lengths: list[dict[str, int]]


def pack_labels(labels: list[dict[str, torch.Tensor]]) -> PackedLabels | list[dict[str, torch.Tensor]]:
    """
    Pack the labels of a batch; return them as they are if tensors of one name differ in more than their length.

    Example:

    ```python
    >>> import torch
    >>> from training_reftr.packing import pack_labels, unpack_labels

    >>> packed = pack_labels([{"boxes": torch.zeros(2, 4)}, {}, {"boxes": torch.ones(1, 4)}])
    >>> packed.tensors["boxes"].shape
    torch.Size([3, 4])
    >>> [list(label) for label in unpack_labels(packed)]
    [['boxes'], [], ['boxes']]

    ```"""
    names = {name for label in labels for name in label}
    columns = {name: [label[name] for label in labels if name in label] for name in sorted(names)}
    if any(len({(tensor.dtype, tensor.shape[1:]) for tensor in tensors}) > 1 for tensors in columns.values()):
        return labels
    lengths = [{name: len(tensor) for name, tensor in label.items()} for label in labels]
    return PackedLabels({name: torch.cat(tensors) for name, tensors in columns.items()}, lengths)


def unpack_labels(labels: PackedLabels | list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """Return the labels that `pack_labels` was given; their tensors are views."""
    if not isinstance(labels, PackedLabels):
        return labels
    counts = {name: [length[name] for length in labels.lengths if name in length] for name in labels.tensors}
    parts = {name: iter(torch.split(tensor, counts[name])) for name, tensor in labels.tensors.items()}
    return [{name: next(parts[name]) for name in lengths} for lengths in labels.lengths]
