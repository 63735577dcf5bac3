"""Features of the extras of setup.cfg work with their lowest versions."""

import sys

from test_commands import IMAGE, REFTR, ROOT, folder, run, trained  # noqa: F401 -- fixtures


def test_exported_model_answers_on_onnx_runtime(trained, folder):  # noqa: F811 -- a fixture
    run(REFTR, "export", "--model", "model", "--output", "graph", cwd=folder)
    code = (
        "import sys, onnxruntime; from PIL import Image; from modeling_reftr import RefTRProcessor;"
        "inputs = RefTRProcessor.from_pretrained('graph')(Image.open(sys.argv[1]), ['red'], return_tensors='np');"
        "print(onnxruntime.InferenceSession('graph/model.onnx').run(['pred_boxes'], dict(inputs))[0].shape)"
    )
    assert run(sys.executable, "-c", code, IMAGE, cwd=folder).stdout.strip() == "(1, 1, 4)"


def test_space_page_is_built(trained, folder):  # noqa: F811 -- a fixture
    code = "import sys; sys.path.insert(0, sys.argv[1]); import app; print(type(app.build_app('model')).__name__)"
    environment = {"GRADIO_ANALYTICS_ENABLED": "False"}
    assert run(sys.executable, "-c", code, ROOT / "demo", cwd=folder, **environment).stdout.strip() == "UploadsOnly"


def test_model_loads_with_int8_weights(trained, folder):  # noqa: F811 -- a fixture
    code = (
        "import torch; from torchao.quantization import Int8DynamicActivationInt8WeightConfig as Int8;"
        "from transformers import TorchAoConfig; from modeling_reftr import RefTRForVisualGrounding as Model;"
        "model = Model.from_pretrained('model', quantization_config=TorchAoConfig(Int8()));"
        "print(any('torchao' in type(weight).__module__ for weight in model.parameters()))"
    )
    assert run(sys.executable, "-c", code, cwd=folder).stdout.strip() == "True"


def test_openmoji_objects_are_pasted(folder):  # noqa: F811 -- a fixture
    flags = [flag for split in ("train", "validation", "test") for flag in (f"--num_{split}", "2")]
    flags += ["--objects", "openmoji", "--cache_dir", "cache"]
    assert run(REFTR, "data", "check", "cutouts", *flags, cwd=folder).stdout.endswith("0 errors, 0 warnings.\n")
