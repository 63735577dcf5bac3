"""Sources of starting weights: each source loads its weights, logs them and leaves the rest random."""

import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForPreTraining, BertModel, DetrConfig, DetrForObjectDetection

from modeling_reftr import RefTRConfig, RefTRForVisualGrounding
from modeling_reftr.convert_reftr_checkpoint import convert_checkpoint, load_tokenizer
from tests.helpers.golden import load_case, published_state_dict
from tests.helpers.tiny import TINY_MODEL, TINY_TEXT
from training_reftr.build import build_model, load_reftr, load_text_backbone, read_tokenizer, text_config_of
from training_reftr.settings import TrainingSettings


RESNET = {"backbone": "test_resnet", "out_indices": [1, 2, 3, 4]}  # timm's smallest
RESNET_MODEL = {**TINY_MODEL, "backbone_config": RESNET, "freeze_backbone_batch_norm": True}


def randomize(model):
    """Fill all weights and statistics with random values."""
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) * 0.2 + (0.5 if name.endswith("running_var") else -0.1))
    return model


@pytest.fixture
def build(shapes, caplog):
    """Build the model of a run from its settings; return model, processor and log."""

    def run_build(seed=0, **settings):
        torch.manual_seed(seed)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            args = TrainingSettings.from_flat(
                **{"model": {**TINY_MODEL, "text_config": TINY_TEXT}, "image_size": 64, **settings}
            )
            model, processor = build_model(args, shapes["train"])
        return SimpleNamespace(model=model, processor=processor, log=caplog.text)

    return run_build


@pytest.fixture(scope="module")
def text_folder(tokenizer, tmp_path_factory):
    """Save a pretrained text model with its tokenizer and pretraining heads, as the authors of BERT do."""
    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(**{**TINY_TEXT, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id})
    BertForPreTraining(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def detr_file(tmp_path_factory):
    """Save a tiny DETR with transformers."""
    folder = tmp_path_factory.mktemp("detr")
    sizes = {"d_model": 32, "encoder_layers": 1, "encoder_ffn_dim": 64, "encoder_attention_heads": 2}
    rest = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "num_queries": 3}
    timm_resnet = {"backbone": "resnet50", "use_timm_backbone": True, "use_pretrained_backbone": False}
    randomize(DetrForObjectDetection(DetrConfig(**sizes, **rest, **timm_resnet))).save_pretrained(folder)
    return folder


def weights_below(model, prefix):
    """Return the weights below a prefix, without the counters of batch norm."""
    weights = {name.removeprefix(prefix): v for name, v in model.state_dict().items() if name.startswith(prefix)}
    return {name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")}


def is_subset(weights, others):
    """Return whether there are weights and all of them are among the others."""
    return bool(weights) and all(torch.equal(value, others[name]) for name, value in weights.items())


def assert_frozen_as_configured(model):
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    fresh = RefTRForVisualGrounding(model.config)
    assert trained == {name for name, parameter in fresh.named_parameters() if parameter.requires_grad}


# 5. random weights


def test_model_without_init_has_random_weights_of_seed(build):
    first, again, other = build(), build(), build(seed=1)
    weights = first.model.state_dict()
    assert is_subset(again.model.state_dict(), weights)
    assert not is_subset(weights_below(other.model, "model.encoder."), weights_below(first.model, "model.encoder."))
    assert "Random weights, because no setting initializes them: backbone, box_head, decoder, encoder," in first.log


# 4. image and text backbones


def test_init_text_loads_weights_and_tokenizer(build, text_folder, tokenizer):
    pretrained = BertModel.from_pretrained(text_folder)
    built = build(init_text=str(text_folder), model=TINY_MODEL)
    assert is_subset(weights_below(built.model, "model.text_backbone."), pretrained.state_dict())
    assert built.model.config.text_config.hidden_size == TINY_TEXT["hidden_size"]
    assert built.processor.tokenizer.get_vocab() == tokenizer.get_vocab()
    count = len(pretrained.state_dict())
    assert (
        f"init_text: {count} weights of the text backbone from {text_folder}. Random weights in it: none." in built.log
    )
    assert "text_backbone" not in built.log.split("no setting initializes them")[1]
    changed = build(init_text=str(text_folder), model={**TINY_MODEL, "text_config": {"hidden_dropout_prob": 0.3}})
    assert changed.model.config.text_config.hidden_dropout_prob == 0.3
    assert is_subset(weights_below(changed.model, "model.text_backbone."), pretrained.state_dict())


def test_init_text_reads_old_file_with_restricted_reader(build, text_folder, tmp_path):
    """Read pytorch_model.bin, here without a pooler, with the restricted unpickler."""
    shutil.copytree(text_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    pretrained = BertModel.from_pretrained(text_folder).state_dict()
    weights = {f"bert.{name}": value for name, value in pretrained.items() if "pooler" not in name}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    built = build(init_text=str(tmp_path), model=TINY_MODEL)
    loaded = weights_below(built.model, "model.text_backbone.")
    assert is_subset({name: value for name, value in loaded.items() if "pooler" not in name}, pretrained)
    assert not torch.equal(loaded["pooler.dense.weight"], pretrained["pooler.dense.weight"])
    assert "Random weights in it: pooler.dense.bias, pooler.dense.weight." in built.log
    torch.save({"encoder.weight": print}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is refused: it asks for print"):
        build(init_text=str(tmp_path), model=TINY_MODEL)


@pytest.mark.parametrize("read", ["tokenizer", "configuration", "conversion"])
def test_text_model_claiming_many_labels_is_refused(text_folder, tmp_path, read):
    """Refuse a label count for which transformers would make a name per label."""
    shutil.copytree(text_folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_labels": 200_000}))
    readers = {
        "tokenizer": read_tokenizer,
        "configuration": lambda folder: text_config_of(folder, {}),
        "conversion": lambda folder: load_tokenizer(folder, RefTRConfig()),
    }
    with pytest.raises(ValueError, match="num_labels is over 100,000"):
        readers[read](str(tmp_path))


def test_init_text_refuses_index_naming_files_elsewhere(build, text_folder, tmp_path):
    shutil.copytree(text_folder, tmp_path / "bert")
    (tmp_path / "bert" / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    names = dict.fromkeys(load_file(tmp_path / "elsewhere.safetensors"), "../elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": names}
    (tmp_path / "bert" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=r"weight_map names '\.\./elsewhere\.safetensors', which is not a safetensors"
    ):
        load_text_backbone(
            RefTRForVisualGrounding(RefTRConfig(**TINY_MODEL, text_config=TINY_TEXT)), str(tmp_path / "bert")
        )


def test_init_text_refuses_mismatched_or_incomplete_model(build, text_folder, tmp_path):
    with pytest.raises(ValueError, match=r"model_type='roberta', but init_text='.*' is of type 'bert'"):
        build(init_text=str(text_folder), model={**TINY_MODEL, "text_config": {"model_type": "roberta"}})
    with pytest.raises(ValueError, match=r"does not fit the text backbone: \d+ weights.*intermediate\.dense\.weight"):
        build(init_text=str(text_folder), model={**TINY_MODEL, "text_config": {"intermediate_size": 80}})
    with pytest.raises(ValueError, match=r"encoder\.layer\.1\.attention"):
        build(init_text=str(text_folder), model={**TINY_MODEL, "text_config": {"num_hidden_layers": 2}})
    with pytest.raises(OSError, match=r"There is no text model at '\./nowhere'"):
        build(init_text="./nowhere")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(text_folder / name, tmp_path)
    with pytest.raises(OSError, match=r"has no model\.safetensors and no pytorch_model\.bin"):
        build(init_text=str(tmp_path), model=TINY_MODEL)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(OSError, match="There is no tokenizer in"):
        build(init_text=str(tmp_path), model=TINY_MODEL)


@pytest.mark.parametrize("kind", ["safetensors", "pth", "stride", "learning norms", "counted norms"])
def test_init_backbone_loads_weights_from_file(build, kind, tmp_path):
    imagenet = randomize(timm.create_model("test_resnet")).state_dict()
    if kind != "counted norms":  # older files of torchvision have no counters, those of timm do
        imagenet = {name: value for name, value in imagenet.items() if "num_batches" not in name}
    file = tmp_path / f"imagenet.{'pth' if kind == 'pth' else 'safetensors'}"
    torch.save(imagenet, file) if kind == "pth" else save_file(imagenet, file)
    model = {**RESNET_MODEL, "text_config": TINY_TEXT}
    if kind == "stride":
        model["backbone_config"] = {**RESNET, "output_stride": 16}
    model |= {"num_frozen_backbone_stages": 1, "freeze_backbone_batch_norm": "norms" not in kind}
    built = build(init_backbone=str(file), model=model)
    imagenet = {name: value for name, value in imagenet.items() if "num_batches" not in name}
    assert is_subset(weights_below(built.model, "model.backbone._backbone."), imagenet)
    assert_frozen_as_configured(built.model)
    assert f"weights of the image backbone from {file}. Left: fc.bias, fc.weight." in built.log


def test_init_backbone_timm_loads_weights_from_hub(build, tmp_path, monkeypatch):
    """Download only the weights of timm from the Hub for the value `timm`."""
    imagenet = randomize(timm.create_model("test_efficientnet_gn")).state_dict()
    save_file(imagenet, tmp_path / "model.safetensors")
    asked = []

    def fetch(name, file):
        asked.append((name, file))
        return str(tmp_path / file)

    monkeypatch.setattr("training_reftr.build.hf_hub_download", fetch)
    built = build(init_backbone="timm")
    assert asked == [("timm/test_efficientnet_gn.r160_in1k", "model.safetensors")]
    assert is_subset(weights_below(built.model, "model.backbone._backbone."), imagenet)
    assert "from timm/test_efficientnet_gn.r160_in1k. Left: bn2.bias" in built.log


def test_init_backbone_maps_flattened_timm_names(build, tmp_path):
    """Map stages.0 to stages_0, which timm uses in its feature extractors."""
    imagenet = randomize(timm.create_model("test_convnext")).state_dict()
    save_file(imagenet, tmp_path / "convnext.safetensors")
    backbone = {"backbone": "test_convnext", "out_indices": [0, 1, 2, 3]}
    model = {**TINY_MODEL, "backbone_config": backbone, "text_config": TINY_TEXT}
    built = build(init_backbone=str(tmp_path / "convnext.safetensors"), model=model)
    flat = {name.replace("stages.", "stages_").replace("stem.", "stem_"): value for name, value in imagenet.items()}
    assert is_subset(weights_below(built.model, "model.backbone._backbone."), flat)


def test_init_backbone_refuses_mismatched_weights(build, tmp_path):
    save_file({"conv1.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match=r"init_backbone='.*other.safetensors' does not fit the image backbone. .*blocks"
    ):
        build(init_backbone=str(tmp_path / "other.safetensors"))
    for name in (str(tmp_path), "resnet50", str(tmp_path / "none.pth")):
        with pytest.raises(
            OSError, match=r"is neither a weights file \(\.pth, \.pt, \.bin, \.safetensors\) nor 'timm'"
        ):
            build(init_backbone=name)
    transformers_resnet = {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 16, 24, 32],
        "depths": [1] * 4,
    }
    model = {**TINY_MODEL, "backbone_config": {**transformers_resnet, "out_indices": [1, 2, 3, 4]}}
    with pytest.raises(ValueError, match="timm has no weights for the image backbone None"):
        build(init_backbone="timm", model={**model, "text_config": TINY_TEXT})


# 3. DETR


def test_init_detr_and_text_load_published_start(build, detr_file, text_folder):
    """Load backbone and encoder of a DETR, text backbone and tokenizer of BERT; the rest is random."""
    backbone = {"backbone": "resnet50", "out_indices": [1, 2, 3, 4]}
    model = {**RESNET_MODEL, "backbone_config": backbone, "num_frozen_backbone_stages": 1}
    built = build(init_detr=str(detr_file), init_text=str(text_folder), model=model)
    detr = DetrForObjectDetection.from_pretrained(detr_file).model
    assert is_subset(weights_below(built.model, "model.encoder."), detr.encoder.state_dict())
    assert is_subset(weights_below(built.model, "model.backbone._backbone."), detr.backbone.model.state_dict())
    assert is_subset(
        weights_below(built.model, "model.text_backbone."), BertModel.from_pretrained(text_folder).state_dict()
    )
    assert_frozen_as_configured(built.model)
    assert f"weights of image backbone and encoder from {detr_file}." in built.log
    random = built.log.split("Random weights, because no setting initializes them: ")[1]
    assert random.startswith("box_head, decoder, image_projection, level_embedding, phrase_projection, query_encoder")


# 2. RefTR


@pytest.fixture(scope="module")
def published(tokenizer, tmp_path_factory):
    """Save a tiny published checkpoint of the box model with a tokenizer."""
    folder = tmp_path_factory.mktemp("published")
    torch.save({"model": published_state_dict(load_case("rec_bert")[0]), "epoch": 3}, folder / "refcoco.pth")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def test_init_from_published_file_equals_its_conversion(build, published, tmp_path):
    file, tokenizer = published / "refcoco.pth", str(published / "tokenizer")
    convert_checkpoint(file, tmp_path / "converted", tokenizer=tokenizer)
    built = build(init_from=str(file), tokenizer=tokenizer, model={})
    from_folder = build(init_from=str(tmp_path / "converted"), model={})
    weights = from_folder.model.state_dict()
    assert built.model.state_dict().keys() == weights.keys()
    assert is_subset(built.model.state_dict(), weights)
    configs = [
        {**result.model.config.to_dict(), "_name_or_path": None, "architectures": None}
        for result in (built, from_folder)
    ]
    assert configs[0] == configs[1]
    assert f"RefTR from {file}: {len(weights)} weights. Random weights: none. Left: none." in built.log
    assert "assumed as published, because shapes do not determine them: " in built.log
    assert_frozen_as_configured(built.model)
    # a second stage on top: the mask head is random, all other weights are loaded
    masks = build(init_from=str(file), tokenizer=tokenizer, model={"predict_masks": True, "auxiliary_loss": False})
    assert is_subset(weights, masks.model.state_dict())
    assert "Random weights: mask_head." in masks.log
    head = masks.model.mask_head.output_convolution.weight
    assert head.abs().sum() > 0
    assert head.requires_grad


def test_init_from_applies_changed_model_fields(trained, build):
    output, _ = trained
    built = build(init_from=str(output), model={"dropout": 0.3, "num_frozen_backbone_stages": 1}, max_text_length=12)
    assert built.model.config.dropout == 0.3
    assert built.processor.max_expression_length == built.processor.max_caption_length == 12
    assert_frozen_as_configured(built.model)
    saved = RefTRForVisualGrounding.from_pretrained(output).state_dict()
    assert is_subset(built.model.state_dict(), saved)


def test_init_from_accepts_completed_timm_name(build, tmp_path):
    """Accept a saved backbone name that timm completed with its weights, where a recipe gives the network only."""
    first = build(model={**RESNET_MODEL, "text_config": TINY_TEXT})
    first.model.config.backbone_config.backbone = "test_resnet.r160_in1k"
    first.model.save_pretrained(tmp_path)
    first.processor.save_pretrained(tmp_path)
    assert "test_resnet.r160_in1k" in (tmp_path / "config.json").read_text()
    built = build(init_from=str(tmp_path), model={"backbone_config": RESNET})
    assert built.model.config.backbone_config.backbone.startswith("test_resnet")
    with pytest.raises(ValueError, match=r"backbone='resnet101', but init_from has 'test_resnet\.r160_in1k' there"):
        build(init_from=str(tmp_path), model={"backbone_config": {"backbone": "resnet101"}})


@pytest.mark.parametrize("name", ["./runs/nothing", "/nowhere/at/all", "nothing.pth", "runs/nothing/deeper"])
def test_init_from_missing_path_fails_without_network(build, name, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("went to the network"))
    with pytest.raises(OSError, match=f"There is no RefTR at '{name}'"):
        build(init_from=name, model={})


def test_init_from_refuses_pickled_weights_in_folder(build, trained, tmp_path):
    output, _ = trained
    for name in ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(output / name, tmp_path)
    torch.save(RefTRForVisualGrounding.from_pretrained(output).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"safetensors"):
        build(init_from=str(tmp_path), model={})


def test_build_model_refuses_contradicting_settings(build, trained, published):
    output, _ = trained
    with pytest.raises(ValueError, match=r"has no effect on init_from=.* has its own"):
        build(init_from=str(output), tokenizer="bert-base-uncased", model={})
    with pytest.raises(ValueError, match=r"max_text_length=65 is more than model\.max_text_positions=64"):
        build(max_text_length=65)
    with pytest.raises(ValueError, match=r"vocab_size=5 is smaller than the tokenizer's \d+ tokens"):
        build(
            tokenizer=str(published / "tokenizer"), model={**TINY_MODEL, "text_config": {**TINY_TEXT, "vocab_size": 5}}
        )


# run as a user does


def test_eval_only_evaluates_published_file(recipe, run, published, tmp_path):
    """Evaluate with `--eval_only --init_from FILE.pth`, formerly `--eval --resume=FILE.pth`."""
    argv = ("--init_from", published / "refcoco.pth", "--tokenizer", published / "tokenizer")
    result = run(
        "train_reftr.py", recipe, "--eval_only", *argv, "--dataset_config.num_test", "2", "--output_dir", tmp_path
    )
    assert f"RefTR from {published / 'refcoco.pth'}: " in result.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["model"] == str(published / "refcoco.pth")
    assert metrics["splits"]["test"]["num_phrases"] > 0
    assert not (tmp_path / "model.safetensors").exists()


def test_init_from_refuses_changed_text_backbone(trained, recipe, run, tmp_path):
    command = ("train_reftr.py", recipe, "--init_from", trained[0], "--output_dir", tmp_path)
    result = run(*command, "--model.text_config.hidden_size", "48", check=False)
    assert "model.text_config.hidden_size=48, but init_from has 32 there" in result.stderr


def test_load_reftr_ignores_recipe_model(trained):
    """Use the model of a recipe for training only: an evaluation takes the model as it was saved."""
    output, _ = trained
    model, _ = load_reftr(output, TrainingSettings.from_flat(model={"predict_masks": True}))
    assert not model.config.predict_masks
