"""Exponential moving average of a model's weights. Nothing here is a collective."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel

from modeling_reftr import RefTRForVisualGrounding
from training_reftr.evaluation import SHARDED
from training_reftr.settings import OptimizationSettings


logger = logging.getLogger(__name__)


def build_average(
    model: RefTRForVisualGrounding, optimization: OptimizationSettings, accelerator: Accelerator
) -> AveragedModel | None:
    """
    Return the average of a model's weights and buffers, which starts as a copy of it; None without `ema_decay`.

    Args:
        model ([`RefTRForVisualGrounding`]): model before it is compiled and prepared by the accelerator.
        optimization ([`OptimizationSettings`]): setting `ema_decay`.

    Raises:
        ValueError: if the weights will be sharded over processes.
    """
    if not optimization.ema_decay:
        return None
    if accelerator.distributed_type in SHARDED:
        raise ValueError(
            f"ema_decay={optimization.ema_decay:g} requires all weights on every process, and "
            f"{accelerator.distributed_type.value} shards them: set ema_decay to 0, or train with DDP."
        )
    return AveragedModel(
        model,
        device=accelerator.device,
        multi_avg_fn=exponential_average(optimization.ema_decay),
        use_buffers=True,
    )


def exponential_average(decay: float) -> Callable[[list[torch.Tensor], list[torch.Tensor], torch.Tensor | int], None]:
    """
    Return the function that moves averaged weights towards the current ones, in place.

    The first averages are short, `(1 + n) / (10 + n)` after n steps, so that they do not contain the random weights
    (`tf.train.ExponentialMovingAverage`, argument `num_updates`).

    Example:

    ```python
    >>> import torch
    >>> from training_reftr.averaging import exponential_average

    >>> averaged = [torch.zeros(1)]
    >>> exponential_average(0.99)(averaged, [torch.ones(1)], 10_000)
    >>> averaged
    [tensor([0.0100])]

    ```"""

    @torch.no_grad()
    def average(averaged: list[torch.Tensor], current: list[torch.Tensor], num_averaged: torch.Tensor | int) -> None:
        weight = 1 - min(decay, (1 + int(num_averaged)) / (10 + int(num_averaged)))
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, weight)
        else:  # counters of batch norms
            torch._foreach_copy_(averaged, current)

    return average


def load_average(file: Path, average: AveragedModel) -> None:
    """
    Load the average of a checkpoint. If it was written without one, keep the copy of its weights and log a warning.

    Raises:
        OSError: if the file does not fit the model.
    """
    if not file.exists():
        logger.warning(
            f"The average of weights restarts from {str(file.parent)!r}, which was written without ema_decay."
        )
        return
    try:
        average.load_state_dict(load_file(file))
    except RuntimeError as error:
        raise OSError(f"{str(file)!r} does not fit the model: {error}.") from error
