"""The `visual-grounding` pipeline: every form of question, the answers of the model, and code in a saved folder."""

import json

import numpy as np
import pytest
import torch
from transformers import pipeline

import modeling_reftr
from modeling_reftr import RefTRForVisualGrounding, RefTRProcessor, VisualGroundingPipeline


TEXTS = ["the red circle", "the star", "the blue square"]


@pytest.fixture(scope="module")
def images(shapes):
    return [shapes["test"][index]["image"].resize((50 + 10 * index, 64)) for index in range(3)]


@pytest.fixture
def saved(make_model, processor, tmp_path):
    """Save a model that predicts masks, and its processor."""
    make_model(predict_masks=True).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def ground(saved):
    return pipeline("visual-grounding", model=str(saved))


def expected(folder, image, texts, phrases=None):
    """Return the box and the mask of each phrase, computed by the model itself."""
    model, processor = RefTRForVisualGrounding.from_pretrained(folder), RefTRProcessor.from_pretrained(folder)
    with torch.no_grad():
        outputs = model(**processor(image, texts, phrases=phrases))
    results = processor.post_process_referring_segmentation(outputs, [(image.height, image.width)])
    return [
        (box.tolist(), mask.numpy())
        for result in results
        for box, mask in zip(result["boxes"], result["masks"], strict=True)
    ]


def check(answers, phrases, truth):
    assert [answer["phrase"] for answer in answers] == phrases
    for answer, (box_xyxy, mask) in zip(answers, truth, strict=True):
        assert list(answer["box"]) == ["xmin", "ymin", "xmax", "ymax"]
        assert list(answer["box"].values()) == pytest.approx(box_xyxy, abs=1e-3)
        assert answer["mask"].mode == "L"
        assert set(np.unique(answer["mask"])) <= {0, 255}
        assert ((np.asarray(answer["mask"]) > 0) == mask).all()


def test_pipeline_answers_every_expression_of_one_image(ground, saved, images):
    assert isinstance(ground, VisualGroundingPipeline)
    check(ground(images[0], text=TEXTS), TEXTS, expected(saved, images[0], TEXTS))
    check(ground(images[0], text="the star"), ["the star"], expected(saved, images[0], ["the star"]))
    question = {"image": images[0], "text": TEXTS}
    check(ground(question), TEXTS, expected(saved, images[0], TEXTS))


@pytest.mark.parametrize("kind", ["path", "Path", "array", "tensor", "channels first"])
def test_pipeline_accepts_every_image_type(ground, saved, images, tmp_path, kind):
    images[1].save(tmp_path / "image.png")
    pixels = np.asarray(images[1])
    image = {
        "path": str(tmp_path / "image.png"),
        "Path": tmp_path / "image.png",
        "array": pixels,
        "tensor": torch.from_numpy(pixels.copy()).permute(2, 0, 1),
        "channels first": pixels.transpose(2, 0, 1),
    }[kind]
    answers = ground(image, text=TEXTS)
    check(answers, TEXTS, expected(saved, images[1], TEXTS))
    drawn = ground.draw(image, answers)
    assert drawn.width == 320
    assert drawn.height > 320


def test_pipeline_answers_phrases_of_captions(ground, saved, images):
    caption = "The red circle is left of the star"
    truth = expected(saved, images[0], [caption], [["The red circle", "the star"]])
    phrases = ["The red circle", "the star"]
    check(ground(images[0], text=caption, phrases=phrases), phrases, truth)
    check(ground(images[0], text=caption, phrases=[(0, 14), (26, 34)]), phrases, truth)
    two = ground(images[0], text=[caption, "a star"], phrases=[phrases, ["star"]])
    check(two[:2], phrases, truth)
    assert [answer["phrase"] for answer in two] == [*phrases, "star"]


def test_pipeline_encodes_each_image_once(ground, images):
    calls = []
    ground.model.base_model.backbone.register_forward_hook(lambda module, inputs, _: calls.append(len(inputs[0])))
    ground(images[0], text=TEXTS)
    ground(images, text=TEXTS, batch_size=2)
    assert calls == [1, 2, 1]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_pipeline_answers_several_images_in_order(ground, saved, images, batch_size, num_workers):
    settings = {"batch_size": batch_size, "num_workers": num_workers}
    same = [images[0]] * 3  # of one size, so that batching changes nothing
    truth = expected(saved, same[0], TEXTS)
    texts = [TEXTS, TEXTS[:1], TEXTS[1:]]
    questions = [{"image": image, "text": text} for image, text in zip(same, texts, strict=True)]
    for results in (
        ground(same, text=texts, **settings),
        ground(questions, **settings),
        list(ground(iter(questions), **settings)),
    ):
        check(results[0], TEXTS, truth)
        check(results[1], TEXTS[:1], truth[:1])
        check(results[2], TEXTS[1:], truth[1:])
    for answers in ground(same, text="the star", **settings):
        check(answers, ["the star"], truth[1:2])
    # masks of images of different sizes keep the size of their image
    for image, answers in zip(images, ground(images, text=TEXTS, **settings), strict=True):
        assert all(answer["mask"].size == image.size for answer in answers)
    # captions and expressions in one list
    mixed = [
        {"image": same[0], "text": "the red circle and the star", "phrases": ["the star"]},
        {"image": same[0], "text": TEXTS},
    ] * 2
    answers = ground(mixed, **settings)
    assert [[answer["phrase"] for answer in found] for found in answers] == [["the star"], TEXTS] * 2
    check(answers[3], TEXTS, truth)


def test_pipeline_reads_questions_lazily(ground, shapes):
    read = []

    def questions():
        for row in shapes["test"]:
            read.append(row["image_id"])
            yield {"image": row["image"], "text": [sentence["text"] for sentence in row["sentences"]]}

    answers = ground(questions(), batch_size=2)
    first = next(answers)
    assert len(first) == len(shapes["test"][0]["sentences"])
    assert len(read) < len(shapes["test"])


def test_pipeline_returns_no_box_for_truncated_phrases(ground, images):
    caption = "the red circle and " * 60 + "the star"
    answers = ground(images[0], text=caption, phrases=["the red circle", "the star"])
    assert [answer["phrase"] for answer in answers] == ["the red circle", "the star"]
    assert answers[0]["box"] is not None
    assert answers[1] == {"label": "the star", "phrase": "the star", "score": 0.0, "box": None, "mask": None}
    assert ground.draw(images[0], answers).width == 320
    assert ground(images[0], text=caption, phrases=["the star", "the red circle"]) == answers[::-1]


def test_pipeline_mask_threshold_shrinks_masks(ground, images):
    areas = [
        np.asarray(ground(images[0], text="the star", mask_threshold=threshold)[0]["mask"]).sum()
        for threshold in (0.01, 0.5, 0.99)
    ]
    assert areas == sorted(areas, reverse=True)
    assert areas[0] > areas[2]


def test_pipeline_of_box_model_returns_boxes_without_dropout(make_model, processor, images):
    model = make_model(dropout=0.5, attention_dropout=0.5).train()
    ground = pipeline("visual-grounding", model=model, processor=processor)
    first, again = ground(images[0], text="the star"), ground(images[0], text="the star")
    assert first == again  # no dropout
    assert set(first[0]) == {"label", "phrase", "score", "box"}
    assert ground.draw(images[0], first).width == 320


@pytest.mark.parametrize(
    ("inputs", "arguments", "message"),
    [
        ("IMAGE", {}, "text=None must be an expression to locate or a list of expressions"),
        ("IMAGE", {"text": []}, r"text=\[\] must be an expression"),
        ("IMAGE", {"text": ["the star", 7]}, "must be an expression to locate"),
        ("IMAGE", {"text": "  "}, "is blank"),
        ("IMAGE", {"text": "a star", "phrases": ["circle"]}, "'circle' is not in its sentence"),
        ("IMAGE", {"text": ["a star"] * 2, "phrases": [["star"]]}, "1 lists of phrases for 2 texts"),
        ([], {"text": "a star"}, "There are no images"),
        (["IMAGE"] * 2, {"text": ["a star"] * 3}, "3 texts for 2 images"),
        ([{"image": "IMAGE"}], {}, r"A question must have an 'image' and a 'text', got \['image'\]"),
        ([{"image": "IMAGE", "text": "a"}], {"text": "a"}, "contain their text and phrases"),
        (7, {"text": "a star"}, "must be an image, a question or a list of them, got int"),
        (None, {"text": "a star"}, "list of them, got NoneType"),
        ([np.zeros((2, 8, 8, 3), np.uint8)], {"text": "a star"}, "must be about one image, got 2"),
    ],
)
def test_pipeline_rejects_invalid_questions(ground, images, inputs, arguments, message):
    def fill(value):
        if isinstance(value, list):
            return [fill(item) for item in value]
        if isinstance(value, dict):
            return {name: fill(item) for name, item in value.items()}
        return images[0] if isinstance(value, str) and value == "IMAGE" else value

    with pytest.raises(ValueError, match=message):
        ground(fill(inputs), **arguments)


def test_pipeline_names_unreadable_images(ground, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    for path in (tmp_path / "text.png", tmp_path / "none.png"):
        with pytest.raises(OSError, match=path.name):
            ground(path, text="a star")


def test_saved_pipeline_loads_without_package(ground, saved, images, tmp_path, run):
    """Load in a clean process with the code of the folder, and again from what that process saves."""
    ground.save_pretrained(tmp_path / "complete")
    images[0].save(tmp_path / "image.png")
    code = """
import json, sys
from transformers import pipeline
folder, again, image = sys.argv[1:]
for name in (folder, again):
    ground = pipeline("visual-grounding", model=name, trust_remote_code=True)
    answers = ground(image, text=["the red circle", "the star"])
    sys.stdout.write(json.dumps([answer["box"] for answer in answers]) + "\\n")
    ground.draw(image, answers).save(again + ".png")
    ground.save_pretrained(again)
assert not any(name.startswith("modeling_reftr") for name in sys.modules), "our package was imported"
"""
    # a folder saved by the model and the processor contains the code as well
    for folder in (tmp_path / "complete", saved):
        result = run(
            "-I", "-c", code, folder, tmp_path / f"{folder.name}_again", tmp_path / "image.png",
            cwd=tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules"),
        )  # fmt: skip
        truth = [answer["box"] for answer in ground(images[0], text=TEXTS[:2])]
        assert [json.loads(line) for line in result.stdout.splitlines()] == [truth, truth]
        configs = [
            json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / f"{folder.name}_again")
        ]
        for name in ("auto_map", "custom_pipelines", "reftr_version"):
            assert configs[0][name] == configs[1][name]
        assert configs[0]["custom_pipelines"]["visual-grounding"]["impl"] == "pipeline_reftr.VisualGroundingPipeline"


def test_pipeline_does_not_run_foreign_code_of_config(saved, tmp_path):
    path = saved / "config.json"
    config = json.loads(path.read_text())
    (saved / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config["custom_pipelines"]["visual-grounding"]["impl"] = "evil.Evil"
    path.write_text(json.dumps(config))
    for trusted in (None, True):
        ground = pipeline("visual-grounding", model=str(saved), trust_remote_code=trusted)
        assert type(ground) is VisualGroundingPipeline
    assert not (tmp_path / "ran").exists()


def test_config_of_other_version_warns(saved, run):
    path = saved / "config.json"
    config = json.loads(path.read_text())
    assert config["reftr_version"] == modeling_reftr.__version__
    code = "import sys; from modeling_reftr import RefTRConfig; RefTRConfig.from_pretrained(sys.argv[1])"
    assert "saved by version" not in run("-c", code, saved).stderr
    path.write_text(json.dumps({**config, "reftr_version": "9.9.9"}))
    warning = run("-c", code, saved).stderr
    assert f"saved by version 9.9.9 of RefTR's code, and is read by version {modeling_reftr.__version__}" in warning
