"""A mistyped model is one sentence at every entry point: at once for a path, within seconds for a Hub id."""

import os
import shutil
import subprocess
import sys
import time

import pytest

from modeling_reftr import RefTRConfig, RefTRForVisualGrounding, RefTRImageProcessor, RefTRPredictor, RefTRProcessor
from modeling_reftr import locating_reftr as locating
from modeling_reftr.detr_reftr import locate_weights
from reftr_cli.__main__ import main
from tests.helpers.local_hub import Hub
from tests.helpers.processes import free_port
from tests.helpers.tiny import ROOT
from training_reftr.build import local_or_hub
from training_reftr.locating import check_model


CLASSES = (RefTRConfig, RefTRForVisualGrounding, RefTRImageProcessor, RefTRPredictor, RefTRProcessor)
READERS = [*(read.from_pretrained for read in CLASSES), local_or_hub, check_model]
IMAGE = str(ROOT / "demo" / "shapes.jpg")
COMMANDS = {
    "predict": ("predict", "--image", IMAGE, "--text", "a star", "--model"),
    "demo": ("demo", "--model"),
    "export": ("export", "--output", "exported", "--model"),
    "push": ("push", "--repo", "someone/toy", "--model"),
    "push space": ("push", "--space", "someone/page", "--model"),
    "start": ("train", "demo", "--init_from"),
    "evaluate": ("train", "--eval_only", "--dataset", "shapes", "--init_from"),
    "evaluate run": ("train", "demo", "--eval_only", "--output_dir"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Work in a folder with a model in runs/demo."""
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def unreachable(monkeypatch):
    """Let requests to the Hub be refused."""
    with Hub() as hub:
        hub.use(monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{free_port()}")


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("went to the network"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


SUGGESTION = "did you mean 'runs/demo'?"
ADVICE = "give the path of a folder, or a Hub id (owner/name)."


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("runs/dmeo", SUGGESTION),
        ("./runs/dmeo", "did you mean './runs/demo'?"),
        ("./rnus/demo", "did you mean './runs/demo'?"),
        ("runs/nothing", ADVICE),
        ("~/nothing", ADVICE),
        ("a/b/c", ADVICE),
    ],
)
@pytest.mark.parametrize("read", READERS)
def test_missing_path_is_refused_without_network(folder, no_network, name, end, read):
    with pytest.raises(FileNotFoundError) as raised:
        read(name)
    assert str(raised.value) == f"There is no RefTR at '{name}': {end}"


def test_weights_of_missing_detr_are_refused_without_network(folder, no_network):
    with pytest.raises(FileNotFoundError, match=r"There is no DETR at 'runs/dmeo': did you mean 'runs/demo'\?"):
        locate_weights("runs/dmeo")


@pytest.mark.parametrize("argv", COMMANDS.values(), ids=COMMANDS)
def test_command_refuses_missing_path_without_network(folder, no_network, argv):
    with pytest.raises(SystemExit) as end:
        main([*argv, "runs/dmeo"])
    assert end.value.code == "error: There is no RefTR at 'runs/dmeo': did you mean 'runs/demo'?"


@pytest.mark.parametrize(
    "command", [("-m", "reftr_cli", *COMMANDS["predict"]), (ROOT / "train_reftr.py", *COMMANDS["evaluate"][1:])]
)
def test_command_refuses_missing_path_before_importing_torch(folder, command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0"}
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, *command, "runs/dmeo"], env=environment, capture_output=True, text=True, timeout=60
    )
    seconds = time.monotonic() - start
    assert result.stderr == "error: There is no RefTR at 'runs/dmeo': did you mean 'runs/demo'?\n"
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch, transformers.models.auto"], check=True)
    assert seconds < time.monotonic() - start


@pytest.mark.parametrize("read", READERS)
def test_hub_id_is_refused_within_seconds_if_hub_is_unreachable(folder, unreachable, read):
    start = time.monotonic()
    with pytest.raises(OSError, match=r"'rnus/demo', and http://127\.0.* cannot be reached: ") as raised:
        read("rnus/demo")
    assert time.monotonic() - start < 5
    assert str(raised.value).endswith("; did you mean 'runs/demo'?")


def test_hub_id_that_hub_does_not_have_is_one_sentence(folder, monkeypatch):
    with Hub() as hub:
        hub.use(monkeypatch)
        with pytest.raises(OSError, match=r"at 'someone/nothing', and http://.* has no such model") as raised:
            RefTRForVisualGrounding.from_pretrained("someone/nothing")
    assert "\n" not in str(raised.value)


def test_hub_id_in_cache_is_accepted_without_network(folder, no_network, monkeypatch):
    monkeypatch.setattr(locating, "is_cached", lambda name, arguments: name == "runs/cached")
    locating.check_source("runs/cached")
    with pytest.raises(FileNotFoundError):
        locating.check_source("runs/other")


def test_offline_mode_refuses_hub_id_that_is_not_cached(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="There is no tokenizer at 'someone/toy', and the Hub is not asked"):
        locating.check_source("someone/toy", what="tokenizer")


def test_find_similar_compares_each_part_of_path(folder):
    shutil.copytree(folder / "runs" / "demo", folder / "runs" / "demo2")
    assert locating.find_similar("runs/dmo") == ["runs/demo", "runs/demo2"]
    assert locating.find_similar(f"{folder}/run/demo2") == [f"{folder}/runs/demo2", f"{folder}/runs/demo"][:1]
    assert locating.find_similar("other/thing") == []
