"""
Train the demo with several seeds, one after the other, and collect the metrics of each run:

    python benchmarks/demo_seeds.py 0 1 2 3 4
    python benchmarks/demo_seeds.py 0 1 --label "torch 2.6"    # in an environment with another version of torch
    python benchmarks/demo_seeds.py 0 1 --label short -- --num_epochs 1    # what follows -- goes to train_reftr.py
    python benchmarks/quote_results.py                         # then write them into the README

The output is a JSON file about one recipe and one commit:

    {"recipe", "recipe_sha256", "commit", "runs": [{"seed", "label", "arguments", "minutes", "machine", "metrics"}]}

`minutes` is the time of the complete command: dataset, training and evaluation. The file is written after each run.
Seeds that it already contains with the same label are skipped; runs of another recipe or commit are replaced.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from data_scripts.atomic_files import write_file
from training_reftr.recipes import find_recipe, read_recipe
from training_reftr.run_folder import RunFolder


ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "benchmarks" / "results" / "demo" / "seeds.json"
BOXES = ("accuracy@0.5", "mean_iou", "num_phrases")
METRICS = (*BOXES, "mask_mean_iou")
SEPARATION = ("mask_separation", "mask_separation_target")
BASELINES = ("constant_box", "swapped_expressions")


def hash_recipe(recipe: str) -> str:
    """Return the SHA-256 of the settings of a recipe and of those that it inherits, whatever their comments say."""
    layers = list(read_recipe(find_recipe(recipe)).values())
    return hashlib.sha256(json.dumps(layers, sort_keys=True).encode()).hexdigest()


def describe_commit() -> str:
    """Return the current commit, with a hash of the uncommitted changes behind it if there are any."""

    def git(*argv: str) -> str:
        return subprocess.check_output(["git", *argv], cwd=ROOT, text=True)

    commit = git("rev-parse", "HEAD").strip()
    changes = git("diff", "HEAD", "--", ".", ":!benchmarks/results")
    return commit + (f"+{hashlib.sha256(changes.encode()).hexdigest()[:8]}" if changes else "")


def describe_machine(num_threads: int | None) -> dict:
    """Return what the duration of a run depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": name[1] if name else platform.processor() or platform.machine(),
        "cores": cores,
        "threads": num_threads or cores,
        "torch": importlib.metadata.version("torch"),
        "python": platform.python_version(),
    }


def select_metrics(metrics: dict) -> dict:
    """Select the metrics of the first evaluated split: in total, by phrase type, and of the blind baselines."""
    values = next(iter(metrics["splits"].values()))
    return {
        **{name: values[name] for name in (*METRICS, *SEPARATION) if name in values},
        "per_kind": {
            kind: {name: part[name] for name in METRICS if name in part} for kind, part in values["per_kind"].items()
        },
        **{name: {key: values[name][key] for key in BOXES} for name in BASELINES if name in values},
    }


def train(recipe: str, seed: int, folder: Path, num_threads: int | None, arguments: list[str]) -> float:
    """
    Train one seed in a new folder, with further arguments of train_reftr.py, and return the minutes.

    Raises:
        subprocess.CalledProcessError: if the run fails; its output is on stderr.
    """
    shutil.rmtree(folder, ignore_errors=True)
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(num_threads)} if num_threads else {})}
    argv = ["train_reftr.py", str(find_recipe(recipe).resolve()), "--seed", str(seed), "--output_dir", str(folder)]
    argv += arguments
    start = time.monotonic()
    subprocess.run([sys.executable, *argv], cwd=ROOT, env=environment, stdout=sys.stderr, check=True)
    return (time.monotonic() - start) / 60


def read_results(path: Path, head: dict) -> list[dict]:
    """Return the runs of a file of results about the same recipe and commit."""
    results = json.loads(path.read_text()) if path.exists() else {**head, "runs": []}
    if {name: results[name] for name in head} == head:
        return results["runs"]
    sys.stderr.write(f"{len(results['runs'])} runs in {path} are of another recipe or commit and will be replaced.\n")
    return []


def check_label(label: str) -> str:
    """Validate a label, which names a folder of runs."""
    if not re.fullmatch(r"|[\w+ -][\w.+ -]*", label):
        raise argparse.ArgumentTypeError(f"{label!r} must have letters, digits, spaces and '.+-' only.")
    return label


def main():
    parser = argparse.ArgumentParser(description="Train the demo with several seeds, and collect their metrics.")
    parser.add_argument("seeds", type=int, nargs="+", metavar="seed", help="seeds to train, one after the other")
    parser.add_argument("--recipe", default="recipes/demo.yaml", help="recipe to train")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="JSON file of the results")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "demo_seeds", help="folder of the runs")
    parser.add_argument("--num_threads", type=int, help="OMP_NUM_THREADS of the runs, by default that of this process")
    parser.add_argument("--label", type=check_label, default="", help="what distinguishes these runs from the others")
    argv = sys.argv[1:]
    end = argv.index("--") if "--" in argv else len(argv)
    options, arguments = parser.parse_args(argv[:end]), argv[end + 1 :]
    num_threads = options.num_threads or int(os.environ.get("OMP_NUM_THREADS", 0)) or None
    head = {"recipe": options.recipe, "recipe_sha256": hash_recipe(options.recipe), "commit": describe_commit()}
    runs = read_results(options.output, head)
    for seed in options.seeds:
        if any((run["label"], run["seed"]) == (options.label, seed) for run in runs):
            sys.stderr.write(f"Seed {seed} is in {options.output} already.\n")
            continue
        folder = (options.runs / options.label / f"seed_{seed}").resolve()
        minutes = train(options.recipe, seed, folder, num_threads, arguments)
        runs.append(
            {
                "seed": seed,
                "label": options.label,
                "arguments": arguments,
                "minutes": round(minutes, 2),
                "machine": describe_machine(num_threads),
                "metrics": select_metrics(json.loads(RunFolder(folder).metrics.read_text())),
            }
        )
        runs.sort(key=lambda run: (run["label"], run["seed"]))
        write_file(options.output, json.dumps({**head, "runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
