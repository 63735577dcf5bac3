"""The model with the published weights reproduces the published outputs (each check states its tolerance)."""

import pytest
import torch

from modeling_reftr import RefTRImageProcessor
from modeling_reftr.convert_reftr_checkpoint import rename_key
from tests.helpers.golden import golden_inputs, golden_model, load_case


CASES = ("rec_bert", "rec_roberta", "multiphrase_bert", "res_bert")


@pytest.fixture(scope="module", params=[(name, attention) for name in CASES for attention in ("eager", "sdpa")])
def golden_run(request):
    """Run a case forward and backward; return the case, its arrays, the captured states, the outputs and the model."""
    name, attention = request.param
    case, arrays = load_case(name)
    model = golden_model(case, attention)
    inputs = golden_inputs(case, arrays)
    captured = {}
    model.model.image_projection.register_forward_hook(
        lambda module, args, output: captured.update({"mid.image_features_proj": output})
    )
    model.model.text_projection.register_forward_hook(
        lambda module, args, output: captured.update({"mid.sentence_features": output})
    )
    model.model.query_encoder.register_forward_hook(
        lambda module, args, output: captured.update({"mid.query": output[0], "mid.query_pos": output[1]})
    )
    outputs = model(**inputs)
    outputs.loss.backward()
    captured["mid.encoder_memory"] = outputs.encoder_last_hidden_state
    captured["mid.decoder_hidden_states"] = outputs.intermediate_hidden_states
    return case, {key: torch.from_numpy(value) for key, value in arrays.items()}, captured, outputs, model


def test_model_reproduces_published_phrase_mask(golden_run):
    _, arrays, _, outputs, _ = golden_run
    assert torch.equal(outputs.phrase_mask, arrays["out.phrase_mask"].bool())


def test_model_reproduces_published_intermediate_states(golden_run):
    _, arrays, captured, outputs, _ = golden_run
    real = outputs.phrase_mask
    compared = 0
    for name, value in captured.items():
        expected = arrays[name]
        if name in ("mid.query", "mid.query_pos"):  # padding slots are never read
            value, expected = value[real], expected[real]
        if name == "mid.decoder_hidden_states":
            value, expected = value[:, real], expected[:, real]
        torch.testing.assert_close(value, expected, atol=1e-4, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
        compared += 1
    assert compared == sum(name.startswith("mid.") for name in arrays)


def test_model_reproduces_published_boxes(golden_run):
    _, arrays, _, outputs, _ = golden_run
    real = outputs.phrase_mask
    torch.testing.assert_close(outputs.pred_boxes[real], arrays["out.pred_boxes"][:, :, 0][real], atol=1e-5, rtol=0)
    for index, auxiliary in enumerate(outputs.auxiliary_outputs or []):
        expected = arrays[f"out.aux_pred_boxes_{index}"][:, :, 0][real]
        torch.testing.assert_close(auxiliary["pred_boxes"][real], expected, atol=1e-5, rtol=0)


def test_post_process_boxes_reproduces_published_boxes(golden_run):
    case, arrays, _, outputs, _ = golden_run
    boxes = RefTRImageProcessor().post_process_boxes(outputs, torch.tensor(case["orig_sizes"]))
    for index, real in enumerate(outputs.phrase_mask):
        expected = arrays[f"out.post_boxes_xyxy_{index}"]
        torch.testing.assert_close(boxes[index][real].detach(), expected, atol=1e-2, rtol=0)


def test_model_reproduces_published_masks(golden_run):
    case, arrays, _, outputs, _ = golden_run
    if not case["masks"]:
        assert outputs.pred_masks is None
        return
    torch.testing.assert_close(outputs.pred_masks, arrays["out.pred_masks"], atol=1e-4, rtol=0)


def test_model_reproduces_published_losses(golden_run):
    case, _, _, outputs, _ = golden_run
    assert set(outputs.loss_dict) == set(case["losses"])
    for name, expected in case["losses"].items():
        assert outputs.loss_dict[name].item() == pytest.approx(expected, rel=1e-4), name
    assert outputs.loss.item() == pytest.approx(case["weighted_total"], rel=1e-4)


def test_model_reproduces_published_gradient_norms(golden_run):
    case, _, _, _, model = golden_run
    parameters = dict(model.named_parameters())

    def gradient(key):
        name = rename_key(key)
        if "in_proj_" in name:
            prefix, kind = name.split("in_proj_")
            return torch.cat([parameters[f"{prefix}{part}_proj.{kind}"].grad for part in "qkv"])
        return parameters[name].grad

    for key, expected in case["grad_norms"].items():
        # a gradient under 1e-6 is zero in theory and consists of rounding errors
        tolerance = {"abs": 1e-6} if expected < 1e-6 else {"rel": 1e-3}
        assert gradient(key).norm().item() == pytest.approx(expected, **tolerance), key
    for key in case["params_without_grad"]:
        assert parameters[rename_key(key)].grad is None, key
