"""Phrases with none, one or several targets: queries, presence, labels, losses, freezing and answers."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import box_convert, box_iou
from transformers import pipeline

from modeling_reftr import RefTRConfig, RefTRForVisualGrounding, RefTRPredictor, VisualGroundingPipeline
from modeling_reftr.loss_reftr import grounding_loss
from modeling_reftr.matching_reftr import match_queries, matching_cost, pad_targets
from modeling_reftr.presence_reftr import rank_queries
from tests.helpers.golden import golden_inputs, golden_model, load_case
from tests.modeling_reftr.test_modeling import model_inputs
from training_reftr.data import GroundingCollator


SEVERAL = {"predict_presence": True, "num_queries_per_phrase": 3, "predict_masks": True, "dropout": 0.3}
WEIGHTS = {"bbox_loss_coefficient": 2.0, "giou_loss_coefficient": 3.0, "presence_loss_coefficient": 5.0}


@pytest.fixture
def several(make_model):
    """Return a model of three queries per phrase, whose queries and presence differ."""
    model = make_model(**SEVERAL)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.presence_head.output.weight)
    # else the query, and not what it finds, decides on the best one
    torch.nn.init.normal_(model.model.query_encoder.query_embedding.weight, std=0.1)
    return model.eval()


@pytest.fixture
def batch(shapes, processor):
    """Collate three images with their sentences, one phrase or several, boxes and masks."""
    collate = GroundingCollator(processor, with_targets=False, with_masks=True)
    return collate([shapes["test"][index] for index in range(3)])


# model


def test_published_outputs_are_unchanged_by_presence():
    case, arrays = load_case("res_bert")
    model = golden_model(case)
    with torch.no_grad():
        expected = model(**golden_inputs(case, arrays))
    config = RefTRConfig(**{**model.config.to_dict(), "predict_presence": True})
    taught = RefTRForVisualGrounding._from_config(config, attn_implementation=model.config._attn_implementation)
    missing, unexpected = taught.load_state_dict(model.state_dict(), strict=False)
    assert {name.split(".")[0] for name in missing} == {"presence_head"}
    assert not unexpected
    with torch.no_grad():
        outputs = taught.eval()(**golden_inputs(case, arrays))
    assert torch.equal(outputs.pred_boxes, expected.pred_boxes)
    assert torch.equal(outputs.pred_masks, expected.pred_masks)
    assert torch.equal(outputs.presence, torch.full_like(outputs.presence, 0.5)), "equally probable at first"
    assert expected.presence is None


def test_best_query_gives_boxes_and_masks(several, batch):
    with torch.no_grad():
        outputs = several(**model_inputs(batch), output_attentions=True)
    sentences, slots = outputs.phrase_mask.shape
    assert outputs.presence_logits.shape == (sentences, slots, 3)
    assert outputs.query_boxes.shape == (sentences, slots, 3, 4)
    best = outputs.presence.argmax(-1)
    assert len(best[outputs.phrase_mask].unique()) > 1
    for sentence, slot in outputs.phrase_mask.nonzero().tolist():
        query = best[sentence, slot]
        assert torch.equal(outputs.pred_boxes[sentence, slot], outputs.query_boxes[sentence, slot, query])
        assert torch.equal(outputs.pred_masks[sentence, slot], outputs.query_masks[sentence, slot, query])
        others = outputs.query_masks[sentence, slot]
        assert not torch.equal(others[0], others[1]), "each query has a mask of its own"
    assert outputs.mask_attentions.shape[:2] == (sentences, slots)
    assert outputs.auxiliary_outputs[0]["query_boxes"].shape == outputs.query_boxes.shape


def test_presence_divides_logits_by_temperature(several, batch):
    several.config.presence_temperature, several.config.presence_threshold = 2.0, 0.7
    with torch.no_grad():
        outputs = several(**model_inputs(batch))
    torch.testing.assert_close(outputs.presence, (outputs.presence_logits / 2).sigmoid())
    assert outputs.presence_threshold.item() == pytest.approx(0.7)


def test_presence_is_independent_of_grouping_by_image(several, shapes, processor):
    """Sentences of an image have the presence that they have alone."""
    row = shapes["test"][0]
    texts = [sentence["text"] for sentence in row["sentences"]][:3]
    with torch.no_grad():
        together = several(**processor(images=row["image"], text=texts))
        for index, text in enumerate(texts):
            alone = several(**processor(images=row["image"], text=text))
            torch.testing.assert_close(together.presence_logits[index], alone.presence_logits[0], atol=2e-4, rtol=1e-4)


# labels and losses


def test_first_queries_are_matched_with_lowest_total_cost():
    torch.manual_seed(0)
    cost, is_target = torch.rand(5, 2, 4, 3), torch.rand(5, 2, 3) > 0.4
    matches = match_queries(cost, is_target)
    for sentence, slot in itertools.product(range(5), range(2)):
        targets = is_target[sentence, slot].nonzero().flatten().tolist()
        found = matches[sentence, slot].tolist()
        assert sorted(found[: len(targets)]) == targets
        assert set(found[len(targets) :]) == {-1}
        expected = min(
            sum(cost[sentence, slot, query, target].item() for query, target in enumerate(order))
            for order in itertools.permutations(targets)
        )
        total = sum(cost[sentence, slot, query, target].item() for query, target in enumerate(found) if target >= 0)
        assert total == pytest.approx(expected)


def test_presence_decides_between_equal_boxes():
    """Of two queries that find the same, the more certain one gets the target that both are close to."""
    label = {"boxes": torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.2, 0.2, 0.1, 0.1]])}
    targets = pad_targets([{**label, "target_slots": torch.tensor([0, 0])}], torch.tensor([[True]]))
    boxes = torch.full((1, 1, 3, 4), 0.5)
    cost = matching_cost(boxes, targets, 2.0, 3.0, torch.tensor([[[0.1, 0.9, 0.5]]]))
    torch.testing.assert_close(cost[0, 0, 0] - cost[0, 0, 1], torch.full((2,), 0.8))


def test_more_targets_than_queries_match_the_nearest():
    cost = torch.tensor([[[[3.0, 1.0, 2.0]]]])
    assert match_queries(cost, torch.tensor([[[True, True, True]]])).tolist() == [[[1]]]
    assert match_queries(cost, torch.tensor([[[True, False, True]]])).tolist() == [[[2]]]


def test_losses_of_several_targets_equal_direct_calculation():
    torch.manual_seed(1)
    phrase_mask = torch.tensor([[True, True, False], [True, True, True]])
    query_boxes = torch.rand(2, 3, 2, 4) * 0.3 + 0.35
    logits = torch.randn(2, 3, 2)
    boxes = torch.rand(3, 4) * 0.3 + 0.35
    labels = [
        {"boxes": boxes, "target_slots": torch.tensor([1, 0, 1]), "is_absent": torch.tensor([False, False])},
        # nothing for the first phrase, the second is not known, the third has one that a query hits
        {
            "boxes": query_boxes[1, 2, 1:].clone(),
            "target_slots": torch.tensor([2]),
            "is_absent": torch.tensor([True, False, False]),
        },
    ]
    config = RefTRConfig(predict_presence=True, num_queries_per_phrase=2, **WEIGHTS)
    _, parts = grounding_loss(
        query_boxes[:, :, 0], phrase_mask, labels, config, presence_logits=logits, query_boxes=query_boxes
    )

    def cost(query, target, logit):
        giou = paired_giou(query, target)
        return 2 * (query - target).abs().sum() - 3 * giou - logit.sigmoid()

    expected_l1, expected_presence = 0, 0
    for sentence, slot, targets in ((0, 0, boxes[1:2]), (0, 1, boxes[[0, 2]]), (1, 0, []), (1, 2, labels[1]["boxes"])):
        queries, of_phrase = query_boxes[sentence, slot], logits[sentence, slot]
        orders = list(itertools.permutations(range(len(targets))))
        best = min(
            orders,
            key=lambda order: sum(cost(queries[q], targets[t], of_phrase[q]).item() for t, q in enumerate(order)),
        )
        is_right = torch.zeros(2)
        for target, query in enumerate(best):
            expected_l1 += (queries[query] - targets[target]).abs().sum() / len(best)
            pair = box_convert(torch.stack((queries[query], targets[target])), "cxcywh", "xyxy")
            is_right[query] = float(box_iou(pair[:1], pair[1:]) > 0.5)
        expected_presence += torch.nn.functional.binary_cross_entropy_with_logits(of_phrase, is_right)
    torch.testing.assert_close(parts["loss_bbox"], expected_l1 / 2)
    torch.testing.assert_close(parts["loss_presence"], expected_presence / 2)


def paired_giou(first, second):
    from torchvision.ops import generalized_box_iou

    pair = box_convert(torch.stack((first, second)), "cxcywh", "xyxy")
    return generalized_box_iou(pair[:1], pair[1:])[0, 0]


def test_masks_are_trained_by_queries_of_their_boxes():
    """With two targets, each query learns the mask of the object that its box is matched with."""
    boxes = torch.tensor([[0.25, 0.5, 0.4, 0.8], [0.75, 0.5, 0.4, 0.8]])
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, :, :4], masks[1, :, 4:] = True, True
    logits = torch.where(masks, 9.0, -9.0)[[1, 0]]  # the first query is right, the second left
    labels = [
        {"boxes": boxes, "masks": masks, "target_slots": torch.tensor([0, 0]), "is_absent": torch.tensor([False])}
    ]
    config = RefTRConfig(predict_presence=True, predict_masks=True, num_queries_per_phrase=2)
    arguments = {"phrase_mask": torch.tensor([[True]]), "labels": labels, "config": config}
    arguments |= {
        "pred_boxes": boxes[None, :1],
        "pred_masks": logits[None, :1],
        "presence_logits": torch.zeros(1, 1, 2),
    }
    arguments |= {"query_masks": logits[None, None], "pixel_mask": torch.ones(1, 8, 8)}
    right = grounding_loss(query_boxes=boxes[[1, 0]][None, None], **arguments)[1]
    wrong = grounding_loss(query_boxes=boxes[None, None], **arguments)[1]
    assert right["loss_dice"] < 0.01 < 0.9 < wrong["loss_dice"]


def test_one_query_learns_the_nearest_of_several_targets():
    boxes = torch.tensor([[0.2, 0.2, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2]])
    labels = [{"boxes": boxes, "target_slots": torch.tensor([0, 0]), "is_absent": torch.tensor([False])}]
    _, parts = grounding_loss(boxes[None, 1:], torch.tensor([[True]]), labels, RefTRConfig())
    assert parts["loss_bbox"].item() == 0


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ({"target_slots": [0]}, r"\['target_slots'\] has shape \(1,\), expected \(2,\)"),
        ({"target_slots": [0, 5]}, r"\['target_slots'\] is \[0, 5\]; expected phrase slots from 0 to 1"),
        ({"target_slots": [0, 1], "is_absent": [False] * 3}, r"\['is_absent'\] has shape \(3,\)"),
    ],
)
def test_invalid_target_slots_are_refused(label, message):
    label = {name: torch.tensor(value) for name, value in label.items()}
    with pytest.raises(ValueError, match=message):
        pad_targets([{"boxes": torch.full((2, 4), 0.5), **label}], torch.tensor([[True, True]]))


def test_processor_labels_none_one_and_several_targets(processor):
    image = Image.new("RGB", (80, 60))
    left, right = [0, 0, 40, 60], [40, 0, 80, 60]
    mask = np.zeros((60, 80), dtype=bool)
    mask[:, :40] = True
    batch = processor(
        images=image,
        text=["both cups and no cat", "the cup"],
        phrases=[["both cups", "no cat", "and"], ["the cup"]],
        boxes=[[[left, right], [], left], [right]],
        masks=[[[mask, ~mask], [], mask], [~mask]],
    )
    first, second = batch["labels"]
    assert first["target_slots"].tolist() == [0, 0, 2]
    assert first["is_absent"].tolist() == [False, True, False]
    torch.testing.assert_close(first["boxes"][:, 0], torch.tensor([0.25, 0.75, 0.25]))
    assert first["masks"].shape[0] == 3
    assert not (first["masks"][0] & first["masks"][1]).any()
    assert set(second) == {"boxes", "masks"}, "one target per phrase is labelled as before"
    alone = processor(images=image, text="no cat", boxes=[[]], masks=[[]])["labels"][0]
    assert alone["boxes"].shape == (0, 4)
    assert alone["is_absent"].tolist() == [True]
    with pytest.raises(ValueError, match=r"have \[2\] boxes and \[1\] masks: give a mask for each box"):
        processor(images=image, text="cups", phrases=["cups"], boxes=[[left, right]], masks=[[mask]])


# training


def test_every_parameter_gets_a_gradient(several, batch):
    several.train()
    inputs = model_inputs(batch)
    labels = batch["labels"]
    labels[0] = {"boxes": torch.zeros(0, 4), "target_slots": torch.zeros(0, dtype=torch.long)}
    labels[0]["is_absent"] = torch.ones(1, dtype=torch.bool)
    outputs = several(**inputs, labels=labels)
    outputs.loss.backward()
    assert outputs.loss_dict["loss_presence"] > 0
    lacking = [name for name, weight in several.named_parameters() if weight.requires_grad and weight.grad is None]
    assert lacking == []


def test_frozen_answers_keep_boxes_and_masks_to_the_bit(make_model, batch, tmp_path):
    make_model(**{**SEVERAL, "freeze_answers": True}).save_pretrained(tmp_path)
    model = RefTRForVisualGrounding.from_pretrained(tmp_path)
    inputs = model_inputs(batch)
    with torch.no_grad():
        before = model.eval()(**inputs)
    model.train()
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert {name.split(".")[0] for name in trained} == {"presence_head"}
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=1.0)
    for _ in range(2):
        loss = model(**inputs, labels=batch["labels"]).loss
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        after = model.eval()(**inputs)
    assert torch.equal(before.query_boxes, after.query_boxes)
    assert torch.equal(before.query_masks, after.query_masks)
    assert not torch.equal(before.presence_logits, after.presence_logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_queries_per_phrase": 2}, "requires predict_presence=True"),
        ({"num_queries_per_phrase": 0, "predict_presence": True}, "must be at least 1"),
        ({"freeze_answers": True}, "trains the presence head alone"),
        ({"presence_threshold": 1.5}, "must be a probability"),
        ({"presence_temperature": 0.0}, "greater than 0"),
    ],
)
def test_invalid_presence_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RefTRConfig(**settings)


# answers


def test_ranked_queries_follow_score():
    outputs = SimpleNamespace(
        presence=torch.tensor([[[0.2, 0.9, 0.6], [0.1, 0.2, 0.3]]]),
        presence_threshold=torch.tensor(0.5),
        query_boxes=torch.arange(6.0).reshape(1, 2, 3, 1).expand(-1, -1, -1, 4),
        query_masks=torch.arange(6.0).reshape(1, 2, 3, 1, 1),
        pred_masks=torch.zeros(1, 2, 1, 1),
        phrase_mask=torch.tensor([[True, True]]),
    )
    ranked = rank_queries(outputs)
    assert ranked.boxes_cxcywh[0, :, :, 0].tolist() == [[1, 2, 0], [5, 4, 3]]
    assert ranked.mask_logits[0, :, :, 0, 0].tolist() == [[1, 2, 0], [5, 4, 3]]
    assert ranked.is_answer.tolist() == [[[True, True, False], [False, False, False]]]
    assert rank_queries(outputs, 0.25).is_answer.tolist() == [[[True, True, False], [True, False, False]]]


def answers_of(several, processor, threshold):
    pipe = VisualGroundingPipeline(several, processor=processor)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8))
    return pipe, image, pipe(image, text=["the red circle", "the star"], threshold=threshold)


def test_pipeline_answers_none_one_or_several_times(several, processor):
    _, image, everything = answers_of(several, processor, 0.0)
    assert [answer["label"] for answer in everything] == ["the red circle"] * 3 + ["the star"] * 3
    scores = [answer["score"] for answer in everything]
    assert scores[:3] == sorted(scores[:3], reverse=True)
    assert len({round(score, 6) for score in scores}) > 3
    threshold = (scores[0] + scores[1]) / 2
    pipe, _, found = answers_of(several, processor, threshold)
    assert [answer["score"] > threshold for answer in found if answer["box"]] == [True] * sum(
        score > threshold for score in scores
    )
    assert {answer["label"] for answer in found} == {"the red circle", "the star"}, "each phrase is answered"
    _, _, nothing = answers_of(several, processor, 0.999999)
    assert [(answer["box"], answer["mask"]) for answer in nothing] == [(None, None)] * 2
    assert [answer["score"] for answer in nothing] == pytest.approx([max(scores[:3]), max(scores[3:])], abs=1e-5)
    assert pipe.draw(image, nothing).size
    predictor = RefTRPredictor(several, processor)
    predictor.set_image(image)
    same = predictor.predict(["the red circle", "the star"], threshold=threshold)
    assert [answer["score"] for answer in same] == pytest.approx([answer["score"] for answer in found], abs=1e-5)
    lines = predictor.to_json(nothing)
    assert [(line["box"], line["segmentation"]) for line in lines] == [(None, None)] * 2
    assert all(0 < line["score"] < 1 for line in lines)


def test_library_pipeline_returns_scores(several, processor, tmp_path):
    several.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    detector = pipeline("zero-shot-object-detection", model=str(tmp_path))
    image = Image.new("RGB", (80, 60))
    answers = detector(image, candidate_labels=["the star"], threshold=0.0)
    predictor = RefTRPredictor(several, processor)
    predictor.set_image(image)
    expected = [answer["score"] for answer in predictor.predict("the star", threshold=0.0)]
    assert [answer["score"] for answer in answers] == pytest.approx(expected, abs=1e-4)
    assert len(detector(image, candidate_labels=["the star"], threshold=expected[1] - 1e-3)) == 2


def test_stored_threshold_is_the_default(several, processor, tmp_path):
    several.config.presence_threshold = 0.999999
    several.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    predictor = RefTRPredictor.from_pretrained(tmp_path)
    predictor.set_image(Image.new("RGB", (80, 60)))
    assert [answer["box"] for answer in predictor.predict("the star")] == [None]
    assert len(predictor.predict("the star", threshold=0.0)) == 3


def test_post_processing_agrees_on_scores_and_masks(several, processor):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8))
    inputs = processor(images=image, text=["the red circle is left of the star"], phrases=[["circle", "star"]])
    with torch.no_grad():
        outputs = several(**inputs)
    threshold = outputs.presence[outputs.phrase_mask].median().item()
    (result,) = processor.post_process_grounded_object_detection(
        outputs, threshold=threshold, target_sizes=[(60, 80)], text_labels=[["circle", "star"]]
    )
    assert len(result["boxes"]) == len(result["scores"]) == len(result["masks"]) == len(result["text_labels"])
    assert 0 < len(result["boxes"]) < 6
    assert (result["scores"] > threshold).all()
    (found,) = processor.image_processor.post_process_object_detection(outputs, threshold, [(60, 80)])
    assert torch.equal(found["boxes"], result["boxes"])
    assert torch.equal(found["scores"], result["scores"])
    (segmented,) = processor.post_process_referring_segmentation(outputs, [(60, 80)], threshold=threshold)
    assert torch.equal(segmented["masks"], result["masks"][:, 0])
    assert set(segmented["phrase_scores"]) == {0, 1}


def test_presence_costs_at_most_one_percent_of_a_forward():
    flops = {}
    for presence in (False, True):
        with torch.device("meta"):
            model = RefTRForVisualGrounding(RefTRConfig(predict_masks=True, predict_presence=presence)).eval()
            inputs = {"pixel_values": torch.zeros(1, 3, 640, 640), "input_ids": torch.zeros(1, 20, dtype=torch.long)}
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**inputs)
        flops[presence] = counter.get_total_flops()
    assert 1 < flops[True] / flops[False] < 1.01
