"""Optimiser, its rates, and their schedules. Nothing here holds a collective."""

import math

import torch
from torch import nn


def build_optimizer(model: nn.Module, args) -> torch.optim.Optimizer:
    """AdamW over what is trained, with a rate each for the backbones, the mask head and the rest."""
    rates = {
        "model.backbone.": args.backbone_learning_rate,
        "model.text_backbone.": args.text_learning_rate,
        "mask_head.": args.mask_head_learning_rate,
        "": args.learning_rate,
    }
    groups = {prefix: [] for prefix in rates}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[next(prefix for prefix in rates if name.startswith(prefix))].append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters, "lr": rates[prefix]} for prefix, parameters in groups.items() if parameters],
        betas=(0.9, args.adam_beta2),
        weight_decay=args.weight_decay,
        fused=True,
    )


def build_scheduler(
    optimizer, args, steps_per_epoch: int, num_steps: int, done: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """
    One factor for all rates, set before every update (published schedules); `done` updates are over.

    `cosine` never goes under 0.01 of the peak; `step` is 0.1 of it after `lr_drop_epochs`.
    """

    def factor(step: int) -> float:
        if step < args.warmup_steps:
            return (step + 1) / args.warmup_steps
        if args.lr_schedule == "cosine":
            progress = (step - args.warmup_steps) / max(1, num_steps - args.warmup_steps)
            return max(0.01, 0.5 * (math.cos(math.pi * min(1.0, progress)) + 1))
        if args.lr_schedule == "step":
            return 0.1 if step >= args.lr_drop_epochs * steps_per_epoch else 1.0
        return 1.0

    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor, last_epoch=done - 1)
