"""Words that the tokenizer does not know are named in a warning, once."""

import json
import logging

import pytest
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoProcessor, PreTrainedTokenizerFast

from modeling_reftr import RefTRImageProcessor, RefTRPredictor, RefTRProcessor, VisualGroundingPipeline
from modeling_reftr.unknown_words_reftr import spells_unknown_words, warn_about_unknown_words
from reftr_cli.predict import main as predict


IMAGE = Image.new("RGB", (64, 48))
WARNING = "The model's tokenizer does not know the "


@pytest.fixture
def warned(monkeypatch):
    """Return the list of warnings about unknown words that are given from now on."""
    found = []
    warn_about_unknown_words.cache_clear()
    logger = logging.getLogger("modeling_reftr.unknown_words_reftr")
    monkeypatch.setattr(logger, "warning", found.append)
    yield found
    warn_about_unknown_words.cache_clear()


def words_of(message):
    """Return the words of a warning as it quotes them."""
    return message.removeprefix(WARNING).partition(" ")[2].partition(":")[0]


@pytest.fixture
def published():
    """Make a processor with pieces of words in its vocabulary, as BERT has."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "play", "##ing", "##er", "star", "z", "##e"]
    backend = Tokenizer(models.WordPiece({token: index for index, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=40, **names)
    return RefTRProcessor(RefTRImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}), tokenizer)


def test_processor_warns_once_per_list_of_unknown_words(processor, warned):
    texts = ["the red Zebra left of the star", "the zebra and a llama!"]
    for _ in range(2):
        processor(IMAGE, texts)
    assert warned == [f"{WARNING}words 'zebra', 'llama': answers to them are guesses."]
    processor(IMAGE, "the zebra")
    assert warned[1:] == [f"{WARNING}word 'zebra': answers to it are guesses."]


@pytest.mark.parametrize("text", ["the red star", "The STAR, left of the circle?!", "the-star"])
def test_processor_does_not_warn_about_training_words_and_punctuation(processor, warned, text):
    processor(IMAGE, text)
    assert warned == []


def test_processor_warns_about_words_of_captions_and_of_text_alone(processor, warned):
    processor(IMAGE, "The star and a Zebra", phrases=["a Zebra"])
    processor(text=["the llama"])
    assert list(map(words_of, warned)) == ["'Zebra'", "'llama'"]


def test_processor_of_published_vocabulary_warns_only_about_unknown_tokens(published, warned):
    assert not spells_unknown_words(published.tokenizer)
    published(IMAGE, "the player playing zee")
    assert warned == []
    published(IMAGE, "the player, the ☕ zebra")
    assert warned == [f"{WARNING}words '☕', 'zebra': answers to them are guesses."]


def test_processor_does_not_warn_in_training(processor, warned):
    processor(IMAGE, "the zebra", boxes=[0, 0, 9, 9])
    processor([IMAGE], [["the zebra"]], boxes=[[None]])
    assert warned == []


def test_warning_quotes_few_and_short_words(processor, warned):
    processor(IMAGE, " ".join(["z" * 100, *(f"y{number}y" for number in range(12))]))
    (message,) = warned
    assert f"'{'z' * 40}', 'y0y'" in message
    assert message.endswith("'y8y' and 3 more: answers to them are guesses.")


def test_every_entry_point_warns_about_unknown_words(make_model, processor, warned, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    IMAGE.save(tmp_path / "image.png")
    predictor = RefTRPredictor(model, processor)
    predictor.set_image(IMAGE)
    ground = VisualGroundingPipeline(model, processor=processor, device="cpu")
    command = ["--model", str(tmp_path), "--image", str(tmp_path / "image.png"), "--device", "cpu", "--text"]
    calls = {
        "pipeline": lambda: ground(IMAGE, text="a zebra"),
        "predictor": lambda: predictor.predict("a llama"),
        "predict": lambda: predict([*command, "a okapi"]),
    }
    for call in calls.values():
        call()
    assert list(map(words_of, warned)) == ["'zebra'", "'llama'", "'okapi'"]


def test_saved_processor_warns_without_new_fields_in_its_file(processor, warned, tmp_path):
    processor.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "processor_config.json").read_text())
    assert set(fields) == {
        *("auto_map", "image_processor", "processor_class"),
        *("max_expression_length", "max_caption_length", "max_phrase_length", "max_phrases"),
    }
    AutoProcessor.from_pretrained(tmp_path)(images=IMAGE, text="the zebra")
    assert len(warned) == 1
