"""Pixels and boxes share one frame at every entry point, for any EXIF orientation and annotated size."""

import io
import itertools
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin, TiffImagePlugin
from transformers import pipeline

import data_scripts
from data_scripts import reading
from data_scripts.checking import check
from data_scripts.exporting import export_dataset
from data_scripts.reading import Frame, drop_orientation, image_of, is_as_stored, read_frame
from modeling_reftr import RefTRImageProcessor, RefTRProcessor, orientation_reftr
from modeling_reftr.drawing_reftr import COLORS
from modeling_reftr.image_processing_reftr import open_image
from modeling_reftr.orientation_reftr import turn_upright
from reftr_cli import preview
from reftr_cli.preview import draw_preview
from tests.helpers.layout_orientation import (
    CASES,
    TEXT,
    UPRIGHT_BOX,
    draw_stored,
    draw_upright,
    find_red,
    make_images,
    orientation_exif,
    save_jpeg,
)
from training_reftr.data import EvaluationData, GroundingCollator, TrainingData, move
from training_reftr.images import ImageReader
from training_reftr.settings import TrainingSettings


SIDE = 160  # the longer side after resizing, twice that of the images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("orientation")
    make_images(folder)
    return folder


@pytest.fixture(scope="module")
def rows(folder, tmp_path_factory):
    cache_dir = str(tmp_path_factory.mktemp("built"))
    return data_scripts.load("refcoco_unc", "train", data_dir=str(folder), cache_dir=cache_dir)


@pytest.fixture(scope="module")
def undecoded(rows):
    return rows.cast_column("image", datasets.Image(decode=False))


@pytest.fixture(scope="module")
def large_processor(tokenizer):
    return RefTRProcessor(RefTRImageProcessor(size={"shortest_edge": SIDE, "longest_edge": SIDE}), tokenizer)


def path_of(case, folder):
    return str(folder / "images" / "train2014" / case.file_name)


def box_matches_red(pixels, box_xyxy, size) -> bool:
    """Return whether a box in an image of (height, width) `size` bounds the red area of `pixels`."""
    height, width = pixels.shape[:2]
    if width * size[0] != height * size[1]:
        return False
    found = np.array(find_red(pixels)) * (size[1] / width)
    return bool(np.abs(found - np.array(box_xyxy)).max() < 0.6)


def label_matches_red(pixel_values, label) -> bool:
    """Return whether the first box and mask of a label bound the red area of normalized, padded pixels."""
    mean, std = (torch.tensor(values)[:, None, None] for values in modeling_mean_and_std())
    is_padding = (pixel_values == 0).all(0)
    pixels = ((pixel_values * std + mean) * 255).round().clamp(0, 255)
    height, width = (~is_padding).any(1).sum().item(), (~is_padding).any(0).sum().item()
    pixels = pixels[:, :height, :width].permute(1, 2, 0).numpy()
    cx, cy, w, h = label["boxes"][0].tolist()
    box = np.array([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]) * [width, height, width, height]
    is_correct = box_matches_red(pixels, box, (height, width))
    if "masks" in label:
        colored = label["masks"][0, :height, :width, None].numpy() * np.array([255, 0, 0])
        is_correct = is_correct and find_red(colored) == find_red(pixels)
    return is_correct


def modeling_mean_and_std():
    return RefTRImageProcessor.image_mean, RefTRImageProcessor.image_std


def image_matches_frame(image, case) -> bool:
    """Return whether a decoded image equals the annotated frame, up to JPEG artifacts."""
    pixels = np.asarray(image.convert("RGB")).astype(int)
    return pixels.shape == case.frame.shape and bool(np.abs(pixels - case.frame).max() < 12)


def row_matches_case(row, case) -> bool:
    """Return whether image, size and box of a decoded row match a case."""
    is_own = row["image_id"] == f"coco_{case.number}" and (row["height"], row["width"]) == case.size
    return is_own and image_matches_frame(row["image"], case) and row["objects"][0]["box"] == case.box


def at_the_processor(folder, large_processor, **_):
    for case in CASES:
        mask = np.zeros(case.size, bool)
        x0, y0, x1, y1 = case.box
        mask[y0:y1, x0:x1] = True
        sizes = None if case.annotated_size is None else [case.annotated_size]
        path = path_of(case, folder)
        with Image.open(path) as opened:
            batches = [
                large_processor(image, TEXT, boxes=case.box, masks=mask, original_sizes=sizes)
                for image in (path, opened)
            ]
        yield all(label_matches_red(batch["pixel_values"][0], batch["labels"][0]) for batch in batches)


def at_the_pipeline(rows, folder, large_processor, make_model, **_):
    ground = pipeline("visual-grounding", model=make_model(), processor=large_processor)
    for row, case in zip(rows, CASES, strict=True):
        image = path_of(case, folder) if case.annotated_size is None else row["image"]
        seen = {}
        ground.model.register_forward_pre_hook(lambda _, __, kwargs, seen=seen: seen.update(kwargs), with_kwargs=True)
        (answer,) = ground(image, TEXT)
        cx, cy = (case.box[0] + case.box[2]) / 2 / case.size[1], (case.box[1] + case.box[3]) / 2 / case.size[0]
        w, h = (case.box[2] - case.box[0]) / case.size[1], (case.box[3] - case.box[1]) / case.size[0]
        is_correct = label_matches_red(seen["pixel_values"][0], {"boxes": torch.tensor([[cx, cy, w, h]])})
        # the answer is in pixels of the same frame
        (asked,) = ground.processor.post_process_grounding(ground.model(**seen), [case.size])
        box = torch.tensor(list(answer["box"].values()))
        yield is_correct and torch.allclose(asked["boxes"][0], box, atol=1e-2)


def at_the_reader(undecoded, large_processor, **_):
    reader = ImageReader(large_processor.image_processor)
    for row in undecoded:
        yield box_matches_red(np.asarray(reader(row)), row["objects"][0]["box"], (row["height"], row["width"]))


def at_the_cache(undecoded, large_processor, tmp_path, **_):
    reader = ImageReader(large_processor.image_processor, str(tmp_path))
    for row in undecoded:
        written, read = np.asarray(reader(row)), np.asarray(reader(row))
        is_correct = box_matches_red(read, row["objects"][0]["box"], (row["height"], row["width"]))
        yield is_correct and (written == read).all()
    assert list(tmp_path.rglob("*.npy"))


def arguments(**settings):
    return TrainingSettings.from_flat(**{"num_workers": 0, "augmentation": "none", "image_size": SIDE, **settings})


def at_the_training_loader(rows, large_processor, **_):
    data = TrainingData(rows, large_processor, arguments(batch_size=4), 0, 1, with_masks=True)
    yield from check_batches(data.batches(0), large_processor)


def at_the_evaluation_loader(rows, large_processor, **_):
    data = EvaluationData({"test": rows}, large_processor, arguments(evaluation_batch_size=4), 0, 1)
    yield from check_batches(data.batches("test"), large_processor)


def check_batches(batches, processor):
    """Return whether the label of each image is correct, in the order of the cases."""
    results = {}
    for batch in batches:
        pixel_values = move(batch, "cpu", processor)["pixel_values"]
        for index, label, targets in zip(
            batch["image_index"].tolist(), batch["labels"], batch["targets"], strict=True
        ):
            results[targets[0]["image_id"]] = label_matches_red(pixel_values[index], label)
    return [results[f"coco_{case.number}"] for case in CASES]


def at_load(rows, folder, **_):
    streamed = data_scripts.load("refcoco_unc", "train", data_dir=str(folder), streaming=True)
    for row, other, case in zip(rows, streamed, CASES, strict=True):
        is_same = np.array_equal(np.asarray(row["image"]), np.asarray(other["image"]))
        yield row_matches_case(row, case) and row_matches_case(other, case) and is_same


def at_an_export(rows, tmp_path, **_):
    source = data_scripts.SOURCES["refcoco_unc"]
    loaded = []
    for embed in (True, False):
        output = export_dataset(source, {"train": rows}, tmp_path / f"export_{embed}", embed=embed)
        loaded.append(datasets.load_dataset(str(output), split="train", cache_dir=str(tmp_path / "cache")))
        loaded.append(datasets.load_dataset(str(output), split="train", streaming=True))
    for *copies, case in zip(*loaded, CASES, strict=True):
        yield all(row_matches_case(row, case) for row in copies)


def at_the_preview(rows, monkeypatch, **_):
    monkeypatch.setattr(preview, "phrase_of", lambda *_: "")  # labels have the color of the frame
    for index, case in enumerate(CASES):
        drawn = np.asarray(draw_preview(rows.select([index]), num=1, seed=0)).astype(int)
        color = [int(COLORS[0][start : start + 2], 16) for start in (1, 3, 5)]
        is_frame = (np.abs(drawn - color) < 12).all(axis=-1)
        ys, xs = is_frame[: 8 + 320 * case.size[0] // case.size[1]].nonzero()
        frame = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) - 8  # the gap around the grid
        yield bool(np.abs(frame * case.size[1] / 320 - case.box).max() < 1)


DOORS = (
    at_the_processor,
    at_the_pipeline,
    at_the_reader,
    at_the_cache,
    at_the_training_loader,
    at_the_evaluation_loader,
    at_load,
    at_an_export,
    at_the_preview,
)


@pytest.mark.row("O1")
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_pixels_and_boxes_agree_for_every_orientation(
    door, folder, rows, undecoded, large_processor, make_model, tmp_path, monkeypatch, record_property
):
    """Try 8 orientations with 4 kinds of annotation at every entry point."""
    results = list(
        door(
            folder=folder,
            rows=rows,
            undecoded=undecoded,
            large_processor=large_processor,
            make_model=make_model,
            tmp_path=tmp_path,
            monkeypatch=monkeypatch,
        )
    )
    record_property("counted", (sum(map(bool, results)), len(CASES)))
    assert [case for case, is_correct in zip(CASES, results, strict=True) if not is_correct] == []


def test_both_packages_keep_same_stored_orientations():
    sizes = [(30, 40), (40, 30), (30, 30), (40, 40), (60, 80), (1, 1)]
    for orientation, stored, annotated in itertools.product(range(1, 9), sizes, [None, *sizes]):
        mine = orientation_reftr.keeps_stored_orientation(orientation, stored, annotated)
        assert mine == reading.keeps_stored_frame(orientation, stored, annotated)
        is_turned = orientation >= 5 and stored[0] != stored[1]
        assert mine == (is_turned and annotated == stored), (orientation, stored, annotated)
    assert orientation_reftr.INVERSE_TRANSPOSES == reading.UNDONE_TURNS


def test_open_images_returns_opened_image_unchanged(tmp_path):
    save_jpeg(tmp_path / "6.jpg", 6)
    image_processor = RefTRImageProcessor()
    stored, upright = draw_stored(6).shape[:2], draw_upright().shape[:2]
    for size, expected in ((stored, stored), (upright, upright), (None, upright)):
        (image,) = image_processor.open_images(str(tmp_path / "6.jpg"), None if size is None else [size])
        for again in (None, [stored], [upright]):
            (same,) = image_processor.open_images(image, again)
            assert (same.height, same.width) == expected
            assert same is image


def test_turn_upright_does_not_change_its_input(tmp_path):
    save_jpeg(tmp_path / "6.jpg", 6)
    with Image.open(tmp_path / "6.jpg") as image:
        image.load()
        before = image.tobytes(), image.size, dict(image.info)
        for size in (None, image.size[::-1], image.size):
            turn_upright(image, size)
        assert (image.tobytes(), image.size, dict(image.info)) == before
        assert image.getexif()[0x0112] == 6


def test_turn_upright_is_thread_safe_on_shared_image(tmp_path):
    exif = orientation_exif(6)
    exif[0x010E] = "a description that takes a moment to read " * 10
    Image.new("RGB", (8, 4)).save(tmp_path / "6.jpg", exif=exif)
    with Image.open(tmp_path / "6.jpg") as opened:
        opened.load()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            for _ in range(200):
                images = [opened.copy()] * 8
                assert {image.size for image in pool.map(turn_upright, images)} == {(4, 8)}
    finally:
        sys.setswitchinterval(interval)


def xmp(orientation, is_element=False):
    if is_element:
        return f"<rdf:Description><tiff:Orientation>{orientation}</tiff:Orientation></rdf:Description>".encode()
    return f'<rdf:Description tiff:Orientation="{orientation}"/>'.encode()


def png_chunk(kind, content):
    checksum = zlib.crc32(kind + content).to_bytes(4, "big")
    return len(content).to_bytes(4, "big") + kind + content + checksum


def save_png_with_late_exif(image, path, orientation):
    """Save a PNG whose eXIf chunk follows the pixels."""
    file = io.BytesIO()
    image.save(file, "PNG")
    content, end = file.getvalue()[:-12], file.getvalue()[-12:]
    exif = orientation_exif(orientation).tobytes().removeprefix(b"Exif\0\0")
    path.write_bytes(content + png_chunk(b"eXIf", exif) + end)


def save_png_with_raw_profile(image, path, orientation):
    """Save EXIF in a PNG as ImageMagick does."""
    exif = orientation_exif(orientation).tobytes()
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n{len(exif):8d}\n{exif.hex()}\n", zip=True)
    image.save(path, pnginfo=info)


def save_png_with_xmp(image, path, orientation):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp(orientation).decode(), zip=True)
    image.save(path, pnginfo=info)


def save_tiff_with_xmp(image, path, orientation):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[700] = xmp(orientation)
    image.save(path, tiffinfo=tags)


def save_jpeg_with_both(image, path, orientation):
    image.save(path, quality=100, subsampling=0, exif=orientation_exif(orientation), xmp=xmp(orientation))


KINDS = {
    "png": lambda image, path, orientation: image.save(path, exif=orientation_exif(orientation)),
    "late.png": save_png_with_late_exif,
    "raw.png": save_png_with_raw_profile,
    "xmp.png": save_png_with_xmp,
    "webp": lambda image, path, orientation: image.save(path, lossless=True, exif=orientation_exif(orientation)),
    "xmp.webp": lambda image, path, orientation: image.save(path, lossless=True, xmp=xmp(orientation)),
    "tiff": lambda image, path, orientation: image.save(path, exif=orientation_exif(orientation)),
    "lzw.tiff": lambda image, path, orientation: image.save(
        path, compression="tiff_lzw", exif=orientation_exif(orientation)
    ),
    "xmp.tiff": save_tiff_with_xmp,
    "xmp.jpg": lambda image, path, orientation: image.save(path, quality=100, subsampling=0, xmp=xmp(orientation)),
    "element.jpg": lambda image, path, orientation: image.save(
        path, quality=100, subsampling=0, xmp=xmp(orientation, is_element=True)
    ),
    "both.jpg": save_jpeg_with_both,
    "progressive.jpg": lambda image, path, orientation: image.save(
        path, quality=100, subsampling=0, progressive=True, exif=orientation_exif(orientation)
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_file_of_every_kind_is_in_frame_of_its_boxes(kind, tmp_path):
    """Apply the orientation in every file that Pillow finds it in, in the image processor and in `datasets`."""
    image_processor = RefTRImageProcessor()
    for orientation in (3, 5, 6, 8):
        path = tmp_path / f"{orientation}.{kind}"
        KINDS[kind](Image.fromarray(draw_stored(orientation)), path, orientation)
        stored, upright = draw_stored(orientation), draw_upright()
        for size in (None, upright.shape[:2], stored.shape[:2], (1, 2)):
            is_stored = size == stored.shape[:2] and orientation >= 5
            expected = stored if is_stored else upright
            by_path = turn_upright(open_image(path), size)
            with Image.open(path) as opened:
                by_image = turn_upright(opened, size)
            (again,) = image_processor.open_images([by_path])
            for image in (by_path, by_image, again):
                assert np.abs(np.asarray(image).astype(int) - expected).max() < 12, (orientation, size)
                # the orientation is removed, so the image is not rotated again
                assert ImageOps.exif_transpose(image).size == image.size
            frame = read_frame(path, None if size is None else size[::-1])
            assert frame == Frame(*expected.shape[1::-1], is_stored)
            value = datasets.Image().encode_example(image_of(path, frame))
            assert (value["bytes"] is None) is not is_stored
            decoded = datasets.Image().decode_example(value)
            assert np.array_equal(np.asarray(decoded), np.asarray(by_path))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_drop_orientation_keeps_pixels_and_mode(mode):
    image = Image.fromarray(draw_stored(6))
    image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257) if mode == "I;16" else image
    image = image if image.mode == mode else image.convert(mode)
    file = io.BytesIO()
    image.save(file, "TIFF" if mode in ("CMYK", "I;16", "I", "F") else "PNG", exif=orientation_exif(6))
    content, _ = drop_orientation(file.getvalue())
    with Image.open(io.BytesIO(content)) as stripped:
        assert stripped.getexif().get(0x0112) is None
        assert stripped.mode == image.mode
        assert np.array_equal(np.asarray(stripped), np.asarray(image))


def test_drop_orientation_does_not_reencode_jpeg(tmp_path):
    save_jpeg(tmp_path / "6.jpg", 6)
    content = (tmp_path / "6.jpg").read_bytes()
    stripped, ending = drop_orientation(content)
    assert ending == "jpg"
    start = content.index(b"\xff\xdb")  # the compressed pixels start with the quantization tables
    assert stripped.endswith(content[start:])
    assert len(stripped) < len(content)


@pytest.mark.parametrize("cut", [3, 30, 200])
def test_damaged_jpeg_is_named(tmp_path, cut):
    save_jpeg(tmp_path / "6.jpg", 6)
    (tmp_path / "6.jpg").write_bytes((tmp_path / "6.jpg").read_bytes()[:cut])
    with pytest.raises(OSError, match=r"6\.jpg' is damaged"):
        image_of(tmp_path / "6.jpg", Frame(80, 64, is_stored=True))


def test_damaged_exif_is_named(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", exif=b"Exif\0\0no TIFF here")
    with pytest.raises(OSError, match=r"a\.png' cannot be read as an image: .*EXIF data"):
        RefTRImageProcessor()(str(tmp_path / "a.png"))
    with Image.open(tmp_path / "a.png") as image, pytest.raises(OSError, match="EXIF data of an image of 8 x 8"):
        RefTRImageProcessor()(image)
    with pytest.raises(OSError, match=r"a\.png' cannot be read as"):
        read_frame(tmp_path / "a.png")


# rows of other programs


def make_foreign_rows(undecoded, folder, by_content):
    """Return the rows with unmodified image files, as other programs write them to Parquet."""
    images = []
    for case in CASES:
        path = path_of(case, folder)
        content = None
        if by_content:
            with open(path, "rb") as file:
                content = file.read()
        images.append({"bytes": content, "path": case.file_name if by_content else path})
    rows = [{**row, "image": image} for row, image in zip(undecoded, images, strict=True)]
    return datasets.Dataset.from_list(rows, features=undecoded.features).cast_column("image", datasets.Image())


@pytest.mark.parametrize("by_content", [False, True])
def test_rows_with_oriented_files_agree_with_boxes(
    undecoded, folder, large_processor, tmp_path, monkeypatch, by_content
):
    rows = make_foreign_rows(undecoded, folder, by_content)
    parts = {"rows": rows, "undecoded": rows.cast_column("image", datasets.Image(decode=False))}
    for door in (at_the_reader, at_the_cache, at_the_training_loader, at_the_evaluation_loader, at_the_preview):
        (tmp_path / door.__name__).mkdir()
        results = list(
            door(**parts, large_processor=large_processor, tmp_path=tmp_path / door.__name__, monkeypatch=monkeypatch)
        )
        assert results == [True] * len(CASES), door.__name__


def test_collator_refuses_stored_boxes_on_turned_image(undecoded, folder, large_processor):
    rows = make_foreign_rows(undecoded, folder, by_content=False)
    (row_index,) = [index for index, case in enumerate(CASES) if case == (6, "stored")]
    with pytest.raises(ValueError, match=r"coco_602' has .* \(64, 80\) and its boxes are in \(80, 64\)"):
        GroundingCollator(large_processor)([rows[row_index]])


def test_image_reader_refuses_image_of_other_frame_than_row(large_processor):
    content = io.BytesIO()
    Image.new("RGB", (80, 64)).save(content, "PNG")
    row = {"image_id": "one", "image": {"bytes": content.getvalue(), "path": None}, "height": 80, "width": 64}
    with pytest.raises(ValueError, match=r"'one' has .* \(64, 80\) and its boxes are in \(80, 64\)"):
        ImageReader(large_processor.image_processor)(row)


def test_collator_scales_labels_to_size_of_image(rows, large_processor):
    row = rows[0]
    doubled = [value * 2 for value in UPRIGHT_BOX]
    objects = [{**row["objects"][0], "box": doubled, "boxes": [doubled], "segmentation": None}]
    row = {**row, "width": row["width"] * 2, "height": row["height"] * 2, "objects": objects}
    batch = GroundingCollator(large_processor)([row])
    assert label_matches_red(batch["pixel_values"][0], batch["labels"][0])


def test_check_accepts_rows_of_every_orientation(rows):
    report = check(data_scripts.SOURCES["refcoco_unc"], {"train": rows})
    assert report["errors"] == []


def test_coco_id_is_found_in_either_frame(undecoded):
    for row, case in zip(undecoded, CASES, strict=True):
        assert is_as_stored(row["image"]) == case.is_stored
        assert data_scripts.coco_id("of somebody", row["image"]["path"]) == case.number
