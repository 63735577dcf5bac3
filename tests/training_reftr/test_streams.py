"""Streamed training: lanes of shards, resuming, mixtures, what each process reads."""

import itertools
import json
import re

import datasets
import numpy as np
import pytest
from huggingface_hub import HfApi

import data_scripts
from data_scripts.exporting import export_dataset
from data_scripts.streaming import SplitStream, open_streams
from tests.helpers.faults import finish, kill, losses_of, start, steps_of, wait_for, write_recipe
from tests.helpers.layout_toy import make_toy
from tests.helpers.local_hub import Hub
from tests.helpers.processes import start_ranks
from tests.helpers.tiny import TINY_SET
from training_reftr.checkpoints import TrainingState
from training_reftr.data import TrainingData
from training_reftr.resuming import find_changes
from training_reftr.settings import TrainingSettings
from training_reftr.sources import load_rows, split_of
from training_reftr.streams import StreamedOrder, StreamedRows, StreamSampler, count_shards, cut


def make_rows(num_rows, num_sentences=3, prefix="", bytes_per_image=0):
    """Return rows whose images are random bytes, each with up to `num_sentences` sentences."""
    rng = np.random.default_rng(num_rows)
    rows = []
    for number in range(num_rows):
        texts = [f"text {index} of {number}" for index in range(1 + number % num_sentences)]
        phrase = {"start": 0, "end": 4, "objects": [0], "types": []}
        item = {"object_id": "o", "box": [1, 2, 9, 9], "boxes": [[1, 2, 9, 9]], "category": None, "segmentation": None}
        rows.append(
            {
                "image_id": f"{prefix}{number}",
                "image": {"bytes": rng.bytes(bytes_per_image), "path": None},
                "width": int(rng.integers(20, 90)),
                "height": 40,
                "objects": [item],
                "sentences": [
                    {"sentence_id": f"{prefix}{number}_{index}", "text": text, "phrases": [phrase]}
                    for index, text in enumerate(texts)
                ],
                "positions": None,
            }
        )
    features = datasets.Features({**data_scripts.FEATURES, "image": datasets.Image(decode=False)})
    return datasets.Dataset.from_list(rows, features=features)


def stream_of(*parts, weights=None):
    """Return the stream of (rows, number of shards), or several of them mixed by weights."""
    streams = [[SplitStream.of(rows.to_iterable_dataset(num_shards=num_shards))] for rows, num_shards in parts]
    return StreamedRows(streams, weights or [1.0])


def read(order, batch_size, world_size, num_readers, epoch=0, progress=(), stop=None):
    """Return the samples of each process, as (shard of the stream, row, sentences)."""
    found = []
    for rank in range(world_size):
        sampler = StreamSampler(order, batch_size, rank, world_size, num_readers)
        sampler.begin(epoch, progress)
        tickets = [ticket for (ticket,) in sampler][:stop]
        assert len(tickets) == min(len(sampler), len(tickets) if stop is None else stop)
        lanes = {ticket.lane: order.samples(ticket.lane, ticket.start) for ticket in reversed(tickets)}
        samples = [sample for ticket in tickets for sample in itertools.islice(lanes[ticket.lane], ticket.size)]
        assert len(samples) == len(tickets) * batch_size
        found.append([(sample.row["image_id"], sample.sentences) for sample in samples])
    return found


def sentences_of(samples):
    return [(image_id, index) for image_id, indices in samples for index in indices]


# lanes


@pytest.mark.parametrize("by_shape", [False, True])
@pytest.mark.parametrize(("world_size", "num_readers"), [(1, 1), (1, 3), (2, 1), (3, 2), (4, 4)])
def test_lanes_have_each_sample_once_and_equal_steps(world_size, num_readers, by_shape):
    rows = make_rows(700)
    order = StreamedOrder(stream_of((rows, 13)), 2, 7, by_shape)
    assert order.num_samples == sum(-(-len(sentences) // 2) for sentences in rows["sentences"])
    assert order.fingerprint.num_rows == 700
    epochs = [read(order, 4, world_size, num_readers, epoch) for epoch in (0, 0, 1)]
    assert epochs[0] == epochs[1] != epochs[2]
    for ranks in epochs:
        assert {len(samples) for samples in ranks} == {order.num_samples // (4 * world_size) * 4}
        found = sentences_of(itertools.chain(*ranks))
        assert len(set(found)) == len(found)
        assert sum(map(len, rows["sentences"])) - len(found) < 2 * 4 * world_size
    other = StreamedOrder(stream_of((rows, 13)), 2, 8, by_shape)
    assert read(other, 4, world_size, num_readers) != epochs[0]


def test_stream_with_fewer_shards_than_readers_is_shared():
    order = StreamedOrder(stream_of((make_rows(100, 1), 1)), 1, 0, True)
    ranks = read(order, 2, 4, 2)
    assert [len(samples) for samples in ranks] == [24] * 4
    assert len(set(sentences_of(itertools.chain(*ranks)))) == 96


def test_epochs_start_with_other_shards_and_mix_rows(monkeypatch):
    monkeypatch.setattr("training_reftr.streams.WINDOW", 256)
    order = StreamedOrder(stream_of((make_rows(1000, 1), 10)), 1, 0, False)
    first, second = (read(order, 1, 1, 1, epoch, stop=256)[0] for epoch in (0, 1))
    images = [{int(image_id) // 100 for image_id, _ in samples} for samples in (first, second)]
    assert len(images[0]) == len(images[1]) == 3
    assert images[0] != images[1]
    neighbors = sum(abs(int(one[0]) - int(other[0])) < 3 for one, other in itertools.pairwise(first))
    assert neighbors < 0.1 * len(first)


def test_processes_open_the_shards_of_their_lanes(monkeypatch):
    opened = []
    read_shard = SplitStream.read
    monkeypatch.setattr(SplitStream, "read", lambda self, shard: opened.append(shard) or read_shard(self, shard))
    order = StreamedOrder(stream_of((make_rows(640, 1), 64)), 1, 0, True)
    shards = []
    for rank in range(4):
        sampler = StreamSampler(order, 5, rank, 4, 2)
        opened.clear()
        for lane in {ticket.lane for (ticket,) in sampler}:
            assert len(list(order.samples(lane))) == 80
        shards.append(sorted(opened))
    assert [len(part) for part in shards] == [16] * 4
    assert sorted(itertools.chain(*shards)) == list(range(64))


@pytest.mark.parametrize("num_readers", [1, 3])
def test_resume_in_epoch_repeats_order_and_opens_no_earlier_shard(num_readers, monkeypatch):
    monkeypatch.setattr("training_reftr.streams.WINDOW", 64)
    order = StreamedOrder(stream_of((make_rows(900, 1), 30)), 1, 0, True)
    whole = read(order, 4, 2, num_readers)
    opened = []
    read_shard = SplitStream.read
    monkeypatch.setattr(SplitStream, "read", lambda self, shard: opened.append(shard) or read_shard(self, shard))
    for num_taken in (1, 7, 60, 111):
        opened.clear()
        rest = read(order, 4, 2, num_readers, progress=[(8, num_taken, 2, num_readers)])
        assert rest == [samples[num_taken * 4 :] for samples in whole]
        assert len(opened) <= 30 * (1 - num_taken / 112) + 2 * num_readers * 3
    done = StreamSampler(order, 4, 0, 2, num_readers)
    assert done.num_batches([(8, 112, 2, num_readers)]) == 0


@pytest.mark.parametrize("weights", [None, [0.75, 0.25]])
def test_resume_with_other_layout_repeats_no_sample(weights, monkeypatch):
    """Whatever was begun of a window is left out, and all else is read once."""
    monkeypatch.setattr("training_reftr.streams.WINDOW", 32)
    parts = [(make_rows(1200, 1), 24), (make_rows(400, 1, "other"), 8)][: 2 if weights else 1]
    order = StreamedOrder(stream_of(*parts, weights=weights), 1, 0, False)
    progress, found = [], []
    for batch_size, world_size, num_readers, num_batches in (
        (4, 2, 2, 9),
        (4, 1, 3, 20),
        (3, 4, 1, 5),
        (8, 1, 1, None),
    ):
        before = StreamSampler(order, batch_size, 0, world_size, num_readers).plan(progress, 0)
        ranks = read(order, batch_size, world_size, num_readers, 0, progress, num_batches)
        found += itertools.chain(*ranks)
        if num_batches is not None:
            progress.append((batch_size * world_size, num_batches, world_size, num_readers))
    assert len(set(found)) == len(found)
    # of 4, 3 and 4 lanes, a window each, and at the end what does not fill a batch
    assert 0 < before.num_left_out <= (4 + 3 + 4) * 31
    # parts of windows shift the shares of a mixture, so that one stream ends before the other
    margin = 8 if weights is None else 120
    assert 0 <= order.num_samples - len(found) - before.num_left_out <= margin
    # the same numbers as before continue the last part
    again = read(order, 8, 1, 1, 0, [*progress, (8, 10, 1, 1)])
    assert again[0] == found[-len(again[0]) :]


def test_change_of_layout_is_reported_once():
    data = TrainingSettings.from_flat(streaming=True)
    order = StreamedOrder(stream_of((make_rows(400, 1), 8)), 1, 0, False)
    state = TrainingState(seen=[[8, 3, 2, 1]])

    class Data:
        layout = 1, 2

        def num_left_out(self, epoch, progress):
            return StreamSampler(order, 8, 0, *self.layout).plan(progress, epoch).num_left_out

    left_out = "376 samples left out of this epoch, which windows that were begun had"
    assert find_changes(state, data, 8, Data()) == [
        "1 processes with 2 readers of the stream each (was 2 with 1)",
        left_out,
    ]
    Data.layout = 2, 1
    assert find_changes(state, data, 8, Data()) == []
    assert find_changes(state, data, 16, Data())[1:] == [left_out]


def test_cut_joins_parts_of_intervals():
    intervals = [(0, 10), (50, 60), (90, 91)]
    numbers = [*range(10), *range(50, 60), 90]
    for begin, size in itertools.product(range(23), range(23)):
        part = cut(intervals, begin, size)
        assert [number for first, end in part for number in range(first, end)] == numbers[begin : begin + size]
        assert all(first < end for first, end in part)


# mixtures


def test_mixture_has_weights_in_every_window_and_ends_with_a_stream(monkeypatch):
    monkeypatch.setattr("training_reftr.streams.WINDOW", 100)
    rows = stream_of((make_rows(600, 1), 12), (make_rows(900, 1, "b"), 9), weights=[0.7, 0.3])
    order = StreamedOrder(rows, 1, 0, True)
    assert order.num_samples == int(600 / 0.7)
    epochs = [read(order, 5, 2, 2, epoch) for epoch in (0, 1)]
    for ranks in epochs:
        samples = list(itertools.chain(*ranks))
        assert len(set(samples)) == len(samples) >= 840
        of_second = [image_id.startswith("b") for image_id, _ in samples]
        assert abs(sum(of_second) - 0.3 * len(samples)) <= 4
        for first in range(0, 400, 100):
            assert 15 <= sum(of_second[first : first + 100]) <= 45
    second = [{image_id for image_id, _ in itertools.chain(*ranks) if image_id[0] == "b"} for ranks in epochs]
    assert len(second[0] & second[1]) < 0.6 * len(second[0])  # another part of the longer stream


@pytest.fixture
def two_exports(tmp_path):
    """Write two exports; the second one trains on an image that the first one holds out."""
    for name, train, validation in (("one", range(40), range(100, 104)), ("two", range(60, 104), range(200, 204))):
        rows = make_rows(1, 1)
        parts = {
            split: datasets.Dataset.from_list(
                [
                    {**rows[0], "image_id": f"coco_{number}", "sentences": [{**rows[0]["sentences"][0],
                     "sentence_id": f"{name}_{number}"}]} for number in numbers
                ],
                features=rows.features,
            )
            for split, numbers in (("train", train), ("validation", validation))
        }  # fmt: skip
        for split, part in parts.items():
            part.cast_column("image", datasets.Image()).to_parquet(tmp_path / name / "data" / f"{split}.parquet")
    return [str(tmp_path / name) for name in ("one", "two")]


def test_streams_of_several_datasets_leave_out_held_out_images(two_exports, tmp_path):
    one, two = two_exports
    settings = {"dataset": f"{one},{two}", "streaming": True, "data_cache_dir": str(tmp_path / "cache")}
    settings |= {"validation_split": f"{one}/validation", "test_splits": f"{two}/validation"}
    rows = load_rows(TrainingSettings.from_flat(**settings).data)
    assert len(rows[f"{one}/validation"]) == 4
    order = StreamedOrder(rows["train"], 1, 0, False)
    images = [image_id for image_id, _ in read(order, 1, 1, 1)[0]]
    assert sorted(images) == sorted(f"coco_{number}" for number in (*range(40), *range(60, 100)))
    weights = {one: 1, two: 3}
    rows = load_rows(TrainingSettings.from_flat(**settings, stream_weights=weights).data)
    assert rows["train"].weights == [0.25, 0.75]
    assert StreamedOrder(rows["train"], 1, 0, False).num_samples == 53
    with pytest.raises(ValueError, match=r"stream_weights has no weight of '.*two': give one for each dataset"):
        load_rows(TrainingSettings.from_flat(**settings, stream_weights={one: 1}).data)
    with pytest.raises(ValueError, match="stream_weights has no field 'three'"):
        load_rows(TrainingSettings.from_flat(**settings, stream_weights={"three": 1}).data)
    with pytest.raises(ValueError, match=r"There is no split 'val' in '.*one'; there are: train, validation"):
        load_rows(TrainingSettings.from_flat(**settings, train_split="val").data)
    for weight in (0, -1, "1", True, float("nan")):
        with pytest.raises(ValueError, match=r"stream_weights has one=.*; expected a finite number above 0\."):
            TrainingSettings.from_flat(stream_weights={"one": weight})


def test_streams_of_several_splits_are_joined(two_exports, tmp_path):
    settings = {"dataset": two_exports[0], "streaming": True, "train_split": "train+validation"}
    args = TrainingSettings.from_flat(**settings, validation_split="none", test_splits="none")
    rows = split_of(load_rows(args.data), "train+validation")
    assert rows.num_shards == 2
    assert len(read(StreamedOrder(rows, 1, 0, False), 4, 1, 1)[0]) == 44


# files


@pytest.fixture
def arguments(data_cache):
    def make(**overrides):
        settings = {"data_cache_dir": data_cache, "image_size": 64, "num_workers": 0, "augmentation": "none"}
        return TrainingSettings.from_flat(**{**settings, "batch_size": 4, "streaming": True, **overrides})

    return make


def write_shards(folder, rows, num_shards, split="train"):
    """Write rows as Parquet files, as an export of many images has them."""
    for index in range(num_shards):
        path = folder / "data" / f"{split}-{index:05d}-of-{num_shards:05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows.shard(num_shards, index, contiguous=True).to_parquet(path)
    return sum(path.stat().st_size for path in (folder / "data").glob(f"{split}-*"))


def bytes_read():
    """Return how many bytes this process has read from files."""
    with open("/proc/self/io") as file:
        return int(re.search(r"rchar: (\d+)", file.read())[1])


def test_process_reads_its_quarter_of_the_bytes_and_counts_without_images(tmp_path):
    rows = make_rows(256, 1, bytes_per_image=200_000)
    total = write_shards(tmp_path, rows.cast_column("image", datasets.Image()), 64)
    stream = StreamedRows([[open_streams(str(tmp_path), cache_dir=str(tmp_path / "cache"))["train"]]], [1.0])
    assert stream.num_shards == 64
    before = bytes_read()
    contents = count_shards(stream, 8)
    annotations = bytes_read() - before
    assert annotations < 0.3 * total
    parts = [count_shards(stream, 8, rank, 4) for rank in range(4)]
    assert {shard: counted for part in parts for shard, counted in part.items()} == contents
    assert [len(part) for part in parts] == [16] * 4
    order = StreamedOrder(stream, 8, 0, True, contents)
    for rank in range(4):
        sampler = StreamSampler(order, 8, rank, 4, 2)
        before = bytes_read()
        images = [
            sample.row["image"]["bytes"]
            for lane in {ticket.lane for (ticket,) in sampler}
            for sample in order.samples(lane)
        ]
        assert {len(image) for image in images} == {200_000}
        assert len(set(images)) == 64
        # the end of a file, which says where its columns are, is read in addition
        assert 0.24 * total < bytes_read() - before < 0.3 * total


def test_streamed_order_does_not_decode_images(tmp_path, processor, arguments):
    (tmp_path / "toy").mkdir()
    make_toy(tmp_path / "toy")
    streams = open_streams("toy", data_dir=str(tmp_path / "toy"), cache_dir=str(tmp_path / "built"))
    stream = StreamedRows([[streams["train"]]], [1.0])
    for path in (tmp_path / "toy" / "pictures").glob("train_*"):
        path.write_bytes(b"not an image")
    order = StreamedOrder(stream, 8, 0, True)
    assert order.num_samples == 6
    assert len(read(order, 1, 1, 1)[0]) == 6
    with pytest.raises(OSError, match=r"train_\d\.jpg' cannot be read as an image"):
        list(TrainingData(stream, processor, arguments(batch_size=2), 0, 1).batches(0))


def test_stream_that_is_shorter_than_counted_is_refused(shapes, processor, arguments):
    rows = StreamedRows.of(shapes["train"].to_iterable_dataset())
    data = TrainingData(rows, processor, arguments(expressions_per_image=100), 0, 1)
    data.loader.dataset.dataset.order.shards[0][0][0].rows = shapes["train"].select(range(10)).to_iterable_dataset()
    with pytest.raises(
        ValueError, match="Shard 0 of the stream has 10 samples of 48: the training files have changed"
    ):
        list(data.batches(0))


def test_invalid_text_is_named_when_its_shard_is_counted(tmp_path):
    rows = make_rows(8, 1).cast_column("image", datasets.Image())
    bad = rows.map(
        lambda row: {"sentences": [{**row["sentences"][0], "text": " "}]} if row["image_id"] == "6" else row
    )
    write_shards(tmp_path, bad, 4)
    stream = StreamedRows([[open_streams(str(tmp_path), cache_dir=str(tmp_path / "cache"))["train"]]], [1.0])
    with pytest.raises(ValueError, match=r"train, image '6' or after it: a text is blank\."):
        count_shards(stream, 8)
    assert len(count_shards(stream, 8, 0, 4)) == 1


@pytest.fixture
def hub(monkeypatch):
    with Hub() as hub:
        hub.use(monkeypatch, "hf_write")
        monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.address)
        yield hub


@pytest.mark.parametrize("num_workers", [0, 2])
def test_dataset_of_the_hub_is_streamed_by_name(hub, shapes, processor, arguments, tmp_path, num_workers):
    folder = export_dataset(data_scripts.SOURCES["shapes"], shapes, tmp_path / "exported")
    for file in (folder / "data").glob("train*"):
        file.unlink()
    write_shards(folder, shapes["train"], 8)
    api = HfApi(token="hf_write")
    api.create_repo("someone/shapes", repo_type="dataset")
    api.upload_folder(repo_id="someone/shapes", repo_type="dataset", folder_path=folder)
    args = arguments(dataset="someone/shapes", num_workers=num_workers, expressions_per_image=100)
    rows = load_rows(args.data)
    assert rows["train"].num_shards == 8
    assert len(rows["validation"]) == len(shapes["validation"])
    found, files = [], []
    for rank in range(2):
        data = TrainingData(rows["train"], processor, args, rank, 2, with_masks=True)
        num_requests = len(hub.requests)
        found += [target[0]["sentence_id"] for batch in data.batches(0) for target in batch["targets"]]
        files.append({request.path for request in hub.requests[num_requests:] if "train-" in request.path})
        del data
    expected = [item["sentence_id"] for sentences in shapes["train"]["sentences"] for item in sentences]
    assert sorted(found) == sorted(expected)
    assert [len(part) for part in files] == [4, 4]
    assert not files[0] & files[1]


# runs

RECORD = """
import os, re, training_reftr.data as data, training_reftr.step as step, training_reftr.streams as streams
rank, folder = os.environ.get("RANK", "0"), {folder!r}
def bytes_read():
    with open("/proc/self/io") as file:
        return int(re.search(r"rchar: ([0-9]+)", file.read())[1])
def note(name, text):
    with open(f"{{folder}}/{{name}}_{{rank}}", "a") as file:
        file.write(text + "\\n")
read = data.StreamedDataset.__getitems__
def counted(self, tickets):
    before = bytes_read()
    samples = read(self, tickets)
    note("bytes", str(bytes_read() - before))
    return samples
data.StreamedDataset.__getitems__ = counted
read_shard = streams.StreamedOrder.read_shard
def opened(self, stream, shard, *args):
    note("shards", str(shard))
    return read_shard(self, stream, shard, *args)
streams.StreamedOrder.read_shard = opened
move = step.move
def noted(batch, *args):
    note("seen", " ".join(targets[0]["sentence_id"] for targets in batch["targets"]))
    return move(batch, *args)
step.move = noted
"""


@pytest.mark.parametrize(
    ("ranks", "num_shards"), [(2, 16), pytest.param(4, 64, marks=pytest.mark.slow)], ids=["two", "four"]
)
def test_processes_share_shards_and_resume_to_the_same_bits(ranks, num_shards, data_cache, tmp_path):
    """Train an epoch, and again with a kill in it; the slow case starts torchrun."""
    sizes = {**TINY_SET, "num_train": 8 * num_shards, "num_test": 2, "num_validation": 2}
    shapes = data_scripts.load("shapes", cache_dir=data_cache, **sizes)
    folder = tmp_path / "shapes"
    write_shards(folder, shapes["train"], num_shards)
    for split in ("validation", "test"):
        write_shards(folder, shapes[split], 1, split)
    settings = {"dataset": str(folder), "dataset_config": {}, "streaming": True, "num_epochs": 1}
    settings["expressions_per_image"] = 100
    recipe = write_recipe(tmp_path / "recipe.yaml", data_cache, **settings, batch_size=16 // ranks)

    def launch(name, *argv):
        (tmp_path / name).mkdir(exist_ok=True)
        before = RECORD.format(folder=str(tmp_path / name))
        argv = (recipe, "--output_dir", tmp_path / name / "run", *argv)
        if ranks > 2:
            return [start(*argv, ranks=ranks, before=before)]
        script = tmp_path / f"{name}.py"
        script.write_text(f"import runpy\n{before}\nrunpy.run_path('train_reftr.py', run_name='__main__')\n")
        return start_ranks([script, *argv], ranks)

    def noted(name, kind):
        return [(tmp_path / name / f"{kind}_{rank}").read_text().split() for rank in range(ranks)]

    for process in launch("whole"):
        finish(process)
    shards = [[int(shard) for shard in numbers] for numbers in noted("whole", "shards")]
    assert [len(numbers) for numbers in shards] == [num_shards // ranks] * ranks
    assert sorted(itertools.chain(*shards)) == list(range(num_shards))
    read = [sum(map(int, numbers)) for numbers in noted("whole", "bytes")]
    assert all(0.8 / ranks < number / sum(read) < 1.2 / ranks for number in read), read
    seen = [name for names in noted("whole", "seen") for name in names]
    expected = [item["sentence_id"] for sentences in shapes["train"]["sentences"] for item in sentences]
    assert sorted(seen) == sorted(expected)
    num_steps = 8 * num_shards // 16
    run = tmp_path / "killed" / "run"
    processes = launch("killed")
    wait_for(lambda: max(steps_of(run), default=0) >= 2, processes[0])
    for process in processes:
        kill(process)
    assert steps_of(run)[0] < num_steps
    outputs = [finish(process) for process in launch("killed", "--resume", "auto")]
    assert "Going on from" in "".join(outputs)
    whole = tmp_path / "whole" / "run"
    assert [names[-1] for names in noted("killed", "seen")] == [names[-1] for names in noted("whole", "seen")]
    assert set(itertools.chain(*noted("killed", "seen"))) == set(seen)
    assert losses_of(run) == losses_of(whole)
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, other = (folder / f"checkpoints/step_{num_steps:08d}" / name for folder in (run, whole))
        assert one.read_bytes() == other.read_bytes()
    state = json.loads((run / f"checkpoints/step_{num_steps:08d}/state.json").read_text())
    assert state["num_rows"] == 8 * num_shards
    assert state["seen"] == [[16, num_steps, ranks, 1]]
