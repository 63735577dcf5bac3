"""Reproduction of the published table from miniature user files: the authors' layout, a checkpoint, one command."""

import argparse
import json
import os
import subprocess
import sys

import pytest
import torch
from torchvision.ops import box_iou

from modeling_reftr.rle_reftr import from_coco_rle
from reftr_cli.reproduce import main, published_settings
from tests.helpers.golden import load_case, published_state_dict
from tests.helpers.layout_refcoco import make_refcoco
from tests.helpers.tiny import ROOT
from training_reftr.arguments import parse_arguments


@pytest.fixture(scope="module")
def files(tokenizer, tmp_path_factory):
    """Write the files of a user: the refer API's files, a published checkpoint with masks and a tokenizer."""
    folder = tmp_path_factory.mktemp("files")
    facts = make_refcoco(folder / "DATA")
    instances = json.loads(facts["instances_file"].read_text())
    for annotation in instances["annotations"]:
        if annotation["image_id"] == 100:  # the image of val; fractions of pixels, as in real boxes
            annotation["bbox"] = [1.7, 2.6, 30.2, 20.3]
    facts["instances_file"].write_text(json.dumps(instances))
    weights = published_state_dict(load_case("res_bert")[0])
    settings = argparse.Namespace(lr=1e-5, masks=True)
    torch.save({"model": weights, "args": settings, "epoch": 39}, folder / "refcoco.pth")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def make(*arguments, **environment):
    """Run `make` with this environment, marked as installed."""
    command = ["make", f"VENV={sys.prefix}", f"--old-file={sys.prefix}/.installed", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_make_reproduce_converts_evaluates_and_compares(files, tmp_path):
    output = tmp_path / "out"
    result = make(
        "reproduce", f"DATA={files / 'DATA'}", f"CHECKPOINT={files / 'refcoco.pth'}", f"OUTPUT={output}",
        f"TOKENIZER={files / 'tokenizer'}", HF_DATASETS_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "Assumed as published" in result.stdout
    assert f"Compared with the published metrics in {output / 'report.md'}" in result.stdout
    metrics = json.loads((output / "metrics.json").read_text())
    assert (metrics["dataset"], metrics["model"]) == ("refcoco_unc", str(output / "model"))
    assert all(values["integer_boxes"] for values in metrics["splits"].values())
    assert metrics["two_step_masks"]
    assert (metrics["evaluation_batching"], metrics["evaluation_batch_size"]) == ("published", 8)
    assert {name: values["num_phrases"] for name, values in metrics["splits"].items()} == {
        "val": 1,
        "testA": 1,
        "testB": 1,
    }
    size = json.loads((output / "model" / "processor_config.json").read_text())["image_processor"]["size"]
    assert size == {"shortest_edge": 640, "longest_edge": 640}

    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert [(line["split"], line["words"]) for line in lines] == [
        ("val", "of val"),
        ("testA", "of testA"),
        ("testB", "of testB"),
    ]
    # compared with the box truncated to integer pixels, at the original size
    answer = torch.tensor([lines[0]["pred_box_xyxy"]], dtype=torch.float64)
    assert lines[0]["iou"] == box_iou(answer, torch.tensor([[1.0, 2.0, 31.0, 22.0]])).item() > 0
    assert lines[0]["iou"] != box_iou(answer, torch.tensor([[1.7, 2.6, 31.9, 22.9]])).item()
    assert from_coco_rle(lines[0]["segmentation"]).shape == (30, 40)

    report = (output / "report.md").read_text()
    for split, boxes, masks in (("val", "85.65", "74.34"), ("testA", "88.73", "76.77"), ("testB", "81.16", "70.87")):
        values = metrics["splits"][split]
        for metric, published, name in (
            ("boxes, accuracy@0.5", boxes, "accuracy@0.5"),
            ("masks, mIoU at the resized size", masks, "mask_mean_iou_resized"),
        ):
            assert f"| {split} | {metric} | {100 * values[name]:.2f} | {published} | RefTR, ResNet-101" in report
    assert "truncated to integers, as published" in report
    assert "in the published batches, of 8 expressions" in report
    # the converted model is kept for other uses
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(output / "model"))


def test_make_reproduce_names_missing_variables():
    result = make("reproduce", "DATA=somewhere")
    assert result.returncode != 0
    assert "make reproduce requires DATA=folder CHECKPOINT=file.pth" in result.stderr


def test_reproduce_names_missing_checkpoint(tmp_path):
    with pytest.raises(OSError, match=r"none\.pth"):
        main(["--data_dir", "data", "--checkpoint", str(tmp_path / "none.pth"), "--output_dir", str(tmp_path / "out")])


def test_published_settings_fit_each_dataset():
    settings = published_settings("refcocog_umd")
    assert settings["test_splits"] == "val,test"
    args = parse_arguments([item for name, value in settings.items() for item in (f"--{name}", value)])
    assert args.data.dataset_config == {"integer_boxes": True}
    assert args.evaluation.two_step_masks
    assert (args.evaluation.evaluation_batching, args.evaluation.evaluation_batch_size) == ("published", 8)
    # its annotations are integer pixels, and it has no such flag
    assert published_settings("flickr30k_entities")["dataset_config"] == "{}"
    assert published_settings("reftr_refcoco_unc")["test_splits"] == "val,testA,testB"
    with pytest.raises(ValueError, match="'refcoco' is not a dataset; use one of shapes"):
        published_settings("refcoco")
    with pytest.raises(ValueError, match="'resc_vg' has only the splits train"):
        main(["--data_dir", "d", "--checkpoint", "c", "--dataset", "resc_vg"])
