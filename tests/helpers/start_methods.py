"""
Train, evaluate and predict with loader processes, in the main thread or another, and print the results; the script of
tests/integration/test_start_methods.py:

    python tests/helpers/start_methods.py fork thread 2 recipe.yaml folder
"""

import json
import multiprocessing
import sys
import threading
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
from PIL import Image

import train_reftr
from modeling_reftr import RefTRForVisualGrounding, RefTRProcessor, VisualGroundingPipeline
from modeling_reftr.answers_reftr import answer_to_json


COLORS = ("red", "blue", "green")
VOLATILE = ("time", "train/expressions_per_second", "train/seconds_per_update", "train/memory_gb")


def train(argv: list[str], folder: Path) -> list:
    """Train a model, and return the contents of its log and its report."""
    code = train_reftr.main([*argv, "--output_dir", str(folder)])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [{name: value for name, value in line.items() if name not in VOLATILE} for line in lines]
    return [code, lines, json.loads((folder / "metrics.json").read_text())["splits"]]


def evaluate(argv: list[str], folder: Path) -> list:
    """Evaluate the trained model, and return the contents of the report."""
    settings = ["--eval_only", "--init_from", str(folder), "--output_dir", f"{folder}_report"]
    code = train_reftr.main([*argv, *settings])
    return [code, json.loads(Path(f"{folder}_report", "metrics.json").read_text())["splits"]]


def ask(num_workers: int, folder: Path) -> list:
    """Return the pipeline's answers about several images."""
    model = RefTRForVisualGrounding.from_pretrained(folder).eval()
    ground = VisualGroundingPipeline(model, processor=RefTRProcessor.from_pretrained(folder), device="cpu")
    images = [Image.new("RGB", (64, 48), color) for color in COLORS]
    answers = ground(images, text="the star", num_workers=num_workers, batch_size=2)
    return [[answer_to_json(answer) for answer in found] for found in answers]


def main():
    method, thread, num_workers, recipe, folder = sys.argv[1:]
    multiprocessing.set_start_method(method)
    argv, folder = [recipe, "--num_workers", num_workers], Path(folder)
    starts, results, start = [], {}, BaseProcess.start

    def count_and_start(process):
        starts.append(process.name)
        start(process)

    BaseProcess.start = count_and_start

    def run():
        for name, work in (
            ("train", lambda: train(argv, folder)),
            ("evaluate", lambda: evaluate(argv, folder)),
            ("ask", lambda: ask(int(num_workers), folder)),
        ):
            starts.clear()
            result = work()
            results[name] = {
                "result": result,
                "starts": len(starts),
                "left": len(multiprocessing.active_children()),
            }

    if thread == "thread":
        other = threading.Thread(target=run)
        other.start()
        other.join()
    else:
        run()
    children = [child.pid for child in psutil.Process().children(recursive=True)]
    sys.stdout.write("\n" + json.dumps({"results": results, "children": children}) + "\n")


if __name__ == "__main__":
    main()
