"""Write weights with the permissions of any other new file, because safetensors makes its files private."""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file


def save_tensors(
    tensors: dict[str, torch.Tensor], path: str | os.PathLike, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file with the permissions of a new file."""
    save_file(tensors, path, metadata=metadata)
    apply_default_permissions([Path(path)])


def apply_default_permissions(paths: Iterable[Path]) -> None:
    """Give files the permissions that the umask, or the default ACL of their folder, gives to a new file."""
    modes = {}
    for path in paths:
        if path.parent not in modes:
            modes[path.parent] = new_file_mode(path.parent)
        os.chmod(path, modes[path.parent])


def new_file_mode(folder: Path) -> int:
    """Return the permissions of a new file in a folder; the umask itself cannot be read without changing it."""
    probe = folder / f".mode.{os.getpid()}.{os.urandom(4).hex()}"
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return os.fstat(descriptor).st_mode & 0o777
    finally:
        os.close(descriptor)
        os.unlink(probe)
