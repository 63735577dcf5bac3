"""
Guards that stop a run on signals, hangs and losses that are not finite. `Signals.poll` and `check_finite` are
collectives: all processes call them.
"""

import contextlib
import faulthandler
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Self

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import gather_object


logger = logging.getLogger(__name__)


class Stopped(KeyboardInterrupt):
    """
    Raised when a signal asks the process to end.

    Args:
        number (`int`): number of the signal.
        is_saved (`bool`, *optional*, defaults to `False`): whether a checkpoint was written before.
    """

    def __init__(self, number: int, is_saved: bool = False) -> None:
        super().__init__(number, is_saved)
        self.number, self.is_saved = number, is_saved

    @property
    def exit_code(self) -> int:
        """Return the exit code of shells for a signal: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.number

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        return f"{name}: the run is saved." if self.is_saved else f"{name}: ended at once, nothing more was saved."


class Signals:
    """
    Handle signals: SIGINT (Ctrl-C) and SIGTERM (a scheduler reclaims the machine) end the process, SIGUSR1 asks for a
    checkpoint, on any rank.

    While signals are deferred, as in training, the first SIGINT or SIGTERM is recorded and acted upon between two
    steps. Another SIGINT, or any signal after a SIGINT, raises `Stopped` at once, and so does every signal at other
    times. A repeated SIGTERM is ignored, because launchers and schedulers both send it.

    Python delivers signals to the main thread only. In other threads, as in executors of notebooks and Ray, no signal
    is handled and a warning is logged.
    """

    def __init__(self) -> None:
        self.is_save_asked = False
        self.stop = None  # number of the first SIGINT or SIGTERM
        self.is_deferred = False
        self.before = {}

    def __enter__(self) -> Self:
        self.process = os.getpid()
        self.is_main_thread = threading.current_thread() is threading.main_thread()
        if self.is_main_thread:
            numbers = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR1", None))  # Windows lacks the last
            self.before = {number: signal.signal(number, self._handle) for number in numbers if number is not None}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self, is_announced: bool = True) -> Iterator[None]:
        """Record signals for `poll`, and announce them on stderr if `is_announced`."""
        self.is_deferred, self.is_announced = True, is_announced
        if is_announced and not self.is_main_thread:
            logger.warning(
                "The run is not in the main thread, which alone receives signals: SIGTERM and Ctrl-C save nothing, "
                "and SIGUSR1 asks for no checkpoint. Checkpoints are written as checkpoint_every says."
            )
        try:
            yield
        finally:
            self.is_deferred = False

    def _handle(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self.process:  # a forked process, which its parent ends with SIGTERM
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if number not in (signal.SIGINT, signal.SIGTERM):
            self.is_save_asked = True
            return
        is_first, self.stop = self.stop is None, self.stop or number
        if self.is_deferred and is_first:
            if self.is_announced:  # not by logging, whose lock the main thread may hold
                text = f"\n{signal.Signals(number).name}: saving after this step; Ctrl-C ends at once, unsaved.\n"
                os.write(2, text.encode())
        elif not self.is_deferred or signal.SIGINT in (number, self.stop):
            raise Stopped(signal.SIGINT if signal.SIGINT in (number, self.stop) else number)

    def poll(self, accelerator: Accelerator) -> tuple[bool, bool]:
        """Return whether any rank was asked to (save, stop) since the last call. A collective."""
        asked = [self.is_save_asked, self.stop == signal.SIGINT, self.stop == signal.SIGTERM]
        asked = torch.tensor(asked, dtype=torch.float32, device=accelerator.device)
        save, interrupt, terminate = (accelerator.reduce(asked, reduction="sum") > 0).tolist()
        # A signal that arrives during the reduction is seen by the next call.
        self.is_save_asked = self.is_save_asked and not save
        if interrupt or terminate:
            self.stop = signal.SIGINT if interrupt else signal.SIGTERM
        return save, interrupt or terminate


def explain_runtime_error(error: RuntimeError) -> OSError | None:
    """
    Return an error with a one-sentence explanation if another process caused a RuntimeError of torch, else None.
    """
    killed = re.match(
        r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (is killed by signal: [^.]+|exited[^.]*)", str(error)
    )
    if killed:
        return ChildProcessError(
            f"A loader process (pid {killed[1]}) {killed[2].replace('is killed', 'was killed')}; most often memory is "
            "full. Lower num_workers or batch_size, and continue with --resume auto."
        )
    if isinstance(error, torch.distributed.DistBackendError) or "gloo" in str(error):
        reason = str(error).splitlines()[0]
        return ConnectionError(
            f"The connection to another rank of this run was lost, whose own message says why. ({reason})"
        )
    return None


class Watchdog:
    """
    End the process, with its stacks on stderr, if `feed` is not called in time, as when another process is gone or a
    loader hangs. The launcher then ends the other processes.
    """

    def __init__(self, minutes: float) -> None:
        self.seconds = minutes * 60

    def __enter__(self) -> Self:
        self.feed()
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()

    def feed(self) -> None:
        """Restart the timer."""
        faulthandler.dump_traceback_later(self.seconds, exit=True, file=sys.__stderr__)


def check_finite(
    loss: torch.Tensor,
    total: torch.Tensor,
    gradient_norm: torch.Tensor | None,
    batches: list[dict],
    step: int,
    accelerator: Accelerator,
) -> None:
    """
    Raise before an optimizer step that would corrupt the weights. A collective only if a value is not finite.

    Args:
        loss (`torch.Tensor`): loss of this process.
        total (`torch.Tensor`): loss of all processes.
        gradient_norm (`torch.Tensor`, *optional*): norm on all processes; None if a gradient scaler checks it.
        batches (`list[dict]`): batches of this process, with `targets`.
        step (`int`): number of the optimizer step.

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
