"""The model card reports the files of a folder, and warns of metrics on images seen in training."""

import json
import shlex

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from modeling_reftr.requirements_reftr import MINIMUM_VERSIONS
from training_reftr.card import requirements, write_card
from training_reftr.recipes import to_recipe
from training_reftr.run import describe_best
from training_reftr.settings import TrainingSettings


@pytest.fixture
def folder(make_model, processor, tmp_path):
    make_model(predict_masks=True).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return tmp_path


def card_of(folder, repository="someone/reftr", **settings):
    """Write the card of a folder, and the recipe of the settings if there are any."""
    if settings:
        (folder / "recipe.yaml").write_text(to_recipe(TrainingSettings.from_flat(**settings)))
    return ModelCard.load(write_card(folder, repository))


METRICS = {
    "model": "runs/x",
    "dataset": "refcoco_unc",
    "two_step_masks": False,
    "example": {"image": "example.png", "texts": ['a "red" cup', "the tree"]},
    "splits": {
        "testA": {
            "integer_boxes": True,
            "accuracy@0.5": 0.8123456,
            "mean_iou": 0.7,
            **{f"precision@0.{tenths}": 0.5 for tenths in range(5, 10)},
            "num_phrases": 5657,
            "per_kind": {},
        }
    },
}


def test_card_lists_report_metrics_next_to_published_ones(folder):
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    card = card_of(folder, dataset="refcoco_unc", init_detr="facebook/detr-resnet-50", hub_dataset="someone/refcoco")
    assert "| testA | boxes, accuracy@0.5 | 81.23 | 88.73 |" in card.text
    assert "On RefCOCO (unc):" in card.text
    (accuracy,) = [result for result in card.data.eval_results if result.metric_type == "accuracy@0.5"]
    assert (accuracy.metric_value, accuracy.dataset_split) == (0.81235, "testA")
    assert (accuracy.dataset_type, accuracy.dataset_name) == ("someone/refcoco", "RefCOCO (unc)")
    assert card.data.datasets == ["someone/refcoco"]
    assert card.data.base_model == ["facebook/detr-resnet-50"]
    assert r'text=["a \"red\" cup", "the tree"]' in card.text
    entries = yaml.safe_load((folder / ".eval_results" / "someone_refcoco.yaml").read_text())
    assert entries[0] == {
        "dataset": {"id": "someone/refcoco", "task_id": "testA/accuracy@0.5"},
        "value": 0.81235,
        "notes": "boxes: accuracy at IoU 0.5",
    }


def test_card_names_minimum_versions_in_one_command(folder):
    text = card_of(folder).text
    assert f"With Python {MINIMUM_VERSIONS['python']} or newer:" in text
    (command,) = [line for line in text.splitlines() if line.startswith("pip install ")]
    assert shlex.split(command)[2:] == requirements()
    assert f"transformers>={MINIMUM_VERSIONS['transformers']},<6" in command


def test_card_opens_with_task_and_drawn_predictions(trained):
    """Show a stranger first what the model does, in the words that people search for, and a large example."""
    text = ModelCard.load(trained[0] / "README.md").text
    title, sentence, image, *_ = text.strip().split("\n\n")
    assert title == "# RefTR"
    assert sentence.startswith("This model locates what a text refers to in an image: ")
    for task in ("visual grounding", "referring expression comprehension", "phrase grounding"):
        assert task in " ".join(sentence.split())
    assert image.endswith("](predictions.png)")
    with Image.open(trained[0] / "predictions.png") as drawn:
        assert min(drawn.size) >= 512


def test_card_shows_metrics_before_their_conditions(trained):
    """Begin the results with a table, and put the conditions of the evaluation below it."""
    results = ModelCard.load(trained[0] / "README.md").text.split("## Results\n")[1].split("\n## ")[0]
    lines = [line for line in results.splitlines() if line]
    assert lines[:2] == ["On shapes:", "### test"]
    assert lines[2].startswith("| boxes | accuracy@0.5 |")
    assert "A box is correct if its IoU is over 0.5." in results.split("### Conditions of the evaluation")[1]
    assert "|" not in results.split("### Conditions of the evaluation")[1]


def test_card_names_licence_that_dataset_declares(folder):
    (folder / "metrics.json").write_text(json.dumps({**METRICS, "dataset_license": "CC BY-SA 4.0"}))
    assert "Images and annotations of the dataset: CC BY-SA 4.0." in card_of(folder).text
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    assert "stay under their authors' licences" in card_of(folder).text


def test_card_without_dataset_hub_id_has_no_leaderboard_entries(folder):
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    card = card_of(folder, dataset="refcoco_unc")
    assert not (folder / ".eval_results").exists()
    assert card.data.datasets is None
    assert card.data.eval_results


@pytest.mark.parametrize(
    ("settings", "is_warned"),
    [
        ({"dataset": "refcoco_unc", "init_detr": "detr.pth"}, True),
        ({"dataset": "flickr30k_entities,refcocog_umd", "init_from": "someone/reftr"}, True),
        ({"dataset": "refcoco_unc", "init_backbone": "timm"}, False),
        ({"dataset": "refcoco_unc"}, False),
        ({"dataset": "flickr30k_entities", "init_detr": "detr.pth"}, False),
        ({"dataset": "visual_genome"}, True),
        ({"dataset": "visual_genome", "dataset_config": {"exclude": ["refcoco_unc"]}}, False),
        ({"dataset": "visual_genome", "dataset_config": {"held_out_file": "ids.json"}}, False),
        ({"dataset": "shapes"}, False),
    ],
)
def test_card_warns_of_pretraining_on_held_out_images(folder, settings, is_warned):
    assert ("**Data leakage:**" in card_of(folder, **settings).text) == is_warned


@pytest.mark.parametrize(
    ("settings", "start", "base_model"),
    [
        ({}, "random weights", None),
        ({"init_from": "someone/reftr-base"}, "the RefTR `someone/reftr-base`", ["someone/reftr-base"]),
        (
            {"init_detr": "facebook/detr-resnet-50", "init_text": "google-bert/bert-base-uncased"},
            "image backbone and encoder of the DETR `facebook/detr-resnet-50` and the text encoder "
            "`google-bert/bert-base-uncased`",
            ["facebook/detr-resnet-50", "google-bert/bert-base-uncased"],
        ),
        ({"init_backbone": "timm"}, "the image backbone `timm`", None),
        ({"init_from": "refcoco.pth"}, "the RefTR `refcoco.pth`", None),
    ],
)
def test_card_names_starting_weights(folder, settings, start, base_model):
    card = card_of(folder, dataset="shapes", **settings)
    assert f"It was initialized from {start}." in card.text
    assert card.data.base_model == base_model


def test_card_of_model_without_training_files_is_complete(folder):
    card = card_of(folder)
    assert "This folder has no record of its training." in card.text
    assert "Not evaluated yet" in card.text
    assert "The model always predicts a box" in card.text
    assert "referring-image-segmentation" in card.data.tags
    assert card.data.eval_results is None


def test_card_of_model_without_masks_mentions_no_masks(make_model, processor, tmp_path):
    make_model().save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert "mask" not in card.text.split("## Training")[0]
    assert "referring-image-segmentation" not in card.data.tags


def test_card_of_converted_checkpoint_keeps_its_license(folder):
    (folder / "origin.json").write_text(json.dumps({"converted_from": "refcoco.pth", "sha256": "0" * 64}))
    card = card_of(folder)
    assert card.data.license == "mit"
    assert "Converted from the published checkpoint `refcoco.pth`" in card.text
    assert "**Data leakage:**" in card.text


def test_card_of_fine_tuned_conversion_names_its_start(folder):
    (folder / "origin.json").write_text(json.dumps({"converted_from": "refcoco.pth", "sha256": "0" * 64}))
    describe_best(TrainingSettings.from_flat(output_dir=str(folder), init_from="refcoco.pth"))
    card = card_of(folder)
    assert "It was initialized from the RefTR `refcoco.pth`." in card.text
    assert "not trained further" not in card.text


def test_write_card_keeps_handwritten_card(folder):
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    assert write_card(folder).read_text() == "---\nlicense: mit\n---\n\n# Mine\n"


def test_card_of_local_folder_names_no_hub_addresses(folder, monkeypatch, shapes):
    """Run the snippet of the card in its folder, and find no Hub id or URL derived from the folder name."""
    image = shapes["test"][0]["image"]
    image.save(folder / "photo.jpg")
    (folder / "metrics.json").write_text(json.dumps({**METRICS, "dataset": "shapes"}))
    write_card(folder)
    card = ModelCard.load(folder / "README.md")
    assert "huggingface.co" not in card.content
    assert folder.name not in card.content
    assert not {"widget", "base_model", "datasets"} & card.data.to_dict().keys()
    snippet = card.text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder)
    exec(snippet, {})
    assert (folder / "answers.png").is_file()


def test_card_makes_no_hub_ids_of_files_and_folders(folder, monkeypatch):
    """Check folders that no longer exist, too, and that a missing example image has no URL."""
    (folder / "metrics.json").write_text(json.dumps({**METRICS, "dataset": "exported/mine"}))
    card = card_of(folder, dataset="exported/mine", init_detr="weights/detr.pth", init_text="some/bert")
    assert card.data.base_model == ["some/bert"]
    assert {result.dataset_type for result in card.data.eval_results} == {"mine"}
    assert "widget" not in card.data.to_dict()
    (folder / "example.png").touch()
    (widget,) = card_of(folder).data.to_dict()["widget"]
    assert widget["src"] == "https://huggingface.co/someone/reftr/resolve/main/example.png"


def test_write_card_replaces_file_atomically(folder):
    """Replace the card atomically: a partial one without the mark would never be replaced again."""
    path = write_card(folder)
    (folder / "earlier.md").hardlink_to(path)
    earlier = path.read_bytes()
    assert write_card(folder, "someone/reftr").read_bytes() != earlier
    assert (folder / "earlier.md").read_bytes() == earlier
    assert not list(folder.glob(".*"))


def test_card_does_not_take_removed_weights_folder_for_hub_id(folder, tmp_path, monkeypatch):
    """Recognize a folder from the run's records even after it is gone, as on another machine."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "boxes").mkdir(parents=True)
    describe_best(TrainingSettings.from_flat(output_dir=str(folder), init_from="runs/boxes"))
    (tmp_path / "runs" / "boxes").rmdir()
    card = ModelCard.load(write_card(folder, "someone/reftr"))
    assert "It was initialized from the RefTR `./runs/boxes`." in card.text
    assert card.data.base_model is None


def test_card_does_not_take_existing_folder_for_base_model(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "boxes").mkdir(parents=True)
    assert card_of(folder, init_from="runs/boxes").data.base_model is None
    assert card_of(folder, init_from="runs/others").data.base_model == ["runs/others"]


def test_card_of_unfinished_run_reports_best_validation(folder):
    values = {4: 0.25, 8: 0.625, 12: 0.5}
    lines = [json.dumps({"step": step, "validation/accuracy@0.5": value}) for step, value in values.items()]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    text = card_of(folder, dataset="shapes").text
    assert "Best validation so far, at step 8: boxes: accuracy at IoU 0.5 0.625." in text


def test_write_card_refuses_folder_without_model(tmp_path):
    with pytest.raises(OSError, match=r"no config\.json"):
        write_card(tmp_path)
