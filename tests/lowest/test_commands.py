"""
Every command runs with the lowest versions that setup.cfg allows: from the installed package, in an empty folder, in a
separate process. $LOWEST_EXTRAS names the installed extras, $LOWEST_BEFORE a folder with the last unsupported
transformers.
"""

import configparser
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from safetensors.torch import load_file


ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "helpers"))  # only the helpers: the product must be the installed one

from golden import golden_config, load_case, published_state_dict  # noqa: E402 -- needs the path above
from local_hub import HubProcess  # noqa: E402


REFTR = Path(sys.executable).parent / "reftr"
EXTRAS = os.environ.get("LOWEST_EXTRAS", "").split()
IMAGE = ROOT / "demo" / "shapes.jpg"
QUESTION = ("--image", str(IMAGE), "--text", "the red circle")
SMALL = {
    "dataset": "shapes",
    "dataset_config": {"image_size": 64, "num_train": 48, "num_validation": 9, "num_test": 10},
    "data_cache_dir": "cache",
    "image_size": 64,
    "model": {
        "backbone_config": {"backbone": "test_efficientnet_gn", "out_indices": [1, 2, 3, 4], "output_stride": 8},
        "freeze_backbone_batch_norm": False,
        "num_frozen_backbone_stages": 0,
        "max_text_positions": 64,
        "d_model": 32,
        "projection_group_norm_groups": 8,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "predict_masks": True,
        "text_config": {
            "model_type": "bert",
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 64,
        },
    },
    "num_epochs": 2,
    "batch_size": 8,
    "num_workers": 1,
    "log_every": 1,
}


def run(*command, cwd, check=True, **environment):
    """Run a command in a separate process that finds only the installed project."""
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert not check or result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lowest")


@pytest.fixture(scope="module")
def trained(folder):
    """Train a tiny model with masks for a few steps."""
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL))
    run(REFTR, "train", "small.yaml", "--output_dir", "model", "--max_steps", "4", cwd=folder)
    return folder / "model"


def test_installed_versions_are_the_lowest_declared():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    lines = settings["options"]["install_requires"].split("\n")
    for extra in EXTRAS:
        lines += settings["options.extras_require"][extra].split("\n")
    lowest = {}
    for requirement in map(Requirement, filter(None, lines)):
        (floor,) = [Version(part.version) for part in requirement.specifier if part.operator == ">="]
        lowest[requirement.name] = max(floor, lowest.get(requirement.name, floor))
    installed = {name: Version(Version(importlib.metadata.version(name)).public) for name in lowest}
    assert installed == lowest


def test_imported_product_is_the_installed_one(folder):
    found = run(sys.executable, "-c", "import train_reftr; print(train_reftr.__file__)", cwd=folder).stdout.strip()
    assert Path(found).is_relative_to(sys.prefix)


def test_train_writes_model_report_and_metrics(trained):
    assert {"model.safetensors", "README.md", "report.md", "predictions.png"} <= {
        file.name for file in trained.iterdir()
    }
    assert json.loads((trained / "metrics.json").read_text())["splits"]["test"]["num_phrases"] > 0


def test_resume_continues_at_last_step(trained, folder):
    before = load_file(trained / "model.safetensors")
    run(REFTR, "train", "small.yaml", "--output_dir", "model", "--max_steps", "6", "--resume", "auto", cwd=folder)
    steps = [json.loads(line)["step"] for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 6
    assert sorted(set(steps)) == list(range(1, 7))
    after = load_file(trained / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_predict_prints_and_draws_answer(trained, folder):
    printed = run(REFTR, "predict", "--model", "model", *QUESTION, "--output", "answer.png", cwd=folder).stdout
    (answer,) = json.loads(printed)
    assert np.isfinite(answer["box"]).all()
    assert answer["segmentation"]["size"] == [400, 400]
    assert (folder / "answer.png").is_file()


def test_convert_to_folder_and_back_keeps_weights(trained, folder):
    case = load_case("rec_bert")[0]
    weights = published_state_dict(case)
    torch.save({"model": weights, "epoch": 3}, folder / "published.pth")
    golden_config(case).save_pretrained(folder / "config")
    argv = ("--config", "config", "--no_processor", "--output_dir", "converted")
    run(REFTR, "convert", "--checkpoint", "published.pth", *argv, cwd=folder)
    run(REFTR, "convert", "--checkpoint", "converted", "--output_dir", "back", "--to_published", cwd=folder)
    (path,) = (folder / "back").glob("*.safetensors")
    back = load_file(path)
    assert len(back) > 100
    assert all(torch.equal(back[name], weights[name]) for name in back)


def test_pushed_model_answers_with_its_own_code(trained, folder, tmp_path):
    code = (
        "import json, sys; from transformers import pipeline;"
        "ground = pipeline('visual-grounding', model='someone/toy', trust_remote_code=True);"
        "print(json.dumps(ground(sys.argv[1], text=['the red circle'])[0]['box']));"
        "assert not any(name.startswith('modeling_reftr') for name in sys.modules)"
    )
    with HubProcess(folder / "hub") as hub:
        settings = hub.environment("hf_write", tmp_path)
        printed = run(REFTR, "push", "--model", "model", "--repo", "someone/toy", cwd=folder, **settings).stdout
        assert json.loads(printed)["repo"] == "someone/toy"
        answer = run(sys.executable, "-c", code, IMAGE, cwd=tmp_path, **settings).stdout
    printed = run(REFTR, "predict", "--model", "model", *QUESTION, cwd=folder).stdout
    assert list(json.loads(answer).values()) == pytest.approx(json.loads(printed)[0]["box"], abs=0.01)


@pytest.mark.parametrize("door", ["AutoConfig", "AutoProcessor", "AutoModelForZeroShotObjectDetection"])
def test_unsupported_transformers_release_is_named(trained, tmp_path, door):
    code = f"import sys; from transformers import {door}; {door}.from_pretrained(sys.argv[1], trust_remote_code=True)"
    environment = {"PYTHONPATH": os.environ["LOWEST_BEFORE"], "HF_HOME": str(tmp_path)}
    result = run(sys.executable, "-c", code, trained, cwd=tmp_path, check=False, **environment)
    found = importlib.metadata.distributions(path=[os.environ["LOWEST_BEFORE"]])
    (version,) = [distribution.version for distribution in found if distribution.name == "transformers"]
    assert f"but found transformers=={version}." in result.stderr.splitlines()[-2]
    assert "RefTR does not run on older releases: pip install --upgrade" in result.stderr.splitlines()[-1]
