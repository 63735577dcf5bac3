"""RefTRImageProcessor: the published sizes and pixels, every mode of picture, EXIF."""

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


def test_sizes_are_the_published_ones():
    rows = json.loads((GOLDEN / "preprocess_sizes.json").read_text())["rows"]
    assert len(rows) == 140
    for height, width, resized_height, resized_width in rows:
        assert resized_size(height, width, 640, 640) == (resized_height, resized_width), (height, width)


@pytest.mark.parametrize("index", range(5))
def test_pixels_and_boxes_are_the_published_ones(image_processor, index):
    golden = np.load(GOLDEN / "preprocess.npz")
    picture = golden[f"image_{index}"]
    pixels = image_processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"][0]
    assert tuple(pixels.shape) == tuple(golden[f"shape_{index}"])
    # one grey level is 0.0175 to 0.0176 after normalising
    np.testing.assert_allclose(pixels[:, ::19, ::23], golden[f"pixels_{index}"], atol=0.02)
    np.testing.assert_allclose([pixels.mean(), pixels.std()], golden[f"mean_std_{index}"], atol=1e-3)
    boxes = to_label_boxes(golden[f"boxes_xyxy_{index}"], *picture.shape[:2], "a sentence")
    np.testing.assert_allclose(boxes, golden[f"boxes_cxcywh_{index}"], atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 1300), (1300, 1), (2, 3)])
def test_thin_pictures_keep_a_pixel(image_processor, size):
    inputs = image_processor(np.zeros((*size, 3), dtype=np.uint8), return_tensors="pt")
    assert min(inputs["pixel_values"].shape) >= 1
    assert inputs["pixel_values"].isfinite().all()


def test_smaller_pictures_are_padded_with_zeros_after_normalising(image_processor):
    pictures = [np.full((320, 640, 3), 200, np.uint8), np.full((640, 640, 3), 200, np.uint8)]
    inputs = image_processor(pictures, return_tensors="pt")
    assert inputs["pixel_mask"].dtype == torch.int64
    assert inputs["pixel_mask"].sum(dim=(1, 2)).tolist() == [320 * 640, 640 * 640]
    assert (inputs["pixel_values"][0, :, 320:] == 0).all()


def half_and_half():
    """A picture whose left half is darker than its right."""
    picture = np.full((60, 80, 3), 40, np.uint8)
    picture[:, 40:] = 210
    return Image.fromarray(picture)


def as_mode(mode, rotated):
    picture = half_and_half()
    exif = Image.Exif()
    if rotated:  # stored turned by 90 degrees, with the tag that says so
        picture = picture.transpose(Image.Transpose.ROTATE_90)
        exif[0x0112] = 6
    if mode == "I;16":
        grey = np.asarray(picture.convert("L")).astype(np.uint16) * 257
        picture = Image.fromarray(grey)
    elif mode == "I":
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.int32) * 257)
    elif mode == "P":
        picture = picture.quantize(8)
    else:
        picture = picture.convert(mode)
    picture.getexif().update(exif)
    return picture


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "RGBA", "LA", "I;16", "I"])
def test_every_mode_comes_out_as_upright_rgb(image_processor, mode, rotated):
    pixels = image_processor(as_mode(mode, rotated), return_tensors="pt")["pixel_values"][0]
    assert pixels.shape == (3, 480, 640)
    expected = image_processor(half_and_half(), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(pixels, expected, atol=0.06, rtol=0)


@pytest.mark.parametrize(
    "picture",
    [
        np.full((30, 40), 9, np.uint8),
        np.full((30, 40, 1), 9, np.uint8),
        np.full((3, 30, 40), 9, np.uint8),
        np.full((30, 40, 3), 9 * 257, np.uint16),
        torch.full((3, 30, 40), 9, dtype=torch.uint8),
    ],
)
def test_arrays_and_tensors(image_processor, picture):
    pixels = image_processor(picture, return_tensors="pt")["pixel_values"][0]
    expected = image_processor(np.full((30, 40, 3), 9, np.uint8), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(pixels, expected)


def test_exif_is_not_followed_where_only_the_stored_size_was_annotated(image_processor):
    picture = as_mode("RGB", rotated=True)  # stored 80 x 60 (height, width), upright 60 x 80
    upright = image_processor(picture, original_sizes=[(60, 80)], return_tensors="pt")["pixel_values"]
    stored = image_processor(picture, original_sizes=[(80, 60)], return_tensors="pt")["pixel_values"]
    neither = image_processor(picture, original_sizes=[(1, 2)], return_tensors="pt")["pixel_values"]
    assert upright.shape[-2:] == neither.shape[-2:] == (480, 640)
    assert stored.shape[-2:] == (640, 480)


def test_missing_and_broken_files_are_named(image_processor, tmp_path):
    with pytest.raises(OSError, match=r"no image at .*nowhere\.png"):
        image_processor(str(tmp_path / "nowhere.png"), return_tensors="pt")
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(OSError, match=r"text\.jpg.* cannot be read as an image"):
        image_processor(tmp_path / "text.jpg", return_tensors="pt")
    half_and_half().save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) * 9 // 10])
    with pytest.raises(OSError, match=r"cut\.jpg.* cannot be read as an image"):
        image_processor(tmp_path / "cut.jpg", return_tensors="pt")
    assert image_processor(str(tmp_path / "whole.jpg"), return_tensors="pt")["pixel_values"].shape == (1, 3, 480, 640)


def test_no_images(image_processor):
    with pytest.raises(ValueError, match="There are no images"):
        image_processor([], return_tensors="pt")


def test_saved_processor_is_the_same(image_processor, tmp_path):
    processor = RefTRImageProcessor(size={"shortest_edge": 96, "longest_edge": 96})
    processor.save_pretrained(tmp_path)
    loaded = RefTRImageProcessor.from_pretrained(tmp_path)
    pixels = [p(half_and_half(), return_tensors="pt")["pixel_values"] for p in (processor, loaded)]
    assert pixels[0].shape == (1, 3, 72, 96)
    assert torch.equal(*pixels)


def test_a_picture_by_its_address(tmp_path):
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


def test_pictures_and_arrays_give_the_same_batch(image_processor):
    """Pictures are resized with their channels last in memory, arrays with their channels first."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, size, dtype=np.uint8) for size in ((90, 140, 3), (700, 500, 3), (480, 640, 3))]
    inputs = image_processor([Image.fromarray(array) for array in arrays], return_tensors="pt")
    expected = image_processor([array.transpose(2, 0, 1) for array in arrays], return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    assert torch.equal(inputs["pixel_mask"], expected["pixel_mask"])
    assert inputs["pixel_values"].is_contiguous()
    apart = image_processor([Image.fromarray(array) for array in arrays])
    assert all(torch.equal(*pair) for pair in zip(apart["pixel_values"], inputs["pixel_values"], strict=True))


def test_a_batch_of_a_given_size(image_processor):
    picture = np.zeros((320, 640, 3), np.uint8)
    inputs = image_processor(picture, pad_size={"height": 700, "width": 800}, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 700, 800)
    assert inputs["pixel_mask"].sum() == 320 * 640
    for height, width in ((300, 800), (400, 600)):
        with pytest.raises(ValueError, match="at least 320 and 640"):
            image_processor(picture, pad_size={"height": height, "width": width}, return_tensors="pt")


def test_batches_of_few_shapes(image_processor, tmp_path):
    picture = Image.new("RGB", (100, 70))
    inputs = image_processor(picture, size_divisor=100, return_tensors="pt")
    assert inputs["pixel_values"].shape[-2:] == (500, 700)
    assert inputs["pixel_mask"].sum() == 640 * 448
    kept = RefTRImageProcessor(size_divisor=100)
    assert kept(picture, return_tensors="pt")["pixel_values"].shape[-2:] == (500, 700)
    kept.save_pretrained(tmp_path)
    assert RefTRImageProcessor.from_pretrained(tmp_path).size_divisor == 100
    with pytest.raises(ValueError, match="size_divisor=0 must be at least 1"):
        image_processor(picture, size_divisor=0, return_tensors="pt")
