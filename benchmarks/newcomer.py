"""
A newcomer's path, timed: a clone, `make demo`, a picture of one's own answered, with the README's first commands as
they stand there but for the picture's name, nothing installed before and nothing cached but what pip keeps.

    python benchmarks/newcomer.py --output benchmarks/results/newcomer.json
    python benchmarks/newcomer.py --environment .venv --max_steps 2    # its pieces, in a minute
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
# what is drawn, and where: corners in pixels
TRUTH = {"the red square": (30, 40, 110, 120), "the green star": (190, 60, 280, 150)}
STAR = ((0.5, 0.0), (0.62, 0.36), (1.0, 0.36), (0.69, 0.59), (0.81, 0.95), (0.5, 0.73), (0.19, 0.95), (0.31, 0.59))
STAR = (*STAR, (0.0, 0.36), (0.38, 0.36))


def first_commands(readme: str) -> list[str]:
    """The commands of the README's first block."""
    return re.search(r"```bash\n(.*?)```", readme, re.DOTALL)[1].splitlines()


def draw_picture(path: Path):
    """A picture that is not of the training set: of another size, with a plain background."""
    picture = Image.new("RGB", (320, 200), (120, 120, 120))
    draw = ImageDraw.Draw(picture)
    draw.rectangle(TRUTH["the red square"], fill=(215, 45, 40))
    left, top, right, bottom = TRUTH["the green star"]
    draw.polygon([(left + x * (right - left), top + y * (bottom - top)) for x, y in STAR], fill=(45, 165, 60))
    picture.save(path)


def follow(folder: Path, environment: str | None, max_steps: int | None) -> dict:
    """
    Take the path in an empty folder.

    Args:
        folder (`Path`): where the clone will be.
        environment (`str`, *optional*): an environment that has everything, in place of a new one.
        max_steps (`int`, *optional*): cuts the demo's training short.

    Returns:
        `dict`: seconds of each step, answers with their IoU.

    Raises:
        subprocess.CalledProcessError: if a step fails; what it said is on stderr.
    """
    clone, seconds = folder / "clone", {}
    variables = {**os.environ, "HF_HOME": str(folder / "cache")}
    for name in ("PYTHONPATH", "VIRTUAL_ENV", "HF_DATASETS_CACHE", "HF_HUB_CACHE"):
        variables.pop(name, None)

    def step(name: str, *words) -> str:
        start = time.monotonic()
        where = clone if clone.exists() else folder
        output = subprocess.run(words, cwd=where, env=variables, stdout=subprocess.PIPE, text=True, check=True).stdout
        seconds[name] = round(time.monotonic() - start, 1)
        return output

    step("clone", "git", "clone", "--quiet", str(ROOT), str(clone))
    if environment is not None:
        (clone / ".venv").mkdir()
        (clone / ".venv" / "bin").symlink_to(Path(environment, "bin").resolve())
        (clone / ".venv" / ".installed").touch()
        variables["PYTHONPATH"] = str(clone)  # not the checkout that it was made for
    if max_steps is not None:
        with open(clone / "recipes" / "demo.yaml", "a") as file:
            file.write(f"\nmax_steps: {max_steps}\n")
    demo, ask = first_commands((clone / "README.md").read_text())
    step("install", "make", ".venv/.installed")
    step("demo", *shlex.split(demo))
    draw_picture(clone / "photo.jpg")
    ask = [word.replace("demo/shapes.jpg", "photo.jpg") for word in shlex.split(ask)]
    answers = json.loads(step("answer", *ask))
    for answer in answers:
        boxes = (torch.tensor([box], dtype=torch.float32) for box in (answer["box"], TRUTH[answer["phrase"]]))
        answer["iou"] = round(box_iou(*boxes).item(), 3)
    return {
        "seconds": {**seconds, "all": round(sum(seconds.values()), 1)},
        "answers": [{name: answer[name] for name in ("phrase", "box", "iou")} for answer in answers],
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=clone, text=True).strip(),
        "max_steps": max_steps,
        "environment": "installed before" if environment else "new",
        "machine": {"system": platform.system(), "cores": os.cpu_count(), "python": platform.python_version()},
    }


def main():
    parser = argparse.ArgumentParser(description="A newcomer's path, timed.")
    parser.add_argument("--environment", help="a virtual environment that has everything, in place of a new one")
    parser.add_argument("--max_steps", type=int, help="cut the demo's training short")
    parser.add_argument("--output", help="JSON file to write the result to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = json.dumps(follow(Path(folder), options.environment, options.max_steps), indent=2)
    if options.output:
        Path(options.output).write_text(result + "\n")
    sys.stdout.write(result + "\n")


if __name__ == "__main__":
    main()
