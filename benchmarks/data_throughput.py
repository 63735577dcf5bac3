"""
Measure images per second from JPEG files to a normalized batch at 640 pixels on one core:
`python benchmarks/data_throughput.py`.

The run alternates between the published steps (decoding with OpenCV, resizing with PIL and antialiasing, conversion to
tensors and normalization, image by image) and ours (dataset rows, decoded by their `Image` feature, and paths, both
processed by `RefTRImageProcessor`). Compare the ratios of the shortest times, not the absolute times; the goal is 1 or
more. The published steps require OpenCV (`pip install opencv-python-headless`); without it only ours are measured.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path


os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

import datasets
import numpy as np
import torch
import torchvision.transforms.functional as tvF
from PIL import Image

from modeling_reftr import RefTRImageProcessor
from modeling_reftr.image_processing_reftr import resized_size


try:
    import cv2
except ImportError:
    cv2 = None


# label -> (size, images per batch, rounds)
SIZES = {"640 x 480": ((640, 480), 8, 31), "4000 x 3000": ((4000, 3000), 4, 9)}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_image(size: tuple[int, int], seed: int) -> Image.Image:
    """Generate noise of several scales, which compresses about as well as a photograph."""
    rng = np.random.default_rng(seed)
    canvas = np.zeros((size[1], size[0], 3), np.float32)
    width = 4
    while width < max(size) // 2:
        noise = rng.normal(0, 90 / width**0.5, (max(2, width * size[1] // size[0]), width, 3)).astype(np.float32)
        for channel in range(3):
            canvas[..., channel] += np.asarray(Image.fromarray(noise[..., channel]).resize(size, Image.BICUBIC))
        width *= 2
    return Image.fromarray((canvas + 120).clip(0, 255).astype(np.uint8))


def published(paths: list[str]) -> torch.Tensor:
    """Apply the published steps and collate the published batch, padded with zeros, with its mask."""
    tensors = []
    for path in paths:
        image = Image.fromarray(cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB))
        height, width = resized_size(image.height, image.width, 640, 640)
        image = image.resize((width, height), Image.BILINEAR)
        tensors.append(tvF.normalize(tvF.to_tensor(image), MEAN, STD))
    height, width = (max(tensor.shape[axis] for tensor in tensors) for axis in (1, 2))
    batch = torch.zeros(len(tensors), 3, height, width)
    mask = torch.ones(len(tensors), height, width, dtype=torch.bool)
    for index, tensor in enumerate(tensors):
        batch[index, :, : tensor.shape[1], : tensor.shape[2]].copy_(tensor)
        mask[index, : tensor.shape[1], : tensor.shape[2]] = False
    return batch


def measure(actions: dict, count: int, rounds: int) -> dict[str, float]:
    """
    Measure the images per second of each action, alternating between them, and return the best of the rounds, which
    other load affects least.
    """
    rates = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            rates[name].append(count / (time.perf_counter() - start))
    return {name: max(values) for name, values in rates.items()}


def main():
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    processor = RefTRImageProcessor()

    def ours(images) -> torch.Tensor:
        return processor(images, return_tensors="pt")["pixel_values"]

    results = {}
    for label, (size, count, rounds) in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            paths = [str(Path(folder, f"{index}.jpg")) for index in range(count)]
            for seed, path in enumerate(paths):
                make_image(size, seed).save(path, quality=90)
            rows = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
            actions = {
                "published": lambda paths=paths: published(paths),
                "rows": lambda rows=rows: ours(rows[:]["image"]),
                "paths": lambda paths=paths: ours(paths),
            }
            if cv2 is None:
                sys.stderr.write("OpenCV (cv2) is not installed: the published steps are not measured.\n")
                del actions["published"]
            else:
                cv2.setNumThreads(1)
            rates = measure(actions, count, rounds)
            results[label] = {f"{name}, pictures a second": rate for name, rate in rates.items()}
            results[label]["kilobytes a picture"] = sum(map(os.path.getsize, paths)) / count / 1000
            if cv2 is not None:
                for name in ("rows", "paths"):
                    results[label][f"{name}, ratio"] = rates[name] / rates["published"]
                difference = (published(paths) - ours(paths)).abs().max()
                results[label]["largest difference, grey levels"] = float(difference) * 255 * max(STD)
    rounded = {label: {name: round(value, 2) for name, value in found.items()} for label, found in results.items()}
    sys.stdout.write(json.dumps(rounded, indent=2) + "\n")


if __name__ == "__main__":
    main()
