"""Value range and layout of every image type are determined once and per image, at every entry point."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from transformers import pipeline

from modeling_reftr import RefTRImageProcessor
from modeling_reftr.pixels_reftr import height_and_width, to_channels_first, to_pil_image


@pytest.fixture(scope="module")
def image_processor():
    return RefTRImageProcessor(size={"shortest_edge": 64, "longest_edge": 64})


@pytest.fixture(scope="module")
def pixels():
    """Return uint8 pixels (48, 56, 3) with both ends of the range; no side can be a number of channels."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 56, 3), dtype=np.uint8)
    pixels[0, 0], pixels[0, 1] = 0, 255
    return pixels


def process(image_processor, image, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return image_processor(image, return_tensors="pt", **settings)["pixel_values"]


FRACTIONS = {
    "float16": lambda pixels: (pixels / 255).astype(np.float16),
    "float32": lambda pixels: pixels.astype(np.float32) / 255,
    "float64": lambda pixels: pixels / 255,
    "longdouble": lambda pixels: pixels.astype(np.longdouble) / 255,
    "big-endian float": lambda pixels: (pixels / 255).astype(">f4"),
    "interpolated": lambda pixels: np.clip(pixels / 255, 1e-6, 1) * (1 + 3e-7) - 2e-6,
    "ToTensor": lambda pixels: torch.from_numpy(pixels).permute(2, 0, 1).float().div(255),
    "tensor float16": lambda pixels: (torch.from_numpy(pixels).permute(2, 0, 1) / 255).half(),
    "tensor float64": lambda pixels: torch.from_numpy(pixels).permute(2, 0, 1).double() / 255,
    "with a gradient": lambda pixels: (torch.from_numpy(pixels).permute(2, 0, 1) / 255).requires_grad_(),
}
FULL_RANGE = {
    **{
        name: lambda pixels, name=name: pixels.astype(name) for name in ("int16", "int32", "int64", "uint32", "uint64")
    },
    **{
        f"{name} of 0..255": lambda pixels, name=name: pixels.astype(name)
        for name in ("float16", "float32", "float64")
    },
    "uint16": lambda pixels: pixels.astype(np.uint16) * 257,
    "big-endian uint16": lambda pixels: (pixels.astype(np.uint16) * 257).astype(">u2"),
    **{
        f"tensor {dtype}": lambda pixels, dtype=dtype: torch.from_numpy(pixels).to(dtype)
        for dtype in (torch.int16, torch.int32, torch.int64, torch.uint32, torch.uint64, torch.bfloat16, torch.float16)
    },
    "tensor uint16": lambda pixels: torch.from_numpy(pixels.astype(np.uint16) * 257),
}
MEMORY = {
    "channels first": lambda pixels: np.ascontiguousarray(pixels.transpose(2, 0, 1)),
    "transposed twice": lambda pixels: np.asfortranarray(pixels),
    "negative strides": lambda pixels: pixels[::-1, ::-1].copy()[::-1, ::-1],
    "BGR turned": lambda pixels: pixels[..., ::-1].copy()[..., ::-1],
    "tensor channels last": lambda pixels: torch.from_numpy(pixels),
    "tensor not contiguous": lambda pixels: torch.from_numpy(pixels).permute(2, 0, 1),
    "tensor expanded": lambda pixels: torch.from_numpy(pixels)[None].expand(1, -1, -1, -1),
    "batch of one": lambda pixels: pixels[None],
    "opaque RGBA": lambda pixels: np.concatenate([pixels, np.full((48, 56, 1), 255, np.uint8)], axis=2),
    "opaque RGBA fractions": lambda pixels: np.concatenate([pixels / 255, np.ones((48, 56, 1))], axis=2),
    "PIL": Image.fromarray,
}


@pytest.mark.parametrize("kind", [*FRACTIONS, *FULL_RANGE, *MEMORY])
def test_image_processor_gives_same_pixels_for_every_type(image_processor, pixels, kind):
    image = {**FRACTIONS, **FULL_RANGE, **MEMORY}[kind](pixels)
    before = image.detach().clone() if isinstance(image, torch.Tensor) else np.array(image)
    expected = process(image_processor, pixels)
    assert torch.equal(process(image_processor, image), expected)
    if isinstance(image, torch.Tensor):
        assert torch.equal(image.detach(), before)
    else:
        assert np.array_equal(np.asarray(image), before)
    first = image[0] if getattr(image, "ndim", 3) == 4 else image
    assert tuple(height_and_width(first)) == (48, 56)


@pytest.mark.parametrize("kind", [np.array, torch.from_numpy])
def test_to_channels_first_rounds_16_bit_values(kind):
    values = np.array([[0, 128, 129, 385, 386, 65406, 65407, 65535]], np.uint16)
    assert to_channels_first(kind(values)).flatten().tolist() == [0, 0, 1, 1, 2, 254, 255, 255]


@pytest.mark.parametrize("kind", ["uint8", "fractions"])
def test_transparent_array_pixels_become_white(image_processor, pixels, kind):
    opacity = np.full((48, 56, 1), 255, np.uint8)
    opacity[:20] = 0
    expected = pixels.copy()
    expected[:20] = 255
    image = np.concatenate([pixels, opacity], axis=2)
    found = process(image_processor, image if kind == "uint8" else image / 255)
    assert torch.equal(found, process(image_processor, expected))


def test_image_processor_keeps_fractional_values(image_processor, pixels):
    image = pixels.astype(np.float32) * 0.99 + 0.3
    expected = process(image_processor, image / 255, do_rescale=False)
    torch.testing.assert_close(process(image_processor, image), expected, atol=1e-5, rtol=0)


def test_image_processor_accepts_read_only_and_mapped_arrays(image_processor, pixels, tmp_path):
    expected = process(image_processor, pixels)
    frozen = pixels.copy()
    frozen.flags.writeable = False
    np.save(tmp_path / "image.npy", pixels)
    for image in (frozen, *(np.load(tmp_path / "image.npy", mmap_mode=mode) for mode in ("r", "c", "r+"))):
        assert torch.equal(process(image_processor, image), expected)


REFUSED = {
    "negative": lambda pixels: pixels.astype(np.float32) - 1,
    "normalized": lambda pixels: (pixels / 255 - 0.45) / 0.225,
    "in -1..1": lambda pixels: pixels / 127.5 - 1,
    "over 255": lambda pixels: pixels.astype(np.float32) + 1,
    "a little over 1": lambda pixels: pixels / 255 * 1.01,
    "12 bits": lambda pixels: pixels.astype(np.int32) * 16,
    "int64 over 255": lambda pixels: pixels.astype(np.int64) + 1,
    "int16 negative": lambda pixels: pixels.astype(np.int16) - 1,
    "int8": lambda pixels: (pixels // 2).astype(np.int8),
    "int32 of 0 and 1": lambda pixels: (pixels > 9).astype(np.int32),
    "uint16 of 8 bits": lambda pixels: pixels.astype(np.uint16),
    "uint64": lambda pixels: pixels.astype(np.uint64) << np.uint64(56),
    "complex": lambda pixels: pixels.astype(np.complex64),
    "RGBA of two ranges": lambda pixels: np.concatenate([pixels.astype(float), np.ones((48, 56, 1))], axis=2),
    "RGBA of two other ranges": lambda pixels: np.concatenate([pixels / 255, np.full((48, 56, 1), 255.0)], axis=2),
    "not a number": lambda pixels: np.where(pixels > 254, np.nan, pixels / 255),
    "infinite": lambda pixels: np.where(pixels > 254, np.inf, pixels / 255),
    "minus infinity": lambda pixels: np.where(pixels > 254, -np.inf, pixels / 255),
    "text": lambda pixels: pixels.astype(str),
    "objects": lambda pixels: pixels.astype(object),
    "2 channels": lambda pixels: pixels[..., :2],
    "5 channels": lambda pixels: np.concatenate([pixels, pixels[..., :2]], axis=2),
    "5 channels first": lambda pixels: np.concatenate([pixels, pixels[..., :2]], axis=2).transpose(2, 0, 1),
    "one dimension": lambda pixels: pixels[0, :, 0],
    "five dimensions": lambda pixels: pixels[None, None],
}


@pytest.mark.parametrize("kind", REFUSED)
def test_image_processor_rejects_ambiguous_or_invalid_values(image_processor, pixels, kind):
    image = REFUSED[kind](pixels)
    images = [image]
    if getattr(image, "dtype", np.dtype(object)).kind in "uifc":
        images.append(torch.from_numpy(np.ascontiguousarray(image)))
    for image in images:
        with pytest.raises(ValueError, match=r"^An image .*\.$"):
            process(image_processor, image)


def test_image_processor_keeps_black_in_every_dtype(image_processor):
    expected = process(image_processor, np.zeros((48, 64, 3), np.uint8))
    for name in ("bool", "uint16", "int16", "int64", "float16", "float32"):
        assert torch.equal(process(image_processor, np.zeros((48, 64, 3), name)), expected), name


def test_image_processor_reads_boolean_image_as_black_and_white(image_processor):
    mask = np.random.default_rng(0).random((48, 64)) < 0.5
    expected = process(image_processor, mask.astype(np.uint8) * 255)
    for image in (mask, mask[..., None], torch.from_numpy(mask), torch.from_numpy(mask)[None], Image.fromarray(mask)):
        assert torch.equal(process(image_processor, image), expected)


def test_image_processor_scales_each_image_independently(image_processor, pixels):
    """Process a dark image next to bright ones of several dtypes, with and without grouping by size."""
    images = [
        torch.from_numpy(pixels).permute(2, 0, 1) / 255 * 0.003,
        torch.from_numpy(pixels).permute(2, 0, 1) * 0.99,
        torch.from_numpy(pixels).permute(2, 0, 1),
        torch.from_numpy(pixels).permute(2, 0, 1) / 255,
    ]
    alone = torch.cat([process(image_processor, image) for image in images])
    for disable_grouping in (None, True, False):
        assert torch.equal(process(image_processor, images, disable_grouping=disable_grouping), alone)
    batch = torch.stack([images[0], images[3], images[1]])
    assert torch.equal(process(image_processor, batch), alone[[0, 3, 1]])
    assert torch.equal(process(image_processor, batch.permute(0, 2, 3, 1).numpy()), alone[[0, 3, 1]])


def test_image_processor_respects_do_rescale_and_rescale_factor(image_processor, pixels):
    """With do_rescale=False values are not scaled, and with rescale_factor only by that factor."""
    values = (pixels / 255).astype(np.float32)
    settings = {"do_resize": False, "do_normalize": False}
    for image in (values, values * 2 - 1, values * 300, pixels.astype(np.float64) / 255):
        found = process(image_processor, image, do_rescale=False, **settings)
        assert torch.equal(found[0], torch.from_numpy(image).permute(2, 0, 1).float())
    expected = process(image_processor, pixels, **settings)
    for factor, image in ((1.0, values), (1 / 65535, pixels.astype(np.uint16) * 257)):
        found = process(image_processor, image, rescale_factor=factor, **settings)
        torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="not finite"):
        process(image_processor, values * np.nan, do_rescale=False)


# layout


def test_ambiguous_channel_axis_is_last_in_arrays_first_in_tensors(image_processor):
    """Pixels and size follow the same rule, unless the call gives `input_data_format`."""
    rng = np.random.default_rng(0)
    for shape in itertools.product((1, 3, 4), (50,), (1, 3, 4)):
        array = rng.integers(0, 256, shape, dtype=np.uint8)
        tensor = torch.from_numpy(array)
        last, first = shape[:2], shape[1:]
        for image, layout, size in (
            (array, None, last),
            (tensor, None, first),
            (array, "channels_first", first),
            (tensor, "channels_last", last),
        ):
            assert height_and_width(image, layout) == size
            found, sizes = image_processor.preprocess_with_sizes(
                image, input_data_format=layout, do_resize=False, return_tensors="pt"
            )
            assert sizes == [size]
            assert found["pixel_values"].shape == (1, 3, *size)


def test_gray_image_with_few_rows_is_not_read_as_channels(image_processor):
    """The height of a gray image is not its number of channels."""
    for height in (1, 2, 3, 4):
        array = np.random.default_rng(0).integers(0, 256, (height, 50), dtype=np.uint8)
        expected = process(image_processor, Image.fromarray(array), do_resize=False)
        for image in (array, torch.from_numpy(array), [array], [torch.from_numpy(array)]):
            assert torch.equal(process(image_processor, image, do_resize=False), expected)


# PIL


def as_mode(image, mode):
    if mode == "La":
        return image.convert("LA").convert("La")
    if mode == "RGBa":
        return image.convert("RGBA").convert("RGBa")
    if mode == "PA":
        return image.convert("LA").convert("PA")
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    if mode.startswith("I"):
        values = np.asarray(image.convert("L")).astype(np.int32) * 257
        return Image.fromarray(values) if mode == "I" else Image.frombytes(mode, image.size, values.astype(
            ">u2" if mode == "I;16B" else "<u2").tobytes())  # fmt: skip
    if mode == "F in 0..1":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.float32) / 255)
    return image.quantize(8) if mode == "P" else image.convert(mode)


GRAY = ("1", "L", "LA", "La", "PA", "I", "I;16", "I;16B", "I;16L", "F", "F in 0..1")
COLOR = ("RGB", "RGBA", "RGBa", "RGBX", "P", "CMYK", "YCbCr", "HSV", "LAB")


@pytest.mark.parametrize("mode", [*GRAY, *COLOR])
def test_image_processor_converts_every_pillow_mode(image_processor, mode):
    colors = [(200, 30, 40), (20, 180, 60)] if mode in COLOR else [(0, 0, 0), (255, 255, 255)]
    if mode not in ("1", *COLOR):
        colors = [(60, 60, 60), (180, 180, 180)]
    image = Image.new("RGB", (64, 48), colors[0])
    image.paste(colors[1], (0, 0, 20, 48))
    found = process(image_processor, as_mode(image, mode))
    # a few gray levels of 0.018, for modes that convert colors to another space
    tolerance = {"LAB": 0.2, "HSV": 0.06, "YCbCr": 0.06}.get(mode, 1e-6)
    torch.testing.assert_close(found, process(image_processor, image), atol=tolerance, rtol=0)


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "P"])
def test_transparent_pillow_pixels_become_white(image_processor, mode):
    image = Image.new("RGBA", (64, 48), (80, 80, 80, 255))
    image.paste((0, 0, 0, 0), (0, 0, 20, 48))
    if mode == "P":
        image = image.convert("L").convert("P")
        image.info["transparency"] = image.getpixel((0, 0))
    else:
        image = image.convert("LA").convert(mode) if mode in ("LA", "La") else image.convert(mode)
    expected = Image.new("RGB", (64, 48), (80, 80, 80))
    expected.paste((255, 255, 255), (0, 0, 20, 48))
    assert torch.equal(process(image_processor, image), process(image_processor, expected))


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(np.full((48, 64), -5, np.int32)),
        Image.fromarray(np.full((48, 64), 70_000, np.int32)),
        Image.fromarray(np.full((48, 64), 300.0, np.float32)),
        Image.fromarray(np.full((48, 64), np.nan, np.float32)),
        Image.fromarray(np.full((48, 64), 9, np.uint16)),
    ],
)
def test_pillow_image_with_invalid_range_is_refused(image_processor, image):
    with pytest.raises(ValueError, match=r"^An image of 64 x 48 pixels has .*values"):
        process(image_processor, image)


# other entry points


def test_processor_and_pipeline_accept_fractional_pixels(processor, make_model, pixels):
    expected = processor(pixels, "the star", boxes=[4, 4, 20, 30])
    ground = pipeline("visual-grounding", model=make_model(), processor=processor)
    (answer,) = ground(pixels, "the star")
    drawn = ground.draw(pixels, [answer])
    for kind in ("ToTensor", "float32", "float64"):
        image = FRACTIONS[kind](pixels)
        inputs = processor(image, "the star", boxes=[4, 4, 20, 30])
        assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
        assert torch.equal(inputs["labels"][0]["boxes"], expected["labels"][0]["boxes"])
        assert ground(image, "the star") == [answer]
        assert ground.draw(image, [answer]).tobytes() == drawn.tobytes()
    with pytest.raises(ValueError, match="values from -"):
        ground(pixels / 127.5 - 1, "the star")


def test_to_pil_image_gives_same_pixels_for_every_type(pixels):
    expected = Image.fromarray(pixels).tobytes()
    for make in (*FRACTIONS.values(), *FULL_RANGE.values()):
        assert to_pil_image(make(pixels)).tobytes() == expected
    gray = to_pil_image(pixels[..., 0])
    assert gray.mode == "RGB"
    assert np.array_equal(np.asarray(gray)[..., 2], pixels[..., 0])
