"""
What a file of `torch.save` claims, looked at before PyTorch reads it: `torch.load` allocates whatever a few bytes ask
for, unpacks, and hashes and prints values that unfold to any size.
"""

import io
import mmap
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from data_scripts.pickles import BoundedUnpickler, refuse_packed
from data_scripts.quoting import explain, quote


MAGIC_NUMBER = 0x1950A86A20F9469CFC6C  # of files of torch.save before 1.6, which are not zip files
ITEM_SIZES = {
    "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1,
    "Bool": 1, "ComplexFloat": 8, "ComplexDouble": 16,
}  # fmt: skip


class NotRead:
    """Stand-in for objects of a checkpoint that are not tensors: accepts any arguments and keeps none."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __new__(cls, *args: Any, **kwargs: Any) -> "NotRead":
        """Accept any arguments."""
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


# classes of `args` and numbers in a published checkpoint, which are never called
NOT_READ = [
    (NotRead, name)
    for name in (
        "argparse.Namespace",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy.dtype",
        "numpy.ndarray",
    )
]
# PyTorch builds these itself; they are small for any arguments
SMALL = ("torch.device", "torch.Size", "torch.float64", "torch.float32", "torch.float16", "torch.bfloat16")


@dataclass(frozen=True)
class Storage:
    """The claimed elements of one or more tensors; without a count, a type of storage."""

    item_size: int
    count: int | None = None


class ClaimsUnpickler(BoundedUnpickler):
    """
    Interpret the pickle of a checkpoint without building tensors. `storages` (key -> [`Storage`]) are their claims.

    Args:
        file, name, num_bytes: see [`BoundedUnpickler`].
    """

    def __init__(self, file: BinaryIO | mmap.mmap, name: str, num_bytes: int):
        super().__init__(file, name, num_bytes)
        self.storages = {}
        self.allowed = {
            "collections.OrderedDict": self.make_dict,
            "collections.Counter": self.make_dict,
            "builtins.set": self.make_set,
            "_codecs.encode": self.encode,
            "torch._utils._rebuild_tensor": self.make_tensor,
            "torch._utils._rebuild_tensor_v2": self.make_tensor,
            "torch._utils._rebuild_parameter": NotRead,
            **{f"torch.{name}Storage": Storage(size) for name, size in ITEM_SIZES.items()},
            **{name: NotRead for _, name in NOT_READ},
            **dict.fromkeys(SMALL, NotRead),
        }

    def refuse(self, reason: str) -> NoReturn:
        """Raise the ValueError that names the file and the reason."""
        raise ValueError(f"{self.name} is refused: {reason}.")

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in of a global name."""
        full_name = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if full_name not in self.allowed:
            asked = quote(full_name.removeprefix("builtins."))[1:-1]
            self.refuse(f"it asks for {asked}, which no checkpoint of weights requires. Nothing of it was run")
        return self.allowed[full_name]

    def set_state(self, value: Any, state: Any) -> None:
        """Drop the state of stand-ins, and the attributes of an `OrderedDict`."""
        if not isinstance(value, NotRead) and not (type(value) is dict and type(state) is dict):
            super().set_state(value, state)

    def persistent_load(self, pid: Any) -> Storage:
        """Return a storage: ("storage", type, key, device, number of elements, in old files None)."""
        kind, storage_type, key, device, count, *view = pid if type(pid) is tuple else ()
        is_type = isinstance(storage_type, Storage) and storage_type.count is None
        is_claim = is_type and type(key) is str and type(device) is str and type(count) is int and count >= 0
        if kind != "storage" or not is_claim or view not in ([], [None]):
            self.refuse(f"it has a tensor over {quote(pid)}")
        if key not in self.storages or not self.storages[key].count:  # PyTorch asks once, unless it was nothing
            self.charge(count * storage_type.item_size)
            self.storages[key] = Storage(storage_type.item_size, count)
        return self.storages[key]

    def make_tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> NotRead:
        """Check that a tensor lies within its storage, because PyTorch would enlarge the storage."""
        sizes = (offset, *shape, *stride) if type(shape) is type(stride) is tuple else ()
        is_tensor = isinstance(storage, Storage) and storage.count is not None and len(shape) == len(stride) <= 32
        if not is_tensor or not all(type(size) is int and 0 <= size < 2**62 for size in sizes) or not sizes:
            self.refuse(f"it has a tensor of shape {quote(shape)} and strides {quote(stride)}")
        end = offset + 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if 0 not in shape and end > storage.count:
            self.refuse(
                f"it has a tensor of shape {quote(shape)} that claims {end} numbers of a storage of {storage.count}"
            )
        return NotRead()

    def _make_object(self) -> None:
        self.stack.pop()
        if self.stack.pop() is not NotRead:
            raise pickle.UnpicklingError("it makes an object of what is not a class")
        self.append(NotRead())

    dispatch = {**BoundedUnpickler.dispatch, pickle.NEWOBJ[0]: _make_object}


def check_claims(path: Path) -> None:
    """
    Check a file of `torch.save` without building, unpacking or allocating what it claims.

    Args:
        path (`Path`): the file, of any format of `torch.save`.

    Raises:
        ValueError: if it is damaged, asks for more than weights, or claims more than its size can hold.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content[:4] == b"PK\3\4":  # as PyTorch tells one format from the other
                _check_zip(path, content)
            else:
                _check_legacy(content, str(path))
    except Exception as error:  # a damaged pickle can raise anything
        if isinstance(error, ValueError) and str(path) in explain(error, max_length=10_000):
            raise
        raise ValueError(f"{path} cannot be read as a checkpoint of weights: {explain(error)}") from error


def _check_zip(path: Path, content: mmap.mmap) -> None:
    with zipfile.ZipFile(path) as archive:
        refuse_packed(archive, str(path), len(content))
        entries = {entry.filename.lower(): entry for entry in archive.infolist()}  # PyTorch takes A for a
        pickles = [entry for name, entry in entries.items() if name.endswith("data.pkl")]
        if len(entries) < len(archive.infolist()) or len(pickles) != 1:
            raise ValueError(f"{path} is refused: it has entries of one name, or not one data.pkl.")
        if _directory_offset(content) != archive.start_dir:
            raise ValueError(f"{path} is refused: its directory is not where its end says it is.")
        reader = ClaimsUnpickler(io.BytesIO(archive.read(pickles[0])), str(path), len(content))
        reader.load()
        for key, storage in reader.storages.items():
            entry = archive.getinfo(f"{pickles[0].filename.removesuffix('data.pkl')}data/{key}")
            if entry.file_size < storage.count * storage.item_size:
                raise ValueError(
                    f"{path} is refused: its storage {quote(key)} claims {storage.count * storage.item_size} bytes "
                    f"and has {entry.file_size}."
                )


def _directory_offset(content: mmap.mmap) -> int:
    """Return where a zip file without a comment says its directory is; zipfile would look elsewhere too."""
    end, locator, record = content[-22:], content[-42:-22], content[-98:-42]
    if end[:4] != b"PK\5\6":
        return -1
    if locator[:4] != b"PK\6\7":
        return int.from_bytes(end[16:20], "little")
    is_record = record[:4] == b"PK\6\6" and int.from_bytes(locator[8:16], "little") == len(content) - 98
    return int.from_bytes(record[48:56], "little") if is_record else -1


def _check_legacy(content: mmap.mmap, name: str) -> None:
    """Check torch.save's format before 1.6: magic number, version, system, value, and keys of the storages behind."""

    def read() -> tuple[Any, dict[str, Storage]]:
        reader = ClaimsUnpickler(content, name, len(content))
        return reader.load(), reader.storages

    if read()[0] != MAGIC_NUMBER:
        raise pickle.UnpicklingError("it does not begin as a file of torch.save")
    read()
    read()
    _, storages = read()
    keys, _ = read()
    if type(keys) is not list or not all(type(key) is str and key in storages for key in keys):
        raise ValueError(f"{name} is refused: it lists the storages {quote(keys)}.")
