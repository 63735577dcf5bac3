"""Text of any script is written with the installed fonts, and never as the box of a missing glyph."""

import configparser

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from modeling_reftr import fonts_reftr
from modeling_reftr.fonts_reftr import FONT_PACKAGES, Pen, find_fonts, load_font, spell, split_by_font
from tests.helpers.tiny import ROOT


TEXTS = {
    "accent": "é",
    "decomposed accent": "e\u0301",
    "Cyrillic": "кот",
    "Chinese": "人",
    "Arabic": "كوب أحمر",
    "Hindi": "लाल प्याला",
    "Korean": "컵",
    "emoji": "\U0001f600",
    "several scripts": "le café 人 أحمر प्या",
    "variant": "\u2764\ufe0f",
    "joiner": "\u0915\u094d\u200d\u0937",
    "control": "a\x07b",
    "reversing": "the \u202ered\u202c cup",
    "unassigned": "\u0378",
    "private": "\ue000",
}


@pytest.fixture(autouse=True)
def forget_fonts():
    yield
    clear_caches()


def clear_caches():
    for function in (find_fonts, fonts_reftr._find_font, spell, split_by_font):
        function.cache_clear()


@pytest.fixture
def without_fonts(monkeypatch):
    """Leave only the font of Pillow."""
    clear_caches()
    monkeypatch.setattr(fonts_reftr, "FONT_FOLDERS", ())
    monkeypatch.setattr(fonts_reftr, "FONT_PACKAGES", ())


def draw_glyph(character: str, path: str) -> tuple:
    """Draw a character in a font, independent of the product's comparison."""
    font = load_font(path, 40, ImageFont.Layout.BASIC)
    mask = font.getmask(character)
    return mask.size, bytes(mask)


def find_missing_glyphs(text: str) -> list[str]:
    """Return the characters that are drawn as the box of a missing glyph."""
    ignored = {" ", "\u200c", "\u200d"}
    return [
        character
        for part, path in split_by_font(spell(text))
        for character in part
        if character not in ignored and draw_glyph(character, path) == draw_glyph("\U0010fffe", path)
    ]


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_pen_draws_no_missing_glyph(text):
    assert find_missing_glyphs(text) == []
    assert Pen(20).measure(text) > 0


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_pen_draws_no_missing_glyph_without_fonts(text, without_fonts):
    assert find_fonts() == ()
    assert find_missing_glyphs(text) == []
    assert Pen(20).measure(text) > 0


def test_missing_glyphs_are_found():
    """The check above finds the box that Pillow's own font draws for other characters."""
    assert draw_glyph("é", "") == draw_glyph("\U0010fffe", "")
    assert draw_glyph("e", "") != draw_glyph("\U0010fffe", "")


def test_characters_without_font_are_written_as_code_points(without_fonts):
    assert spell("the cup") == "the cup"
    assert spell("café") == "cafe"
    assert spell("cafe\u0301") == "cafe"
    assert spell("人左") == "U+4EBA U+5DE6"
    assert spell("a 人.") == "a U+4EBA ."


def test_control_characters_are_written_as_code_points():
    assert spell("the \u202ered\u202c cup\u200b \x07") == "the U+202E red U+202C cup U+200B U+0007"
    assert spell("a\tb\u3000c\n") == "a b c"


def test_pen_prefers_one_font_for_text(tmp_path, monkeypatch):
    """Write all of a text in the font that has all of it, and letters of other fonts in parts."""
    clear_caches()
    monkeypatch.setattr(
        fonts_reftr,
        "has_characters",
        lambda path, text: set(text) <= {"": set("abc"), "x": set("abcé"), "y": set("人")}[path] | {" "},
    )
    monkeypatch.setattr(fonts_reftr, "find_fonts", lambda: ("x", "y"))
    assert split_by_font("abc") == (("abc", ""),)
    assert split_by_font("abé c") == (("abé c", "x"),)
    assert split_by_font("ab 人 é") == (("ab ", ""), ("人 ", "y"), ("é", "x"))


def test_parts_of_right_to_left_text_are_ordered_from_left_to_right(monkeypatch):
    clear_caches()
    fonts = {"": set("abc"), "x": set("אב")}
    monkeypatch.setattr(fonts_reftr, "has_characters", lambda path, text: set(text) <= fonts[path] | {" "})
    monkeypatch.setattr(fonts_reftr, "find_fonts", lambda: ("x",))
    assert split_by_font("אב abc") == (("abc", ""), ("אב ", "x"))
    assert split_by_font("abc אב") == (("abc ", ""), ("אב", "x"))


def test_damaged_and_unusable_fonts_are_skipped(tmp_path, monkeypatch):
    clear_caches()
    (tmp_path / "NotoSans-Regular.ttf").write_bytes(b"no font")
    (tmp_path / "notes.txt").write_text("")
    monkeypatch.setattr(fonts_reftr, "FONT_FOLDERS", (str(tmp_path), str(tmp_path / "missing")))
    monkeypatch.setattr(fonts_reftr, "FONT_PACKAGES", ("modeling_reftr.none", "no_such_package"))
    assert find_fonts() == (str(tmp_path / "NotoSans-Regular.ttf"),)
    assert spell("人") == "U+4EBA"


def test_fonts_of_packages_and_regular_styles_come_first(tmp_path, monkeypatch):
    clear_caches()
    package = tmp_path / "site" / "some_fonts"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    names = ["DejaVuSans.ttf", "ASerif-Bold.ttf", "Zeta.otf", "NotoColorEmoji.ttf"]
    for path in (package / "Own.ttf", *(tmp_path / "system" / name for name in names)):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(fonts_reftr, "FONT_PACKAGES", ("some_fonts",))
    monkeypatch.setattr(fonts_reftr, "FONT_FOLDERS", (str(tmp_path / "system"),))
    found = [path.rpartition("/")[2] for path in find_fonts()]
    assert found == ["Own.ttf", "DejaVuSans.ttf", "Zeta.otf", "NotoColorEmoji.ttf", "ASerif-Bold.ttf"]
    monkeypatch.setattr(fonts_reftr, "MAX_FONTS", 2)
    find_fonts.cache_clear()
    assert len(find_fonts()) == 2


def test_pen_wraps_at_spaces_and_within_long_words():
    pen = Pen(16)
    for text in ("the red cup left of the man", "人" * 40, "x" * 200, "a " * 100):
        lines = pen.wrap(text, 120)
        assert all(pen.measure(line) <= 120 for line in lines)
        assert "".join(lines).replace(" ", "") == spell(text).replace(" ", "")
        (first,) = pen.wrap(text, 120, max_lines=1)
        assert first.endswith("...")
        assert pen.measure(first) <= 120
    assert pen.wrap("", 120) == pen.wrap(" \n", 120) == []
    assert pen.wrap("ab", 0) == ["a", "b"]


def test_pen_writes_within_line():
    pen = Pen(20)
    for text in ("Ápg|", "لأحمر", "प्याला", "人컵"):
        canvas = Image.new("L", (400, 80), 255)
        pen.write(ImageDraw.Draw(canvas), (20, 20), text, "black")
        rows, columns = np.nonzero(np.asarray(canvas) < 200)
        assert rows.min() >= 20 - 4
        assert rows.max() < 20 + pen.line_height + 2
        assert columns.min() >= 20 - 3
        assert columns.max() < 20 + pen.measure(text) + 3


def test_extra_installs_known_font_packages():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    lines = settings["options.extras_require"]["fonts"].split()
    names = [line.partition(">=")[0].replace("-", "_") for line in lines]
    assert names == [name for name in FONT_PACKAGES if name != "matplotlib"]
