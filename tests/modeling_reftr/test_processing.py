"""RefTRProcessor: shapes of text, phrases, boxes and masks; truncation; answers; error messages."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_reftr import RefTRProcessor
from modeling_reftr.rle_reftr import to_coco_rle


IMAGE = Image.new("RGB", (64, 48), "gray")


def decode(processor, ids):
    return processor.tokenizer.decode(ids, skip_special_tokens=True)


def test_processor_encodes_single_sentence(processor):
    inputs = processor(IMAGE, "The RED circle")
    assert inputs["pixel_values"].shape == (1, 3, 48, 64)
    assert inputs["image_index"].tolist() == [0]
    assert decode(processor, inputs["input_ids"][0]) == "the red circle"
    assert "phrase_input_ids" not in inputs
    assert "labels" not in inputs


def test_processor_reads_list_as_texts_of_one_image(processor):
    inputs = processor([IMAGE], ["the red circle", "the star"])
    assert inputs["image_index"].tolist() == [0, 0]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]


def test_processor_reads_list_as_one_text_per_image(processor):
    inputs = processor([IMAGE, IMAGE], ["the red circle", "the star"])
    assert inputs["image_index"].tolist() == [0, 1]


def test_processor_reads_nested_list_as_texts_of_each_image(processor):
    inputs = processor([IMAGE, IMAGE], [["the star"], ["the square", "the circle"]])
    assert inputs["image_index"].tolist() == [0, 1, 1]


def test_processor_finds_phrases_by_text_and_by_span(processor):
    text = "the red circle is left of the star"
    inputs = processor(IMAGE, text, phrases=["the star", (0, 14)])
    spans = inputs["phrase_spans"][0].tolist()
    assert spans == [[7, 9], [1, 4]]
    assert [decode(processor, ids) for ids in inputs["phrase_input_ids"][0]] == ["the star", "the red circle"]
    for span, phrase in zip(spans, ("the star", "the red circle"), strict=True):
        assert decode(processor, inputs["input_ids"][0][slice(*span)]) == phrase


def test_processor_maps_repeated_phrase_to_next_occurrence(processor):
    inputs = processor(IMAGE, "the star above the star", phrases=["the star", "The Star"])
    assert inputs["phrase_spans"][0].tolist() == [[1, 3], [4, 6]]
    with pytest.raises(ValueError, match="is not once more in its sentence"):
        processor(IMAGE, "the star above the star", phrases=["the star"] * 3)


def test_processor_prefers_complete_word_for_phrase(processor):
    inputs = processor(IMAGE, "the starry star", phrases=["star"])
    first = inputs["phrase_spans"][0, 0, 0].item()
    assert decode(processor, inputs["input_ids"][0, first : first + 1]) == "star"


def test_processor_keeps_offsets_when_lower_case_is_longer(processor):
    inputs = processor(IMAGE, "İİİ the star", phrases=["the star", (4, 12)])
    assert inputs["phrase_spans"][0, 0].tolist() == inputs["phrase_spans"][0, 1].tolist()
    assert decode(processor, inputs["phrase_input_ids"][0, 0]) == "the star"


def test_processor_pads_slots_with_empty_phrases(processor):
    text = ["the star above the square", "the circle"]
    inputs = processor(IMAGE, text, phrases=[["the star", "the square"], ["the circle"]])
    assert inputs["phrase_attention_mask"].sum(dim=-1).tolist() == [[4, 4], [4, 2]]
    assert inputs["phrase_spans"][1].tolist() == [[1, 3], [0, 1]]


def test_processor_pads_to_max_length_on_request(processor):
    inputs = processor(IMAGE, "the star", padding="max_length")
    assert inputs["input_ids"].shape == (1, 40)
    small = RefTRProcessor(processor.image_processor, processor.tokenizer, max_caption_length=50)
    inputs = small(IMAGE, "the star", phrases=["the star"], padding="max_length")
    assert inputs["input_ids"].shape == (1, 50)
    assert inputs["phrase_input_ids"].shape == (1, 16, 22)
    with pytest.raises(ValueError, match="17 phrases"):
        small(IMAGE, "the star " * 17, phrases=[["the star"] * 17][0], padding="max_length")


def test_processor_truncates_long_texts_with_one_warning(processor, make_model, caplog):
    texts = ["the star " * 200 + "the square", "the circle", "the red star " * 100]
    phrases = [["the star", "the square"], ["the circle"], ["the red star"]]
    logger = logging.getLogger("transformers")
    logger.propagate = True
    with caplog.at_level(logging.WARNING):
        inputs = processor(IMAGE, texts, phrases=phrases)
    logger.propagate = False
    (record,) = [record for record in caplog.records if "were truncated" in record.message]
    assert "2 of 3 texts are longer than 64 tokens" in record.message
    assert inputs["input_ids"].shape == (3, 64)
    outputs = make_model()(**inputs)
    assert outputs.phrase_mask.tolist() == [[True, False], [True, False], [True, False]]
    answers = processor.post_process_grounding(outputs, [(48, 64)])
    assert [answer["phrase_indices"] for answer in answers] == [[0], [0], [0]]


def test_processor_turns_boxes_into_labels(processor):
    inputs = processor(IMAGE, "the star", boxes=[16, 12, 48, 36])
    torch.testing.assert_close(inputs["labels"][0]["boxes"], torch.tensor([[0.5, 0.5, 0.5, 0.5]]))
    inputs = processor(IMAGE, ["the star", "the square"], boxes=[[0, 0, 64, 48], [0, 0, 32, 24]])
    torch.testing.assert_close(inputs["labels"][1]["boxes"], torch.tensor([[0.25, 0.25, 0.5, 0.5]]))
    inputs = processor(
        [IMAGE, IMAGE],
        [["the star above the square"], ["the circle", "the star"]],
        phrases=[[["the star", "the square"]], [["the circle"], ["the star"]]],
        boxes=[[[[0, 0, 8, 8], [8, 8, 16, 16]]], [[[0, 0, 8, 8]], [[0, 0, 9, 9]]]],
    )
    assert [len(label["boxes"]) for label in inputs["labels"]] == [2, 1, 1]


def test_processor_turns_masks_into_labels_of_padded_size(processor):
    mask = np.zeros((48, 64), bool)
    mask[:24, :32] = True
    inputs = processor(
        [IMAGE, Image.new("RGB", (64, 64))], ["the star", "the square"], masks=[[mask], [np.ones((64, 64))]]
    )
    masks = inputs["labels"][0]["masks"]
    assert masks.shape == (1, 64, 64)
    assert masks.dtype == torch.bool
    assert masks.sum() == 24 * 32
    assert masks[0, :24, :32].all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": [], "text": "the star"}, "There are no images"),
        ({"text": ""}, "The text '' is blank"),
        ({"text": " \n"}, "is blank"),
        ({"text": "\u200b"}, "is blank"),
        ({"text": []}, "must be a sentence, a list"),
        ({"text": [["the star"], "the square"]}, "mixes sentences and lists"),
        ({"images": [IMAGE] * 2, "text": "the star"}, "One text for 2 images"),
        ({"images": [IMAGE] * 2, "text": ["a"] * 3}, "3 texts for 2 images"),
        ({"images": [IMAGE] * 2, "text": [["a"]]}, "1 lists of texts for 2 images"),
        ({"images": [IMAGE] * 2, "text": [["a"], []]}, "An image has no sentence"),
        ({"text": "the star", "phrases": ["the square"]}, "'the square' is not in its sentence 'the star'"),
        ({"text": "the star", "phrases": [(4, 9)]}, r"\(4, 9\) is not a part of 'the star', which has 8 characters"),
        ({"text": "the star", "phrases": [(4, 4)]}, r"\(4, 4\) is not a part"),
        ({"text": "the star", "phrases": [" "]}, "A phrase of 'the star' is blank"),
        ({"text": ["a", "b"], "phrases": [["a"]]}, "1 entries of phrases for 2 sentences"),
        ({"text": ["a", "b"], "phrases": ["a", "b"]}, "must be a list of phrases for each sentence"),
        ({"text": "the star", "boxes": [[0, 0, 9, 9], [0, 0, 9, 9]]}, "2 boxes for the 1 phrases of 'the star'"),
        ({"text": "the star", "boxes": [9, 0, 9, 9]}, "x0 < x1"),
        ({"text": "the star", "boxes": [0, 9, 9, 0]}, "x0 < x1 and y0 < y1"),
        ({"text": "the star", "boxes": [0, 0, float("nan"), 9]}, "nan"),
        ({"text": "the star", "boxes": [0, 0, 99, 9]}, "exceeds its image of 64 x 48 pixels"),
        ({"text": "the star", "masks": [np.ones((9, 9))]}, r"has the size \(9, 9\), its image has \(48, 64\)"),
        ({"text": "the star", "original_sizes": [(1, 1), (2, 2)]}, "2 original_sizes for 1 images"),
        ({"text": "the star", "padding": "left"}, "padding='left' must be"),
    ],
)
def test_processor_rejects_invalid_arguments(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**{"images": IMAGE, **arguments})


def test_processor_gives_same_labels_for_run_lengths_and_masks(processor):
    mask = np.zeros((48, 64), bool)
    mask[5:20, 10:40] = True
    encoded = to_coco_rle(mask)
    lengths = {"size": [48, 64], "counts": [int(mask.size)]}
    inputs = processor(
        IMAGE,
        ["the star", "the circle", "it", "this"],
        masks=[mask, encoded, [encoded], lengths],
        boxes=[[0, 0, 9, 9]] * 4,
    )
    masks = [label["masks"] for label in inputs["labels"]]
    assert all(torch.equal(other, masks[0]) for other in masks[1:3])
    assert masks[3].sum() == 0
    none = processor(IMAGE, ["the star", "it"], masks=[None, encoded])["labels"]
    assert "masks" not in none[0]
    assert torch.equal(none[1]["masks"], masks[0])


def test_processor_clips_boxes_at_image_edge(processor):
    inputs = processor(IMAGE, "the star", boxes=[-0.5, 0, 64.4, 48.9])
    torch.testing.assert_close(inputs["labels"][0]["boxes"], torch.tensor([[0.5, 0.5, 1.0, 1.0]]))


def test_post_process_grounding_returns_pixels_of_each_image(processor, make_model):
    model = make_model()
    images = [Image.new("RGB", (64, 64)), Image.new("RGB", (32, 16))]
    inputs = processor(images, [["the star", "the square"], ["the circle"]])
    outputs = model(**inputs)
    by_image = processor.post_process_grounding(outputs, [(64, 64), (16, 32)])
    assert [answer["phrases"] for answer in by_image] == [["the star"], ["the square"], ["the circle"]]
    cx, cy, w, h = outputs.pred_boxes[2, 0].tolist()
    expected = torch.tensor([[cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]]) * torch.tensor([32, 16, 32, 16])
    torch.testing.assert_close(by_image[2]["boxes"], expected)


def test_post_process_grounding_returns_slots_of_answered_phrases(processor, make_model):
    """If the first requested phrase is truncated, the only answer belongs to the second."""
    text = "the star " * 200 + "the square"
    outputs = make_model()(**processor(IMAGE, text, phrases=["the square", "the star"]))
    (answer,) = processor.post_process_grounding(outputs, [(48, 64)])
    assert (answer["phrase_indices"], answer["phrases"], len(answer["boxes"])) == ([1], ["the star"], 1)


def test_processor_round_trips_through_save_pretrained(processor, tmp_path):
    processor.max_expression_length = 11
    processor.save_pretrained(tmp_path)
    loaded = RefTRProcessor.from_pretrained(tmp_path)
    assert loaded.max_expression_length == 11
    inputs = [p(IMAGE, "the red star", phrases=["red star"]) for p in (processor, loaded)]
    assert inputs[0].keys() == inputs[1].keys()
    for name, value in inputs[0].items():
        assert torch.equal(value, inputs[1][name]), name


def test_processor_returns_numpy_on_request(processor):
    inputs = processor(IMAGE, "the star", return_tensors="np")
    assert all(isinstance(value, np.ndarray) for value in inputs.values())


@pytest.mark.parametrize("kind", ["tensor", "array", "channels_first"])
def test_processor_accepts_tensors_and_arrays(processor, kind):
    """`mode` is a method of a tensor, but the color mode of a PIL image."""
    array = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    image = {
        "tensor": torch.from_numpy(array).permute(2, 0, 1),
        "array": array,
        "channels_first": array.transpose(2, 0, 1),
    }[kind]
    inputs = processor(image, "the red circle", boxes=[0, 0, 30, 20])
    expected = processor(Image.fromarray(array), "the red circle", boxes=[0, 0, 30, 20])
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    assert torch.equal(inputs["labels"][0]["boxes"], expected["labels"][0]["boxes"])


def test_processor_forgets_max_length_after_call(processor, tmp_path):
    image = Image.new("RGB", (40, 30))
    text = "the red circle is left of the blue star"
    assert processor(image, text, max_length=6)["input_ids"].shape == (1, 6)
    fixed = processor(image, "the star", text_kwargs={"max_length": 6, "padding": "max_length"})
    assert fixed["input_ids"].shape == (1, 6)
    processor(image, text, phrases=["the red circle"])
    processor.save_pretrained(tmp_path)
    loaded = RefTRProcessor.from_pretrained(tmp_path)
    assert torch.equal(loaded(image, text)["input_ids"], processor(image, text)["input_ids"])
    assert loaded(image, text)["input_ids"].shape[1] > 6
    with pytest.raises(ValueError, match="padding='left'"):
        processor(image, text, padding="left")
