"""Data flow from rows to training batches: order, batches, workers, the image cache and sources."""

import gc
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import re
import time
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import data_scripts
from benchmarks.data_flow import cache_seconds, make_rows, padded_shares
from data_scripts.exporting import export_dataset
from modeling_reftr import RefTRImageProcessor
from modeling_reftr.rle_reftr import to_coco_rle
from tests.helpers.layout_refcoco import make_refcoco
from tests.helpers.layout_toy import make_toy
from tests.helpers.processes import free_port
from tests.helpers.tiny import ROOT, TINY_SET
from training_reftr.data import EvaluationData, GroundingCollator, TrainingData, TrainingSamples, move
from training_reftr.images import ImageReader, decode_array, encode_array
from training_reftr.samples import make_sample, take_sentences
from training_reftr.sampling import BUCKET_SIZE, BuiltOrder, EpochSampler, SampleIndex
from training_reftr.settings import TrainingSettings
from training_reftr.sources import load_rows, split_of
from training_reftr.streams import StreamedRows
from training_reftr.tokenizer_training import train_tokenizer


@pytest.fixture(scope="module")
def sized_rows():
    """Return rows without images, of many sizes and with 1 to about 17 sentences."""
    return make_rows(1000)


@pytest.fixture
def arguments(data_cache):
    """Return a function that makes settings of a tiny run on the shapes; its arguments override fields."""

    def make(**overrides):
        settings = {"dataset_config": TINY_SET, "data_cache_dir": data_cache, "image_size": 64}
        return TrainingSettings.from_flat(
            **{**settings, "num_workers": 0, "batch_size": 4, "augmentation": "none", **overrides}
        )

    return make


def sentences_of(samples):
    return [(sample.index, sentence) for sample in samples for sentence in sample.sentences]


def global_batches(order, batch_size, world_size, epoch=0, progress=()):
    """Return the samples of each global batch, whichever process receives them."""
    parts = []
    for rank in range(world_size):
        sampler = EpochSampler(order, batch_size, rank, world_size)
        sampler.begin(epoch, progress)
        parts.append(list(sampler))
        assert len(parts[-1]) == len(sampler) == sampler.num_batches(progress)
        assert all(len(batch) == batch_size for batch in parts[-1])
    return [[sample for batch in batches for sample in batch] for batches in zip(*parts, strict=True)]


# the order of an epoch


@pytest.mark.parametrize("limit", [1, 3, 8, 100])
@pytest.mark.parametrize("by_shape", [False, True])
def test_epoch_order_contains_every_sentence_once(sized_rows, limit, by_shape):
    order = BuiltOrder(sized_rows, limit, 0, by_shape)
    samples = list(order.samples(3))
    assert len(samples) == order.num_samples
    expected = [(row, index) for row, items in enumerate(sized_rows["sentences"]) for index in range(len(items))]
    assert sorted(sentences_of(samples)) == expected
    assert samples == list(order.samples(3)) == list(BuiltOrder(sized_rows, limit, 0, by_shape).samples(3))
    assert samples[200:] == list(order.samples(3, 200))
    for other in (order.samples(4), BuiltOrder(sized_rows, limit, 1, by_shape).samples(3)):
        assert [sample[1:] for sample in other] != [sample[1:] for sample in samples]


def test_epoch_order_splits_sentences_of_image_evenly(sized_rows):
    counts = [len(items) for items in sized_rows["sentences"]]
    assert max(counts) > 8
    for limit in (4, 8):
        sizes = {}
        for sample in BuiltOrder(sized_rows, limit, 0, True).samples(0):
            sizes.setdefault(sample.index, []).append(len(sample.sentences))
        for row, count in enumerate(counts):
            assert len(sizes[row]) == -(-count // limit)
            assert sum(sizes[row]) == count
            assert max(sizes[row]) - min(sizes[row]) <= 1
    nine = make_rows(1).map(lambda row: {"sentences": [{"text": str(number)} for number in range(9)]})
    samples = [list(BuiltOrder(nine, 8, seed, False).samples(0)) for seed in range(8)]
    assert {tuple(sorted(len(sample.sentences) for sample in pair)) for pair in samples} == {(4, 5)}
    # drawn at random rather than cut in the order of the row
    assert len({frozenset(sample.sentences) for pair in samples for sample in pair}) > 8


def test_epoch_order_follows_selected_rows_and_skips_empty_ones(sized_rows):
    chosen = sized_rows.select([5, 700, 2])
    counts = [len(items) for items in chosen["sentences"]]
    assert Counter(index for index, _ in sentences_of(BuiltOrder(chosen, 8, 0, True).samples(0))) == dict(
        enumerate(counts)
    )
    silent = sized_rows.select(range(6)).map(lambda row, index: {"sentences": row["sentences"] if index % 2 else []},
                                             with_indices=True)  # fmt: skip
    assert {sample.index for sample in BuiltOrder(silent, 8, 0, True).samples(0)} == {1, 3, 5}


@pytest.mark.parametrize("by_shape", [False, True])
def test_epoch_sampler_ranks_share_batches_of_one_process(sized_rows, by_shape):
    order = BuiltOrder(sized_rows, 8, 0, by_shape)
    alone = global_batches(order, 12, 1)
    assert len(alone) == order.num_samples // 12
    for world_size in (2, 3, 4):
        shared = global_batches(order, 12 // world_size, world_size)
        assert [sorted(batch) for batch in shared] == [sorted(batch) for batch in alone]
    # gradient accumulation: half batches, two at a time, make the same global batches
    halves = global_batches(order, 6, 1)
    assert [sorted(a + b) for a, b in zip(halves[::2], halves[1::2], strict=False)] == [sorted(b) for b in alone]
    with pytest.raises(ValueError, match=r"\d+ training samples do not fill one global batch of 4000 \(2 processes"):
        EpochSampler(order, 2000, 0, 2)


def test_epoch_sampler_balances_sentences_across_processes(sized_rows):
    order = BuiltOrder(sized_rows, 8, 0, False)
    samplers = [list(EpochSampler(order, 8, rank, 4)) for rank in range(4)]
    dealt, cut = [], []
    for batches, batch in zip(zip(*samplers, strict=True), global_batches(order, 32, 1), strict=True):
        counts = [sum(len(sample.sentences) for sample in part) for part in batches]
        dealt.append(max(counts) / np.mean(counts))
        counts = [sum(len(sample.sentences) for sample in batch[start : start + 8]) for start in range(0, 32, 8)]
        cut.append(max(counts) / np.mean(counts))
    print(f"the fullest process holds {np.mean(dealt):.3f} of the mean, cut in pieces {np.mean(cut):.3f}")
    assert np.mean(dealt) - 1 < 0.4 * (np.mean(cut) - 1)


def test_epoch_sampler_resumes_with_remaining_samples(sized_rows):
    order = BuiltOrder(sized_rows, 8, 0, True)
    complete = global_batches(order, 4, 2, epoch=1)
    assert global_batches(order, 4, 2, epoch=1, progress=[(8, 5)]) == complete[5:]
    assert global_batches(order, 4, 2, epoch=1, progress=[(8, 5), (8, 2)]) == complete[7:]
    assert global_batches(order, 4, 2, epoch=1, progress=[(8, len(complete))]) == []
    # resume with two other numbers of processes
    seen = complete[:5]
    seen += global_batches(order, 4, 3, epoch=1, progress=[(8, 5)])[:7]
    rest = global_batches(order, 5, 1, epoch=1, progress=[(8, 5), (12, 7)])
    sentences = [item for batch in seen + rest for item in sentences_of(batch)]
    assert len(set(sentences)) == len(sentences)
    assert order.num_samples - sum(map(len, seen + rest)) < 5


def test_epoch_order_groups_similar_images_and_texts():
    """With RefCOCO's sizes, padding drops from a quarter of all pixels to almost none."""
    rows = make_rows(3000)
    for batch_size, world_size in ((8, 1), (8, 4)):
        pixels, tokens = padded_shares(rows, batch_size, world_size, by_shape=False)
        fewer_pixels, fewer_tokens = padded_shares(rows, batch_size, world_size, by_shape=True)
        print(f"{world_size} x {batch_size}: pixels {pixels:.3f} -> {fewer_pixels:.3f}, tokens {tokens:.3f} -> "
              f"{fewer_tokens:.3f}")  # fmt: skip
        assert pixels > 0.2
        assert fewer_pixels < 0.05
        assert fewer_tokens < tokens - 0.05
    # an epoch does not go from tall to wide images
    order = BuiltOrder(rows, 8, 0, True)
    shapes = np.array([order.shapes[sample.index] for sample in order.samples(0)])
    buckets = shapes[: len(shapes) // BUCKET_SIZE * BUCKET_SIZE].reshape(-1, BUCKET_SIZE).mean(axis=1)
    assert abs(np.corrcoef(buckets, np.arange(len(buckets)))[0, 1]) < 0.5
    # samples outside complete buckets have any shape
    assert shapes[len(buckets) * BUCKET_SIZE :].std() > shapes.std() / 2


def test_epoch_order_of_large_dataset_takes_seconds():
    """Order a tenth of Visual Genome; benchmarks/data_flow.py orders all of it."""
    rows = make_rows(10_800, 50)
    start = time.perf_counter()
    order = BuiltOrder(rows, 8, 0, True)
    next(order.samples(0))
    duration = time.perf_counter() - start
    print(f"{len(order.lengths)} sentences in {duration:.2f} s")
    assert len(order.lengths) > 500_000
    assert duration < 3


# batches


def contents(batch):
    """Return the tensors and targets of a batch for comparison."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    for number, label in enumerate(batch["labels"]):
        tensors |= {f"{number} {name}": value for name, value in label.items()}
    return tensors, batch["targets"]


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        (tensors, targets), (other_tensors, other_targets) = contents(batch), contents(other)
        assert targets == other_targets
        assert tensors.keys() == other_tensors.keys()
        for name, value in tensors.items():
            assert torch.equal(value, other_tensors[name]), name


def sentence_ids(batches):
    return [target[0]["sentence_id"] for batch in batches for target in batch["targets"]]


@pytest.mark.parametrize("augmentation", ["none", "published", "strong"])
def test_training_data_workers_change_no_batch_and_persist(shapes, processor, arguments, augmentation):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    python_state, numpy_state = random.getstate(), np.random.get_state()[1].tolist()
    settings = {"augmentation": augmentation, "expressions_per_image": 3}
    alone = TrainingData(shapes["train"], processor, arguments(**settings), 0, 1, with_masks=True)
    data = TrainingData(shapes["train"], processor, arguments(**settings, num_workers=2), 0, 1, with_masks=True)
    workers = set()
    for epoch in (0, 1):
        batches = list(data.batches(epoch))
        assert_same(batches, alone.batches(epoch))
        assert data.num_batches(epoch) == len(batches)
        workers.add(frozenset(process.pid for process in multiprocessing.active_children()))
    assert_same(data.batches(1, [(4, 3)]), batches[3:])
    next(data.batches(0))  # abandoned in the middle of an epoch
    assert_same(data.batches(1), batches)
    assert len(workers) == 1
    assert len(workers.pop()) >= 2
    before = len(multiprocessing.active_children())
    del data
    gc.collect()
    assert before - len(multiprocessing.active_children()) == 2
    # the global generators, used for weights and dropout, are untouched
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python_state
    assert np.random.get_state()[1].tolist() == numpy_state


def test_num_batches_does_not_disturb_running_epoch(shapes, processor, arguments):
    data = TrainingData(shapes["train"], processor, arguments(), 0, 1)
    expected = sentence_ids(data.batches(1))
    batches = data.batches(1)
    assert data.num_batches(0, [(4, 2)]) == data.num_batches(0) - 2
    assert sentence_ids(batches) == expected


def test_training_data_batches_equal_collator_output(shapes, processor, arguments):
    """Without augmentation, batches have the pixels, boxes and masks of rows given to the collator directly."""
    data = TrainingData(shapes["train"], processor, arguments(), 0, 1, with_masks=True)
    rows = {row["image_id"]: row for row in shapes["train"]}
    collator = GroundingCollator(processor, with_masks=True)
    for batch in data.batches(0):
        images = list(dict.fromkeys(target[0]["image_id"] for target in batch["targets"]))
        slots = {target[0]["sentence_id"]: slot for slot, target in enumerate(batch["targets"])}
        expected = collator([rows[name] for name in images])
        inputs = move(batch, "cpu", processor)
        for name in ("pixel_values", "pixel_mask"):
            assert torch.equal(inputs[name], expected[name])
        shared = [slot for slot, target in enumerate(expected["targets"]) if target[0]["sentence_id"] in slots]
        assert len(shared) == len(slots)
        for other in shared:
            slot = slots[expected["targets"][other][0]["sentence_id"]]
            assert batch["targets"][slot] == expected["targets"][other]
            for name in ("boxes", "masks"):
                assert torch.equal(batch["labels"][slot][name], expected["labels"][other][name])


def test_loaders_send_a_fifth_of_the_bytes(shapes, processor, arguments):
    """Send images to the device as uint8 and their mask as bool."""
    names = ("pixel_values", "pixel_mask")
    normalized = GroundingCollator(processor)([shapes["test"][0]])
    for batches in (
        TrainingData(shapes["train"], processor, arguments(), 0, 1).batches(0),
        EvaluationData({"test": shapes["test"]}, processor, arguments(), 0, 1).batches("test"),
    ):
        batch = next(iter(batches))
        assert [batch[name].dtype for name in names] == [torch.uint8, torch.bool]
        assert sum(batch[name][0].nbytes for name in names) * 5 == sum(normalized[name].nbytes for name in names)


def test_training_data_reshuffles_each_epoch_reproducibly(shapes, processor, arguments):
    data = TrainingData(shapes["train"], processor, arguments(), 0, 1)
    epochs = [sentence_ids(data.batches(epoch)) for epoch in (0, 1, 0)]
    assert epochs[0] == epochs[2] != epochs[1]


def test_augmentation_differs_between_epochs_images_and_seeds(shapes, processor):
    def brightness(seed, epoch, index):
        image = np.asarray(shapes["train"][index]["image"])
        reader = ImageReader(processor.image_processor)
        rows = shapes["train"].cast_column("image", datasets.Image(decode=False))
        sample = TrainingSamples(reader, "brightness", seed, with_masks=False)(
            rows[index], SampleIndex(epoch, index, (0,))
        )
        return sample.image.mean() / image.mean()

    cases = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    gains = [brightness(*case) for case in cases]
    assert gains == [brightness(*case) for case in cases]
    assert len({round(gain, 3) for gain in gains}) == 4


def test_evaluation_data_serves_rows_of_requested_split(shapes, processor, arguments):
    splits = {name: shapes[name].select(range(2)) for name in ("test", "validation")}
    data = EvaluationData(splits, processor, arguments(), 0, 1)
    for name in ("validation", "test", "validation"):
        seen = {
            target["image_id"] for batch in data.batches(name) for targets in batch["targets"] for target in targets
        }
        assert seen == set(splits[name]["image_id"])


def test_take_sentences_keeps_only_named_objects():
    objects = [{"object_id": str(number)} for number in range(4)]
    named = [[0], [3, 1], [3]]
    sentences = [{"text": str(indices), "phrases": [{"objects": indices}]} for indices in named]
    taken = take_sentences({"objects": objects, "sentences": sentences}, (2, 1))
    assert [item["object_id"] for item in taken["objects"]] == ["1", "3"]
    assert [sentence["text"] for sentence in taken["sentences"]] == ["[3]", "[3, 1]"]
    assert [sentence["phrases"][0]["objects"] for sentence in taken["sentences"]] == [[1], [1, 0]]


def test_collator_drops_empty_masks_from_labels(shapes, processor):
    row = shapes["train"][0]
    complete = GroundingCollator(processor, with_masks=True)([row])["labels"]
    assert all("masks" in label for label in complete)
    empty = to_coco_rle(torch.zeros(row["height"], row["width"], dtype=torch.bool))
    row = {**row, "objects": [{**item, "segmentation": empty} for item in row["objects"]]}
    labels = GroundingCollator(processor, with_masks=True)([row])["labels"]
    assert [set(label) for label in labels] == [{"boxes"}] * len(complete)


def test_make_sample_scales_boxes_to_resized_image(processor):
    objects = [
        {"box": box, "segmentation": None} for box in ([10.0, 5, 50, 30], [-0.5, 5, 100.5, 30], [-5, 5, 50, 30])
    ]
    row = {"width": 100, "height": 40, "objects": objects, "sentences": []}
    sample = make_sample(row, np.zeros((80, 50, 3), np.uint8), processor.image_processor)
    # a box is clipped if it exceeds the image by at most one pixel
    assert sample.boxes_xyxy.tolist() == [[5, 10, 25, 60], [0, 10, 50, 60], [-2.5, 10, 25, 60]]
    assert sample.masks is None


def test_published_order_takes_sentences_one_by_one(shapes, processor, arguments):
    args = arguments(group_by_image=False, bucket_by_shape=False)
    batches = list(TrainingData(shapes["train"], processor, args, 0, 1).batches(0))
    assert {len(batch["labels"]) for batch in batches} == {4}
    assert {len(batch["pixel_values"]) for batch in batches} == {4}
    ids = sentence_ids(batches)
    assert len(set(ids)) == len(ids)
    total = sum(map(len, shapes["train"]["sentences"]))
    assert total - 4 < len(ids) <= total
    images = [name.rsplit("_", 1)[0] for name in ids]
    assert sum(a == b for a, b in itertools.pairwise(images)) < len(ids) / 10


def test_training_data_ranks_share_batches_of_one_process(shapes, processor, arguments):
    def ids(batch_size, rank, world_size):
        args = arguments(batch_size=batch_size)
        data = TrainingData(shapes["train"], processor, args, rank, world_size)
        return [sentence_ids([batch]) for batch in data.batches(2)]

    pairs = zip(ids(2, 0, 2), ids(2, 1, 2), strict=True)
    assert [sorted(first + second) for first, second in pairs] == [sorted(batch) for batch in ids(4, 0, 1)]


# the image cache


@pytest.fixture
def toy(tmp_path):
    """Write the toy source, whose images have another size than the model's."""
    (tmp_path / "toy").mkdir()
    make_toy(tmp_path / "toy")
    return {"data_dir": str(tmp_path / "toy"), "cache_dir": str(tmp_path / "built")}


def test_image_cache_gives_identical_batches(toy, processor, arguments, tmp_path, caplog):
    rows = data_scripts.load("toy", **toy)
    assert rows["train"][0]["width"] != 64
    for augmentation in ("none", "strong"):
        settings = {"batch_size": 2, "augmentation": augmentation}
        cached = {**settings, "image_cache": str(tmp_path / "kept")}
        plain = [
            list(TrainingData(rows["train"], processor, arguments(**settings), 0, 1, with_masks=True).batches(epoch))
            for epoch in (0, 1)
        ]
        data = TrainingData(rows["train"], processor, arguments(**cached), 0, 1, with_masks=True)
        for epoch in (0, 1):
            assert_same(data.batches(epoch), plain[epoch])
    # rows given to the collator directly
    collator = GroundingCollator(processor, with_masks=True)
    by_id = {row["image_id"]: row for row in rows["train"]}
    data = TrainingData(rows["train"], processor, arguments(batch_size=2), 0, 1, with_masks=True)
    for batch in data.batches(0):
        images = list(dict.fromkeys(target[0]["image_id"] for target in batch["targets"]))
        expected = collator([by_id[name] for name in images])
        inputs = move(batch, "cpu", processor)
        for name in ("pixel_values", "pixel_mask"):
            assert torch.equal(inputs[name], expected[name])
        for label, other in zip(batch["labels"], expected["labels"], strict=True):
            assert torch.allclose(label["boxes"], other["boxes"], atol=1e-6)
            assert torch.equal(label["masks"], other["masks"])
    # evaluation, whose targets keep their own size
    evaluated = [
        list(EvaluationData(rows, processor, arguments(image_cache=folder), 0, 1).batches("testA"))
        for folder in (None, str(tmp_path / "kept"))
    ]
    loader = EvaluationData(rows, processor, arguments(num_workers=2), 0, 1).batches("testA")
    assert loader.num_workers == 2
    for batch, other in zip(loader, evaluated[0], strict=True):
        assert batch["targets"] == other["targets"]
    for batch, other in zip(*evaluated, strict=True):
        assert batch["targets"] == other["targets"]
        assert torch.equal(batch["pixel_values"], other["pixel_values"])
        for label, other_label in zip(batch["labels"], other["labels"], strict=True):
            assert torch.allclose(label["boxes"], other_label["boxes"], atol=1e-6)
    kept = list((tmp_path / "kept").rglob("*.npy"))
    assert len(kept) == len(rows["train"]) + len(rows["testA"])
    assert not [path for path in (tmp_path / "kept").rglob("*") if path.is_file() and path not in kept]
    assert not caplog.records


def make_image_row(path, size=(90, 60), color=(10, 200, 30)):
    Image.new("RGB", size, color).save(path)
    return {"image_id": "a", "image": {"path": str(path), "bytes": None}, "width": size[0], "height": size[1]}


def test_image_cache_rebuilds_damaged_and_changed_images(tmp_path, caplog):
    row = make_image_row(tmp_path / "a.png")
    reader = ImageReader(RefTRImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}), str(tmp_path / "kept"))
    image = np.asarray(reader(row))
    assert image.shape == (43, 64, 3)
    (path,) = (tmp_path / "kept").rglob("*.npy")
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", content[:200] + bytes([content[200] ^ 1]) + content[201:]):
        caplog.clear()
        path.write_bytes(damaged)
        assert (np.asarray(reader(row)) == image).all()
        assert "is damaged (its checksum differs) and is read again" in caplog.text
        assert path.read_bytes() == content
    # the cached array is read instead of the image
    path.write_bytes(encode_array(np.zeros((43, 64, 3), np.uint8)))
    assert not np.asarray(reader(row)).any()
    # another image and another size have their own cache entries
    row = make_image_row(tmp_path / "a.png", color=(200, 0, 0))
    assert np.asarray(reader(row))[0, 0].tolist() == [200, 0, 0]
    larger = ImageReader(RefTRImageProcessor(size={"shortest_edge": 80, "longest_edge": 80}), str(tmp_path / "kept"))
    assert larger(row).shape == (53, 79, 3)
    assert len(list((tmp_path / "kept").rglob("*.npy"))) == 3
    (tmp_path / "a.png").unlink()
    with pytest.raises(OSError, match=r"The image .*a\.png"):
        reader(row)
    with pytest.raises(ValueError, match="checksum"):
        decode_array(b"")


def test_image_cache_folder_is_safe_across_processes(tmp_path, run):
    row = make_image_row(tmp_path / "a.jpg", size=(800, 600))
    program = (
        "import sys, json; from modeling_reftr import RefTRImageProcessor\n"
        "from training_reftr.images import ImageReader\n"
        f"reader = ImageReader(RefTRImageProcessor(), {str(tmp_path / 'kept')!r})\n"
        f"row = json.loads({json.dumps(json.dumps(row))})\n"
        "import shutil, multiprocessing\n"
        "def work(number):\n"
        "    for _ in range(20):\n"
        "        path = reader.path_of(row); path.unlink(missing_ok=True) if number == 0 else None\n"
        "        assert reader(row).shape == (480, 640, 3)\n"
        "with multiprocessing.Pool(3) as pool: pool.map(work, range(3))\n"
    )
    result = run("-c", program)
    assert "damaged" not in result.stderr
    assert len([path for path in (tmp_path / "kept").rglob("*") if path.is_file()]) == 1


def test_image_cache_reads_many_times_faster_than_decoding(tmp_path):
    plain, cached, png = cache_seconds(tmp_path)
    print(f"4000 x 3000 read in {plain * 1000:.1f} ms, kept {cached * 1000:.2f} ms, as PNG {png * 1000:.1f} ms")
    assert plain / cached > 20
    assert png > 2 * cached


# sources


def test_load_rows_validates_dataset_flags_and_splits(arguments):
    rows = load_rows(arguments().data)
    assert set(rows) == {"train", "validation", "test"}
    assert len(split_of(rows, "train+validation")) == TINY_SET["num_train"] + TINY_SET["num_validation"]
    for name in ("val", "train+val"):
        with pytest.raises(ValueError, match=r"no split 'val'; there are: train, validation, test\."):
            split_of(rows, name)
        with pytest.raises(ValueError, match=r"no split 'val'"):
            load_rows(arguments(train_split=name).data)
    assert load_rows(arguments(train_split="val").data, eval_only=True)
    with pytest.raises(ValueError, match="no dataset 'shape'"):
        load_rows(arguments(dataset="shape").data)
    with pytest.raises(ValueError, match="has no flag colour"):
        load_rows(arguments(dataset_config={"colour": 1}).data)


def test_load_rows_joins_datasets_without_held_out_images(tmp_path):
    for name in ("refcoco_unc", "refcocog_google"):
        make_refcoco(tmp_path, name)
    args = TrainingSettings.from_flat(
        dataset="refcoco_unc,refcocog_google", dataset_config={"refcoco_unc": {"integer_boxes": True}},
        data_dir=str(tmp_path), data_cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    rows = load_rows(args.data)
    others = ["refcoco_unc/val", "refcoco_unc/testA", "refcoco_unc/testB", "refcocog_google/val"]
    assert list(rows) == ["train", *others]
    assert "coco_100" in rows["refcocog_google/val"]["image_id"]
    held_out = {image_id for name in others for image_id in rows[name]["image_id"]}
    assert not held_out & set(rows["train"]["image_id"])
    assert len(rows["train"]) == 20
    boxes = [rows["train"][index]["objects"][0]["box"] for index in (9, 19)]
    assert boxes[0] == [103, 299, 238, 477] != boxes[1]
    # validation images are trained on as well, test images are not
    args.data.train_split = "train+val"
    joined = load_rows(args.data)
    assert list(joined) == ["train", "val", "refcoco_unc/testA", "refcoco_unc/testB"]
    tested = {image_id for name in list(joined)[2:] for image_id in joined[name]["image_id"]}
    trained = set(split_of(joined, "train+val")["image_id"])
    assert "coco_100" in trained
    assert not tested & trained
    # trainval of a dataset without one is train and val, so it has the same images
    args.data.train_split = "trainval"
    at_once = load_rows(args.data)
    assert next(iter(at_once)) == "trainval"
    assert set(at_once["trainval"]["image_id"]) == trained
    assert len(at_once["trainval"]) == len(split_of(joined, "train+val"))
    args.data.dataset_config = {"refcoco": {}}
    with pytest.raises(ValueError, match=r"dataset_config has no field 'refcoco'. Did you mean 'refcoco_unc'"):
        load_rows(args.data)


@pytest.fixture(scope="module")
def exported(shapes, tmp_path_factory):
    """Export the shapes to a folder of Parquet files."""
    folder = tmp_path_factory.mktemp("exported") / "shapes"
    return str(export_dataset(data_scripts.SOURCES["shapes"], shapes, folder))


def test_load_rows_reads_folder_of_parquet_files(exported, shapes, arguments, processor, tmp_path):
    args = arguments(dataset=exported, dataset_config={}, data_cache_dir=str(tmp_path))
    rows = load_rows(args.data)
    assert {name: len(part) for name, part in rows.items()} == {name: len(part) for name, part in shapes.items()}
    batches = [
        list(TrainingData(part["train"], processor, args, 0, 1, with_masks=True).batches(0)) for part in (rows, shapes)
    ]
    assert_same(*batches)
    with pytest.raises(OSError, match="no folder '/nowhere': give one"):
        load_rows(arguments(dataset="/nowhere", dataset_config={}).data)
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "other" / "train.parquet")
    with pytest.raises(ValueError, match="has the columns text, which are neither those of an export"):
        load_rows(arguments(dataset=str(tmp_path / "other"), dataset_config={}).data)


@pytest.mark.parametrize("kind", ["parquet", "builder"])
def test_training_data_streams_each_sentence_at_most_once(exported, shapes, arguments, processor, kind):
    source = {"dataset": exported, "dataset_config": {}} if kind == "parquet" else {}
    args = arguments(**source, streaming=True, expressions_per_image=3)
    rows = load_rows(args.data)
    assert isinstance(rows["train"], StreamedRows)
    assert [len(rows[name]) for name in ("validation", "test")] == [
        len(shapes[name]) for name in ("validation", "test")
    ]
    assert np.array_equal(rows["test"][3]["image"], shapes["test"][3]["image"])
    data = TrainingData(rows["train"], processor, args, 0, 1, with_masks=True)
    built = TrainingData(shapes["train"], processor, args, 0, 1, with_masks=True)
    assert data.num_batches(0) == built.num_batches(0)
    epochs = [list(data.batches(epoch)) for epoch in (0, 1)]
    ids = sentence_ids(epochs[0])
    assert len(set(ids)) == len(ids)
    total = sum(map(len, shapes["train"]["sentences"]))
    assert len(epochs[0]) == built.num_batches(0)
    assert total - 4 * 3 < len(ids) <= total
    assert sentence_ids(epochs[1]) != ids
    assert_same(data.batches(0), epochs[0])
    assert_same(data.batches(0, [(4, 3, 1, 1)]), epochs[0][3:])
    with_workers = arguments(**source, streaming=True, expressions_per_image=3, num_workers=2)
    workers = TrainingData(rows["train"], processor, with_workers, 0, 1, with_masks=True)
    batches = list(workers.batches(0))
    ids = sentence_ids(batches)
    assert len(set(ids)) == len(ids)
    assert len(batches) == len(epochs[0])
    assert_same(workers.batches(0), batches)
    assert_same(workers.batches(0, [(4, 3, 1, 2)]), batches[3:])
    # three processes have equally many batches and no sentence twice
    thirds = arguments(**source, streaming=True, expressions_per_image=3, batch_size=2)
    ranks = [list(TrainingData(rows["train"], processor, thirds, rank, 3).batches(0)) for rank in range(3)]
    assert len({len(batches) for batches in ranks}) == 1
    ids = [name for batches in ranks for name in sentence_ids(batches)]
    assert len(set(ids)) == len(ids)


def test_streaming_rejects_training_on_evaluated_split(arguments):
    with pytest.raises(ValueError, match="'validation' is streamed for training and evaluated too"):
        load_rows(arguments(streaming=True, train_split="train+validation").data)


# the script


@pytest.mark.slow
def test_train_script_trains_on_streamed_parquet_files(exported, recipe, run, tmp_path):
    """End to end: a streamed folder of Parquet files, workers, strong augmentation and the image cache."""
    settings = yaml.safe_load(recipe.read_text())
    settings |= {
        "dataset": exported, "dataset_config": {}, "train_split": "train", "streaming": True, "num_workers": 2,
        "augmentation": "strong", "image_cache": str(tmp_path / "kept"), "max_steps": 8,
    }  # fmt: skip
    path = tmp_path / "streamed.yaml"
    path.write_text(yaml.safe_dump(settings))
    logs = []
    for ranks in (1, 2):
        launch = ("-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", free_port())
        result = run(
            *(launch if ranks == 2 else ()), "train_reftr.py", path, "--batch_size", 8 // ranks,
            "--output_dir", tmp_path / str(ranks),
        )  # fmt: skip
        assert "Traceback" not in result.stderr
        logs.append([float(value) for value in re.findall(r"step \d+ epoch \d+ loss=([\d.]+)", result.stderr)])
    assert len(logs[0]) == len(logs[1]) == 8
    assert list((tmp_path / "kept").rglob("*.npy"))


def test_tokenizer_training_is_equal_in_every_process(run, data_cache, tokenizer):
    code = (
        "import hashlib, data_scripts; from tests.helpers.tiny import TINY_SET; "
        "from training_reftr.tokenizer_training import all_sentences, train_tokenizer; "
        f"rows = data_scripts.load('shapes', 'train', cache_dir={data_cache!r}, **TINY_SET); "
        "print(hashlib.md5(train_tokenizer(all_sentences(rows), 64).backend_tokenizer.to_str().encode()).hexdigest())"
    )
    path = str(ROOT)
    here = hashlib.md5(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "0" else "0"  # changes the order of strings in sets
    assert run("-c", code, PYTHONPATH=path, PYTHONHASHSEED=seed).stdout.split() == [here]


def test_trained_tokenizer_spells_rare_words():
    tokenizer = train_tokenizer(["the star", "The star left of the bus", "überall"], max_length=8, vocab_size=28)
    assert tokenizer.tokenize("The STAR") == ["the", "star"]
    assert tokenizer.tokenize("tease") == ["t", "##e", "##a", "##s", "##e"]
    assert tokenizer.tokenize("left") == ["l", "##e", "##f", "##t"]
    assert tokenizer.tokenize("zebra") == ["[UNK]"]
    assert tokenizer("the star")["input_ids"][0] == tokenizer.cls_token_id
    assert len(tokenizer) == 28
