"""One optimizer step. `train_step` is a collective: all processes call it together."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed

from training_reftr.data import move
from training_reftr.guards import check_finite


if TYPE_CHECKING:
    from training_reftr.run import Run


def train_step(run: Run, batches: list[dict], accelerator: Accelerator) -> tuple[dict[str, torch.Tensor], int]:
    """
    Take one optimizer step on the batches of one accumulation. Losses are divided by the number of sentences of all
    processes and batches together.

    Args:
        run ([`Run`]): run to train. The random numbers of a step (dropout) depend only on the seed, the step and the
            process, so that a resumed run repeats an uninterrupted one.
        batches (`list[dict]`): `gradient_accumulation_steps` batches of this process.

    Returns:
        `dict[str, torch.Tensor]`: the loss, its parts, and the norm of the gradient before clipping, over all
        processes. `int`: number of expressions (phrases) of all processes.

    Raises:
        FloatingPointError: on all processes and before the weights change, if a loss is not finite.
    """
    model, optimizer, settings, step = run.model, run.optimizer, run.settings, run.state.step + 1
    set_seed(seed_of(settings.optimization.seed, step, accelerator.process_index))
    counts = torch.tensor(
        [
            sum(len(batch["labels"]) for batch in batches),
            sum(len(targets) for batch in batches for targets in batch["targets"]),
        ],
        dtype=torch.float32,
        device=accelerator.device,
    )
    num_sentences, num_expressions = accelerator.reduce(counts, reduction="sum")
    # DeepSpeed takes the optimizer step within backward, and handles gradients that are not finite itself.
    steps_in_backward = accelerator.distributed_type == DistributedType.DEEPSPEED
    losses = {}
    for number, batch in enumerate(batches):
        # Synchronize gradients between processes once per optimizer step.
        context = accelerator.no_sync(model) if number + 1 < len(batches) else accelerator.accumulate(model)
        with context:
            with accelerator.autocast():
                outputs = model(**move(batch, accelerator.device, run.processor), num_items_in_batch=num_sentences)
            if steps_in_backward:
                check_finite(outputs.loss, accelerator.reduce(outputs.loss.detach()), None, [batch], step, accelerator)
            # Gradients are averaged over processes, whereas the loss is a sum over them.
            accelerator.backward(outputs.loss * accelerator.num_processes)
        for name, value in {"loss": outputs.loss, **outputs.loss_dict}.items():
            losses[name] = losses.get(name, 0) + value.detach()
    gradient_norm = accelerator.clip_grad_norm_(model.parameters(), settings.optimization.max_grad_norm)
    gradient_norm = torch.as_tensor(gradient_norm, dtype=torch.float32, device=accelerator.device)
    summed = accelerator.reduce(torch.stack(list(losses.values())), reduction="sum")
    totals = {**dict(zip(losses, summed, strict=True)), "gradient_norm": gradient_norm}
    # The gradient scaler of fp16 skips a step with gradients that are not finite itself.
    norm = gradient_norm if accelerator.scaler is None and not steps_in_backward else None
    check_finite(losses["loss"], totals["loss"], norm, batches, step, accelerator)
    optimizer.step()
    optimizer.zero_grad()
    return totals, int(num_expressions)


def seed_of(seed: int, step: int, rank: int) -> int:
    """Return the random seed of a step on a process, in the range [0, 2**32)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()[:4], "big")
