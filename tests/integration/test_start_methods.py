"""Threads and start methods of loader processes give bit-identical results without needless starts."""

import itertools
import json
import multiprocessing
from multiprocessing.process import BaseProcess

import psutil
import pytest
import torch
import yaml

from tests.data_scripts.test_data_flow import assert_same
from tests.helpers.processes import run_process, start_server
from tests.helpers.tiny import ROOT, trials
from training_reftr.data import EvaluationData, TrainingData
from training_reftr.settings import TrainingSettings


NUM_WORKERS = 2
NUM_EPOCHS = 3
# worker starts of: training, validation and report; report alone; one pipeline call
STARTS = {"train": 3 * NUM_WORKERS, "evaluate": NUM_WORKERS, "ask": NUM_WORKERS}
MATRIX = list(itertools.product(("fork", "forkserver", "spawn"), ("thread", "main"), (NUM_WORKERS, 0)))


@pytest.fixture(scope="session")
def long_recipe(recipe, tmp_path_factory):
    """Write a recipe with masks, dropout, several evaluations and a report on two splits."""
    settings = yaml.safe_load(recipe.read_text())
    settings |= {"num_epochs": NUM_EPOCHS, "batch_size": 24, "num_pictures": 0, "test_splits": "test,validation"}
    settings["model"] |= {"predict_masks": True, "dropout": 0.1}
    path = tmp_path_factory.mktemp("recipe") / "long.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def run_case(method, thread, num_workers, recipe, folder) -> dict:
    """Run one case in a separate process and return its report."""
    argv = ["-m", "tests.helpers.start_methods", method, thread, num_workers, recipe, folder]
    result = run_process(argv, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("The run is not in the main thread") == (thread == "thread")
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def expected(long_recipe, tmp_path_factory):
    """Return the results without workers in the main thread."""
    folder = tmp_path_factory.mktemp("expected") / "run"
    return run_case("fork", "main", 0, long_recipe, folder)["results"]


@pytest.mark.row("S15")
@pytest.mark.parametrize("trial", trials(len(MATRIX), short=1))
def test_results_are_independent_of_thread_and_start_method(long_recipe, expected, tmp_path, trial, record_property):
    method, thread, num_workers = MATRIX[trial]
    answer = run_case(method, thread, num_workers, long_recipe, tmp_path / "run")
    good = [
        json.dumps(answer["results"][name]["result"]) == json.dumps(expected[name]["result"])
        and answer["results"][name]["starts"] == (STARTS[name] if num_workers else 0)
        and answer["results"][name]["left"] == 0
        for name in STARTS
    ]
    record_property("counted", (sum(good), len(good)))
    assert all(good), good
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in answer["children"] if psutil.pid_exists(pid)], 10)
    assert not alive  # the server processes of the start methods end with their parent


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_evaluation_data_starts_its_workers_once(shapes, processor, method, monkeypatch):
    start_server()
    before = multiprocessing.get_start_method()
    starts, start = [], BaseProcess.start
    monkeypatch.setattr(BaseProcess, "start", lambda process: (starts.append(process.name), start(process))[1])
    splits = {name: shapes[name].select(range(4)) for name in ("validation", "test")}
    data = [
        EvaluationData(
            splits, processor, TrainingSettings.from_flat(num_workers=number, evaluation_batch_size=2), 0, 1
        )
        for number in (0, NUM_WORKERS)
    ]
    multiprocessing.set_start_method(method, force=True)
    try:
        for split in ("test", "validation", "test"):
            alone, shared = (list(part.batches(split)) for part in data)
            assert len(alone) == 2
            assert_same(alone, shared)
        next(iter(data[1].batches("test")))  # an evaluation that is not finished
        assert_same(data[1].batches("validation"), data[0].batches("validation"))
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert len(starts) == NUM_WORKERS


def test_data_loading_leaves_global_rng_unchanged(shapes, processor):
    for number in (0, NUM_WORKERS):
        args = TrainingSettings.from_flat(num_workers=number, batch_size=2)
        torch.manual_seed(3)
        state = torch.get_rng_state()
        for _ in range(2):
            next(iter(EvaluationData({"test": shapes["test"]}, processor, args, 0, 1).batches("test")))
            next(TrainingData(shapes["train"], processor, args, 0, 1).batches(0))
        assert torch.equal(torch.get_rng_state(), state)


def test_script_runs_outside_main_thread(tmp_path):
    script = tmp_path / "executor.py"
    script.write_text(
        "import runpy, sys\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "sys.argv = ['train_reftr.py', '--help']\n"
        "def work():\n"
        "    try:\n"
        f"        runpy.run_path({str(ROOT / 'train_reftr.py')!r}, run_name='__main__')\n"
        "    except SystemExit as error:\n"
        "        return error.code\n"
        "with ThreadPoolExecutor(1) as threads:\n"
        "    sys.stdout.write(f'ended with {threads.submit(work).result()}')\n"
    )
    assert run_process([script]).stdout.endswith("ended with None")
