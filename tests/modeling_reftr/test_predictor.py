"""RefTRPredictor encodes an image once and gives the answers of the pipeline to every question about it."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import pipeline

from modeling_reftr import RefTRPredictor


TEXTS = ["the red circle", "the star", "the blue square"]
CAPTION = "the red circle is left of the star"
QUESTIONS = {
    "one expression": ("the star", None),
    "several expressions": (TEXTS, None),
    "phrases of a caption": (CAPTION, ["the star", (0, 14)]),
    "a caption and an expression": ([CAPTION, "a star"], [["the star", "the red circle"], None]),
    "a phrase past the end": ("the red circle and " * 60 + "the star", ["the red circle", "the star"]),
}


@pytest.fixture(scope="module")
def images(shapes):
    return [shapes["test"][index]["image"].resize((50 + 10 * index, 64)) for index in range(2)]


@pytest.fixture(params=[False, True], ids=["boxes", "masks"])
def predictor(request, make_model, processor):
    return RefTRPredictor(make_model(predict_masks=request.param), processor)


def assert_equal_answers(found, expected):
    assert len(found) == len(expected)
    for answer, other in zip(found, expected, strict=True):
        assert answer.keys() == other.keys()
        for name in answer.keys() - {"box", "mask"}:
            assert answer[name] == other[name]
        assert (answer["box"] is None) == (other["box"] is None)
        if answer["box"] is not None:
            assert answer["box"] == pytest.approx(other["box"], abs=1e-3)
        if answer.get("mask") is not None:
            np.testing.assert_array_equal(np.asarray(answer["mask"]), np.asarray(other["mask"]))


@pytest.mark.parametrize("question", QUESTIONS)
def test_predict_equals_pipeline(predictor, images, question):
    text, phrases = QUESTIONS[question]
    pipe = pipeline("visual-grounding", model=predictor.model, processor=predictor.processor)
    for image in images:
        predictor.set_image(image)
        assert_equal_answers(predictor.predict(text, phrases), pipe(image, text=text, phrases=phrases))


def test_predict_encodes_image_once(predictor, images):
    calls = []
    predictor.model.base_model.backbone.register_forward_hook(lambda *_: calls.append(1))
    predictor.set_image(images[0])
    assert [predictor.predict(text)[0]["label"] for text in TEXTS] == TEXTS
    assert len(predictor.predict(TEXTS)) == 3
    assert len(calls) == 1
    predictor.set_image(images[1])
    assert len(calls) == 2


@pytest.mark.parametrize("kind", ["path", "array", "tensor of a channel first"])
def test_set_image_accepts_every_type(predictor, images, tmp_path, kind):
    images[0].save(tmp_path / "image.png")
    pixels = np.asarray(images[0])
    predictor.set_image(images[0])
    expected = predictor.predict(TEXTS)
    predictor.set_image(
        {"path": str(tmp_path / "image.png"), "array": pixels, "tensor of a channel first": pixels.transpose(2, 0, 1)}[
            kind
        ]
    )
    assert_equal_answers(predictor.predict(TEXTS), expected)
    assert predictor.draw(expected).width == 320


def test_set_image_turns_image_upright_unless_annotated_as_stored(predictor, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 40)).save(tmp_path / "turned.jpg", exif=exif)
    predictor.set_image(tmp_path / "turned.jpg")
    assert predictor.image.size == (40, 64)
    predictor.set_image(tmp_path / "turned.jpg", original_size=(40, 64))
    assert predictor.image.size == (64, 40)


def test_mask_threshold_shrinks_masks(make_model, processor, images):
    predictor = RefTRPredictor(make_model(predict_masks=True), processor)
    predictor.set_image(images[0])
    areas = [
        np.asarray(predictor.predict("the star", mask_threshold=threshold)[0]["mask"]).sum()
        for threshold in (0.01, 0.5, 0.99)
    ]
    assert areas == sorted(areas, reverse=True)
    assert areas[0] > areas[2]


def test_predict_and_draw_require_image(predictor, images):
    with pytest.raises(ValueError, match="call `set_image` before `predict`"):
        predictor.predict("the star")
    with pytest.raises(ValueError, match="call `set_image` before `draw`"):
        predictor.draw([])
    predictor.set_image(images[0])
    predictor.reset_image()
    with pytest.raises(ValueError, match="No image is set"):
        predictor.predict("the star")


def test_failed_set_image_leaves_no_image(predictor, images, tmp_path):
    predictor.set_image(images[0])
    with pytest.raises(OSError, match=r"missing\.png"):
        predictor.set_image(tmp_path / "missing.png")
    with pytest.raises(ValueError, match="No image is set"):
        predictor.predict("the star")
    with pytest.raises(ValueError, match="takes one image, got 2"):
        predictor.set_image(images)


@pytest.mark.parametrize("text", [None, [], ["the star", 7], [["the star"]], "  "])
def test_predict_rejects_invalid_texts(predictor, images, text):
    predictor.set_image(images[0])
    with pytest.raises(ValueError, match=r"must be an expression to locate|is blank"):
        predictor.predict(text)


def test_from_pretrained_loads_folder(predictor, images, tmp_path):
    predictor.model.save_pretrained(tmp_path)
    predictor.processor.save_pretrained(tmp_path)
    predictor.set_image(images[0])
    loaded = RefTRPredictor.from_pretrained(tmp_path)
    loaded.set_image(images[0])
    assert_equal_answers(loaded.predict(TEXTS), predictor.predict(TEXTS))
    with pytest.raises(OSError, match="none"):
        RefTRPredictor.from_pretrained(tmp_path / "none")


def test_predictor_loads_from_code_of_saved_folder(make_model, processor, images, tmp_path, run):
    """Load in a process without this package, as in a Space."""
    model = make_model(predict_masks=True)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    images[0].save(tmp_path / "image.png")
    code = """
import json, sys
from transformers.dynamic_module_utils import get_class_from_dynamic_module
folder, image = sys.argv[1:]
predictor = get_class_from_dynamic_module("predictor_reftr.RefTRPredictor", folder)
predictor = predictor.from_pretrained(folder, trust_remote_code=True)
predictor.set_image(image)
sys.stdout.write(json.dumps([answer["box"] for answer in predictor.predict(["the red circle", "the star"])]))
assert not any(name.startswith("modeling_reftr") for name in sys.modules), "our package was imported"
"""
    result = run(
        "-I", "-c", code, tmp_path / "model", tmp_path / "image.png",
        cwd=tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules"),
    )  # fmt: skip
    predictor = RefTRPredictor(model, processor)
    predictor.set_image(images[0])
    for box, answer in zip(json.loads(result.stdout), predictor.predict(TEXTS[:2]), strict=True):
        assert box == pytest.approx(answer["box"], abs=1e-3)
