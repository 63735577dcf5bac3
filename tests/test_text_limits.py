"""Texts that cannot be answered are refused in a sentence, and no function over text takes more than linear time."""

import time

import pytest
from PIL import Image

from modeling_reftr import VisualGroundingPipeline
from modeling_reftr.inputs_reftr import is_joined, split_expressions
from modeling_reftr.processing_reftr import find_phrases
from training_reftr.augmentation import mirror_sentence, mirrored_words


def mirror_phrases(text: str):
    return mirror_sentence({"text": text, "phrases": [{"start": 0, "end": 4}] * text.count("left")})


FUNCTIONS = {
    "mirrored_words": (mirrored_words, "left right "),
    "mirror_sentence": (mirror_phrases, "left right "),
    "split_expressions": (split_expressions, "the st. bernard dog. the cat . "),
    "is_joined": (is_joined, "the st. bernard dog. the cat . "),
    "find_phrases": (lambda text: find_phrases(text, ["the dog"] * text.count("dog")), "the dog, the cat "),
}


def seconds_of(function, text: str) -> float:
    """The least of three times, which others on the machine disturb least."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function(text)
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.parametrize(("function", "piece"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_eight_times_the_text_takes_about_eight_times_the_time(function, piece):
    number = 500
    short, long = (seconds_of(function, piece * count) for count in (number, 8 * number))
    assert long < 24 * short, "64 times where the time grows with the square"


TEXTS = {
    "half of a surrogate pair": ("the \ud83d cup", "half of a surrogate pair"),
    "as a file name has it": ("the \udcff cup", "half of a surrogate pair"),
    "NUL": ("the \0 cup", "NUL"),
    "ten megabytes": ("the cup " * 1_250_000, "characters"),
}


@pytest.mark.parametrize(("text", "reason"), TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("door", ["text", "phrase", "pipeline"])
def test_text_that_cannot_be_answered_is_refused(processor, make_model, text, reason, door):
    image = Image.new("RGB", (64, 48))
    pipeline = VisualGroundingPipeline(make_model(), processor=processor, device="cpu")
    ask = {
        "text": lambda: processor(image, text),
        "phrase": lambda: processor(image, "the cup", phrases=[text]),
        "pipeline": lambda: pipeline(image, text=text),
    }
    with pytest.raises(ValueError, match=reason) as refused:
        ask[door]()
    assert len(str(refused.value)) < 1000


def test_controls_and_marks_of_direction_change_no_offset(processor):
    text = "the \u202ered\u202c cup\u200b \x07"
    plain = processor(Image.new("RGB", (64, 48)), text, phrases=["cup"])
    assert plain["phrase_spans"].shape[-1] == 2
    assert find_phrases(text, ["cup"]) == [(text.index("cup"), text.index("cup") + 3)]
