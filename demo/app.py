"""
A page that asks RefTR about pictures, as a Space of the Hub or at home:

    python demo/app.py --model runs/demo

Without `--model` the variable REFTR_MODEL names the model, as in a Space's settings. Where `modeling_reftr` is not
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

import gradio as gr
import numpy as np
import torch
from gradio_client.utils import is_file_obj_with_meta, traverse
from PIL import Image
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor


MAX_FILE_BYTES = 5 * 1024**2
MAX_EXPRESSIONS = 16
MAX_CHARACTERS = 512
MAX_WAITING = 20
MAX_PICTURES = 8  # whose features are kept; with ResNet-50 they take about 50 MB each
KEPT = 3600  # seconds that files are: what was uploaded, and what was made of it
DISPLAY_SIDE = 800  # pixels of the longer side: of a large picture, opacities of 16 answers would take gigabytes
BOX_LINE = 6  # pixels of what is displayed
MASK_OPACITY = 0.45
COLORS = (
    *("#d81bbd", "#0098a8", "#e67700", "#7b2fd0", "#8a6d00", "#c2255c", "#2b8a3e", "#1864ab"),
    *("#f03e3e", "#12b886", "#fab005", "#4263eb", "#a61e4d", "#5c940d", "#862e9c", "#495057"),
)
EXAMPLES = [[str(Path(__file__).parent / "shapes.jpg"), "the green star\nthe red square\nthe shape right of the star"]]
ABOUT = f"""# Ask about a picture

Give a picture and say what to look for, one expression a line: RefTR ([paper](https://arxiv.org/abs/2106.03089))
answers each with a box, and with a mask if the model has been trained for them. It always answers: it has no score,
and cannot say that a thing is not there.

A picture's file has up to {MAX_FILE_BYTES // 1024**2} MB. Up to {MAX_EXPRESSIONS} expressions are taken, and each is
cut after {MAX_CHARACTERS} characters."""


class Answerer:
    """
    A model, its processor, and what it saw in the pictures that it was asked about last.

    Args:
        model_name (`str`): folder or Hub id of a RefTR with its processor.

    Raises:
        OSError, ValueError: if there is no such model.
    """

    def __init__(self, model_name: str):
        is_installed = importlib.util.find_spec("modeling_reftr") is not None
        if is_installed:
            importlib.import_module("modeling_reftr")  # tells the Auto classes about RefTR
        self.processor = AutoProcessor.from_pretrained(model_name, trust_remote_code=not is_installed)
        self.model = AutoModelForZeroShotObjectDetection.from_pretrained(
            model_name, trust_remote_code=not is_installed
        ).fused_copy()
        self.pictures = OrderedDict()  # digest of a file -> its picture and the picture's features
        self._lock = threading.Lock()  # for the bookkeeping of `pictures`

    @torch.no_grad()
    def look(self, path: str):
        """
        The picture in a file, upright, and its features; of a picture that was seen lately, without another look.

        Raises:
            ValueError: if it is too large or no picture, in words that name the file without its folder.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"There is no picture {path.name!r} here any more: upload it again.")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(
                f"The file {path.name!r} has more than {MAX_FILE_BYTES // 1024**2} MB: make it smaller first."
            )
        digest = hashlib.sha256(path.read_bytes()).digest()
        with self._lock:
            seen = self.pictures.get(digest)
        if seen is None:
            try:
                (image,) = self.processor.image_processor.open_images(str(path))
                inputs = self.processor.image_processor(image, return_tensors="pt")
            except (OSError, ValueError) as error:
                raise ValueError("The file " + str(error).replace(f"{path.parent}{os.sep}", "")) from error
            seen = (image.convert("RGB"), self.model.get_image_features(**inputs))
        with self._lock:
            self.pictures[digest] = seen
            self.pictures.move_to_end(digest)
            if len(self.pictures) > MAX_PICTURES:
                self.pictures.popitem(last=False)
        return seen

    @torch.no_grad()
    def answer(self, path: str, expressions: list[str]):
        """
        Ask about the picture in a file.

        Returns:
            The picture and its opacities, one an expression, see `draw`; and `list[dict]`: `phrase`, `box` as
            (x0, y0, x1, y1) in pixels of the upright picture, and from a model that predicts masks `segmentation`,
            COCO's run-length encoding.

        Raises:
            ValueError: if the picture or an expression cannot be read.
        """
        image, features = self.look(path)
        outputs = self.model(image_features=features, **self.processor(text=expressions))
        size = [(image.height, image.width)]
        scale = DISPLAY_SIDE / max(image.size)
        shown = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
        masks = [None] * len(expressions)
        if outputs.pred_masks is None:
            results = self.processor.post_process_grounding(outputs, size)
        else:
            segment = self.processor.post_process_referring_segmentation
            results = segment(outputs, size, return_coco_rle=True)
            masks = [result["masks"][0].numpy() for result in segment(outputs, [(shown.height, shown.width)])]
        answers, opacities = [], []
        for phrase, result, mask in zip(expressions, results, masks, strict=True):
            box_xyxy = result["boxes"][0]
            opacities.append(draw(box_xyxy * scale, mask, shown.height, shown.width))
            answers.append({"phrase": phrase, "box": [round(value, 2) for value in box_xyxy.tolist()]})
            if mask is not None:
                answers[-1]["segmentation"] = result["segmentations"][0]
        return shown, opacities, answers


def draw(box_xyxy: torch.Tensor, mask: np.ndarray | None, height: int, width: int) -> np.ndarray:
    """A box as a frame and a mask (height, width) as a film in it -> how much they cover, (height, width), 0 to 1."""
    opacity = np.zeros((height, width)) if mask is None else mask * MASK_OPACITY
    limits = torch.tensor([width, height, width, height])
    x0, y0, x1, y1 = box_xyxy.round().long().clamp(limits * 0, limits).tolist()
    frame = np.zeros_like(opacity, dtype=bool)
    frame[y0:y1, x0:x1] = True
    frame[y0 + BOX_LINE : y1 - BOX_LINE, x0 + BOX_LINE : x1 - BOX_LINE] = False
    opacity[frame] = 1
    return opacity


def read_expressions(text) -> tuple[list[str], bool]:
    """
    The lines of a text that are not blank, each cut after `MAX_CHARACTERS`; and whether any was.

    Raises:
        ValueError: if there are none, or more than `MAX_EXPRESSIONS`.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()] if isinstance(text, str) else []
    if not lines:
        raise ValueError("There is no expression: say what to look for, one expression a line.")
    if len(lines) > MAX_EXPRESSIONS:
        raise ValueError(f"There are {len(lines)} expressions: up to {MAX_EXPRESSIONS} are answered at once.")
    return [line[:MAX_CHARACTERS] for line in lines], any(len(line) > MAX_CHARACTERS for line in lines)


def check_upload(file: dict) -> dict:
    """
    Refuse a file, as gradio's clients name it, that is not among those that were uploaded.

    Raises:
        gr.Error: with a sentence for the page.
    """
    path, folder = Path(file["path"]), Path(gr.utils.get_upload_folder()).resolve()
    # absolute as well: "http://host/../../tmp/gradio/x" leads there too, for who takes it for a path
    if not (path.is_absolute() and path.resolve().is_relative_to(folder)):
        raise gr.Error("Only uploaded pictures are taken, no addresses and no paths.", print_exception=False)
    return file


class UploadsOnly(gr.Blocks):
    """Blocks that take files only as uploads: gradio's own fetch what any input names by its URL."""

    async def preprocess_data(self, block_fn, inputs, *args, **kwargs):
        """As gradio's, which reads and fetches files, once their names are found harmless."""
        traverse(inputs, check_upload, is_file_obj_with_meta)
        return await super().preprocess_data(block_fn, inputs, *args, **kwargs)


class RefuseAddresses:
    """Refuses the routes through which gradio's server fetches an address for its caller (`file=http://...`)."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        """Answers such a request with 403, and hands on all others."""
        app = self.app
        if scope["type"] == "http" and "://" in scope["path"]:
            app = PlainTextResponse("Only this page's own files are served, no addresses.", status_code=403)
        await app(scope, receive, send)


def build_app(model_name: str) -> gr.Blocks:
    """
    The page, with its model loaded.

    Args:
        model_name (`str`): folder or Hub id of a RefTR with its processor.

    Raises:
        OSError, ValueError: if there is no such model.
    """
    answerer = Answerer(model_name)

    def ask(picture, text):
        """Answers one or several expressions, a line each, about an uploaded picture."""
        try:
            if not picture:
                raise ValueError("There is no picture: upload one, or take the example.")
            expressions, is_cut = read_expressions(text)
            shown, opacities, answers = answerer.answer(picture["path"], expressions)
        except ValueError as error:  # the page takes messages for HTML
            raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from error
        if is_cut:
            gr.Warning(f"Expressions were cut after {MAX_CHARACTERS} characters.")
        colors = dict(zip(expressions, COLORS, strict=False))
        layers = list(zip(opacities, expressions, strict=True))
        return gr.AnnotatedImage((shown, layers), color_map=colors), answers

    with UploadsOnly(title="RefTR: ask about a picture", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as app:
        gr.Markdown(ABOUT)
        with gr.Row():
            with gr.Column():
                picture = gr.Image(
                    type="filepath", sources=["upload", "clipboard"], label="Picture", height=400, elem_id="picture"
                )
                text = gr.Textbox(label="Expressions, one a line", lines=4, max_lines=MAX_EXPRESSIONS)
                button = gr.Button("Ask", variant="primary")
                gr.Examples(EXAMPLES, [picture, text], api_visibility="private")
            with gr.Column():
                shown = gr.AnnotatedImage(label="Answers", height=500, format="jpeg", elem_id="answers")
                answers = gr.JSON(label="JSON")
        gr.Markdown(f"Model: `{model_name}`")
        # the file as it was uploaded: gradio would decode all of it before anybody knows its size
        button.click(ask, [picture, text], [shown, answers], preprocess=False, concurrency_limit=1, api_name="ask")
    app.answerer = answerer
    return app.queue(max_size=MAX_WAITING, api_open=False)


def launch(app: gr.Blocks, port: int | None = None, share: bool = False, wait: bool = True) -> str:
    """
    Serve the page of `build_app`.

    Args:
        port (`int`, *optional*): by default the first free one from 7860 on.
        share (`bool`, *optional*, defaults to `False`): also by a public address of gradio's makers.
        wait (`bool`, *optional*, defaults to `True`): serve until interrupted; else go on, and serve meanwhile.

    Returns:
        `str`: the page's address on this machine.
    """
    _, address, _ = app.launch(
        server_port=port,
        share=share,
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


def main(argv: list[str] | None = None):
    """The command: serves the page until it is interrupted."""
    parser = argparse.ArgumentParser(prog="reftr demo", description="A page that asks RefTR about pictures.")
    parser.add_argument("--model", default=os.environ.get("REFTR_MODEL"), help="RefTR folder or Hub id")
    parser.add_argument("--port", type=int, help="port of the page; by default the first free one from 7860 on")
    parser.add_argument("--share", choices=("no", "yes"), default="no", help="also by a public address of gradio's")
    args = parser.parse_args(argv)
    if not args.model:
        raise ValueError(
            "There is no model: give --model, or set the variable REFTR_MODEL (on a Space: Settings, Variables), to "
            "the folder or the Hub id of a trained RefTR."
        )
    launch(build_app(args.model), args.port, args.share == "yes")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
