"""
Allow one run at a time in a folder. `exclusive` is a collective: all ranks enter it together; the main process holds
the lock.
"""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator

from training_reftr.checkpoints import on_main_process
from training_reftr.run_folder import RunFolder


try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

logger = logging.getLogger(__name__)

_held = set()  # descriptors of locked files


@contextlib.contextmanager
def exclusive(folder: str | Path, accelerator: Accelerator) -> Iterator[None]:
    """
    Keep other runs out of a folder while this one writes there. A collective.

    Raises:
        OSError: on all ranks, if another run is there.
    """
    with contextlib.ExitStack() as stack:
        with on_main_process(accelerator):
            if accelerator.is_main_process:
                stack.enter_context(locked(Path(folder)))
        yield


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """
    Hold the lock of a folder, which is created if it is missing. The operating system releases it when the process
    ends, however it ends. Without such locks (Windows, some network file systems) a warning is logged.

    Raises:
        OSError: if another process holds it, with its id and host, or the folder cannot be written.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = RunFolder(folder).lock
    descriptor = acquire(path)
    try:
        yield
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)  # while the lock is held: `acquire` checks that the file still exists
            _held.discard(descriptor)
            os.close(descriptor)
        if is_new:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def acquire(path: Path) -> int | None:
    """
    Lock a file and write the process that holds it into the file.

    Returns:
        `int`: its descriptor, or None where files cannot be locked.

    Raises:
        OSError: see `locked`.
    """
    if fcntl is None:
        return warn_of_no_locks(path, "this system has no fcntl")
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # not inherited by child programs
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = read_holder(descriptor)
            os.close(descriptor)
            raise OSError(
                f"Another run is writing to {str(path.parent)!r}: {holder}. Wait for its end, stop it, or choose "
                "another --output_dir."
            ) from None
        except OSError as error:
            os.close(descriptor)
            return warn_of_no_locks(path, str(error))
        if is_same_file(descriptor, path):
            break
        os.close(descriptor)  # a run that ended removed the file in between
    _held.add(descriptor)
    os.truncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


def warn_of_no_locks(path: Path, reason: str) -> None:
    """Warn that other runs can write to a folder."""
    logger.warning(
        f"Files in {str(path.parent)!r} cannot be locked ({reason}): make sure that no other run writes there."
    )


def read_holder(descriptor: int) -> str:
    """Return the process that holds a locked file, as written right after locking."""
    for _ in range(20):
        holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
        if holder:
            return holder
        time.sleep(0.05)
    return "an unknown process"


def is_same_file(descriptor: int, path: Path) -> bool:
    """Return whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _close_in_child() -> None:
    """Close inherited locks after a fork, because a loader process may outlive the process that took them."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
