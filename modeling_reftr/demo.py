"""
The page that asks a model, here or as a Space. Its files are in the checkout's `demo/`:

    reftr demo --model runs/demo
"""

import importlib.util
import re
import sys
from pathlib import Path

from .escaping import for_terminal


FOLDER = Path(__file__).resolve().parents[1] / "demo"


def demo_folder() -> Path:
    """
    Where the page's files are.

    Raises:
        OSError: if they are not there, as in an installed copy, which is without them.
    """
    if not (FOLDER / "app.py").is_file():
        raise OSError(f"The demo is part of the checkout and is not at {str(FOLDER)!r}: clone the repository.")
    return FOLDER


def space_files(model: str) -> dict[str, bytes]:
    """The files of a Space that asks a model of the Hub, by name."""
    files = {path.name: path.read_bytes() for path in sorted(demo_folder().iterdir()) if path.is_file()}
    front_matter = re.sub(r"(?m)^models:.*$", f"models: [{model}]", files["README.md"].decode(), count=1)
    return {**files, "README.md": front_matter.encode()}


def main(argv: list[str] | None = None):
    """The command: serves the page until it is interrupted."""
    spec = importlib.util.spec_from_file_location("app", demo_folder() / "app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    app.main(argv)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(for_terminal(f"error: {error}"))
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)
