"""Read files of unknown origin without running code that they contain."""

import contextlib
import io
import json
import re
import struct
import unicodedata
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, Never

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from .quoting import explain, quote


# images over this are refused, as by the image processor
MAX_PIXELS = 50_000_000
# texts over this are refused, as by the processor, and those with a NUL or half of a surrogate pair
MAX_CHARACTERS = 100_000
REFUSED = re.compile("[\0\ud800-\udfff]")
# those that images are decoded from, as by the image processor, which gives the reasons
IMAGE_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
# what an image of an EXIF orientation was turned by before it was stored
UNDONE_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
MAX_ENTRY_BYTES = 64 << 20  # of one entry of a list in a JSON file; more is a damaged file
MAX_NAME = 1000  # characters of the path of a file that an annotation file names
AS_STORED = ".as_stored"  # at the end of the name of an image whose orientation is not followed


def load_json(path: str | Path) -> Any:
    """
    Read a JSON file in UTF-8.

    Raises:
        OSError: if the file does not exist or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise OSError(f"There is no file {str(path)!r}.")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise OSError(f"{str(path)!r} is damaged: {explain(error)}") from error


def scan_list(path: str | Path, chunk_bytes: int = 1 << 20) -> Iterator[tuple[int, int, dict]]:
    """
    Yield the objects of a JSON file that is one list, without reading the complete file.

    Args:
        path (`str` or `Path`): the file, `[{...}, {...}, ...]`.
        chunk_bytes (`int`): how much is read at a time.

    Yields:
        (first byte, number of bytes, object); its texts are in latin-1, read the bytes for the true ones.

    Raises:
        OSError: if the file is damaged or is not a list of objects, saying where.
    """
    decoder = json.JSONDecoder()
    with open(path, "rb") as file:
        # a character a byte, so that positions in the text are positions in the file
        text, base, position, expected = "", 0, 0, "["

        def damaged(reason: str) -> OSError:
            return OSError(f"{str(path)!r} is damaged at byte {base + position}: {reason}.")

        while True:
            if base == position == 0 and text.startswith("\xef\xbb\xbf"):  # a byte order mark
                position = 3
            while position < len(text) and text[position] in " \t\r\n":
                position += 1
            if position == len(text):
                chunk = file.read(chunk_bytes)
                if not chunk:
                    raise damaged("it ends before its list does")
                base, text, position = base + position, chunk.decode("latin-1"), 0
            elif text[position] not in expected:
                raise damaged(f"{' or '.join(expected)} was expected")
            elif text[position] == "]":
                return
            elif text[position] == "{":
                try:
                    value, end = decoder.raw_decode(text, position)
                except RecursionError as error:
                    raise damaged(explain(error)) from error
                except ValueError as error:  # an object that goes on in the next chunk
                    chunk = file.read(max(chunk_bytes, len(text) - position))
                    if not chunk or len(text) - position > MAX_ENTRY_BYTES:
                        raise damaged(explain(error)) from error
                    base, text, position = base + position, text[position:] + chunk.decode("latin-1"), 0
                    continue
                yield base + position, end - position, value
                position, expected = end, ",]"
            else:
                expected = "{]" if text[position] == "[" else "{"
                position += 1


def read_entries(path: Path) -> Iterator[tuple[str, int, bytes]]:
    """
    Yield (position, offset in bytes, JSON) of each line of a file that is not blank, or of each entry of a file that
    is one array.

    Raises:
        OSError: if an array is damaged, or has an entry that is not an object.
    """
    with open(path, "rb") as file:
        is_array = file.read(1000).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        file.seek(0)
        if is_array:
            for number, (offset, length, _) in enumerate(scan_list(path), start=1):
                file.seek(offset)
                yield f"{path}, entry {number}", offset, file.read(length)
            return
        offset = 0
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}, line {number}", offset, line
            offset += len(line)


def refuse_constant(name: str) -> Never:
    """Refuse NaN and infinity, which Python's reader accepts and JSON does not have."""
    raise ValueError(f"{name} is not a number")


def parse_line(content: bytes) -> dict:
    """
    Parse a line as JSON.

    Raises:
        ValueError: where it is not an object.
    """
    try:
        line = json.loads(content.decode("utf-8-sig"), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {explain(error)}.") from error
    if not isinstance(line, dict):
        raise ValueError(f'the line is {quote(line)}; expected {{"name": value, ...}}, an object.')
    return line


def parse_xml(path: str | Path) -> ElementTree.Element:
    """
    Read an XML file in UTF-8 and return its root.

    Raises:
        OSError: if the file does not exist.
        ValueError: if it is not XML, or has a document type, which can make a small file a huge one.
    """
    text = Path(path).read_bytes().decode("utf-8-sig")
    if "<!DOCTYPE" in text:
        raise ValueError("it has a document type, which an annotation never has")
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(explain(error)) from error


def is_file_name(name: Any) -> bool:
    """Return whether it is the path of a file that `is_inside` its folder, and that a system can have."""
    return isinstance(name, str) and len(name) <= MAX_NAME and not REFUSED.search(name) and is_inside(name)


def is_inside(name: str) -> bool:
    """
    Return whether a relative path stays in its folder, on every system.

    Example:

    ```python
    >>> from data_scripts.reading import is_inside

    >>> is_inside("pictures/1.jpg"), is_inside("../1.jpg"), is_inside("/1.jpg"), is_inside("http://host/1.jpg")
    (True, False, False, False)

    ```"""
    path = PurePosixPath(name.replace("\\", "/"))
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts and ":" not in path.parts[0]


def coco_number(name: str) -> int | None:
    """
    Return the COCO id in the name of an image file of COCO 2014; None if it has none.

    Example:

    ```python
    >>> from data_scripts.reading import coco_number

    >>> coco_number("coco/train2014/COCO_train2014_000000581857.jpg"), coco_number("1.jpg")
    (581857, None)

    ```"""
    found = re.match(r"COCO_(?:train|val)2014_(\d{12})", re.split(r"[/\\]", name)[-1])
    return int(found[1]) if found else None


def coco_id(image_id: str, path: str | None = None, *, picture: str | None = None) -> int | None:
    """
    Return the COCO id of a row's image, which identifies it across datasets; None if the row does not tell one.

    Args:
        image_id (`str`): the row's, "coco_<id>" or any other with "_coco_<id>" at its end.
        path (`str`, *optional*): path of its image, used if image_id has no COCO id: COCO_train2014_<id>.jpg.
        picture (`str`, *optional*): deprecated name of `path`.

    Example:

    ```python
    >>> from data_scripts import coco_id

    >>> coco_id("vg_2405722_coco_581857"), coco_id("coco_581857"), coco_id("vg_1")
    (581857, 581857, None)
    >>> coco_id("17", "train2014/COCO_train2014_000000000042.jpg")
    42

    ```"""
    if picture is not None:
        warnings.warn("`picture` is deprecated, use `path`.", FutureWarning, stacklevel=2)
        path = picture
    match = re.search(r"(?:^|_)coco_(\d{1,18})$", image_id)
    return int(match[1]) if match else coco_number(path or "")


def check_text(text: object, name: str) -> str:
    """
    Return a text as it is, if it can be encoded, written to a file and read again, and tokenized in a second. The
    processor has the same rule.

    Args:
        text (`str`): the text.
        name (`str`): the name of the value, as the beginning of the message.

    Raises:
        ValueError: if it is not a `str`, has more than `MAX_CHARACTERS` characters, a NUL, or half of a surrogate
            pair, as JSON and pickles can spell one, and as stands in the name of a file for a byte that is not UTF-8.

    Example:

    ```python
    >>> from data_scripts.reading import check_text

    >>> check_text("the \\ud83d cup", "text")
    Traceback (most recent call last):
    ValueError: text has '\\ud83d' at character 4, half of a surrogate pair, in 'the \\ud83d cup'

    ```"""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a str, got {type(text).__name__}")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"{name} has {len(text):,} characters, more than {MAX_CHARACTERS:,}; it begins with {text[:40]!r}"
        )
    if found := REFUSED.search(text):
        what = "NUL" if found[0] == "\0" else "half of a surrogate pair"
        excerpt = text[max(0, found.start() - 40) : found.end() + 40]
        raise ValueError(f"{name} has {found[0]!r} at character {found.start()}, {what}, in {excerpt!r}")
    return text


def check_spans(spans: list[tuple[int, int]], name: str) -> None:
    """
    Check that the phrases of a text, as (start, end), are together not longer than the processor accepts: they may
    overlap, and each is tokenized.

    Raises:
        ValueError: if they have more than `MAX_CHARACTERS` characters.
    """
    length = sum(end - start for start, end in spans)
    if length > MAX_CHARACTERS:
        raise ValueError(f"{name} have {length:,} characters together, more than {MAX_CHARACTERS:,}")


def check_texts(value: Any, name: str) -> None:
    """
    Check all texts of a value as JSON has it, at any depth: see `check_text`. Names are given as `name.field[index]`.

    Raises:
        ValueError: naming the first that is refused.

    Example:

    ```python
    >>> from data_scripts.reading import check_texts

    >>> check_texts({"sentences": [{"sent": "a\\0"}]}, "ref")
    Traceback (most recent call last):
    ValueError: ref.sentences[0].sent has '\\x00' at character 1, NUL, in 'a\\x00'

    ```"""
    waiting = [(name, value)]
    while waiting:
        where, part = waiting.pop()
        if isinstance(part, str):
            check_text(part, where)
            continue
        if isinstance(part, dict):
            for key in part:
                if isinstance(key, str):
                    check_text(key, f"a name in {where}")
            named = ((f".{str(key)[:40]}", entry) for key, entry in part.items())
        elif isinstance(part, list | tuple):
            named = ((f"[{index}]", entry) for index, entry in enumerate(part))
        else:
            continue
        # numbers get no name, because a polygon or a mask has thousands
        found = [(f"{where}{name}", entry) for name, entry in named if isinstance(entry, str | dict | list | tuple)]
        waiting += reversed(found)


def has_words(text: object) -> bool:
    """
    Return whether it is text of more than spaces and invisible characters. The processor has the same rule.

    Example:

    ```python
    >>> from data_scripts.reading import has_words

    >>> has_words("?"), has_words(" \\u200b"), has_words(None)
    (True, False, False)

    ```"""
    return isinstance(text, str) and not all(
        character.isspace() or character == "\ufffd" or unicodedata.category(character).startswith("C")
        for character in text
    )


def read_text(path: str | Path) -> str:
    """
    Read a text file in UTF-8, with or without a byte order mark.

    Raises:
        OSError: if the file does not exist.
        ValueError: if it is not UTF-8, or has what `check_text` refuses, naming the line.
    """
    content = Path(path).read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{str(path)!r}, line {number} is not UTF-8: {error.reason} at byte {error.start}."
        ) from error
    for number, line in enumerate(text.split("\n"), start=1):
        check_text(line, f"{str(path)!r}, line {number}")
    return text


def is_number(value: Any) -> bool:
    """Return whether a value can be a coordinate: a finite number that is not astronomical."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def is_four_numbers(value: Any) -> bool:
    """Return whether a value is a list of four coordinates."""
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def open_file(source: str | Path | BinaryIO) -> Image.Image:
    """
    Open an image file of one of `IMAGE_FORMATS`, by its content and not by its name. Nothing is decoded yet.

    Args:
        source (`str`, `Path` or binary file): the file.

    Raises:
        OSError: if it is missing, or in another format, which is named where its first bytes tell it.
    """
    try:
        return Image.open(source, formats=tuple(name for name in IMAGE_FORMATS if name != "MPO"))
    except (UnidentifiedImageError, KeyError):  # a KeyError is of a decoder that this Pillow does not have
        pass
    if isinstance(source, (str, Path)):
        with open(source, "rb") as file:
            prefix = file.read(16)
    else:
        source.seek(0)
        prefix = source.read(16)
    found = name_format(prefix)
    if found in IMAGE_FORMATS:
        raise OSError(f"it begins as {found}, but is damaged, or this Pillow was built without {found}")
    raise OSError(
        f"its content looks like {'no known format' if found is None else found}, and the accepted formats are "
        f"{', '.join(IMAGE_FORMATS[:-1])} and {IMAGE_FORMATS[-1]}: convert it to one of them"
    )


def name_format(prefix: bytes) -> str | None:
    """
    Return Pillow's name of the format that a file is in, None where its first 16 bytes do not tell.

    Example:

    ```python
    >>> from data_scripts.reading import name_format

    >>> name_format(b"%!PS-Adobe-3.0 E")
    'EPS'

    ```"""
    if prefix[4:12] in (b"ftypheic", b"ftypheix"):
        return "HEIC"  # of many phones; Pillow itself does not know it
    Image.init()
    for name, (_, accepts) in Image.OPEN.items():
        try:
            if accepts is not None and accepts(prefix):
                return name
        except (struct.error, IndexError):
            continue  # fewer bytes than it compares
    return None


def read_image_size(path: str | Path) -> tuple[int, int]:
    """
    Read the stored (width, height) of an image file from its header, without decoding it.

    Raises:
        OSError: if the file is missing or has no header of an image.
        ValueError: if it claims more than `MAX_PIXELS` pixels.
    """
    return _read_header(path)[0]


class Frame(NamedTuple):
    """
    The frame that an image is annotated in.

    Args:
        width, height (`int`): of the image in that frame.
        is_stored (`bool`): whether its EXIF orientation is not followed, though it would turn the image.
    """

    width: int
    height: int
    is_stored: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.width, self.height


def keeps_stored_frame(orientation: int, stored_size: tuple[int, int], annotated_size: tuple[int, int] | None) -> bool:
    """
    Return whether an image stays as it is stored: only its stored size agrees with the annotated one. Anything else
    follows the EXIF orientation, square images and orientations 2 to 4 included. The image processor has the same
    rule.

    Args:
        orientation (`int`): of EXIF, 1 to 8; from 5 on, width and height are exchanged.
        stored_size, annotated_size (`(width, height)`): `annotated_size` is None where it is unknown.

    Example:

    ```python
    >>> from data_scripts.reading import keeps_stored_frame

    >>> keeps_stored_frame(6, (40, 30), (40, 30)), keeps_stored_frame(6, (40, 30), (30, 40))
    (True, False)

    ```"""
    stored_size = tuple(stored_size)
    turned_size = stored_size[::-1] if orientation >= 5 else stored_size
    return annotated_size is not None and stored_size == tuple(annotated_size) != turned_size


def _orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, 1 to 8; 1 if it has none or an invalid one."""
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation if orientation in UNDONE_TURNS else 1


def _read_header(path: str | Path, with_orientation: bool = False) -> tuple[tuple[int, int], int]:
    """Read the stored (width, height) of an image file, and its EXIF orientation if requested, else 1."""
    try:
        with open_file(path) as image:
            size = image.size
            is_small = size[0] * size[1] <= MAX_PIXELS
            if image.format == "TIFF" and image.tag_v2.get(ExifTags.Base.Orientation) in (5, 6, 7, 8):
                size = size[::-1]  # Pillow itself turns a TIFF, and says so in its size
            orientation = _orientation_of(image) if with_orientation and is_small else 1
    except FileNotFoundError as error:
        raise OSError(f"There is no image at {str(path)!r}.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{str(path)!r} has more than {MAX_PIXELS:,} pixels.") from error
    except Exception as error:
        raise OSError(f"{str(path)!r} cannot be read as an image: {explain(error)}") from error
    if not is_small:
        raise ValueError(f"{str(path)!r} has {size[0]} x {size[1]} pixels, more than {MAX_PIXELS:,}.")
    return size, orientation


def read_frame(path: str | Path, annotated_size: tuple[int, int] | None = None) -> Frame:
    """
    Return the frame that an image file is annotated in, from its header: it is turned as its EXIF orientation says,
    unless `keeps_stored_frame`.

    Args:
        path (`str` or `Path`): the file.
        annotated_size (`(width, height)`, *optional*): the size that the image was annotated at.

    Raises:
        OSError, ValueError: see `read_image_size`.
    """
    stored_size, orientation = _read_header(path, with_orientation=True)
    if keeps_stored_frame(orientation, stored_size, annotated_size):
        return Frame(*stored_size, is_stored=True)
    return Frame(*(stored_size[::-1] if orientation >= 5 else stored_size))


def image_of(path: str | Path, frame: Frame) -> str | dict:
    """
    Return what a row stores of an image file, so that every reader shows the frame that it is annotated in:
    its path; or, where its orientation is not followed, its content without the orientation, since the datasets
    library turns an image as EXIF says.

    Args:
        path (`str` or `Path`): the file.
        frame ([`Frame`]): what `read_frame` gives for it.

    Returns:
        `str`, or `dict` of `bytes` and `path`, a name that is not that of a file (`is_as_stored`).

    Raises:
        OSError: if the file is missing or damaged.
        ValueError: if its path cannot be written to a dataset, see `check_text`.
    """
    check_text(str(path), "The path of an image")
    if not frame.is_stored:
        return str(path)
    path = Path(path)
    try:
        content, ending = drop_orientation(path.read_bytes())
    except FileNotFoundError as error:
        raise OSError(f"There is no image at {str(path)!r}.") from error
    except Exception as error:
        raise OSError(f"{str(path)!r} is damaged: {explain(error)}") from error
    return {"bytes": content, "path": f"{path.stem}{AS_STORED}.{ending}"}


class NamedBytes(io.BytesIO):
    """The content of an image that is stored in a row, with its name."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.name = name

    def __str__(self) -> str:
        return self.name


def frame_content(
    content: bytes, name: str | None, annotated_size: tuple[int, int] | None = None
) -> tuple[Frame, dict]:
    """
    Return the frame that the content of an image file is annotated in, and what a row stores of it, as `read_frame`
    and `image_of` do for a file.

    Args:
        content (`bytes`): of the file.
        name (`str`, *optional*): of the file.
        annotated_size (`(width, height)`, *optional*): the size that the image was annotated at.

    Raises:
        OSError, ValueError: see `read_image_size`.
    """
    frame = read_frame(NamedBytes(content, name or "the image"), annotated_size)
    if frame.is_stored:
        content, ending = drop_orientation(content)
        name = f"{PurePosixPath(name or 'image').stem}{AS_STORED}.{ending}"
    return frame, {"bytes": content, "path": name}


def is_as_stored(image: dict) -> bool:
    """Return whether an image of a row that is not decoded is the content of a file without its orientation."""
    return image["bytes"] is not None and PurePosixPath(image["path"] or "").stem.endswith(AS_STORED)


def drop_orientation(content: bytes) -> tuple[bytes, str]:
    """
    Return the content of an image file without its orientation, and the ending of its new name. Pixels stay as they
    are stored: a JPEG loses its metadata, anything else is written again as PNG or TIFF without loss.
    """
    if content.startswith(b"\xff\xd8"):
        stripped = drop_jpeg_metadata(content)
        with open_file(io.BytesIO(stripped)) as image:
            if _orientation_of(image) == 1:
                return stripped, "jpg"
    with open_file(io.BytesIO(content)) as image:
        orientation = _orientation_of(image) if image.format == "TIFF" else 1
        image.load()
        stored = image.transpose(UNDONE_TURNS[orientation]) if orientation != 1 else image.copy()
    stored.info = {name: value for name, value in stored.info.items() if name in ("transparency", "icc_profile")}
    ending = "png" if stored.mode in ("1", "L", "LA", "P", "RGB", "RGBA") else "tiff"
    file = io.BytesIO()
    stored.save(file, ending)
    return file.getvalue(), ending


def drop_jpeg_metadata(content: bytes) -> bytes:
    """
    Return a JPEG without its APP1 segments, where EXIF and XMP stand, before the first scan.

    Raises:
        ValueError: if it ends before that.
    """
    kept, position = [content[:2]], 2
    while True:
        # a marker may have fill bytes before it, and all but the first scan's have their length behind them
        while content[position : position + 2] == b"\xff\xff":
            position += 1
        marker = content[position : position + 2]
        if len(marker) < 2 or marker[0] != 0xFF:
            raise ValueError("it is a JPEG without an image")
        if marker == b"\xff\xda":
            return b"".join([*kept, content[position:]])
        end = position + 2 + int.from_bytes(content[position + 2 : position + 4], "big")
        if marker != b"\xff\xe1":
            kept.append(content[position:end])
        position = end


@contextlib.contextmanager
def decoded(path: str | Path) -> Iterator[Image.Image]:
    """
    Yield an image file with every pixel decoded. Errors of the block count as damage of the file.

    Raises:
        OSError: if the file is missing, cut or damaged.
        ValueError: if it claims more than `MAX_PIXELS` pixels.
    """
    read_image_size(path)
    try:
        with open_file(path) as image:
            image.load()
            yield image
    except Exception as error:
        raise OSError(f"{str(path)!r} is damaged: {explain(error)}") from error


def check_decodes(path: str | Path) -> None:
    """
    Decode every pixel of an image file.

    Raises:
        OSError: if the file is missing, cut or damaged.
        ValueError: if it claims more than `MAX_PIXELS` pixels.
    """
    with decoded(path):
        pass


def load_image_file(path: str | Path) -> Image.Image:
    """
    Decode an image file, turned as its EXIF orientation says.

    Raises:
        OSError: if the file is missing, cut or damaged.
        ValueError: if it claims more than `MAX_PIXELS` pixels.
    """
    with decoded(path) as image:
        return ImageOps.exif_transpose(image)
