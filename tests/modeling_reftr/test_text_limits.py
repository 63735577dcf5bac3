"""Unanswerable texts are refused with a short error, and every function over text takes linear time."""

import random
import time

import pytest
from PIL import Image

from data_scripts.escaping import for_code, for_markdown, for_terminal
from data_scripts.flickr30k_entities import parse_caption
from modeling_reftr import VisualGroundingPipeline
from modeling_reftr.drawing_reftr import draw_answers
from modeling_reftr.inputs_reftr import is_joined, split_expressions
from modeling_reftr.phrase_search_reftr import find_occurrences
from modeling_reftr.phrases_reftr import find_phrases
from modeling_reftr.quoting_reftr import quote
from training_reftr.augmentation import mirror_sentence, mirrored_words


def mirror_phrases(text: str):
    return mirror_sentence({"text": text, "phrases": [{"start": 0, "end": 4}] * text.count("left")})


def find_half_a_word(text: str):
    """Search half of a repetitive text, which begins at every word and ends at none."""
    return find_phrases(text, [text[: len(text) // 6 * 3] + "a"])


def find_half_a_letter(text: str):
    """Search a phrase that begins at every letter and ends at none, as a folded sharp s is two letters."""
    with pytest.raises(ValueError, match="is not in its sentence"):
        find_phrases(text, ["s" * (len(text) + 1)])


FUNCTIONS = {
    "mirrored_words": (mirrored_words, "left right "),
    "mirror_sentence": (mirror_phrases, "left right "),
    "split_expressions": (split_expressions, "the st. bernard dog. the cat . "),
    "is_joined": (is_joined, "the st. bernard dog. the cat . "),
    "find_phrases": (lambda text: find_phrases(text, ["the dog"] * text.count("dog")), "the dog, the cat "),
    "find_phrases, half a word": (find_half_a_word, "ab "),
    "find_phrases, half a letter": (find_half_a_letter, "ß"),
    "find_phrases, parts of words": (
        lambda text: find_phrases(text, ["a " + "xa " * number for number in range(1, 50)]),
        "xa ",
    ),
    "find_phrases, spans": (
        lambda text: find_phrases(text, [(3 * i, 3 * i + 2) for i in range(len(text) // 3)]),
        "ab ",
    ),
    "parse_caption": (parse_caption, "[/EN#7/people/other A man] washes "),
    "parse_caption, unfinished": (parse_caption, "[/EN#7/people/other A man washes "),
    "parse_caption, types": (lambda text: parse_caption(f"[/EN#7{text}"), "/a"),
    "for_terminal": (for_terminal, "the \x1b[31mred\u202e cup"),
    "for_markdown": (for_markdown, "a | [b](c) <script> _d_ ``` "),
    "for_code": (for_code, "a ` b `` "),
    "quote": (quote, "the \x1b[31mred\u202e cup"),
    "draw_answers": (
        lambda text: draw_answers(Image.new("RGB", (64, 48)), [None], [text], title=text),
        "the-dog e\u0301 ",
    ),
    "draw_answers, one word": (lambda text: draw_answers(Image.new("RGB", (64, 48)), [None], [text]), "dog"),
}


def measure_seconds(function, text: str) -> float:
    """Return the least of three times, which other processes on the machine disturb least."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function(text)
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.parametrize(("function", "piece"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_text_functions_run_in_linear_time(function, piece):
    number = 500
    short, long = (measure_seconds(function, piece * count) for count in (number, 8 * number))
    assert long < 24 * short, "quadratic time would be 64 times as long"


def test_find_occurrences_returns_all_positions():
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choice("ab") for _ in range(rng.randint(1, 30)))
        wanted = rng.choice(["ab", "a", "b"]) * rng.randint(1, 6)
        begin = rng.randint(0, 5)
        expected = [index for index in range(begin, len(text)) if text.startswith(wanted, index)]
        assert list(find_occurrences(text, wanted, begin)) == expected, (text, wanted, begin)


def test_find_phrases_limits_total_length():
    """Phrases may overlap: a few spans could request any number of characters to be tokenized."""
    text = "the cup " * 1000
    assert len(find_phrases(text, [(0, 8000)] * 12)) == 12
    with pytest.raises(ValueError, match="more than 100,000 characters together") as refused:
        find_phrases(text, [(0, 8000)] * 13)
    assert len(str(refused.value)) < 300


def test_draw_answers_limits_height_for_long_labels():
    image, text = Image.new("RGB", (64, 48)), "the cup " * 12_500
    assert draw_answers(image, [None], [text], width=960).height < 5_000
    assert draw_answers(image, [None] * 300, [text] * 300, width=960).height < 15_000


@pytest.mark.parametrize("phrase", ["the cat", "the dog " * 10_000, (7, 90_000), (0, 1, 2), ["the"] * 10_000, b"the"])
def test_processor_error_quotes_only_part_of_text(processor, phrase):
    with pytest.raises(ValueError, match="the cup the cup") as refused:
        processor(Image.new("RGB", (64, 48)), "the cup " * 10_000, phrases=[phrase])
    assert len(str(refused.value)) < 500


TEXTS = {
    "half of a surrogate pair": ("the \ud83d cup", "half of a surrogate pair"),
    "as a file name has it": ("the \udcff cup", "half of a surrogate pair"),
    "NUL": ("the \0 cup", "NUL"),
    "ten megabytes": ("the cup " * 1_250_000, "characters"),
}


@pytest.mark.parametrize(("text", "reason"), TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("entry_point", ["text", "phrase", "pipeline"])
def test_unanswerable_text_is_refused_at_every_entry_point(processor, make_model, text, reason, entry_point):
    image = Image.new("RGB", (64, 48))
    pipeline = VisualGroundingPipeline(make_model(), processor=processor, device="cpu")
    ask = {
        "text": lambda: processor(image, text),
        "phrase": lambda: processor(image, "the cup", phrases=[text]),
        "pipeline": lambda: pipeline(image, text=text),
    }
    with pytest.raises(ValueError, match=reason) as refused:
        ask[entry_point]()
    assert len(str(refused.value)) < 1000


def test_control_characters_do_not_change_phrase_offsets(processor):
    text = "the \u202ered\u202c cup\u200b \x07"
    plain = processor(Image.new("RGB", (64, 48)), text, phrases=["cup"])
    assert plain["phrase_spans"].shape[-1] == 2
    assert find_phrases(text, ["cup"]) == [(text.index("cup"), text.index("cup") + 3)]
