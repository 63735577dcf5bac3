"""A folder has one run at a time, even if the process holding its lock is killed."""

import os
import re
import signal
import socket
import stat
import time

import pytest

from training_reftr import lock


def test_locked_folder_is_refused_with_process_and_host(tmp_path):
    folder = tmp_path / "runs" / "one"
    with lock.locked(folder):
        mode = (folder / ".lock").stat().st_mode
        message = f"Another run is writing to {str(folder)!r}: process {os.getpid()} on {socket.gethostname()}. "
        with pytest.raises(OSError, match=re.escape(message)), lock.locked(folder):
            pass
        (folder / "checkpoints").mkdir()
    assert stat.S_IMODE(mode) == stat.S_IMODE((folder / "checkpoints").stat().st_mode) & 0o666
    assert [path.name for path in folder.iterdir()] == ["checkpoints"]
    with lock.locked(folder):
        pass


def test_lock_survives_removal_of_its_file_before_locking(tmp_path, monkeypatch):
    """Lock anew if the previous run removes the file after this one opened it and before it locked it."""
    flock, removed = lock.fcntl.flock, []

    def remove_first(descriptor, operation):
        if not removed:
            removed.append((tmp_path / ".lock").unlink())
        return flock(descriptor, operation)

    monkeypatch.setattr(lock.fcntl, "flock", remove_first)
    with lock.locked(tmp_path):
        assert (tmp_path / ".lock").exists()
        with pytest.raises(OSError, match="Another run is writing"), lock.locked(tmp_path):
            pass
    assert removed


def test_lock_file_names_current_holder_only(tmp_path):
    (tmp_path / ".lock").write_text("process 1 on a machine with a long name " * 9)
    with lock.locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


def test_lock_removes_unused_new_folder(tmp_path):
    with pytest.raises(ValueError, match="refused"), lock.locked(tmp_path / "new"):
        raise ValueError("refused")
    (tmp_path / "old").mkdir()
    with lock.locked(tmp_path / "old"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_lock_is_released_on_kill_despite_living_loader_process(tmp_path):
    reading, writing = os.pipe()
    holder = os.fork()
    if holder == 0:
        with lock.locked(tmp_path):
            loader = os.fork()
            if loader == 0:
                time.sleep(60)
                os._exit(0)
            os.write(writing, str(loader).encode())
            time.sleep(60)
        os._exit(0)
    loader = int(os.read(reading, 100))
    try:
        with pytest.raises(OSError, match=f"process {holder} on"), lock.locked(tmp_path):
            pass
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        os.kill(loader, 0)  # the loader process is still alive
        assert (tmp_path / ".lock").exists()
        with lock.locked(tmp_path):
            assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    finally:
        os.kill(loader, signal.SIGKILL)


def test_folder_without_lock_support_is_used_with_warning(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", fail)  # as on a network file system without locks
    with lock.locked(tmp_path):
        pass
    assert "cannot be locked ([Errno 38] Function not implemented)" in caplog.text
    caplog.clear()
    monkeypatch.setattr(lock, "fcntl", None)  # as on Windows
    with lock.locked(tmp_path):
        pass
    assert "cannot be locked (this system has no fcntl)" in caplog.text
