"""Masks: head for any backbone, phrase and grouping; losses; loading and freezing; resize to the image size."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from modeling_reftr import RefTRConfig, RefTRForVisualGrounding, RefTRImageProcessor
from modeling_reftr.image_processing_reftr import resize_logits, resize_logits_in_two_steps
from modeling_reftr.loss_reftr import mask_losses
from modeling_reftr.modeling_reftr import RefTRMaskHead, RefTRMaskInputConvolution
from tests.helpers.golden import golden_inputs, golden_mask, golden_model, load_case
from tests.modeling_reftr.test_modeling import model_inputs
from training_reftr.data import GroundingCollator


IMAGE = Image.new("RGB", (64, 48), "gray")


@pytest.fixture
def batch(shapes, processor):
    """Collate three images with their sentences, one phrase or several, boxes and masks."""
    collate = GroundingCollator(processor, with_targets=False, with_masks=True)
    return collate([shapes["test"][index] for index in range(3)])


@pytest.fixture
def make_mask_model(make_model):
    def make(**overrides):
        return make_model(**{"predict_masks": True, "auxiliary_loss": False, **overrides})

    return make


def iou(mask, other):
    return ((mask & other).sum() / (mask | other).sum()).item()


# published outputs


@pytest.fixture(scope="module")
def golden_outputs():
    case, arrays = load_case("res_bert")
    model = golden_model(case)
    with torch.no_grad():
        return case, arrays, model(**golden_inputs(case, arrays), output_attentions=True)


def test_model_reproduces_published_mask_attentions(golden_outputs):
    _, arrays, outputs = golden_outputs
    torch.testing.assert_close(
        outputs.mask_attentions[:, 0], torch.from_numpy(arrays["out.mask_att"]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(outputs.mask_attentions.sum(dim=(2, 3, 4)), torch.ones(2, 1))


@pytest.mark.parametrize("original", [False, True])
def test_post_process_masks_reproduces_published_masks(golden_outputs, original):
    case, arrays, outputs = golden_outputs
    sizes = case["orig_sizes"] if original else None
    masks = RefTRImageProcessor().post_process_masks(outputs, sizes, two_step=True)
    padded = nn.functional.interpolate(outputs.pred_masks, size=(128, 128), mode="bilinear").sigmoid()
    for index, (mask,) in enumerate(masks):
        size = case["orig_sizes" if original else "sizes"][index]
        expected = golden_mask(arrays[f"out.post_mask_{'orig_' if original else ''}{index}"], size)
        rows, columns = case["sizes"][index]
        uncertain = ((padded[index, :, :rows, :columns] - 0.5).abs() < 1e-4).float()
        uncertain = nn.functional.interpolate(uncertain[None], size=size, mode="nearest")[0, 0].bool()
        assert mask.shape == expected.shape
        assert torch.equal(mask | uncertain, expected | uncertain)
        if not original:
            truth = golden_mask(arrays[f"in.target_masks_{index}"], size)
            assert iou(mask, truth) == pytest.approx(float(arrays[f"out.mask_iou_{index}"]), abs=1e-4)


# one head for any backbone, phrase and grouping


def test_forward_returns_boxes_and_masks(batch, make_mask_model):
    model, inputs = make_mask_model(), model_inputs(batch)
    outputs = model(**inputs)
    sentences, phrases = batch["phrase_input_ids"].shape[:2]
    assert outputs.pred_boxes.shape == (sentences, phrases, 4)
    assert outputs.pred_masks.shape == (sentences, phrases, 16, 16)
    assert outputs.mask_attentions is None


def test_masks_do_not_depend_on_padding_or_grouping(batch, make_mask_model):
    model, inputs = make_mask_model(), model_inputs(batch)
    expected = model(**inputs)
    repeated = {**inputs}
    image_index = repeated.pop("image_index")
    for name in ("pixel_values", "pixel_mask"):
        repeated[name] = inputs[name][image_index]
    torch.testing.assert_close(model(**repeated).pred_masks, expected.pred_masks, atol=1e-4, rtol=0)
    for index in range(len(inputs["input_ids"])):
        alone = {name: value[index : index + 1] for name, value in inputs.items() if not name.startswith("pixel")}
        alone.pop("phrase_index")
        image = image_index[index]
        alone |= {name: inputs[name][image : image + 1] for name in ("pixel_values", "pixel_mask")}
        alone["image_index"] = torch.zeros(1, dtype=torch.long)
        is_real = expected.phrase_mask[index]
        torch.testing.assert_close(
            model(**alone).pred_masks[0][is_real], expected.pred_masks[index][is_real], atol=1e-4, rtol=0
        )


def test_expression_gives_same_masks_as_single_phrase(processor, make_mask_model):
    model = make_mask_model()
    phrases = {"phrases": ["the red star"]}
    single, several = (model(**processor(IMAGE, "the red star", **arguments)) for arguments in ({}, phrases))
    torch.testing.assert_close(single.pred_masks, several.pred_masks, atol=1e-4, rtol=0)


BACKBONES = {
    "resnet": {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "swin": {
        "model_type": "swin",
        "embed_dim": 12,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 1, 1, 1],
        "window_size": 2,
    },
    "convnext": {"model_type": "convnext", "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "timm": {"backbone": "test_resnet", "out_indices": [1, 2, 3, 4], "output_stride": 16},
    "timm_five": {"backbone": "test_resnet", "out_indices": [0, 1, 2, 3, 4]},
}


@pytest.mark.parametrize("name", list(BACKBONES))
def test_mask_head_supports_backbones_with_four_stages(batch, make_mask_model, name):
    backbone = BACKBONES[name]
    if "model_type" in backbone:
        backbone = {**backbone, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    model = make_mask_model(backbone_config=backbone)
    outputs = model(**batch)
    assert outputs.pred_masks.shape[-2:] == (16, 16)
    outputs.loss.backward()
    assert all(parameter.grad is not None for parameter in model.mask_head.parameters())


def test_mask_head_with_fewer_than_four_stages_is_refused(make_mask_model):
    with pytest.raises(
        ValueError, match=r"requires four feature maps, the backbone returns 2; set backbone_config\.out_indices"
    ):
        make_mask_model(backbone_config={"backbone": "test_resnet", "out_indices": [3, 4]})


@pytest.mark.parametrize(("d_model", "heads"), [(32, 2), (36, 3), (40, 5), (64, 8), (96, 12)])
def test_mask_head_supports_any_width_from_32(batch, make_mask_model, d_model, heads):
    settings = {"encoder_attention_heads": heads, "decoder_attention_heads": heads, "projection_group_norm_groups": 4}
    model = make_mask_model(d_model=d_model, **settings)
    outputs = model(**batch)
    assert outputs.loss.isfinite()
    assert outputs.pred_masks.shape[-2:] == (16, 16)
    for norm in model.mask_head.norms:
        assert norm.num_channels % norm.num_groups == 0


def test_mask_head_at_default_width_has_published_groups():
    with torch.device("meta"):
        model = RefTRForVisualGrounding(RefTRConfig(predict_masks=True))
    assert [norm.num_groups for norm in model.mask_head.norms] == [8] * 5
    assert sum(parameter.numel() for parameter in model.parameters()) == 155_417_181


@pytest.mark.parametrize("overrides", [{"d_model": 28}, {"predict_masks": False, "freeze_grounding": True}])
def test_mask_head_with_invalid_settings_is_refused(make_mask_model, overrides):
    settings = {"d_model": 32, "projection_group_norm_groups": 4} | overrides
    with pytest.raises(ValueError, match=r"d_model=28 is too narrow|predict_masks=False has none"):
        make_mask_model(**settings)


# losses


def test_loss_combines_boxes_and_masks_with_coefficients(batch, make_mask_model):
    model = make_mask_model(mask_loss_coefficient=2.0, dice_loss_coefficient=0.5)
    outputs = model(**batch)
    parts = outputs.loss_dict
    assert set(parts) == {"loss_bbox", "loss_giou", "loss_mask", "loss_dice"}
    expected = parts["loss_bbox"] + parts["loss_giou"] + 2 * parts["loss_mask"] + 0.5 * parts["loss_dice"]
    torch.testing.assert_close(outputs.loss, expected)


def reference_losses(logits, target):
    """Return the focal and dice loss of one mask at the target's size, written out."""
    logits = nn.functional.interpolate(logits[None, None], size=target.shape, mode="bilinear")[0, 0].double()
    p, t = logits.sigmoid(), target.double()
    focal = -(0.25 * t * (1 - p) ** 2 * p.log() + 0.75 * (1 - t) * p**2 * (1 - p).log()).mean()
    return focal, 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)


def test_mask_losses_sum_phrases_and_divide_by_sentences(batch, make_mask_model):
    model = make_mask_model()
    outputs = model(**batch)
    expected = torch.zeros(2, dtype=torch.float64)
    for index, label in enumerate(batch["labels"]):
        for slot, mask in enumerate(label["masks"]):
            expected += torch.stack(reference_losses(outputs.pred_masks[index, slot].detach(), mask))
    expected /= len(batch["labels"])
    assert outputs.loss_dict["loss_mask"].item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert outputs.loss_dict["loss_dice"].item() == pytest.approx(expected[1].item(), rel=1e-5)


def test_mask_loss_counts_padding_unless_disabled(processor, make_mask_model):
    images = [Image.new("RGB", (64, 32), "red"), Image.new("RGB", (32, 64), "blue")]
    masks = [[np.ones((32, 64))], [np.ones((64, 32))]]
    boxes = [[[0, 0, 64, 32]], [[0, 0, 32, 64]]]
    inputs = processor(images, [["the star"], ["the circle"]], boxes=boxes, masks=masks)
    losses = {}
    for over_padding in (True, False):
        model = make_mask_model(mask_loss_over_padding=over_padding)
        outputs = model(**inputs)
        losses[over_padding] = outputs.loss_dict["loss_dice"].item()
        changed = model.loss_function(
            outputs.pred_boxes,
            outputs.phrase_mask,
            inputs["labels"],
            model.config,
            pred_masks=outputs.pred_masks + 5,
            pixel_mask=inputs["pixel_mask"],
            image_index=inputs["image_index"],
        )[1]
        # the mask covers the complete image: higher logits are better inside, worse in the padding
        losses[over_padding, "+5"] = changed["loss_dice"].item()
    assert losses[False, "+5"] < 0.02
    assert losses[True, "+5"] > 0.2
    assert losses[True] != losses[False]


def test_sentences_without_masks_have_zero_mask_loss(batch, make_mask_model):
    model = make_mask_model()
    for label in batch["labels"][1:]:
        del label["masks"]
    some = model(**batch).loss_dict
    del batch["labels"][0]["masks"]
    outputs = model(**batch)
    assert some["loss_mask"] > 0
    assert outputs.loss_dict["loss_mask"] == outputs.loss_dict["loss_dice"] == 0
    outputs.loss.backward()  # every weight stays in the graph: DDP fails on unused parameters
    assert all(parameter.grad is not None for parameter in model.mask_head.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("logit", [1e4, -1e4])
@pytest.mark.row("R8")
def test_mask_loss_of_extreme_logits_is_finite(batch, make_mask_model, logit, dtype):
    model = make_mask_model()
    nn.init.constant_(model.mask_head.output_convolution.bias, logit)
    model = model.to(dtype)
    outputs = model(**batch)
    outputs.loss.backward()
    assert outputs.pred_masks.dtype == torch.float32
    assert outputs.loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.mask_head.parameters())


def test_model_rejects_label_masks_of_wrong_size(batch, make_mask_model):
    batch["labels"][0]["masks"] = torch.ones(1, 9, 9)
    with pytest.raises(ValueError, match=r"\['masks'\] has shape \(1, 9, 9\), expected \(targets, 64, 64\)"):
        make_mask_model()(**batch)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_fully_padded_image_gives_finite_masks_and_gradients(batch, make_mask_model, attention):
    model = make_mask_model()
    model.set_attn_implementation(attention)
    batch["pixel_mask"][1] = 0
    outputs = model(**batch)
    outputs.loss.backward()
    assert outputs.pred_masks.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.mask_head.parameters())


def test_mask_losses_accept_bool_float_and_uint8_masks():
    logits, mask = torch.randn(1, 1, 4, 4), torch.rand(1, 8, 8) > 0.5
    losses = [
        mask_losses(logits, torch.ones(1, 1, dtype=torch.bool), [{"masks": masks}], 1, (8, 8))["loss_mask"]
        for masks in (mask, mask.float(), mask.to(torch.uint8) * 255)
    ]
    assert losses[0] == losses[1] == losses[2]


# loading, initialization and freezing


def test_box_checkpoint_loads_and_reports_new_mask_head(make_model, batch, tmp_path, caplog):
    boxes = make_model(auxiliary_loss=False)
    boxes.save_pretrained(tmp_path)
    logger = logging.getLogger("transformers")
    logger.propagate = True
    with caplog.at_level(logging.WARNING):
        model, info = RefTRForVisualGrounding.from_pretrained(tmp_path, predict_masks=True, output_loading_info=True)
    logger.propagate = False
    assert all(name.startswith("mask_head.") for name in info["missing_keys"])
    assert len(info["missing_keys"]) == len(model.mask_head.state_dict())
    assert "mask_head.output_convolution.weight" in caplog.text
    inputs = model_inputs(batch)
    torch.testing.assert_close(model.eval()(**inputs).pred_boxes, boxes(**inputs).pred_boxes, atol=1e-6, rtol=0)


def test_mask_head_is_initialized_as_published(make_mask_model, make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    for model in (make_mask_model(), RefTRForVisualGrounding.from_pretrained(tmp_path, predict_masks=True)):
        head = model.mask_head
        for projection in (head.query_projection, head.key_projection):
            assert projection.bias.abs().max() == 0
            bound = (6 / sum(projection.weight.shape)) ** 0.5
            assert 0.95 * bound < projection.weight.abs().max() <= bound
        for convolution in (*head.convolutions[:3], *head.adapters):
            assert convolution.bias.abs().max() == 0
            fan_in = convolution.weight[0].numel()
            bound = (3 / fan_in) ** 0.5  # Kaiming uniform with a = 1
            assert 0.9 * bound < convolution.weight.abs().max() <= bound
        for norm in head.norms:
            assert norm.weight.min() == norm.weight.max() == 1


def test_freeze_grounding_trains_only_mask_head(make_mask_model, batch, tmp_path):
    trainable_batch_norm = {"backbone_config": BACKBONES["timm"], "dropout": 0.5}
    make_mask_model(freeze_grounding=True, **trainable_batch_norm).save_pretrained(tmp_path)
    model = RefTRForVisualGrounding.from_pretrained(tmp_path)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("mask_head.")}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    boxes = model.eval()(**model_inputs(batch)).pred_boxes
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    model.train()
    model(**batch).loss.backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("mask_head.") for name in changed)
    torch.testing.assert_close(model.eval()(**model_inputs(batch)).pred_boxes, boxes)


def test_saved_model_gives_same_masks(make_mask_model, batch, tmp_path):
    model, inputs = make_mask_model(), model_inputs(batch)
    model.save_pretrained(tmp_path)
    loaded = RefTRForVisualGrounding.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(**inputs).pred_masks, model(**inputs).pred_masks, atol=1e-5, rtol=0)


# resize to the image size


def test_post_process_segmentation_returns_masks_of_target_sizes(processor, make_mask_model):
    images = [Image.new("RGB", (90, 60), "red"), Image.new("RGB", (50, 70), "blue")]
    text = ["the star above the circle", "the square"]
    inputs = processor(images, text, phrases=[["the star", "the circle"], ["the square"]])
    outputs = make_mask_model()(**inputs)
    sizes = [(60, 90), (70, 50)]
    answers = processor.post_process_referring_segmentation(outputs, sizes)
    assert [tuple(answer["masks"].shape) for answer in answers] == [(2, 60, 90), (1, 70, 50)]
    assert all(answer["masks"].dtype == torch.bool for answer in answers)
    boxes = processor.post_process_grounding(outputs, sizes)
    for answer, expected in zip(answers, boxes, strict=True):
        assert torch.equal(answer["boxes"], expected["boxes"])
        assert answer["phrases"] == expected["phrases"]
    encoded = processor.post_process_referring_segmentation(outputs, sizes, return_coco_rle=True)
    for answer, expected in zip(encoded, answers, strict=True):
        assert "masks" not in answer
        decoded = [coco_mask.decode(segmentation).astype(bool) for segmentation in answer["segmentations"]]
        assert np.array_equal(np.stack(decoded), expected["masks"].numpy())
    with pytest.raises(ValueError, match="3 target_sizes"):
        processor.post_process_referring_segmentation(outputs, [(1, 1)] * 3)


def test_mask_threshold_is_a_probability(processor, make_mask_model):
    outputs = make_mask_model()(**processor(IMAGE, "the star"))
    counts = []
    for threshold in (0.0, 0.3, 0.5, 0.7, 1.0):
        (mask,) = processor.image_processor.post_process_masks(outputs, [(48, 64)], threshold)
        counts.append(mask.sum().item())
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 48 * 64
    assert counts[-1] == 0


def test_post_process_segmentation_requires_mask_head(processor, make_model):
    outputs = make_model()(**processor(IMAGE, "the star"))
    with pytest.raises(ValueError, match="predict_masks=False"):
        processor.post_process_referring_segmentation(outputs, [(48, 64)])


def test_resize_logits_agrees_with_two_steps_at_resized_size():
    logits = torch.randn(1, 40, 40)[0]
    once, twice = (
        resize(logits, (160, 160), (120, 160), (120, 160), 0.5)
        for resize in (resize_logits, resize_logits_in_two_steps)
    )
    assert (once != twice).float().mean() < 1e-3


def test_resize_logits_extends_masks_to_image_edges():
    """Logits continue unchanged beyond the centers of the outer cells; half their value would be under 0.7."""
    mask = resize_logits(torch.ones(4, 4), (64, 64), (64, 64), (64, 64), threshold=0.7)
    assert mask.all()


def test_resize_logits_is_more_accurate_than_two_steps():
    """Resize low-resolution logits of a disc to a larger original size, where two steps leave stair-shaped edges."""

    def disc(height, width):
        rows, columns = torch.meshgrid(
            (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij"
        )
        return 0.35 - ((rows - 0.5) ** 2 + (columns - 0.45) ** 2).sqrt()

    logits = nn.functional.pad(disc(30, 40), (0, 0, 0, 10), value=-1.0) * 20
    truth = disc(1200, 1600) > 0
    once, twice = (
        iou(resize(logits, (160, 160), (120, 160), (1200, 1600), 0.5), truth)
        for resize in (resize_logits, resize_logits_in_two_steps)
    )
    assert once > twice > 0.95
    assert once > 0.985


def test_input_convolution_equals_one_convolution_of_all_channels():
    """Convolve image and memory channels once each, for phrases that share and skip images and sentences."""
    torch.manual_seed(0)
    layer = RefTRMaskInputConvolution(d_model=6, num_heads=2)
    image_features, image_memory = torch.randn(3, 6, 4, 5), torch.randn(4, 6, 4, 5)
    attentions = torch.randn(5, 2, 4, 5)
    image, sentence = torch.tensor([0, 0, 2, 2, 0]), torch.tensor([0, 0, 1, 3, 2])
    states = torch.cat((image_features[image], image_memory[sentence], attentions), dim=1)
    expected = nn.functional.conv2d(states, layer.weight, layer.bias, padding=1)
    found = layer(image_features, image_memory, attentions, image, sentence)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_mask_head_halves_arithmetic_for_captions():
    """Compare the head at the published width with a convolution over all inputs of each phrase."""
    with torch.device("meta"):
        head = RefTRMaskHead(RefTRConfig(predict_masks=True), [256, 512, 1024, 2048])
    num_images, num_sentences, num_phrases, side = 2, 10, 6, 20  # five captions per image of 640 x 640 pixels
    image_index = torch.arange(num_sentences, device="meta") // 5
    inputs = {
        "queries": torch.empty(num_sentences, num_phrases, 256, device="meta"),
        "image_features": torch.empty(num_images, side**2, 256, device="meta"),
        "image_memory": torch.empty(num_sentences, side**2, 256, device="meta"),
        "image_mask": torch.ones(num_images, side**2, dtype=torch.bool, device="meta"),
        "feature_maps": tuple(
            torch.empty(num_images, channels, side * scale, side * scale, device="meta")
            for channels, scale in ((256, 8), (512, 4), (1024, 2), (2048, 1))
        ),
    }
    with FlopCounterMode(display=False) as counter:
        head(**inputs, image_index=image_index)
    width = 2 * 256 + 8
    direct = 2 * num_sentences * num_phrases * side**2 * width * width * 9
    first = counter.get_flop_counts()["RefTRMaskHead.convolutions.0"]
    saved = direct - sum(first.values())
    assert 0.4 < saved / (counter.get_total_flops() + saved) < 0.6


def test_scaled_attention_multiplies_attention_maps_by_number_of_values(batch, make_mask_model):
    scaled = make_mask_model(mask_conditioning="scaled_attention").eval()
    published = make_mask_model().eval()
    published.load_state_dict(scaled.state_dict())
    inputs = {name: value for name, value in model_inputs(batch).items() if name != "labels"}
    with torch.no_grad():
        expected, attentions = scaled(**inputs).pred_masks, published(**inputs, output_attentions=True).mask_attentions
        differs = published(**inputs).pred_masks
        heads, size = attentions.shape[2], attentions.shape[3:].numel()
        published.mask_head.convolutions[0].weight[:, -heads:] *= heads * size
        found = published(**inputs).pred_masks
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (differs - expected).abs().max() > 1e-2


def test_mask_conditioning_of_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"mask_conditioning='scaled' must be one of attention, scaled_attention"):
        RefTRConfig(predict_masks=True, mask_conditioning="scaled")
