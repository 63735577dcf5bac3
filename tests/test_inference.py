"""What makes inference faster changes no answer: folded batch norms, features that are kept, texts that come again."""

import copy
import json

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from test_modeling import assert_same_boxes, model_inputs, single_inputs
from torchvision.ops import box_iou
from transformers.image_transforms import center_to_corners_format

from benchmarks import speed
from conftest import TINY_TEXT
from golden import golden_inputs, golden_model, load_case
from modeling_reftr.fusing_reftr import fold_batch_norms
from training_reftr.arguments import TrainingArguments
from training_reftr.checkpoints import TrainingState, checkpoints_of, save_checkpoint
from training_reftr.data import GroundingCollator
from training_reftr.optimization import build_optimizer


TIMM = {"backbone": "test_resnet", "out_indices": [1, 2, 3, 4], "output_stride": 8}
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
    """Three images with their sentences, several phrases each, and labels."""
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
    """Batch norms that are not the identity."""
    torch.manual_seed(1)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            with torch.no_grad():
                module.weight.uniform_(0.5, 2)
                module.bias.normal_()
    return model


def norms(model):
    return sum(getattr(module, "running_mean", None) is not None for module in model.modules())


@pytest.mark.parametrize(
    ("backbone", "frozen", "left"),
    [(TIMM, True, 0), (TIMM, False, 0), (RESNET, False, 0), (CONVNEXT, False, 0)],
    ids=["frozen", "timm", "resnet", "no batch norm"],
)
def test_folded_batch_norms_change_no_answer(single_batch, make_model, tmp_path, backbone, frozen, left):
    model = shake(make_model(backbone_config=backbone, freeze_backbone_batch_norm=frozen, predict_masks=True))
    before = copy.deepcopy(model.state_dict())
    places = {name: (value.data_ptr(), value.stride()) for name, value in model.named_parameters()}
    with torch.no_grad():
        expected = model(**single_batch)
        fused = model.fuse()(**single_batch)
    assert model.is_fused
    assert norms(model) == left
    assert_same_boxes(fused, expected)
    torch.testing.assert_close(fused.pred_masks, expected.pred_masks, rtol=1e-4, atol=1e-4)

    # what is saved while it is fused is what was there before; the model stays fused
    model.save_pretrained(tmp_path)
    assert norms(model) == left
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in saved.items())

    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.is_fused

    # training takes them out again, to the last bit
    parameters = {name: id(parameter) for name, parameter in model.unfuse().named_parameters()}
    model.fuse().train()
    assert not model.is_fused
    assert parameters == {name: id(parameter) for name, parameter in model.named_parameters()}
    # where they lay, as they lay: in another place or order in memory, sums are rounded otherwise
    assert places == {name: (value.data_ptr(), value.stride()) for name, value in model.named_parameters()}
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_checkpoint_on_the_way_of_an_evaluation_is_of_the_whole_model(single_batch, make_model, processor, tmp_path):
    """Where a signal asks for one, the model is fused."""
    model = shake(make_model(backbone_config=TIMM)).train()
    args = TrainingArguments(output_dir=str(tmp_path))
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(build_optimizer(model, args))
    boxes = torch.rand(len(single_batch["input_ids"]), 1, 4)
    model(**single_batch, labels=[{"boxes": box} for box in boxes]).loss.backward()
    optimizer.step()
    before = copy.deepcopy(model.eval().state_dict())
    state = TrainingState(run_id="", settings=vars(args))
    save_checkpoint(model.fuse(), optimizer, processor, state, args, accelerator)
    (checkpoint,) = checkpoints_of(tmp_path)
    saved = load_file(checkpoint / "model.safetensors")
    assert saved.keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in saved.items())
    names = {name for name, parameter in model.train().named_parameters() if parameter.requires_grad}
    moments = {name.rpartition("/")[0] for name in load_file(checkpoint / "optimizer.safetensors")}
    assert moments == names


def test_a_fused_model_may_move_and_be_fused_twice(single_batch, make_model):
    model = shake(make_model(backbone_config=TIMM)).fuse()
    assert model.fuse() is model
    model.double()
    boxes = model(**single_batch).pred_boxes
    model.unfuse()
    assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {torch.float64}
    torch.testing.assert_close(model(**single_batch).pred_boxes, boxes, rtol=0, atol=1e-6)


def test_training_is_no_time_to_fuse(make_model):
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        make_model().train().fuse()


class Branches(torch.nn.Module):
    """A norm that alone reads a convolution; one whose convolution is also read by a sum; one that runs twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (torch.nn.Conv2d(3, 3, 1) for _ in range(3))
        self.alone, self.beside, self.twice = (torch.nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, pixels):
        states = self.second(self.alone(self.first(pixels)))
        states = states + self.beside(states)
        return self.twice(self.third(states)) + self.twice(states)


def test_norms_are_folded_only_where_nothing_else_reads_the_convolution():
    module = shake(Branches().eval())
    pixels = torch.randn(2, 3, 5, 5)
    expected = module(pixels)
    folded = fold_batch_norms(module, pixels[:1])
    assert [entry.name for entry in folded] == ["alone"]
    torch.testing.assert_close(module(pixels), expected)


@pytest.mark.parametrize("name", ["rec_bert", "multiphrase_bert", "res_bert"])
def test_the_published_model_fused_and_in_bfloat16(name):
    """Folded, the published boxes; in bfloat16, boxes that overlap with them by 0.98."""
    case, arrays = load_case(name)
    model, inputs = golden_model(case, "sdpa").eval().fuse(), golden_inputs(case, arrays)
    expected = torch.from_numpy(arrays["out.pred_boxes"][:, :, 0])
    with torch.no_grad():
        outputs = model(**inputs)
        coarse = model.to(torch.bfloat16)(**inputs)
    real = outputs.phrase_mask
    torch.testing.assert_close(outputs.pred_boxes[real], expected[real], atol=1e-5, rtol=0)
    corners = [center_to_corners_format(boxes[real]) for boxes in (coarse.pred_boxes, expected)]
    assert box_iou(*corners).diagonal().min() >= 0.98


def test_image_features_stand_for_the_pictures(inputs, make_model):
    model = make_model(predict_masks=True)
    pictures = {name: inputs.pop(name) for name in ("pixel_values", "pixel_mask")}
    with torch.no_grad():
        expected = model(**pictures, **inputs)
        features = model.get_image_features(**pictures)
        answers = model(image_features=features, **inputs)
    for name in ("pred_boxes", "pred_masks", "pixel_mask", "image_index"):
        assert torch.equal(answers[name], expected[name]), name


def test_many_questions_one_after_the_other(single_batch, make_model):
    """As all at once: the picture is encoded once, and each text is padded as it was."""
    model = make_model()
    with torch.no_grad():
        expected = model(**single_batch).pred_boxes
        features = model.get_image_features(single_batch["pixel_values"], single_batch["pixel_mask"])
        texts = {name: single_batch[name] for name in ("input_ids", "attention_mask", "image_index")}
        for index in range(len(expected)):
            one = {name: value[index : index + 1] for name, value in texts.items()}
            boxes = model(image_features=features, **one).pred_boxes
            torch.testing.assert_close(boxes[0], expected[index], rtol=0, atol=1e-5)


def test_words_alone(processor, shapes, make_model):
    model, rows = make_model(), [shapes["test"][index] for index in range(2)]
    pictures = [row["image"] for row in rows]
    with torch.no_grad():
        features = model.get_image_features(**processor.image_processor(pictures, return_tensors="pt"))
        for texts in (["the star"], ["a red circle"]), [["the star", "left"], ["a red circle"]]:
            words = processor(text=list(texts))
            assert "pixel_values" not in words
            assert torch.equal(
                model(image_features=features, **words).pred_boxes,
                model(**processor(pictures, list(texts))).pred_boxes,
            )
        sentence = "the star left of the circle"
        words = processor(text=[[sentence], ["star"]], phrases=[[["the star", "circle"]], [["star"]]])
        assert model(image_features=features, **words).pred_boxes.shape == (2, 2, 4)
    assert processor(text=["one", "two"])["image_index"].tolist() == [0, 0]
    assert processor(text="one")["image_index"].tolist() == [0]
    with pytest.raises(ValueError, match="give images with them"):
        processor(text="one", boxes=[[1, 2, 3, 4]])
    with pytest.raises(ValueError, match="There is no text"):
        processor(pictures)


def test_pictures_or_their_features(single_batch, make_model):
    model = make_model()
    features = model.get_image_features(single_batch["pixel_values"])
    with pytest.raises(ValueError, match="either pixel_values or image_features"):
        model(image_features=features, **single_batch)
    texts = {name: single_batch[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="either pixel_values or image_features"):
        model(**texts)
    with pytest.raises(ValueError, match="pixel_mask belongs to pixel_values"):
        model(image_features=features, pixel_mask=single_batch["pixel_mask"], **texts)
    with pytest.raises(ValueError, match="without image_index they must be as many"):
        model(image_features=features, **texts)


def test_texts_that_come_again_are_not_encoded_again(inputs, make_model):
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


def test_a_full_cache_forgets_what_was_not_asked_for(single_batch, make_model):
    model = make_model()
    with torch.no_grad():
        expected = model(**single_batch)
        with model.cache_text(max_tokens=9):
            for _ in range(3):
                assert_same_boxes(model(**single_batch), expected)
                cache = model.model._text_cache
                assert cache.num_tokens == sum(map(len, cache.texts)) <= 9
                assert cache.texts


def test_texts_are_cached_without_their_padding(make_model):
    """A text that is padded further, or with other tokens, is the same; the one asked for the longest ago goes."""
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
        assert ask(third, []) == 3  # no room for all: the second is forgotten
        assert list(cache.texts) == [tuple(first), tuple(third)]


def test_texts_are_kept_for_inference_alone(make_model):
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
def test_the_benchmark_runs(monkeypatch, tmp_path, rows, count):
    """With a model of seconds: what it compares gives the same answers, and its rows are whole."""
    small = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "projection_group_norm_groups": 8}
    small |= {"backbone_config": TIMM}
    small |= {"text_config": {**TINY_TEXT, "vocab_size": 30000, "max_position_embeddings": 128}}
    monkeypatch.setattr(speed, "CONFIG", small)
    monkeypatch.setattr(speed, "SIZES", ((48, 64), (64, 48)))
    output = tmp_path / "speed.json"
    monkeypatch.setattr("sys.argv", ["speed.py", "--rounds", "2", "--output", str(output), "--rows", *rows])
    speed.main()
    result = json.loads(output.read_text())
    assert len(result["rows"]) == count  # each in both precisions, but training
    for row in result["rows"]:
        assert row["ratio"] == pytest.approx(row["ours"] / row["published_pattern"], rel=0.05)
        if "mean_iou" in row:
            is_exact = "bfloat16" not in row["name"]
            assert row["largest_difference"] < (1e-5 if is_exact else 0.1), row


def test_a_row_that_fails_takes_no_other_with_it(monkeypatch, tmp_path):
    def fail(device, rounds):
        raise ValueError("out of luck")

    row = speed.Row("a row", "seconds", [1.0], [2.0], {})
    monkeypatch.setattr(speed, "ROWS", {"first": (lambda device, rounds: [row], 1), "second": (fail, 1)})
    output = tmp_path / "speed.json"
    monkeypatch.setattr("sys.argv", ["speed.py", "--output", str(output)])
    with pytest.raises(ValueError, match="out of luck"):
        speed.main()
    assert [(row["name"], row["ratio"]) for row in json.loads(output.read_text())["rows"]] == [("a row", 0.5)]


def test_figures_of_different_machines_do_not_mix(monkeypatch, tmp_path):
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


def test_the_memory_of_a_process_is_its_own(run):
    """And not what the process that started it held."""
    child = "import sys; from benchmarks import speed; sys.stdout.write(str(speed.peak_memory()))"
    parent = f"import subprocess, sys; held = b'1' * 3 * 2**30; subprocess.run([sys.executable, '-c', {child!r}])"
    assert 0 < int(run("-c", parent).stdout) < 2 * 2**30
