"""Samples hold arrays, so that an image is opened once and a mask decoded once from row to batch."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import data_scripts
from modeling_reftr import orientation_reftr, rle_reftr
from modeling_reftr.image_processing_reftr import RefTRImageProcessor
from modeling_reftr.rle_reftr import to_coco_rle
from training_reftr import images, samples
from training_reftr.data import GroundingCollator, GroundingDataset, TrainingSamples
from training_reftr.images import ImageReader
from training_reftr.sampling import SampleIndex


NUM_ROWS = 3


@pytest.fixture
def rows(tmp_path):
    """Write JPEG files with an EXIF orientation; return rows of two objects with masks and expressions."""
    rows = []
    rng = np.random.default_rng(0)
    for number in range(NUM_ROWS):
        exif = Image.Exif()
        exif[0x0112] = 6
        path = tmp_path / f"{number}.jpg"
        Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(path, exif=exif)
        objects, sentences = [], []
        for index in range(2):
            mask = torch.zeros(120, 90, dtype=torch.bool)
            mask[10 : 60 + index, 20:70] = True
            box = [20.0, 10.0, 70.0, 60.0 + index]
            objects.append(
                {
                    "object_id": str(index),
                    "box": box,
                    "boxes": [box],
                    "category": None,
                    "segmentation": to_coco_rle(mask),
                }
            )
            for text in ("the left box", "the box on the left"):
                phrase = {"start": 0, "end": len(text), "objects": [index], "types": []}
                sentences.append({"sentence_id": f"{number}_{len(sentences)}", "text": text, "phrases": [phrase]})
        rows.append(
            {
                "image_id": str(number),
                "image": {"path": str(path), "bytes": None},
                "width": 90,
                "height": 120,
                "objects": objects,
                "sentences": sentences,
            }
        )
    features = datasets.Features({name: data_scripts.FEATURES[name] for name in rows[0]})
    return datasets.Dataset.from_list(rows, features=features)


@pytest.fixture
def calls(monkeypatch):
    """Count the calls that open and decode images and masks."""
    counts = {}

    def count(owner, name, label):
        function = getattr(owner, name)

        def counted(*args, **kwargs):
            counts[label] = counts.get(label, 0) + 1
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(images, "open_image", "opened")
    count(orientation_reftr, "read_orientation", "orientation applied")
    count(RefTRImageProcessor, "preprocess_with_sizes", "preprocessed")
    count(RefTRImageProcessor, "rescale_and_normalize", "normalized")
    count(samples, "from_coco_rle", "masks decoded")
    count(rle_reftr, "to_run_lengths", "run lengths read")
    return counts


def test_image_is_opened_once_and_mask_decoded_once(rows, processor, calls):
    dataset = GroundingDataset(rows, TrainingSamples(ImageReader(processor.image_processor), "strong", 0, True))
    collate = GroundingCollator(processor, with_masks=True, are_resized=True)
    batch = collate([dataset[SampleIndex(0, index, (0, 1, 2, 3))] for index in range(NUM_ROWS)])
    assert [label["masks"].shape[0] for label in batch["labels"]] == [1] * 4 * NUM_ROWS
    assert calls["opened"] == NUM_ROWS
    assert calls["orientation applied"] == NUM_ROWS
    assert calls["preprocessed"] == 1
    assert calls["masks decoded"] == 2 * NUM_ROWS
    assert calls["run lengths read"] == 2 * NUM_ROWS


def test_sample_has_the_arrays_of_its_row(rows, processor):
    reader = ImageReader(processor.image_processor)
    row = rows.cast_column("image", datasets.Image(decode=False))[0]
    sample = TrainingSamples(reader, "none", 0, with_masks=True)(row, SampleIndex(0, 0, (3, 0)))
    assert sample.image.shape == (64, 48, 3)
    assert sample.image.dtype == np.uint8
    assert sample.boxes_xyxy == pytest.approx(np.array([[20, 10, 70, 60], [20, 10, 70, 61]]) * 64 / 120)
    assert sample.masks.shape == (2, 64, 48)
    assert [sentence["sentence_id"] for sentence in sample.sentences] == ["0_3", "0_0"]
    assert sample.row["height"] == 120
    without = TrainingSamples(reader, "none", 0, with_masks=False)(row, SampleIndex(0, 0, (0,)))
    assert without.masks is None
    assert len(without.boxes_xyxy) == 1


def test_collator_makes_same_batch_of_rows_and_samples(rows, processor):
    """Give decoded rows to the collator, as `transformers.Trainer` does."""
    row = rows.cast_column("image", datasets.Image(decode=False))[1]
    sample = TrainingSamples(ImageReader(processor.image_processor), "none", 0, True)(
        row, SampleIndex(0, 1, (0, 1, 2, 3))
    )
    of_sample = GroundingCollator(processor, with_masks=True, are_resized=True)([sample])
    of_row = GroundingCollator(processor, with_masks=True)([row])
    assert torch.equal(of_sample["pixel_values"], of_row["pixel_values"])
    assert of_sample["targets"] == of_row["targets"]
    for first, second in zip(of_sample["labels"], of_row["labels"], strict=True):
        assert torch.equal(first["masks"], second["masks"])
        torch.testing.assert_close(first["boxes"], second["boxes"])


def test_collator_keeps_axes_of_images_three_pixels_wide(processor):
    """Do not confuse an image side of three pixels with the channel axis."""
    for size in ((3, 40), (40, 3), (3, 3)):
        image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        box = [0.0, 0.0, 2.0, 2.0]
        row = {
            "image_id": "1",
            "image": Image.fromarray(image),
            "height": size[0],
            "width": size[1],
            "objects": [{"object_id": "1", "box": box, "boxes": [box], "category": None, "segmentation": None}],
            "sentences": [
                {
                    "sentence_id": "1",
                    "text": "it",
                    "phrases": [{"start": 0, "end": 2, "objects": [0], "types": []}],
                }
            ],
        }
        batch = GroundingCollator(processor)([row])
        expected = processor(Image.fromarray(image), "it")
        assert torch.equal(batch["pixel_values"], expected["pixel_values"]), size
