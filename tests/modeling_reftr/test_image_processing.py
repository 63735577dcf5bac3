"""RefTRImageProcessor: published sizes and pixels, every image mode, EXIF orientation."""

import functools
import http.server
import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_reftr import RefTRImageProcessor, open_image
from modeling_reftr.image_processing_reftr import resized_size
from modeling_reftr.labels_reftr import to_label_boxes
from tests.helpers.golden import GOLDEN


@pytest.fixture
def image_processor():
    return RefTRImageProcessor()


def test_resized_size_matches_published_sizes():
    rows = json.loads((GOLDEN / "preprocess_sizes.json").read_text())["rows"]
    assert len(rows) == 140
    for height, width, resized_height, resized_width in rows:
        assert resized_size(height, width, 640, 640) == (resized_height, resized_width), (height, width)


@pytest.mark.parametrize("index", range(5))
def test_image_processor_reproduces_published_pixels_and_boxes(image_processor, index):
    golden = np.load(GOLDEN / "preprocess.npz")
    image = golden[f"image_{index}"]
    pixels = image_processor(Image.fromarray(image), return_tensors="pt")["pixel_values"][0]
    assert tuple(pixels.shape) == tuple(golden[f"shape_{index}"])
    # one gray level is 0.0175 to 0.0176 after normalization
    np.testing.assert_allclose(pixels[:, ::19, ::23], golden[f"pixels_{index}"], atol=0.02)
    np.testing.assert_allclose([pixels.mean(), pixels.std()], golden[f"mean_std_{index}"], atol=1e-3)
    boxes = to_label_boxes(golden[f"boxes_xyxy_{index}"], *image.shape[:2], "a sentence")
    np.testing.assert_allclose(boxes, golden[f"boxes_cxcywh_{index}"], atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 1300), (1300, 1), (2, 3)])
def test_image_processor_keeps_a_pixel_of_thin_images(image_processor, size):
    inputs = image_processor(np.zeros((*size, 3), dtype=np.uint8), return_tensors="pt")
    assert min(inputs["pixel_values"].shape) >= 1
    assert inputs["pixel_values"].isfinite().all()


def test_image_processor_pads_with_zeros_after_normalization(image_processor):
    images = [np.full((320, 640, 3), 200, np.uint8), np.full((640, 640, 3), 200, np.uint8)]
    inputs = image_processor(images, return_tensors="pt")
    assert inputs["pixel_mask"].dtype == torch.int64
    assert inputs["pixel_mask"].sum(dim=(1, 2)).tolist() == [320 * 640, 640 * 640]
    assert (inputs["pixel_values"][0, :, 320:] == 0).all()


def half_and_half():
    """Return an image whose left half is darker than its right half."""
    image = np.full((60, 80, 3), 40, np.uint8)
    image[:, 40:] = 210
    return Image.fromarray(image)


def as_mode(mode, rotated):
    image = half_and_half()
    exif = Image.Exif()
    if rotated:  # stored rotated by 90 degrees, with the matching EXIF tag
        image = image.transpose(Image.Transpose.ROTATE_90)
        exif[0x0112] = 6
    if mode == "I;16":
        gray = np.asarray(image.convert("L")).astype(np.uint16) * 257
        image = Image.fromarray(gray)
    elif mode == "I":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.int32) * 257)
    elif mode == "P":
        image = image.quantize(8)
    else:
        image = image.convert(mode)
    image.getexif().update(exif)
    return image


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "RGBA", "LA", "I;16", "I"])
def test_image_processor_converts_every_mode_to_upright_rgb(image_processor, mode, rotated):
    pixels = image_processor(as_mode(mode, rotated), return_tensors="pt")["pixel_values"][0]
    assert pixels.shape == (3, 480, 640)
    expected = image_processor(half_and_half(), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(pixels, expected, atol=0.06, rtol=0)


@pytest.mark.parametrize(
    "image",
    [
        np.full((30, 40), 9, np.uint8),
        np.full((30, 40, 1), 9, np.uint8),
        np.full((3, 30, 40), 9, np.uint8),
        np.full((30, 40, 3), 9 * 257, np.uint16),
        torch.full((3, 30, 40), 9, dtype=torch.uint8),
    ],
)
def test_image_processor_accepts_arrays_and_tensors(image_processor, image):
    pixels = image_processor(image, return_tensors="pt")["pixel_values"][0]
    expected = image_processor(np.full((30, 40, 3), 9, np.uint8), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(pixels, expected)


def test_image_processor_ignores_exif_if_stored_size_was_annotated(image_processor):
    image = as_mode("RGB", rotated=True)  # stored 80 x 60 (height, width), upright 60 x 80
    upright = image_processor(image, original_sizes=[(60, 80)], return_tensors="pt")["pixel_values"]
    stored = image_processor(image, original_sizes=[(80, 60)], return_tensors="pt")["pixel_values"]
    neither = image_processor(image, original_sizes=[(1, 2)], return_tensors="pt")["pixel_values"]
    assert upright.shape[-2:] == neither.shape[-2:] == (480, 640)
    assert stored.shape[-2:] == (640, 480)


def test_image_processor_names_missing_and_broken_files(image_processor, tmp_path):
    with pytest.raises(OSError, match=r"no image at .*nowhere\.png"):
        image_processor(str(tmp_path / "nowhere.png"), return_tensors="pt")
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(OSError, match=r"text\.jpg.* cannot be read as an image"):
        image_processor(tmp_path / "text.jpg", return_tensors="pt")
    half_and_half().save(tmp_path / "full.jpg")
    content = (tmp_path / "full.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) * 9 // 10])
    with pytest.raises(OSError, match=r"cut\.jpg.* cannot be read as an image"):
        image_processor(tmp_path / "cut.jpg", return_tensors="pt")
    assert image_processor(str(tmp_path / "full.jpg"), return_tensors="pt")["pixel_values"].shape == (1, 3, 480, 640)


def test_image_processor_rejects_empty_list(image_processor):
    with pytest.raises(ValueError, match="There are no images"):
        image_processor([], return_tensors="pt")


def test_image_processor_round_trips_through_save_pretrained(image_processor, tmp_path):
    processor = RefTRImageProcessor(size={"shortest_edge": 96, "longest_edge": 96})
    processor.save_pretrained(tmp_path)
    loaded = RefTRImageProcessor.from_pretrained(tmp_path)
    pixels = [p(half_and_half(), return_tensors="pt")["pixel_values"] for p in (processor, loaded)]
    assert pixels[0].shape == (1, 3, 72, 96)
    assert torch.equal(*pixels)


def test_image_url_at_private_address_requires_allow_private(tmp_path):
    Image.new("RGB", (64, 48), "red").save(tmp_path / "red.png")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        processor = RefTRImageProcessor(size={"shortest_edge": 64, "longest_edge": 64})
        image = open_image(f"{address}/red.png", allow_private=True)
        assert processor(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 48, 64)
        with pytest.raises(OSError, match=r"/none\.png' cannot be read as an image: .*404"):
            open_image(f"{address}/none.png", allow_private=True)
        with pytest.raises(OSError, match=r"is at 127\.0\.0\.1, and only public addresses are fetched"):
            processor(f"{address}/red.png", return_tensors="pt")
        server.shutdown()


def test_image_processor_gives_same_batch_for_images_and_arrays(image_processor):
    """PIL images are resized with channels last in memory, arrays with channels first."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, size, dtype=np.uint8) for size in ((90, 140, 3), (700, 500, 3), (480, 640, 3))]
    inputs = image_processor([Image.fromarray(array) for array in arrays], return_tensors="pt")
    expected = image_processor([array.transpose(2, 0, 1) for array in arrays], return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    assert torch.equal(inputs["pixel_mask"], expected["pixel_mask"])
    assert inputs["pixel_values"].is_contiguous()
    separate = image_processor([Image.fromarray(array) for array in arrays])
    assert all(torch.equal(*pair) for pair in zip(separate["pixel_values"], inputs["pixel_values"], strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size_divisor": 48},
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.1]},
        {"image_mean": 0.5, "image_std": 0.25, "rescale_factor": 1 / 128},
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_rescale": False, "do_normalize": False},
    ],
)
def test_deferred_normalization_gives_same_pixels_bit_for_bit(settings):
    image_processor = RefTRImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}, **settings)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, size, dtype=np.uint8) for size in ((64, 64, 3), (90, 140, 3), (100, 1, 3))]
    images.append(as_mode("RGBA", rotated=True))
    expected = image_processor(images, return_tensors="pt")
    batch = image_processor(images, do_defer_normalization=True, return_tensors="pt")
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["pixel_mask"].dtype == torch.bool
    assert torch.equal(batch["pixel_mask"].long(), expected["pixel_mask"])
    assert not batch["pixel_mask"].all()
    normalized = image_processor.normalize_batch(**batch)
    assert normalized.dtype == expected["pixel_values"].dtype
    assert torch.equal(normalized, expected["pixel_values"])
    without_padding = image_processor(images[0], do_defer_normalization=True, do_pad=False, return_tensors="pt")
    expected = image_processor(images[0], do_pad=False, return_tensors="pt")
    assert torch.equal(image_processor.normalize_batch(**without_padding), expected["pixel_values"])


def test_image_processor_pads_batch_to_pad_size(image_processor):
    image = np.zeros((320, 640, 3), np.uint8)
    inputs = image_processor(image, pad_size={"height": 700, "width": 800}, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 700, 800)
    assert inputs["pixel_mask"].sum() == 320 * 640
    for height, width in ((300, 800), (400, 600)):
        with pytest.raises(ValueError, match="at least 320 and 640"):
            image_processor(image, pad_size={"height": height, "width": width}, return_tensors="pt")


def test_image_processor_pads_to_multiple_of_size_divisor(image_processor, tmp_path):
    image = Image.new("RGB", (100, 70))
    inputs = image_processor(image, size_divisor=100, return_tensors="pt")
    assert inputs["pixel_values"].shape[-2:] == (500, 700)
    assert inputs["pixel_mask"].sum() == 640 * 448
    configured = RefTRImageProcessor(size_divisor=100)
    assert configured(image, return_tensors="pt")["pixel_values"].shape[-2:] == (500, 700)
    configured.save_pretrained(tmp_path)
    assert RefTRImageProcessor.from_pretrained(tmp_path).size_divisor == 100
    with pytest.raises(ValueError, match="size_divisor=0 must be at least 1"):
        image_processor(image, size_divisor=0, return_tensors="pt")


@pytest.mark.parametrize("padded_size", [(4, 6), (5, 6), (4, 8), (5, 8)])
def test_resize_masks_pads_each_side_that_is_too_short(padded_size):
    masks = torch.ones(2, 4, 6, dtype=torch.bool)
    resized = RefTRImageProcessor().resize_masks(masks, padded_size, do_resize=False)
    assert resized.shape == (2, *padded_size)
    assert resized[:, :4, :6].all()
    assert resized.sum() == masks.sum()


def mean_shift(image_processor, masks, side):
    """Return the mean distance (x, y), in 0..1, by which resizing to a square moves the centroids of masks."""
    shifts = []
    for before, after in zip(masks, image_processor.resize_masks(masks, (side, side)).numpy(), strict=True):
        (y, x), (new_y, new_x) = (np.stack(np.nonzero(mask)).mean(axis=1) + 0.5 for mask in (before, after))
        shifts.append((new_x / side - x / before.shape[1], new_y / side - y / before.shape[0]))
    return np.mean(shifts, axis=0)


@pytest.mark.parametrize("side", [40, 128])
def test_mask_resampling_nearest_exact_keeps_masks_in_place(side, tmp_path):
    masks = np.zeros((30, 90, 60), dtype=bool)
    for index, mask in enumerate(masks):
        mask[index : 31 + 2 * index, index % 20 : 35 + index % 7] = True
    size = {"height": side, "width": side}
    RefTRImageProcessor(size=size, mask_resampling="nearest-exact").save_pretrained(tmp_path)
    exact = RefTRImageProcessor.from_pretrained(tmp_path)
    assert exact.mask_resampling == "nearest-exact"
    assert np.abs(mean_shift(exact, masks, side)).max() < 0.001
    assert np.abs(mean_shift(RefTRImageProcessor(size=size), masks, side)).min() > 0.002
    with pytest.raises(ValueError, match="mask_resampling='bilinear' must be 'nearest' or 'nearest-exact'"):
        RefTRImageProcessor(mask_resampling="bilinear")
