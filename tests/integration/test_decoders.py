"""Images in formats that are not accepted, wherever an image comes in: a sentence, and nothing is decoded."""

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
from data_scripts.checking import find_image_faults
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
    """Each content under the name of a JPEG, and a picture."""
    for name, content in REFUSED.items():
        (tmp_path / f"{name}.jpg").write_bytes(content)
    Image.new("RGB", (64, 48)).save(tmp_path / "picture.png")
    return tmp_path


def make_rows(image, column="image"):
    """Rows of the schema whose image is the path, or the bytes, that a dataset of somebody's may hold."""
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
    """The first rows of a dataset of one line."""
    image = target.pop("image", "picture.png")
    line = {"image": image, "expressions": [{"text": "the star", **(target or {"box": BOX})}]}
    (folder / "train.jsonl").write_text(json.dumps(line) + "\n")
    return data_scripts.load("jsonl", data_dir=str(folder), cache_dir=str(folder / "cache"))


def serve(content):
    """Open the URL at which a server of this machine gives the content."""

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
    """Run the command that checks a dataset of one line."""
    line = {"image": image, "expressions": [{"text": "the star", "box": BOX}]}
    (folder / "train.jsonl").write_text(json.dumps(line) + "\n")
    words = ["--data_dir", str(folder), "--cache_dir", str(folder / "cache")]
    data_command.main(["check", "jsonl", *words])


def raise_faults(row):
    """What `reftr data check` says of a row, as an error."""
    for _, message in find_image_faults(row, decode=True):
        raise ValueError(message)


def undecoded(image):
    """Return the one row of a dataset, its image not decoded."""
    return make_rows(image).cast_column("image", datasets.Image(decode=False))[0]


def make_doors(ground, folder):
    """Name of a door -> what a file (its path and its content) is given to there."""
    processor, picture = ground.processor, Image.new("RGB", (64, 48))
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
            picture, ["the star"], boxes=[[BOX]], masks=questions(path)["image"]
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
        "collator": lambda path, content: GroundingCollator(processor)([undecoded(str(path))]),
        "preview": lambda path, content: draw_preview(make_rows({"bytes": content, "path": None}), 1, 0),
        "check": lambda path, content: raise_faults(undecoded(str(path))),
        "header": lambda path, content: reading.read_frame(path),
        "orientation": lambda path, content: reading.drop_orientation(content),
        "predict": lambda path, content: predict.main(
            ["--model", str(folder / "model"), "--image", str(path), "--text", "the star"]
        ),
        "data check": lambda path, content: check_jsonl(folder, path.name),
        "PIL image": lambda path, content: processor(unopened(path), "the star"),
        "pipeline, PIL image": lambda path, content: ground(unopened(path), text="the star"),
        "collator, PIL image": lambda path, content: GroundingCollator(processor)(
            [{**make_rows("1.jpg").remove_columns("image")[0], "image": unopened(path)}]
        ),
        "PIL mask": lambda path, content: processor(picture, "the star", boxes=[BOX], masks=[unopened(path)]),
        "PIL image, drawing": lambda path, content: draw_answers(unopened(path), [], []),
    }


def fail_to_open(name):
    """In place of a format's decoder: one that must not be asked."""

    def factory(*_):
        raise AssertionError(f"the decoder of {name} was asked")

    return factory


def unopened(path) -> Image.Image:
    """A PIL image of which only the header was read, which fails when it is decoded."""
    image = FACTORIES[path.stem](io.BytesIO(path.read_bytes()), "")

    def load():
        raise AssertionError(f"{path.name} was decoded")

    if image.format != "EPS":  # which shows by the program that it starts
        image.load = load
    return image


def sentence_of(door, path, content) -> str:
    """What a door says of a file that it refuses; empty if it takes it."""
    try:
        door(path, content)
    except (ValueError, OSError) as error:
        return str(error)
    return ""


@pytest.mark.row("S11")
def test_refused_formats_are_never_decoded(ground, folder, monkeypatch, record_property):
    """Format by format through all doors; the everyday suite takes EPS and a few of the others."""
    mark = stand_in_for_ghostscript(folder, monkeypatch)
    with pytest.raises(OSError, match="cannot identify"):
        Image.open(folder / "EPS.jpg").load()
    assert mark.exists()  # so that its absence says something
    mark.unlink()
    ground.model.save_pretrained(folder / "model")
    ground.processor.save_pretrained(folder / "model")
    doors, failed = make_doors(ground, folder), []
    formats = [list(REFUSED)[index] for index in trials(len(REFUSED), short=2)]
    for name in formats:
        if name != "EPS":  # whose own shows by the program that it starts
            monkeypatch.setitem(Image.OPEN, name, (fail_to_open(name), Image.OPEN[name][1]))
        for door, take in doors.items():
            sentence = sentence_of(take, folder / f"{name}.jpg", REFUSED[name])
            if not is_refusal(sentence, name) or mark.exists():
                failed.append((name, door, sentence))
                mark.unlink(missing_ok=True)
    number = len(formats) * len(doors)
    record_property("counted", (number - len(failed), number))
    assert not failed


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_format_is_decoded_under_any_name(ground, tmp_path, name):
    path = tmp_path / "picture.eps"
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
    path = str(folder / "picture.png")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": [path] * 2, "text": ["the star", "the circle"]}, features=features)
    expected = ground([path] * 2, text=["the star", "the circle"])
    formatted = [rows.with_format(name) for name in ("numpy", "torch", "arrow", "pandas")]
    for dataset in (rows, *formatted, rows.to_iterable_dataset()):
        assert list(ground(dataset)) == expected
    for column in (rows["image"], KeyDataset(rows, "image"), rows.to_iterable_dataset()["image"]):
        assert next(iter(ground(column, text="the star"))) == expected[0]
    assert isinstance(rows[0]["image"], Image.Image)  # the dataset itself is as it was


@pytest.mark.parametrize("image", ["http://127.0.0.1:9/1.jpg", "data:image/png;base64,iVBORw0KGgo="])
def test_path_in_row_is_never_opened_as_url(processor, image):
    with pytest.raises(OSError, match="There is no image at"):
        processor({"bytes": None, "path": image}, "the star")
    with pytest.raises(OSError, match="There is no image at"):
        ImageReader(processor.image_processor)(undecoded(image))
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
    questions = predict.read_questions(folder, ["the star"])
    found = {question["image"].rpartition("/")[2] for _, question in questions}
    assert found == {"picture.png", "scan.TIFF", *(f"{name}.jpg" for name in REFUSED)}


def test_both_packages_accept_same_image_formats():
    """data_scripts does without modeling_reftr, which travels to the Hub without data_scripts."""
    assert decoding_reftr.IMAGE_FORMATS == reading.IMAGE_FORMATS


def test_images_are_opened_in_one_function_per_package():
    """In the product, in benchmarks and in what documents tell people to write."""
    paths = [path for folder in ("modeling_reftr", "data_scripts", "training_reftr", "metrics", "demo", "benchmarks")
             for path in (ROOT / folder).rglob("*.py")]  # fmt: skip
    paths += [*ROOT.glob("*.py"), *ROOT.glob("*.md"), *(ROOT / "docs").iterdir(), *(ROOT / "demo").glob("*.md")]
    opened = []
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            if re.search(r"Image\.open\(|\bload_image\b|decode_image\(|read_image\(", line):
                opened.append((path.relative_to(ROOT).as_posix(), "formats=" in line))
    assert sorted(opened) == [("data_scripts/reading.py", True), ("modeling_reftr/decoding_reftr.py", True)]
