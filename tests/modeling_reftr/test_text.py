"""Text is encoded as published: expressions in lower case, captions unchanged, each sentence independently."""

import copy
import json
import logging
import unicodedata

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, pipeline

from modeling_reftr import RefTRProcessor, VisualGroundingPipeline
from modeling_reftr.inputs_reftr import is_joined
from modeling_reftr.phrases_reftr import find_phrases
from reftr_cli.predict import main as predict
from tests.helpers.tiny import TINY_TEXT
from training_reftr.data import GroundingCollator


IMAGE = Image.new("RGB", (64, 48), "gray")
ODD = [
    "ΟΔΟΣ",  # the last letter has a special form at the end of a word
    "ΣΑΣ ΟΔΟΣ ΟΔΟΣ.",
    "İstanbul",  # two code points in lower case
    "İİİ",
    "STRAẞE",
    "ﬁSH",
    "E\u0301TE\u0301",  # combining marks
    "ÉTÉ",
    "👩\u200d🚀 ASTRONAUT",
    "ILIK \u0131rmak",  # the dotless i
    "ǅUNGLA",  # one letter made of two, in title case
    "猫 CAT",
]


def byte_tokenizer(**settings) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer like RoBERTa's: it keeps capitals, and a letter may be several tokens."""
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", **settings
    )


@pytest.fixture
def cased(processor):
    return RefTRProcessor(processor.image_processor, byte_tokenizer(model_max_length=128))


@pytest.fixture
def cased_model(make_model, cased):
    text_config = {**TINY_TEXT, "vocab_size": len(cased.tokenizer), "pad_token_id": 1, "max_position_embeddings": 128}
    return make_model(text_config=text_config, max_text_positions=128)


def decode(processor, ids) -> str:
    return processor.tokenizer.decode(ids, skip_special_tokens=True)


def real(inputs, index: int, prefix: str = "") -> list[int]:
    """Return the token ids of a sentence without its padding."""
    return inputs[f"{prefix}input_ids"][index][inputs[f"{prefix}attention_mask"][index].bool()].tolist()


# lower case


@pytest.mark.parametrize("text", ODD)
def test_processor_lowercases_complete_expression(cased, text):
    expected = byte_tokenizer()(text.lower())["input_ids"]
    inputs = cased(IMAGE, text)
    assert inputs["input_ids"].tolist() == [expected]
    assert decode(cased, inputs["input_ids"][0]) == text.lower()
    # the expression as its own phrase
    inputs = cased(IMAGE, text, phrases=[text])
    assert inputs["input_ids"].tolist() == [expected]
    assert inputs["phrase_input_ids"].tolist() == [[expected]]
    assert inputs["phrase_spans"].tolist() == [[[1, len(expected) - 1]]]


@pytest.mark.parametrize("text", ODD)
def test_processor_keeps_case_of_captions_and_phrases(cased, text):
    caption = f"A Dog, {text} beside the Dog"
    begin = caption.index(text)
    cased.max_phrase_length = 40  # of bytes
    phrases = ["a dog", (begin, begin + len(text)), text, "THE DOG"]
    inputs = cased(IMAGE, caption, phrases=phrases)
    ids = inputs["input_ids"][0]
    assert decode(cased, ids) == caption
    written = ["A Dog", text, text, "the Dog"]
    for phrase, (start, end), own in zip(
        written, inputs["phrase_spans"][0], inputs["phrase_input_ids"][0], strict=True
    ):
        assert decode(cased, own) == phrase
        assert decode(cased, ids[start:end]).strip() == phrase


@pytest.mark.parametrize("text", ODD)
@pytest.mark.parametrize("change", [str, str.lower, str.upper, str.casefold, str.title])
def test_find_phrases_ignores_case(text, change):
    if change in (str.upper, str.title) and "\u0131" in text:
        pytest.skip("becomes another letter, I, which is the capital of i")
    sentence = f"x {text}, y"
    assert find_phrases(sentence, [change(text)]) == [(2, 2 + len(text))]
    assert find_phrases(sentence, ["Y", change(text)]) == [(len(sentence) - 1, len(sentence)), (2, 2 + len(text))]


@pytest.mark.parametrize(
    ("sentence", "phrase", "span"),
    [
        ("İstanbul i", "i", (9, 10)),  # not the first half of a letter
        ("ﬁsh f", "f", (4, 5)),
        ("E\u0301te\u0301 e", "e", (6, 7)),  # not a letter that carries a mark
        ("the starry star", "star", (11, 15)),
        ("ΟΔΟΣΑ ΟΔΟΣ", "οδος", (6, 10)),
    ],
)
def test_find_phrases_matches_complete_letters_and_words(sentence, phrase, span):
    assert find_phrases(sentence, [phrase]) == [span]


def test_find_phrases_prefers_word_over_end_of_longer_word():
    assert find_phrases("the upright car is right", ["right"]) == [(19, 24)]
    assert find_phrases("upright", ["right"]) == [(2, 7)], "used if there is no better match"


@pytest.mark.parametrize(
    ("sentence", "phrase", "span"),
    [
        ("the man\u2019s red hat", "the man's red hat", (0, 17)),
        ("a \u201cstop\u201d sign", 'A "Stop" sign', (0, 13)),
        ("two  red\n cars\u00a0there", "red cars", (5, 14)),
        ("two red cars", "red\u00a0 cars ", (4, 12)),
        ("red", " red", (0, 3)),
    ],
)
def test_find_phrases_ignores_shape_of_quotes_and_number_of_spaces(sentence, phrase, span):
    assert find_phrases(sentence, [phrase]) == [span]


def test_find_phrases_rejects_part_of_letter():
    for sentence, phrase in (("İ", "i"), ("ﬁ", "f"), ("ẞ", "s")):
        with pytest.raises(ValueError, match="is not in its sentence"):
            find_phrases(sentence, [phrase])


def test_processor_does_not_compose_decomposed_letters(cased):
    one, two = "CAFÉ", unicodedata.normalize("NFD", "CAFÉ")
    assert decode(cased, cased(IMAGE, two)["input_ids"][0]) == two.lower() != one.lower()


# each sentence independently


LONG = "The RED Star " + "left of it " * 8  # over 40 tokens, under 128
CAPTION, PHRASES = "The Red Circle is Left of the Star", ["the red circle", "the Star"]


@pytest.mark.parametrize("expression", ["The RED Star", LONG, "ΟΔΟΣ"])
@pytest.mark.parametrize("padding", ["longest", "max_length"])
@pytest.mark.parametrize("form", ["none", "text", "span", "blank around it"])
def test_processor_encodes_expression_alike_next_to_captions(cased, expression, padding, form):
    alone = cased(IMAGE, expression)
    caption_alone = cased(IMAGE, CAPTION, phrases=PHRASES)
    text, phrases = {
        "none": (expression, None),
        "text": (expression, [expression.upper() if expression != "ΟΔΟΣ" else expression]),
        "span": (expression, [(0, len(expression))]),
        "blank around it": (expression, [(0, len(expression.rstrip()))]),
    }[form]
    for order in (slice(None), slice(None, None, -1)):
        texts, names = [text, CAPTION][order], [phrases, PHRASES][order]
        inputs = cased(IMAGE, texts, phrases=names, padding=padding)
        index = texts.index(text)
        assert real(inputs, index) == real(alone, 0)
        assert real(inputs, 1 - index) == real(caption_alone, 0)
        assert inputs["phrase_attention_mask"][index].sum(dim=1).tolist()[:2] == [len(real(alone, 0)), 2]
        assert inputs["phrase_spans"][index, 0].tolist() == [1, len(real(alone, 0)) - 1]
        kept = inputs["phrase_attention_mask"][index, 0].bool()
        assert inputs["phrase_input_ids"][index, 0][kept].tolist() == real(alone, 0)
    assert len(real(alone, 0)) <= 40


def test_model_answers_expression_alike_next_to_captions(cased, cased_model):
    texts = ["The RED Star", CAPTION, LONG]
    with torch.no_grad():
        alone = [cased_model(**cased(IMAGE, text)).pred_boxes[0, 0] for text in texts]
        caption = cased_model(**cased(IMAGE, CAPTION, phrases=PHRASES)).pred_boxes[0]
        together = cased_model(**cased(IMAGE, texts, phrases=[None, PHRASES, None]))
        as_expressions = cased_model(**cased(IMAGE, texts)).pred_boxes[:, 0]
    assert together.phrase_mask.tolist() == [[True, False], [True, True], [True, False]]
    for index in (0, 2):
        torch.testing.assert_close(together.pred_boxes[index, 0], alone[index], rtol=0, atol=1e-6)
        torch.testing.assert_close(as_expressions[index], alone[index], rtol=0, atol=1e-6)
    torch.testing.assert_close(together.pred_boxes[1], caption, rtol=0, atol=1e-6)
    assert (alone[0] - caption[0]).abs().max() > 1e-4  # the boxes can differ


def test_collator_encodes_joined_datasets_like_each_alone(cased, shapes):
    """Collate an image with expressions and one with captions, in one batch and separately."""
    row = shapes["test"][0]

    def with_sentences(texts, spans):
        phrase = row["sentences"][0]["phrases"][0]
        sentences = [
            {"sentence_id": text, "text": text, "phrases": [{**phrase, "start": a, "end": b} for a, b in text_spans]}
            for text, text_spans in zip(texts, spans, strict=True)
        ]
        return {**row, "sentences": sentences}

    expressions = with_sentences(["The RED Star", LONG], [[(0, 12)], [(0, len(LONG))]])
    captions = with_sentences([CAPTION], [[(0, 14), (26, 34)]])
    collate = GroundingCollator(cased)
    alone, caption, joined = collate([expressions]), collate([captions]), collate([captions, expressions])
    assert real(joined, 0) == real(caption, 0)
    for index in (0, 1):
        assert real(joined, 1 + index) == real(alone, index)
    assert decode(cased, real(joined, 1)) == "the red star"
    assert decode(cased, real(joined, 0)) == CAPTION
    assert len(real(joined, 2)) == 40


# truncation in Python equals that of the tokenizer


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("limit", [3, 4, 7, 40, 63])
def test_processor_truncates_like_tokenizer(processor, kind, side, limit):
    tokenizer = copy.deepcopy(processor.tokenizer) if kind == "bert" else byte_tokenizer(model_max_length=64)
    tokenizer.truncation_side = side
    limited = RefTRProcessor(processor.image_processor, copy.deepcopy(tokenizer), max_phrase_length=5)
    end = "</s>" if kind == "roberta" else "[SEP]"
    text = f"the red star {end} left of the star " * 9  # a special token in the input is text
    expected = tokenizer(text.lower(), truncation=True, max_length=limit)["input_ids"]
    assert limited(IMAGE, text, max_length=limit)["input_ids"].tolist() == [expected]
    caption = "the star is left of the large red square and of the circle"
    expected = tokenizer(caption[16:], truncation=True, max_length=5)["input_ids"]
    inputs = limited(IMAGE, caption, phrases=[(16, len(caption))])
    assert inputs["phrase_input_ids"].tolist() == [[expected]]
    assert limited.tokenizer.backend_tokenizer.truncation is None


def test_processor_respects_model_max_length_of_tokenizer(processor):
    limited = RefTRProcessor(processor.image_processor, byte_tokenizer(model_max_length=16))
    for phrases in (None, [(0, 9), (80, 89)]):
        assert limited(IMAGE, "the star " * 20, phrases=phrases)["input_ids"].shape == (1, 16)
    assert limited(IMAGE, "the star " * 20, padding="max_length")["input_ids"].shape == (1, 16)


def test_processor_pads_with_pad_token_of_tokenizer(cased):
    inputs = cased(IMAGE, ["a star", "a", CAPTION], phrases=[None, None, PHRASES])
    for name in ("", "phrase_"):
        padding = inputs[f"{name}input_ids"][inputs[f"{name}attention_mask"] == 0]
        assert set(padding.tolist()) == {cased.tokenizer.pad_token_id}
        assert cased.tokenizer.pad_token_id != 0


def test_processor_rejects_max_length_without_room_for_text(processor):
    with pytest.raises(ValueError, match="A length of 2 tokens leaves no room for text besides the 2 special tokens"):
        processor(IMAGE, "the red star", max_length=2)


def test_processor_disables_truncation_and_padding_of_tokenizer(processor, tmp_path):
    """A `tokenizer.json` may enable both; the files that the processor saves do not."""
    text = "the red star is left of the large blue circle"
    expected = processor(IMAGE, [text, "the star"], phrases=[["the large blue circle"], None])
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(max_length=5)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    processor.image_processor.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    assert json.loads(path.read_text())["truncation"]["max_length"] == 5
    loaded = RefTRProcessor.from_pretrained(tmp_path)
    made = RefTRProcessor(processor.image_processor, tokenizer)
    for other in (made, loaded):  # before any call, as a change would affect other threads
        backend = other.tokenizer.backend_tokenizer
        assert (backend.truncation, backend.padding) == (None, None)
    for other in (made, loaded):
        inputs = other(IMAGE, [text, "the star"], phrases=[["the large blue circle"], None])
        assert inputs.keys() == expected.keys()
        assert all(torch.equal(inputs[name], value) for name, value in expected.items())
    loaded.save_pretrained(tmp_path)
    assert (json.loads(path.read_text())["truncation"], json.loads(path.read_text())["padding"]) == (None, None)


def test_processor_warns_about_truncated_phrases(processor, caplog):
    caption = "the star " + "left of the star " * 7
    with caplog.at_level(logging.WARNING):
        processor(IMAGE, caption, phrases=[(0, len(caption) - 9)])
    (record,) = [record for record in caplog.records if "were truncated" in record.message]
    assert record.message == "1 phrases are longer than 22 tokens and were truncated."


# several expressions in one text


JOINED = ["the red square. the green star.", "a cat . a dog .", "cat. remote control. dog.", "the star. the square"]
JOINED += ["the st. bernard dog. the cat.", "The Red Square.  The Star.\n"]
SINGLE = [
    "the st. bernard dog",
    "the st. bernard dog.",
    "man no. 3 on the left",
    "the red square.",
    "woman. far right",
]
SINGLE += ["john f. kennedy.", "the man on the left. he wears a hat.", "the u.s. flag.", "the 3.5 mm lens.", "dog..."]


@pytest.mark.parametrize(("texts", "expected"), [(JOINED, True), (SINGLE, False)], ids=["joined", "single"])
def test_is_joined_detects_several_expressions(texts, expected):
    assert [is_joined(text) for text in texts] == [expected] * len(texts)


@pytest.fixture
def warnings_of(caplog):
    """Return a function that counts the warnings of a call, in a process that has given none."""
    from transformers.utils import logging as library

    def count(function) -> int:
        library.warning_once.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            function()
        records = [record for record in caplog.records if "is read as one expression" in record.message]
        assert all('text=["the red square", "the green star"]' in record.message for record in records)
        return len(records)

    return count


def test_every_entry_point_warns_once_about_joined_expressions(make_model, processor, warnings_of, tmp_path):
    model, text = make_model(), JOINED[0]
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    IMAGE.save(tmp_path / "image.png")
    ground = VisualGroundingPipeline(model, processor=processor, device="cpu")
    stock = pipeline("zero-shot-object-detection", model=str(tmp_path), device="cpu")
    command = ["--model", str(tmp_path), "--image", str(tmp_path / "image.png"), "--device", "cpu", "--text"]
    calls = {
        "processor": lambda text: processor(IMAGE, text),
        "text alone": lambda text: processor(text=[["a star", text]]),
        "next to captions": lambda text: processor(IMAGE, [CAPTION, text], phrases=[PHRASES, None]),
        "pipeline": lambda text: ground(IMAGE, text=text),
        "stock": lambda text: stock(IMAGE, candidate_labels=[text]),
        "predict": lambda text: predict([*command, text]),
    }
    for name, call in calls.items():
        assert warnings_of(lambda call=call: [call(text), call(text), call(JOINED[1])]) == 1, name
        assert warnings_of(lambda call=call: call(SINGLE[1])) == 0, name


def test_processor_with_phrases_or_boxes_does_not_warn(processor, warnings_of):
    text = JOINED[0]
    assert warnings_of(lambda: processor(IMAGE, text, phrases=["the red square", "the green star"])) == 0
    assert warnings_of(lambda: processor(IMAGE, text, phrases=[text])) == 0
    assert warnings_of(lambda: processor(IMAGE, text, boxes=[0, 0, 9, 9])) == 0
