"""Batch norm over the whole global batch. Its forward holds a collective in training."""

import torch
from torch import nn
from torch.distributed.nn.functional import all_reduce


class SynchronizedBatchNorm2d(nn.BatchNorm2d):
    """
    `nn.BatchNorm2d` whose training statistics are those of all processes' batches together. PyTorch's own
    `SyncBatchNorm` does the same on GPUs alone.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(N, channels, height, width) -> the same, by the statistics of all processes while training."""
        if not self.training:
            return super().forward(input)
        values = input.float()
        sums = torch.cat((values.sum(dim=(0, 2, 3)), values.new_full((1,), values.numel() / values.shape[1])))
        sums = all_reduce(sums)
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centered = values - mean[:, None, None]
        variance = all_reduce(centered.square().sum(dim=(0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centered * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)


def synchronize_batch_norm(model: nn.Module):
    """
    Make the model's trainable batch norms see the global batch, in place; weights and their names stay.

    Raises:
        ValueError: for a batch norm of another class, which this module cannot stand in for.
    """
    for name, module in model.named_modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SynchronizedBatchNorm2d
        elif isinstance(module, nn.BatchNorm2d) and not isinstance(module, SynchronizedBatchNorm2d):
            raise ValueError(
                f"{name} is a {type(module).__name__}, whose statistics cannot be shared between processes; train "
                "with freeze_backbone_batch_norm=True, on one process, or with another backbone."
            )
