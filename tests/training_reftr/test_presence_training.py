"""Phrases with none or several targets in training, evaluation, calibration, reports and commands."""

import itertools
import json
import math
import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

import data_scripts
from modeling_reftr import RefTRForVisualGrounding, RefTRProcessor
from modeling_reftr.rle_reftr import from_coco_rle
from tests.helpers.tiny import ROOT, TINY_SET
from training_reftr.baselines import constant_box, shuffled_expressions
from training_reftr.build import load_weights
from training_reftr.calibration import fit_temperature, fit_threshold, logit, scale_score
from training_reftr.data import GroundingCollator, TrainingData
from training_reftr.evaluation import evaluate, summarize
from training_reftr.generalized import answers_of, generalized_metrics, is_exact, targets_in
from training_reftr.metrics import box_ious
from training_reftr.negatives import ImageContext, add_negatives, context_of, may_fit
from training_reftr.preflight import count_labels, refuse_idle_model
from training_reftr.report import format_generalized, prediction
from training_reftr.samples import make_sample
from training_reftr.sampling import BuiltOrder
from training_reftr.settings import TrainingSettings
from training_reftr.streams import StreamedRows, count_shards
from training_reftr.trainer_metrics import score_phrases
from training_reftr.visualization import draw_presence, draw_validation_images


QUESTIONS = {"absent_questions": 2, "half_right_questions": 1, "plural_questions": 2, "max_objects": 4}
BOX, OTHER = [0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0]


@pytest.fixture(scope="module")
def rows(data_cache):
    """Load shapes with questions about none and several of them."""
    return data_scripts.load("shapes", cache_dir=data_cache, **{**TINY_SET, **QUESTIONS, "repeated_colors": 1.0})


def phrases_of(rows):
    return [(row, sentence, phrase) for row in rows for sentence in row["sentences"] for phrase in sentence["phrases"]]


def settings_of(**values):
    return TrainingSettings.from_flat(**{"dataset": "shapes", "image_size": 64, "num_workers": 0, **values})


def record_of(boxes, scores, targets, threshold=0.5, **fields):
    """Return the record of a phrase in an image of 40 x 20 pixels."""
    targets = [{"object_id": str(box), "box": box, "boxes": [box], "segmentation": None} for box in targets]
    return {
        "image_id": "a",
        "sentence_id": "s",
        "phrase": 0,
        "words": "the star",
        "types": [],
        "image_size": (20, 40),
        "pred_box": boxes[0] if boxes else None,
        "iou": 0.0,
        "any_box_iou": 0.0,
        "query_boxes": boxes,
        "query_scores": scores,
        "threshold": threshold,
        **(targets[0] if len(targets) == 1 else {"targets": targets}),
        **fields,
    }


# samples and labels


def test_collator_labels_all_targets_of_a_phrase(rows, processor):
    collate = GroundingCollator(processor, with_masks=True)
    chosen = list(rows["test"])[:4]
    batch = collate(chosen)
    counts = []
    sentences = [(row, sentence) for row in chosen for sentence in row["sentences"]]
    for label, targets, (row, sentence) in zip(batch["labels"], batch["targets"], sentences, strict=True):
        named = [phrase["objects"] for phrase in sentence["phrases"]]
        counts += map(len, named)
        slots = label.get("target_slots", torch.arange(len(label["boxes"]))).tolist()
        assert slots == [slot for slot, objects in enumerate(named) for _ in objects]
        absent = label.get("is_absent", torch.zeros(len(named), dtype=torch.bool)).tolist()
        assert absent == [not objects for objects in named]
        assert len(label["masks"]) == len(slots)
        for target, objects in zip(targets, named, strict=True):
            found = [item["object_id"] for item in targets_in(target)]
            assert found == [row["objects"][index]["object_id"] for index in objects]
    assert {0, 1, 2} <= set(counts)


def test_no_target_sentences_are_trained_on_only_by_models_with_presence(rows):
    train = rows["train"]
    absent = {sentence["sentence_id"] for _, sentence, phrase in phrases_of(train) if not phrase["objects"]}
    assert absent

    def taken(learns_absence):
        samples = BuiltOrder(train, 100, 0, False, learns_absence).samples(0)
        return {
            train[sample.index]["sentences"][index]["sentence_id"] for sample in samples for index in sample.sentences
        }

    every = {sentence["sentence_id"] for row in train for sentence in row["sentences"]}
    assert taken(True) == every
    assert taken(False) == every - absent
    stream = StreamedRows.of(train.to_iterable_dataset(num_shards=2))
    counted = [
        sum(shard.num_samples for shard in count_shards(stream, 1, learns_absence=on).values()) for on in (1, 0)
    ]
    assert counted == [len(every), len(every - absent)]
    num_boxes, num_masks = count_labels(train, with_masks=True)
    assert num_boxes == num_masks == len(every - absent)


def test_training_batches_refer_to_learnable_phrases(rows, processor):
    for learns_absence in (False, True):
        data = TrainingData(
            rows["train"], processor, settings_of(batch_size=2), 0, 1, with_masks=True, learns_absence=learns_absence
        )
        labels = [label for batch in data.batches(0) for label in batch["labels"]]
        assert any(len(label["boxes"]) > 1 for label in labels)
        assert any("is_absent" in label and label["is_absent"].any() for label in labels) == learns_absence


# negatives


@pytest.mark.parametrize(
    ("text", "categories", "expected"),
    [
        ("the cat", ["cat"], False),
        ("the brown dog", ["dog"], True),
        ("a puppy", ["dog"], True),
        ("the brown sofa on the left", ["sofa"], True),
        ("the large thing on the left", ["cat"], True),
        ("the cat", [""], False),
    ],
)
def test_guard_rejects_what_may_be_true_after_all(text, categories, expected):
    context = ImageContext(frozenset({"dog"}), frozenset({"dog", "brown", "sofa"}))
    assert may_fit(text, categories, context) == expected


def test_negatives_are_a_function_of_the_batch(processor):
    objects = [{"object_id": "1", "box": BOX, "boxes": [BOX], "category": "", "segmentation": None}]

    def sample_of(number, name):
        texts = [f"the {name}", f"a striped {name}"]
        sentences = [{"sentence_id": f"{number}/{text}", "text": text, "phrases": [phrase_of(text)]} for text in texts]
        row = {"image_id": str(number), "height": 20, "width": 40, "sentences": sentences}
        row["objects"] = [{**objects[0], "category": name}]
        sample = make_sample(row, np.zeros((20, 40, 3), dtype=np.uint8), processor.image_processor, with_masks=True)
        sample.key, sample.context = f"0/0/{number}", context_of(row)
        return sample

    def phrase_of(text):
        return {"start": 0, "end": len(text), "objects": [0], "types": []}

    samples = [sample_of(*item) for item in enumerate(["cat", "dog", "cat", "cup", "car"])]
    extended = add_negatives(samples, 1.5)
    again = add_negatives(samples, 1.5)
    texts = [[sentence["text"] for sentence in sample.sentences] for sample in extended]
    assert texts == [[sentence["text"] for sentence in sample.sentences] for sample in again]
    assert [len(of_image) for of_image in texts] == [5] * 5
    for of_image, name in zip(texts, ["cat", "dog", "cat", "cup", "car"], strict=True):
        assert not any(name in text for text in of_image[2:])
    for sample in samples:
        sample.key = sample.key.replace("0/", "0/1", 1)
    other = add_negatives(samples, 1.5)
    assert texts != [[sentence["text"] for sentence in sample.sentences] for sample in other], "another epoch"
    batch = GroundingCollator(processor, with_masks=True, are_resized=True, negative_ratio=1.5)(samples)
    absent = [bool(label["is_absent"].all()) for label in batch["labels"] if "is_absent" in label]
    assert absent == [True] * 15
    assert len(batch["labels"]) == 25


def test_negatives_require_presence(make_model):
    optimization = settings_of().optimization
    with pytest.raises(ValueError, match=r"negative_ratio=0\.5 asks about what is not in an image"):
        refuse_idle_model(make_model(), optimization, 0.5)
    refuse_idle_model(make_model(predict_presence=True), optimization, 0.5)
    with pytest.raises(ValueError, match="presence would learn nothing"):
        refuse_idle_model(make_model(predict_presence=True, presence_loss_coefficient=0.0), optimization)


# evaluation


@pytest.fixture(scope="module")
def evaluated(rows, tokenizer, data_cache):
    """Evaluate a model of three queries with random weights, whose presence and boxes differ."""
    from modeling_reftr import RefTRConfig, RefTRImageProcessor
    from tests.helpers.tiny import TINY_MODEL, TINY_TEXT

    torch.manual_seed(0)
    text = {**TINY_TEXT, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    several = {"predict_presence": True, "num_queries_per_phrase": 3, "predict_masks": True}
    model = RefTRForVisualGrounding(RefTRConfig(**{**TINY_MODEL, "text_config": text, **several})).eval()
    torch.nn.init.normal_(model.box_head.layers[-1].weight, std=0.5)
    torch.nn.init.normal_(model.presence_head.output.weight)
    processor = RefTRProcessor(RefTRImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}), tokenizer)
    records = evaluate(model, processor, rows["test"], settings_of(), Accelerator(cpu=True), "test")
    return model, processor, records


def test_records_have_answers_of_all_queries(evaluated, rows):
    model, processor, records = evaluated
    expected = phrases_of(rows["test"])
    assert len(records) == len(expected)
    for record, (row, sentence, phrase) in list(zip(records, expected, strict=True))[::7]:
        assert [target["object_id"] for target in targets_in(record)] == [
            row["objects"][index]["object_id"] for index in phrase["objects"]
        ]
        assert record["query_scores"] == sorted(record["query_scores"], reverse=True)
        assert len(record["query_boxes"]) == 3
        assert record["pred_box"] == record["query_boxes"][0]
        spans = [(part["start"], part["end"]) for part in sentence["phrases"]]
        inputs = processor(images=row["image"], text=sentence["text"], phrases=spans)
        with torch.no_grad():
            outputs = model(**inputs)
        sizes = [(row["height"], row["width"])]
        (result,) = processor.post_process_referring_segmentation(outputs, sizes)
        chosen = [index for index, slot in enumerate(result["phrase_indices"]) if slot == record["phrase"]]
        answers = answers_of(record)
        assert len(answers) == len(chosen)
        union = np.zeros(sizes[0], dtype=bool)
        for index in chosen:
            union |= result["masks"][index].numpy()
        truth = np.zeros(sizes[0], dtype=bool)
        for target in targets_in(record):
            truth |= from_coco_rle(target["segmentation"]).astype(bool)
        assert record["answer_pixels"] == pytest.approx(((union & truth).sum(), (union | truth).sum()), abs=3)


def test_summary_has_metrics_of_one_target_and_of_all(evaluated, rows):
    _, _, records = evaluated
    values = summarize(records)
    single = [record for record in records if "targets" not in record]
    assert 0 < values["num_phrases"] == len(single) < len(records)
    assert values["generalized"]["num_phrases"] == len(records)
    assert values["accuracy@0.5"] == pytest.approx(np.mean([record["iou"] > 0.5 for record in single]))
    assert values["pr_f1_iou@0.5"] == pytest.approx(np.mean([is_exact(record) for record in records]))
    assert values["n_acc"] == pytest.approx(
        np.mean([not answers_of(record) for record in records if not targets_in(record)])
    )
    kinds = values["generalized"]["per_kind"]
    assert {"absent", "half_right", "plural"} <= kinds.keys()
    assert "auroc" in kinds["absent"]
    assert "auroc" not in kinds["plural"]
    assert not {"absent", "plural"} & values["per_kind"].keys()
    groups = values["generalized"]["per_group"]
    assert sum(group["num_phrases"] for group in groups.values()) == len(records)
    lines = "\n".join(format_generalized(values))
    assert "| several targets |" in lines
    assert f"| half_right | {kinds['half_right']['n_acc']:.3f} |" in lines
    assert shuffled_expressions(records) is not None
    assert constant_box(rows["train"], records)["num_phrases"] == len(single)
    assert draw_presence(values["generalized"]).size[0] > 700
    assert draw_validation_images(records, rows["test"], 6) is not None


def test_metrics_by_hand():
    records = [
        record_of([BOX, OTHER], [0.9, 0.2], [BOX], types=["place"]),
        record_of([BOX, OTHER], [0.9, 0.8], [OTHER, BOX]),
        record_of([BOX, OTHER], [0.9, 0.3], [OTHER, BOX]),
        record_of([BOX, OTHER], [0.4, 0.3], [], types=["absent"]),
        record_of([BOX, OTHER], [0.6, 0.3], [], types=["half"]),
        record_of([], [], [BOX]),
    ]
    values = generalized_metrics(records, 0.5)
    assert values["pr_f1_iou@0.5"] == pytest.approx(3 / 6)
    assert (values["n_acc"], values["t_acc"]) == (1 / 2, 3 / 4)
    kinds = values["generalized"]["per_kind"]
    assert kinds["place"] == {"pr_f1_iou@0.5": 1.0, "num_phrases": 1}
    assert (kinds["absent"]["auroc"], kinds["absent"]["n_acc"]) == (3 / 4, 1.0)
    assert (kinds["half"]["auroc"], kinds["half"]["n_acc"]) == (3 / 4, 0.0)
    line = prediction("test", records[1])
    assert [answer["score"] for answer in line["answers"]] == [0.9, 0.8]
    assert (line["score"], line["num_targets"]) == (0.9, 2)
    line = prediction("test", records[3])
    assert (line["box"], line["score"], line["answers"], line["num_targets"]) == (None, 0.4, [], 0)


def test_model_without_presence_is_evaluated_on_questions(rows, make_model, processor):
    records = evaluate(make_model(), processor, rows["test"], settings_of(), Accelerator(cpu=True), "test")
    values = summarize(records)
    assert (values["n_acc"], values["t_acc"]) == (0.0, 1.0), "it always answers"
    assert "presence_auroc" in values
    assert "answers" not in prediction("test", next(record for record in records if "targets" not in record))


def test_trainer_scores_phrases_with_one_target():
    boxes = torch.tensor([[0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0]])
    labels = [
        {"boxes": boxes, "target_slots": torch.tensor([0, 0, 2]), "is_absent": torch.tensor([False, True, False])},
        {
            "boxes": torch.zeros(0, 4),
            "target_slots": torch.zeros(0, dtype=torch.long),
            "is_absent": torch.tensor([True]),
        },
        {"boxes": boxes[:1]},
    ]
    pred_boxes = boxes[2].expand(3, 3, 4)
    scores = score_phrases((pred_boxes, torch.ones(3, 3, dtype=torch.bool)), labels)
    assert scores[0, :, 0].tolist() == pytest.approx([1.0, 0.5])


# calibration


def test_threshold_gives_most_exact_answers():
    rng = random.Random(0)
    records = []
    for _ in range(200):
        targets = rng.choice([[], [BOX], [BOX, OTHER]])
        scores = sorted((rng.random() for _ in range(3)), reverse=True)
        records.append(record_of([BOX, OTHER, [0.0, 0.0, 1.0, 1.0]], scores, targets))
    best = fit_threshold(records)
    counts = {
        threshold: sum(is_exact(record, threshold) for record in records) for threshold in np.linspace(0, 1, 2001)
    }
    assert sum(is_exact(record, best) for record in records) == max(counts.values())
    assert min(counts.values()) < max(counts.values())


def test_temperature_recovers_scaled_probabilities():
    rng = np.random.default_rng(0)
    truth = rng.normal(0.5, 2, size=4000)
    is_right = rng.random(4000) < 1 / (1 + np.exp(-truth))
    scores = 1 / (1 + np.exp(-3 * truth))  # three times as certain as they should be
    records = [
        record_of([BOX], [float(score)], [BOX] if right else [OTHER])
        for score, right in zip(scores, is_right, strict=True)
    ]
    assert fit_temperature(records) == pytest.approx(3, rel=0.1)
    assert scale_score(float(scores[0]), 3.0) == pytest.approx(1 / (1 + math.exp(-truth[0])), abs=1e-6)
    assert logit(1.0) == pytest.approx(-logit(0.0))
    assert fit_temperature(records[:0]) == fit_temperature([record_of([BOX], [0.9], [BOX])]) == 1.0


# runs


def test_added_queries_keep_the_first_answers(make_model, processor, tmp_path):
    model = make_model(auxiliary_loss=True)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    changes = {"predict_presence": True, "num_queries_per_phrase": 3}
    more, _, random_weights = load_weights(tmp_path, settings_of(), changes)
    assert {name.split(".")[0] for name in random_weights} == {"presence_head"}
    embeddings = more.model.query_encoder.query_embedding.weight
    (first,) = model.model.query_encoder.query_embedding.weight
    assert torch.equal(embeddings[0], first)
    assert not torch.equal(embeddings[1], embeddings[2])
    assert (embeddings - first).abs().max() < first.std()
    assert embeddings.requires_grad
    more.save_pretrained(tmp_path / "more")
    processor.save_pretrained(tmp_path / "more")
    with pytest.raises(ValueError, match="queries can be added only"):
        load_weights(tmp_path / "more", settings_of(), {"num_queries_per_phrase": 2})


@pytest.fixture(scope="module")
def taught(trained, recipe, tmp_path_factory):
    """Teach presence to the trained model by the recipe for it; return the folder and the command's result."""
    from tests.helpers.processes import run_process

    folder = tmp_path_factory.mktemp("taught")
    flags = itertools.chain.from_iterable((f"--dataset_config.{name}", value) for name, value in QUESTIONS.items())
    command = ["train_reftr.py", recipe, ROOT / "recipes/common/presence.yaml", "--init_from", trained[0], *flags]
    result = run_process([str(part) for part in [*command, "--max_steps", 4, "--output_dir", folder]], ROOT, 300)
    assert result.returncode == 0, result.stderr
    return folder, result


def test_teaching_presence_keeps_boxes_to_the_bit(taught, trained, shapes):
    before, after = (RefTRForVisualGrounding.from_pretrained(folder).eval() for folder in (trained[0], taught[0]))
    processor = RefTRProcessor.from_pretrained(taught[0])
    inputs = processor(images=shapes["test"][0]["image"], text=["the red circle", "the star"])
    with torch.no_grad():
        first, second = before(**inputs), after(**inputs)
    assert torch.equal(first.pred_boxes, second.pred_boxes)
    assert second.presence_logits.abs().min() > 0, "presence was trained"


def test_run_fits_and_reports_presence(taught):
    folder, result = taught
    config = json.loads((folder / "config.json").read_text())
    assert config["presence_threshold"] != 0.5
    assert config["presence_temperature"] != 1.0
    assert "Presence, fitted to validation: temperature" in result.stderr
    values = json.loads((folder / "metrics.json").read_text())["splits"]["test"]
    assert values["generalized"]["threshold"] == pytest.approx(config["presence_threshold"])
    assert {"presence_auroc", "expected_calibration_error", "n_acc"} <= values.keys()
    assert "none, one or several: pr_f1_iou@0.5" in result.stdout
    assert "| answered exactly |" in (folder / "report.md").read_text()
    card = (folder / "README.md").read_text()
    assert f"score over {config['presence_threshold']:.3f} are answers" in card
    assert "pr_f1_iou@0.5" in card
    with Image.open(folder / "presence.png") as drawn:
        assert drawn.width > 700
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert all(len(line["answers"]) == (line["box"] is not None) for line in lines)
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any("validation/pr_f1_iou@0.5" in line for line in log)


def test_predict_prints_scores_and_what_is_not_found(taught, run, tmp_path):
    Image.new("RGB", (80, 60), "gray").save(tmp_path / "1.png")
    command = ["-m", "reftr_cli", "predict", "--model", taught[0], "--image", tmp_path / "1.png", "--text", "the star"]
    saved = ["--save", "jsonl", tmp_path / "answers.jsonl"]
    (nothing,) = json.loads(run(*command, "--threshold", 0.9999, *saved).stdout)
    assert nothing["box"] is None
    assert 0 < nothing["score"] < 1
    (line,) = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert line["expressions"][0]["boxes"] == []
    (found,) = json.loads(run(*command, "--threshold", 0).stdout)
    assert found["box"] is not None
    assert found["score"] == nothing["score"]


@pytest.mark.slow
def test_resumed_run_with_negatives_repeats_the_uninterrupted_one(recipe, run, tmp_path):
    settings = ["--model.predict_presence", "true", "--model.num_queries_per_phrase", 3, "--model.dropout", 0.3]
    command = ["train_reftr.py", recipe, *settings, "--negative_ratio", 0.7, "--checkpoint_every", 2, "--max_steps", 5]
    command += ["--keep_checkpoints", 9]
    run(*command, "--output_dir", tmp_path / "whole")
    run(*command, "--output_dir", tmp_path / "parts", "--resume", tmp_path / "whole/checkpoints/step_00000002")

    def losses(name):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}

    whole, parts = losses("whole"), losses("parts")
    assert parts.keys() == {3, 4, 5}
    assert all(whole[step] == parts[step] for step in parts)


def test_ious_of_records_are_of_the_nearest_target(evaluated):
    _, _, records = evaluated
    several = [record for record in records if len(targets_in(record)) > 1]
    for record in several:
        best = box_ious(record["pred_box"], [target["box"] for target in targets_in(record)]).max()
        assert record["iou"] == pytest.approx(float(best))
    assert several
