"""
Every setting of the model either applies or is refused with a message, for every source of a model. Settings that are
not given are taken from the model.
"""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml

import train_reftr
from modeling_reftr import RefTRProcessor
from tests.helpers.golden import load_case, published_state_dict
from training_reftr.arguments import parse_arguments
from training_reftr.build import build_model, image_size_of
from training_reftr.checkpoints import checkpoints_of
from training_reftr.resuming import refuse_changes
from training_reftr.run import load_for_report
from training_reftr.settings import FIELDS, Scope, TrainingSettings, names_in_scope
from training_reftr.tokenizer_training import train_tokenizer


PATHS = ("new", "folder", "published", "evaluated folder", "evaluated published", "evaluated run", "resumed")
APPLIES, REFUSED, IS_THE_PATH, TESTED_ELSEWHERE = (
    "applies",
    "refused",
    "is the path",
    "test_starting_weights.py",
)
SIZES = {**dict.fromkeys(PATHS, APPLIES), "resumed": REFUSED}
STARTS = {**dict.fromkeys(PATHS, REFUSED), "new": TESTED_ELSEWHERE}
TABLE = {
    "image_size": SIZES,
    "keep_aspect_ratio": SIZES,
    "mask_resampling": SIZES,
    "max_text_length": SIZES,
    "size_divisor": SIZES,
    "attn_implementation": dict.fromkeys(PATHS, APPLIES),
    "model": {
        **dict.fromkeys(PATHS, REFUSED),
        **dict.fromkeys(("new", "folder", "published"), APPLIES),
    },
    "tokenizer": {
        **dict.fromkeys(PATHS, REFUSED),
        **dict.fromkeys(("new", "published", "evaluated published"), APPLIES),
    },
    "init_detr": STARTS,
    "init_backbone": STARTS,
    "init_text": STARTS,
    "init_from": {**dict.fromkeys(PATHS, IS_THE_PATH), "resumed": REFUSED},
}
# setting -> (arguments that change its value, check of the changed value)
VALUES = {
    "image_size": (["--image_size", "32"], lambda model, processor: image_size_of(processor.image_processor) == 32),
    "keep_aspect_ratio": (
        ["--keep_aspect_ratio", "false"],
        lambda model, processor: processor.image_processor.size.longest_edge is None,
    ),
    "mask_resampling": (
        ["--mask_resampling", "nearest-exact"],
        lambda model, processor: processor.image_processor.mask_resampling == "nearest-exact",
    ),
    "max_text_length": (
        ["--max_text_length", "12"],
        lambda model, processor: processor.max_expression_length == processor.max_caption_length == 12,
    ),
    "size_divisor": (["--size_divisor", "48"], lambda model, processor: processor.image_processor.size_divisor == 48),
    "attn_implementation": (
        ["--attn_implementation", "eager"],
        lambda model, processor: model.config._attn_implementation == "eager",
    ),
    "model": (["--model.dropout", "0.25"], lambda model, processor: model.config.dropout == 0.25),
    "tokenizer": (["--tokenizer", "{tokenizer}"], lambda model, processor: "zebra" in processor.tokenizer.get_vocab()),
    "init_detr": (["--init_detr", "detr.pth"], None),
    "init_backbone": (["--init_backbone", "timm"], None),
    "init_text": (["--init_text", "./bert"], None),
    "init_from": (["--init_from", "./elsewhere"], None),
}


@pytest.fixture(scope="module")
def files(tokenizer, trained, tmp_path_factory):
    """Write a published checkpoint with its tokenizer and another tokenizer; return them with a finished run."""
    folder = tmp_path_factory.mktemp("files")
    torch.save({"model": published_state_dict(load_case("rec_bert")[0]), "epoch": 3}, folder / "refcoco.pth")
    tokenizer.save_pretrained(folder / "own_tokenizer")
    train_tokenizer(["the zebra", "a red star"], max_length=64).save_pretrained(folder / "tokenizer")
    return SimpleNamespace(published=folder / "refcoco.pth", folder=folder, run=trained[0])


@pytest.fixture
def load(files, recipe, shapes):
    """Load model and processor from one of `PATHS` with additional command-line arguments."""

    def load_path(path, *argv):
        argv = [word.format(tokenizer=files.folder / "tokenizer") for word in argv]
        recipes = [] if path in ("folder", "published") else [str(recipe)]
        source = {
            "folder": ["--init_from", str(files.run)],
            "published": ["--init_from", str(files.published)],
            "evaluated folder": ["--eval_only", "--init_from", str(files.run)],
            "evaluated published": ["--eval_only", "--init_from", str(files.published)],
            "evaluated run": ["--eval_only", "--output_dir", str(files.run)],
            "resumed": ["--resume", "auto", "--output_dir", str(files.run)],
        }.get(path, [])
        if "published" in path and "--tokenizer" not in argv:
            source += ["--tokenizer", str(files.folder / "own_tokenizer")]
        args = parse_arguments([*recipes, *source, *argv])
        if path == "resumed":
            refuse_changes(args, checkpoints_of(files.run)[0])
            return train_reftr.prepare_run, None
        return load_for_report(args) if args.evaluation.eval_only else build_model(args, shapes["train"])

    return load_path


def test_every_setting_has_scope_and_model_settings_have_rows():
    assert {item.metadata["scope"] for item in FIELDS.values()} == set(Scope)
    assert all(item.metadata["help"].endswith((".", ":")) for item in FIELDS.values())
    assert TABLE.keys() == {*names_in_scope(Scope.MODEL), "attn_implementation"}
    assert VALUES.keys() == TABLE.keys()
    assert all(row.keys() == set(PATHS) for row in TABLE.values())
    # a default other than None would override the values of a loaded model
    assert all(TrainingSettings().to_flat()[name] in (None, {}) for name in names_in_scope(Scope.MODEL))


@pytest.mark.parametrize("path", PATHS)
def test_model_setting_applies_or_is_refused(load, path):
    before = load(path)  # the values of the recipe apply everywhere
    applied = []
    for setting, row in TABLE.items():
        argv, _ = VALUES[setting]
        if row[path] == REFUSED:
            with pytest.raises(ValueError, match=rf"\b{setting}\b.*="):
                load(path, *argv)
        elif row[path] == APPLIES:
            applied.append(setting)
    if path != "resumed":
        after = load(path, *(word for setting in applied for word in VALUES[setting][0]))
        for setting in applied:
            assert VALUES[setting][1](*after), (setting, path)
            assert not VALUES[setting][1](*before), (setting, path)


def test_loaded_model_keeps_its_sizes_if_none_are_given(files, tmp_path, shapes):
    processor = RefTRProcessor.from_pretrained(files.run)
    processor.image_processor.size = {"shortest_edge": 48, "longest_edge": 48}
    processor.image_processor.size_divisor = 16
    processor.max_expression_length = processor.max_caption_length = 9
    for file in files.run.iterdir():
        if file.suffix in (".json", ".safetensors"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    processor.save_pretrained(tmp_path)
    for argv in ([], ["--eval_only"]):
        args = parse_arguments(["--init_from", str(tmp_path), *argv])
        _, loaded = load_for_report(args) if argv else build_model(args, shapes["train"])
        assert image_size_of(loaded.image_processor) == 48
        assert (loaded.image_processor.size_divisor, loaded.max_caption_length) == (16, 9)


def test_evaluation_replaces_recipe_model_or_refuses_contradiction(files, recipe):
    """Let --init_from replace the model of a recipe; without it, recipe and checkpoint must agree."""
    args = parse_arguments([str(recipe), "--eval_only", "--init_from", str(files.run)])
    assert args.initialization.model == {}
    model, _ = load_for_report(parse_arguments([str(recipe), "--eval_only", "--output_dir", str(files.run)]))
    assert model.config.d_model == args.initialization.model.get("d_model", 32)
    other = parse_arguments([str(recipe), "--eval_only", "--output_dir", str(files.run), "--model.decoder_layers=6"])
    with pytest.raises(ValueError, match=r"model\.decoder_layers=6, but the model of .* has 2 there"):
        load_for_report(other)


def test_evaluation_of_model_with_missing_weights_is_refused(files, tmp_path):
    for file in files.run.iterdir():
        if file.suffix in (".json", ".safetensors"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "predict_masks": True}))
    with pytest.raises(ValueError, match=r"lacks \d+ of the weights .* the first is 'mask_head\."):
        load_for_report(parse_arguments(["--eval_only", "--init_from", str(tmp_path)]))


def test_evaluation_with_resume_file_is_refused(recipe):
    with pytest.raises(ValueError, match=r"resume='refcoco.pth' initializes training, and eval_only"):
        parse_arguments([str(recipe), "--eval_only", "--resume", "refcoco.pth"])
    assert parse_arguments([str(recipe), "--eval_only", "--resume", "auto"]).evaluation.eval_only


def test_recipe_card_and_report_state_actual_image_size(files, recipe, tmp_path):
    """Run the script: fine-tune a model of 64 pixels at 32 and at its own size, then evaluate at 48."""
    argv = [str(recipe), "--init_from", str(files.run), "--max_steps", "1", "--num_pictures", "0", "--output_dir"]
    train_reftr.main([*argv, str(tmp_path / "given"), "--image_size", "32"])
    train_reftr.main([*argv, str(tmp_path / "loaded"), "--image_size", "null"])
    for name, size in (("given", 32), ("loaded", 64)):
        folder = tmp_path / name
        assert image_size_of(RefTRProcessor.from_pretrained(folder).image_processor) == size
        assert yaml.safe_load((folder / "recipe.yaml").read_text())["image_size"] == size
        assert f"images of {size} pixels" in (folder / "README.md").read_text()
        assert json.loads((folder / "metrics.json").read_text())["image_size"] == size
    evaluation = ["--eval_only", "--dataset", "shapes", "--dataset_config", "{num_train: 48, image_size: 64}"]
    evaluation += ["--dataset_config.num_test", "2", "--dataset_config.num_validation", "9", "--num_workers", "0"]
    evaluation += ["--num_pictures", "0", "--data_cache_dir", str(tmp_path / "cache")]
    train_reftr.main([*evaluation, "--output_dir", str(tmp_path / "given"), "--image_size", "48"])
    assert json.loads((tmp_path / "given" / "metrics.json").read_text())["image_size"] == 48
    card = (tmp_path / "given" / "README.md").read_text()
    assert "images of 32 pixels" in card
    assert "On shapes, images of 48 pixels:" in card
