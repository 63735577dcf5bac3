"""
`post_process_grounded_object_detection`: Grounding DINO's signature and result, accepted by supervision.

`supervision.Detections.from_transformers` requires tensors `scores`, `boxes` and integer `labels`. Where a result also
has `masks`, it squeezes their axis 1: they must have the shape (N, 1, height, width).
"""

import inspect

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GroundingDinoProcessor

from modeling_reftr import RefTRProcessor


IMAGES = [Image.new("RGB", (64, 48), "gray"), Image.new("RGB", (40, 64), "gray")]
SIZES = [(48, 64), (64, 40)]
TEXTS = [["the red circle", "the star"], ["a square"]]


@pytest.fixture(params=[False, True], ids=["boxes", "masks"])
def model(request, make_model):
    return make_model(predict_masks=request.param)


def to_detections(result):
    """Convert a result by the rules of `supervision.Detections.from_transformers`."""
    fields = {"boxes": "xyxy", "scores": "confidence", "labels": "class_id"}
    found = {new: result[old].cpu().detach().numpy() for old, new in fields.items()}
    found["class_id"] = found["class_id"].astype(int)
    if "masks" in result:
        found["mask"] = np.squeeze(result["masks"].cpu().detach().numpy().astype(bool), axis=1)
    return found


def test_signature_accepts_calls_for_grounding_dino():
    ours = list(inspect.signature(RefTRProcessor.post_process_grounded_object_detection).parameters)
    theirs = list(inspect.signature(GroundingDinoProcessor.post_process_grounded_object_detection).parameters)
    assert ours[: len(theirs)] == theirs


def test_result_is_one_supervision_compatible_dict_per_image(model, processor):
    inputs = processor(images=IMAGES, text=TEXTS, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    results = processor.post_process_grounded_object_detection(
        outputs, inputs.input_ids, threshold=0.4, text_threshold=0.3, target_sizes=SIZES
    )
    by_sentence = processor.post_process_grounding(outputs, SIZES)
    assert [result["text_labels"] for result in results] == TEXTS
    assert [result["labels"].tolist() for result in results] == [[0, 1], [0]]
    torch.testing.assert_close(results[0]["boxes"], torch.cat([by_sentence[0]["boxes"], by_sentence[1]["boxes"]]))
    torch.testing.assert_close(results[1]["boxes"], by_sentence[2]["boxes"])
    assert [result["scores"].tolist() for result in results] == [[1.0, 1.0], [1.0]]
    has_masks = outputs.pred_masks is not None
    for result, (height, width), texts in zip(results, SIZES, TEXTS, strict=True):
        assert set(result) == {"scores", "boxes", "labels", "text_labels"} | ({"masks"} if has_masks else set())
        detections = to_detections(result)
        assert detections["xyxy"].shape == (len(texts), 4)
        assert detections["confidence"].shape == detections["class_id"].shape == (len(texts),)
        if has_masks:
            assert detections["mask"].shape == (len(texts), height, width)
    if has_masks:
        masks = processor.image_processor.post_process_masks(outputs, SIZES)
        assert torch.equal(results[0]["masks"][:, 0], torch.cat(masks[:2]))


def test_supervision_accepts_result(model, processor):
    supervision = pytest.importorskip("supervision")
    outputs = model(**processor(IMAGES, TEXTS))
    for result in processor.post_process_grounded_object_detection(outputs, target_sizes=SIZES):
        detections = supervision.Detections.from_transformers(result, id2label=dict(enumerate(result["text_labels"])))
        assert list(detections.data["class_name"]) == result["text_labels"]
        assert (detections.mask is not None) == ("masks" in result)


def test_boxes_stay_relative_without_target_sizes(model, processor):
    outputs = model(**processor(IMAGES, TEXTS))
    results = processor.post_process_grounded_object_detection(outputs)
    scaled = processor.post_process_grounded_object_detection(outputs, target_sizes=torch.tensor(SIZES))
    for result, other, (height, width) in zip(results, scaled, SIZES, strict=True):
        torch.testing.assert_close(result["boxes"] * torch.tensor([width, height] * 2), other["boxes"])


def test_threshold_of_one_removes_every_box(model, processor):
    outputs = model(**processor(IMAGES, TEXTS))
    for result, size in zip(
        processor.post_process_grounded_object_detection(outputs, threshold=1.0, target_sizes=SIZES),
        SIZES,
        strict=True,
    ):
        assert result["boxes"].shape == (0, 4)
        assert result["labels"].dtype == torch.long
        assert len(result["scores"]) == len(result["labels"]) == len(result["text_labels"]) == 0
        if "masks" in result:
            assert result["masks"].shape == (0, 1, *size)


def test_phrases_are_labeled_by_slot(model, processor):
    texts = ["the red circle is left of the star", "a square"]
    inputs = processor(IMAGES[0], texts, phrases=[["the star", "the red circle"], ["a square"]])
    (result,) = processor.post_process_grounded_object_detection(model(**inputs), target_sizes=SIZES[:1])
    assert result["text_labels"] == ["the star", "the red circle", "a square"]
    assert result["labels"].tolist() == [0, 1, 2]


def test_truncated_phrases_have_no_result(model, processor):
    caption = "the red circle and " * 60 + "the star"
    inputs = processor(IMAGES[0], caption, phrases=["the star", "the red circle"])
    (result,) = processor.post_process_grounded_object_detection(
        model(**inputs), target_sizes=SIZES[:1], text_labels=[["star", "circle"]]
    )
    assert result["labels"].tolist() == [1]
    assert result["text_labels"] == ["circle"]


def test_text_labels_replace_decoded_texts(model, processor):
    outputs = model(**processor(IMAGES, TEXTS))
    labels = [["Circle", "Star"], ["Square"]]
    results = processor.post_process_grounded_object_detection(outputs, target_sizes=SIZES, text_labels=labels)
    assert [result["text_labels"] for result in results] == labels
    with pytest.raises(ValueError, match="1 text_labels for 2 images"):
        processor.post_process_grounded_object_detection(outputs, text_labels=labels[:1])
    with pytest.raises(ValueError, match="has 1 texts for an image with at least 2"):
        processor.post_process_grounded_object_detection(outputs, text_labels=[["Circle"], ["Square"]])


def test_one_size_per_image_is_required(model, processor):
    outputs = model(**processor(IMAGES, TEXTS))
    with pytest.raises(ValueError, match="3 target_sizes for 2 images"):
        processor.post_process_grounded_object_detection(outputs, target_sizes=[*SIZES, (1, 1)])


def test_image_without_sentences_has_empty_result(model, processor):
    inputs = processor(IMAGES, TEXTS)
    inputs["image_index"] = torch.tensor([1, 1, 1])
    results = processor.post_process_grounded_object_detection(model(**inputs), target_sizes=SIZES)
    assert [len(result["boxes"]) for result in results] == [0, 3]
