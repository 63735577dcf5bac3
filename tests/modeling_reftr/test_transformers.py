"""RefTR as a transformers model: attention, precision, compilation, Auto classes, pipeline, loading, fine-tuning."""

import copy
import json
import math
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AutoModel, AutoModelForZeroShotObjectDetection, Trainer, TrainingArguments, pipeline
from transformers.modeling_utils import local_torch_dtype

from modeling_reftr import RefTRConfig, RefTRForVisualGrounding, RefTRModel, RefTRProcessor
from modeling_reftr.fusing_reftr import fold_batch_norms
from tests.modeling_reftr.test_modeling import assert_same_boxes, model_inputs, single_inputs
from training_reftr.data import GroundingCollator


@pytest.fixture
def batch(shapes, processor):
    """Collate three images with their sentences, one phrase or several, and labels."""
    return GroundingCollator(processor, with_targets=False, with_masks=True)(
        [shapes["test"][index] for index in range(3)]
    )


@pytest.fixture(params=["single", "several_phrases"])
def inputs(request, batch, processor, shapes):
    return single_inputs(processor, shapes) if request.param == "single" else model_inputs(batch)


@pytest.fixture
def checkpoint(make_model, processor, tmp_path):
    """Save a model and its processor; return the folder and the model."""
    model = make_model()
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint", model


# attention and precision


# a convolutional backbone has no attention, and the timm wrapper of transformers accepts only eager and sdpa
FLEX = {"": "flex_attention", "text_config": "flex_attention", "backbone_config": "sdpa"}


@pytest.mark.parametrize("attention", ["sdpa", pytest.param(FLEX, id="flex", marks=pytest.mark.slow)])
def test_attention_implementations_agree(inputs, make_model, attention):
    model = make_model()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**inputs)
        model.set_attn_implementation(attention)
        assert_same_boxes(model(**inputs), expected)


def test_gradient_checkpointing_gives_same_gradients(batch, make_model):
    gradients = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.model.encoder.layers[0].gradient_checkpointing
        model(**batch).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_model_in_half_precision_gives_close_boxes_and_loss(batch, make_model, dtype):
    expected = make_model()(**batch)
    outputs = make_model().to(dtype)(**batch)
    assert outputs.pred_boxes.dtype == outputs.loss.dtype == torch.float32
    assert outputs.last_hidden_state.dtype == dtype
    assert not torch.equal(outputs.pred_boxes, outputs.pred_boxes.to(dtype).float()), "the sigmoid must not round"
    real = outputs.phrase_mask
    assert (outputs.pred_boxes - expected.pred_boxes)[real].abs().max() < 0.05
    assert outputs.loss.item() == pytest.approx(expected.loss.item(), rel=0.05)


def test_image_positions_are_computed_in_float32(make_model):
    """Angles of distant cells differ in float32, but bfloat16 would round them to the same value."""
    mask = torch.ones(1, 40, 40, dtype=torch.bool)
    model = make_model()
    expected = model.model.image_position_embedding(mask)
    positions = model.to(torch.bfloat16).model.image_position_embedding(mask)
    assert positions.dtype == torch.float32
    assert torch.equal(positions, expected)


# the graph with masks contains the other one
@pytest.mark.parametrize("predict_masks", [pytest.param(False, marks=pytest.mark.slow), True])
def test_model_compiles_to_one_graph(inputs, batch, make_model, predict_masks):
    model = make_model(predict_masks=predict_masks)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if "phrase_index" in inputs:
        inputs = batch  # the labels add the loss to the graph
    with torch.no_grad():
        outputs, expected = compiled(**inputs), model(**inputs)
    assert_same_boxes(outputs, expected)
    if predict_masks:
        torch.testing.assert_close(outputs.pred_masks, expected.pred_masks, atol=1e-4, rtol=0)
    assert outputs.loss == pytest.approx(expected.loss)


class SynchronizationRecorder(TorchDispatchMode):
    """Record operations whose result the host requires from the device: data-dependent sizes or values."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        indices = arguments[1] if function.name().startswith(("aten::index", "aten::_index_put")) else ()
        if any(part in function.name() for part in ("_local_scalar_dense", "nonzero", "masked_select", "unique")) or (
            isinstance(indices, (list, tuple))
            and any(index is not None and index.dtype == torch.bool for index in indices)
        ):
            self.seen.append(function.name())
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("mask_settings", [{}, {"predict_masks": True, "mask_loss_over_padding": False}])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_forward_and_loss_do_not_synchronize_device(batch, make_model, attention, mask_settings):
    model = make_model(**mask_settings)
    model.set_attn_implementation(attention)
    with SynchronizationRecorder() as recorder:
        model(**batch)
    assert recorder.seen == []
    with SynchronizationRecorder() as recorder:  # the check can fail
        model(**{name: value for name, value in batch.items() if name != "phrase_index"})
    assert "aten::nonzero" in recorder.seen


class HostRecorder(TorchDispatchMode):
    """Record operations with a tensor on the host as input or output."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        tensors = [value for value in tree_leaves((arguments, keywords, result)) if isinstance(value, torch.Tensor)]
        if any(tensor.device.type == "cpu" for tensor in tensors):
            self.seen.append(function.name())
        return result


@pytest.mark.parametrize("settings", [{}, {"predict_masks": True, "mask_loss_over_padding": False}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_and_loss_stay_on_gpu(batch, make_model, dtype, settings):
    """
    Use a fake GPU: tensors have sizes and devices but no values. Mixed devices and synchronization are errors, and a
    CUDA graph accepts no tensor on the host.
    """

    def to_fake(value):
        return torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value

    with FakeTensorMode(), torch.device("cuda"):
        with local_torch_dtype(dtype):
            model = make_model(**settings)
        inputs = tree_map(to_fake, dict(batch))
        for is_training in (True, False):
            model.train(is_training)
            if not is_training:  # fake tensors cannot be copied: norms are folded in place, as in a fused copy
                fold_batch_norms(model.model.backbone)
            with HostRecorder() as recorder:
                outputs = model(**inputs)
            assert outputs.last_hidden_state.dtype == dtype
            assert outputs.loss.device.type == outputs.pred_boxes.device.type == "cuda"
            assert outputs.loss.dtype == outputs.pred_boxes.dtype == torch.float32
            assert outputs.pred_boxes.shape == (*batch["input_ids"].shape[:1], batch["phrase_spans"].shape[1], 4)
            assert recorder.seen == []
        with pytest.raises(DynamicOutputShapeException):  # the host would wait for the number of phrases
            model(**{name: value for name, value in inputs.items() if name != "phrase_index"})
        with pytest.raises(RuntimeError, match="device"):
            model(**{**inputs, "pixel_mask": inputs["pixel_mask"].cpu()})
        with HostRecorder() as recorder:
            inputs["pixel_values"].cpu()
        assert recorder.seen == ["aten::_to_copy"]


def test_model_gives_same_boxes_without_phrase_index(batch, make_model):
    model, inputs = make_model(), model_inputs(batch)
    index = inputs.pop("phrase_index")
    assert len(index) < inputs["phrase_input_ids"].shape[:2].numel()
    assert_same_boxes(model(**inputs, phrase_index=index), model(**inputs))
    with pytest.raises(ValueError, match="phrase_index"):
        model(**inputs, phrase_index=index[:, 0])


# Auto classes and code on the Hub


def test_import_registers_auto_classes_and_pipeline(run, checkpoint):
    code = """
import sys, modeling_reftr
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForZeroShotObjectDetection, AutoProcessor, pipelines,
)
config = AutoConfig.for_model(
    "reftr", backbone_config={"backbone": "test_resnet", "out_indices": [1, 2, 3, 4]}, encoder_layers=1,
    text_config={"model_type": "bert", "num_hidden_layers": 1},
)
assert type(config) is modeling_reftr.RefTRConfig
assert type(AutoModel.from_config(config)) is modeling_reftr.RefTRModel
assert type(AutoModelForZeroShotObjectDetection.from_config(config)) is modeling_reftr.RefTRForVisualGrounding
assert type(AutoProcessor.from_pretrained(sys.argv[1])) is modeling_reftr.RefTRProcessor
assert type(AutoImageProcessor.from_pretrained(sys.argv[1])) is modeling_reftr.RefTRImageProcessor
assert "visual-grounding" in pipelines.PIPELINE_REGISTRY.supported_tasks
"""
    run("-c", code, checkpoint[0])


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(
            "from transformers import AutoModel; from modeling_reftr import RefTRModel", marks=pytest.mark.slow
        ),
        "import modeling_reftr; from transformers import AutoModel; from modeling_reftr import RefTRModel",
        pytest.param(
            "from modeling_reftr.modeling_reftr import RefTRModel; from transformers import AutoModel",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_auto_classes_are_registered_in_any_import_order(run, code):
    run("-c", f"{code}\nassert RefTRModel in AutoModel._model_mapping._extra_content.values()")


def test_saved_folder_loads_without_package(checkpoint, shapes, tmp_path, run):
    """Load in a clean process from the code of the folder, bit-equal, and again from what that process saves."""
    folder, _ = checkpoint
    image_path = tmp_path / "image.png"
    shapes["test"][0]["image"].save(image_path)
    code = """
import sys, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForZeroShotObjectDetection, AutoProcessor
folder, image_path, out = sys.argv[1:]
for number in range(2):
    model = AutoModelForZeroShotObjectDetection.from_pretrained(folder, trust_remote_code=True)
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(Image.open(image_path), ["the red circle", "the star"])
    with torch.no_grad():
        torch.save([model(**inputs).pred_boxes, base(**inputs).last_hidden_state], f"{out}{number}.pt")
    assert not any(name.startswith("modeling_reftr") for name in sys.modules), "our package was imported"
    folder = f"{out}again"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
"""
    out = tmp_path / "answers"
    run("-I", "-c", code, folder, image_path, out, cwd=tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules"))
    loaded, base = (
        RefTRForVisualGrounding.from_pretrained(folder),
        RefTRModel.from_pretrained(folder),
    )
    inputs = RefTRProcessor.from_pretrained(folder)(Image.open(image_path), ["the red circle", "the star"])
    with torch.no_grad():
        expected = [loaded(**inputs).pred_boxes, base(**inputs).last_hidden_state]
    for number in range(2):
        answers = torch.load(tmp_path / f"answers{number}.pt", weights_only=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(answers, expected, strict=True))


def test_zero_shot_detection_pipeline_returns_boxes_of_model(checkpoint, shapes):
    folder, model = checkpoint
    image = shapes["test"][0]["image"]
    detector = pipeline("zero-shot-object-detection", model=str(folder))
    answers = detector(image, candidate_labels=["the red circle", "the star"])
    assert [answer["label"] for answer in answers] == ["the red circle", "the star"]
    assert [answer["score"] for answer in answers] == [1.0, 1.0]
    processor = RefTRProcessor.from_pretrained(folder)
    inputs = processor(image, ["the red circle", "the star"])
    boxes = processor.post_process_grounding(model(**inputs), [(64, 64)])
    for answer, expected in zip(answers, boxes, strict=True):
        assert list(answer["box"].values()) == pytest.approx(expected["boxes"][0].tolist(), abs=1.01)
    assert detector(image, candidate_labels=["the star"], threshold=1.0) == []


def test_model_ignores_token_type_ids(inputs, make_model):
    model = make_model()
    outputs = model(**inputs, token_type_ids=torch.ones_like(inputs["input_ids"]))
    assert_same_boxes(outputs, model(**inputs))


# loading


def remove_weights(folder, part):
    """Remove the weights whose names contain a part."""
    weights = {name: value for name, value in load_file(folder / "model.safetensors").items() if part not in name}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("missing", ["box_head", "decoder.layers.1", "level_embedding"])
def test_partial_checkpoint_initializes_only_missing_weights(checkpoint, missing):
    folder, model = checkpoint
    remove_weights(folder, missing)
    loaded, report = RefTRForVisualGrounding.from_pretrained(folder, output_loading_info=True)
    assert report["missing_keys"] == {name for name in model.state_dict() if missing in name}
    for name, value in loaded.state_dict().items():
        assert value.isfinite().all()
        if missing not in name:
            assert torch.equal(value, model.state_dict()[name]), name
    if missing == "box_head":
        assert not loaded.box_head.layers[-1].weight.any()
        assert loaded.box_head.layers[0].weight.abs().max().item() == pytest.approx(32**-0.5, rel=0.05)
    elif missing == "level_embedding":
        assert loaded.model.level_embedding.std().item() == pytest.approx(1, rel=0.4)
    else:
        fresh = loaded.model.decoder.layers[1].mlp.fc1.weight
        assert fresh.abs().max().item() == pytest.approx(math.sqrt(6 / (32 + 64)), rel=0.05)


def test_base_model_and_head_load_each_other(checkpoint, tmp_path):
    folder, model = checkpoint
    base = AutoModel.from_pretrained(folder)
    assert type(base) is RefTRModel
    assert all(torch.equal(value, model.model.state_dict()[name]) for name, value in base.state_dict().items())
    base.save_pretrained(tmp_path / "base")
    with_head, report = AutoModelForZeroShotObjectDetection.from_pretrained(
        tmp_path / "base", output_loading_info=True
    )
    assert all(name.startswith("box_head.") for name in report["missing_keys"])
    assert torch.equal(with_head.model.level_embedding, model.model.level_embedding)


def test_mismatched_sizes_are_refused_unless_ignored(checkpoint):
    folder, model = checkpoint
    config = RefTRConfig.from_pretrained(folder)
    config.max_text_positions = 20
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        RefTRForVisualGrounding.from_pretrained(folder, config=config)
    loaded = RefTRForVisualGrounding.from_pretrained(folder, config=config, ignore_mismatched_sizes=True)
    assert loaded.model.text_position_embeddings.weight.shape == (20, 32)
    assert torch.equal(loaded.box_head.layers[0].weight, model.box_head.layers[0].weight)


def test_model_loads_shards_dtype_and_device_map(batch, make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = RefTRForVisualGrounding.from_pretrained(tmp_path, device_map="auto")
    assert_same_boxes(loaded(**batch), model(**batch))
    half = RefTRForVisualGrounding.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_resized_text_embeddings_keep_answers_after_saving(batch, make_model, tmp_path):
    model = make_model()
    size = model.config.text_config.vocab_size + 5
    expected = model(**batch)
    assert model.resize_token_embeddings(size).num_embeddings == size
    assert model.config.text_config.vocab_size == size
    assert_same_boxes(model(**batch), expected)
    model.save_pretrained(tmp_path)
    assert_same_boxes(RefTRForVisualGrounding.from_pretrained(tmp_path)(**batch), expected)


# fine-tuning with peft and Trainer


def test_lora_trains_and_merges(batch, make_model):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=r".*(encoder|decoder).*\.(q_proj|v_proj)"))
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(10):
        loss = tuned(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    expected = tuned(**batch)
    merged = tuned.merge_and_unload()
    assert type(merged) is RefTRForVisualGrounding
    assert_same_boxes(merged(**batch), expected)
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.endswith(("q_proj.weight", "v_proj.weight")) for name in changed)


def test_transformers_trainer_lowers_loss(shapes, processor, make_model, tmp_path):
    model = make_model()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        remove_unused_columns=False,
        prediction_loss_only=True,
        label_names=["labels"],
        logging_steps=1,
        report_to=[],
        use_cpu=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=shapes["train"],
        eval_dataset=shapes["validation"],
        data_collator=GroundingCollator(processor, with_targets=False),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert json.loads((tmp_path / "checkpoint-12" / "config.json").read_text())["model_type"] == "reftr"
    shutil.rmtree(tmp_path / "checkpoint-12")
