"""
Serve the Space's page on this machine:

    reftr demo --model runs/demo
"""

import argparse
import importlib.util
import os
import re
from types import ModuleType

from data_scripts.progress import disable_library_bars
from training_reftr.locating import check_model
from training_reftr.recipes import resource_folder


def space_files(model: str) -> dict[str, bytes]:
    """Return the files of a Space that runs a model of the Hub, by file name."""
    files = {path.name: path.read_bytes() for path in sorted(resource_folder("demo").iterdir()) if path.is_file()}
    front_matter = re.sub(r"(?m)^models:.*$", f"models: [{model}]", files["README.md"].decode(), count=1)
    return {**files, "README.md": front_matter.encode()}


def import_page() -> ModuleType:
    """Import the page, a single file that the Space runs as a script."""
    spec = importlib.util.spec_from_file_location("app", resource_folder("demo") / "app.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    return page


def main(argv: list[str] | None = None) -> None:
    """
    Serve the page until the command is interrupted.

    Raises:
        ValueError: if no model is named.
    """
    parser = argparse.ArgumentParser(prog="reftr demo", description="Serve a page that runs RefTR in the browser.")
    parser.add_argument("--model", default=os.environ.get("REFTR_MODEL"), help="RefTR folder or Hub id")
    parser.add_argument("--port", type=int, help="port of the page; by default the first free one from 7860 on")
    parser.add_argument(
        "--share", choices=("no", "yes"), default="no", help="also serve at a public address of Gradio"
    )
    args = parser.parse_args(argv)
    if not args.model:
        raise ValueError(
            "No model is named: set --model, or the environment variable REFTR_MODEL, to the folder or Hub id of a "
            "trained RefTR."
        )
    check_model(args.model)
    page = import_page()
    disable_library_bars()
    page.launch(page.build_app(args.model), args.port, args.share == "yes")
