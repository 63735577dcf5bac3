"""Nesting and counts of call arguments have one meaning everywhere, and ambiguous ones are refused."""

import math

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from modeling_reftr import VisualGroundingPipeline


WIDE, TALL = Image.new("RGB", (64, 48), "gray"), Image.new("RGB", (48, 64), "white")
BOX, OTHER_BOX = [16, 12, 48, 36], [0, 0, 32, 24]
MASK = np.zeros((48, 64), bool)
MASK[12:36, 16:48] = True


@pytest.fixture
def model(make_model):
    return make_model(predict_masks=True)


@pytest.fixture
def ground(model, processor):
    return VisualGroundingPipeline(model, processor=processor, device="cpu")


# sizes: one per image


@pytest.mark.parametrize(
    ("texts", "images"),
    [
        ([["the star", "the square"], ["the circle"]], 2),  # more sentences than images
        ([["the star"], ["the circle"]], 2),
        (["the star"], 1),
        (["the star", "the square"], 1),
        ([["the star"], ["the circle"], ["it", "a square"]], 3),
    ],
)
@pytest.mark.parametrize("kind", [list, torch.tensor, np.array], ids=["list", "tensor", "array"])
def test_target_sizes_belong_to_images_not_sentences(processor, model, texts, images, kind):
    sizes = [(480, 640), (100, 50), (7, 9)][:images]
    with torch.no_grad():
        outputs = model(**processor([WIDE, TALL, WIDE][:images], texts))
    answers = processor.post_process_referring_segmentation(outputs, kind(sizes))
    for answer, image, (cx, cy, w, h) in zip(
        answers, outputs.image_index.tolist(), outputs.pred_boxes[:, 0].tolist(), strict=True
    ):
        height, width = sizes[image]
        expected = [(cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height]
        assert answer["boxes"][0].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-4)
        assert answer["masks"].shape == (1, height, width)


@pytest.mark.parametrize("from_features", [False, True])
@pytest.mark.parametrize("asked", [[0, 0], [1], [1, 0, 1, 0], [0, 0, 0]])
def test_target_sizes_cover_images_without_a_sentence(processor, model, asked, from_features):
    """Match sizes to images, whether there are fewer, as many or more sentences."""
    inputs = processor([WIDE, TALL], ["a star", "a star"])
    images = {name: inputs.pop(name) for name in ("pixel_values", "pixel_mask")}
    text = {name: inputs[name][:1].expand(len(asked), -1) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        image_inputs = {"image_features": model.get_image_features(**images)} if from_features else images
        outputs = model(**image_inputs, **text, image_index=torch.tensor(asked))
    sizes = [(100, 200), (10, 20)]
    answers = processor.post_process_grounding(outputs, sizes)
    corners = processor.image_processor.post_process_boxes(outputs)
    for answer, image, box_xyxy in zip(answers, asked, corners, strict=True):
        height, width = sizes[image]
        torch.testing.assert_close(answer["boxes"], box_xyxy * torch.tensor([width, height, width, height]))
    if len(asked) != 2:
        for call in (processor.post_process_grounding, processor.post_process_referring_segmentation):
            with pytest.raises(ValueError, match=f"{len(asked)} target_sizes for 2 images"):
                call(outputs, [sizes[image] for image in asked])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([(1, 1)] * 3, "3 target_sizes for 2 images"),
        ([(1, 1)], "1 target_sizes for 2 images"),
        ([], "0 target_sizes for 2 images"),
        ((48, 64), "one .height, width. for each of 2 images, got 48"),  # a pair is not a list of pairs
        (torch.tensor([48, 64]), "for each of 2 images"),
        ([48, 64, 48, 64], "4 target_sizes for 2 images"),
        ([(48, 64, 3), (48, 64, 3)], "for each of 2 images"),
        ([(48, 64), (0, 64)], "positive numbers of pixels"),
        ([(48, 64), (math.nan, 64)], "positive numbers of pixels"),
        (48, "must be a list, got int"),
        ({"a": (48, 64), "b": (48, 64)}, "must be a list, got dict"),
    ],
)
def test_target_sizes_of_wrong_count_or_form_are_refused(processor, model, sizes, message):
    with torch.no_grad():
        outputs = model(**processor([WIDE, TALL], [["the star"], ["the circle", "a square"]]))
    for call in (
        processor.post_process_grounding,
        processor.post_process_referring_segmentation,
        processor.image_processor.post_process_boxes,
        processor.image_processor.post_process_masks,
    ):
        with pytest.raises(ValueError, match=message):
            call(outputs, sizes)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((48, 64), "for each of 2 images, got 48"),  # a pair, for two images
        (torch.tensor([48, 64]), "for each of 2 images"),
        ([(48, 64)], "1 original_sizes for 2 images"),
        ([(48, 64), "64"], "for each of 2 images, got '64'"),
        ([(48, 64), (48, -1)], "positive numbers of pixels"),
    ],
)
def test_original_sizes_of_wrong_count_or_form_are_refused(processor, sizes, message):
    for call in (
        lambda sizes: processor([WIDE, TALL], [["the star"], ["it"]], original_sizes=sizes),
        lambda sizes: processor.image_processor([WIDE, TALL], original_sizes=sizes),
        lambda sizes: processor.image_processor.open_images([WIDE, TALL], sizes),
    ):
        with pytest.raises(ValueError, match=message):
            call(sizes)
        for form in ([(48, 64), (64, 48)], np.array([(48, 64), (64, 48)]), [None, (64, 48)]):
            call(form)


def test_original_sizes_given_as_single_pair_are_refused(processor):
    with pytest.raises(ValueError, match="2 original_sizes for 1 images"):
        processor(WIDE, "the star", original_sizes=(48, 64))


def test_post_processing_without_image_count_is_refused(processor, model):
    with torch.no_grad():
        outputs = model(**processor([WIDE, TALL], [["the star"], ["the circle", "a square"]]))
    outputs.pixel_mask = None
    with pytest.raises(ValueError, match="no pixel_mask"):
        processor.post_process_grounding(outputs, [(1, 1)] * 2)
    outputs.image_index = None  # then every sentence has its own image
    assert len(processor.post_process_grounding(outputs, [(1, 1)] * 3)) == 3


# nesting of the text and number of images


def sequences(values: list) -> list:
    """Return a list of texts as every supported sequence type."""
    column = datasets.Dataset.from_dict({"text": values})["text"]
    return [values, tuple(values), np.array(values), np.array(values, dtype=object), pd.Series(values), column]


@pytest.mark.parametrize(
    ("images", "text", "image_index"),
    [
        (WIDE, "the star", [0]),
        ([WIDE], "the star", [0]),
        (WIDE, ["the star"], [0]),
        ([WIDE], ["the star"], [0]),
        (WIDE, ["the star", "the square"], [0, 0]),
        ([WIDE], ["the star", "the square"], [0, 0]),  # one image, in or out of a list: every text refers to it
        ([WIDE, TALL], ["the star", "the square"], [0, 1]),  # several images: one text per image
        ([WIDE], [["the star", "the square"]], [0, 0]),
        ([WIDE, TALL], [["the star"], ["the square"]], [0, 1]),
        ([WIDE, TALL], [["the star", "it"], ["the square"]], [0, 0, 1]),
        (None, "the star", [0]),
        (None, ["the star", "the square"], [0, 0]),  # without images all texts refer to one image
        (None, [["the star"], ["the square", "it"]], [0, 1, 1]),
    ],
)
def test_processor_assigns_each_text_to_its_image(processor, images, text, image_index):
    assert processor(images, text)["image_index"].tolist() == image_index
    if isinstance(text, list) and isinstance(text[0], str):
        for form in sequences(text):
            assert processor(images, form)["image_index"].tolist() == image_index, type(form)
    elif isinstance(text, list):
        for form in (tuple(map(tuple, text)), [np.array(group) for group in text], pd.Series(text)):
            assert processor(images, form)["image_index"].tolist() == image_index, type(form)


@pytest.mark.parametrize(
    ("images", "text", "message"),
    [
        ([WIDE, TALL], "the star", "One text for 2 images"),
        ([WIDE, TALL], ["the star"], "1 texts for 2 images"),
        ([WIDE, TALL], ["the star"] * 3, "3 texts for 2 images"),
        ([WIDE], [["the star"], ["the square"]], "2 lists of texts for 1 images"),
        (WIDE, [["the star"], "the square"], "mixes sentences and lists"),
        (WIDE, [[["the star"]]], r"must be a str, got list"),
        (WIDE, ["the star", None], "text mixes sentences and lists"),
        (WIDE, [7, 8], "must be a list, got int"),
        (WIDE, {"the star": 1}, "must be a list, got dict"),
        (WIDE, {"the star"}, "must be a list, got set"),
        (WIDE, (text for text in ["the star"]), "must be a list, got generator"),
        (WIDE, b"the star", "must be a list, got bytes"),
        (WIDE, [[]], "An image has no sentence"),
        (WIDE, [["the star", 7]], "must be a str, got int"),
    ],
)
def test_processor_refuses_texts_of_wrong_nesting(processor, images, text, message):
    with pytest.raises(ValueError, match=message):
        processor(images, text)


# phrases, boxes and masks follow the nesting of the text


CAPTION = "the star above the square"
SPANS = [[1, 3], [4, 6]]


@pytest.mark.parametrize(
    ("text", "phrases", "spans"),
    [
        (CAPTION, ["the star", "the square"], [SPANS]),
        (CAPTION, ("the star", "the square"), [SPANS]),
        (CAPTION, np.array(["the star", "the square"]), [SPANS]),
        (CAPTION, [(0, 8), (15, 25)], [SPANS]),
        (CAPTION, [[0, 8], "the square"], [SPANS]),
        (CAPTION, np.array([[0, 8], [15, 25]]), [SPANS]),
        ([CAPTION], [["the star", "the square"]], [SPANS]),
        ([CAPTION], [("the star", "the square")], [SPANS]),
        ([CAPTION, "the star"], [["the star", "the square"], None], [SPANS, [[1, 3], [0, 1]]]),
        ([[CAPTION], ["the star"]], [[["the star", "the square"]], [["the star"]]], [SPANS, [[1, 3], [0, 1]]]),
    ],
)
def test_processor_accepts_phrases_nested_like_their_text(processor, text, phrases, spans):
    images = [WIDE, TALL] if isinstance(text[0], list) else WIDE
    assert processor(images, text, phrases=phrases)["phrase_spans"].tolist() == spans


@pytest.mark.parametrize(
    ("text", "phrases", "message"),
    [
        (CAPTION, "the star", "must be a list of phrases"),
        (CAPTION, (0, 8), "The phrase 0 of .* must be a str or a pair of int"),  # one span is not a list of spans
        (CAPTION, [["the star", "the square"]], "must be a str or a pair of int"),
        (CAPTION, [(0, 8, 9)], "must be a str or a pair of int"),
        (CAPTION, [(0.0, 8.0)], "must be a str or a pair of int"),
        (CAPTION, ["the star", None], "The phrase None of"),
        (CAPTION, [7], "The phrase 7 of"),
        (CAPTION, {"the star"}, "must be a list, got set"),
        ([CAPTION, CAPTION], ["the star", "the square"], "must be a list of phrases for each sentence"),
        ([CAPTION, CAPTION], "ab", "must be a list, got str"),
        ([CAPTION], [(0, 8)], "The phrase 0 of"),
        ([CAPTION], [["the star"], ["the star"]], "2 entries of phrases for 1 sentences"),
        ([[CAPTION]], [["the star"]], "must be a list of phrases for each sentence"),
        ([[CAPTION]], ["the star"], "must be a list, got str"),
        ([[CAPTION]], [7], "must be a list, got int"),
    ],
)
def test_processor_refuses_phrases_of_wrong_nesting(processor, text, phrases, message):
    with pytest.raises(ValueError, match=message):
        processor(WIDE, text, phrases=phrases)


@pytest.mark.parametrize(
    ("text", "phrases", "boxes", "counts"),
    [
        ("the star", None, BOX, [1]),
        ("the star", None, tuple(BOX), [1]),
        ("the star", None, np.array(BOX), [1]),
        ("the star", None, torch.tensor(BOX), [1]),
        ("the star", None, [BOX], [1]),
        ("the star", None, np.array([BOX]), [1]),
        (["the star"], None, [BOX], [1]),
        (["the star"], None, [[BOX]], [1]),
        (["the star", "it"], None, torch.tensor([BOX, OTHER_BOX]), [1, 1]),
        (["the star", "it"], None, [None, OTHER_BOX], [0, 1]),
        ([["the star", "it"]], None, [[BOX, [OTHER_BOX]]], [1, 1]),
        (CAPTION, ["the star", "the square"], [BOX, OTHER_BOX], [2]),
        (CAPTION, ["the star", "the square"], np.array([BOX, OTHER_BOX]), [2]),
        ([CAPTION, "it"], [["the star", "the square"], None], [[BOX, OTHER_BOX], BOX], [2, 1]),
    ],
)
def test_processor_accepts_boxes_nested_like_their_text(processor, text, phrases, boxes, counts):
    labels = processor(WIDE, text, phrases=phrases, boxes=boxes)["labels"]
    found = [label.get("boxes", torch.zeros(0, 4)) for label in labels]
    assert [len(item) for item in found] == counts
    for item in found:
        assert all(box in ([0.5, 0.5, 0.5, 0.5], [0.25, 0.25, 0.5, 0.5]) for box in item.tolist())


@pytest.mark.parametrize(
    ("text", "phrases", "boxes", "message"),
    [
        (["a", "b", "c", "d"], None, BOX, "must be a list, got int"),  # four numbers are not four boxes
        ("the star", None, [[[BOX]]], "must be four numbers"),
        ("the star", None, BOX[:3], "must be four numbers"),
        ("the star", None, [*BOX, 1], "must be four numbers"),
        ("the star", None, [[*BOX, *BOX]], "must be four numbers"),
        ("the star", None, {"x": BOX}, "must be a list, got dict"),
        ("the star", None, [{"x": BOX}], "must be four numbers"),
        ("the star", None, [None], "must be four numbers"),
        ("the star", None, ["a", "b", "c", "d"], "must be four numbers"),
        ("a b c d", ["a", "b", "c", "d"], BOX, "must be four numbers"),  # four numbers for four phrases
        ("a b", ["a", "b"], np.array([BOX * 2, BOX * 2]), "must be four numbers"),
        ("a b", ["a", "b"], BOX, "4 boxes for the 2 phrases"),
        ("a b", ["a"], BOX, "4 boxes for the 1 phrases"),
        (["the star"], None, BOX, "4 entries of boxes for 1 sentences"),
    ],
)
def test_processor_refuses_boxes_of_wrong_nesting(processor, text, phrases, boxes, message):
    with pytest.raises(ValueError, match=message):
        processor(WIDE, text, phrases=phrases, boxes=boxes)


@pytest.mark.parametrize(
    ("text", "masks"),
    [
        ("the star", MASK),
        ("the star", MASK[None]),
        ("the star", MASK.tolist()),
        ("the star", [MASK.tolist()]),
        ("the star", torch.from_numpy(MASK)),
        ("the star", Image.fromarray(MASK)),
        ("the star", [Image.fromarray(MASK)]),
        (["the star"], MASK[None]),
        (["the star"], [MASK]),
        (["the star"], [[MASK]]),
        ([["the star"]], [[MASK[None]]]),
    ],
)
def test_processor_accepts_mask_with_or_without_phrase_axis(processor, text, masks):
    (label,) = processor(WIDE, text, masks=masks)["labels"]
    assert label["masks"].shape == (1, 48, 64)
    assert (label["masks"][0].numpy() == MASK).all()


def test_processor_reads_mask_of_one_row_as_one_mask(processor):
    image, mask = Image.new("RGB", (64, 1)), np.arange(64)[None] < 9
    for form in (mask, mask[None]):
        (label,) = processor(image, "the star", masks=form, do_resize=False)["labels"]
        assert label["masks"].shape == (1, 1, 64)
        assert label["masks"].sum() == 9


@pytest.mark.parametrize(
    ("text", "phrases", "masks", "message"),
    [
        ("the star", None, MASK.T, r"has the size \(64, 48\)"),
        ("the star", None, MASK[..., None], "48 masks for the 1 phrases"),
        ("the star", None, MASK[0], "64 masks for the 1 phrases"),
        ("the star", None, MASK[None, None, None], r"has the size \(1, 48, 64\)"),
        ("the star", None, "mask.png", "must be a list, got str"),
        (["the star"], None, MASK, "48 entries of masks for 1 sentences"),
        ("a b", ["a", "b"], [MASK, None], r"has the size \(\)"),
        ("a b", ["a", "b"], MASK, "48 masks for the 2 phrases"),
    ],
)
def test_processor_refuses_masks_of_wrong_nesting(processor, text, phrases, masks, message):
    with pytest.raises(ValueError, match=message):
        processor(WIDE, text, phrases=phrases, masks=masks)


# pipeline questions


@pytest.mark.parametrize(
    ("images", "text", "asked"),
    [
        (WIDE, "the star", ["the star"]),
        (WIDE, ["the star"], ["the star"]),
        (WIDE, ("the star", "it"), ["the star", "it"]),
        (WIDE, np.array(["the star", "it"]), ["the star", "it"]),
        ([WIDE], ["the star"], [["the star"]]),
        ([WIDE, TALL], "the star", [["the star"]] * 2),
        ([WIDE, TALL], ["the star", "it"], [["the star"], ["it"]]),
        ((WIDE, TALL), pd.Series(["the star", "it"]), [["the star"], ["it"]]),
        ([WIDE, TALL], [["the star", "a"], "it"], [["the star", "a"], ["it"]]),
        (iter([WIDE, TALL]), "the star", [["the star"]] * 2),
    ],
)
def test_pipeline_assigns_each_text_to_its_image(ground, images, text, asked):
    found = ground(images, text=text)
    phrases = [
        answer["phrase"] if isinstance(answer, dict) else [part["phrase"] for part in answer] for answer in found
    ]
    assert phrases == asked


@pytest.mark.parametrize(
    ("images", "asked", "message"),
    [
        ([WIDE], {"text": ["the star", "it"]}, "2 texts for 1 images"),
        ([WIDE, TALL], {"text": ["the star"]}, "1 texts for 2 images"),
        ([WIDE, TALL], {"text": {"the star": 1}}, "must be a list, got dict"),
        (iter([WIDE, TALL]), {"text": ["the star", "it"]}, "does not say which image each text refers to"),
        (WIDE, {"text": [["the star"]]}, "must be an expression to locate or a list of expressions"),
        (WIDE, {"text": 7}, "must be a list, got int"),
        (WIDE, {"text": ["the star", "it"], "phrases": "ab"}, "must be a list, got str"),
        (WIDE, {"text": "the star", "phrases": (0, 8)}, "must be a str or a pair of int"),
    ],
)
def test_pipeline_refuses_questions_of_wrong_nesting(ground, images, asked, message):
    with pytest.raises(ValueError, match=message):
        list(ground(images, **asked))
