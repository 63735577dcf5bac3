"""Atomic files and folders: complete or absent, whatever interrupts the process that writes them."""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_scripts.atomic_files import (
    atomic_file,
    atomic_folder,
    remove_folder,
    remove_leftovers,
    replaced_files,
    sha256_of,
    write_file,
)
from tests.helpers.tiny import ROOT


SIZE = 1 << 20
# each script writes one of two contents repeatedly until it is killed; it prints a line once writing has begun
WRITERS = {
    "file": "write_file(target, bytes([number % 2]) * SIZE, durable=False)",
    "folder": (
        "with atomic_folder(target, overwrite=True) as folder:\n"
        "        for name in 'ab':\n"
        "            (folder / name).write_bytes(bytes([number % 2]) * SIZE)"
    ),
    "files": (
        "with replaced_files(target) as folder:\n"
        "        for name in 'ab':\n"
        "            (folder / name).write_bytes(bytes([number % 2]) * SIZE)"
    ),
}


@pytest.fixture
def small_files():
    """Limit files to 1,000 bytes, so that a larger write fails as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(params=[0o022, 0o027], ids=oct)
def umask(request):
    previous = os.umask(request.param)
    yield request.param
    os.umask(previous)


def mode_of(path):
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("trial", range(3))
def test_killed_writer_leaves_complete_files(tmp_path, kind, trial):
    target = tmp_path / "target"
    script = f"""
import itertools, pathlib
from data_scripts.atomic_files import atomic_folder, replaced_files, write_file
target, SIZE = pathlib.Path({str(target)!r}), {SIZE}
for number in itertools.count():
    {WRITERS[kind]}
    if number == 1:
        print(flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        time.sleep(0.003 * trial)
        process.kill()
    # an interrupted exchange of folders leaves both of them, complete, next to the target
    target = target if target.exists() else max(tmp_path.iterdir(), key=lambda path: len(list(path.iterdir())))
    contents = [file.read_bytes() for file in ([target] if kind == "file" else [target / "a", target / "b"])]
    assert all(content in (bytes(SIZE), b"\1" * SIZE) for content in contents)
    if kind == "folder":
        assert contents[0] == contents[1]
    remove_leftovers(tmp_path)
    remove_leftovers(target) if kind == "files" else None
    assert not list(tmp_path.rglob(".*"))


def write_folder(path):
    with atomic_folder(path, overwrite=True) as folder:
        (folder / "content").write_bytes(bytes(2000))


def write_files(path):
    with replaced_files(path) as folder:
        (folder / "content").write_bytes(bytes(2000))


@pytest.mark.parametrize("write", [write_folder, write_files])
def test_folder_writer_on_full_disk_keeps_previous_folder(tmp_path, small_files, write):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "content").write_bytes(b"former")
    with pytest.raises(OSError, match="File too large"):
        write(path)
    assert (path / "content").read_bytes() == b"former"
    assert [item.name for item in tmp_path.rglob("*")] == ["folder", "content"]


def test_write_file_on_full_disk_keeps_previous_file(tmp_path, small_files):
    path = tmp_path / "file"
    write_file(path, "former")
    with pytest.raises(OSError, match="File too large"):
        write_file(path, bytes(2000))
    assert path.read_text() == "former"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("overwrite", [False, True])
def test_atomic_writer_interrupted_in_block_leaves_nothing(tmp_path, overwrite):
    def interrupt(path):
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "folder", overwrite) as folder:
        interrupt(folder / "file")
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "file") as temporary:
        interrupt(temporary)
    assert list(tmp_path.iterdir()) == []


def test_new_files_and_folders_follow_umask(tmp_path, umask):
    write_file(tmp_path / "parent" / "file", b"")
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "file").touch()
    with replaced_files(tmp_path / "files") as folder:
        (folder / "file").touch()
    for name in ("parent/file", "folder/file", "files/file"):
        assert mode_of(tmp_path / name) == 0o666 & ~umask
    for name in ("parent", "folder", "files"):
        assert mode_of(tmp_path / name) == 0o777 & ~umask


def test_replaced_file_keeps_its_permissions(tmp_path):
    path = tmp_path / "file"
    path.touch(0o640)
    path.chmod(0o604)
    write_file(path, "new")
    assert mode_of(path) == 0o604


def test_writers_follow_symbolic_links(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for name in ("file", "folder"):
        (tmp_path / name).symlink_to(f"elsewhere/{name}")
    write_file(tmp_path / "file", "new")
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "content").touch()
    assert (tmp_path / "elsewhere" / "file").read_text() == "new"
    assert (tmp_path / "elsewhere" / "folder" / "content").exists()
    assert (tmp_path / "file").is_symlink()
    assert (tmp_path / "folder").is_symlink()


def test_atomic_folder_refuses_existing_folder_or_file(tmp_path):
    (tmp_path / "file").touch()
    for path, overwrite in ((tmp_path, False), (tmp_path / "file", True)):
        with pytest.raises(FileExistsError, match="Choose another folder"), atomic_folder(path, overwrite):
            pass


def test_atomic_folder_with_overwrite_replaces_all_files(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "former").touch()
    with atomic_folder(path, overwrite=True) as folder:
        (folder / "new").touch()
    assert [item.name for item in tmp_path.rglob("*")] == ["folder", "new"]


def test_atomic_folder_with_failed_rename_keeps_previous_folder(tmp_path, monkeypatch):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "former").touch()
    rename = os.rename

    def fail_for_new(source, target):
        if target == path and (source / "new").exists():
            raise PermissionError("no rename")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_for_new)
    with pytest.raises(PermissionError), atomic_folder(path, overwrite=True) as folder:
        (folder / "new").touch()
    assert [item.name for item in tmp_path.rglob("*")] == ["folder", "former"]


def test_replaced_files_follows_order_and_keeps_other_files(tmp_path, monkeypatch):
    (tmp_path / "other").touch()
    names, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: names.append(target.name) or replace(source, target))
    with replaced_files(tmp_path, last="*.safetensors") as folder:
        for name in ("b.safetensors", "a.safetensors", "c.json"):
            (folder / name).touch()
    assert names == ["c.json", "a.safetensors", "b.safetensors"]
    assert {path.name for path in tmp_path.iterdir()} == {"other", *names}


@pytest.mark.parametrize("durable", [True, False])
def test_write_file_syncs_before_rename_only_if_durable(tmp_path, monkeypatch, durable):
    events, fsync, replace = [], os.fsync, os.replace

    def record_fsync(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}").removesuffix(".incomplete")[: len(str(tmp_path)) + 6])
        fsync(descriptor)

    def record_replace(source, target):
        events.append("renamed")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write_file(tmp_path / "file", "content", durable)
    assert events == ([f"{tmp_path}/.file", "renamed", str(tmp_path)] if durable else ["renamed"])


def test_remove_folder_leaves_nothing(tmp_path):
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "content").touch()
    remove_folder(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_remove_leftovers_keeps_other_files(tmp_path):
    for name in (".one.incomplete", "two.incomplete", ".three"):
        (tmp_path / name).touch()
    (tmp_path / ".four.0a.incomplete").mkdir()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"two.incomplete", ".three"}


def test_sha256_of_returns_hex_digest_of_file(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256_of(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_file_is_written_if_another_process_removes_the_former_one(tmp_path, monkeypatch):
    """The former file is gone after the first look at it, a moment that a real process rarely meets."""
    path, stat = tmp_path / "cache.npy", Path.stat
    path.write_text("former")

    def stat_and_lose(self, **kwargs):
        status = stat(self, **kwargs)
        if self == path:
            path.unlink()
        return status

    monkeypatch.setattr(Path, "stat", stat_and_lose)
    write_file(path, "new", durable=False)
    monkeypatch.undo()
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["cache.npy"]
