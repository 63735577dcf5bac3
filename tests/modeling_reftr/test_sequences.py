"""Any sequence is accepted wherever a list is, with equal results; other values are refused in one sentence."""

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers.pipelines.pt_utils import KeyDataset

from modeling_reftr import VisualGroundingPipeline
from tests.modeling_reftr.test_threads import same
from training_reftr.metrics.referring_expression_comprehension.referring_expression_comprehension import (
    ReferringExpressionComprehension,
)
from training_reftr.metrics.referring_segmentation.referring_segmentation import ReferringSegmentation


class Rows(Dataset):
    """A torch dataset without `__iter__`, whose end is known only from its length."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return self.values[index % len(self.values)]


def to_object_array(values):
    array = np.empty(len(values), dtype=object)
    for index, value in enumerate(values):
        array[index] = value
    return array


def to_series(values):
    """Return a series whose labels differ from positions: read as positions, they reverse the order."""
    return pd.Series(values, index=range(len(values))[::-1], dtype=object)


def to_column(values):
    return datasets.Dataset.from_dict({"values": values})["values"]


def to_key_dataset(values):
    return KeyDataset(datasets.Dataset.from_dict({"values": values}), "values")


KINDS = {
    "tuple": tuple,
    "object array": to_object_array,
    "series": to_series,
    "column": to_column,
    "key dataset": to_key_dataset,
    "torch dataset": Rows,
}


def nested(values, convert):
    """Convert a list and the lists in it to another type of sequence; those of `datasets` nest by themselves."""
    if not isinstance(values, list):
        return values
    inner = values if convert in (to_column, to_key_dataset) else [nested(value, convert) for value in values]
    return convert(inner)


def pixels(height, width, seed):
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


IMAGES = [Image.fromarray(pixels(48, 64, 0)), Image.fromarray(pixels(64, 40, 1))]
TEXTS = ["the red circle", "the star left of the blue square"]
GROUPS = [["the red circle"], ["the star", "a blue square"]]
PHRASES = [["red circle"], ["the star", "the blue square"]]
SPANS = [[[4, 14]], [[0, 8], [17, 32]]]
BOXES = [[[1.0, 2.0, 30.0, 40.0]], [[1.0, 1.0, 20.0, 20.0], [5.0, 6.0, 30.0, 60.0]]]
MASKS = [
    [(np.indices((48, 64)).sum(0) > 50).tolist()],
    [(np.indices((64, 40)).sum(0) > limit).tolist() for limit in (20, 60)],
]
SIZES = [[48, 64], [64, 40]]


@pytest.fixture
def pipe(make_model, processor):
    return VisualGroundingPipeline(make_model(predict_masks=True), processor=processor, device="cpu")


PROCESSOR_ARGUMENTS = {
    "images": {"images": IMAGES, "text": TEXTS},
    "texts of images": {"images": IMAGES, "text": GROUPS},
    "text alone": {"text": TEXTS},
    "phrases": {"images": IMAGES, "text": TEXTS, "phrases": PHRASES},
    "spans": {"images": IMAGES, "text": TEXTS, "phrases": SPANS},
    "boxes": {"images": IMAGES, "text": TEXTS, "phrases": PHRASES, "boxes": BOXES},
    "boxes of one text": {"images": IMAGES[0], "text": TEXTS[0], "boxes": BOXES[0][0]},
    "masks": {"images": IMAGES, "text": TEXTS, "phrases": PHRASES, "masks": MASKS},
    "mask of one text": {"images": IMAGES[0], "text": TEXTS[0], "masks": MASKS[0][0]},
    "annotated sizes": {"images": IMAGES, "text": TEXTS, "original_sizes": SIZES},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PROCESSOR_ARGUMENTS)
def test_processor_accepts_any_sequence(processor, name, kind):
    arguments = PROCESSOR_ARGUMENTS[name]
    found = processor(**{key: nested(value, KINDS[kind]) for key, value in arguments.items()})
    assert same(dict(found), dict(processor(**arguments)))


@pytest.mark.parametrize("kind", KINDS)
def test_image_processor_accepts_any_sequence(processor, kind):
    expected = processor.image_processor(IMAGES, return_tensors="pt")
    assert same(dict(processor.image_processor(KINDS[kind](IMAGES), return_tensors="pt")), dict(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_post_process_accepts_sizes_and_thresholds_of_any_type(pipe, processor, kind):
    with torch.no_grad():
        outputs = pipe.model(**processor(IMAGES, TEXTS))
    answer = processor.post_process_referring_segmentation
    expected = answer(outputs, SIZES, threshold=0.4)
    assert same(answer(outputs, nested(SIZES, KINDS[kind]), threshold=0.4), expected)
    for threshold in (np.float64(0.4), torch.tensor(0.4, dtype=torch.float64), np.array(0.4)):
        assert same(answer(outputs, SIZES, threshold=threshold), expected)
    with pytest.raises(ValueError, match="must be one number from 0 to 1"):
        answer(outputs, SIZES, threshold=KINDS[kind]([0.4, 0.5]))


@pytest.mark.parametrize("kind", KINDS)
def test_pipeline_accepts_any_sequence(pipe, kind):
    settings = {"batch_size": 2}
    for arguments in (
        {"text": TEXTS},
        {"text": GROUPS},
        {"text": TEXTS, "phrases": PHRASES},
        {"text": TEXTS, "phrases": SPANS},
        {"text": "the star"},
    ):
        expected = pipe(IMAGES, **arguments, **settings)
        others = {key: nested(value, KINDS[kind]) for key, value in arguments.items()}
        found = pipe(KINDS[kind](IMAGES), **others, **settings)
        assert isinstance(found, list) is (kind not in ("key dataset", "torch dataset"))
        assert same(list(found), expected)
    questions = [{"image": image, "text": text} for image, text in zip(IMAGES, TEXTS, strict=True)]
    assert same(list(pipe(KINDS[kind](questions), **settings)), pipe(IMAGES, text=TEXTS, **settings))
    assert same(pipe(IMAGES[0], text=KINDS[kind](TEXTS)), pipe(IMAGES[0], text=TEXTS))


def test_pipeline_accepts_datasets_rows_and_batches(pipe):
    rows = datasets.Dataset.from_dict({"image": IMAGES, "text": TEXTS, "number": [1, 2]})
    expected = pipe(IMAGES, text=TEXTS)
    assert same(list(pipe(rows)), expected)
    assert same(list(pipe(rows.to_iterable_dataset())), expected)
    assert same(list(pipe(row for row in rows)), expected)
    assert same(pipe(rows[:2]), expected)  # by columns
    assert same(pipe(rows[:1]), expected[:1])
    assert same(pipe(rows[0]), expected[0])
    assert same(pipe({"image": IMAGES, "text": "the star"}), pipe(IMAGES, text="the star"))
    mapped = rows.map(lambda row: {"xmin": [answer["box"]["xmin"] for answer in pipe(row)]})
    assert list(mapped["xmin"]) == [[answer["box"]["xmin"] for answer in answers] for answers in expected]
    with pytest.raises(ValueError, match="contain their text and phrases"):
        pipe(rows[:2], text=TEXTS)
    with pytest.raises(ValueError, match="1 texts for 2 images"):
        pipe({"image": IMAGES, "text": TEXTS[:1]})


def test_pipeline_reads_dataset_lazily(pipe):
    read = []

    class Watched(Rows):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    answers = pipe(Watched(IMAGES * 4), text=TEXTS * 4)
    assert same(next(answers), pipe(IMAGES[0], text=TEXTS[0]))
    assert len(set(read)) < 8


def test_processor_and_pipeline_accept_arrays_as_batches(pipe, processor):
    batch = np.stack([pixels(48, 64, seed) for seed in (0, 1)])
    images = list(batch)
    for stacked in (batch, torch.from_numpy(batch).permute(0, 3, 1, 2)):
        assert same(pipe(stacked, text=TEXTS), pipe(images, text=TEXTS))
        assert same(dict(processor(stacked, TEXTS)), dict(processor(images, TEXTS)))
    expected = dict(processor(IMAGES, TEXTS))
    for texts in (np.array(TEXTS), pa.array(TEXTS), pd.Series(TEXTS, index=[5, 7]), pd.array(TEXTS)):
        assert same(dict(processor(IMAGES, texts)), expected)
        assert same(pipe(IMAGES, text=texts), pipe(IMAGES, text=TEXTS))
    boxes = [group[0] for group in BOXES]
    expected = processor(IMAGES, TEXTS, boxes=boxes)["labels"]
    for values in (np.array(boxes), torch.tensor(boxes), pa.array(boxes), np.array(boxes, dtype=object)):
        assert same(processor(IMAGES, TEXTS, boxes=values)["labels"], expected)
    phrases = pa.array(PHRASES)
    assert same(dict(processor(IMAGES, TEXTS, phrases=phrases)), dict(processor(IMAGES, TEXTS, phrases=PHRASES)))
    assert same(pipe(IMAGES, text=TEXTS, phrases=phrases), pipe(IMAGES, text=TEXTS, phrases=PHRASES))


METRICS = {
    ReferringExpressionComprehension: ([[0, 0, 8, 10], [2, 2, 4, 4]], [[0, 0, 10, 10], [2, 2, 3, 3]]),
    ReferringSegmentation: ([MASKS[1][0], MASKS[1][1]], [MASKS[1][1], MASKS[1][0]]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("module", METRICS)
def test_metrics_accept_any_sequence(module, kind, tmp_path):
    metric, (predictions, references) = module(cache_dir=str(tmp_path)), METRICS[module]
    expected = metric.compute(predictions=predictions, references=references)
    assert 0 < expected["mean_iou"] < 1
    convert = KINDS[kind]
    changes = [convert] if convert is Rows else [convert, lambda values: nested(values, convert)]
    for change in changes:
        assert metric.compute(predictions=change(predictions), references=change(references)) == expected
    for value in (np.array(1.0), {"a": 1}, pd.DataFrame({"a": [1]}), "a box", iter(predictions)):
        with pytest.raises(ValueError, match=r"^references must be a sequence of (boxes|masks), got "):
            metric.compute(predictions=predictions, references=value)


@pytest.mark.parametrize("kind", KINDS)
def test_segmentation_metric_accepts_run_lengths_in_any_sequence(kind, tmp_path):
    metric, runs = ReferringSegmentation(cache_dir=str(tmp_path)), {"size": [2, 2], "counts": [1, 3]}
    mask = {name: KINDS[kind](values) for name, values in runs.items()}
    assert metric.compute(predictions=[mask, None], references=[runs, mask])["mean_iou"] == 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_empty_sequences_are_refused_like_empty_lists(pipe, processor, kind):
    empty = to_column([]) if kind == "column" else KINDS[kind]([])
    for call, arguments in (
        (processor, {"images": IMAGES, "text": []}),
        (processor, {"images": [], "text": TEXTS}),
        (processor, {"images": IMAGES, "text": TEXTS, "phrases": []}),
        (processor, {"images": IMAGES, "text": TEXTS, "boxes": []}),
        (pipe, {"images": IMAGES, "text": []}),
        (pipe, {"images": [], "text": TEXTS}),
        (pipe, {"images": IMAGES[0], "text": []}),
    ):
        messages = []
        for value in ([], empty):
            with pytest.raises(ValueError, match=r"\w") as error:
                call(**{name: value if given == [] else given for name, given in arguments.items()})
            messages.append(str(error.value))
        assert messages[0] == messages[1]


TABLE = pd.DataFrame({"text": TEXTS})


@pytest.mark.parametrize("value", [np.array("the star"), {"a", "b"}, TABLE, iter(TEXTS), b"ab", 7])
def test_processor_and_pipeline_reject_non_sequences(pipe, processor, value):
    for name in ("text", "phrases", "boxes", "masks"):
        with pytest.raises(ValueError, match=rf"^{name}=.* must be a list, got {type(value).__name__}\.$"):
            processor(**{"images": IMAGES, "text": TEXTS, name: value})
    for name in ("text", "phrases"):
        with pytest.raises(ValueError, match=rf"^{name}=.* must be a list, got {type(value).__name__}\.$"):
            pipe(**{"images": IMAGES, "text": TEXTS, name: value})
    for call in (processor, pipe):
        with pytest.raises(ValueError, match=type(value).__name__):
            call(images=value, text=TEXTS)
