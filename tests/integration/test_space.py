"""The page of the Space on a local server: answers, limits and refused requests."""

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image
from transformers import pipeline

from modeling_reftr import RefTRForVisualGrounding, RefTRPredictor
from modeling_reftr.answers_reftr import answer_to_json
from modeling_reftr.rle_reftr import from_coco_rle
from tests.helpers.refused_formats import REFUSED, is_refusal, stand_in_for_ghostscript
from tests.helpers.space_app import DEMO, EXPRESSIONS, copy_with_masks, import_app
from tests.helpers.tiny import ROOT, trials


pytest.importorskip("gradio", reason="the page needs gradio: pip install gradio")
gradio_client = pytest.importorskip("gradio_client")  # a dependency of gradio
pytestmark = pytest.mark.filterwarnings("ignore:.*no_silent_downcasting", "ignore:The copy keyword is deprecated")


NOT_UPLOADED = "Only uploaded images are accepted, no addresses and no paths."


@pytest.fixture(scope="module")
def space():
    return import_app()


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    """Save a tiny model with masks, its processor and their code."""
    return copy_with_masks(trained[0], tmp_path_factory.mktemp("space") / "model")


@pytest.fixture(scope="module")
def page(space, folder, tmp_path_factory):
    """Serve the page on a local port as the command does; return the app with its address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        # connections of uvloop raise no audit events, which the watch below needs
        patch.setitem(sys.modules, "uvloop", None)
        app = space.build_app(str(folder))
        app.address = space.launch(app, wait=False).rstrip("/")
        yield app
        app.close()


@pytest.fixture(scope="module")
def client(page, tmp_path_factory):
    downloads = tmp_path_factory.mktemp("downloads")
    return gradio_client.Client(page.address, verbose=False, analytics_enabled=False, download_files=str(downloads))


@pytest.fixture
def image(tmp_path, shapes):
    shapes["test"][0]["image"].save(tmp_path / "image.png")
    return tmp_path / "image.png"


def ask(client, path, text="\n".join(EXPRESSIONS)):
    return client.predict(gradio_client.handle_file(str(path)), text, api_name="/ask")


def ask_and_get_error(client, path, text="\n".join(EXPRESSIONS)) -> str:
    with pytest.raises(gradio_client.exceptions.AppError) as error:
        ask(client, path, text)
    return str(error.value)


def test_space_answers_match_pipeline(client, folder, shapes, tmp_path):
    image = tmp_path / "wide.png"
    shapes["test"][0]["image"].resize((64, 40)).save(image)
    shown, answers = ask(client, image)
    ground = pipeline("visual-grounding", model=str(folder))
    expected = [answer_to_json(answer) for answer in ground(image, text=EXPRESSIONS)]
    assert [answer["phrase"] for answer in answers] == EXPRESSIONS
    for answer, reference in zip(answers, expected, strict=True):
        assert answer["box"] == pytest.approx(reference["box"], abs=0.02)
        masks = [from_coco_rle(value["segmentation"]) for value in (answer, reference)]
        assert masks[0].shape == (40, 64)
        assert (masks[0] != masks[1]).mean() < 0.01
    assert json.loads(json.dumps(answers)) == answers
    with Image.open(shown) as drawing:
        assert drawing.size[0] == 800
        assert drawing.size[1] >= 500


def test_space_draws_answers_like_pipeline(client, space, folder, image):
    """Compare with the pipeline's drawing, up to the compression."""
    shown, _ = ask(client, image)
    ground = pipeline("visual-grounding", model=str(folder))
    expected = ground.draw(image, ground(image, text=EXPRESSIONS), width=space.DISPLAY_SIDE)
    with Image.open(shown) as drawing:
        difference = np.abs(np.asarray(drawing.convert("RGB")).astype(int) - np.asarray(expected))
    assert difference.mean() < 5
    assert (difference.max(axis=-1) > 64).mean() < 0.01


@pytest.mark.parametrize(("size", "width"), [((64, 40), 800), ((40, 80), 400), ((10, 80), 320)])
def test_drawing_fits_into_page(space, folder, tmp_path, size, width):
    Image.new("RGB", size, "gray").save(tmp_path / "image.png")
    drawing, _ = space.Answerer(str(folder)).answer(str(tmp_path / "image.png"), EXPRESSIONS)
    assert drawing.width == width
    assert drawing.height < 1100


def test_model_without_masks_answers_with_boxes(space, trained, image):
    drawing, answers = space.Answerer(str(trained[0])).answer(str(image), EXPRESSIONS)
    assert [set(answer) for answer in answers] == [{"label", "phrase", "score", "box"}] * 2
    assert drawing.width == space.DISPLAY_SIDE


def test_image_is_encoded_once_and_cache_is_limited(client, page, space, image, tmp_path, monkeypatch):
    encodings, answerer = [], page.answerer
    monkeypatch.setattr(answerer, "predictors", type(answerer.predictors)())
    hook = answerer.model.model.backbone.register_forward_hook(lambda *_: encodings.append(1))
    first = ask(client, image, "the star")[1]
    shutil.copy(image, tmp_path / "another name.png")
    assert ask(client, tmp_path / "another name.png", "the star")[1] == first
    ask(client, image, "the circle")
    assert len(encodings) == 1
    shades = [tmp_path / f"{shade}.png" for shade in range(space.MAX_IMAGES)]
    for shade, path in enumerate(shades):
        Image.new("RGB", (40, 30), (shade, 0, 0)).save(path)
    for path in (*shades[:-1], image, shades[-1], image):  # the first shade is evicted, not the recently used image
        ask(client, path, "the star")
    assert len(answerer.predictors) == space.MAX_IMAGES
    assert len(encodings) == space.MAX_IMAGES + 1
    ask(client, shades[0], "the star")
    assert len(encodings) == space.MAX_IMAGES + 2
    hook.remove()


def test_space_applies_orientation_and_accepts_image_modes(client, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), "red").save(tmp_path / "sideways.jpg", exif=exif)
    answer = ask(client, tmp_path / "sideways.jpg")[1][0]
    assert answer["segmentation"]["size"] == [40, 20]
    for mode in ("L", "P", "RGBA", "1"):
        Image.new(mode, (40, 20)).save(tmp_path / "mode.png")
        assert len(ask(client, tmp_path / "mode.png")[1]) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "There is no expression: enter the expressions to locate, one per line."),
        (" \n\t\n", "There is no expression: enter the expressions to locate, one per line."),
        ("the star\n" * 17, "There are 17 expressions, more than 16: enter fewer of them at once."),
    ],
)
def test_empty_or_excessive_text_is_refused_with_message(client, image, text, message):
    assert ask_and_get_error(client, image, text) == message


def test_question_without_image_is_refused_with_message(client):
    with pytest.raises(gradio_client.exceptions.AppError, match="There is no image: upload one"):
        client.predict(None, "the star", api_name="/ask")


def test_unreadable_upload_is_refused_with_message(client, tmp_path):
    complete = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(complete, "JPEG")
    for name, content in {"text.png": b"not an image", "cut.jpg": complete.getvalue()[:700], "empty.png": b""}.items():
        (tmp_path / name).write_bytes(content)
        message = ask_and_get_error(client, tmp_path / name)
        assert re.match(f"The file '{name}' cannot be read as an image: ", message), message
        assert "/" not in message  # the message does not reveal a folder of the server
        assert "Traceback" not in message


@pytest.mark.row("S11")
def test_upload_of_refused_format_starts_no_program(client, tmp_path_factory, monkeypatch, record_property):
    folder = tmp_path_factory.mktemp("formats")
    program_log, passed = stand_in_for_ghostscript(folder, monkeypatch), 0
    names = [list(REFUSED)[index] for index in trials(len(REFUSED), short=2)]
    for name in names:
        (folder / "photo.jpg").write_bytes(REFUSED[name])
        message = ask_and_get_error(client, folder / "photo.jpg")
        passed += is_refusal(message, name) and message.startswith("The file 'photo.jpg' cannot be read")
    record_property("counted", (passed, len(names)))
    assert passed == len(names)
    assert not program_log.exists()


def test_error_message_escapes_markup(page):
    """Send a raw request, because the client and the upload of gradio change such names."""
    file = {"path": f"{os.environ['GRADIO_TEMP_DIR']}/<b>.png", "meta": {"_type": "gradio.FileData"}}
    text = post_question(page, [file, "the star"])
    assert "There is no image '&lt;b&gt;.png' here" in text
    assert "<b>" not in text


# limits


@pytest.mark.row("S9")
def test_upload_over_5_mb_is_refused_with_message(client, page, space, tmp_path):
    """Refuse the upload in gradio, and in the page if a file came another way."""
    noise = Image.effect_noise((2600, 2600), 100)
    noise.save(tmp_path / "large.png")
    size = (tmp_path / "large.png").stat().st_size
    assert size > space.MAX_FILE_BYTES == 5 * 1024**2
    with open(tmp_path / "large.png", "rb") as file:
        answer = httpx.post(f"{page.address}/gradio_api/upload", files={"files": file})
    assert (answer.status_code, answer.text) == (413, "File size exceeded maximum allowed size of 5242880 bytes.")
    with pytest.raises(ValueError, match=r"^The file 'large.png' has more than 5 MB: make it smaller first\.$"):
        page.answerer.encode(str(tmp_path / "large.png"))
    # the largest accepted file
    content = io.BytesIO()
    noise.crop((0, 0, 600, 600)).save(content, "PNG")
    (tmp_path / "just.png").write_bytes(content.getvalue().ljust(space.MAX_FILE_BYTES, b"\0"))
    assert len(ask(client, tmp_path / "just.png")[1]) == 2


@pytest.mark.parametrize("size", [(7072, 7072), (30_000, 30_000)])
@pytest.mark.row("S9")
def test_upload_with_too_many_pixels_is_refused_with_message(client, tmp_path, size):
    Image.new("1", size).save(tmp_path / "bomb.png")
    start = time.monotonic()
    message = ask_and_get_error(client, tmp_path / "bomb.png")
    assert time.monotonic() - start < 2
    assert "50,000,000" in message
    assert message.endswith("resize it to a smaller size first.")


@pytest.mark.row("S9")
def test_expressions_are_cut_at_512_characters(client, space, image):
    long = "the star " * 100
    answers = ask(client, image, f"the circle\n{long}")[1]
    assert [answer["phrase"] for answer in answers] == ["the circle", long[:512]]
    assert "512 characters" in space.ABOUT


def test_answers_in_json_begin_with_label_and_box(client, image):
    """Show the box before the mask, whose RLE fills the page."""
    for answer in ask(client, image)[1]:
        assert list(answer) == ["label", "box", "score", "segmentation", "phrase"]


def warnings_of(events: str) -> list[str]:
    """Return the messages of the page in an event stream of a queue."""
    messages = [json.loads(line.removeprefix("data: ")) for line in events.splitlines() if line.startswith("data: ")]
    return [message["log"] for message in messages if message["msg"] == "log"]


def run_as_page(page, name, data) -> tuple[list[str], list]:
    """Run a function of the page through the queue as a browser does; return its messages and its outputs."""
    (number,) = [fn._id for fn in page.fns.values() if fn.name == name]
    join = {"data": data, "fn_index": number, "session_hash": "page"}
    httpx.post(f"{page.address}/gradio_api/queue/join", json=join).raise_for_status()
    events = httpx.get(f"{page.address}/gradio_api/queue/data?session_hash=page", timeout=60).text
    (output,) = re.findall(r'^data: (.*"process_completed".*)$', events, re.MULTILINE)
    return warnings_of(events), json.loads(output)["output"]["data"]


def ask_as_page(page, path, text) -> list[str]:
    """Ask as a browser does, and return the messages of the page."""
    file = httpx.post(f"{page.address}/gradio_api/upload", files={"files": path.read_bytes()}).json()[0]
    return run_as_page(page, "ask", [{"path": file, "meta": {"_type": "gradio.FileData"}}, text])[0]


def test_expression_over_token_limit_is_reported_with_part_that_is_read(page, image):
    processor = page.answerer.processor
    limit = processor.max_expression_length
    long = "The <red> circle " * limit
    (warning,) = ask_as_page(page, image, f"the circle\n{long[:500]}")
    assert warning.startswith(f"Expression 2 is longer than the {limit} tokens that the model reads, and was")
    assert "&lt;red&gt;" in warning
    assert "<red>" not in warning
    [(number, tokens, part)] = page.answerer.find_truncated(["the circle", long])
    assert (number, tokens) == (2, limit)
    assert long.lower().startswith(part)
    assert len(processor.tokenizer(part)["input_ids"]) == limit
    assert ask_as_page(page, image, "the circle\nthe star") == []
    assert page.answerer.find_truncated([part]) == []


def test_drawing_of_answers_is_downloaded_and_deleted_with_cache(page, client, folder, image):
    ask_as_page(page, image, "\n".join(EXPRESSIONS))
    _, (button,) = run_as_page(page, "offer", [None])
    url, path = button["value"]["url"], Path(button["value"]["path"])
    response = httpx.get(url if url.startswith("http") else f"{page.address}{url}")
    drawing = Image.open(io.BytesIO(response.content))
    predictor = RefTRPredictor.from_pretrained(folder)
    predictor.set_image(str(image))
    expected = predictor.draw(predictor.predict(EXPRESSIONS), width=drawing.width)
    assert (drawing.format, drawing.size) == ("PNG", expected.size)
    difference = np.abs(np.asarray(drawing.convert("RGB")).astype(int) - np.asarray(expected.convert("RGB")))
    assert (difference > 40).mean() < 0.02  # the page's model has fused layers
    assert path.name == "answers.png"
    assert len(ask(client, image, "the circle")) == 2  # a client of the API receives no drawing
    drawings = {str(path) for path in Path(os.environ["GRADIO_TEMP_DIR"]).rglob("answers.png")}
    assert len(drawings) >= 2
    assert drawings <= set().union(*page.temp_file_sets)  # gradio deletes these after CACHE_SECONDS


@pytest.mark.row("S9")
def test_queue_accepts_20_waiting_questions(page, client, image):
    """Queue 20 questions while one is answered, refuse the next, and offer no route around the queue."""
    free, begun = threading.Event(), threading.Event()
    answer = page.answerer.answer

    def slow(*arguments):
        begun.set()
        free.wait(60)
        return answer(*arguments)

    file = httpx.post(f"{page.address}/gradio_api/upload", files={"files": image.read_bytes()}).json()[0]
    data = [{"path": file, "meta": {"_type": "gradio.FileData"}}, "the star"]
    call = f"{page.address}/gradio_api/call/ask"
    page.answerer.answer = slow
    try:
        first = httpx.post(call, json={"data": data})
        assert begun.wait(30)
        queued = [httpx.post(call, json={"data": data}) for _ in range(25)]
    finally:
        free.set()
        page.answerer.answer = answer
    assert first.status_code == 200
    assert [response.status_code for response in queued] == [200] * 20 + [503] * 5
    assert "queue is full" in queued[-1].json()["detail"].lower()
    direct = httpx.post(f"{page.address}/gradio_api/run/ask", json={"data": data})
    assert direct.status_code == 404
    for response in (first, *queued[:20]):  # all queued questions are answered
        event = httpx.get(f"{call}/{response.json()['event_id']}", timeout=60).text
        assert "event: complete" in event


# files and URLs in requests


class AuditWatch:
    """Record addresses that any thread of this process connects to or resolves, and files that it opens."""

    def __init__(self):
        self.is_on = False
        sys.addaudithook(self.record)  # an audit hook cannot be removed

    def record(self, event, arguments):
        if self.is_on and event == "open":
            self.opened.append(str(arguments[0]))
        elif self.is_on and event in ("socket.connect", "socket.getaddrinfo"):
            host, port = arguments[1][:2] if event == "socket.connect" else arguments[:2]
            self.addresses.add(f"{host}:{port}")

    def __enter__(self):
        self.opened, self.addresses, self.is_on = [], set(), True
        return self

    def __exit__(self, *_):
        self.is_on = False


@pytest.fixture(scope="module")
def watch():
    return AuditWatch()


@pytest.fixture
def listener():
    """Listen on a local port, so that connections to it are noticed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.3)
        yield server


def was_connected(listener) -> bool:
    try:
        listener.accept()
    except TimeoutError:
        return False
    return True


def post_question(page, data) -> str:
    """Post `data` to the HTTP API and return the event stream."""
    call = f"{page.address}/gradio_api/call/ask"
    answer = httpx.post(call, json={"data": data})
    assert answer.status_code == 200, answer.text
    return httpx.get(f"{call}/{answer.json()['event_id']}", timeout=60).text


@pytest.mark.row("S6")
def test_http_api_answers_upload(page, image, watch):
    """Accept a valid request of the form refused below, and check that the watch records it."""
    with watch:
        file = httpx.post(f"{page.address}/gradio_api/upload", files={"files": image.read_bytes()}).json()[0]
        text = post_question(page, [{"path": file, "meta": {"_type": "gradio.FileData"}}, "the star"])
    assert "event: complete" in text
    assert '"phrase": "the star"' in text
    assert file in watch.opened
    assert watch.addresses == {page.address.removeprefix("http://")}


@pytest.mark.parametrize("place", ["picture", "text", "within"])
@pytest.mark.parametrize(
    "path",
    [
        "http://127.0.0.1:{port}/x.png",
        "http://localhost:{port}/x.png",
        "https://pictures.example.com/x.png",
        "https://huggingface.co/x.png",
        "http://127.0.0.1:{port}/{up}{upload}",
        "HTTP://127.0.0.1:{port}/x.png",
        "ftp://127.0.0.1:{port}/x.png",
        "file:///etc/passwd",
        "//127.0.0.1:{port}/x.png",
        "/etc/passwd",
        "{demo}/shapes.jpg",
        "demo/shapes.jpg",
        "{uploads}/../secret.png",
    ],
)
@pytest.mark.row("S6")
def test_http_api_refuses_urls_and_paths_unopened(page, image, listener, watch, place, path):
    upload = httpx.post(f"{page.address}/gradio_api/upload", files={"files": image.read_bytes()}).json()[0]
    uploads = os.environ["GRADIO_TEMP_DIR"]
    shutil.copy(image, f"{uploads}/../secret.png")  # next to the uploads, which may be read
    names = {"demo": DEMO, "uploads": uploads, "upload": upload[1:], "up": "../" * 20}
    path = path.format(port=listener.getsockname()[1], **names)
    address = path if "://" in path else f"http://127.0.0.1:{listener.getsockname()[1]}/x.png"
    file = {"path": path, "url": address, "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}}
    data = {"picture": [file, "the star"], "text": [None, file], "within": [{"files": [file]}, "the star"]}
    with watch:
        text = post_question(page, data[place])
    assert "event: error" in text
    assert NOT_UPLOADED in text
    assert watch.addresses == {page.address.removeprefix("http://")}
    assert not [name for name in watch.opened if name.endswith(("passwd", "shapes.jpg", "secret.png", "x.png"))]
    assert not was_connected(listener)


@pytest.mark.row("S6")
def test_http_api_refuses_data_url_and_missing_path(page):
    file = {"path": "x.png", "url": "data:image/png;base64,AAAA", "meta": {"_type": "gradio.FileData"}}
    assert NOT_UPLOADED in post_question(page, [file, "the star"])
    text = post_question(page, [{**file, "path": None}, "the star"])
    assert "event: error" in text


@pytest.mark.parametrize("scheme", ["http://", "http%3A%2F%2F", "https://"])
@pytest.mark.parametrize("route", ["file=", "file/", "proxy="])
@pytest.mark.row("S6")
def test_server_fetches_no_urls_for_callers(page, listener, watch, route, scheme):
    for host in (f"127.0.0.1:{listener.getsockname()[1]}", "pictures.example.com", "huggingface.co"):
        with watch:
            answer = httpx.get(f"{page.address}/gradio_api/{route}{scheme}{host}/x.png", timeout=30)
        assert answer.status_code == 403
        assert answer.text == "Only this page's own files are served, no addresses."
        assert watch.addresses == {page.address.removeprefix("http://")}
    assert not was_connected(listener)


@pytest.mark.parametrize("path", ["/etc/passwd", f"{DEMO}/app.py", "demo/app.py", "app.py", f"{ROOT}/setup.cfg"])
@pytest.mark.row("S6")
def test_server_serves_only_files_of_page(page, path):
    for route in ("file=", "file/"):
        answer = httpx.get(f"{page.address}/gradio_api/{route}{path}")
        assert answer.status_code in (403, 404)


# as a Space


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_copied_space_folder_runs_without_package(folder, image, tmp_path):
    """Run a copy of the folder without the package; REFTR_MODEL names a model folder that contains its code."""
    shutil.copytree(DEMO, tmp_path / "space", ignore=shutil.ignore_patterns("__pycache__"))
    port = free_port()
    code = (
        "import runpy, sys; sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in str(finder)];"
        f"sys.path.remove({str(ROOT)!r}) if {str(ROOT)!r} in sys.path else None;"
        "sys.argv = ['app.py']; runpy.run_path('app.py', run_name='__main__')"
    )
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "GRADIO_TEMP_DIR": str(tmp_path / "uploads"),
        "GRADIO_SERVER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "REFTR_MODEL": str(folder),
    }
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(
        command, cwd=tmp_path / "space", env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.3)
        assert process.poll() is None, process.stdout.read()
        client = gradio_client.Client(
            f"http://127.0.0.1:{port}", verbose=False, analytics_enabled=False, download_files=str(tmp_path / "got")
        )
        answers = ask(client, image)[1]
        assert [answer["phrase"] for answer in answers] == EXPRESSIONS
        assert list((tmp_path / "modules").rglob("modeling_reftr.py"))  # the code in the model folder was used
    finally:
        process.terminate()
        process.wait(30)


def test_space_without_model_names_reftr_model_variable(run, tmp_path):
    result = run("demo/app.py", check=False, REFTR_MODEL="")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: There is no model: give --model, or set the variable REFTR_MODEL")
    with pytest.raises(OSError, match="nothing"):
        import_app().main(["--model", str(tmp_path / "nothing")])


def test_client_snippet_of_readme_runs(page, image, tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (DEMO / "README.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    Image.open(image).save("photo.jpg")
    exec(code.replace("you/your-space", page.address), {})
    assert "[{'label': 'the red cup', 'box': [" in capsys.readouterr().out


def test_space_metadata_and_requirements_are_valid():
    """Check the front matter, the example image and the requirements of the model code."""
    _, front, text = (DEMO / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(front)
    assert (DEMO / card["app_file"]).is_file()
    assert card["sdk"] == "gradio"
    assert len(card["short_description"]) <= 60
    assert (DEMO / "shapes.jpg").stat().st_size < 50_000
    assert "REFTR_MODEL" in text
    setup = (ROOT / "setup.cfg").read_text().splitlines()
    needed = (DEMO / "requirements.txt").read_text().splitlines()
    assert not [line for line in needed if f"    {line}" not in setup]
    assert not [line for line in needed if line.startswith("gradio")]  # the Space installs the version in sdk_version


def test_page_shows_scores_of_a_model_with_presence(space, folder, image, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    model = RefTRForVisualGrounding.from_pretrained(folder, predict_presence=True, presence_threshold=0.9999)
    model.save_pretrained(tmp_path / "model")
    assert "gives no confidence" not in space.describe_app(predicts_presence=True)
    answerer = space.Answerer(str(tmp_path / "model"))
    drawing, answers = answerer.answer(str(image), EXPRESSIONS)
    assert [(answer["box"], answer["segmentation"]) for answer in answers] == [(None, None)] * 2
    assert [answer["score"] for answer in answers] == [0.5, 0.5]
    labels = [answer["label"] for answer in space.with_scores(answers)]
    assert labels == ["the green circle: not found (0.50)", "the star: not found (0.50)"]
    assert space.with_scores([{**answers[0], "box": [0, 0, 9, 9]}])[0]["label"] == "the green circle (0.50)"
    plain = space.Answerer(str(folder)).answer(str(image), EXPRESSIONS)
    assert drawing.tobytes() != plain[0].tobytes()
    assert space.with_scores(plain[1]) == plain[1]
