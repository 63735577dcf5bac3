"""Exported graphs, which run without this project's code, and eight-bit weights."""

import dataclasses
import json

import numpy as np
import onnxruntime
import pytest
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from PIL import Image
from transformers.exporters.base import ExportedModel

from modeling_reftr import RefTRForVisualGrounding, RefTRProcessor
from modeling_reftr.modeling_reftr import RefTRVisualGroundingOutput
from reftr_cli.graph_export import compare_outputs, export, make_inputs
from tests.helpers.documents import blocks_of
from tests.helpers.tiny import ROOT
from tests.modeling_reftr.test_inference import TIMM


BACKBONE = {"backbone": "test_resnet", "out_indices": [1, 2, 3, 4]}


@pytest.fixture
def checkpoint(make_model, processor, tmp_path):
    model = make_model(backbone_config=BACKBONE, predict_masks=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)  # the exporter leaves out biases of zero
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_export_command_writes_onnx_graph_equal_to_model(checkpoint, tmp_path, run):
    """The command writes the graph, which then reads other numbers and sizes of images and texts."""
    folder = tmp_path / "runs" / "demo-onnx"
    printed = run("-m", "reftr_cli", "export", "--model", checkpoint, "--output", folder).stdout
    assert json.loads(printed)["largest_differences"].keys() == {"pred_boxes", "pred_masks"}

    assert_graph_accepts_processor_output(folder)
    exported = ExportedModel.from_pretrained(folder)
    processor = RefTRProcessor.from_pretrained(folder)
    model = RefTRForVisualGrounding.from_pretrained(checkpoint).eval()
    for sizes, texts in (
        ([(50, 40)], [["the red circle"]]),
        ([(64, 64), (90, 30), (31, 77)], [["the star", "the large blue square above it"], ["red"], ["a", "b", "c d"]]),
    ):
        images = [Image.effect_noise(size, 90).convert("RGB") for size in sizes]
        inputs = processor(images, texts)
        answers = exported(**inputs)
        with torch.no_grad():
            expected = model(**inputs)
        torch.testing.assert_close(answers.pred_boxes, expected.pred_boxes, atol=1e-4, rtol=0)
        torch.testing.assert_close(answers.pred_masks, expected.pred_masks, atol=1e-4, rtol=1e-4)
        found = processor.post_process_referring_segmentation(answers, [size[::-1] for size in sizes])
        assert [masks["masks"].shape[0] for masks in found] == [1] * sum(map(len, texts))


def assert_graph_accepts_processor_output(folder):
    """Check names, axes and eight-bit weights of the graph in ONNX Runtime, fed with the processor's output."""
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    processor = RefTRProcessor.from_pretrained(folder)
    images = [Image.effect_noise(size, 90).convert("RGB") for size in [(64, 48), (40, 60), (90, 20)]]
    inputs = dict(processor(images, [["the red circle", "star"], ["red"], ["a blue square"]], return_tensors="np"))
    names = [value.name for value in session.get_outputs()]
    found = dict(zip(names, session.run(None, inputs), strict=True))
    assert {value.name for value in session.get_inputs()} == set(inputs)
    fields = {field.name for field in dataclasses.fields(RefTRVisualGroundingOutput)}
    repeated = {name for name in names if name.startswith("output.")}
    assert {name.removeprefix("output.") for name in repeated} <= set(inputs)
    assert {name.split(".")[0] for name in set(names) - repeated} <= fields
    assert {"pred_boxes", "pred_masks", "phrase_mask", "last_hidden_state"} <= set(names)
    axes = {value.name: value.shape for value in (*session.get_inputs(), *session.get_outputs())}
    assert axes["pixel_values"] == ["images", 3, "height", "width"]
    assert axes["input_ids"] == ["sentences", "tokens"]
    assert axes["image_index"] == ["sentences"]
    assert axes["pred_boxes"] == ["sentences", 1, 4]
    assert "height" in axes["pred_masks"][2]
    meta = session.get_modelmeta()
    assert (meta.producer_name, meta.description[:6]) == ("modeling_reftr", "RefTR ")
    assert meta.custom_metadata_map == {"task": "visual-grounding", "text": "sentences"}

    quantize_dynamic(folder / "model.onnx", folder / "small.onnx", weight_type=QuantType.QInt8)
    small = onnxruntime.InferenceSession(folder / "small.onnx")
    (boxes,) = small.run(["pred_boxes"], inputs)
    assert not np.array_equal(boxes, found["pred_boxes"])
    np.testing.assert_allclose(boxes, found["pred_boxes"], atol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "dynamo"])
@pytest.mark.parametrize("phrases", [False, True])
def test_exported_graph_of_every_target_equals_model(make_model, tmp_path, target, phrases):
    model = make_model(backbone_config=BACKBONE, predict_masks=True)
    exported = export(model, target, phrases)
    exported.save_pretrained(tmp_path)
    sizes = {"images": 1, "sentences": 2, "tokens": 6, "phrases": 3, "phrase_tokens": 5, "height": 96, "width": 64}
    inputs = make_inputs(model, sizes, phrases)
    if target == "onnx":
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        assert {value.name for value in session.get_inputs()} == set(inputs)
        assert session.get_modelmeta().custom_metadata_map["text"] == ("phrases" if phrases else "sentences")
        session.run(None, {name: value.numpy() for name, value in inputs.items()})
    else:
        exported.program.module()(**inputs)
    found = compare_outputs(ExportedModel.from_pretrained(tmp_path, trust_remote_code=True), model, phrases)
    assert max(found.values()) < 1e-4


@pytest.mark.slow
def test_export_names_remedy_for_unsupported_dynamo_model(make_model, processor, tmp_path, run):
    make_model(backbone_config=TIMM).save_pretrained(tmp_path / "model")  # its pooling rounds sizes up
    processor.save_pretrained(tmp_path / "model")
    flags = ("--model", tmp_path / "model", "--output", tmp_path / "program", "--format", "dynamo")
    error = run("-m", "reftr_cli", "export", *flags, check=False).stderr
    assert "use --format onnx" in error


@pytest.mark.slow
def test_eight_bit_weights_give_similar_boxes(checkpoint, processor, tmp_path, monkeypatch):
    pytest.importorskip("torchao")  # every process that finds it installed imports it, for seconds
    (tmp_path / "runs").mkdir()
    checkpoint.rename(tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in blocks_of(ROOT / "docs" / "serve.md") if "torchao" in block.code]
    names = {"RefTRForVisualGrounding": RefTRForVisualGrounding}
    exec(block.code, names)
    model = RefTRForVisualGrounding.from_pretrained("runs/demo").eval()
    inputs = processor(Image.effect_noise((64, 48), 90).convert("RGB"), ["the red circle", "the star"])
    with torch.no_grad():
        boxes, expected = names["small"].fused_copy()(**inputs).pred_boxes, model(**inputs).pred_boxes
    assert not torch.equal(boxes, expected)
    torch.testing.assert_close(boxes, expected, atol=0.02, rtol=0)
