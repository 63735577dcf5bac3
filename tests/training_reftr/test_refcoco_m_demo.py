"""The demo with photographs runs from its three names on the Hub, here a local one with miniatures of the three."""

import json

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard
from transformers import BertConfig, BertForPreTraining, DetrConfig, DetrForObjectDetection

from tests.helpers.layout_documents import PUBLISHED_MODEL, RESNET, TEXT
from tests.helpers.layout_hub import write_samples
from tests.helpers.local_hub import Hub, Token
from training_reftr.arguments import parse_arguments


SETTINGS = parse_arguments(["refcoco_m_demo"])
# name on the Hub -> kind
NAMES = {
    SETTINGS.data.dataset: "dataset",
    SETTINGS.initialization.init_detr: "model",
    SETTINGS.initialization.init_text: "model",
}
MINIATURE = {
    "model": PUBLISHED_MODEL,
    "image_size": 64,
    "num_epochs": 1,
    "lr_drop_epochs": [1],
    "batch_size": 4,
    "num_workers": 0,
    "num_pictures": 2,
}


@pytest.fixture
def hub(tokenizer, tmp_path, monkeypatch):
    """Serve the dataset, the DETR and the BERT that the recipe names."""
    folders = dict(zip(NAMES, ("photos", "detr", "bert"), strict=True))
    write_samples(tmp_path / "photos", range(60))
    sizes = {"d_model": 32, "encoder_layers": 1, "encoder_ffn_dim": 64, "encoder_attention_heads": 2}
    rest = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "num_queries": 3}
    backbone = {"backbone": RESNET["backbone"], "use_timm_backbone": True, "use_pretrained_backbone": False}
    DetrForObjectDetection(DetrConfig(**sizes, **rest, **backbone)).save_pretrained(tmp_path / "detr")
    vocabulary = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    BertForPreTraining(BertConfig(**{**TEXT, **vocabulary})).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    with Hub(tokens={name: Token(name.split("/")[0]) for name in NAMES}) as hub:
        hub.use(monkeypatch)
        for name, kind in NAMES.items():
            api = HfApi(endpoint=hub.address, token=name)
            api.create_repo(name, repo_type=kind)
            api.upload_folder(repo_id=name, repo_type=kind, folder_path=tmp_path / folders[name])
        yield hub


def test_recipe_names_dataset_and_weights_of_the_hub():
    assert list(NAMES) == ["moondream/refcoco-m", "facebook/detr-resnet-50", "google-bert/bert-base-uncased"]
    assert SETTINGS.data.dataset_config == {"split_parts": {"validation": {"train": 0.8, "val": 0.1, "test": 0.1}}}
    assert SETTINGS.initialization.model["predict_masks"]
    # brightness as published is part of the strong augmentation; no published loader is followed
    assert SETTINGS.data.augmentation == "strong"


@pytest.mark.slow
def test_recipe_trains_and_reports_a_cut_of_validation(hub, run, tmp_path):
    miniature = tmp_path / "miniature.yaml"
    miniature.write_text(yaml.safe_dump({**MINIATURE, "data_cache_dir": str(tmp_path / "cache")}))
    output = tmp_path / "run"
    argv = ("-m", "reftr_cli", "train", "refcoco_m_demo", miniature, "--output_dir", output)
    environment = hub.environment(home=tmp_path / "home")
    result = run(*argv, **environment)
    assert "Dataset moondream/refcoco-m: train_of_validation 4" in result.stderr
    assert "image backbone and encoder from facebook/detr-resnet-50" in result.stderr
    assert "of the text backbone from google-bert/bert-base-uncased" in result.stderr

    metrics = json.loads((output / "metrics.json").read_text())
    assert list(metrics["splits"]) == ["test_of_validation"]
    assert metrics["splits"]["test_of_validation"]["cut_from"] == {"split": "validation", "share": 0.1}
    assert "mask_mean_iou" in metrics["splits"]["test_of_validation"]
    report = (output / "report.md").read_text()
    assert "A part of the split `validation`, about 10 % of its images: the results are not comparable" in report
    assert "## validation" not in report
    assert "Compared with published results" not in report
    assert "from COCO's train2014" in report

    card = ModelCard.load(output / "README.md")
    assert "`test_of_validation` is about 10 % of `validation`" in card.text
    assert "not comparable with published results on the split" in " ".join(card.text.split())
    assert "**Data leakage:**" in card.text
    assert card.data.datasets == ["moondream/refcoco-m"]
    assert card.data.base_model == ["facebook/detr-resnet-50", "google-bert/bert-base-uncased"]
    assert {entry.dataset_split for entry in card.data.eval_results} == {"test_of_validation"}
    assert {entry.dataset_name for entry in card.data.eval_results} == {"moondream/refcoco-m, a part of validation"}
    assert not (output / ".eval_results").exists()

    # evaluated again from the cache, without the Hub
    before = len(hub.requests)
    run(*argv, "--eval_only", **environment | {"HF_HUB_OFFLINE": "1"})
    assert len(hub.requests) == before
    again = json.loads((output / "metrics.json").read_text())
    assert again["splits"]["test_of_validation"]["mean_iou"] == metrics["splits"]["test_of_validation"]["mean_iou"]
