"""Write text of any script with the fonts that are installed, and never as the box of a missing glyph."""

import functools
import importlib.util
import os
import sys
import unicodedata
from pathlib import Path

from PIL import ImageDraw, ImageFont, features
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Packages with font files, in order of preference; `pip install "modeling-reftr[fonts]"` installs those of Noto.
FONT_PACKAGES = (
    "fontpkg_noto_sans",
    "fontpkg_noto_sans_arabic",
    "fontpkg_noto_sans_devanagari",
    "fontpkg_noto_sans_tamil",
    "fontpkg_noto_sans_telugu",
    "fontpkg_noto_sans_thai",
    "fontpkg_noto_sans_khmer",
    "manimgx_fonts_cjk",
    "matplotlib",
)
FONT_FOLDERS = {
    "darwin": ("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"),
    "win32": (r"%WINDIR%\Fonts", r"%LOCALAPPDATA%\Microsoft\Windows\Fonts"),
}.get(sys.platform, ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts"))
# Words in names of font files that make text less readable, or draw every character as a box.
STYLES = ("bold", "italic", "oblique", "thin", "light", "black", "condensed", "mono", "serif", "emoji", "lastresort")
MAX_FONTS = 128  # opened in search of a character
MAX_FILES = 5000  # looked at in search of fonts
TEST_SIZE = 16  # pixels, to compare glyphs
REGULAR = 450  # weight of variable fonts, whose default may be thin
JOINERS = "\u200c\u200d"  # part of words in Arabic and Indic scripts
VARIANTS = "".join(map(chr, range(0xFE00, 0xFE10)))  # select between variants of the glyph before them


class Pen:
    """
    Write text of one size.

    A text is written in the first font that has all of its characters, among Pillow's own, the packages in
    `FONT_PACKAGES` and the fonts of the system; otherwise every part of it in the first font that has the part. A
    character that no font has is written without its accents, or as its code point, such as U+4EBA; so are control
    characters and those that change the direction of writing. With the same fonts the result is always the same.

    Args:
        size (`int`): the size of the font in pixels.

    Example:

    ```python
    >>> from PIL import Image, ImageDraw
    >>> from modeling_reftr.fonts_reftr import Pen

    >>> pen, canvas = Pen(20), Image.new("RGB", (200, 40), "white")
    >>> pen.write(ImageDraw.Draw(canvas), (4, 4), "the red cup", "black")
    >>> canvas.getcolors(1) is None and pen.measure("the red cup") < 200
    True
    >>> pen.wrap("the red cup", pen.measure("the red")), len(pen.wrap("a long word " * 1000, 200, max_lines=9))
    (['the red', 'cup'], 9)

    ```"""

    def __init__(self, size: int) -> None:
        self.size = size
        self.line_height = round(size * 1.4)

    def measure(self, text: str) -> float:
        """Return the width of a text in pixels."""
        return sum(load_font(path, self.size).getlength(part) for part, path in split_by_font(spell(text)))

    def write(self, draw: ImageDraw.ImageDraw, xy: tuple[float, float], text: str, color: str) -> None:
        """Write a line of text whose box begins at the upper left corner `xy`."""
        x, baseline = xy[0], xy[1] + round(self.size * 1.05)
        for part, path in split_by_font(spell(text)):
            font = load_font(path, self.size)
            draw.text((x, baseline), part, fill=color, font=font, anchor="ls")
            x += font.getlength(part)

    def wrap(self, text: str, width: float, max_lines: int | None = None) -> list[str]:
        """
        Break a text into lines of at most `width` pixels, between words where possible.

        Args:
            text (`str`): the text.
            width (`float`): the maximum width of a line in pixels; a line has at least one character.
            max_lines (`int`, *optional*): the maximum number of lines; the last one ends in "..." if there are more.
        """
        lines, line = [], ""
        for word in spell(text).split():
            if line and self.measure(f"{line} {word}") <= width:
                line = f"{line} {word}"
                continue
            lines += [line] if line else []
            while len(word) > 1 and self.measure(word) > width:
                end = self._count_fitting(word, width)
                lines.append(word[:end])
                word = word[end:]
            line = word
            if max_lines is not None and len(lines) > max_lines:
                break
        lines += [line] if line else []
        if max_lines is not None and len(lines) > max_lines:
            last = lines[max_lines - 1]
            while last and self.measure(f"{last}...") > width:
                last = last[:-1]
            lines = [*lines[: max_lines - 1], f"{last.rstrip()}..."]
        return lines

    def _count_fitting(self, word: str, width: float) -> int:
        """Return how many characters of a word fit into a width, at least one."""
        low, high = 1, min(len(word) - 1, int(4 * width / self.size) + 1)  # few letters are narrower than that
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.measure(word[:middle]) <= width else (low, middle - 1)
        return low


@functools.lru_cache(maxsize=4096)
def spell(text: str) -> str:
    """Replace the characters of a text that no font has, and those that are not to be drawn."""
    if text.isascii() and text.isprintable():
        return " ".join(text.split())
    spelled = ""
    for character in unicodedata.normalize("NFC", text):
        if character.isspace():
            spelled += " "
        elif character in VARIANTS or character in JOINERS:
            spelled += character if character in JOINERS and features.check("raqm") else ""
        elif not is_control(character) and find_font(character) is not None:
            spelled += character
        else:
            base = unicodedata.normalize("NFD", character)[0]
            if base != character and find_font(base) is not None:
                spelled += base
            else:
                spelled += f" U+{ord(character):04X} "
                if not is_control(character):
                    logger.warning_once(
                        "No installed font has some characters of a text, which are drawn as code points such as "
                        'U+4EBA: install the fonts of Noto, for example by pip install "modeling-reftr[fonts]".'
                    )
    return " ".join(spelled.split())


def is_control(character: str) -> bool:
    """Return whether a character is not drawn, or changes how others are drawn: control, format, unassigned."""
    return unicodedata.category(character).startswith("C")


@functools.lru_cache(maxsize=4096)
def split_by_font(text: str) -> tuple[tuple[str, str], ...]:
    """
    Split a text returned by `spell` into parts of one font, from left to right.

    Returns:
        `tuple`: the text and the font of each part, see `load_font`.
    """
    path = find_font(text)
    if path is not None:
        return ((text, path),) if text else ()
    parts, path = [], ""
    for cluster in split_clusters(text):
        # Stay in one font as far as possible: letters are joined only within a part.
        if not parts or not has_characters(path, cluster):
            path = find_font(cluster)
            # A mark that no font has together with its letter is drawn without it.
            path = find_font(cluster[0]) if path is None else path
            parts.append(("", path or ""))
        parts[-1] = (parts[-1][0] + cluster, path or "")
    strong = next((kind for kind in map(unicodedata.bidirectional, text) if kind in ("L", "R", "AL")), "L")
    return tuple(parts if strong == "L" else parts[::-1])


def split_clusters(text: str) -> list[str]:
    """Split a text into characters with the marks and joiners that follow them."""
    clusters = []
    for character in text:
        if clusters and (unicodedata.category(character).startswith("M") or character in JOINERS):
            clusters[-1] += character
        else:
            clusters.append(character)
    return clusters


def find_font(text: str) -> str | None:
    """Return the first font that has all characters of a text, see `load_font`; None if there is none."""
    return _find_font("".join(sorted(set(text) - {" ", *JOINERS})))


@functools.lru_cache(maxsize=16384)
def _find_font(characters: str) -> str | None:
    """Return the first font that has these sorted characters."""
    if has_characters("", characters):
        return ""
    # Look into fonts named after the script first: "NotoSansDevanagari-Regular.ttf" for DEVANAGARI LETTER KA.
    letters = [character for character in characters if character > "\x7f" and character.isalpha()]
    scripts = {unicodedata.name(character, "-").split()[0].lower() for character in letters}
    paths = sorted(find_fonts(), key=lambda path: not any(script in Path(path).name.lower() for script in scripts))
    return next((path for path in paths if has_characters(path, characters)), None)


def has_characters(path: str, text: str) -> bool:
    """Return whether a font has a glyph for every character of a text, except spaces and joiners."""
    return all(_has_glyph(path, character) for character in text if character != " " and character not in JOINERS)


@functools.lru_cache(maxsize=65536)
def _has_glyph(path: str, character: str) -> bool:
    """Compare a glyph with that of a character that no font has."""
    try:
        glyph, missing = (_draw_glyph(path, drawn) for drawn in (character, "\uffff"))
    except (OSError, ValueError):  # damaged, or a bitmap font of other sizes
        return False
    return glyph != missing


def _draw_glyph(path: str, character: str) -> tuple[tuple[int, int], bytes]:
    """Return the size and the pixels of a glyph."""
    core = load_font(path, TEST_SIZE, ImageFont.Layout.BASIC).getmask(character)
    return core.size, bytes(core)


@functools.lru_cache(maxsize=4 * MAX_FONTS)
def load_font(path: str, size: int, layout: ImageFont.Layout | None = None) -> ImageFont.FreeTypeFont:
    """
    Load a font.

    Args:
        path (`str`): the font file; empty for Pillow's own font, which has ASCII and little else.
        size (`int`): its size in pixels.
        layout (`ImageFont.Layout`, *optional*):
            The layout engine, by default the one that joins letters and orders them from right to left, if available.

    Raises:
        OSError: if the file is damaged or does not have this size.
    """
    if not path:
        font = ImageFont.load_default(size)
        return font if layout is None else font.font_variant(layout_engine=layout)
    font = ImageFont.truetype(path, size, layout_engine=layout)
    try:
        axes = font.get_variation_axes()
    except (OSError, NotImplementedError):  # not a variable font
        return font
    values = [axis["default"] for axis in axes]
    for index, axis in enumerate(axes):
        if axis["name"] in (b"Weight", "Weight"):
            values[index] = min(max(REGULAR, axis["minimum"]), axis["maximum"])
    font.set_variation_by_axes(values)
    return font


@functools.lru_cache(maxsize=1)
def find_fonts() -> tuple[str, ...]:
    """Return at most `MAX_FONTS` font files: those of packages, then those of the system, regular styles first."""
    found, folders = [], []
    for name in FONT_PACKAGES:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            continue
        folders += spec.submodule_search_locations or () if spec else ()
    num_packages = len(folders)
    folders += [os.path.expandvars(os.path.expanduser(folder)) for folder in FONT_FOLDERS]
    for number, folder in enumerate(folders):
        for path in list_fonts(folder):
            name = Path(path).stem.lower()
            rank = number if number < num_packages else num_packages
            is_known = name.startswith(("notosans", "dejavusans"))
            found.append((sum(style in name for style in STYLES), rank, not is_known, name, path))
    return tuple(path for *_, path in sorted(found)[:MAX_FONTS])


def list_fonts(folder: str) -> list[str]:
    """Return the font files in a folder and the folders in it."""
    found, num_files = [], 0
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if name.lower().endswith((".ttf", ".otf", ".ttc")):
                found.append(os.path.join(parent, name))
        num_files += len(names)
        if num_files > MAX_FILES:
            break
    return found
