"""Batch norm over the global batch of all processes. Its forward is a collective in training."""

from typing import Any

import torch
from torch import distributed, nn
from torch.autograd.function import once_differentiable


class SumOverProcesses(torch.autograd.Function):
    """Sum a tensor over all processes; the gradient of the sum is summed over them, too."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum, of the tensor's shape."""
        total = tensor.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient of this process's tensor."""
        gradient = gradient.clone()
        distributed.all_reduce(gradient)
        return gradient


class CpuSyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` by the statistics of all processes in training, for CPUs, which `nn.SyncBatchNorm` refuses."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize a tensor of shape (N, channels, height, width)."""
        if not self.training:
            return super().forward(input)
        values = input.float()
        sums = torch.cat((values.sum(dim=(0, 2, 3)), values.new_full((1,), values.numel() / values.shape[1])))
        sums = SumOverProcesses.apply(sums)
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centered = values - mean[:, None, None]
        variance = SumOverProcesses.apply(centered.square().sum(dim=(0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centered * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)


def synchronize_batch_norm(model: nn.Module, device: torch.device) -> None:
    """
    Replace the model's trainable batch norms by ones that see the global batch, in place; parameters, buffers and
    their names stay.

    Args:
        model (`nn.Module`): to be trained by several processes.
        device (`torch.device`): device of the training; on CPUs, `CpuSyncBatchNorm2d` is used.

    Raises:
        ValueError: for a batch norm of another class, which cannot be replaced.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and type(module) is not nn.BatchNorm2d:
            raise ValueError(
                f"{name} is a {type(module).__name__}, whose statistics cannot be shared between processes; train "
                "with freeze_backbone_batch_norm=True, on one process, or with another backbone."
            )
    if device.type != "cpu":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                replaced = CpuSyncBatchNorm2d(norm.num_features, norm.eps, norm.momentum, device="meta")
                replaced.weight, replaced.bias = norm.weight, norm.bias
                for buffer_name, buffer in norm.named_buffers():
                    setattr(replaced, buffer_name, buffer)
                setattr(parent, name, replaced.train(norm.training))
