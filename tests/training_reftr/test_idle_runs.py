"""A run in which a requested part of the model cannot learn is refused before it writes anything."""

import json
import logging

import datasets
import pytest
import yaml

import train_reftr
from tests.helpers.faults import free_port
from training_reftr.preflight import count_labels, find_unfinished_warmup, refuse_empty_splits, refuse_missing_labels
from training_reftr.settings import DataSettings, TrainingSettings
from training_reftr.streams import StreamedRows


FROZEN_HEAD = ["--model.predict_masks", "true", "--mask_head_learning_rate", "0"]
ZERO_LEARNING_RATES = ["--learning_rate", "0", "--backbone_learning_rate", "0", "--text_learning_rate", "0"]


def change(rows, *, sentences=None, segmentation=None):
    """Return rows with fewer sentences or fewer segmentations, without decoding the images."""

    def changed(row, index):
        if sentences is not None:
            row["sentences"] = row["sentences"][:sentences]
        if segmentation is not None and not segmentation(index):
            row["objects"] = [{**item, "segmentation": None} for item in row["objects"]]
        return row

    rows = rows.cast_column("image", datasets.Image(decode=False))
    return rows.map(changed, with_indices=True, features=rows.features, load_from_cache_file=False)


@pytest.fixture(scope="module")
def folders(shapes, tmp_path_factory):
    """Write one folder of Parquet files per defect, as `reftr data export` does."""
    found = {}
    parts = {
        "no masks": {"segmentation": lambda index: False},
        "some masks": {"segmentation": lambda index: index % 3 == 0},
        "no sentences": {"sentences": 0},
        "no phrases": {},
        "no validation": {},
    }
    for name, changes in parts.items():
        found[name] = tmp_path_factory.mktemp(name.replace(" ", "_"))
        for split, rows in shapes.items():
            part = change(rows, **changes) if split == "train" else rows
            if name == "no phrases" and split == "train":
                bare = [{**item, "phrases": []} for item in rows[0]["sentences"]]
                part = change(rows).map(lambda row, bare=bare: {**row, "sentences": bare}, features=part.features)
            if (name, split) == ("no validation", "validation"):
                part = rows.select([])
            part.to_parquet(found[name] / f"{split}.parquet")
    return found


def argv_of_folder(folder):
    """Return the arguments that train on a folder of Parquet files."""
    return ["--dataset", str(folder), "--dataset_config", "null"]


def assert_refused(recipe, tmp_path, message, *argv):
    """Assert that a run is refused with a message, before it writes or pushes anything."""
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        # a request to the Hub would come first and fail offline with an OSError
        train_reftr.main([str(recipe), "--output_dir", str(folder), "--push_to_hub", "someone/nothing", *argv])
    assert not folder.exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--gradient_accumulation_steps", "7"],
            r"6 batches .* fewer than gradient_accumulation_steps=7, so",
        ),
        (["--gradient_accumulation_steps", "7", "--dry_run"], "no optimizer step could be taken"),
        (["--gradient_accumulation_steps", "2", "--batch_size", "40"], r"An epoch has 1 batches \(batch_size=40"),
        (["--batch_size", "49"], "48 training samples do not fill one global batch of 49"),
        (["--max_steps", "5", "--gradient_accumulation_steps", "100"], "no optimizer step could be taken"),
        (ZERO_LEARNING_RATES, r"stay random in .*backbone \(backbone_learning_rate=0\).*box_head \(learning_rate=0\)"),
        (["--learning_rate", "0"], r"stay random in .*encoder \(learning_rate=0\), decoder"),
        (["--backbone_learning_rate", "0"], r"stay random in backbone \(backbone_learning_rate=0\)\."),
        (["--text_learning_rate", "0"], r"stay random in text_backbone \(text_learning_rate=0\)\."),
        (FROZEN_HEAD, r"stay random in mask_head \(mask_head_learning_rate=0\)\."),
        (["--model", "{predict_masks: true, freeze_grounding: true}"], r"backbone \(model.freeze_grounding=True\)"),
        (["--model.num_frozen_backbone_stages", "4"], r"backbone \(model.num_frozen_backbone_stages=4\)"),
        (["--model.bbox_loss_coefficient=0", "--model.giou_loss_coefficient=0"], "The boxes would learn nothing"),
        (
            ["--model", "{predict_masks: true, mask_loss_coefficient: 0, dice_loss_coefficient: 0}"],
            "The masks would learn nothing, because model.mask_loss_coefficient=0 and model.dice_loss_coefficient=0",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_run_with_settings_that_learn_nothing_is_refused(recipe, tmp_path, argv, message):
    assert_refused(recipe, tmp_path, message, *argv)


@pytest.mark.parametrize("streaming", ["false", "true"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no masks", "no sentence of train_split='train' has a mask for all of its phrases"),
        ("no sentences", "No row of the training split has a sentence"),
        ("no phrases", "No sentence of train_split='train' has a phrase that names an object"),
    ],
)
def test_run_on_data_without_labels_is_refused(recipe, folders, tmp_path, name, message, streaming):
    argv = (*argv_of_folder(folders[name]), "--streaming", streaming, "--model.predict_masks", "true")
    assert_refused(recipe, tmp_path, message, *argv, "--data_cache_dir", str(tmp_path / "cache"))


def test_run_with_empty_split_is_refused(recipe, folders, shapes, tmp_path):
    argv = (*argv_of_folder(folders["no validation"]), "--data_cache_dir", str(tmp_path / "cache"), "--streaming")
    message = r"The split 'validation' of '.*' has no rows: '.*validation\.parquet' is empty\. Fill or remove it\."
    for streaming in ("true", "false"):
        assert_refused(recipe, tmp_path, message, *argv, streaming)
    empty = {**shapes, "validation": shapes["validation"].select([])}
    message = "validation_split='validation' of shapes has no rows: there is nothing to choose the best model by"
    with pytest.raises(ValueError, match=message):
        refuse_empty_splits(empty, DataSettings())
    empty = {**shapes, "train": shapes["train"].select([])}
    with pytest.raises(ValueError, match="train_split='train' of shapes has no rows: there is nothing to learn from"):
        refuse_empty_splits(empty, DataSettings())
    refuse_empty_splits(empty, DataSettings(train_split="train+test"))


def test_run_may_freeze_loaded_parts_but_not_new_ones(trained, recipe, tmp_path):
    """Allow a learning rate of zero for loaded parts, but neither for all of them nor for a new head."""
    argv = ["--init_from", str(trained[0]), "--model.predict_masks", "true"]
    assert_refused(
        recipe, tmp_path, r"stay random in mask_head \(", *argv, *ZERO_LEARNING_RATES, "--mask_head_learning_rate", "0"
    )
    assert_refused(
        recipe, tmp_path, "Nothing would be learned: ", "--init_from", str(trained[0]), *ZERO_LEARNING_RATES
    )
    argv += ["--max_steps", "1", "--num_pictures", "0", "--output_dir", str(tmp_path / "masks")]
    assert train_reftr.main([str(recipe), *argv, *ZERO_LEARNING_RATES]) == 0
    assert (tmp_path / "masks" / "model.safetensors").exists()


def test_resume_with_zero_learning_rates_is_refused(trained, recipe, tmp_path):
    with pytest.raises(ValueError, match="Nothing would be learned: "):
        train_reftr.main([str(recipe), "--output_dir", str(trained[0]), "--resume", "auto", *ZERO_LEARNING_RATES])


def test_run_with_some_masks_trains_and_counts_missing(recipe, folders, shapes, tmp_path, caplog):
    rows = change(shapes["train"], segmentation=lambda index: index % 3 == 0)
    num_sentences = sum(map(len, shapes["train"]["sentences"]))
    num_masked = sum(len(row["sentences"]) for index, row in enumerate(rows) if index % 3 == 0)
    assert count_labels(rows, with_masks=True) == (num_sentences, num_masked)
    assert count_labels(rows.select(range(1, 48, 2)), with_masks=True) == (
        sum(len(rows[index]["sentences"]) for index in range(1, 48, 2)),
        sum(len(rows[index]["sentences"]) for index in range(3, 48, 6)),
    )
    assert count_labels(shapes["train"], with_masks=True) == (num_sentences, num_sentences)
    argv = [*argv_of_folder(folders["some masks"]), "--data_cache_dir", str(tmp_path / "cache")]
    argv += ["--model.predict_masks", "true", "--max_steps", "1", "--num_pictures", "0"]
    with caplog.at_level(logging.WARNING):
        train_reftr.main([str(recipe), *argv, "--output_dir", str(tmp_path / "run")])
    assert f"{num_sentences - num_masked:,} of {num_sentences:,} training sentences have no mask" in caplog.text


def test_count_labels_requires_mask_for_every_phrase(shapes):
    """Require a mask of the first object of each phrase, which is the target."""
    features = shapes["train"].features
    segmentation = {"size": [1, 1], "counts": "0"}
    objects = [
        {
            "object_id": str(number),
            "box": [0, 0, 1, 1],
            "boxes": [[0, 0, 1, 1]],
            "category": "",
            "segmentation": segmentation if number else None,
        }
        for number in range(3)
    ]

    def sentence(*phrases):
        spans = [{"start": 0, "end": 1, "objects": list(indices), "types": []} for indices in phrases]
        return {"sentence_id": "s", "text": "a", "phrases": spans}

    def row(*sentences):
        known = {"image_id": "i", "width": 1, "height": 1, "objects": objects, "sentences": sentences}
        return dict.fromkeys(features) | known

    rows = [row(sentence((1,), (0, 1))), row(), row(sentence((1, 2), (2,)), sentence((0,))), row(sentence())]
    built = datasets.Dataset.from_list(rows, features=features)
    assert count_labels(built, with_masks=True) == (3, 1)
    assert count_labels(built.select([0, 1, 3]), with_masks=True) == (1, 0)
    args = TrainingSettings.from_flat()
    assert (
        refuse_missing_labels(built, args.data, True)
        == "2 of 3 training sentences have no mask and train the boxes alone."
    )
    assert refuse_missing_labels(built, args.data, False) is None
    without_masks = built.select([0, 1, 3])
    for part in (without_masks, StreamedRows.of(without_masks.to_iterable_dataset())):
        with pytest.raises(ValueError, match="has a mask for all of its phrases"):
            refuse_missing_labels(part, args.data, True)
    assert refuse_missing_labels(StreamedRows.of(built.to_iterable_dataset()), args.data, True) is None


def test_run_warns_of_unfinished_warmup(recipe, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train_reftr.main(
            [
                str(recipe),
                "--output_dir",
                str(tmp_path),
                "--max_steps",
                "1",
                "--warmup_steps",
                "9",
                "--num_pictures",
                "0",
            ]
        )
    assert "The warm-up of 9 steps is not over when the run ends after 1" in caplog.text


@pytest.mark.slow
def test_idle_run_on_two_processes_is_refused_on_both(run, recipe, folders, tmp_path):
    settings = yaml.safe_load(recipe.read_text()) | {"model": {**yaml.safe_load(recipe.read_text())["model"]}}
    path = tmp_path / "masks.yaml"
    path.write_text(yaml.safe_dump(settings | {"data_cache_dir": str(tmp_path / "cache")}))
    for argv, message in (
        (["--gradient_accumulation_steps", "4"], r"3 batches (batch_size=8, 2 processes)"),
        ([*argv_of_folder(folders["no masks"]), "--model", json.dumps({"predict_masks": True})], "has a mask for all"),
    ):
        result = run(
            "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port(), "train_reftr.py",
            path, "--output_dir", tmp_path / "run", *argv, check=False, timeout=120,
        )  # fmt: skip
        assert result.returncode != 0
        assert result.stderr.count(message) >= 2
        assert not (tmp_path / "run").exists()


def test_find_unfinished_warmup_includes_last_step():
    assert find_unfinished_warmup(5, 6) is None
    assert find_unfinished_warmup(6, 6).startswith("The warm-up of 6 steps is not over when the run ends after 6")
