"""Images in formats that are not accepted are refused at every entry point before they are decoded."""

import base64
import io
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets
import pytest
from PIL import Image
from transformers.pipelines.pt_utils import KeyDataset

import data_scripts
import reftr_cli.data as data_command
from data_scripts import reading
from data_scripts.checking import validate_image
from modeling_reftr import VisualGroundingPipeline, decoding_reftr, open_image
from modeling_reftr.drawing_reftr import draw_answers
from reftr_cli import predict
from reftr_cli.preview import draw_preview
from tests.helpers.refused_formats import REFUSED, is_refusal, stand_in_for_ghostscript
from tests.helpers.tiny import ROOT, trials
from training_reftr.data import GroundingCollator, GroundingDataset, TrainingSamples
from training_reftr.images import ImageReader
from training_reftr.sampling import SampleIndex


Image.init()
FACTORIES = {name: Image.OPEN[name][0] for name in REFUSED}
BOX = [8.0, 8.0, 24.0, 24.0]
ACCEPTED = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")


@pytest.fixture
def ground(make_model, processor):
    return VisualGroundingPipeline(make_model(), processor=processor)


@pytest.fixture
def folder(tmp_path):
    """Write every refused content under the name of a JPEG, and one valid image."""
    for name, content in REFUSED.items():
        (tmp_path / f"{name}.jpg").write_bytes(content)
    Image.new("RGB", (64, 48)).save(tmp_path / "image.png")
    return tmp_path


def make_rows(image, column="image"):
    """Return rows of the schema with this image, a path or bytes, as a foreign dataset may have them."""
    row = {
        "image_id": "1",
        column: image,
        "width": 64,
        "height": 48,
        "objects": [{"object_id": "1", "box": BOX, "boxes": [BOX], "category": None, "segmentation": None}],
        "sentences": [
            {
                "sentence_id": "1",
                "text": "the star",
                "phrases": [{"start": 0, "end": 8, "objects": [0], "types": []}],
            }
        ],
        "positions": None,
    }
    return datasets.Dataset.from_list([row], features=data_scripts.FEATURES)


def load_jsonl(folder, **target):
    """Build a JSON Lines dataset of one line."""
    image = target.pop("image", "image.png")
    line = {"image": image, "expressions": [{"text": "the star", **(target or {"box": BOX})}]}
    (folder / "train.jsonl").write_text(json.dumps(line) + "\n")
    return data_scripts.load("jsonl", data_dir=str(folder), cache_dir=str(folder / "cache"))


def serve(content):
    """Open the URL of a local server that returns the content."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "image/jpeg")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            return open_image(f"http://127.0.0.1:{server.server_port}/1.jpg", allow_private=True)
        finally:
            server.shutdown()


def check_jsonl(folder, image):
    """Run `reftr data check` on a dataset of one line."""
    line = {"image": image, "expressions": [{"text": "the star", "box": BOX}]}
    (folder / "train.jsonl").write_text(json.dumps(line) + "\n")
    argv = ["--data_dir", str(folder), "--cache_dir", str(folder / "cache")]
    data_command.main(["check", "jsonl", *argv])


def raise_faults(row):
    """Raise the faults that `reftr data check` finds in a row."""
    for _, message in validate_image(row, decode=True):
        raise ValueError(message)


def make_undecoded_row(image):
    """Return a row with an undecoded image."""
    return make_rows(image).cast_column("image", datasets.Image(decode=False))[0]


def make_doors(ground, folder):
    """Return every entry point for images as a function of a path and its content, by name."""
    processor, image = ground.processor, Image.new("RGB", (64, 48))
    texts = ["the star"]

    def questions(path):
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        return datasets.Dataset.from_dict({"image": [str(path)], "text": texts}, features=features)

    return {
        "open_image of bytes": lambda path, content: open_image(content),
        "open_image of a file": lambda path, content: open_image(io.BytesIO(content)),
        "processor by path": lambda path, content: processor(path, "the star"),
        "processor by content": lambda path, content: processor(
            f"data:image/jpeg;base64,{base64.b64encode(content).decode()}", "the star"
        ),
        "processor by row": lambda path, content: processor({"bytes": content, "path": "1.jpg"}, "the star"),
        "image processor": lambda path, content: processor.image_processor([str(path)]),
        "URL": lambda path, content: serve(content),
        "pipeline": lambda path, content: ground(str(path), text="the star"),
        "pipeline, questions": lambda path, content: ground([{"image": path, "text": "the star"}]),
        "pipeline, dataset": lambda path, content: list(ground(questions(path))),
        "pipeline, formatted dataset": lambda path, content: list(ground(questions(path).with_format("numpy"))),
        "pipeline, stream": lambda path, content: list(ground(questions(path).to_iterable_dataset())),
        "processor, column": lambda path, content: processor(questions(path)["image"], ["the star"]),
        "processor, column of masks": lambda path, content: processor(
            image, ["the star"], boxes=[[BOX]], masks=questions(path)["image"]
        ),
        "pipeline, columns": lambda path, content: ground(
            {"image": questions(path)["image"], "text": questions(path)["text"]}
        ),
        "pipeline, column": lambda path, content: list(ground(questions(path)["image"], text="the star")),
        "pipeline, KeyDataset": lambda path, content: list(
            ground(KeyDataset(questions(path), "image"), text="the star")
        ),
        "pipeline, drawing": lambda path, content: ground.draw(path, []),
        "dataset": lambda path, content: load_jsonl(folder, image=path.name),
        "dataset, mask": lambda path, content: load_jsonl(folder, mask=path.name),
        "training": lambda path, content: GroundingDataset(
            make_rows(str(path)), TrainingSamples(ImageReader(processor.image_processor), "none", 0, False)
        )[SampleIndex(0, 0, (0,))],
        "training, image cache": lambda path, content: GroundingDataset(
            make_rows({"bytes": content, "path": "1.jpg"}),
            TrainingSamples(ImageReader(processor.image_processor, str(folder / "kept")), "none", 0, False),
        )[SampleIndex(0, 0, (0,))],
        "collator": lambda path, content: GroundingCollator(processor)([make_undecoded_row(str(path))]),
        "preview": lambda path, content: draw_preview(make_rows({"bytes": content, "path": None}), 1, 0),
        "check": lambda path, content: raise_faults(make_undecoded_row(str(path))),
        "header": lambda path, content: reading.read_frame(path),
        "orientation": lambda path, content: reading.drop_orientation(content),
        "predict": lambda path, content: predict.main(
            ["--model", str(folder / "model"), "--image", str(path), "--text", "the star"]
        ),
        "data check": lambda path, content: check_jsonl(folder, path.name),
        "PIL image": lambda path, content: processor(make_undecodable_image(path), "the star"),
        "pipeline, PIL image": lambda path, content: ground(make_undecodable_image(path), text="the star"),
        "collator, PIL image": lambda path, content: GroundingCollator(processor)(
            [{**make_rows("1.jpg").remove_columns("image")[0], "image": make_undecodable_image(path)}]
        ),
        "PIL mask": lambda path, content: processor(
            image, "the star", boxes=[BOX], masks=[make_undecodable_image(path)]
        ),
        "PIL image, drawing": lambda path, content: draw_answers(make_undecodable_image(path), [], []),
    }


def fail_to_open(name):
    """Return a replacement of a decoder that fails when it is called."""

    def factory(*_):
        raise AssertionError(f"the decoder of {name} was called")

    return factory


def make_undecodable_image(path) -> Image.Image:
    """Open only the header of an image, so that decoding it fails."""
    image = FACTORIES[path.stem](io.BytesIO(path.read_bytes()), "")

    def load():
        raise AssertionError(f"{path.name} was decoded")

    if image.format != "EPS":  # EPS is detected by the program that it starts
        image.load = load
    return image


def refusal_message(door, path, content) -> str:
    """Return the error message of an entry point for a file, or an empty text if it accepts the file."""
    try:
        door(path, content)
    except (ValueError, OSError) as error:
        return str(error)
    return ""


@pytest.mark.row("S11")
def test_refused_formats_are_never_decoded(ground, folder, monkeypatch, record_property):
    """Try every format at every entry point; without the scorecard only EPS and another one."""
    program_log = stand_in_for_ghostscript(folder, monkeypatch)
    with pytest.raises(OSError, match="cannot identify"):
        Image.open(folder / "EPS.jpg").load()
    assert program_log.exists()  # the stand-in works, so its absence below is meaningful
    program_log.unlink()
    ground.model.save_pretrained(folder / "model")
    ground.processor.save_pretrained(folder / "model")
    doors, failed = make_doors(ground, folder), []
    formats = [list(REFUSED)[index] for index in trials(len(REFUSED), short=2)]
    for name in formats:
        if name != "EPS":  # the decoder of EPS is detected by the program that it starts
            monkeypatch.setitem(Image.OPEN, name, (fail_to_open(name), Image.OPEN[name][1]))
        for door, call in doors.items():
            message = refusal_message(call, folder / f"{name}.jpg", REFUSED[name])
            if not is_refusal(message, name) or program_log.exists():
                failed.append((name, door, message))
                program_log.unlink(missing_ok=True)
    count = len(formats) * len(doors)
    record_property("counted", (count - len(failed), count))
    assert not failed


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_format_is_decoded_under_any_name(ground, tmp_path, name):
    path = tmp_path / "image.eps"
    Image.new("RGB", (64, 48), "red").save(path, name)
    assert reading.read_image_size(path) == (64, 48)
    reading.check_decodes(path)
    assert ground.processor(path, "the star")["pixel_values"].shape == (1, 3, 48, 64)
    assert len(ground(Image.open(path), text="the star")) == 1


def test_mpo_is_decoded_as_its_first_image(ground, tmp_path):
    images = [Image.new("RGB", (64, 48), color) for color in ("red", "green")]
    images[0].save(tmp_path / "two.jpg", "MPO", save_all=True, append_images=images[1:])
    image = Image.open(tmp_path / "two.jpg")
    assert image.format == "MPO"
    assert len(ground(image, text="the star")) == 1
    assert open_image(tmp_path / "two.jpg").convert("RGB").getpixel((5, 5))[0] > 200


def test_pipeline_accepts_datasets_and_columns(ground, folder):
    path = str(folder / "image.png")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": [path] * 2, "text": ["the star", "the circle"]}, features=features)
    expected = ground([path] * 2, text=["the star", "the circle"])
    formatted = [rows.with_format(name) for name in ("numpy", "torch", "arrow", "pandas")]
    for dataset in (rows, *formatted, rows.to_iterable_dataset()):
        assert list(ground(dataset)) == expected
    for column in (rows["image"], KeyDataset(rows, "image"), rows.to_iterable_dataset()["image"]):
        assert next(iter(ground(column, text="the star"))) == expected[0]
    assert isinstance(rows[0]["image"], Image.Image)  # the dataset itself is unchanged


@pytest.mark.parametrize("image", ["http://127.0.0.1:9/1.jpg", "data:image/png;base64,iVBORw0KGgo="])
def test_path_in_row_is_never_opened_as_url(processor, image):
    with pytest.raises(OSError, match="There is no image at"):
        processor({"bytes": None, "path": image}, "the star")
    with pytest.raises(OSError, match="There is no image at"):
        ImageReader(processor.image_processor)(make_undecoded_row(image))
    with pytest.raises(ValueError, match="must have bytes or a path"):
        processor({"bytes": None, "path": None}, "the star")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"", "no known format"),
        (b"Image type: 1\r\n", "no known format"),
        (b"BM", "it begins as BMP"),
    ],
)
def test_open_image_names_format_of_refused_content(content, found):
    with pytest.raises(OSError, match=found):
        open_image(content)


def test_predict_reads_accepted_image_names_of_folder(folder):
    for name in ("drawing.eps", "text.pdf", "scan.TIFF"):
        (folder / name).write_bytes(b"")
    questions = predict.read_questions([str(folder)], ["the star"])
    found = {question["image"].rpartition("/")[2] for _, question in questions}
    assert found == {"image.png", "scan.TIFF", *(f"{name}.jpg" for name in REFUSED)}


def test_both_packages_accept_same_image_formats():
    """Compare the copies: modeling_reftr is uploaded to the Hub without data_scripts, so they share no code."""
    assert decoding_reftr.IMAGE_FORMATS == reading.IMAGE_FORMATS


def test_images_are_opened_in_one_function_per_package():
    """Search the product, the benchmarks and the code in documents."""
    paths = [path for folder in ("modeling_reftr", "data_scripts", "training_reftr", "metrics", "demo", "benchmarks")
             for path in (ROOT / folder).rglob("*.py")]  # fmt: skip
    paths += [*ROOT.glob("*.py"), *ROOT.glob("*.md"), *(ROOT / "docs").iterdir(), *(ROOT / "demo").glob("*.md")]
    opened = []
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            if re.search(r"Image\.open\(|\bload_image\b|decode_image\(|read_image\(", line):
                opened.append((path.relative_to(ROOT).as_posix(), "formats=" in line))
    assert sorted(opened) == [("data_scripts/reading.py", True), ("modeling_reftr/decoding_reftr.py", True)]
