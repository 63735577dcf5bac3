"""One update of the weights. `update` holds collectives: all processes call it together."""

import hashlib

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed

from training_reftr.data import move
from training_reftr.guards import check_finite


def update(run, batches: list[dict], accelerator: Accelerator) -> tuple[dict, int]:
    """
    One update from a few batches, whose losses are divided by the sentences of all processes and batches together.

    Args:
        run (`Run`): what is trained. What is drawn in an update (dropout) depends on the seed, the update's number
            and the process alone, so that a run that goes on from a checkpoint draws what the whole one does.
        batches (`list[dict]`): of this process, `gradient_accumulation_steps` of them.

    Returns:
        `dict[str, torch.Tensor]`: the loss, its parts, and the gradient's norm before it was cut, of all processes
        together. `int`: expressions (phrases) of all processes.

    Raises:
        FloatingPointError: on all processes and before the weights change, where a loss is not finite.
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
    # DeepSpeed's engine does; what it makes of gradients that are not finite is its own affair
    updates_in_backward = accelerator.distributed_type == DistributedType.DEEPSPEED
    losses = {}
    for number, batch in enumerate(batches):
        # gradients travel between processes once an update
        context = accelerator.no_sync(model) if number + 1 < len(batches) else accelerator.accumulate(model)
        with context:
            with accelerator.autocast():
                outputs = model(**move(batch, accelerator.device), num_items_in_batch=num_sentences)
            if updates_in_backward:
                check_finite(outputs.loss, accelerator.reduce(outputs.loss.detach()), None, [batch], step, accelerator)
            # the processes' gradients are averaged, while the loss is a sum over them
            accelerator.backward(outputs.loss * accelerator.num_processes)
        for name, value in {"loss": outputs.loss, **outputs.loss_dict}.items():
            losses[name] = losses.get(name, 0) + value.detach()
    gradient_norm = accelerator.clip_grad_norm_(model.parameters(), settings.optimization.max_grad_norm)
    gradient_norm = torch.as_tensor(gradient_norm, dtype=torch.float32, device=accelerator.device)
    summed = accelerator.reduce(torch.stack(list(losses.values())), reduction="sum")
    totals = {**dict(zip(losses, summed, strict=True)), "gradient_norm": gradient_norm}
    # the scaler of fp16 looks for gradients that are not finite itself, and leaves the update out
    norm = gradient_norm if accelerator.scaler is None and not updates_in_backward else None
    check_finite(losses["loss"], totals["loss"], norm, batches, step, accelerator)
    optimizer.step()
    optimizer.zero_grad()
    return totals, int(num_expressions)


def seed_of(seed: int, step: int, rank: int) -> int:
    """What a step's draws begin with on a process, in 0 .. 2**32 - 1."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()[:4], "big")
