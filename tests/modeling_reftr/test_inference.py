"""Faster inference gives the same answers: folded batch norms, reused image features, cached texts."""

import copy
import inspect
import json
import pickle

import pytest
import torch
from torchvision.ops import box_iou
from transformers.image_transforms import center_to_corners_format

from benchmarks import speed
from modeling_reftr import fusing_reftr, modeling_reftr
from modeling_reftr.fusing_reftr import fold_batch_norms
from tests.helpers.golden import golden_inputs, golden_model, load_case
from tests.helpers.tiny import TINY_TEXT
from tests.modeling_reftr.test_modeling import assert_same_boxes, model_inputs, single_inputs
from training_reftr.data import GroundingCollator


TIMM = {"backbone": "test_resnet", "out_indices": [1, 2, 3, 4], "output_stride": 8}
# its norms include the activations that follow them
ACTIVATING = {"backbone": "test_efficientnet", "out_indices": [1, 2, 3, 4]}
RESNET = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [16, 24, 32, 48],
    "depths": [1, 2, 1, 1],
    "layer_type": "bottleneck",
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
CONVNEXT = {
    "model_type": "convnext",
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}


@pytest.fixture
def batch(shapes, processor):
    """Collate three images with their sentences, several phrases each, and labels."""
    return GroundingCollator(processor, with_targets=False, with_masks=True)(
        [shapes["test"][index] for index in range(3)]
    )


@pytest.fixture
def single_batch(processor, shapes):
    return single_inputs(processor, shapes)


@pytest.fixture(params=["single", "several_phrases"])
def inputs(request, batch, processor, shapes):
    return single_inputs(processor, shapes) if request.param == "single" else model_inputs(batch)


def shake(model):
    """Give batch norms random values, so that none is the identity."""
    torch.manual_seed(1)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.eps = 0.1  # otherwise the effect is too small to detect
            with torch.no_grad():
                module.weight.uniform_(0.5, 2)
                module.bias.normal_()
    return model


def norms(model):
    return sum(getattr(module, "running_mean", None) is not None for module in model.modules())


@pytest.mark.parametrize(
    ("backbone", "frozen"),
    [(TIMM, True), (TIMM, False), (ACTIVATING, True), (ACTIVATING, False), (RESNET, False), (CONVNEXT, False)],
    ids=["frozen", "timm", "frozen with activation", "norm with activation", "resnet", "no batch norm"],
)
def test_fused_copy_gives_same_answer_and_leaves_model_unchanged(single_batch, make_model, tmp_path, backbone, frozen):
    model = shake(make_model(backbone_config=backbone, freeze_backbone_batch_norm=frozen, predict_masks=True))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    storage = {name: (id(value), value.data_ptr(), value.stride()) for name, value in model.named_parameters()}
    fused = model.fused_copy()
    assert fused.is_fused
    assert not model.is_fused
    assert not any(module.training for module in fused.modules())
    assert all(module.training for module in model.modules())
    assert norms(fused) == 0
    with torch.no_grad():
        answers, expected = fused(**single_batch), model.eval()(**single_batch)
    assert_same_boxes(answers, expected)
    torch.testing.assert_close(answers.pred_masks, expected.pred_masks, rtol=1e-4, atol=1e-4)
    assert not answers.pred_boxes.requires_grad

    # the copy shares no memory, and the model is unchanged
    own = {value.data_ptr() for value in (*model.parameters(), *model.buffers()) if value.numel()}
    assert not own & {value.data_ptr() for value in (*fused.parameters(), *fused.buffers())}
    assert storage == {name: (id(value), value.data_ptr(), value.stride()) for name, value in model.named_parameters()}
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def without_hooks(module):
    return not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())


def test_fused_copy_can_be_copied_and_loaded_but_not_saved(single_batch, make_model, tmp_path):
    """A fused copy has its own state dict and can be loaded, copied, pickled and cast, but not saved or trained."""
    model = shake(make_model(backbone_config=TIMM, predict_masks=True))
    fused = model.fused_copy()
    assert without_hooks(fused)
    own = {name: id(value) for name, value in fused.named_parameters()}
    state = {name: value.clone() for name, value in fused.state_dict().items()}
    assert {name: id(value) for name, value in fused.named_parameters()} == own
    with torch.no_grad():
        expected = fused(**single_batch).pred_boxes
        for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), fused.fused_copy()):
            assert copied.is_fused
            assert torch.equal(copied(**single_batch).pred_boxes, expected)
        other = shake(make_model(backbone_config=TIMM, predict_masks=True, init_xavier_std=0.5)).fused_copy()
        for parameter in other.parameters():
            parameter += 0.1
        assert not torch.equal(other(**single_batch).pred_boxes, expected)
        assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
        assert torch.equal(other(**single_batch).pred_boxes, expected)
        doubled = copy.deepcopy(fused).double()
        torch.testing.assert_close(doubled(**single_batch).pred_boxes, expected, rtol=0, atol=1e-5)
    for unfused, target in ((model, fused), (fused, model)):
        with pytest.raises(RuntimeError, match="Missing key"):
            target.load_state_dict(unfused.state_dict())
    for saved in (fused, fused.model):
        with pytest.raises(ValueError, match="save the model that it was made of"):
            saved.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    labels = [{"boxes": torch.rand(1, 4)} for _ in single_batch["input_ids"]]
    loss = fused.train()(**single_batch, labels=labels).loss
    with pytest.raises(RuntimeError, match="does not require grad"):  # a fused copy cannot be trained
        loss.backward()


@pytest.mark.slow
def test_fused_copy_compiles(single_batch, make_model):
    fused = shake(make_model(backbone_config=TIMM)).fused_copy()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(**single_batch).pred_boxes, fused(**single_batch).pred_boxes, rtol=0, atol=1e-5
        )


def test_models_override_no_module_method_except_train():
    """torch and libraries on top of it handle the models as plain modules; `freeze_grounding` requires `train`."""
    own = {"__init__", "forward", "__doc__", "__module__", "__annotations__"}
    classes = [value for value in vars(modeling_reftr).values() if inspect.isclass(value)]
    classes = [
        cls for cls in classes if issubclass(cls, torch.nn.Module) and cls.__module__ == modeling_reftr.__name__
    ]
    names = {cls.__name__: vars(cls).keys() & vars(torch.nn.Module).keys() - own for cls in classes}
    assert len(names) > 10
    assert {name: methods for name, methods in names.items() if methods} == {"RefTRForVisualGrounding": {"train"}}


class Branches(torch.nn.Module):
    """Convolutions read by a norm only, by a norm and a sum, by a norm that runs twice, and by a hook."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third, self.fourth = (torch.nn.Conv2d(3, 3, 1) for _ in range(4))
        self.alone, self.summed, self.twice, self.hooked = (torch.nn.BatchNorm2d(3) for _ in range(4))
        self.fourth.register_forward_hook(lambda module, args, output: None)

    def forward(self, pixels):
        states = self.second(self.alone(self.first(pixels)))
        states = self.hooked(self.fourth(states + self.summed(states)))
        return self.twice(self.third(states)) + self.twice(states)


class Untraceable(torch.nn.Module):
    """A condition on values, which torch.fx cannot trace, around a traceable part."""

    def __init__(self):
        super().__init__()
        self.part = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3))
        self.convolution, self.norm = torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3)

    def forward(self, pixels):
        pixels = self.part(pixels)
        return self.norm(self.convolution(pixels)) if pixels.sum() != 0 else pixels


def test_fold_batch_norms_keeps_norms_of_shared_convolutions():
    module = shake(Branches().eval())
    pixels = torch.randn(2, 3, 5, 5)
    expected = module(pixels)
    fold_batch_norms(module)
    kinds = {name: type(child) for name, child in module.named_children() if type(child) is not torch.nn.Conv2d}
    norm = torch.nn.BatchNorm2d
    assert kinds == {"alone": torch.nn.Sequential, "summed": norm, "twice": norm, "hooked": norm}
    torch.testing.assert_close(module(pixels), expected)


def test_fold_batch_norms_keeps_untraceable_norms(monkeypatch):
    module, logged = shake(Untraceable().eval()), []
    monkeypatch.setattr(fusing_reftr.logger, "warning_once", logged.append)
    pixels = torch.randn(2, 3, 5, 5)
    expected = module(pixels)
    fold_batch_norms(module)
    assert type(module.norm) is torch.nn.BatchNorm2d
    assert type(module.part[1]) is torch.nn.Sequential
    torch.testing.assert_close(module(pixels), expected)
    assert [text.partition(":")[0] for text in logged] == ["1 batch norms of Untraceable were not folded"]


@pytest.mark.parametrize("name", ["rec_bert", "multiphrase_bert", "res_bert"])
def test_fused_copy_reproduces_published_boxes_also_in_bfloat16(name):
    """The fused copy gives the published boxes; in bfloat16 they overlap with an IoU of at least 0.98."""
    case, arrays = load_case(name)
    model, inputs = golden_model(case, "sdpa").fused_copy(), golden_inputs(case, arrays)
    expected = torch.from_numpy(arrays["out.pred_boxes"][:, :, 0])
    with torch.no_grad():
        outputs = model(**inputs)
        coarse = model.to(torch.bfloat16)(**inputs)
    real = outputs.phrase_mask
    torch.testing.assert_close(outputs.pred_boxes[real], expected[real], atol=1e-5, rtol=0)
    corners = [center_to_corners_format(boxes[real]) for boxes in (coarse.pred_boxes, expected)]
    assert box_iou(*corners).diagonal().min() >= 0.98


def test_model_gives_same_answer_for_image_features(inputs, make_model):
    model = make_model(predict_masks=True)
    images = {name: inputs.pop(name) for name in ("pixel_values", "pixel_mask")}
    with torch.no_grad():
        expected = model(**images, **inputs)
        features = model.get_image_features(**images)
        answers = model(image_features=features, **inputs)
    for name in ("pred_boxes", "pred_masks", "pixel_mask", "image_index"):
        assert torch.equal(answers[name], expected[name]), name


def test_model_answers_single_texts_as_in_batch(single_batch, make_model):
    """Each image is encoded once, and each text keeps the padding of the batch."""
    model = make_model()
    with torch.no_grad():
        expected = model(**single_batch).pred_boxes
        features = model.get_image_features(single_batch["pixel_values"], single_batch["pixel_mask"])
        texts = {name: single_batch[name] for name in ("input_ids", "attention_mask", "image_index")}
        for index in range(len(expected)):
            one = {name: value[index : index + 1] for name, value in texts.items()}
            boxes = model(image_features=features, **one).pred_boxes
            torch.testing.assert_close(boxes[0], expected[index], rtol=0, atol=1e-5)


def test_processor_encodes_text_without_images(processor, shapes, make_model):
    model, rows = make_model(), [shapes["test"][index] for index in range(2)]
    images = [row["image"] for row in rows]
    with torch.no_grad():
        features = model.get_image_features(**processor.image_processor(images, return_tensors="pt"))
        for texts in (["the star"], ["a red circle"]), [["the star", "left"], ["a red circle"]]:
            encoded = processor(text=list(texts))
            assert "pixel_values" not in encoded
            assert torch.equal(
                model(image_features=features, **encoded).pred_boxes,
                model(**processor(images, list(texts))).pred_boxes,
            )
        sentence = "the star left of the circle"
        encoded = processor(text=[[sentence], ["star"]], phrases=[[["the star", "circle"]], [["star"]]])
        assert model(image_features=features, **encoded).pred_boxes.shape == (2, 2, 4)
    assert processor(text=["one", "two"])["image_index"].tolist() == [0, 0]
    assert processor(text="one")["image_index"].tolist() == [0]
    with pytest.raises(ValueError, match="give images with them"):
        processor(text="one", boxes=[[1, 2, 3, 4]])
    with pytest.raises(ValueError, match="There is no text"):
        processor(images)


def test_model_requires_either_pixels_or_image_features(single_batch, make_model):
    model = make_model()
    features = model.get_image_features(single_batch["pixel_values"])
    with pytest.raises(ValueError, match="Exactly one of `pixel_values` and `image_features`"):
        model(image_features=features, **single_batch)
    texts = {name: single_batch[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="Exactly one of `pixel_values` and `image_features`"):
        model(**texts)
    with pytest.raises(ValueError, match="`pixel_mask` belongs to `pixel_values`"):
        model(image_features=features, pixel_mask=single_batch["pixel_mask"], **texts)
    with pytest.raises(ValueError, match="give `image_index`, or one sentence per image"):
        model(image_features=features, **texts)


def test_cache_text_encodes_repeated_texts_once(inputs, make_model):
    model = make_model()
    counted = []
    model.model.text_backbone.register_forward_pre_hook(
        lambda module, args, kwargs: counted.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    with torch.no_grad():
        expected = model(**inputs)
        without = sum(counted)
        counted.clear()
        with model.cache_text():
            assert_same_boxes(model(**inputs), expected)
            first = sum(counted)
            assert_same_boxes(model(**inputs), expected)
        assert sum(counted) == first <= without
        assert_same_boxes(model(**inputs), expected)
    assert sum(counted) == first + without


def test_cache_text_when_full_stays_within_max_tokens(single_batch, make_model):
    model = make_model()
    with torch.no_grad():
        expected = model(**single_batch)
        with model.cache_text(max_tokens=9):
            for _ in range(3):
                assert_same_boxes(model(**single_batch), expected)
                cache = model.model._text_cache
                assert cache.num_tokens == sum(map(len, cache.texts)) <= 9
                assert cache.texts


def test_cache_text_ignores_padding_and_evicts_least_recent_text(make_model):
    """Padding, of any length and with any tokens, is not part of the cached text; the least recent text is evicted."""
    model, pixel_values = make_model(), torch.zeros(1, 3, 64, 64)
    first, second, third = [2, 5, 6, 3], [2, 7, 3], [2, 8, 9, 3]
    counted = []
    model.model.text_backbone.register_forward_pre_hook(lambda *_: counted.append(1))

    def ask(tokens, padding):
        input_ids = torch.tensor([[*tokens, *padding]])
        mask = torch.tensor([[1] * len(tokens) + [0] * len(padding)])
        model(pixel_values=pixel_values, input_ids=input_ids, attention_mask=mask)
        return len(counted)

    with torch.no_grad(), model.cache_text(max_tokens=8) as cache:
        assert [ask(first, []), ask(first, [0]), ask(first, [7, 7])] == [1, 1, 1]
        assert ask(second, []) == 2
        assert ask(first, []) == 2
        assert ask(third, []) == 3  # no room for all three: the second is evicted
        assert list(cache.texts) == [tuple(first), tuple(third)]


def test_cache_text_requires_no_grad_and_eval_mode(make_model):
    model = make_model()
    with pytest.raises(ValueError, match=r"torch.no_grad\(\)"), model.cache_text():
        pass
    with torch.no_grad(), pytest.raises(ValueError, match=r"model.eval\(\)"), model.train().cache_text():
        pass


FULL_SIZE = ("training_memory", "preparation", "loading")
GRAPHS = ["compiled", "evaluation_compiled", "training_compiled", "exported"]
OURS = [name for name in speed.ROWS if name not in (*FULL_SIZE, *GRAPHS)]


@pytest.mark.parametrize(
    ("rows", "count"),
    [(OURS, 2 * 5 + 1), pytest.param(GRAPHS, 2 * 3 + 1, marks=pytest.mark.slow)],
    ids=["ours", "graph"],
)
def test_speed_benchmark_writes_every_row_with_same_answers(monkeypatch, tmp_path, rows, count):
    """Run with a tiny model: compared variants give the same answers, and every row is complete."""
    small = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "projection_group_norm_groups": 8}
    small |= {"backbone_config": TIMM}
    small |= {"text_config": {**TINY_TEXT, "vocab_size": 30000, "max_position_embeddings": 128}}
    monkeypatch.setattr(speed, "CONFIG", small)
    monkeypatch.setattr(speed, "SIZES", ((48, 64), (64, 48)))
    output = tmp_path / "speed.json"
    monkeypatch.setattr("sys.argv", ["speed.py", "--rounds", "2", "--output", str(output), "--rows", *rows])
    speed.main()
    result = json.loads(output.read_text())
    assert len(result["rows"]) == count  # each in both precisions, except training
    for row in result["rows"]:
        assert row["ratio"] == pytest.approx(row["ours"] / row["published_pattern"], rel=0.05)
        if "mean_iou" in row:
            is_exact = "bfloat16" not in row["name"]
            assert row["largest_difference"] < (1e-5 if is_exact else 0.1), row


def test_speed_benchmark_keeps_finished_rows_if_one_fails(monkeypatch, tmp_path):
    def fail(device, rounds):
        raise ValueError("out of luck")

    row = speed.Row("a row", "seconds", [1.0], [2.0], {})
    monkeypatch.setattr(speed, "ROWS", {"first": (lambda device, rounds: [row], 1), "second": (fail, 1)})
    output = tmp_path / "speed.json"
    monkeypatch.setattr("sys.argv", ["speed.py", "--output", str(output)])
    with pytest.raises(ValueError, match="out of luck"):
        speed.main()
    assert [(row["name"], row["ratio"]) for row in json.loads(output.read_text())["rows"]] == [("a row", 0.5)]


def test_speed_benchmark_rejects_output_of_other_machine(monkeypatch, tmp_path):
    output = tmp_path / "speed.json"
    others = json.dumps({"machine": {"device": "a larger one"}, "rows": []})
    output.write_text(others)
    monkeypatch.setattr("sys.argv", ["speed.py", "--output", str(output)])
    with pytest.raises(ValueError, match="a larger one"):
        speed.main()
    assert output.read_text() == others
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["speed.py", "--device", "cuda"])
    with pytest.raises(ValueError, match="no GPU"):
        speed.main()


@pytest.mark.slow
def test_peak_memory_excludes_parent_process(run):
    """Memory of the process that started it is not counted."""
    child = "import sys; from benchmarks import speed; sys.stdout.write(str(speed.peak_memory()))"
    parent = f"import subprocess, sys; held = b'1' * 3 * 2**30; subprocess.run([sys.executable, '-c', {child!r}])"
    assert 0 < int(run("-c", parent).stdout) < 2 * 2**30
