"""
Pickles of others, read without running their code, and in time and memory that the size of their file bounds.

A pickle is a program. This one interpreter of it, in Python, sees what the library's own reader in C does not: a
thousand bytes can hash a tuple that unfolds to 10 ** 30 entries, reserve memory for a memo of 2 ** 32 entries, or ask
NumPy for an array of any size.
"""

import io
import math
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Never, NoReturn

import numpy as np

from .quoting import explain, quote


# keys of dicts and entries of sets: hashing them takes no time
KEY_TYPES = (str, int, float, bool, bytes, type(None))
MAX_KEY = 2**60  # of integers: larger ones can be made to share one hash
MAX_DEPTH = 100
UNUSED_OPCODES = (  # they call classes, or require buffers of the caller
    *(pickle.INST + pickle.OBJ + pickle.NEWOBJ + pickle.NEWOBJ_EX + pickle.EXT1 + pickle.EXT2 + pickle.EXT4),
    *(pickle.NEXT_BUFFER + pickle.READONLY_BUFFER),
)
CONTAINERS = (list, tuple, dict, set, frozenset)


class BoundedUnpickler(pickle._Unpickler):
    """
    Unpickler of numbers, texts, lists, tuples, dicts and sets. Subclasses decide in `find_class` which other names are
    allowed and in `set_state` what may be changed, and count memory beyond the bytes of the file in `charge`.

    Args:
        file (binary file): with `read` and `readline`, whose `read(n)` reserves no memory for what is not there.
        name (`str`): of the file, for messages.
        num_bytes (`int`): of the file, which all that is charged must not exceed.
    """

    def __init__(self, file: BinaryIO, name: str, num_bytes: int) -> None:
        super().__init__(file, encoding="latin-1")
        self.name = name
        self.num_bytes = num_bytes
        self.num_charged = 0

    def refuse(self, reason: str) -> NoReturn:
        """Raise the ValueError that names the file and the reason."""
        raise ValueError(f"{self.name!r} is refused: {reason}.")

    def charge(self, num_bytes: int) -> None:
        """Count bytes that are made of something else than bytes of the file."""
        self.num_charged += num_bytes
        if num_bytes < 0 or self.num_charged > self.num_bytes:
            self.refuse(f"it claims {quote(self.num_charged)} bytes, more than the {self.num_bytes} that it has")

    def find_class(self, module: str, name: str) -> None:
        """Refuse every name."""
        self.refuse(f"it asks for {quote(f'{module}.{name}')[1:-1]}")

    def set_state(self, value: Any, state: Any) -> None:
        """Refuse to change a value."""
        self.refuse(f"it sets the state of {quote(value)}")

    def check_keys(self, keys: Any) -> None:
        """Refuse keys that take time to hash, or that are made to share one hash."""
        for key in keys:
            if type(key) is str:
                continue
            if type(key) not in KEY_TYPES or (type(key) is int and abs(key) >= MAX_KEY):
                self.refuse(f"a dict or set in it has the key {quote(key)}; expected text or a number")

    def make_dict(self, items: Any = ()) -> dict:
        """Return what stands for an `OrderedDict`."""
        items = [(key, value) for key, value in items]
        self.check_keys(key for key, _ in items)
        return dict(items)

    def make_set(self, items: Any = ()) -> set:
        """Return a set of the entries of a list."""
        self.check_keys(items)
        return set(items)

    def encode(self, text: str, encoding: str = "latin-1", *_: Any) -> bytes:
        """Return Python 2's bytes, as protocol 2 writes them."""
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "utf8", "ascii"):
            self.refuse(f"it encodes {quote(text)} as {quote(encoding)}")
        self.charge(len(text))
        return text.encode(encoding)

    # opcodes

    def _refuse_opcode(self) -> Never:
        raise pickle.UnpicklingError("it has an opcode that data never has")

    def _build(self) -> None:
        state = self.stack.pop()
        self.set_state(self.stack[-1], state)

    def _set_items(self, items: list) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise pickle.UnpicklingError("it sets entries of what is not a dict, or of a key without a value")
        self.check_keys(items[::2])
        target.update(zip(items[::2], items[1::2], strict=True))

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def _set_marked(self) -> None:
        items = self.pop_mark()
        self._set_items(items)

    def _make_marked_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    def _extend(self, items: list) -> None:
        if type(self.stack[-1]) is not list:
            raise pickle.UnpicklingError("it appends to what is not a list")
        self.stack[-1].extend(items)

    def _append_item(self) -> None:
        value = self.stack.pop()
        self._extend([value])

    def _append_marked(self) -> None:
        items = self.pop_mark()
        self._extend(items)

    def _add_marked(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is not set:
            raise pickle.UnpicklingError("it adds to what is not a set")
        self.stack[-1].update(self.make_set(items))

    def _make_marked_frozenset(self) -> None:
        items = self.pop_mark()
        self.append(frozenset(self.make_set(items)))

    def _read_bytearray(self) -> None:
        num_bytes = int.from_bytes(self.read(8), "little")
        self.append(bytearray(self.read(min(num_bytes, self.num_bytes))))

    dispatch = {
        **dict.fromkeys(range(256), _refuse_opcode),
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: _build,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_marked,
        pickle.DICT[0]: _make_marked_dict,
        pickle.APPEND[0]: _append_item,
        pickle.APPENDS[0]: _append_marked,
        pickle.ADDITEMS[0]: _add_marked,
        pickle.FROZENSET[0]: _make_marked_frozenset,
        pickle.BYTEARRAY8[0]: _read_bytearray,
        **dict.fromkeys(UNUSED_OPCODES, _refuse_opcode),
    }


@dataclass(frozen=True)
class _Name:
    """What may be named, but not called."""

    name: str


@dataclass
class _DType:
    """A NumPy dtype of numbers or of text of a fixed length, as it is pickled: its code, then its byte order."""

    code: str
    order: str = "="

    @property
    def dtype(self) -> np.dtype:
        """The dtype itself."""
        return np.dtype(self.code).newbyteorder(self.order)


TORCH_TYPES = {
    "Double": "<f8", "Float": "<f4", "Half": "<f2", "Long": "<i8", "Int": "<i4", "Short": "<i2", "Char": "i1",
    "Byte": "u1", "Bool": "?",
}  # fmt: skip


class DataUnpickler(BoundedUnpickler):
    """
    Reads NumPy arrays and numbers as well, of Python 2 too. Tensors become arrays over `storages`, key -> array, which
    are stored next to the pickle and filled after it.
    """

    def __init__(self, file: BinaryIO, name: str, num_bytes: int) -> None:
        super().__init__(file, name, num_bytes)
        self.storages = {}
        cores, builtins = ("numpy.core", "numpy._core"), ("builtins", "__builtin__")
        # (module, name) -> what stands in for it; nothing else is ever looked up
        self.allowed = {
            ("collections", "OrderedDict"): self.make_dict,
            ("_codecs", "encode"): self.encode,
            ("numpy", "ndarray"): _Name("ndarray"),
            ("numpy", "dtype"): self.make_dtype,
            **{(f"{core}.multiarray", "_reconstruct"): self.make_array for core in cores},
            **{(f"{core}.numeric", "_frombuffer"): self.make_array_of_buffer for core in cores},
            **{(f"{core}.multiarray", "scalar"): self.make_number for core in cores},
            **{(module, name): self.make_set for module in builtins for name in ("set", "frozenset")},
            ("torch._utils", "_rebuild_tensor_v2"): self.make_tensor,
            **{("torch", f"{name}Storage"): np.dtype(code) for name, code in TORCH_TYPES.items()},
        }

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands in for a name."""
        if isinstance(module, str) and module.partition(".")[0] == "pandas":
            as_json = str(Path(self.name).with_suffix(".json"))
            self.refuse(
                "it is a pickle of pandas, which can run code. If you trust its source, convert it to JSON: "
                f"pandas.read_pickle({self.name!r}).to_json({as_json!r}, orient='records')"
            )
        if (module, name) not in self.allowed:
            self.refuse(
                f"it asks for {quote(f'{module}.{name}')[1:-1]}, and an annotation file consists of numbers, "
                "texts, lists and numpy arrays only. If you trust its source, ask them for JSON"
            )
        return self.allowed[module, name]

    def make_dtype(self, code: str, *_: Any) -> _DType:
        """Return a dtype of numbers or of text, without objects and fields."""
        if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?[biufcSU][1-9]\d{0,8}", code):
            raise pickle.UnpicklingError(f"it has a numpy dtype {quote(code)}; expected one of numbers or text")
        return _DType(code)

    def make_array(self, *_: Any) -> np.ndarray:
        """Return an array to be filled by `set_state`."""
        return np.zeros(0, np.int8)

    def set_state(self, value: Any, state: Any) -> None:
        """Give a dtype its byte order, or an array its shape, its dtype and its content."""
        if isinstance(value, _DType):
            _, order, *fields = state
            if order not in ("<", ">", "=", "|") or any(field is not None for field in fields[:3]):
                raise pickle.UnpicklingError("it has a numpy dtype with fields, or of no byte order")
            value.order = order
        elif isinstance(value, np.ndarray):
            shape, dtype, is_fortran, content = state[-4:]
            content = content.encode("latin-1") if isinstance(content, str) else content
            num_bytes = self._num_bytes_of(shape, dtype)
            if not isinstance(content, bytes) or len(content) != num_bytes:
                raise pickle.UnpicklingError(f"it has a numpy array of {quote(shape)} whose content is another")
            self.charge(num_bytes)
            value.__setstate__((1, shape, dtype.dtype, bool(is_fortran), content))
        else:
            super().set_state(value, state)

    def _num_bytes_of(self, shape: Any, dtype: Any) -> int:
        """Return the number of bytes of an array; refuse what is not a shape and a dtype."""
        is_shape = isinstance(shape, tuple) and all(type(side) is int and side >= 0 for side in shape)
        if not is_shape or len(shape) > 8 or not isinstance(dtype, _DType):
            raise pickle.UnpicklingError(f"it has a numpy array of {quote(shape)} and {quote(dtype)}")
        return math.prod(shape) * dtype.dtype.itemsize

    def make_array_of_buffer(self, buffer: Any, dtype: Any, shape: Any, order: str = "C", *_: Any) -> np.ndarray:
        """Return the array of a pickle of protocol 5."""
        if not isinstance(buffer, bytes | bytearray) or len(buffer) != self._num_bytes_of(shape, dtype):
            raise pickle.UnpicklingError(f"it has a numpy array of {quote(shape)} whose content is another")
        return np.frombuffer(buffer, dtype.dtype).reshape(shape, order=order)

    def make_number(self, dtype: Any, content: Any = None) -> Any:
        """Return a NumPy scalar as the Python number or text that it is."""
        content = content.encode("latin-1") if isinstance(content, str) else content
        if not isinstance(content, bytes) or len(content) != self._num_bytes_of((), dtype):
            raise pickle.UnpicklingError("it has a numpy scalar of objects")
        self.charge(len(content))
        return np.frombuffer(content, dtype.dtype)[0].item()

    def persistent_load(self, pid: Any) -> np.ndarray:
        """Return the storage of a tensor: ("storage", type, key, device, number of elements, ...)."""
        _, dtype, key, _, count, *_ = pid
        if not isinstance(dtype, np.dtype) or type(key) is not str or type(count) is not int:
            raise pickle.UnpicklingError(f"it has a tensor over {quote(pid)}")
        if key not in self.storages:
            self.charge(count * dtype.itemsize)
            self.storages[key] = np.zeros(count, dtype)
        return self.storages[key]

    def make_tensor(self, storage: np.ndarray, offset: int, shape: Any, stride: Any, *_: Any) -> np.ndarray:
        """Return a tensor of a file of `torch.save` as an array over its storage, which is filled later."""
        self._num_bytes_of(shape, _DType("u1"))
        count = math.prod(shape)
        array = storage[offset : offset + count].reshape(shape)
        steps = zip(shape, array.strides, stride, strict=True)
        if offset < 0 or any(size > 1 and step != number * array.itemsize for size, step, number in steps):
            raise pickle.UnpicklingError("it has a tensor that is not contiguous")
        return array


def read_pickle(path: str | Path) -> Any:
    """
    Read a pickle of Python 2 or 3, or a file of `torch.save`, without running its code.

    Args:
        path (`str` or `Path`): the file.

    Returns:
        Lists, tuples, dicts, sets, numbers, texts and NumPy arrays, as they were written; tensors as NumPy arrays.

    Raises:
        OSError: if there is no such file, or it is damaged.
        ValueError: if it asks for anything that is not data, or claims or unfolds to more than its size allows.
    """
    path = Path(path)
    if not path.is_file():
        raise OSError(f"There is no file {str(path)!r}.")
    content = path.read_bytes()
    try:
        value = _load_zip(content, str(path)) if zipfile.is_zipfile(io.BytesIO(content)) else _load(content, str(path))
    except Exception as error:  # a damaged pickle can raise anything
        if str(path) in explain(error, max_length=10_000):
            raise
        raise OSError(f"{str(path)!r} is damaged: {explain(error)}") from error
    refuse_unfolding(value, str(path), 10 * len(content) + 10_000)
    return value


def _load(content: bytes, name: str) -> Any:
    """Read a pickle or a file of torch.save before 1.6."""
    file = io.BytesIO(content)

    def read() -> tuple[Any, dict]:
        reader = DataUnpickler(file, name, len(content))
        return reader.load(), reader.storages

    value, _ = read()
    if value != 0x1950A86A20F9469CFC6C:
        return value
    # torch.save before 1.6: its magic number, version and system come first
    read()
    read()
    value, storages = read()
    # the storages' keys, then each storage with its number of elements before it
    keys, _ = read()
    for key in keys:
        storage = storages[key]
        storage[:] = np.frombuffer(file.read(8 + storage.nbytes)[8:], storage.dtype)
    return value


def _load_zip(content: bytes, name: str) -> Any:
    """Read a file of torch.save since 1.6."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        refuse_packed(archive, name, len(content))
        pickles = [entry for entry in archive.namelist() if entry.endswith("data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"it has {len(pickles)} entries data.pkl, and a file of torch.save has one")
        reader = DataUnpickler(io.BytesIO(archive.read(pickles[0])), name, len(content))
        value = reader.load()
        for key, storage in reader.storages.items():
            stored = archive.read(f"{pickles[0].removesuffix('data.pkl')}data/{key}")[: storage.nbytes]
            storage[:] = np.frombuffer(stored, storage.dtype)
        return value


def refuse_packed(archive: zipfile.ZipFile, name: str, num_bytes: int) -> None:
    """
    Refuse a zip file that unpacks to more than it has: torch.save writes its entries as they are.

    Args:
        archive (`ZipFile`): opened; nothing is unpacked.
        name (`str`): of the file, for the message.
        num_bytes (`int`): of the file.

    Raises:
        ValueError: if an entry is compressed, or all together are larger than the file.
    """
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(
                f"{name!r} is refused: its entry {quote(entry.filename)} is compressed, from {entry.compress_size} to "
                f"{entry.file_size} bytes, and torch.save compresses nothing."
            )
    claimed = sum(entry.file_size for entry in archive.infolist())
    if claimed > num_bytes:
        raise ValueError(f"{name!r} is refused: its entries claim {claimed} bytes, more than the {num_bytes} it has.")


def refuse_unfolding(value: Any, name: str, limit: int) -> None:
    """
    Refuse data whose lists are shared so often, contain themselves or are nested so deep that a traversal never ends.

    Args:
        value: lists, tuples, dicts and sets, and anything in them.
        name (`str`): of the file, for messages.
        limit (`int`): of entries, where a list counts wherever it stands.

    Raises:
        ValueError: saying which it is.
    """
    sizes, opened = {}, {}  # by id, of containers that are done, and of those that are being looked through

    def open_container(container: Any) -> tuple:
        entries = container.values() if isinstance(container, dict) else container
        total, inner = 1 + len(container), []
        for entry in entries:
            if isinstance(entry, CONTAINERS):
                inner.append(entry)
            elif isinstance(entry, str | bytes | bytearray):
                total += len(entry) // 16  # one of these is not walked entry by entry
            elif isinstance(entry, np.ndarray):
                total += entry.size
        opened[id(container)] = total
        return container, iter(inner)

    stack = [open_container([value])]
    while stack:
        container, inner = stack[-1]
        entry = next(inner, None)
        if entry is None:
            stack.pop()
            total = sizes[id(container)] = opened.pop(id(container))
            if total > limit:
                raise ValueError(
                    f"{name!r} is refused: lists in it are shared so often that it unfolds to more than {limit} "
                    "entries, and its size is that of far fewer."
                )
            if stack:
                opened[id(stack[-1][0])] += total
        elif id(entry) in opened:
            raise ValueError(f"{name!r} is refused: a list in it contains itself.")
        elif id(entry) in sizes:
            opened[id(container)] += sizes[id(entry)]
        elif len(stack) > MAX_DEPTH:
            raise ValueError(f"{name!r} is refused: its lists are nested deeper than {MAX_DEPTH}.")
        else:
            stack.append(open_container(entry))
