"""
A web page that locates expressions in images, as a Space of the Hub or on this machine:

    python demo/app.py --model runs/demo

Without `--model`, the variable REFTR_MODEL names the model, as in a Space's settings. If `modeling_reftr` is not
installed, as on a Space, the code in the model's folder is run.
"""

import argparse
import hashlib
import html
import importlib
import importlib.util
import os
import sys
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_pil_to_cache
from gradio_client.utils import is_file_obj_with_meta, traverse
from PIL import Image
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from transformers.dynamic_module_utils import get_class_from_dynamic_module


MAX_FILE_BYTES = 5 * 1024**2
MAX_EXPRESSIONS = 16
MAX_CHARACTERS = 512
MAX_WAITING = 20
MAX_IMAGES = 8  # whose features are cached; with ResNet-50 they take about 50 MB each
CACHE_SECONDS = 3600  # for which uploaded and generated files are kept
DISPLAY_SIDE = 800  # pixels of the longer side of the drawn image
MIN_WIDTH = 320  # pixels, for the texts
MAX_QUOTED = 80  # characters of a truncated text in a message
CSS = "#examples td { white-space: pre-line; }"  # one line per expression, as in the text field
EXAMPLES = [[str(Path(__file__).parent / "shapes.jpg"), "the green star\nthe red square\nthe shape right of the star"]]
ABOUT = f"""# Locate expressions in an image

Upload an image and enter the expressions to locate, one per line: RefTR
([paper](https://arxiv.org/abs/2106.03089)) answers each with a box, and with a mask if the model was trained for it.
{{presence}}

An image file may have up to {MAX_FILE_BYTES // 1024**2} MB. Up to {MAX_EXPRESSIONS} expressions are accepted, and each
is truncated to {MAX_CHARACTERS} characters and to the length of the model's input. A message says what was read."""
PRESENCE = {
    False: "It always answers: it predicts no confidence, and cannot tell that an object is absent.",
    True: "It answers with none, one or several boxes, each with the probability that it is right. If nothing is "
    "found, the highest probability of a box is shown.",
}


class Answerer:
    """
    Locate expressions with one model, and cache the features of the most recent images.

    Args:
        model_name (`str`): the folder or Hub id of a RefTR model with its processor.

    Raises:
        OSError, ValueError: if there is no such model.
    """

    def __init__(self, model_name: str) -> None:
        is_installed = importlib.util.find_spec("modeling_reftr") is not None
        if is_installed:
            self.predictor_class = importlib.import_module("modeling_reftr").RefTRPredictor
        else:
            self.predictor_class = get_class_from_dynamic_module("predictor_reftr.RefTRPredictor", model_name)
        predictor = self.predictor_class.from_pretrained(model_name, trust_remote_code=not is_installed)
        self.model, self.processor = predictor.model.fused_copy(), predictor.processor
        self.predictors = OrderedDict()  # digest of a file -> predictor with that image
        self._lock = threading.Lock()  # guards `predictors`

    def encode(self, path: str) -> Any:
        """
        Return a predictor with the image of a file, from the cache if the image was encoded recently.

        Raises:
            ValueError: if the file is too large or not an image; the message names the file without its folder.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"There is no image {path.name!r} here any more: upload it again.")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(
                f"The file {path.name!r} has more than {MAX_FILE_BYTES // 1024**2} MB: make it smaller first."
            )
        digest = hashlib.sha256(path.read_bytes()).digest()
        with self._lock:
            predictor = self.predictors.get(digest)
        if predictor is None:
            predictor = self.predictor_class(self.model, self.processor)
            try:
                predictor.set_image(str(path))
            except (OSError, ValueError) as error:
                raise ValueError("The file " + str(error).replace(f"{path.parent}{os.sep}", "")) from error
        with self._lock:
            self.predictors[digest] = predictor
            self.predictors.move_to_end(digest)
            if len(self.predictors) > MAX_IMAGES:
                self.predictors.popitem(last=False)
        return predictor

    def answer(self, path: str, expressions: list[str]) -> tuple[Image.Image, list[dict[str, Any]]]:
        """
        Locate expressions in the image of a file.

        Returns:
            `tuple`: the image with the answers drawn onto it, and the answers in JSON, see `to_json`.

        Raises:
            ValueError: if the image or an expression is invalid.
        """
        predictor = self.encode(path)
        answers = predictor.predict(expressions)
        width = round(DISPLAY_SIDE * predictor.image.width / max(predictor.image.size))
        drawing = predictor.draw(with_scores(answers), width=max(width, MIN_WIDTH))
        return drawing, to_json(predictor, answers)

    def find_truncated(self, expressions: list[str]) -> list[tuple[int, int, str]]:
        """
        Find the expressions that are longer than the model reads.

        Args:
            expressions (`list[str]`): the expressions.

        Returns:
            `list[tuple]`: the number of each truncated expression from 1 on, the number of tokens that it may have,
            and the part of it that is read.
        """
        found = []
        for number, expression in enumerate(expressions, start=1):
            text = expression.lower()  # as the processor reads it
            [(_, offsets)], limits = self.processor.tokenize([text], [self.processor.max_expression_length])
            if limits:
                characters = [position for start, end in offsets if end > start for position in (start, end)]
                found.append((number, limits[0], text[min(characters) : max(characters)]))
        return found


def to_json(predictor: Any, answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Convert answers to JSON, label and box first: a mask is a long text that would hide the box below it."""
    return [{name: answer[name] for name in ("label", "box")} | answer for answer in predictor.to_json(answers)]


def with_scores(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return answers whose labels have the score, from a model that predicts presence: "not found (0.08)"."""
    labelled = []
    for answer in answers:
        label = answer["label"]
        if "phrase_index" in answer:
            score = f"({answer['score']:.2f})"
            label = f"{label} {score}" if answer["box"] else f"{label}: not found {score}"
        labelled.append({**answer, "label": label})
    return labelled


def describe_app(predicts_presence: bool) -> str:
    """Return the text of the page."""
    return ABOUT.format(presence=PRESENCE[predicts_presence])


def read_expressions(text: Any) -> tuple[list[str], bool]:
    """
    Return the nonblank lines of a text, truncated to `MAX_CHARACTERS`, and whether any line was truncated.

    Raises:
        ValueError: if there are none, or more than `MAX_EXPRESSIONS`.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()] if isinstance(text, str) else []
    if not lines:
        raise ValueError("There is no expression: enter the expressions to locate, one per line.")
    if len(lines) > MAX_EXPRESSIONS:
        raise ValueError(
            f"There are {len(lines)} expressions, more than {MAX_EXPRESSIONS}: enter fewer of them at once."
        )
    return [line[:MAX_CHARACTERS] for line in lines], any(len(line) > MAX_CHARACTERS for line in lines)


def shorten(text: str) -> str:
    """Return a text of at most `MAX_QUOTED` characters, its end if it is longer."""
    return text if len(text) <= MAX_QUOTED else f"... {text[4 - MAX_QUOTED :]}"


def check_upload(file: dict[str, Any]) -> dict[str, Any]:
    """
    Reject a file, as named by a gradio client, that was not uploaded.

    Raises:
        gr.Error: with a message for the page.
    """
    path, folder = Path(file["path"]), Path(gr.utils.get_upload_folder()).resolve()
    # Require an absolute path: read as a path, "http://host/../../tmp/gradio/x" leads into the folder as well.
    if not (path.is_absolute() and path.resolve().is_relative_to(folder)):
        raise gr.Error("Only uploaded images are accepted, no addresses and no paths.", print_exception=False)
    return file


class UploadsOnly(gr.Blocks):
    """Accept files only as uploads: gradio itself fetches any URL that an input names."""

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Check the names of files before gradio reads or fetches them."""
        traverse(inputs, check_upload, is_file_obj_with_meta)
        return await super().preprocess_data(block_fn, inputs, *args, **kwargs)


class RefuseAddresses:
    """Reject the routes through which gradio's server fetches an address for its caller (`file=http://...`)."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer such a request with 403, and pass on all others."""
        app = self.app
        if scope["type"] == "http" and "://" in scope["path"]:
            app = PlainTextResponse("Only this page's own files are served, no addresses.", status_code=403)
        await app(scope, receive, send)


def build_app(model_name: str) -> gr.Blocks:
    """
    Load a model and build its page.

    Args:
        model_name (`str`): the folder or Hub id of a RefTR model with its processor.

    Raises:
        OSError, ValueError: if there is no such model.
    """
    answerer = Answerer(model_name)

    # The API of the page calls the image `picture`, as the name of the parameter.
    def ask(picture: dict[str, Any] | None, text: str) -> tuple[Image.Image, list[dict[str, Any]], str]:
        """Locate expressions, one per line, in an uploaded image."""
        try:
            if not picture:
                raise ValueError("There is no image: upload one, or use the example.")
            expressions, is_cut = read_expressions(text)
            drawing, answers = answerer.answer(picture["path"], expressions)
        except ValueError as error:  # the page interprets messages as HTML
            raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from error
        if is_cut:
            gr.Warning(f"Expressions were truncated to {MAX_CHARACTERS} characters.")
        for number, limit, part in answerer.find_truncated(expressions):
            gr.Warning(
                f"Expression {number} is longer than the {limit} tokens that the model reads, and was truncated to "
                f'"{html.escape(shorten(part), quote=False)}".'
            )
        file = save_pil_to_cache(drawing, download.GRADIO_CACHE, name="answers", format="png")
        download.temp_files.add(file)  # to be deleted with the other files
        return drawing, answers, file

    def offer(file: str) -> gr.DownloadButton:
        """Offer the drawn answers for download."""
        return gr.DownloadButton(value=file, interactive=True)

    with UploadsOnly(
        title="RefTR: visual grounding", analytics_enabled=False, delete_cache=(CACHE_SECONDS, CACHE_SECONDS)
    ) as app:
        gr.Markdown(describe_app(getattr(answerer.model.config, "predict_presence", False)))
        with gr.Row():
            with gr.Column():
                picture = gr.Image(
                    type="filepath", sources=["upload", "clipboard"], label="Image", height=400, elem_id="picture"
                )
                text = gr.Textbox(label="Expressions, one per line", lines=4, max_lines=MAX_EXPRESSIONS)
                button = gr.Button("Locate", variant="primary")
                gr.Examples(EXAMPLES, [picture, text], api_visibility="private", elem_id="examples")
            with gr.Column():
                shown = gr.Image(
                    label="Answers",
                    interactive=False,
                    format="jpeg",
                    buttons=["fullscreen"],
                    elem_id="answers",
                )
                download = gr.DownloadButton("Download the drawing", interactive=False, elem_id="download")
                answers = gr.JSON(label="JSON")
        gr.Markdown(f"Model: `{model_name}`")
        # Pass the uploaded file itself: gradio would decode it before its size is checked.
        drawing = gr.State()  # a state is not part of the API, whose clients draw the answers themselves
        outputs = [shown, answers, drawing]
        asked = button.click(ask, [picture, text], outputs, preprocess=False, concurrency_limit=1, api_name="ask")
        asked.success(offer, drawing, download, api_visibility="private")
    app.answerer = answerer
    return app.queue(max_size=MAX_WAITING, api_open=False)


def launch(app: gr.Blocks, port: int | None = None, share: bool = False, wait: bool = True) -> str:
    """
    Serve the page of `build_app`.

    Args:
        app (`gr.Blocks`): the page.
        port (`int`, *optional*): its port, by default the first free one from 7860 on.
        share (`bool`, *optional*, defaults to `False`): whether to serve it at a public address of gradio, too.
        wait (`bool`, *optional*, defaults to `True`):
            Whether to block until interrupted; otherwise return and serve in the background.

    Returns:
        `str`: the page's address on this machine.
    """
    _, address, _ = app.launch(
        server_port=port,
        share=share,
        css=CSS,
        prevent_thread_lock=not wait,
        max_file_size=MAX_FILE_BYTES,
        app_kwargs={"middleware": [Middleware(RefuseAddresses)]},
        footer_links=["api", "gradio"],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
    )
    return address


def main(argv: list[str] | None = None) -> None:
    """Serve the page until it is interrupted."""
    parser = argparse.ArgumentParser(prog="reftr demo", description="A web page that locates expressions in images.")
    parser.add_argument("--model", default=os.environ.get("REFTR_MODEL"), help="folder or Hub id of a RefTR model")
    parser.add_argument("--port", type=int, help="port of the page (default: the first free one from 7860 on)")
    parser.add_argument(
        "--share", choices=("no", "yes"), default="no", help="also serve it at a public address of gradio"
    )
    args = parser.parse_args(argv)
    if not args.model:
        raise ValueError(
            "There is no model: give --model, or set the variable REFTR_MODEL (on a Space: Settings, Variables), to "
            "the folder or Hub id of a trained RefTR model."
        )
    launch(build_app(args.model), args.port, args.share == "yes")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
