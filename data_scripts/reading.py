"""Reading what others have written, without running any of their code."""

import io
import json
import pickle
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image


# pictures over this are refused, as by the image processor
MAX_PIXELS = 50_000_000


def _numpy_scalar(dtype, data=None):
    """A numpy scalar of a pickle, as the Python number or text that it is."""
    if data is None or dtype.hasobject:
        raise pickle.UnpicklingError("a numpy scalar of objects")
    return np.frombuffer(data.encode("latin-1") if isinstance(data, str) else data, dtype=dtype)[0].item()


def _encode(text, encoding="latin-1", *_):
    """Python 2's bytes, as protocol 2 writes them."""
    if not isinstance(text, str) or str(encoding).lower() not in ("latin1", "latin-1", "utf-8", "utf8", "ascii"):
        raise pickle.UnpicklingError(f"an encoding {encoding!r}")
    return text.encode(encoding)


def _numpy_array(buffer, dtype, shape, order="C", *_):
    """A numpy array of a pickle of protocol 5."""
    if dtype.hasobject:
        raise pickle.UnpicklingError("a numpy array of objects")
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)


def _tensor(storage, offset, shape, stride, *_):
    """A tensor of a file of `torch.save`, as the numpy array that it is; storages are arrays that are filled later."""
    count = int(np.prod(shape, dtype=np.int64))
    array = storage[offset : offset + count].reshape(shape)
    steps = zip(shape, array.strides, stride, strict=True)
    if offset < 0 or any(size > 1 and step != number * array.itemsize for size, step, number in steps):
        raise pickle.UnpicklingError("a tensor that does not lie in one piece")
    return array


TORCH_TYPES = {
    "Double": "<f8", "Float": "<f4", "Half": "<f2", "Long": "<i8", "Int": "<i4", "Short": "<i2", "Char": "i1",
    "Byte": "u1", "Bool": "?",
}  # fmt: skip
NUMPY_RECONSTRUCT = np.ndarray.__reduce__(np.zeros(0))[0]
# (module, name) -> what stands in for it; nothing else is ever looked up
ALLOWED = {
    ("collections", "OrderedDict"): dict,
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): NUMPY_RECONSTRUCT for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _numpy_array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _numpy_scalar for core in ("core", "_core")},
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    **{("torch", f"{name}Storage"): np.dtype(code) for name, code in TORCH_TYPES.items()},
}


class RestrictedUnpickler(pickle.Unpickler):
    """
    Reads numbers, texts, lists, tuples, dicts, sets and numpy arrays, of Python 2 as well; refuses the rest. Tensors
    become numpy arrays over `storages`, key -> array, which lie beside the pickle and are to be filled after it.
    """

    def __init__(self, file, name: str, max_bytes: int = 0):
        super().__init__(file, encoding="latin-1")
        self.name = name
        self.max_bytes = max_bytes
        self.storages = {}

    def find_class(self, module, name):
        """What a pickle may name."""
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if module in ("builtins", "__builtin__") and name in ("set", "frozenset", "complex", "bytearray"):
            return {"set": set, "frozenset": frozenset, "complex": complex, "bytearray": bytearray}[name]
        raise ValueError(
            f"{self.name!r} is refused: it asks for {module}.{name}, and an annotation file needs nothing but "
            "numbers, texts, lists and numpy arrays. If you trust its source, ask them for JSON."
        )

    def persistent_load(self, pid):
        """The storage of a tensor: ("storage", type, key, device, number of elements, ...)."""
        _, dtype, key, _, count, *_ = pid
        if key not in self.storages:
            if not 0 <= count * dtype.itemsize <= self.max_bytes:
                raise ValueError(f"{self.name!r} is refused: it has a tensor of {count} elements, more than it holds.")
            self.storages[key] = np.zeros(count, dtype)
        return self.storages[key]


def read_pickle(path: str | Path):
    """
    A pickle of Python 2 or 3, or a file of `torch.save`, read by a restricted reader.

    Args:
        path (`str` or `Path`): the file.

    Returns:
        Lists, tuples, dicts, sets, numbers, texts and numpy arrays, as they were written; tensors as numpy arrays.

    Raises:
        OSError: if there is no such file, or it is damaged.
        ValueError: if it asks for anything that is not data.
    """
    path = Path(path)
    if not path.is_file():
        raise OSError(f"There is no file {str(path)!r}.")
    content = path.read_bytes()
    try:
        if zipfile.is_zipfile(io.BytesIO(content)):  # torch.save since 1.6
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
                reader = RestrictedUnpickler(archive.open(name), str(path), len(content))
                value = reader.load()
                for key, storage in reader.storages.items():
                    stored = archive.open(f"{name.removesuffix('data.pkl')}data/{key}").read(storage.nbytes)
                    storage[:] = np.frombuffer(stored, storage.dtype)
                return value
        file = io.BytesIO(content)
        value = RestrictedUnpickler(file, str(path)).load()
        if value == 0x1950A86A20F9469CFC6C:  # torch.save before 1.6: its magic number, version and system come first
            for _ in range(2):
                RestrictedUnpickler(file, str(path)).load()
            reader = RestrictedUnpickler(file, str(path), len(content))
            value = reader.load()
            # the storages' keys, then each storage with its number of elements before it
            for key in RestrictedUnpickler(file, str(path)).load():
                storage = reader.storages[key]
                storage[:] = np.frombuffer(file.read(8 + storage.nbytes)[8:], storage.dtype)
        return value
    except (OSError, ValueError) as error:
        if str(path) in str(error):
            raise
        raise OSError(f"{str(path)!r} is damaged: {error}") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise OSError(f"{str(path)!r} is damaged: {type(error).__name__}: {error}") from error


def read_json(path: str | Path):
    """
    A JSON file in UTF-8.

    Raises:
        OSError: if there is no such file, or it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise OSError(f"There is no file {str(path)!r}.")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise OSError(f"{str(path)!r} is damaged: {error}") from error


def is_inside(name: str) -> bool:
    """
    Whether a relative path stays in its folder, on every system.

    Example:

    ```python
    >>> from data_scripts.reading import is_inside

    >>> is_inside("pictures/1.jpg"), is_inside("../1.jpg"), is_inside("/1.jpg"), is_inside("http://host/1.jpg")
    (True, False, False, False)

    ```"""
    path = PurePosixPath(name.replace("\\", "/"))
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts and ":" not in path.parts[0]


def has_words(text) -> bool:
    """Whether it is text of more than spaces."""
    return isinstance(text, str) and bool(text.strip())


def is_number(value) -> bool:
    """Whether it is a number that has a place in a picture: finite, and not astronomical."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def picture_size(path: str | Path) -> tuple[int, int]:
    """
    (width, height) of a picture file as stored, from its header: nothing is decoded.

    Raises:
        OSError: if the file is missing or has no picture's header.
        ValueError: if it claims more than `MAX_PIXELS` pixels.
    """
    return _read_header(path)[0]


def _read_header(path: str | Path, with_orientation: bool = False) -> tuple[tuple[int, int], int]:
    """The stored (width, height) of a picture file, and its EXIF orientation where that is asked for, else 1."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            small = width * height <= MAX_PIXELS
            # Pillow itself turns a TIFF, and says so in its size
            is_asked = with_orientation and small and image.format != "TIFF"
            orientation = image.getexif().get(0x0112, 1) if is_asked else 1
    except FileNotFoundError as error:
        raise OSError(f"There is no picture at {str(path)!r}.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{str(path)!r} has more than {MAX_PIXELS:,} pixels.") from error
    except Exception as error:
        raise OSError(f"{str(path)!r} cannot be read as a picture: {error}") from error
    if not small:
        raise ValueError(f"{str(path)!r} has {width} x {height} pixels, more than {MAX_PIXELS:,}.")
    return (width, height), orientation


def upright_size(path: str | Path, annotated_size: tuple[int, int] | None = None) -> tuple[int, int]:
    """
    (width, height) of a picture file once it is turned as its EXIF orientation says, unless only the stored size
    agrees with the annotated (width, height): the rule of the image processor.

    Raises:
        OSError, ValueError: see `picture_size`.
    """
    stored, orientation = _read_header(path, with_orientation=True)
    turned = stored[::-1] if orientation in (5, 6, 7, 8) else stored
    if annotated_size is not None and stored == tuple(annotated_size) != turned:
        return stored
    return turned


def check_decodes(path: str | Path):
    """
    Decode every pixel of a picture file.

    Raises:
        OSError: if the file is missing, cut or damaged.
        ValueError: if it claims more than `MAX_PIXELS` pixels.
    """
    picture_size(path)
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:
        raise OSError(f"{str(path)!r} is damaged: {error}") from error
