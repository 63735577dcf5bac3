"""
Run the training script under faults: kills, signals, full disks, NaN. Every run is a process as a user starts it;
faults that cannot be caused from outside are injected by a few lines before the script.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml

from data_scripts.atomic_files import sha256_of
from tests.helpers.processes import ENVIRONMENT, ScriptProcess, free_port
from tests.helpers.tiny import ROOT, TINY_MODEL, TINY_SET, TINY_TEXT
from training_reftr.checkpoints import MANIFEST, STATE


def write_recipe(path: Path, data_cache: str, **settings) -> Path:
    """Write a recipe of 12 steps in two epochs, with dropout, so that results depend on the random state."""
    model = {**TINY_MODEL, "text_config": {**TINY_TEXT, "hidden_dropout_prob": 0.1}, "dropout": 0.1}
    recipe = {
        "dataset": "shapes",
        "dataset_config": TINY_SET,
        "data_cache_dir": data_cache,
        "image_size": 64,
        "model": model,
        "expressions_per_image": 8,
        "num_epochs": 2,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "num_workers": 0,
        "log_every": 1,
        "checkpoint_every": 1,
        "num_pictures": 0,
        **settings,
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


def start(*argv, ranks: int = 1, before: str = "", cwd=ROOT, **environment) -> subprocess.Popen | ScriptProcess:
    """Start train_reftr.py; `before` is Python code that each of its processes runs first."""
    script = ["train_reftr.py"]
    if before:
        file = Path(argv[argv.index("--output_dir") + 1]).with_suffix(".before.py")
        file.write_text(f"import runpy\n{before}\nrunpy.run_path('train_reftr.py', run_name='__main__')\n")
        script = [str(file)]
    if ranks == 1 and not environment:
        return ScriptProcess([*script, *argv], cwd, merge=True)
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(free_port())]
    return subprocess.Popen(
        [*command, *script, *map(str, argv)],
        cwd=cwd,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen | ScriptProcess, timeout: float = 300, expected: int | None = 0) -> str:
    """Wait for a run and return its output. A run that hangs is killed with all its processes."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    if expected is not None and process.returncode != expected:
        raise RuntimeError(f"exit code {process.returncode}, expected {expected}:\n{output}")
    return output


def kill(process: subprocess.Popen | ScriptProcess):
    """Kill a run with all its processes, like a power failure."""
    processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in processes:  # one by one, because the launcher's children have separate process groups
        each.kill()
    psutil.wait_procs(processes[1:])
    process.communicate()


def wait_for(condition, process: subprocess.Popen | ScriptProcess, seconds: float = 120):
    """Wait until a condition is met while a process runs."""
    limit = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > limit:
            raise RuntimeError(f"The run ended or took too long:\n{process.communicate(timeout=10)[0]}")
        time.sleep(0.002)


def steps_of(output_dir: Path) -> list[int]:
    """Return the steps of the existing checkpoints, the latest first."""
    found = (Path(output_dir) / "checkpoints").glob("step_*")
    return sorted((int(path.name.removeprefix("step_")) for path in found), reverse=True)


def losses_of(output_dir: Path) -> dict[int, dict]:
    """Return step -> the metrics of training that do not depend on time, and the metrics of validation."""
    found = {}
    for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        timed = ("time", "per_second", "per_update", "memory_gb")
        found.setdefault(record["step"], {}).update(
            {name: value for name, value in record.items() if not name.endswith(timed)}
        )
    return found


def write_manifest(path: Path):
    """Write the manifest of a checkpoint for its current files."""
    files = [file for file in sorted(path.iterdir()) if file.name != MANIFEST]
    (path / MANIFEST).write_text(json.dumps({file.name: [file.stat().st_size, sha256_of(file)] for file in files}))


def change_state(path: Path, **changes):
    """Change fields of a checkpoint's state; the value `...` removes a field."""
    values = {**json.loads((path / STATE).read_text()), **changes}
    (path / STATE).write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))
    write_manifest(path)
