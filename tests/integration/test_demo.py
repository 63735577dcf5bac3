"""The demo reaches its metrics. Takes minutes; run by `make test-all`."""

import json
import time

import pytest
from PIL import Image

from tests.helpers.tiny import ROOT


@pytest.mark.slow
def test_demo_learns_to_locate_expressions(run, tmp_path):
    start = time.monotonic()
    result = run("train_reftr.py", "recipes/demo.yaml", "--output_dir", tmp_path, timeout=1500, OMP_NUM_THREADS="2")
    minutes = (time.monotonic() - start) / 60
    (metrics,) = json.loads((tmp_path / "metrics.json").read_text())["splits"].values()
    print(f"{minutes:.1f} minutes\n{result.stdout}")
    assert metrics["num_phrases"] >= 1000
    assert metrics["accuracy@0.5"] >= 0.85
    assert min(kind["accuracy@0.5"] for kind in metrics["per_kind"].values()) >= 0.75
    assert metrics["mask_num_phrases"] == metrics["num_phrases"]
    assert metrics["mask_mean_iou"] >= 0.72
    assert metrics["per_kind"]["caption"]["mask_mean_iou"] >= 0.70
    assert metrics["mask_separation"] - metrics["mask_separation_target"] < 0.15
    assert metrics["swapped_expressions"]["accuracy@0.5"] < 0.1
    assert metrics["constant_box"]["accuracy@0.5"] < 0.2
    with Image.open(tmp_path / "predictions.png") as image:
        assert image.width > 1000

    # on another image, expressions about different objects give different boxes
    photo = tmp_path / "photo.png"
    canvas = Image.new("RGB", (64, 64), (110, 110, 110))
    canvas.paste((215, 45, 40), (6, 8, 26, 28))
    canvas.paste((45, 85, 215), (38, 36, 58, 56))
    canvas.save(photo)
    answers = json.loads(
        run(
            "-m", "reftr_cli", "predict", "--model", tmp_path, "--image", photo, "--text", "the red square",
            "the blue square",
        ).stdout
    )  # fmt: skip
    assert answers[0]["box"][0] < answers[1]["box"][0]


def test_demo_recipe_needs_no_download():
    """Name no pretrained weights in the recipe, so that nothing is downloaded."""
    recipe = (ROOT / "recipes" / "demo.yaml").read_text()
    assert "init_" not in recipe.replace("init_std", "")
    assert "tokenizer" not in recipe
