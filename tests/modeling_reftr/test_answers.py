"""Format of an answer in Python and in JSON, and deprecated argument names."""

import json

import numpy as np
import pytest
from transformers import pipeline

from modeling_reftr.answers_reftr import answer_to_json, json_answer
from modeling_reftr.rle_reftr import from_coco_rle
from training_reftr.report import prediction


CAPTION = "the red circle and " * 60 + "the star"


@pytest.fixture(scope="module")
def image(shapes):
    return shapes["test"][0]["image"]


def test_answer_has_fields_of_library_pipelines(make_model, processor, image):
    pipe = pipeline("visual-grounding", model=make_model(predict_masks=True), processor=processor)
    found, missing = pipe(image, text=CAPTION, phrases=["the red circle", "the star"])
    assert found["label"] == found["phrase"] == "the red circle"
    assert found["score"] == 1.0
    assert list(found["box"]) == ["xmin", "ymin", "xmax", "ymax"]
    assert found["mask"].size == image.size
    assert missing == {"label": "the star", "phrase": "the star", "score": 0.0, "box": None, "mask": None}


def test_answer_to_json_serializes_found_and_missing_phrases(make_model, processor, image):
    pipe = pipeline("visual-grounding", model=make_model(predict_masks=True), processor=processor)
    answers = pipe(image, text=CAPTION, phrases=["the red circle", "the star"])
    found, missing = json.loads(json.dumps([answer_to_json(answer) for answer in answers]))
    assert found["box"] == [round(side, 2) for side in answers[0]["box"].values()]
    np.testing.assert_array_equal(from_coco_rle(found["segmentation"]), np.asarray(answers[0]["mask"]) > 0)
    assert missing == {"label": "the star", "phrase": "the star", "score": 0.0, "box": None, "segmentation": None}
    pipe = pipeline("visual-grounding", model=make_model(), processor=processor)
    assert set(answer_to_json(pipe(image, text="the star")[0])) == {"label", "phrase", "score", "box"}


def test_prediction_line_contains_json_answer():
    record = {"image_id": "1", "sentence_id": "2", "phrase": 0, "words": "the star", "iou": 0.5, "any_box_iou": 0.5}
    record["pred_box"] = [0.123, 1, 2, 3]
    line = prediction("test", record)
    assert line | json_answer("the star", [0.123, 1, 2, 3]) == line
    assert line["pred_box_xyxy"] == [0.123, 1, 2, 3]
    assert line["phrase"] == 0
    line = prediction("test", {**record, "pred_box": None, "pred_segmentation": None})
    assert line | json_answer("the star", None, segmentation=None) == line


def test_processors_warn_about_deprecated_annotated_sizes(processor, image):
    sizes = [(image.height, image.width)]
    for call in (
        lambda **sizes: processor(image, "the star", **sizes),
        lambda **sizes: processor.image_processor(image, **sizes),
    ):
        with pytest.warns(FutureWarning, match="`annotated_sizes` is deprecated, use `original_sizes`"):
            old = call(annotated_sizes=sizes)
        np.testing.assert_array_equal(old["pixel_values"], call(original_sizes=sizes)["pixel_values"])
        with pytest.raises(ValueError, match="pass only `original_sizes`"):
            call(annotated_sizes=sizes, original_sizes=sizes)
