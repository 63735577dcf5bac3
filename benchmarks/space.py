"""
Measure the response time of the Space's app, with gradio's client on this machine: `python benchmarks/space.py`.

A full-size model (ResNet-50, BERT-base, masks; random weights, no network) is saved and served by `demo/app.py` in a
separate process. Images of 640 x 480 pixels are uploaded with each request. Three kinds of requests are measured: the
first of all, the first about each other image, and the second about the same image, whose features the app has cached.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from gradio_client import Client, handle_file
from PIL import Image

from modeling_reftr import RefTRConfig, RefTRForVisualGrounding, RefTRImageProcessor, RefTRProcessor
from training_reftr.tokenizer_training import train_tokenizer


IMAGES = 6
QUESTIONS = ("the person left of the bus\nthe bus", "the red car\nthe tree behind it")
GOALS = {"first question": 3.0, "second question on the same image": 1.0}


def save_model(folder: Path):
    """Save a full-size model with random weights, and its processor."""
    RefTRForVisualGrounding(RefTRConfig(predict_masks=True)).save_pretrained(folder)
    RefTRProcessor(RefTRImageProcessor(), train_tokenizer(list(QUESTIONS), max_length=512)).save_pretrained(folder)


def save_images(folder: Path) -> list[Path]:
    """Save images of smooth noise."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{number}.jpg" for number in range(IMAGES)]
    for path in paths:
        coarse = Image.fromarray(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8))
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(path)
    return paths


def connect(process: subprocess.Popen, port: int, downloads: Path) -> Client:
    """Wait until the app listens, and return a client."""
    while process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return Client(
                    f"http://127.0.0.1:{port}", verbose=False, analytics_enabled=False, download_files=str(downloads)
                )
        time.sleep(0.2)
    raise OSError(f"demo/app.py ended with {process.returncode}; its output is above.")


def seconds(client: Client, path: Path, text: str) -> float:
    """Measure one request."""
    start = time.perf_counter()
    client.predict(handle_file(str(path)), text, api_name="/ask")
    return time.perf_counter() - start


def measure(folder: Path) -> dict[str, list[float]]:
    """Serve a model and return the seconds of each kind of request."""
    save_model(folder / "model")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "demo/app.py", "--model", str(folder / "model"), "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "GRADIO_TEMP_DIR": str(folder / "uploads")}
    process = subprocess.Popen(command, env=environment, stdout=sys.stderr)
    try:
        client = connect(process, port, folder / "downloads")
        first, *others = save_images(folder)
        times = {"first question of all": [seconds(client, first, QUESTIONS[0])]}
        times["first question"] = [seconds(client, path, QUESTIONS[0]) for path in others]
        times["second question on the same image"] = [seconds(client, path, QUESTIONS[1]) for path in others]
    finally:
        process.terminate()
        process.wait()
    return times


def main():
    parser = argparse.ArgumentParser(description="Measure the response time of the Space's app.")
    parser.add_argument("--output", help="JSON file to write the result to")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        times = measure(Path(folder))
    result = {
        "seconds": {
            name: {
                "median": round(statistics.median(values), 3),
                "shortest": round(min(values), 3),
                "longest": round(max(values), 3),
            }
            for name, values in times.items()
        },
        "goals": GOALS,
        "measured_on": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load before": round(load, 2),
            "torch": torch.__version__,
        },
    }
    text = json.dumps(result, indent=2) + "\n"
    sys.stdout.write(text)
    if options.output:
        Path(options.output).write_text(text)


if __name__ == "__main__":
    main()
