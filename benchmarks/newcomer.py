"""
Measure the time of a new user's first steps: a clone, `make demo`, and predictions on an image of their own. The
commands are the first ones of the README, except for the name of the image; nothing is installed before, and only
pip's cache is used.

    python benchmarks/newcomer.py --output benchmarks/results/newcomer.json
    python benchmarks/newcomer.py --environment .venv --max_steps 2    # a test of its steps, in a minute
"""

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torchvision.ops import box_iou


ROOT = Path(__file__).resolve().parents[1]
# expression -> box of its object, corners in pixels
TRUTH = {"the red square": (30, 40, 110, 120), "the green star": (190, 60, 280, 150)}
STAR = ((0.5, 0.0), (0.62, 0.36), (1.0, 0.36), (0.69, 0.59), (0.81, 0.95), (0.5, 0.73), (0.19, 0.95), (0.31, 0.59))
STAR = (*STAR, (0.0, 0.36), (0.38, 0.36))


def first_commands(readme: str) -> list[str]:
    """Return the commands of the first block of the README."""
    return re.search(r"```bash\n(.*?)```", readme, re.DOTALL)[1].splitlines()


def draw_image(path: Path):
    """Draw an image unlike those of the training split: of another size, with a plain background."""
    image = Image.new("RGB", (320, 200), (120, 120, 120))
    draw = ImageDraw.Draw(image)
    draw.rectangle(TRUTH["the red square"], fill=(215, 45, 40))
    left, top, right, bottom = TRUTH["the green star"]
    draw.polygon([(left + x * (right - left), top + y * (bottom - top)) for x, y in STAR], fill=(45, 165, 60))
    image.save(path)


def follow(folder: Path, environment: str | None, max_steps: int | None) -> dict:
    """
    Run and time the commands in an empty folder.

    Args:
        folder (`Path`): parent folder of the clone.
        environment (`str`, *optional*): an environment with all dependencies, in place of a new one.
        max_steps (`int`, *optional*): optimizer steps of the demo's training, all of them by default.

    Returns:
        `dict`: seconds of each command, and the answers with their IoU.

    Raises:
        subprocess.CalledProcessError: if a command fails; its output is on stderr.
    """
    clone, seconds = folder / "clone", {}
    variables = {**os.environ, "HF_HOME": str(folder / "cache")}
    for name in ("PYTHONPATH", "VIRTUAL_ENV", "HF_DATASETS_CACHE", "HF_HUB_CACHE"):
        variables.pop(name, None)

    def step(name: str, *argv) -> str:
        start = time.monotonic()
        where = clone if clone.exists() else folder
        output = subprocess.run(argv, cwd=where, env=variables, stdout=subprocess.PIPE, text=True, check=True).stdout
        seconds[name] = round(time.monotonic() - start, 1)
        return output

    step("clone", "git", "clone", "--quiet", str(ROOT), str(clone))
    if environment is not None:
        (clone / ".venv").mkdir()
        (clone / ".venv" / "bin").symlink_to(Path(environment, "bin").resolve())
        (clone / ".venv" / ".installed").touch()
        variables["PYTHONPATH"] = str(clone)  # import the clone, not the checkout of the environment
    if max_steps is not None:
        with open(clone / "recipes" / "demo.yaml", "a") as file:
            file.write(f"\nmax_steps: {max_steps}\n")
    demo, predict = first_commands((clone / "README.md").read_text())
    step("install", "make", ".venv/.installed")
    step("demo", *shlex.split(demo))
    draw_image(clone / "photo.jpg")
    predict = [argument.replace("demo/shapes.jpg", "photo.jpg") for argument in shlex.split(predict)]
    answers = json.loads(step("answer", *predict))
    for answer in answers:
        boxes = (torch.tensor([box], dtype=torch.float32) for box in (answer["box"], TRUTH[answer["label"]]))
        answer["iou"] = round(box_iou(*boxes).item(), 3)
    return {
        "seconds": {**seconds, "all": round(sum(seconds.values()), 1)},
        "answers": [{"phrase": answer["label"], "box": answer["box"], "iou": answer["iou"]} for answer in answers],
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=clone, text=True).strip(),
        "max_steps": max_steps,
        "environment": "installed before" if environment else "new",
        "machine": {"system": platform.system(), "cores": os.cpu_count(), "python": platform.python_version()},
    }


def main():
    parser = argparse.ArgumentParser(description="Measure the time of a new user's first steps.")
    parser.add_argument("--environment", help="a virtual environment with all dependencies, in place of a new one")
    parser.add_argument("--max_steps", type=int, help="optimizer steps of the demo's training")
    parser.add_argument("--output", help="JSON file to write the result to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = json.dumps(follow(Path(folder), options.environment, options.max_steps), indent=2)
    if options.output:
        Path(options.output).write_text(result + "\n")
    sys.stdout.write(result + "\n")


if __name__ == "__main__":
    main()
