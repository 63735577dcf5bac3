"""The converter uses every published key, ignores it by name or refuses it; code in a file is never executed."""

import argparse
import copy
import json
import operator
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_reftr import RefTRConfig, RefTRForVisualGrounding, RefTRProcessor, convert_reftr_checkpoint
from modeling_reftr.convert_reftr_checkpoint import (
    check_config,
    config_from_shapes,
    convert_checkpoint,
    convert_state_dict,
    convert_to_published,
    describe_assumptions,
    our_names,
    published_key,
    read_published_checkpoint,
    read_weights,
    settings_from_shapes,
    to_published_state_dict,
)
from reftr_cli.__main__ import main as run_command
from reftr_cli.convert import main
from tests.helpers.golden import (
    GOLDEN,
    golden_config,
    golden_inputs,
    golden_model,
    load_case,
    published_state_dict,
    weight_by_rule,
)
from tests.helpers.tiny import ROOT


CASES = ("rec_bert", "rec_roberta", "multiphrase_bert", "res_bert")
FULL_SIZE = json.loads((GOLDEN / "full_size_keys.json").read_text())
# parameter counts, for the published models on which they were counted
FULL_SIZE_PARAMETERS = {
    "rec_resnet50_bert": 151_981_508,
    "rec_resnet101_bert": 170_921_412,
    "rec_resnet50_roberta": 167_144_900,
    "res_resnet50_bert": 155_417_181,
    "res_resnet101_bert": 174_357_085,
}


def published_content(weights):
    """Return a checkpoint as the published training script writes it, with two optimizer moments per weight."""
    moments = {
        index: {"step": 7, "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
        for index, weight in enumerate(weights.values())
    }
    schedule = {"deacy_rate": 0.1, "lr_milestones": [90, 180], "warm_up_steps": 10, "min_decay_rate": 0.01}
    return {
        "model": weights,
        "optimizer": {"state": moments, "param_groups": [{"lr": 1e-4, "params": list(range(len(weights)))}]},
        "lr_scheduler": {"base_lrs": [1e-4], "last_epoch": 7, "_step_count": 8, "lr_lambdas": [schedule]},
        "epoch": 3,
        "args": argparse.Namespace(lr=1e-4, lr_backbone_names=["img_backbone"], output_dir="exps", device="cuda"),
        "best_val_acc": np.float64(0.8),
    }


def meta_model(config):
    with torch.device("meta"):
        return RefTRForVisualGrounding(config)


def run_main(*arguments):
    """Run the command as a user would, within this process."""
    assert run_command(["convert", *map(str, arguments)]) == 0


def saved(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def case():
    return load_case("rec_bert")[0]


@pytest.fixture(scope="module")
def expected(case):
    return meta_model(golden_config(case)).state_dict()


@pytest.fixture(scope="module")
def published_weights(case):
    return published_state_dict(case)


@pytest.fixture
def published(published_weights):
    return dict(published_weights)


@pytest.fixture(scope="module")
def checkpoint(published_weights, tmp_path_factory):
    """Write a small file with every entry of a published checkpoint."""
    path = tmp_path_factory.mktemp("published") / "checkpoint.pth"
    torch.save(published_content(published_weights), path)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def golden_folders(tmp_path_factory):
    """Save the configuration of each golden case, which has the numbers of heads that shapes do not determine."""
    folders = {}
    for name in CASES:
        folders[name] = tmp_path_factory.mktemp(name)
        golden_config(load_case(name)[0]).save_pretrained(folders[name])
    return folders


def test_convert_state_dict_splits_packed_attention(published, expected):
    converted = convert_state_dict(published, expected)
    packed = published["vl_transformer.encoder.layers.0.self_attn.in_proj_weight"]
    parts = [converted[f"model.encoder.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(torch.cat(parts), packed)


def test_convert_state_dict_ignores_obsolete_keys(published, expected):
    leftovers = {
        "lang_backbone.embeddings.position_ids": torch.arange(128)[None],
        "total_params": torch.zeros(1),
        "bbox_embed.layers.0.total_ops": torch.zeros(1),
    }
    assert (
        convert_state_dict({**published, **leftovers}, expected).keys()
        == convert_state_dict(published, expected).keys()
    )


def test_convert_state_dict_lists_unknown_and_missing_keys(published, expected):
    del published["bbox_embed.layers.2.bias"]
    published["bbox_attention.q_linear.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="do not fit") as error:
        convert_state_dict(published, expected)
    assert "bbox_attention.q_linear.weight" in str(error.value)
    assert "box_head.layers.2.bias" in str(error.value)


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("bbox_embed.layers.2.bias", (5,), r"\(5,\) in the checkpoint, but the model takes \(4,\)"),
        ("vl_transformer.encoder.layers.1.self_attn.in_proj_weight", (383, 128), r"\(383, 128\).*\(384, 128\)"),
        ("vl_transformer.encoder.layers.1.self_attn.in_proj_bias", (), r"\(\) in the .*\(384,\)"),
    ],
)
def test_convert_state_dict_rejects_wrong_shape(published, expected, key, shape, message):
    published[key] = torch.zeros(shape)
    with pytest.raises(ValueError, match=f"{key} .*{message}"):
        convert_state_dict(published, expected)


def test_convert_state_dict_rejects_transposed_weight(published, expected):
    key = "vl_transformer.encoder.layers.1.linear1.weight"
    rows, columns = published[key].shape
    assert rows != columns
    published[key] = published[key].T.contiguous()
    with pytest.raises(ValueError, match=rf"{key} has the shape \({columns}, {rows}\)"):
        convert_state_dict(published, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_convert_state_dict_rejects_non_finite_weights(published, expected, value):
    key = "query_encoder.linear1.bias"
    published[key] = published[key].clone()
    published[key][3] = value
    with pytest.raises(ValueError, match=f"{key} holds values that are not finite"):
        convert_state_dict(published, expected)


def test_model_with_unfrozen_batch_norm_gives_same_features(case):
    model = golden_model(case, freeze_backbone_batch_norm=False)
    frozen = golden_model(case)
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(
        model.model.get_image_features(image).pooler_output,
        frozen.model.get_image_features(image).pooler_output,
        atol=1e-5,
        rtol=1e-5,
    )


def test_golden_files_match_compared_cases():
    steps = {path.stem for path in GOLDEN.glob("train_steps_*.json")}  # of tests/training_reftr/test_golden_steps.py
    names = {path.stem for path in GOLDEN.glob("*.json")} - {"preprocess_sizes", "full_size_keys", *steps}
    assert names == set(CASES)
    for name in names:
        assert json.loads((GOLDEN / f"{name}.json").read_text())["name"] == name


@pytest.mark.parametrize("name", FULL_SIZE)
def test_converter_maps_full_size_keys_in_both_directions(name):
    shapes = {key: torch.empty(shape, device="meta") for key, shape in FULL_SIZE[name].items()}
    model = meta_model(config_from_shapes(shapes))
    state_dict = model.state_dict()
    assert sorted(ours for key in shapes for ours in our_names(key)) == sorted(state_dict)
    assert {published_key(ours) for ours in state_dict} == shapes.keys()
    for key, value in shapes.items():
        parts = [state_dict[ours].shape for ours in our_names(key)]
        assert (sum(part[0] for part in parts), *parts[0][1:]) == value.shape, key
        assert {published_key(ours) for ours in our_names(key)} == {key}
    back = to_published_state_dict(state_dict)
    assert {key: list(value.shape) for key, value in back.items()} == FULL_SIZE[name]
    weights = {key: torch.zeros(1).expand(shape) for key, shape in FULL_SIZE[name].items()}
    assert convert_state_dict(weights, state_dict).keys() == state_dict.keys()
    if name in FULL_SIZE_PARAMETERS:
        assert sum(parameter.numel() for parameter in model.parameters()) == FULL_SIZE_PARAMETERS[name]


def test_config_from_shapes_of_published_model_equals_default():
    shapes = {key: torch.empty(shape, device="meta") for key, shape in FULL_SIZE["rec_resnet50_bert"].items()}
    assert config_from_shapes(shapes).to_dict() == RefTRConfig().to_dict()


def test_config_from_shapes_assumes_published_settings():
    config = {
        name: config_from_shapes({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
        for name, shapes in FULL_SIZE.items()
    }
    roberta = config["rec_resnet101_roberta"]
    assert roberta.backbone_config.backbone == "resnet101"
    assert (roberta.text_config.model_type, roberta.text_config.layer_norm_eps) == ("roberta", 1e-5)
    assert (roberta.text_config.pad_token_id, roberta.text_config.num_attention_heads) == (1, 12)
    assert roberta.auxiliary_loss
    assert config["res_resnet50_bert"].predict_masks
    assert config["res_resnet50_bert"].decoder_attention_heads == 8
    assert not config["res_resnet50_bert"].auxiliary_loss


def test_describe_assumptions_matches_config():
    for name in ("rec_resnet50_roberta", "res_resnet50_bert"):
        config = config_from_shapes({key: torch.empty(shape, device="meta") for key, shape in FULL_SIZE[name].items()})
        description = describe_assumptions(config)
        assert ("decoder_attention_heads=8" in description) == (not config.predict_masks)
        for assumption in re.split(r", (?=[a-z])", description):
            setting, value = assumption.split("=")
            assert str(operator.attrgetter(setting)(config)) == value


@pytest.mark.parametrize("name", CASES)
def test_settings_from_shapes_match_golden_config(name):
    case, _ = load_case(name)
    shapes = {key: torch.empty(shape, device="meta") for key, shape in case["state_dict_shapes"].items()}
    config = golden_config(case)
    check_config(config, shapes)
    inferred = settings_from_shapes(shapes)
    assert inferred["text_config"]["model_type"] == case["text"]
    assert inferred["predict_masks"] == case["masks"]
    assert ("decoder_attention_heads" in inferred) == case["masks"]
    found, expected = config_from_shapes(shapes).to_dict(), config.to_dict()
    assumed = {"num_attention_heads", "layer_norm_eps"}
    for settings in (found["text_config"], expected["text_config"]):
        for setting in assumed:
            del settings[setting]
    assert found == expected


def test_config_from_shapes_infers_heads_from_mask_head():
    case, _ = load_case("res_bert")
    shapes = {key: torch.empty(shape, device="meta") for key, shape in case["state_dict_shapes"].items()}
    width = shapes["vl_transformer.level_embed"].shape[1]
    shapes["mask_head.lay1.weight"] = torch.empty(2 * width + 4, 2 * width + 4, 3, 3, device="meta")
    config = config_from_shapes(shapes)
    assert (config.decoder_attention_heads, config.encoder_attention_heads) == (4, 4)


def test_config_from_shapes_detects_learned_positions(published, case):
    for axis in ("row", "col"):
        published[f"img_backbone.1.{axis}_embed.weight"] = torch.rand(50, 64)
    config = config_from_shapes(published)
    assert (config.position_embedding_type, config.max_image_positions) == ("learned", 50)
    converted = convert_state_dict(published, meta_model(config).state_dict())
    assert torch.equal(
        converted["model.image_position_embedding.column_embeddings.weight"],
        published["img_backbone.1.col_embed.weight"],
    )
    with pytest.raises(ValueError, match="position_embedding_type is 'sine' in the configuration, 'learned' in the"):
        check_config(golden_config(case), published)


def test_converter_rejects_config_different_from_checkpoint(published, case, tmp_path):
    config = golden_config(case, encoder_layers=5, predict_masks=True, backbone_config={"backbone": "resnet101"})
    config.text_config.hidden_size = 44
    with pytest.raises(ValueError, match="encoder_layers is 5 in the configuration, 2 in the checkpoint") as error:
        check_config(config, published)
    assert "backbone_config.backbone is 'resnet101' in the configuration, 'resnet50'" in str(error.value)
    assert "text_config.hidden_size is 44 in the configuration, 48" in str(error.value)
    assert "predict_masks is True" in str(error.value)
    check_config(golden_config(case, backbone_config={"backbone": "resnet50.tv_in1k"}), published)
    torch.save(published, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match="encoder_layers is 5 in the configuration, 2 in the checkpoint"):
        convert_checkpoint(tmp_path / "checkpoint.pth", tmp_path / "out", config=config, with_processor=False)


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ("img_backbone.0.body.layer3.5.", "5 blocks in its third stage"),
        ("vl_transformer.level_embed", "no weights 'vl_transformer.level_embed'"),
        ("lang_backbone.embeddings.word_embeddings.", "no weights 'lang_backbone.embeddings.word_embeddings.weight'"),
    ],
)
def test_config_from_shapes_rejects_incomplete_weights(published, drop, message):
    published = {key: value for key, value in published.items() if not key.startswith(drop)}
    with pytest.raises(ValueError, match=message):
        config_from_shapes(published)


@pytest.mark.parametrize("name", CASES)
def test_converted_model_reproduces_published_outputs(name, golden_folders, tokenizer, tmp_path, capsys):
    case, arrays = load_case(name)
    content = published_content(published_state_dict(case))
    torch.save(content, tmp_path / "checkpoint.pth")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    output = tmp_path / "made" / "here"
    command = ["--checkpoint", tmp_path / "checkpoint.pth", "--output_dir", output]
    run_main(*command, "--config", golden_folders[name], "--tokenizer", tmp_path / "tokenizer")
    assert capsys.readouterr().out == f"Written: {output}\n"
    assert os.listdir(output.parent) == ["here"]
    assert {"config.json", "model.safetensors", "modeling_reftr.py", "processing_reftr.py", "tokenizer.json"} <= set(
        os.listdir(output)
    )

    model = RefTRForVisualGrounding.from_pretrained(output).eval()
    outputs = model(**golden_inputs(case, arrays))
    real = outputs.phrase_mask
    boxes = torch.from_numpy(arrays["out.pred_boxes"])[:, :, 0]
    torch.testing.assert_close(outputs.pred_boxes[real], boxes[real], atol=1e-5, rtol=0)
    if case["masks"]:
        masks = torch.from_numpy(arrays["out.pred_masks"])
        torch.testing.assert_close(outputs.pred_masks, masks, atol=1e-4, rtol=0)
    assert outputs.loss.item() == pytest.approx(case["weighted_total"], rel=1e-4)
    encoded = RefTRProcessor.from_pretrained(output).tokenizer("the red circle")
    assert encoded["input_ids"] == tokenizer("the red circle")["input_ids"]


def test_converter_round_trip_is_bit_equal(checkpoint, published, golden_folders, tmp_path, capsys):
    settings = ["--config", golden_folders["rec_bert"], "--no_processor"]
    run_main("--checkpoint", checkpoint, "--output_dir", tmp_path / "ours", *settings)
    run_main("--checkpoint", tmp_path / "ours", "--output_dir", tmp_path / "back", "--to_published")
    back = tmp_path / "back" / "published.safetensors"
    assert back.stat().st_mode == (tmp_path / "ours" / "config.json").stat().st_mode
    assert capsys.readouterr().out.endswith(f"Written: {back}\n")
    weights = load_file(back)
    assert weights.keys() == published.keys()
    for key, value in published.items():
        assert torch.equal(weights[key], value), key

    # the written file can be read again, also in the .pth format of the published code
    run_main("--checkpoint", back, "--output_dir", tmp_path / "again", *settings)
    ours, again = (tmp_path / name / "model.safetensors" for name in ("ours", "again"))
    assert ours.read_bytes() == again.read_bytes()
    torch.save({"model": load_file(back)}, tmp_path / "back.pth")
    assert read_published_checkpoint(tmp_path / "back.pth").keys() == published.keys()

    # the output may be a single file, is replaced only with --overwrite, and a broken model writes nothing
    command = ["--checkpoint", tmp_path / "ours", "--output_dir", back, "--to_published"]
    with pytest.raises(OSError, match="is there already"):
        main([*map(str, command)])
    main([*map(str, command), "--overwrite"])
    incomplete = load_file(ours)
    del incomplete["box_head.layers.0.bias"]
    save_file(incomplete, ours)
    with pytest.raises(ValueError, match=r"box_head\.layers\.0\.bias"):
        main(
            ["--checkpoint", str(tmp_path / "ours"), "--output_dir", str(tmp_path / "b.safetensors"), "--to_published"]
        )
    assert sorted(os.listdir(tmp_path)) == ["again", "back", "back.pth", "ours"]
    assert os.listdir(tmp_path / "back") == ["published.safetensors"]


def test_conversion_to_published_rejects_unsupported_models(make_model, tmp_path):
    with pytest.raises(ValueError, match=r"lacks these weights: .*mask_head\.unknown"):
        to_published_state_dict({"mask_head.unknown": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"missing: \['model\.encoder\.layers\.0\.self_attn\.k_proj\.bias', .*v_proj"):
        to_published_state_dict({"model.encoder.layers.0.self_attn.q_proj.bias": torch.zeros(1)})
    make_model().save_pretrained(tmp_path / "demo")
    with pytest.raises(ValueError, match="0 blocks in its third stage"):
        convert_to_published(tmp_path / "demo", tmp_path / "back")
    with pytest.raises(FileNotFoundError, match="folder of a saved RefTR"):
        convert_to_published("no/folder", tmp_path / "back")
    assert os.listdir(tmp_path) == ["demo"]


@pytest.mark.parametrize(
    "switch", [{"pre_norm": True}, {"add_positions_to_image_tokens": True}, {"mask_conditioning": "scaled_attention"}]
)
def test_conversion_to_published_rejects_layers_that_answer_otherwise(make_model, tmp_path, switch):
    make_model(predict_masks=True, **switch).save_pretrained(tmp_path / "demo")
    (name,) = switch
    with pytest.raises(ValueError, match=rf"{name}=.+, which the published code does not know"):
        convert_to_published(tmp_path / "demo", tmp_path / "back")


def test_converter_reads_bare_state_dicts_and_legacy_files(published, case, tmp_path):
    config = golden_config(case, freeze_backbone_batch_norm=False)
    for number, (content, is_zip) in enumerate([(published, True), (published_content(published), False)]):
        torch.save(content, tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=is_zip)
        output = tmp_path / str(number)
        convert_checkpoint(tmp_path / "checkpoint.pth", output, config=config, with_processor=False)
        _, loading = RefTRForVisualGrounding.from_pretrained(output, output_loading_info=True)
        assert not any(loading.values())
    assert (tmp_path / "0/model.safetensors").read_bytes() == (tmp_path / "1/model.safetensors").read_bytes()


def test_checkpoint_saved_on_gpu_is_read_without_gpu(tmp_path):
    weights = {"vl_transformer.level_embed": torch.rand(1, 8)}
    torch.save({"model": weights}, tmp_path / "cpu.pth")
    with zipfile.ZipFile(tmp_path / "cpu.pth") as source, zipfile.ZipFile(tmp_path / "gpu.pth", "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                assert b"X\x03\x00\x00\x00cpu" in content
                content = content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            target.writestr(name, content)
    (read,) = read_published_checkpoint(tmp_path / "gpu.pth").values()
    assert torch.equal(read, *weights.values())


def test_converter_without_config_prints_assumptions(checkpoint, tmp_path, capsys):
    main(["--checkpoint", str(checkpoint), "--output_dir", str(tmp_path / "out"), "--no_processor"])
    printed = capsys.readouterr().out
    for setting in ("encoder_attention_heads=8", "text_config.layer_norm_eps=1e-12", "auxiliary_loss=True"):
        assert setting in printed
    assert RefTRConfig.from_pretrained(tmp_path / "out").encoder_layers == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There is no file"),
        (b"", "cannot be read as a checkpoint"),
        (b"no checkpoint", "cannot be read as a checkpoint"),
        ([1, 2], "holds no weights"),
        ({}, "holds no weights"),
        ({"model": {}}, "holds no weights"),
        ({"vl_transformer.a": torch.zeros(2, dtype=torch.long)}, "'vl_transformer.a' in .* floating-point"),
        ({"vl_transformer.a": "weight"}, "'vl_transformer.a' in .* floating-point"),
        ({"vl_transformer.a": torch.zeros(2, 2).to_sparse()}, "asks for torch._utils._rebuild_sparse_tensor"),
        ({"vl_transformer.a": torch.zeros(2, device="meta")}, "asks for torch._utils._rebuild_meta_tensor"),
        ({"vl_transformer.a": torch.zeros(1).expand(10**9)}, "larger than the file"),
        ({"model": {"backbone.0.body.conv1.weight": torch.zeros(2)}}, "no published RefTR checkpoint"),
    ],
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.row("S1")
def test_converter_rejects_files_without_published_weights(content, message, tmp_path):
    if isinstance(content, bytes):
        (tmp_path / "checkpoint.pth").write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / "checkpoint.pth")
    with pytest.raises((ValueError, OSError), match=message):
        convert_checkpoint(tmp_path / "checkpoint.pth", tmp_path / "out", with_processor=False)
    assert not (tmp_path / "out").exists()


def test_read_published_checkpoint_rejects_truncated_files(tmp_path):
    weights = {"vl_transformer.level_embed": torch.rand(1, 800)}
    torch.save({"model": weights}, tmp_path / "complete.pth")
    save_file(weights, tmp_path / "complete.safetensors")
    for suffix in (".pth", ".safetensors"):
        content = (tmp_path / f"complete{suffix}").read_bytes()
        for end in (1, 9, len(content) // 2, len(content) - 1):
            path = tmp_path / f"part{suffix}"
            path.write_bytes(content[:end])
            with pytest.raises(ValueError, match="cannot be read as a checkpoint of weights: "):
                read_published_checkpoint(path)


def test_converter_keeps_existing_output_without_overwrite(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("mine")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(OSError, match="is not empty"):
        convert_checkpoint(checkpoint, tmp_path / "out", with_processor=False)
    assert (tmp_path / "out" / "config.json").read_text() == "mine"
    convert_checkpoint(checkpoint, tmp_path / "out", with_processor=False, overwrite=True)
    assert RefTRConfig.from_pretrained(tmp_path / "out").d_model == 128
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    with pytest.raises(OSError, match="is a file"):
        convert_checkpoint(checkpoint, tmp_path / "out" / "notes.txt", with_processor=False)


def test_failed_conversion_leaves_no_files(checkpoint, tmp_path, monkeypatch):
    def fail(self, folder, *args, **kwargs):
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr(RefTRForVisualGrounding, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space"):
        convert_checkpoint(checkpoint, tmp_path / "out", with_processor=False)
    with pytest.raises(FileNotFoundError, match="There is no configuration"):
        convert_checkpoint(checkpoint, tmp_path / "out", config=tmp_path / "none.json", with_processor=False)
    assert os.listdir(tmp_path) == []


def test_converter_uses_cached_tokenizer_without_network(checkpoint, tokenizer, tmp_path, monkeypatch):
    calls = []
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, lambda *args, **kwargs: calls.append(args))
    cached = {}
    monkeypatch.setattr(convert_reftr_checkpoint, "try_to_load_from_cache", lambda name, file: cached.get(name))
    with pytest.raises(OSError, match=r"'bert-base-uncased' .* Give --tokenizer NAME .* --no_processor"):
        convert_checkpoint(checkpoint, tmp_path / "out")
    assert os.listdir(tmp_path) == []

    cached["google-bert/bert-base-uncased"] = f"{saved(tokenizer, tmp_path / 'cache')}/tokenizer.json"
    convert_checkpoint(checkpoint, tmp_path / "out")
    assert len(RefTRProcessor.from_pretrained(tmp_path / "out").tokenizer) == len(tokenizer)
    assert not calls


def test_converter_rejects_missing_or_too_large_tokenizer(checkpoint, tokenizer, tmp_path):
    with pytest.raises(OSError, match="There is no tokenizer at '/no/folder'"):
        convert_checkpoint(checkpoint, tmp_path / "out", tokenizer="/no/folder")
    larger = type(tokenizer).from_pretrained(saved(tokenizer, tmp_path / "tokenizer"))
    larger.add_tokens([f"word{number}" for number in range(120)])
    with pytest.raises(ValueError, match=f"{len(larger)} tokens, the checkpoint's text backbone has 120"):
        convert_checkpoint(checkpoint, tmp_path / "out", tokenizer=saved(larger, tmp_path / "tokenizer"))
    assert os.listdir(tmp_path) == ["tokenizer"]


class Attack:
    """An object that calls a function when it is unpickled without restriction."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks(target):
    """Return contents that would create `target`, and how they are written, by name."""
    system = Attack(os.system, f"touch {target}")
    code = f"open({str(target)!r}, 'w').close()"
    weights = {"vl_transformer.level_embed": torch.zeros(1, 8)}
    return {
        "zip file": ({"model": weights, "epoch": system}, {}),
        "legacy file": ({"model": weights, "epoch": system}, {"_use_new_zipfile_serialization": False}),
        "bare pickle": (system, None),
        "bare pickle of old protocol": (system, 2),
        "weight": ({"model": {**weights, "vl_transformer.a": system}}, {}),
        "args": ({"model": weights, "args": Attack(exec, code)}, {}),
        "args' attribute": ({"model": weights, "args": argparse.Namespace(lr=Attack(eval, code))}, {}),
        "optimizer state": ({"model": weights, "optimizer": {"state": {0: {"exp_avg": system}}}}, {}),
        "subprocess": ({"model": weights, "epoch": Attack(subprocess.call, ["touch", str(target)])}, {}),
        "nested": ({"model": weights, "epoch": Attack(np.dtype, Attack(exec, code))}, {}),
    }


@pytest.mark.parametrize("is_checked", [True, False])
@pytest.mark.parametrize("name", attacks("target"))
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_converter_rejects_malicious_files_without_side_effects(name, is_checked, tmp_path, monkeypatch, capsys):
    """Each of the two readers refuses on its own, even if the environment asks PyTorch for unrestricted pickles."""
    if not is_checked:
        monkeypatch.setattr(convert_reftr_checkpoint, "check_claims", lambda path: None)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    target, path = tmp_path / "run", tmp_path / "checkpoint.pth"
    content, writing = attacks(target)[name]
    if isinstance(writing, dict):
        torch.save(content, path, **writing)
    else:
        path.write_bytes(pickle.dumps(content, protocol=writing))
    assert not target.exists()
    with pytest.raises(SystemExit) as stop:
        run_main("--checkpoint", path, "--output_dir", tmp_path / "out", "--no_processor")
    assert stop.value.code.startswith(f"error: {path} ")
    assert ("is refused: it asks for " if is_checked else "cannot be read as a checkpoint") in stop.value.code
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.pth"]


@pytest.mark.parametrize(
    "call",
    [
        Attack(getattr, "text", "upper"),
        Attack(np.zeros, 3),
        Attack(np.load, "other.npy"),
        Attack(np.frombuffer, b"8 bytes."),
        Attack(torch.load, "other.pth"),
        Attack(dict.fromkeys, "ab"),
    ],
    ids=lambda call: call.call[0].__name__,
)
def test_read_weights_rejects_harmless_calls_outside_allowlist(call, tmp_path, monkeypatch):
    """Both readers call only what a checkpoint requires: an attack is composed of calls that look harmless."""
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": {"vl_transformer.level_embed": torch.zeros(1, 8)}, "epoch": call}, path)
    with pytest.raises(ValueError, match="is refused: it asks for "):
        read_weights(path)
    monkeypatch.setattr(convert_reftr_checkpoint, "check_claims", lambda path: None)
    with pytest.raises(ValueError, match="Weights only load failed"):
        read_weights(path)


def test_attacks_create_file_when_unpickled_without_restriction(tmp_path):
    for name, (content, _) in attacks(tmp_path / "run").items():
        pickle.loads(pickle.dumps(content))
        assert (tmp_path / "run").exists(), name
        (tmp_path / "run").unlink()


def test_convert_command_reports_refusal_without_traceback(run, tmp_path):
    torch.save({"model": Attack(os.system, f"touch {tmp_path / 'run'}")}, tmp_path / "checkpoint.pth")
    command = ["-m", "reftr_cli", "convert", "--checkpoint", tmp_path / "checkpoint.pth"]
    result = run(*command, "--output_dir", tmp_path / "out", "--no_processor", check=False)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {tmp_path / 'checkpoint.pth'} is refused: it asks for posix.system")
    assert "Traceback" not in result.stderr
    assert os.listdir(tmp_path) == ["checkpoint.pth"]


# getrusage would report the peak of the parent process if that was larger
MEASURED_RUN = """
import re, sys
from pathlib import Path
from reftr_cli.__main__ import main as run_command
from reftr_cli.convert import main
def memory(name):
    return 1024 * int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = memory("VmRSS")
main(sys.argv[1:])
sys.stderr.write(f"grown by {memory('VmHWM') - before}")
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc, which Linux has")
def test_converter_limits_time_and_memory_for_full_size_file(tmp_path):
    weights = {key: weight_by_rule(key, shape) for key, shape in FULL_SIZE["res_resnet50_bert"].items()}
    checkpoint, output = tmp_path / "checkpoint.pth", tmp_path / "out"
    torch.save(published_content(weights), checkpoint)
    result = subprocess.run(
        [sys.executable, "-c", MEASURED_RUN, "--checkpoint", checkpoint, "--output_dir", output, "--no_processor"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    growth, size = int(result.stderr.rsplit(" ", 1)[1]), checkpoint.stat().st_size
    assert size > 3 * 155e6 * 4
    assert 0 < growth < 2.5 * size, f"grown by {growth / size:.2f} times the file"
    checkpoint.unlink()

    model = RefTRForVisualGrounding.from_pretrained(output).eval()
    # weights mapped from a file are aligned differently from allocated ones, which changes the rounding
    model = copy.deepcopy(model)
    in_memory = RefTRForVisualGrounding(model.config).eval()
    in_memory.load_state_dict(convert_state_dict(weights, in_memory.state_dict()))
    inputs = {"pixel_values": torch.randn(1, 3, 192, 256), "input_ids": torch.tensor([[101, 1996, 2417, 4937, 102]])}
    with torch.no_grad():
        answer, expected = model(**inputs), in_memory(**inputs)
    assert torch.equal(answer.pred_boxes, expected.pred_boxes)
    assert torch.equal(answer.pred_masks, expected.pred_masks)
    shutil.rmtree(output)


def test_convert_command_rejects_options_without_effect(tmp_path):
    arguments = ["--checkpoint", str(tmp_path / "none.pth"), "--output_dir", str(tmp_path / "out")]
    for ignored in (["--config", "c"], ["--tokenizer", "t"], ["--no_processor"]):
        with pytest.raises(ValueError, match=f"{ignored[0]} has no effect with --to_published"):
            main([*arguments, "--to_published", *ignored])
    with pytest.raises(ValueError, match="--tokenizer has no effect with --no_processor"):
        main([*arguments, "--no_processor", "--tokenizer", "t"])
