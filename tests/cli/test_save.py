"""`reftr predict --save`: answers in formats of evaluations and annotation tools, read by their own libraries."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import data_scripts
from data_scripts.importing import import_files
from data_scripts.label_studio import encode_brush
from modeling_reftr import RefTRConfig, RefTRForVisualGrounding, RefTRImageProcessor, RefTRProcessor
from modeling_reftr.rle_reftr import from_coco_rle
from reftr_cli.__main__ import main
from tests.cli.test_command_line import error_of
from tests.helpers.documents import blocks_of
from tests.helpers.tiny import ROOT, TINY_MODEL, TINY_TEXT


CAPTION = "the circle and the star"


@pytest.fixture(scope="module")
def folder(shapes, tokenizer, tmp_path_factory):
    """Write a model that predicts masks, two images, and questions about them."""
    folder = tmp_path_factory.mktemp("save")
    torch.manual_seed(0)
    text_config = {**TINY_TEXT, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    model = RefTRForVisualGrounding(RefTRConfig(**TINY_MODEL, text_config=text_config, predict_masks=True))
    torch.nn.init.normal_(model.box_head.layers[-1].weight, std=0.5)  # else all boxes are equal
    model.save_pretrained(folder / "model")
    image_processor = RefTRImageProcessor(size={"shortest_edge": 64, "longest_edge": 64})
    RefTRProcessor(image_processor, tokenizer).save_pretrained(folder / "model")
    shapes["test"][0]["image"].save(folder / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # upright it is 30 x 40
    Image.effect_noise((40, 30), 90).convert("RGB").save(folder / "turned é.jpg", exif=exif)
    questions = [
        {"image": "a.png", "text": ["the star", "ein Würfel ☕"], "image_id": 10, "category_id": 2},
        {"image": "turned é.jpg", "text": CAPTION, "phrases": ["the star", "the circle"], "image_id": 20},
        {"image": "a.png", "text": "the square " * 60, "phrases": [[0, 10], [650, 659]], "image_id": 10},
    ]
    (folder / "questions.jsonl").write_text("".join(f"{json.dumps(item)}\n" for item in questions))
    return folder


def predict(folder, *argv, image="questions.jsonl"):
    argv = ("predict", "--model", folder / "model", "--image", folder / image, *argv)
    return main([str(argument) for argument in argv])


@pytest.fixture(scope="module")
def saved(folder):
    """Save the answers in every format, and return the content of the files and the printed answers."""
    formats = {"coco_results": ".json", "label_studio": ".json", "odvg": ".jsonl", "jsonl": ".jsonl"}
    argv = [item for name, end in formats.items() for item in ("--save", name, folder / "out" / f"{name}{end}")]
    with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.redirect_stderr(io.StringIO()) as stderr:
        predict(folder, *argv)
    printed, errors = stdout.getvalue(), stderr.getvalue()
    content = {}
    for name, end in formats.items():
        text = (folder / "out" / f"{name}{end}").read_text(encoding="utf-8")
        content[name] = [json.loads(line) for line in text.splitlines()] if end == ".jsonl" else json.loads(text)
    assert len(list((folder / "out").iterdir())) == len(formats)
    answers = [answer for line in printed.splitlines() for answer in json.loads(line)["answers"]]
    return {**content, "answers": answers, "errors": errors}


def test_coco_results_are_read_and_scored_by_pycocotools(saved, folder):
    answered = [answer for answer in saved["answers"] if answer["box"] is not None]
    assert len(answered) == len(saved["answers"]) - 1
    results = saved["coco_results"]
    assert [item["label"] for item in results] == [answer["label"] for answer in answered]
    assert [(item["image_id"], item["category_id"]) for item in results] == [(10, 2)] * 2 + [(20, 1)] * 2 + [(10, 1)]
    for item, answer in zip(results, answered, strict=True):
        x, y, width, height = item["bbox"]
        assert [x, y, x + width, y + height] == pytest.approx(answer["box"])
        assert item["segmentation"] == answer["segmentation"]
    # the answers as ground truth: every one of them is found
    truth = {
        "images": [{"id": 10, "width": 64, "height": 64}, {"id": 20, "width": 30, "height": 40}],
        "categories": [{"id": 1, "name": "object"}, {"id": 2, "name": "shape"}],
        "annotations": [
            {**item, "id": number, "iscrowd": 0, "area": item["bbox"][2] * item["bbox"][3]}
            for number, item in enumerate(results, start=1)
        ],
    }
    (folder / "truth.json").write_text(json.dumps(truth))
    api = COCO(str(folder / "truth.json"))
    loaded = api.loadRes(str(folder / "out" / "coco_results.json"))
    assert (loaded.annToMask(loaded.loadAnns(3)[0]) == from_coco_rle(results[2]["segmentation"])).all()
    for kind in ("bbox", "segm"):
        evaluation = COCOeval(api, loaded, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert evaluation.stats[1] == pytest.approx(1), kind


def test_phrases_without_an_answer_are_counted(saved):
    lines = saved["errors"].splitlines()
    assert len([line for line in lines if "1 phrases past the end of a truncated text" in line]) == 4


def test_label_studio_predictions_are_percent_with_words_and_masks(saved, folder):
    first, second = saved["label_studio"]
    assert first["data"]["image"].startswith("/data/local-files/?d=")
    assert second["data"]["image"].endswith("/turned%20%C3%A9.jpg")
    (prediction,) = second["predictions"]
    assert prediction["model_version"] == "model"
    by_type = {}
    for result in prediction["result"]:
        by_type.setdefault(result["type"], []).append(result)
        assert (result["original_width"], result["original_height"], result["image_rotation"]) == (30, 40, 0)
    answers = saved["answers"][2:4]
    for region, words, mask, answer in zip(
        by_type["rectanglelabels"], by_type["textarea"], by_type["brushlabels"], answers, strict=True
    ):
        assert region["id"] == words["id"] != mask["id"]
        assert words["value"]["text"] == [answer["label"]]
        value = region["value"]
        x0, y0, x1, y1 = np.clip(answer["box"], 0, [30, 40, 30, 40])
        expected = [x0 / 0.3, y0 / 0.4, (x1 - x0) / 0.3, (y1 - y0) / 0.4]
        assert [value[name] for name in ("x", "y", "width", "height")] == pytest.approx(expected)
        assert mask["value"]["rle"] == encode_brush(from_coco_rle(answer["segmentation"]))


def accept(tasks):
    """Return tasks whose predictions are annotations, as Label Studio exports them when they are accepted."""
    return [{"data": task["data"], "annotations": task["predictions"]} for task in tasks]


@pytest.mark.parametrize("name", ["label_studio", "odvg", "jsonl"])
def test_saved_answers_are_read_back(saved, folder, name, tmp_path):
    cache, base = str(tmp_path / "cache"), folder.parent
    path = folder / "out" / f"{name}.jsonl"
    if name == "label_studio":
        path = tmp_path / "export.json"
        path.write_text(json.dumps(accept(saved[name])))
    if name == "jsonl":
        flags = {"path": str(path), "image_dir": "/", "allow_outside_paths": True}
        rows = data_scripts.load("jsonl", "train", cache_dir=cache, **flags)
    else:
        import_files(name, {"train": [path]}, tmp_path / "in", image_dir=base)
        flags = {"data_dir": str(tmp_path / "in"), "image_dir": str(base)}
        rows = data_scripts.load("jsonl", "train", cache_dir=cache, **flags)
    found = [
        (sentence["text"][phrase["start"] : phrase["end"]], row["objects"][phrase["objects"][0]]["box"])
        for row in rows
        for sentence in row["sentences"]
        for phrase in sentence["phrases"]
    ]
    sizes = {"a": (64, 64), "turned é": (30, 40)}
    assert [(row["width"], row["height"]) for row in rows] == list(sizes.values())
    answers = [*saved["answers"][:2], saved["answers"][4], *saved["answers"][2:4]]
    expected = [
        (answer["label"], np.clip(answer["box"], 0, 2 * ((30, 40) if answer in saved["answers"][2:4] else (64, 64))))
        for answer in answers
    ]
    assert [words for words, _ in found] == [words for words, _ in expected]
    np.testing.assert_allclose([box for _, box in found], [box for _, box in expected], atol=1e-3)


def test_one_image_is_saved_too(folder, tmp_path, capsys):
    path = tmp_path / "one.json"
    predict(folder, "--text", "the star", "--save", "coco_results", path, image="a.png")
    (result,) = json.loads(path.read_text())
    assert (result["image_id"], result["category_id"], result["label"]) == (1, 1, "the star")
    (answer,) = json.loads(capsys.readouterr().out)
    assert result["segmentation"] == answer["segmentation"]


def test_save_names_wrong_arguments(folder, tmp_path):
    def refused(*argv, image="a.png"):
        arguments = ("predict", "--model", folder / "model", "--image", folder / image, *argv)
        return error_of(*(str(argument) for argument in arguments))

    assert "'coco' is not a format to write here; use one of jsonl, odvg, coco_results, label_studio" in refused(
        "--text", "a", "--save", "coco", tmp_path / "a.json"
    )
    assert "is a folder; expected the name of a file" in refused("--text", "a", "--save", "odvg", tmp_path)
    for ids, error in (
        ((1, None), "has no image_id, and others have one"),
        (("1", "2"), "image_id of a question is '1'; expected an integer"),
    ):
        lines = [{"image": "a.png", "text": "a", **({"image_id": value} if value else {})} for value in ids]
        (folder / "bad.jsonl").write_text("\n".join(map(json.dumps, lines)))
        assert error in refused("--save", "coco_results", tmp_path / "a.json", image="bad.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_failed_questions_are_not_in_saved_files(folder, tmp_path, capsys):
    lines = ['{"image": "a.png", "text": "the star"}', '{"image": "none.png", "text": "the star"}', "{}"]
    (folder / "failing.jsonl").write_text("\n".join(lines))
    with pytest.raises(SystemExit, match="2 of 3 questions failed"):
        predict(folder, "--save", "coco_results", tmp_path / "a.json", image="failing.jsonl")
    assert len(json.loads((tmp_path / "a.json").read_text())) == 1


# the libraries of the tools; `make test-oracles` installs them


def test_label_studio_library_decodes_masks_and_accepts_predictions(saved):
    brush = pytest.importorskip("label_studio_sdk.converter.brush")
    from label_studio_sdk.label_interface import LabelInterface

    (config,) = [
        block.code
        for block in blocks_of(ROOT / "docs" / "your_own_pictures.md")
        if block.language == "text" and block.code.startswith("<View>")
    ]
    interface = LabelInterface(config)
    for task in saved["label_studio"]:
        for prediction in task["predictions"]:
            assert interface.validate_prediction(prediction), interface.validate_prediction(prediction, True)
    masks = [
        result
        for task in saved["label_studio"]
        for result in task["predictions"][0]["result"]
        if result["type"] == "brushlabels"
    ]
    answers = [*saved["answers"][:2], saved["answers"][4], *saved["answers"][2:4]]
    for result, answer in zip(masks, answers, strict=True):
        size = (result["original_height"], result["original_width"], 4)
        decoded = brush.decode_rle(result["value"]["rle"]).reshape(size)
        assert (decoded == 255 * from_coco_rle(answer["segmentation"])[:, :, None]).all()


def test_snippet_makes_detections_of_supervision(folder):
    supervision = pytest.importorskip("supervision")
    from modeling_reftr import VisualGroundingPipeline

    (code,) = [
        block.code
        for block in blocks_of(ROOT / "docs" / "serve.md")
        if block.language == "python" and "sv." in block.code
    ]
    model = RefTRForVisualGrounding.from_pretrained(folder / "model")
    pipe = VisualGroundingPipeline(model, processor=RefTRProcessor.from_pretrained(folder / "model"))
    for texts in (["the star", "the circle"], ["the star"]):
        answers = pipe(folder / "turned é.jpg", text=texts)
        names = {"answers": answers}
        exec(code, names)
        detections = names["detections"]
        assert isinstance(detections, supervision.Detections)
        assert detections.xyxy.tolist() == [pytest.approx(list(answer["box"].values())) for answer in answers]
        assert detections.mask.shape == (len(texts), 40, 30)
        assert (detections.mask == [np.asarray(answer["mask"]) > 0 for answer in answers]).all()
        assert list(detections["class_name"]) == texts
        assert detections.confidence.tolist() == [1.0] * len(texts)
