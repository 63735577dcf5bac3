"""Losses compared with those of torchvision, and phrases that are excluded from them."""

import pytest
import torch
from torchvision.ops import box_convert, generalized_box_iou_loss

from modeling_reftr import RefTRConfig
from modeling_reftr.loss_reftr import box_losses, grounding_loss
from modeling_reftr.matching_reftr import pad_targets
from modeling_reftr.overlap_reftr import generalized_box_iou


WEIGHTS = {"bbox_loss_coefficient": 2.0, "giou_loss_coefficient": 3.0}
WEIGHTS |= {"mask_loss_coefficient": 5.0, "dice_loss_coefficient": 7.0}


@pytest.fixture
def boxes():
    """Return pairs of boxes that overlap, touch, contain each other and lie apart in one direction or both."""
    torch.manual_seed(0)
    first, second = torch.rand(2, 500, 2), torch.rand(2, 500, 2) * 0.5
    return torch.cat((first, second), dim=-1).unbind(0)


def test_generalized_box_iou_equals_torchvision(boxes):
    corners = [box_convert(part, "cxcywh", "xyxy") for part in boxes]
    expected = 1 - generalized_box_iou_loss(*corners)
    torch.testing.assert_close(generalized_box_iou(*corners), expected, atol=1e-5, rtol=0)
    assert (expected < -0.5).any()
    assert (expected > 0.5).any()
    empty = torch.zeros(1, 4)
    assert generalized_box_iou(empty, empty).item() == 0


def test_box_losses_sum_over_mask_and_divide_by_sentences(boxes):
    predicted, true = (part.unflatten(0, (250, 2)) for part in boxes)
    mask = torch.rand(250, 2) > 0.5
    losses = box_losses(predicted, true, mask, 11)
    corners = [box_convert(part[mask], "cxcywh", "xyxy") for part in (predicted, true)]
    torch.testing.assert_close(losses["loss_bbox"], (predicted - true)[mask].abs().sum() / 11)
    torch.testing.assert_close(losses["loss_giou"], generalized_box_iou_loss(*corners).sum() / 11)


def test_pad_targets_masks_phrases_without_box():
    phrase_mask = torch.tensor([[True, False], [True, True]])
    labels = [{"boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]] * 2)}, {"boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}]
    targets = pad_targets(labels, phrase_mask)
    assert targets.is_target.tolist() == [[[True], [False]], [[True], [False]]]
    assert targets.boxes_cxcywh[1, 0, 0].tolist() == pytest.approx([0.5, 0.5, 0.4, 0.4])
    assert not targets.boxes_cxcywh[1, 1].any()
    assert not targets.is_absent.any(), "a phrase without a box may refer to something"


def mask_case():
    """Return the arguments of the loss for three sentences about two images, the second of them padded."""
    torch.manual_seed(0)
    pixel_mask = torch.ones(2, 16, 24, dtype=torch.long)
    pixel_mask[1, :, 12:] = 0
    labels = [{"boxes": torch.full((1, 4), 0.5), "masks": torch.rand(1, 16, 24) > 0.5} for _ in range(3)]
    return {
        "pred_boxes": torch.rand(3, 1, 4),
        "phrase_mask": torch.tensor([[True], [True], [False]]),
        "labels": labels,
        "pred_masks": torch.randn(3, 1, 4, 6),
        "pixel_mask": pixel_mask,
        "image_index": torch.tensor([1, 0, 1]),
    }


@pytest.mark.parametrize("over_padding", [True, False])
def test_grounding_loss_of_batch_is_mean_over_sentences(over_padding):
    case = mask_case()
    config = RefTRConfig(predict_masks=True, mask_loss_over_padding=over_padding, **WEIGHTS)
    total, parts = grounding_loss(**case, config=config)
    alone = []
    for index, image in enumerate(case["image_index"].tolist()):
        one = {name: case[name][index : index + 1] for name in ("pred_boxes", "phrase_mask", "labels", "pred_masks")}
        # each sentence keeps the pixel mask of its image
        alone.append(grounding_loss(**one, pixel_mask=case["pixel_mask"][image][None], config=config)[1])
    for name, value in parts.items():
        torch.testing.assert_close(value, sum(losses[name] for losses in alone) / 3, msg=name)
        assert alone[2][name] == 0, "the third sentence has no answer"
    weighted = 2 * parts["loss_bbox"] + 3 * parts["loss_giou"] + 5 * parts["loss_mask"] + 7 * parts["loss_dice"]
    torch.testing.assert_close(total, weighted)


def test_grounding_loss_weights_auxiliary_layers_like_last():
    case = mask_case()
    case = {name: case[name] for name in ("pred_boxes", "phrase_mask", "labels")}
    earlier = [{"pred_boxes": torch.rand(3, 1, 4)} for _ in range(2)]
    total, parts = grounding_loss(**case, auxiliary_outputs=earlier, config=RefTRConfig(**WEIGHTS))
    assert set(parts) == {f"loss_{kind}{layer}" for kind in ("bbox", "giou") for layer in ("", "_0", "_1")}
    kinds = {"bbox": 2, "giou": 3}
    weighted = sum(kinds[name.split("_")[1]] * value for name, value in parts.items())
    torch.testing.assert_close(total, weighted)
