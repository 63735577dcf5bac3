"""What the README shows is what there is: its Python runs, its figures are the committed ones, its files exist."""

import json
import os
import re
import shlex
import shutil

import numpy as np
import torch
from layout_refcoco import make_refcoco
from layout_visual_genome import make_visual_genome
from PIL import Image

from benchmarks.quote_results import quote
from conftest import ROOT
from golden import GOLDEN, load_case, published_state_dict
from modeling_reftr import RefTRForVisualGrounding, convert_reftr_checkpoint
from training_reftr.arguments import parse_arguments


README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def detr_keys(shapes):
    """A published RefTR's keys that come from DETR, under DETR's names, with their shapes; and one that is left."""
    for key, shape in shapes.items():
        if key.startswith(("img_backbone.0.", "vl_transformer.encoder.")):
            yield key.replace("img_backbone", "backbone").replace("vl_transformer", "transformer"), shape
    yield "query_embed.weight", [100, 256]


def test_figures_are_the_committed_results():
    assert "| all expressions |" in README
    assert quote(README) == README


def test_python_runs(trained, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained[0], tmp_path / "runs" / "demo")
    # as the demo's, with masks
    RefTRForVisualGrounding.from_pretrained(trained[0], predict_masks=True).save_pretrained(tmp_path / "runs" / "demo")
    os.symlink(ROOT / "metrics", tmp_path / "metrics")
    Image.fromarray(np.full((90, 150, 3), 99, np.uint8)).save(tmp_path / "photo.jpg")
    make_refcoco(tmp_path / "data")
    make_refcoco(tmp_path / "data", "refcocog_umd")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    shapes = json.loads((GOLDEN / "full_size_keys.json").read_text())["rec_resnet50_bert"]
    torch.save({"model": {key: torch.zeros(shape) for key, shape in detr_keys(shapes)}}, "detr-r50-e632da11.pth")
    # those of graphs and of eight bits are with their tests
    code = [block for block in blocks("python") if "ExportedModel" not in block and "torchao" not in block]
    assert len(code) == 8
    names = {}
    for block in code:
        exec(block, names)
    printed = capsys.readouterr().out
    assert "'boxes': tensor(" in printed
    assert "'score': 1.0, 'label': 'the red circle'" in printed
    assert "torch.Size([1, 90, 150])" in printed
    assert "\n0.8\n" in printed
    assert names["inputs"]["phrase_spans"].shape == (1, 2, 2)
    assert names["rows"][0]["sentences"][0]["text"] in printed
    assert len(names["joined"]) > len(names["rows"])
    assert "337 weights taken, left: ['query_embed.weight']" in printed


def test_published_weights_are_converted(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    published = published_state_dict(load_case("rec_bert")[0])
    torch.save({"model": published}, "refcoco.pth")
    tokenizer.save_pretrained("bert-base-uncased")
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines if "convert" in line or "python -c" in line]
    for _, option, code, *arguments in commands:
        if option == "-m":
            assert code == "modeling_reftr.convert_reftr_checkpoint"
            convert_reftr_checkpoint.main(arguments)
        else:
            exec(code, {})
    assert len(commands) == 3
    back = torch.load("back.pth", weights_only=True)["model"]
    assert back.keys() == published.keys()
    assert all(torch.equal(back[key], value) for key, value in published.items())


def test_data_commands_run(run, tmp_path):
    make_refcoco(tmp_path / "data")
    make_refcoco(tmp_path / "data", "refcocog_umd")
    make_visual_genome(tmp_path / "visual_genome")
    (tmp_path / "mine").mkdir()
    Image.new("RGB", (200, 100)).save(tmp_path / "mine" / "1.jpg")
    (line,) = blocks("json")
    (tmp_path / "mine" / "train.jsonl").write_text(line)
    commands = [line for block in blocks("bash") for line in block.splitlines() if "-m data_scripts" in line]
    assert len(commands) == 9
    for command in commands:
        words = shlex.split(command, comments=True)
        cache = {"HF_DATASETS_CACHE": tmp_path / "cache"}
        run(*words[1:], cwd=tmp_path, PYTHONPATH=str(ROOT), **{name: str(path) for name, path in cache.items()})
    assert (tmp_path / "samples.png").exists()
    assert list((tmp_path / "exported" / "data").glob("train-*.parquet"))
    assert len(json.loads((tmp_path / "held_out.json").read_text())["coco_ids"]) > 0


def test_commands_name_what_there_is():
    commands = [line for block in blocks("bash") for line in block.replace("\\\n", "").splitlines()]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for command in commands:
        if command.startswith("make "):
            assert command.split()[1] in targets, command
        if "train_reftr.py" in command:
            words = shlex.split(command.split("train_reftr.py")[1], comments=True)
            parse_arguments([str(ROOT / words[0]), *(word for word in words[1:] if word != "--print_config")])
    assert len(commands) >= 6


def test_links_and_pictures_exist():
    paths = [path for path in re.findall(r"\]\(([^)]+)\)", README) if "://" not in path]
    assert paths
    for path in paths:
        assert (ROOT / path).exists(), path
