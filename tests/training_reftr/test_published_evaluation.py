"""Published evaluation: batches composed independently from the raw index, and published misses."""

import json
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_convert, box_iou

import data_scripts
import train_reftr
from data_scripts.checking import validate_boxes
from data_scripts.exporting import export_dataset
from data_scripts.reports import format_statistics
from modeling_reftr import RefTRForVisualGrounding, RefTRProcessor
from modeling_reftr.image_processing_reftr import resized_size
from reftr_cli.data import main as data_main
from reftr_cli.preview import draw_preview
from tests.helpers.layout_reftr_index import rectangle, save
from tests.helpers.processes import run_ranks
from training_reftr.data import EvaluationData, TrainingData
from training_reftr.sampling import published_batches, source_order
from training_reftr.settings import TrainingSettings
from training_reftr.sources import load_rows
from training_reftr.streams import StreamedRows


# (width, height), wide images first; each group gives the images of one published batch
SIZES = ((64, 20), (48, 36), (128, 30), (64, 48), (24, 64), (50, 64), (30, 96), (64, 64))
GROUPS = ((0, 1, 2), (4, 6), (0, 3, 4, 5), (1, 2, 3, 7))
EXPRESSIONS = ("the red circle", "a small blue square", "the green star on the left", "triangle")
BATCH_SIZE = 8


def make_index(folder):
    """Write an index of 29 expressions with interleaved images and two misses; return its val records."""
    rng = np.random.default_rng(0)
    images = folder / "refcoco" / "images" / "train2014"
    masks = folder / "refcoco" / "masks" / "refcoco"
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    for number, (width, height) in enumerate(SIZES):
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"COCO_train2014_{number:012d}.jpg", quality=95)
    records = []
    for number in range(29):
        image = int(rng.choice(GROUPS[number // BATCH_SIZE]))
        width, height = SIZES[image]
        x, y = rng.uniform(0, width / 2), rng.uniform(0, height / 2)
        box = [x, y, x + rng.uniform(2, width / 2), y + rng.uniform(2, height / 2)]
        if number == 11:  # without extent in integer pixels
            box = [5.2, 6.1, 5.9, 9.5]
        mask = rectangle(height, width, [int(value) for value in box]) * (number != 12)
        np.save(masks / f"{number}.npy", mask)
        records.append(
            (f"COCO_train2014_{image:012d}.jpg", f"{number}.npy", box, f"{EXPRESSIONS[number % 4]} {number}")
        )
    for split in ("train", "val", "testA", "testB"):
        # val ends with a blank expression, which cannot be evaluated; the other splits have one record
        blank = (*records[0][:3], " ")
        save(
            [*records, blank] if split == "val" else records[:1],
            folder / f"refcoco/anns/refcoco/refcoco_unc_{split}.pth",
        )
    return records


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    return folder, make_index(folder)


@pytest.fixture(scope="module")
def model_folder(trained, tmp_path_factory):
    """Save a model with large box weights, so that padding visibly changes boxes and hits."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(3)
    model = RefTRForVisualGrounding.from_pretrained(trained[0], predict_masks=True)
    for layer in model.box_head.layers:
        torch.nn.init.normal_(layer.weight, std=0.35)
    model.save_pretrained(folder)
    RefTRProcessor.from_pretrained(trained[0]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def evaluate_as(recipe, model_folder, index, tmp_path_factory):
    """Run an evaluation in this process or on ranks; return (metrics, predictions by text, report.md)."""
    cache = tmp_path_factory.mktemp("cache")

    def run(*words, ranks=1, dataset_config="integer_boxes: true"):
        output = tmp_path_factory.mktemp("out")
        argv = [
            recipe, "--eval_only", "--init_from", model_folder, "--dataset", "reftr_refcoco_unc",
            "--data_dir", index[0], "--data_cache_dir", cache, "--dataset_config", f"{{{dataset_config}}}",
            "--test_splits", "val", "--output_dir", output, "--two_step_masks", "--num_pictures", "0", *words,
        ]  # fmt: skip
        if ranks > 1:
            run_ranks(["train_reftr.py", *argv], ranks)
        else:
            train_reftr.main([str(word) for word in argv])
        metrics = json.loads((output / "metrics.json").read_text())
        lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
        return metrics, {line["words"]: line for line in lines}, (output / "report.md").read_text()

    return run


def published_boxes(folder, records, model_folder, batch_size):
    """
    Return the boxes (xyxy, in pixels of the original image) by text, without the loaders of the project.

    Consecutive expressions, each with its own image, form a batch whose images are padded together and whose texts are
    padded to the fixed length.
    """
    model = RefTRForVisualGrounding.from_pretrained(model_folder).eval()
    processor = RefTRProcessor.from_pretrained(model_folder)
    boxes = {}
    for start in range(0, len(records), batch_size):
        batch = records[start : start + batch_size]
        images = [Image.open(folder / "refcoco/images/train2014" / name).convert("RGB") for name, *_ in batch]
        texts = [[text] for *_, text in batch]
        with torch.no_grad():
            outputs = model(**processor(images=images, text=texts, padding="max_length"))
        for image, (*_, text), box in zip(images, batch, outputs.pred_boxes.reshape(-1, 4), strict=True):
            boxes[text] = (box_convert(box, "cxcywh", "xyxy") * torch.tensor(image.size * 2)).tolist()
    return boxes


def max_difference(lines, boxes):
    """Return the largest difference between predictions and boxes in pixels."""
    return max(np.abs(np.subtract(lines[text]["pred_box_xyxy"], box)).max() for text, box in boxes.items())


def test_evaluation_in_published_batches_matches_published_boxes(index, model_folder, evaluate_as):
    folder, records = index
    expected = published_boxes(folder, records, model_folder, BATCH_SIZE)
    found = {name: evaluate_as("--evaluation_batching", name) for name in ("published", "grouped", "unpadded")}
    assert max_difference(found["published"][1], expected) < 1e-3
    assert max_difference(found["grouped"][1], expected) > 0.1  # the test can distinguish the batchings
    # without padding the answers equal those of single expressions
    alone = published_boxes(folder, records, model_folder, 1)
    assert max_difference(found["unpadded"][1], alone) < 1e-3
    assert max_difference(found["unpadded"][1], expected) > 0.1

    # published accuracy: integer boxes of the index, and a box without extent counts as a miss
    targets = torch.tensor([[int(value) for value in box] for _, _, box, _ in records]).float()
    ious = box_iou(torch.tensor([expected[text] for *_, text in records]), targets).diag()
    values = {name: metrics["splits"]["val"] for name, (metrics, *_) in found.items()}
    assert values["published"]["num_phrases"] == len(records) == 29
    assert values["published"]["accuracy@0.5"] == pytest.approx((ious > 0.5).sum().item() / 29)
    assert values["published"]["mean_iou"] == pytest.approx(ious.mean().item(), abs=1e-5)
    assert found["published"][1][records[11][-1]]["iou"] == 0
    # an empty mask counts with an IoU of 0
    assert values["published"]["mask_num_phrases"] == 29
    assert (values["published"]["num_without_extent"], values["published"]["num_empty_masks"]) == (1, 2)
    accuracies = {name: value["mean_iou"] for name, value in values.items()}
    assert len(set(accuracies.values())) == 3

    for name, sentence in (
        ("published", "in the published batches, of 8 expressions that follow each other in the annotations"),
        ("grouped", "in batches of 16 images, each with all its expressions"),
        ("unpadded", "in batches of at most 16 images of one resized size: no image is padded"),
    ):
        metrics, _, report = found[name]
        assert (metrics["evaluation_batching"], metrics["evaluation_batch_size"]) == (
            name,
            8 if name == "published" else 16,
        )
        assert sentence in report
        assert ("padding changes answers" in report) == (name != "published")
        assert "1 phrases whose box has no extent count as misses, as published" in report
        assert "2 phrases with an empty mask count with a mask IoU of 0, as published" in report


def test_evaluation_on_two_ranks_keeps_published_batches(index, model_folder, evaluate_as):
    folder, records = index
    _, lines, _ = evaluate_as("--evaluation_batching", "published", "--evaluation_batch_size", "5", ranks=2)
    assert max_difference(lines, published_boxes(folder, records, model_folder, 5)) < 1e-3
    assert list(lines) == [text for row in rows_of(index) for text in (item["text"] for item in row["sentences"])]


def rows_of(index, **flags):
    return data_scripts.load(
        "reftr_refcoco_unc", "val", data_dir=index[0], cache_dir=str(index[0] / "cache"), integer_boxes=True, **flags
    )


def test_report_states_omissions_without_integer_boxes(evaluate_as, index):
    """Use boxes as annotated: every box has an extent, and empty masks do not count."""
    metrics, _, report = evaluate_as(dataset_config="")
    values = metrics["splits"]["val"]
    assert (values["num_phrases"], values["mask_num_phrases"], values["num_without_mask"]) == (29, 27, 2)
    assert (values["num_left_out"], values["num_without_extent"]) == (0, 0)
    assert "2 phrases have no mask and are left out of the mask metrics" in report
    assert values["left_out"] == {"expressions without words": 1, "masks without a pixel": 2}
    assert "the dataset left out 1 expressions without words, 2 masks without a pixel" in report
    assert "counts boxes without extent as misses" in report


# the order


def test_source_order_follows_index_whatever_row_order(index):
    rows = rows_of(index)
    texts = [text for *_, text in index[1]]
    for mixed in (rows, rows.shuffle(seed=1)):
        order = source_order(mixed)
        assert [mixed[row]["sentences"][sentence_index]["text"] for _, row, sentence_index in order] == texts
    # omitted rows leave gaps and do not change the composition of the batches
    fewer = rows.select(range(1, len(rows)))
    complete, part = (published_batches(source_order(part), 8) for part in (rows, fewer))

    def texts_of(batches, part):
        return [
            [
                part[sample.index]["sentences"][sentence_index]["text"]
                for sample in batch
                for sentence_index in sample.sentences
            ]
            for batch in batches
        ]

    left_out = {item["text"] for item in rows[0]["sentences"]}
    assert left_out
    expected = [[text for text in batch if text not in left_out] for batch in texts_of(complete, rows)]
    assert texts_of(part, fewer) == [batch for batch in expected if batch]


def test_source_order_survives_export_and_streaming(index, tmp_path):
    rows = rows_of(index)
    export_dataset(data_scripts.SOURCES["reftr_refcoco_unc"], {"val": rows}, tmp_path / "export")
    args = TrainingSettings.from_flat(
        dataset=str(tmp_path / "export"), data_cache_dir=str(tmp_path / "cache"), eval_only=True, test_splits="val"
    )
    assert source_order(load_rows(args.data, eval_only=True)["val"]) == source_order(rows)
    args = TrainingSettings.from_flat(
        dataset="reftr_refcoco_unc", dataset_config={"integer_boxes": True}, data_dir=str(index[0]), streaming=True,
        validation_split="val", test_splits="val",
    )  # fmt: skip
    assert source_order(load_rows(args.data, eval_only=True)["val"]) == source_order(rows)


def test_source_order_of_rows_without_positions_is_row_order(shapes):
    order = source_order(shapes["test"])
    assert [position for position, *_ in order] == list(range(len(order)))
    assert [row for _, row, _ in order] == sorted(row for _, row, _ in order)


def test_published_batching_refuses_rows_of_unknown_order(index, processor):
    rows = rows_of(index)
    args = TrainingSettings.from_flat(evaluation_batching="published", num_workers=0)
    earlier = rows.remove_columns("positions")
    with pytest.raises(ValueError, match=r"no column 'positions'.*export the dataset again"):
        EvaluationData({"test": earlier}, processor, args, 0, 1)
    data = EvaluationData({"test": earlier}, processor, TrainingSettings.from_flat(num_workers=0), 0, 1)
    assert len(data.batches("test"))
    with pytest.raises(ValueError, match="no common order of annotations"):
        source_order(datasets.concatenate_datasets([rows, rows]))


@pytest.mark.parametrize("batching", ["published", "unpadded"])
def test_exact_batching_refuses_size_divisor(index, processor, batching):
    with pytest.raises(ValueError, match=r"size_divisor=32 pads them further: remove one of them"):
        TrainingSettings.from_flat(evaluation_batching=batching, size_divisor=32)
    processor.image_processor.size_divisor = 32
    with pytest.raises(ValueError, match=r"image processor pads further \(size_divisor=32"):
        EvaluationData(
            {"test": rows_of(index)}, processor, TrainingSettings.from_flat(evaluation_batching=batching), 0, 1
        )


def resized(row):
    return resized_size(row["height"], row["width"], shortest_edge=64, longest_edge=64)


def batches_of(rows, processor, args, rank, ranks):
    """Return the samples of each batch of a rank."""
    return EvaluationData({"test": rows}, processor, args, rank, ranks).sampler.batches["test"]


@pytest.mark.parametrize("batching", ["grouped", "published", "unpadded"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_evaluation_gives_ranks_equal_batches_and_every_phrase(index, processor, batching, ranks):
    rows = rows_of(index)
    args = TrainingSettings.from_flat(evaluation_batching=batching, evaluation_batch_size=4, num_workers=0)
    batches = [batches_of(rows, processor, args, rank, ranks) for rank in range(ranks)]
    assert len({len(mine) for mine in batches}) == 1
    seen = {
        (sample.index, sentence_index)
        for mine in batches
        for batch in mine
        for sample in batch
        for sentence_index in sample.sentences or range(len(rows[sample.index]["sentences"]))
    }
    assert len(seen) == 29
    if batching == "unpadded":
        for mine in batches:
            for batch in mine:
                assert len({resized(rows[sample.index]) for sample in batch}) == 1


def test_evaluation_pads_uneven_ranks_with_first_rows(shapes, processor):
    rows = shapes["test"]
    assert len(rows) == 10
    args = TrainingSettings.from_flat(evaluation_batch_size=2, num_workers=0)
    batches = [batches_of(rows, processor, args, rank, 4) for rank in range(4)]
    seen = Counter(sample.index for mine in batches for batch in mine for sample in batch)
    assert seen == {index: 2 if index < 2 else 1 for index in range(10)}


def test_check_warns_of_published_misses_with_reason(index, capsys, tmp_path):
    words = ["check", "reftr_refcoco_unc", "--data_dir", str(index[0]), "--cache_dir", str(tmp_path / "cache")]
    assert data_main([*words, "--integer_boxes"]) == 0
    printed = capsys.readouterr().out
    assert "warning: miss: 2\n" in printed
    for why in ("[5.0, 6.0, 5.0, 9.0] has no extent", "no pixel belongs to it"):
        assert f"{why}: it cannot be learned, and counts as a miss in an evaluation, as published" in printed
    # without integer_boxes a box without extent is an error
    (row,) = [row for row in rows_of(index) if any(item["box"] == [5, 6, 5, 9] for item in row["objects"])]
    assert [kind for kind, message in validate_boxes(row) if "no extent" in message] == ["box"]


def test_statistics_and_preview_accept_published_misses(index, tmp_path):
    """Read the rows without changes in statistics and previews."""
    rows = rows_of(index)
    assert "val" in format_statistics({"val": rows})
    assert draw_preview(rows, 12, 0).width > 64


# training


@pytest.mark.parametrize("streaming", [False, True])
def test_training_drops_boxes_without_extent_and_empty_masks(index, processor, streaming):
    """Train on val with integer boxes: 28 of 29 expressions remain, and empty masks give no labels."""
    rows = rows_of(index)
    if streaming:
        rows = StreamedRows.of(rows.to_iterable_dataset())
    args = TrainingSettings.from_flat(batch_size=1, num_workers=0, group_by_image=False, augmentation="none")
    data = TrainingData(rows, processor, args, 0, 1, with_masks=True)
    batches = list(data.batches(0))
    assert len(batches) == data.num_batches(0) == 28
    labels = {batch["targets"][0][0]["words"]: batch["labels"][0] for batch in batches}
    assert index[1][11][-1] not in labels
    assert all("boxes" in label for label in labels.values())
    assert [text for text, label in labels.items() if "masks" not in label] == [index[1][12][-1]]


def test_processor_refuses_box_without_extent(index, processor):
    with pytest.raises(ValueError, match=r"must be \(x0, y0, x1, y1\) with x0 < x1"):
        processor(images=Image.new("RGB", (64, 48)), text="a dot", boxes=[[5, 6, 5, 9]])
