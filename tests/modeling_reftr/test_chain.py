"""The published training chain in miniature: Visual Genome, boxes, masks, each started from the previous run."""

import itertools
import json

import yaml
from safetensors.torch import load_file

import data_scripts
from data_scripts.visual_genome import held_out_coco_ids
from tests.helpers.layout_refcoco import make_refcoco
from tests.helpers.layout_visual_genome import make_visual_genome
from tests.helpers.tiny import TINY_MODEL, TINY_TEXT


def test_recipe_chain_passes_weights_on_and_excludes_held_out_images(run, tmp_path):
    """Run the published recipes on files in the original layouts; a second recipe makes everything small."""
    make_visual_genome(tmp_path / "visual_genome", (581857, 100, 20, 101, 102))
    for name in ("refcoco_unc", "refcoco+_unc", "refcocog_umd"):
        make_refcoco(tmp_path / "refer", name)
    small = {
        "model": {**TINY_MODEL, "text_config": TINY_TEXT},
        "init_detr": None,
        "init_text": None,
        "data_cache_dir": str(tmp_path / "cache"),
        "image_size": 64,
        "batch_size": 2,
        "num_epochs": 2,
        "lr_drop_epochs": [1],
        "num_workers": 0,
        "num_pictures": 1,
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))

    def train(name, *arguments):
        output_dir = tmp_path / name
        recipe = f"recipes/{name}.yaml"
        run("train_reftr.py", recipe, tmp_path / "small.yaml", "--output_dir", output_dir, *arguments)
        return output_dir, json.loads((output_dir / "metrics.json").read_text())["splits"]

    pretrained, _ = train(
        "visual_genome_r50",
        *("--data_dir", tmp_path / "visual_genome", "--dataset_config.exclude_data_dir", tmp_path / "refer"),
        *("--dataset_config.validation_images", 1, "--warmup_epochs", 1),
    )
    data_arguments = ("--data_dir", tmp_path / "refer")
    boxes, metrics = train("refcoco_r50_boxes_pretrained", "--init_from", pretrained, *data_arguments)
    assert set(metrics) == {"val", "testA", "testB"}
    assert "mask_mean_iou" not in metrics["testA"]
    masks, metrics = train("refcoco_r50_masks_pretrained", "--init_from", boxes, *data_arguments)
    assert 0 <= metrics["testB"]["mask_mean_iou_resized"] <= 1
    # each run started from the weights of the previous run
    chain = [load_file(folder / "model.safetensors") for folder in (pretrained, boxes, masks)]
    names = [name for name in chain[0] if "encoder" in name and name.endswith("proj.weight")]
    assert names
    for before, after in itertools.pairwise(chain):
        assert before.keys() <= after.keys()
        assert all((before[name] - after[name]).abs().max() < 0.01 for name in names)
    # no held-out image was part of the first dataset
    rows = data_scripts.load(
        "visual_genome",
        data_dir=tmp_path / "visual_genome",
        cache_dir=str(tmp_path / "cache"),
        exclude=["refcoco_unc", "refcoco+_unc", "refcocog_umd"],
        exclude_data_dir=str(tmp_path / "refer"),
        validation_images=1,
    )
    held_out = held_out_coco_ids(["refcoco_unc", "refcoco+_unc", "refcocog_umd"], tmp_path / "refer")
    used = {data_scripts.coco_id(image_id) for split in rows.values() for image_id in split["image_id"]}
    assert held_out
    assert not used & held_out
