"""
What ends a run before it does harm, or before it is killed. `Signals.poll` and `check_finite` hold collectives: all
processes call them; a `Watchdog` is a process's own.
"""

import faulthandler
import signal
import sys

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object


class Signals:
    """
    SIGTERM (a scheduler takes the machine back: save and end) and SIGUSR1 (save and go on), of whichever process. They
    are only noted when they come, and acted upon between two steps.
    """

    def __init__(self):
        self.is_save_asked = False
        self.is_stop_asked = False

    def __enter__(self):
        self.before = {
            signal.SIGTERM: signal.signal(signal.SIGTERM, self._ask_to_stop),
            signal.SIGUSR1: signal.signal(signal.SIGUSR1, self._ask_to_save),
        }
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask_to_stop(self, *_):
        self.is_stop_asked = True

    def _ask_to_save(self, *_):
        self.is_save_asked = True

    def poll(self, accelerator: Accelerator) -> tuple[bool, bool]:
        """Whether any process was asked to (save, stop) since the last call; a collective."""
        asked = torch.tensor([self.is_save_asked, self.is_stop_asked], dtype=torch.float32, device=accelerator.device)
        save, stop = (accelerator.reduce(asked, reduction="sum") > 0).tolist()
        # a signal that comes meanwhile is seen by the next call
        self.is_save_asked = self.is_save_asked and not save
        return save, stop


class Watchdog:
    """
    Ends the process, with its stacks on stderr, when `feed` was not called for so long: a process that waits for one
    that is gone, a loader that hangs. The launcher then ends the others.
    """

    def __init__(self, minutes: float):
        self.seconds = minutes * 60

    def __enter__(self):
        self.feed()
        return self

    def __exit__(self, *_):
        faulthandler.cancel_dump_traceback_later()

    def feed(self):
        """Start to count anew."""
        faulthandler.dump_traceback_later(self.seconds, exit=True, file=sys.__stderr__)


def check_finite(loss: torch.Tensor, total, gradient_norm, batches: list[dict], step: int, accelerator: Accelerator):
    """
    Stop before an update that would spoil the weights. A collective where something is wrong, and only there.

    Args:
        loss (`torch.Tensor`): this process's loss of the update.
        total (`torch.Tensor`): the loss of all processes.
        gradient_norm (`torch.Tensor`): the same on all processes; None where a gradient scaler looks after it.
        batches (`list[dict]`): what this process computed it from, with `targets`.
        step (`int`): the update's number.

    Raises:
        FloatingPointError: on all processes, naming the step, the processes and their images and sentences.
    """
    values = torch.stack([total, total if gradient_norm is None else gradient_norm])
    if values.isfinite().all().item():
        return
    names = [
        f"{targets[0]['image_id']}/{targets[0]['sentence_id']}"
        for batch in batches
        for targets in batch["targets"]
        if targets
    ]
    mine = {"rank": accelerator.process_index, "loss": loss.item(), "samples": names}
    found = gather_object([mine])
    culprits = [item for item in found if not torch.tensor(item["loss"]).isfinite()] or found
    lines = "".join(
        f"\n  process {item['rank']}: loss {item['loss']}, image/sentence {', '.join(item['samples'])}"
        for item in culprits
    )
    what = "The loss is not finite" if culprits is not found else "The gradient is not finite, though the loss is"
    raise FloatingPointError(
        f"{what} in step {step}; the weights were not changed. Lower the learning rate, look at these samples, or go "
        f"on from a checkpoint (--resume auto) with another --seed:{lines}"
    )
