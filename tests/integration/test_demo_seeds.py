"""The demo's seeds are trained, resumed, and quoted with their worst value."""

import json
import math

import numpy as np
import pytest
import yaml

from benchmarks import quote_results
from benchmarks.demo_seeds import hash_recipe
from benchmarks.own_images import BACKGROUNDS, SHAPE_ALONE, SIZES, ask, ask_by_shape, draw_image
from benchmarks.quote_results import (
    quote,
    seeds_of,
    table_of_mask_conditioning,
    table_of_own_images,
    table_of_seeds,
    table_of_splits,
    table_of_summary,
)
from tests.helpers.tiny import ROOT


@pytest.fixture
def short_recipe(recipe, tmp_path):
    """Write a recipe of two optimizer steps of a tiny model with masks."""
    values = yaml.safe_load(recipe.read_text())
    values["max_steps"] = 2
    values["model"]["predict_masks"] = True
    path = tmp_path / "short.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def train_seeds(run, tmp_path, recipe, *argv, arguments=()):
    """Run the script, with arguments for the training script, and return its results and its messages."""
    flags = ("--recipe", recipe, "--output", tmp_path / "seeds.json", "--runs", tmp_path / "runs", "--num_threads", 1)
    result = run("benchmarks/demo_seeds.py", *argv, *flags, *arguments, PYTHONPATH=str(ROOT))
    return json.loads((tmp_path / "seeds.json").read_text()), result.stderr


@pytest.mark.slow
def test_two_seeds_are_trained_collected_and_not_repeated(run, short_recipe, tmp_path):
    results, _ = train_seeds(run, tmp_path, short_recipe, 4, 3)
    assert results["recipe_sha256"] == hash_recipe(str(short_recipe))
    assert len(results["commit"].partition("+")[0]) == 40
    assert [(entry["seed"], entry["label"]) for entry in results["runs"]] == [(3, ""), (4, "")]
    for entry in results["runs"]:
        assert yaml.safe_load((tmp_path / "runs" / f"seed_{entry['seed']}" / "recipe.yaml").read_text())["seed"] in (
            3,
            4,
        )
        (split,) = json.loads((tmp_path / "runs" / f"seed_{entry['seed']}" / "metrics.json").read_text())[
            "splits"
        ].values()
        metrics = entry["metrics"]
        for name in ("accuracy@0.5", "mean_iou", "mask_mean_iou", "mask_separation", "mask_separation_target"):
            assert metrics[name] == split[name]
        assert metrics["per_kind"].keys() == {"attribute", "caption", "place", "relation"}
        assert metrics["per_kind"]["place"]["mask_mean_iou"] == split["per_kind"]["place"]["mask_mean_iou"]
        assert metrics["constant_box"]["accuracy@0.5"] == split["constant_box"]["accuracy@0.5"]
        assert entry["minutes"] > 0
        assert entry["machine"]["threads"] == 1
        assert entry["machine"].keys() == {"cpu", "cores", "threads", "torch", "python"}
    assert "worst" in table_of_seeds(results)

    marker = tmp_path / "runs" / "seed_3" / "kept"
    marker.touch()
    again, messages = train_seeds(run, tmp_path, short_recipe, 3, 4)
    assert again == results
    assert "Seed 3 is in" in messages
    assert marker.exists()


@pytest.mark.slow
def test_runs_of_another_recipe_are_replaced(run, short_recipe, tmp_path):
    old = {"recipe": str(short_recipe), "recipe_sha256": "0", "commit": "0", "runs": [{"seed": 3, "label": ""}]}
    (tmp_path / "seeds.json").write_text(json.dumps(old))
    arguments = ["--max_steps", "1"]
    label = ("--label", "other torch")
    results, messages = train_seeds(run, tmp_path, short_recipe, 3, *label, arguments=("--", *arguments))
    assert "1 runs in" in messages
    assert [(entry["seed"], entry["label"]) for entry in results["runs"]] == [(3, "other torch")]
    assert results["runs"][0]["arguments"] == arguments
    assert yaml.safe_load((tmp_path / "runs" / label[1] / "seed_3" / "recipe.yaml").read_text())["max_steps"] == 1
    assert (tmp_path / "runs" / "other torch" / "seed_3" / "metrics.json").exists()


def test_hash_of_recipe_follows_inherited_settings_not_comments(tmp_path):
    (tmp_path / "base.yaml").write_text("seed: 1\n")
    (tmp_path / "heir.yaml").write_text("inherit: base.yaml\nnum_epochs: 2\n")
    first = hash_recipe(str(tmp_path / "heir.yaml"))
    (tmp_path / "heir.yaml").write_text("# a comment\ninherit: base.yaml\nnum_epochs: 2\n")
    assert hash_recipe(str(tmp_path / "heir.yaml")) == first
    (tmp_path / "base.yaml").write_text("seed: 2\n")
    assert hash_recipe(str(tmp_path / "heir.yaml")) != first


def result_of(seed, accuracy, label="", swapped=0.1, separation=0.2):
    """Return an entry of the file of results."""
    boxes = {"accuracy@0.5": accuracy, "mean_iou": accuracy / 2, "num_phrases": 9}
    baseline = {"accuracy@0.5": swapped, "mean_iou": swapped, "num_phrases": 9}
    metrics = {
        **boxes,
        "mask_mean_iou": accuracy / 4,
        "mask_separation": separation,
        "mask_separation_target": 0.01,
        "per_kind": {"place": {**boxes, "mask_mean_iou": accuracy / 4}},
        "constant_box": baseline,
        "swapped_expressions": baseline,
    }
    machine = {"cpu": "a CPU", "cores": 2, "threads": 2, "torch": "2.9", "python": "3.11"}
    return {"seed": seed, "label": label, "minutes": 6.0 + seed / 10, "machine": machine, "metrics": metrics}


RESULTS = {
    "runs": [
        result_of(0, 0.8),
        result_of(1, 0.6, swapped=0.3, separation=0.4),
        result_of(2, 0.7),
        result_of(0, 0.5, label="old torch"),
    ]
}


def test_table_of_seeds_puts_worst_value_first():
    text = table_of_seeds(RESULTS)
    rows = {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:]
        for line in text.splitlines()
        if "|" in line
    }
    assert rows["all expressions"] == [
        "**0.600** / 0.700 / 0.800",
        "**0.300** / 0.350 / 0.400",
        "**0.150** / 0.175 / 0.200",
        "9",
    ]
    assert rows["place"][0] == "**0.600** / 0.700 / 0.800"
    # of a baseline the highest value is the worst
    assert rows["expressions swapped between objects"][0] == "**0.300** / 0.167 / 0.100"
    assert "3 runs with the seeds 0, 1, 2" in text
    assert "Each run took 6.0 to 6.2 minutes with 2 threads on 2 cores (a CPU), torch 2.9." in text
    assert "have a mean IoU of **0.400** / 0.267 / 0.200; that of the annotated masks is 0.010." in text
    assert "old torch, accuracy of all expressions: **0.500** / 0.500 / 0.500." in text


def test_table_of_mask_conditioning_compares_labels():
    runs = [result_of(0, 0.8, "attention", separation=0.5), result_of(1, 0.6, "attention"), result_of(0, 0.4, "add")]
    for run in runs:
        run["metrics"]["per_kind"]["caption"] = {"mask_mean_iou": run["metrics"]["accuracy@0.5"] / 8}
    first, _, attention, add = table_of_mask_conditioning({"runs": runs}).splitlines()
    assert first.split(" | ")[-2:] == ["of captions", "mask separation |"]
    assert attention.split(" | ") == [
        "| `attention`",
        "**0.600** / 0.700 / 0.800",
        "**0.150** / 0.175 / 0.200",
        "**0.075** / 0.087 / 0.100",
        "**0.500** / 0.350 / 0.200 |",
    ]
    assert "**0.400** / 0.400 / 0.400" in add


def test_table_of_splits_names_each_of_several():
    first, second = result_of(0, 0.8)["metrics"], result_of(0, 0.4)["metrics"]
    assert "`test`" not in table_of_splits({"test": first})
    text = table_of_splits({"test": first, "unseen": second})
    assert "| all expressions | 0.800 |" in text[text.index("`test`:") : text.index("`unseen`:")]
    assert "| all expressions | 0.400 |" in text[text.index("`unseen`:") :]


def test_summary_quotes_worst_values_and_every_split(tmp_path, monkeypatch):
    monkeypatch.setattr(quote_results, "RESULTS", tmp_path)
    splits = {"test": result_of(0, 0.9)["metrics"], "unseen": result_of(0, 0.4)["metrics"]}
    sizes = {"square": {"accuracy@0.5": 0.9}, "1:2": {"accuracy@0.5": 0.85}, "shape alone": {"accuracy@0.5": 0.3}}
    files = {
        "demo/seeds.json": RESULTS,
        "demo/own_images.json": {"seed_0": sizes, "seed_1": {"1:2": {"accuracy@0.5": 0.8}}},
        "newcomer.json": {"seconds": {"all": 630}, "machine": {"cores": 2}},
        "shapes_small/metrics.json": {"splits": {"test": splits["test"]}},
        "openmoji/metrics.json": {"splits": splits},
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    text = table_of_summary()
    assert "of 3 seeds | **0.600** / 0.700 / 0.800 | **0.150** / 0.175 / 0.200 |" in text
    assert "| expressions swapped between objects | **0.300** / 0.167 / 0.100 |  |" in text
    assert "the worst | 0.800 |" in text
    assert "openmoji.yaml`, split `unseen`, one run | 0.400 | 0.100 |" in text
    assert "10.5 minutes on 2 cores" in text


def test_seeds_are_quoted_in_place_of_single_run(tmp_path, monkeypatch):
    monkeypatch.setattr(quote_results, "RESULTS", tmp_path)
    (tmp_path / "demo").mkdir()
    single = json.loads((ROOT / "benchmarks" / "results" / "shapes_small" / "metrics.json").read_text())
    (tmp_path / "demo" / "metrics.json").write_text(json.dumps(single))
    document = "<!-- demo results -->\n<!-- end of demo results -->\n"
    assert "**" not in quote(document)
    (tmp_path / "demo" / "seeds.json").write_text(json.dumps({"runs": RESULTS["runs"][-1:]}))
    assert "**" not in quote(document)  # all runs are labelled
    (tmp_path / "demo" / "seeds.json").write_text(json.dumps(RESULTS))
    assert table_of_seeds(RESULTS) in quote(document)


def test_committed_seeds_are_of_current_recipe():
    path = seeds_of("demo")
    if not path.exists():
        pytest.skip("no seeds are committed")
    results = json.loads(path.read_text())
    assert results["recipe"] == "recipes/demo.yaml"
    assert results["recipe_sha256"] == hash_recipe(str(ROOT / "recipes" / "demo.yaml"))
    assert "+" not in results["commit"]  # no uncommitted changes


@pytest.mark.slow
def test_own_images_of_every_size_are_measured(run, trained, tmp_path):
    output = tmp_path / "own_images.json"
    run("benchmarks/own_images.py", "--model", trained[0], "--num_images", 2, "--output", output, PYTHONPATH=str(ROOT))
    results = json.loads(output.read_text())
    (sizes,) = results.values()
    assert list(sizes) == [*SIZES, SHAPE_ALONE]
    assert sizes.pop(SHAPE_ALONE)["images"] == 2 * len(SIZES)
    assert all(row["images"] == 2 and row["expressions"] >= 12 for row in sizes.values())
    better = {name: {"accuracy@0.5": 1.0} for name in sizes}
    lines = table_of_own_images({**results, "better": better}).splitlines()
    worst, mean = sizes["square"]["accuracy@0.5"], (sizes["square"]["accuracy@0.5"] + 1) / 2
    assert lines[2].startswith(f"| worst | {worst:.3f} |")
    assert lines[3].startswith(f"| mean | {mean:.3f} |")


def test_own_images_have_boxes_of_drawn_objects():
    for number in range(20):
        image, objects = draw_image(np.random.default_rng(number), 300, 200)
        pixels = np.asarray(image).astype(int)
        (ground,) = (color for color in BACKGROUNDS if (pixels == color).all(axis=-1).mean() > 0.3)
        is_drawn = (pixels != ground).any(axis=-1)
        for item in objects:
            left, top, right, bottom = item["box"]
            inside = (slice(math.floor(top), math.ceil(bottom) + 1), slice(math.floor(left), math.ceil(right) + 1))
            assert is_drawn[inside].mean() > 0.25
            is_drawn[inside] = False
        assert not is_drawn.any(), "nothing is drawn outside the boxes"
        assert {box for _, box in ask(objects)} == {item["box"] for item in objects}


def test_own_images_are_asked_for_by_shape_where_one_object_has_it():
    objects = [
        {"shape": shape, "box": (left, 0, left + 9, 9)} for left, shape in enumerate(("star", "circle", "star"))
    ]
    assert ask_by_shape(objects) == [("the circle", (1, 0, 10, 9))]
