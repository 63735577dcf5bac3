"""Augmentation keeps pixels, boxes, masks and text consistent."""

import colorsys
import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from training_reftr.augmentation import (
    augment,
    change_brightness,
    change_saturation,
    crop_and_scale,
    mirror,
    mirror_sentence,
    mirrored_words,
)
from training_reftr.samples import Sample


COLORS = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


def mirrored_text(text):
    """Return the mirrored text, or None if it cannot be mirrored."""
    sentence = mirror_sentence({"text": text, "phrases": []})
    return sentence and sentence["text"]


def make_sample(text="the red box on the left", width=64, height=48, box=(10, 8, 25, 30)):
    """Make a sample of a red box on grey with its mask; the second object is the blue upper right corner."""
    pixels = np.full((height, width, 3), 100, np.uint8)
    x0, y0, x1, y1 = box
    masks = np.zeros((2, height, width), bool)
    masks[0, y0:y1, x0:x1] = True
    masks[1, :6, -8:] = True
    pixels[masks[0]] = (200, 20, 20)
    pixels[masks[1]] = (20, 20, 200)
    boxes = [[float(value) for value in box], [width - 8.0, 0.0, float(width), 6.0]]
    phrase = {"start": 0, "end": len(text), "objects": [0], "types": []}
    sentences = [{"sentence_id": "a_0", "text": text, "phrases": [phrase]}]
    return Sample(pixels, np.array(boxes), masks, sentences, row={})


def colored_box(image, channel):
    """Return the bounding box of the pixels dominated by a color channel."""
    pixels = np.asarray(image).astype(int)
    others = np.delete(pixels, channel, axis=2).max(axis=2)
    rows, columns = np.nonzero(pixels[..., channel] > others + 15)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


# pixels


@pytest.mark.parametrize("factor", [0.5, 0.83, 1.0, 1.3, 1.5])
def test_brightness_and_saturation_changes_follow_hsv(factor):
    bright, saturated = change_brightness(COLORS, factor), change_saturation(COLORS, factor)
    for pixel, brighter, stronger in zip(*(a.reshape(-1, 3) for a in (COLORS, bright, saturated)), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(pixel / 255))
        expected = colorsys.hsv_to_rgb(hue, saturation, min(1, value * factor))
        assert np.abs(np.array(expected) * 255 - brighter).max() <= 0.501
        expected = colorsys.hsv_to_rgb(hue, min(1, saturation * factor), value)
        assert np.abs(np.array(expected) * 255 - stronger).max() <= 0.501
    # the HSV of PIL has eight bits, so its V agrees up to rounding
    values = [np.asarray(Image.fromarray(pixels).convert("HSV"))[..., 2] for pixels in (COLORS, bright)]
    assert np.abs(np.clip(values[0] * factor, 0, 255) - values[1]).max() <= 1


@pytest.mark.parametrize("factor", [0.5, 0.77, 1.0, 1.21, 1.5])
def test_brightness_and_saturation_round_as_formulas_over_all_channels(factor):
    """Compare every byte with the formulas written over all channels at once in float32."""
    values = np.arange(256, dtype=np.uint8)
    colors = np.stack(np.meshgrid(values, values, values[::17], indexing="ij"), axis=-1).reshape(256, -1, 3)
    for pixels in (colors, colors[..., ::-1], colors[..., [1, 2, 0]]):
        value = pixels.max(axis=2, keepdims=True).astype(np.float32)
        gain = np.minimum(np.float32(factor), 255 / np.maximum(value, 1))
        np.testing.assert_array_equal(change_brightness(pixels, factor), np.rint(pixels * gain).astype(np.uint8))
        lack = value - pixels
        gain = np.minimum(np.float32(factor), value / np.maximum(lack.max(axis=2, keepdims=True), 1))
        expected = np.rint(value - lack * gain).astype(np.uint8)
        np.testing.assert_array_equal(change_saturation(pixels, factor), expected)


def test_saturation_change_leaves_grey_and_black_unchanged():
    grey = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    assert (change_saturation(grey, 1.5) == grey).all()
    assert (change_brightness(grey, 1.0) == grey).all()
    assert change_brightness(grey, 1.5).max() == 255


def test_published_augmentation_changes_only_brightness():
    sample = make_sample()
    changed = augment(sample, "published", random.Random(1))
    assert (augment(sample, "brightness", random.Random(1)).image == changed.image).all()
    assert changed.boxes_xyxy is sample.boxes_xyxy
    assert changed.masks is sample.masks
    assert changed.sentences is sample.sentences
    gains = {
        round(float(after) / before, 1)
        for before, after in zip(np.ravel(sample.image), np.ravel(changed.image), strict=True)
        if before >= 100
    }
    assert len(gains) == 1
    assert gains != {1.0}
    factors = [augment(sample, "published", random.Random(seed)).image[40, 0, 0] / 100 for seed in range(200)]
    assert 0.5 <= min(factors) < 0.55
    assert 1.45 < max(factors) <= 1.5
    assert augment(sample, "none", random.Random(1)) is sample


# geometry


def test_strong_augmentation_keeps_boxes_and_masks_on_pixels():
    mirrored_count, sizes = 0, set()
    for seed in range(60):
        changed = augment(make_sample(), "strong", random.Random(seed))
        height, width = changed.image.shape[:2]
        sizes.add((height, width))
        text = changed.sentences[0]["text"]
        mirrored_count += text == "the red box on the right"
        assert text in ("the red box on the left", "the red box on the right")
        assert changed.sentences[0]["phrases"][0]["end"] == len(text)
        for channel, box, mask in zip((0, 2), changed.boxes_xyxy, changed.masks, strict=True):
            assert min(box) >= -1e-6
            assert box[2] <= width + 1e-6
            assert box[3] <= height + 1e-6
            assert colored_box(changed.image, channel) == pytest.approx(box, abs=1.5)
            assert mask.shape == (height, width)
            assert colored_box(np.dstack([np.where(mask, 255, 0)] + [np.zeros_like(mask, int)] * 2), 0) == (
                pytest.approx(box, abs=1.5)
            )
    assert 20 <= mirrored_count <= 40
    assert len(sizes) > 40


def test_crop_keeps_boxes_complete_and_scale_in_range():
    for seed in range(100):
        changed = crop_and_scale(make_sample(width=100, height=40, box=(3, 2, 99, 39)), random.Random(seed))
        height, width = changed.image.shape[:2]
        # the box leaves almost nothing to crop, so the shape and the area of the box stay
        assert width / height == pytest.approx(2.5, abs=0.35)
        assert 80 <= max(width, height) <= 120
        x0, y0, x1, y1 = changed.boxes_xyxy[0]
        assert (x1 - x0) * (y1 - y0) >= 0.88 * width * height
    without_objects = replace(make_sample(), boxes_xyxy=np.zeros((0, 4)), masks=None)
    assert crop_and_scale(without_objects, random.Random(0)).boxes_xyxy.shape == (0, 4)


def test_mirror_applied_twice_restores_sample():
    sample = make_sample("Left of the box, clockwise")
    again = mirror(mirror(sample))
    assert again.sentences == sample.sentences
    for name in ("image", "boxes_xyxy", "masks"):
        assert (getattr(again, name) == getattr(sample, name)).all()
        assert not (getattr(mirror(sample), name) == getattr(sample, name)).all()


def test_mirror_is_skipped_if_any_sentence_forbids_it():
    sample = make_sample("the box on the left")
    sample.sentences.append({"sentence_id": "a_1", "text": "number 7", "phrases": []})
    assert mirror(sample) is None
    texts = {augment(sample, "strong", random.Random(seed)).sentences[0]["text"] for seed in range(20)}
    assert texts == {"the box on the left"}


# text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("man on left", "man on right"),
        ("left guy", "right guy"),
        ("guy left", "guy right"),
        ("LEFT one? Left!", None),  # "right one" may mean the correct one
        ("LEFT dog", "RIGHT dog"),
        ("Left-most dog", "Right-most dog"),
        ("the leftmost of the cars", "the rightmost of the cars"),
        ("Rightmost", "Leftmost"),
        ("righthand man, right-handed batter", "lefthand man, left-handed batter"),
        ("top-left/bottom right corner", "top-right/bottom left corner"),
        ("second from left to right", "second from right to left"),
        ("2nd from the left", "2nd from the right"),
        ("facing left, her left hand", "facing right, her right hand"),
        ("turned clockwise", "turned counterclockwise"),
        ("counter-clockwise, anticlockwise, counter clockwise", "clockwise, clockwise, clockwise"),
        ("leftwards of it", "rightwards of it"),
        ("on the left next to the car", "on the right next to the car"),
        ("the cup is left of the plate", "the cup is right of the plate"),
        ("left half of the picture", "right half of the picture"),
        ("the dog in the middle", "the dog in the middle"),
        ("a man's t-shirt", "a man's t-shirt"),
        # not a direction, or ambiguous
        ("the left over pizza", None),
        ("leftovers", None),
        ("two slices left", None),
        ("he has left the room", None),
        ("the bag left on the bench", None),
        ("man right next to the tree", None),
        ("right behind the car", None),
        ("all right", None),
        ("the right angle", None),
        ("right side up", None),
        ("the bright lamp", None),
        ("upright piano", None),
        ("lefty", None),
        ("leftt", None),
        # readable text, or a side independent of the viewer
        ("player number seven", None),
        ("player 7 on the left", None),
        ("the letter on the box", None),
        ("shirt with B", None),
        ('sign "stop"', None),
        ("the one that says hello", None),
        ("hand at three o'clock", None),
        ("starboard side", None),
        ("the east wall", None),
    ],
)  # fmt: skip
def test_mirror_sentence_swaps_directions_or_returns_none(text, expected):
    assert mirrored_text(text) == expected


def test_mirror_sentence_keeps_phrase_spans_on_their_text():
    text = "Left-most man is left of the clockwise wheel on the RIGHT"
    names = ["Left-most man", "the clockwise wheel", "wheel", "the RIGHT", text, "t-mo"]
    phrases = [
        {"start": (start := text.index(name)), "end": start + len(name), "objects": [0], "types": ["x"]}
        for name in names
    ]
    sentence = mirror_sentence({"sentence_id": "1", "text": text, "phrases": phrases})
    found = [sentence["text"][phrase["start"] : phrase["end"]] for phrase in sentence["phrases"]]
    mirrored = "Right-most man is right of the counterclockwise wheel on the LEFT"
    # a phrase starting within a swapped word is extended to the complete word
    assert found == ["Right-most man", "the counterclockwise wheel", "wheel", "the LEFT", mirrored, "Right-mo"]
    assert sentence["phrases"][0]["types"] == ["x"]
    assert sentence["sentence_id"] == "1"


def test_mirror_accepts_every_sentence_of_shapes_dataset(shapes):
    """Check places and relations against the mirrored boxes: the leftmost shape is still the leftmost."""
    checked = 0
    for row in shapes["train"].select(range(20)):
        for sentence in row["sentences"]:
            assert mirrored_words(sentence["text"]) is not None, sentence["text"]
        boxes_xyxy = np.array([item["box"] for item in row["objects"]])
        mirrored = mirror(Sample(np.asarray(row["image"]), boxes_xyxy, None, row["sentences"], row))
        for before, after in zip(row["sentences"], mirrored.sentences, strict=True):
            if len(after["phrases"]) == 2 and " is right of " in after["text"]:
                assert " is left of " in before["text"]
                first, second = (mirrored.boxes_xyxy[phrase["objects"][0]] for phrase in after["phrases"])
                assert first[0] + first[2] > second[0] + second[2]
                checked += 1
    assert checked
