"""The optimizer, its learning rates and their schedules. Nothing here is a collective."""

import math

import torch
from torch import nn

from training_reftr.settings import OptimizationSettings, ScheduleSettings


LEARNING_RATES = {
    "model.backbone.": "backbone_learning_rate",
    "model.text_backbone.": "text_learning_rate",
    "mask_head.": "mask_head_learning_rate",
    "": "learning_rate",
}


def learning_rate_setting(name: str) -> str:
    """
    Return the setting that holds the learning rate of a parameter.

    Example:

    ```python
    >>> from training_reftr.optimization import learning_rate_setting

    >>> learning_rate_setting("model.backbone.stem.weight"), learning_rate_setting("box_head.layers.0.bias")
    ('backbone_learning_rate', 'learning_rate')

    ```"""
    return next(setting for prefix, setting in LEARNING_RATES.items() if name.startswith(prefix))


def build_optimizer(model: nn.Module, optimization: OptimizationSettings) -> torch.optim.Optimizer:
    """Return AdamW with learning rates of their own for the backbones, the mask head and the other parameters."""
    groups = {setting: [] for setting in LEARNING_RATES.values()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[learning_rate_setting(name)].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": getattr(optimization, setting)}
            for setting, parameters in groups.items()
            if parameters
        ],
        betas=(0.9, optimization.adam_beta2),
        weight_decay=optimization.weight_decay,
        fused=True,
    )


def num_warmup_steps(schedule: ScheduleSettings, steps_per_epoch: int) -> int:
    """Return the optimizer steps of the warm-up."""
    return schedule.warmup_steps or round(schedule.warmup_epochs * steps_per_epoch)


def build_scheduler(
    optimizer: torch.optim.Optimizer, schedule: ScheduleSettings, steps_per_epoch: int, num_steps: int, done: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """
    Return the learning rate schedule of the published code. It multiplies all learning rates by one factor:
    `(step + 1) / warmup` during warm-up; then 0.1 for each of `lr_drop_epochs` that has passed (`step`), half a cosine
    until the last step (`cosine`), or 1 (`constant`). The factor is at least 0.01.

    Args:
        optimizer (`torch.optim.Optimizer`): optimizer with the peak learning rates.
        schedule ([`ScheduleSettings`]): settings of the schedule.
        steps_per_epoch (`int`): optimizer steps per epoch.
        num_steps (`int`): optimizer steps of the complete run.
        done (`int`, *optional*, defaults to 0): optimizer steps that a resumed run has already taken.
    """
    warmup = num_warmup_steps(schedule, steps_per_epoch)

    def factor(step: int) -> float:
        if step < warmup:
            value = (step + 1) / warmup
        elif schedule.lr_schedule == "cosine":
            progress = (step - warmup) / max(1, num_steps - warmup)
            value = 0.5 * (math.cos(math.pi * min(1.0, progress)) + 1)
        elif schedule.lr_schedule == "step":
            value = 0.1 ** sum(step >= epochs * steps_per_epoch for epochs in schedule.lr_drop_epochs)
        else:
            value = 1.0
        return max(0.01, value)

    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor, last_epoch=done - 1)
